"""A model, a loss, its batches and its evaluation, tied together by a configuration."""

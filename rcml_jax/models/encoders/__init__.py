"""Towers and encoders as Flax modules; the only place that knows Hugging Face's classes."""

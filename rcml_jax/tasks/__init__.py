"""Data made ready for a method: splits, tokenizers, images, towers and their stored states."""

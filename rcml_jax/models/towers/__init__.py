"""Towers: plain Flax modules with the states of all tokens and Hugging Face's parameter trees."""

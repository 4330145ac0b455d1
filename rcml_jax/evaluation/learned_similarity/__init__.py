"""Similarities learned on frozen embeddings: their networks, closed-form maps and the search."""

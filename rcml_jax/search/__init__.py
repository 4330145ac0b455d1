"""Searching embedded catalogues under a relation."""

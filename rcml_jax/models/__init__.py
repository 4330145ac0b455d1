"""Flax modules; they know no loss."""

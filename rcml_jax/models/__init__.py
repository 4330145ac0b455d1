"""Flax modules; they know no loss. The names that a configuration may give are here."""

#: What of a frozen tower is its vector, and how its tokens become one; of `models.frozen`.
LAYERS = ("projected", "penultimate")
POOLINGS = ("auto", "first", "mean")

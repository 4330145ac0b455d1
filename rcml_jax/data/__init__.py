"""Sources of items, relations and pairs, and the batches made of them."""

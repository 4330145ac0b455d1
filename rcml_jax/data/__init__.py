"""Sources of items, relations and pairs, and the batches made of them."""

#: The texts of an article of N24News.
N24NEWS_TEXTS = ("headline", "caption", "abstract", "article")

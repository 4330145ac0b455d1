"""Slow NumPy twins of the retrieval measures, from the whole matrix of scores, query by query."""

import numpy as np


def order(scores, right):
    """Places of one query's gallery: falling score, then wrong before right, then place."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], right[j], j))


def rank(scores, right):
    """How many wrong items are not below the best of the right ones."""
    best = max(s for s, r in zip(scores, right, strict=True) if r)
    return sum(not s < best for s, r in zip(scores, right, strict=True) if not r)


def search(scores, right, k):
    """Lists (q, k), what of them is right, and ranks (q,)."""
    lists = [order(s, r)[:k] for s, r in zip(scores, right, strict=True)]
    flags = [[bool(r[j]) for j in places] for places, r in zip(lists, right, strict=True)]
    return (
        np.array(lists),
        np.array(flags),
        [rank(s, r) for s, r in zip(scores, right, strict=True)],
    )


def average_precision(flags, answers, k):
    total = 0.0
    for i in range(min(k, len(flags))):
        if flags[i]:
            total += sum(flags[: i + 1]) / (i + 1)
    return total / min(k, answers)


def measures(scores, right, ks=(1, 5, 10)):
    k = max(ks)
    _, flags, ranks = search(scores, right, k)
    result = {f"p@{n}": np.mean([sum(row[:n]) / n for row in flags]) for n in ks}
    result |= {f"r@{n}": np.mean([any(row[:n]) for row in flags]) for n in ks}
    result[f"map@{k}"] = np.mean(
        [average_precision(row, sum(r), k) for row, r in zip(flags, right, strict=True)]
    )
    result["mrr"] = np.mean([1 / (r + 1) for r in ranks])
    result["median_rank"] = np.median([r + 1 for r in ranks])
    return result | {"queries": len(ranks)}


def bootstrap_means(values, groups, draws):
    """Means of the values (q,) whose groups are drawn, a group as often as it is drawn."""
    found = []
    for draw in draws:
        chosen = [v for g in draw for v, own in zip(values, groups, strict=True) if own == g]
        found.append(np.mean(chosen))
    return found

"""Running top-K lists and ranks of many queries, fed block by block."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TopK:
    """The best k items of a gallery for each of q queries.

    indices, scores, relevance: (q, k), best first: gallery indices, their scores, and whether they
    are relevant; fewer columns if the gallery is smaller than k. Among equal scores the irrelevant
    ones come first, then the lower indices. rank: (q,) how many irrelevant items of the whole
    gallery score no less than the best of the relevant ones; 0 is best. relevant: (q,) number of
    relevant items.
    """

    indices: np.ndarray
    scores: np.ndarray
    relevance: np.ndarray
    rank: np.ndarray
    relevant: np.ndarray


class Best:
    """The best k items of each of some rows, so far; new ones wait until they are many."""

    def __init__(self, rows: int, k: int):
        self.scores = np.full((rows, k), -np.inf, np.float32)
        self.index = np.full((rows, k), -1, np.int64)
        self._new: list[tuple[np.ndarray, ...]] = []
        self._waiting = 0

    @property
    def floor(self) -> np.ndarray:
        """(rows,) scores that a later item has to exceed; it loses a tie."""
        return self.scores[:, -1]

    def add(self, row: np.ndarray, index: np.ndarray, scores: np.ndarray) -> None:
        """Take up items (n,); those of a row come in the order of their index if they tie."""
        self._new.append((row, index, scores))
        self._waiting += len(row)
        if self._waiting >= self.scores.size:
            self.merge()

    def merge(self) -> None:
        """Take up the items that wait."""
        rows, k = self.scores.shape
        old = np.repeat(np.arange(rows), k), self.index.reshape(-1), self.scores.reshape(-1)
        row, index, scores = (np.concatenate(parts) for parts in zip(old, *self._new, strict=True))
        kept = _first(row, scores, rows, k)
        self.index, self.scores = index[kept], scores[kept]
        self._new, self._waiting = [], 0


class Direction:
    """All queries of one direction, in blocks of `block`, and what is known of them so far.

    pairs: (p, 2) query and relevant item, every query in at least one; scores: (p,) theirs. The
    items that are added and counted are the irrelevant ones.
    """

    def __init__(self, pairs, scores, queries: int, gallery: int, k: int, block: int):
        self._pairs, self._scores, self._queries = pairs, scores, queries
        blocks = -(-queries // block)
        bar = np.full(blocks * block, -np.inf, np.float32)
        np.maximum.at(bar, pairs[:, 0], scores)
        #: (blocks, block) score of the best relevant item.
        self.bar = bar.reshape(blocks, block)
        #: (blocks, block) how many irrelevant items have reached it.
        self.count = np.zeros((blocks, block), np.int64)
        self.best = [Best(block, min(k, gallery)) for _ in range(blocks)]

    def state(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores that an item has to exceed to be listed, and to reach to be counted, (block,)."""
        return self.best[block].floor, self.bar[block]

    def found(self) -> TopK:
        """The lists, with the relevant items among them, and the ranks."""
        for best in self.best:
            best.merge()
        q = self._queries
        wrong, wrong_scores = (
            np.concatenate([getattr(best, name) for best in self.best])[:q]
            for name in ("index", "scores")
        )
        k = wrong.shape[1]
        query, item = self._pairs.T
        row = np.concatenate([np.repeat(np.arange(q), k), query])
        scores = np.concatenate([wrong_scores.reshape(-1), self._scores])
        kept = _first(row, scores, q, k)  # irrelevant before relevant if they tie
        indices = np.concatenate([wrong.reshape(-1), item])[kept]
        relevant = np.bincount(query, minlength=q)
        rank = self.count.reshape(-1)[:q]
        return TopK(indices, scores[kept], kept >= q * k, rank, relevant)


def _first(row: np.ndarray, scores: np.ndarray, rows: int, k: int) -> np.ndarray:
    """Indices (rows, k) of the k highest scores of each row, in order; the first of equals first.

    row, scores: (n,), at least k of each row.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes one of the two zeros
    falling = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    key = row.astype(np.uint64) << np.uint64(32) | falling
    counts = np.bincount(row, minlength=rows)
    first = np.cumsum(counts) - counts
    return np.argsort(key, kind="stable")[first[:, None] + np.arange(k)]


# The items nearest to one query of several modalities, block by block over mapped files.


_BLOCK_BYTES = 16 * 2**20


def nearest(
    vectors: Mapping[str, np.ndarray],
    has: Mapping[str, np.ndarray],
    query: Sequence[np.ndarray],
    k: int,
    *,
    leave_out: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and scores, (k,) each or fewer, of the best of n items for a query.

    vectors: of each modality (n, d), memory-mapped files among them, of any float type, unit
    vectors or zeros; has: of each (n,) bool, whether an item has it; query: unit vectors (d,), of
    one modality or several. A score is the mean cosine over all pairs of one of the query's vectors
    and one of the item's. An item that has nothing, and `leave_out`, are no candidates. Of equal
    scores the first comes first. The search is exact, in float32, and holds 16 MiB of rows.
    """
    return nearest_of_each(vectors, has, [query], k, leave_out=[leave_out])[0]


def nearest_of_each(
    vectors: Mapping[str, np.ndarray],
    has: Mapping[str, np.ndarray],
    queries: Sequence[Sequence[np.ndarray]],
    k: int,
    *,
    leave_out: Sequence[int | None],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `nearest` finds for each of several queries, in one pass over the items."""
    n = len(next(iter(vectors.values())))
    # The sum of all cosines is the product of the two sums.
    totals = [np.sum([np.asarray(x, np.float32) for x in query], axis=0) for query in queries]
    total, sides = np.stack(totals, axis=1), np.array([len(query) for query in queries], np.float32)
    best = Best(len(queries), min(k, n))
    step = max(1, _BLOCK_BYTES // (4 * len(total)))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        scores = np.zeros((part.stop - start, len(queries)), np.float32)
        count = np.zeros((part.stop - start, 1), np.float32)
        for name, rows in vectors.items():
            own = has[name][part, None]
            scores += np.where(own, rows[part].astype(np.float32) @ total, 0)
            count += own
        scores /= sides * np.maximum(count, 1)
        found = (count > 0) & (scores > best.floor)
        for q, item in enumerate(leave_out):
            if item is not None and start <= item < part.stop:
                found[item - start, q] = False
        index, column = np.nonzero(found)
        best.add(column, index + start, scores[index, column])
    best.merge()
    kept = best.index >= 0
    return [(best.index[q, kept[q]], best.scores[q, kept[q]]) for q in range(len(queries))]

"""The items nearest to one query of several modalities, block by block over mapped files."""

from collections.abc import Mapping, Sequence

import numpy as np

from rcml_jax.evaluation.toplists import Best

_BLOCK_BYTES = 16 * 2**20


def nearest(
    vectors: Mapping[str, np.ndarray],
    has: Mapping[str, np.ndarray],
    query: Sequence[np.ndarray],
    k: int,
    *,
    leave_out: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Places and scores, (k,) each or fewer, of the best of n items for a query.

    vectors: of each modality (n, d), memory-mapped files among them, of any float type, unit
    vectors or zeros; has: of each (n,) bool, whether an item has it; query: unit vectors (d,), of
    one modality or several. A score is the mean cosine over all pairs of one of the query's vectors
    and one of the item's. An item that has nothing, and `leave_out`, are no candidates. Of equal
    scores the first comes first. The search is exact, in float32, and holds 16 MiB of rows.
    """
    n = len(next(iter(vectors.values())))
    # The sum of all cosines is the product of the two sums.
    total = np.sum([np.asarray(vector, np.float32) for vector in query], axis=0)
    best = Best(1, min(k, n))
    step = max(1, _BLOCK_BYTES // (4 * len(total)))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        scores = np.zeros(part.stop - start, np.float32)
        count = np.zeros(part.stop - start, np.float32)
        for name, rows in vectors.items():
            scores += np.where(has[name][part], rows[part].astype(np.float32) @ total, 0)
            count += has[name][part]
        scores /= len(query) * np.maximum(count, 1)
        found = (count > 0) & (scores > best.floor[0])
        if leave_out is not None and start <= leave_out < part.stop:
            found[leave_out - start] = False
        places = np.flatnonzero(found)
        best.add(np.zeros_like(places), places + start, scores[places])
    best.merge()
    kept = best.index[0] >= 0
    return best.index[0][kept], best.scores[0][kept]

"""Search with a similarity of pairs that is no product of embeddings, strip by strip."""

from collections.abc import Callable

import numpy as np

from rcml_jax.evaluation.alignment import KS, measures
from rcml_jax.evaluation.answers import pairs_of_texts
from rcml_jax.evaluation.toplists import Found

#: Bytes a score needs in work: itself, its order, whether it is right.
_SCORE_BYTES = 32


def pair_retrieval(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    memory: int = 2**29,
) -> dict[str, dict[str, float]]:
    """The measures of both directions, as `alignment.retrieval` has them, under a learned score.

    score: (n, d), (m, d) → (n, m), larger for more similar. Of queries × gallery only a strip that
    fits `memory` bytes is held. Raises UserError for an image without a text.
    """
    pairs_of_texts(image_of_text, len(image), len(text))
    rows = np.asarray(image_of_text)
    images, texts = np.arange(len(image)), np.arange(len(text))

    def of_images(part: np.ndarray) -> Found:
        return _found(np.asarray(score(image[part], text)), rows == images[part][:, None])

    def of_texts(part: np.ndarray) -> Found:
        return _found(np.asarray(score(image, text[part])).T, rows[texts[part]][:, None] == images)

    return {
        "image_to_text": measures(_in_strips(of_images, len(image), len(text), memory)),
        "text_to_image": measures(_in_strips(of_texts, len(text), len(image), memory)),
    }


def _in_strips(
    search: Callable[[np.ndarray], Found], queries: int, gallery: int, memory: int
) -> Found:
    size = max(1, memory // (_SCORE_BYTES * gallery))
    parts = [search(np.arange(i, min(i + size, queries))) for i in range(0, queries, size)]
    names = ("index", "scores", "right", "rank", "answers")
    return Found(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


def _found(scores: np.ndarray, right: np.ndarray) -> Found:
    """A strip (q, n); wrong first in ties, NaN as in `ranking.candidate_ranks`."""
    best = np.max(np.where(right, scores, -np.inf), axis=1, keepdims=True)
    rank = np.sum(~right & ~(scores < best), axis=1)
    order = np.lexsort((right, -np.where(np.isnan(scores) & ~right, np.inf, scores)), axis=1)
    order = order[:, : max(KS)]
    take = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    return Found(order, take(scores), take(right), rank, right.sum(axis=1))

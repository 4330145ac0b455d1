"""Retrieval between images and texts under every similarity: precision, recall, MRR, mAP, ranks.

Ties count against the model: among equal scores the wrong ones come first.
"""

from collections.abc import Iterable

import numpy as np

from rcml_jax.evaluation.answers import pairs_of_texts
from rcml_jax.evaluation.rows import Source, check_rows, check_widths, open_rows
from rcml_jax.evaluation.streaming import MEMORY, search_both
from rcml_jax.evaluation.toplists import Found
from rcml_jax.similarity import SIMILARITIES

KS = (1, 5, 10)


def measures(found: Found, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """The measures of one direction, means over its queries as fractions.

    For each K of ks, of which the lists of `found` must have the largest: `p@K`, the share of the
    top K that is right (with a answers at most a / K), and `r@K`, whether any of them is. `mrr`:
    1 / rank of the best right answer in the whole gallery. `map@K` for the largest K: average
    precision over the top K, Σ_i≤K right_i · p@i / min(K, answers). `median_rank` of the best right
    answer, 1 at best; `queries`, their number.
    """
    longest = max(ks)
    queries, listed = found.right.shape
    # A list is shorter than K if the whole gallery is; the places left over hold nothing right.
    right = np.zeros((queries, max(longest, listed)))
    right[:, :listed] = found.right
    hits = right.cumsum(axis=1)
    result = {f"p@{k}": hits[:, k - 1].mean() / k for k in ks}
    result |= {f"r@{k}": (hits[:, k - 1] > 0).mean() for k in ks}
    precision = hits[:, :longest] / np.arange(1, longest + 1)
    average = (right[:, :longest] * precision).sum(axis=1) / np.minimum(longest, found.answers)
    result["mrr"] = (1 / (found.rank + 1)).mean()
    result[f"map@{longest}"] = average.mean()
    result["median_rank"] = np.median(found.rank + 1)
    return {name: float(value) for name, value in result.items()} | {"queries": queries}


def check_pairs(
    image: Source,
    text: Source,
    image_of_text: np.ndarray,
    *,
    similarities: Iterable[str] = tuple(SIMILARITIES),
) -> None:
    """Raise UserError, with the rows, unless images and texts can be searched for each other.

    Refused are widths that differ, rows with NaN or infinite entries, an index in `image_of_text`
    (m,) that is out of range, an image without a text, and rows that have no score under one of the
    similarities, such as zero vectors under "cosine".
    """
    images = open_rows("image", image, memory=MEMORY)
    texts = open_rows("text", text, memory=MEMORY)
    check_widths(images, texts)
    pairs_of_texts(image_of_text, len(images), len(texts))
    for similarity in similarities:
        check_rows(images, similarity)
        check_rows(texts, similarity)


def retrieval(
    image: Source,
    text: Source,
    image_of_text: np.ndarray,
    *,
    similarities: Iterable[str] = tuple(SIMILARITIES),
    ks: tuple[int, ...] = KS,
    memory: int = MEMORY,
    signed: str = "absolute",
) -> dict[str, dict[str, dict[str, float]]]:
    """The measures of both directions under each similarity.

    image (n, d), text (m, d), image_of_text (m,), memory and signed as in `streaming.search_both`.
    Returns {"image_to_text": {similarity: measures}, "text_to_image": {...}}; the first's queries
    are the images. Raises UserError as `check_pairs` does.
    """
    similarities = tuple(similarities)
    # Opened once: a model that embeds as it goes is not asked again for every similarity.
    image = open_rows("image", image, memory=memory // 4)
    text = open_rows("text", text, memory=memory // 4)
    check_pairs(image, text, image_of_text, similarities=similarities)
    result = {"image_to_text": {}, "text_to_image": {}}
    for similarity in similarities:
        found = search_both(
            image,
            text,
            image_of_text,
            similarity=similarity,
            k=max(ks),
            memory=memory,
            signed=signed,
        )
        for direction, of_direction in zip(result, found, strict=True):
            result[direction][similarity] = measures(of_direction, ks)
    return result

"""Which rows of a gallery are right for which query, as pairs of indices."""

from collections.abc import Sequence

import numpy as np

from rcml_jax.errors import UserError

Positives = np.ndarray | Sequence[Sequence[int]]
_NAMED = 5


def named(kind: str, index: np.ndarray) -> str:
    """What an error message calls some of many: "row 3", or "rows 3, 7, 8, 9, 12 and 40 more"."""
    listed = ", ".join(str(i) for i in index[:_NAMED])
    more = f" and {len(index) - _NAMED} more" if len(index) > _NAMED else ""
    plural = "queries" if kind == "query" else f"{kind}s"
    return f"{kind if len(index) == 1 else plural} {listed}{more}"


def pairs_of_positives(positives: Positives, queries: int, gallery: int) -> np.ndarray:
    """The distinct pairs (p, 2) of query and right answer, sorted.

    positives: (q,) for one right answer each, (q, p), or q sequences. Raises UserError for an index
    that is out of range and for a query without a right answer.
    """
    if len(positives) != queries:
        raise UserError(f"positives has {len(positives)} rows for {queries} queries")
    rows = [np.reshape(row, -1) for row in positives]
    query = np.repeat(np.arange(queries), [len(row) for row in rows])
    answers = _integers("positives", np.concatenate([row for row in rows if len(row)] or [[]]))
    _check_range("positives", answers, gallery, "gallery rows", "query", query)
    pairs = np.unique(np.stack([query, answers], axis=1), axis=0)
    _check_answers(pairs, queries, "query")
    return pairs


def pairs_of_texts(image_of_text: np.ndarray, images: int, texts: int) -> np.ndarray:
    """The pairs (texts, 2) of image and text, sorted.

    image_of_text: (texts,) index of each text's image. Raises UserError for an index that is out of
    range and for an image without a text, a query without a right answer.
    """
    image_of_text = _integers("image_of_text", image_of_text)
    if image_of_text.shape != (texts,):
        raise UserError(
            f"image_of_text has shape {image_of_text.shape}; it must give one image for each of "
            f"the {texts} texts"
        )
    text = np.arange(texts)
    _check_range("image_of_text", image_of_text, images, "images", "text", text)
    pairs = np.stack([image_of_text, text], axis=1)
    _check_answers(pairs, images, "image")
    return pairs[np.argsort(image_of_text, kind="stable")]


def _integers(name, values):
    values = np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise UserError(f"{name} must hold integers; its type is {values.dtype}")
    return values.astype(np.int64)


def _check_range(name, values, limit, of, kind, places):
    wrong = np.flatnonzero((values < 0) | (values >= limit))
    if len(wrong):
        raise UserError(
            f"{name} is out of range for {named(kind, np.unique(places[wrong]))}: it is "
            f"{values[wrong[0]]}, and there are {limit} {of}, counted from 0"
        )


def _check_answers(pairs, queries, kind):
    without = np.flatnonzero(np.bincount(pairs[:, 0], minlength=queries) == 0)
    if len(without):
        raise UserError(f"a query with no right answer: {named(kind, without)}")

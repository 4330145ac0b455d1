"""Search with a score of pairs: the same as the search of embeddings, whatever the strips."""

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation.cross_modal import pair_retrieval, retrieval


def data(seed=0, images=13, texts=29, width=3):
    """Small integers, so that there are ties, and exact ones."""
    rng = np.random.default_rng(seed)
    image, text = (rng.integers(-2, 3, (n, width)).astype(np.float32) for n in (images, texts))
    return (
        image,
        text,
        np.concatenate([np.arange(images), rng.integers(images, size=texts - images)]),
    )


def product(x, y):
    return np.asarray(x) @ np.asarray(y).T


@pytest.mark.parametrize("memory", [1, 32 * 29 * 4, 2**29])
def test_a_product_is_searched_as_embeddings_are(memory):
    pairs = data()
    expected = retrieval(*pairs, similarities=["dot"])
    found = pair_retrieval(product, *pairs, memory=memory)
    for direction, measures in found.items():
        assert measures == pytest.approx(expected[direction]["dot"]), direction


def test_scores_that_say_nothing_rank_last():
    pairs = data()
    found = pair_retrieval(lambda x, y: np.zeros((len(x), len(y))), *pairs)
    # Every wrong item comes before the right ones: of 13 images 12 do.
    assert found["text_to_image"]["mrr"] == pytest.approx(1 / 13)
    assert found["text_to_image"]["r@10"] == 0


def test_nan_is_below_nothing():
    pairs = data()
    scores = lambda x, y: np.full((len(x), len(y)), np.nan)  # noqa: E731
    found = pair_retrieval(scores, *pairs)
    assert found["text_to_image"]["median_rank"] == 13


def test_an_image_without_a_text_is_said():
    image, text, rows = data()
    with pytest.raises(UserError, match="image 0"):
        pair_retrieval(product, image, text, np.maximum(rows, 1))

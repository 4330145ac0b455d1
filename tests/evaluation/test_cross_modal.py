import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation import cross_modal
from rcml_jax.evaluation.cross_modal import search
from rcml_jax.ops import similarity as similarities
from tests import reference, reference_alignment


def pairs(n=23, m=70, d=16, seed=0):
    """Vectors of ±1, whose scores are exact and often tie; two or more texts for some images."""
    rng = np.random.default_rng(seed)
    image, text = (rng.choice([-1, 1], (rows, d)).astype(np.float32) for rows in (n, m))
    image_of_text = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, m - n)]))
    text[::3] = image[image_of_text[::3]]  # some right answers rank high
    return image, text, image_of_text


def test_measures_in_both_directions():
    image, text, image_of_text = pairs()
    right = image_of_text == np.arange(len(image))[:, None]
    result = cross_modal.retrieval(image, text, image_of_text, memory=2**19)
    assert list(result) == ["image_to_text", "text_to_image"]
    for direction in result.values():
        assert list(direction) == list(similarities.SIMILARITIES)
    for name in similarities.SIMILARITIES:
        scores = np.round(reference.matrix(getattr(reference, name), image, text), 6)
        for direction, s, r in (
            ("image_to_text", scores, right),
            ("text_to_image", scores.T, right.T),
        ):
            expected = reference_alignment.measures(s, r)
            assert result[direction][name] == pytest.approx(expected, rel=1e-9)
    assert (
        0 < result["image_to_text"]["cosine"]["p@5"] < result["image_to_text"]["cosine"]["r@5"] < 1
    )


def test_intervals_draw_groups_of_queries():
    rng = np.random.default_rng(3)
    groups, values, ranks = np.array([7, 2, 2, 5, 7, 5, 9]), rng.random(7), rng.integers(1, 9, 7)
    found = cross_modal.bootstrap_intervals({"mrr": values}, ranks, groups, samples=50, seed=1)
    rng = np.random.default_rng(1)
    draws = [np.array([2, 5, 7, 9])[rng.integers(4, size=4)] for _ in range(50)]
    means = reference_alignment.bootstrap_means(values, groups, draws)
    assert found["mrr"] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
    medians = [
        np.quantile(np.concatenate([ranks[groups == g] for g in d]), 0.5, method="inverted_cdf")
        for d in draws
    ]
    assert found["median_rank"] == np.quantile(medians, [0.025, 0.975]).tolist()


def test_intervals_of_many_queries_are_those_of_a_normal_distribution():
    values = np.random.default_rng(0).random(400) < 0.3
    found = cross_modal.bootstrap_intervals({"r@1": values}, np.ones(400), samples=2000)
    half = 1.96 * values.std() / np.sqrt(400)
    mean = values.mean()
    assert found["r@1"] == pytest.approx([mean - half, mean + half], abs=0.006)
    assert found["median_rank"] == [1, 1]
    image, text, image_of_text = pairs()
    result = cross_modal.retrieval(
        image, text, image_of_text, similarities=["cosine"], bootstrap=20, memory=2**19
    )
    for direction in result.values():
        (measures,) = direction.values()
        assert set(measures["interval"]) == set(cross_modal.INTERVALS)
        for name, (low, high) in measures["interval"].items():
            assert low <= measures[name] <= high


def test_a_gallery_smaller_than_k():
    image, text, image_of_text = pairs(3, 7)
    result = cross_modal.retrieval(image, text, image_of_text, similarities=["dot"], ks=(2, 20))
    right = image_of_text == np.arange(3)[:, None]
    scores = image @ text.T
    for direction, s, r in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        expected = reference_alignment.measures(s, r, ks=(2, 20))
        assert result[direction]["dot"] == pytest.approx(expected, rel=1e-9)


def test_perfect_and_collapsed_embeddings():
    eye = np.eye(12, dtype=np.float32)
    perfect = cross_modal.measures(search(eye, eye, positives=np.arange(12), similarity="cosine"))
    assert perfect == pytest.approx(
        {"p@1": 1, "p@5": 1 / 5, "p@10": 1 / 10, "r@1": 1, "r@5": 1, "r@10": 1}
        | {"mrr": 1, "map@10": 1, "median_rank": 1, "queries": 12}
    )
    ones = np.ones((12, 4), np.float32)
    collapsed = cross_modal.measures(
        search(ones, ones, positives=np.arange(12), similarity="cosine")
    )
    assert collapsed["r@10"] == collapsed["map@10"] == 0
    assert collapsed["median_rank"] == 12
    assert collapsed["mrr"] == pytest.approx(1 / 12)


def test_what_a_model_embeds_is_embedded_once():
    image, text, image_of_text = pairs()

    class Embedding:
        width, asked = text.shape[1], 0

        def __len__(self):
            return len(text)

        def block(self, start, stop):
            self.asked += stop - start
            return text[start:stop]

    source = Embedding()
    result = cross_modal.retrieval(image, source, image_of_text, similarities=["dot", "cosine"])
    assert source.asked == len(text)
    assert result == cross_modal.retrieval(
        image, text, image_of_text, similarities=["dot", "cosine"]
    )


def test_bad_pairs():
    image, text, image_of_text = pairs()
    cross_modal.check_pairs(image, text, image_of_text)
    zero = text.copy()
    zero[[3, 9]] = 0
    cross_modal.check_pairs(image, zero, image_of_text, similarities=["dot"])
    nan = image.copy()
    nan[17, 2] = np.nan
    for message, *bad in (
        ("image has width 16 and text 7", image, text[:, :7], image_of_text),
        ("image has NaN or infinite entries in row 17$", nan, text, image_of_text),
        (
            "text has only zeros, whose cosine is not defined, in rows 3, 9$",
            image,
            zero,
            image_of_text,
        ),
        (
            "no relevant item: image 17$",
            image,
            text,
            np.where(image_of_text == 17, 0, image_of_text),
        ),
        ("out of range for text", image, text, image_of_text + 1),
    ):
        with pytest.raises(UserError, match=message):
            cross_modal.check_pairs(*bad)
        with pytest.raises(UserError, match=message):
            cross_modal.retrieval(*bad)

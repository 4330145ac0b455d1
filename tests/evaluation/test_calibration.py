"""Calibrated similarities: twins, inverses, and what they do to order, sign and probability."""

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation import calibration
from rcml_jax.evaluation.calibration import (
    SPACES,
    calibration_error,
    fit_csls,
    fit_isotonic,
    fit_sigmoid,
    fit_signed,
    fit_zero,
    pair_scores,
    pool_violators,
    score_measures,
)
from tests import reference


def scores(seed, pairs=4000):
    """Matched and unrelated scores of a logistic model: the logit of a match is 8 s − 4."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(-0.2, 1.2, size=2 * pairs)
    matched = rng.random(len(s)) < 1 / (1 + np.exp(4 - 8 * s))
    return s[matched], s[~matched]


def cone(seed, images=80, width=6):
    """Embeddings in a narrow cone: two texts an image, all cosines above 0."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(images, width))
    rows = np.repeat(np.arange(images), 2)
    text = image[rows] + 0.3 * rng.normal(size=(2 * images, width))
    return (image + 4).astype(np.float32), (text + 3).astype(np.float32), rows


def test_zero_is_the_quantile_of_unrelated_pairs():
    _, unrelated = scores(0)
    for level in (0.5, 0.9, 0.99):
        found = fit_zero(unrelated, level)
        assert np.mean(found(unrelated) < 0) == pytest.approx(level, abs=2 / len(unrelated))
        assert np.mean(found(unrelated) < 0) >= level
        assert found(unrelated).std() == pytest.approx(1)
        np.testing.assert_allclose(found.inverse(found(unrelated)), unrelated)
    # With 99 pairs, a new one is below the largest with a probability of 0.99.
    assert fit_zero(np.arange(99.0), 0.99)(98.0) == pytest.approx(0, abs=1e-12)


def test_the_sigmoid_is_the_logistic_model():
    found = fit_sigmoid(*scores(0, 40_000), prior=0.5)
    # Half of the planted pairs are matched, so the prior is that of the model.
    assert found.scale == pytest.approx(8, rel=0.05)
    assert found.offset == pytest.approx(-4, rel=0.05)
    rare = fit_sigmoid(*scores(0, 40_000), prior=0.01)
    assert rare.offset - found.offset == pytest.approx(np.log(1 / 99), abs=0.3)
    # Scores that can be told apart leave the slope finite.
    assert np.isfinite(fit_sigmoid(np.ones(9), np.zeros(9)).scale)


@pytest.mark.parametrize("seed", range(3))
def test_pooling_is_the_nearest_rising_sequence(seed):
    values = np.random.default_rng(seed).normal(size=12) + np.linspace(0, 1, 12)
    found = pool_violators(values, np.ones(12))
    np.testing.assert_allclose(found, reference.isotonic(values), atol=1e-12)
    # A weight of two is the value twice.
    weight = np.random.default_rng(seed).integers(1, 4, size=12)
    twice = reference.isotonic(np.repeat(values, weight))
    np.testing.assert_allclose(np.repeat(pool_violators(values, weight), weight), twice, atol=1e-12)


def test_the_isotonic_map_is_a_probability_that_rises_strictly():
    matched, unrelated = scores(0)
    found = fit_isotonic(matched, unrelated)
    grid = np.linspace(-1, 2, 999)
    assert (np.diff(found(grid)) > 0).all()
    np.testing.assert_allclose(found.inverse(found(grid)), grid, atol=1e-6)
    inside = np.linspace(0, 1, 50)
    prior = len(matched) / (len(matched) + len(unrelated))
    found = fit_isotonic(matched, unrelated, prior=prior)
    np.testing.assert_allclose(found(inside), 1 / (1 + np.exp(4 - 8 * inside)), atol=0.08)


def test_the_calibration_error_is_that_of_its_bins():
    rng = np.random.default_rng(0)
    p, matched, weight = rng.random(50), rng.random(50) < 0.4, rng.random(50)
    p[:2] = 0, 1
    for bins in (1, 5, 15):
        found = calibration_error(p, matched, weight=weight, bins=bins)
        expected = reference.calibration_error(p, matched, weight, bins)
        assert found == pytest.approx(expected)
        assert found > 0.05
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_measures_of_scores():
    found = score_measures(scores(0), scores(1), level=0.9)
    matched, unrelated = scores(1)
    assert found["unrelated_negative"]["plain"] == np.mean(unrelated < 0)
    assert found["matched_positive"]["plain"] == np.mean(matched > 0)
    assert found["unrelated_negative"]["shifted"] == pytest.approx(0.9, abs=0.02)
    zero = np.quantile(scores(0)[1], 0.9)
    assert found["matched_positive"]["shifted"] == pytest.approx(np.mean(matched > zero), abs=0.01)
    assert max(found["calibration_error"].values()) < 0.03
    # Nothing to learn from: the signs are there, the probabilities are not.
    one = np.random.default_rng(0).normal(size=(2, 2000))
    assert score_measures((one[0] - 3, one[1]), tuple(one))["calibration_error"].keys() <= {
        "isotonic"
    }


def test_csls_is_that_of_the_definition():
    image, text, _ = cone(0, images=12)
    x, y, _ = cone(1, images=5)
    found = fit_csls(image, text, neighbors=3)
    product = found.image(x) @ found.text(y).T
    np.testing.assert_allclose(product, reference.csls(x, y, image, text, 3), atol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found.inverse(found.image(x)), unit, atol=1e-6)
    assert len(fit_csls(image, text, neighbors=3, references=4).references["text"]) == 4


@pytest.mark.parametrize("space", SPACES)
def test_unrelated_pairs_become_negative_and_the_order_stays(space):
    image, text, rows = cone(0, images=400)
    fitted = fit_signed(image, text, rows, space=space, level=0.95, pairs=5000)
    x, y, own = cone(1, images=150)
    found = fitted.image(x) @ fitted.text(y).T
    plain = calibration.dataclasses.replace(fitted, zero=None)
    before = plain.image(x) @ plain.text(y).T
    np.testing.assert_allclose(fitted.zero.inverse(found), before, atol=1e-6)
    assert (np.argmax(found, axis=1) == np.argmax(before, axis=1)).all()
    related = np.arange(150)[:, None] == own
    assert np.mean(found[~related] < 0) == pytest.approx(0.95, abs=0.02)
    assert np.mean(found[related] > 0) > 0.5
    if space == "cosine":
        assert (before > 0).all()
    i, j = np.nonzero(related)
    np.testing.assert_allclose(pair_scores(fitted.image(x), fitted.text(y), i, j), found[i, j])


EYE = np.eye(2)


def test_scores_that_cannot_be_calibrated_are_one_sentence():
    for call, message in (
        (lambda: fit_zero(np.ones(200)), "all unrelated scores are equal"),
        (lambda: fit_zero(np.arange(50.0)), "50 unrelated pairs are too few .* at least 99"),
        (lambda: fit_zero(np.arange(50.0), 1.0), "level=1.0 must be between 0 and 1"),
        (lambda: fit_zero(np.ones((2, 2))), r"one row of finite scores; its shape is \(2, 2\)"),
        (lambda: fit_sigmoid(np.zeros(5), np.arange(5.0)), "do not score higher"),
        (lambda: fit_sigmoid(np.ones(5), np.ones(5)), "all scores are equal"),
        (lambda: fit_isotonic(np.zeros(5), np.ones(5)), "do not score higher"),
        (lambda: fit_isotonic(np.ones(5), np.ones(5), prior=0), "prior=0 must be between"),
        (lambda: fit_csls(np.ones((3, 2)), np.ones((9, 2))), "from 1 to the 3 rows of image"),
        (lambda: fit_csls(np.ones((9, 2)), np.ones((9, 2)), neighbors=3, references=2), "at least"),
        (lambda: fit_signed(*cone(0), space="no"), "space='no' is unknown; choose one of cosine"),
        (lambda: fit_signed(*cone(0), pairs=0), "0 of the pairs of .* cannot be drawn"),
        (lambda: fit_signed(EYE, EYE, [0, 1], space="cosine"), "1 images and 1 texts"),
        (lambda: fit_zero(np.arange(200) * 1e-310), "too small or too large"),
        (lambda: fit_zero(np.arange(200) * 1e200), "too small or too large"),
        (lambda: fit_sigmoid(np.arange(5) * 1e-200, np.zeros(5)), "too small or too large"),
        (lambda: fit_isotonic(np.arange(5) * 1e-310, np.zeros(5)), "too small or too large"),
        (lambda: fit_zero(["a"]), "unrelated must be one row of finite scores"),
        (lambda: calibration_error([], []), "probability must be one row"),
        (lambda: calibration_error([np.nan], [1]), "probability must be one row"),
        (lambda: calibration_error([1.5], [1]), "from 0 to 1"),
        (lambda: calibration_error([0.5, 0.5], [1]), "a value of matched for each"),
        (lambda: calibration_error([0.5], [1], bins=0), "bins=0 must be at least 1"),
        (lambda: calibration_error([0.5], [1], weight=[0]), "some weight above 0"),
    ):
        with pytest.raises(UserError, match=message):
            call()

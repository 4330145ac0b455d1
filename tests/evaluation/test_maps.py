"""Maps between embeddings of separate towers: twins, and what each recovers of planted data."""

import importlib.util
import sys

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation.learned_similarity import maps
from rcml_jax.evaluation.learned_similarity.training import fit
from tests import reference

needs_ott = pytest.mark.skipif(not importlib.util.find_spec("ott"), reason="ott-jax is missing")


def matched(seed=0, rows=40, width=(4, 3), noise=0.3):
    """Centred rows of two modalities that share some of what they say."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width[0]))
    y = x @ rng.normal(size=width) + noise * rng.normal(size=(rows, width[1]))
    return x - x.mean(axis=0), y - y.mean(axis=0)


def test_procrustes_is_the_polar_factor():
    cross = np.random.default_rng(0).normal(size=(5, 5))
    found = maps.procrustes(cross)
    np.testing.assert_allclose(found, reference.nearest_rotation(cross), atol=1e-10)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_canonical_correlations_are_roots_of_eigenvalues(shrinkage):
    x, y = matched()
    moments = maps.moments(iter([(x[:9], y[:9]), (x[9:], y[9:])]))
    a, b, found = maps.cca(*moments, shrinkage=shrinkage)
    expected = reference.canonical_correlations(x, y, shrinkage)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert 0.1 < expected[-1] < expected[0] < 1
    # Variates have a variance of one under the shrunk covariance, and the correlations between.
    own = reference.shrunk(x.T @ x / len(x), shrinkage)
    np.testing.assert_allclose(a.T @ own @ a, np.eye(3), atol=1e-8)
    cross = (1 - shrinkage) * moments[2]
    np.testing.assert_allclose(a.T @ cross @ b, np.diag(found), atol=1e-8)
    narrow = maps.cca(*moments, shrinkage=shrinkage, width=2)
    np.testing.assert_array_equal(narrow[0], a[:, :2])


def test_kernel_cca_is_cca_of_kernel_features():
    x, y = matched(rows=12)
    rows = np.repeat(np.arange(12), 2)
    y = np.concatenate([y, y + 0.1])[np.argsort(np.tile(np.arange(12), 2), kind="stable")]
    found = maps.kernel_variates(*maps.kernel_features(x, y, rows, bandwidth=0.7), shrinkage=0.2)
    features = [reference.kernel_features(v, v, 0.7) for v in (x, y)]
    expected = reference.canonical_correlations(features[0][rows], features[1], 0.2)
    np.testing.assert_allclose(found["correlations"], expected[:12], atol=1e-3)
    variates = []
    for name, v in (("image", x), ("text", y)):
        side = found[name]
        kernel = reference.gaussian_kernel(v, np.asarray(side["landmarks"]), 0.7)
        np.testing.assert_allclose(
            maps.gaussian_kernel(v.astype(np.float32), side["landmarks"], side["bandwidth"]),
            kernel,
            atol=1e-5,
        )
        variates.append(kernel @ side["map"] - side["offset"])
    np.testing.assert_allclose(variates[0][rows].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(variates[1].mean(axis=0), 0, atol=1e-3)
    cross = 0.8 * variates[0][rows].T @ variates[1] / len(y)
    np.testing.assert_allclose(cross, np.diag(found["correlations"]), atol=2e-3)
    few = maps.kernel_variates(*maps.kernel_features(x, y, rows, landmarks=5))
    assert [len(few[name]["landmarks"]) for name in maps.MODALITIES] == [5, 5]


@pytest.mark.parametrize(("power", "kept"), [(1.0, None), (3.0, None), (2.0, 2), (1.0, 99)])
def test_relative_representations_are_cosines_with_anchors(power, kept):
    x, anchors = np.random.default_rng(0).normal(size=(2, 6, 4))
    found = maps.relative(x.astype(np.float32), anchors, power=power, kept=kept)
    expected = reference.relative(x, anchors, power, kept)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (expected == 0).sum() == (24 if kept == 2 else 0)


def test_anchors_are_images_and_the_means_of_their_texts():
    x, y = np.arange(8.0).reshape(4, 2), np.arange(10.0).reshape(5, 2)
    images, texts = maps.anchors_of_pairs(x, y, np.array([2, 0, 2, 3, 0]))
    np.testing.assert_array_equal(images, x[[0, 2, 3]])
    np.testing.assert_array_equal(texts, [(y[1] + y[4]) / 2, (y[0] + y[2]) / 2, y[3]])
    images, texts = maps.anchors_of_pairs(x, y, np.array([2, 0, 2, 3, 0]), limit=2)
    np.testing.assert_array_equal(images, x[[0, 3]])


# Planted maps


def planted(kind, seed, rows, width=4):
    """Texts that are a rotated copy of their images, or a nonlinear function of them."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(rows, width)) * np.linspace(1, 2, width)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    turn = np.random.default_rng(99).normal(size=(2, 6 * width, 6 * width))
    if kind == "rotated":
        text = image @ np.linalg.qr(turn[0][:width, :width])[0]
    else:
        # Even in every direction: no linear map of the images has anything of it.
        text = np.abs(image @ turn[0][:width]) - np.abs(image @ turn[1][:width])
    return image.astype(np.float32), text.astype(np.float32), np.arange(rows)


def recall(model, image, text, rows):
    return np.mean(np.argmax(np.asarray(model.score(image, text)), axis=0) == rows)


def test_a_rotated_copy_is_recovered_by_every_closed_form():
    train, test = planted("rotated", 0, 300), planted("rotated", 1, 50)
    options = {
        "procrustes": {},
        "cca": {"shrinkage": 1e-4},
        "kernel_cca": {"shrinkage": 1e-4, "landmarks": 300},
        "relative": {"kept": 20, "power": 2.0},
    }
    for name, chosen in options.items():
        assert recall(fit(name, *train, options=chosen), *test) > 0.9, name


def test_a_nonlinear_copy_needs_more_than_a_linear_map():
    train, test = planted("abs", 0, 600), planted("abs", 1, 50)
    validation = planted("abs", 2, 50)
    network = {"width": 64, "steps": 600, "learning_rate": 3e-3, "batch_size": 64}
    linear = [
        fit("procrustes", *train),
        fit("cca", *train),
        fit("two_tower", *train, validation, options=network),
    ]
    assert max(recall(model, *test) for model in linear) < 0.25
    layers = fit("two_tower_mlp", *train, validation, options=network)
    assert len(layers.params["image"]) == 2
    assert recall(layers, *test) > 0.6
    kernel = fit("kernel_cca", *train, options={"shrinkage": 1e-3, "landmarks": 600})
    assert recall(kernel, *test) > 0.4


@needs_ott
def test_clouds_are_matched_without_pairs():
    """The order of the texts says nothing; the shape of the cloud does."""
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(60, 3)) * [1.0, 2.0, 3.0]
    x -= x.mean(axis=0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(60)
    rotation, plan, *rows = maps.match_unpaired(x, (x @ turn)[order])
    np.testing.assert_allclose(rotation, turn, atol=1e-3)
    assert [r.tolist() for r in rows] == [list(range(60))] * 2
    assert (order[plan.argmax(axis=1)] == np.arange(60)).mean() > 0.9
    few, _, *rows = maps.match_unpaired(x, (x @ turn)[order], points=20, seed=1)
    assert [len(set(r)) for r in rows] == [20, 20]
    np.testing.assert_allclose(few @ few.T, np.eye(3), atol=1e-5)


@needs_ott
def test_the_matching_learner_looks_at_no_pair():
    image, text, rows = planted("rotated", 0, 50)
    shuffled = np.random.default_rng(0).permutation(rows)
    params = [fit("optimal_transport", image, text, r).params["rotation"] for r in (rows, shuffled)]
    np.testing.assert_allclose(*params, atol=1e-6)


def test_without_ott_the_sentence_names_the_extra(monkeypatch):
    maps._ott.cache_clear()
    monkeypatch.setitem(sys.modules, "ott.solvers", None)
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[alignment\]"'):
        maps.match_unpaired(*matched())

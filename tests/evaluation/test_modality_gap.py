import importlib.util
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from rcml_jax.errors import UserError
from rcml_jax.evaluation import modality_gap as gap
from rcml_jax.evaluation.modality_gap import (
    calibrate,
    gaussian_wasserstein2,
    modality_gap,
    negative_share,
)

needs_ott = pytest.mark.skipif(not importlib.util.find_spec("ott"), reason="ott-jax is missing")


def modalities(seed=0, images=40, texts=70, width=6):
    """Two clouds of unequal spread and place; some images have several texts, some none."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(images, width)) * np.linspace(0.2, 2, width) + 1
    rows = rng.integers(images, size=texts)
    text = image[rows] + rng.normal(size=(texts, width)) - 3
    return image.astype(np.float32), text.astype(np.float32), rows


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def covariance(seed, width=5, rank=None):
    x = np.random.default_rng(seed).normal(size=(rank or 3 * width, width))
    return x.T @ x / len(x)


def test_the_gap_is_that_of_the_definitions():
    image, text, rows = modalities()
    found = modality_gap(image, text, rows)
    x, y = unit(image), unit(text)
    c_x, c_y = np.cov(x.T, bias=True), np.cov(y.T, bias=True)
    shift = np.linalg.norm(x.mean(axis=0) - y.mean(axis=0))
    assert found["centroid"] == pytest.approx(shift, rel=1e-6)
    root = scipy.linalg.sqrtm(c_y)
    cross = np.trace(scipy.linalg.sqrtm(root @ c_x @ root)).real
    expected = np.sqrt(shift**2 + np.trace(c_x + c_y) - 2 * cross)
    assert found["wasserstein2"] == pytest.approx(expected, rel=1e-6)
    cosines = x @ y.T
    matched = np.zeros_like(cosines, bool)
    matched[rows, np.arange(len(rows))] = True
    assert found["matched_cosine"] == pytest.approx(cosines[matched].mean(), rel=1e-6)
    error = cosines[~matched].std() / np.sqrt(found["pairs"])
    assert found["random_cosine"] == pytest.approx(cosines[~matched].mean(), abs=5 * error)
    for name, z in (("image", x), ("text", y)):
        sigma = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
        share = sigma / sigma.sum()
        entropy = -np.sum(share * np.log(share))
        assert found["effective_rank"][name] == pytest.approx(np.exp(entropy), rel=1e-6)
        assert found["first_component"][name] == pytest.approx(sigma[0] ** 2 / np.sum(sigma**2))
        others = z @ z.T
        others = others[~np.eye(len(z), dtype=bool)]
        error = others.std() / np.sqrt(found["pairs"])
        assert found["random_within"][name] == pytest.approx(others.mean(), abs=5 * error)
    assert found["collapsed"] == found["warnings"] == []
    assert json.loads(json.dumps(found)) == found


def test_blocks_change_nothing(monkeypatch):
    whole = modality_gap(*modalities())
    monkeypatch.setattr(gap, "BLOCK", 7)
    parts = modality_gap(*modalities())
    for name in ("centroid", "wasserstein2", "matched_cosine", "random_cosine"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-12), name


def test_without_normalisation_a_shift_is_its_length():
    image = modalities()[0]
    found = modality_gap(image, image + 2, np.arange(len(image)), normalize=False)
    for name in ("centroid", "wasserstein2"):
        assert found[name] == pytest.approx(2 * np.sqrt(6), rel=1e-5)


def test_unmatched_pairs_are_all_the_others_equally_often():
    rows = np.array([0, 2, 2, 1])
    image, text = gap.unmatched_pairs(3, rows, 8000, seed=3)
    counts = np.zeros((3, 4))
    np.add.at(counts, (image, text), 1)
    matched = np.arange(3)[:, None] == rows
    assert (counts[matched] == 0).all()
    np.testing.assert_allclose(counts[~matched], 1000, atol=150)
    again = gap.unmatched_pairs(3, rows, 8000, seed=3)
    np.testing.assert_array_equal(image, again[0])
    assert (gap.unmatched_pairs(3, rows, 8000, seed=4)[0] != image).any()


@pytest.mark.parametrize("ranks", [(None, None), (None, 2), (2, 3)])
def test_gaussian_wasserstein_is_that_of_sqrtm(ranks):
    c_x, c_y = (covariance(seed, rank=rank) for seed, rank in enumerate(ranks))
    m_x, m_y = np.arange(5.0), np.ones(5)
    # sqrtm of a singular matrix is noise: the twin takes a nearby regular one.
    d_x, d_y = (c + 1e-9 * np.eye(5) for c in (c_x, c_y))
    root = scipy.linalg.sqrtm(d_y)
    cross = np.trace(scipy.linalg.sqrtm(root @ d_x @ root)).real
    expected = np.sqrt(np.sum((m_x - m_y) ** 2) + np.trace(d_x + d_y) - 2 * cross)
    assert gaussian_wasserstein2(m_x, c_x, m_y, c_y) == pytest.approx(expected, rel=1e-4)
    assert gaussian_wasserstein2(m_y, c_y, m_x, c_x) == pytest.approx(expected, rel=1e-4)


def test_gaussian_wasserstein_of_known_cases():
    one = lambda m, s: (np.array([m]), np.array([[s**2]]))  # noqa: E731
    assert gaussian_wasserstein2(*one(1.0, 2.0), *one(4.0, 6.0)) == pytest.approx(5.0)
    zero, a, b = np.zeros(3), np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.0, 0.0])
    # Of diagonal covariances: the distance between the vectors of deviations.
    apart = np.linalg.norm(np.sqrt(a) - np.sqrt(b))
    assert gaussian_wasserstein2(zero, np.diag(a), zero, np.diag(b)) == pytest.approx(apart)
    for c in (covariance(0), covariance(1, rank=2), np.zeros((5, 5))):
        assert gaussian_wasserstein2(np.ones(5), c, np.ones(5), c) < 1e-6


def test_a_collapsed_embedding_is_named():
    rng = np.random.default_rng(0)
    point = np.ones((30, 4)) + 0.01 * rng.normal(size=(30, 4))
    found = modality_gap(point, point, np.arange(30))
    assert found["collapsed"] == ["pairs", "image", "text"]
    assert all("the embedding has collapsed" in sentence for sentence in found["warnings"])
    # One modality alone, on the other side of the sphere.
    found = modality_gap(-point, rng.normal(size=(30, 4)), np.arange(30))
    assert found["collapsed"] == ["image"]


def test_rows_that_are_all_equal_have_rank_0():
    found = modality_gap(np.full((9, 4), 0.1), modalities(width=4)[1][:9], np.arange(9))
    assert found["effective_rank"]["image"] == 0
    assert found["first_component"]["image"] == 1
    assert found["collapsed"] == ["image"]


@needs_ott
def test_sinkhorn_and_sliced():
    image, text, rows = modalities(texts=40)
    sinkhorn, sliced = gap.sinkhorn_wasserstein2, gap.sliced_wasserstein2
    assert sinkhorn(image, image[::-1]) == sliced(image, image[::-1]) == 0
    cost = np.sum((image[:, None] - text) ** 2, axis=-1)
    best = np.sqrt(cost[scipy.optimize.linear_sum_assignment(cost)].mean())
    assert sinkhorn(image, text) == pytest.approx(best, rel=0.03)
    # A shift: its length, and over √d when seen along one direction at a time.
    assert sinkhorn(image, image + 1) == pytest.approx(np.sqrt(6), rel=1e-4)
    assert sliced(image, image + 1, projections=2000) == pytest.approx(1, rel=0.05)
    directions = np.random.default_rng(0).normal(size=(6, 4000))
    directions /= np.linalg.norm(directions, axis=0)
    sorted_gap = np.sort(image @ directions, axis=0) - np.sort(text @ directions, axis=0)
    expected = np.sqrt(np.mean(sorted_gap**2))
    assert sliced(image, text, projections=2000) == pytest.approx(expected, rel=0.05)
    for name, distance in (("sinkhorn", sinkhorn), ("sliced", sliced)):
        found = modality_gap(image, text, rows, wasserstein=name, points=40)
        assert found["wasserstein2"] == pytest.approx(distance(unit(image), unit(text)), rel=1e-5)
        assert (found["wasserstein"], found["points"]) == (name, 40)


def test_without_ott_the_sentence_names_the_extra(monkeypatch):
    gap._ott.cache_clear()
    for name in ("ott", "ott.geometry", "ott.tools"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sinkhorn", "sliced"):
        with pytest.raises(UserError, match=r'pip install "rcml_jax\[alignment\]"'):
            modality_gap(*modalities(), wasserstein=name)


def test_centring_takes_the_gap_and_whitening_the_cone():
    image, text, rows = modalities(images=200, texts=300)
    train = calibrate(image[:150], text[:250])
    np.testing.assert_allclose(train.means["image"], unit(image[:150]).mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(
        train.text(text[250:]), unit(text[250:]) - unit(text[:250]).mean(axis=0), atol=1e-6
    )
    white = calibrate(image, text, whiten=True, shrinkage=0.0)
    for x in (white.image(image), white.text(text)):
        np.testing.assert_allclose(np.cov(x.T, bias=True), np.eye(6), atol=1e-4)
    # ZCA: of all whitening maps the symmetric one.
    np.testing.assert_allclose(white.maps["text"], white.maps["text"].T, atol=1e-10)
    shrunk = calibrate(image, text, whiten=True, shrinkage=1.0)
    spread = np.trace(np.cov(unit(text).T, bias=True)) / 6
    np.testing.assert_allclose(shrunk.maps["text"], np.eye(6) / np.sqrt(spread), rtol=1e-4)
    centred = calibrate(image, text)
    found = modality_gap(centred.image(image), centred.text(text), rows, normalize=False)
    assert found["centroid"] < 1e-6 < 0.5 < modality_gap(image, text, rows)["centroid"]


def test_the_negative_share_is_that_of_the_unmatched_pairs():
    image, text, rows = modalities()
    cosines = unit(image) @ unit(text).T
    matched = np.arange(len(image))[:, None] == rows
    expected = np.mean(cosines[~matched] < 0)
    assert 0.5 < expected < 0.95
    assert negative_share(image, text, rows) == pytest.approx(expected, abs=0.03)
    cone = np.abs(image) + 1
    assert negative_share(cone, cone, np.arange(40)) == 0
    centred = calibrate(cone, cone)
    share = negative_share(centred.image(cone), centred.text(cone), np.arange(40))
    assert 0.3 < share < 0.7


def test_half_precision_is_read_as_float32():
    image, text, rows = modalities()
    half = modality_gap(jnp.asarray(image, jnp.bfloat16), text.astype(np.float16), rows)
    assert half["wasserstein2"] == pytest.approx(
        modality_gap(image, text, rows)["wasserstein2"], 0.01
    )


def test_seeds_make_the_figures():
    figures = [modality_gap(*modalities(), pairs=50, seed=seed) for seed in (0, 0, 1)]
    assert figures[0] == figures[1]
    assert figures[0]["random_cosine"] != figures[2]["random_cosine"]


def broken(**changes):
    arrays = dict(zip(("image", "text", "image_of_text"), modalities(), strict=True))
    return {k: change(arrays[k]) if (change := changes.get(k)) else arrays[k] for k in arrays}


def nan_in_row_3(x):
    return np.where(np.arange(len(x))[:, None] == 3, np.nan, x)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": lambda x: x[:, :5]}, "image has width 5 and text 6; project"),
        ({"image": lambda x: x[:1]}, r"image has shape \(1, 6\); it must be"),
        ({"text": lambda x: x[0]}, r"text has shape \(6,\); it must be"),
        ({"text": lambda x: x.astype(str)}, "text holds <U.* must be a matrix of real"),
        ({"text": nan_in_row_3}, "text holds NaN or infinity in row 3"),
        ({"image_of_text": lambda x: x[1:]}, r"shape \(69,\).* each of the 70 texts"),
        ({"image_of_text": lambda x: x * 1.0}, "image_of_text is float64"),
        ({"image_of_text": lambda x: x - x.min() - 1}, r"is -1, but image has the rows 0 to 39"),
        ({"image_of_text": lambda x: 0 * x + 40}, r"image_of_text\[0\] is 40"),
    ],
)
def test_what_cannot_be_compared_is_said(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        modality_gap(**broken(**changes))
    with pytest.raises(UserError, match=sentence):
        negative_share(**broken(**changes))


def test_what_cannot_be_calibrated_is_said():
    image, text, _ = modalities()
    with pytest.raises(UserError, match="covariance of text is singular; give more rows or raise"):
        calibrate(image, text[:4], whiten=True, shrinkage=0.0)
    with pytest.raises(UserError, match="covariance of image is singular; its rows are all equal"):
        calibrate(np.ones((5, 6)), text, whiten=True)
    with pytest.raises(UserError, match="shrinkage=2 must be from 0 to 1"):
        calibrate(image, text, shrinkage=2)
    with pytest.raises(UserError, match="image has width 3 and text 6"):
        calibrate(image[:, :3], text)
    with pytest.raises(UserError, match="text has width 3; the calibration was fitted on 6"):
        calibrate(image, text).text(text[:, :3])


@pytest.mark.parametrize("name", ["pairs", "points", "projections"])
def test_numbers_below_one_are_said(name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        modality_gap(*modalities(), **{name: 0})


def test_an_unknown_wasserstein_is_said():
    with pytest.raises(UserError, match="wasserstein='exact' is unknown; choose one of gaussian"):
        modality_gap(*modalities(), wasserstein="exact")


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_calibration_has_an_inverse(whiten, normalize):
    image, text, _ = modalities()
    fitted = calibrate(image, text, whiten=whiten, normalize=normalize)
    for name, x in (("image", image), ("text", text)):
        before = unit(x) if normalize else x
        back = fitted.inverse(name, getattr(fitted, name)(x))
        np.testing.assert_allclose(back, before, atol=1e-4)

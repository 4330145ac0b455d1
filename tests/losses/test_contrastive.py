"""The plain losses against their twins, and at the edges: masks, padding, extreme numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.losses import contrastive
from tests import reference
from tests.losses.plain import (
    ALL_LOSSES,
    PAIRED_OPTIONS,
    SOFTMAX_OPTIONS,
    embeddings,
    scores,
    soft_targets,
    value_and_slopes,
)

PAIRS = PAIRED_OPTIONS["pairs masked"]["where"]


def check(ours, twin, *arrays):
    """Value and gradients of our loss, under jit, are the twin's."""
    value, gradients = value_and_slopes(ours)(*arrays)
    np.testing.assert_allclose(value, twin(*arrays), rtol=2e-5, atol=1e-6)
    for a, e in zip(gradients, reference.gradient(twin, *arrays), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
        assert np.any(a != 0)


@pytest.mark.parametrize("options", SOFTMAX_OPTIONS.values(), ids=SOFTMAX_OPTIONS)
def test_softmax(options):
    check(
        partial(contrastive.softmax_contrastive, **options),
        partial(reference.softmax_contrastive, **options),
        scores(4, 6),
    )


@pytest.mark.parametrize("options", SOFTMAX_OPTIONS.values(), ids=SOFTMAX_OPTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce(options, normalize):
    options = {**options, "temperature": 0.3, "normalize": normalize}
    check(
        partial(contrastive.info_nce, **options),
        partial(reference.info_nce, **options),
        *embeddings(4, 6, 3),
    )


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
@pytest.mark.parametrize("options", PAIRED_OPTIONS.values(), ids=PAIRED_OPTIONS)
def test_paired_losses(name, options):
    # A milder bias than SigLIP's own, so that central differences can see every entry.
    options = {**options, "temperature": 0.4, **({"bias": -1.5} if name == "sigmoid" else {})}
    check(
        partial(getattr(contrastive, name), **options),
        partial(getattr(reference, name), **options),
        *embeddings(5, 5, 3),
    )


@pytest.mark.parametrize("labels", [[0, 1, 0, 0, 1], [2, -1, -1, 2, 7], [-1] * 5, [0] * 5])
@pytest.mark.parametrize("where", [None, np.array([1, 0, 1, 1, 1], bool), PAIRS])
def test_label_supervised(labels, where):
    labels = np.array(labels)
    check(
        lambda t, i: contrastive.label_supervised(t, i, labels, temperature=0.4, where=where),
        lambda t, i: reference.label_supervised(t, i, labels, temperature=0.4, where=where),
        *embeddings(5, 5, 3),
    )


@pytest.mark.parametrize(
    ("name", "n"), [("info_nce", 7), ("clip", 7), ("sigmoid", 7), ("clip", 1), ("sigmoid", 1)]
)
def test_default_options(name, n):
    pair = embeddings(n, n, 4)
    actual = getattr(contrastive, name)(*pair)
    np.testing.assert_allclose(actual, getattr(reference, name)(*pair), rtol=1e-5, atol=1e-6)


def test_unknown_labels_make_it_clip():
    pair = embeddings(6, 6, 4)
    unknown = contrastive.label_supervised(*pair, np.full(6, -1))
    np.testing.assert_allclose(unknown, contrastive.clip(*pair), rtol=1e-6)


def test_padding_equals_a_smaller_batch():
    text, image = embeddings(8, 8, 4)
    where = np.arange(8) < 5
    labels = np.array([0, 1, 0, -1, 1, 0, 1, 1])
    losses = {
        "clip": lambda t, i, l, **o: contrastive.clip(t, i, **o),
        "sigmoid": lambda t, i, l, **o: contrastive.sigmoid(t, i, **o),
        "label_supervised": lambda t, i, l, **o: contrastive.label_supervised(t, i, l, **o),
    }
    for loss in losses.values():
        whole = value_and_slopes(partial(loss, l=labels, where=where))
        padded, padded_slopes = whole(text, image)
        small, slopes = value_and_slopes(partial(loss, l=labels[:5]))(text[:5], image[:5])
        np.testing.assert_allclose(padded, small, rtol=1e-5)
        for a, e in zip(padded_slopes, slopes, strict=True):
            np.testing.assert_allclose(a[:5], e, rtol=1e-4, atol=1e-6)
            assert np.all(a[5:] == 0)


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_permutations(name):
    text, image = embeddings(6, 6, 4)
    order = np.random.default_rng(1).permutation(6)
    loss = getattr(contrastive, name)
    np.testing.assert_allclose(loss(text[order], image[order]), loss(text, image), rtol=1e-5)
    indices = np.argsort(order)
    np.testing.assert_allclose(
        loss(text, image[order], targets=indices), loss(text, image), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_text_and_image_are_interchangeable(name):
    text, image = embeddings(6, 6, 4)
    loss = getattr(contrastive, name)
    np.testing.assert_allclose(loss(image, text), loss(text, image), rtol=1e-6)


def test_row_softmax_of_two_is_the_logistic_function():
    logit = np.float32(1.7)
    actual = contrastive.softmax_contrastive(jnp.array([[logit, 0]]))
    np.testing.assert_allclose(actual, np.log1p(np.exp(-logit)), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"where": np.zeros(3, bool)},
        {"where": np.zeros((3, 3), bool), "targets": soft_targets(3, 3)},
        {"targets": np.full(3, -1)},
        {"targets": np.zeros((3, 3), np.float32)},
        {"weights": np.zeros(3, np.float32)},
    ],
)
def test_nothing_to_learn_from(options):
    loss = partial(contrastive.softmax_contrastive, **options)
    # Not compiled, so that a NaN is seen in any step on the way, even if it is masked at the end.
    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(loss)(scores(3, 3))
    assert value == 0
    assert np.all(gradient == 0)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_all_padding(name):
    loss = partial(getattr(contrastive, name), where=np.zeros(4, bool))
    value, gradients = value_and_slopes(loss)(*embeddings(4, 4, 3))
    assert value == 0
    assert all(np.all(g == 0) for g in gradients)


def test_infinite_logits_count_as_masked():
    logits = scores(4, 6)
    masked = np.random.default_rng(7).uniform(size=(4, 6)) < 0.4
    masked[1] = True
    infinite = np.where(masked, -np.inf, logits).astype(np.float32)
    for targets in (None, soft_targets(4, 6)):
        loss = partial(contrastive.softmax_contrastive, targets=targets)
        value, (gradient,) = value_and_slopes(loss)(infinite)
        np.testing.assert_allclose(value, loss(logits, where=~masked), rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_nan_logits_are_not_hidden():
    logits = scores(3, 3)
    logits[0, 1] = np.nan
    assert np.isnan(contrastive.softmax_contrastive(logits))


@pytest.mark.parametrize("targets", [None, soft_targets(3, 3)])
def test_extreme_logits(targets):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]], np.float32)
    loss = partial(contrastive.softmax_contrastive, targets=targets)
    with jax.debug_nans(True):
        value, (gradient,) = value_and_slopes(loss)(logits)
    np.testing.assert_allclose(value, reference.softmax_contrastive(logits, targets), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.any(gradient != 0)


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_tiny_temperature(name):
    pair = embeddings(5, 5, 4)
    loss = getattr(contrastive, name)
    temperature = np.float32(1e-4)
    value, slopes = value_and_slopes(lambda t, i, s: loss(t, i, temperature=s))(*pair, temperature)
    expected = getattr(reference, name)(*pair, temperature=float(temperature))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert all(np.isfinite(s).all() and np.any(s != 0) for s in slopes)


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_learned_temperature(name):
    pair = embeddings(5, 5, 4)
    scale = np.float32(0.5)
    loss = jax.jit(jax.grad(lambda s: getattr(contrastive, name)(*pair, temperature=s)))
    (expected,) = reference.gradient(
        lambda s: getattr(reference, name)(*pair, temperature=float(s)), scale
    )
    np.testing.assert_allclose(loss(scale), expected, rtol=1e-3)


def test_learned_bias():
    pair = embeddings(5, 5, 4)
    slope = jax.grad(lambda b: contrastive.sigmoid(*pair, temperature=0.5, bias=b))(-2.0)
    (expected,) = reference.gradient(
        lambda b: reference.sigmoid(*pair, temperature=0.5, bias=float(b)), -2.0
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_gradient_of_soft_targets():
    logits = scores(3, 4)
    targets = soft_targets(3, 4) + np.float32(0.1)
    where = np.array([1, 1, 0, 1], bool)
    actual = jax.grad(lambda t: contrastive.softmax_contrastive(logits, t, where=where))(targets)
    (expected,) = reference.gradient(
        lambda t: reference.softmax_contrastive(logits, t, where), targets
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_zero_embeddings_have_finite_gradients(loss):
    text, image = embeddings(4, 4, 3)
    text[1] = 0
    _, gradients = value_and_slopes(loss)(text, image)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


def test_wrong_shapes_are_refused():
    logits = scores(3, 4)
    with pytest.raises(ValueError, match=r"targets are int.* shape \(4,\)"):
        contrastive.softmax_contrastive(logits, np.arange(4))
    with pytest.raises(ValueError, match=r"targets are float32 of shape \(3,\)"):
        contrastive.softmax_contrastive(logits, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="4 rows have no diagonal in 3 columns"):
        contrastive.softmax_contrastive(logits.T)
    for loss in (contrastive.clip, contrastive.sigmoid):
        with pytest.raises(ValueError, match="must agree"):
            loss(*embeddings(3, 4, 2))

"""CLIP, SigLIP, UniCL and InfoNCE side by side: twins, padding, extreme numbers."""

from functools import partial

import jax
import numpy as np
import pytest

from rcml_jax.losses.clip import clip
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.unicl import label_supervised
from tests import reference
from tests.losses.plain import (
    ALL_LOSSES,
    LOSSES,
    PAIRED_OPTIONS,
    check,
    embeddings,
    value_and_slopes,
)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
@pytest.mark.parametrize("options", PAIRED_OPTIONS.values(), ids=PAIRED_OPTIONS)
def test_paired_losses(name, options):
    # A milder bias than SigLIP's own, so that central differences can see every entry.
    options = {**options, "temperature": 0.4, **({"bias": -1.5} if name == "sigmoid" else {})}
    check(
        partial(LOSSES[name], **options),
        partial(getattr(reference, name), **options),
        *embeddings(5, 5, 3),
    )


@pytest.mark.parametrize(
    ("name", "n"), [("info_nce", 7), ("clip", 7), ("sigmoid", 7), ("clip", 1), ("sigmoid", 1)]
)
def test_default_options(name, n):
    pair = embeddings(n, n, 4)
    actual = LOSSES[name](*pair)
    np.testing.assert_allclose(actual, getattr(reference, name)(*pair), rtol=1e-5, atol=1e-6)


def test_padding_equals_a_smaller_batch():
    text, image = embeddings(8, 8, 4)
    where = np.arange(8) < 5
    labels = np.array([0, 1, 0, -1, 1, 0, 1, 1])
    losses = {
        "clip": lambda t, i, l, **o: clip(t, i, **o),
        "sigmoid": lambda t, i, l, **o: sigmoid(t, i, **o),
        "label_supervised": lambda t, i, l, **o: label_supervised(t, i, l, **o),
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
    loss = LOSSES[name]
    np.testing.assert_allclose(loss(text[order], image[order]), loss(text, image), rtol=1e-5)
    indices = np.argsort(order)
    np.testing.assert_allclose(
        loss(text, image[order], targets=indices), loss(text, image), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_text_and_image_are_interchangeable(name):
    text, image = embeddings(6, 6, 4)
    loss = LOSSES[name]
    np.testing.assert_allclose(loss(image, text), loss(text, image), rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_all_padding(name):
    loss = partial(LOSSES[name], where=np.zeros(4, bool))
    value, gradients = value_and_slopes(loss)(*embeddings(4, 4, 3))
    assert value == 0
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_tiny_temperature(name):
    pair = embeddings(5, 5, 4)
    loss = LOSSES[name]
    temperature = np.float32(1e-4)
    value, slopes = value_and_slopes(lambda t, i, s: loss(t, i, temperature=s))(*pair, temperature)
    expected = getattr(reference, name)(*pair, temperature=float(temperature))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert all(np.isfinite(s).all() and np.any(s != 0) for s in slopes)


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_learned_temperature(name):
    pair = embeddings(5, 5, 4)
    scale = np.float32(0.5)
    loss = jax.jit(jax.grad(lambda s: LOSSES[name](*pair, temperature=s)))
    (expected,) = reference.gradient(
        lambda s: getattr(reference, name)(*pair, temperature=float(s)), scale
    )
    np.testing.assert_allclose(loss(scale), expected, rtol=1e-3)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_zero_embeddings_have_finite_gradients(loss):
    text, image = embeddings(4, 4, 3)
    text[1] = 0
    _, gradients = value_and_slopes(loss)(text, image)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


def test_texts_and_images_of_different_shapes_are_refused():
    for loss in (clip, sigmoid):
        with pytest.raises(ValueError, match="must agree"):
            loss(*embeddings(3, 4, 2))

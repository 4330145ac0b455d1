"""The plain losses in bfloat16, under vmap, in chunks of rows and on eight devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses.clip import clip
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce
from rcml_jax.losses.unicl import label_supervised
from tests.losses.plain import (
    ALL_LOSSES,
    LOSSES,
    PAIRED_OPTIONS,
    SOFTMAX_OPTIONS,
    embeddings,
    soft_targets,
    value_and_slopes,
)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_bfloat16_is_computed_in_float32(loss):
    text, image = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(6, 6, 8))
    value, gradients = value_and_slopes(loss)(text, image)
    exact, slopes = value_and_slopes(loss)(*(x.astype("f4") for x in (text, image)))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for a, e in zip(gradients, slopes, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype("f4"), e, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_vmap(loss):
    text, image = (
        np.stack(x) for x in zip(*(embeddings(4, 4, 3, seed) for seed in range(3)), strict=True)
    )
    single = jax.jit(loss)
    expected = np.stack([single(t, i) for t, i in zip(text, image, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(text, image), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_strict_promotion(loss):
    pair = [jnp.asarray(x) for x in embeddings(4, 4, 3)]
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(jax.grad(loss, (0, 1)))(*pair)


CHUNKED_OPTIONS = {
    "info_nce": [*SOFTMAX_OPTIONS.values(), {"normalize": False}],
    "clip": [*PAIRED_OPTIONS.values(), {"where": np.zeros(5, bool)}],
    "sigmoid": list(PAIRED_OPTIONS.values()),
    "label_supervised": [
        {"labels": np.array([2, -1, -1, 2, 0])},
        {"labels": np.array([0, 1, 0, 0, 1]), "where": np.array([1, 0, 1, 1, 1], bool)},
        {"labels": np.array([0, 1, 0, 0, 1]), **PAIRED_OPTIONS["pairs masked"]},
    ],
}


@pytest.mark.parametrize("name", CHUNKED_OPTIONS)
def test_chunks_of_rows_are_the_plain_form(name):
    """At a size that does not divide the rows, and for the temperature, too."""
    loss = LOSSES[name]
    pair = embeddings(4, 6, 3) if name == "info_nce" else embeddings(5, 5, 3)

    @partial(jax.jit, static_argnums=3)
    def every(text, image, temperature, chunk_size):
        return [
            jax.value_and_grad(
                lambda t, i, s, o=options: loss(t, i, temperature=s, **o, chunk_size=chunk_size),
                (0, 1, 2),
            )(text, image, temperature)
            for options in CHUNKED_OPTIONS[name]
        ]

    for chunk_size in (3, 99) if name == "label_supervised" else (3,):
        plain = every(*pair, np.float32(0.4), None)
        chunked = every(*pair, np.float32(0.4), chunk_size)
        for options, ours, theirs in zip(CHUNKED_OPTIONS[name], chunked, plain, strict=True):
            for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6, err_msg=str(options))
            if np.any(options.get("where", True)):
                assert all(np.abs(e).max() > 1e-3 for e in jax.tree.leaves(theirs))


def test_chunks_of_no_rows_are_refused():
    for loss in (info_nce, clip, sigmoid):
        with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
            loss(*embeddings(4, 4, 3), chunk_size=0)


def test_gradient_of_soft_targets_in_chunks():
    pair, targets = embeddings(5, 5, 3), soft_targets(5, 5)
    one, two = (
        jax.jit(jax.grad(lambda t, b=b: clip(*pair, targets=t, chunk_size=b)))(targets)
        for b in (None, 2)
    )
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    assert np.abs(one).max() > 1e-2


@pytest.mark.parametrize("name", ["info_nce", "clip", "sigmoid"])
def test_chunks_hold_a_part_of_the_similarities(name):
    n = 1024
    pair = [jax.ShapeDtypeStruct((n, 8), jnp.float32)] * 2

    def planned(chunk_size):
        loss = partial(LOSSES[name], chunk_size=chunk_size)
        plan = value_and_slopes(loss).lower(*pair).compile().memory_analysis()
        return plan.temp_size_in_bytes

    assert planned(64) < planned(None) / 5
    assert planned(None) > 4 * n * n


CHUNKED = {
    "info_nce, chunks": partial(info_nce, chunk_size=5),
    "clip, chunks": partial(clip, chunk_size=5),
    "sigmoid, chunks": partial(sigmoid, chunk_size=5),
    "label_supervised, chunks": lambda t, i: label_supervised(
        t, i, jnp.arange(t.shape[0]) // 3, chunk_size=5
    ),
}


@pytest.mark.parametrize("loss", CHUNKED.values(), ids=CHUNKED)
def test_chunks_under_vmap_and_strict_promotion(loss):
    text, image = (
        np.stack(x) for x in zip(*(embeddings(7, 7, 3, seed) for seed in range(3)), strict=True)
    )
    with jax.numpy_dtype_promotion("strict"):
        single = value_and_slopes(loss)
        expected = [single(t, i) for t, i in zip(text, image, strict=True)]
        actual = jax.jit(jax.vmap(single))(text, image)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", (ALL_LOSSES | CHUNKED).values(), ids=ALL_LOSSES | CHUNKED)
def test_eight_devices_equal_one(loss):
    pair = embeddings(32, 32, 8)
    devices = np.array(jax.devices())
    assert len(devices) == 8
    step = value_and_slopes(loss)
    sharding = NamedSharding(Mesh(devices, ("batch",)), PartitionSpec("batch"))
    value, gradients = step(*(jax.device_put(x, sharding) for x in pair))
    expected, slopes = step(*(jax.device_put(x, devices[0]) for x in pair))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, e in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)
        assert np.any(a != 0)

"""RCML's loss in bfloat16, under vmap, in chunks and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses.rcml import relation_contrastive
from tests.losses.relation_batch import make_batch


@pytest.mark.parametrize(("chunk_size", "pair_chunk_size"), [(None, None), (1, None), (1, 3)])
def test_eight_devices_equal_one(chunk_size, pair_chunk_size):
    (text, image, *pairs), options = make_batch(items=16, padded_items=3, groups=(6, 2, 8))
    devices = np.array(jax.devices())
    assert len(devices) == 8
    step = jax.jit(
        jax.value_and_grad(
            lambda t, i: relation_contrastive(
                t, i, *pairs, **options, chunk_size=chunk_size, pair_chunk_size=pair_chunk_size
            )[0],
            (0, 1),
        )
    )
    by_item = NamedSharding(Mesh(devices, ("batch",)), PartitionSpec(None, "batch"))
    value, gradients = step(*(jax.device_put(x, by_item) for x in (text, image)))
    expected, slopes = step(*(jax.device_put(x, devices[0]) for x in (text, image)))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, e in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
        assert np.any(a != 0)


def test_bfloat16_is_computed_in_float32():
    (text, image, *pairs), options = make_batch()
    text, image = jnp.asarray(text, jnp.bfloat16), jnp.asarray(image, jnp.bfloat16)
    loss, _ = relation_contrastive(text, image, *pairs, **options)
    exact, _ = relation_contrastive(text.astype("f4"), image.astype("f4"), *pairs, **options)
    assert loss.dtype == jnp.float32
    assert loss == exact
    slope = jax.grad(lambda t: relation_contrastive(t, image, *pairs, **options)[0])(text)
    assert slope.dtype == jnp.bfloat16
    assert np.isfinite(slope.astype("f4")).all()


@pytest.mark.parametrize(("chunk_size", "pair_chunk_size"), [(None, None), (1, None), (1, 3)])
def test_vmap(chunk_size, pair_chunk_size):
    batches = [make_batch(seed) for seed in range(3)]
    expected = [relation_contrastive(*arrays, **options)[0] for arrays, options in batches]
    arrays, options = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    actual = jax.vmap(
        lambda arrays, options: relation_contrastive(
            *arrays, **options, chunk_size=chunk_size, pair_chunk_size=pair_chunk_size
        )[0]
    )(arrays, options)
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_strict_promotion(chunk_size):
    arrays, options = jax.tree.map(jnp.asarray, make_batch())
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(
            jax.grad(
                lambda t: relation_contrastive(t, *arrays[1:], **options, chunk_size=chunk_size)[0]
            )
        )(arrays[0])


def value_and_gradients(arrays, options, **ways):
    """Loss, terms and gradients for the embeddings, compiled."""
    text, image, *pairs = arrays

    def loss(text, image):
        return relation_contrastive(text, image, *pairs, **options, temperature=0.3, **ways)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(text, image)


@pytest.mark.parametrize(
    "ways",
    [
        {"pair_chunk_size": 1},
        {"pair_chunk_size": 3, "chunk_size": 2},
        {"pair_chunk_size": 2, "chunk_size": 1, "remat": False},
        {"pair_chunk_size": 99, "chunk_size": 1},
    ],
)
def test_pairs_in_chunks_are_the_plain_form(ways):
    arrays, options = make_batch(groups=(7, 2, 5), items=9)
    expected, actual = (value_and_gradients(arrays, options, **w) for w in ({}, ways))
    assert all(np.abs(gradient).max() > 1e-2 for gradient in expected[1])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)


def test_chunks_of_no_pairs_are_refused():
    arrays, options = make_batch()
    with pytest.raises(ValueError, match="pair_chunk_size=0 must be at least 1"):
        relation_contrastive(*arrays, **options, pair_chunk_size=0)


@pytest.mark.parametrize(("relations", "most"), [(11, 2**31), (1, 2**30)])
def test_four_thousand_pairs_fit_into_memory(relations, most):
    """Value and gradient for 8,192 items of width 512, inputs and gradients included."""
    pairs, items, width = -(-4096 // relations), 8192, 512
    of = jax.ShapeDtypeStruct
    embeddings = of((relations, items, width), jnp.float32)
    index = of((relations, pairs), jnp.int32)
    options = {
        "pair_valid": of((relations, pairs), bool),
        "related": of((items, items), bool),
        "valid": of((items,), bool),
        "intra": of((relations,), bool),
    }

    def planned(**ways):
        def loss(text, image, anchor, positive, options):
            return relation_contrastive(text, image, anchor, positive, **options, **ways)[0]

        graded = jax.jit(jax.value_and_grad(loss, (0, 1)))
        plan = graded.lower(embeddings, embeddings, index, index, options).compile()
        plan = plan.memory_analysis()
        return plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes

    assert planned(chunk_size=1, pair_chunk_size=128) < most < 2**32
    assert planned() > 3 * 2**30

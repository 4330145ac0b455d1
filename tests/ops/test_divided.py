"""Embedding divided over devices is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.ops.divided import divided

ITEMS = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


@jax.jit
def embed(weights, items, scale):
    found = items @ weights
    return {"one": found[None] * scale[None], "two": jnp.stack([found, -found])}


@pytest.mark.parametrize("devices", [0, 1, 2, 8])
@pytest.mark.parametrize(("count", "chunk"), [(37, 256), (37, 3), (1, 4), (8, 1)])
def test_items_come_out_at_their_places(devices, count, chunk):
    asked = []

    def read(indices):
        asked.append(indices)
        indices = indices[::-1]
        return indices, (ITEMS[indices], np.float32(1) + indices[:, None].astype(np.float32))

    found = divided(
        embed,
        (WEIGHTS,),
        read,
        count,
        axis=1,
        devices=jax.devices()[:devices],
        chunk=chunk,
    )
    expected = ITEMS[:count] @ WEIGHTS
    np.testing.assert_allclose(found["two"], np.stack([expected, -expected]), rtol=1e-5, atol=1e-6)
    scaled = expected * (1 + np.arange(count)[:, None])
    np.testing.assert_allclose(found["one"], scaled[None], rtol=1e-5, atol=1e-5)
    # All chunks have one size, a multiple of the devices, and no item is left out.
    sizes = {len(indices) for indices in asked}
    assert len(sizes) == 1
    assert sizes.pop() % max(devices, 1) == 0
    assert set(np.concatenate(asked)) == set(range(count))


def test_inputs_are_split_over_the_devices_where_they_can_be():
    seen = []

    def look(items):
        seen.append(items.sharding.shard_shape(items.shape) if devices else items.shape)
        return items

    for devices in (jax.devices()[:4], ()):
        found = divided(look, (), lambda i: (i, (ITEMS[i],)), 32, devices=devices, chunk=8)
        np.testing.assert_array_equal(found, ITEMS[:32])
    assert seen == [(8, 5)] + 4 * [(8, 5)]

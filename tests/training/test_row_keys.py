"""Draws of a few rows against the rows of the whole draw, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rcml_jax.training.gradcache import _counters, rows_of

KEY = jax.random.key(5)
N, START, STRIDE, COUNT = 24, 2, 4, 6
ROWS = START + STRIDE * np.arange(COUNT)

DRAWS = {
    "bernoulli": lambda key, n: jax.random.bernoulli(key, 0.3, (n, 3)),
    "normal": lambda key, n: jax.random.normal(key, (n, 2, 5)),
    "uniform, one a row": lambda key, n: jax.random.uniform(key, (n,)),
    "bfloat16": lambda key, n: jax.random.uniform(key, (n, 7), jnp.bfloat16),
    "bytes": lambda key, n: jax.random.bits(key, (n, 3), "uint8"),
    "folded": lambda key, n: jax.random.normal(jax.random.fold_in(key, 9), (n, 3)),
    "split": lambda key, n: jax.random.normal(jax.random.split(key, (2, 2))[1, 0], (n, 3)),
    "dropout": lambda key, n: nn.Dropout(0.5, deterministic=False).apply(
        {}, jnp.ones((n, 8)), rngs={"dropout": key}
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_rows_are_those_of_the_whole_draw(name):
    draw = DRAWS[name]
    whole = np.asarray(draw(KEY, N).astype(jnp.float32))
    # The start is traced, as it is in a scan over parts.
    part = jax.jit(lambda start: draw(rows_of(KEY, start, STRIDE, COUNT), COUNT))(START)
    np.testing.assert_array_equal(part.astype(jnp.float32), whole[ROWS])
    assert len(np.unique(whole)) > 1


@pytest.mark.parametrize("shape", [(), (5, 3), (1, 6)])
def test_what_is_not_by_row_is_drawn_as_ever(shape):
    part = jax.random.normal(rows_of(KEY, START, STRIDE, COUNT), shape)
    np.testing.assert_array_equal(part, jax.random.normal(KEY, shape))


def test_keys_under_vmap_and_over_devices():
    starts = jnp.arange(STRIDE)

    def draw(start):
        return jax.random.normal(rows_of(KEY, start, STRIDE, COUNT), (COUNT, 3))

    parts = jax.vmap(draw)(starts)
    whole = jax.random.normal(KEY, (N, 3))
    np.testing.assert_array_equal(parts.swapaxes(0, 1).reshape(N, 3), whole)
    parts = jax.pmap(draw)(starts)
    np.testing.assert_array_equal(parts.swapaxes(0, 1).reshape(N, 3), whole)


def test_sixty_four_bits():
    with jax.enable_x64(True):
        whole = jax.random.bits(KEY, (N, 3), "uint64")
        part = jax.random.bits(rows_of(KEY, START, STRIDE, COUNT), (COUNT, 3), "uint64")
    assert part.dtype == np.uint64
    np.testing.assert_array_equal(part, whole[ROWS])


def test_places_beyond_four_thousand_million():
    rows = np.array([0, 1, 70_000, 2**32 - 1], np.uint32)
    shape = (4, 3, 50_001)
    high, low = _counters(jnp.asarray(rows), shape)
    places = rows[:, None].astype(np.uint64) * np.uint64(3 * 50_001)
    places = (places + np.arange(3 * 50_001, dtype=np.uint64)).reshape(shape)
    np.testing.assert_array_equal(high, places >> np.uint64(32))
    np.testing.assert_array_equal(low, places & np.uint64(2**32 - 1))


def test_another_generator_draws_anew():
    key = jax.random.key(5, impl="rbg")
    drawn = jax.random.normal(rows_of(key, START, STRIDE, COUNT), (COUNT,))
    expected = jax.random.normal(jax.random.fold_in(key, START), (COUNT,))
    np.testing.assert_array_equal(drawn, expected)


def test_a_raw_key_is_taken():
    raw = jax.random.key_data(KEY)
    drawn = jax.random.normal(rows_of(raw, START, STRIDE, COUNT), (COUNT,))
    np.testing.assert_array_equal(drawn, jax.random.normal(KEY, (N,))[ROWS])

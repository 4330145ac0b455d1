"""Dropout that draws as few bits as it needs: how often, how much, and row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.models.m3col import Dropout
from rcml_jax.training.gradcache import rows_of


def apply(rate, x, key, deterministic=False):
    return Dropout(rate).apply({}, x, deterministic=deterministic, rngs={"dropout": key})


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125, 0.1, 0.999])
def test_units_are_dropped_at_the_rate_and_the_others_scaled(rate):
    x = jax.random.normal(jax.random.key(0), (400, 3, 101)) + 3
    found = np.asarray(apply(rate, x, jax.random.key(1)))
    kept = found != 0
    share = round((1 - rate) * 256) / 256
    count = x.size
    assert abs(kept.mean() - share) < 4 * np.sqrt(share * (1 - share) / count) + 1e-9
    np.testing.assert_allclose(found[kept], np.asarray(x)[kept] / max(share, 1 / 256), rtol=1e-6)
    # Neighbours, which share a word of random bits, are independent.
    both = (kept[..., 1:] & kept[..., :-1]).mean()
    assert abs(both - share**2) < 0.01


def test_nothing_is_dropped_where_nothing_is_asked_for():
    x = jnp.ones((4, 5))
    for rate, deterministic in ((0.5, True), (0.0, False), (0.001, False)):
        np.testing.assert_array_equal(apply(rate, x, jax.random.key(0), deterministic), x)
    np.testing.assert_array_equal(apply(1.0, x, jax.random.key(0)), 0 * x)


def test_type_and_gradient():
    x = jnp.ones((6, 7), jnp.bfloat16)
    found, pull = jax.vjp(lambda x: apply(0.5, x, jax.random.key(2)), x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pull(jnp.ones_like(found))[0], found)  # 2 where kept, else 0


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1])
def test_a_part_of_the_batch_draws_its_own_rows(rate):
    x = jnp.ones((8, 45))
    whole = apply(rate, x, jax.random.key(3))
    part = apply(rate, x[1::2], rows_of(jax.random.key(3), 1, 2, 4))
    assert 0 < np.mean(whole == 0) < 1
    np.testing.assert_array_equal(part, whole[1::2])

"""Dropout by few bits, at a rate that is traced; tests/models/test_dropout.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.ops.dropout import LEVELS, keep_units


def test_a_traced_share_draws_the_same_units():
    x = jnp.ones((9, 11))
    for kept in (0, 1, 77, 255, LEVELS):
        static = keep_units(jax.random.key(1), x, kept)
        traced = jax.jit(keep_units)(jax.random.key(1), x, jnp.uint32(kept))
        np.testing.assert_array_equal(static, traced)
    np.testing.assert_array_equal(keep_units(jax.random.key(1), x, LEVELS), x)
    np.testing.assert_array_equal(keep_units(jax.random.key(1), x, 0), 0 * x)

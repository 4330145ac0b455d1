"""Dropout that draws no more random bits than its rate needs."""

import jax
import jax.numpy as jnp

#: Parts that a rate is rounded to.
LEVELS = 256
_WORD = 32


def keep_units(key: jax.Array, x: jax.Array, kept: int | jax.Array, *, bits: int = 8) -> jax.Array:
    """Units of x (..., f) are kept with the probability kept / `LEVELS` and scaled up, else 0.

    bits: 1, 2, 4 or 8 random ones a unit, of which kept · 2^bits has to be a multiple of `LEVELS`.
    JAX's own function draws 32, which in small layers on a CPU cost as much as a matrix product.
    The draws of a row do not depend on the other rows.
    """
    *shape, width = x.shape
    drawn = jax.random.bits(key, (*shape, -(-width * bits // _WORD)), jnp.uint32)
    shifts = jnp.arange(0, _WORD, bits, dtype=jnp.uint32)
    pieces = drawn[..., None] >> jnp.expand_dims(shifts, range(drawn.ndim))
    draws = (pieces % 2**bits).reshape(*shape, -1)[..., :width]
    scale = jnp.asarray(LEVELS / jnp.maximum(kept, 1), x.dtype)
    return jnp.where(draws < kept * 2**bits // LEVELS, x * scale, jnp.zeros((), x.dtype))

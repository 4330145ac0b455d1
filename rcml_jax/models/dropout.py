"""Dropout that draws a byte a unit."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_LEVELS = 256


class Dropout(nn.Module):
    """Units are 0 with the probability `rate`, rounded to a 256th; the others are scaled up.

    The distribution is `flax.linen.Dropout`'s at a quarter of its random bits, which in small
    layers on a CPU cost as much as a matrix product.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """x (..., f) → the same shape; draws from the random stream "dropout"."""
        kept = round((1 - self.rate) * _LEVELS)
        if deterministic or kept == _LEVELS:
            return x
        *shape, width = x.shape
        # Rows of their own words, so that a row's draws do not depend on the other rows.
        words = jax.random.bits(self.make_rng("dropout"), (*shape, -(-width // 4)), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape, -1)[..., :width]
        scale = jnp.asarray(_LEVELS / max(kept, 1), x.dtype)
        return jnp.where(draws < kept, x * scale, jnp.zeros((), x.dtype))

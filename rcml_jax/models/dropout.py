"""Dropout that draws no more bits than its rate needs."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_WORD = 32
_LEVELS = 256


class Dropout(nn.Module):
    """Units are 0 with the probability `rate`, rounded to a 256th; the others are scaled up.

    The distribution is `flax.linen.Dropout`'s, with one random bit a unit at a rate of 1/2, two at
    1/4 and eight at most instead of 32, which in small layers on a CPU cost as much as a matrix
    product.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """x (..., f) → the same shape; draws from the random stream "dropout"."""
        kept = round((1 - self.rate) * _LEVELS)
        if deterministic or kept == _LEVELS:
            return x
        bits = next(b for b in (1, 2, 4, 8) if kept * 2**b % _LEVELS == 0)
        *shape, width = x.shape
        # Rows of their own words, so that a row's draws do not depend on the other rows.
        words = (*shape, -(-width * bits // _WORD))
        drawn = jax.random.bits(self.make_rng("dropout"), words, jnp.uint32)
        pieces = drawn[..., None] >> jnp.arange(0, _WORD, bits, dtype=jnp.uint32)
        draws = (pieces % 2**bits).reshape(*shape, -1)[..., :width]
        scale = jnp.asarray(_LEVELS / max(kept, 1), x.dtype)
        return jnp.where(draws < kept * 2**bits // _LEVELS, x * scale, jnp.zeros((), x.dtype))

"""The heads that DeCLIP trains beside the towers and leaves behind afterwards."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-5


class WholeBatchNorm(nn.Module):
    """Batch norm by the mean and variance of the rows that count, without running statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """x (n, d), where (n,) bool, false for padding → (n, d); at least one row must count."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        counted = where[:, None]
        mean = jnp.mean(x, axis=0, where=counted)
        variance = jnp.mean((x - mean) ** 2, axis=0, where=counted)
        return (x - mean) * jax.lax.rsqrt(variance + _EPSILON) * scale + bias


class SimSiamHeads(nn.Module):
    """SimSiam's projector and predictor (Chen & He, 2021, Section 3), d wide.

    Projector: three layers, each with batch norm, ReLU between them. Predictor: two layers with a
    quarter of the width between them, batch norm and ReLU on the hidden one. They need the whole
    batch, because of the batch norm.
    """

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeddings (n, d) and where (n,) bool → predictions p and projections z, (n, d) each."""
        width, z = x.shape[-1], x
        for layer in range(3):
            z = nn.relu(z) if layer else z
            z = nn.Dense(width, use_bias=False, name=f"projector_{layer}")(z)
            z = WholeBatchNorm(name=f"projector_norm_{layer}")(z, where)
        hidden = nn.Dense(max(width // 4, 1), use_bias=False, name="predictor_0")(z)
        hidden = nn.relu(WholeBatchNorm(name="predictor_norm")(hidden, where))
        return nn.Dense(width, name="predictor_1")(hidden), z


class TokenHead(nn.Module):
    """BERT's head for masked tokens before its tied output layer, and that layer's bias.

    width: of the token embeddings; vocab_size: the number of ids.
    """

    width: int
    vocab_size: int

    @nn.compact
    def __call__(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token states (n, k, d) → (n, k, width), and the bias (vocab_size,)."""
        hidden = nn.gelu(nn.Dense(self.width, name="dense")(states))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        return nn.LayerNorm(name="norm")(hidden), bias

"""M3CoL's model: an encoder for each modality, uni-modal classifiers and a fusion classifier."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rcml_jax.ops.dropout import LEVELS, keep_units


class Dropout(nn.Module):
    """Units are 0 with the probability `rate`, rounded to a 256th; the others are scaled up.

    The distribution is `flax.linen.Dropout`'s, with one random bit a unit at a rate of 1/2, two at
    1/4 and eight at most (`keep_units`).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """x (..., f) → the same shape; draws from the random stream "dropout"."""
        kept = round((1 - self.rate) * LEVELS)
        if deterministic or kept == LEVELS:
            return x
        bits = next(b for b in (1, 2, 4, 8) if kept * 2**b % LEVELS == 0)
        return keep_units(self.make_rng("dropout"), x, kept, bits=bits)


_GLOROT = nn.initializers.glorot_normal()


class MLP(nn.Module):
    """Linear layers with ReLU and dropout between them: (n, f) → (n, widths[-1]).

    Glorot normal weights and zero biases, as in the authors' omics models.
    """

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Apply the layers; dropout draws from the random stream "dropout"."""
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, kernel_init=_GLOROT, dtype=self.dtype)(x)
            if index + 1 < len(self.widths):
                x = Dropout(self.dropout)(nn.relu(x), deterministic=deterministic)
        return x


class TableEncoder(nn.Module):
    """Scaled columns, then an MLP.

    The parameters `low` and `range` (f,), which are subtracted and divided by, start as 0 and 1;
    `SCALINGS` gives the true ones, which are not to be trained.
    """

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Features (n, f) → embeddings (n, widths[-1])."""
        low = self.param("low", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        span = self.param("range", nn.initializers.ones, x.shape[-1:], jnp.float32)
        # Not trained; their gradient would cost as much as the first layer's forward pass.
        low, span = jax.lax.stop_gradient((low, span))
        mlp = MLP(self.widths, self.dropout, self.dtype, name="mlp")
        return mlp((x - low[None]) / span[None], deterministic=deterministic)


def column_range(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Minimum and span (f,) of the columns of x (n, f) over the rows `where` (n,).

    A constant column has the largest span there is, so that it becomes 0, whatever other rows have
    there: its weights are not trained.
    """
    rows = where[:, None]
    largest = jnp.finfo(x.dtype).max
    low = jnp.min(jnp.where(rows, x, largest / 2), axis=0)
    span = jnp.max(jnp.where(rows, x, -largest / 2), axis=0) - low
    return low, jnp.where(span > 0, span, largest)


def column_moments(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (f,) of the columns of x (n, f) over the rows `where` (n,).

    A column counts as constant, and becomes 0 as by `column_range`, where its deviation is at most
    1e-6 · (1 + |mean|). Towers have dead units, of 1e-32, that would otherwise be scaled-up noise.
    """
    low, span = column_range(x, where)
    rows, count = where[:, None], where.sum(dtype=x.dtype)
    # In units of the span, whose squares stay numbers where entries are huge.
    scaled = jnp.where(rows, (x - low[None]) / span[None], 0)
    mean = scaled.sum(axis=0) / count
    deviation = jnp.sqrt(jnp.square(jnp.where(rows, scaled - mean[None], 0)).sum(axis=0) / count)
    mean, deviation = low + span * mean, span * deviation
    constant = deviation <= 1e-6 * (1 + jnp.abs(mean))
    return mean, jnp.where(constant, jnp.finfo(x.dtype).max, deviation)


#: To [0, 1] by minimum and maximum, as MOGONET's tables; to mean 0 and deviation 1.
SCALINGS = {"range": column_range, "standard": column_moments}


class M3CoL(nn.Module):
    """Encoders by the name of their modality, and the classifiers on their embeddings.

    encoders: name → module from an input to (n, d); the order of the names is that of the
    concatenation. hidden: the widths of the classifiers' hidden layers. unimodal: whether there is
    a classifier for each modality, too. projections: name → linear map of its states, for encoders
    of several widths.
    """

    encoders: Mapping[str, nn.Module]
    classes: int
    hidden: tuple[int, ...]
    unimodal: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    projections: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)

    def setup(self):
        """Create the classifiers."""
        widths = (*self.hidden, self.classes)
        self.fusion = MLP(widths, self.dropout, self.dtype)
        if self.unimodal:
            self.heads = {name: MLP(widths, self.dropout, self.dtype) for name in self.encoders}

    def encode(self, name: str, inputs: tuple, *, deterministic: bool = True) -> jax.Array:
        """The embeddings (n, d) of one modality, not normalised; `inputs`: its arrays."""
        return self._projected(name, self.encoders[name](*inputs, deterministic=deterministic))

    def tokens(self, name: str, inputs: tuple) -> jax.Array:
        """The states (n, l, d) of one image or text modality before pooling, without dropout."""
        return self._projected(name, self.encoders[name].tokens(*inputs))

    def _projected(self, name: str, states: jax.Array) -> jax.Array:
        return self.projections[name](states) if name in self.projections else states

    def classify(
        self, embeddings: Mapping[str, jax.Array], *, deterministic: bool = True
    ) -> dict[str, jax.Array]:
        """Logits (n, classes) in float32: "fused", and by the name of each modality."""
        joint = jnp.concatenate([embeddings[name] for name in self.encoders], axis=-1)
        logits = {"fused": self.fusion(joint, deterministic=deterministic)}
        if self.unimodal:
            for name, head in self.heads.items():
                logits[name] = head(embeddings[name], deterministic=deterministic)
        return {name: x.astype(jnp.float32) for name, x in logits.items()}

    def __call__(
        self, inputs: Mapping[str, tuple], *, deterministic: bool = True
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Inputs by modality → embeddings and logits."""
        embeddings = {
            name: self.encode(name, inputs[name], deterministic=deterministic)
            for name in self.encoders
        }
        return embeddings, self.classify(embeddings, deterministic=deterministic)

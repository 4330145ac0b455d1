"""MultiSClip, the soft-target loss of M3CoL (arXiv 2409.17777, Eq. 9–11 and 13)."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, lowest, map_rows, unstack
from rcml_jax.losses.m3co import (
    bidirectional,
    check_modalities,
    chunked_bidirectional,
    over_temperature,
)
from rcml_jax.ops.similarity import l2_normalize


def multi_soft_clip(
    embeddings: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
    stop_gradient_targets: bool = False,
    chunk_size: int | None = None,
) -> jax.Array:
    """MultiSClip: similarities within one modality are the targets across (Eq. 9–11, 13).

    For modalities 1 and 2, with w¹_il = softmax_l(p¹_i·p¹_l/τ) and L_sim of `m3co`,
    L¹ = 1/N Σ_i Σ_l w¹_il [L_sim(p²_i, p¹; l) + L_sim(p¹_l, p²; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2, summed over pairs of modalities.

    embeddings: M ≥ 2 arrays (n, d), normalised here. where: (n,) bool, false for padding.
    stop_gradient_targets: stop the gradient through w; in the paper it flows. chunk_size: samples
    compared at a time, or None for all; with it memory grows with chunk_size × n, not n × n.
    Raises ValueError for shapes that do not fit.
    """
    check_modalities(embeddings)
    units = [l2_normalize(x) for x in embeddings]
    if chunk_size is not None:
        return _chunked(units, temperature, where, stop_gradient_targets, chunk_size)
    valid = all_valid(where, len(units[0]))
    weights = [_weights(over_temperature(_gram(x), temperature), valid) for x in units]
    if stop_gradient_targets:
        weights = jax.lax.stop_gradient(weights)
    total: Any = 0.0
    for a, b in itertools.combinations(range(len(units)), 2):
        # L² has the targets w² on these logits, and L¹ has w¹ on the transposed ones.
        logits = over_temperature(units[a] @ units[b].T, temperature)
        targets = weights[b] + weights[a].T
        total += bidirectional(logits, targets, where, temperature) / 2
    return total


def _weights(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Softmax of each row (n, n) over the valid columns."""
    return jax.nn.softmax(jnp.where(valid[None], logits, lowest(logits.dtype)), axis=1)


@jax.custom_vjp
def _gram(x: jax.Array) -> jax.Array:
    """x @ x.T, whose gradient is one product, (G + Gᵀ) x, instead of two.

    `benchmarks/m3col_losses.py`.
    """
    return x @ x.T


_gram.defvjp(lambda x: (x @ x.T, x), lambda x, g: ((g + g.T) @ x,))


def _chunked(units, temperature, where, stop_gradient_targets, chunk_size):
    """`multi_soft_clip` of unit vectors, `chunk_size` samples at a time.

    A chunk has rows of w² but columns of w¹. Similarities within a modality are symmetric, so with
    r_i = log Σ_l exp(s_il) both come from the chunk's s_il: w_il = exp(s_il − r_i) and
    w_li = exp(s_il − r_l). The r of all samples are computed first.
    """
    valid = all_valid(where, len(units[0]))

    def similarities(rows):
        pairs = zip(rows, units, strict=True)
        return [over_temperature(x @ y.T, temperature) for x, y in pairs]

    def log_sums(index, rows):
        del index
        logits = (jnp.where(valid[None], s, lowest(s.dtype)) for s in similarities(rows))
        return [jax.nn.logsumexp(s, axis=1) for s in logits]

    normalizers = [unstack(r, len(valid)) for r in map_rows(log_sums, units, chunk_size)]

    def compare(index, own):
        del index
        rows, of_rows, rows_valid = own
        both = rows_valid[:, None] & valid[None]
        # Masked before the exponential, which may be infinite at padding.
        within = [jnp.where(both, s, lowest(s.dtype)) for s in similarities(rows)]
        for a, b in itertools.combinations(range(len(units)), 2):
            own = jnp.exp(within[b] - of_rows[b][:, None])
            targets = own + jnp.exp(within[a] - normalizers[a][None])
            if stop_gradient_targets:
                targets = jax.lax.stop_gradient(targets)
            yield over_temperature(rows[a] @ units[b].T, temperature), targets

    return chunked_bidirectional(compare, (units, normalizers, valid), where, chunk_size) / 2

"""Softmax cross entropy with any targets, InfoNCE, and the parts that CLIP, SigLIP and UniCL share.

All losses of this package are pure functions of arrays to one scalar, computed in float32 at least.
They work as they stand under `grad`, `vmap` and `jit`, also with inputs sharded over mesh axes of
type Auto. `temperature` and `bias` may be traced. Embeddings must be finite even where masked.

Losses of embeddings take an option `chunk_size`: the number of rows compared with all candidates at
a time. The comparison runs again in the backward pass, so memory grows with chunk_size × candidates
instead of rows × candidates. Value and gradient are the same up to rounding.
"""

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import lowest, map_rows
from rcml_jax.ops.similarity import as_float, cosine, dot, l2_normalize


def softmax_contrastive(
    logits: jax.Array,
    targets: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Mean cross entropy between the softmax over each row's candidates and the row's targets.

    L = Σ_i w_i Σ_j −t_ij log [exp(l_ij) / Σ_k exp(l_ik)] / Σ_i w_i, with k over the allowed
    candidates and i over the rows that have a positive.

    logits: (n, m); −inf counts as masked.
    targets: None, the diagonal (n ≤ m); (n,) integers, the index of each row's positive, where an
        index outside 0..m−1 means no positive; (n, m), non-negative, one soft target per row,
        normalised to sum to one after masking.
    where: (m,) or (n, m) bool, true for allowed candidates. A masked positive is no positive.
    weights: (n,) row weights, 1 by default.

    A row without a positive, or of weight 0, adds 0 to the numerator and to the denominator; if no
    row is left the loss is 0. Raises ValueError if the shape or type of `targets` fits none of the
    three forms.
    """
    return mean_of(*softmax_sums(as_float(logits), targets, where, weights))


def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    targets: jax.Array | None = None,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> jax.Array:
    """InfoNCE from queries (n, d) to keys (m, d), in one direction (van den Oord et al., 2018).

    `softmax_contrastive` of the cosines (dot products without `normalize`) over the temperature,
    with its `targets`, `where` and `weights`. chunk_size: queries compared at a time, or None.
    """
    if chunk_size is None:
        logits = scaled_similarities(queries, keys, temperature, normalize)
        return softmax_contrastive(logits, targets, where=where, weights=weights)
    queries, keys = prepare(queries, keys, normalize)
    where = jnp.ones(len(keys), bool) if where is None else jnp.asarray(where, bool)
    if weights is None:
        weights = jnp.ones(len(queries))
    rows = {
        "queries": queries,
        "targets": checked_targets(targets, len(queries), len(keys)),
        "weights": jnp.asarray(weights, queries.dtype),
    }
    if where.ndim == 2:
        rows["where"] = where

    def sums(index, own):
        del index
        logits = scaled_similarities(own["queries"], keys, temperature, False)
        # The padding of the last chunk has weight 0, so it counts nowhere.
        return softmax_sums(logits, own["targets"], own.get("where", where), own["weights"])

    total, weight = map_rows(sums, rows, chunk_size)
    return mean_of(jnp.sum(total), jnp.sum(weight))


# Shared with the other losses of embeddings.


def softmax_sums(logits, targets, where, weights):
    """Numerator and denominator of `softmax_contrastive`."""
    allowed = ~(logits < jnp.finfo(logits.dtype).min)  # −∞; NaN is to be seen in the loss
    if where is not None:
        allowed &= jnp.atleast_2d(jnp.asarray(where, bool))
    targets = jnp.where(allowed, target_matrix(targets, logits), 0)
    mass = jnp.sum(targets, axis=1)
    if weights is None:
        weights = jnp.ones_like(mass)
    weights = jnp.asarray(weights, logits.dtype)
    live = (mass > 0) & (weights != 0)
    # Dead rows become rows of zeros before the logarithm: masking them afterwards would leave NaN
    # in the gradient.
    allowed |= ~live[:, None]
    logits = jnp.where(live[:, None], logits, 0)
    log_sum = jax.nn.logsumexp(jnp.where(allowed, logits, lowest(logits.dtype)), axis=1)
    surprise = jnp.where(allowed, log_sum[:, None] - jnp.where(allowed, logits, 0), 0)
    losses = jnp.sum(targets * surprise, axis=1) / jnp.where(live, mass, 1)
    weights = jnp.where(live, weights, 0)
    return jnp.sum(weights * losses), jnp.sum(weights)


def mean_of(total, weight):
    """The mean total / weight, or 0 if nothing was counted."""
    return total / jnp.where(weight != 0, weight, 1)


def prepare(x, y, normalize):
    """Both arrays in float32 at least, with rows of length one if `normalize`."""
    return (l2_normalize(x), l2_normalize(y)) if normalize else (as_float(x), as_float(y))


def scaled_similarities(x, y, temperature, normalize):
    """Cosines (dot products without `normalize`) of x (n, d) and y (m, d) over τ: (n, m)."""
    scores = cosine(x, y) if normalize else dot(x, y)
    return scores / jnp.asarray(temperature, scores.dtype)


def target_matrix(targets, logits):
    """Any form of targets as an (n, m) matrix of the logits' type.

    The comparisons fuse into their consumer and, unlike a gather, need no communication when the
    logits are sharded.
    """
    targets = checked_targets(targets, *logits.shape)
    if targets.ndim == 1:
        targets = targets[:, None] == jnp.arange(logits.shape[1], dtype=targets.dtype)[None]
    return targets.astype(logits.dtype)


def checked_targets(targets, n, m):
    """Targets as (n,) integers or an (n, m) matrix; ValueError for anything else."""
    if targets is None:
        if n > m:
            raise ValueError(f"{n} rows have no diagonal in {m} columns; give targets")
        targets = jnp.arange(n)
    targets = jnp.asarray(targets)
    indices = targets.shape == (n,) and jnp.issubdtype(targets.dtype, jnp.integer)
    if not indices and targets.shape != (n, m):
        raise ValueError(
            f"targets are {targets.dtype} of shape {targets.shape}; they must be integers of shape "
            f"({n},) or a matrix of shape ({n}, {m})"
        )
    return targets


def allowed_pairs(rows, valid):
    """Allowed pairs (m, n) bool of m rows of `valid`, which is (n,) or (n, n)."""
    return rows if valid.ndim == 2 else rows[:, None] & valid[None]


def check_paired(text, image):
    """Raise ValueError if text and image differ in shape."""
    if text.shape != image.shape:
        raise ValueError(f"text has shape {text.shape} and image {image.shape}; they must agree")

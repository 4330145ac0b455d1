"""Contrastive losses of whole batches: softmax with any targets, CLIP, SigLIP and UniCL.

All are pure functions of arrays to one scalar, computed in float32 at least, and are right as they
stand under `grad`, `vmap` and `jit`, with inputs sharded over mesh axes of type Auto, too.
`temperature` and `bias` may be traced. Embeddings must be finite even where they are masked.

Those that take embeddings have an option `block`: so many rows are compared with all candidates at
a time, and again in the backward pass, so that memory grows with block × candidates and not with
rows × candidates. Value and gradient are the same up to rounding.
"""

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, column_log_sums, map_rows
from rcml_jax.ops.similarity import as_float, cosine, dot, l2_normalize


def softmax_contrastive(
    logits: jax.Array,
    targets: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Mean cross entropy between the softmax over each row's candidates and the row's targets.

    L = Σ_i w_i Σ_j −t_ij log [exp(l_ij) / Σ_k exp(l_ik)] / Σ_i w_i, with k over the candidates
    that are allowed and i over the rows that have a positive.

    logits: (n, m); −inf counts as masked.
    targets: None, the diagonal (n ≤ m); (n,) integers, the index of each row's positive, where an
        index outside 0..m−1 means no positive; (n, m), non-negative, a soft target a row, which is
        normalised to sum to one after masking.
    where: (m,) or (n, m) bool, true for allowed candidates. A masked positive is no positive.
    weights: (n,) row weights, 1 if left out.

    A row without a positive, or of weight 0, adds 0 to the numerator and to the denominator; if no
    row is left the loss is 0. Raises ValueError if the shape or type of `targets` fits none of the
    three forms.
    """
    return _ratio(*_softmax_sums(as_float(logits), targets, where, weights))


def _softmax_sums(logits, targets, where, weights):
    """Numerator and denominator of `softmax_contrastive`."""
    allowed = ~jnp.isneginf(logits)
    if where is not None:
        allowed &= jnp.asarray(where, bool)
    targets = jnp.where(allowed, _target_matrix(targets, logits), 0)
    mass = jnp.sum(targets, axis=1)
    if weights is None:
        weights = jnp.ones_like(mass)
    weights = jnp.asarray(weights, logits.dtype)
    live = (mass > 0) & (weights != 0)
    # Dead rows become rows of zeros before the logarithm: masking them afterwards would leave NaN
    # in the gradient.
    allowed |= ~live[:, None]
    logits = jnp.where(live[:, None], logits, 0)
    log_sum = jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=1)
    surprise = jnp.where(allowed, log_sum[:, None] - jnp.where(allowed, logits, 0), 0)
    losses = jnp.sum(targets * surprise, axis=1) / jnp.where(live, mass, 1)
    weights = jnp.where(live, weights, 0)
    return jnp.sum(weights * losses), jnp.sum(weights)


def _ratio(total, weight):
    """The mean, or 0 if nothing was counted."""
    return total / jnp.where(weight != 0, weight, 1)


def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    targets: jax.Array | None = None,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    normalize: bool = True,
    block: int | None = None,
) -> jax.Array:
    """InfoNCE from queries (n, d) to keys (m, d): one direction (van den Oord et al., 2018).

    `softmax_contrastive` of the cosines (dot products without `normalize`) over the temperature;
    `targets`, `where` and `weights` are handed on. block: queries compared at a time, or None.
    """
    if block is None:
        logits = _logits(queries, keys, temperature, normalize)
        return softmax_contrastive(logits, targets, where=where, weights=weights)
    queries, keys = _comparable(queries, keys, normalize)
    where = jnp.ones(len(keys), bool) if where is None else jnp.asarray(where, bool)
    if weights is None:
        weights = jnp.ones(len(queries))
    rows = {
        "queries": queries,
        "targets": _checked_targets(targets, len(queries), len(keys)),
        "weights": jnp.asarray(weights, queries.dtype),
    }
    if where.ndim == 2:
        rows["where"] = where

    def sums(index, own):
        del index
        logits = _logits(own["queries"], keys, temperature, False)
        # A row of weight 0 counts nowhere; such is the padding of the last block.
        return _softmax_sums(logits, own["targets"], own.get("where", where), own["weights"])

    total, weight = map_rows(sums, rows, block)
    return _ratio(jnp.sum(total), jnp.sum(weight))


def clip(
    text: jax.Array,
    image: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    targets: jax.Array | None = None,
    normalize: bool = True,
    block: int | None = None,
) -> jax.Array:
    """CLIP: the average of InfoNCE from text to image and back (Radford et al., 2021).

    text, image: (n, d). where: (n,) bool, false for padding, which is neither row nor candidate; or
    (n, n) bool, false for pairs of a text and an image that are neither positive nor negative.
    targets: as in `softmax_contrastive`, text to image; image to text takes the transposed matrix,
    each row of it normalised on its own. block: texts compared at a time, or None. Raises
    ValueError if text and image differ in shape.
    """
    _check_paired(text, image)
    if block is not None:
        targets = _checked_targets(targets, len(text), len(text))
        return _blocked_clip(
            *_comparable(text, image, normalize), temperature, where, targets, block
        )
    logits = _logits(text, image, temperature, normalize)
    targets = _target_matrix(targets, logits)
    valid = all_valid(where, len(text))
    both = _allowed(valid, valid)
    forward = softmax_contrastive(logits, targets, where=both)
    backward = softmax_contrastive(logits.T, targets.T, where=both.T)
    return (forward + backward) / 2


def sigmoid(
    text: jax.Array,
    image: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    bias: float | jax.Array = -10.0,
    where: jax.Array | None = None,
    targets: jax.Array | None = None,
    normalize: bool = True,
    block: int | None = None,
) -> jax.Array:
    """SigLIP: −(1/n) Σ_ij log σ(y_ij (x_i·y_j/τ + b)), y_ij = ±1 (Zhai et al., 2023).

    text, image: (n, d). where: as of `clip`; n counts the rows of which something is valid.
    targets: as in `softmax_contrastive`, but not normalised: an entry t in [0, 1] adds
    t log σ(l) + (1 − t) log σ(−l), so that 1 stands for y = 1 and 0 for y = −1. A row without a
    positive therefore still has its negatives. Without any valid row the loss is 0.
    block: texts compared at a time, or None. Raises ValueError if text and image differ in shape.
    """
    _check_paired(text, image)
    text, image = _comparable(text, image, normalize)
    rows = {"text": text, "targets": _checked_targets(targets, len(text), len(text))}
    rows["valid"] = valid = all_valid(where, len(text))

    def total(index, own):
        del index
        logits = _logits(own["text"], image, temperature, False)
        logits = logits + jnp.asarray(bias, logits.dtype)
        targets = _target_matrix(own["targets"], logits)
        terms = targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
        return jnp.sum(jnp.where(_allowed(own["valid"], valid), terms, 0))

    sums = total(jnp.arange(len(text)), rows) if block is None else map_rows(total, rows, block)
    some = valid if valid.ndim == 1 else jnp.any(valid, axis=1)
    return -jnp.sum(sums) / jnp.maximum(jnp.sum(some), 1).astype(text.dtype)


def label_supervised(
    text: jax.Array,
    image: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    normalize: bool = True,
    block: int | None = None,
) -> jax.Array:
    """UniCL: CLIP with every item of the same label as a positive (Yang et al., 2022, Eq. 2–4).

    text, image: (n, d). labels: (n,) integers; the target is spread evenly over the items of the
    row's label. A negative label is unknown: only the item itself is positive. where: as of `clip`.
    block: texts compared at a time, or None. Raises ValueError if text and image
    differ in shape.
    """
    labels = jnp.asarray(labels)
    if block is not None:
        _check_paired(text, image)
        everyone = jnp.arange(len(labels))

        def same_label(index, own, logits):
            same = (own[:, None] == labels) & (labels >= 0) | (index[:, None] == everyone)
            return same.astype(logits.dtype)

        text, image = _comparable(text, image, normalize)
        return _blocked_clip(text, image, temperature, where, labels, block, same_label)
    same = (labels[:, None] == labels) & (labels >= 0)
    targets = same | jnp.eye(labels.shape[0], dtype=bool)
    return clip(
        text, image, temperature=temperature, where=where, targets=targets, normalize=normalize
    )


def _blocked_clip(text, image, temperature, where, targets, block, matrix=None):
    """CLIP with `block` texts compared with all images at a time, in one pass for both directions.

    A block's share of an image's loss is the logarithm of a sum of exponentials over the texts of
    the block and Σ_i t_ij l_ij: log-sums are combined over the blocks, for every image j
    lse_j − Σ_i t_ij l_ij / Σ_i t_ij. matrix(index, targets, logits) makes the target matrix of a
    block; without it `targets` are in one of the forms of `_target_matrix`.
    """
    valid = all_valid(where, len(text))
    rows = {"text": text, "targets": targets, "valid": valid}

    def parts(index, own):
        logits = _logits(own["text"], image, temperature, False)
        if matrix is None:
            target = _target_matrix(own["targets"], logits)
        else:
            target = matrix(index, own["targets"], logits)
        both = _allowed(own["valid"], valid)
        target = jnp.where(both, target, 0)
        by_image = (
            column_log_sums(logits, both),
            jnp.sum(target * logits, axis=0),
            jnp.sum(target, axis=0),
        )
        return _softmax_sums(logits, target, both, None), by_image

    by_text, (log_sums, sums, mass) = map_rows(parts, rows, block)
    sums, mass = jnp.sum(sums, axis=0), jnp.sum(mass, axis=0)
    live = mass > 0
    losses = jax.nn.logsumexp(log_sums, axis=0) - sums / jnp.where(live, mass, 1)
    backward = _ratio(jnp.sum(jnp.where(live, losses, 0)), jnp.sum(live).astype(losses.dtype))
    return (_ratio(*map(jnp.sum, by_text)) + backward) / 2


def _comparable(x, y, normalize):
    """Both in float32 at least, and of length one if asked for."""
    return (l2_normalize(x), l2_normalize(y)) if normalize else (as_float(x), as_float(y))


def _logits(x, y, temperature, normalize):
    """Similarities over the temperature."""
    scores = cosine(x, y) if normalize else dot(x, y)
    return scores / jnp.asarray(temperature, scores.dtype)


def _target_matrix(targets, logits):
    """Any form of targets as an (n, m) matrix of the logits' type.

    The comparisons fuse into what reads them, and unlike a gather need no communication when the
    logits are sharded.
    """
    targets = _checked_targets(targets, *logits.shape)
    if targets.ndim == 1:
        targets = targets[:, None] == jnp.arange(logits.shape[1])
    return targets.astype(logits.dtype)


def _checked_targets(targets, n, m):
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


def _allowed(rows, valid):
    """(m, n) bool: the allowed pairs of m rows of `valid`, which is (n,) or (n, n)."""
    return rows if valid.ndim == 2 else rows[:, None] & valid


def _check_paired(text, image):
    if text.shape != image.shape:
        raise ValueError(f"text has shape {text.shape} and image {image.shape}; they must agree")

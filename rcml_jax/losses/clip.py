"""CLIP's loss: InfoNCE in both directions (Radford et al., 2021)."""

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, column_log_sums, map_rows
from rcml_jax.losses.softmax import (
    allowed_pairs,
    check_paired,
    checked_targets,
    mean_of,
    prepare,
    scaled_similarities,
    softmax_contrastive,
    softmax_sums,
    target_matrix,
)


def clip(
    text: jax.Array,
    image: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    targets: jax.Array | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> jax.Array:
    """CLIP: the average of InfoNCE from text to image and back (Radford et al., 2021).

    text, image: (n, d). where: (n,) bool, false for padding, which is neither row nor candidate; or
    (n, n) bool, false for pairs of a text and an image that are neither positive nor negative.
    targets: as in `softmax_contrastive`, text to image; image to text takes the transposed matrix,
    each row of it normalised on its own. chunk_size: texts compared at a time, or None. Raises
    ValueError if text and image differ in shape.
    """
    check_paired(text, image)
    if chunk_size is not None:
        targets = checked_targets(targets, len(text), len(text))
        text, image = prepare(text, image, normalize)
        return chunked_clip(text, image, temperature, where, targets, chunk_size)
    logits = scaled_similarities(text, image, temperature, normalize)
    targets = target_matrix(targets, logits)
    valid = all_valid(where, len(text))
    both = allowed_pairs(valid, valid)
    forward = softmax_contrastive(logits, targets, where=both)
    backward = softmax_contrastive(logits.T, targets.T, where=both.T)
    return (forward + backward) / 2


def chunked_clip(text, image, temperature, where, targets, chunk_size, matrix=None):
    """CLIP in one pass for both directions: `chunk_size` texts against all images at a time.

    For an image j the loss is lse_j − Σ_i t_ij l_ij / Σ_i t_ij. Every chunk adds its texts i to the
    two sums and to the log-sum of exponentials lse_j. matrix(index, targets) makes the target
    matrix of a chunk; without it `targets` have one of the forms of `target_matrix`.
    """
    valid = all_valid(where, len(text))
    rows = {"text": text, "targets": targets, "valid": valid}

    def parts(index, own):
        logits = scaled_similarities(own["text"], image, temperature, False)
        if matrix is None:
            target = target_matrix(own["targets"], logits)
        else:
            target = matrix(index, own["targets"]).astype(logits.dtype)
        both = allowed_pairs(own["valid"], valid)
        target = jnp.where(both, target, 0)
        by_image = (
            column_log_sums(logits, both),
            jnp.sum(target * logits, axis=0),
            jnp.sum(target, axis=0),
        )
        return softmax_sums(logits, target, both, None), by_image

    by_text, (log_sums, sums, mass) = map_rows(parts, rows, chunk_size)
    sums, mass = jnp.sum(sums, axis=0), jnp.sum(mass, axis=0)
    live = mass > 0
    losses = jax.nn.logsumexp(log_sums, axis=0) - sums / jnp.where(live, mass, 1)
    backward = mean_of(jnp.sum(jnp.where(live, losses, 0)), jnp.sum(live).astype(losses.dtype))
    return (mean_of(*map(jnp.sum, by_text)) + backward) / 2

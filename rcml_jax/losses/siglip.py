"""SigLIP's loss: each pair of a text and an image is one binary decision (Zhai et al., 2023)."""

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, map_rows
from rcml_jax.losses.softmax import (
    allowed_pairs,
    check_paired,
    checked_targets,
    prepare,
    scaled_similarities,
    target_matrix,
)


def sigmoid(
    text: jax.Array,
    image: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    bias: float | jax.Array = -10.0,
    where: jax.Array | None = None,
    targets: jax.Array | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> jax.Array:
    """SigLIP: −(1/n) Σ_ij log σ(y_ij (x_i·y_j/τ + b)), y_ij = ±1 (Zhai et al., 2023).

    text, image: (n, d). where: as in `clip`; n counts the rows that have a valid pair.
    targets: as in `softmax_contrastive`, but not normalised: an entry t in [0, 1] adds
    t log σ(l) + (1 − t) log σ(−l), so 1 stands for y = 1 and 0 for y = −1. A row without a
    positive therefore still has its negatives. Without any valid row the loss is 0.
    chunk_size: texts compared at a time, or None.
    Raises ValueError if text and image differ in shape.
    """
    check_paired(text, image)
    text, image = prepare(text, image, normalize)
    rows = {"text": text, "targets": checked_targets(targets, len(text), len(text))}
    rows["valid"] = valid = all_valid(where, len(text))

    def total(index, own):
        del index
        logits = scaled_similarities(own["text"], image, temperature, False)
        logits = logits + jnp.asarray(bias, logits.dtype)
        targets = target_matrix(own["targets"], logits)
        terms = targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
        return jnp.sum(jnp.where(allowed_pairs(own["valid"], valid), terms, 0))

    sums = (
        total(jnp.arange(len(text)), rows)
        if chunk_size is None
        else map_rows(total, rows, chunk_size)
    )
    some = valid if valid.ndim == 1 else jnp.any(valid, axis=1)
    return -jnp.sum(sums) / jnp.maximum(jnp.sum(some), 1).astype(text.dtype)

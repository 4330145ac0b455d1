"""DeCLIP (Li et al., 2022, arXiv 2110.05208): CLIP with three further kinds of supervision.

All are pure functions of arrays, computed in float32 at least, and correct under `grad`, `jit`
and sharded inputs. Rows that `where` excludes are neither queries nor candidates.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, lowest, map_rows, unstack
from rcml_jax.losses.clip import clip
from rcml_jax.losses.softmax import info_nce
from rcml_jax.ops.similarity import as_float, cosine, l2_normalize, paired_cosine


def declip(
    text: Sequence[jax.Array],
    image: Sequence[jax.Array],
    *,
    self_supervised: float | jax.Array = 0.0,
    self_supervision: float = 0.2,
    multi_view: float = 0.2,
    nearest_neighbor: float = 0.2,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1 − α − β − γ) L_CLIP + α (L_ISS + L_TSS) + β L_MVS + γ L_NNS, and its terms by name.

    text, image: two views (n, d) of each item, the first of them the item as it is.
    self_supervised: L_ISS + L_TSS, such as `simsiam` plus `masked_tokens`.
    self_supervision, multi_view, nearest_neighbor: α, β and γ; a term of weight 0 is not computed.
    where: (n,) bool, false for padding. chunk_size: rows compared at a time, or None.

    L_MVS is the mean CLIP loss of the three pairs of views beside the plain one. L_NNS is the mean
    of `neighbor_supervision` over the four pairs of views.
    """
    options: dict[str, Any] = {"temperature": temperature, "where": where, "chunk_size": chunk_size}
    terms: dict[str, Any] = {"clip": clip(text[0], image[0], **options)}
    value = (1 - self_supervision - multi_view - nearest_neighbor) * terms["clip"]
    if self_supervision:
        value += self_supervision * self_supervised
    if multi_view:
        pairs = (text[0], image[1]), (text[1], image[0]), (text[1], image[1])
        terms["multi_view"] = sum(clip(*pair, **options) for pair in pairs) / len(pairs)
        value += multi_view * terms["multi_view"]
    if nearest_neighbor:
        found = [neighbor_supervision(t, text[0], i, **options) for t in text for i in image]
        terms["nearest_neighbor"] = sum(found) / len(found)
        value += nearest_neighbor * terms["nearest_neighbor"]
    return value, terms


def neighbor_supervision(
    text: jax.Array,
    bank: jax.Array,
    image: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """InfoNCE from images to the nearest neighbours of their texts, t'_i = bank[k(i)] (L_NNS).

    k(i) is the row j ≠ i of the bank with the largest cosine to text i. The keys are t'_1, ...,
    t'_n, constants without a gradient. If two rows have the same neighbour, each is a positive of
    the other. A row's own text may be a key, as another row's neighbour; it is then not a candidate
    for that row. Without a second valid row the loss is 0.

    text, image: (n, d), a view of each. bank: (n, d), the texts of the same rows to look among. The
    paper looks in a queue of the 65,536 texts before the batch; a queue would be a state that a
    step has to carry, so here it is the batch itself.
    where: (n,) bool, false for padding. chunk_size: rows compared at a time, or None.
    The (n, n) masks are bool and kept whole.
    """
    valid = all_valid(where, len(text))
    bank = jax.lax.stop_gradient(l2_normalize(bank))
    neighbor = nearest_rows(text, bank, where=where, chunk_size=chunk_size)
    everyone = jnp.arange(len(text))
    some = valid & (jnp.sum(valid) > 1)
    return info_nce(
        image,
        bank[neighbor],
        temperature=temperature,
        targets=neighbor[:, None] == neighbor[None],
        where=some[:, None] & some[None] & (neighbor[None] != everyone[:, None]),
        chunk_size=chunk_size,
    )


def nearest_rows(
    text: jax.Array,
    bank: jax.Array,
    *,
    where: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """For each text (n, d) the row of the bank (n, d) with the largest cosine, (n,) int.

    The text's own row and rows that `where` excludes are skipped. If no row remains, the result is
    row 0. Of equal cosines the first counts. chunk_size: rows compared at a time, or None.
    """
    valid = all_valid(where, len(text))
    text, bank = (jax.lax.stop_gradient(as_float(x)) for x in (text, bank))
    everyone = jnp.arange(len(text))

    def nearest(index, rows):
        allowed = valid[None] & (index[:, None] != everyone[None])
        scores = cosine(rows, bank)
        return jnp.argmax(jnp.where(allowed, scores, lowest(scores.dtype)), axis=1)

    if chunk_size is None:
        return nearest(everyone, text)
    return unstack(map_rows(nearest, text, chunk_size), len(text))


def simsiam(
    predicted: Sequence[jax.Array],
    projected: Sequence[jax.Array],
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """SimSiam of two views: −(cos(p₁, sg z₂) + cos(p₂, sg z₁))/2, the mean over rows (L_ISS).

    sg stops the gradient (Chen & He, 2021). predicted, projected: two arrays (n, d), the
    predictor's and the projector's outputs of each view. where: (n,) bool, false for padding.
    Without any valid row the loss is 0.
    """
    first, second = (jax.lax.stop_gradient(z) for z in projected)
    both = paired_cosine(predicted[0], second) + paired_cosine(predicted[1], first)
    return -masked_mean(both / 2, where)


def masked_tokens(
    states: jax.Array, table: jax.Array, bias: jax.Array, labels: jax.Array
) -> jax.Array:
    """Cross entropy (n, k) of predicting tokens from states at k masked positions (L_TSS).

    The logits are states · tableᵀ + bias: with the token embeddings as the table, they are tied.
    states: (n, k, d). table: (V, d). bias: (V,). labels: (n, k) ids. One position of all texts is
    predicted at a time, and again in the backward pass, so that (n, V) logits are held.
    """
    states = as_float(states)
    table, bias = table.astype(states.dtype), bias.astype(states.dtype)

    @jax.checkpoint
    def one(position):
        states, labels = position
        logits = states @ table.T + bias[None]
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - own

    positions = jnp.swapaxes(states, 0, 1), jnp.swapaxes(labels, 0, 1)
    return jax.lax.map(one, positions).T


def masked_mean(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """The mean of x (n,) over the rows that `where` keeps; 0 if there is none."""
    valid = all_valid(where, len(x))
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(jnp.sum(valid, dtype=x.dtype), 1)

"""M3CoL's losses (arXiv 2409.17777): M3Co over mixed samples, MultiSClip over soft targets.

Both are pure functions of whole batches, right as they stand under `jit` with sharded inputs,
`grad` and `vmap`, and computed in float32 at least.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rcml_jax.similarity import cosine


def m3co(
    clean: Sequence[jax.Array],
    mixed: Sequence[jax.Array],
    coefficient: jax.Array,
    partner: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
) -> jax.Array:
    """M3Co, bidirectional and mixup-contrastive, summed over pairs of modalities (Eq. 6–8, 12).

    For modalities 1 and 2, with L_sim(x, y; m) = −log softmax_j(x·y_j/τ)[m],
    L¹ = 1/N Σ_i [λ_i L_sim(p̃¹_i, p²; i) + (1−λ_i) L_sim(p̃¹_i, p²; j_i)]
       + 1/N Σ_i [λ_i L_sim(p²_i, p̃¹; i) + (1−λ_i) L_sim(p²_{j_i}, p̃¹; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2. λ = 1 gives twice the CLIP loss.

    clean, mixed: M ≥ 2 arrays (n, d), normalised here. coefficient: λ (n,). partner: M index arrays
    (n,), each a permutation. where: (n,) bool, false for padding, which must partner itself only.
    """
    _check(clean, mixed, partner)
    total = jnp.float32(0)
    for a, b in itertools.combinations(range(len(clean)), 2):
        for x, y in ((a, b), (b, a)):
            targets = _mixed_targets(coefficient, partner[x])
            logits = _logits(mixed[x], clean[y], temperature)
            total += _both_ways(logits, targets, where) / 2
    return total


def multi_soft_clip(
    embeddings: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
    stop_gradient_targets: bool = False,
) -> jax.Array:
    """MultiSClip: similarities within one modality are the targets across (Eq. 9–11, 13).

    For modalities 1 and 2, with w_il = softmax_l(p¹_i·p¹_l/τ),
    L¹ = 1/N Σ_i Σ_l w_il [L_sim(p²_i, p¹; l) + L_sim(p¹_l, p²; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2, summed over pairs of modalities.

    embeddings: M ≥ 2 arrays (n, d), normalised here. where: (n,) bool, false for padding.
    stop_gradient_targets: no gradient through w; the paper's has it.
    """
    _check(embeddings)
    total = jnp.float32(0)
    for a, b in itertools.combinations(range(len(embeddings)), 2):
        for x, y in ((a, b), (b, a)):
            soft = _log_softmax(_logits(embeddings[x], embeddings[x], temperature), where)
            targets = jnp.exp(soft)
            if stop_gradient_targets:
                targets = jax.lax.stop_gradient(targets)
            logits = _logits(embeddings[y], embeddings[x], temperature)
            total += _both_ways(logits, targets, where) / 2
    return total


def _logits(x: jax.Array, y: jax.Array, temperature: float | jax.Array) -> jax.Array:
    scores = cosine(x, y)
    return scores / jnp.asarray(temperature, scores.dtype)


def _mixed_targets(coefficient: jax.Array, partner: jax.Array) -> jax.Array:
    """(n, n): λ_i at i and 1 − λ_i at the partner; they add up where a sample partners itself."""
    columns = jnp.arange(len(partner))
    share = jnp.asarray(coefficient, jnp.float32)[:, None]
    own, other = columns[:, None] == columns, jnp.asarray(partner)[:, None] == columns
    return share * own + (1 - share) * other


def _both_ways(logits: jax.Array, targets: jax.Array, where: jax.Array | None) -> jax.Array:
    """1/N Σ_il t_il [L_sim(row i; l) + L_sim(column l; i)]."""
    rows = _log_softmax(logits, where)
    columns = _log_softmax(logits.T, where).T
    if where is None:
        return -jnp.sum(targets * (rows + columns)) / len(logits)
    both = jnp.asarray(where, bool)[:, None] & jnp.asarray(where, bool)
    terms = jnp.where(both, targets * (rows + columns), 0)
    return -jnp.sum(terms) / jnp.maximum(jnp.sum(where), 1)


def _log_softmax(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """Row-wise, over valid columns; padding gets a large negative number, not −inf: 0 · −inf."""
    if where is not None:
        logits = jnp.where(jnp.asarray(where, bool), logits, jnp.finfo(logits.dtype).min / 2)
    return jax.nn.log_softmax(logits, axis=1)


def _check(*groups: Sequence[jax.Array]) -> None:
    count = len(groups[0])
    if count < 2 or any(len(group) != count for group in groups):
        raise ValueError(
            f"{[len(group) for group in groups]} arrays; the loss compares two modalities or more, "
            "with one array each"
        )
    shapes = {x.shape for group in groups[:2] for x in group}
    if len(shapes) > 1:
        raise ValueError(f"embeddings have the shapes {sorted(shapes)}; they must be the same")

"""M3Co, the mixup-contrastive loss of M3CoL (arXiv 2409.17777, Eq. 6–8 and 12).

`bidirectional` is what M3Co and MultiSClip have in common: Eq. 5 along rows and along columns,
weighted by a matrix of targets. Its plain form comes first; `_bidirectional_without_shift` is the
same at a known temperature, and `chunked_bidirectional` bounds the memory. Both losses are pure
functions of whole batches, computed in float32 at least. They work unchanged under `jit` with
sharded inputs, `grad` and `vmap`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, column_log_sums, lowest, map_rows
from rcml_jax.ops.similarity import l2_normalize


def m3co(
    clean: Sequence[jax.Array],
    mixed: Sequence[jax.Array],
    coefficient: jax.Array,
    partner: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """M3Co, bidirectional and mixup-contrastive, summed over pairs of modalities (Eq. 6–8, 12).

    For modalities 1 and 2, with L_sim(x, y; m) = −log softmax_j(x·y_j/τ)[m],
    L¹ = 1/N Σ_i [λ_i L_sim(p̃¹_i, p²; i) + (1−λ_i) L_sim(p̃¹_i, p²; j_i)]
       + 1/N Σ_i [λ_i L_sim(p²_i, p̃¹; i) + (1−λ_i) L_sim(p²_{j_i}, p̃¹; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2. λ = 1 gives twice the CLIP loss.

    clean, mixed: M ≥ 2 arrays (n, d), normalised here. coefficient: λ (n,). partner: M index arrays
    (n,), each a permutation. where: (n,) bool, false for padding, which must partner itself only.
    chunk_size: samples compared at a time, or None for all; with it memory grows with
    chunk_size × n, not n × n. Raises ValueError for shapes that do not fit.
    """
    check_modalities(clean, mixed, partner)
    clean, mixed = [l2_normalize(x) for x in clean], [l2_normalize(x) for x in mixed]
    samples = jnp.arange(len(clean[0]))
    pairs = list(itertools.permutations(range(len(clean)), 2))
    if chunk_size is None:
        total: Any = 0.0
        for a, b in pairs:
            logits = over_temperature(mixed[a] @ clean[b].T, temperature)
            targets = _mixed_targets(coefficient, samples, partner[a], logits)
            total += bidirectional(logits, targets, where, temperature) / 2
        return total

    def compare(index, own):
        mixed, coefficient, partner = own
        for a, b in pairs:
            logits = over_temperature(mixed[a] @ clean[b].T, temperature)
            yield logits, _mixed_targets(coefficient, index, partner[a], logits)

    return (
        chunked_bidirectional(compare, (mixed, coefficient, list(partner)), where, chunk_size) / 2
    )


def over_temperature(cosines: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Cosines over a temperature, in the type of the cosines."""
    return cosines / jnp.asarray(temperature, cosines.dtype)


def _mixed_targets(
    coefficient: jax.Array, index: jax.Array, partner: jax.Array, logits: jax.Array
) -> jax.Array:
    """Targets with λ_i at i and 1 − λ_i at the partner; they add up where the two are the same.

    index, partner: of each row of the logits (n, m); the targets have their shape and type.
    """
    share = jnp.asarray(coefficient, logits.dtype)[:, None]
    columns = jnp.arange(logits.shape[1])[None]
    own = index[:, None] == columns
    other = jnp.asarray(partner, columns.dtype)[:, None] == columns
    return jnp.where(own, share, 0) + jnp.where(other, 1 - share, 0)


def bidirectional(
    logits: jax.Array,
    targets: jax.Array,
    where: jax.Array | None = None,
    temperature: float | jax.Array | None = None,
) -> jax.Array:
    """1/N Σ_il t_il [−log softmax_l(s_i·)[l] − log softmax_i(s_·l)[i]] of logits s and targets t.

    logits, targets: (n, n). where: (n,) bool, false for padded rows and columns; N counts the
    others. If there are none, the loss is 0. temperature: pass it if the logits are cosines divided
    by a temperature known at trace time; a faster, equal form may then be used.
    """
    valid = all_valid(where, len(logits))
    if isinstance(temperature, int | float) and temperature >= _NO_SHIFT:
        total = _bidirectional_without_shift(logits, targets, valid)
    else:
        total = _bidirectional(logits, targets, valid)
    return total / jnp.maximum(jnp.sum(valid, dtype=total.dtype), 1)


def _bidirectional(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """`bidirectional` times N, as the paper writes it."""
    both = valid[:, None] & valid[None]
    logits = jnp.where(both, logits, lowest(logits.dtype))
    log_p = jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0)
    return -jnp.sum(jnp.where(both, targets * log_p, 0))


#: From this temperature on, exponentials of cosines over it, and sums of them, are within the range
#: of float32, so the largest logit need not be subtracted before.
_NO_SHIFT = 0.025


def _bidirectional_without_shift(
    logits: jax.Array, targets: jax.Array, valid: jax.Array
) -> jax.Array:
    """`_bidirectional` of cosines over a temperature of `_NO_SHIFT` or more.

    With r_i = log Σ_l exp(s_il) and c_l = log Σ_i exp(s_il) the bracket is r_i + c_l − 2 s_il. Sums
    are products with the mask, which need no masked copies. `benchmarks/m3col_losses.py`.
    """
    mask = valid.astype(logits.dtype)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    exponentials = jnp.exp(logits)
    tiny = jnp.finfo(logits.dtype).tiny  # Where nothing is valid.
    rows = jnp.log(jnp.maximum(product(exponentials, mask), tiny))
    columns = jnp.log(jnp.maximum(product(mask, exponentials), tiny))
    sums = rows * product(targets, mask) + columns * product(mask, targets)
    return jnp.sum(jnp.where(valid, sums - 2 * product(targets * logits, mask), 0))


def chunked_bidirectional(
    compare: Callable[..., Iterator], rows, where: jax.Array | None, chunk_size: int
) -> jax.Array:
    """`bidirectional` summed over comparisons, `chunk_size` rows of all of them at a time.

    compare(index, rows of a chunk) yields the logits and targets, (chunk_size, n), of each
    comparison. rows is a tree of arrays with a leading axis n. The backward pass computes again
    every chunk's log-sums of exponentials: those of its rows, and its share of the columns'.
    """
    valid = all_valid(where, len(jax.tree.leaves(rows)[0]))

    def parts(index, own):
        rows, rows_valid = own
        both = rows_valid[:, None] & valid[None]
        total: Any = 0.0
        columns = []
        for logits, targets in compare(index, rows):
            targets = jnp.where(both, targets, 0)
            log_sums = jax.nn.logsumexp(jnp.where(both, logits, lowest(logits.dtype)), axis=1)
            total += jnp.sum(log_sums * targets.sum(axis=1)) - 2 * jnp.sum(targets * logits)
            columns.append((column_log_sums(logits, both), targets.sum(axis=0)))
        return total, columns

    totals, columns = map_rows(parts, (rows, valid), chunk_size)
    total = jnp.sum(totals)
    for log_sums, mass in columns:
        total += jnp.sum(jax.nn.logsumexp(log_sums, axis=0) * mass.sum(axis=0))
    return total / jnp.maximum(jnp.sum(valid, dtype=total.dtype), 1)


def check_modalities(*groups: Sequence[jax.Array]) -> None:
    """Raise ValueError unless each group has as many arrays, two or more, of one shape."""
    count = len(groups[0])
    if count < 2 or any(len(group) != count for group in groups):
        raise ValueError(
            f"{[len(group) for group in groups]} arrays; the loss compares two modalities or more, "
            "with one array each"
        )
    shapes = {x.shape for group in groups[:2] for x in group}
    if len(shapes) > 1:
        raise ValueError(f"embeddings have the shapes {sorted(shapes)}; they must be the same")

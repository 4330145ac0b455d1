"""M3CoL's losses (arXiv 2409.17777): M3Co over mixed samples, MultiSClip over soft targets.

Both are pure functions of whole batches, right as they stand under `jit` with sharded inputs,
`grad` and `vmap`, and computed in float32 at least. With `block` so many samples are compared with
all at a time, and again in the backward pass, so that memory grows with block × n and not with
n × n. Value and gradient are the same up to rounding.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import all_valid, column_log_sums, lowest, map_rows, unstack
from rcml_jax.ops.similarity import l2_normalize

#: Cosines over a temperature from here on have exponentials and sums of them within the range of
#: float32, so that none need be shifted by the largest.
_NO_SHIFT = 0.025


def m3co(
    clean: Sequence[jax.Array],
    mixed: Sequence[jax.Array],
    coefficient: jax.Array,
    partner: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """M3Co, bidirectional and mixup-contrastive, summed over pairs of modalities (Eq. 6–8, 12).

    For modalities 1 and 2, with L_sim(x, y; m) = −log softmax_j(x·y_j/τ)[m],
    L¹ = 1/N Σ_i [λ_i L_sim(p̃¹_i, p²; i) + (1−λ_i) L_sim(p̃¹_i, p²; j_i)]
       + 1/N Σ_i [λ_i L_sim(p²_i, p̃¹; i) + (1−λ_i) L_sim(p²_{j_i}, p̃¹; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2. λ = 1 gives twice the CLIP loss.

    clean, mixed: M ≥ 2 arrays (n, d), normalised here. coefficient: λ (n,). partner: M index arrays
    (n,), each a permutation. where: (n,) bool, false for padding, which must partner itself only.
    block: samples compared at a time, or None. Raises ValueError for shapes that do not fit.
    """
    _check(clean, mixed, partner)
    clean, mixed = [l2_normalize(x) for x in clean], [l2_normalize(x) for x in mixed]
    everyone = jnp.arange(len(clean[0]))
    if block is not None:
        rows = mixed, coefficient, list(partner)

        def compare(index, own, both):
            mixed, coefficient, partner = own
            for x, y in itertools.permutations(range(len(clean)), 2):
                targets = _mixed_targets(coefficient, index, partner[x], everyone)
                yield _logits(mixed[x], clean[y], temperature), jnp.where(both, targets, 0)

        return _blocked_both_ways(compare, rows, where, block)
    targets = [_mixed_targets(coefficient, everyone, p, everyone) for p in partner]
    targets = [_valid_rows(t, where) for t in targets]
    total = jnp.float32(0)
    for x, y in itertools.permutations(range(len(clean)), 2):
        logits = _logits(mixed[x], clean[y], temperature)
        total += _both_ways(logits, targets[x], where, temperature) / 2
    return total


def multi_soft_clip(
    embeddings: Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 0.1,
    where: jax.Array | None = None,
    stop_gradient_targets: bool = False,
    block: int | None = None,
) -> jax.Array:
    """MultiSClip: similarities within one modality are the targets across (Eq. 9–11, 13).

    For modalities 1 and 2, with w_il = softmax_l(p¹_i·p¹_l/τ),
    L¹ = 1/N Σ_i Σ_l w_il [L_sim(p²_i, p¹; l) + L_sim(p¹_l, p²; i)],
    L² with the modalities swapped, and the loss (L¹ + L²)/2, summed over pairs of modalities.

    embeddings: M ≥ 2 arrays (n, d), normalised here. where: (n,) bool, false for padding.
    stop_gradient_targets: no gradient through w; the paper's has it. block: samples compared at a
    time, or None. Raises ValueError for shapes that do not fit.
    """
    _check(embeddings)
    units = [l2_normalize(x) for x in embeddings]
    if block is not None:
        return _blocked_soft_clip(units, temperature, where, stop_gradient_targets, block)
    valid = all_valid(where, len(units[0]))
    both = None if where is None else valid[:, None] & valid
    within = [_gram(x) / temperature for x in units]
    normalizers = [_log_sums(x, valid, temperature, axis=1) for x in within]
    total = jnp.float32(0)
    for a, b in itertools.combinations(range(len(units)), 2):
        # With x_a as rows, L² has its targets w^b on these logits, L¹ w^a on the transposed ones.
        logs = within[a] - normalizers[a], within[b] - normalizers[b][:, None]
        targets = _soft_targets(logs, both)
        if stop_gradient_targets:
            targets = jax.lax.stop_gradient(targets)
        logits = _logits(units[a], units[b], temperature)
        total += _both_ways(logits, targets, where, temperature) / 2
    return total


def _blocked_soft_clip(units, temperature, where, stop_gradient_targets, block):
    """`multi_soft_clip` of unit vectors, whose targets are made block by block, too."""
    valid = all_valid(where, len(units[0]))

    def log_sums(index, own):
        del index
        logits = (_logits(x, y, temperature) for x, y in zip(own, units, strict=True))
        return [jax.nn.logsumexp(jnp.where(valid, s, lowest(s.dtype)), axis=1) for s in logits]

    normalizers = [unstack(r, len(valid)) for r in map_rows(log_sums, units, block)]

    def compare(index, own, both):
        del index
        rows, of_rows = own
        within = [_logits(x, y, temperature) for x, y in zip(rows, units, strict=True)]
        for a, b in itertools.combinations(range(len(units)), 2):
            logs = within[a] - normalizers[a], within[b] - of_rows[b][:, None]
            targets = _soft_targets(logs, both)
            if stop_gradient_targets:
                targets = jax.lax.stop_gradient(targets)
            yield _logits(rows[a], units[b], temperature), targets

    return _blocked_both_ways(compare, (units, normalizers), where, block)


def _blocked_both_ways(
    compare: Callable[..., Iterator], rows, where: jax.Array | None, block: int
) -> jax.Array:
    """Half of `_both_ways` summed over comparisons, `block` rows of all of them at a time.

    compare(index, rows of a block, both) yields the logits and targets, (block, n), of each
    comparison, the targets 0 where `both` (block, n) is false: row or column is padding.
    """
    valid = all_valid(where, len(jax.tree.leaves(rows)[0]))

    def parts(index, own):
        rows, rows_valid = own
        both = rows_valid[:, None] & valid
        total, columns = jnp.float32(0), []
        for logits, targets in compare(index, rows, both):
            log_sums = jax.nn.logsumexp(jnp.where(both, logits, lowest(logits.dtype)), axis=1)
            total += jnp.sum(log_sums * targets.sum(axis=1)) - 2 * jnp.sum(targets * logits)
            columns.append((column_log_sums(logits, both), targets.sum(axis=0)))
        return total, columns

    totals, columns = map_rows(parts, (rows, valid), block)
    total = jnp.sum(totals)
    for log_sums, mass in columns:
        total += jnp.sum(jax.nn.logsumexp(log_sums, axis=0) * mass.sum(axis=0))
    return total / jnp.maximum(jnp.sum(valid), 1) / 2


def _both_ways(
    logits: jax.Array,
    targets: jax.Array,
    where: jax.Array | None,
    temperature: float | jax.Array,
) -> jax.Array:
    """1/N Σ_il t_il [L_sim(row i; l) + L_sim(column l; i)]; targets are 0 on padding.

    With r and c the logarithms of the sums of exponentials of rows and columns, the bracket is
    r_i + c_l − 2 logit_il: no (n, n) array of log-probabilities is made.
    """
    valid = all_valid(where, len(logits))
    rows, columns = (_log_sums(logits, valid, temperature, axis) for axis in (1, 0))
    sums = rows * _sums(targets, valid, axis=1) + columns * _sums(targets, valid, axis=0)
    total = jnp.sum(jnp.where(valid, sums - 2 * _sums(targets * logits, valid, axis=1), 0))
    return total / jnp.maximum(jnp.sum(valid), 1)


def _log_sums(
    logits: jax.Array, valid: jax.Array, temperature: float | jax.Array, axis: int
) -> jax.Array:
    """log Σ exp(logit) along an axis of (n, n) cosines over τ, over what is valid."""
    if isinstance(temperature, int | float) and temperature >= _NO_SHIFT:
        sums = _sums(jnp.exp(logits), valid, axis)
        return jnp.log(jnp.maximum(sums, jnp.finfo(sums.dtype).tiny))
    return jax.nn.logsumexp(logits, axis=axis, where=jnp.expand_dims(valid, 1 - axis))


def _sums(x: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
    """Sums of x (n, n) along an axis over what is valid.

    As a product with the mask: on a CPU faster than a reduction, and nothing is masked before.
    """
    ones = valid.astype(x.dtype)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(x, ones) if axis == 1 else product(ones, x)


def _logits(x: jax.Array, y: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Cosine similarities of unit vectors over τ, (n, n)."""
    return x @ y.T / temperature


@jax.custom_vjp
def _gram(x: jax.Array) -> jax.Array:
    """Dot products (n, n) of x's rows, whose gradient is one product, (G + Gᵀ) x, and not two."""
    return x @ x.T


_gram.defvjp(lambda x: (x @ x.T, x), lambda x, g: ((g + g.T) @ x,))


def _mixed_targets(
    coefficient: jax.Array, index: jax.Array, partner: jax.Array, columns: jax.Array
) -> jax.Array:
    """Rows: λ_i at i and 1 − λ_i at the partner; they add up where a sample partners itself."""
    share = jnp.asarray(coefficient, jnp.float32)[:, None]
    own, other = index[:, None] == columns, jnp.asarray(partner)[:, None] == columns
    return share * own + (1 - share) * other


def _soft_targets(logs: Sequence[jax.Array], both: jax.Array | None) -> jax.Array:
    """The sum of two modalities' targets, 0 where `both` (rows, n) is false, from their logarithms.

    With s_il = x_i·x_l/τ and r_i = log Σ_l exp(s_il), w_il = exp(s_il − r_i); similarities are
    symmetric, so w_li = exp(s_il − r_l), and nothing is transposed.
    """
    if both is not None:  # Before the exponential, which elsewhere may be infinite.
        logs = [jnp.where(both, x, lowest(x.dtype)) for x in logs]
    return sum(jnp.exp(x) for x in logs)


def _valid_rows(targets: jax.Array, where: jax.Array | None) -> jax.Array:
    """Targets with the rows of padding at 0."""
    return targets if where is None else jnp.where(jnp.asarray(where, bool)[:, None], targets, 0)


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

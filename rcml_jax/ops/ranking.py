"""Ranks of a positive among its candidates, and the retrieval measures made of ranks.

Ties count against the model: a model that gives every candidate the same score ranks last.
"""

from functools import partial

import jax
import jax.numpy as jnp


@jax.jit
def candidate_ranks(scores: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """0-based rank (q,) of the positive, column 0 of scores (q, c), among its candidates.

    The rank is the number of other candidates whose score is not below the positive's. NaN is below
    nothing: a positive of NaN ranks last, and a candidate of NaN ranks before the positive.
    where: (c,) or (q, c) bool, true for candidates that exist; column 0 always does.
    """
    others = ~(scores[:, 1:] < scores[:, :1])
    if where is not None:
        others &= jnp.broadcast_to(jnp.asarray(where, bool), scores.shape)[:, 1:]
    return jnp.sum(others, axis=1, dtype=jnp.int32)


@partial(jax.jit, static_argnames="k")
def hit_at(
    ranks: jax.Array, k: int, *, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Hit@k as (sum, count): how many of the 0-based ranks (q,) are below k, of how many queries.

    where: (q,) bool, false for padding.
    """
    return _sum_and_count(ranks < k, where)


@jax.jit
def reciprocal_rank(
    ranks: jax.Array, *, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Reciprocal ranks 1/(rank + 1) of 0-based ranks (q,) as (sum, count); `where` as in `hit_at`.

    Their mean is the mean reciprocal rank (MRR).
    """
    return _sum_and_count(1 / (ranks + 1), where)


def retrieval_metrics(
    ranks: jax.Array, ks: tuple[int, ...] = (1, 5), *, where: jax.Array | None = None
) -> dict[str, float]:
    """The means `hit@k`, for each k of ks, and `mrr` of 0-based ranks (q,), as fractions.

    where: (q,) bool, false for padding. Raises ValueError if there is no query.
    """
    sums = {f"hit@{k}": hit_at(ranks, k, where=where) for k in ks}
    sums["mrr"] = reciprocal_rank(ranks, where=where)
    if float(sums["mrr"][1]) == 0:
        raise ValueError("there are no queries to average over")
    return {name: float(total) / float(count) for name, (total, count) in sums.items()}


def _sum_and_count(values, where):
    values = values.astype(jnp.float32)
    counted = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where, bool)
    return jnp.sum(values, where=counted), jnp.sum(counted)

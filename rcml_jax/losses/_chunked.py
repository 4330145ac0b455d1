"""Losses over many rows, computed chunk by chunk, forward and backward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def map_rows(function: Callable, rows, chunk_size: int):
    """Stack `function(index, rows of a chunk)` over chunks, each made again in the backward pass.

    rows: a tree of arrays with a leading axis of n rows. index: (chunk_size,), the indices of a
    chunk's rows. The last chunk is padded with zeros, whose index is n or above. Chunk b has the
    rows b, b + chunks, ...; if rows are split over devices, every chunk is split in the same way.
    Raises ValueError if chunk_size < 1.
    """
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size={chunk_size} must be at least 1, or None for all rows at once"
        )
    n = len(jax.tree.leaves(rows)[0])
    chunks = -(-n // chunk_size)
    chunk_size = -(-n // chunks)

    def split(x):
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, chunks * chunk_size - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunk_size, chunks, *x.shape[1:]).swapaxes(0, 1)

    pieces = (
        jnp.arange(chunks * chunk_size).reshape(chunk_size, chunks).T,
        jax.tree.map(split, rows),
    )
    again = jax.checkpoint(function, prevent_cse=False)
    return jax.lax.map(lambda piece: again(*piece), pieces)


def unstack(x: jax.Array, n: int) -> jax.Array:
    """Results of `map_rows`, (chunks, chunk_size, ...), as (n, ...) in the order of the rows."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n]


def column_log_sums(logits: jax.Array, where: jax.Array) -> jax.Array:
    """A chunk's share (m,) of log Σ_i exp(l_ij) over the rows i of all chunks that `where` allows.

    logits, where: (chunk_size, m). The logsumexp of the shares over the chunks is that of the
    column. A column without any row has a very low number instead of −∞, so that its gradient is
    finite.
    """
    return jax.nn.logsumexp(jnp.where(where, logits, lowest(logits.dtype)), axis=0)


def lowest(dtype: jnp.dtype) -> float:
    """Large negative logit for masked entries; safe to add to itself."""
    return float(jnp.finfo(dtype).min) / 2


def all_valid(where: jax.Array | None, n: int) -> jax.Array:
    """`where` as bool, or (n,) of True if it is None."""
    return jnp.ones(n, bool) if where is None else jnp.asarray(where, bool)

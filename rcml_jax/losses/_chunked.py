"""Losses over many rows, computed block by block, forward and backward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def map_rows(function: Callable, rows, block: int):
    """Stack `function(index, rows of a block)` over blocks, each made again in the backward pass.

    rows: a tree of arrays whose leading axis has the n rows; index: (block,), which rows a block
    has. The last block is padded with zeros, of index n and above. Block b has the rows b,
    b + blocks, ...: where rows are split over devices, so is every block. Raises ValueError for a
    block of no rows.
    """
    if block < 1:
        raise ValueError(f"block={block} must be at least 1, or None for all rows at once")
    n = len(jax.tree.leaves(rows)[0])
    blocks = -(-n // block)
    block = -(-n // blocks)

    def split(x):
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, blocks * block - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(block, blocks, *x.shape[1:]).swapaxes(0, 1)

    pieces = jnp.arange(blocks * block).reshape(block, blocks).T, jax.tree.map(split, rows)
    again = jax.checkpoint(function, prevent_cse=False)
    return jax.lax.map(lambda piece: again(*piece), pieces)


def unstack(x: jax.Array, n: int) -> jax.Array:
    """Results of `map_rows`, (blocks, block, ...), as (n, ...) in the order of the rows."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n]


def column_log_sums(logits: jax.Array, where: jax.Array) -> jax.Array:
    """A block's share (m,) of log Σ_i exp(l_ij) over the rows i of all blocks that `where` allows.

    logits, where: (block, m). The logsumexp of the shares over the blocks is that of the column; a
    column without any row has a very low number instead of −∞, and so a finite gradient.
    """
    return jax.nn.logsumexp(jnp.where(where, logits, lowest(logits.dtype)), axis=0)


def lowest(dtype: jnp.dtype) -> float:
    """Large negative logit for masked entries; safe to add to itself."""
    return float(jnp.finfo(dtype).min) / 2


def all_valid(where: jax.Array | None, n: int) -> jax.Array:
    """`where` as bool, or (n,) of True if it is None."""
    return jnp.ones(n, bool) if where is None else jnp.asarray(where, bool)

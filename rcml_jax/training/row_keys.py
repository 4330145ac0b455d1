"""Random keys that draw some rows of what another key draws for a whole batch.

A step that embeds its batch in parts, or on several devices, has to draw the same dropout for an
example as the step that embeds all of them at once. In JAX's default generator a draw is a function
of the key and of the place in the array alone (threefry in counter mode), so the rows of a part can
be had without the others: the place that is counted from is moved.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry2x32_p

_THREEFRY = "threefry2x32"
_WORDS = 2  # of a threefry key; after them the data of a rows key has: start, stride, count


def rows_of(key: jax.Array, start: Any, stride: int, count: int) -> jax.Array:
    """A key whose draws of `count` rows are rows of the same draws of `key` for more rows.

    Of an array (count, ...) row i is row start + stride·i of the array (n, ...) that `key` draws,
    to the bit, whichever n is; any other shape is drawn as `key` draws it. Keys split or folded
    from it behave in the same way. start: integer, may be traced.

    Where `key` is of another generator than JAX's default one, or that is not in counter mode
    (`jax_threefry_partitionable`), rows are drawn anew: `key` folded with start.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    counted = jax.config.jax_threefry_partitionable
    if not counted or jax.random.key_impl(key) != _THREEFRY:
        return jax.random.fold_in(key, start)
    place = jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in (start, stride, count)])
    return jax.random.wrap_key_data(
        jnp.concatenate([jax.random.key_data(key), place]), impl=_IMPLEMENTATION
    )


def _threefry(data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data[:_WORDS], impl=_THREEFRY)


def _seed(seed: jax.Array) -> jax.Array:
    raise TypeError("a rows key is made from another key, by rows_of")


def _split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    words = jax.random.key_data(jax.random.split(_threefry(data), shape))
    return jnp.concatenate([words, jnp.broadcast_to(data[_WORDS:], (*shape, 3))], axis=-1)


def _fold_in(data: jax.Array, number: jax.Array) -> jax.Array:
    words = jax.random.key_data(jax.random.fold_in(_threefry(data), number))
    return jnp.concatenate([words, data[_WORDS:]])


def _random_bits(data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """What threefry draws in counter mode, with the counters of the rows that are wanted."""
    if not shape:
        return jax.random.bits(_threefry(data), shape, f"uint{bit_width}")
    start, stride, count = data[_WORDS:]
    mine = count == shape[0]
    row = jnp.arange(shape[0], dtype=jnp.uint32)
    row = jnp.where(mine, start + stride * row, row)
    high, low = _counters(row, shape)
    high, low = threefry2x32_p.bind(data[0], data[1], high, low)
    if bit_width == 64:
        return (high.astype(jnp.uint64) << jnp.uint64(32)) | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{bit_width}")


def _counters(row: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The 64-bit places row·width + 0, 1, ... in an array of rows, as two 32-bit words."""
    width = math.prod(shape[1:])
    if width >= 2**32:
        raise NotImplementedError(f"a row of the shape {shape} has 2**32 draws or more")
    # The product of two 32-bit numbers from the four of their halves.
    half, mask = jnp.uint32(16), jnp.uint32(0xFFFF)
    a, b = row >> half, row & mask
    c, d = jnp.uint32(width >> 16), jnp.uint32(width & 0xFFFF)
    middle = ((b * d) >> half) + ((a * d) & mask) + ((b * c) & mask)
    low = row * jnp.uint32(width)
    high = a * c + ((a * d) >> half) + ((b * c) >> half) + (middle >> half)
    spread = (len(row),) + (1,) * (len(shape) - 1)
    low, high = low.reshape(spread), high.reshape(spread)
    place = low + jnp.arange(width, dtype=jnp.uint32).reshape(shape[1:])
    return high + (place < low).astype(jnp.uint32), place


_IMPLEMENTATION = define_prng_impl(
    key_shape=(_WORDS + 3,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="rows of threefry2x32",
    tag="rows",
)

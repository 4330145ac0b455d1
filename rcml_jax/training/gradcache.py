"""Gradients of a batch in parts, so that only one part's activations are in memory at a time.

A contrastive loss of a batch is not the mean of the losses of its parts: in a part each sample has
fewer negatives and mixes with fewer partners. "exact" gives the gradient of the whole batch under
any loss, for one more forward pass (the scheme of GradCache, arXiv 2101.06983); "micro" takes that
mean, as M3CoL's authors do when they accumulate gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import define_prng_impl, threefry2x32_p

from rcml_jax.errors import UserError
from rcml_jax.methods.base import Method
from rcml_jax.ops.split import split_embeddings
from rcml_jax.training.sharding import across_devices

# Random keys that draw some of the rows that another key draws for a whole batch.


_THREEFRY = "threefry2x32"
_WORDS = 2  # length of a threefry key; a rows key appends start, stride and count


def rows_of(key: jax.Array, start: Any, stride: int, count: int) -> jax.Array:
    """A key that draws `count` of the rows that `key` draws for a larger array.

    Row i of a drawn array (count, ...) equals row start + stride·i of the array (n, ...) that `key`
    draws, to the bit, for any n. Any other shape is drawn as `key` draws it. Keys split or folded
    from it behave in the same way. start: integer, may be traced.

    If `key` is not of JAX's default generator in counter mode (`jax_threefry_partitionable`), the
    rows are new draws of `key` folded with start.
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


def _split_rows(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    words = jax.random.key_data(jax.random.split(_threefry(data), shape))
    return jnp.concatenate([words, jnp.broadcast_to(data[_WORDS:], (*shape, 3))], axis=-1)


def _fold_in(data: jax.Array, number: jax.Array | int) -> jax.Array:
    words = jax.random.key_data(jax.random.fold_in(_threefry(data), number))
    return jnp.concatenate([words, data[_WORDS:]])


def _random_bits(data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Draws of threefry in counter mode, for the counters of the requested rows only."""
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
    """The 64-bit counters row·width + 0, 1, ... in an array of rows, as two 32-bit words."""
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
    counter = low + jnp.arange(width, dtype=jnp.uint32).reshape(1, *shape[1:])
    return high + (counter < low).astype(jnp.uint32), counter


_IMPLEMENTATION = define_prng_impl(
    key_shape=(_WORDS + 3,),
    seed=_seed,
    split=_split_rows,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="rows of threefry2x32",
    tag="rows",
)


def accumulated(
    loss: Callable,
    encode: Callable,
    *,
    micro_batch: int,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable:
    """Value and gradient of a whole-batch loss whose encoders see `micro_batch` examples at a time.

    encode(params, inputs, key) → embeddings, a tree with the examples on the leading axis of every
        leaf. An example's embedding depends on that example alone, except for draws with `key`.
    loss(params, embeddings, *args) → a scalar, or (scalar, auxiliary) with `has_aux`, of the
        embeddings of all examples. It may also use the parameters, such as a learned temperature.
    micro_batch: the largest number of examples embedded at a time; need not divide the batch.
    axis_name: under `jax.pmap`, the axis over which the examples are split; `micro_batch` then
        counts the examples of one device. Under `jit` with sharded inputs it stays None.

    Returns `function(params, inputs, key, *args) -> (value, gradient)`, as
    `jax.value_and_grad(lambda params: loss(params, encode(params, inputs, key), *args))` does, to
    rounding, dropout included: an example's draws do not depend on its part (see
    `row_keys`). key may be None. The embeddings are made without a backward pass, the loss
    is differentiated for them, and each part is embedded again to pull its share back (GradCache).
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")

    def function(params: Any, inputs: Any, key: jax.Array | None, *args: Any) -> tuple:
        count = _count(inputs)
        parts = -(-count // micro_batch)
        before = 0 if axis_name is None else lax.axis_index(axis_name) * count
        alone = axis_name is None and parts == 1

        def embed(params: Any, piece: Any, part: Any = 0) -> Any:
            """Part p has the rows p, p + parts, ... of this device's."""
            if key is None or alone:
                return encode(params, piece, key)
            return encode(params, piece, rows_of(key, before + part, parts, _count(piece)))

        def value(params: Any, everyone: Any) -> Any:
            return loss(params, split_embeddings(everyone), *args)

        if parts == 1:
            return _at_once(value, embed, params, inputs, has_aux, axis_name)
        return _in_parts(value, embed, params, inputs, parts, has_aux, axis_name)

    return function


def _at_once(
    value: Callable, embed: Callable, params: Any, inputs: Any, has_aux: bool, axis: str | None
) -> tuple:
    def of(params: Any) -> Any:
        one = lambda everyone: value(params, everyone)  # noqa: E731
        return (across_devices(one, axis) if axis else one)(embed(params, inputs))

    result, grads = jax.value_and_grad(of, has_aux=has_aux)(params)
    return result, lax.pmean(grads, axis) if axis else grads


def _in_parts(
    value: Callable,
    embed: Callable,
    params: Any,
    inputs: Any,
    parts: int,
    has_aux: bool,
    axis: str | None,
) -> tuple:
    count = _count(inputs)
    pieces = jnp.arange(parts), _split(inputs, parts)
    embedded = _join(lax.map(lambda part: embed(params, part[1], part[0]), pieces), count)
    if axis:
        embedded = jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), embedded)
    graded = jax.value_and_grad(value, argnums=(0, 1), has_aux=has_aux)
    result, (direct, cotangents) = graded(params, embedded)
    if axis:
        # Every device has the whole loss: its share of the gradient is that of its own examples,
        # and one of so many of what does not go through the embeddings.
        cotangents = _own_rows(cotangents, count, axis)
        direct = jax.tree.map(lambda x: x / lax.axis_size(axis), direct)

    def pull_back(total: Any, part: tuple) -> tuple:
        (number, piece), cotangent = part
        _, pull = jax.vjp(lambda params: embed(params, piece, number), params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    # Whatever fills the last part has no gradient.
    grads, _ = lax.scan(pull_back, direct, (pieces, _split(cotangents, parts, zeros=True)))
    return result, lax.psum(grads, axis) if axis else grads


def whole(
    method: Method,
    params: Any,
    batch: dict,
    key: jax.Array,
    progress: jax.Array,
    axis: str | None = None,
) -> tuple:
    """((loss, metrics), gradient) of a batch at once; axis: that of its examples under `pmap`."""
    if axis:
        return exact(method, params, batch, key, progress, 1, axis)
    return method.value_and_grad(params, batch, key, progress)


def exact(
    method: Method,
    params: Any,
    batch: dict,
    key: jax.Array,
    progress: jax.Array,
    parts: int,
    axis: str | None = None,
) -> tuple:
    """((loss, metrics), gradient) of the whole batch, embedded in parts: see `accumulated`.

    Raises UserError for a method whose loss is not an objective of embeddings.
    """
    _check_split_loss(method)
    method = method.over_axis(axis) if axis else method
    batch = _prepare(method, batch, key, axis)
    items = batch["items"]
    graded = accumulated(
        lambda params, everyone: method.objective(params, everyone, batch, progress),
        lambda params, piece, key: method.embed(params, batch | {"items": piece}, key),
        micro_batch=-(-_count(items) // parts),
        has_aux=True,
        axis_name=axis,
    )
    return graded(params, items, key)


def micro(
    method: Method,
    params: Any,
    batch: dict,
    key: jax.Array,
    progress: jax.Array,
    parts: int,
    axis: str | None = None,
) -> tuple:
    """((loss, metrics), gradient): means over the parts, each a batch of its own.

    Raises UserError where `shared` is not by sample or the batch cannot be split evenly.
    """
    _check_samples(batch, parts, 1 if axis is None else lax.axis_size(axis))

    def one(part: tuple) -> tuple:
        number, piece = part
        return whole(method, params, piece, jax.random.fold_in(key, number), progress, axis)

    pieces = (jnp.arange(parts), _split(batch, parts))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)  # noqa: E731
    total, _ = lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / parts, total)


ACCUMULATIONS = {"exact": exact, "micro": micro}


def parts_of(size: int, micro_batch: int) -> int:
    """Into how many parts a batch is cut so that none has more than `micro_batch`; 0: no cut."""
    return -(-size // micro_batch) if 0 < micro_batch < size else 1


def check(accumulation: str, method: Method, batch: dict, parts: int, devices: int = 1) -> None:
    """Raise UserError where a method's batches cannot be accumulated in parts, before any is.

    devices: over how many the batch is split by `pmap`.
    """
    if parts > 1 and accumulation == "exact":
        _check_split_loss(method)
    elif parts > 1:
        _check_samples(batch, parts, devices, split=False)


def _check_split_loss(method: Method) -> None:
    if type(method).loss is not Method.loss:
        raise UserError(
            "exact accumulation trains one model; set config.accumulation=micro, "
            "config.micro_batch=0 or config.seeds=1"
        )


def _check_samples(batch: dict, parts: int, devices: int, split: bool = True) -> None:
    """The leaves of `shared` have the samples on their leading axis, which can be split evenly."""
    size = _count(batch["items"]) * (devices if split else 1)
    if any(x.shape[:1] != (size,) for x in jax.tree.leaves(batch["shared"])):
        raise UserError(
            "config.accumulation=micro makes batches of their own of the parts of a batch, and "
            "this method's, whose pairs lie across the parts, cannot be cut; set "
            "config.accumulation=exact"
        )
    if size % (parts * devices):
        over = f" on {devices} devices" if devices > 1 else ""
        raise UserError(
            f"a batch of {size} examples cannot be accumulated in {parts} parts of one size{over}; "
            "make config.batch.size a multiple of config.micro_batch, or set "
            "config.accumulation=exact"
        )


def _count(items: Any) -> int:
    return len(jax.tree.leaves(items)[0])


def _prepare(method: Method, batch: dict, key: jax.Array, axis: str | None) -> dict:
    """`method.prepare` on the items of all devices; this device's part of what it makes of them."""
    if axis is None or not method.prepares:
        return method.prepare(batch, key) if method.prepares else batch
    items = lax.all_gather(batch["items"], axis, tiled=True)
    prepared = method.prepare(batch | {"items": items}, key)
    return prepared | {"items": _own_rows(prepared["items"], _count(batch["items"]), axis)}


def _own_rows(tree: Any, count: int, axis: str) -> Any:
    """This device's part of what is gathered from all devices, `count` rows of each."""
    start = lax.axis_index(axis) * count
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), tree)


def _split(tree: Any, parts: int, zeros: bool = False) -> Any:
    """Part p has the rows p, p + parts, ...: where rows are split over devices, so is each part.

    Parts of neighbouring rows would lie on a few devices each, and all would compute all of them.
    Where the rows do not suffice the last ones are the first again, or zeros.
    """

    def one(x: jax.Array) -> jax.Array:
        missing = -len(x) % parts
        if missing:
            more = x[:missing]
            x = jnp.concatenate([x, jnp.zeros_like(more) if zeros else more])
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, tree)


def _join(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count], tree)

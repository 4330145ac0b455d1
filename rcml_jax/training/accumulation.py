"""Gradients of a batch in parts, so that only one part's activations are in memory at a time.

A contrastive loss of a batch is not the mean of the losses of its parts: in a part each sample has
fewer negatives and mixes with fewer partners. "exact" gives the gradient of the whole batch under
any loss, for one more forward pass (the scheme of GradCache, arXiv 2101.06983); "micro" takes that
mean, as M3CoL's authors do when they accumulate gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rcml_jax.errors import UserError
from rcml_jax.methods.base import Method
from rcml_jax.training.parallel import across_devices
from rcml_jax.training.row_keys import rows_of


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
        leaf; of each example alone, but for random draws with `key`.
    loss(params, embeddings, *args) → a scalar, or (scalar, auxiliary) with `has_aux`, of the
        embeddings of all examples; it may use the parameters, too, as a learned temperature does.
    micro_batch: the largest number of examples embedded at a time; any, whatever the batch has.
    axis_name: under `jax.pmap`, the axis over which the examples are split; `micro_batch` are then
        those of one device. Under `jit` with sharded inputs it stays None.

    Returns `function(params, inputs, key, *args) -> (value, gradient)`, as
    `jax.value_and_grad(lambda params: loss(params, encode(params, inputs, key), *args))` does, to
    rounding, dropout included: an example's draws do not depend on its part (see
    `training.row_keys`). key may be None. The embeddings are made without a backward pass, the loss
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
            return loss(params, everyone, *args)

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

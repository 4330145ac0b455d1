"""The train state and one step of it, the same on one device and on many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rcml_jax.methods.base import Method
from rcml_jax.training.accumulation import ACCUMULATIONS
from rcml_jax.training.parallel import across_devices


class TrainState(NamedTuple):
    """Everything that a step changes, and the run's random key, which it never does."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def create(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    steps: int,
    accumulation: str = "exact",
    parts: int = 1,
) -> Callable:
    """`step(state, batch, axis) -> (state, metrics)`, to be compiled by a parallel mode.

    axis is the name of the device axis under `pmap` and None otherwise. The random key of a step is
    folded from the run's key and the step, so a resumed run draws the same numbers. A batch in more
    than one part has its gradient accumulated over them: see `training.accumulation`.
    """

    def gradient(params: Any, batch: dict, key: jax.Array, progress: jax.Array) -> tuple:
        if parts > 1:
            return ACCUMULATIONS[accumulation](method, params, batch, key, progress, parts)
        loss = jax.value_and_grad(method.loss, has_aux=True)
        return loss(params, batch, key, progress)

    def gradient_across(
        params: Any, batch: dict, key: jax.Array, progress: jax.Array, axis: str
    ) -> tuple:
        batch = _prepare_across(method, batch, key, axis)
        key = jax.random.fold_in(key, lax.axis_index(axis))

        def loss(params):
            embedded = method.embed(params, batch, key)
            whole = across_devices(
                lambda everyone: method.objective(params, everyone, batch, progress), axis
            )
            return whole(embedded)

        result, grads = jax.value_and_grad(loss, has_aux=True)(params)
        return result, lax.pmean(grads, axis)

    def step(state: TrainState, batch: dict, axis: str | None) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        arguments = state.params, batch, key, state.step / steps
        if axis is None:
            (value, metrics), grads = gradient(*arguments)
        else:
            (value, metrics), grads = gradient_across(*arguments, axis)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value} | metrics | {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _prepare_across(method: Method, batch: dict, key: jax.Array, axis: str) -> dict:
    """`method.prepare` on the items of all devices; this device's part of what it makes of them."""
    if not method.prepares:
        return batch
    items = lax.all_gather(batch["items"], axis, tiled=True)
    whole = method.prepare(batch | {"items": items}, key)
    size = len(jax.tree.leaves(batch["items"])[0])
    start = lax.axis_index(axis) * size
    mine = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), whole["items"])
    return whole | {"items": mine}

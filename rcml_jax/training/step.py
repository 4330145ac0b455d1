"""The train state and one step of it, the same on one device and on many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rcml_jax.methods.base import Method
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


def make_step(method: Method, optimizer: optax.GradientTransformation, steps: int) -> Callable:
    """`step(state, batch, axis) -> (state, metrics)`, to be compiled by a parallel mode.

    axis is the name of the device axis under `pmap` and None otherwise. The random key of a step is
    folded from the run's key and the step, so a resumed run draws the same numbers.
    """

    def step(state: TrainState, batch: dict, axis: str | None) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        progress = state.step / steps
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))

        def loss(params):
            if axis is None:
                return method.loss(params, batch, key, progress)
            embedded = method.embed(params, batch, key)
            whole = across_devices(
                lambda everyone: method.objective(params, everyone, batch, progress), axis
            )
            return whole(embedded)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        if axis is not None:
            grads = lax.pmean(grads, axis)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step

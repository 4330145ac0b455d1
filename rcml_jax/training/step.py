"""The train state and one step of it, the same on one device and on many."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rcml_jax.methods.base import Method
from rcml_jax.training.gradcache import ACCUMULATIONS, whole


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
    than one part has its gradient accumulated over them: see `training.gradcache`.
    """
    graded = whole
    if parts > 1:
        graded = functools.partial(ACCUMULATIONS[accumulation], parts=parts)

    def step(state: TrainState, batch: dict, axis: str | None) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        progress = state.step.astype(jnp.float32) / steps
        (value, metrics), grads = graded(method, state.params, batch, key, progress, axis=axis)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value} | metrics | {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step

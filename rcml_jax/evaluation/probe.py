"""Small classifiers on frozen features."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PROBES = ("linear", "mlp")


def fit_classifier(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    kind: str = "linear",
    l2: float = 1.0,
    steps: int = 200,
    width: int = 256,
    seed: int = 0,
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a binary classifier on (m, f) features and (m,) labels; returns features → labels.

    "linear": logistic regression, Σ log(1 + exp(−y f(x))) + l2/2 ‖w‖² (scikit-learn's C = 1/l2),
    by L-BFGS. "mlp": one hidden layer of `width` ReLUs by the same optimiser. Features are
    standardised by the training mean and deviation.
    """
    if kind not in PROBES:
        raise ValueError(f"probe {kind!r} is unknown; choose one of {PROBES}")
    mean = features.mean(axis=0)
    scale = features.std(axis=0) + 1e-6
    logits, first = (_linear, _first_linear) if kind == "linear" else (_mlp, _first_mlp)
    x = jnp.asarray((features - mean) / scale, jnp.float32)
    y = jnp.asarray(labels, jnp.float32)
    params = _fit(logits, first(features.shape[1], width, seed), x, y, l2, steps=steps)

    def predict(features: np.ndarray) -> np.ndarray:
        scores = logits(params, jnp.asarray((features - mean) / scale, jnp.float32))
        return np.asarray(scores > 0).astype(np.int32)

    return predict


@functools.partial(jax.jit, static_argnames=("logits", "steps"))
def _fit(
    logits: Callable, params: dict, x: jax.Array, y: jax.Array, l2: float, *, steps: int
) -> dict:
    """The parameters at the end; compiled once for a form of classifier and a shape of data."""

    def loss(params):
        fit = jnp.sum(optax.sigmoid_binary_cross_entropy(logits(params, x), y))
        decay = sum(jnp.sum(p * p) for p in jax.tree.leaves(params) if p.ndim > 1)
        return (fit + 0.5 * l2 * decay) / len(y)

    return minimise(loss, params, steps)


def minimise(loss: Callable, params: Any, steps: int, tolerance: float = 1e-5) -> Any:
    """L-BFGS until the gradient's norm is below the tolerance, at most `steps` iterations."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def body(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad)

    def unfinished(carry):
        _, state, norm = carry
        return (optax.tree.get(state, "count") < steps) & (norm > tolerance)

    @jax.jit
    def run(params):
        return jax.lax.while_loop(
            unfinished, body, (params, optimizer.init(params), jnp.asarray(jnp.inf))
        )[0]

    return run(params)


def _first_linear(width_in: int, width: int, seed: int) -> dict:
    del width, seed
    return {"w": jnp.zeros((width_in, 1)), "b": jnp.zeros((1,))}


def _linear(p: dict, x: jax.Array) -> jax.Array:
    return (x @ p["w"] + p["b"])[:, 0]


def _first_mlp(width_in: int, width: int, seed: int) -> dict:
    first, second = jax.random.split(jax.random.key(seed))
    init = jax.nn.initializers.he_normal()
    return {
        "w1": init(first, (width_in, width)),
        "b1": jnp.zeros((width,)),
        "w2": init(second, (width, 1)),
        "b2": jnp.zeros((1,)),
    }


def _mlp(p: dict, x: jax.Array) -> jax.Array:
    return (jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])[:, 0]

"""Gradients of a batch in parts, so that only one part's activations are in memory at a time.

A contrastive loss of a batch is not the mean of the losses of its parts: in a part each sample has
fewer negatives and mixes with fewer partners. "micro" takes that mean, as M3CoL's authors do when
they accumulate gradients; "exact" gives the gradient of the whole batch, for one more forward pass
(the scheme of GradCache, arXiv 2101.06983).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rcml_jax.methods.base import Method


def micro(
    method: Method, params: Any, batch: dict, key: jax.Array, progress: jax.Array, parts: int
) -> tuple:
    """((loss, metrics), gradient): means over the parts, each a batch of its own.

    The leaves of `shared` must have the samples on their leading axis, like those of `items`.
    """
    loss = jax.value_and_grad(method.loss, has_aux=True)

    def one(part: tuple) -> tuple:
        number, piece = part
        return loss(params, piece, jax.random.fold_in(key, number), progress)

    pieces = (jnp.arange(parts), _split(batch, parts))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)  # noqa: E731
    total, _ = lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / parts, total)


def exact(
    method: Method, params: Any, batch: dict, key: jax.Array, progress: jax.Array, parts: int
) -> tuple:
    """((loss, metrics), gradient) of the whole batch, embedded part by part.

    Embed without gradients, take the objective's gradient for the parameters and the embeddings,
    then embed again part by part and pull each part's gradient back.
    """
    batch = method.prepare(batch, key)
    keys = jax.random.split(key, parts)
    pieces = _split(batch["items"], parts)

    def embed(params: Any, piece: Any, key: jax.Array) -> Any:
        return method.embed(params, batch | {"items": piece}, key)

    embedded = lax.map(lambda part: embed(params, *part), (pieces, keys))
    objective = jax.value_and_grad(
        lambda params, everyone: method.objective(params, everyone, batch, progress),
        argnums=(0, 1),
        has_aux=True,
    )
    result, (grads, cotangent) = objective(params, _join(embedded))

    def pull_back(total: Any, part: tuple) -> tuple:
        piece, key, cotangent = part
        _, pull = jax.vjp(lambda params: embed(params, piece, key), params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    grads, _ = lax.scan(pull_back, grads, (pieces, keys, _split(cotangent, parts)))
    return result, grads


def _split(tree: Any, parts: int) -> Any:
    """Part p has the rows p, p + parts, ...: where rows are split over devices, so is each part.

    Parts of neighbouring rows would lie on a few devices each, and all would compute all of them.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


ACCUMULATIONS = {"exact": exact, "micro": micro}

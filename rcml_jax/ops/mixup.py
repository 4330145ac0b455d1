"""Beta mixing of any pytree of arrays with partners from the batch (M3CoL Eq. 2–3)."""

from typing import Any

import jax
import jax.numpy as jnp

_LARGEST_EXPONENT = 86.0


def coefficients(
    key: jax.Array, size: int, *, alpha: float = 0.15, fraction: float | jax.Array = 1.0
) -> jax.Array:
    """λ (size,) ~ Beta(α, α), one a sample, shared by its modalities.

    fraction: the share of samples that are mixed, drawn sample by sample; the others keep λ = 1.
    """
    draw, choose = jax.random.split(key)
    mixed = jax.random.uniform(choose, (size,), jnp.float32) < fraction
    return jnp.where(mixed, symmetric_beta(draw, alpha, (size,)), 1.0)


def symmetric_beta(key: jax.Array, alpha: float | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws (shape) from Beta(α, α), without the rejection of `jax.random.beta`.

    λ = 1/2 + t/(2 √(1 + t²)), t = √(U^(−1/α) − 1) cos(2πV), for uniform U and V: √(2α) t has
    Student's t distribution of 2α degrees of freedom (Bailey 1994; Devroye, "Random variate
    generation in one line of code", 1996). Rejection is a loop, which under `vmap` and on
    accelerators waits for the slowest draw.
    """
    first, second = jax.random.uniform(key, (2, *shape), jnp.float32)
    # Beyond e^86 λ is 0 or 1; no product below may leave the range of float32, which ends at e^88.
    tail = jnp.expm1(jnp.minimum(-jnp.log1p(-first) / alpha, _LARGEST_EXPONENT))
    turn = jnp.cos(2 * jnp.pi * second)
    square = tail * turn**2
    root = jnp.sqrt(1 + square)
    # The smaller of λ and 1 − λ in a form that does not cancel.
    smaller = 1 / (2 * root * (root + jnp.sqrt(square)))
    return jnp.where(turn < 0, smaller, 1 - smaller)


def partners(key: jax.Array, size: int, *, where: jax.Array | None = None) -> jax.Array:
    """A random permutation (size,) int: each sample's partner, which may be the sample itself.

    where: (size,) bool, false for padding, which is its own partner and nobody else's.
    """
    if where is None:
        return jax.random.permutation(key, size)
    where = jnp.asarray(where, bool)
    # Both orders have the valid samples first and the padding after them, in its own order.
    indices = jnp.argsort(~where, stable=True)
    draws = jax.random.uniform(key, (size,), jnp.float32)
    shuffled = jnp.argsort(jnp.where(where, draws, 2.0), stable=True)
    return jnp.zeros(size, shuffled.dtype).at[indices].set(shuffled)


def mix(tree: Any, coefficient: jax.Array, partner: jax.Array) -> Any:
    """x̃_i = λ_i x_i + (1 − λ_i) x_partner(i) for every leaf (n, ...) of a tree (Eq. 2–3).

    coefficient: (n,); partner: (n,) int. Partners come from the whole batch: mix before it is split
    over devices. Integer leaves (token ids) cannot be mixed and raise TypeError.
    """
    return mix_with(tree, jax.tree.map(lambda x: jnp.asarray(x)[partner], tree), coefficient)


def mix_with(tree: Any, others: Any, coefficient: jax.Array) -> Any:
    """λ_i x_i + (1 − λ_i) y_i for the leaves x (n, ...) of a tree and y of another, the partners'.

    For partners that were fetched in a smaller type. Raises TypeError as `mix` does.
    """

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"an array of {x.dtype} cannot be mixed; mix its embedding")
        share = coefficient.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        return share * x + (1 - share) * y

    return jax.tree.map(one, tree, others)

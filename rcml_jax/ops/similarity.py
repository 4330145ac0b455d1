"""Similarities of vectors; a larger score means more similar, so distances are negated.

Every similarity comes in two forms. The matrix form takes x (n, d) and y (m, d) to scores (n, m);
the paired form takes x (..., d) and y (..., d), broadcast, to (...), for candidates gathered one by
one. A score depends on its two vectors alone, never on the rest of the array, so both forms and any
split into blocks agree. Inputs narrower than 32 bits are computed, and scored, in float32.
Gradients are finite everywhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Similarity = Callable[..., jax.Array]


def as_float(x: jax.Array) -> jax.Array:
    """The array itself if it is float32 or float64, else its float32 copy."""
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Vectors of length one along the last axis; a zero vector stays zero."""
    x = as_float(x)
    # Squares of tiny or huge entries would leave the floating-point range. The result does not
    # depend on the scale, so the scale needs no gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest >= jnp.finfo(x.dtype).tiny, largest, 1)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Dot products x·y: (n, d), (m, d) → (n, m)."""
    return as_float(x) @ as_float(y).T


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosines x·y / (‖x‖ ‖y‖): (n, d), (m, d) → (n, m); 0 if either vector is zero."""
    return l2_normalize(x) @ l2_normalize(y).T


def euclidean(x: jax.Array, y: jax.Array, *, block_size: int = 32) -> jax.Array:
    """Negative Euclidean distances −‖x − y‖₂: (n, d), (m, d) → (n, m).

    Taken from the differences, `block_size` rows of x at a time: expanding the square into dot
    products would lose the distances between close vectors to rounding. The gradient at x = y is 0.
    """
    return _blockwise(paired_euclidean, x, y, block_size)


def manhattan(x: jax.Array, y: jax.Array, *, block_size: int = 32) -> jax.Array:
    """Negative Manhattan distances −‖x − y‖₁: (n, d), (m, d) → (n, m).

    Works on `block_size` rows of x at a time, so that no (n, m, d) array is held.
    """
    return _blockwise(paired_manhattan, x, y, block_size)


def chi_square(
    x: jax.Array,
    y: jax.Array,
    *,
    signed: str = "absolute",
    epsilon: float = 1e-12,
    block_size: int = 32,
) -> jax.Array:
    """Negative chi-square distances −Σ (x − y)² / (|x| + |y| + ε): (n, d), (m, d) → (n, m).

    signed: "absolute" takes entries as they are; "shift" first subtracts from both vectors of a
    pair the smallest entry that the two have in common, so that they are non-negative. Any other
    value raises ValueError. Works on `block_size` rows of x at a time.
    """

    def score(row, rows):
        return paired_chi_square(row, rows, signed=signed, epsilon=epsilon)

    return _blockwise(score, x, y, block_size)


def paired_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Dot products of paired vectors: (..., d), (..., d) → (...)."""
    return jnp.sum(as_float(x) * as_float(y), axis=-1)


def paired_cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosines of paired vectors: (..., d), (..., d) → (...); 0 if either vector is zero."""
    return jnp.sum(l2_normalize(x) * l2_normalize(y), axis=-1)


def paired_euclidean(x: jax.Array, y: jax.Array) -> jax.Array:
    """Negative Euclidean distances of paired vectors: (..., d), (..., d) → (...)."""
    square = jnp.sum((as_float(x) - as_float(y)) ** 2, axis=-1)
    # The slope of the root at 0 is infinite, and infinity times 0 is NaN: keep 0 out of the root.
    apart = square > 0
    return -jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)


def paired_manhattan(x: jax.Array, y: jax.Array) -> jax.Array:
    """Negative Manhattan distances of paired vectors: (..., d), (..., d) → (...)."""
    return -jnp.sum(jnp.abs(as_float(x) - as_float(y)), axis=-1)


def paired_chi_square(
    x: jax.Array, y: jax.Array, *, signed: str = "absolute", epsilon: float = 1e-12
) -> jax.Array:
    """Negative chi-square distances of paired vectors: (..., d), (..., d) → (...).

    Options and errors as in `chi_square`.
    """
    if signed not in ("absolute", "shift"):
        raise ValueError(f"signed is {signed!r}; it must be 'absolute' or 'shift'")
    x, y = as_float(x), as_float(y)
    if signed == "shift":
        smallest = jnp.min(jnp.minimum(x, y), axis=-1, keepdims=True)
        x, y = x - smallest, y - smallest
    difference = x - y
    # (difference / total) is at most 1, so nothing overflows before the product does.
    return -jnp.sum(difference * (difference / (jnp.abs(x) + jnp.abs(y) + epsilon)), axis=-1)


def _blockwise(score: Similarity, x: jax.Array, y: jax.Array, block_size: int) -> jax.Array:
    """Score every row of x against all of y, `block_size` rows at a time, forward and backward."""
    x, y = as_float(x), as_float(y)
    row_scores = jax.checkpoint(lambda row: score(row[None], y), prevent_cse=False)
    return jax.lax.map(row_scores, x, batch_size=block_size)


SIMILARITIES: dict[str, Similarity] = {
    "cosine": cosine,
    "dot": dot,
    "euclidean": euclidean,
    "manhattan": manhattan,
    "chi_square": chi_square,
}

PAIRED: dict[str, Similarity] = {
    "cosine": paired_cosine,
    "dot": paired_dot,
    "euclidean": paired_euclidean,
    "manhattan": paired_manhattan,
    "chi_square": paired_chi_square,
}


def get(name: str) -> Similarity:
    """The matrix form of a similarity; ValueError with the known names if there is none."""
    return _look_up(SIMILARITIES, name)


def paired(name: str) -> Similarity:
    """The paired form of a similarity; ValueError with the known names if there is none."""
    return _look_up(PAIRED, name)


def _look_up(table: dict[str, Similarity], name: str) -> Similarity:
    if name not in table:
        raise ValueError(f"unknown similarity {name!r}; it must be one of {', '.join(table)}")
    return table[name]

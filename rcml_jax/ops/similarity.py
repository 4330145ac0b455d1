"""Similarities of vectors; a larger score means more similar, so distances are negated.

Every similarity comes in two forms. The matrix form takes x (n, d) and y (m, d) to scores (n, m);
the paired form takes x (..., d) and y (..., d), broadcast, to (...), for candidates gathered one by
one. A score depends on its two vectors alone, never on the rest of the array, so both forms and any
split into blocks agree. Inputs narrower than 32 bits are computed, and scored, in float32.
Gradients are finite everywhere.

`prepare_rows` and `row_scores` are a faster form of the matrices, without gradients, for a streamed
search: the first runs once for each row, the second for each pair of chunks. In chunks of a given
shape a score is the same to the bit at every position, so that equal rows tie.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Similarity = Callable[..., jax.Array]
#: Rows of x worked on at a time, and dimensions added at a time: a tile of scores stays in the
#: processor's cache, and is read and written once in so many dimensions.
_TILE, _UNROLL = 128, 16


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


def prepare_rows(similarity: str, rows: jax.Array) -> jax.Array:
    """Rows (n, d) as `row_scores` takes them: float32, and of length one for "cosine"."""
    return l2_normalize(rows) if similarity == "cosine" else as_float(rows)


def row_scores(
    similarity: str, x: jax.Array, y: jax.Array, *, signed: str = "absolute", epsilon: float = 1e-12
) -> jax.Array:
    """Scores of prepared rows: (n, d), (m, d) → (n, m).

    similarity: a name of `rcml_jax.ops.similarity`; signed, epsilon: of "chi_square", as there. n
    is at most 128 or a multiple of it. Products have full float32 precision on every device. The
    others are sums of the dimensions one after the other, vectorised over pairs; no (n, m, d) is
    held.
    """
    if similarity in ("cosine", "dot"):
        return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    if similarity == "manhattan":
        return -_sum_over_dimensions(lambda a, b: jnp.abs(a - b), x, y)
    if similarity == "euclidean":
        return -jnp.sqrt(_sum_over_dimensions(lambda a, b: (a - b) ** 2, x, y))
    if similarity != "chi_square":
        raise ValueError(f"unknown similarity {similarity!r}")
    if signed not in ("absolute", "shift"):
        raise ValueError(f"signed is {signed!r}; it must be 'absolute' or 'shift'")
    if signed == "absolute":
        term = functools.partial(_chi_square, jnp.abs, epsilon)
        return -_sum_over_dimensions(term, x, y)
    smallest = jnp.minimum(x.min(axis=1)[:, None], y.min(axis=1))

    def shifted(a, b, low):
        return _chi_square(lambda value: value - low, epsilon, a, b)

    return -_sum_over_dimensions(shifted, x, y, smallest)


def _chi_square(size, epsilon, a, b):
    return (a - b) * ((a - b) / (size(a) + size(b) + epsilon))


def _sum_over_dimensions(term: Callable[..., jax.Array], x, y, *of_pairs) -> jax.Array:
    """Σ_k term(x_ik, y_jk, *of_pairs_ij): (n, d), (m, d), (n, m)... → (n, m)."""
    n, width = x.shape
    tile = min(n, _TILE)
    # Zeros in both add nothing: every similarity of a number to itself is 0.
    x, y = (jnp.pad(v, ((0, 0), (0, -width % _UNROLL))) for v in (x, y))
    steps = x.shape[1] // _UNROLL
    columns = y.T.reshape(steps, _UNROLL, len(y))

    def of_tile(parts):
        rows, *others = parts
        rows = rows.T.reshape(steps, _UNROLL, tile)

        def add(total, step):
            a, b = step
            terms = (term(a[k][:, None], b[k], *others) for k in range(_UNROLL))
            return total + functools.reduce(jnp.add, terms), None

        return jax.lax.scan(add, jnp.zeros((tile, len(y)), x.dtype), (rows, columns))[0]

    tiles = (v.reshape(n // tile, tile, v.shape[1]) for v in (x, *of_pairs))
    return jax.lax.map(of_tile, tuple(tiles)).reshape(n, len(y))

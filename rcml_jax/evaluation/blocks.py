"""Similarities of two blocks of rows: fast forms without gradients, for a streamed search.

Two steps: `prepare` runs once for each row, `scores` for each pair of blocks. A score depends on
its two rows only. In blocks of a given shape it is the same to the bit at every position, so that
equal rows tie. `rcml_jax.ops.similarity` has the forms with gradients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rcml_jax.ops.similarity import as_float, l2_normalize

#: Rows of x worked on at a time, and dimensions added at a time: a tile of scores stays in the
#: processor's cache, and is read and written once in so many dimensions.
_TILE, _UNROLL = 128, 16


def prepare(similarity: str, rows: jax.Array) -> jax.Array:
    """Rows (n, d) as `scores` takes them: float32, and of length one for "cosine"."""
    return l2_normalize(rows) if similarity == "cosine" else as_float(rows)


def scores(
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

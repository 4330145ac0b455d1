"""Similarities in closed form, orthogonal Procrustes and CCA, and what every learner subtracts.

Arrays are images (n, d), texts (m, d′) and `rows` (m,), the row of each text's image. All is
computed in float64, from moments of the m pairs that are added up block by block.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.gap import inverse_root

MODALITIES = ("image", "text")
BLOCK = 8192


def fit_preparation(image: np.ndarray, text: np.ndarray, rows: np.ndarray) -> dict[str, dict]:
    """{"image", "text"} → {"mean": (d,), "scale": ()} of rows of length one over the pairs.

    scale: the root mean square of the entries of what is left after the mean is subtracted. Raises
    UserError if nothing is left.
    """
    sums = [np.zeros(x.shape[1]) for x in (image, text)]
    squares = [0.0, 0.0]
    for pair in _pair_blocks(image, text, rows):
        for i, x in enumerate(pair):
            sums[i] += x.sum(axis=0)
            squares[i] += np.sum(x * x)
    found = {}
    for name, total, square in zip(MODALITIES, sums, squares, strict=True):
        mean = total / len(text)
        variance = square / len(text) - mean @ mean
        # Below this, rows of float32 differ by their rounding alone.
        if variance < 1e-13:
            raise UserError(f"the rows of {name} all point the same way; there is nothing to learn")
        scale = np.sqrt(variance / len(mean))
        found[name] = {"mean": jnp.asarray(mean, jnp.float32), "scale": jnp.float32(scale)}
    return found


def procrustes(
    options: Any, prepare: dict, image: np.ndarray, text: np.ndarray, rows: np.ndarray
) -> dict[str, jax.Array]:
    """{"rotation": (d, d′)}: the R that brings prepared images X nearest to their texts Y.

    R = U Vᵀ of XᵀY = U S Vᵀ (Schönemann, 1966), a rotation or reflection; with unequal widths the
    partial isometry that makes tr(Rᵀ XᵀY) greatest.
    """
    _, _, cross = _moments(prepare, image, text, rows)
    u, _, vt = np.linalg.svd(cross, full_matrices=False)
    return {"rotation": jnp.asarray(u @ vt, jnp.float32)}


def cca(
    options: Any, prepare: dict, image: np.ndarray, text: np.ndarray, rows: np.ndarray
) -> dict[str, jax.Array]:
    """{"image": (d, k), "text": (d′, k), "correlations": (k,)}: canonical directions, best first.

    Variates have a variance of one. k is the narrower width or `options.width`, if that is less;
    covariances are shrunk by `options.shrinkage` (`gap.inverse_root`). Raises UserError if one is
    singular.
    """
    x_x, y_y, cross = _moments(prepare, image, text, rows)
    whiten_x = inverse_root(x_x, options.shrinkage, "image")
    whiten_y = inverse_root(y_y, options.shrinkage, "text")
    u, correlations, vt = np.linalg.svd(whiten_x @ cross @ whiten_y, full_matrices=False)
    kept = slice(0, options.width)
    params = {
        "image": (whiten_x @ u)[:, kept],
        "text": (whiten_y @ vt.T)[:, kept],
        "correlations": np.minimum(correlations[kept], 1),
    }
    return {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}


CLOSED_FORMS = {"procrustes": procrustes, "cca": cca}


def _moments(prepare, image, text, rows):
    """XᵀX, YᵀY and XᵀY of the prepared pairs, over their number."""
    widths = image.shape[1], text.shape[1]
    moments = [np.zeros((widths[i], widths[j])) for i, j in ((0, 0), (1, 1), (0, 1))]
    means, scales = (
        [np.asarray(prepare[name][key], np.float64) for name in MODALITIES]
        for key in ("mean", "scale")
    )
    for pair in _pair_blocks(image, text, rows):
        x, y = ((v - m) / s for v, m, s in zip(pair, means, scales, strict=True))
        for moment, (a, b) in zip(moments, ((x, x), (y, y), (x, y)), strict=True):
            moment += a.T @ b
    return [moment / len(text) for moment in moments]


def _pair_blocks(
    image: np.ndarray, text: np.ndarray, rows: np.ndarray
) -> Iterator[list[np.ndarray]]:
    """Rows of length one of matched pairs, in float64, block by block; rows of zeros stay zero."""
    for start in range(0, len(text), BLOCK):
        part = slice(start, start + BLOCK)
        pair = [np.asarray(x, np.float64) for x in (image[rows[part]], text[part])]
        lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
        yield [x / np.where(n > 0, n, 1) for x, n in zip(pair, lengths, strict=True)]

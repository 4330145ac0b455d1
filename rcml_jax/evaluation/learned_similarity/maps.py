"""Closed-form maps between embeddings of towers that were trained apart.

All functions are pure. Images are x (n, d) and texts y (m, d′); the widths may differ. `prepared`
rows have length one, less the mean of their modality, over one number for all entries (see
`fit_preparation`). What needs matched pairs takes second moments of them, which `moments` adds up
in chunks, so that any number of pairs fits in memory.

References:
  Procrustes: Schönemann, 1966. CCA: Hotelling, 1936; with shrunk covariances, Vinod, 1976. Kernel
  CCA: Bach and Jordan, 2002, on Nyström features (Williams and Seeger, 2001). Relative
  representations: Moschella et al., 2023; kept entries and power: Norelli et al., 2023 (ASIF).
  Matching without pairs: Alvarez-Melis and Jaakkola, 2018 (Gromov-Wasserstein); Grave et al., 2019
  (Wasserstein-Procrustes).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.modality_gap import importing_ott, inverse_root, scaled_rows
from rcml_jax.ops.similarity import l2_normalize

MODALITIES = ("image", "text")
CHUNK = 8192
#: Directions of a kernel matrix below this share of its largest eigenvalue are rounding noise.
_NOISE = 1e-6
#: Entropy of the transport plans, as a share of the mean cost, from the first round to the last.
_ENTROPY = (0.05, 0.005)
_ROUNDS = 10


def paired_chunks(
    image: np.ndarray, text: np.ndarray, rows: np.ndarray
) -> Iterator[list[np.ndarray]]:
    """Rows of length one of matched pairs, in float64, chunk by chunk; zero rows stay zero."""
    for start in range(0, len(text), CHUNK):
        part = slice(start, start + CHUNK)
        yield [scaled_rows(x, True) for x in (image[rows[part]], text[part])]


def fit_preparation(image: np.ndarray, text: np.ndarray, rows: np.ndarray) -> dict[str, dict]:
    """{"image", "text"} → {"mean": (d,), "scale": ()} of rows of length one over the pairs.

    scale: the root mean square of the entries of what is left after the mean is subtracted. Raises
    UserError if nothing is left.
    """
    sums = [np.zeros(x.shape[1]) for x in (image, text)]
    squares = [0.0, 0.0]
    for pair in paired_chunks(image, text, rows):
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


def prepared(preparation: dict, x: jax.Array) -> jax.Array:
    """Rows of length one, less the training mean, over the training scale: {"mean", "scale"}."""
    return (l2_normalize(x) - preparation["mean"]) / preparation["scale"]


def moments(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """XᵀX, YᵀY and XᵀY over the number of pairs; pairs: chunks of matched rows (n, d), (n, d′)."""
    sums: list[Any] = [0.0, 0.0, 0.0]
    count = 0
    for x, y in pairs:
        sums = [s + a.T @ b for s, (a, b) in zip(sums, ((x, x), (y, y), (x, y)), strict=True)]
        count += len(x)
    x_x, y_y, cross = (s / count for s in sums)
    return x_x, y_y, cross


def procrustes(cross: np.ndarray) -> np.ndarray:
    """The rotation or reflection R (d, d′) that brings X nearest to Y, of cross = XᵀY (d, d′).

    R = U Vᵀ of XᵀY = U S Vᵀ. With unequal widths it is the partial isometry that makes
    tr(Rᵀ XᵀY) greatest.
    """
    u, _, vt = np.linalg.svd(cross, full_matrices=False)
    return u @ vt


def cca(
    x_x: np.ndarray,
    y_y: np.ndarray,
    cross: np.ndarray,
    *,
    shrinkage: float = 0.0,
    width: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canonical directions (d, k) and (d′, k) and their correlations (k,), largest first.

    x_x, y_y, cross: second moments of centred rows, over their number. Variates have a variance of
    one. shrinkage s: covariances are (1 − s) C + s tr(C)/d I and the cross-covariance is (1 − s)
    XᵀY, which is the shrinkage of both modalities' joint covariance, so that no correlation exceeds
    1. k is the narrower width, or `width` if that is less. Raises UserError if a covariance is
    singular.
    """
    whiten_x = inverse_root(x_x, shrinkage, "image")
    whiten_y = inverse_root(y_y, shrinkage, "text")
    joint = (1 - shrinkage) * whiten_x @ cross @ whiten_y
    u, correlations, vt = np.linalg.svd(joint, full_matrices=False)
    kept = slice(0, width)
    found = whiten_x @ u, whiten_y @ vt.T
    return found[0][:, kept], found[1][:, kept], np.minimum(correlations[kept], 1)


def gaussian_kernel(x: jax.Array, landmarks: jax.Array, bandwidth: float) -> jax.Array:
    """exp(−‖x − l‖² / (2 d b)) of rows x (n, d) and landmarks (k, d): (n, k).

    2 d is the mean squared distance of prepared rows; `bandwidth` b is in units of it.
    """
    square = (
        jnp.sum(x * x, axis=1)[:, None]
        + jnp.sum(landmarks * landmarks, axis=1)
        - 2 * x @ landmarks.T
    )
    return jnp.exp(-jnp.maximum(square, 0) / (2 * x.shape[1] * bandwidth))


def nystroem_root(kernel: np.ndarray) -> np.ndarray:
    """K^(−½) (k, r) on the r directions of the landmarks' kernel (k, k) that are not noise.

    The features k(x, L) K^(−½) of two rows have the kernel as their product: exactly where one of
    the rows is in the span of the landmarks, and approximately elsewhere.
    """
    values, vectors = np.linalg.eigh(np.asarray(kernel, np.float64))
    kept = values > _NOISE * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept])


def kernel_features(
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    *,
    landmarks: int = 1000,
    bandwidth: float = 1.0,
) -> tuple[dict[str, dict[str, Any]], list[np.ndarray], tuple]:
    """Gaussian-kernel features of prepared images and texts: sides, means and centred `moments`.

    x (n, d), y (m, d′), rows (m,): the image of each text. landmarks: at most so many rows of each
    modality, evenly spaced, span the features. sides: {"image", "text"}: {"landmarks", "map",
    "bandwidth"}, of which the features of x are k(x, landmarks) map; means: (k,) of each.
    """
    sides: dict[str, dict[str, Any]] = {}
    features = []
    for name, values in zip(MODALITIES, (x, y), strict=True):
        chosen = jnp.asarray(values[_spaced(len(values), landmarks)], jnp.float32)
        root = nystroem_root(np.asarray(gaussian_kernel(chosen, chosen, bandwidth)))
        kernels = [
            np.asarray(gaussian_kernel(jnp.asarray(values[i : i + CHUNK]), chosen, bandwidth))
            for i in range(0, len(values), CHUNK)
        ]
        features.append(np.concatenate(kernels).astype(np.float64) @ root)
        sides[name] = {"landmarks": chosen, "map": root, "bandwidth": np.float32(bandwidth)}
    counts = np.bincount(rows, minlength=len(x)) / len(y)
    means = [counts @ features[0], features[1].mean(axis=0)]
    chunks = (
        (features[0][rows[i : i + CHUNK]] - means[0], features[1][i : i + CHUNK] - means[1])
        for i in range(0, len(y), CHUNK)
    )
    return sides, means, moments(chunks)


def kernel_variates(
    sides: dict[str, dict[str, Any]],
    means: list[np.ndarray],
    moments: tuple,
    *,
    shrinkage: float = 0.1,
    width: int | None = None,
) -> dict[str, dict[str, np.ndarray] | np.ndarray]:
    """Regularised CCA between the features of `kernel_features`.

    With all rows as landmarks it is kernel CCA itself. Returns {"image", "text"}: {"landmarks",
    "map", "offset", "bandwidth"}, of which the variates of x are k(x, landmarks) map − offset; and
    "correlations" (k,).
    """
    *directions, correlations = cca(*moments, shrinkage=shrinkage, width=width)
    found: dict[str, Any] = {
        name: side | {"map": side["map"] @ of_side, "offset": mean @ of_side}
        for (name, side), mean, of_side in zip(sides.items(), means, directions, strict=True)
    }
    return found | {"correlations": correlations}


def relative(
    x: jax.Array, anchors: jax.Array, *, power: float = 1.0, kept: int | jax.Array | None = None
) -> jax.Array:
    """Cosines of rows x (n, d) with anchors (k, d), each raised to a power, of length one: (n, k).

    Two modalities with matched anchors can be compared by them. kept: entries other than the `kept`
    largest of a row are 0; None keeps all. A negative cosine keeps its sign.
    """
    cosines = l2_normalize(x) @ l2_normalize(anchors).T
    if kept is not None:
        place = jnp.clip(cosines.shape[1] - kept, 0, cosines.shape[1] - 1)
        cosines = jnp.where(cosines < jnp.sort(cosines, axis=1)[:, place][:, None], 0, cosines)
    return l2_normalize(jnp.sign(cosines) * jnp.abs(cosines) ** power)


def anchors_of_pairs(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Anchors (k, d), (k, d′): each image that has texts, and the mean of its texts.

    rows (m,): the image of each text. limit: at most so many, evenly spaced.
    """
    images, own = np.unique(rows, return_inverse=True)
    sums = np.zeros((len(images), y.shape[1]))
    np.add.at(sums, own, y)
    means = sums / np.bincount(own)[:, None]
    chosen = _spaced(len(images), limit or len(images))
    return x[images[chosen]], means[chosen]


def match_unpaired(x: np.ndarray, y: np.ndarray, *, points: int = 1000, seed: int = 0) -> tuple:
    """The isometry R (d, d′) and the transport plan (n′, m′), found without any pair.

    x (n, d), y (m, d′): prepared rows, in any order; at most `points` of each, drawn by the seed,
    are used. Gromov-Wasserstein matches the two matrices of distances. From its plan P,
    R = procrustes(XᵀPY); then the plan of the costs ‖xR − y‖² and R take turns, with falling
    entropy. By ott-jax. Returns R, P and the rows of x and of y that P is about. Raises UserError
    if ott-jax is not installed.
    """
    match, transport = _ott()
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.permutation(len(v))[:points]) for v in (x, y)]
    clouds = [jnp.asarray(v[c], jnp.float32) for v, c in zip((x, y), chosen, strict=True)]
    plan = match(*(_square_distances(c, c) for c in clouds), _ENTROPY[0])
    for entropy in np.geomspace(*_ENTROPY, _ROUNDS):
        rotation = procrustes(np.asarray(clouds[0].T @ (plan @ clouds[1]), np.float64))
        turned = clouds[0] @ jnp.asarray(rotation, jnp.float32)
        plan = transport(_square_distances(turned, clouds[1]), entropy)
    rotation = procrustes(np.asarray(clouds[0].T @ (plan @ clouds[1]), np.float64))
    return rotation, np.asarray(plan), *chosen


def _square_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared distances (n, m), over their mean."""
    square = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1) - 2 * x @ y.T
    square = jnp.maximum(square, 0)
    return square / jnp.mean(square)


@functools.cache
def _ott() -> tuple[Callable, Callable]:
    """Plans by Gromov-Wasserstein, of two cost matrices, and by Sinkhorn, of one; both jitted."""
    with importing_ott("matching without pairs needs"):
        from ott.geometry import geometry
        from ott.solvers import linear, quadratic

    @jax.jit
    def match(x_x, y_y, entropy):
        images, texts = (geometry.Geometry(cost_matrix=c) for c in (x_x, y_y))
        options: Any = {"epsilon": entropy, "relative_epsilon": "mean"}
        limit = {"max_iterations": 500}
        return quadratic.solve(images, texts, linear_solver_kwargs=limit, **options).matrix

    @jax.jit
    def transport(cost, entropy):
        space = geometry.Geometry(cost_matrix=cost, epsilon=entropy)
        return linear.solve(space, max_iterations=500).matrix

    return match, transport


def _spaced(length: int, count: int) -> np.ndarray:
    """At most `count` indices below `length`, evenly spaced."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(int))

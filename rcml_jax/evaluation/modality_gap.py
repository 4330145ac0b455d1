"""The modality gap: how far apart images and texts lie, how narrow each cone is, and a calibration.

Embeddings are two matrices, images (n, d) and texts (m, d), and `image_of_text` (m,) int, the row
of each text's image. Unless `normalize` is false, rows are scaled to length one first, as the
cosine does and as Liang et al. (2022) measure the gap. Towers of different scale can then be
compared.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation import WASSERSTEIN

#: Cosines that are all above this are those of a collapsed embedding.
COLLAPSED = 0.95
BLOCK = 8192


def modality_gap(
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    wasserstein: str = "gaussian",
    normalize: bool = True,
    pairs: int = 10_000,
    points: int = 2048,
    projections: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Distances between two modalities, and how narrow the cone of each is.

    Returns a dict of JSON values:
    centroid: ‖μ_image − μ_text‖₂.
    wasserstein2: the Wasserstein-2 distance, by the closed form for Gaussians of the same moments
        (`gaussian_wasserstein2`); or by ott-jax (extra `alignment`), from at most `points` rows of
        each modality drawn by the seed: "sinkhorn" (`sinkhorn_wasserstein2`) or "sliced" along
        `projections` directions (`sliced_wasserstein2`).
    matched_cosine, random_cosine: the mean cosine of all matched pairs, and that of `pairs` pairs
        drawn by the seed from those that are not matched; random_within: {"image", "text"}, the
        mean cosine of as many pairs of different rows of one modality.
    effective_rank: {"image", "text"}, exp of the entropy of σ/Σσ for the singular values σ of the
        centred matrix (Roy and Vetterli, 2007): d for a round cloud, 1 for a line.
    first_component: {"image", "text"}, σ₁²/Σσ², the share of the variance on the first axis.
    collapsed: which of "pairs" (matched and random), "image" and "text" have every cosine that was
        looked at above 0.95; then `warnings` says so in a sentence.
    and the protocol: wasserstein, normalize, pairs, points (None with "gaussian"), seed. From few
        points in many dimensions an empirical distance is far above that of the distributions.

    Raises UserError for matrices that cannot be compared and for an unknown name.
    """
    if wasserstein not in WASSERSTEIN:
        raise UserError(
            f"wasserstein={wasserstein!r} is unknown; choose one of {', '.join(WASSERSTEIN)}"
        )
    _check_count("pairs", pairs)
    _check_count("points", points)
    _check_count("projections", projections)
    image, text, image_of_text = check_pairs(image, text, image_of_text, same_width=True)
    moments = {"image": _moments(image, normalize), "text": _moments(text, normalize)}
    gaussian = (*moments["image"], *moments["text"])
    spectra = {name: _spectrum(covariance) for name, (_, covariance) in moments.items()}
    if wasserstein == "gaussian":
        distance = gaussian_wasserstein2(*gaussian)
    else:
        rng = np.random.default_rng(seed)
        clouds = [scaled_rows(_sample(x, points, rng), normalize) for x in (image, text)]
        if wasserstein == "sinkhorn":
            distance = sinkhorn_wasserstein2(*clouds)
        else:
            distance = sliced_wasserstein2(*clouds, projections=projections, seed=seed)
    matched = cosines(image, text, image_of_text, np.arange(len(text)))
    unmatched = cosines(image, text, *unmatched_pairs(len(image), image_of_text, pairs, seed))
    within = {}
    for name, x in (("image", image), ("text", text)):
        # Rows matched to themselves: the pairs that are left are those of different rows.
        within[name] = cosines(x, x, *unmatched_pairs(len(x), np.arange(len(x)), pairs, seed))
    lowest = {"pairs": min(matched.min(), unmatched.min())}
    lowest |= {name: cosines.min() for name, cosines in within.items()}
    collapsed = [name for name, cosine in lowest.items() if cosine > COLLAPSED]
    return {
        "centroid": float(np.linalg.norm(moments["image"][0] - moments["text"][0])),
        "wasserstein2": distance,
        "matched_cosine": float(matched.mean()),
        "random_cosine": float(unmatched.mean()),
        "random_within": {name: float(cosines.mean()) for name, cosines in within.items()},
        "effective_rank": {name: _effective_rank(s) for name, s in spectra.items()},
        "first_component": {name: _first_share(s) for name, s in spectra.items()},
        "collapsed": collapsed,
        "warnings": [
            f"the embedding has collapsed: every cosine seen ({name}) is above {COLLAPSED} "
            f"(lowest {lowest[name]:.4f})"
            for name in collapsed
        ],
        "wasserstein": wasserstein,
        "normalize": normalize,
        "pairs": pairs,
        "points": None if wasserstein == "gaussian" else points,
        "seed": seed,
    }


def gaussian_wasserstein2(
    mean_x: np.ndarray, cov_x: np.ndarray, mean_y: np.ndarray, cov_y: np.ndarray
) -> float:
    """W₂ of two Gaussians: √(‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₂^½ C₁ C₂^½)^½)) (Gelbrich, 1990).

    means (d,), covariances (d, d), which may be singular. The trace of the last root is computed as
    the sum of the singular values of C₁^½ C₂^½, which it equals: no root of rounding noise is
    taken, so equal singular covariances are at distance 0.
    """
    roots = [np.asarray(_root(np.asarray(c, np.float64))) for c in (cov_x, cov_y)]
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    square = np.sum((np.asarray(mean_x, np.float64) - mean_y) ** 2)
    spread = np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    return float(np.sqrt(square + max(spread, 0.0)))


def sinkhorn_wasserstein2(x: np.ndarray, y: np.ndarray) -> float:
    """W₂ of two clouds (n, d), (m, d) as the root of the Sinkhorn divergence, by ott-jax.

    The divergence is the entropic cost less that of each cloud with itself, so that equal clouds
    are at distance 0. The means, whose part ‖μ₁ − μ₂‖² is exact, are taken out first: the entropy's
    weight, ott's default share of the typical cost, then follows the spread and not the shift.
    Raises UserError if ott-jax is not installed or the iterations do not converge.
    """
    shift = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    clouds = [jnp.asarray(c - c.mean(axis=0), jnp.float32) for c in (x, y)]
    value, converged = _ott()[0](*clouds)
    if not np.all(converged):
        raise UserError("Sinkhorn did not converge on these embeddings; use sliced or gaussian")
    return float(np.sqrt(np.sum(shift**2) + max(float(value), 0.0)))


def sliced_wasserstein2(
    x: np.ndarray, y: np.ndarray, *, projections: int = 256, seed: int = 0
) -> float:
    """Sliced W₂ of two clouds (n, d), (m, d): the root of the mean, over random directions on the
    sphere, of the squared W₂ of the projections, by ott-jax.

    A shift by δ is at distance ‖δ‖/√d on average. Raises UserError if ott-jax is not installed.
    """
    clouds = [jnp.asarray(c, jnp.float32) for c in (x, y)]
    square = _ott()[1](*clouds, jax.random.key(seed), projections)
    return float(np.sqrt(max(float(square), 0.0)))


@contextlib.contextmanager
def importing_ott(what: str) -> Iterator[None]:
    """Inside, ott may be imported; what: the start of the sentence if it is missing: "X needs".

    Raises UserError if ott-jax is not installed.
    """
    try:
        with warnings.catch_warnings():
            # ott's dependency jaxopt warns that nobody maintains it any more.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except ImportError as error:
        raise UserError(f'{what} ott-jax: pip install "rcml_jax[alignment]"') from error


@functools.cache
def _ott() -> tuple[Callable, Callable]:
    """The Sinkhorn divergence, with whether it converged, and the sliced distance, both jitted."""
    with importing_ott('wasserstein="sinkhorn" and "sliced" need'):
        from ott.geometry import pointcloud
        from ott.tools import sinkhorn_divergence, sliced

    @jax.jit
    def divergence(x, y):
        value, out = sinkhorn_divergence.sinkhorn_divergence(pointcloud.PointCloud, x=x, y=y)
        return value, jnp.stack([jnp.asarray(c) for c in out.converged])

    @functools.partial(jax.jit, static_argnums=3)
    def distance(x, y, key, projections):
        return sliced.sliced_wasserstein(x, y, n_proj=projections, rng=key)[0]

    return divergence, distance


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Maps of images and texts to embeddings without the gap, fitted by `calibrate`.

    `means` and `maps` hold each modality's mean (d,) and whitening matrix (d, d) or None.
    """

    means: dict[str, np.ndarray]
    maps: dict[str, np.ndarray | None]
    normalize: bool

    def image(self, x: np.ndarray) -> np.ndarray:
        """Calibrated embeddings (n, d) float32 of images (n, d)."""
        return self._apply("image", x)

    def text(self, x: np.ndarray) -> np.ndarray:
        """Calibrated embeddings (n, d) float32 of texts (n, d)."""
        return self._apply("text", x)

    def inverse(self, modality: str, z: np.ndarray) -> np.ndarray:
        """The rows (n, d) that calibrated ones were made from: of length one, if `normalize`."""
        mean, whitening = self.means[modality], self.maps[modality]
        z = np.asarray(check_matrix(modality, z), np.float64)
        return (z if whitening is None else np.linalg.solve(whitening.T, z.T).T) + mean

    def _apply(self, modality: str, x: np.ndarray) -> np.ndarray:
        x, mean = check_matrix(modality, x), self.means[modality]
        if x.shape[1] != len(mean):
            raise UserError(
                f"{modality} has width {x.shape[1]}; the calibration was fitted on {len(mean)}"
            )
        out = np.empty(x.shape, np.float32)
        for part in _blocks(len(x)):
            rows = scaled_rows(x[part], self.normalize) - mean
            out[part] = rows if self.maps[modality] is None else rows @ self.maps[modality]
        return out


def calibrate(
    image: np.ndarray,
    text: np.ndarray,
    *,
    whiten: bool = False,
    shrinkage: float = 0.01,
    normalize: bool = True,
) -> Calibration:
    """Fit a calibration on training rows, images (n, d) and texts (m, d).

    Each modality's own mean is subtracted, after rows are brought to length one (`normalize`).
    whiten: also multiply by C^(−½), C = (1 − s) Ĉ + s tr(Ĉ)/d I with s = `shrinkage`, of each
    modality by itself. The symmetric root (ZCA) rotates the axes least, so that directions that the
    two modalities share stay shared. Raises UserError if s is not in [0, 1], or if C is
    singular.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage={shrinkage} must be from 0 to 1")
    means, maps = {}, {}
    for name, x in (("image", image), ("text", text)):
        means[name], covariance = _moments(check_matrix(name, x), normalize)
        maps[name] = inverse_root(covariance, shrinkage, name) if whiten else None
    if means["image"].shape != means["text"].shape:
        _reject_widths(len(means["image"]), len(means["text"]))
    return Calibration(means, maps, normalize)


def negative_share(
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    pairs: int = 10_000,
    seed: int = 0,
) -> float:
    """Share of unrelated pairs whose cosine is negative, among `pairs` pairs drawn by the seed.

    In a narrow cone it is 0; after centring about a half. Equal seeds draw the same pairs.
    """
    _check_count("pairs", pairs)
    image, text, image_of_text = check_pairs(image, text, image_of_text, same_width=True)
    rows = unmatched_pairs(len(image), image_of_text, pairs, seed)
    return float(np.mean(cosines(image, text, *rows) < 0))


def unmatched_pairs(
    images: int, image_of_text: np.ndarray, pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of images and of texts, (pairs,) each, drawn evenly from the pairs that do not match.

    Raises UserError where there are none.
    """
    if images < 2 or not len(image_of_text) or pairs < 1:
        raise UserError(
            f"{max(pairs, 0)} of the pairs of {images} images and {len(image_of_text)} texts that "
            "do not match cannot be drawn; give at least 2 images, a text and pairs=1"
        )
    rng = np.random.default_rng(seed)
    text = rng.integers(len(image_of_text), size=pairs)
    # One of the images but the text's own: those from it onwards move up by one.
    image = rng.integers(images - 1, size=pairs)
    return image + (image >= image_of_text[text]), text


def inverse_root(covariance: np.ndarray, shrinkage: float, name: str) -> np.ndarray:
    """C^(−½), symmetric, of C = (1 − s) Ĉ + s tr(Ĉ)/d I; UserError if C is singular."""
    covariance = np.asarray(covariance, np.float64)
    d = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)
    values, vectors = np.linalg.eigh(shrunk)
    if not values[0] > d * np.finfo(np.float64).eps * values[-1]:
        remedy = "give more rows or raise shrinkage" if values[-1] > 0 else "its rows are all equal"
        raise UserError(f"the covariance of {name} is singular; {remedy}")
    return (vectors / np.sqrt(values)) @ vectors.T


def check_pairs(
    image: Any, text: Any, image_of_text: Any, *, same_width: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings and indices as arrays. Raises UserError for invalid ones."""
    image, text = check_matrix("image", image), check_matrix("text", text)
    if same_width and image.shape[1] != text.shape[1]:
        _reject_widths(image.shape[1], text.shape[1])
    rows = np.asarray(image_of_text)
    if rows.shape != (len(text),) or not np.issubdtype(rows.dtype, np.integer):
        raise UserError(
            f"image_of_text is {rows.dtype} of shape {rows.shape}; it must hold one integer for "
            f"each of the {len(text)} texts, the row of its image"
        )
    wrong = (rows < 0) | (rows >= len(image))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise UserError(
            f"image_of_text[{index}] is {rows[index]}, but image has the rows 0 to {len(image) - 1}"
        )
    return image, text, rows.astype(np.int64)


def check_matrix(name: str, x: Any) -> np.ndarray:
    """A matrix in float32, or float64 if it is given so. Raises UserError for anything else."""
    x = np.asarray(x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise UserError(f"{name} holds {x.dtype}; it must be a matrix of real numbers")
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise UserError(
            f"{name} has shape {x.shape}; it must be (rows, width) with at least 2 rows"
        )
    for part in _blocks(len(x)):
        finite = np.isfinite(x[part]).all(axis=1)
        if not finite.all():
            row = part.start + int(np.argmin(finite))
            raise UserError(f"{name} holds NaN or infinity in row {row}; drop the row or mend it")
    return x


def _reject_widths(image: int, text: int) -> None:
    raise UserError(
        f"image has width {image} and text {text}; project the wider one to the narrower width"
    )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1")


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def scaled_rows(x: np.ndarray, normalize: bool) -> np.ndarray:
    """Rows as float64, of length one if `normalize`; a row of zeros stays zero."""
    x = np.asarray(x, np.float64)
    if not normalize:
        return x
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def _moments(x: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), over n, in float64 by blocks of rows."""
    mean = np.zeros(x.shape[1])
    for part in _blocks(len(x)):
        mean += scaled_rows(x[part], normalize).sum(axis=0)
    mean /= len(x)
    covariance = np.zeros((x.shape[1],) * 2)
    for part in _blocks(len(x)):
        rows = scaled_rows(x[part], normalize) - mean
        covariance += rows.T @ rows
    covariance /= len(x)
    # Rows that are all equal differ from their mean by its rounding.
    noise = (64 * np.finfo(np.float64).eps * np.linalg.norm(mean)) ** 2
    return mean, covariance * (np.trace(covariance) > noise)


def _clipped(values: np.ndarray) -> np.ndarray:
    """Eigenvalues with those that are rounding noise set to 0."""
    noise = len(values) * np.finfo(np.float64).eps * max(values.max(), 0)
    return np.where(values > noise, values, 0)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(_clipped(values))) @ vectors.T


def _spectrum(covariance: np.ndarray) -> np.ndarray:
    """Variances along the principal axes, largest first."""
    return _clipped(np.linalg.eigvalsh(covariance))[::-1]


def _effective_rank(spectrum: np.ndarray) -> float:
    """A cloud that is one point has rank 0."""
    sigma = np.sqrt(spectrum[spectrum > 0])
    share = sigma / sigma.sum()
    return float(np.exp(-np.sum(share * np.log(share)))) if len(sigma) else 0.0


def _first_share(spectrum: np.ndarray) -> float:
    return float(spectrum[0] / spectrum.sum()) if spectrum[0] > 0 else 1.0


def cosines(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Cosines of the rows x[i] and y[j], whatever their lengths; 0 where either is zero."""
    parts = [
        np.sum(scaled_rows(x[i[part]], True) * scaled_rows(y[j[part]], True), axis=1)
        for part in _blocks(len(i))
    ]
    return np.concatenate(parts)


def _sample(x: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    return x if len(x) <= rows else x[np.sort(rng.choice(len(x), rows, replace=False))]


# Data of the alignment study's figures: histograms of cosines, and a plane.


BINS = 80
#: Rows of each modality at most that the plane shows.
POINTS = 400


def cosine_histograms(
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    pairs: int = 10_000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Histograms of the cosines of matched pairs and of unmatched ones.

    image (n, d), text (m, d), image_of_text (m,). Returns `edges` (BINS + 1,) from -1 to 1, and
    `matched` and `random` (BINS,), shares of all matched pairs and of `pairs` pairs drawn by the
    seed as `gap.modality_gap` draws them. Raises UserError as that does.
    """
    image, text, image_of_text = check_pairs(image, text, image_of_text, same_width=True)
    edges = np.linspace(-1, 1, BINS + 1)
    of_pairs = {
        "matched": cosines(image, text, image_of_text, np.arange(len(text))),
        "random": cosines(image, text, *unmatched_pairs(len(image), image_of_text, pairs, seed)),
    }
    counts = {n: np.histogram(c.clip(-1, 1), edges)[0] / len(c) for n, c in of_pairs.items()}
    return {"edges": edges, **counts}


def plane(
    image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of both modalities on the first two principal axes of both together.

    At most POINTS texts drawn by the seed and their images, of length one before the axes are
    fitted. Returns `image` and `text`, (p, 2) each, row by row a matched pair.
    """
    image, text, image_of_text = check_pairs(image, text, image_of_text, same_width=True)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(text))[:POINTS])
    sides = [scaled_rows(x, True) for x in (image[image_of_text[rows]], text[rows])]
    both = np.concatenate(sides)
    both -= both.mean(axis=0)
    axes = np.linalg.svd(both, full_matrices=False)[2][:2]
    # A sign of its own: the side with the larger weight is the positive one.
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    points = both @ axes.T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    return {"image": points[: len(rows)], "text": points[len(rows) :]}

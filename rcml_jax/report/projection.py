"""Planes of embeddings, t-SNE and UMAP, and how well kinds hold together: the silhouette."""

import warnings

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.report.arrays import LeftOutError

PERPLEXITY = 30
NEIGHBOURS = 15
SEED = 0


def tsne(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by t-SNE (cosine, perplexity 30, PCA at the start, a fixed seed).

    Raises LeftOutError where all rows are the same, or not finite.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError('t-SNE needs scikit-learn: pip install "rcml_jax[plots]"') from error

    _check(vectors)
    model = TSNE(perplexity=PERPLEXITY, metric="cosine", init="pca", random_state=SEED)
    return model.fit_transform(np.ascontiguousarray(vectors))


def _check(vectors: np.ndarray) -> None:
    """Raise LeftOutError for what has no plane; scikit-learn's t-SNE crashes on equal rows."""
    if not np.isfinite(vectors).all():
        raise LeftOutError("the embeddings are not finite; the training has diverged")
    if np.ptp(vectors, axis=0).max() < 1e-6:
        raise LeftOutError("all embeddings are the same; the model has collapsed")


def silhouette(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw, 1987) of rows (n, d) by cosine distance, from −1 to 1.

    NaN where there is one label only, or as many labels as rows.
    """
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise UserError(
            'the silhouette needs scikit-learn: pip install "rcml_jax[plots]"'
        ) from error
    if not 1 < len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(vectors, labels, metric="cosine"))


def umap(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by UMAP (cosine, 15 neighbours, minimum distance 0.1, a fixed seed).

    Raises LeftOutError where umap-learn cannot be imported, there are not more rows than
    neighbours, or all rows are the same or not finite.
    """
    if len(vectors) <= NEIGHBOURS:
        raise LeftOutError(
            f"UMAP with {NEIGHBOURS} neighbours needs more than {NEIGHBOURS} samples; there are "
            f"{len(vectors)}"
        )
    _check(vectors)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Tensorflow not installed", category=ImportWarning
        )
        try:
            from umap import UMAP
        except Exception as error:  # numba fails in ways of its own where it does not fit NumPy
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeftOutError(
                f'umap-learn cannot be imported ({reason}): pip install "rcml_jax[plots]"'
            ) from error
        # Said where the neighbours' graph falls apart and the start is drawn at random instead.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap\.")
        model = UMAP(
            n_neighbors=NEIGHBOURS, min_dist=0.1, metric="cosine", random_state=SEED, n_jobs=1
        )
        return model.fit_transform(np.ascontiguousarray(vectors, np.float32))

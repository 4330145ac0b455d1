"""What the alignment study's pictures are drawn from: histograms of cosines, and a plane."""

import numpy as np

from rcml_jax.evaluation.gap import check_pairs, cosines, scaled_rows, unmatched_pairs

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

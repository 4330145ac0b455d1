"""Taking information away from pictures and texts, to make a task that needs both."""

import numpy as np

_GREY = 128


def hide_patches(
    images: np.ndarray, rng: np.random.Generator, *, share: float, patch: int
) -> np.ndarray:
    """Copies of images (n, H, W, 3) uint8, the same share of the patches of each turned grey.

    H and W are multiples of `patch`; share: 0 to 1, rounded to a whole number of patches.
    """
    n, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    count = round(share * rows * columns)
    order = np.argsort(rng.random((n, rows * columns)), axis=1)
    hidden = (order < count).reshape(n, rows, columns)
    mask = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    return np.where(mask[..., None], np.uint8(_GREY), images)


def drop_words(text: str, rng: np.random.Generator, *, share: float) -> str:
    """The text without about that share of its words, each lost by itself; it may turn empty."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)

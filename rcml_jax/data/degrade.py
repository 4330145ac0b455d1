"""Taking information away from images and texts, to make a task that needs both."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rcml_jax.data.images import Part, image_states, to_array
from rcml_jax.data.relation_graph import ItemImages

_GREY = 128


def hide_patches(
    images: np.ndarray,
    rng: np.random.Generator,
    part: Part | None = None,
    *,
    share: float,
    patch: int,
) -> np.ndarray:
    """Copies of images (n, H, W, 3) uint8, the same share of the patches of each turned grey.

    H and W are multiples of `patch`; share: 0 to 1, rounded to a whole number of patches; part: as
    of `images.augment`.
    """
    n, height, width, _ = images.shape
    batch, mine = part or (n, np.arange(n))
    rows, columns = height // patch, width // patch
    count = round(share * rows * columns)
    order = np.argsort(rng.random((batch, rows * columns))[mine], axis=1)
    hidden = (order < count).reshape(n, rows, columns)
    mask = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    return np.where(mask[..., None], np.uint8(_GREY), images)


def hide_patches_of_rows(
    images: np.ndarray, rows: Sequence[int] | np.ndarray, seed: int, *, share: float, patch: int
) -> np.ndarray:
    """As `hide_patches`; what is hidden of an image depends on the seed and its row, rows (n,)."""
    return np.concatenate(
        [
            hide_patches(image[None], _noise(seed, row), share=share, patch=patch)
            for image, row in zip(images, rows, strict=True)
        ]
    )


class PatchesHidden:
    """Images without the patches that `hide_patches_of_rows` hides, for a tower of any size.

    They are squares of `side` × `side` patches, whatever the image's size; the row is its index.
    """

    def __init__(self, images: ItemImages, seed: int, *, share: float, side: int):
        self._images, self._seed, self._share, self._side = images, seed, share, side

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._images[index]
        patch = max(min(image.size) // self._side, 1)
        pixels = to_array(image, patch * self._side)
        hidden = hide_patches(
            pixels[None], _noise(self._seed, index), share=self._share, patch=patch
        )
        return Image.fromarray(hidden[0])

    def encoded(self, index: int) -> bytes:
        """The PNG bytes of one image."""
        out = io.BytesIO()
        self[index].save(out, "PNG")
        return out.getvalue()

    def states(self) -> list:
        """A JSON value for each image that changes when the image or what is hidden does."""
        hidden = [self._share, self._side, self._seed]
        return [[*hidden, state] for state in image_states(self._images)]


def drop_words(text: str, rng: np.random.Generator, *, share: float) -> str:
    """The text without about that share of its words, each lost by itself; it may turn empty."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def drop_words_of_rows(
    texts: Sequence[str], rows: Sequence[int] | np.ndarray, seed: int, *, share: float
) -> list[str]:
    """As `drop_words`; which words a text loses depends on the seed and its row, rows (n,)."""
    return [
        drop_words(text, _noise(seed, row), share=share)
        for text, row in zip(texts, rows, strict=True)
    ]


def _noise(seed: int, row: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(row)))

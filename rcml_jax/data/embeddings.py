"""Embeddings of images and their texts, from memory or from people's own `.npz` files."""

import dataclasses
import pathlib
import zipfile

import numpy as np

from rcml_jax.errors import UserError

_KEYS = ("image", "text", "image_of_text")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images (n, d), texts (m, d′) and the row of each text's image, `image_of_text` (m,) int."""

    image: np.ndarray
    text: np.ndarray
    image_of_text: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three, in their order."""
        return self.image, self.text, self.image_of_text


def read_npz(path: str | pathlib.Path) -> Pairs:
    """The arrays `image`, `text` and `image_of_text` of a file that `numpy.savez` wrote.

    Raises UserError for a file that is missing, is none, holds pickled objects or lacks an array.
    What is wrong inside the arrays is said where they are used.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no file {path}; give --config configs/alignment.py:npz,path=FILE"
        )
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise UserError(f"{path} holds one array (.npy); save three with numpy.savez")
            missing = [name for name in _KEYS if name not in arrays.files]
            if missing:
                raise UserError(
                    f"{path} lacks the array {missing[0]!r}; it must hold {', '.join(_KEYS)}"
                )
            return Pairs(*(arrays[name] for name in _KEYS))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        pickled = "pickle" in str(error) and zipfile.is_zipfile(path)
        reason = "holds pickled objects" if pickled else "is no .npz file, or a damaged one"
        raise UserError(f"{path} {reason}; save plain arrays with numpy.savez") from error


def split_pairs(pairs: Pairs, shares: tuple[float, ...], seed: int) -> list[Pairs]:
    """Parts with these shares of the images, drawn by the seed, and the texts of each part."""
    order = np.random.default_rng(seed).permutation(len(pairs.image))
    bounds = np.round(np.cumsum(shares) * len(order)).astype(int)
    starts = [0, *bounds[:-1]]
    return [select_pairs(pairs, np.sort(order[i:j])) for i, j in zip(starts, bounds, strict=True)]


def select_pairs(pairs: Pairs, images: np.ndarray) -> Pairs:
    """Some images, by their rows (k,), and the texts of each."""
    place = np.full(len(pairs.image), -1)
    place[images] = np.arange(len(images))
    texts = np.flatnonzero(place[pairs.image_of_text] >= 0)
    return Pairs(pairs.image[images], pairs.text[texts], place[pairs.image_of_text[texts]])


def join_pairs(parts: list[Pairs]) -> Pairs:
    """All parts as one, in their order."""
    starts = np.cumsum([0, *(len(part.image) for part in parts[:-1])])
    return Pairs(
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.text for part in parts]),
        np.concatenate([p.image_of_text + i for p, i in zip(parts, starts, strict=True)]),
    )


def project_to_narrower(pairs: Pairs, seed: int) -> Pairs:
    """The wider modality after a seeded random orthonormal projection to the narrower width."""
    widths = pairs.image.shape[1], pairs.text.shape[1]
    if widths[0] == widths[1]:
        return pairs
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((max(widths), min(widths))))[0].astype(np.float32)
    name = "image" if widths[0] > widths[1] else "text"
    return dataclasses.replace(pairs, **{name: getattr(pairs, name) @ basis})

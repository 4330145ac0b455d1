"""Embeddings of images and texts, from memory or from people's own `.npz` files."""

import dataclasses
import hashlib
import pathlib
import zipfile

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.log import counted
from rcml_jax.parsing import ARRAY_ERRORS, user_path

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
    remedy = "give --config alignment:npz,path=FILE"
    arrays = _read_arrays(user_path(path), _KEYS, (), remedy)
    return Pairs(*(arrays[name] for name in _KEYS))


def _read_arrays(
    path: pathlib.Path, required: tuple[str, ...], optional: tuple[str, ...], remedy: str
) -> dict[str, np.ndarray]:
    """The named arrays of an `.npz` file; the remedy is for a path where there is no file."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; {remedy}")
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise UserError(
                    f"{path} holds one array (.npy); save {', '.join(required or optional)} with "
                    "numpy.savez"
                )
            missing = [name for name in required if name not in arrays.files]
            if missing:
                raise UserError(
                    f"{path} lacks the array {missing[0]!r}; it must hold {', '.join(required)}"
                )
            return {n: arrays[n] for n in (*required, *optional) if n in arrays.files}
    except ARRAY_ERRORS as error:
        pickled = "pickle" in str(error) and zipfile.is_zipfile(path)
        reason = "holds pickled objects" if pickled else "is no .npz file, or a damaged one"
        raise UserError(f"{path} {reason}; save plain arrays with numpy.savez") from error


# Embeddings of the items of a relation graph


@dataclasses.dataclass(frozen=True, eq=False)
class ItemEmbeddings:
    """Unit vectors of n items, and of R relation sentences in the order of the graph's relations.

    ids: (n,) strings. text (n, d) and image (n, d′), of which one may be None: the items as they
    are. text_under, image_under (R, n, d): the items under each relation, or None. relation
    (R, d″): the sentences, or None; relation_unseen (K, R, d″): the K sentences of each relation
    that the graph keeps for the test, or None.
    """

    ids: np.ndarray
    text: np.ndarray | None = None
    image: np.ndarray | None = None
    text_under: np.ndarray | None = None
    image_under: np.ndarray | None = None
    relation: np.ndarray | None = None
    relation_unseen: np.ndarray | None = None

    def vectors(self) -> dict[str, np.ndarray]:
        """The arrays of vectors that there are, by name."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        return {name: array for name, array in found.items() if array is not None}


def read_item_embeddings(
    path: str | pathlib.Path, relations: int, unseen: int = 0
) -> ItemEmbeddings:
    """The embeddings in an `.npz` file, normalized to length one.

    relations: number of relations R of the graph; unseen: number K of its held-out sentences.
    Raises UserError for a file that cannot be read, lacks `ids` or both `text` and `image`, or has
    an array of the wrong shape or type, an id twice, or a vector that is not finite or zero.
    """
    path = user_path(path)
    names = tuple(field.name for field in dataclasses.fields(ItemEmbeddings))
    arrays = _read_arrays(path, names[:1], names[1:], "give --embeddings an .npz file")
    ids = arrays.pop("ids")
    if ids.ndim != 1 or ids.dtype.kind != "U":
        raise UserError(
            f"ids of {path} must be one row of strings, not {ids.dtype} of shape {ids.shape}; save "
            "numpy.array(ids, dtype=str)"
        )
    values, counts = np.unique(ids, return_counts=True)
    if np.any(counts > 1):
        raise UserError(
            f"{path} has the id '{values[np.argmax(counts > 1)]}' more than once; keep one vector "
            "of each item"
        )
    if "text" not in arrays and "image" not in arrays:
        raise UserError(f"{path} has neither text nor image; it must hold one of them at least")
    _check_shapes(path, arrays, len(ids), relations, unseen)
    return ItemEmbeddings(ids, **{name: _unit(path, name, x) for name, x in arrays.items()})


def _check_shapes(
    path: pathlib.Path, arrays: dict[str, np.ndarray], items: int, relations: int, unseen: int
) -> None:
    expected: dict[str, tuple] = {"text": (items,), "image": (items,), "relation": (relations,)}
    for side in ("text", "image"):
        expected[f"{side}_under"] = relations, items, *_width(arrays.get(side))
    expected["relation_unseen"] = unseen, relations, *_width(arrays.get("relation"))
    for name, array in arrays.items():
        plain = name.partition("_")[0]
        if plain not in arrays:
            raise UserError(f"{path} has {name} without {plain}; save both")
        leading = expected[name]
        ranks = len(leading) + 1 if name == plain else len(leading)
        if array.ndim != ranks or array.shape[: len(leading)] != leading or 0 in array.shape:
            sizes = ", ".join(map(str, leading)) + (", width" if name == plain else "")
            raise UserError(
                f"{name} of {path} has the shape {array.shape}, not ({sizes}); there are {items} "
                f"ids in the file, and {relations} relations and {unseen} unseen sentences of each "
                "in the catalogue"
            )


def _width(array: np.ndarray | None) -> tuple[int, ...]:
    return () if array is None else array.shape[-1:]


def _unit(path: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    """Rows of length one, float32. Raises UserError where they have no direction."""
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name} of {path} is of type {array.dtype}; save floating-point numbers")
    array = array.astype(np.float32)
    largest = np.max(np.abs(array), axis=-1, keepdims=True)
    for bad, what in ((~np.isfinite(largest), "NaN or infinite"), (largest == 0, "zero")):
        if np.any(bad):
            row = tuple(int(i) for i in np.argwhere(bad)[0][:-1])
            raise UserError(
                f"{name} of {path} has "
                f"{counted(int(bad.sum()), 'vectors that are', 'vector that is')} {what}, the "
                f"first at index {row[0] if len(row) == 1 else row}; leave out such items or embed "
                "them anew"
            )
    array = array / largest
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def file_digest(path: str | pathlib.Path) -> str:
    """SHA-256 of a file's content. Raises UserError where it cannot be read."""
    try:
        with user_path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give an .npz file") from error


def split_pairs(pairs: Pairs, shares: tuple[float, ...], seed: int) -> list[Pairs]:
    """Parts with these shares of the images, drawn by the seed, and the texts of each part."""
    order = np.random.default_rng(seed).permutation(len(pairs.image))
    bounds = np.round(np.cumsum(shares) * len(order)).astype(int)
    starts = [0, *bounds[:-1]]
    return [select_pairs(pairs, np.sort(order[i:j])) for i, j in zip(starts, bounds, strict=True)]


def select_pairs(pairs: Pairs, images: np.ndarray) -> Pairs:
    """Some images, by their rows (k,), and the texts of each."""
    index = np.full(len(pairs.image), -1)
    index[images] = np.arange(len(images))
    texts = np.flatnonzero(index[pairs.image_of_text] >= 0)
    return Pairs(pairs.image[images], pairs.text[texts], index[pairs.image_of_text[texts]])


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

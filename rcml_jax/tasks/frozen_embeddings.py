"""Embeddings of images and texts by frozen towers, computed once and kept on disk."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.data.images import ImageBank, image_states
from rcml_jax.data.relation_graph import ItemImages
from rcml_jax.data.stages import file_state, stored_rows
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.log import log_line
from rcml_jax.models.frozen import load_towers
from rcml_jax.parsing import checkpoint_name
from rcml_jax.tasks.stored_states import in_chunks


def tower_embeddings(
    name: str,
    images: ItemImages | None,
    texts: Sequence[str] | None,
    directory: pathlib.Path,
    *,
    layer: str = "projected",
    pooling: str = "auto",
    max_length: int = 512,
    log: Callable[[str], None] = log_line,
) -> dict[str, np.ndarray]:
    """Memory-mapped float32 embeddings, "image" (n, d) and "text" (m, d'), of what is given.

    name, layer, pooling: as of `models.frozen.load_towers`; max_length: of texts, in tokens. They
    are kept below `directory`, each under a digest of the checkpoints' files and its own inputs, so
    that what changes is embedded anew. Raises UserError as `load_towers` and `stored_rows`.
    """
    image, text = load_towers(name, layer=layer, pooling=pooling)
    length = min(text.size, max_length)
    asked: list[Any] = [name, layer, pooling, _fingerprints(name)]
    found = {}
    if images is not None:
        state = [*asked, image_states(images)]
        found["image"] = _stored(directory, "image", state, ImageBlocks(image, images), log)
    if texts is not None:
        state = [*asked, length, list(texts)]
        found["text"] = _stored(directory, "text", state, TextBlocks(text, texts, length), log)
    return found


def _stored(
    directory: pathlib.Path, side: str, state: list, rows: Any, log: Callable[[str], None]
) -> np.ndarray:
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return stored_rows(directory / digest / f"{side}.npy", rows, log=log)


def _fingerprints(name: str) -> list:
    """Sizes and times of local checkpoints, so that another one in its place is embedded anew.

    Of all files: the tokenizer and the configurations make another embedding, too.
    """
    directories = [pathlib.Path(checkpoint_name(side)) for side in name.split("+")]
    files = [sorted(d.rglob("*")) for d in directories if d.is_dir()]
    return [file_state(file) for found in files for file in found if file.is_file()]


#: Texts are cut to the longest of their chunk, in steps of so many tokens.
_LENGTH_STEP = 4


class ImageBlocks:
    """Embeddings of images, computed on demand; a source of rows."""

    dtype = np.float32

    def __init__(self, tower: Any, images: ItemImages):
        self.shape, self._embed = (tower.width,), tower.embed
        self._bank = ImageBank(images, tower.framing, cache_bytes=0)

    def __len__(self) -> int:
        return len(self._bank.images)

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop, (stop - start, width)."""
        return in_chunks(lambda rows: self._embed(self._bank(rows)), start, stop)


class TextBlocks:
    """Embeddings of texts of at most `max_length` tokens, computed on demand."""

    dtype = np.float32

    def __init__(self, tower: Any, texts: Sequence[str], max_length: int):
        self.shape, self._texts, self._max_length = (tower.width,), texts, max_length
        self._embed = tower.embed
        # A SigLIP text tower pools the last token, of whatever it was given.
        self._trim = tower.kind != "siglip"
        self._tokenizer = Tokenizer.from_pretrained_dir(tower.directory)

    def __len__(self) -> int:
        return len(self._texts)

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop, (stop - start, width)."""
        ids, mask = self._tokenizer.encode(self._texts[start:stop], self._max_length)
        lengths = mask.sum(axis=1)
        # Padding changes nothing but the time it takes: texts of a length share a chunk.
        order = np.argsort(lengths, kind="stable") if self._trim else np.arange(len(ids))

        def embed(places: np.ndarray) -> jax.Array:
            rows = order[places]
            longest = ids.shape[1]
            if self._trim:  # few lengths, few compilations
                longest = -(-int(lengths[rows].max()) // _LENGTH_STEP) * _LENGTH_STEP
            return self._embed(ids[rows, :longest], mask[rows, :longest])

        found = np.empty((len(ids), *self.shape), self.dtype)
        found[order] = in_chunks(embed, 0, len(ids))
        return found

"""Token states of a catalogue on disk, and their pooling under a sentence that is new to it.

A store of `rcml_jax.search.embedding_store` that keeps token states also holds

- `tokens_text.npy`, `tokens_image.npy`: (items, 4) int32: of each item the length of its slot, the
  row of the slot in the file of that length, the number of states in it (0: none), and which of
  them is the pooled state;
- `states_text_16.npy` and others: (rows, 16, d) float16 or int8, the states of all items whose
  slots are 16 long; an image's slot is as long as an image has states, a text's a multiple of 8;
- `scales_text_16.npy` and others, with int8: (rows, 16) float32, what a state is multiplied with.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.methods.relational import TokenReader
from rcml_jax.models.relation_pooling import FoldedRelation
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.search.embedding_store import (
    MODALITIES,
    Embeddings,
    allocate,
    open_array,
    sync,
    write_parts,
)
from rcml_jax.search.items import Items
from rcml_jax.training import sharding

TYPES = ("float16", "int8")
_STEP = 8
_TEXTS_AT_ONCE = 256
#: Items of one call of the jitted pooling, and of one step of it on CPUs, which stays in the cache.
_ROWS, _ROWS_IN_CACHE = 512, 8
_LENGTH, _ROW, _COUNT, _POOLED = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where token states are kept. places: of each modality the (items, 4) array of the module.

    dtype: float16 or int8; width: d.
    """

    dtype: str
    width: int
    places: dict[str, np.ndarray]

    @property
    def rows(self) -> dict[str, dict[int, int]]:
        """Of each modality the number of rows by the length of the slots."""
        found = {}
        for name, places in self.places.items():
            lengths, counts = np.unique(places[:, _LENGTH], return_counts=True)
            pairs = zip(lengths.tolist(), counts.tolist(), strict=True)
            found[name] = {length: count for length, count in pairs if length}
        return found

    @property
    def bytes(self) -> int:
        """Size of all files on disk."""
        of_state = self.width + 4 if self.dtype == "int8" else 2 * self.width
        slots = sum(length * n for rows in self.rows.values() for length, n in rows.items())
        return slots * of_state + 16 * sum(map(len, self.places.values()))

    def manifest(self) -> dict[str, Any]:
        """What the manifest of the store has of it."""
        return {"dtype": self.dtype, "width": self.width, "bytes": self.bytes, "rows": self.rows}


def plan_tokens(reader: TokenReader, items: Items, dtype: str) -> TokenLayout:
    """The layout for items; texts are tokenized, and no tower is run.

    Where there are several processes, each tokenizes its share, and all have to call this.

    Raises UserError for an unknown type.
    """
    if dtype not in TYPES:
        raise UserError(
            f"the type {dtype!r} of token states is unknown; choose {' or '.join(TYPES)}"
        )
    n = len(items)
    share = -(-n // jax.process_count())
    start = share * jax.process_index()
    part = items.texts[start : start + share]
    found = sharding.gather(sharding.everywhere(lambda: _text_lengths(reader, part)))
    has_image = np.fromiter(map(bool, items.image_names), bool, n)
    lengths = {
        "text": np.concatenate(found),
        "image": np.where(has_image, np.int32(reader.image_length), np.int32(0)),
    }
    places = {}
    for name, own in lengths.items():
        places[name] = np.zeros((n, 4), np.int32)
        places[name][:, _LENGTH] = own
        for length in np.unique(own):
            places[name][own == length, _ROW] = np.arange(np.count_nonzero(own == length))
    return TokenLayout(dtype, reader.width, places)


def _text_lengths(reader: TokenReader, texts: Sequence[str]) -> np.ndarray:
    """The lengths of the slots of texts, (n,) int32."""
    lengths = np.zeros(len(texts), np.int32)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        padded = part + [""] * (_TEXTS_AT_ONCE - len(part))
        states = reader.text_lengths(padded)[: len(part)]
        has = np.array([bool(text) for text in part])
        lengths[start : start + len(part)] = np.where(has, -(-states // _STEP) * _STEP, 0)
    return lengths


class TokenWriter:
    """Writes the token states of a store; `sync` before a shard is marked.

    begun: whether the store has a whole shard; then its own layout is taken, else files of the
    given one are made. Raises UserError where files are damaged or the disk refuses them.
    """

    def __init__(self, directory: pathlib.Path, layout: TokenLayout, items: Items, begun: bool):
        self._directory, self._items = directory, items
        if not begun:
            for path, shape, dtype in _files(directory, layout.manifest(), len(items)):
                allocate(path, shape, dtype)
            for name, places in layout.places.items():
                array = np.load(_places_path(directory, name), mmap_mode="r")
                write_parts(_places_path(directory, name), [(array.offset, places)])
        self._layout = layout.manifest()
        self._places = {name: np.load(_places_path(directory, name)) for name in MODALITIES}
        self._touched: set[pathlib.Path] = set()

    def write(
        self, items: Sequence[int], states: dict[str, TokenStates], has: dict[str, np.ndarray]
    ) -> None:
        """Write the states of items; has: of each modality (n,) whether they have any.

        Raises UserError for an item that has more states than its slot holds.
        """
        for name in MODALITIES:
            places = self._places[name]
            parts: dict[int, list[tuple[int, np.ndarray]]] = {}
            found = jax.device_get(states[name]) if has[name].any() else None
            for n, item in enumerate(items):
                places[item, _COUNT:] = 0
                if found is None or not has[name][n]:
                    continue
                mask = found.mask[n]
                rows = found.states[n][mask]
                length, row = places[item, : _ROW + 1].tolist()
                if len(rows) > length:
                    raise UserError(
                        f"the {name} of item {self._items.ids[item]!r} has grown since the store "
                        "was made, and has no room there; embed into another directory"
                    )
                places[item, _COUNT] = len(rows)
                places[item, _POOLED] = mask[: int(found.pooled_index[n])].sum()
                slot = np.zeros((length, rows.shape[1]), np.float32)
                slot[: len(rows)] = rows
                parts.setdefault(length, []).append((row, slot))
            for length, slots in parts.items():
                self._put(name, length, slots)
            path = _places_path(self._directory, name)
            offset = np.load(path, mmap_mode="r").offset
            write_parts(path, [(offset + 16 * item, places[item]) for item in items])
            self._touched.add(path)

    def _put(self, name: str, length: int, slots: list[tuple[int, np.ndarray]]) -> None:
        values, scales = quantize(np.stack([slot for _, slot in slots]), self._layout["dtype"])
        if not np.isfinite(values).all():
            raise UserError(
                f"the {name} states are too large for float16 or not finite; give --tokens int8, "
                "or another run"
            )
        for kind, arrays in (("states", values), ("scales", scales)):
            if arrays is None:
                continue
            path = self._directory / f"{kind}_{name}_{length}.npy"
            offset, size = np.load(path, mmap_mode="r").offset, arrays[0].nbytes
            write_parts(
                path, [(offset + size * row, x) for (row, _), x in zip(slots, arrays, strict=True)]
            )
            self._touched.add(path)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        sync(self._touched)
        self._touched.clear()


def quantize(states: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """States (..., d) as they are kept, and with int8 a float32 scale (...) for each."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return states.astype(np.float16), None
    largest = np.abs(states).max(axis=-1)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(states / scales[..., None]).astype(np.int8), scales


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The token states of a whole store, mapped. places: as of `TokenLayout`.

    states and scales: by modality and length of slots; no scales with float16.
    """

    width: int
    places: dict[str, np.ndarray]
    states: dict[tuple[str, int], np.ndarray]
    scales: dict[tuple[str, int], np.ndarray]


def open_tokens(embeddings: Embeddings) -> Tokens:
    """The token states of a store. Raises UserError where it keeps none or they are damaged."""
    layout, directory = embeddings.tokens, embeddings.directory
    if layout is None:
        raise UserError(f"{directory} keeps no token states; embed anew with --tokens")
    n = len(embeddings.items)
    arrays = {path.stem: open_array(path, *rest) for path, *rest in _files(directory, layout, n)}
    found: dict[str, dict] = {"states": {}, "scales": {}}
    for stem, array in arrays.items():
        kind, name, *length = stem.split("_")
        if kind in found:
            found[kind][name, int(length[0])] = array
    places = {name: np.array(arrays[f"tokens_{name}"]) for name in MODALITIES}
    return Tokens(layout["width"], places, **found)


def pool_tokens(
    tokens: Tokens,
    folded: FoldedRelation,
    items: np.ndarray | None = None,
    *,
    device: jax.Device | None = None,
) -> dict[str, np.ndarray]:
    """Unit vectors (n, d) of each modality under the first of folded relations, in one pass.

    items: (n,) which ones, by default all; zeros where an item has no states.
    """
    device = device or jax.devices()[0]
    query, logit, matrix = jax.device_put(jax.tree.map(lambda x: x[0], folded), device)
    chunk = _ROWS_IN_CACHE if device.platform == "cpu" else _ROWS
    found = {}
    # Two more than there are cores: blocks are read while others are computed.
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2)) as pool:
        for name in MODALITIES:
            places = tokens.places[name] if items is None else tokens.places[name][items]
            found[name] = np.zeros((len(places), tokens.width), np.float32)
            jobs = []
            for length in np.unique(places[places[:, _COUNT] > 0, _LENGTH]).tolist():
                own = np.flatnonzero(places[:, _LENGTH] == length)
                files = tokens.states[name, length], tokens.scales.get((name, length))
                for start in range(0, len(own), _ROWS):
                    # All blocks have one size: the last one begins earlier or is filled up.
                    first = min(start, max(0, len(own) - _ROWS))
                    members = own[np.arange(first, first + _ROWS).clip(max=len(own) - 1)]
                    jobs.append((members, _block(files, places[members])))

            def work(job: tuple, out: np.ndarray = found[name]) -> None:
                members, (load, count, pooled) = job
                out[members] = _pool(*load(), count, pooled, query, logit, matrix, chunk=chunk)

            list(pool.map(work, jobs))
    return found


def _block(files: tuple, places: np.ndarray) -> tuple:
    """What loads the rows of a block, without a copy where they are neighbours; their counts."""
    rows = places[:, _ROW]
    neighbours = (np.diff(rows) == 1).all()
    chosen = slice(rows[0], rows[-1] + 1) if neighbours else rows
    load = lambda: [None if file is None else file[chosen] for file in files]  # noqa: E731
    return load, places[:, _COUNT], places[:, _POOLED]


@functools.partial(jax.jit, static_argnames="chunk")
def _pool(states, scales, count, index, query, logit, matrix, *, chunk):
    """Unit vectors (n, d) of slots (n, T, d) under one folded relation, `chunk` slots at a time."""

    def some(part):
        states, scales, count, index = part
        place = jnp.arange(states.shape[1])
        states = states.astype(jnp.float32)
        logits = jnp.einsum("ntd,d->nt", states, query)
        logits = logits if scales is None else logits * scales
        logits += jnp.where(place == index[:, None], logit, 0.0)
        weights = jax.nn.softmax(logits, axis=-1, where=place < count[:, None])
        weights = weights if scales is None else weights * scales
        return jnp.einsum("nt,ntd->nd", weights, states)

    parts = jax.tree.map(
        lambda x: x.reshape(-1, chunk, *x.shape[1:]), (states, scales, count, index)
    )
    pooled = jax.lax.map(some, parts).reshape(len(states), -1)
    return l2_normalize(pooled @ matrix)


def _places_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / f"tokens_{name}.npy"


def _files(directory: pathlib.Path, layout: dict, items: int) -> list[tuple]:
    """(path, shape, type) of every file of a layout."""
    files: list[tuple] = [(_places_path(directory, x), (items, 4), "int32") for x in MODALITIES]
    for name, rows in layout["rows"].items():
        for length, count in rows.items():
            shape = (count, int(length), layout["width"])
            files.append((directory / f"states_{name}_{length}.npy", shape, layout["dtype"]))
            if layout["dtype"] == "int8":
                files.append((directory / f"scales_{name}_{length}.npy", shape[:2], "float32"))
    return files

"""Embeddings of many items under relations on disk: written in shards, resumed, memory-mapped.

A directory holds

- `text.npy`, `image.npy`: (relations, items, d), or (1, items, d) of a modality that depends on no
  relation, float16 or float32; the rows of what an item lacks are zeros;
- `has_text.npy`, `has_image.npy`: (items,) bool;
- `items.jsonl`: id, text and name of the image of each item, in the arrays' order, and the state
  of the image's file when it was embedded;
- `manifest.json`: model, items, relations, sizes, and how many shards are done. It is written
  before anything else, and anew after each shard, so what it counts is whole. `stale` are items
  whose text or image has changed since, until they are embedded anew;
- token states, where they were asked for: see `rcml_jax.search.token_store`.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rcml_jax.data.strings import StringBuilder
from rcml_jax.errors import UserError
from rcml_jax.files import atomic_file, exclusive
from rcml_jax.log import counted
from rcml_jax.parsing import ARRAY_ERRORS, user_path
from rcml_jax.search.items import Items, from_names

MODALITIES = ("text", "image")
DTYPES = ("float32", "float16")
_FORMAT = 2
_MANIFEST, _ITEMS = "manifest.json", "items.jsonl"
_LOCK = ".lock"
#: What a kill may leave before there is a manifest.
_OF_THE_START = (f"{_MANIFEST}.part", _LOCK, f"{_LOCK}.json", f"{_LOCK}.json.part")
_EXAMPLES = 5
_AT_ONCE = 4096  # ids that are hashed at a time
_SEARCHED_IDS = 20_000  # ids that a mistyped one is compared with
_TEXTS = ("id", "text", "image")
_KEYS: tuple[str, ...]
_KEYS = ("model", "items", "items_digest", "root", "relations", "shapes", "dtype", "shard")
_KEYS += ("done", "problems", "stale")


def either(names: Sequence[str]) -> str:
    """Names as the alternatives of a sentence: 'a' or 'b'."""
    return " or ".join(map(repr, names))


def ids_digest(ids: Sequence[str]) -> str:
    """Changes with ids and their order."""
    digest = hashlib.sha256(b"[")  # of a list in JSON
    for start in range(0, len(ids), _AT_ONCE):
        part = json.dumps(ids[start : start + _AT_ONCE])[1:-1]
        digest.update(f"{', ' if start else ''}{part}".encode())
    digest.update(b"]")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is embedded, by what, and how it is kept.

    model: what names the model: "workdir", "step", "digest" and more; relations: the sentences,
    first the intra-sample one; shapes: of each modality the number of relations, or 1, and the
    width; shard: items that are embedded between two marks of what is done; tokens: the layout of
    `token_store.TokenLayout` as JSON values, None where no token states are kept.
    """

    model: dict[str, Any]
    items: Items
    relations: tuple[str, ...]
    shapes: dict[str, tuple[int, int]]
    dtype: str = "float32"
    shard: int = 1024
    tokens: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"the type {self.dtype!r} is unknown; choose {' or '.join(DTYPES)}")
        if self.shard < 1:
            raise UserError(f"a shard of {self.shard} items is too small; 1 is the least")

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds before anything is done."""
        root = self.items.root
        return {
            "format": _FORMAT,
            "model": self.model,
            "items": len(self.items),
            "items_digest": ids_digest(self.items.ids),
            "root": None if root is None else str(root),
            "relations": list(self.relations),
            "shapes": {name: list(self.shapes[name]) for name in MODALITIES},
            "dtype": self.dtype,
            "shard": self.shard,
            "tokens": self.tokens,
            "done": 0,
            "problems": {},
            "stale": [],
        }


class Writer:
    """The store of a plan, new or begun before: `shards()`, and `write`, `mark` for each of them.

    Raises UserError where the directory holds embeddings of another plan or anything else, or the
    disk has no room. A store with a whole shard keeps its size of shards; one without is made anew.
    Items of whole shards whose text or image has changed are `stale`: `rewrite` them, then call
    `refresh`.
    """

    def __init__(self, directory: pathlib.Path | str, plan: Plan):
        self.directory = user_path(directory)
        self._manifest = plan.manifest()
        begun = (self.directory / _MANIFEST).is_file()
        if not begun:
            _make_empty(self.directory)
        if begun and (found := read_manifest(self.directory))["done"]:
            check_same(self.directory, found, self._manifest)
            self._manifest = found
            check_room(self.directory, found)
            self._write_rows(plan.items)
            self._find_stale()
        else:
            self._create(plan)
        self._arrays = _open_arrays(self.directory, self._manifest)
        if not self.stale:
            self._keep_rows()  # of shards that are not done

    @property
    def stale(self) -> list[int]:
        """Items of whole shards that must be embedded anew, ascending."""
        return self._manifest["stale"]

    def _find_stale(self) -> None:
        done = min(self._manifest["done"] * self.shard, self._manifest["items"])
        changed = set()
        with self._part.open("rb") as file:
            pairs = zip(_lines(self.directory, self._manifest), file, strict=True)
            for number, (before, now) in enumerate(pairs):
                differs = number < done and before != now
                if differs and _row(self.directory, before) != json.loads(now):
                    changed.add(number)
        if changed - {*self.stale}:
            # Kept, also if another change comes before these are embedded.
            self._manifest["stale"] = sorted(changed | {*self.stale})
            _write_manifest(self.directory, self._manifest)

    def rewrite(
        self, items: Sequence[int], blocks: dict[str, np.ndarray], has: dict[str, np.ndarray]
    ) -> None:
        """Write some stale items anew; blocks and has as of `write`, in the order of `items`."""
        for place, item in enumerate(items):
            row = slice(place, place + 1)
            for name in MODALITIES:
                mask = np.asarray(has[name], bool)[row]
                self._put(f"has_{name}", item, mask[None])
                lead, _, width = self._arrays[name].shape
                zeros = np.zeros((lead, 1, width), np.float32)
                self._put(name, item, blocks[name][:, row] if mask.any() else zeros)

    def refresh(self) -> None:
        """All stale items are written anew: their texts and the states of their files are kept."""
        self._sync()
        self._keep_rows()
        done = self._manifest["done"] * self.shard
        image = np.load(_path(self.directory, "has_image"))[:done]
        problems: dict[str, dict[str, Any]] = {
            name: {"count": 0, "first": []} for name in ("unreadable", "empty")
        }
        lines = _lines(self.directory, self._manifest)
        for has, line in zip(image, lines, strict=False):
            row = None if has else _row(self.directory, line)
            if row is None or (row["text"] and not row["image"]):
                continue
            problem = problems["unreadable" if row["image"] else "empty"]
            problem["count"] += 1
            problem["first"] = [*problem["first"], row["id"]][:_EXAMPLES]
        self._manifest["problems"] = problems
        self._manifest["stale"] = []
        _write_manifest(self.directory, self._manifest)

    @property
    def shard(self) -> int:
        """Items of a shard."""
        return self._manifest["shard"]

    @property
    def tokens(self) -> dict[str, Any] | None:
        """The layout of the token states in this store, None where it keeps none."""
        return self._manifest["tokens"]

    @property
    def begun(self) -> bool:
        """Whether a shard is whole."""
        return self._manifest["done"] > 0

    def shards(self) -> Iterator[range]:
        """The items of each shard that is not done, in order."""
        items = self._manifest["items"]
        for start in range(self._manifest["done"] * self.shard, items, self.shard):
            yield range(start, min(start + self.shard, items))

    def write(self, start: int, blocks: dict[str, np.ndarray], has: dict[str, np.ndarray]) -> None:
        """Write items from `start` on: vectors (relations, m, d), and (m,) whether they have each.

        Where `has` is false, zeros are written; a modality that none has needs no vectors.
        """
        for name in MODALITIES:
            mask = np.asarray(has[name], bool)
            self._put(f"has_{name}", start, mask[None])
            if mask.any():
                self._put(name, start, np.where(mask[:, None], blocks[name], 0))

    def mark(self, problems: dict[str, list[str]]) -> None:
        """The shard that was begun is whole. problems: of each kind the ids in it that have it.

        The manifest counts them and names the first few.
        """
        for name, ids in problems.items():
            known = self._manifest["problems"].setdefault(name, {"count": 0, "first": []})
            known["count"] += len(ids)
            known["first"] = (known["first"] + ids)[:_EXAMPLES]
        self._manifest["done"] += 1
        self._sync()
        _write_manifest(self.directory, self._manifest)

    def _sync(self) -> None:
        sync(_path(self.directory, name) for name in self._arrays)

    @property
    def _part(self) -> pathlib.Path:
        return self.directory / f"{_ITEMS}.part"

    def _write_rows(self, items: Items) -> None:
        """The items as they are now, in a file that `_keep_rows` makes that of the store."""
        with _guarded(self.directory), self._part.open("w", encoding="ascii") as file:
            file.writelines(json.dumps(row) + "\n" for row in items.rows())

    def _keep_rows(self) -> None:
        with _guarded(self.directory):
            os.replace(self._part, self.directory / _ITEMS)

    def _put(self, name: str, start: int, block: np.ndarray) -> None:
        """Write rows of each relation by ordinary calls."""
        array = self._arrays[name]
        block = np.ascontiguousarray(block, array.dtype)
        table = array.nbytes // len(block)  # of one relation
        place = array.offset + start * (table // self._manifest["items"])
        parts = [(place + number * table, rows) for number, rows in enumerate(block)]
        write_parts(_path(self.directory, name), parts)

    def _create(self, plan: Plan) -> None:
        directory, n = self.directory, len(plan.items)
        check_room(directory, self._manifest)
        _write_manifest(directory, self._manifest)
        for name, (lead, width) in plan.shapes.items():
            allocate(_path(directory, name), (lead, n, width), plan.dtype)
            allocate(_path(directory, f"has_{name}"), (n,), "bool")
        self._write_rows(plan.items)


def hold_store(directory: pathlib.Path | str) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing a store while a block runs.

    Raises UserError, which names the other process, where one writes it.
    """
    directory = pathlib.Path(directory)
    if not (directory / _MANIFEST).is_file():
        _make_empty(directory)
    return exclusive(
        directory / _LOCK,
        f"is embedding into {directory}",
        remedy="wait until it ends, or give another directory",
    )


class Store(Protocol):
    """What any store of embeddings says of itself and of its items."""

    @property
    def directory(self) -> pathlib.Path | str:
        """Where it is."""

    @property
    def relations(self) -> tuple[str, ...]:
        """The sentences, first the intra-sample one."""

    @property
    def model(self) -> dict[str, Any]:
        """What made it."""

    @property
    def root(self) -> pathlib.Path | None:
        """The folder of the images; None where they are those of the model's own data."""

    @property
    def digest(self) -> str:
        """That of the ids, as of `ids_digest`."""

    def __len__(self) -> int:
        """The number of items."""

    def number(self, key: str) -> int:
        """The index of an item. Raises UserError, with ids that are like it."""

    def text(self, number: int) -> str:
        """The text of an item."""

    def image(self, number: int) -> bytes:
        """The bytes of the file of an item's image. Raises OSError."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """A store that is whole, opened for reading.

    items: as they were embedded, their images read where they are files; vectors: of each
    modality the memory-mapped array; has: of each modality (items,) bool; model: what made them;
    problems: of each kind the "count" of the items that have it, and the "first" few ids; tokens:
    the layout of the token states, None where there are none.
    """

    directory: pathlib.Path
    items: Items
    relations: tuple[str, ...]
    vectors: dict[str, np.ndarray]
    has: dict[str, np.ndarray]
    model: dict[str, Any]
    problems: dict[str, dict[str, Any]]
    tokens: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def root(self) -> pathlib.Path | None:
        """As of `Store`."""
        return self.items.root

    @functools.cached_property
    def digest(self) -> str:
        """As of `Store`."""
        return ids_digest(self.items.ids)

    def number(self, key: str) -> int:
        """The index of an item. Raises UserError, with ids that are like it."""
        ids = self.items.ids
        try:
            return ids.index(key)
        except ValueError:
            like = ids if len(ids) <= _SEARCHED_IDS else [x for x in ids if x[:1] == key[:1]]
            close = difflib.get_close_matches(key, like[:_SEARCHED_IDS], 3, 0.5)
            hint = f"; did you mean {either(close)}?" if close else f"; see its {_ITEMS}"
            raise UserError(f"{self.directory} has no item {key!r}{hint}") from None

    def text(self, number: int) -> str:
        """The text of an item."""
        return self.items.texts[number]

    def image(self, number: int) -> bytes:
        """The bytes of the file of an item's image. Raises OSError."""
        return self.items.read(number)

    def under(self, modality: str, relation: int) -> np.ndarray:
        """The vectors (items, d) of a modality under a relation, mapped."""
        vectors = self.vectors[modality]
        return vectors[relation if len(vectors) > 1 else 0]


def open_embeddings(directory: pathlib.Path | str) -> Embeddings:
    """Open a store. Raises UserError where there is none, it is unfinished or damaged."""
    directory = user_path(directory)
    manifest = read_manifest(directory)
    shards = -(-manifest["items"] // manifest["shard"])
    if manifest["done"] < shards:
        raise UserError(
            f"{directory} is unfinished ({manifest['done']} of {shards} shards); start the command "
            "that embeds again to go on"
        )
    if manifest["stale"]:
        raise UserError(
            f"{directory}: "
            f"{counted(len(manifest['stale']), 'items have', 'item has')} changed since the last "
            "embedding; start the command that embeds again to go on"
        )
    arrays = _open_arrays(directory, manifest)
    return Embeddings(
        directory,
        _read_items(directory, manifest),
        tuple(manifest["relations"]),
        {name: arrays[name] for name in MODALITIES},
        {name: np.array(arrays[f"has_{name}"]) for name in MODALITIES},
        manifest["model"],
        manifest["problems"],
        manifest["tokens"],
    )


def read_manifest(directory: pathlib.Path | str) -> dict[str, Any]:
    """The manifest of a store. Raises UserError where there is none or it is damaged."""
    path = user_path(directory) / _MANIFEST
    if not path.is_file():
        raise UserError(
            f"{directory} holds no {_MANIFEST}, so nothing was embedded there; embed first: "
            f"rcml-embed --workdir WORKDIR --items ITEMS --to {directory}"
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}, not {_FORMAT}")
        missing = [key for key in _KEYS if key not in manifest]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        manifest.setdefault("tokens", None)  # a store from before there were any
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return manifest


def _read_items(directory: pathlib.Path, manifest: dict) -> Items:
    builders = {name: StringBuilder() for name in _TEXTS}
    for line in _lines(directory, manifest):
        row = _row(directory, line)
        for name, builder in builders.items():
            builder.append(row[name])
    ids, texts, names = (builder.build() for builder in builders.values())
    if manifest["root"] is None:
        return Items(ids, texts, names, read=_not_a_file)
    return from_names(ids, texts, names, pathlib.Path(manifest["root"]))


def _lines(directory: pathlib.Path, manifest: dict) -> Iterator[bytes]:
    """The lines of `items.jsonl`. Raises UserError where there are more or fewer than items."""
    path, count = directory / _ITEMS, 0
    try:
        with path.open("rb") as file:
            for count, line in enumerate(file, 1):
                if count <= manifest["items"]:
                    yield line
        if count != manifest["items"]:
            raise ValueError(f"it has {count} items, not {manifest['items']}")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def _row(directory: pathlib.Path, line: bytes) -> dict[str, Any]:
    """A line of `items.jsonl`."""
    try:
        row = json.loads(line)
        if "state" not in row or not all(isinstance(row.get(name), str) for name in _TEXTS):
            raise ValueError("a line lacks id, text, image or state")
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(directory / _ITEMS, error) from error
    return row


def _not_a_file(index: int) -> bytes:
    raise FileNotFoundError(f"the image of item {index} belongs to the model's own data")


def _open_arrays(directory: pathlib.Path, manifest: dict) -> dict[str, np.memmap]:
    n, arrays = manifest["items"], {}
    for modality, (lead, width) in manifest["shapes"].items():
        wanted = {
            modality: ((lead, n, width), manifest["dtype"]),
            f"has_{modality}": ((n,), "bool"),
        }
        for name, (shape, dtype) in wanted.items():
            arrays[name] = open_array(_path(directory, name), shape, dtype)
    return arrays


def open_array(path: pathlib.Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
    """Map an array of a store. Raises UserError where it is missing or has another layout."""
    try:
        array = np.load(path, mmap_mode="r")
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"it is {array.dtype} {array.shape}, not {dtype} {shape}")
    except ARRAY_ERRORS as error:
        raise damaged(path, error) from error
    return array


def _make_empty(directory: pathlib.Path) -> None:
    """Make a directory that holds nothing, or see that it is one."""
    with _guarded(directory):
        directory.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in directory.iterdir() if path.name not in _OF_THE_START]
    if names:
        raise UserError(
            f"{directory} holds {min(names)} and no embeddings of ours; give an empty or a new "
            "directory"
        )


def check_same(directory: pathlib.Path | str, found: dict, asked: dict) -> None:
    """Raise UserError where the manifest of a store is that of another plan than asked for."""
    model = found["model"]
    words = {
        "model": f"another model ({model.get('workdir')}, step {model.get('step')})",
        "items_digest": "other items",
        "relations": f"other relations ({counted(len(found['relations']), 'sentences')})",
        "shapes": "another width",
        "dtype": f"the type {found['dtype']}",
        "tokens": f"the option --tokens {_token_type(found) or 'left out'}",
    }
    for name, what in words.items():
        theirs, ours = found[name], asked[name]
        if name == "model":
            theirs, ours = theirs.get("digest"), ours["digest"]
        elif name == "tokens":
            theirs, ours = _token_type(found), _token_type(asked)
        if theirs != ours:
            raise UserError(
                f"{directory} holds embeddings of {what}; give another directory, or remove it"
            )


def _token_type(manifest: dict) -> str:
    return "" if manifest["tokens"] is None else manifest["tokens"]["dtype"]


def check_room(directory: pathlib.Path, manifest: dict) -> None:
    """Raise UserError where the disk has no room for the shards that are not done."""
    left = max(0, manifest["items"] - manifest["done"] * manifest["shard"])
    size = np.dtype(manifest["dtype"]).itemsize
    needed = left * sum(lead * width * size + 1 for lead, width in manifest["shapes"].values())
    if manifest["tokens"] is not None:
        needed += manifest["tokens"]["bytes"] * left // max(1, manifest["items"])
    if shutil.disk_usage(directory).free < needed:
        raise UserError(
            f"no room in {directory} for {needed / 2**20:,.1f} MiB of embeddings; free some, or "
            "embed under fewer relations, in float16 or without --tokens"
        )


def _write_manifest(directory: pathlib.Path, manifest: dict) -> None:
    content = json.dumps(manifest, indent=2) + "\n"
    with _guarded(directory), atomic_file(directory / _MANIFEST, durable=True) as file:
        file.write(content.encode())


def allocate(path: pathlib.Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an array of zeros, of which the disk holds nothing yet. Raises UserError."""
    with _guarded(path.parent):
        if 0 in shape:  # which cannot be mapped
            np.save(path, np.zeros(shape, dtype))
        else:
            np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)


def write_parts(path: pathlib.Path, parts: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write arrays at offsets of a file by ordinary calls: on a full disk a map would kill us.

    Raises UserError where the disk refuses it.
    """
    with _guarded(path.parent), path.open("rb+") as file:
        for place, rows in parts:
            file.seek(place)
            file.write(rows)


def sync(paths: Iterable[pathlib.Path]) -> None:
    """Wait until files are on the disk. Raises UserError where it refuses them."""
    for path in paths:
        with _guarded(path.parent), path.open("rb+") as file:
            os.fsync(file.fileno())


def _path(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / f"{name}.npy"


@contextlib.contextmanager
def _guarded(directory: pathlib.Path) -> Iterator[None]:
    """Turns what the disk refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror or error}; mend that and start the same "
            "command again to go on"
        ) from error


def damaged(path: pathlib.Path, error: Exception) -> UserError:
    """The error of a file of a store that cannot be used."""
    return UserError(f"{path} is damaged ({error}); embed anew into another directory")

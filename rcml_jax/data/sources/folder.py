"""People's own data: a folder with tables of items, relations and pairs, and images.

Each table is a `.csv` file with a header, a `.jsonl` file (UTF-8) or a Parquet file:

- `items`: `id`, `text`, `image` (a path relative to the folder) and, if there are classes, `label`;
- `relations`: `id`, `sentence`;
- `pairs`: `item_a`, `item_b` (or `item_1`, `item_2`, or `a`, `b`), `relation` and, optionally,
  `split` (train, validation or val, test; an empty one is none).

The items may also be a folder `items` of Parquet files, a data set as Hugging Face's `save_to_disk`
writes it, or tar shards as img2dataset writes them; in tables the images themselves may stand in
the column `image`.

Ids are compared as text. Order within a pair does not matter, and a pair that comes twice counts
once.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax.data import images, prepared
from rcml_jax.data.containers import ImageReader
from rcml_jax.data.relation_graph import INTRA_RELATION, SPLITS, RelationGraph, normalize_pairs
from rcml_jax.data.stages import HERE, Runner
from rcml_jax.data.tables import Table, optional, required, rows_of, table_of
from rcml_jax.errors import UserError
from rcml_jax.files import write_whole
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import TextGate, read_json, user_path

CACHE = ".prepared"
_RECIPE = 3
_TABLES = ("items", "relations", "pairs")
_LEFT_OUT = "left_out.json"
_SPLIT_NAMES = {"train": 0, "validation": 1, "val": 1, "test": 2}
_PAIR_COLUMNS = (("item_a", "item_b"), ("item_1", "item_2"), ("a", "b"))
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What was left out for images that cannot be decoded: item ids, and the number of pairs."""

    items: tuple[str, ...] = ()
    pairs: int = 0


@dataclasses.dataclass(frozen=True)
class _Item:
    id: str
    text: str
    image: str
    label: str
    where: str


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph of `config.data`: `path`, `strict` and the runner of the preparation.

    Raises UserError without a path.
    """
    if not data.path:
        raise UserError("the folder source needs a path: --config rcml:folder,path=DIRECTORY")
    return load(data.path, cache, strict=data.strict, runner=Runner.from_config(data))


def load(
    folder: str | Path,
    cache_dir: str | Path | None = None,
    *,
    strict: bool = False,
    max_image_size: int | None = 512,
    intra_relation: str = INTRA_RELATION,
    runner: Runner = HERE,
    log: Callable[[str], None] | None = None,
) -> RelationGraph:
    """The folder's graph; prepared into `cache_dir` (default `<folder>/.prepared`) if it is new.

    A change of a table, of an image's size or time, or of an argument here makes it anew, in a
    folder beside the older ones (which may be deleted). Images are stored with a longer side of
    `max_image_size` at most. An image that cannot be decoded is left out with its pairs, and a
    warning is logged; with `strict` it is an error. `runner` says where images are decoded.

    Raises:
      UserError: anything else that is wrong in a table, with file, line and reason.
    """
    folder = user_path(folder)
    cache = folder / CACHE if cache_dir is None else user_path(cache_dir)
    name = _cache_name(folder)
    fingerprint = _fingerprint(folder, TextGate(strict), f"{max_image_size} {intra_relation}")
    left_out = prepared.folder_of(cache, name, fingerprint).parents[1] / _LEFT_OUT

    def build() -> RelationGraph:
        graph, skipped = read(
            folder,
            strict=strict,
            max_image_size=max_image_size,
            intra_relation=intra_relation,
            kept=prepared.unfinished_folder(cache, name, fingerprint),
            runner=runner,
            log=log,
        )
        lost = len(skipped.items)
        if lost:  # told at every start, without reading the tables again
            found = {"lost": lost, "of": len(graph) + lost, "first": skipped.items[:6]}
            write_whole(left_out, json.dumps(found))
        return graph

    graph = prepared.load_or_prepare(
        cache,
        name,
        build,
        fingerprint=fingerprint,
        runner=runner,
        log=log,
        description=f"The items, relations and pairs of the folder {folder.resolve().name}.",
    )
    if left_out.is_file():
        told = read_json(left_out.read_text("utf-8"))
        _log.warning(
            "%d of %s left out with all pairs, as images cannot be decoded: %s%s",
            told["lost"],
            counted(told["of"], "items"),
            ", ".join(told["first"][:5]),
            ", ..." if told["lost"] > 5 else "",
        )
    return graph


def read(
    folder: str | Path,
    *,
    strict: bool = False,
    max_image_size: int | None = 512,
    intra_relation: str = INTRA_RELATION,
    kept: Path | None = None,
    runner: Runner = HERE,
    log: Callable[[str], None] | None = None,
) -> tuple[RelationGraph, Skipped]:
    """The folder's graph straight from its files, every row and image checked.

    kept, runner: as of `images.decode_problems`; without the folder nothing is cached.

    Raises:
      UserError: as `load`.
    """
    folder = user_path(folder)
    log, gate = log or log_line, TextGate(strict)
    reader = ImageReader(folder)
    items = _read_items(table_of(folder, "items"), gate)
    relations = _read_relations(folder, gate)
    _check_sentences(relations, strict, log)
    pairs, pair_split = _read_pairs(folder, items, relations, gate)
    gate.report(log)
    good = _check_images(items, reader, strict, kept, runner)
    if not good.any():
        raise UserError(f"No image of {folder} can be decoded; check the image files.")
    kept_items = [item for item, ok in zip(items, good, strict=True) if ok]
    keep = good[pairs[:, 0]] & good[pairs[:, 1]]
    if not keep.any():
        raise UserError(f"No pair of {folder} is left; check its pairs and image files.")
    number = np.cumsum(good) - 1
    pairs = np.stack([number[pairs[:, 0]], number[pairs[:, 1]], pairs[:, 2]], axis=1)[keep]
    pairs, pair_split = normalize_pairs(pairs, pair_split[keep])
    label_names = sorted({item.label for item in kept_items} - {""})
    labels = [label_names.index(item.label) if item.label else -1 for item in kept_items]
    graph = RelationGraph(
        name=_cache_name(folder),
        ids=tuple(item.id for item in kept_items),
        texts=tuple(item.text for item in kept_items),
        labels=np.array(labels, np.int32),
        label_names=tuple(label_names),
        relations=tuple(relations.values()),
        relation_ids=tuple(relations),
        intra_relation=intra_relation,
        pairs=pairs,
        pair_split=pair_split,
        images=images.EncodedImages(
            [(item.image, item.where) for item in kept_items],
            functools.partial(_stored, reader, max_image_size),
        ),
    )
    lost = tuple(item.id for item, ok in zip(items, good, strict=True) if not ok)
    return graph.validate(), Skipped(lost, int(np.sum(~keep)))


def _read_items(table: Table, gate: TextGate) -> list[_Item]:
    items: dict[str, _Item] = {}
    reader = ImageReader(table.root)
    for where, row in rows_of(table, gate):
        item = _Item(
            id=required(row, "id", where),
            text=required(row, "text", where),
            image=required(row, "image", where),
            label=optional(row, "label"),
            where=where,
        )
        if item.id in items:
            raise UserError(
                f"{where}: the id '{item.id}' is used before ({items[item.id].where}); give "
                "every item its own id."
            )
        if not os.path.isfile(file := reader.file_of(item.image)):
            raise UserError(
                f"{where}: there is no image file {file}; write a path relative to {table.root}."
            )
        items[item.id] = item
    if not items:
        raise UserError(f"{table} has no items; add a row for each item.")
    return list(items.values())


def _read_relations(folder: Path, gate: TextGate) -> dict[str, str]:
    relations: dict[str, str] = {}
    for where, row in rows_of(table_of(folder, "relations"), gate):
        key = required(row, "id", where)
        if key in relations:
            raise UserError(
                f"{where}: the id '{key:.100}' is used before; give every relation its own id."
            )
        relations[key] = required(row, "sentence", where)
    if not relations:
        raise UserError(f"{table_of(folder, 'relations')} has no relations; add a row for each.")
    return relations


def _check_sentences(relations: dict[str, str], strict: bool, log: Callable[[str], None]) -> None:
    """Tell which relation ids have one and the same sentence; an error with `strict`."""
    ids: dict[str, list[str]] = {}
    for key, sentence in relations.items():
        ids.setdefault(" ".join(sentence.split()), []).append(key)
    same = [keys for keys in ids.values() if len(keys) > 1]
    if same:
        groups = "; ".join(", ".join(map(repr, keys)) for keys in same[:5])
        groups += "; ..." if len(same) > 5 else ""
        problem = counted(len(same), "sentences have", "sentence has")
        problem += f" several relation ids ({groups})"
        if strict:
            raise UserError(
                f"{problem}; give each its own sentence, or leave `strict` off, so that they are "
                "one relation to the evaluation."
            )
        log(f"{problem}: no model can tell these apart, and the evaluation takes them for one.")


def _read_pairs(
    folder: Path, items: list[_Item], relations: dict[str, str], gate: TextGate
) -> tuple[np.ndarray, np.ndarray]:
    item_number = {item.id: number for number, item in enumerate(items)}
    relation_number = {key: number for number, key in enumerate(relations)}
    rows, splits = [], []
    declared: dict[tuple[int, int], tuple[int, str]] = {}
    for where, row in rows_of(table_of(folder, "pairs"), gate):
        names = next((pair for pair in _PAIR_COLUMNS if set(pair) & set(row)), _PAIR_COLUMNS[0])
        a, b = (_known(row, name, where, item_number, "item") for name in names)
        relation = _known(row, "relation", where, relation_number, "relation")
        if a == b:
            raise UserError(
                f"{where}: item '{items[a].id}' is paired with itself; remove the row (an item's "
                "own text and image are a pair anyway)."
            )
        split = _split(row, where)
        if split >= 0:
            unit = (min(a, b), max(a, b))
            before, line = declared.setdefault(unit, (split, where))
            if before != split:
                raise UserError(
                    f"{where}: this pair is in split {SPLITS[split]}, but in {SPLITS[before]} "
                    f"before ({line}); declare one split for all the relations of a pair."
                )
        rows.append((a, b, relation))
        splits.append(split)
    if not rows:
        raise UserError(f"{table_of(folder, 'pairs')} has no pairs; add a row for each.")
    # Where a pair comes twice, a declared split goes before none.
    order = np.argsort(-np.array(splits), kind="stable")
    return np.array(rows, np.int32)[order], np.array(splits, np.int8)[order]


def _split(row: dict, where: str) -> int:
    name = optional(row, "split").lower()
    if not name:
        return -1
    if name not in _SPLIT_NAMES:
        raise UserError(
            f"{where}: there is no split '{name}'; use train, validation or test, or leave it "
            "empty."
        )
    return _SPLIT_NAMES[name]


def _known(row: dict, column: str, where: str, numbers: dict[str, int], kind: str) -> int:
    key = required(row, column, where)
    if key not in numbers:
        raise UserError(
            f"{where}: there is no {kind} '{key:.100}'; add it to {kind}s or correct it."
        )
    return numbers[key]


def _check_images(
    items: list[_Item], reader: ImageReader, strict: bool, kept: Path | None, runner: Runner
) -> np.ndarray:
    """Whether each item's image can be decoded (N,) bool; with `strict` all can, or UserError."""
    names = [item.image for item in items]
    problems = images.decode_problems(names, reader, kept=kept, runner=runner)
    for item, text in zip(items, problems, strict=True):
        if text and strict:
            raise UserError(
                f"{item.where}: the image {reader.root / item.image} cannot be decoded ({text}); "
                "replace it or leave `strict` off."
            )
    return np.array([not text for text in problems])


def _stored(reader: ImageReader, max_image_size: int | None, place: tuple[str, str]) -> bytes:
    """The image to store; place: its name, and the file and line of its item."""
    name, where = place
    try:
        return images.storable(reader(name), max_image_size)
    except images.DECODE_ERRORS as error:
        raise UserError(
            f"{where}: the image {reader.root / name} cannot be read ({error}); replace it."
        ) from error


def _cache_name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", folder.resolve().name).strip("_") or "folder"


def _fingerprint(folder: Path, gate: TextGate, arguments: str) -> str:
    """Changes with the tables' contents and with the images' names, sizes and times."""
    digest = hashlib.sha256(f"{_RECIPE} {gate.strict} {arguments}".encode())
    tables = {name: table_of(folder, name) for name in _TABLES}
    for table in tables.values():
        digest.update(table.digest().encode())
    if tables["items"].kind != ".tar":  # of shards the state is that of their images
        reader = ImageReader(folder)
        states: dict[Path, str] = {}
        for item in _read_items(tables["items"], gate):
            file = reader.file_of(item.image)
            if file not in states:
                state = file.stat()
                states[file] = f"{state.st_size} {state.st_mtime_ns}"
            digest.update(f"{item.image} {states[file]}".encode())
    return digest.hexdigest()

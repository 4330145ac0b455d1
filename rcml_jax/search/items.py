"""Items to embed: ids, texts and images of a table, or of a relation graph.

A table is a `.csv` file with a header, a `.jsonl` file (UTF-8), a Parquet file or a tar shard as
img2dataset writes it; or a folder with `items.csv` or another of these, with several Parquet files
or shards, or with a data set that Hugging Face's `save_to_disk` wrote. Its columns are `id`, `text`
and `image` (a path relative to the table, or the image itself), as in
`rcml_jax.data.sources.folder`. Here an item may lack its text or its image, and further columns are
kept, for stores that can filter by them.
"""

import dataclasses
import decimal
import functools
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rcml_jax.data import images
from rcml_jax.data.containers import ImageReader
from rcml_jax.data.images import DECODE_ERRORS
from rcml_jax.data.relation_graph import RelationGraph
from rcml_jax.data.stages import file_state
from rcml_jax.data.strings import StringBuilder
from rcml_jax.data.tables import Table, optional, required, rows_of, table_at, table_of
from rcml_jax.errors import UserError
from rcml_jax.log import log_line
from rcml_jax.parsing import TextGate, user_path

#: The longer side of an image before it is resized for a model, as the folder source keeps it.
STORED_SIZE = 512
_SIDE = 320  # pixels of a thumbnail's longer side: sharp on a phone's dense screen


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """n items in order.

    ids; texts, "" where there is none; image_names, "" where there is none: tuples, or
    `StringColumn`s where there may be many. read: an index → the bytes of that image's file, or
    OSError. root: the folder that names are relative to; None where the images are those of a
    graph. states: gives for each image, in order, a JSON value that changes when its content does.
    columns: by name the values of each further column: bool, int (up to 2^53), float or str, one
    type a column, and None where there is none.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    image_names: Sequence[str]
    read: Callable[[int], bytes]
    root: Path | None = None
    states: Callable[[], Iterable] | None = None
    columns: dict[str, tuple] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def image_states(self) -> Iterable:
        """The state of each image's content, as a JSON value; None where it is not known."""
        return itertools.repeat(None, len(self)) if self.states is None else self.states()

    def rows(self) -> Iterator[dict]:
        """Each item's id, text and image, and the state of the image's content, as JSON values."""
        columns = zip(self.ids, self.texts, self.image_names, self.image_states(), strict=True)
        for key, text, image, state in columns:
            yield {"id": key, "text": text, "image": image, "state": state}

    def digest(self) -> str:
        """Changes with ids, texts, names of images and their order, not with the images."""
        digest = hashlib.sha256()
        for row in zip(self.ids, self.texts, self.image_names, strict=True):
            for value in row:
                encoded = value.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


def read_items(path: str | Path, *, strict: bool = False) -> Items:
    """The items of a table, or of the folder that holds one.

    In a .csv file a column of numbers is one if all its values are written as such, without leading
    zeros. Texts with a NUL or half of a surrogate pair are changed and counted on standard error;
    with `strict` they are an error.

    Raises:
      UserError: there is no such table, it is malformed, an id is missing or used twice, or no row
        has a text or an image.
    """
    path, gate = user_path(path), TextGate(strict)
    if not path.exists():
        raise UserError(f"there is no {path}; give a folder or a table of items")
    table = table_of(path, "items") if path.is_dir() else table_at(path)
    builders = [StringBuilder() for _ in range(3)]
    others: dict[str, dict[int, Any]] = {}
    n = 0
    for where, row in rows_of(table, gate):
        values = required(row, "id", where), optional(row, "text"), optional(row, "image")
        for builder, value in zip(builders, values, strict=True):
            builder.append(value)
        for name in row.keys() - {"id", "text", "image", ""}:
            others.setdefault(name, {})[n] = row[name]
        n += 1
    ids, texts, image_names = (builder.build() for builder in builders)
    if not ids.is_unique():
        _refuse_ids(table)
    gate.report(log_line)
    if not n:
        raise UserError(f"{table} has no items; add a row for each item.")
    if not any(texts) and not any(image_names):
        raise UserError(f"{table} has no value in a column 'text' or 'image'; add one of them.")
    words = table.kind == ".csv"
    columns = {
        name: column([given.get(i) for i in range(n)], words)
        for name, given in sorted(others.items())
    }
    found = from_names(ids, texts, image_names, table.root)
    return dataclasses.replace(found, columns=columns)


def _refuse_ids(table: Table) -> None:
    """Raise UserError for the first id that is used twice: both places are looked up now."""
    places: dict[str, str] = {}
    for where, row in rows_of(table):
        key = required(row, "id", where)
        if key in places:
            raise UserError(
                f"{where}: the id '{key:.100}' is used before ({places[key]}); give every item its "
                "own id."
            )
        places[key] = where


_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,14})")
_NUMBER = re.compile(rf"{_INTEGER.pattern}(\.[0-9]+)?([eE][+-]?[0-9]{{1,2}})?")


def column(values: Sequence[Any], words: bool = False) -> tuple:
    """Values of one type: bool, int, float or str; None for what is empty.

    words: they are texts, of which numbers are to be made where all are numbers. Values of several
    types and integers that a float cannot hold become texts, as JSON has them.
    """
    values = [None if value == "" else value for value in values]
    values = [float(value) if isinstance(value, decimal.Decimal) else value for value in values]
    given = [value for value in values if value is not None]
    make: Callable[[Any], Any]
    if words and all(_INTEGER.fullmatch(value) for value in given):
        make = int
    elif words and all(_NUMBER.fullmatch(value) for value in given):
        make = float
    elif all(type(value) is bool for value in given):
        make = bool
    elif all(type(value) is int and abs(value) <= 2**53 for value in given):
        make = int
    elif all(
        type(value) is float or (type(value) is int and abs(value) <= 2**53) for value in given
    ):
        make = float
    else:
        make = lambda value: value if isinstance(value, str) else json.dumps(value, default=str)  # noqa: E731
    return tuple(None if value is None else make(value) for value in values)


def from_names(
    ids: Sequence[str], texts: Sequence[str], image_names: Sequence[str], root: Path
) -> Items:
    """Items whose images are files relative to `root`, or parts of such files."""
    reader = ImageReader(root)

    def states() -> Iterator:
        @functools.lru_cache(1024)  # many images may be in one file
        def of_file(path: Path) -> list | None:
            try:
                return file_state(path)[1:]
            except DECODE_ERRORS:  # it is missing, or its name is none
                return None

        for name in image_names:
            yield of_file(reader.file_of(name)) if name else None

    return Items(
        ids,
        texts,
        image_names,
        lambda i: reader(image_names[i]),
        root.resolve(),
        states,
    )


def from_graph(graph: RelationGraph) -> Items:
    """The items of a relation graph, under their ids."""
    return Items(
        graph.ids,
        graph.texts,
        graph.ids,
        graph.images.encoded,
        states=lambda: images.image_states(graph.images),
    )


def write_listing(graph: RelationGraph, directory: str | Path) -> None:
    """Write what a graph has to be embedded: items, images and relation sentences.

    `items.jsonl` (`id`, `text`, `image`) and `relations.jsonl` (`id`, `sentence`, `unseen`), both
    in the order of the graph, and `images/`. `unseen` are the sentences that only the test uses.
    `items.jsonl` comes last: a listing that has it is whole. Raises UserError where the directory
    is not empty or cannot be written.
    """
    directory, begun = user_path(directory), False
    try:
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} is not empty; give --list a new directory")
        begun = True
        (directory / "images").mkdir(parents=True)
        unseen = graph.held_out_sentences()
        relations = [
            {"id": str(r), "sentence": said, "unseen": [sentences[r] for sentences in unseen]}
            for r, said in enumerate(graph.relations)
        ]
        _write_rows(directory / "relations.jsonl", relations)
        items = []
        for index, (key, text) in enumerate(zip(graph.ids, graph.texts, strict=True)):
            encoded = graph.images.encoded(index)
            kind = "png" if encoded.startswith(b"\x89PNG") else "jpg"
            name = f"images/{index:06d}.{kind}"
            (directory / name).write_bytes(encoded)
            items.append({"id": key, "text": text, "image": name})
        _write_rows(directory / "items.jsonl", items)
    except OSError as error:
        if begun:  # so that the next start finds it empty
            shutil.rmtree(directory, ignore_errors=True)
        raise UserError(f"cannot write {directory}: {error.strerror}") from error


def _write_rows(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, "utf-8")


def pixels(encoded: bytes, framing: int | images.Framing) -> np.ndarray:
    """An image as training has it: uint8 (size, size, 3).

    Raises:
      ImageError: the bytes are no image.
    """
    return images.to_array(images.open_rgb(images.storable(encoded, STORED_SIZE)), framing)


def thumbnail(encoded: bytes) -> bytes | None:
    """A small JPEG, upright, transparent parts white; None where that cannot be made."""
    try:
        image = images.open_rgb(images.storable(encoded, _SIDE))
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        return None
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()

"""Embeddings of a catalogue as a table of LanceDB: filters, full text, and indices of vectors.

The table `items` of a database has a row an item, in any order:

- `id`, `text`, `image` (the name of its file, "" where there is none), and the items' further
  columns;
- `vector_text_0`, `vector_image_0`, `vector_text_1` and so on: the vectors of each modality under
  each relation, null where the item lacks it; of a modality that depends on no relation the first
  alone;
- `item_number`: its index in the catalogue; `image_state`: the state of the image's file when it
  was embedded, a JSON text.

The metadata of its schema hold the manifest of `embedding_store.Plan` under `rcml_jax`. Each shard
is one commit, so a row is whole or not there, and a table with fewer rows than the manifest has
items is unfinished.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from rcml_jax.files import exclusive
from rcml_jax.parsing import NO_TEXT, read_file, user_path
from rcml_jax.remote import path_or_address
from rcml_jax.search.embedding_store import MODALITIES, Plan, check_room, check_same, either

#: From so many items on a table gets an index by itself, and is searched by it.
MANY = 1_000_000
INDICES = ("ivf-pq", "hnsw")
_NAME, _KEY, _LOCK = "items", b"rcml_jax", ".lock"
_OWN = ("id", "text", "image", "item_number", "image_state")
_ADDRESS = re.compile(r"lance(?:\+([A-Za-z0-9+.-]+))?://(.*)", re.DOTALL)
_IN_A_STORE = re.compile(r"[\w.@$%+-]*(?:[/?].*)?", re.ASCII)
_NO_COLUMN = re.compile(r"^_|^vector_|[.`*]")  # names that LanceDB reads as something else
_TRAINED_ON = 256  # vectors that an index needs at least: PQ has so many codes
_AT_ONCE = 1000  # rows that are asked for by their numbers
_EXAMPLES, _LIKE_IDS = 5, 20_000
_PROBES = 50  # partitions of an index that a query looks into


def is_table(address: object) -> bool:
    """Whether an address is that of a table, and no path."""
    return isinstance(address, str) and _ADDRESS.fullmatch(address) is not None


def table_or_path(address: str) -> str | pathlib.Path:
    """The address of a table or on object storage as it is, anything else as a path.

    Raises UserError for neither.
    """
    if is_table(address):
        _uri(address)
        return address
    return path_or_address(address)


def _uri(address: str) -> str:
    """What LanceDB opens for an address."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address!a} is the address of no table; write lance://DIRECTORY")
    scheme, rest = match.groups()
    if not rest:
        raise UserError(f"{address} names no directory; write lance://DIRECTORY")
    if "://" in rest:
        raise UserError(f"{address} is no directory; write lance+{rest} for object storage")
    if scheme == "db":
        raise UserError(
            f"{address} is a server of LanceDB, which is not supported; give a directory or object "
            "storage"
        )
    if scheme is None:
        return str(user_path(rest))
    if not _IN_A_STORE.fullmatch(rest):  # LanceDB would make a local folder of it
        raise UserError(f"{address!a} has a bucket of no valid name; write lance+s3://BUCKET/PATH")
    return f"{scheme}://{rest}"


def _is_local(address: str) -> bool:
    return address.startswith("lance://")


def _connect(address: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise UserError(f'{address} needs LanceDB: pip install "rcml_jax[lance]"') from error
    with _guarded(address):
        return lancedb.connect(_uri(address))


@contextlib.contextmanager
def _guarded(address: str) -> Iterator[None]:
    """Turns what LanceDB or the storage refuses into a sentence."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"LanceDB cannot use {address} ({_reason(error)}); mend that and start the same "
            "command again"
        ) from error


def _reason(error: Exception) -> str:
    """What LanceDB says, in one line and without the places in its sources."""
    text = re.sub(r",? ?/\S+\.rs:\d+:\d+", "", " ".join(str(error).split()))
    text = text.removeprefix("Invalid input, ").removeprefix("lance error: ").rstrip(". ")
    return text if len(text) <= 300 else f"{text[:299]}…"


# Writing


@contextlib.contextmanager
def hold_table(address: str) -> Iterator[None]:
    """Keep other processes of this file system from writing a table while a block runs.

    On object storage there are no locks; there `TableWriter` finds out. Raises UserError, which
    names the other process, where one writes it, or where the directory holds anything else.
    """
    if not _is_local(address):
        yield
        return
    directory = pathlib.Path(_uri(address))
    with _guarded(address):
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
    names -= {f"{_NAME}.lance", _LOCK, f"{_LOCK}.json", f"{_LOCK}.json.part"}
    if names:
        raise UserError(
            f"{directory} holds {min(names)} and is no table of ours; give an empty or a new "
            "directory"
        )
    remedy = "wait until it ends, or give another directory"
    with exclusive(directory / _LOCK, f"is embedding into {address}", remedy=remedy):
        yield


class TableWriter:
    """The table of a plan, new or begun before; the interface is that of `embedding_store.Writer`.

    Rows that are whole stay. Items whose text or image has changed are `stale`; where only further
    columns have changed, these are replaced at once. Call `finish` at the end.

    Raises UserError where the table is that of another plan or has other columns, where LanceDB is
    missing or refuses something, where the disk has no room, and where another process writes the
    same table: each commit is refused whose predecessor is not our own.
    """

    def __init__(self, address: str, plan: Plan):
        self.directory, self.shard, self._items = address, plan.shard, plan.items
        self._schema = _schema(plan)
        # As they are before anything is read.
        self._states = StringColumn.of(map(json.dumps, plan.items.image_states()))
        self._waiting: list[Any] = []
        manifest = plan.manifest()
        database = _connect(address)
        found = _open(address, database)
        with _guarded(address):
            count = 0 if found is None else found.count_rows()
        if found is not None and count:
            before = _manifest(address, found)
            check_same(address, before, manifest)
            self._check_columns(found.schema)
        if _is_local(address):
            check_room(pathlib.Path(_uri(address)), manifest | {"done": count // plan.shard})
        if not count:  # made anew, also if it was begun for another plan
            mode = "create" if found is None else "overwrite"
            with _guarded(address):
                found = database.create_table(_NAME, schema=self._schema, mode=mode)
        self._table: Any = found
        self._version = self._table.version
        self.stale: list[int] = []
        self._missing = np.ones(len(plan.items), bool)
        if count:
            self._compare()

    def _check_columns(self, schema: Any) -> None:
        for ours, theirs in ((self._schema, schema), (schema, self._schema)):
            for field in ours:
                if field.name not in theirs.names or theirs.field(field.name).type != field.type:
                    raise UserError(
                        f"{self.directory} has other columns than the items ({field.name!r} is "
                        "missing or of another type in one of them); give another directory, or "
                        "remove it"
                    )

    def _compare(self) -> None:
        """Find rows that are missing, stale or there twice, and replace changed columns."""
        columns = self._items.columns
        twice, changed, relabelled = set(), set(), set()
        for batch in _scan(self.directory, self._table, [*_OWN, *columns]):
            for row in batch.to_pylist():
                number = row["item_number"]
                if not self._missing[number]:
                    twice.add(number)
                self._missing[number] = False
                wanted = self._own_values(number)
                if any(row[name] != value for name, value in wanted.items()):
                    changed.add(number)
                elif any(row[name] != values[number] for name, values in columns.items()):
                    relabelled.add(number)
        if twice:  # two processes have written them at once
            self._missing[[*twice]] = True
            for part in _parts(sorted(twice)):
                self._commit(functools.partial(self._table.delete, _among(part)))
        self.stale = sorted(changed - twice)
        for part in _parts(sorted(relabelled - twice)):
            self._relabel(part)

    def _relabel(self, numbers: list[int]) -> None:
        import pyarrow as pa

        with _guarded(self.directory):
            rows = self._table.search().where(_among(numbers)).to_arrow()
        order = rows["item_number"].to_pylist()
        for name, values in self._items.columns.items():
            field = self._schema.field(name)
            new = pa.array([values[number] for number in order], field.type)
            rows = rows.set_column(rows.schema.get_field_index(name), field, new)
        self._merge(rows)

    def shards(self) -> Iterator[range]:
        """The items that are missing: neighbours, of one shard each, in order."""
        missing = np.flatnonzero(self._missing)
        if not len(missing):
            return
        new = (np.diff(missing) > 1) | (missing[1:] // self.shard != missing[:-1] // self.shard)
        for part in np.split(missing, np.flatnonzero(new) + 1):
            yield range(int(part[0]), int(part[-1]) + 1)

    def write(self, start: int, blocks: dict[str, np.ndarray], has: dict[str, np.ndarray]) -> None:
        """As of `embedding_store.Writer`; nothing is kept before `mark`."""
        numbers = range(start, start + len(has[MODALITIES[0]]))
        self._waiting.append(self._batch(numbers, blocks, has))

    def mark(self, problems: dict[str, list[str]]) -> None:
        """Commit what was written; the problems can be seen in the rows."""
        import pyarrow as pa

        rows = pa.Table.from_batches(self._waiting, self._schema)
        self._waiting = []
        self._commit(lambda: self._table.add(rows))
        self._missing[np.asarray(rows["item_number"])] = False

    def rewrite(
        self, items: Sequence[int], blocks: dict[str, np.ndarray], has: dict[str, np.ndarray]
    ) -> None:
        """Replace the rows of some stale items; blocks and has as of `write`."""
        import pyarrow as pa

        self._merge(pa.Table.from_batches([self._batch(items, blocks, has)], self._schema))

    def refresh(self) -> None:
        """All stale items are written anew."""
        self.stale = []

    def finish(self, index: str = "auto") -> None:
        """Index the texts and, if asked for, the vectors; indices there are brought up to date.

        index: ivf-pq or hnsw; auto: ivf-pq from a million items on; none: no new one. A column
        with fewer than 256 vectors needs none and gets none. Where vectors are indexed, ids are,
        too.

        Raises UserError where no column has as many.
        """
        from lancedb.index import FTS, BTree, HnswSq, IvfPq

        if index == "auto":
            index = "ivf-pq" if len(self._items) >= MANY else "none"
        with _guarded(self.directory):
            there = {found.columns[0]: found for found in self._table.list_indices()}
            self._index("text", there.get("text"), FTS())
            made = 0
            vectors = [name for name in self._schema.names if name.startswith("vector_")]
            for name in vectors:
                old = there.get(name)
                kind = "hnsw" if old is not None and "hnsw" in old.index_type.lower() else "ivf-pq"
                wanted = index if index != "none" else None if old is None else kind
                if wanted is None or self._table.count_rows(f"{name} IS NOT NULL") < _TRAINED_ON:
                    continue
                made += 1
                width = self._schema.field(name).type.list_size
                # Four numbers a byte where the width allows it: with eight, recall@10 was 0.90 in
                # benchmarks/index.py at a width of 128. Narrow vectors need more bytes a number.
                step = next((s for s in (4, 2) if width % s == 0 and width >= 16 * s), 1)
                config: Any = IvfPq("cosine", num_sub_vectors=width // step)
                config = HnswSq("cosine") if wanted == "hnsw" else config
                self._index(name, old if kind == wanted else None, config)
            if made:  # as many items are found faster by these, too
                for name in ("id", "item_number"):
                    self._index(name, there.get(name), BTree())
        if index != "none" and not made:
            raise UserError(
                f"{self.directory} has too few items for an index; give {_TRAINED_ON} at least, or "
                "leave --index out"
            )

    def _index(self, column: str, old: Any, config: Any) -> None:
        if old is None or old.num_unindexed_rows or old.num_indexed_rows < len(self._items):
            self._commit(lambda: self._table.create_index(column, config=config, replace=True))

    def _merge(self, rows: Any) -> None:
        # Else an item without a vector counts as one with a bad vector.
        options = {"on_bad_vectors": "null"}
        merge = self._table.merge_insert("item_number").when_matched_update_all()
        self._commit(lambda: merge.execute(rows, **options))

    def _commit(self, change: Any) -> None:
        """Change the table, unless another process has changed it since our last commit."""
        with _guarded(self.directory):
            self._table.checkout_latest()
            alone = self._table.version == self._version
            if alone:
                change()
                alone = self._table.version == self._version + 1
            self._version = self._table.version
        if not alone:
            raise UserError(
                f"another process is writing to {self.directory}; wait until it ends and start the "
                "same command again, or give another directory"
            )

    def _own_values(self, number: int) -> dict[str, Any]:
        """What a row has of an item beside further columns and vectors."""
        items = self._items
        found = items.ids[number], items.texts[number], items.image_names[number]
        return dict(zip(_OWN, (*found, number, self._states[number]), strict=True))

    def _batch(
        self, numbers: Sequence[int], blocks: dict[str, np.ndarray], has: dict[str, np.ndarray]
    ) -> Any:
        """The rows of some items, in order."""
        import pyarrow as pa

        rows = [self._own_values(number) for number in numbers]
        values: dict[str, list] = {name: [row[name] for row in rows] for name in _OWN}
        for name, column in self._items.columns.items():
            values[name] = [column[number] for number in numbers]
        arrays = []
        for field in self._schema:
            if field.name in values:
                arrays.append(pa.array(values[field.name], field.type))
                continue
            _, modality, relation = field.name.split("_")
            mask, width = np.asarray(has[modality], bool), field.type.list_size
            if mask.any():
                flat = np.asarray(blocks[modality][int(relation)])
            else:
                flat = np.zeros((len(mask), width))
            flat = np.ascontiguousarray(flat, field.type.value_type.to_pandas_dtype()).ravel()
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(flat), type=field.type, mask=pa.array(~mask)
            )
            arrays.append(vectors)
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)


def _schema(plan: Plan) -> Any:
    """The Arrow schema of a plan. Raises UserError for the name of a column that cannot be."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError('a table needs LanceDB: pip install "rcml_jax[lance]"') from error

    # Numbers are of one type, as LanceDB compares none of integers with 19.99.
    types = {bool: pa.bool_(), int: pa.float64(), float: pa.float64(), str: pa.string()}
    fields = [pa.field(name, pa.string()) for name in _OWN[:3]]
    folded = {name: name for name in _OWN}
    for name, values in plan.items.columns.items():
        lower = name.casefold()
        if lower in folded or _NO_COLUMN.search(lower) or NO_TEXT.search(name):
            raise UserError(
                f"the column {name!a} of the items cannot be one of a table, as it has a dot, a "
                "backtick or a star, begins with _ or vector_, or is there already; rename it"
            )
        folded[lower] = name
        kinds = {type(value) for value in values if value is not None} or {str}
        fields.append(pa.field(name, types[kinds.pop()]))
    fields += [pa.field("item_number", pa.int64()), pa.field("image_state", pa.string())]
    value = pa.float16() if plan.dtype == "float16" else pa.float32()
    for relation in range(len(plan.relations)):
        for name in MODALITIES:
            lead, width = plan.shapes[name]
            if relation < lead:
                fields.append(pa.field(_column(name, relation), pa.list_(value, width)))
    return pa.schema(fields, {_KEY: json.dumps(plan.manifest()).encode()})


def _column(modality: str, relation: int) -> str:
    return f"vector_{modality}_{relation}"


def _among(numbers: Sequence[int]) -> str:
    return f"item_number IN ({', '.join(map(str, numbers))})"


def _parts(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _AT_ONCE):
        yield [int(number) for number in numbers[start : start + _AT_ONCE]]


# Reading


def _open(address: str, database: Any) -> Any:
    """The handle of the table, None where there is none."""
    with _guarded(address):
        names: list[str] = []
        page = None
        while True:
            found = database.list_tables(page_token=page)
            names += found.tables
            page = found.page_token
            if not page:
                break
        if _NAME not in names:
            return None
        try:
            return database.open_table(_NAME)
        except ValueError as error:
            if "not found" in str(error):  # a kill has left a directory without a commit
                return None
            raise


def _manifest(address: str, table: Any) -> dict[str, Any]:
    try:
        manifest = json.loads((table.schema.metadata or {})[_KEY])
        for key in ("model", "items", "items_digest", "root", "relations", "shapes", "dtype"):
            manifest[key]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{address} holds a table that is not ours or is damaged; give another directory, or "
            "embed anew"
        ) from error
    return manifest


def _scan(address: str, table: Any, columns: list[str], where: str = "") -> Iterator[Any]:
    """Record batches of all rows, or of those that a filter keeps."""
    with _guarded(address):
        query = table.search()
        query = query.where(where) if where else query
        yield from query.select(columns).to_batches(8192)


@dataclasses.dataclass(frozen=True, eq=False)
class LanceTable:
    """A whole table, opened for reading.

    directory: its address; relations, model: as of `embedding_store.Embeddings`; count: their
    number; digest: that of the ids, as of `embedding_store.ids_digest`; root: the folder of the
    images, None where they are those of the model's own data; handle: LanceDB's.
    """

    directory: str
    relations: tuple[str, ...]
    model: dict[str, Any]
    count: int
    digest: str
    root: pathlib.Path | None
    shapes: dict[str, list[int]]
    dtype: str
    handle: Any

    def __len__(self) -> int:
        return self.count

    def column(self, modality: str, relation: int) -> str:
        """The name of the column with the vectors of a modality under a relation."""
        return _column(modality, relation if self.shapes[modality][0] > 1 else 0)

    def number(self, key: str) -> int:
        """The index of an item in the catalogue. Raises UserError, with ids that are like it."""
        return self.item(key, ())["item_number"][0].as_py()

    def text(self, number: int) -> str:
        """The text of an item."""
        return self.rows([number], ["text"])[0]["text"]

    def item(self, key: str, columns: Sequence[str]) -> Any:
        """A batch of one row: an item's index and other columns. Raises UserError as `number`."""
        for batch in self.scan(["item_number", *columns], f"id = {_literal(key)}"):
            if len(batch):
                return batch
        like = f"starts_with(id, {_literal(key[:1])})" if self.count > _LIKE_IDS else ""
        ids = itertools.chain.from_iterable(
            batch["id"].to_pylist() for batch in self.scan(["id"], like)
        )
        close = difflib.get_close_matches(key, itertools.islice(ids, _LIKE_IDS), 3, 0.5)
        hint = f"; did you mean {either(close)}?" if close else ""
        raise UserError(f"{self.directory} has no item {key!r}{hint}")

    def rows(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The values of some items, in the order of their indices."""
        found = {}
        for part in _parts(numbers):
            for batch in self.scan(["item_number", *columns], _among(part)):
                found.update({row["item_number"]: row for row in batch.to_pylist()})
        return [found[int(number)] for number in numbers]

    def image(self, number: int) -> bytes:
        """The bytes of the file of an item's image. Raises OSError."""
        name = self.rows([number], ["image"])[0]["image"]
        if self.root is None or not name:
            raise FileNotFoundError(f"the item {number} of {self.directory} has no file")
        return read_file(self.root / name)

    def problems(self) -> dict[str, dict[str, Any]]:
        """As of `embedding_store.Embeddings`."""
        lacks = {name: f"{_column(name, 0)} IS NULL" for name in MODALITIES}
        filters = {
            "unreadable": f"{lacks['image']} AND image != ''",
            "empty": f"{lacks['image']} AND {lacks['text']} AND image = ''",
        }
        found = {}
        for name, where in filters.items():
            batches = self.scan(["item_number", "id"], where)
            rows = [row for batch in batches for row in batch.to_pylist()]
            ids = [row["id"] for row in sorted(rows, key=lambda row: row["item_number"])]
            found[name] = {"count": len(ids), "first": ids[:_EXAMPLES]}
        return found

    def check_filter(self, where: str) -> None:
        """Raise UserError for a filter that is malformed or names a column that is not there."""
        try:
            self.handle.count_rows(where)
        except (OSError, RuntimeError, ValueError) as error:
            names = [n for n in self.handle.schema.names if not n.startswith("vector_")]
            raise UserError(
                f"the filter {where!r} cannot be used ({_reason(error)}); write a condition "
                f"such as \"id != 'x' AND text != ''\" on the columns {', '.join(names)}"
            ) from error

    def scan(self, columns: Sequence[str], where: str = "") -> Iterator[Any]:
        """Record batches of the rows that a filter keeps, in any order."""
        return _scan(self.directory, self.handle, list(columns), where)

    @functools.cached_property
    def indices(self) -> dict[str, Any]:
        """What LanceDB says of the index of each column that has one."""
        with _guarded(self.directory):
            return {found.columns[0]: found for found in self.handle.list_indices()}

    def matching(self, words: str, where: str = "") -> dict[int, float]:
        """The items whose text has all of some words: their BM25 scores by their indices.

        Raises UserError where the texts have no index.
        """
        import lancedb.query

        if "text" not in self.indices:
            raise UserError(
                f"the texts of {self.directory} are not indexed yet; start the command that embeds "
                "again to go on"
            )
        with _guarded(self.directory):
            match: Any = lancedb.query.MatchQuery
            asked = match(words, "text", operator=lancedb.query.FullTextOperator.AND)
            query = self.handle.search(asked, query_type="fts")
            query = query.where(where) if where else query
            found = query.select(["item_number", "_score"]).limit(max(1, self.count)).to_arrow()
        numbers, scores = found["item_number"].to_pylist(), found["_score"].to_pylist()
        return dict(zip(numbers, scores, strict=True))

    def candidates(
        self, column: str, query: np.ndarray, count: int, columns: list[str], where: str = ""
    ) -> Any:
        """An Arrow table of `count` rows whose vectors in a column are near a query's, by an index.

        What an index returns is approximate; a column without one is scanned.
        """
        with _guarded(self.directory):
            found = self.handle.search(query, vector_column_name=column).distance_type("cosine")
            found = found.nprobes(_PROBES).ef(2 * count)
            found = found.where(where) if where else found
            return found.select([*columns, "_distance"]).limit(count).to_arrow()


def _literal(text: str) -> str:
    """A text in a filter."""
    return "'" + text.replace("'", "''") + "'"


def open_table(address: str) -> LanceTable:
    """Open a table. Raises UserError where there is none, it is unfinished or not ours."""
    local = pathlib.Path(_uri(address)) if _is_local(address) else None
    # LanceDB would make the directory.
    handle = None if local is not None and not local.is_dir() else _open(address, _connect(address))
    if handle is None:
        raise UserError(
            f"there is no table in {address}; embed first: rcml-embed --workdir WORKDIR --items "
            f"ITEMS --to {address}"
        )
    manifest = _manifest(address, handle)
    with _guarded(address):
        count, items = handle.count_rows(), manifest["items"]
    there = np.zeros(items, bool)
    for batch in _scan(address, handle, ["item_number"]):
        there[np.asarray(batch["item_number"])] = True
    if count != items or not there.all():  # some may be there twice
        raise UserError(
            f"{address} is unfinished ({there.sum():,} of {items:,} items, {count:,} rows); start "
            "the command that embeds again to go on"
        )
    root = manifest["root"]
    return LanceTable(
        address,
        tuple(manifest["relations"]),
        manifest["model"],
        items,
        manifest["items_digest"],
        None if root is None else pathlib.Path(root),
        manifest["shapes"],
        manifest["dtype"],
        handle,
    )


def vectors_of(rows: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (m, d) float32 of the rows of a batch that have one, and which do (n,) bool."""
    array = rows[column]
    if hasattr(array, "combine_chunks"):  # of a table
        array = array.combine_chunks()
    has = np.asarray(array.is_valid())
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(int(has.sum()), array.type.list_size), has

"""The cache of prepared relation graphs: a data set of TensorFlow Datasets in ArrayRecord files.

No TensorFlow is imported. Layout: `<data_dir>/<name>-<fingerprint>/relation_graph/<version>/`.
Records lie in the order of the items, in shards of equal ranges (`rcml_jax.data.stages`), one
record an item with its neighbors of a larger index. A preparation writes into a folder
`incomplete.<digest>` and renames it when it is whole, so a folder of that layout is a whole data
set. After a kill the next one takes over the shards that are there, if the source has a
fingerprint. The builders of TFDS are not used to write: they start from nothing every time and
shuffle through a copy of all records.

The graph (all but the images) is kept beside the records: arrays in `graph.npz`, ids and texts,
which are mapped, in `ids.strings` and `texts.strings`. They are made from the records wherever one
is missing or damaged.
"""

import array
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters

from rcml_jax.data.images import EncodedImages, ImageError, open_rgb
from rcml_jax.data.relation_graph import RelationGraph
from rcml_jax.data.stages import (
    HERE,
    Arrays,
    Runner,
    disk_errors,
    file_state,
    load_arrays,
    pack,
    ranges,
    save_arrays,
    unpack,
)
from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from rcml_jax.files import exclusive
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import user_path

DATASET, VERSION = "relation_graph", "1.0.0"
_SPLIT = "items"
_FORMAT = file_adapters.FileFormat.ARRAY_RECORD
_GRAPH_FILE = "graph.npz"
_STRINGS = ("ids", "texts")
_ABANDONED_SECONDS = 24 * 3600


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "index": np.int64,
            "id": tfds.features.Text(),
            "text": tfds.features.Text(),
            "label": np.int64,
            "split": np.int64,
            "group": np.int64,
            "attributes": tfds.features.Sequence(np.int64),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "neighbor_item": tfds.features.Sequence(np.int64),
            "neighbor_relation": tfds.features.Sequence(np.int64),
            "neighbor_split": tfds.features.Sequence(np.int64),
        }
    )


def _shard_arrays(graph: RelationGraph, start: int, stop: int) -> Arrays:
    """All that the records of some items hold, and where their images are."""
    chosen = slice(start, stop)
    optional = {
        "label": (graph.labels, ()),
        "split": (graph.item_split, ()),
        "group": (graph.item_group, ()),
        "attributes": (graph.attributes, (0,)),
    }
    columns = {
        name: np.full((stop - start, *shape), -1) if values is None else values[chosen]
        for name, (values, shape) in optional.items()
    }
    first = np.searchsorted(graph.pairs[:, 0], np.arange(start, stop + 1))
    images = graph.images
    places = images.places if isinstance(images, EncodedImages) else range(len(images))
    return columns | {
        "index": np.arange(start, stop),
        "id": pack(list(graph.ids[chosen])),
        "text": pack(list(graph.texts[chosen])),
        "place": pack(list(places[chosen])),
        "first": first - first[0],
        "pairs": graph.pairs[first[0] : first[-1]],
        "pair_split": graph.pair_split[first[0] : first[-1]],
    }


def _records(encode: Callable[[Any], bytes], arrays: Arrays) -> Iterator[tuple[int, bytes]]:
    """(index, serialized record) of each item of a shard."""
    features = _features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    ids, texts, places = (unpack(arrays[name]) for name in ("id", "text", "place"))
    first, pairs = arrays["first"], arrays["pairs"].astype(np.int64)
    for i, index in enumerate(arrays["index"].tolist()):
        mine = slice(first[i], first[i + 1])
        record = {
            "index": index,
            "id": ids[i],
            "text": texts[i],
            "image": io.BytesIO(encode(places[i])),
            "neighbor_item": pairs[mine, 1],
            "neighbor_relation": pairs[mine, 2],
            "neighbor_split": arrays["pair_split"][mine].astype(np.int64),
        }
        for name in ("label", "split", "group", "attributes"):
            record[name] = arrays[name][i].astype(np.int64)
        example = serializer.get_tf_example(features.encode_example(record))
        # Else the order of the features would be another one in each process.
        yield index, example.SerializeToString(deterministic=True)


def _write_shard(encode: Callable[[Any], bytes], path: Path, arrays: Arrays) -> None:
    """Write the shard of some items, whole or not at all; encode: a place to an image's bytes."""
    adapter = file_adapters.ADAPTER_FOR_FORMAT[_FORMAT]
    with tfds.core.utils.incomplete_file(tfds.core.Path(path)) as part:
        adapter.write_examples(part, _records(encode, arrays))


class StoredImages:
    """Images of a prepared graph: read from the ArrayRecord file and decoded on demand.

    Thread-safe; a pickled copy opens the files again.
    """

    def __init__(self, folder: Path, positions: np.ndarray):
        self._folder, self._positions = Path(folder), positions
        self._lock = threading.Lock()
        self._records = None

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Image.Image:
        encoded = self.encoded(index)
        try:
            return open_rgb(encoded)
        except ImageError as error:
            raise _damaged(self._folder, error) from error

    def states(self) -> list:
        """A JSON value for each image: the folder's fingerprint and sizes, and its position."""
        sizes = sorted((p.name, p.stat().st_size) for p in self._folder.iterdir() if p.is_file())
        records = [self._folder.parents[1].name, [x for x in sizes if _SPLIT in x[0]]]
        state = hashlib.sha256(json.dumps(records).encode()).hexdigest()
        return [f"{state} {position}" for position in self._positions.tolist()]

    def state(self) -> list:
        """A JSON value that changes when any image does: folder, record files, positions."""
        files = sorted(p for p in self._folder.iterdir() if p.is_file() and _SPLIT in p.name)
        positions = hashlib.sha256(self._positions.tobytes()).hexdigest()
        return [self._folder.parents[1].name, [file_state(p) for p in files], positions]

    def encoded(self, index: int) -> bytes:
        """The PNG or JPEG bytes of one item's image."""
        records = self._records
        if records is None:
            with self._lock:
                records = self._records = self._records or _read_records(self._folder)
        try:
            return records[int(self._positions[index])]["image"]
        except IndexError:
            raise
        except Exception as error:  # the C++ reader raises several kinds
            raise _damaged(self._folder, error) from error

    def __getstate__(self) -> dict:
        return {"_folder": self._folder, "_positions": self._positions}

    def __setstate__(self, state: dict) -> None:
        StoredImages.__init__(self, state["_folder"], state["_positions"])


def folder_of(data_dir: str | Path, name: str, fingerprint: str = "") -> Path:
    """Where a prepared graph lies; the fingerprint tells one state of its source from another."""
    config = f"{name}-{fingerprint[:12]}" if fingerprint else name
    root = user_path(data_dir).absolute() / config
    return root / DATASET / VERSION


def unfinished_folder(data_dir: str | Path, name: str, fingerprint: str) -> Path:
    """Where a source may keep what it has finished; gone when `load_or_prepare` is through."""
    return folder_of(data_dir, name, fingerprint).parents[1] / "unfinished"


def is_prepared(data_dir: str | Path, name: str, fingerprint: str = "") -> bool:
    """Whether the graph has been prepared as a whole."""
    return folder_of(data_dir, name, fingerprint).exists()


def prepare(
    data_dir: str | Path,
    graph: RelationGraph,
    *,
    name: str | None = None,
    fingerprint: str = "",
    runner: Runner = HERE,
    **about: str,
) -> Path:
    """Writes a graph with its images (`graph.images.encoded`) and returns its folder.

    Nothing is done where it is there already; another process that prepares the same is waited for.
    `runner` says where the shards are made. `about`: description, license, citation, homepage.

    Raises:
      UserError: the graph is not valid, an image cannot be had, or the disk is full or read-only.
    """
    graph.validate()
    name = name or graph.name
    folder = folder_of(data_dir, name, fingerprint)
    if folder.exists():  # perhaps where nothing can be written
        return folder
    with _locked(folder, name):
        return _prepare(data_dir, graph, name, fingerprint, runner, about)


def _prepare(
    data_dir: str | Path,
    graph: RelationGraph,
    name: str,
    fingerprint: str,
    runner: Runner,
    about: dict[str, str],
) -> Path:
    folder = folder_of(data_dir, name, fingerprint)
    if folder.exists():
        return folder
    work = folder.parent / f"incomplete.{_digest(graph)}"
    try:
        if not fingerprint:  # the images may have changed, and nobody would know
            shutil.rmtree(work, ignore_errors=True)
        _remove_abandoned(folder.parent, work)
        work.mkdir(parents=True, exist_ok=True)
        _write(work, graph, runner, about)
        os.replace(work, folder)
    except UserError:
        raise
    except Exception as error:  # TFDS and the C++ writer raise many kinds
        _raise_disk_error(error, Path(data_dir))
        raise
    finally:
        if not fingerprint:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def load(data_dir: str | Path, name: str, *, fingerprint: str = "") -> RelationGraph:
    """A prepared graph; its images are read from the ArrayRecord file on demand.

    Raises:
      UserError: it has not been prepared, or its files are damaged (the folder is named).
    """
    folder = folder_of(data_dir, name, fingerprint)
    if not folder.exists():
        raise UserError(f"No prepared data set {folder}; prepare '{name}' first.")
    return _read_graph(folder)


def load_or_prepare(
    data_dir: str | Path,
    name: str,
    build: Callable[[], RelationGraph],
    *,
    fingerprint: str = "",
    runner: Runner = HERE,
    log: Callable[[str], None] | None = None,
    **about: str,
) -> RelationGraph:
    """The prepared graph, made by `build` and stored the first time; one line says so to `log`.

    While another process prepares the same, it waits and then loads that; `log` is told. `runner`
    says where the shards are made.
    """
    if is_prepared(data_dir, name, fingerprint):
        return load(data_dir, name, fingerprint=fingerprint)
    log = log or log_line
    with _locked(folder_of(data_dir, name, fingerprint), name, log):
        if not is_prepared(data_dir, name, fingerprint):
            start = time.perf_counter()
            graph = build().validate()
            folder = _prepare(data_dir, graph, name, fingerprint, runner, about)
            shutil.rmtree(unfinished_folder(data_dir, name, fingerprint), ignore_errors=True)
            sizes = len(graph), len(graph.relations), len(graph.pairs)
            said = ", ".join(map(counted, sizes, ("items", "relations", "pairs")))
            log(f"Prepared {name}: {said} in {time.perf_counter() - start:.1f} s ({folder}).")
    return load(data_dir, name, fingerprint=fingerprint)


@contextlib.contextmanager
def _locked(folder: Path, name: str, log: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes out of the preparation of a folder."""
    root = folder.parents[1]
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / ".lock", f"is preparing {name}", wait=True, log=log):
        yield


def _write(work: Path, graph: RelationGraph, runner: Runner, about: dict[str, str]) -> None:
    """Write the whole data set into `work`; shards that are there stay."""
    parts = ranges(len(graph))
    counts = [stop - start for start, stop in parts]
    shards = _shards(work, counts)
    images = graph.images
    encode = images.encode if isinstance(images, EncodedImages) else images.encoded
    runner.run(
        functools.partial(_write_shard, encode),
        [
            (path, functools.partial(_shard_arrays, graph, start, stop))
            for path, (start, stop) in zip(shards, parts, strict=True)
        ],
    )
    save_arrays(work / _GRAPH_FILE, _arrays(graph))
    for name in _STRINGS:
        StringColumn.of(getattr(graph, name)).save(work / f"{name}.strings")
    _write_info(work, graph, counts, sum(path.stat().st_size for path in shards), about)
    known = {path.name for path in shards}
    for path in work.iterdir():  # what killed processes were writing
        if _SPLIT in path.name and path.name not in known:
            path.unlink()


def _write_info(
    work: Path, graph: RelationGraph, counts: list[int], size: int, about: dict[str, str]
) -> None:
    """Write the JSON files by which TFDS reads the shards."""
    metadata = {
        "graph_name": graph.name,
        "relations": list(graph.relations),
        "relation_ids": list(graph.relation_ids),
        "intra_relation": graph.intra_relation,
        "label_names": list(graph.label_names),
        "paraphrases": [list(sentences) for sentences in graph.paraphrases],
        "held_out": graph.held_out,
        "class_links": None if graph.class_links is None else graph.class_links.tolist(),
    }
    info = tfds.core.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name=DATASET,
            version=tfds.core.Version(VERSION),
            data_dir=str(work),
            module_name=__name__,
        ),
        description=about.get("description", "A relation graph."),
        license=about.get("license"),
        citation=about.get("citation"),
        homepage=about.get("homepage"),
        features=_features(),
        metadata=tfds.core.MetadataDict(metadata),
    )
    info.set_file_format(_FORMAT)
    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(work),
        dataset_name=DATASET,
        split=_SPLIT,
        filetype_suffix=_FORMAT.file_suffix,
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT, shard_lengths=counts, num_bytes=size, filename_template=template
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(work)


def _digest(graph: RelationGraph) -> str:
    """A short digest of all that the records hold but the images."""
    found = hashlib.sha256(f"{VERSION} {len(graph)}".encode())
    for name, values in _arrays(graph).items():
        found.update(f"{name} {values.dtype} {values.shape}".encode())
        found.update(np.ascontiguousarray(values).data)
    for text in itertools.chain(graph.ids, graph.texts):
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]


def _arrays(graph: RelationGraph) -> dict[str, np.ndarray]:
    """What `graph.npz` holds; the same as `_scan` reads from the records."""
    n = len(graph)

    def column(values: np.ndarray | None, dtype: type, shape: tuple[int, ...] = ()) -> np.ndarray:
        return np.full((n, *shape), -1, dtype) if values is None else values.astype(dtype)

    return {
        "positions": np.arange(n),
        "labels": column(graph.labels, np.int32),
        "item_split": column(graph.item_split, np.int8),
        "item_group": column(graph.item_group, np.int32),
        "attributes": column(graph.attributes, np.int32, (0,)),
        "pairs": graph.pairs.astype(np.int32),
        "pair_split": graph.pair_split.astype(np.int8),
    }


def _remove_abandoned(parent: Path, work: Path) -> None:
    """Deletes what other preparations that were killed long ago have left."""
    for left in parent.glob("incomplete.*"):
        with contextlib.suppress(OSError):
            if left != work and time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)


def _raise_disk_error(error: BaseException | None, data_dir: Path) -> None:
    """A UserError for a disk that is full or cannot be written, wherever in the chain it is."""
    while error is not None:
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left" in str(error).lower() or "enough disk space" in str(error):
            raise UserError(
                f"No room is left on the disk of {data_dir}; free some or set data.dir to "
                "another disk."
            ) from error
        if isinstance(error, PermissionError) or code in (errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{data_dir} cannot be written ({error}); set data.dir to a folder that can."
            ) from error
        error = error.__cause__ or error.__context__


def _damaged(folder: Path, error: Exception | str) -> UserError:
    return UserError(
        f"The prepared data set {folder} is damaged or from another version ({error}); delete "
        "that folder, and it will be prepared again."
    )


def _read_records(folder: Path):
    """The records as TFDS's data source, images left encoded."""
    try:
        builder = tfds.builder_from_directory(str(folder))
        return builder.as_data_source(_SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # missing or foreign files: TFDS raises many kinds
        raise _damaged(folder, error) from error


def _read_graph(folder: Path) -> RelationGraph:
    path = folder / _GRAPH_FILE
    try:
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        info = json.loads((folder / "dataset_info.json").read_text("utf-8"))
        counts = [int(n) for split in info["splits"] for n in split["shardLengths"]]
        arrays, strings = load_arrays(path), _load_strings(folder)
        sizes = {len(x) for x in strings.values()}
        if arrays is None or len(arrays["positions"]) != sum(counts) or sizes != {sum(counts)}:
            arrays, strings = _scan(folder)
            with contextlib.suppress(OSError):  # a read-only cache is read by scanning
                for name, column in strings.items():
                    column.save(folder / f"{name}.strings")
                save_arrays(path, arrays)
                strings = _load_strings(folder) or strings
        # Not in data sets of an older version.
        split, group, attributes = (
            values if values is not None and np.any(values >= 0) else None
            for values in map(arrays.get, ("item_split", "item_group", "attributes"))
        )
        links = metadata.get("class_links")
        graph = RelationGraph(
            name=metadata["graph_name"],
            ids=strings["ids"],
            texts=strings["texts"],
            labels=arrays["labels"],
            label_names=tuple(metadata["label_names"]),
            relations=tuple(metadata["relations"]),
            intra_relation=metadata["intra_relation"],
            pairs=arrays["pairs"],
            pair_split=arrays["pair_split"],
            images=StoredImages(folder, arrays["positions"]),
            item_split=split,
            class_links=None if links is None else np.array(links, np.int32).reshape(-1, 3),
            item_group=group,
            attributes=attributes,
            paraphrases=tuple(map(tuple, metadata.get("paraphrases", ()))),
            held_out=metadata.get("held_out", 0),
            relation_ids=tuple(metadata.get("relation_ids", ())),
        )
        missing = [f.name for f in _shards(folder, counts) if not f.is_file()]
        if missing:
            raise _damaged(folder, f"{missing[0]} is missing")
        return graph.validate(strings=False)  # they were looked at before they were written
    except (OSError, KeyError, ValueError, TypeError, AttributeError, UserError) as error:
        if isinstance(error, UserError) and str(folder) in str(error):
            raise
        raise _damaged(folder, error) from error


def _shards(folder: Path, counts: list[int]) -> list[Path]:
    stem = f"{DATASET}-{_SPLIT}.{_FORMAT.file_suffix}"
    return [folder / f"{stem}-{i:05d}-of-{len(counts):05d}" for i in range(len(counts))]


def _load_strings(folder: Path) -> dict[str, StringColumn]:
    """Ids and texts, mapped; empty where one is missing or damaged."""
    try:
        return {name: StringColumn.open(folder / f"{name}.strings") for name in _STRINGS}
    except (OSError, ValueError):
        return {}


def _scan(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, StringColumn]]:
    """The graph's arrays, ids and texts out of the records, which TFDS has shuffled."""
    records = _read_records(folder)
    n = len(records)
    # In the order of the records, as numbers and bytes: objects of each item would take gigabytes.
    numbers = {name: np.full(n, -1, np.int64) for name in ("index", "label", "split", "group")}
    counts, near = np.zeros(n, np.int64), [array.array("i") for _ in range(3)]
    attributes: Any = None
    data = {name: bytearray() for name in _STRINGS}
    stops = {name: array.array("q", [0]) for name in _STRINGS}
    try:
        for position in range(n):
            r = records[position]
            for name, values in numbers.items():
                values[position] = int(r.get(name, -1))
            own = np.array(r.get("attributes", ()), np.int32)
            attributes = np.empty((n, len(own)), np.int32) if attributes is None else attributes
            attributes[position] = own
            counts[position] = len(r["neighbor_item"])
            for part, key in zip(near, ("item", "relation", "split"), strict=True):
                part.frombytes(np.asarray(r[f"neighbor_{key}"]).astype(np.int32).tobytes())
            for name in _STRINGS:
                data[name] += r[name.removesuffix("s")]
                stops[name].append(len(data[name]))
    except Exception as error:  # the C++ reader raises several kinds
        raise _damaged(folder, error) from error
    order = np.argsort(numbers["index"], kind="stable")
    if not np.array_equal(numbers["index"][order], np.arange(n)):
        raise _damaged(folder, "its records are not one for each item")
    ends = np.cumsum(counts)
    counts = counts[order]
    first = np.repeat(np.arange(n, dtype=np.int32), counts)
    # Of each item the neighbors of its record.
    places = np.repeat(ends[order] - np.cumsum(counts), counts) + np.arange(len(first))
    item, relation, split = (np.frombuffer(part, np.int32)[places] for part in near)
    arrays = {
        "positions": order,
        "labels": numbers["label"][order].astype(np.int32),
        "item_split": numbers["split"][order].astype(np.int8),
        "item_group": numbers["group"][order].astype(np.int32),
        "attributes": attributes[order],
        "pairs": np.stack([first, item, relation], axis=1),
        "pair_split": split.astype(np.int8),
    }
    strings = {
        name: StringColumn(
            np.frombuffer(stops[name], np.int64), np.frombuffer(data[name], np.uint8)
        ).take(order)
        for name in _STRINGS
    }
    return arrays, strings

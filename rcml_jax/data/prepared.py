"""The cache of prepared relation graphs: a TensorFlow Datasets builder in ArrayRecord files.

No TensorFlow is imported. Layout: `<data_dir>/<name>-<fingerprint>/relation_graph/<version>/`.
A preparation writes into a folder `incomplete.*` and renames it when it is whole, so a folder of
that layout is a whole data set. The graph (all but the images) is kept beside the records: arrays
in `graph.npz`, ids and texts, which are mapped, in `ids.strings` and `texts.strings`. They are made
from the records wherever one is missing or damaged.
"""

import array
import contextlib
import errno
import hashlib
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rcml_jax.data.images import ImageError, open_rgb
from rcml_jax.data.relation_graph import RelationGraph
from rcml_jax.data.stages import disk_errors, file_state, load_arrays, save_arrays
from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from rcml_jax.files import exclusive
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import user_path

_SPLIT = "items"
_GRAPH_FILE = "graph.npz"
_STRINGS = ("ids", "texts")
_ABANDONED_SECONDS = 24 * 3600


class RelationGraphBuilder(tfds.core.GeneratorBasedBuilder):
    """Any relation graph: one record an item, with its neighbours of a larger index."""

    name = "relation_graph"
    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for checksums beside the code, by a package that only Python 3.8 gets. We have
    # no downloads.
    code_path = None

    def __init__(self, *, graph: RelationGraph | None = None, about: dict | None = None, **kwargs):
        # TFDS makes a builder without a graph to read what another one has prepared.
        self._graph: Any = graph
        self._about = about or {}
        self.failure: UserError | None = None
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        graph = self._graph
        features = tfds.features.FeaturesDict(
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
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._about.get("description", "A relation graph."),
            license=self._about.get("license"),
            citation=self._about.get("citation"),
            homepage=self._about.get("homepage"),
            features=features,
            metadata=tfds.core.MetadataDict(metadata),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        graph = self._graph
        first = np.searchsorted(graph.pairs[:, 0], np.arange(len(graph) + 1))
        optional = (graph.item_split, graph.item_group, graph.attributes)
        split, group, attributes = (
            np.full((len(graph), *shape), -1) if values is None else values
            for values, shape in zip(optional, ((), (), (0,)), strict=True)
        )
        for index in range(len(graph)):
            mine = slice(first[index], first[index + 1])
            try:
                encoded = graph.images.encoded(index)
            except UserError as error:
                self.failure = error  # TFDS would wrap it
                raise
            yield (
                index,
                {
                    "index": index,
                    "id": graph.ids[index],
                    "text": graph.texts[index],
                    "label": int(graph.labels[index]),
                    "split": int(split[index]),
                    "group": int(group[index]),
                    "attributes": attributes[index].astype(np.int64),
                    "image": io.BytesIO(encoded),
                    "neighbor_item": graph.pairs[mine, 1].astype(np.int64),
                    "neighbor_relation": graph.pairs[mine, 2].astype(np.int64),
                    "neighbor_split": graph.pair_split[mine].astype(np.int64),
                },
            )


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
                records = self._records = self._records or _records(self._folder)
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
    return root / RelationGraphBuilder.name / str(RelationGraphBuilder.VERSION)


def is_prepared(data_dir: str | Path, name: str, fingerprint: str = "") -> bool:
    """Whether the graph has been prepared as a whole."""
    return folder_of(data_dir, name, fingerprint).exists()


def prepare(
    data_dir: str | Path,
    graph: RelationGraph,
    *,
    name: str | None = None,
    fingerprint: str = "",
    **about: str,
) -> Path:
    """Writes a graph with its images (`graph.images.encoded`) and returns its folder.

    Nothing is done where it is there already. `about`: description, license, citation, homepage.

    Raises:
      UserError: the graph is not valid, an image cannot be had, or the disk is full or read-only.
    """
    graph.validate()
    folder = folder_of(data_dir, name or graph.name, fingerprint)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        _write(folder, graph, about)
    except UserError:
        raise
    except Exception as error:  # TFDS and the C++ writer wrap what went wrong
        if folder.exists():  # another process was faster
            return folder
        _raise_disk_error(error, Path(data_dir))
        raise
    with contextlib.suppress(UserError):
        _read_graph(folder)  # leaves graph.npz beside the records
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
    log: Callable[[str], None] | None = None,
    **about: str,
) -> RelationGraph:
    """The prepared graph, made by `build` and stored the first time; one line says so to `log`.

    While another process prepares the same, it waits and then loads that; `log` is told.
    """
    if is_prepared(data_dir, name, fingerprint):
        return load(data_dir, name, fingerprint=fingerprint)
    log = log or log_line
    folder = folder_of(data_dir, name, fingerprint).parents[1]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock", f"is preparing {name}", wait=True, log=log):
        if not is_prepared(data_dir, name, fingerprint):
            start = time.perf_counter()
            graph = build()
            folder = prepare(data_dir, graph, name=name, fingerprint=fingerprint, **about)
            sizes = len(graph), len(graph.relations), len(graph.pairs)
            said = ", ".join(map(counted, sizes, ("items", "relations", "pairs")))
            log(f"Prepared {name}: {said} in {time.perf_counter() - start:.1f} s ({folder}).")
    return load(data_dir, name, fingerprint=fingerprint)


def _write(folder: Path, graph: RelationGraph, about: dict) -> None:
    builder = RelationGraphBuilder(
        graph=graph,
        about=about,
        data_dir=str(folder.parents[1]),
        file_format="array_record",
    )
    bars = tfds.core.utils.tqdm_utils
    shown = bars._active
    try:
        bars.display_progress_bar(False)
        # TFDS prints; its download folder is not used, but it makes one.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads)
    except Exception:
        if builder.failure is not None:
            raise builder.failure from None
        raise
    finally:
        bars.display_progress_bar(shown)


def _remove_abandoned(parent: Path) -> None:
    """Deletes what preparations that were killed long ago have left."""
    for left in parent.glob("incomplete.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
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


def _records(folder: Path):
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
    stem = f"{RelationGraphBuilder.name}-{_SPLIT}.array_record"
    return [folder / f"{stem}-{i:05d}-of-{len(counts):05d}" for i in range(len(counts))]


def _load_strings(folder: Path) -> dict[str, StringColumn]:
    """Ids and texts, mapped; empty where one is missing or damaged."""
    try:
        return {name: StringColumn.open(folder / f"{name}.strings") for name in _STRINGS}
    except (OSError, ValueError):
        return {}


def _scan(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, StringColumn]]:
    """The graph's arrays, ids and texts out of the records, which TFDS has shuffled."""
    records = _records(folder)
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

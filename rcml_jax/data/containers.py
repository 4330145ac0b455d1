"""Rows and images inside of large files: Parquet, saved Hugging Face data sets, tar shards.

Parquet files and the Arrow files of `datasets.Dataset.save_to_disk` need pyarrow (extra `parquet`)
and nothing else: a saved data set is a list of Arrow streams. Tar shards are those of WebDataset,
as img2dataset writes them: the files of an example share a key, `KEY.jpg`, `KEY.txt`, `KEY.json`.
The standard library reads them, not the webdataset package: that gives examples one after the
other, while `tarfile` tells where in a shard each file lies, so that any image is one read.

An image inside of such a file has a name, too: `shard.tar::OFFSET+SIZE` or `table.parquet::ROW`.
"""

import collections
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.parsing import read_file, read_json

Rows = Iterator[tuple[str, dict]]
_IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_INSIDE = re.compile(
    r"(?P<file>.+\.(?:tar|parquet|arrow))::(?P<place>\d+)(?:\+(?P<size>\d+))?", re.IGNORECASE
)
#: Columns that have to be texts, numbers or images.
_COLUMNS = ("id", "text", "image", "label")
_MOST_BYTES = 2**30
_BATCH = 1024
#: Row groups of Parquet whose images are kept in memory: the one that is read, and its neighbor.
_KEPT_GROUPS = 2


def check_names(names: Iterable[str], where: str) -> None:
    """Raise UserError for a name that comes twice: one value would hide the other."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column '{twice[0]}' comes twice; rename or remove one.")


class ImageReader:
    """Gives the bytes of images by their names, which are relative to a folder. Thread-safe.

    A name is that of a file, or of a part of a tar archive or a table (see the module). Of Parquet
    files the images of two row groups stay in memory; tables with images have small ones.
    """

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()
        self._tables: dict[Path, _StoredColumn] = {}

    def __reduce__(self) -> tuple:  # a copy opens the tables again
        return ImageReader, (self.root,)

    def __call__(self, name: str) -> bytes:
        """The bytes of an image. Raises OSError or ValueError, as `gates.read_file`."""
        inside = _INSIDE.fullmatch(name)
        if inside is None:
            return read_file(self.root / name)
        path, place, size = self.root / inside["file"], int(inside["place"]), inside["size"]
        if not path.is_file():  # opening a pipe would wait for its other end
            raise OSError(f"{path.name} is missing or no regular file")
        if size is not None:
            return _part_of_file(path, place, int(size))
        with self._lock:
            if path not in self._tables:
                self._tables[path] = _StoredColumn(path)
            value = self._tables[path].value(place)
        data, file = _image_parts(value)
        if data is None and not file:
            raise OSError(f"row {place + 1} of {path.name} has no image")
        return read_file(self.root / file) if data is None else data

    def file_of(self, name: str) -> Path:
        """The file that an image is, or is a part of."""
        inside = _INSIDE.fullmatch(name)
        return self.root / (name if inside is None else inside["file"])


def _part_of_file(path: Path, start: int, size: int) -> bytes:
    if size > _MOST_BYTES:
        raise OSError(f"an image in {path.name} has more than {_MOST_BYTES:,} bytes")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{path.name} is truncated")
    return data


def _image_parts(value: Any) -> tuple[bytes | None, str]:
    """Bytes and path of an image as Hugging Face stores it; plain bytes have no path."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path") or ""
    return value, ""


# Parquet and Arrow


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path.name} needs pyarrow: pip install "rcml_jax[parquet]"') from error
    return pyarrow


class _StoredColumn:
    """The images of a Parquet or an Arrow file, one row at a time. Raises OSError."""

    def __init__(self, path: Path):
        self._path, self._pa = path, _pyarrow(path)
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        try:
            if path.suffix.lower() == ".parquet":
                self._file = self._pa.parquet.ParquetFile(path)
                meta = self._file.metadata
                sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
                self._name = _image_column(self._file.schema_arrow)
            else:
                table = self._pa.ipc.open_stream(self._pa.memory_map(str(path))).read_all()
                self._name = _image_column(table.schema)
                table.column(self._name).validate(full=True)
                self._groups[0], sizes = table.column(self._name), [table.num_rows]
        except (OSError, KeyError, self._pa.ArrowException) as error:
            raise OSError(f"{path.name} cannot be read ({error})") from error
        self._bounds = np.cumsum([0, *sizes])

    def value(self, row: int) -> Any:
        group = int(np.searchsorted(self._bounds, row, side="right")) - 1
        if not 0 <= row < self._bounds[-1]:
            raise OSError(f"{self._path.name} has no row {row + 1}")
        if group not in self._groups:
            try:
                table = self._file.read_row_group(group, columns=[self._name])
            except (OSError, self._pa.ArrowException) as error:
                raise OSError(f"{self._path.name} is damaged ({error})") from error
            self._groups[group] = table.column(0)
            while len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
        return self._groups[group][row - int(self._bounds[group])].as_py()


def _image_column(schema: Any) -> str:
    """The name of the column `image`, whatever its case. Raises KeyError."""
    return {name.strip().lower(): name for name in schema.names}["image"]


def parquet_rows(path: Path, root: Path) -> Rows:
    """(file and row, row) of a Parquet file; columns of lists and structures are left out.

    Dates and times are texts; NaN is what a row lacks, as pandas writes it. root: the folder that
    names of images are relative to. Raises UserError.
    """
    pa = _pyarrow(path)
    try:
        file = pa.parquet.ParquetFile(path)
        schema = file.schema_arrow
        _check_columns(pa, schema, path)
        kept = [field.name for field in schema if _is_plain(pa, field) or _is_image(pa, field)]
        everywhere = [x for x in kept if _is_image(pa, schema.field(x)) and _no_nulls(file, x)]
        # Images that every row has are named without being read.
        batches = file.iter_batches(_BATCH, columns=[x for x in kept if x not in everywhere])
        yield from _rows(pa, batches, schema, path, root, len(everywhere) > 0)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def arrow_rows(path: Path, root: Path) -> Rows:
    """As `parquet_rows`, of an Arrow stream."""
    pa = _pyarrow(path)
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            _check_columns(pa, reader.schema, path)
            yield from _rows(pa, reader, reader.schema, path, root, False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def _rows(
    pa: Any, batches: Iterable[Any], schema: Any, path: Path, root: Path, everywhere: bool
) -> Rows:
    names, start = _class_names(schema), 0
    file = path.relative_to(root).as_posix()
    for batch in batches:
        batch.validate(full=True)  # damaged offsets would end the process
        columns: dict[str, list] = {}
        for field, array in zip(batch.schema, batch.columns, strict=True):
            column = field.name.strip().lower()
            if _is_image(pa, field):
                columns[column] = _image_names(array, file, start)
            elif _is_plain(pa, field):
                values = _values(pa, array)
                if known := names.get(field.name):
                    values = [_class_name(known, value) for value in values]
                columns[column] = ["" if value is None else value for value in values]
        if everywhere:
            columns["image"] = [f"{file}::{start + i}" for i in range(batch.num_rows)]
        for i, row in enumerate(zip(*columns.values(), strict=True), start + 1):
            yield f"{path.name}, row {i}", dict(zip(columns, row, strict=True))
        start += batch.num_rows


def _check_columns(pa: Any, schema: Any, path: Path) -> None:
    """Raise UserError for names that come twice, and for columns of ours that cannot be read."""
    check_names((name.strip().lower() for name in schema.names), path.name)
    for field in schema:
        ours = field.name.strip().lower() in _COLUMNS
        if ours and not (_is_plain(pa, field) or _is_image(pa, field)):
            raise UserError(
                f"{path.name}: the column '{field.name}' is of the type {field.type!s:.100}, "
                "which is not read; save it as text, or rename it."
            )


def _values(pa: Any, array: Any) -> list:
    """The values of a plain column, None where there is none."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_temporal(array.type) and not pa.types.is_interval(array.type):
        array = array.cast(pa.string())  # Python's dates end at the year 9999
    # A NaN is equal to nothing.
    return [value if value == value else None for value in array.to_pylist()]


def _image_names(array: Any, file: str, start: int) -> list[str]:
    """The name of each row's image: of the part of `file`, or of a file of its own, or ""."""
    nothing = [None] * len(array)
    if array.type.num_fields:
        names = [field.name for field in array.type]
        # Flattened, so that a row without the structure has no part of it.
        parts = dict(zip(names, array.flatten(), strict=True))
    else:
        parts = {"bytes": array}
    has = parts["bytes"].is_valid().to_pylist() if "bytes" in parts else nothing
    paths = parts["path"].to_pylist() if "path" in parts else nothing
    return [
        f"{file}::{start + i}" if inside else (path or "")
        for i, (inside, path) in enumerate(zip(has, paths, strict=True))
    ]


def _is_binary(pa: Any, kind: Any) -> bool:
    types = pa.types
    found = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return found or str(kind) == "binary_view"  # older versions have no name for it


def _is_image(pa: Any, field: Any) -> bool:
    """Whether a column holds images as bytes, or as Hugging Face's structure of bytes and path."""
    if field.name.strip().lower() != "image":
        return False
    if pa.types.is_struct(field.type):
        return bool({"bytes", "path"} & {part.name for part in field.type})
    return _is_binary(pa, field.type)


def _is_plain(pa: Any, field: Any) -> bool:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    special = isinstance(kind, pa.BaseExtensionType) or _is_binary(pa, kind)
    return not (special or pa.types.is_nested(kind))


def _no_nulls(file: Any, column: str) -> bool:
    """Whether a Parquet file's statistics say that every row has the bytes of its image."""
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        parts = [group.column(i) for i in range(group.num_columns)]
        found = [x for x in parts if x.path_in_schema in (column, f"{column}.bytes")]
        statistics = found[0].statistics if found else None
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return False
    return True


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of columns of type ClassLabel, as Hugging Face notes them."""
    try:
        noted = read_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {k: x for k, x in noted.items() if x.get("_type") == "ClassLabel"}
        return {k: [str(name) for name in x["names"]] for k, x in labels.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _class_name(names: list[str], value: Any) -> Any:
    """The name of a class; "" for −1, Hugging Face's class of what has none."""
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else ""


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set, or of each split of one, that `save_to_disk` wrote; or none.

    Raises UserError where its description is damaged, or a file is missing.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            names = [Path(name).name for name in read_json(splits.read_bytes())["splits"]]
            return [path for name in names for path in saved_files(folder / name)]
        if not state.is_file():
            return []
        listed = read_json(state.read_bytes())["_data_files"]
        files = [folder / Path(entry["filename"]).name for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no whole data set of Hugging Face ({error}); save it again."
        ) from error
    for path in files:
        if not path.is_file():
            raise UserError(f"{folder} lacks {path.name}, which its state.json names; copy it.")
    return files


# Tar shards


def tar_rows(path: Path, root: Path) -> Rows:
    """(file and key, row) of a WebDataset shard: id (the key), text, image, and what its JSON says.

    The text is that of `.txt`, or the JSON's `caption` or `text`; the label that of `.cls`, or the
    JSON's. Nothing is unpacked. Raises UserError.
    """
    file = path.relative_to(root).as_posix()
    try:
        with tarfile.open(path, "r:") as archive:
            key = ""
            parts: dict[str, tarfile.TarInfo] = {}
            for member in archive:
                found, kind = _key_of(member, path)
                if not kind:
                    continue
                if found != key and parts:
                    yield _example(archive, path, file, key, parts)
                    parts = {}
                if kind in parts:
                    raise UserError(
                        f"{path.name}, key '{found:.100}': .{kind} comes twice; give every example "
                        "its own key."
                    )
                key, parts[kind] = found, member
            if parts:
                yield _example(archive, path, file, key, parts)
            _check_end(archive, path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or no tar archive; fetch it again."
        ) from error


def _key_of(member: tarfile.TarInfo, path: Path) -> tuple[str, str]:
    """The key of a member's example, and its kind, "" where the member belongs to none."""
    name = PurePosixPath(member.name)
    where = f"{path.name}, member '{member.name:.100}'"
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: its name leads out of the archive; pack it under a plain name.")
    if member.isdir() or name.name.startswith("."):
        return "", ""
    if not member.isreg() or member.issparse():
        raise UserError(f"{where}: it is a link or no plain file; pack the file itself.")
    stem, _, kind = name.name.partition(".")
    return (name.parent / stem).as_posix(), kind.lower()


def _example(
    archive: tarfile.TarFile, path: Path, file: str, key: str, parts: dict[str, tarfile.TarInfo]
) -> tuple[str, dict]:
    where = f"{path.name}, key '{key:.100}'"

    def content(kind: str) -> bytes:
        stream = archive.extractfile(parts[kind]) if kind in parts else None
        return b"" if stream is None else stream.read()

    try:
        noted = read_json(content("json")) if "json" in parts else {}
        text, label = content("txt").decode("utf-8").strip(), content("cls").decode("utf-8")
    except ValueError as error:
        what = "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else "malformed JSON"
        raise UserError(f"{where}: {what} ({error}); correct the file.") from error
    if not isinstance(noted, dict):
        raise UserError(f"{where}: its .json is no object; write {{...}}.")
    row = {k.lower(): v for k, v in noted.items() if not isinstance(v, dict | list)}
    image = next((parts[kind] for kind in _IMAGE_KINDS if kind in parts), None)
    row["id"] = key
    row["text"] = text or row.get("caption") or row.get("text") or ""
    row["image"] = "" if image is None else f"{file}::{image.offset_data}+{image.size}"
    if "cls" in parts:
        row["label"] = label.strip()
    return where, row


def _check_end(archive: tarfile.TarFile, path: Path) -> None:
    """Raise UserError unless the archive ends as one that is whole: `tarfile` itself lets it go."""
    stream: Any = archive.fileobj
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{path} is truncated or damaged after {archive.offset:,} bytes; fetch it again."
        )

"""Tables of people's own data, read row by row: CSV, JSON lines, Parquet, tar shards."""

import csv
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rcml_jax.data.containers import (
    arrow_rows,
    check_names,
    parquet_rows,
    saved_files,
    tar_rows,
)
from rcml_jax.data.stages import file_state
from rcml_jax.errors import UserError
from rcml_jax.parsing import CsvRows, TextGate, read_json, user_path

#: The kinds of one file alone; a folder may hold many of the last two, or a saved data set.
SUFFIXES = (".csv", ".jsonl", ".parquet", ".tar")
_OTHER_TABLES = ("relations.parquet", "pairs.parquet")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in one file or several of one kind.

    path: what the user knows it by; root: the folder that names of images are relative to. Raises
    UserError for a file that is not regular, such as a pipe, or whose name is no text.
    """

    path: Path
    root: Path
    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            if not user_path(file).is_file():
                raise UserError(f"{file} is no regular file; give a table that is one.")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def kind(self) -> str:
        """The suffix of its files."""
        return self.files[0].suffix.lower()

    def digest(self) -> str:
        """Changes when the table does: by content, or by size and time where it may be large."""
        digest = hashlib.sha256()
        for path in self.files:
            if self.kind in (".csv", ".jsonl"):
                digest.update(path.name.encode() + path.read_bytes())
            else:
                name = path.relative_to(self.root).as_posix()
                digest.update(f"{name} {file_state(path)}".encode())
        return digest.hexdigest()


def rows_of(table: Table, gate: TextGate | None = None) -> Iterator[tuple[str, dict]]:
    """(file and line, row) of a table; UserError, with file and line, for what is malformed.

    Of images inside of the table, `image` is a name that `containers.ImageReader` knows. gate: what
    its texts go through, by default one that is not strict.
    """
    gate = gate or TextGate()
    for path in table.files:
        try:
            for where, row in _READERS[table.kind](path, table.root):
                yield (
                    where,
                    {
                        key: gate(value, where) if isinstance(value, str) else value
                        for key, value in row.items()
                    },
                )
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def required(row: dict, column: str, where: str) -> str:
    """A value that must be there, as text."""
    if row.get(column) is None:
        raise UserError(f"{where}: the column '{column}' is missing; add it.")
    value = optional(row, column)
    if not value:
        raise UserError(f"{where}: '{column}' is empty; fill it in or remove the row.")
    return value


def optional(row: dict, column: str) -> str:
    """A value as text, empty where there is none."""
    value = row.get(column)
    return "" if value is None else str(value).strip()


def table_at(path: Path) -> Table:
    """The table in a file. Raises UserError for another kind of file."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} is neither .csv nor .jsonl, .parquet or .tar; save it as one of them."
        )
    return Table(path, path.parent, (path,))


def table_of(folder: Path, name: str) -> Table:
    """The one table of a name: a file, or a folder of Parquet files, tar shards or saved data.

    The items may also be tar shards, a saved data set or Parquet files in `folder` itself. Raises
    UserError where there is none, or more than one.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set data.path to the folder of your data.")
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    found = [Table(path, folder, (path,)) for path in paths if path.is_file()]
    places = [folder / name] if found or name != "items" else [folder / name, folder]
    for place in places:
        if not (found and place == folder) and (files := _files_in(place)):
            found.append(Table(place, folder, files))
    if not found:
        raise UserError(
            f"{folder} has neither {name}.csv nor {name}.jsonl, nor Parquet files, tar shards or a "
            f"saved data set of {name}; add one."
        )
    if len(found) > 1:
        raise UserError(
            f"{folder} has both {found[0].path.name} and {found[1].path.name}; remove one."
        )
    return found[0]


def _files_in(folder: Path) -> tuple[Path, ...]:
    """The files of a table in a folder, in order."""
    if saved := saved_files(folder):
        return tuple(saved)
    # img2dataset writes a Parquet file of the same rows beside each shard.
    tables = (p for p in folder.glob("*.parquet") if p.name not in _OTHER_TABLES)
    return tuple(sorted(folder.glob("*.tar")) or sorted(tables))


def _of_csv(path: Path, root: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = CsvRows(file)
        try:
            _, header = next(rows, (1, []))
            columns = [column.strip().lower() for column in header]
            check_names(filter(None, columns), path.name)
            for number, values in rows:
                where = f"{path.name}, line {number}"
                if len(values) > len(columns):
                    raise UserError(
                        f"{where}: there are more values than columns; put values with commas "
                        "in double quotes."
                    )
                yield where, dict.fromkeys(columns) | dict(zip(columns, values, strict=False))
        except csv.Error as error:
            raise UserError(
                f"{path.name}, line {rows.line}: malformed CSV ({error}); correct the line."
            ) from error


def _of_jsonl(path: Path, root: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = read_json(line, unique=True)
            except ValueError as error:
                raise UserError(f"{where}: malformed JSON ({error}); correct the line.") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: this is no JSON object; write {{...}} on each line.")
            if any(isinstance(value, dict | list) for value in row.values()):
                raise UserError(f"{where}: a value is a list or an object; use text or numbers.")
            yield where, row


_Reader = Callable[[Path, Path], Iterator[tuple[str, dict]]]
_READERS: dict[str, _Reader] = {
    ".csv": _of_csv,
    ".jsonl": _of_jsonl,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".tar": tar_rows,
}

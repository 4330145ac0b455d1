"""Tables of people's own data: `.csv` with a header or `.jsonl`, UTF-8, read row by row."""

import collections
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from rcml_jax.errors import UserError
from rcml_jax.parsing import CsvRows, TextGate, read_json


def rows_of(table: Path, gate: TextGate | None = None) -> Iterator[tuple[str, dict]]:
    """(file and line, row) of a table; UserError, with file and line, for what is malformed.

    gate: what its texts go through, by default one that is not strict.
    """
    gate = gate or TextGate()
    readers = {".csv": _of_csv, ".jsonl": _of_jsonl}
    if table.suffix.lower() not in readers:
        raise UserError(f"{table} is neither .csv nor .jsonl; save it as one of them.")
    try:
        for where, row in readers[table.suffix.lower()](table):
            yield (
                where,
                {
                    key: gate(value, where) if isinstance(value, str) else value
                    for key, value in row.items()
                },
            )
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{table} cannot be read ({error}); check the file.") from error


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


def table_of(folder: Path, name: str) -> Path:
    """The one file of a table."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set data.path to the folder of your data.")
    found = [p for p in (folder / f"{name}.csv", folder / f"{name}.jsonl") if p.is_file()]
    if not found:
        raise UserError(f"{folder} has neither {name}.csv nor {name}.jsonl; add one.")
    if len(found) > 1:
        raise UserError(f"{folder} has both {name}.csv and {name}.jsonl; remove one.")
    return found[0]


def _of_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = CsvRows(file)
        try:
            _, header = next(rows, (1, []))
            columns = [column.strip().lower() for column in header]
            _check_names(filter(None, columns), path.name)
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


def _check_names(names: Iterable[str], where: str) -> None:
    """Raise UserError for a name that comes twice: one value would hide the other."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column '{twice[0]}' comes twice; rename or remove one.")


def _of_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
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

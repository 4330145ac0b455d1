"""The numbers behind figures: saved as CSV or `.npz`, and read back to be drawn."""

import csv
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.training.workdir import write_arrays

Arrays = Mapping[str, np.ndarray]


class LeftOutError(Exception):
    """A figure that cannot be drawn; the message is the reason that the page gives."""


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write columns of one length to `.csv`, or any arrays to `.npz`; returns what `load` reads.

    Raises UserError where the file cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            _write_csv(path, arrays)
        else:
            write_arrays(path, arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return load(path)


def _write_csv(path: pathlib.Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a saved file; columns of a table are numbers where all cells are."""
    if path.suffix != ".csv":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return {name: _column(cells) for name, cells in zip(header, columns, strict=True)}


def _column(cells: Sequence[str]) -> np.ndarray:
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        return np.array(cells)


def slug(text: str) -> str:
    """A text as part of a file's name: lower case letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"

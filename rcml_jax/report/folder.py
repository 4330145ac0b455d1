"""A report's folder, figures beside the page and numbers under `data`; and what a page holds."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.report.arrays import LeftOutError, save


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure's file and what it shows, in words."""

    path: pathlib.Path
    alt: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown; `marked` holds (row, column) of those to be seen first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()


@dataclasses.dataclass(frozen=True)
class Figure:
    """An entry of the page: pictures or a table with a caption, or the reason why there is none."""

    title: str
    caption: str = ""
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    data: tuple[pathlib.Path, ...] = ()
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with its figures."""

    title: str
    figures: tuple[Figure, ...]


class Folder:
    """Names files of a report and saves arrays there; every name is given out once."""

    def __init__(self, root: pathlib.Path, log: Callable[[str], None] = lambda line: None):
        self.root, self.log = root, log
        self._given: set[str] = set()

    def save(self, name: str, arrays: Mapping[str, Any]) -> tuple[pathlib.Path, dict]:
        """Save arrays as `data/<name>`, `.csv` or `.npz`; gives the file and what is read back."""
        path = self._path("data", name)
        return path, save(path, arrays)

    def picture(self, name: str) -> pathlib.Path:
        """Where the picture of this name is to be drawn."""
        return self._path("", name)

    def _path(self, folder: str, name: str) -> pathlib.Path:
        stem, _, suffix = name.rpartition(".")
        number = 1
        while f"{folder}/{name}" in self._given:
            number += 1
            name = f"{stem}-{number}.{suffix}"
        self._given.add(f"{folder}/{name}")
        return self.root / folder / name

    def attempt(self, title: str, make: Callable[[], Figure]) -> Figure:
        """The figure, or in its place the reason why it cannot be drawn."""
        self.log(title)
        try:
            return make()
        except (LeftOutError, UserError) as error:
            return Figure(title, left_out=str(error))


def percent(rate: float) -> str:
    """A rate as a table shows it, in percent."""
    return "–" if np.isnan(rate) else f"{100 * rate:.1f}"

"""UPMC Food-101: recipe pages, a photo and the page's text each, of 101 dishes.

From visiir.isir.upmc.fr/explore (Wang et al., ICMEW 2015), in the cleaned split of M3CoL's authors
(67,972 train and 22,716 test). Layout of the directory:

- `train.csv`, `test.csv`, with the columns `id`, `text`, `annotation`, `label`;
- `images/train/<annotation>/<id>` and `images/test/<annotation>/<id>`;
- `texts_txt/<annotation>/<id with .txt>`, the pages' texts; without the folder `texts_txt` the
  column `text` is taken.

`label` is not read: the classes are the annotations.
"""

import csv
import os
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rcml_jax.data import imagetext
from rcml_jax.data.classification import ClassificationData
from rcml_jax.data.relation_graph import split_index
from rcml_jax.errors import UserError
from rcml_jax.parsing import CsvRows, TextGate

NAME = "food101"
_FILES = {"train": "train.csv", "test": "test.csv"}
_TEXTS = "texts_txt"
_REMEDY = (
    "get UPMC Food-101 from visiir.isir.upmc.fr/explore and its cleaned split from "
    "github.com/RaghavSinghal10/M3CoL, so that DIRECTORY has train.csv, test.csv, "
    "images/{train,test}/<annotation>/<id> and texts_txt/<annotation>/<id with .txt>, and name it "
    "with --config m3col:food101,path=DIRECTORY"
)
# ASCII letters to lower case, every other byte to a blank.
_LETTERS = bytes(b | 32 if chr(b) in string.ascii_letters else 32 for b in range(256))


def from_config(data: Any, cache: Path) -> ClassificationData:
    """The data of `config.data`: `path`, `strict` and `split_seed`."""
    return load(data.path, strict=data.strict, seed=data.split_seed, cache=cache)


def load(
    directory: str | Path,
    *,
    strict: bool = False,
    validation: int = 5000,
    seed: int = 0,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> ClassificationData:
    """The photos, the pages' texts as `clean` leaves them, and the dish as the class.

    Modalities: "image" (files, opened when they are asked for) and "text". The classes are the
    annotations of train.csv, sorted. `validation` training samples are held out, but never more
    than a fifth of them. Each class gives its share, rounded down or up so that the shares add up,
    and keeps one sample at least; which ones is drawn by `seed`. Rows without an image that can be
    decoded, or with an empty text, are skipped and counted in one line to `log` (default: standard
    error); with `strict` they are an error. What was found out about the images is kept in
    `cache`, if one is given.

    Raises:
      UserError: a negative `validation`, a missing or malformed file, an annotation that train
        lacks, or a split with more than half of its images or texts missing.
    """
    if validation < 0:
        raise UserError(f"{validation} samples cannot be held out; validation is 0 or more.")
    folder = imagetext.require_files(
        directory, tuple(_FILES.values()), title="UPMC Food-101", remedy=_REMEDY
    )
    pages = (folder / _TEXTS).is_dir()
    gate, records = TextGate(strict), []
    for part, name in _FILES.items():
        for line, key, annotation, text in _read(folder / name, gate, with_text=not pages):
            page = folder / _TEXTS / annotation / f"{PurePosixPath(key).stem}.txt"
            records.append(
                imagetext.Record(
                    where=f"{name}, line {line}",
                    split=split_index(part),
                    label=annotation,
                    image=str(folder / "images" / part / annotation / key),
                    text=_page(page) if pages else text,
                    text_from=str(page) if pages else "the column 'text'",
                )
            )
    data = imagetext.assemble(
        NAME,
        records,
        label_field="annotation",
        images=str(folder / "images" / "{train,test}" / "<annotation>" / "<id>"),
        texts=f"as {folder / _TEXTS}/<annotation>/<id with .txt>" if pages else "in column 'text'",
        gate=gate,
        cache=cache,
        log=log,
    )
    train = data.rows("train")
    split = data.split.copy()
    split[train[_held_out(data.labels[train], validation, seed)]] = split_index("validation")
    return replace(data, split=split).validate()


def clean(text: str | bytes) -> str:
    """A page's text as the authors prepare it: letters (a to z) only, lower case, no single ones.

    Anything else, letters with accents too, parts words. Bytes may have any ASCII-like encoding.
    """
    encoded = text.encode("utf-8", "replace") if isinstance(text, str) else text
    words = encoded.translate(_LETTERS).decode("ascii").split()
    return " ".join(word for word in words if len(word) > 1)


def _page(path: Path) -> str:
    """The clean text of a page's file; empty if there is none."""
    if not os.path.isfile(path):
        return ""
    with imagetext.reading(path):
        return clean(path.read_bytes())


def _held_out(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the samples (n,), a fifth at most, every class in proportion: sorted indices.

    Shares are rounded by the largest remainders; every class keeps a sample.
    """
    rng = np.random.default_rng(seed)
    count = min(count, len(labels) // 5)
    sizes = np.bincount(labels)
    shares, remainders = np.divmod(sizes * count, len(labels))
    # Of equal remainders the seed chooses, so that it is not always the alphabet's first classes.
    order = np.lexsort((rng.random(len(sizes)), -remainders))
    more = order[shares[order] + 1 < sizes[order]][: count - shares.sum()]
    shares[more] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in enumerate(shares)
    ]
    return np.sort(np.concatenate(chosen))


def _read(path: Path, gate: TextGate, *, with_text: bool) -> list[tuple[int, str, str, str]]:
    """(line, id, annotation, clean text) of every row; the text is empty without `with_text`."""
    needed = ("id", "annotation", *(("text",) if with_text else ()))
    found = []
    with imagetext.reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = _rows(file, path)
        _, header = next(rows, (1, []))
        columns = [column.strip().lower() for column in header]
        for name in needed:
            if name not in columns:
                raise UserError(
                    f"{path} has no column {name!r}; its first line must be "
                    "id,text,annotation,label."
                )
        for line, row in rows:
            if len(row) != len(columns):
                raise UserError(
                    f"{path}, line {line}: there are {len(row)} values for {len(columns)} "
                    "columns; put values with commas in double quotes."
                )
            values = dict(zip(columns, row, strict=True))
            where = f"{path}, line {line}"
            key, annotation = (gate(values[x], where).strip() for x in ("id", "annotation"))
            if not annotation:
                raise UserError(
                    f"{path}, line {line}: 'annotation' is empty; fill it in or remove the row."
                )
            found.append((line, key, annotation, clean(values["text"]) if with_text else ""))
    return found


def _rows(file: Iterator[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, values) of a CSV file's rows of any length, empty lines left out."""
    rows = CsvRows(file)
    try:
        yield from rows
    except csv.Error as error:
        raise UserError(
            f"{path}: the row that starts in line {rows.line} is malformed CSV ({error}); "
            "correct it."
        ) from error

"""ROSMAP and BRCA: omics views of patients as MOGONET published them, or own tables like them.

A folder holds, for each view k from 1 on, `{k}_tr.csv` and `{k}_te.csv` (a row for each sample, the
same samples in the same order in every view) and, if wanted, `{k}_featname.csv` (a line for each
column), and for all views `labels_tr.csv` and `labels_te.csv` (a class from 0 on in each line).
There is no header; values are numbers with commas between.

The published files: github.com/txWang/MOGONET (Wang et al., "MOGONET integrates multi-omics data
using graph convolutional networks", Nature Communications 2021), MIT licence.
"""

import hashlib
import http.client
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.relation_graph import SPLITS
from rcml_jax.errors import UserError
from rcml_jax.files import atomic_file
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import user_path

SOURCE = "https://raw.githubusercontent.com/txWang/MOGONET/main"
VIEWS = ("mrna", "methylation", "mirna")
TIMEOUT_SECONDS = 30
_LOCAL_COPY = "--config.data.path=DIRECTORY"
_LARGEST = float(np.finfo(np.float32).max)

LABEL_NAMES = {
    "rosmap": ("control", "alzheimers"),
    "brca": ("Normal-like", "Basal-like", "HER2-enriched", "Luminal A", "Luminal B"),
}
#: git's blob id of each published file.
BLOBS = {
    "rosmap": {
        "labels_tr.csv": "535f5fa69c9b2e61f1f31ca6e278c24c5f033f63",
        "labels_te.csv": "6773b84fcd8e2526d020f7f7f3c9440290bff9c7",
        "1_tr.csv": "e35c70223b8506acf45ee46509356db39ea70ea4",
        "1_te.csv": "c52d01e785471c42a17f0aaeeae5c65822214978",
        "1_featname.csv": "dc4bfc4e49d8bc69747cb70ecfc84df0c67396cc",
        "2_tr.csv": "64378292cd1ce30af3e2b4462e25de05f498fbc6",
        "2_te.csv": "c2cc6718934085d74a4260c6268e4f023dad7ce3",
        "2_featname.csv": "cba7bb0ad97f10021443b60707a4017badb0a236",
        "3_tr.csv": "7a5e82a9a2d08b58be531c6c6e9dd657d956a626",
        "3_te.csv": "266f6f6292f1bf8305c20b9362bdb033d6bc5ea5",
        "3_featname.csv": "8bde03a76f6ca52aef334fea33f34406adbc5218",
    },
    "brca": {
        "labels_tr.csv": "500c4965cfb07b192ddee944a022d02e2481ef30",
        "labels_te.csv": "44fd92df634fa828e26c9a6766af640987a294ae",
        "1_tr.csv": "f9592a73980ecb37f332b7a6d9b57b5a99078090",
        "1_te.csv": "d34625f7875308260b4b83b584c5b8eeffd621da",
        "1_featname.csv": "060ea7ba5f0d82eab6dde8ec5c29ba010aa841f5",
        "2_tr.csv": "c58c38acd33f14dd99295c6eb629cc56885af98e",
        "2_te.csv": "ac5dd437b58659090eb6934e7e3a4a9a52a4a553",
        "2_featname.csv": "08fd266a1de90339d08e5afc2672a44ba0f98e04",
        "3_tr.csv": "08e7b9a8c490892df01a474973c3e53efc76beb7",
        "3_te.csv": "7f8a67831896b6302f446dca88f0aeac71103635",
        "3_featname.csv": "291dd56ba3c6c2dc7cdd74bded4e457fe15bf290",
    },
}


def from_config(data: Any, cache: Path) -> ClassificationData:
    """The data set of `config.data`: `name`, and `path` or a copy in `dir`."""
    return load(data.name, cache, directory=data.path or _copy(data.dir, data.name))


def _copy(directory: str, name: str) -> str:
    """`config.data.dir` itself where it is a local copy of a MOGONET data set, else ""."""
    root = user_path(directory) if directory else Path()
    places = (root, root / name.upper())
    found = directory and any((place / "labels_tr.csv").is_file() for place in places)
    return directory if found else ""


def load(
    name: str,
    cache_dir: str | Path,
    *,
    directory: str | Path = "",
    log: Callable[[str], None] | None = None,
) -> ClassificationData:
    """The data set "rosmap" or "brca": training rows first, then test rows, none for validation.

    ROSMAP has 245 and 106 samples, three views of 200 features and 2 classes; BRCA 612 and 263,
    views of 1000, 1000 and 503 features and 5 classes. Values are as published, float32.

    The files are downloaded into `<cache_dir>/omics/<SET>` the first time; a copy that already
    lies there is used as well. Each must be the published file to the byte, and is fetched anew if
    it is not. With `directory` they are read from there (from the folder itself, or from ROSMAP or
    BRCA in it) and may be own data: any number of views, rows, features and classes. Other than
    three views are called view1, view2, ..., and other classes "0", "1", ... Columns that are
    constant in training, samples that repeat another's values, and classes of one sample or none
    in a split are kept, counted, and told to `log`.

    Raises:
      UserError: a file that cannot be had, or anything wrong in one, with file, line and column.
    """
    if name not in BLOBS:
        raise UserError(f"There is no omics data set {name!r}; use {' or '.join(BLOBS)}.")
    if directory:
        folder = _local_folder(user_path(directory), name.upper())
        matches = [re.fullmatch(r"(\d+)_t[re]\.csv", path.name) for path in folder.glob("*.csv")]
        # With a gap in the numbers, a file is missing; to stop at it would drop a view in silence.
        views = max((int(match[1]) for match in matches if match), default=1)
    else:
        folder, views = user_path(cache_dir) / "omics" / name.upper(), len(VIEWS)
        _fetch(folder, BLOBS[name], log or log_line)
    data = _read(name, folder, views, LABEL_NAMES[name])
    for line in remarks(data):
        (log or log_line)(line)
    return data


def blob_id(content: bytes) -> str:
    """git's id of a file's content: SHA-1 over `blob <size>\\0<content>`, in hexadecimal."""
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()


def _local_folder(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}; correct --config.data.path.")
    for folder in (directory, directory / name, directory / name.lower()):
        if any(folder.glob("*_tr.csv")):
            return folder
    raise UserError(
        f"{directory} has neither 1_tr.csv and labels_tr.csv nor a folder {name} with them; "
        "correct --config.data.path."
    )


def _fetch(folder: Path, blobs: dict[str, str], log: Callable[[str], None]) -> None:
    """Download what the folder lacks or has damaged; every file there is a verified one then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [
            (name, blob)
            for name, blob in blobs.items()
            if not (folder / name).exists() or blob_id((folder / name).read_bytes()) != blob
        ]
        for number, (name, blob) in enumerate(wanted, 1):
            url = f"{SOURCE}/{folder.name}/{name}"
            log(f"Downloading {url} ({number} of {len(wanted)})")
            _store(folder / name, _download(url, blob))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read or written ({error}); set --config.data.dir to a folder "
            "that can."
        ) from error


def _download(url: str, blob: str) -> bytes:
    """A file's bytes, verified."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()  # IncompleteRead if it ends before its Content-Length
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"{url} cannot be downloaded ({str(error) or type(error).__name__}); try again later "
            f"or name a folder with a copy of the files: {_LOCAL_COPY}."
        ) from error
    if blob_id(content) != blob:
        raise UserError(
            f"What {url} gives is not the published file (its checksum is another); try again "
            f"later or name a folder with a copy of the files: {_LOCAL_COPY}."
        )
    return content


def _store(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever other processes do."""
    with atomic_file(path, shared=True) as file:
        file.write(content)


def _read(name: str, folder: Path, views: int, label_names: tuple[str, ...]) -> ClassificationData:
    train_labels = _labels(folder / "labels_tr.csv")
    classes = int(train_labels.max()) + 1
    labels = {"tr": train_labels, "te": _labels(folder / "labels_te.csv", classes)}
    modalities = []
    for view in range(1, views + 1):
        parts = [_table(folder / f"{view}_{split}.csv") for split in labels]
        for (split, split_labels), part in zip(labels.items(), parts, strict=True):
            if len(part) != len(split_labels):
                raise UserError(
                    f"{folder / f'{view}_{split}.csv'} has {len(part)} rows, but "
                    f"labels_{split}.csv has {len(split_labels)}; give every sample a row in both."
                )
        _check_columns(folder, view, *parts)
        title = VIEWS[view - 1] if views == len(VIEWS) else f"view{view}"
        modalities.append(Modality(title, "table", np.concatenate(parts).astype(np.float32)))
    own = classes != len(label_names)
    places = np.array([SPLITS.index("train"), SPLITS.index("test")], np.int8)
    return ClassificationData(
        name=name,
        modalities=tuple(modalities),
        labels=np.concatenate(list(labels.values())),
        label_names=tuple(map(str, range(classes))) if own else label_names,
        split=np.repeat(places, [len(part) for part in labels.values()]),
    ).validate()


def remarks(data: ClassificationData) -> list[str]:
    """A sentence for each thing about tables that does no harm and that a user should know."""
    lines, train = [], data.rows("train")
    for view in data.modalities:
        constant = int(np.sum(np.ptp(view.values[train], axis=0) == 0))
        if constant:
            lines.append(
                f"{data.name}: {counted(constant, 'columns')} of {view.values.shape[1]:,} of "
                f"{view.name} with one value in all training samples, so without effect."
            )
    groups: dict[bytes, list[int]] = {}
    for row, values in enumerate(zip(*(m.values for m in data.modalities), strict=True)):
        groups.setdefault(b"".join(x.tobytes() for x in values), []).append(row)
    repeated = [rows for rows in groups.values() if len(rows) > 1]
    if repeated:
        differing = sum(len(r) for r in repeated if len(set(data.labels[r].tolist())) > 1)
        known = set(train.tolist())
        seen = sum(row not in known for rows in repeated if known & set(rows) for row in rows)
        lines.append(
            f"{data.name}: {sum(map(len, repeated)):,} samples have the same values in every view "
            f"as another one: {differing:,} of them beside another label, and {seen:,} test "
            "samples that are among those of training."
        )
    for split in ("train", "test"):
        count = np.bincount(data.labels[data.rows(split)], minlength=data.classes)
        for number, words in ((1, "one sample"), (0, "no sample")):
            names = [data.label_names[c] for c in np.flatnonzero(count == number)]
            if names:
                lines.append(f"{data.name}: {split} has {words} of {', '.join(names)}.")
    return lines


def _check_columns(folder: Path, view: int, train: np.ndarray, test: np.ndarray) -> None:
    columns = train.shape[1]
    if test.shape[1] != columns:
        raise UserError(
            f"{folder / f'{view}_te.csv'} has {test.shape[1]} columns, but {view}_tr.csv has "
            f"{columns}; give both the same features in the same order."
        )
    path = folder / f"{view}_featname.csv"
    if path.exists() and len(names := _lines(path)) != columns:
        raise UserError(
            f"{path} has {len(names)} lines, but {view}_tr.csv has {columns} columns; name every "
            "column in a line of its own, or remove the file."
        )


def _labels(path: Path, classes: int | None = None) -> np.ndarray:
    """(n,) int32, from 0 to classes - 1; without `classes` (in training), two or more classes."""
    table = _table(path)
    if table.shape[1] != 1:
        raise UserError(f"{path}, line 1, column 2: labels are one column; write a class a line.")
    labels = table[:, 0]
    # Without gaps there are no more classes than samples, so that no slip can make very many.
    end = len(labels) if classes is None else classes
    wrong = np.flatnonzero((labels < 0) | (labels >= end) | (labels != np.floor(labels)))
    if wrong.size:
        rule = "number the classes 0, 1, 2 and so on, without gaps"
        if classes is not None:
            rule = f"write one of the classes of labels_tr.csv, 0 to {classes - 1}"
        label = labels[wrong[0]]
        raise UserError(f"{path}, line {wrong[0] + 1}, column 1: {label:g} is no class; {rule}.")
    if classes is None and not labels.any():
        raise UserError(f"{path} has one class only; give samples of two or more classes.")
    return labels.astype(np.int32)


def _lines(path: Path) -> list[str]:
    """The lines of a text file; empty ones at its end are none."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; add it or correct its name.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as plain text.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error
    if not text.strip():
        raise UserError(f"{path} is empty; put a line for each row in it.")
    return text.rstrip().split("\n")


def _table(path: Path) -> np.ndarray:
    """(rows, columns) float64, every value finite also as float32."""
    lines = _lines(path)
    try:
        table = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
    except ValueError:
        return _table_cell_by_cell(path, lines)
    # loadtxt leaves out empty lines; comparing this way finds nan, too.
    if len(table) != len(lines) or not np.all(np.abs(table) <= _LARGEST):
        return _table_cell_by_cell(path, lines)
    return table


def _table_cell_by_cell(path: Path, lines: list[str]) -> np.ndarray:
    """As `_table`, slowly, to tell what is wrong and where."""
    remedy = "fill in a number or remove the sample from every file"
    columns = lines[0].count(",") + 1
    table = np.empty((len(lines), columns))
    for row, line in enumerate(lines):
        cells = [cell.strip() for cell in line.split(",")]
        for column in range(max(columns, len(cells))):
            where = f"{path}, line {row + 1}, column {column + 1}"
            if column >= columns:
                raise UserError(f"{where}: line 1 has {columns} columns only; remove the cell.")
            if column >= len(cells) or not cells[column]:
                raise UserError(f"{where}: the cell is missing; {remedy}.")
            table[row, column] = value = _number(cells[column])
            if not abs(value) <= _LARGEST:
                header = "" if row else " (the files have no header)"
                raise UserError(
                    f"{where}: {cells[column][:40]!r} is no finite float32 number{header}; "
                    f"{remedy}."
                )
    return table


def _number(cell: str) -> float:
    try:
        return math.nan if "_" in cell else float(cell)  # to Python, 1_0 is ten
    except ValueError:
        return math.nan

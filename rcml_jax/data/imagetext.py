"""What the image-text sources share: records with a picture file, a text and a class."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.images import DECODE_ERRORS, open_rgb
from rcml_jax.data.log import log_line
from rcml_jax.data.relation_graph import SPLITS, split_index
from rcml_jax.errors import UserError


class Record(NamedTuple):
    """One sample as its source has it.

    where: file and line or record number, for messages; split: a place in SPLITS; image: the path
    of its picture; text_from: where the text stands, for messages.
    """

    where: str
    split: int
    label: str
    image: str
    text: str
    text_from: str


class ImageFiles:
    """The pictures in files, read whenever they are asked for; an `ItemImages`.

    Raises:
      UserError: on access, a file that cannot be read or is no picture; it is named.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        encoded = self.encoded(index)
        try:
            return open_rgb(encoded)
        except DECODE_ERRORS as error:
            raise UserError(
                f"The image {self.paths[index]} cannot be decoded ({error}); replace it, or "
                "remove it, so that its record is skipped."
            ) from error

    def encoded(self, index: int) -> bytes:
        """The bytes of one file, of any format that Pillow reads."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise UserError(
                f"The image {self.paths[index]} cannot be read ({error}); restore it."
            ) from error


def require_files(directory: str | Path, files: Sequence[str], *, title: str, remedy: str) -> Path:
    """The directory, if it has all the files; `remedy` says where they come from.

    Raises:
      UserError: no directory is given, or it or a file is missing.
    """
    if not str(directory):
        raise UserError(f"No directory of {title} is given; {remedy}")
    folder = Path(directory).expanduser()
    if not os.path.isdir(folder):
        raise UserError(f"There is no directory {folder}; {remedy}")
    for name in files:
        if not os.path.isfile(folder / name):
            raise UserError(f"{folder} is not {title}, because it has no {name}; {remedy}")
    return folder


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading a text file may raise into a UserError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def assemble(
    name: str,
    records: Sequence[Record],
    *,
    label_field: str,
    pictures: str,
    texts: str,
    strict: bool,
    log: Callable[[str], None] | None,
) -> ClassificationData:
    """The records with a picture file and a text, in order: modalities "image" and "text".

    The classes are the labels of the training records, sorted. The others, without a picture or a
    text, are skipped, and one line with their number and the first one goes to `log` (default: to
    standard error); with `strict` the first one is an error.

    label_field, pictures, texts: the class's field and where pictures and texts are expected, for
    messages.

    Raises:
      UserError: a class that no training record has; most of a split's pictures or texts are
        missing; or as `ClassificationData.validate`.
    """
    label_names = sorted({record.label for record in records if record.split == 0})
    number = {label: index for index, label in enumerate(label_names)}
    for record in records:
        if record.label not in number:
            raise UserError(
                f"{record.where}: no training record has the {label_field} {record.label!r}; "
                "correct it or remove the record."
            )
    split = np.array([record.split for record in records], np.int8)
    no_picture = np.array([not os.path.isfile(record.image) for record in records], bool)
    no_text = np.array([not record.text for record in records], bool)
    _check_most(name, records, split, no_picture, f"picture; pictures are expected as {pictures}.")
    _check_most(name, records, split, no_text, f"text; texts are expected {texts}.")
    skipped = np.flatnonzero(no_picture | no_text)
    if skipped.size:
        first = records[skipped[0]]
        lacks = f"picture {first.image}" if no_picture[skipped[0]] else f"text in {first.text_from}"
        if strict:
            raise UserError(
                f"{first.where}: there is no {lacks}; add it, or leave `strict` off, so that the "
                "record is skipped."
            )
        (log or log_line)(
            f"{name}: {len(skipped):,} of {len(records):,} records are skipped "
            f"({np.sum(no_picture):,} without a picture, {np.sum(no_text & ~no_picture):,} without "
            f"a text); the first is {first.where}: there is no {lacks}"
        )
    keep = ~(no_picture | no_text)
    kept = [record for record, good in zip(records, keep, strict=True) if good]
    return ClassificationData(
        name=name,
        modalities=(
            Modality("image", "image", ImageFiles([record.image for record in kept])),
            Modality("text", "text", tuple(record.text for record in kept)),
        ),
        labels=np.array([number[record.label] for record in kept], np.int32),
        label_names=tuple(label_names),
        split=split[keep],
    ).validate()


def _check_most(
    name: str, records: Sequence[Record], split: np.ndarray, missing: np.ndarray, rest: str
) -> None:
    """UserError if more than half of a split's records lack something: a wrong layout, mostly."""
    for part in SPLITS:
        rows = split == split_index(part)
        lost = np.flatnonzero(missing & rows)
        if 2 * len(lost) > np.sum(rows):
            raise UserError(
                f"{name}: {len(lost):,} of the {np.sum(rows):,} {part} records, first "
                f"{records[lost[0]].where}, have no {rest}"
            )

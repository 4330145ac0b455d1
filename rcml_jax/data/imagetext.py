"""What the image-text sources share: records with an image file, a text and a class."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.images import DECODE_ERRORS, FORMATS, decode_problems, open_rgb
from rcml_jax.data.relation_graph import SPLITS, split_index
from rcml_jax.data.stages import Stages, file_state, pack, unpack
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import TextGate, read_file, user_path


class Record(NamedTuple):
    """One sample as its source has it.

    where: file and line or record number, for messages; split: an index into SPLITS; image: its
    path; text_from: where the text stands, for messages.
    """

    where: str
    split: int
    label: str
    image: str
    text: str
    text_from: str


class ImageFiles:
    """The images in files, read whenever they are asked for; an `ItemImages`.

    Raises:
      UserError: on access, a file that cannot be read or is no image; it is named.
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
        """The bytes of one file, of any format that the library reads."""
        try:
            return read_file(self.paths[index])
        except DECODE_ERRORS as error:
            raise UserError(
                f"The image {self.paths[index]} cannot be read ({error}); restore it."
            ) from error

    def states(self) -> list:
        """A JSON value for each file that changes when the file does."""
        return [[path, *file_state(Path(path))[1:]] for path in self.paths]


def image_problems(paths: Sequence[str], cache: str | Path | None) -> list[str]:
    """What is wrong with each image file, "" where nothing is.

    All of them are decoded, once as long as they stay as they are: the result is kept in `cache`.
    """
    if cache is None:
        return decode_problems(paths, read_file)
    # Another Pillow may read more files, or fewer.
    key = [PIL.__version__, FORMATS, ImageFiles(paths).states()]
    stages = Stages(user_path(cache) / "image_checks")
    problems = lambda: pack(decode_problems(paths, read_file))  # noqa: E731
    return unpack(stages.get("images", key, lambda: {"problems": problems()})["problems"])


def require_files(directory: str | Path, files: Sequence[str], *, title: str, remedy: str) -> Path:
    """The directory, if it has all the files; `remedy` says where they come from.

    Raises:
      UserError: no directory is given, or it or a file is missing.
    """
    if not str(directory):
        raise UserError(f"No directory of {title} is given; {remedy}")
    folder = user_path(directory)
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
    images: str,
    texts: str,
    gate: TextGate,
    cache: str | Path | None,
    log: Callable[[str], None] | None,
) -> ClassificationData:
    """The records with an image and a text, in order: modalities "image" and "text".

    The classes are the labels of the training records, sorted. The others, without a text or an
    image that can be decoded, are skipped, and one line with their number and the first one goes to
    `log` (default: to standard error); if the gate is strict the first one is an error.

    gate: what the texts came through; cache: as of `image_problems`. label_field, images, texts:
    the class's field and where images and texts are expected, for messages.

    Raises:
      UserError: a class that no training record has; most of a split's images or texts are
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
    log = log or log_line
    gate.report(lambda line: log(f"{name}: {line}"))
    no_image = np.array([not os.path.isfile(record.image) for record in records], bool)
    there = np.flatnonzero(~no_image).tolist()
    damaged = np.zeros(len(records), bool)
    problems = dict(
        zip(there, image_problems([records[i].image for i in there], cache), strict=True)
    )
    damaged[there] = [problem != "" for problem in problems.values()]
    no_text = np.array([not record.text for record in records], bool)
    _check_most(name, records, split, no_image, f"image; images are expected as {images}.")
    _check_most(name, records, split, no_text, f"text; texts are expected {texts}.")
    _check_most(name, records, split, damaged, "image that can be decoded; get them anew.")
    keep = ~(no_image | no_text | damaged)
    skipped = np.flatnonzero(~keep)
    if skipped.size:
        i, first = skipped[0], records[skipped[0]]
        lacks = f"there is no text in {first.text_from}"
        if no_image[i]:
            lacks = f"there is no image {first.image}"
        elif damaged[i]:
            lacks = f"the image {first.image} cannot be decoded ({problems[i]})"
        if gate.strict:
            raise UserError(
                f"{first.where}: {lacks}; mend or add it, or leave `strict` off, so that the "
                "record is skipped."
            )
        counts = f"{np.sum(no_image):,} without an image"
        if damaged.any():
            counts += f", {np.sum(damaged):,} with a damaged one"
        log(
            f"{name}: {len(skipped):,} of {counted(len(records), 'records')} skipped ({counts}, "
            f"{np.sum(no_text & ~no_image & ~damaged):,} without a text); the first is "
            f"{first.where}: {lacks}"
        )
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

"""Images with several captions each, from local copies: Flickr8k, Flickr30K and MS-COCO.

Flickr8k (Hodosh et al., 2013): a folder of images, the captions of `Flickr8k.token.txt`
(`<image>#<n>\\t<caption>`) and the lists `Flickr_8k.{train,dev,test}Images.txt`, or the Karpathy
split `dataset_flickr8k.json`, which is preferred. Flickr30K (Young et al., 2014):
`flickr30k-images/*.jpg` with the captions of `results_20130124.token`, or with the Karpathy split
`dataset_flickr30k.json`, which is preferred. MS-COCO (Lin et al., 2014), 2017:
`annotations/captions_{train,val}2017.json`, `{train,val}2017/*.jpg`.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax.data.imagetext import ImageFiles, image_problems, reading, require_files
from rcml_jax.data.relation_graph import SPLITS, ItemImages
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import TextGate, read_json, text_lines

_FLICKR_SPLITS = {"train": 0, "restval": 0, "val": 1, "test": 2}
_FLICKR_FILES = ("dataset_flickr30k.json", "results_20130124.token")
_FLICKR_REMEDY = (
    "get Flickr30K from its authors, so that DIRECTORY has the folder flickr30k-images and "
    f"{' or '.join(_FLICKR_FILES)}, and name it with "
    "--config alignment:flickr30k,path=DIRECTORY"
)
# Flickr8k's own names first; then those of copies laid out as Flickr30K.
_FLICKR8K_JSON = ("dataset_flickr8k.json", "dataset_flickr30k.json")
_FLICKR8K_TOKENS = ("Flickr8k.token.txt", "results_20130124.token")
_FLICKR8K_LISTS = tuple(f"Flickr_8k.{part}Images.txt" for part in ("train", "dev", "test"))
_FLICKR8K_IMAGES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images", "flickr30k-images")
_FLICKR8K_REMEDY = (
    "get Flickr8k from its authors, so that DIRECTORY has the image folder Flicker8k_Dataset and "
    f"either {_FLICKR8K_JSON[0]} or {_FLICKR8K_TOKENS[0]} with {', '.join(_FLICKR8K_LISTS)}, and "
    "name it with --config alignment:flickr8k,path=DIRECTORY"
)
_COCO_FILES = tuple(f"annotations/captions_{part}2017.json" for part in ("train", "val"))
_COCO_REMEDY = (
    "get the 2017 images and annotations from cocodataset.org, so that DIRECTORY has the folders "
    "annotations, train2017 and val2017, and name it with "
    "--config alignment:coco,path=DIRECTORY"
)
# Shares of what is drawn by the seed where a source declares no split.
_DRAWN = {"flickr8k": (1.0,), "flickr30k": (0.6, 0.2, 0.2), "coco": (0.95, 0.05)}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Pictures and their captions: n images, m >= n texts, each image with one text at least.

    image_of_text: (m,) int64, rows of images; split: (n,) int8, places in SPLITS.
    """

    name: str
    images: ItemImages
    texts: tuple[str, ...]
    image_of_text: np.ndarray
    split: np.ndarray


def flickr8k(
    directory: str | Path,
    *,
    seed: int = 0,
    strict: bool = False,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> CaptionedImages:
    """Flickr8k with its official split: 6,000 images to train, 1,000 each to validate and test.

    The caption file and the lists may stand in the directory or in its folder `Flickr8k_text`.
    Images of the caption file that no list names are left out, too; the rest is left out, counted
    and raised as for `flickr30k`. `seed` has no effect. Raises UserError for an image in two lists.
    """
    del seed
    gate = TextGate(strict)
    folder = require_files(directory, (), title="Flickr8k", remedy=_FLICKR8K_REMEDY)
    images = next((folder / n for n in _FLICKR8K_IMAGES if (folder / n).is_dir()), None)
    if images is None:
        raise UserError(
            f"{folder} is not Flickr8k, because it has no image folder "
            f"({', '.join(_FLICKR8K_IMAGES)}); {_FLICKR8K_REMEDY}"
        )
    text = folder / "Flickr8k_text"
    text = text if text.is_dir() else folder
    json_file = next((text / n for n in _FLICKR8K_JSON if (text / n).is_file()), None)
    token_file = next((text / n for n in _FLICKR8K_TOKENS if (text / n).is_file()), None)
    if json_file:
        captions, split, left_out = _karpathy(json_file, gate)
    elif token_file:
        require_files(text, _FLICKR8K_LISTS, title="Flickr8k", remedy=_FLICKR8K_REMEDY)
        captions, _, left_out = _token_file(token_file, gate)
        split = _image_lists(text, gate, left_out)
        unlisted = captions.keys() - split.keys()
        nowhere = sum(not (images / name).is_file() for name in unlisted)
        left_out["images in no list"] = len(unlisted) - nowhere
        left_out["captioned images without a file in no list"] = nowhere
        # In the caption file's order; what only a list names has no captions.
        names = [*captions, *(name for name in split if name not in captions)]
        captions = {name: captions.get(name, []) for name in names if name not in unlisted}
    else:
        raise UserError(
            f"{folder} is not Flickr8k, because it has neither {_FLICKR8K_JSON[0]} nor "
            f"{_FLICKR8K_TOKENS[0]}; {_FLICKR8K_REMEDY}"
        )
    paths = {name: str(images / name) for name in captions}
    return _assemble(
        "flickr8k", captions, paths, split, 0, gate, cache, log, _FLICKR8K_REMEDY, left_out
    )


def flickr30k(
    directory: str | Path,
    *,
    seed: int = 0,
    strict: bool = False,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> CaptionedImages:
    """Flickr30K. Without the Karpathy split, 60, 20 and 20 % of the images by the seed.

    Images without a file that can be decoded or a caption, and empty captions, are left out and
    counted in one line to `log` (default: standard error); with `strict` a damaged image and a
    caption that is no Unicode text are an error. What was found out about the images is kept in
    `cache`, if one is given. Raises UserError for a missing or malformed file, and where more than
    half of the images are missing.
    """
    folder = require_files(directory, (), title="Flickr30K", remedy=_FLICKR_REMEDY)
    found = [name for name in _FLICKR_FILES if (folder / name).is_file()]
    if not found:
        require_files(folder, _FLICKR_FILES[1:], title="Flickr30K", remedy=_FLICKR_REMEDY)
    read = _karpathy if found[0] == _FLICKR_FILES[0] else _token_file
    gate = TextGate(strict)
    captions, split, left_out = read(folder / found[0], gate)
    paths = {name: str(folder / "flickr30k-images" / name) for name in captions}
    return _assemble(
        "flickr30k", captions, paths, split, seed, gate, cache, log, _FLICKR_REMEDY, left_out
    )


def coco(
    directory: str | Path,
    *,
    seed: int = 0,
    strict: bool = False,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> CaptionedImages:
    """MS-COCO 2017: val2017 is the test split, and 5 % of train2017 by the seed the validation.

    Left out, counted and raised as for `flickr30k`.
    """
    folder = require_files(directory, _COCO_FILES, title="MS-COCO", remedy=_COCO_REMEDY)
    gate = TextGate(strict)
    captions: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    split: dict[str, int] = {}
    notes: set[tuple[str, int]] = set()
    left_out = {_TWICE: 0}
    for part, file in zip(("train", "val"), _COCO_FILES, strict=True):
        content = _read_json(folder / file)
        names: dict[int, str] = {}
        for entry in _records(content, "images", file):
            name = f"{part}2017/{_field(entry, 'file_name', str, file, gate)}"
            key = _field(entry, "id", int, file, gate)
            if names.get(key, name) != name:
                raise UserError(f"{file}: two images have the id {key}; get the file anew.")
            left_out[_TWICE] += key in names
            names[key] = name
            captions[name], paths[name] = [], str(folder / name)
            if part == "val":
                split[name] = 2
        for entry in _records(content, "annotations", file):
            image = _field(entry, "image_id", int, file, gate)
            if image not in names:
                raise UserError(f"{file}: a caption names the image {image}, which is not there.")
            note = entry.get("id")
            if isinstance(note, int):
                if (part, note) in notes:
                    left_out[_TWICE] += 1
                    continue
                notes.add((part, note))
            captions[names[image]].append(_field(entry, "caption", str, file, gate))
    return _assemble("coco", captions, paths, split, seed, gate, cache, log, _COCO_REMEDY, left_out)


#: Captions of each image, the split of each, and by reason how many records were left out.
_Read = tuple[dict[str, list[str]], dict[str, int], dict[str, int]]
_TWICE = "repeated records"


def _karpathy(path: Path, gate: TextGate) -> _Read:
    """Of two records of an image or of a caption the first is kept; of an image in one split."""
    captions: dict[str, list[str]] = {}
    split: dict[str, int] = {}
    left_out = {_TWICE: 0}
    for entry in _records(_read_json(path), "images", path.name):
        name, part = (_field(entry, key, str, path.name, gate) for key in ("filename", "split"))
        if part not in _FLICKR_SPLITS:
            raise UserError(f"{path.name}: {name} has the unknown split {part!r}; get it anew.")
        if name in captions:
            if split[name] != _FLICKR_SPLITS[part]:
                raise UserError(f"{path.name}: {name} stands in two splits; get the file anew.")
            left_out[_TWICE] += 1
            continue
        split[name] = _FLICKR_SPLITS[part]
        where = f"{path.name}, {name}"
        said: set[int] = set()
        captions[name] = []
        for sentence in _records(entry, "sentences", where):
            caption, number = _field(sentence, "raw", str, where, gate), sentence.get("sentid")
            # Within one image: converted files may number the captions of each from 0.
            if isinstance(number, int):
                if number in said:
                    left_out[_TWICE] += 1
                    continue
                said.add(number)
            captions[name].append(caption)
    return captions, split, left_out


def _token_file(path: Path, gate: TextGate) -> _Read:
    """No splits. Of two captions with the same number the first one is kept."""
    captions: dict[str, list[str]] = {}
    seen, left_out = set(), {_TWICE: 0}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        line = gate(line, f"{path.name}, line {number}")
        image, tab, caption = line.partition("\t")
        name, hash_sign, _ = image.rpartition("#")
        if not (tab and hash_sign and name):
            raise UserError(
                f"{path.name}, line {number}: not of the form <image>#<n>, tab, caption; get the "
                "file anew."
            )
        if image in seen:
            left_out[_TWICE] += 1
            continue
        seen.add(image)
        captions.setdefault(name, []).append(caption)
    return captions, {}, left_out


def _image_lists(folder: Path, gate: TextGate, left_out: dict[str, int]) -> dict[str, int]:
    """The split of each image by Flickr8k's three lists; counts names that a list has twice."""
    split: dict[str, int] = {}
    for part, file in enumerate(_FLICKR8K_LISTS):
        for number, line in enumerate(_lines(folder / file), 1):
            name = gate(line.strip(), f"{file}, line {number}")
            if not name:
                continue
            if split.get(name, part) != part:
                other = _FLICKR8K_LISTS[split[name]]
                raise UserError(f"{name} is both in {other} and in {file}; get the lists anew.")
            left_out[_TWICE] += name in split
            split[name] = part
    return split


def _lines(path: Path) -> list[str]:
    """Lines of a text file, whatever its line ends; a caption may hold U+2028 and the like."""
    with reading(path):
        # Not `read_text`, which turns every kind of line end into a new line.
        return text_lines(path.read_bytes().decode("utf-8-sig"))


def _assemble(
    name: str,
    captions: dict[str, list[str]],
    paths: dict[str, str],
    split: dict[str, int],
    seed: int,
    gate: TextGate,
    cache: str | Path | None,
    log: Callable[[str], None] | None,
    remedy: str,
    left_out: dict[str, int],
) -> CaptionedImages:
    """What has a file and a caption, in the source's order; splits not declared are drawn.

    left_out: by reason how many images or captions of the files `captions` lacks already.
    """
    tell = log or log_line
    texts = {image: [t.strip() for t in lines if t.strip()] for image, lines in captions.items()}
    no_file = [image for image in captions if not os.path.isfile(paths[image])]
    if 2 * len(no_file) >= len(captions):
        first = f", {paths[no_file[0]]} among them" if no_file else ""
        raise UserError(
            f"{name}: {len(no_file):,} of {counted(len(captions), 'images')} missing{first}; "
            f"{remedy}"
        )
    gate.report(lambda line: tell(f"{name}: {line}"))
    lost = set(no_file)
    there = [image for image in captions if image not in lost]
    problems = image_problems([paths[image] for image in there], cache)
    damaged = {image: text for image, text in zip(there, problems, strict=True) if text}
    if damaged and (gate.strict or 2 * len(damaged) >= len(there)):
        first = next(iter(damaged))
        raise UserError(
            f"{name}: {counted(len(damaged), 'images')} cannot be decoded, {paths[first]} among "
            f"them ({damaged[first]}); replace or remove them"
            + (", or leave `strict` off." if gate.strict else ".")
        )
    lost |= damaged.keys()
    no_text = [image for image in captions if image not in lost and not texts[image]]
    if lost or no_text:
        counts = f"{len(no_file):,} without a file, "
        if damaged:
            counts += f"{len(damaged):,} that cannot be decoded, "
        tell(
            f"{name}: {len(lost) + len(no_text):,} of {counted(len(captions), 'images')} left out "
            f"({counts}{len(no_text):,} without a caption)"
        )
    reasons = [counted(count, reason) for reason, count in left_out.items() if count]
    if reasons:
        tell(f"{name}: also left out: {', '.join(reasons)}")
    kept = [image for image in captions if image not in lost and texts[image]]
    free = np.flatnonzero([image not in split for image in kept])
    place = np.array([split.get(image, 0) for image in kept], np.int8)
    shares = np.cumsum(_DRAWN[name])[:-1]
    order = np.random.default_rng(seed).permutation(free)
    for part, rows in enumerate(np.split(order, np.round(shares * len(free)).astype(int))):
        place[rows] = part
    empty = [part for i, part in enumerate(SPLITS) if not (place == i).any()]
    if empty:
        raise UserError(f"{name}: the split {empty[0]} has no images; {remedy}")
    texts_of_each = [len(texts[image]) for image in kept]
    return CaptionedImages(
        name=name,
        images=ImageFiles([paths[image] for image in kept]),
        texts=tuple(text for image in kept for text in texts[image]),
        image_of_text=np.repeat(np.arange(len(kept)), texts_of_each),
        split=place,
    )


def _read_json(path: Path) -> Any:
    with reading(path):
        content = path.read_text("utf-8-sig")
    try:
        return read_json(content)
    except ValueError as error:
        raise UserError(f"{path} is malformed JSON ({error}); get the file anew.") from error


def _records(content: Any, key: str, where: str) -> list:
    """A list of records under a key."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{where} has no list {key!r}; get the file anew.")
    return found


def _field(entry: Any, key: str, kind: type, where: str, gate: TextGate) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        name = {str: "text", int: "number"}[kind]
        raise UserError(f"{where}: a record has no {name} {key!r}; get the file anew.")
    return gate(value, where) if isinstance(value, str) else value

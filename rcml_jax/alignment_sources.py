"""Where the alignment study's embeddings come from: runs of ours, towers of checkpoints, files."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.data import captions, openmoji
from rcml_jax.data.captions import CaptionedImages
from rcml_jax.data.embeddings import (
    Pairs,
    project_to_narrower,
    read_npz,
    select_pairs,
    split_pairs,
)
from rcml_jax.data.graph import SPLITS, ItemImages, split_graph
from rcml_jax.data.images import ImageBank
from rcml_jax.data.log import log_line
from rcml_jax.data.stored_rows import stored_rows
from rcml_jax.data.text import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.evaluation import gap
from rcml_jax.evaluation.alignment import check_pairs
from rcml_jax.methods import build
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.methods.task import cache_directory
from rcml_jax.similarity import SIMILARITIES
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import read_params

NAMES = ("openmoji", "npz", "flickr30k", "coco", "runs")
#: Train, validation and test pairs of a source.
Splits = list[Pairs]
_SHARES = (0.6, 0.2, 0.2)
_CHUNK = 64


def sources(config: Any, workdir: pathlib.Path) -> dict[str, Callable[[], Splits]]:
    """By name, what reads a source's splits; the runs of `config.runs` are trained already.

    Raises UserError for an unknown name and for a source without a path or towers.
    """
    data, towers = config.data, [t for t in config.towers.names.split(",") if t]
    if data.name not in NAMES:
        raise UserError(
            f"config.data.name={data.name!r} is unknown; choose one of {', '.join(NAMES)}"
        )
    if data.name in ("npz", "runs"):
        if towers:
            raise UserError(f"the source {data.name} takes no towers; leave towers out")
        return {"npz": lambda: _npz(config)} if data.name == "npz" else _runs(data.path)
    found: dict[str, Callable[[], Splits]] = {}
    if data.name == "openmoji":
        found = {
            "rcml": lambda: _run(workdir / "runs" / "rcml", config.runs.rcml),
            "clip": lambda: _run(workdir / "runs" / "clip", config.runs.clip),
            "apart": lambda: _apart(config, workdir),
        }
    elif not towers:
        raise UserError(
            f"the source {data.name} needs towers: --config.towers.names=CLIP, or IMAGE+TEXT for "
            "two that were trained apart; directories or names on the Hugging Face hub"
        )
    data_once = functools.cache(lambda: _captioned(config))  # the same for all towers
    for name in towers:
        _check_towers(name)
        label = "+".join(pathlib.PurePath(side).name for side in name.split("+"))
        if label in found:
            raise UserError(f"two sources are called {label!r}; rename one of the directories")
        found[label] = lambda name=name: _towers(name, data_once(), config.towers, workdir)
    return found


def _npz(config: Any) -> Splits:
    pairs = read_npz(config.data.path)
    # Looked at as a whole, so that what is wrong with it is said by the file's own rows.
    whole = project_to_narrower(Pairs(*gap.check_pairs(*pairs.arrays())), 0)
    asked = config.evaluation.similarity
    known = tuple(SIMILARITIES) if asked == "all" else tuple(asked.split(","))
    check_pairs(*whole.arrays(), similarities=known)
    return split_pairs(pairs, _SHARES, config.data.split_seed)


def _runs(paths: str) -> dict[str, Callable[[], Splits]]:
    directories = [pathlib.Path(path) for path in paths.split(",") if path]
    if not directories:
        raise UserError("name work directories: --config configs/alignment.py:runs,path=DIRECTORY")
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        raise UserError("two of the work directories have the same name; rename one")
    return {
        name: lambda directory=directory: _run(directory, workdirs.load_config(directory))
        for name, directory in zip(names, directories, strict=True)
    }


def _run(directory: pathlib.Path, config: Any) -> Splits:
    """The towers of a relational method, each item with itself."""
    method = build(config, directory)
    if not isinstance(method, RelationalMethod):
        raise UserError(
            f"{directory} holds a run of {config.method!r}, whose images and texts share no space; "
            "name a run of configs/rcml.py"
        )
    params = jax.tree.map(jax.numpy.asarray, read_params(directory))
    found = []
    for split in SPLITS:
        items = np.sort(method.task.splits.items(split))
        image, text = method.own_embeddings(params, items)
        found.append(Pairs(image, text, np.arange(len(items))))
    return found


def _apart(config: Any, workdir: pathlib.Path) -> Splits:
    """An image and a text encoder that were trained apart, on the same items."""
    sides = {}
    for modality in ("image", "text"):
        name = f"apart_{modality}"
        directory = workdir / "runs" / name
        method = build(config.runs[name], directory)
        params = jax.tree.map(jax.numpy.asarray, read_params(directory))
        sides[modality] = [
            method.embeddings(params, method.task.data.rows(split))[modality][0] for split in SPLITS
        ]
    return [
        Pairs(image, text, np.arange(len(text)))
        for image, text in zip(sides["image"], sides["text"], strict=True)
    ]


# Towers of checkpoints, on any data


def _captioned(config: Any) -> CaptionedImages:
    """The pictures and texts that towers of checkpoints embed."""
    data = config.data
    if data.name in ("flickr30k", "coco"):
        return getattr(captions, data.name)(data.path, seed=data.split_seed)
    graph = openmoji.load(cache_directory(data.dir))
    run = config.runs.rcml.data  # its items, so that all sources are asked the same
    splits = split_graph(graph, seed=run.split_seed, disjoint=run.disjoint)
    split = np.zeros(len(graph), np.int8)
    for place, name in enumerate(SPLITS):
        split[splits.items(name)] = place
    return CaptionedImages(graph.name, graph.images, graph.texts, np.arange(len(graph)), split)


def _towers(name: str, data: CaptionedImages, asked: Any, workdir: pathlib.Path) -> Splits:
    """The data's pairs embedded by towers of checkpoints, once; kept in the work directory."""
    from rcml_jax.models.frozen import load_towers

    image, text = load_towers(name, layer=asked.layer, pooling=asked.pooling)
    length = min(text.size, asked.max_length)
    blocks = {
        "image": ImageBlocks(image, data.images),
        "text": TextBlocks(text, data.texts, length),
    }
    key = {"name": name, "layer": asked.layer, "pooling": asked.pooling, "length": length}
    key |= {"files": _fingerprints(name), "texts": list(data.texts), "images": _names(data.images)}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    directory = workdir / "embeddings" / digest
    sides = {
        side: stored_rows(directory / f"{side}.npy", rows, log=log_line)
        for side, rows in blocks.items()
    }
    pairs = Pairs(sides["image"], sides["text"], data.image_of_text)
    return [select_pairs(pairs, np.flatnonzero(data.split == i)) for i in range(len(SPLITS))]


def _check_towers(name: str) -> None:
    """Say what is wrong with a name before anything is trained or embedded."""
    from rcml_jax.models.frozen import tower_types

    tower_types(name)


def _fingerprints(name: str) -> list:
    """Sizes and times of local checkpoints, so that another one in its place is embedded anew."""
    files = [
        f for side in name.split("+") for f in sorted(pathlib.Path(side).glob("*.safetensors"))
    ]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _names(images: ItemImages) -> list:
    return list(getattr(images, "paths", ())) or [len(images)]


class ImageBlocks:
    """The embeddings of images, computed as they are asked for: a source of rows."""

    dtype = np.float32

    def __init__(self, tower: Any, images: ItemImages):
        self.shape, self._embed = (tower.width,), tower.embed
        self._bank = ImageBank(images, tower.size, cache_bytes=0)

    def __len__(self) -> int:
        return len(self._bank.images)

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop, (stop - start, width)."""
        return _in_chunks(lambda rows: self._embed(self._bank(rows)), start, stop)


class TextBlocks:
    """The embeddings of texts of at most `max_length` tokens, computed as they are asked for."""

    dtype = np.float32

    def __init__(self, tower: Any, texts: Sequence[str], max_length: int):
        self.shape, self._texts, self._max_length = (tower.width,), texts, max_length
        self._embed = tower.embed
        self._tokenizer = Tokenizer.from_pretrained_dir(tower.directory)

    def __len__(self) -> int:
        return len(self._texts)

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop, (stop - start, width)."""
        return _in_chunks(self._rows, start, stop)

    def _rows(self, rows: np.ndarray) -> jax.Array:
        ids, mask = self._tokenizer.encode([self._texts[i] for i in rows], self._max_length)
        return self._embed(ids, mask)


def _in_chunks(embed: Callable[[np.ndarray], jax.Array], start: int, stop: int) -> np.ndarray:
    """Rows in chunks of one size, the last filled up, so that little is compiled."""
    parts = []
    for first in range(start, stop, _CHUNK):
        rows = np.arange(first, first + _CHUNK).clip(max=stop - 1)
        parts.append(np.asarray(embed(rows))[: stop - first])
    return np.concatenate(parts)

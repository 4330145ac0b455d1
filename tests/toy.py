"""A catalogue of 60 made-up items with planted relations, and configurations small enough to test.

Item i is of kind i % 12, seen in the colour of its image, and stands at place i % 10, seen in
where the image's spot is; its text names both. There is a relation for each kind and each place.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "rcml.py"
ITEMS, KINDS, PLACES = 60, 12, 10

#: Options that make a run of seconds: width 16, one layer, 16-pixel images.
TINY = {
    "steps": 12,
    "validate_every": 3,
    "log_every": 2,
    "patience": 0,
    "devices": 1,
    "data.disjoint": "pair",
    "data.queries": 40,
    "batch.relations": 3,
    "batch.pairs_per_relation": 2,
    "batch.intra_pairs": 4,
    "batch.size": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.embed_dim": 16,
    "model.image_size": 16,
    "model.patch_size": 8,
    "model.vocab_size": 300,
    "model.max_length": 16,
    "optimizer.warmup_steps": 1,
}


def write_catalogue(folder: pathlib.Path) -> pathlib.Path:
    """Items, relations, pairs and images as the folder source wants them."""
    folder = pathlib.Path(folder)
    (folder / "images").mkdir(parents=True)
    items, pairs = [], []
    for i in range(ITEMS):
        kind, place = i % KINDS, i % PLACES
        Image.fromarray(image(kind, place)).save(folder / "images" / f"{i}.png")
        row = {"id": f"i{i}", "text": f"kind{kind} place{place}", "image": f"images/{i}.png"}
        items.append(row | {"label": f"kind{kind}"})
    names = [f"kind{k}" for k in range(KINDS)] + [f"place{p}" for p in range(PLACES)]
    relations = [{"id": name, "sentence": f"both {name}"} for name in names]
    for i in range(ITEMS):
        for j in range(i):
            pairs += [(i, j, f"kind{i % KINDS}")] * (i % KINDS == j % KINDS)
            pairs += [(i, j, f"place{i % PLACES}")] * (i % PLACES == j % PLACES)
    pairs = [{"a": f"i{i}", "b": f"i{j}", "relation": name} for i, j, name in pairs]
    for name, rows in (("items", items), ("relations", relations), ("pairs", pairs)):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def image(kind: int, place: int) -> np.ndarray:
    """(16, 16, 3) uint8: the kind's colour, and a white spot at the place."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:] = 80 * (kind % 3), 80 * (kind // 3 % 2), 60 * (kind // 6)
    row, column = divmod(place, 4)
    pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    return pixels


def tiny_config(folder: pathlib.Path, **options):
    """The configuration of the folder source under TINY and the options, a__b standing for a.b."""
    spec = importlib.util.spec_from_file_location("rcml_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("folder,path=placeholder")
    values = {"data.path": str(folder), "data.dir": str(cache_of(folder))}
    config.update_from_flattened_dict(values | TINY | dotted(options))
    return config


def cache_of(folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(folder) / ".cache"


def dotted(options: dict) -> dict:
    return {name.replace("__", "."): value for name, value in options.items()}


def arguments(folder: pathlib.Path, workdir: pathlib.Path, **options) -> list[str]:
    """The command line of train.py for a tiny run, without the program's name."""
    values = {"data.dir": str(cache_of(folder))} | TINY | dotted(options)
    return [
        f"--config={CONFIG}:folder,path={folder}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def start(program: str, args: list[str], **env: str) -> subprocess.Popen:
    """Start train.py or eval.py in a process of its own, with the devices of this one."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
    )


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

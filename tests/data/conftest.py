"""A small made-up graph, and OpenMoji prepared once for all tests."""

import io

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import openmoji
from rcml_jax.data.graph import RelationGraph, pairs_within
from rcml_jax.data.images import EncodedImages


def png(index: int, size: int = 8) -> bytes:
    """A plain picture that tells its item."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), (index % 256, index // 256, 7)).save(out, "PNG")
    return out.getvalue()


def make_graph(items: int = 60, relations: int = 12, group: int = 8, seed: int = 0):
    """Random groups of items, each group under its own relation."""
    rng = np.random.default_rng(seed)
    groups = [np.sort(rng.choice(items, group, replace=False)) for _ in range(relations)]
    pairs = pairs_within(groups)
    return RelationGraph(
        name="toy",
        ids=tuple(f"id{i}" for i in range(items)),
        texts=tuple(f"text é {i}" for i in range(items)),
        labels=(np.arange(items) % 3 - 1).astype(np.int32),
        label_names=("zero", "one"),
        relations=tuple(f"relation number {r}" for r in range(relations)),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=EncodedImages(items, png),
    )


@pytest.fixture
def toy() -> RelationGraph:
    return make_graph()


@pytest.fixture(scope="session")
def openmoji_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("openmoji")


@pytest.fixture(scope="session")
def emoji(openmoji_dir) -> RelationGraph:
    return openmoji.load(openmoji_dir, log=lambda line: None)

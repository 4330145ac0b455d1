"""A small made-up graph, OpenMoji prepared once for all tests, and planted Amazon corpora."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data.images import EncodedImages
from rcml_jax.data.relation_graph import RelationGraph, normalize_pairs, pairs_within
from rcml_jax.data.sources import openmoji
from tests.data import planted_amazon


def png(index: int, size: int = 8) -> bytes:
    """A plain image that tells its item."""
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


def make_classes(
    classes: int = 6, each: int = 4, relations: int = 5, share: float = 0.3, seed: int = 0
):
    """Items of classes, a share of them linked by each relation; half of the linked pairs."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes, dtype=np.int32), each)
    a, b = np.triu_indices(classes)
    links = [(i, j, e) for e in range(relations) for i, j in zip(a, b, strict=True)]
    links = np.unique(rng.permutation(links)[: int(share * len(links))], axis=0).astype(np.int32)
    members = [np.flatnonzero(labels == c) for c in range(classes)]
    pairs = [(i, j, e) for a, b, e in links for i in members[a] for j in members[b]]
    pairs = normalize_pairs(np.array(pairs))[0]
    pairs = pairs[rng.random(len(pairs)) < 0.5]
    return dataclasses.replace(
        make_graph(items=len(labels), relations=relations),
        texts=tuple(f"class {label}" for label in labels),
        labels=labels,
        label_names=tuple(map(str, range(classes))),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        class_links=links,
    )


def make_respects(items: int = 60, values: int = 6, drawn: float = 0.3, seed: int = 0):
    """`make_graph` with three respects more, the last relations; a share of their pairs."""
    rng = np.random.default_rng(seed)
    graph = make_graph(items, relations=4, group=8, seed=seed)
    attributes = np.full((items, 7), -1, np.int32)
    attributes[:, 4:] = rng.integers(-1, values, (items, 3))
    a, b = np.triu_indices(items, 1)
    pairs = [graph.pairs]
    for e in (4, 5, 6):
        value = attributes[:, e]
        some = (value[a] == value[b]) & (value[a] >= 0) & (rng.random(len(a)) < drawn)
        pairs.append(np.stack([a[some], b[some], np.full(some.sum(), e)], axis=1))
    pairs, pair_split = normalize_pairs(np.concatenate(pairs))
    return dataclasses.replace(
        graph,
        relations=(*graph.relations, "one colour", "one size", "one shape"),
        pairs=pairs,
        pair_split=pair_split,
        attributes=attributes,
        item_group=(np.arange(items) // 4).astype(np.int32),
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


@pytest.fixture(scope="session")
def planted():
    """2,000 buyers and 400 items of Amazon's format; see planted_amazon."""
    return planted_amazon.plant(2000, 400)


@pytest.fixture(scope="session")
def corpus(planted, tmp_path_factory):
    """The folder of their files, compressed; not to be changed."""
    return planted_amazon.write(planted, tmp_path_factory.mktemp("planted"))


@pytest.fixture
def tiny(tmp_path):
    """A planted corpus of 100 items, not compressed, to be changed by a test."""
    return planted_amazon.write(planted_amazon.plant(500, 100), tmp_path / "tiny", compressed=False)

"""OpenMoji as classification: which of Unicode's groups an emoji is of, from picture and name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rcml_jax.data import openmoji
from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.graph import split_graph


def load(
    data_dir: str | Path, *, split_seed: int = 0, log: Callable[[str], None] | None = None
) -> ClassificationData:
    """The 1,914 emoji in their groups, with the item-disjoint splits of the relation graph.

    Raises:
      UserError: as `openmoji.load`.
    """
    graph = openmoji.load(data_dir, log=log)
    groups = openmoji.groups()
    names = tuple(dict.fromkeys(groups[kind] for kind in graph.label_names))
    group_of_label = np.array([names.index(groups[kind]) for kind in graph.label_names], np.int32)
    splits = split_graph(graph, seed=split_seed, disjoint="item")
    split = np.empty(len(graph), np.int8)
    for place, name in enumerate(("train", "validation", "test")):
        split[splits.items(name)] = place
    return ClassificationData(
        name="openmoji",
        modalities=(
            Modality("image", "image", graph.images),
            Modality("text", "text", graph.texts),
        ),
        labels=group_of_label[graph.labels],
        label_names=names,
        split=split,
    ).validate()

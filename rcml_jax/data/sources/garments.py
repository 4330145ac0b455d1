"""H&M's articles as classification: the garment group, from photograph and text.

The files, the items and their texts are those of `rcml_jax.data.sources.hm`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax.data.classification import WORD, ClassificationData, Modality, stem, word_stems
from rcml_jax.data.images import ChosenImages
from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import hm
from rcml_jax.errors import UserError
from rcml_jax.log import log_line


def from_config(data: Any, cache: Path) -> ClassificationData:
    """The garments that `config.data` asks for. Raises UserError without a path."""
    if not data.path:
        raise UserError(
            "the hm source needs the files of the H&M competition, which cannot be fetched for "
            "you: --config m3col:hm,path=DIRECTORY"
        )
    return load(
        cache,
        data.path,
        strict=data.strict,
        split_seed=data.split_seed,
        mask_class_words=data.mask_class_words,
    )


def load(
    cache: str | Path,
    path: str | Path,
    *,
    strict: bool = False,
    split_seed: int = 0,
    mask_class_words: bool = False,
    log: Callable[[str], None] | None = None,
) -> ClassificationData:
    """The articles of `hm.load`, by garment group; the colours of a product are in one split.

    mask_class_words: remove the words of the groups' names from the texts, which often name the
    group. Articles without a group, and those of groups without an article in training, are left
    out, counted, and told to `log`.

    Raises:
      UserError: as `hm.load` and `ClassificationData.validate`.
    """
    graph = hm.load(cache, path, strict=strict, log=log)
    splits = split_graph(graph, seed=split_seed, disjoint="item")
    split = np.empty(len(graph), np.int8)
    for index, name in enumerate(SPLITS):
        split[splits.items(name)] = index
    trained = np.unique(graph.labels[split == SPLITS.index("train")])
    keep = np.flatnonzero(np.isin(graph.labels, trained[trained >= 0]))
    if len(keep) < len(graph):
        (log or log_line)(
            f"H&M: {len(graph) - len(keep):,} of {len(graph):,} articles are left out: of no "
            "garment group, or of one without an article in training."
        )
    texts = [graph.texts[i] for i in keep.tolist()]
    if mask_class_words:
        texts = without_class_words(texts, graph.label_names)
    names = trained[trained >= 0]
    chosen = ChosenImages(graph.images, keep)
    return ClassificationData(
        name=hm.NAME,
        modalities=(Modality("image", "image", chosen), Modality("text", "text", texts)),
        labels=np.searchsorted(names, graph.labels[keep]).astype(np.int32),
        label_names=tuple(graph.label_names[i] for i in names),
        split=split[keep],
    ).validate()


def without_class_words(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Texts without the words of the classes' names, in any case, singular or plural."""
    words = set().union(*(word_stems(name) for name in names))
    shown = lambda found: "" if stem(found[0]) in words else found[0]  # noqa: E731
    return [" ".join(WORD.sub(shown, text).split()) for text in texts]

"""Flickr8k as a relation graph: an item is a photograph with one of its captions.

Read from a local copy as of `rcml_jax.data.sources.captions`, with its official split. The
relations are ours: two captions of one photograph, and photographs of the same subject, which is
what more than half of their captions name.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax.data.images import ChosenImages
from rcml_jax.data.imagetext import ImageFiles
from rcml_jax.data.relation_graph import (
    RelationGraph,
    agreeing_pairs,
    numbered_relations,
    pairs_within,
)
from rcml_jax.data.sources import captions
from rcml_jax.errors import UserError

SAME = "both describe the same photograph"
#: The end of the sentence "both of them show ..." → the words of captions that name it.
SUBJECTS = {
    "a dog": "dogs?|pupp(y|ies)",
    "a child": "child(ren)?|kids?|boys?|girls?|toddlers?|bab(y|ies)",
    "a man": "man|men|guys?",
    "a woman": "wom[ae]n|lady|ladies",
    "many people": "people|crowds?|groups?|teams?",
    "water": "water|ocean|sea|lake|river|pool|waves?|stream",
    "snow": "snow(y|ball)?|ski(s|er|ers|ing)?|snowboard(s|er|ing)?|sled|ice",
    "a beach": "beach|sand|sandy|shore",
    "a ball game": "ball|football|soccer|basketball|baseball|tennis|volleyball|rugby",
    "somebody on wheels": "bikes?|bicycles?|bikers?|cyclists?|motorcycles?|motorbikes?"
    "|skateboard(s|er|ers|ing)?|scooter|skating",
    "a street": "street|city|sidewalk|road",
    "mountains or rocks": "mountains?|mountainous|rocks?|rocky|cliff|climb(s|ing|er|ers)?",
}
#: Most pairs of a subject that are drawn.
PAIRS = 20_000


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph of `config.data`: `path` and `strict`. Raises UserError without a path."""
    if not data.path:
        raise UserError(
            "the flickr8k source needs a local copy: --config rcml:flickr8k,path=DIRECTORY"
        )
    return load(data.path, strict=data.strict, cache=cache)


def load(
    path: str | Path,
    *,
    strict: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> RelationGraph:
    """The graph of a copy of Flickr8k: as many items as captions, in their order.

    seed: of the pairs that are drawn. The others, and what is raised, are those of
    `captions.flickr8k`; relations without a pair are left out.
    """
    found = captions.flickr8k(path, strict=strict, cache=cache, log=log)
    image_of_text = found.image_of_text
    subjects = _subjects(found.texts, image_of_text, len(found.images))
    values = np.column_stack([np.arange(len(found.images)), *subjects])[image_of_text]
    rng = np.random.default_rng(seed)
    # Captions of one photograph follow each other.
    photographs = np.split(
        np.arange(len(image_of_text)), 1 + np.flatnonzero(np.diff(image_of_text))
    )
    parts = [pairs_within(photographs)[:, :2]]
    parts += [agreeing_pairs(column, PAIRS, rng) for column in values.T[1:]]
    used, pairs, pair_split = numbered_relations(parts)
    sentences = [SAME, *(f"both of them show {name}" for name in SUBJECTS)]
    first = np.searchsorted(image_of_text, image_of_text)
    assert isinstance(found.images, ImageFiles)
    names = [Path(image).name for image in found.images.paths]
    return RelationGraph(
        name="flickr8k",
        ids=tuple(
            f"{names[image]}#{number}"
            for image, number in zip(image_of_text, np.arange(len(first)) - first, strict=True)
        ),
        texts=found.texts,
        labels=np.full(len(found.texts), -1, np.int32),
        label_names=(),
        relations=tuple(sentences[r] for r in used),
        pairs=pairs,
        pair_split=pair_split,
        images=ChosenImages(found.images, image_of_text),
        item_split=found.split[image_of_text],
        attributes=values[:, used].astype(np.int32),
    ).validate()


def _subjects(texts: tuple[str, ...], image_of_text: np.ndarray, images: int) -> list[np.ndarray]:
    """For each subject (images,) int: 0 where more than half of the captions name it, else -1."""
    count = np.bincount(image_of_text, minlength=images)
    found = []
    for words in SUBJECTS.values():
        names = re.compile(rf"\b({words})\b", re.IGNORECASE)
        named = np.array([bool(names.search(text)) for text in texts])
        share = np.bincount(image_of_text, named, images) / count
        found.append(np.where(share > 0.5, 0, -1))
    return found

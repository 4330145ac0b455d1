"""Embedding tables made of random vectors."""

import numpy as np

from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.ops.similarity import SIMILARITIES

NAMES = (*SIMILARITIES, "product")
ITEMS = np.array([3, 4, 7, 10, 11, 15, 20, 21, 30, 42])


def units(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def random_table(seed=0, relations=4, text_free=False, image_free=False, dim=5):
    """Items named ITEMS; a modality that is free does not depend on the relation."""
    rng = np.random.default_rng(seed)
    n = len(ITEMS)
    return RelationEmbeddings(
        ITEMS,
        units(rng, 1 if text_free else relations, n, dim),
        units(rng, 1 if image_free else relations, n, dim),
        units(rng, relations, dim),
    )


def arrays(table):
    """What the twins in tests/reference.py take."""
    return tuple(np.asarray(x, np.float64) for x in (table.text, table.image, table.relation))


KINDS = {
    "under relations": {},
    "text free": {"text_free": True},
    "image free": {"image_free": True},
    "both free": {"text_free": True, "image_free": True},
}


def collapsed_table():
    """Every item has the same embedding under every relation."""
    table = random_table()
    text = np.broadcast_to(table.text[:1, :1], table.text.shape)
    relation = np.broadcast_to(table.relation[:1], table.relation.shape)
    return RelationEmbeddings(ITEMS, text, text, relation)

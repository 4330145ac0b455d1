"""Random batches of pairs under relations."""

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_batch(seed=0, relations=3, items=7, dim=4, padded_items=2, groups=(4, 1, 3)):
    """Random pairs: relation 0 is intra-sample, groups are uneven, the graph has more links."""
    rng = np.random.default_rng(seed)
    text, image = unit(rng.normal(size=(2, relations, items, dim))).astype(np.float32)
    real, size = items - padded_items, max(groups)
    anchor, positive = rng.integers(0, real, (2, relations, size))
    positive = np.where(anchor == positive, (positive + 1) % real, positive)
    positive[0] = anchor[0]
    pair_valid = np.arange(size) < np.array(groups)[:, None]
    related = np.eye(items, dtype=bool)
    related[anchor[pair_valid], positive[pair_valid]] = True
    related[0, 1] = True
    related |= related.T
    return (text, image, anchor, positive), {
        "pair_valid": pair_valid,
        "related": related,
        "valid": np.arange(items) < real,
        "intra": np.arange(relations) == 0,
    }

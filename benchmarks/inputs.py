"""Random models and batches of the sizes that are measured; no data set is needed."""

import types
from typing import Any

import numpy as np
from transformers import CLIPConfig

from configs.rcml import get_config
from rcml_jax.models.towers.clip import small_clip_config

# The ids of the largest tokenizer that configs/rcml.py allows.
TOKENIZER = types.SimpleNamespace(
    vocab_size=get_config().model.vocab_size, end_id=get_config().model.vocab_size - 1
)


def clip_config(small: bool) -> CLIPConfig:
    """ViT-B/32, or the small towers of configs/rcml.py."""
    if not small:
        return CLIPConfig()
    model = get_config().model
    names = ("width", "layers", "heads", "embed_dim", "image_size", "patch_size", "max_length")
    return small_clip_config(
        vocab_size=TOKENIZER.vocab_size,
        eos_token_id=TOKENIZER.end_id,
        **{name: model[name] for name in names},
    )


def token_ids(rng: np.random.Generator, n: int, length: int, config: CLIPConfig) -> np.ndarray:
    """Token ids (n, length) of texts that fill their length, the end token last."""
    end = config.text_config.eos_token_id
    ids = rng.integers(3, min(end, config.text_config.vocab_size), (n, length), dtype=np.int32)
    ids[:, -1] = end
    return ids


def images(rng: np.random.Generator, n: int, config: CLIPConfig) -> np.ndarray:
    """Images (n, H, W, 3), uint8."""
    side = config.vision_config.image_size
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def pair_indices(
    rng: np.random.Generator, items: int, relations: int, pairs: int, intra_pairs: int
) -> dict[str, np.ndarray]:
    """The pairs of a relation batch: `relations` rows of `pairs`, and the intra-sample row first.

    As in rcml_jax/data/sampling.py: intra, anchor, positive, pair_valid, linked, related
    and valid. An item
    may be in pairs of several relations.
    """
    shape = (relations + 1, max(pairs, intra_pairs))
    anchor = rng.integers(0, items, shape).astype(np.int32)
    positive = ((anchor + rng.integers(1, items, shape)) % items).astype(np.int32)
    anchor[0] = positive[0] = np.arange(shape[1]) % items
    return pair_tables(anchor, positive, items, pairs, intra_pairs)


def pair_tables(
    anchor: np.ndarray, positive: np.ndarray, items: int, pairs: int, intra_pairs: int
) -> dict[str, np.ndarray]:
    """What a relation batch says of given pairs (R, G), of which the first row is intra-sample."""
    rows, columns = np.arange(anchor.shape[0]), np.arange(anchor.shape[1])
    pair_valid = columns < np.where(rows > 0, pairs, intra_pairs)[:, None]
    linked = np.zeros((*anchor.shape, len(rows)), bool)
    linked[1:] = np.eye(len(rows), dtype=bool)[1:, None]
    related = np.eye(items, dtype=bool)
    related[anchor[pair_valid], positive[pair_valid]] = True
    return {
        "intra": rows == 0,
        "anchor": anchor,
        "positive": positive,
        "pair_valid": pair_valid,
        "linked": linked,
        "related": related | related.T,
        "valid": np.ones(items, bool),
    }


def relation_batch(config: CLIPConfig, sizes: Any, text_length: int, sentence_length: int) -> dict:
    """A batch as `rcml_jax.data.sampling.collator` makes it; sizes: a configuration's `batch`."""
    rng = np.random.default_rng(0)
    pairs = pair_indices(
        rng, sizes.size, sizes.relations, sizes.pairs_per_relation, sizes.intra_pairs
    )
    return {
        "items": {
            "ids": token_ids(rng, sizes.size, text_length, config),
            "images": images(rng, sizes.size, config),
        },
        "shared": {
            "relation_ids": token_ids(rng, sizes.relations + 1, sentence_length, config),
            "labels": rng.integers(0, 10, sizes.size),
            **pairs,
        },
    }

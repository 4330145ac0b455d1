"""Batches of items with titles of real lengths, and weights for them; NumPy alone.

Each relation has pairs of distinct items, and some of the items are self pairs. Titles have a
log-normal number of tokens (median 20, sigma 0.5, cut to 4..77), sentences 30 to 60, the self
pairs' 16; tokens and images are random.
"""

from typing import Any, NamedTuple

import numpy as np

from benchmarks import inputs
from rcml_jax.data.packing import LENGTHS, pack, pack_order

MEDIAN_TITLE, TITLE_SIGMA, SHORTEST_TITLE = 20, 0.5, 4
SENTENCES, SELF_SENTENCE = (30, 60), 16
TEXTS_PER_ROW = 4


class Sizes(NamedTuple):
    """Relations beside the self pairs', pairs of each, self pairs."""

    relations: int
    pairs: int
    self_pairs: int

    @property
    def items(self) -> int:
        """Distinct items: no two pairs share one."""
        return 2 * self.relations * self.pairs


class ItemBatch(NamedTuple):
    """One batch, padded and packed.

    padded: as `rcml_jax.data.sampling.collator` makes it; packed: the same with TEXTS_PER_ROW
    titles in a row, as in configs/rcml.py:amazon; title_lengths (items,) in tokens.
    """

    padded: dict
    packed: dict
    title_lengths: np.ndarray


def title_lengths(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Numbers of tokens of product titles, start and end token included."""
    lengths = np.exp(np.log(MEDIAN_TITLE) + TITLE_SIGMA * rng.standard_normal(count))
    return np.rint(lengths).astype(int).clip(SHORTEST_TITLE, limit)


def padded_texts(rng: np.random.Generator, lengths: np.ndarray, limit: int, config: Any):
    """Random texts of these lengths: ids (n, T), T as the tokenizer would trim it."""
    width = next(x for x in (*(x for x in LENGTHS if x < limit), limit) if x >= max(lengths))
    ids = inputs.token_ids(rng, len(lengths), width, config)
    end, places = lengths[:, None] - 1, np.arange(width)
    text = config.text_config
    texts = np.select([places < end, places == end], [ids, text.eos_token_id], text.pad_token_id)
    return texts.astype(np.int32)


def pair_indices(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """anchor, positive, pair_valid (R, G) and the rest of a relation batch; self pairs first."""
    shape = (sizes.relations + 1, max(sizes.pairs, sizes.self_pairs))
    anchor, positive = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places = rng.permutation(sizes.items).reshape(2, sizes.relations, sizes.pairs)
    anchor[1:, : sizes.pairs], positive[1:, : sizes.pairs] = places
    anchor[0, : sizes.self_pairs] = rng.choice(sizes.items, sizes.self_pairs, replace=False)
    positive[0] = anchor[0]
    tables = inputs.pair_tables(anchor, positive, sizes.items, sizes.pairs, sizes.self_pairs)
    return tables | {"labels": np.zeros(sizes.items, np.int32)}


def item_batch(config: Any, sizes: Sizes, seed: int = 0) -> ItemBatch:
    """A random batch; config: the towers', a `CLIPConfig`."""
    rng = np.random.default_rng(seed)
    limit = config.text_config.max_position_embeddings
    pairs = pair_indices(rng, sizes)
    titles = title_lengths(rng, sizes.items, limit)
    titles = titles[pack_order(titles, TEXTS_PER_ROW)]
    sentences = rng.integers(*SENTENCES, sizes.relations + 1, endpoint=True)
    sentences[0] = SELF_SENTENCE
    padded = {
        "items": {
            "ids": padded_texts(rng, titles, limit, config),
            "images": inputs.images(rng, sizes.items, config),
        },
        "shared": pairs
        | {"relation_ids": padded_texts(rng, sentences.clip(max=limit), limit, config)},
    }
    return ItemBatch(padded, packed_batch(padded, titles), titles)


def packed_batch(padded: dict, titles: np.ndarray) -> dict:
    """The batch with several titles, of these lengths, in each row."""
    ids, images = padded["items"]["ids"], padded["items"]["images"]
    mask = np.arange(ids.shape[1]) < titles[:, None]
    return padded | {
        "items": {
            "ids": pack(ids, mask, TEXTS_PER_ROW),
            "images": images.reshape(-1, TEXTS_PER_ROW, *images.shape[1:]),
        }
    }

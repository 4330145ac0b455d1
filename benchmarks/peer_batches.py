"""The batch of benchmarks/peers.py in three forms: ours, factored and plain.

32 pairs under 11 relations: three pairs of distinct items under each of ten kinds of buyers, and
two self pairs among these 60 items. Titles have a log-normal number of tokens (median 20, sigma
0.5, cut to 4..77), sentences 30 to 60, the self pairs' 16; tokens and pictures are random.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig

from benchmarks import inputs
from benchmarks.torch_rcml import Tensors
from configs.rcml import get_config
from rcml_jax.data.packing import pack, pack_order
from rcml_jax.data.text import LENGTHS
from rcml_jax.models.clip import IMAGE_MEAN, IMAGE_STD

RELATIONS, PAIRS, SELF_PAIRS = 10, 3, 2
TEXTS_PER_ROW = 4
MEDIAN_TITLE, TITLE_SIGMA, SHORTEST_TITLE = 20, 0.5, 4
SENTENCES, SELF_SENTENCE = (30, 60), 16


class Workload(NamedTuple):
    """One batch in the three forms, with random texts and pictures.

    ours: as `rcml_jax.data.batches.collator` makes it; packed: the same with TEXTS_PER_ROW titles
    in a row, as in configs/rcml.py:amazon; factored: ours as tensors; plain: pair by pair and
    padded to `limit` tokens. All hold the same `items` distinct items.
    """

    config: Any
    clip_config: CLIPConfig
    ours: dict
    packed: dict
    factored: Tensors
    plain: Tensors
    items: int
    limit: int
    title_lengths: np.ndarray


def title_lengths(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Numbers of tokens of product titles, start and end token included."""
    lengths = np.exp(np.log(MEDIAN_TITLE) + TITLE_SIGMA * rng.standard_normal(count))
    return np.rint(lengths).astype(int).clip(SHORTEST_TITLE, limit)


def padded_texts(rng: np.random.Generator, lengths: np.ndarray, limit: int, config: CLIPConfig):
    """Random texts of these lengths: ids (n, T), T as the tokenizer would trim it."""
    width = next(x for x in (*(x for x in LENGTHS if x < limit), limit) if x >= max(lengths))
    ids = inputs.token_ids(rng, len(lengths), width, config)
    end, places = lengths[:, None] - 1, np.arange(width)
    text = config.text_config
    return np.select([places < end, places == end], [ids, text.eos_token_id], text.pad_token_id)


def pair_indices(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """anchor, positive, pair_valid (R, G) and the rest of a relation batch; self pairs first."""
    shape = (RELATIONS + 1, max(PAIRS, SELF_PAIRS))
    anchor, positive = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places = rng.permutation(2 * RELATIONS * PAIRS).reshape(2, RELATIONS, PAIRS)
    anchor[1:, :PAIRS], positive[1:, :PAIRS] = places
    items = places.size
    anchor[0, :SELF_PAIRS] = rng.choice(items, SELF_PAIRS, replace=False)
    positive[0] = anchor[0]
    tables = inputs.pair_tables(anchor, positive, items, PAIRS, SELF_PAIRS)
    return tables | {"labels": np.zeros(items, np.int32)}


def build_workload(small: bool) -> Workload:
    """The batch that all sides are given."""
    rng = np.random.default_rng(0)
    clip_config = inputs.clip_config(small)
    limit = clip_config.text_config.max_position_embeddings
    pairs = pair_indices(rng)
    items = len(pairs["valid"])
    titles = title_lengths(rng, items, limit)
    titles = titles[pack_order(titles, TEXTS_PER_ROW)]
    sentences = rng.integers(*SENTENCES, RELATIONS + 1, endpoint=True)
    sentences[0] = SELF_SENTENCE
    ours = {
        "items": {
            "ids": padded_texts(rng, titles, limit, clip_config).astype(np.int32),
            "images": inputs.images(rng, items, clip_config),
        },
        "shared": pairs
        | {
            "relation_ids": padded_texts(rng, sentences.clip(max=limit), limit, clip_config).astype(
                np.int32
            )
        },
    }
    factored = factored_batch(ours, clip_config)
    pad = clip_config.text_config.pad_token_id
    plain = plain_batch(factored, limit, pad)
    config = configuration(items)
    packed = packed_batch(ours, titles)
    return Workload(config, clip_config, ours, packed, factored, plain, items, limit, titles)


def packed_batch(ours: dict, titles: np.ndarray) -> dict:
    """Our batch with several titles, of these lengths, in each row."""
    ids, images = ours["items"]["ids"], ours["items"]["images"]
    mask = np.arange(ids.shape[1]) < titles[:, None]
    return ours | {
        "items": {
            "ids": pack(ids, mask, TEXTS_PER_ROW),
            "images": images.reshape(-1, TEXTS_PER_ROW, *images.shape[1:]),
        }
    }


def configuration(items: int):
    """configs/rcml.py with the paper's loss and learning rate, and this batch."""
    config = get_config()
    config.loss.identification_weight = 0.0
    config.optimizer.learning_rate = 5e-5
    config.batch.update(
        size=items, relations=RELATIONS, pairs_per_relation=PAIRS, intra_pairs=SELF_PAIRS
    )
    return config


def factored_batch(ours: dict, clip_config: CLIPConfig) -> Tensors:
    """Our batch as tensors; the pictures are normalised ahead of time, channels first."""
    end = clip_config.text_config.eos_token_id

    def texts(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ends = np.argmax(ids == end, axis=1)
        mask = np.arange(ids.shape[1]) <= ends[:, None]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask)

    shared = ours["shared"]
    ids, mask = texts(ours["items"]["ids"])
    relation_ids, relation_mask = texts(shared["relation_ids"])
    pixels = (ours["items"]["images"] / np.float32(255) - IMAGE_MEAN) / IMAGE_STD
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
    return {
        "ids": ids,
        "mask": mask,
        "relation_ids": relation_ids,
        "relation_mask": relation_mask,
        "pixels": torch.from_numpy(pixels),
        "anchor": torch.from_numpy(shared["anchor"]).long(),
        "positive": torch.from_numpy(shared["positive"]).long(),
        "pair_valid": torch.from_numpy(shared["pair_valid"]),
        "related": torch.from_numpy(shared["related"]),
        "intra": torch.from_numpy(shared["intra"]),
    }


def plain_batch(factored: Tensors, limit: int = 0, pad: int = 0) -> Tensors:
    """The same pairs one by one: anchors, then positives, and each pair's sentence.

    Texts are padded to `limit` tokens, or stay as long as they are where it is 0.
    """

    def wider(x: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(x, (0, max(limit - x.shape[1], 0)), value=value)

    live = factored["pair_valid"]
    relation = live.nonzero()[:, 0]
    rows = torch.cat([factored["anchor"][live], factored["positive"][live]])
    return {
        "ids": wider(factored["ids"][rows], pad),
        "mask": wider(factored["mask"][rows], False),
        "relation_ids": wider(factored["relation_ids"][relation], pad),
        "relation_mask": wider(factored["relation_mask"][relation], False),
        "pixels": factored["pixels"][rows],
        "related": factored["related"][rows][:, rows],
        "intra": factored["intra"][relation],
    }

"""The batch of benchmarks/peers.py in three forms: ours, factored and plain.

32 pairs under 11 relations: three pairs of distinct items under each of ten kinds of buyers, and
two self pairs among these 60 items. Lengths of texts are those of `benchmarks/item_batches.py`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig

from benchmarks import inputs
from benchmarks.item_batches import Sizes, item_batch
from benchmarks.torch_rcml import Tensors
from configs.rcml import get_config
from rcml_jax.models.towers.clip import IMAGE_MEAN, IMAGE_STD

SIZES = Sizes(relations=10, pairs=3, self_pairs=2)


class Workload(NamedTuple):
    """One batch in the three forms, with random texts and images.

    ours: as `rcml_jax.data.sampling.collator` makes it; packed: the same with TEXTS_PER_ROW titles
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


def build_workload(small: bool) -> Workload:
    """The batch that all sides are given."""
    clip_config = inputs.clip_config(small)
    limit = clip_config.text_config.max_position_embeddings
    ours, packed, titles = item_batch(clip_config, SIZES)
    factored = factored_batch(ours, clip_config)
    pad = clip_config.text_config.pad_token_id
    plain = plain_batch(factored, limit, pad)
    config = configuration(SIZES.items)
    return Workload(config, clip_config, ours, packed, factored, plain, SIZES.items, limit, titles)


def configuration(items: int):
    """configs/rcml.py with the paper's loss and learning rate, and this batch."""
    config = get_config()
    config.loss.identification_weight = 0.0
    config.model.gate = False
    config.optimizer.learning_rate = 5e-5
    config.batch.update(
        size=items,
        relations=SIZES.relations,
        pairs_per_relation=SIZES.pairs,
        intra_pairs=SIZES.self_pairs,
    )
    return config


def factored_batch(ours: dict, clip_config: CLIPConfig) -> Tensors:
    """Our batch as tensors; the images are normalised ahead of time, channels first."""
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

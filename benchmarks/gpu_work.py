"""What the stages of benchmarks/gpu.py share: sizes, configurations and batches.

The batch is the paper's on ViT-B/32: 512 pairs of 1,024 distinct items under 8 relations, and 64
self pairs, titles packed four in a row as in configs/rcml.py:amazon.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import throughput_flops as flops
from benchmarks import throughput_models as models
from benchmarks.item_batches import Sizes
from rcml_jax.cli.commands import load_config_file
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.models.towers.transformer import TokenStates

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PAPER = Sizes(relations=8, pairs=64, self_pairs=64)
SMALL = Sizes(relations=2, pairs=4, self_pairs=3)
TINY = {
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.embed_dim": 16,
    "model.image_size": 16,
    "model.patch_size": 8,
    "model.vocab_size": 100,
}


def sizes(small: bool) -> Sizes:
    """Of the batch that is measured."""
    return SMALL if small else PAPER


def set_sizes(config: Any, batch: Sizes) -> None:
    """Give a configuration the sizes of a batch, in place."""
    config.batch.update(
        size=batch.items,
        relations=batch.relations,
        pairs_per_relation=batch.pairs,
        intra_pairs=batch.self_pairs,
    )


def configuration(small: bool, batch: Sizes, dtype: str = "bfloat16") -> Any:
    """configs/rcml.py:amazon with the sizes of a batch: ViT-B/32, or tiny towers."""
    config = load_config_file(f"{CONFIGS / 'rcml.py'}:amazon")
    if small:
        models.shrink(config)
        config.update_from_flattened_dict(TINY)
    set_sizes(config, batch)
    config.model.dtype = dtype
    return config


def paper_loss(config: Any) -> Any:
    """The configuration with Eq. 1-2 alone, which is what the PyTorch peers compute."""
    config = config.copy_and_resolve_references()
    config.loss.identification_weight = 0.0
    config.model.gate = False
    return config


def method(name: str, config: Any) -> RelationalMethod:
    """RCML ("rcml") or CLIP ("clip") with random weights and no data."""
    return models.relational(name, config)


def step_flops(method: RelationalMethod, batch: dict, relations: int) -> int:
    """Model FLOPs of a step on packed texts, backward pass included.

    The tower works on whole rows, their little padding included; pooling needs a title's own tokens
    alone. relations: how many the items are pooled under, 0 for CLIP.
    """
    towers = method.towers_config
    rows, length = batch["items"]["ids"].ids.shape
    count = rows * batch["items"]["ids"].ends.shape[1]
    sentence = batch["shared"]["relation_ids"].shape[1] if relations else 0
    found = flops.relational(
        towers,
        items=count,
        text_length=length * rows // count,
        relations=relations,
        sentence_length=sentence,
    )
    found["text_model"] = rows * flops.encoder(towers.text_config, length)
    found["text_model"] += relations * flops.encoder(towers.text_config, sentence)
    return flops.training(found, method.frozen_parts)


def token_states(states: jax.Array) -> TokenStates:
    """Tokens (n, T, d) without padding, the first one the summary token."""
    mask = jnp.ones(states.shape[:2], bool)
    return TokenStates(states, mask, jnp.zeros(len(states), jnp.int32))


def unit_vectors(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 vectors of length one."""
    x = rng.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

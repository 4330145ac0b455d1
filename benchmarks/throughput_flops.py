"""Model FLOPs by formula, and the peak rates of known devices: what utilisation is made of.

Counted are the matrix products that the model needs, two operations for each multiplication and
addition, every token attending to all others. The losses, below one percent at any size that
trains, element-wise operations, and what is computed a second time to save memory, are not.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

# TFLOP/s of one JAX device, without sparsity: bfloat16, and float32 at JAX's default precision,
# which multiplies in TF32 on NVIDIA's GPUs since Ampere and in bfloat16 on TPUs. From the data
# sheets of NVIDIA's H100, H200, A100, L4 and V100 (whose figures with sparsity are halved) and from
# the pages on TPU versions of Google Cloud's documentation. A device of TPU v2 and v3 is one of the
# two cores of a chip. The first expression that is found in the kind of the device counts.
PEAKS = (
    (r" MIG ", None, None),
    (r"\b(H100|H200) NVL", 835.5, 417.5),
    (r"\bH100 PCIe", 756.0, 378.0),
    (r"\b(H100|H200|GH200)\b", 989.4, 494.7),
    (r"\bA100\b", 312.0, 156.0),
    (r"\bL4\b", 121.0, 60.0),
    (r"\bV100-PCIE", None, 14.0),
    (r"\bV100-SXM", None, 15.7),
    (r"^TPU v2$", 22.5, 22.5),
    (r"^TPU v3$", 61.5, 61.5),
    (r"^TPU v4$", 275.0, 275.0),
    (r"^TPU v5( lite|e)$", 197.0, 197.0),
    (r"^TPU v5p?$", 459.0, 459.0),
    (r"^TPU v6( lite|e)$", 918.0, 918.0),
)


def peak(kind: str, dtype: str) -> float | None:
    """FLOP/s of a device by `device_kind`; dtype: "bfloat16" or "float32". None: not known.

    Nor is it known for float32 where JAX is told to multiply in another precision than its default.
    """
    if dtype == "float32" and jax.config.jax_default_matmul_precision not in (None, "default"):
        return None
    for expression, bfloat16, float32 in PEAKS:
        if re.search(expression, kind):
            rate = bfloat16 if dtype == "bfloat16" else float32
            return rate and 1e12 * rate
    return None


def encoder(config: Any, tokens: int) -> int:
    """The layers of a transformer on one sequence; config: of a tower, Hugging Face's."""
    width, hidden = config.hidden_size, config.intermediate_size
    layer = 8 * width**2 + 4 * width * hidden + 4 * tokens * width
    return config.num_hidden_layers * tokens * layer


def image_tokens(config: Any) -> int:
    """The patches of an image and the CLS token."""
    return (config.image_size // config.patch_size) ** 2 + 1


def image_encoder(config: Any) -> int:
    """A ViT, CLIP's or not, on one image: patches and layers."""
    tokens = image_tokens(config)
    patches = 2 * 3 * config.patch_size**2 * config.hidden_size
    return (tokens - 1) * patches + encoder(config, tokens)


def relational(
    config: Any,
    *,
    items: int,
    text_length: int,
    relations: int = 0,
    sentence_length: int = 0,
) -> dict[str, int]:
    """A forward pass over items (a text and an image each), by the part of the model.

    config: the towers', a `CLIPConfig` or a `PairConfig`. relations: how many the items are pooled
    under; 0: CLIP, which projects the pooled token alone. sentence_length: of the relations'
    sentences, 0 where they are encoded ahead. The parts have their names in the parameters.
    """
    text, vision, width = config.text_config, config.vision_config, config.projection_dim
    patches = image_tokens(vision)
    sentences = relations if sentence_length else 0
    projected = (text_length, patches) if relations else (1, 1)
    texts = items * encoder(text, text_length) + sentences * encoder(text, sentence_length)
    # Scores and weighted sum of the tokens, then W_V and W_o on what was pooled, of both towers.
    pooling = relations * (4 * width * (text_length + patches) + 8 * width**2)
    queries = 2 * relations * 4 * width**2
    return {
        "text_model": texts,
        "vision_model": items * image_encoder(vision),
        "text_projection": 2 * text.hidden_size * width * (items * projected[0] + sentences),
        "visual_projection": 2 * vision.hidden_size * width * items * projected[1],
        "head": items * pooling + queries if relations else 0,
    }


def classifier(
    encoders: Mapping[str, Any],
    *,
    items: int,
    text_length: int,
    mixed: Collection[str] = (),
    hidden: Sequence[int] = (),
    classes: int,
) -> dict[str, int]:
    """M3CoL's forward pass over items, by part.

    encoders: the configurations by modality, "image" and "text". mixed: the modalities that are
    encoded a second time, mixed. hidden: widths of the hidden layers of the classifiers, of which
    there is one for each modality and one for all together.
    """
    sizes = {"image": image_encoder, "text": lambda config: encoder(config, text_length)}
    found = {
        name: items * sizes[name](config) * (2 if name in mixed else 1)
        for name, config in encoders.items()
    }
    widths = [config.hidden_size for config in encoders.values()]
    heads = sum(_mlp((width, *hidden, classes)) for width in (*widths, sum(widths)))
    return found | {"heads": items * heads}


def _mlp(widths: Sequence[int]) -> int:
    return sum(2 * a * b for a, b in itertools.pairwise(widths))


def training(parts: Mapping[str, int], frozen: Collection[str] = ()) -> int:
    """A training step: a part's backward pass takes twice its forward pass, a frozen one's none."""
    return sum(flops * (1 if name in frozen else 3) for name, flops in parts.items())

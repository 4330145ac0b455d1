"""Small models and their checkpoints in every layout that is read, from our own modules alone."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import CLIPConfig, ResNetConfig, SiglipConfig

from rcml_jax.models.backbones import build_backbone, example_input
from rcml_jax.models.checkpoints import to_torch
from rcml_jax.models.towers.resnet import ResNet
from rcml_jax.models.two_towers import TwoTowers

#: "flax_safetensors" is what Hugging Face's Flax classes wrote with safe_serialization=True.
LAYOUTS = ("torch", "sharded", "flax", "flax_safetensors")
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass
class Model:
    """A module, its configuration, and its parameters as NumPy arrays.

    params: the tree of "params"; of a ResNet all variables.
    """

    module: nn.Module
    config: Any
    params: dict

    @property
    def variables(self) -> dict:
        return self.params if isinstance(self.config, ResNetConfig) else {"params": self.params}

    def apply(self, *inputs, **options):
        return self.module.apply(self.variables, *inputs, **options)


def make_model(
    config: Any, *, seed: int = 1, shake: Callable[[np.ndarray], np.ndarray] | None = None
) -> Model:
    """A model of ours as it is initialised; shake: of normal noise what is added to parameters."""
    if isinstance(config, CLIPConfig | SiglipConfig):
        size = config.vision_config.image_size
        module = TwoTowers(config)
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3), jnp.uint8)
    elif isinstance(config, ResNetConfig):
        module, inputs = ResNet(config), (jnp.zeros((1, 32, 32, 3)),)
    else:
        module, inputs = build_backbone(config), example_input(config)
    variables = jax.jit(module.init)(jax.random.key(seed), *inputs)
    variables = jax.tree.map(np.asarray, variables)
    if shake:
        rng = np.random.default_rng(seed)
        variables = jax.tree.map(
            lambda x: np.float32(x + shake(rng.normal(size=x.shape))), variables
        )
    return Model(module, config, variables if "batch_stats" in variables else variables["params"])


def torch_tensors(model: Model, *, prefix: str = "", dtype: Any = np.float32) -> dict:
    """Parameters under PyTorch's names, each behind the prefix."""
    tensors = to_torch(model.params)
    return {f"{prefix}{name}": x.astype(dtype) for name, x in tensors.items()}


def save_checkpoint(
    model: Model,
    directory: pathlib.Path,
    *,
    layout: str = "torch",
    prefix: str = "",
    dtype: Any = np.float32,
    shards: int = 3,
) -> None:
    """Write config.json and the weights in one of LAYOUTS; prefix and dtype: of PyTorch's names."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "config.json").write_text(model.config.to_json_string())
    file = directory / "model.safetensors"
    if layout == "torch":
        tensors = torch_tensors(model, prefix=prefix, dtype=dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    elif layout == "sharded":
        save_sharded(torch_tensors(model, prefix=prefix, dtype=dtype), directory, shards)
    elif layout == "flax":
        (directory / "flax_model.msgpack").write_bytes(msgpack_serialize(model.params))
    elif layout == "flax_safetensors":
        flat = {".".join(path): np.asarray(x) for path, x in flatten_dict(model.params).items()}
        save_file(flat, file, metadata={"format": "flax"})
    else:
        raise ValueError(f"layout={layout!r}")


def save_sharded(tensors: dict, directory: pathlib.Path, shards: int) -> list[pathlib.Path]:
    """Arrays over several files and the index that names them, as `save_pretrained` writes both."""
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: x for name, x in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / INDEX).write_text(json.dumps(index))
    return [directory / file for file in files]

"""The towers by the model type of their configurations, and checkpoints of single ones."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from rcml_jax.models.checkpoints import (
    check_directory,
    checkpoint_location,
    expected_params,
    read_config,
    read_params,
)
from rcml_jax.models.towers.bert import Bert
from rcml_jax.models.towers.clip import CLIPText, CLIPVision
from rcml_jax.models.towers.efficientnet import NAME as EFFICIENTNET
from rcml_jax.models.towers.efficientnet import (
    EfficientNetConfig,
    EfficientNetLite0,
    load_efficientnet_lite0,
)
from rcml_jax.models.towers.siglip import SiglipText, SiglipVision
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.models.towers.vit import ViT
from rcml_jax.registry import call, resolve


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A tower: what makes its module, and its modality, "image" or "text".

    make: (configuration, dtype, remat) → module with `tokens` and `token_states`. alone: whether it
    has checkpoints of its own, instead of being a half of CLIP or SigLIP. packs: whether it takes
    several texts in a row. mean: whether its pooled state is the mean of its tokens. prefix: what
    may stand before PyTorch's names.
    """

    make: Callable[..., nn.Module]
    modality: str
    alone: bool = False
    packs: bool = False
    mean: bool = False
    prefix: str = ""


def _efficientnet(config: EfficientNetConfig, dtype: DTypeLike, remat: str) -> nn.Module:
    """`remat` is ignored: the activations are small, and the tower is usually frozen."""
    del config, remat
    return EfficientNetLite0(dtype=dtype)


#: The towers by `model_type`; a new one is a module with `tokens` and `token_states`, and a line.
BACKBONES = {
    "clip_text_model": Backbone(CLIPText, "text", packs=True),
    "clip_vision_model": Backbone(CLIPVision, "image"),
    "siglip_text_model": Backbone(SiglipText, "text"),
    "siglip_vision_model": Backbone(SiglipVision, "image"),
    "vit": Backbone(ViT, "image", alone=True, prefix="vit"),
    EFFICIENTNET: Backbone(_efficientnet, "image", alone=True, mean=True),
    "bert": Backbone(Bert, "text", alone=True, mean=True, prefix="bert"),
    "roberta": Backbone(Bert, "text", alone=True, mean=True, prefix="roberta"),
}

_KIND = "ViT, BERT or RoBERTa"


@dataclasses.dataclass(frozen=True)
class TowerSizes:
    """The configuration of a tower of another package, which has no checkpoint here.

    model_type: the import path "package.module:NAME" of what makes it, as of `Backbone.make`. The
    sizes are those of `config.model`, under the names of `transformers.CLIPConfig`'s.
    """

    model_type: str
    modality: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_position_embeddings: int
    pad_token_id: int
    eos_token_id: int

    @property
    def option(self) -> str:
        """The option that names it."""
        return f"config.model.{self.modality}_tower"


def backbone_of(config: Any) -> Backbone:
    """The tower of a configuration: of `BACKBONES`, or by an import path.

    Raises UserError for a path that cannot be imported, or that names nothing to call.
    """
    if not isinstance(config, TowerSizes):
        found = BACKBONES[config.model_type]
        first = getattr(config, "pooling", "") == "cls"
        return dataclasses.replace(found, mean=False) if first else found
    wanted = "a flax module or a function (config, dtype, remat) that makes one"
    return Backbone(resolve(config.model_type, {}, config.option, wanted=wanted), config.modality)


def build_backbone(config: Any, dtype: DTypeLike = jnp.float32, remat: str = "") -> nn.Module:
    """The tower that a configuration describes. Raises UserError for one that is no tower."""
    make = backbone_of(config).make
    if not isinstance(config, TowerSizes):
        return make(config, dtype, remat)
    found = call(
        config.model_type,
        make,
        config.option,
        "a tower is made of (config, dtype, remat) and is a flax module with the methods tokens "
        "and token_states",
        config,
        dtype,
        remat,
        accepts=lambda found: isinstance(found, nn.Module) and hasattr(found, "token_states"),
    )
    return found


def token_states(tower: nn.Module, config: Any, inputs: Any, project: Callable) -> TokenStates:
    """The token states of a tower. Raises UserError where one of the user's returns no such."""
    if not isinstance(config, TowerSizes):
        return tower.token_states(inputs, project)
    return call(
        config.model_type,
        tower.token_states,
        config.option,
        "its token_states takes (inputs, project) and returns an "
        "rcml_jax.models.towers.transformer.TokenStates",
        inputs,
        project,
        accepts=lambda found: isinstance(found, TokenStates),
    )


def encoder_config(name: str, *, modality: str | None = None) -> Any:
    """The configuration of a ViT, BERT or RoBERTa checkpoint, without its weights.

    "efficientnet-lite0" is that of the packaged checkpoint. Raises UserError where it cannot be
    read, for a checkpoint of another model, and, with `modality` "image" or "text", for one that
    encodes the other.
    """
    if name == EFFICIENTNET and modality != "text":
        return EfficientNetConfig()
    types = [
        name
        for name, backbone in BACKBONES.items()
        if backbone.alone and modality in (None, backbone.modality)
    ]
    return read_config(name, _KIND, types, f"{modality or 'known'} encoder")


def load_encoder(name: str, *, modality: str | None = None) -> tuple[Any, dict]:
    """Read a ViT, BERT or RoBERTa checkpoint, or the packaged EfficientNet-Lite0.

    name: a directory, a name on the hub, or "efficientnet-lite0". Returns the configuration and the
    parameters as float32 NumPy arrays in the layout of the tower, without a pooling layer or head
    that the checkpoint may have. Raises UserError as `encoder_config` and
    `checkpoints.read_params`.
    """
    if name == EFFICIENTNET and modality != "text":
        return EfficientNetConfig(), load_efficientnet_lite0()
    check_directory(pathlib.Path(checkpoint_location(name)), _KIND)
    config = encoder_config(name, modality=modality)
    backbone = BACKBONES[config.model_type]
    expected = expected_params(build_backbone(config), *example_input(config), method="__call__")
    return config, read_params(name, expected, _KIND, prefixes=[backbone.prefix])


def example_input(config: Any) -> tuple[jnp.ndarray, ...]:
    """The smallest input of an encoder: an image, or ids and mask of a text."""
    if backbone_of(config).modality == "image":
        return (jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8),)
    return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

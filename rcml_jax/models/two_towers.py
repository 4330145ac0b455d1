"""A text tower beside an image tower, with every token in one joint space."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import CLIPConfig, SiglipConfig

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.backbones import backbone_of, build_backbone, token_states
from rcml_jax.models.checkpoints import (
    check_directory,
    checkpoint_location,
    expected_params,
    read_config,
    read_params,
)
from rcml_jax.models.towers.hf_flax import HFText, HFVision, check_hugging_face
from rcml_jax.models.towers.transformer import TokenStates, check_remat
from rcml_jax.ops.similarity import l2_normalize


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """The configurations of two towers, and the width of the space that both are projected to.

    The fields have the names of `transformers.CLIPConfig`'s.
    """

    text_config: Any
    vision_config: Any
    projection_dim: int


#: What describes two towers: CLIP's or SigLIP's own, or a pair.
TowersConfig: TypeAlias = CLIPConfig | SiglipConfig | PairConfig


class TwoTowers(nn.Module):
    """CLIP, SigLIP, or any text tower beside any image tower.

    CLIP's parameter tree is that of Hugging Face's `FlaxCLIPModel` (ViT-B/32: 151,277,313
    parameters, logit scale included), SigLIP's has PyTorch's names in that manner. Those of a pair
    lie under CLIP's names, `text_model`, `text_projection`, `vision_model` and `visual_projection`,
    without a logit scale. SigLIP's towers end in the joint space and have no projections. No tower
    has dropout here. remat: as of `transformer.Encoder`. implementation: "hf" for Hugging Face's
    own Flax CLIP.
    """

    config: TowersConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""
    implementation: str = ""

    def setup(self):
        """Create towers, projections and logit scale under the checkpoints' names."""
        config = self.config
        text, vision = config.text_config, config.vision_config
        if self.implementation == "hf":
            self.text_model: nn.Module = HFText(text, self.dtype)
            self.vision_model: nn.Module = HFVision(vision, self.dtype)
        else:
            self.text_model = build_backbone(text, self.dtype, self.remat)
            self.vision_model = build_backbone(vision, self.dtype, self.remat)
        if isinstance(config, SiglipConfig):
            self.logit_scale = self.param("logit_scale", nn.initializers.zeros, (1,), jnp.float32)
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (1,), jnp.float32)
            return
        project = functools.partial(
            nn.Dense,
            config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
        )
        self.text_projection = project()
        self.visual_projection = project()
        if isinstance(config, CLIPConfig):
            scale = jnp.float32(config.logit_scale_init_value)
            self.logit_scale = self.param("logit_scale", lambda _: scale)

    def text_states(
        self, ids: jax.Array | PackedTexts | TokenStates, *, projected: bool = True
    ) -> TokenStates:
        """Token ids (n, T), packed texts for CLIP's → the states of every token (spec: H_T).

        Not `projected`, they have the tower's own width; SigLIP's are the same. Token states in the
        tower's own width are only projected.
        """
        if isinstance(ids, PackedTexts) and not takes_packed(self.config):
            raise UserError("only CLIP's text tower takes packed texts; give one text a row")
        own = isinstance(self.config, SiglipConfig) or not projected
        project = _same if own else self.text_projection
        return _states(self.text_model, self.config.text_config, ids, project)

    def image_states(
        self, pixels: jax.Array | TokenStates, *, projected: bool = True
    ) -> TokenStates:
        """Images (n, H, W, 3), uint8 or already normalised floats → the states of every token.

        Each tower normalises uint8 images by its own statistics. Not `projected`, the states have
        the tower's own width; SigLIP's are the same. Token states as of `text_states`.
        """
        own = isinstance(self.config, SiglipConfig) or not projected
        project = _same if own else self.visual_projection
        return _states(self.vision_model, self.config.vision_config, pixels, project)

    def __call__(
        self, ids: jax.Array | PackedTexts | None = None, pixels: jax.Array | None = None
    ) -> dict:
        """CLIP itself: L2-normalised pooled embeddings `text` and `image`, (n, d) each.

        Those of packed texts are (n, k, d). Either input may be left out; its key is then absent.
        """
        out = {}
        if ids is not None:
            out["text"] = l2_normalize(self.text_states(ids).pooled)
        if pixels is not None:
            out["image"] = l2_normalize(self.image_states(pixels).pooled)
        return out


def _states(tower: nn.Module, config: Any, inputs: Any, project: Callable) -> TokenStates:
    if isinstance(inputs, TokenStates):
        return inputs._replace(states=project(inputs.states))
    return token_states(tower, config, inputs, project)


def _same(states: jax.Array) -> jax.Array:
    return states


def build_towers(
    config: TowersConfig,
    dtype: DTypeLike = jnp.float32,
    remat: str = "",
    implementation: str = "",
) -> TwoTowers:
    """The towers that a configuration describes; implementation: "hf" for Hugging Face's CLIP.

    Raises UserError for an unknown `remat` or `implementation`, and where "hf" cannot be had.
    """
    check_remat(remat)
    if implementation == "hf":
        check_hugging_face(config, remat)
    elif implementation:
        raise UserError(
            f"config.model.towers={implementation!r} is unknown; leave it empty, or use hf for "
            "Hugging Face's Flax CLIP"
        )
    return TwoTowers(config, dtype, remat, implementation)


def joint_width(config: TowersConfig) -> int:
    """The width d of the joint space."""
    if isinstance(config, SiglipConfig):
        return config.vision_config.hidden_size
    return config.projection_dim


def takes_packed(config: TowersConfig) -> bool:
    """Whether the text tower takes several texts in a row (`PackedTexts`); only CLIP's does."""
    return backbone_of(config.text_config).packs


def set_special_tokens(config: TowersConfig, *, end_id: int, pad_id: int) -> None:
    """Tell SigLIP's text tower its tokenizer's ids; its checkpoints' config.json has others."""
    if isinstance(config, SiglipConfig):
        config.text_config.eos_token_id = end_id
        config.text_config.pad_token_id = pad_id


def pretrained_config(name: str) -> CLIPConfig | SiglipConfig:
    """The configuration of a CLIP or SigLIP checkpoint, a directory or hub name.

    Raises UserError where it cannot be read or is of another model, and for parts of other widths
    or of SigLIP without its pooling head.
    """
    config = read_config(name, "CLIP or SigLIP", ("clip", "siglip"))
    if isinstance(config, SiglipConfig):
        text, vision = config.text_config, config.vision_config
        if not getattr(vision, "vision_use_head", True):
            raise UserError(f"the SigLIP checkpoint {name!r} has no pooling head; use one that has")
        if text.projection_size != vision.hidden_size:
            raise UserError(
                f"the text tower of {name!r} ends {text.projection_size} wide, its image tower "
                f"{vision.hidden_size}; use a checkpoint whose towers share a space"
            )
    return config


def load_pretrained(name: str) -> tuple[CLIPConfig | SiglipConfig, dict]:
    """Read a CLIP or SigLIP checkpoint: a local directory, or a name on the Hugging Face hub.

    Returns the configuration and the parameters as float32 NumPy arrays in the layout of
    `TwoTowers`. Raises UserError as `pretrained_config` and `checkpoints.read_params`.
    """
    check_directory(pathlib.Path(checkpoint_location(name)), "CLIP or SigLIP")
    config = pretrained_config(name)
    return config, read_params(name, towers_shapes(config), "CLIP or SigLIP")


def towers_shapes(config: TowersConfig) -> dict:
    """The tree of shapes of the parameters of `TwoTowers`."""
    size = config.vision_config.image_size
    inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3), jnp.uint8)
    return expected_params(TwoTowers(config), *inputs)

"""Any text tower beside any image tower, with every token in one joint space."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    RobertaConfig,
    ViTConfig,
)
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextTransformer

from rcml_jax.data.packing import PackedTexts
from rcml_jax.models.encoders.classification import ImageEncoder, TextEncoder
from rcml_jax.models.encoders.clip import CLIPTowers, TokenStates, VisionTokens
from rcml_jax.models.encoders.remat import check_remat, recomputed


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """The configurations of two towers, and the width of the space that both are projected to.

    The fields have the names of `transformers.CLIPConfig`'s.
    """

    text_config: CLIPTextConfig | BertConfig | RobertaConfig
    vision_config: CLIPVisionConfig | ViTConfig
    projection_dim: int


class PairTowers(CLIPTowers):
    """CLIP's, BERT's or RoBERTa's text tower beside CLIP's or ViT's image tower.

    The methods are those of `CLIPTowers`. The parameters lie under CLIP's names, `text_model`,
    `text_projection`, `vision_model` and `visual_projection`, and in each tower under Hugging
    Face's; there is no logit scale. The projections have no bias. No tower has dropout.
    """

    config: PairConfig

    def setup(self):
        """Create the towers and the projections under CLIP's names."""
        text, vision = self.config.text_config, self.config.vision_config
        text_tower = FlaxCLIPTextTransformer if _is_clip(text) else TextEncoder
        vision_tower = VisionTokens if _is_clip(vision) else ImageEncoder
        self.text_model = text_tower(text, dtype=self.dtype)
        self.vision_model = vision_tower(vision, dtype=self.dtype)
        project = functools.partial(
            nn.Dense,
            self.config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
        )
        self.text_projection = project()
        self.visual_projection = project()

    def text_states(self, ids: jax.Array | PackedTexts, *, projected: bool = True) -> TokenStates:
        """Token ids (n, T), packed texts for CLIP's → states of every token that is no padding.

        BERT and RoBERTa have no token that was trained to stand for the text. Their summary is the
        mean of the token states, sentence-transformers' own embedding, which comes first: (n, T +
        1, d). Not `projected`, the states have the tower's own width.
        """
        config = self.config.text_config
        if _is_clip(config):
            return super().text_states(ids, projected=projected)
        # The first token is never padding, whatever its id: so a mean is never that of nothing.
        mask = jnp.asarray(ids != config.pad_token_id).at[:, 0].set(True)
        with recomputed(self.remat):
            states = self.text_model.tokens(ids, mask)
        if projected:
            states = self.text_projection(states)
        mean = jnp.mean(states, axis=1, keepdims=True, where=mask[..., None])
        return TokenStates(
            jnp.concatenate([mean, states], axis=1),
            jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True),
            jnp.zeros(len(ids), jnp.int32),
        )

    def image_states(self, pixels: jax.Array, *, projected: bool = True) -> TokenStates:
        """Images (n, H, W, 3), uint8 or already normalised floats → states of CLS and patches.

        Each tower normalises uint8 images by its own statistics. Not `projected`, the states have
        the tower's own width.
        """
        if _is_clip(self.config.vision_config):
            return super().image_states(pixels, projected=projected)
        with recomputed(self.remat):
            states = self.vision_model.tokens(pixels)
        if projected:
            states = self.visual_projection(states)
        mask = jnp.ones(states.shape[:2], bool)
        return TokenStates(states, mask, jnp.zeros(len(pixels), jnp.int32))


#: What describes two towers: CLIP's own, or a pair.
TowersConfig = CLIPConfig | PairConfig


def build_towers(
    config: TowersConfig, dtype: jnp.dtype = jnp.float32, remat: str = ""
) -> CLIPTowers:
    """The towers that a configuration describes. Raises UserError for an unknown `remat`."""
    towers = PairTowers if isinstance(config, PairConfig) else CLIPTowers
    return towers(config, dtype, check_remat(remat))


def takes_packed(config: TowersConfig) -> bool:
    """Whether the text tower takes several texts in a row (`PackedTexts`); only CLIP's does."""
    return _is_clip(config.text_config)


def _is_clip(config: object) -> bool:
    return isinstance(config, CLIPTextConfig | CLIPVisionConfig)

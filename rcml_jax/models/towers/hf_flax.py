"""Hugging Face's own Flax CLIP behind the interface of our towers (transformers before 5)."""

import importlib
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.preprocessing import image_statistics, normalize
from rcml_jax.models.towers.clip import CLIPText, CLIPVision
from rcml_jax.models.towers.transformer import TokenStates


def hugging_face_classes() -> Any:
    """The module of transformers with its Flax CLIP. Raises UserError where it has none."""
    try:
        return importlib.import_module("transformers.models.clip.modeling_flax_clip")
    except ImportError as error:
        raise UserError(
            "config.model.towers=hf needs the Flax classes of transformers before 5; "
            'pip install "transformers<5", or leave config.model.towers empty'
        ) from error


def check_hugging_face(config: Any, remat: str) -> None:
    """Raise UserError for towers that are not CLIP's, and for rematerialisation, which it lacks."""
    hugging_face_classes()
    if getattr(config, "model_type", "") != "clip" or remat:
        raise UserError(
            "config.model.towers=hf is Hugging Face's CLIP alone, without rematerialisation; leave "
            "config.model.towers empty"
        )


class HFText(nn.Module):
    """`FlaxCLIPTextTransformer` with the methods and parameters of `CLIPText`."""

    config: Any
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Create the transformer, whose parameters lie directly under this module."""
        self.model = hugging_face_classes().FlaxCLIPTextTransformer(self.config, dtype=self.dtype)
        nn.share_scope(self, self.model)

    def tokens(self, ids: jax.Array) -> jax.Array:
        """Token ids (n, T) → states (n, T, width)."""
        return self.model(ids, None, jnp.arange(ids.shape[1])[None])[0]

    def token_states(self, ids: jax.Array, project: Callable) -> TokenStates:
        """As `CLIPText.token_states`. Raises UserError for packed texts."""
        if isinstance(ids, PackedTexts):
            raise UserError(
                "config.model.towers=hf takes one text a row; set config.batch.texts_per_row to 1"
            )
        return CLIPText.token_states(cast(CLIPText, self), ids, project)


class HFVision(nn.Module):
    """`FlaxCLIPVisionTransformer` with the methods and parameters of `CLIPVision`."""

    config: Any
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Create the transformer, whose parameters lie directly under this module."""
        self.model = hugging_face_classes().FlaxCLIPVisionTransformer(self.config, dtype=self.dtype)
        nn.share_scope(self, self.model)

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, 3) → states (n, T, width), the post layer norm on every one."""
        pixels = normalize(pixels, *image_statistics(self.config), self.dtype)
        hidden = self.model.embeddings(pixels)
        hidden = self.model.encoder(inputs_embeds=self.model.pre_layrnorm(hidden))[0]
        return self.model.post_layernorm(hidden)

    def token_states(self, pixels: jax.Array, project: Callable) -> TokenStates:
        """As `CLIPVision.token_states`."""
        return CLIPVision.token_states(cast(CLIPVision, self), pixels, project)

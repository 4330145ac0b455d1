"""CLIP's towers as token-level Flax modules, with every token in the joint space."""

import pathlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import CLIPConfig
from transformers.models.clip.modeling_flax_clip import (
    FlaxCLIPModel,
    FlaxCLIPTextTransformer,
    FlaxCLIPVisionTransformer,
)

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.encoders.checkpoints import check_directory, read, unreachable
from rcml_jax.models.encoders.packed import apart, owners, positions
from rcml_jax.models.encoders.remat import recomputed
from rcml_jax.models.encoders.sizes import check_sizes, transformer_sizes
from rcml_jax.similarity import l2_normalize

# The statistics that CLIP's own image processor uses.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_LEGACY_EOS = 2


class TokenStates(NamedTuple):
    """Token-level states of n inputs in the joint space.

    states: (n, T, d) projected hidden states; mask: (n, T) bool, false on padding;
    summary: (n,) int32, the position of the summary token (EOT for text, CLS for images).
    Of n rows of k packed texts mask is (n, k, T), the tokens of each text, and summary (n, k).
    """

    states: jax.Array
    mask: jax.Array
    summary: jax.Array

    def summary_states(self) -> jax.Array:
        """The states of the summary tokens, (n, d) or (n, k, d): CLIP's own embedding, raw."""
        places = self.summary.reshape(len(self.states), -1, 1)
        found = jnp.take_along_axis(self.states, places, axis=1)
        return found.reshape(*self.summary.shape, -1)


class VisionTokens(FlaxCLIPVisionTransformer):
    """Hugging Face's vision transformer, with the post layer norm on every token."""

    def __call__(self, pixels, deterministic: bool = True):
        """Normalised images (n, H, W, 3) → hidden states (n, T, width) of CLS and patches."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        hidden = self.encoder(inputs_embeds=hidden, deterministic=deterministic)[0]
        return self.post_layernorm(hidden)


class CLIPTowers(nn.Module):
    """CLIP's text and vision towers with every token projected to the joint space.

    The parameter tree has the names and shapes of Hugging Face's `FlaxCLIPModel`, so that its
    checkpoints load as they are; ViT-B/32 has 151,277,313 parameters, logit scale included.
    remat: "layers" or "dots" for a backward pass in less memory, see `remat.recomputed`.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = ""

    def setup(self):
        """Create the submodules under Hugging Face's names."""
        self.text_model = FlaxCLIPTextTransformer(self.config.text_config, dtype=self.dtype)
        self.vision_model = VisionTokens(self.config.vision_config, dtype=self.dtype)
        project = lambda: nn.Dense(  # noqa: E731
            self.config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
        )
        self.text_projection = project()
        self.visual_projection = project()
        scale = jnp.float32(self.config.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", lambda _: scale)

    def text_states(self, ids: jax.Array | PackedTexts, *, projected: bool = True) -> TokenStates:
        """Token ids (n, T) → states of every token up to EOT (spec: H_T).

        The tower is causal, so what follows EOT changes nothing before it and needs no mask inside.
        Of packed texts each has the states that it has alone. Not `projected`, they have the
        tower's own width.
        """
        if isinstance(ids, PackedTexts):
            return self._packed_states(ids, projected)
        with recomputed(self.remat):
            hidden = self.text_model(ids, None, jnp.arange(ids.shape[1])[None])[0]
        eos = self.config.text_config.eos_token_id
        # Before transformers 4.31 EOT was found as the largest id; such configurations say 2.
        summary = jnp.argmax(ids if eos == _LEGACY_EOS else ids == eos, axis=1).astype(jnp.int32)
        mask = jnp.arange(ids.shape[1]) <= summary[:, None]
        return TokenStates(self.text_projection(hidden) if projected else hidden, mask, summary)

    def _packed_states(self, texts: PackedTexts, projected: bool) -> TokenStates:
        owner = owners(texts)
        with recomputed(self.remat), apart(owner):
            hidden = self.text_model(texts.ids, None, positions(texts, owner))[0]
        mask = owner[:, None, :] == jnp.arange(texts.ends.shape[1])[:, None]
        states = self.text_projection(hidden) if projected else hidden
        return TokenStates(states, mask, texts.ends)

    def image_states(self, pixels: jax.Array, *, projected: bool = True) -> TokenStates:
        """Images (n, H, W, 3), uint8 or already normalised floats → states of CLS and patches.

        Not `projected`, they have the tower's own width.
        """
        if pixels.dtype == jnp.uint8:
            mean, std = jnp.asarray(IMAGE_MEAN), jnp.asarray(IMAGE_STD)
            pixels = (pixels.astype(jnp.float32) / 255.0 - mean) / std
        with recomputed(self.remat):
            states = self.vision_model(pixels.astype(self.dtype))
        if projected:
            states = self.visual_projection(states)
        n, tokens = states.shape[:2]
        return TokenStates(states, jnp.ones((n, tokens), bool), jnp.zeros((n,), jnp.int32))

    def __call__(
        self, ids: jax.Array | PackedTexts | None = None, pixels: jax.Array | None = None
    ) -> dict:
        """CLIP itself: L2-normalised summary embeddings `text` and `image`, (n, d) each.

        Those of packed texts are (n, k, d). Either input may be left out; its key is then absent.
        """
        out = {}
        if ids is not None:
            out["text"] = l2_normalize(self.text_states(ids).summary_states())
        if pixels is not None:
            out["image"] = l2_normalize(self.image_states(pixels).summary_states())
        return out


def small_config(
    *,
    vocab_size: int,
    eos_token_id: int,
    width: int = 128,
    layers: int = 3,
    heads: int = 4,
    embed_dim: int = 128,
    image_size: int = 32,
    patch_size: int = 8,
    max_length: int = 32,
    activation: str = "quick_gelu",
) -> CLIPConfig:
    """A configuration for towers trained from scratch; both towers share width and depth.

    Raises UserError where the sizes do not fit each other.
    """
    check_sizes(width, heads, image_size, patch_size)
    if eos_token_id == _LEGACY_EOS:
        raise UserError(
            "the tokenizer's end token has the id 2, which CLIP's text tower reads as "
            "'the largest id ends the text'; give the end token another id"
        )
    shared = transformer_sizes(width, layers, heads)
    shared |= {"hidden_act": activation, "projection_dim": embed_dim}
    text = shared | {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_length,
        "eos_token_id": eos_token_id,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = shared | {"image_size": image_size, "patch_size": patch_size}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed_dim)


def pretrained_config(name: str) -> CLIPConfig:
    """The configuration of a CLIP checkpoint, a directory or hub name, without its weights."""
    try:
        return CLIPConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise unreachable(name, error, "CLIP") from error


def load_pretrained(name: str) -> tuple[CLIPConfig, dict]:
    """Read a CLIP checkpoint: a local directory, or a name on the Hugging Face hub.

    Flax weights (`flax_model.msgpack`) and a single `model.safetensors` with PyTorch names are
    read, the latter without torch. Returns the configuration and the parameters as float32 NumPy
    arrays in the layout of `CLIPTowers`. Raises UserError where the checkpoint cannot be read.
    """
    check_directory(pathlib.Path(name), "CLIP")
    return read(FlaxCLIPModel, name, "CLIP")

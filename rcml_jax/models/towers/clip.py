"""CLIP's text and image transformers with the states of all tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.preprocessing import CLIP_STATISTICS, image_statistics, normalize
from rcml_jax.models.towers.transformer import (
    Encoder,
    LayerConfig,
    LayerNames,
    TokenStates,
    packed_positions,
    segment_ids,
    segment_mask,
)

# The statistics that CLIP's own image processor uses.
IMAGE_MEAN, IMAGE_STD = CLIP_STATISTICS
# Before transformers 4.31 EOT was found as the largest id; such configurations say 2.
LEGACY_EOS = 2

LAYER_NAMES = LayerNames(
    query=("self_attn", "q_proj"),
    key=("self_attn", "k_proj"),
    value=("self_attn", "v_proj"),
    out=("self_attn", "out_proj"),
    attention_norm=("layer_norm1",),
    up=("mlp", "fc1"),
    down=("mlp", "fc2"),
    mlp_norm=("layer_norm2",),
)


def clip_layers(
    config: CLIPTextConfig | CLIPVisionConfig, dtype: DTypeLike, *, causal: bool = False
) -> LayerConfig:
    """The layers of CLIP and SigLIP."""
    return LayerConfig(
        width=config.hidden_size,
        hidden=config.intermediate_size,
        heads=config.num_attention_heads,
        activation=config.hidden_act,
        epsilon=config.layer_norm_eps,
        names=LAYER_NAMES,
        causal=causal,
        init=nn.initializers.normal(0.01),
        dtype=dtype,
    )


def check_image(pixels: jax.Array, size: int) -> None:
    """Raise UserError for images that are not (n, size, size, 3)."""
    if pixels.shape[1:] != (size, size, 3):
        raise UserError(f"the image tower takes {size}×{size} images, not {pixels.shape[1:]}")


def check_length(length: int, longest: int) -> None:
    """Raise UserError for texts of more tokens than a tower has positions for."""
    if length > longest:
        raise UserError(
            f"a text of {length} tokens is too long for the text tower, which takes {longest}; "
            "lower model.max_length"
        )


class TextEmbeddings(nn.Module):
    """Token and position embeddings, under CLIP's names."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Ids (n, T) and positions, (n, T) or (1, T) → (n, T, width)."""
        config, init = self.config, nn.initializers.normal(0.01)
        embed = lambda rows, name: nn.Embed(  # noqa: E731
            rows, config.hidden_size, embedding_init=init, dtype=self.dtype, name=name
        )
        tokens = embed(config.vocab_size, "token_embedding")(ids)
        return tokens + embed(config.max_position_embeddings, "position_embedding")(positions)


class PatchEmbeddings(nn.Module):
    """Patches row by row with their positions, behind a class token where there is one."""

    config: CLIPVisionConfig
    class_token: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised images (n, size, size, 3) → (n, T, width)."""
        config = self.config
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        init = nn.initializers.normal(0.01)
        found = nn.Conv(
            width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            use_bias=not self.class_token,
            dtype=self.dtype,
            kernel_init=init,
            name="patch_embedding",
        )(pixels)
        found = found.reshape(len(pixels), -1, width)
        if self.class_token:
            token = self.param(
                "class_embedding", nn.initializers.normal(0.02), (width,), jnp.float32
            )
            token = jnp.broadcast_to(token.astype(found.dtype), (len(pixels), 1, width))
            found = jnp.concatenate([token, found], axis=1)
        rows = nn.Embed(
            (config.image_size // config.patch_size) ** 2 + self.class_token,
            width,
            embedding_init=init,
            dtype=self.dtype,
            name="position_embedding",
        )
        return found + rows(jnp.arange(found.shape[1])[None])


class CLIPText(nn.Module):
    """CLIP's causal text transformer; the parameters are those of `FlaxCLIPTextTransformer`."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def tokens(self, ids: jax.Array | PackedTexts) -> jax.Array:
        """Token ids (n, T) → states (n, T, width) after the final layer norm.

        Each packed text gets the states that it would have alone.
        """
        config, mask = self.config, None
        if isinstance(ids, PackedTexts):
            segments = segment_ids(ids)
            mask, positions = segment_mask(segments), packed_positions(ids, segments)
            ids = jnp.asarray(ids.ids)
        else:
            check_length(ids.shape[1], config.max_position_embeddings)
            positions = jnp.arange(ids.shape[1])[None]
        x = TextEmbeddings(config, self.dtype, name="embeddings")(ids, positions)
        layers = clip_layers(config, self.dtype, causal=True)
        x = Encoder(layers, config.num_hidden_layers, remat=self.remat, name="encoder")(x, mask)
        return nn.LayerNorm(
            epsilon=config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm"
        )(x)

    def token_states(self, ids: jax.Array | PackedTexts, project: Callable) -> TokenStates:
        """The projected states of every token up to EOT, which is the pooled one.

        The tower is causal, so what follows EOT changes nothing before it and needs no mask inside.
        """
        states = project(self.tokens(ids))
        if isinstance(ids, PackedTexts):
            texts = jnp.arange(ids.ends.shape[1], dtype=jnp.int32)
            mask = segment_ids(ids)[:, None, :] == texts[None, :, None]
            return TokenStates(states, mask, jnp.asarray(ids.ends))
        end = text_ends(self.config, ids)
        mask = jnp.arange(ids.shape[1], dtype=jnp.int32)[None] <= end[:, None]
        return TokenStates(states, mask, end)


class CLIPVision(nn.Module):
    """CLIP's image transformer; the parameters are those of `FlaxCLIPVisionTransformer`."""

    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, 3), uint8 or already normalised → states (n, T, width).

        CLS first, then the patches row by row, each after the post layer norm; CLIP itself applies
        that norm to CLS alone.
        """
        config = self.config
        check_image(pixels, config.image_size)
        pixels = normalize(pixels, *image_statistics(config), self.dtype)
        norm = lambda name: nn.LayerNorm(  # noqa: E731
            epsilon=config.layer_norm_eps, dtype=self.dtype, name=name
        )
        x = PatchEmbeddings(config, True, self.dtype, name="embeddings")(pixels)
        x = norm("pre_layrnorm")(x)  # the checkpoints' spelling
        layers = clip_layers(config, self.dtype)
        x = Encoder(layers, config.num_hidden_layers, remat=self.remat, name="encoder")(x)
        return norm("post_layernorm")(x)

    def token_states(self, pixels: jax.Array, project: Callable) -> TokenStates:
        """The projected states of CLS, which is the pooled one, and of the patches."""
        states = project(self.tokens(pixels))
        mask = jnp.ones(states.shape[:2], bool)
        return TokenStates(states, mask, jnp.zeros(len(pixels), jnp.int32))


def text_ends(config: CLIPTextConfig, ids: jax.Array) -> jax.Array:
    """The places (n,) of EOT in texts (n, T)."""
    end = config.eos_token_id
    return jnp.argmax(ids if end == LEGACY_EOS else ids == end, axis=1).astype(jnp.int32)


def end_token(config: CLIPTextConfig) -> int:
    """The id at which CLIP's text tower ends a text."""
    legacy = config.eos_token_id == LEGACY_EOS
    return config.vocab_size - 1 if legacy else config.eos_token_id


def small_clip_config(
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
    if eos_token_id == LEGACY_EOS:
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


def transformer_sizes(width: int, layers: int, heads: int, dropout: float | None = None) -> dict:
    """Names and values as CLIP's, ViT's and BERT's configurations take them."""
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if dropout is not None:
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return sizes


def check_sizes(width: int, heads: int, image_size: int = 1, patch_size: int = 1) -> None:
    """Raises UserError where the sizes do not fit each other."""
    if width % heads:
        raise UserError(f"model.width={width} is not a multiple of model.heads={heads}; change one")
    if image_size % patch_size:
        raise UserError(
            f"model.image_size={image_size} is not a multiple of model.patch_size={patch_size}"
        )

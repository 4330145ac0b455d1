"""ViT, with the states of all tokens."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import ViTConfig

from rcml_jax.models.preprocessing import image_statistics, normalize
from rcml_jax.models.towers.clip import check_image, check_sizes, transformer_sizes
from rcml_jax.models.towers.transformer import Encoder, LayerConfig, LayerNames, TokenStates

_LAYER_NAMES = LayerNames(
    query=("attention", "attention", "query"),
    key=("attention", "attention", "key"),
    value=("attention", "attention", "value"),
    out=("attention", "output", "dense"),
    attention_norm=("layernorm_before",),
    up=("intermediate", "dense"),
    down=("output", "dense"),
    mlp_norm=("layernorm_after",),
)


class ViT(nn.Module):
    """A ViT without pooling layer: images → the CLS state after the final layer norm.

    The parameter tree is that of Hugging Face's `FlaxViTModel(config, add_pooling_layer=False)`;
    ViT-B/16 has 85,798,656 parameters. Training (`deterministic=False`) draws from the "dropout"
    key. remat: as of `Encoder`.
    """

    config: ViTConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def tokens(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Images (n, H, W, 3) → states (n, T, width) of CLS and of the patches, row by row.

        uint8 images are normalised; floats are taken as they are.
        """
        config = self.config
        check_image(pixels, config.image_size)
        pixels = self.normalize(pixels).astype(self.dtype)
        init = _init(config)
        x = _ViTEmbeddings(config, self.dtype, name="embeddings")(pixels, deterministic)
        layers = LayerConfig(
            width=config.hidden_size,
            hidden=config.intermediate_size,
            heads=config.num_attention_heads,
            activation=config.hidden_act,
            epsilon=config.layer_norm_eps,
            names=_LAYER_NAMES,
            qkv_bias=config.qkv_bias,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            init=init,
            dtype=self.dtype,
        )
        encoder = Encoder(layers, config.num_hidden_layers, "layer", self.remat, name="encoder")
        x = encoder(x, None, deterministic)
        return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="layernorm")(x)

    def normalize(self, pixels: jax.Array) -> jax.Array:
        """uint8 images by the mean and deviation of the configuration → float32."""
        return normalize(pixels, *image_statistics(self.config), jnp.float32)

    def token_states(self, pixels: jax.Array, project: Callable) -> TokenStates:
        """The projected states of CLS, which is the pooled one, and of the patches."""
        states = project(self.tokens(pixels))
        mask = jnp.ones(states.shape[:2], bool)
        return TokenStates(states, mask, jnp.zeros(len(pixels), jnp.int32))

    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Images as `tokens` takes them → (n, width)."""
        return self.tokens(pixels, deterministic=deterministic)[:, 0]


def _init(config: ViTConfig) -> Callable:
    return nn.initializers.variance_scaling(
        config.initializer_range**2, "fan_in", "truncated_normal"
    )


class _ViTEmbeddings(nn.Module):
    config: ViTConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pixels: jax.Array, deterministic: bool) -> jax.Array:
        config, init = self.config, _init(self.config)
        width = config.hidden_size
        cls = self.param("cls_token", init, (1, 1, width), jnp.float32).astype(self.dtype)
        patches = _PatchEmbeddings(config, self.dtype, name="patch_embeddings")(pixels)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(pixels), 1, width)), patches], axis=1)
        shape = (1, x.shape[1], width)
        positions = self.param("position_embeddings", init, shape, jnp.float32)
        x = x + positions.astype(self.dtype)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)


class _PatchEmbeddings(nn.Module):
    config: ViTConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        patch = (config.patch_size, config.patch_size)
        found = nn.Conv(
            config.hidden_size,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=_init(config),
            name="projection",
        )(pixels)
        return found.reshape(len(pixels), -1, config.hidden_size)


def small_vit_config(
    *,
    width: int,
    layers: int,
    heads: int,
    image_size: int,
    patch_size: int,
    dropout: float = 0.0,
) -> ViTConfig:
    """A configuration for a ViT trained from scratch; UserError as `small_clip_config`."""
    check_sizes(width, heads, image_size, patch_size)
    return ViTConfig(
        **transformer_sizes(width, layers, heads, dropout),
        image_size=image_size,
        patch_size=patch_size,
        # It is divided by the root of the fan-in, as in Hugging Face's Flax class and unlike in
        # PyTorch; with the default of 0.02 every matrix begins near zero and the model learns late.
        initializer_range=0.02 * width**0.5,
    )

"""ViT, BERT and RoBERTa as encoders for classification: one state for each input."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import AutoConfig, BertConfig, RobertaConfig, ViTConfig
from transformers.models.bert.modeling_flax_bert import FlaxBertModel, FlaxBertModule
from transformers.models.roberta.modeling_flax_roberta import (
    FlaxRobertaModel,
    FlaxRobertaModule,
    create_position_ids_from_input_ids,
)
from transformers.models.vit.modeling_flax_vit import FlaxViTModel, FlaxViTModule

from rcml_jax.errors import UserError
from rcml_jax.models.encoders.checkpoints import check_directory, read, unreachable
from rcml_jax.models.encoders.remat import recomputed
from rcml_jax.models.encoders.sizes import check_sizes, transformer_sizes

_MODELS = {"vit": FlaxViTModel, "bert": FlaxBertModel, "roberta": FlaxRobertaModel}
_MODALITIES = {"image": ("vit",), "text": ("bert", "roberta"), None: tuple(_MODELS)}
_KIND = "ViT, BERT or RoBERTa"


def normalize_pixels(pixels: jax.Array) -> jax.Array:
    """Images (n, H, W, 3) uint8 → float32 in [-1, 1], as ViT's own processor has them."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


class ImageEncoder(nn.Module):
    """A ViT without pooling layer: images → the CLS state after the final layer norm.

    The parameter tree is that of Hugging Face's `FlaxViTModel(config, add_pooling_layer=False)`;
    ViT-B/16 has 85,798,656 parameters. Training (`deterministic=False`) draws from the "dropout"
    key. remat: as of `CLIPTowers`.
    """

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = ""

    def setup(self):
        """Create the transformer, whose parameters lie directly under this module."""
        self.model = FlaxViTModule(self.config, dtype=self.dtype, add_pooling_layer=False)
        nn.share_scope(self, self.model)

    def tokens(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Images (n, H, W, 3) → states (n, T, width) of CLS and of the patches, row by row.

        uint8 images are normalised by `normalize_pixels`; floats are taken as they are, which is
        also the way for a checkpoint with statistics of its own.
        """
        size = self.config.image_size
        if pixels.shape[1:] != (size, size, self.config.num_channels):
            raise UserError(f"the image encoder takes {size}×{size} images, not {pixels.shape[1:]}")
        if pixels.dtype == jnp.uint8:
            pixels = normalize_pixels(pixels)
        with recomputed(self.remat):
            return self.model(pixels.astype(self.dtype), deterministic)[0]

    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Images as `tokens` takes them → (n, width)."""
        return self.tokens(pixels, deterministic=deterministic)[:, 0]


class TextEncoder(nn.Module):
    """A BERT or RoBERTa without pooling layer: texts → the last state of their first token.

    The parameter tree is that of Hugging Face's Flax model of the same configuration without its
    pooling layer; bert-base-uncased has 108,891,648 parameters. Training (`deterministic=False`)
    draws from the "dropout" key. remat: as of `CLIPTowers`.
    """

    config: BertConfig | RobertaConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = ""

    def setup(self):
        """Create the transformer, whose parameters lie directly under this module."""
        modules = {"bert": FlaxBertModule, "roberta": FlaxRobertaModule}
        module = modules[self.config.model_type]
        self.model = module(self.config, dtype=self.dtype, add_pooling_layer=False)
        nn.share_scope(self, self.model)

    def tokens(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Token ids and mask (n, T), the mask 0 or false on padding → states (n, T, width)."""
        if ids.shape[1] > max_text_length(self.config):
            raise UserError(
                f"a text of {ids.shape[1]} tokens is too long for the text encoder, which takes "
                f"{max_text_length(self.config)}; lower the longest length"
            )
        if self.config.model_type == "roberta":
            positions = create_position_ids_from_input_ids(ids, self.config.pad_token_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = mask.astype(jnp.int32)
        with recomputed(self.remat):
            return self.model(ids, mask, None, positions, deterministic=deterministic)[0]

    def __call__(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Token ids and mask as `tokens` takes them, [CLS] or <s> first → (n, width)."""
        return self.tokens(ids, mask, deterministic=deterministic)[:, 0]


def max_text_length(config: BertConfig | RobertaConfig) -> int:
    """The most tokens that a text encoder has positions for."""
    # RoBERTa counts from the position after the padding's own, and never uses those below.
    unused = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return config.max_position_embeddings - unused


def small_vit_config(
    *,
    width: int,
    layers: int,
    heads: int,
    image_size: int,
    patch_size: int,
    dropout: float = 0.0,
) -> ViTConfig:
    """A configuration for an `ImageEncoder` trained from scratch; UserError as `small_config`."""
    check_sizes(width, heads, image_size, patch_size)
    return ViTConfig(
        **transformer_sizes(width, layers, heads, dropout),
        image_size=image_size,
        patch_size=patch_size,
        # The Flax class divides this by the root of the fan-in, which PyTorch's does not; with the
        # default of 0.02 every matrix begins near zero and the model learns late.
        initializer_range=0.02 * width**0.5,
    )


def small_bert_config(
    *,
    vocab_size: int,
    pad_token_id: int,
    width: int,
    layers: int,
    heads: int,
    max_length: int,
    dropout: float = 0.0,
) -> BertConfig:
    """A configuration for a `TextEncoder` trained from scratch; UserError as `small_config`."""
    check_sizes(width, heads)
    return BertConfig(
        **transformer_sizes(width, layers, heads, dropout),
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        max_position_embeddings=max_length,
        type_vocab_size=1,
    )


def encoder_config(
    name: str, *, modality: str | None = None
) -> ViTConfig | BertConfig | RobertaConfig:
    """The configuration of a ViT, BERT or RoBERTa checkpoint, without its weights.

    Raises UserError where it cannot be read, for a checkpoint of another model, and, with
    `modality` "image" or "text", for one that encodes the other.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(name, error, _KIND) from error
    if config.model_type not in _MODALITIES[modality]:
        raise UserError(
            f"{name!r} is a checkpoint of the type {config.model_type!r}, which is no "
            f"{modality or 'known'} encoder; use vit for images, bert or roberta for texts"
        )
    return config


def load_encoder(
    name: str, *, modality: str | None = None
) -> tuple[ViTConfig | BertConfig | RobertaConfig, dict]:
    """Read a ViT, BERT or RoBERTa checkpoint, a directory or a name on the hub.

    The same files as in `load_pretrained` are read. Returns the configuration and the parameters
    as float32 NumPy arrays in the layout of `ImageEncoder` or `TextEncoder`, which is Hugging
    Face's own (`embeddings`, `encoder` and, for ViT, `layernorm`); a pooling layer or a head that
    the checkpoint may have is left out. Raises UserError as `encoder_config`, and where the
    weights cannot be read.
    """
    check_directory(pathlib.Path(name), _KIND)
    config = encoder_config(name, modality=modality)
    options = {"config": config, "add_pooling_layer": False}
    return read(_MODELS[config.model_type], name, _KIND, **options)

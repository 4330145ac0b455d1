"""SigLIP's text and image transformers; SigLIP 2 of fixed resolution has the same architecture."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import SiglipTextConfig, SiglipVisionConfig

from rcml_jax.models.preprocessing import HALF_STATISTICS, image_statistics, normalize
from rcml_jax.models.towers.clip import (
    PatchEmbeddings,
    TextEmbeddings,
    check_image,
    check_length,
    clip_layers,
)
from rcml_jax.models.towers.transformer import Encoder, TokenStates, activation, with_pooled

IMAGE_MEAN, IMAGE_STD = HALF_STATISTICS


class SiglipText(nn.Module):
    """SigLIP's text transformer, which is not causal, and its linear head.

    The parameters have the names of Hugging Face's PyTorch class in the manner of its Flax classes.
    """

    config: SiglipTextConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    def setup(self):
        """Create the parts under the checkpoints' names."""
        config = self.config
        self.embeddings = TextEmbeddings(config, self.dtype)
        self.encoder = Encoder(
            clip_layers(config, self.dtype), config.num_hidden_layers, remat=self.remat
        )
        self.final_layer_norm = nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype)
        self.head = nn.Dense(config.projection_size, dtype=self.dtype)

    def tokens(self, ids: jax.Array) -> jax.Array:
        """Token ids (n, T) → states (n, max_position_embeddings, width).

        Texts are padded to all positions and padding is not masked, as in the training of SigLIP.
        """
        length, longest = ids.shape[1], self.config.max_position_embeddings
        check_length(length, longest)
        # What follows a text may be padded with another id than the tower was trained with.
        ids = jnp.where(self._mask(ids), ids, self.config.pad_token_id)
        ids = jnp.pad(
            ids, ((0, 0), (0, longest - length)), constant_values=self.config.pad_token_id
        )
        x = self.embeddings(ids, jnp.arange(longest)[None])
        return self.final_layer_norm(self.encoder(x))

    def token_states(self, ids: jax.Array, project: Callable) -> TokenStates:
        """The tokens of a text and, before them, the pooled state: that of the last position.

        All of them pass the tower's head, then `project`.
        """
        states = self.tokens(ids)
        mask = self._mask(ids)
        used = jnp.concatenate([states[:, -1:], states[:, : ids.shape[1]]], axis=1)
        used = project(self.head(used))
        return with_pooled(used[:, 1:], mask, used[:, 0])

    def _mask(self, ids: jax.Array) -> jax.Array:
        """(n, T) bool, true up to the first end token; where there is none, everywhere."""
        is_end = ids == self.config.eos_token_id
        before = jnp.cumsum(is_end, axis=1, dtype=jnp.int32) - is_end.astype(jnp.int32)
        return before == 0


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: one learned probe attends to all tokens, then an MLP."""

    config: SiglipVisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Create the probe and the layers under the checkpoints' names."""
        config = self.config
        width, init = config.hidden_size, nn.initializers.xavier_uniform()
        self.probe = self.param("probe", init, (1, 1, width), jnp.float32)
        self.attention = _PackedProjections(width, self.dtype)
        self.layernorm = nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype)
        self.mlp = _MLP(config, self.dtype)

    def __call__(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States (n, T, width) → the pooled states (n, width) and the tokens' own (n, T, width).

        A token's own state is what the head returns where the probe attends to it alone, so that
        tokens and pooled state lie in one space.
        """
        n, tokens, width = states.shape
        heads = self.config.num_attention_heads
        query, _, _ = self.attention.project(self.probe.astype(self.dtype))
        _, key, value = self.attention.project(states)
        query = query.reshape(heads, -1)
        key = key.reshape(n, tokens, heads, -1)
        logits = jnp.einsum("hd,nthd->nht", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(width // heads), axis=-1).astype(self.dtype)
        pooled = jnp.einsum("nht,nthd->nhd", weights, value.reshape(n, tokens, heads, -1))
        values = jnp.concatenate([pooled.reshape(n, 1, width), value], axis=1)
        out = self.attention.out_proj(values)
        out = out + self.mlp(self.layernorm(out))
        return out[:, 0], out[:, 1:]


class _PackedProjections(nn.Module):
    """The projections of PyTorch's `MultiheadAttention`: queries, keys and values in one matrix."""

    width: int
    dtype: DTypeLike

    def setup(self):
        init = nn.initializers.xavier_uniform()
        self.in_proj = nn.Dense(3 * self.width, dtype=self.dtype, kernel_init=init)
        self.out_proj = nn.Dense(self.width, dtype=self.dtype, kernel_init=init)

    def project(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(self.in_proj(x), 3, axis=-1)


class _MLP(nn.Module):
    config: SiglipVisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        x = nn.Dense(config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        x = activation(config.hidden_act)(x)
        return nn.Dense(config.hidden_size, dtype=self.dtype, name="fc2")(x)


class SiglipVision(nn.Module):
    """SigLIP's image transformer without class token, and its attention-pooling head.

    The parameters have the names of Hugging Face's PyTorch class in the manner of its Flax classes;
    PyTorch's `head.attention.in_proj_weight` is `head/attention/in_proj/kernel`.
    """

    config: SiglipVisionConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    def setup(self):
        """Create the parts under the checkpoints' names."""
        config = self.config
        self.embeddings = PatchEmbeddings(config, False, self.dtype)
        self.encoder = Encoder(
            clip_layers(config, self.dtype), config.num_hidden_layers, remat=self.remat
        )
        self.post_layernorm = nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype)
        self.head = PoolingHead(config, self.dtype)

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, 3), uint8 or normalised → states of the patches (n, T, width)."""
        check_image(pixels, self.config.image_size)
        x = self.embeddings(normalize(pixels, *image_statistics(self.config), self.dtype))
        return self.post_layernorm(self.encoder(x))

    def token_states(self, pixels: jax.Array, project: Callable) -> TokenStates:
        """The patches in the head's space and, before them, the pooled state; all projected."""
        pooled, states = self.head(self.tokens(pixels))
        used = project(jnp.concatenate([pooled[:, None], states], axis=1))
        mask = jnp.ones(used.shape[:2], bool)
        return TokenStates(used, mask, jnp.zeros(len(pixels), jnp.int32))

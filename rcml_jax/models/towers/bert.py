"""BERT and RoBERTa, with the states of all tokens."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import BertConfig, RobertaConfig

from rcml_jax.models.towers.clip import check_length, check_sizes, transformer_sizes
from rcml_jax.models.towers.transformer import (
    Encoder,
    LayerConfig,
    LayerNames,
    TokenStates,
    with_pooled,
)

_LAYER_NAMES = LayerNames(
    query=("attention", "self", "query"),
    key=("attention", "self", "key"),
    value=("attention", "self", "value"),
    out=("attention", "output", "dense"),
    attention_norm=("attention", "output", "LayerNorm"),
    up=("intermediate", "dense"),
    down=("output", "dense"),
    mlp_norm=("output", "LayerNorm"),
)


class Bert(nn.Module):
    """A BERT or RoBERTa without pooling layer: texts → the last state of their first token.

    The parameter tree is that of Hugging Face's Flax model of the same configuration without its
    pooling layer; bert-base-uncased has 108,891,648 parameters. Training (`deterministic=False`)
    draws from the "dropout" key. remat: as of `Encoder`.
    """

    config: BertConfig | RobertaConfig
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def tokens(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Token ids and mask (n, T), the mask 0 or false on padding → states (n, T, width)."""
        config = self.config
        check_length(ids.shape[1], max_text_length(config))
        if config.model_type == "roberta":
            # Positions count from the padding id on, and padding has that very position.
            used = ids != config.pad_token_id
            positions = jnp.where(used, jnp.cumsum(used, axis=1), 0) + config.pad_token_id
        else:
            positions = jnp.arange(ids.shape[1])[None]
        x = _BertEmbeddings(config, self.dtype, name="embeddings")(ids, positions, deterministic)
        layers = LayerConfig(
            width=config.hidden_size,
            hidden=config.intermediate_size,
            heads=config.num_attention_heads,
            activation=config.hidden_act,
            epsilon=config.layer_norm_eps,
            names=_LAYER_NAMES,
            pre_norm=False,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            init=nn.initializers.normal(config.initializer_range),
            dtype=self.dtype,
        )
        encoder = Encoder(layers, config.num_hidden_layers, "layer", self.remat, name="encoder")
        return encoder(x, mask.astype(bool)[:, None, None, :], deterministic)

    def token_states(self, ids: jax.Array, project: Callable) -> TokenStates:
        """The projected states of every token that is no padding and, before them, their mean.

        BERT and RoBERTa have no token that was trained to stand for the text; the mean is what
        sentence-transformers takes by default. Where the configuration has `pooling="cls"`, as the
        files of some sentence models say, the pooled state is the first token.
        """
        # The first token is never padding, whatever its id: so a mean is never that of nothing.
        mask = jnp.asarray(ids != self.config.pad_token_id).at[:, 0].set(True)
        states = project(self.tokens(ids, mask))
        if getattr(self.config, "pooling", "mean") == "cls":
            return TokenStates(states, mask, jnp.zeros(len(ids), jnp.int32))
        return with_pooled(states, mask)

    def __call__(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Token ids and mask as `tokens` takes them, [CLS] or <s> first → (n, width)."""
        return self.tokens(ids, mask, deterministic=deterministic)[:, 0]


class _BertEmbeddings(nn.Module):
    config: BertConfig | RobertaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(
                rows, config.hidden_size, embedding_init=init, dtype=self.dtype, name=name
            )

        x = embed(config.vocab_size, "word_embeddings")(ids)
        x = x + embed(config.type_vocab_size, "token_type_embeddings")(jnp.zeros_like(ids))
        x = x + embed(config.max_position_embeddings, "position_embeddings")(positions)
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(x)
        return nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)


def max_text_length(config: BertConfig | RobertaConfig) -> int:
    """The most tokens that a BERT or RoBERTa has positions for."""
    # RoBERTa counts from the position after the padding's own, and never uses those below.
    unused = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return config.max_position_embeddings - unused


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
    """A configuration for a BERT trained from scratch; UserError as `small_clip_config`."""
    check_sizes(width, heads)
    return BertConfig(
        **transformer_sizes(width, layers, heads, dropout),
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        max_position_embeddings=max_length,
        type_vocab_size=1,
    )

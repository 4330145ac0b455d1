"""DeCLIP (arXiv 2110.05208) on the same towers: CLIP with self-, multi-view and neighbour terms."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.losses.declip import declip, masked_mean, masked_tokens, simsiam
from rcml_jax.methods.base import Batch, Metrics, Params
from rcml_jax.methods.baselines import BaselineMethod
from rcml_jax.methods.relational import flat_images, in_rows
from rcml_jax.models.backbones import backbone_of
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.models.two_towers import joint_width
from rcml_jax.ops.similarity import as_float, l2_normalize
from rcml_jax.ops.views import drop_states, drop_tokens, image_view, mask_tokens
from rcml_jax.tasks.relations import RelationTask

# Heads that DeCLIP trains beside the towers; evaluation does not use them.


_EPSILON = 1e-5


class WholeBatchNorm(nn.Module):
    """Batch norm by the mean and variance of the rows that count, without running statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """x (n, d), where (n,) bool, false for padding → (n, d); at least one row must count."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        counted = where[:, None]
        mean = jnp.mean(x, axis=0, where=counted, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=0, where=counted, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + _EPSILON) * scale[None] + bias[None]


class SimSiamHeads(nn.Module):
    """SimSiam's projector and predictor (Chen & He, 2021, Section 3), d wide.

    Projector: three layers, each with batch norm, ReLU between them. Predictor: two layers with a
    quarter of the width between them, batch norm and ReLU on the hidden one. They need the whole
    batch, because of the batch norm.
    """

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeddings (n, d) and where (n,) bool → predictions p and projections z, (n, d) each."""
        width, z = x.shape[-1], x
        for layer in range(3):
            z = nn.relu(z) if layer else z
            z = nn.Dense(width, use_bias=False, name=f"projector_{layer}")(z)
            z = WholeBatchNorm(name=f"projector_norm_{layer}")(z, where)
        hidden = nn.Dense(max(width // 4, 1), use_bias=False, name="predictor_0")(z)
        hidden = nn.relu(WholeBatchNorm(name="predictor_norm")(hidden, where))
        return nn.Dense(width, name="predictor_1")(hidden), z


class TokenHead(nn.Module):
    """BERT's head for masked tokens before its tied output layer, and that layer's bias.

    width: of the token embeddings; vocab_size: the number of ids.
    """

    width: int
    vocab_size: int

    @nn.compact
    def __call__(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token states (n, k, d) → (n, k, width), and the bias (vocab_size,)."""
        hidden = nn.gelu(nn.Dense(self.width, name="dense")(states))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        return nn.LayerNorm(name="norm")(hidden), bias


class DeCLIPMethod(BaselineMethod):
    """`config.method="declip"`: all four terms of the paper, on two views of each image and text.

    The first view is the batch's own image and text. The second image is a random crop in another
    brightness, mirrored where `config.batch.image_flip` is set. The second text has a tenth of its
    tokens deleted and 15% of the others masked.

    Differences from the paper:
    - Nearest neighbours come from the batch. The paper's queue of earlier texts would be a state
      that a step has to carry.
    - The second text is the one whose masked tokens are predicted, every one of them replaced by
      the mask token. The output layer is tied to the token embeddings. CLIP's text tower is
      causal: it predicts from what stands before.
    - SimSiam's batch norm takes its statistics over the whole batch, on all devices.
    - Of a frozen tower whose states are stored, the second view is the mean of three quarters of
      the tokens, and stored texts have no masked tokens to predict.
    - The augmentation is weaker: no blur and no change of colour, no synonyms and no swaps. The
      first image has only the augmentation of `config.batch`.

    The heads lie beside "towers" in the parameters. Evaluation and export do not use them.
    """

    def __init__(self, config: Any, task: RelationTask):
        super().__init__(config, task)
        self.weights = _weights(config.loss)
        own = {"text": self.towers_config.text_config, "image": self.towers_config.vision_config}
        for modality in self.stored_modalities:
            if not backbone_of(own[modality]).mean:
                raise UserError(
                    f"DeCLIP has no second view of stored {modality} states whose pooled state is "
                    "no mean of tokens; set config.model.store_frozen=False"
                )
        self.mask_id = task.tokenizer.mask_id

    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random towers, and the heads of SimSiam and of the masked tokens."""
        params = super().init_params(key, batch)
        width = joint_width(self.towers_config)
        simsiam_key, token_key = jax.random.split(jax.random.fold_in(key, 1))
        heads, x = SimSiamHeads(), jnp.zeros((2, width), jnp.float32)
        params["simsiam"] = heads.init(simsiam_key, x, jnp.ones(2, bool))["params"]
        head = self._token_head(params)
        params["token_head"] = head.init(token_key, jnp.zeros((1, 1, width), jnp.float32))["params"]
        return params

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """Two views of each text and image, and the loss of each text's masked tokens.

        "text", "image", "text_view" and "image_view" are (N, d), "token_loss" and "token_count"
        (N,): the sum over the masked tokens and their number. In rows of k texts they are
        (N/k, k, ...).
        """
        params, items = self.stop_frozen(params), batch["items"]
        images, towers = items["images"], {"params": params["towers"]}
        first = super().embed(params, batch, key)
        flip = self.config.batch.image_flip
        view = self._image_view(images, jax.random.fold_in(key, 0), flip)
        out: Any = self.model.apply(towers, None, flat_images(view))
        second = in_rows(out["image"], images)
        text, more = self._text_view(params, items["ids"], key)
        return first | {"text_view": text, "image_view": second} | more

    def _image_view(self, images: Any, key: jax.Array, flip: bool) -> Any:
        if not isinstance(images, TokenStates):
            return image_view(images, key, flip=flip)
        rows = images.pooled_index.shape
        states: Any = flat_images(images)
        view = _state_view(states, key)
        return TokenStates(*(x.reshape(*rows, *x.shape[1:]) for x in view))

    def _text_view(self, params: Params, ids: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        """The second view's embeddings of texts, and what its masked tokens cost."""
        if isinstance(ids, TokenStates):
            view = _state_view(ids, jax.random.fold_in(key, 1))
            nothing = jnp.zeros(len(view.mask), jnp.float32)
            out: Any = self.model.apply({"params": params["towers"]}, view)
            return out["text"], {"token_loss": nothing, "token_count": nothing}
        tokenizer, packed = self.task.tokenizer, isinstance(ids, PackedTexts)
        tokens, ends = ids if packed else (ids, _first(ids, tokenizer.end_id))
        key = jax.random.fold_in(key, 1)
        tokens, ends = drop_tokens(
            tokens,
            ends,
            self._body(tokens, ends),
            jax.random.fold_in(key, 0),
            pad_id=tokenizer.pad_id,
        )
        masked, positions, labels, chosen = mask_tokens(
            tokens, self._body(tokens, ends), jax.random.fold_in(key, 1), mask_id=self.mask_id
        )
        second: Any = PackedTexts._make((masked, ends)) if packed else masked
        states: Any = self.model.apply({"params": params["towers"]}, second, method="text_states")
        before = states.states.shape[1] - masked.shape[1]  # a pooled state before the tokens
        found = jnp.take_along_axis(states.states, positions[..., None] + before, axis=1)
        head = self._token_head(params)
        out = head.apply({"params": params["token_head"]}, as_float(found))
        hidden, bias = out
        costs = masked_tokens(hidden, _token_embeddings(params["towers"]), bias, labels)
        # The text of a row that each masked token belongs to.
        segment_ids = jnp.sum(positions[..., None] > ends[:, None], axis=-1, dtype=jnp.int32)
        texts = jnp.arange(ends.shape[1], dtype=jnp.int32)
        mine = chosen[..., None] & (segment_ids[..., None] == texts[None, None])
        loss = jnp.sum(jnp.where(mine, costs[..., None], 0), axis=1)
        count = jnp.sum(mine, axis=1).astype(loss.dtype)
        if not packed:
            loss, count = loss[:, 0], count[:, 0]
        return l2_normalize(states.pooled), {"token_loss": loss, "token_count": count}

    def _body(self, ids: jax.Array, ends: jax.Array) -> jax.Array:
        """(n, T) bool: the tokens of texts, without start, end and padding."""
        special: Any = ids == self.task.tokenizer.end_id
        if self.task.tokenizer.start_id is not None:
            special |= ids == self.task.tokenizer.start_id
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        return ~special & (index < ends[:, -1:])

    def _token_head(self, params: Params) -> TokenHead:
        vocab_size, width = _token_embeddings(params["towers"]).shape
        return TokenHead(width, vocab_size)

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The paper's loss over all items of the batch; relations and pairs are not used."""
        del progress
        where, weights = batch["shared"]["valid"], self.weights
        # From rows of items to items.
        flat = {
            name: x.reshape(-1, x.shape[-1]) if name[:5] != "token" else x.reshape(-1)
            for name, x in embedded.items()
        }
        text, image = ((flat[name], flat[f"{name}_view"]) for name in ("text", "image"))
        terms = {}
        if weights["self_supervision"]:
            heads = SimSiamHeads()
            found = [heads.apply({"params": params["simsiam"]}, as_float(x), where) for x in image]
            predicted, projected = zip(*found, strict=True)
            terms["simsiam"] = simsiam(predicted, projected, where=where)
            tokens = masked_mean(flat["token_count"], where)
            terms["masked_tokens"] = masked_mean(flat["token_loss"], where) / jnp.where(
                tokens > 0, tokens, 1
            )
        value, more = declip(
            text,
            image,
            self_supervised=sum(terms.values()),
            temperature=self.temperature(params),
            where=where,
            chunk_size=self.config.loss.chunk_size or None,
            **weights,
        )
        return value, more | terms

    def describe(self) -> dict:
        """As of the other baselines, and which parts of DeCLIP were trained."""
        return super().describe() | {
            "objective": "CLIP, SimSiam of two image views, masked tokens, CLIP of the other pairs "
            "of views, nearest neighbours of texts; unlike the paper's these are looked for in the "
            "batch, not in a queue, and views are random crops in another brightness and texts "
            "with tokens deleted and masked"
        }


def _state_view(states: TokenStates, key: jax.Array) -> TokenStates:
    return TokenStates(*drop_states(*states, key), states.pooled_index)


def _weights(loss: Any) -> dict[str, float]:
    """`config.loss.declip`: α, β and γ by name."""
    names = ("self_supervision", "multi_view", "nearest_neighbor")
    return {name: float(loss.declip[name]) for name in names}


def _first(ids: jax.Array, token: int) -> jax.Array:
    """(n, 1) int32: the position of a token's first occurrence in each text."""
    return jnp.argmax(ids == token, axis=1, keepdims=True).astype(jnp.int32)


def _token_embeddings(towers: Params) -> jax.Array:
    """The text tower's token embeddings (V, width), under CLIP's and SigLIP's name or BERT's."""
    embeddings = towers["text_model"]["embeddings"]
    names = ("token_embedding", "word_embeddings")
    return next(embeddings[name] for name in names if name in embeddings)["embedding"]

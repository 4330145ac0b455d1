"""RCML: the relation-pooled towers with the relation-conditioned contrastive loss."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.losses.rcml import relation_contrastive, relation_identification
from rcml_jax.methods.base import Batch, Metrics, Params
from rcml_jax.methods.relational import (
    Embedder,
    RelationalMethod,
    TokenReader,
    flat_images,
    in_rows,
)
from rcml_jax.models.rcml import RCML
from rcml_jax.models.relation_pooling import FoldedRelation
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.models.two_towers import joint_width
from rcml_jax.ops.divided import Placement
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.tasks.relations import RelationTask


class RCMLMethod(RelationalMethod):
    """`config.method="rcml"`."""

    def __init__(self, config: Any, task: RelationTask):
        super().__init__(config, task)
        if length := config.batch.sentence_noise:
            self.sentence_noise = functools.partial(_noise, joint_width(self.towers_config), length)
        head = config.model
        self.model = RCML(
            self.towers_config,
            FrozenDict(
                beta=head.beta,
                pooled_logit=head.pooled_logit,
                pooled_prior=head.pooled_prior,
                learn_pooled_prior=head.learn_pooled_prior,
                gate=head.gate,
                head_init=head.head_init,
            ),
            self.dtype,
            config.model.remat,
            config.model.towers,
        )
        self._relations = jax.jit(self._embed_relations)
        self._pool = jax.jit(self._pool_items)
        self._pool_text = jax.jit(functools.partial(self._pool_one, "pool_text"))
        self._pool_image = jax.jit(functools.partial(self._pool_one, "pool_image"))
        #: A method of the model by its name, on the variables and its own arguments.
        self.call = jax.jit(
            lambda name, variables, *inputs: self.model.apply(variables, *inputs, method=name),
            static_argnums=0,
        )
        #: (mask, pooled index) of texts; XLA leaves the tower out.
        self.text_layout = jax.jit(
            lambda variables, ids: self.model.apply(variables, ids, method="text_states")[1:]
        )

    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random towers and head."""
        ids, image = self.one_example(batch)
        return self.model.init(key, ids, ids, image)["params"]

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """Embeddings z_T and z_I of the items under the batch's relations, (N, R, d) each.

        (N/k, k, R, d) where items are in rows of k.
        """
        del key  # The towers have no dropout.
        items, shared = batch["items"], batch["shared"]
        params = self.stop_frozen(params)
        out: Any = self.model.clone(axis_name=self.axis_name).apply(
            {"params": {name: params[name] for name in ("towers", "head")}},
            shared["relation_ids"],
            items["ids"],
            flat_images(items["images"]),
            shared["intra"],
            shared.get("sentence_noise"),
        )
        return {"text": out["text"], "image": in_rows(out["image"], items["images"])}

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Eq. 1–2 over the whole batch, plus the identification term if its weight is not 0."""
        del progress
        shared, loss = batch["shared"], self.config.loss
        text, image = (_relations_first(embedded[name]) for name in ("text", "image"))
        pairs = shared["anchor"], shared["positive"]
        common = {
            "pair_valid": shared["pair_valid"],
            "valid": shared["valid"],
            "intra": shared["intra"],
            "temperature": self.temperature(params),
        }
        value, metrics = relation_contrastive(
            text,
            image,
            *pairs,
            related=shared["related"],
            intra_modal_weight=loss.intra_modal_weight,
            chunk_size=loss.chunk_size or None,
            pair_chunk_size=loss.pair_chunk_size or None,
            **common,
        )
        if loss.identification_weight:
            term, more = relation_identification(
                text, image, *pairs, linked=shared["linked"], **common
            )
            value += loss.identification_weight * term
            metrics |= {"identification": term} | more
        return value, metrics

    def tables(
        self,
        params: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, RelationEmbeddings]:
        """One table: every item pooled under every relation."""
        del needed
        variables = {"params": {name: params[name] for name in ("towers", "head")}}
        ids = self.relation_ids if sentences is None else self.task.encode(list(sentences))
        relation = self._relations(variables, ids)
        text, image = self.embed_items(self._pool, (variables, relation, False), items, axis=1)
        table = RelationEmbeddings(items, text, image, np.asarray(l2_normalize(relation)))
        return {"relation": table}

    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings pooled under the intra-sample relation."""
        variables = {"params": {name: params[name] for name in ("towers", "head")}}
        relation = self._relations(variables, self.task.encode([self.task.sentence(-1)]))
        text, image = self.embed_items(self._pool, (variables, relation, True), items, axis=1)
        return image[0], text[0]

    def embedder(
        self, params: Params, sentences: Sequence[str], devices: Sequence[jax.Device] = ()
    ) -> Embedder:
        """Embed under the intra-sample relation first, then under each sentence."""
        place = Placement(devices)
        variables = {"params": {name: params[name] for name in ("towers", "head")}}
        variables = place.whole(variables)
        task = self.task
        sentences = [task.sentence(-1), *sentences]
        relation = self._relations(variables, task.encode(sentences))
        intra = jnp.arange(len(relation)) == 0

        def text(texts: Sequence[str]) -> np.ndarray:
            indices, tokens = self.packed(*task.tokenizer.encode(texts, task.max_length))
            z = np.empty((len(relation), len(texts), relation.shape[1]), np.float32)
            z[:, indices] = self._pool_text(variables, place.split(tokens), relation, intra)
            return z

        def image(pixels: np.ndarray) -> np.ndarray:
            return np.asarray(self._pool_image(variables, place.split(pixels), relation, intra))

        shapes = dict.fromkeys(("text", "image"), relation.shape)
        return Embedder(text, image, shapes, place.count)

    def token_reader(self, params: Params, devices: Sequence[jax.Device] = ()) -> TokenReader:
        """Token states before the head, and the head apart from them."""
        variables = {"params": {name: params[name] for name in ("towers", "head")}}
        return _Tokens(self, variables, Placement(devices))

    def describe(self) -> dict:
        """Both items pooled under the relation in force."""
        return {"relation": "items pooled under the relation sentence (RCML Eq. 4-6)"}

    def _embed_relations(self, variables: dict, ids: jax.Array) -> jax.Array:
        relation: Any = self.model.apply(variables, ids, method="relation")
        return relation.astype(jnp.float32)

    def _pool_items(
        self,
        variables: dict,
        relation: jax.Array,
        is_intra: bool,
        ids: jax.Array,
        images: jax.Array,
    ):
        """z_T and z_I with the relations first, (R, n, d), all of them intra-sample or none."""
        intra = jnp.full(relation.shape[0], is_intra)
        text = self._pool_one("pool_text", variables, ids, relation, intra)
        image = self._pool_one("pool_image", variables, images, relation, intra)
        return text, image

    def _pool_one(
        self,
        pool: str,
        variables: dict,
        inputs: jax.Array,
        relation: jax.Array,
        intra: jax.Array,
    ) -> jax.Array:
        """z_T or z_I with the relations first, (R, n, d)."""
        out: Any = self.model.apply(variables, inputs, relation, intra, method=pool)
        return _relations_first(out)


class _Tokens(TokenReader):
    """The `TokenReader` of RCML. Texts are one a row, also where training packs them."""

    def __init__(self, method: RCMLMethod, variables: dict, place: Placement):
        self._method, self._variables = method, place.whole(variables)
        self._split, self.devices = place.split, place.count
        self.width = joint_width(method.towers_config)
        size = method.task.images.framing.size
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        states = jax.eval_shape(functools.partial(method.call, "image_states"), variables, pixels)
        self.image_length = states.mask.shape[-1]

    def text_lengths(self, texts: Sequence[str]) -> np.ndarray:
        mask, _ = self._method.text_layout(self._variables, self._split(self._encode(texts)))
        return np.asarray(mask).sum(axis=-1)

    def text(self, texts: Sequence[str]) -> TokenStates:
        return self._call("text_states", self._split(self._encode(texts)))

    def image(self, pixels: np.ndarray) -> TokenStates:
        return self._call("image_states", self._split(pixels))

    def relations(self, sentences: Sequence[str]) -> jax.Array:
        return self._call("relation", self._encode(sentences)).astype(jnp.float32)

    def pool(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        return self._call("pool", tokens, relation, intra)

    def attention(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        return self._call("attention", tokens, relation, intra)

    def fold(self, relation: jax.Array, intra: jax.Array) -> FoldedRelation:
        return self._call("fold", relation, intra)

    def _call(self, name: str, *inputs: Any) -> Any:
        return self._method.call(name, self._variables, *inputs)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._method.task.encode(list(texts))


def _noise(width: int, length: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, width) float32, of about that length each."""
    noise = rng.standard_normal((count, width), np.float32)
    return noise * np.float32(length / math.sqrt(width))


def _relations_first(z: jax.Array) -> jax.Array:
    """Embeddings (N, R, d), or in rows (N/k, k, R, d) → (R, N, d)."""
    return jnp.swapaxes(z.reshape(-1, *z.shape[-2:]), 0, 1)

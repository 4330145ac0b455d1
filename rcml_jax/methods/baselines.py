"""CLIP, SigLIP and UniCL on the same towers: self pairs, no relation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.evaluation.scores import EmbeddingTable
from rcml_jax.losses.contrastive import clip, label_supervised, sigmoid
from rcml_jax.methods.base import Batch, Metrics, Params
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.methods.task import RelationTask
from rcml_jax.models.encoders.clip import CLIPTowers

_BIAS = -10.0  # SigLIP's initial bias: most pairs are negative.
_SENTENCE_CHUNK = 2048


class BaselineMethod(RelationalMethod):
    """`config.method="clip"`, "siglip" or "unicl" (labels: the classes of the data set)."""

    def __init__(self, config: Any, task: RelationTask):
        super().__init__(config, task)
        self.model = model = CLIPTowers(self.clip_config, self.dtype)
        self._texts = jax.jit(lambda towers, ids: model.apply({"params": towers}, ids)["text"])
        self._images = jax.jit(
            lambda towers, images: model.apply({"params": towers}, None, images)["image"]
        )

    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random towers, and SigLIP's bias."""
        items = batch["items"]
        params = {"towers": self.model.init(key, items["ids"][:1], items["images"][:1])["params"]}
        if self.config.method == "siglip":
            params["bias"] = jnp.asarray(_BIAS, jnp.float32)
        return params

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """CLIP's embeddings of the items, (N, d) each."""
        del key  # CLIP's towers have no dropout.
        towers = self.stop_frozen(params)["towers"]
        return self.model.apply({"params": towers}, batch["items"]["ids"], batch["items"]["images"])

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The baseline's loss over all items of the batch; relations and pairs are not used."""
        del progress
        shared, config = batch["shared"], self.config
        options = {"temperature": self.temperature(params), "where": shared["valid"]}
        text, image = embedded["text"], embedded["image"]
        if config.method == "siglip":
            return sigmoid(text, image, bias=params["bias"], **options), {}
        if config.method == "unicl":
            return label_supervised(text, image, shared["labels"], **options), {}
        return clip(text, image, **options), {}

    def tables(
        self, params: Params, items: np.ndarray, needed: np.ndarray | None = None
    ) -> dict[str, EmbeddingTable]:
        """ "plain": the items alone; "sentence": the relation sentence appended to the text.

        The second table is made only where `needed` says what will be looked up in it.
        """
        towers = params["towers"]
        relation = np.asarray(self._texts(towers, self.relation_ids))
        text = np.empty((1, len(items), relation.shape[1]), np.float32)
        image = np.empty_like(text)
        for rows, ids, images in self.chunks(items):
            text[0, rows] = self._texts(towers, ids)[: len(rows)]
            image[0, rows] = self._images(towers, images)[: len(rows)]
        tables = {"plain": EmbeddingTable(items, text, image, relation)}
        if needed is not None:
            with_sentence = self._with_sentence(towers, items, needed, relation.shape[1])
            tables["sentence"] = EmbeddingTable(items, with_sentence, image, relation)
        return tables

    def _with_sentence(
        self, towers: Params, items: np.ndarray, needed: np.ndarray, width: int
    ) -> np.ndarray:
        """Texts followed by the sentence, (R, n, d), where they are needed."""
        task = self.task
        out = np.zeros((*needed.shape, width), np.float32)
        relations, rows = np.nonzero(needed)
        for start in range(0, len(rows), _SENTENCE_CHUNK):
            part = slice(start, start + _SENTENCE_CHUNK)
            places = np.arange(start, start + _SENTENCE_CHUNK).clip(max=len(rows) - 1)
            ids, _ = task.tokenizer.encode_with_suffix(
                [task.graph.texts[i] for i in items[rows[places]]],
                [task.sentences[r] for r in relations[places]],
                task.max_length,
            )
            embedded = np.asarray(self._texts(towers, ids))
            out[relations[part], rows[part]] = embedded[: len(rows[part])]
        return out

    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CLIP's own."""
        table = self.tables(params, items)["plain"]
        return table.image[0], table.text[0]

    def describe(self) -> dict:
        """Two ways to score; each task reports the better of them."""
        return {
            "plain": "the items alone; validity always in this way",
            "sentence": "the relation sentence appended to the text, cut at the tower's limit",
            "reported": "for retrieval and relation type the better of the two on this split, "
            "both under variants",
        }

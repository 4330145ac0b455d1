"""CLIP, SigLIP and UniCL on the same towers: self pairs, no relation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.config import block_size
from rcml_jax.evaluation.scores import EmbeddingTable
from rcml_jax.losses.contrastive import clip, label_supervised, sigmoid
from rcml_jax.methods.base import Batch, Metrics, Params
from rcml_jax.methods.relational import (
    Embedder,
    RelationalMethod,
    flat_images,
    in_rows,
    retrieval_items,
    weights_on_validation,
)
from rcml_jax.methods.relational_towers import remat
from rcml_jax.methods.task import RelationTask
from rcml_jax.models.two_towers import build_towers

_BIAS = -10.0  # SigLIP's initial bias: most pairs are negative.
_SENTENCE_CHUNK = 2048


class BaselineMethod(RelationalMethod):
    """`config.method="clip"`, "siglip" or "unicl" (labels: the classes of the data set)."""

    def __init__(self, config: Any, task: RelationTask):
        super().__init__(config, task)
        self.model = model = build_towers(
            self.towers_config, self.dtype, remat(config.model), config.model.get("towers", "")
        )
        self._texts = jax.jit(lambda towers, ids: model.apply({"params": towers}, ids)["text"])
        self._images = jax.jit(
            lambda towers, images: model.apply({"params": towers}, None, images)["image"]
        )
        self._weights: tuple[Params, dict[float, float]] = None, {}

    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random towers, and SigLIP's bias."""
        params = {"towers": self.model.init(key, *self.one_example(batch))["params"]}
        if self.config.method == "siglip":
            params["bias"] = jnp.asarray(_BIAS, jnp.float32)
        return params

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """The towers' own embeddings of the items, (N, d) each; in rows of k (N/k, k, d)."""
        del key  # The towers have no dropout.
        towers, items = self.stop_frozen(params)["towers"], batch["items"]
        out = self.model.apply({"params": towers}, items["ids"], flat_images(items["images"]))
        return out | {"image": in_rows(out["image"], items["images"])}

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The baseline's loss over all items of the batch; relations and pairs are not used."""
        del progress
        shared, config = batch["shared"], self.config
        options = {"temperature": self.temperature(params), "where": shared["valid"]}
        options["block"] = block_size(config.loss)
        # From rows of items to items.
        text, image = (x.reshape(-1, x.shape[-1]) for x in (embedded["text"], embedded["image"]))
        if config.loss.get("mask_related", False):
            options["where"] = self._unrelated(shared)
        if config.method == "siglip":
            return sigmoid(text, image, bias=params["bias"], **options), {}
        if config.method == "unicl":
            return label_supervised(text, image, shared["labels"], **options), {}
        return clip(text, image, **options), {}

    def _unrelated(self, shared: dict) -> jax.Array:
        """(N, N) bool: the pairs that are positives, or related under no relation."""
        valid, labels = shared["valid"], shared["labels"]
        own = jnp.eye(len(valid), dtype=bool)
        if self.config.method == "unicl":
            own |= (labels[:, None] == labels) & (labels >= 0)
        return valid[:, None] & valid & (own | ~shared["related"])

    def tables(
        self,
        params: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, EmbeddingTable]:
        """ "plain": the items alone; "sentence": the relation sentence appended to the text.

        "added": the sentence as a second query vector, with the weight that does best on
        validation. The last two are made only where `needed` says what will be looked up, the
        second not where the text tower's states are stored.
        """
        towers = params["towers"]
        said = list(self.task.sentences if sentences is None else sentences)
        relation = np.asarray(self._texts(towers, self.task.encode(said)))
        text = np.empty((1, len(items), relation.shape[1]), np.float32)
        image = np.empty_like(text)
        for rows, ids, images in self.chunks(items):
            text[0, rows] = self._texts(towers, ids).reshape(len(rows), -1)
            image[0, rows] = self._images(towers, images)
        tables = {"plain": EmbeddingTable(items, text, image, relation)}
        if needed is not None:
            # A stored tower is there so that it need not be run on every text again.
            if "text" not in self.stored_modalities:
                with_sentence = self._with_sentence(towers, items, needed, said, relation.shape[1])
                tables["sentence"] = EmbeddingTable(items, with_sentence, image, relation)
            weights = self.weights_tried(params)
            weight = max(weights, key=weights.get)
            tables["added"] = EmbeddingTable(items, text, image, relation, weight)
        return tables

    def weights_tried(self, params: Params) -> dict[float, float]:
        """Hit@5 AVG on validation by the weight of the sentence, of the parameters' plain table."""
        if self._weights[0] is not params:
            items = retrieval_items(self.task, "validation")
            table = self.tables(params, items)["plain"]
            self._weights = params, weights_on_validation(self.task, table)
        return self._weights[1]

    def _with_sentence(
        self,
        towers: Params,
        items: np.ndarray,
        needed: np.ndarray,
        said: Sequence[str],
        width: int,
    ) -> np.ndarray:
        """Texts followed by the sentence, (R, n, d), where they are needed; equal ones once."""
        task = self.task
        out = np.zeros((*needed.shape, width), np.float32)
        relations, rows = np.nonzero(needed)
        asked = [(task.graph.texts[i], r) for i, r in zip(items[rows], relations, strict=True)]
        place = {pair: number for number, pair in enumerate(dict.fromkeys(asked))}
        distinct = list(place)
        embedded = np.empty((len(distinct), width), np.float32)
        for start in range(0, len(distinct), _SENTENCE_CHUNK):
            chunk = np.arange(start, start + _SENTENCE_CHUNK).clip(max=len(distinct) - 1)
            texts, numbers = zip(*(distinct[i] for i in chunk), strict=True)
            sentences = [said[r] for r in numbers]
            part = self._embedded(
                towers, *task.tokenizer.encode_with_suffix(texts, sentences, task.max_length)
            )
            embedded[start : start + len(part)] = part[: len(distinct) - start]
        out[relations, rows] = embedded[[place[pair] for pair in asked]]
        return out

    def _embedded(self, towers: Params, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Padded texts, ids and mask (n, T) → (n, d)."""
        places, tokens = self.packed(ids, mask)
        found = np.asarray(self._texts(towers, tokens)).reshape(len(places), -1)
        out = np.empty((len(ids), found.shape[1]), np.float32)
        out[places] = found
        return out

    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The towers' own."""
        table = self.tables(params, items)["plain"]
        return table.image[0], table.text[0]

    def embedder(self, params: Params, sentences: Sequence[str]) -> Embedder:
        """The towers' own; for a relation the sentence is appended to the text, as in `tables`."""
        towers, task = params["towers"], self.task

        def text(texts: Sequence[str]) -> np.ndarray:
            tokenizer, limit = task.tokenizer, task.max_length
            encoded = [tokenizer.encode(texts, limit)]
            encoded += [
                tokenizer.encode_with_suffix(texts, [sentence] * len(texts), limit)
                for sentence in sentences
            ]
            return np.stack([self._embedded(towers, *padded) for padded in encoded])

        def image(pixels: np.ndarray) -> np.ndarray:
            return np.asarray(self._images(towers, pixels))[None]

        width = jax.eval_shape(self._texts, towers, task.encode([""])).shape[1]
        return Embedder(text, image, {"text": (1 + len(sentences), width), "image": (1, width)})

    def describe(self) -> dict:
        """The ways to score; each task reports the best of them."""
        tried = {f"{weight:g}": found for weight, found in self._weights[1].items()}
        return {
            "plain": "the items alone; validity always in this way",
            "sentence": "the relation sentence appended to the text, cut at the tower's limit; not "
            "where the text tower's states are stored (config.model.store_frozen)",
            "added": "s(A, B) + w (s(h_E, A) + s(h_E, B)): for a query A the order of candidates "
            "by the query vector A + w h_E; w is the best on validation",
            "weights_on_validation": tried,
            "reported": "for retrieval and relation type the best of these on this split, all "
            "under variants",
        }

"""Scorings of two towers without a pooling head: items only, and two ways to add the sentence."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.evaluation.relation_retrieval import retrieval
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.methods.base import Params
from rcml_jax.models.two_towers import TwoTowers
from rcml_jax.ops.divided import Placement, divided
from rcml_jax.tasks.relations import RelationTask

#: Weights w of a sentence beside a query (see `RelationEmbeddings`), of which validation picks one;
#: without the sentence it is 0.
SENTENCE_WEIGHTS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SENTENCE_CHUNK = 2048


class TowerTables:
    """Embedding tables of two towers for the items of a relational method."""

    def __init__(self, method: Any, model: TwoTowers):
        self._method = method
        apply: Callable[..., Any] = model.apply
        self._texts = jax.jit(lambda towers, ids: apply({"params": towers}, ids)["text"])
        self._images = jax.jit(
            lambda towers, images: apply({"params": towers}, None, images)["image"]
        )
        self._weights: tuple[Params, dict[float, float]] = None, {}

    def _both(self, towers: Params, ids: Any, images: Any) -> tuple[jax.Array, jax.Array]:
        return flat(self._texts(towers, ids)), self._images(towers, images)

    def tables(
        self,
        towers: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, RelationEmbeddings]:
        """ "plain": the items alone; "sentence": the relation sentence appended to the text.

        "added": the sentence as a second query vector, with the weight that does best on
        validation. The last two are made only where `needed` says what will be looked up, the
        second not where the text tower's states are stored.
        """
        task = self._method.task
        said = list(task.sentences if sentences is None else sentences)
        relation = np.asarray(self._texts(towers, task.encode(said)))
        text, image = self._method.embed_items(self._both, (towers,), items)
        text, image = text[None], image[None]
        tables = {"plain": RelationEmbeddings(items, text, image, relation)}
        if needed is not None:
            # A stored tower is there so that it need not be run on every text again.
            if "text" not in self._method.stored_modalities:
                with_sentence = self._with_sentence(towers, items, needed, said, relation.shape[1])
                tables["sentence"] = RelationEmbeddings(items, with_sentence, image, relation)
            weights = self.weights_tried(towers)
            weight = max(weights, key=weights.__getitem__)
            tables["added"] = RelationEmbeddings(items, text, image, relation, weight)
        return tables

    def weights_tried(self, towers: Params) -> dict[float, float]:
        """Weight of the sentence → Hit@5 AVG on validation, with the plain table."""
        if self._weights[0] is not towers:
            items = retrieval_items(self._method.task, "validation")
            table = self.tables(towers, items)["plain"]
            self._weights = towers, weights_on_validation(self._method.task, table)
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
        task = self._method.task
        out = np.zeros((*needed.shape, width), np.float32)
        relations, rows = np.nonzero(needed)
        asked = [(task.graph.texts[i], r) for i, r in zip(items[rows], relations, strict=True)]
        index = {pair: number for number, pair in enumerate(dict.fromkeys(asked))}
        distinct = list(index)

        def read(rows: np.ndarray) -> tuple[np.ndarray, tuple]:
            texts, numbers = zip(*(distinct[i] for i in rows), strict=True)
            sentences = [said[r] for r in numbers]
            padded = task.tokenizer.encode_with_suffix(texts, sentences, task.max_length)
            indices, tokens = self._method.packed(*padded)
            return rows[indices], (tokens,)

        embedded = divided(
            lambda towers, ids: flat(self._texts(towers, ids)),
            (towers,),
            read,
            len(distinct),
            devices=self._method.devices,
            chunk=_SENTENCE_CHUNK,
        )
        out[relations, rows] = embedded[[index[pair] for pair in asked]]
        return out

    def text(
        self, towers: Params, ids: np.ndarray, mask: np.ndarray, place: Placement
    ) -> np.ndarray:
        """Padded texts, ids and mask (n, T) → (n, d)."""
        indices, tokens = self._method.packed(ids, mask)
        found = np.asarray(self._texts(towers, place.split(tokens))).reshape(len(indices), -1)
        out = np.empty((len(ids), found.shape[1]), np.float32)
        out[indices] = found
        return out

    @property
    def tried(self) -> dict[float, float]:
        """The last result of `weights_tried`; empty before the first call."""
        return self._weights[1]

    def images(self, towers: Params, pixels: np.ndarray) -> np.ndarray:
        """Images (n, H, W, 3) → (n, d)."""
        return np.asarray(self._images(towers, pixels))


def flat(embedded: jax.Array) -> jax.Array:
    """Embeddings (n, d), or in rows of several texts, → (N, d)."""
    return embedded.reshape(-1, embedded.shape[-1])


def weights_on_validation(task: RelationTask, table: RelationEmbeddings) -> dict[float, float]:
    """Weight of the sentence → Hit@5 AVG on validation.

    table: of what the validation split's retrieval queries need (`retrieval_items`).
    """
    asked = task.retrieval_queries("validation")
    arguments = asked.query, asked.candidates, asked.relation
    tables = {w: dataclasses.replace(table, sentence_weight=w) for w in SENTENCE_WEIGHTS}
    return {w: retrieval(x, *arguments)["hit@5"]["avg"] for w, x in tables.items()}


def retrieval_items(task: RelationTask, split: str) -> np.ndarray:
    """The items that the split's retrieval queries look up."""
    asked = task.retrieval_queries(split)
    return np.union1d(asked.query, asked.candidates)

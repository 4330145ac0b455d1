"""Embeddings of any frozen model, read from a file and evaluated like a trained method.

Nothing is trained here. docs/embeddings.md describes the file and how to make it.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from rcml_jax.data.sources.embeddings import ItemEmbeddings, file_digest, read_item_embeddings
from rcml_jax.errors import UserError
from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.methods.base import Metrics, Params, Rows
from rcml_jax.methods.control_rows import ITEMS_OF_RELATION, training_items
from rcml_jax.methods.relational import RelationalMethod, best_of, similarities_of
from rcml_jax.methods.tower_tables import retrieval_items, weights_on_validation
from rcml_jax.tasks.relations import RelationTask, cache_directory, load_graph, make_splits

_NO_RELATION = (
    "the file has neither `relation` in the space of the items nor `text_under` or `image_under`"
)


def embeddings_config(config: Any, path: str) -> Any:
    """The configuration of a source, changed to score the embeddings in a file.

    The file's digest is part of it, so that a work directory belongs to one file. Raises UserError
    for a configuration of another kind, or a file that cannot be read.
    """
    if not ("data" in config and "evaluation" in config and "validity_probe" in config.evaluation):
        raise UserError("--embeddings are scored on a relation graph: give --config rcml:SOURCE")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.method = "embeddings"
        config.embeddings = {"path": str(path), "sha256": file_digest(path)}
        # Without towers there are no frozen towers to compare with.
        for name in ("pretrained", "text_pretrained", "image_pretrained", "init_from"):
            config.model[name] = ""
    return config


class EmbeddingsMethod(RelationalMethod):
    """Vectors of a file in up to three ways of scoring, each a table of embeddings.

    "plain": the items as they are. "sentence": the relation sentence is added to the query with a
    weight chosen on validation. "under": the file's own vectors under each relation. Text and image
    of one width are one joint space. Otherwise each has dimensions of its own: TI and IT are left
    out, and AVG is the mean of TT and II.
    """

    evaluated = ""  # there are no parameters
    selection = "hit@5/avg"  # of the weight of the sentence

    def __init__(self, config: Any, task: RelationTask, found: ItemEmbeddings):
        # Not that of the base class, which builds towers.
        self.config, self.task, self.found = config, task, found
        self.similarities = similarities_of(config.evaluation)
        widths = {name: x.shape[-1] for name, x in found.vectors().items()}
        side = "text" if "text" in widths else "image"
        self.joint = len({widths[name] for name in ("text", "image") if name in widths}) == 1
        #: First dimension of each space, and their number.
        self._start = {side: 0, "image": 0 if self.joint else widths[side]}
        self._width = widths[side] if self.joint else widths["text"] + widths["image"]
        self.has_sentence = widths.get("relation") == widths[side]
        self._start["relation"] = 0 if self.has_sentence else self._width
        if "relation" in widths and not self.has_sentence:
            self._width += widths["relation"]
        if found.text is None or found.image is None:
            self.scores: tuple[str, ...] = ("tt",) if side == "text" else ("ii",)
        else:
            self.scores = SCORES if self.joint else ("tt", "ii", "avg")
        ids = np.array(task.graph.ids)
        order = np.argsort(found.ids)
        index = order[np.searchsorted(found.ids[order], ids).clip(max=len(order) - 1)]
        #: Row of each item of the graph in the file; −1: it is not there.
        self._rows = np.where(found.ids[index] == ids, index, -1)
        self.ignored = len(found.ids) - int(np.sum(self._rows >= 0))

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "EmbeddingsMethod":
        """Open the data and the file. Raises UserError for no file, or one that has changed."""
        if "embeddings" not in config:
            raise UserError(
                "config.method='embeddings' is for vectors of a file: python eval.py --embeddings "
                "FILE.npz"
            )
        path = config.embeddings.path
        if file_digest(path) != config.embeddings.sha256:
            raise UserError(f"{path} has changed since it was evaluated; give a new --workdir")
        graph = load_graph(config.data, workdir)
        splits = make_splits(graph, config.data)
        found = read_item_embeddings(path, len(graph.relations), len(graph.held_out_sentences()))
        tokenizer: Any = None  # nothing is tokenized or resized
        images: Any = graph.images
        cache = cache_directory(config.data.dir, workdir)
        task = RelationTask(config, graph, splits, tokenizer, images, 0, cache)
        return cls(config, task, found)

    # Tables

    def tables(
        self,
        params: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, RelationEmbeddings]:
        """ "under", "plain" and "sentence", those of them that the file has vectors for."""
        del params, needed
        if sentences is not None:
            raise ValueError("the file has no vectors of other sentences")
        found, tables = self.found, {}
        if found.text_under is not None or found.image_under is not None:
            tables["under"] = self._table(items, found.text_under, found.image_under)
        tables["plain"] = self._table(items)
        if self.has_sentence:
            tables["sentence"] = self._table(items, weight=self.sentence_weight)
        return tables

    def _table(
        self,
        items: np.ndarray,
        text: np.ndarray | None = None,
        image: np.ndarray | None = None,
        relation: np.ndarray | None = None,
        weight: float = 0.0,
    ) -> RelationEmbeddings:
        """Table of some items; what is not given is as in the file, not under a relation."""
        rows, found = self._rows[items], self.found
        self._check(items)
        sides = {}
        for name, given in (("text", text), ("image", image)):
            own = getattr(found, name)
            if own is None:  # Zeros add nothing to the average of both.
                sides[name] = np.zeros((1, len(items), self._width), np.float32)
            else:
                vectors = own[None] if given is None else given
                sides[name] = self._placed(name, vectors[:, rows])
        relation = found.relation if relation is None else relation
        if relation is None:
            sentences = np.zeros((len(self.task.graph.relations), self._width), np.float32)
        else:
            sentences = self._placed("relation", relation)
        return RelationEmbeddings(items, sides["text"], sides["image"], sentences, weight)

    def _placed(self, name: str, vectors: np.ndarray) -> np.ndarray:
        """Vectors in the dimensions of their space, zeros in the others."""
        width = vectors.shape[-1]
        if width == self._width:
            return vectors
        out = np.zeros((*vectors.shape[:-1], self._width), np.float32)
        start = self._start[name]
        out[..., start : start + width] = vectors
        return out

    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The file's plain vectors of the items."""
        table = self._table(items)
        return table.image[0], table.text[0]

    @functools.cached_property
    def weights_tried(self) -> dict[float, float]:
        """Hit@5 on the validation split with each weight of the sentence."""
        table = self._table(retrieval_items(self.task, "validation"))
        return weights_on_validation(self.task, table)

    @property
    def sentence_weight(self) -> float:
        """The weight with the best validation score; the smallest one if several are equal."""
        return max(self.weights_tried, key=self.weights_tried.__getitem__)

    # Evaluation

    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """The protocol of the README; what the file cannot answer is named under "left_out"."""
        self._check_needed(split)
        if self.ignored:
            print(
                f"note: {self.config.embeddings.path} has items that {self.task.graph.name} lacks: "
                f"{self.ignored:,} ignored",
                file=sys.stderr,
            )
        return super().evaluate(params, split, history)

    def _reported(self, result: dict) -> dict:
        """Without what the file cannot answer, and with what the file is."""
        left_out = self._left_out()
        for name in left_out:
            result.pop(name, None)
        if "training_free_product" in result and not self.joint:
            result["training_free_product"] = {
                task: _without(found, ("ii",))
                for task, found in result["training_free_product"].items()
            }
        result = _only_scores(result, self.scores)
        arrays = {name: list(x.shape) for name, x in self.found.vectors().items()}
        about = {
            "file": pathlib.Path(self.config.embeddings.path).name,
            "sha256": self.config.embeddings.sha256,
            "arrays": arrays,
            "ignored": self.ignored,
        }
        return result | {"embeddings": about, "left_out": left_out}

    def _answered(self, variant: str, found: dict) -> dict:
        """Relation type only by scores that depend on the relation."""
        blind: tuple[str, ...] = ()
        if variant == "plain":
            return {k: v for k, v in found.items() if not k.startswith("relation_type")}
        if variant == "sentence" and not self.joint:
            blind = ("ii",)
        if variant == "under":
            missing = {"tt": self.found.text_under, "ii": self.found.image_under}
            blind = tuple(name for name, under in missing.items() if under is None)
        types = {k: _without(v, blind) for k, v in found.items() if k.startswith("relation_type")}
        return found | types

    def _left_out(self) -> dict[str, str]:
        """Results that the file cannot give, with the reason."""
        found, reasons = self.found, {}
        under = found.text_under is not None or found.image_under is not None
        if not (self.has_sentence or under):
            reasons["relation_type"] = _NO_RELATION
        if found.relation is None and not under:
            reasons["relation_validity"] = "the file has no vectors that depend on the relation"
        if not self.has_sentence:
            reasons["training_free_product"] = "the file has no `relation` in the items' space"
        if self.task.graph.held_out_sentences() and not (
            self.has_sentence and found.relation_unseen is not None
        ):
            reasons["unseen_sentences"] = "the file has no `relation_unseen` in the items' space"
        missing = [name.upper() for name in SCORES if name not in self.scores]
        if missing:
            why = "one modality alone" if len(self.scores) == 1 else "two widths, no joint space"
            reasons["scores"] = f"{', '.join(missing)}: the file has {why}"
        return reasons

    def _unseen_sentences(
        self, params: Params, items: np.ndarray, needed: np.ndarray, measure: Callable
    ) -> list[dict]:
        """The ranking tasks with each set of unseen sentences added to the query."""
        del params, needed
        if self.found.relation_unseen is None or not self.has_sentence:
            return []
        plain = self._answered("plain", measure(self._table(items)))
        return [
            best_of(
                {
                    "plain": plain,
                    "sentence": self._answered(
                        "sentence",
                        measure(self._table(items, relation=said, weight=self.sentence_weight)),
                    ),
                }
            )
            for said in self.found.relation_unseen
        ]

    def _validity(self, params: Params, validity: dict) -> dict | None:
        """None where nothing in the file depends on the relation."""
        if "relation_validity" in self._left_out():
            return None
        return super()._validity(params, validity)

    def _protocol(self, split: str, queries: dict, types: Any, gallery: Any) -> dict:
        said = super()._protocol(split, queries, types, gallery)
        unused = ("selection", "pretrained_clip", *self._left_out())
        return {name: value for name, value in said.items() if name not in unused}

    def describe(self) -> dict:
        """The ways of scoring that the file has vectors for, and the weight of the sentence."""
        said: dict[str, Any] = {"plain": "the items as they are"}
        if self.has_sentence:
            tried = {f"{w:g}": found for w, found in self.weights_tried.items()}
            said["sentence"] = (
                f"s(A, B) + w (s(h_E, A) + s(h_E, B)), w = {self.sentence_weight:g}: for a query A "
                "the order of candidates by the query vector A + w h_E"
            )
            said |= {"weight": self.sentence_weight, "weights_on_validation": tried}
        if self.found.text_under is not None or self.found.image_under is not None:
            said["under"] = "the file's vectors under each relation"
        first = next(iter(name for name in ("under", "plain") if name in said))
        said["validity"] = f"on the vectors of {first!r} and of the sentence"
        said["reported"] = (
            "for each ranking task the best of these on this split, all under variants"
        )
        return said

    def _check_needed(self, split: str) -> None:
        """Raises UserError where the file lacks an item that the evaluation looks up."""
        task, (_, _, items) = self.task, self._asked(split, "random")
        parts = [items, task.gallery_queries(split).items]
        if self.has_sentence:
            asked = task.retrieval_queries("validation")
            parts += [asked.query, asked.candidates.ravel()]
        parts.append(training_items(task, ITEMS_OF_RELATION)[0])
        for examples in map(task.validity_examples, ("train", split)):
            parts += [examples.a, examples.b]
        self._check(np.unique(np.concatenate(parts)))

    def _check(self, items: np.ndarray) -> None:
        missing = items[self._rows[items] < 0]
        if not len(missing):
            return
        graph, splits = self.task.graph, self.task.splits
        trained = int(np.isin(missing, splits.items("train")).sum())
        of_training = (
            f" ({trained:,} of them training items, of which the controls and the probe are made)"
            if trained
            else ""
        )
        raise UserError(
            f"{self.config.embeddings.path} lacks {len(missing):,} of the {len(items):,} items "
            f"that are needed, such as '{graph.ids[missing[0]]}'{of_training}; embed every item "
            "of the catalogue (rcml-eval --list writes them)"
        )

    # Not available from a file of embeddings

    def batches(self, local_rows: Rows | None = None) -> NoReturn:
        """Raises UserError: nothing is trained."""
        raise UserError(
            "embeddings of a file are not trained; score them with rcml-eval --embeddings"
        )

    def init_params(self, key: Any, batch: Any) -> NoReturn:
        """Raises UserError: there are no parameters."""
        self.batches()

    def embed(self, params: Any, batch: Any, key: Any) -> NoReturn:
        """Raises UserError: there is no model."""
        self.batches()

    def objective(self, params: Any, embedded: Any, batch: Any, progress: Any) -> NoReturn:
        """Raises UserError: there is no loss."""
        self.batches()

    def embedder(self, params: Any, sentences: Sequence[str], devices: Any = ()) -> NoReturn:
        """Raises UserError: there is no model to embed other texts and images with."""
        raise UserError("a file of embeddings has no model that embeds other items")


def _without(found: dict, names: Sequence[str]) -> dict:
    """Measures without some of the scores, in copies."""
    return {
        key: _without(value, names) if isinstance(value, dict) else value
        for key, value in found.items()
        if key not in names
    }


def _only_scores(value: Any, kept: Sequence[str]) -> Any:
    """A result without the other scores, wherever AVG stands among them."""
    if isinstance(value, list):
        return [_only_scores(x, kept) for x in value]
    if not isinstance(value, dict):
        return value
    unwanted = [name for name in SCORES if name not in kept] if "avg" in value else []
    return {k: _only_scores(v, kept) for k, v in value.items() if k not in unwanted}

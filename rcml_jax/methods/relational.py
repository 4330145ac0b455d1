"""The base of RCML and its baselines: two towers, and the evaluation protocol."""

import abc
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rcml_jax.config import from_checkpoint, stored_modalities
from rcml_jax.data.packing import PackedTexts, pack_texts
from rcml_jax.data.queries import every_relation
from rcml_jax.errors import UserError
from rcml_jax.evaluation.controls import gains
from rcml_jax.evaluation.measures import main_measures, main_of
from rcml_jax.evaluation.relation_probes import (
    relation_type,
    relation_validity,
    validity_features,
)
from rcml_jax.evaluation.relation_retrieval import gallery_retrieval, retrieval
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.methods.base import Batch, Method, Metrics, Params, Rows, same_shapes
from rcml_jax.methods.control_rows import control_rows
from rcml_jax.methods.tower_tables import TowerTables, flat
from rcml_jax.models.backbones import build_backbone
from rcml_jax.models.preprocessing import with_preprocessing
from rcml_jax.models.relation_pooling import FoldedRelation
from rcml_jax.models.towers.efficientnet import STATISTICS
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.models.two_towers import PairConfig, build_towers, load_pretrained
from rcml_jax.ops.divided import divided
from rcml_jax.ops.similarity import SIMILARITIES, l2_normalize
from rcml_jax.tasks.relations import MOST_RELATIONS, RelationTask
from rcml_jax.tasks.stored_states import (
    StoredStates,
    check_storable,
    image_inputs,
    params_digest,
    text_inputs,
)
from rcml_jax.tasks.towers import (
    check_packing,
    checkpoint_tower,
    frozen_parts,
    load_checkpoints,
    preprocessing,
    towers_config,
)


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Functions that embed any texts and images: first without a relation, then under R sentences.

    text: n texts → unit vectors (1 + R, n, d); image: images (n, H, W, 3) uint8 → the same, or
    (1, n, d) where image embeddings do not depend on the relation. shapes: modality → (number of
    relations, d). devices: number of those that a multiple of so many items is split over.
    """

    text: Callable[[Sequence[str]], np.ndarray]
    image: Callable[[np.ndarray], np.ndarray]
    shapes: dict[str, tuple[int, int]]
    devices: int = 1


class TokenReader(abc.ABC):
    """What a method that pools tokens under relations makes of texts, images and sentences.

    width: d of all states; image_length: states of an image; devices: as of `Embedder`.
    """

    width: int
    image_length: int
    devices: int = 1

    @abc.abstractmethod
    def text_lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Number of states of each text, (n,) int."""

    @abc.abstractmethod
    def text(self, texts: Sequence[str]) -> TokenStates:
        """The token states of texts."""

    @abc.abstractmethod
    def image(self, pixels: np.ndarray) -> TokenStates:
        """The token states of images (n, H, W, 3) uint8."""

    @abc.abstractmethod
    def relations(self, sentences: Sequence[str]) -> jax.Array:
        """The embeddings (R, d) of sentences, as `pool`, `attention` and `fold` take them."""

    @abc.abstractmethod
    def pool(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """Unit vectors (n, R, d) of n items under R relations; intra: (R,) bool."""

    @abc.abstractmethod
    def attention(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """The weights (n, R, T) of `pool`."""

    @abc.abstractmethod
    def fold(self, relation: jax.Array, intra: jax.Array) -> FoldedRelation:
        """The pooling under R relations, apart from any item."""


class RelationalMethod(Method):
    """Two towers on a relation graph, scored by retrieval, relation type and relation validity."""

    family = "relational"
    split_shared = ("related",)
    #: Noise for the relation sentences of a batch, as of `RelationTask.batches`.
    sentence_noise: Callable | None = None

    def __init__(self, config: Any, task: RelationTask):
        self.config = config
        self.task = task
        self.dtype = jnp.dtype(config.model.dtype)
        self.similarities = similarities_of(config.evaluation)
        self.selection = config.selection
        self.towers_config = towers_config(config.model, task.tokenizer)
        self.frozen_parts = frozen_parts(self.towers_config, config.model.freeze)
        self.examples_per_row = config.batch.texts_per_row
        if self.examples_per_row > 1:
            check_packing(self.towers_config)
        self.stored_modalities = stored_modalities(config.model)
        check_storable(self.stored_modalities)

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "RelationalMethod":
        """The method on the relation graph that `config.data` names."""
        return cls(config, RelationTask.load(config, workdir))

    @classmethod
    def completed(cls, config: Any) -> Any:
        """With the preprocessing that the checkpoints' files ask for."""
        came = from_checkpoint(config.model)
        if not (came.text or came.image) or "preprocessing" not in config.model:
            return config
        return with_preprocessing(config, preprocessing(config.model))

    def batches(self, local_rows: Rows | None = None) -> Any:
        """The grain iterator over training batches.

        Raises UserError, too, for splits that are too small to be evaluated.
        """
        self.task.check_queries()
        split = "related" in self.split_shared
        return self.task.batches(self.stored, self.sentence_noise, local_rows, split)

    @functools.cached_property
    def stored(self) -> dict[str, StoredStates]:
        """Stored states of frozen towers by modality (see `config.model.store_frozen`)."""
        if not self.stored_modalities:
            return {}
        task, towers = self.task, self.towers_config
        directory = task.cache / "token_states"
        found = {}
        for modality in self.stored_modalities:
            params = checkpoint_tower(self.config.model, modality)
            if modality == "text":
                own = towers.text_config
                inputs, digest = text_inputs(task.tokenizer, task.graph.texts, task.max_length)
            else:
                own = towers.vision_config
                inputs, digest = image_inputs(task.graph.images, task.images.framing)
            key = hashlib.sha256(digest + params_digest(params) + str(self.dtype).encode())
            name = f"{task.graph.name}-{modality}-{key.hexdigest()[:16]}.npy"
            apply: Callable[..., Any] = functools.partial(
                build_backbone(own, self.dtype).apply,
                {"params": params},
                project=lambda x: x,
                method="token_states",
            )
            found[modality] = StoredStates(directory / name, apply, inputs, len(task.graph))
        return found

    def one_example(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """A text (1, T) and an image (1, H, W, 3), whose shapes parameters depend on."""
        size = self.towers_config.vision_config.image_size
        return batch["shared"]["relation_ids"][:1], jnp.zeros((1, size, size, 3), jnp.uint8)

    @abc.abstractmethod
    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random parameters, the towers under "towers"."""

    def init(self, key: jax.Array, batch: Batch) -> Params:
        """Initial parameters: random, or from a checkpoint for towers that have one.

        A learned temperature is among them, as its logarithm.
        """
        params = self.init_params(key, batch)
        if self.config.loss.learn_temperature:
            log = jnp.log(jnp.asarray(self.config.loss.temperature, jnp.float32))
            params = {**params, "log_temperature": log}
        towers = load_checkpoints(self.config.model, params["towers"])
        params = {**params, "towers": towers}
        return jax.tree.map(jnp.asarray, params)

    def temperature(self, params: Params) -> float | jax.Array:
        """The loss's temperature: fixed by the configuration, or learned."""
        if self.config.loss.learn_temperature:
            return jnp.exp(params["log_temperature"])
        return self.config.loss.temperature

    def adopt(self, params: Params, found: Params) -> Params:
        """Take the towers of another run. Raises UserError where their sizes differ."""
        theirs = found.get("towers")
        if not same_shapes(params["towers"], theirs):
            raise UserError(
                f"config.model.init_from={self.config.model.init_from}: its towers have other "
                "sizes than config.model asks for; give the same model options to both runs"
            )
        return {**params, "towers": jax.tree.map(jnp.asarray, theirs)}

    def frozen(self, params: Params) -> Any:
        """True for the parameters of frozen towers, and for the statistics of batch norm."""
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict(
            {
                path: path[0] == "towers"
                and (path[1] in self.frozen_parts or path[-1] in STATISTICS)
                for path in flat
            }
        )

    def stop_frozen(self, params: Params) -> Params:
        """Stop the gradient of frozen towers, so that there is no backward pass through them."""
        if not self.frozen_parts:
            return params
        frozen = self.frozen(params)
        return jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)

    # Evaluation

    @abc.abstractmethod
    def tables(
        self,
        params: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, RelationEmbeddings]:
        """Embeddings of items under all relations, one table for each scoring of the method.

        needed: (relations, items) bool, the entries that will be read; a table may leave the others
        empty. sentences: sentences to use in place of the task's.
        """

    @abc.abstractmethod
    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of images and texts, (n, d) each, without an inter-sample relation."""

    @abc.abstractmethod
    def embedder(
        self, params: Params, sentences: Sequence[str], devices: Sequence[jax.Device] = ()
    ) -> Embedder:
        """An `Embedder` for any texts and images, under R sentences.

        devices: those of this process that the items are split over, where there are several.
        """

    def token_reader(self, params: Params, devices: Sequence[jax.Device] = ()) -> TokenReader:
        """Token states and their pooling; devices as of `embedder`.

        Raises UserError where the method pools no tokens.
        """
        raise UserError(
            f"the method {self.config.method!r} pools no tokens under a relation, so that it can "
            "neither keep nor read token states; give a run of rcml"
        )

    @abc.abstractmethod
    def describe(self) -> dict:
        """A description of this method's scoring, for the protocol in `eval.json`."""

    def validate(self, params: Params) -> Metrics:
        """Retrieval and relation type on validation, in the method's first scoring."""
        asked, types, items = self._asked("validation")
        by_gallery = self.selection.startswith("retrieval_all/")
        if by_gallery:
            gallery = self.task.gallery_queries("validation")
            items = np.union1d(items, gallery.items)
        table = next(iter(self.tables(params, items).values()))
        scores = _score(table, asked["retrieval"], types)
        found = scores["retrieval"] | {"relation_type": scores["relation_type"]}
        return found | ({"retrieval_all": _score_gallery(table, gallery)} if by_gallery else {})

    def _asked(self, split: str, *candidates: str) -> tuple[dict[str, Any], Any, np.ndarray]:
        """The split's retrieval queries by task, its relation type queries, and the items of all.

        candidates: further sets of candidates beside the controlled one.
        """
        queries = {"retrieval": self.task.retrieval_queries(split)}
        for name in candidates:
            queries[f"retrieval_{name}"] = self.task.retrieval_queries(split, name)
        types = self.task.relation_queries(split)
        parts = [types.a, types.b]
        for asked in queries.values():
            parts += [asked.query, asked.candidates.ravel()]
        return queries, types, np.unique(np.concatenate(parts))

    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """Run the evaluation protocol on a split; returns the content of `eval.json`."""
        del history
        task, config = self.task, self.config
        queries, types, items = self._asked(split, "random")
        gallery = task.gallery_queries(split)
        items = np.union1d(items, gallery.items)
        every = len(task.graph.relations) <= MOST_RELATIONS
        needed = _needed(len(task.graph.relations), items, queries, types, every)
        # Where items have one text, its first item's embedding stands for all.
        texts = np.searchsorted(items, gallery.items[np.unique(gallery.texts)])
        needed[np.unique(gallery.relation)[:, None], texts] = True
        tables = self.tables(params, items, needed)
        score = functools.partial(_score, queries=queries["retrieval"], types=types)
        measure = functools.partial(
            _measured, queries=queries, types=types, gallery=gallery, graph=task.graph
        )
        variants = {name: self._answered(name, measure(x)) for name, x in tables.items()}
        best = best_of(variants)
        first = next(iter(tables.values()))
        validity = {"train": task.validity_examples("train"), "test": task.validity_examples(split)}
        result = {
            "method": config.method,
            "dataset": task.graph.name,
            "split": split,
            "protocol": self._protocol(split, queries, types, gallery),
            **{
                name: best[name]
                for name in ("retrieval", "relation_type", "retrieval_all")
                if name in best
            },
            "relation_validity": self._validity(params, validity),
            **best,
            "controls": control_rows(self, params, first, queries, types, validity),
            "training_free_product": score(first, similarity="product"),
        }
        if unseen := self._unseen_sentences(params, items, needed, measure):
            result["unseen_sentences"] = unseen
        if frozen := self._pretrained_tables(items, needed):
            result["pretrained_clip"] = best_of({n: measure(table) for n, table in frozen.items()})
        if len(variants) > 1:
            result["variants"] = variants
        if self.similarities != ("cosine",):
            tasks = [task for task in ("retrieval", "relation_type") if task in best]
            names = {task: _best_name(variants, task) for task in tasks}
            result["similarities"] = {
                similarity: {
                    task: self._answered(name, score(tables[name], similarity=similarity))[task]
                    for task, name in names.items()
                }
                for similarity in self.similarities
            }
        result = self._reported(result)
        return result | {"gain_over_best_control": gains(result)}

    def _reported(self, result: dict) -> dict:
        """What `eval.json` holds of an evaluation: all of it."""
        return result

    def _answered(self, variant: str, found: dict) -> dict:
        """The ranking tasks, by name, that a way of scoring can answer: all of them."""
        del variant
        return found

    def _unseen_sentences(
        self, params: Params, items: np.ndarray, needed: np.ndarray, measure: Callable
    ) -> list[dict]:
        """The ranking tasks under each held-out paraphrase of the relations."""
        if not self.config.data.relation_text:
            return []
        return [
            best_of({n: measure(x) for n, x in self.tables(params, items, needed, said).items()})
            for said in self.task.graph.held_out_sentences()
        ]

    def _pretrained_tables(self, items: np.ndarray, needed: np.ndarray) -> dict:
        """Those of the CLIP checkpoint before any training, where the towers began as one."""
        if not self.config.model.pretrained or isinstance(self.towers_config, PairConfig):
            return {}
        _, towers = load_pretrained(self.config.model.pretrained)
        towers = jax.tree.map(jnp.asarray, towers)
        model = build_towers(self.towers_config, self.dtype)
        return TowerTables(self, model).tables(towers, items, needed)

    def checkpoint_states(
        self, params: Params, items: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Embeddings of items by the checkpoint's towers, before any training.

        Unit vectors (n, d) of "text" and "image", and (R, d) of the relation sentences. They are in
        the joint space if both towers are from one checkpoint, else in the tower's own width.
        """
        came = from_checkpoint(self.config.model)
        towers = build_towers(self.towers_config, self.dtype)
        variables = {"params": load_checkpoints(self.config.model, params["towers"])}

        def encoder(name: str) -> Callable:
            def encode(x: Any) -> jax.Array:
                states: Any = towers.apply(variables, x, projected=came.joint, method=name)
                return l2_normalize(states.pooled)

            return jax.jit(encode)

        encoders = {
            name: encoder(f"{name}_states") for name in ("text", "image") if getattr(came, name)
        }

        def encode_both(texts: Any, images: Any) -> dict[str, jax.Array]:
            inputs = {"text": texts, "image": images}
            return {name: flat(encode(inputs[name])) for name, encode in encoders.items()}

        sides = self.embed_items(encode_both, (), items)
        if "text" not in encoders:
            return sides, np.zeros((len(self.task.sentences), 0))
        return sides, np.asarray(encoders["text"](self.relation_ids))

    def _validity(self, params: Params, validity: dict) -> dict | None:
        """Fit the probe on triples of the training split, score it on those of the asked one."""
        sides = []
        for examples in (validity["train"], validity["test"]):
            items = np.union1d(examples.a, examples.b)
            table = next(iter(self.tables(params, items).values()))
            features = validity_features(table, examples.a, examples.b, examples.relation)
            sides.append((features, examples.label))
        return relation_validity(
            *sides, probe=self.config.evaluation.validity_probe, seed=self.config.seed
        )

    def _protocol(self, split: str, queries: dict, types: Any, gallery: Any) -> dict:
        data = self.config.data
        asked = queries["retrieval"]
        chance = min(1.0, 5 / asked.candidates.shape[1])
        half = (asked.candidates.shape[1] - 1) // 2
        return {
            "split_seed": data.split_seed,
            "disjoint": self.task.splits.disjoint,
            "items": len(self.task.splits.items(split)),
            "pairs_per_relation": data.pairs_per_relation or "all",
            "retrieval": "pairs of the split in both directions; controlled candidates: the "
            f"positive, {half} items linked to the query under another relation but not under "
            f"this one, {half} linked to something under this relation but to the query under "
            "none; where there are too few, unrelated items of the split, drawn uniformly by a "
            f"fixed seed; chance of Hit@5 {chance:.3f}",
            "candidates": asked.shares(),
            "retrieval_random": "the same pairs; the positive and "
            f"{asked.candidates.shape[1] - 1} items of the split unrelated to the query under "
            "any relation, drawn uniformly by a fixed seed",
            "queries_left_out": {name: int(x.skipped) for name, x in queries.items()},
            "macro": "means over relations of each relation's mean",
            "unseen_sentences": "the same queries under sentences that were kept for the test",
            "relation_type_left_out": int(types.skipped),
            "controls": "see rcml_jax.evaluation.controls; relation_only and query_only are of "
            "this model, words and frozen_towers of none; a gain is one over the best of them",
            "retrieval_all": "items of the split under each relation that links them to others of "
            "it; all its other items are ranked, or its distinct texts but the query's own, and "
            "all items linked under the relation are relevant; texts ask once a relation; chance: "
            "the mean over all orders",
            "retrieval_all_left_out": gallery.left_out,
            "relation_type": "the true relation among relations under which the pair is not "
            "linked, drawn by a fixed seed as often as they are true",
            "relation_type_all": "the true relation among all that do not link the pair; only "
            f"where there are at most {MOST_RELATIONS}",
            "relation_validity": "probe on [z_T(A), z_I(A), z_T(B), z_I(B), h_E], fitted on "
            "training triples; balanced, also in each relation; half of the negatives a true pair "
            "under a wrong relation, half an unrelated pair under this relation",
            "pretrained_clip": "where the towers began as a CLIP checkpoint: that one untrained, "
            "plain or with the sentence appended, whichever does better on this split",
            "similarity": "cosine",
            "ties": "count against the model",
            "selection": f"early stopping on {self.selection} of validation",
            "seed": self.config.seed,
            "scoring": self.describe(),
        }

    @functools.cached_property
    def relation_ids(self) -> np.ndarray:
        """Token ids of all relation sentences."""
        return self.task.encode(self.task.sentences)

    def packed(
        self, ids: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | PackedTexts]:
        """Pack padded texts, ids and mask (n, T), for the tower: their indices (N,), and its input.

        Texts are packed as in training (see `pack_texts`), unless they do not fill a row.
        """
        if self.examples_per_row == 1 or len(ids) < self.examples_per_row:
            return np.arange(len(ids)), ids
        return pack_texts(ids, mask, self.examples_per_row)

    def embed_items(
        self, function: Callable[..., Any], constants: Sequence[Any], items: np.ndarray, **axis: int
    ) -> Any:
        """What `function(*constants, texts, images)` gives of items, as float32 NumPy arrays.

        As `divided` does it, over all processes and the devices of each. axis: of the items in the
        results.
        """
        read = self.reader(items)
        found = divided(function, constants, read, len(items), devices=self.devices, **axis)
        return jax.tree.map(lambda x: x.astype(np.float32, copy=False), found)

    def reader(self, items: np.ndarray) -> Callable[[np.ndarray], tuple]:
        """A function: indices into items → these in the order of rows, and texts and images."""
        images, texts = self.stored.get("image", self.task.images), self.stored.get("text")
        if not texts:
            said = [self.task.graph.texts[i] for i in items]
            ids, mask = self.task.tokenizer.encode(said, self.task.max_length)

        def read(rows: np.ndarray) -> tuple[np.ndarray, tuple]:
            if texts:
                return rows, (texts(items[rows]), images(items[rows]))
            indices, tokens = self.packed(ids[rows], mask[rows])
            rows = rows[indices]
            return rows, (tokens, images(items[rows]))

        return read


def flat_images(images: jax.Array | TokenStates) -> jax.Array | TokenStates:
    """Flatten images in rows, (N/k, k, H, W, 3) → (N, H, W, 3); also stored states."""
    if isinstance(images, TokenStates):
        rows = images.pooled_index.ndim
        return TokenStates(*(x.reshape(-1, *x.shape[rows:]) for x in images))
    return images.reshape(-1, *images.shape[-3:])


def in_rows(embedded: jax.Array, images: jax.Array | TokenStates) -> jax.Array:
    """Embeddings (N, ...) of flat images → (N/k, k, ...) where the images are in rows."""
    rows = images.pooled_index.shape if isinstance(images, TokenStates) else images.shape[:-3]
    return embedded.reshape(*rows, *embedded.shape[1:])


def similarities_of(evaluation: Any) -> tuple[str, ...]:
    """The similarities that `config.evaluation.similarity` names."""
    name = evaluation.similarity
    return tuple(SIMILARITIES) if name == "all" else (name,)


def _score(table: RelationEmbeddings, queries: Any, types: Any, similarity: str = "cosine") -> dict:
    """Both ranking tasks on one table under one similarity."""
    return {
        "retrieval": retrieval(
            table, queries.query, queries.candidates, queries.relation, similarity=similarity
        ),
        "relation_type": relation_type(
            table, types.a, types.b, types.relations, similarity=similarity
        ),
    }


def _measured(
    table: RelationEmbeddings, queries: dict[str, Any], types: Any, gallery: Any, graph: Any
) -> dict:
    """The ranking tasks on one table."""
    found = {
        name: retrieval(table, asked.query, asked.candidates, asked.relation)
        for name, asked in queries.items()
    }
    found["relation_type"] = relation_type(table, types.a, types.b, types.relations)
    found["retrieval_all"] = _score_gallery(table, gallery)
    if len(graph.relations) <= MOST_RELATIONS:
        relations, counts = every_relation(graph, types)
        found["relation_type_all"] = relation_type(table, types.a, types.b, relations, where=counts)
    return found


def best_of(variants: dict) -> dict:
    """The best variant of each task."""
    tasks = [m.task for m in main_measures() if any(m.task in x for x in variants.values())]
    return {task: variants[_best_name(variants, task)][task] for task in tasks}


def _best_name(variants: dict, task: str) -> str:
    able, measure = [name for name, found in variants.items() if task in found], main_of(task).name
    return max(able, key=lambda name: variants[name][task][measure]["avg"])


def _score_gallery(table: RelationEmbeddings, gallery: Any) -> dict:
    g = gallery
    return gallery_retrieval(table, g.items, g.texts, g.query, g.relation, g.relevance, g.hidden)


def _needed(
    relations: int, items: np.ndarray, queries: dict[str, Any], types: Any, every: bool
) -> np.ndarray:
    """Which (relation, item) the retrieval and relation type tasks will look up.

    every: whether all relations of the pairs are asked for.
    """
    needed = np.zeros((relations, len(items)), bool)

    def row(some: np.ndarray) -> np.ndarray:
        return np.searchsorted(items, some)

    for asked in queries.values():
        needed[asked.relation, row(asked.query)] = True
        needed[asked.relation[:, None], row(asked.candidates)] = True
    chosen = np.arange(relations)[None] if every else types.relations
    needed[chosen, row(types.a)[:, None]] = True
    needed[chosen, row(types.b)[:, None]] = True
    return needed

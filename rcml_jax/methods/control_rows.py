"""The controls of a run: scores from a part of the question, on the method's own queries."""

from typing import Any

import numpy as np
import scipy.sparse

from rcml_jax.config import from_checkpoint
from rcml_jax.evaluation import SCORES, controls
from rcml_jax.evaluation.relation_probes import relation_validity, type_measures, validity_features
from rcml_jax.evaluation.relation_retrieval import retrieval, retrieval_measures
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.ops.similarity import l2_normalize

#: Largest number of training items in a relation's mean embedding.
ITEMS_OF_RELATION = 100


def control_rows(
    method: Any, params: Any, table: RelationEmbeddings, queries: dict, types: Any, validity: dict
) -> dict[str, dict]:
    """Results of each control by name (see `controls.LABELS`), for the tasks that it can answer.

    method: a `RelationalMethod`; table: its embeddings of the items that are asked for; queries:
    name of a retrieval task → `RetrievalQueries`; types: `RelationQueries`; validity: "train" and
    "test" → `ValidityExamples`.
    """
    rows: dict[str, dict] = {"chance": _chance(queries, types)}
    rows["relation_only"] = _relation_only(method, params, table, queries)
    rows["query_only"] = _query_only(method, params, table.items, queries, validity)
    rows["relation_frequency"] = _frequency(method.task, types)
    train, test = ((x.relation, x.label) for x in (validity["train"], validity["test"]))
    accuracy = controls.one_hot_validity(train, test, len(method.task.graph.relations))
    rows["relation_one_hot"] = {"relation_validity": {"accuracy": accuracy}}
    rows |= _words(method.task, table, queries, types)
    return rows | _frozen_towers(method, params, table, queries, types)


def training_items(task: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Items (m,) and relations (m,): the items of the training pairs of each relation.

    At most a fixed number of items of a relation, drawn by the split seed.
    """
    pairs = task.splits.pairs("train")
    both = np.unique(np.concatenate([pairs[:, [2, 0]], pairs[:, [2, 1]]]), axis=0)
    both = np.random.default_rng(task.config.data.split_seed).permutation(both)
    both = both[np.argsort(both[:, 0], kind="stable")]
    index = np.arange(len(both)) - np.searchsorted(both[:, 0], both[:, 0])
    relation, items = both[index < most].T
    return items, relation


def _chance(queries: dict, types: Any) -> dict:
    rows = {}
    for name, asked in queries.items():
        found = controls.chance(asked.candidates.shape[1], "retrieval")
        rows[name] = {measure: dict.fromkeys(SCORES, value) for measure, value in found.items()}
    found = controls.chance(types.relations.shape[1], "relation_type")
    top = {measure: dict.fromkeys(SCORES, value) for measure, value in found.items()}
    return rows | {"relation_type": top, "relation_validity": {"accuracy": 0.5}}


def _relation_only(method: Any, params: Any, table: RelationEmbeddings, queries: dict) -> dict:
    """The query replaced by the mean training embedding of the relation."""
    items, relation = training_items(method.task, ITEMS_OF_RELATION)
    trained = next(iter(method.tables(params, np.unique(items)).values()))
    total = len(method.task.graph.relations)
    text, image = (
        controls.relation_means(side, trained.rows(items), relation, total)
        for side in (trained.text, trained.image)
    )
    rows = {}
    for name, asked in queries.items():
        e = asked.relation
        scores = controls.query_scores(text[e], image[e], table, asked.candidates, e)
        rows[name] = retrieval_measures(scores, e)
    return rows


def _query_only(method: Any, params: Any, items: np.ndarray, queries: dict, validity: dict) -> dict:
    """Embeddings under the intra-sample relation; for validity the pair without the sentence."""

    def own(items: np.ndarray) -> RelationEmbeddings:
        image, text = method.own_embeddings(params, items)
        return RelationEmbeddings(items, text[None], image[None], np.zeros((1, text.shape[1])))

    table = own(items)
    rows: dict[str, dict] = {
        name: retrieval(table, asked.query, asked.candidates, asked.relation)
        for name, asked in queries.items()
    }
    sides = []
    for examples in (validity["train"], validity["test"]):
        table = own(np.union1d(examples.a, examples.b))
        nothing = np.zeros(len(examples.a), np.int64)
        features = validity_features(table, examples.a, examples.b, nothing)
        sides.append((features, examples.label))
    probe, seed = method.config.evaluation.validity_probe, method.config.seed
    rows["relation_validity"] = relation_validity(*sides, probe=probe, seed=seed)
    return rows


def _frequency(task: Any, types: Any) -> dict:
    counts = np.bincount(task.splits.pairs("train")[:, 2], minlength=len(task.graph.relations))
    scores = controls.frequency_scores(types.relations, counts)
    return {"relation_type": type_measures(dict.fromkeys(SCORES, scores), types.relations)}


def _words(task: Any, table: RelationEmbeddings, queries: dict, types: Any) -> dict[str, dict]:
    """TF-IDF of the texts, with the sentence, and with the mean vector of a relation's texts."""
    texts = task.graph.texts
    trained, relation = training_items(task, len(texts))
    mine = np.unique(trained)
    fitted = [texts[i] for i in mine]
    listed = [*(texts[i] for i in table.items), *task.sentences, *fitted]
    vectors = controls.tf_idf(listed, fitted)
    # One more row for each relation: the mean of the vectors of its training items.
    sentence, means = len(table.items), len(listed)
    members = np.ones(len(trained)), (relation, np.searchsorted(mine, trained))
    weights = scipy.sparse.csr_array(members, shape=(len(task.sentences), len(mine)))
    mean = controls.unit_rows(weights @ vectors[means - len(mine) :])
    vectors = scipy.sparse.csr_array(scipy.sparse.vstack([vectors, mean]))
    asks = {"words": None, "sentence": sentence, "relation": means}
    parts: dict[str, dict] = {name: {} for name in asks}
    for name, asked in queries.items():
        candidates, e = table.rows(asked.candidates), asked.relation[:, None]
        for part, start in asks.items():
            by = table.rows(asked.query)[:, None] if start is None else start + e
            parts[part][name] = controls.sparse_products(vectors, by, candidates)
    added = {
        "words": ("words",),
        "words_sentence": ("words", "sentence"),
        "words_relation_only": ("relation",),
        "words_and_relation": ("words", "relation"),
    }
    rows: dict[str, dict] = {
        control: {
            name: retrieval_measures({"tt": sum(parts[p][name] for p in used)}, asked.relation)
            for name, asked in queries.items()
        }
        for control, used in added.items()
    }
    sides = table.rows(types.a)[:, None], table.rows(types.b)[:, None]
    for control, start in (("words_sentence", sentence), ("words_and_relation", means)):
        a, b = (controls.sparse_products(vectors, start + types.relations, x) for x in sides)
        rows[control]["relation_type"] = type_measures({"tt": a + b}, types.relations)
    return rows


def _frozen_towers(
    method: Any, params: Any, table: RelationEmbeddings, queries: dict, types: Any
) -> dict[str, dict]:
    """Cosines of the towers that came from a checkpoint, before any training; none without one.

    In a joint space (one CLIP checkpoint) all five scores; else TT and II where the tower came from
    a checkpoint, and their mean as AVG. The sentence is compared with the candidate.
    """
    came = from_checkpoint(method.config.model)
    if not (came.text or came.image):
        return {}
    sides, sentences = method.checkpoint_states(params, table.items)
    result: dict[str, dict] = {"frozen_towers": {}, "frozen_towers_sentence": {}}
    for name, asked in queries.items():
        a, b = table.rows(asked.query)[:, None], table.rows(asked.candidates)
        plain = _cosines(sides, a, b, came.joint)
        result["frozen_towers"][name] = retrieval_measures(plain, asked.relation)
        if came.text:
            more = _towards(sentences[asked.relation][:, None], sides, b, came.joint)
            both = {score: x + more[score] for score, x in plain.items() if score in more}
            result["frozen_towers_sentence"][name] = retrieval_measures(both, asked.relation)
    if came.text:
        e, rows = sentences[types.relations], (table.rows(types.a), table.rows(types.b))
        first, second = (np.sum(e * sides["text"][row][:, None], axis=-1) for row in rows)
        measured = type_measures({"tt": first + second}, types.relations)
        result["frozen_towers_sentence"]["relation_type"] = measured
    return {name: found for name, found in result.items() if found}


def _cosines(sides: dict, a: np.ndarray, b: np.ndarray, joint: bool) -> dict[str, np.ndarray]:
    def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # One query at a time, so that (q, c, d) is never in memory.
        return np.stack([y[k] @ x[i] for (i,), k in zip(a, b, strict=True)])

    scores = {}
    for name in ("tt", "ii", "ti", "it"):
        x, y = (sides.get({"t": "text", "i": "image"}[side]) for side in name)
        if x is not None and y is not None and (joint or name[0] == name[1]):
            scores[name] = products(x, y)
    if joint:
        both = np.asarray(l2_normalize(sides["text"] + sides["image"]))
        scores["avg"] = products(both, both)
    elif len(scores) > 1:
        scores["avg"] = (scores["tt"] + scores["ii"]) / 2
    return scores


def _towards(e: np.ndarray, sides: dict, b: np.ndarray, joint: bool) -> dict[str, np.ndarray]:
    """Cosines of sentences (q, 1, d) with candidates; images only in a joint space."""

    def products(y: np.ndarray) -> np.ndarray:
        return np.stack([y[k] @ x[0] for x, k in zip(e, b, strict=True)])

    text = products(sides["text"])
    if not joint:
        return {"tt": text, "avg": text / 2}
    image = products(sides["image"])
    both = products(np.asarray(l2_normalize(sides["text"] + sides["image"])))
    return {"tt": text, "it": text, "ii": image, "ti": image, "avg": both}

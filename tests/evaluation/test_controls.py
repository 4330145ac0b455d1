"""Controls against their twins, and on three planted catalogues that they tell apart."""

import dataclasses

import numpy as np
import pytest

from rcml_jax.data import queries
from rcml_jax.data.relation_graph import normalize_pairs, split_graph
from rcml_jax.evaluation import SCORES, controls
from rcml_jax.evaluation.relation_probes import type_measures
from rcml_jax.evaluation.relation_retrieval import retrieval, retrieval_measures
from rcml_jax.evaluation.scores import RelationEmbeddings
from tests import reference
from tests.data.conftest import make_graph
from tests.evaluation.tables import ITEMS, KINDS, arrays, random_table

TEXTS = ("red apple", "Red red pear, ripe", "green apple", "…", "blue PEAR of 1999", "apple")


def test_tf_idf_is_that_of_the_twin():
    vectors = controls.tf_idf(TEXTS, TEXTS[:3])
    expected = reference.tf_idf(TEXTS[:3] + TEXTS[4:], TEXTS[:3])
    expected.insert(3, {})  # a text without words
    a, b = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
    found = controls.sparse_products(vectors, a, b)
    twin = [[reference.overlap(x, y) for y in expected] for x in expected]
    np.testing.assert_allclose(found, twin, atol=1e-12)
    assert found[0, 1] > found[0, 2] > found[0, 4] == 0
    np.testing.assert_allclose(np.diag(found), [1, 1, 1, 0, 1, 1])
    assert controls.tf_idf(["", "?"], ["?"]).shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_relation_means_and_the_scores_of_given_queries(kind):
    table = random_table(**KINDS[kind])
    rng = np.random.default_rng(1)
    rows, relation = rng.integers(10, size=12), np.arange(12) % 3  # none of relation 3
    text, image, _ = arrays(table)
    means = [controls.relation_means(x, rows, relation, 4) for x in (table.text, table.image)]
    expected = [reference.relation_means(x, rows, relation, 4) for x in (text, image)]
    for found, twin in zip(means, expected, strict=True):
        np.testing.assert_allclose(found, twin, atol=1e-6)
    assert not means[0][3].any()
    candidates = np.stack([rng.permutation(10)[:4] for _ in range(6)])
    e = np.array([0, 1, 2, 3, 1, 0])
    scores = controls.query_scores(means[0][e], means[1][e], table, ITEMS[candidates], e)
    assert tuple(scores) == SCORES
    # As if the mean were one more item of the table.
    asked = [
        np.concatenate([np.repeat(x, 4 // len(x), 0), mean[:, None]], axis=1)
        for x, mean in zip((text, image), expected, strict=True)
    ]
    for q, (row, r) in enumerate(zip(candidates, e, strict=True)):
        twin = [reference.pair_score(*asked, None, 10, c, r, "cosine") for c in row]
        for name in SCORES:
            np.testing.assert_allclose(scores[name][q], [x[name] for x in twin], atol=1e-5)


def test_the_frequency_of_relations():
    relations = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2], [3, 0, 1]])
    counts = np.array([5, 3, 3, 9])
    scores = controls.frequency_scores(relations, counts)
    np.testing.assert_array_equal(scores, [[5, 3, 3], [3, 3, 5], [3, 5, 3], [9, 5, 3]])
    # The tie of 2 and 1 counts against it.
    measures = type_measures({"avg": scores}, relations)
    assert measures["top1"]["avg"] == 0.5
    assert measures["macro"]["top1"]["avg"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    where = np.array([[True, False, True]] * 4)
    assert type_measures({"avg": scores}, relations, where=where)["top1"]["avg"] == 0.5


def test_the_one_hot_knows_how_often_a_relation_is_true_and_no_more():
    train = np.array([0] * 10 + [1] * 10), np.repeat([1, 0, 1, 0], [9, 1, 2, 8])
    test = np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 0, 1])
    assert controls.one_hot_validity(train, test, 3) == pytest.approx(0.6)


def test_chance_is_the_mean_over_random_orders():
    rng = np.random.default_rng(0)
    scores = rng.random((20_000, 9))
    found = retrieval_measures({"avg": scores}, np.zeros(20_000, int))
    for name, value in controls.chance(9, "retrieval").items():
        assert found[name]["avg"] == pytest.approx(value, abs=0.01)


def test_the_best_control_by_avg_or_else_by_its_texts():
    rows = {
        "words": {"retrieval": {"hit@5": {"tt": 0.6}}},
        "query_only": {"retrieval": {"hit@5": {"tt": 0.9, "avg": 0.5}}},
        "relation_one_hot": {"relation_validity": {"accuracy": 0.5}},
    }
    assert controls.best(rows, "retrieval", "hit@5") == ("words", 0.6)
    assert controls.best(rows, "relation_type", "top3") is None
    assert set(rows) <= set(controls.LABELS)


def test_gains_are_over_the_best_control_of_each_task():
    result = {
        "retrieval": {"hit@5": {"tt": 0.9, "avg": 0.7}},
        "relation_validity": {"accuracy": 0.625},
        "controls": {
            "words": {"retrieval": {"hit@5": {"tt": 0.75}}},
            "query_only": {"retrieval": {"hit@5": {"tt": 0.9, "avg": 0.5}}},
            "relation_one_hot": {"relation_validity": {"accuracy": 0.5}},
        },
    }
    assert controls.gains(result) == {
        "retrieval": {"measure": "hit@5", "control": "words", "gain": pytest.approx(-0.05)},
        "relation_validity": {"measure": "accuracy", "control": "relation_one_hot", "gain": 0.125},
    }
    assert controls.gains({"retrieval": result["retrieval"]}) == {}


# Planted catalogues: 240 items of 12 colours and 10 shapes, in a random order.

COLOUR, SHAPE = np.divmod(np.random.default_rng(7).permutation(240) % 120, 10)


def planted(which):
    """A graph and the embedding (R, n, d) of a model that knows what each relation asks for."""
    colours, shapes = np.eye(12)[COLOUR], np.eye(10)[SHAPE]
    nothing = np.zeros_like
    if which == "both":  # the sentence names a respect, the query has the value
        values = [COLOUR, SHAPE]
        known = [
            np.concatenate([colours, nothing(shapes)], 1),
            np.concatenate([nothing(colours), shapes], 1),
        ]
    elif which == "sentence":  # the sentence names the value: "they are both red"
        values = [np.where(k == COLOUR, k, -1) for k in range(12)]
        known = [np.stack([k == COLOUR, k != COLOUR], 1).astype(float) for k in range(12)]
    else:  # two sentences for one thing, whatever they say, of other items
        values = [np.where(k == COLOUR % 2, COLOUR, -1) for k in range(2)]
        known = [colours, colours]
    pairs = [
        (i, j, e)
        for e, value in enumerate(values)
        for i in range(240)
        for j in range(i)
        if value[i] == value[j] >= 0
    ]
    pairs, _ = normalize_pairs(np.array(pairs))
    graph = dataclasses.replace(
        make_graph(items=240, relations=len(values)),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
    ).validate()
    known = np.stack(known)
    # So small that it only breaks ties.
    return graph, known + 1e-3 * np.random.default_rng(0).normal(size=known.shape)


@pytest.mark.parametrize("which", ["both", "sentence", "query"])
def test_the_controls_tell_what_an_answer_needs(which):
    graph, known = planted(which)
    splits = split_graph(graph, seed=0, fractions=(0.5, 0, 0.5))
    controlled = queries.controlled_queries(graph, splits, "test", limit=600, seed=0)
    drawn = queries.retrieval_queries(graph, splits, "test", limit=600, seed=0)
    everything = np.arange(240)
    train = splits.pairs("train")
    rows, relation = train[:, :2].ravel(), np.repeat(train[:, 2], 2)

    def measured(queries):
        asked = queries.query, queries.candidates, queries.relation
        table = RelationEmbeddings(everything, known, known, known[:, 0])
        mean = controls.relation_means(known, rows, relation, len(known))[queries.relation]
        alone = RelationEmbeddings(everything, *[known.mean(0, keepdims=True)] * 2, known[:, 0])
        return {
            "model": retrieval(table, *asked)["hit@5"]["avg"],
            "relation": retrieval_measures(
                controls.query_scores(mean, mean, table, asked[1], asked[2]), asked[2]
            )["hit@5"]["avg"],
            "query": retrieval(alone, *asked)["hit@5"]["avg"],
        }

    found, by_chance = measured(controlled), 5 / 21
    assert found["model"] == 1
    if which == "both":
        assert controlled.shares()["unrelated"] < 0.1
        assert abs(found["relation"] - by_chance) < 0.08
        # Of the ten that share the other respect and the right one, which come first is chance.
        assert abs(found["query"] - 5 / 11) < 0.1
    elif which == "sentence":
        assert found["relation"] == 1
        assert measured(drawn)["relation"] == 1
    else:
        assert found["query"] == 1
        assert found["relation"] < 0.5

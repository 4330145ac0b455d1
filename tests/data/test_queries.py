import dataclasses
import time

import numpy as np
import pytest

from rcml_jax.data import queries
from rcml_jax.data.relation_graph import normalize_pairs, split_graph
from rcml_jax.errors import UserError
from tests.data.conftest import make_classes, make_graph


@pytest.fixture(scope="module")
def graph():
    return make_graph(items=300, relations=30, group=12)


@pytest.fixture(scope="module", params=["item", "pair"])
def splits(graph, request):
    return split_graph(graph, seed=0, disjoint=request.param)


def links(graph):
    return {tuple(p) for p in graph.pairs.tolist()} | {
        (b, a, e) for a, b, e in graph.pairs.tolist()
    }


@pytest.mark.parametrize("dense", [True, False])
def test_retrieval_candidates_are_unrelated_items_of_the_split(graph, splits, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(queries, "_DENSE_ITEMS", 0)
    q = queries.retrieval_queries(graph, splits, "train", seed=1)
    pairs = splits.pairs("train").tolist()
    both = sorted(pairs + [[b, a, e] for a, b, e in pairs])
    asked = np.stack([q.query, q.candidates[:, 0], q.relation], axis=1)
    assert sorted(asked.tolist()) == both
    assert q.candidates.shape == (len(both), 21)
    assert q.skipped == 0
    related = graph.related().toarray()
    assert related[q.query, q.candidates[:, 0]].all()
    assert not related[q.query[:, None], q.candidates[:, 1:]].any()
    assert np.isin(q.candidates, splits.items("train")).all()
    ordered = np.sort(q.candidates, axis=1)
    assert np.all(ordered[:, 1:] != ordered[:, :-1])


@pytest.mark.parametrize("dense", [True, False])
def test_retrieval_candidates_are_uniform(graph, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(queries, "_DENSE_ITEMS", 0)
    items = np.arange(100)
    query = np.full(4000, 7)
    drawn, found = queries._unrelated(graph, query, items, 20, np.random.default_rng(0))
    assert found.all()
    free = np.flatnonzero(~graph.related_block([7], items)[0])
    counts = np.bincount(drawn.ravel(), minlength=100)
    share = 20 / len(free)
    spread = np.sqrt(4000 * share * (1 - share))
    assert np.all(np.abs(counts[free] - 4000 * share) < 5 * spread)
    assert counts.sum() == counts[free].sum()


def test_the_limit_draws_and_everything_is_deterministic(graph, splits):
    for make in (
        queries.retrieval_queries,
        queries.controlled_queries,
        queries.relation_candidates,
        queries.validity_examples,
    ):
        one, two = (make(graph, splits, "train", limit=50, seed=4) for _ in range(2))
        other = make(graph, splits, "train", limit=50, seed=5)
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(two, field.name)
            np.testing.assert_array_equal(a, b)
            assert np.size(a) == 1 or len(a) <= 50
        first = dataclasses.fields(one)[0].name
        assert not np.array_equal(getattr(one, first), getattr(other, first))


def test_queries_without_enough_unrelated_items_are_counted():
    # One item, 0, is related to everything; the others only to it and to their neighbour.
    pairs = np.array([[0, i, 0] for i in range(1, 30)], np.int32)
    graph = dataclasses.replace(
        make_graph(items=30), pairs=pairs, pair_split=np.full(29, -1, np.int8)
    )
    splits = split_graph(graph, seed=0, disjoint="pair", fractions=(1, 0, 0))
    q = queries.retrieval_queries(graph, splits, "train", negatives=20, seed=0)
    assert (len(q.query), q.skipped) == (29, 29)
    assert 0 not in q.query
    with pytest.raises(UserError, match="29 unrelated"):
        queries.retrieval_queries(graph, splits, "train", negatives=29, seed=0)
    with pytest.raises(UserError, match="test split holds no pair"):
        queries.retrieval_queries(graph, splits, "test", seed=0)


def test_relation_candidates_do_not_link_the_pair(graph, splits):
    q = queries.relation_candidates(graph, splits, "train", seed=1)
    assert q.relations.shape == (len(splits.pairs("train")), 10)
    linked = links(graph)
    for a, b, (true, *others) in zip(q.a, q.b, q.relations, strict=True):
        assert (a, b, true) in linked
        assert not any((a, b, e) in linked for e in others)
        assert len({true, *others}) == 10


@pytest.mark.parametrize("dense", [True, False])
def test_negatives_are_linked_by_nothing_and_have_another_text(dense, monkeypatch):
    """With class links, whatever pairs of them were drawn."""
    if not dense:
        monkeypatch.setattr(queries, "_DENSE_ITEMS", 0)
    graph = make_classes(classes=20, each=6, relations=4, share=0.1).validate()
    splits = split_graph(graph, seed=0, fractions=(0, 0, 1))
    links = {tuple(sorted(link[:2])) for link in graph.class_links.tolist()}
    q = queries.retrieval_queries(graph, splits, "test", negatives=9, limit=300, seed=0)
    for query, (positive, *negatives), e in zip(q.query, q.candidates, q.relation, strict=True):
        assert graph.linked(query, positive, e)
        for negative in negatives:
            assert graph.texts[negative] != graph.texts[query]
            assert tuple(sorted(graph.labels[[query, negative]])) not in links
    # A relation that was not drawn for a pair, but holds, is no wrong one; nor is it false.
    types = queries.relation_candidates(graph, splits, "test", candidates=3, limit=300, seed=0)
    true = graph.linked(types.a[:, None], types.b[:, None], types.relations)
    np.testing.assert_array_equal(true, np.arange(3) == np.zeros((len(true), 1)))
    v = queries.validity_examples(graph, splits, "test", limit=300, seed=0)
    np.testing.assert_array_equal(graph.linked(v.a, v.b, v.relation), v.label == 1)


def test_relation_candidates_of_a_graph_with_few_relations():
    graph = make_graph(items=40, relations=4, group=12)
    splits = split_graph(graph, seed=0, disjoint="pair")
    q = queries.relation_candidates(graph, splits, "train", seed=1)
    assert q.relations.shape[1] == 4
    counts = np.bincount(graph.pair_units())[graph.pair_units()][splits.pair_split == 0]
    assert (len(q.a), q.skipped) == (np.sum(counts == 1), np.sum(counts > 1))


def test_relation_candidates_where_every_pair_has_several_relations():
    graph = make_graph(items=40, relations=1)
    doubled = np.concatenate([graph.pairs, graph.pairs + np.array([0, 0, 1])])
    doubled = np.unique(doubled, axis=0).astype(np.int32)
    graph = dataclasses.replace(
        graph,
        pairs=doubled,
        pair_split=np.full(len(doubled), -1, np.int8),
        relations=("a", "b", "c"),
    )
    splits = split_graph(graph, seed=0, disjoint="pair")
    q = queries.relation_candidates(graph, splits, "train", seed=1)
    assert q.skipped == 0
    assert np.all(q.relations[:, 1:] == 2)


def test_validity_is_balanced_and_every_false_one_is_false(graph, splits):
    v = queries.validity_examples(graph, splits, "train", seed=1)
    linked = links(graph)
    truth = [(a, b, e) in linked for a, b, e in zip(v.a, v.b, v.relation, strict=True)]
    np.testing.assert_array_equal(truth, v.label == 1)
    assert np.mean(v.label) == 0.5
    false = v.label == 0
    related = graph.related_values(v.a[false], v.b[false])
    assert np.mean(related) == 0.5  # a true pair under a wrong relation
    assert np.isin(v.a, splits.items("train")).all()
    assert np.isin(v.b, splits.items("train")).all()
    # Neither the first item nor the sentence tells the answer.
    true = v.label == 1
    assert sorted(v.a[true]) == sorted(v.a[false])
    assert sorted(v.relation[true]) == sorted(v.relation[false])


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("disjoint", ["item", "pair"])
def test_controlled_candidates_are_linked_to_one_half_of_the_query(graph, disjoint, classes):
    # Five groups under each relation, so that it links items to others than the query's.
    pairs, _ = normalize_pairs(graph.pairs // [1, 1, 5])
    graph = dataclasses.replace(graph, pairs=pairs, pair_split=np.full(len(pairs), -1, np.int8))
    splits = split_graph(graph, seed=0, disjoint=disjoint)
    if classes:
        graph = make_classes(classes=40, each=6, relations=4, share=0.1).validate()
        splits = split_graph(graph, seed=0, fractions=(1, 0, 0))
    q = queries.controlled_queries(graph, splits, "train", limit=400, seed=1)
    assert q.skipped == 0
    plain = queries.retrieval_queries(graph, splits, "train", limit=400, seed=1)
    for name in ("query", "relation"):
        np.testing.assert_array_equal(getattr(q, name), getattr(plain, name))
    items = splits.items("train")
    assert np.isin(q.candidates, items).all()
    ordered = np.sort(q.candidates, axis=1)
    assert np.all(ordered[:, 1:] != ordered[:, :-1])
    query, relation = q.query[:, None], q.relation[:, None]
    right = graph.linked(query, q.candidates, relation)
    np.testing.assert_array_equal(right, np.arange(21) == np.zeros((len(right), 1)))
    near = graph.linked_any(query, q.candidates)
    np.testing.assert_array_equal(near, q.kind < queries.SAME_RELATION)
    if classes:
        assert not np.any(graph.labels[query] == graph.labels[q.candidates[:, 1:]])
    else:
        pairs = splits.pairs("train")
        members = {e: set(pairs[pairs[:, 2] == e, :2].ravel()) for e in range(6)}
        for row, kinds, e in zip(q.candidates, q.kind, q.relation, strict=True):
            same = row[kinds == queries.SAME_RELATION]
            assert set(same) <= members[e]
        # Of what another relation links to the query, what this one links to others comes first.
        in_relation = np.array(
            [
                [c in members[e] for c in row]
                for row, e in zip(q.candidates, q.relation, strict=True)
            ]
        )
        for row in np.where(q.kind == queries.OTHER_RELATION, in_relation, -1):
            row = row[row >= 0]
            assert np.all(np.diff(row) <= 0)
    shares = q.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.2 < shares["other_relation"] <= 0.5
    assert 0.2 < shares["same_relation"] <= 0.5


def test_controlled_candidates_are_filled_up_and_counted():
    # One relation alone: nothing is linked to the query under another one.
    graph = make_graph(items=60, relations=1, group=6)
    splits = split_graph(graph, seed=0, disjoint="item", fractions=(1, 0, 0))
    q = queries.controlled_queries(graph, splits, "train", seed=0)
    assert q.shares() == {"other_relation": 0, "same_relation": 0, "unrelated": 1}
    with pytest.raises(UserError, match="55 unrelated"):
        queries.controlled_queries(graph, splits, "train", negatives=55, seed=0)


def test_wrong_relations_are_as_frequent_as_true_ones():
    """So that how often a relation is true says nothing, where there are many of them."""
    rng = np.random.default_rng(0)
    graph = make_graph(items=2000, relations=40)
    weight = 1 / np.arange(1, 41)
    relation = rng.choice(40, size=6000, p=weight / weight.sum())
    pairs = np.concatenate([rng.integers(2000, size=(6000, 2)), relation[:, None]], axis=1)
    pairs, _ = normalize_pairs(pairs)
    graph = dataclasses.replace(graph, pairs=pairs, pair_split=np.full(len(pairs), -1, np.int8))
    splits = split_graph(graph, seed=0, disjoint="pair", fractions=(0, 0, 1))
    q = queries.relation_candidates(graph, splits, "test", candidates=4, seed=0)
    count = np.bincount(q.relations[:, 0], minlength=40)
    first = np.mean(np.argmax(count[q.relations], axis=1) == 0)
    assert abs(first - 0.25) < 0.1
    # Drawn uniformly, the most frequent of four would mostly be the true one.
    uniform = np.concatenate([q.relations[:, :1], rng.integers(40, size=(len(q.a), 3))], axis=1)
    assert np.mean(np.argmax(count[uniform], axis=1) == 0) > 0.6
    v = queries.validity_examples(graph, splits, "test", seed=0)
    counts = [np.bincount(v.relation[v.label == x], minlength=40) for x in (0, 1)]
    np.testing.assert_array_equal(*counts)


def test_every_relation_counts_but_the_other_right_ones(graph, splits):
    q = queries.relation_candidates(graph, splits, "train", limit=60, seed=1)
    relations, counts = queries.every_relation(graph, q)
    np.testing.assert_array_equal(relations[:, 0], q.relations[:, 0])
    np.testing.assert_array_equal(np.sort(relations), np.tile(np.arange(30), (60, 1)))
    linked = links(graph)
    for a, b, row, where in zip(q.a, q.b, relations, counts, strict=True):
        expected = [k == 0 or (a, b, e) not in linked for k, e in enumerate(row)]
        np.testing.assert_array_equal(where, expected)


def test_validity_needs_something_false():
    graph = make_graph(relations=1)
    splits = split_graph(graph, seed=0, disjoint="pair")
    with pytest.raises(UserError, match="two relations"):
        queries.validity_examples(graph, splits, "train", seed=0)


def test_ten_thousand_queries_of_a_large_graph_are_quick():
    graph = make_graph(items=50_000, relations=400, group=60)
    splits = split_graph(graph, seed=0)
    graph.related()
    start = time.perf_counter()
    q = queries.retrieval_queries(graph, splits, "train", seed=0)
    queries.controlled_queries(graph, splits, "train", seed=0)
    queries.relation_candidates(graph, splits, "train", seed=0)
    queries.validity_examples(graph, splits, "train", seed=0)
    assert len(q.query) == 10_000
    assert time.perf_counter() - start < 15  # about 1 s on an idle machine


@pytest.mark.parametrize(
    "draw",
    [queries.retrieval_queries, queries.relation_candidates, queries.validity_examples],
)
def test_no_relation_has_more_pairs_than_allowed(draw):
    graph = make_graph(items=200, relations=6, group=40)
    splits = split_graph(graph, seed=0, disjoint="pair")
    share = 2 if draw is queries.retrieval_queries else 1
    drawn = draw(graph, splits, "test", per_relation=7, seed=0)
    again = draw(graph, splits, "test", per_relation=7, seed=0)
    for field in dataclasses.fields(drawn):
        np.testing.assert_array_equal(getattr(drawn, field.name), getattr(again, field.name))
    if draw is queries.relation_candidates:
        counts = np.bincount(drawn.relations[:, 0])
    elif draw is queries.retrieval_queries:
        counts = np.bincount(drawn.relation)
    else:
        counts = np.bincount(drawn.relation[drawn.label == 1])
    assert counts.max() <= 7 * share
    if draw is not queries.validity_examples:
        assert counts.max() > 5 * share  # some relation has more pairs than it may show


def test_relations_of_one_sentence_link_the_same_pairs():
    graph = make_graph(items=60, relations=6, group=6)
    same = np.array([0, 1, 0, 3, 4, 0], np.int32)
    twins = dataclasses.replace(graph, same_sentence=same)
    splits = split_graph(graph, seed=0)
    pairs = graph.pairs
    for relation in range(6):
        own = np.isin(np.arange(6), np.flatnonzero(same == same[relation]))
        expected = np.array(
            [any(graph.linked(a, b, r) for r in np.flatnonzero(own)) for a, b, _ in pairs]
        )
        found = twins.linked(pairs[:, 0], pairs[:, 1], np.full(len(pairs), relation))
        np.testing.assert_array_equal(found, expected)
    rows, relations = twins.links_of(pairs[:, :2])
    dense = np.zeros((len(pairs), 6), bool)
    dense[rows, relations] = True
    every = twins.linked(pairs[:, :1], pairs[:, 1:2], np.arange(6))
    np.testing.assert_array_equal(dense, every)
    asked = queries.relation_candidates(twins, splits, "train", candidates=4, seed=0)
    assert len(asked.a)
    # No wrong answer has the sentence of the right one.
    assert not np.any(same[asked.relations[:, 1:]] == same[asked.relations[:, :1]])
    plain = queries.relation_candidates(graph, splits, "train", candidates=4, seed=0)
    assert np.any(same[plain.relations[:, 1:]] == same[plain.relations[:, :1]])
    gallery = queries.gallery_queries(twins, splits, "train", seed=0)
    relevance = gallery.relevance.toarray()
    own = np.arange(len(gallery.items)) == gallery.query[:, None]
    a, b = gallery.items[gallery.query][:, None], gallery.items[None]
    expected = twins.linked(a, b, gallery.relation[:, None]) & ~own
    np.testing.assert_array_equal(relevance, expected)

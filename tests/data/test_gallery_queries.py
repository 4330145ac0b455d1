import dataclasses

import numpy as np
import pytest

from rcml_jax.data.queries import gallery_queries
from rcml_jax.data.relation_graph import split_graph
from rcml_jax.errors import UserError
from tests.data.conftest import make_classes, make_graph, make_respects


def truth(graph, splits, split, linked):
    """(item, relation) → the relevant items, by the definition; `linked(a, b, e)` says what is."""
    items = splits.items(split).tolist()
    found = {}
    for e in range(len(graph.relations)):
        for a in items:
            relevance = {b for b in items if b != a and linked(a, b, e)}
            if relevance:
                found[a, e] = relevance
    return found


def as_sets(queries, matrix):
    rows = matrix.toarray()
    assert rows.shape == (len(queries.query), len(queries.items))
    keys = zip(queries.items[queries.query].tolist(), queries.relation.tolist(), strict=True)
    return {key: set(queries.items[row].tolist()) for key, row in zip(keys, rows, strict=True)}


def test_items_are_right_that_are_paired_with_the_query():
    graph = make_graph(items=80, relations=9)
    splits = split_graph(graph, seed=0, fractions=(0.5, 0, 0.5))
    q = gallery_queries(graph, splits, "test", seed=0)
    pairs = {tuple(pair) for pair in graph.pairs.tolist()}
    expected = truth(graph, splits, "test", lambda a, b, e: (min(a, b), max(a, b), e) in pairs)
    assert as_sets(q, q.relevance) == expected
    assert as_sets(q, q.hidden) == {(a, e): {a} for a, e in expected}
    np.testing.assert_array_equal(q.items, splits.items("test"))
    np.testing.assert_array_equal(q.texts, np.arange(len(q.items)))
    assert np.all(np.diff(q.relation) >= 0)
    assert q.left_out == 0


@pytest.mark.parametrize("declared", [False, True])
def test_partners_of_other_splits_are_not_ranked(declared):
    graph = make_graph(items=40, relations=9)
    splits = split_graph(graph, seed=0, disjoint="pair")
    if declared:
        graph = dataclasses.replace(graph, pair_split=splits.pair_split)
        splits = split_graph(graph, seed=1)
    q = gallery_queries(graph, splits, "test", seed=0)
    mine = {tuple(pair) for pair in splits.pairs("test").tolist()}
    every = {tuple(pair) for pair in graph.pairs.tolist()}
    expected = truth(graph, splits, "test", lambda a, b, e: (min(a, b), max(a, b), e) in mine)
    assert as_sets(q, q.relevance) == expected
    hidden = truth(graph, splits, "test", lambda a, b, e: (min(a, b), max(a, b), e) in every - mine)
    found = as_sets(q, q.hidden)
    assert found == {key: {key[0]} | hidden.get(key, set()) for key in expected}
    assert any(len(items) > 1 for items in found.values())


def test_with_class_links_all_that_they_link_is_right():
    graph = make_classes(classes=7, each=5)
    split = np.zeros(len(graph), np.int8)
    split[[0, 1, 7, 14, 3, 10, 5]] = 2  # three of class 0, one each of 1 and 5, two of 3
    graph = dataclasses.replace(graph, item_split=split)
    splits = split_graph(graph, seed=0)
    q = gallery_queries(graph, splits, "test", seed=0)
    links = {tuple(link) for link in graph.class_links.tolist()}

    def linked(a, b, e):
        return (*sorted(graph.labels[[a, b]].tolist()), e) in links

    expected = truth(graph, splits, "test", linked)
    drawn = {tuple(pair) for pair in splits.pairs("test").tolist()}
    assert as_sets(q, q.relevance) == expected
    assert sum(map(len, expected.values())) > 2 * len(drawn)
    assert as_sets(q, q.hidden) == {(a, e): {a} for a, e in expected}
    texts = [graph.texts[i] for i in q.items]
    assert q.texts.tolist() == [texts.index(text) for text in texts]


def test_with_attributes_all_that_agree_are_right():
    graph = make_respects(items=90)
    splits = split_graph(graph, seed=0, fractions=(0.5, 0, 0.5))
    q = gallery_queries(graph, splits, "test", seed=0)
    drawn = splits.pairs("test")
    expected = truth(graph, splits, "test", lambda a, b, e: bool(graph.linked(a, b, e)))
    asked = {(int(i), int(e)) for a, b, e in drawn for i in (a, b)}
    assert asked <= set(expected)
    assert as_sets(q, q.relevance) == {key: expected[key] for key in asked}
    assert sum(len(expected[key]) for key in asked) > 3 * len(drawn)
    assert as_sets(q, q.hidden) == {(a, e): {a} for a, e in asked}


def test_limits_draw_by_the_seed():
    graph = make_graph(items=120, relations=6, group=40)
    splits = split_graph(graph, seed=0, fractions=(0, 0, 1))
    whole = gallery_queries(graph, splits, "test", seed=0)
    assert len(whole.query) == 6 * 40
    few = gallery_queries(graph, splits, "test", per_relation=7, seed=0)
    assert np.bincount(few.relation).tolist() == [7] * 6
    assert few.left_out == 240 - 42
    fewer = gallery_queries(graph, splits, "test", per_relation=7, limit=20, seed=0)
    assert len(fewer.query) == 20
    again, other = (gallery_queries(graph, splits, "test", limit=20, seed=s) for s in (0, 1))
    same = gallery_queries(graph, splits, "test", limit=20, seed=0)
    np.testing.assert_array_equal(again.query, same.query)
    assert not np.array_equal(again.query, other.query)
    # A query has the same answers whoever else is asked.
    assert as_sets(few, few.relevance).items() <= as_sets(whole, whole.relevance).items()


def test_a_split_without_links_is_said():
    graph = make_graph(items=40, relations=1, group=2)
    splits = split_graph(graph, seed=0, fractions=(0.5, 0, 0.5))
    empty = "test" if len(splits.pairs("train")) else "train"
    with pytest.raises(UserError, match=f"No two items of the {empty} split of 'toy' are linked"):
        gallery_queries(graph, splits, empty, seed=0)

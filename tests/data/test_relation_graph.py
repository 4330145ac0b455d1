import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest

from rcml_jax.data import relation_graph
from rcml_jax.data.relation_graph import SPLITS, normalize_pairs, pairs_within, split_graph
from rcml_jax.errors import UserError
from tests.data.conftest import make_classes, make_graph, make_respects


def test_related_is_symmetric_with_a_true_diagonal_under_any_relation(toy):
    expected = np.eye(len(toy), dtype=bool)
    for a, b, _ in toy.pairs:
        expected[a, b] = expected[b, a] = True
    related = toy.related()
    assert related.dtype == bool
    np.testing.assert_array_equal(related.toarray(), expected)
    near = np.flatnonzero(expected[3])[-1]  # twice among the columns
    rows, cols = np.array([5, 3, 3, 59]), np.array([0, 59, near, near, 3])
    np.testing.assert_array_equal(toy.related_block(rows, cols), expected[np.ix_(rows, cols)])
    np.testing.assert_array_equal(toy.related_values(rows, rows[::-1]), expected[rows, rows[::-1]])
    assert toy.related_block(rows, cols[:0]).shape == (4, 0)
    for item in range(len(toy)):
        np.testing.assert_array_equal(toy.related_to(item), np.flatnonzero(expected[item]))


def test_linked_is_whether_the_triple_is_a_pair(toy):
    triples = {tuple(row) for row in toy.pairs.tolist()}
    a, b, e = np.meshgrid(np.arange(12), np.arange(12), np.arange(len(toy.relations)))
    expected = np.array(
        [
            (min(x, y), max(x, y), r) in triples
            for x, y, r in zip(a.flat, b.flat, e.flat, strict=True)
        ]
    ).reshape(a.shape)
    np.testing.assert_array_equal(toy.linked(a, b, e), expected)
    assert expected.any()
    none = dataclasses.replace(toy, pairs=toy.pairs[:0], pair_split=toy.pair_split[:0])
    assert not none.linked(a, b, e).any()


@pytest.mark.parametrize("make", [make_graph, make_classes, make_respects])
@pytest.mark.parametrize("many", [0, 1, 16])
def test_look_ups_of_a_batch_agree_with_single_places(make, many, monkeypatch):
    """However many neighbors an item has, it is gone through or searched with one result."""
    monkeypatch.setattr(relation_graph, "_MANY_LINKS", many)
    graph = make()
    rng = np.random.default_rng(many)
    items = rng.permutation(len(graph))[:15]
    related = graph.related().toarray()
    np.testing.assert_array_equal(graph.related_block(items, items), related[np.ix_(items, items)])
    for item in items:
        np.testing.assert_array_equal(graph.related_to(item), np.flatnonzero(related[item]))
    a, b = rng.integers(len(graph), size=(2, 3, 40))
    np.testing.assert_array_equal(graph.related_values(a, b), related[a, b])
    relations = np.array([2, -1, 0, len(graph.relations) - 1])
    expected = graph.linked(a[..., None], b[..., None], relations.clip(min=0)) & (relations >= 0)
    np.testing.assert_array_equal(graph.linked_under(a, b, relations), expected)
    assert expected.any()


def test_pairs_within_lists_every_two_members_once():
    groups = [np.array([4, 1, 2]), np.array([1, 4]), np.array([0])]
    expected = sorted(
        (min(a, b), max(a, b), e)
        for e, group in enumerate(groups)
        for a, b in itertools.combinations(group.tolist(), 2)
    )
    np.testing.assert_array_equal(pairs_within(groups), expected)


def test_normalize_pairs_orders_drops_doubles_and_self_pairs():
    pairs, split = normalize_pairs([[3, 1, 0], [1, 3, 0], [2, 2, 0], [0, 1, 5]], [1, 2, 0, -1])
    np.testing.assert_array_equal(pairs, [[0, 1, 5], [1, 3, 0]])
    np.testing.assert_array_equal(split, [-1, 1])


def test_item_splits_share_no_item_and_keep_the_fractions():
    graph = make_graph(items=200, relations=40)
    splits = split_graph(graph, seed=3)
    found = [set(splits.items(s).tolist()) for s in SPLITS]
    assert [len(f) for f in found] == [140, 20, 40]
    assert len(set.union(*found)) == 200
    for name, items in zip(SPLITS, found, strict=True):
        pairs = splits.pairs(name)
        assert set(pairs[:, :2].ravel().tolist()) <= items
    inside = sum(len(splits.pairs(s)) for s in SPLITS)
    assert inside == np.sum(
        splits.item_split[graph.pairs[:, 0]] == splits.item_split[graph.pairs[:, 1]]
    )


def test_pair_splits_share_no_item_pair_whatever_the_relation(toy):
    splits = split_graph(toy, seed=3, disjoint="pair")
    units = [{tuple(p) for p in splits.pairs(s)[:, :2].tolist()} for s in SPLITS]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(units, 2))
    assert sum(len(splits.pairs(s)) for s in SPLITS) == len(toy.pairs)
    assert any(len(splits.pairs(s)) > len(u) for s, u in zip(SPLITS, units, strict=True))
    test = splits.pairs("test")
    np.testing.assert_array_equal(splits.items("test"), np.unique(test[:, :2]))
    assert np.all(splits.item_split == -1)


def test_declared_splits_override(toy):
    declared = np.where(toy.pair_units() % 5 == 0, 2, 0).astype(np.int8)
    declared[toy.pair_units() == 1] = -1
    graph = dataclasses.replace(toy, pair_split=declared).validate()
    splits = split_graph(graph, seed=0, disjoint="item")
    assert splits.disjoint == "declared"
    np.testing.assert_array_equal(splits.pairs("test"), graph.pairs[declared == 2])
    assert len(splits.pairs("validation")) == 0


def test_declared_splits_of_items_override(toy):
    declared = (np.arange(len(toy)) % 4 - 1).astype(np.int8)
    graph = dataclasses.replace(toy, item_split=declared).validate()
    for disjoint in ("item", "pair"):
        splits = split_graph(graph, seed=0, disjoint=disjoint)
        assert splits.disjoint == "declared item"
        np.testing.assert_array_equal(splits.items("test"), np.flatnonzero(declared == 2))
        inside = [len(set(declared[[a, b]])) == 1 and declared[a] == 1 for a, b, _ in toy.pairs]
        np.testing.assert_array_equal(splits.pairs("validation"), toy.pairs[inside])


@pytest.mark.parametrize("make", [make_graph, make_classes, make_respects])
def test_linked_blocks_hold_each_relations_own_links(make):
    graph = make()
    last = len(graph.relations) - 1  # by attributes, in a graph that has them
    items, relations = np.random.default_rng(0).permutation(len(graph))[:20], [-1, 2, 0, last]
    blocks = graph.linked_blocks(items, items, np.array(relations))
    assert blocks.shape == (4, 20, 20)
    assert blocks.dtype == bool
    itself = np.eye(20, dtype=bool)
    np.testing.assert_array_equal(blocks[0], itself)
    for block, relation in zip(blocks[1:], relations[1:], strict=True):
        expected = graph.linked(items[:, None], items, relation) | itself
        np.testing.assert_array_equal(block, expected)
    assert (blocks[1:] & ~itself).any()


@pytest.mark.parametrize("make", [make_graph, make_classes])
def test_relations_of_one_sentence_link_the_same_in_a_block(make):
    graph = make()
    same = np.arange(len(graph.relations))
    same[2] = 0
    graph = dataclasses.replace(graph, same_sentence=same)
    items, relations = np.arange(len(graph)), np.array([2, -1, 0])
    blocks = graph.linked_blocks(items, items, relations)
    itself = np.eye(len(graph), dtype=bool)
    for block, relation in zip(blocks[[0, 2]], relations[[0, 2]], strict=True):
        np.testing.assert_array_equal(block, graph.linked(items[:, None], items, relation) | itself)
    alone = make().linked_blocks(items, items, relations)
    assert (blocks[0] & ~alone[0]).any()


def without_pairs():
    return make_graph().without_pairs()


@pytest.mark.parametrize("make", [make_graph, make_classes, make_respects, without_pairs])
@pytest.mark.parametrize("many", [0, 1, 16])
def test_some_columns_of_masks_are_those_of_the_whole(make, many, monkeypatch):
    """Of few columns and of many, in any order, also of items that no row is of."""
    monkeypatch.setattr(relation_graph, "_MANY_LINKS", many)
    graph = make()
    every = np.random.default_rng(many).permutation(len(graph))
    relations = np.array([2, -1, 0, len(graph.relations) - 1])
    related = graph.related_block(every, every)
    linked = graph.linked_blocks(every, every, relations)
    for rows in (every[:20], every[3:7]):
        for columns in ([], [17], [19, 2, 3, 11], range(15, 24)):
            cols = every[np.array(columns, int)]
            cells = np.ix_(np.flatnonzero(np.isin(every, rows)), np.array(columns, int))
            np.testing.assert_array_equal(graph.related_block(rows, cols), related[cells])
            found = graph.linked_blocks(rows, cols, relations)
            np.testing.assert_array_equal(found, linked[:, cells[0], cells[1]])
    assert related.any(axis=0).all()
    assert linked.any(axis=1).all()


def peak(work, *args):
    """The most bytes that are allocated at a time while `work` runs."""
    tracemalloc.start()
    try:
        work(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [make_graph, make_classes, make_respects])
def test_some_columns_are_made_without_the_whole(make):
    graph = make(each=100) if make is make_classes else make(items=600)
    every, relations = np.arange(len(graph)), np.array([-1, 0, 1, 2])
    for mask in (graph.related_block, lambda *x: graph.linked_blocks(*x, relations)):
        whole = mask(every, every)
        peaks = [peak(mask, every, every[:n]) for n in (16, len(every))]
        assert peaks[1] >= whole.nbytes
        assert peaks[0] < peaks[1] / 8


def test_class_links_say_what_is_linked():
    graph = make_classes().validate()
    links = {tuple(link) for link in graph.class_links.tolist()}
    n, every = len(graph), np.arange(len(graph))
    paired = {tuple(pair) for pair in graph.pairs[:, :2].tolist()}
    linked = graph.linked(every[:, None, None], every[:, None], np.arange(len(graph.relations)))
    related, linked_any = graph.related().toarray(), graph.linked_any_block(every, every)
    np.testing.assert_array_equal(linked_any, graph.linked_any(every[:, None], every))
    for a, b in itertools.product(range(n), repeat=2):
        classes = sorted((graph.labels[a], graph.labels[b]))
        expected = [(*classes, e) in links for e in range(len(graph.relations))]
        np.testing.assert_array_equal(linked[a, b], expected)
        same = classes[0] == classes[1]
        assert linked_any[a, b] == (any(expected) or same)
        assert related[a, b] == (same or (min(a, b), max(a, b)) in paired)
    assert linked_any.sum() > related.sum()  # the pairs are a sample
    np.testing.assert_array_equal(graph.related_block(every, every), related)
    rows, relations = graph.links_of(np.array([[0, 1], [5, 0], [3, 3]]))
    found = [relations[rows == row].tolist() for row in range(3)]
    assert found == [np.flatnonzero(linked[a, b]).tolist() for a, b in [(0, 1), (5, 0), (3, 3)]]


def test_attributes_say_what_is_linked():
    graph = make_respects().validate()
    n, every = len(graph), np.arange(len(graph))
    triples = {tuple(pair) for pair in graph.pairs.tolist()}
    value = graph.attributes
    linked = graph.linked(every[:, None, None], every[:, None], np.arange(7))
    linked_any = graph.linked_any_block(every, every)
    np.testing.assert_array_equal(linked_any, graph.linked_any(every[:, None], every))
    agreed = 0
    for a, b in itertools.product(range(n), repeat=2):
        paired = [(min(a, b), max(a, b), e) in triples for e in range(7)]
        agree = [value[a, e] == value[b, e] >= 0 for e in range(7)]
        expected = np.logical_or(paired, agree)
        np.testing.assert_array_equal(linked[a, b], expected)
        assert linked_any[a, b] == (a == b or expected.any())
        agreed += sum(agree) > sum(paired[4:])
    assert agreed > n, "pairs are a sample of what is linked"
    pairs = np.array([[0, 1], [5, 0], [7, 30]])
    rows, relations = graph.links_of(pairs)
    found = [relations[rows == row].tolist() for row in range(3)]
    assert found == [np.flatnonzero(linked[a, b]).tolist() for a, b in pairs]
    assert np.all(np.diff(rows) >= 0)
    assert graph.respects == [4, 5, 6]


def test_validate_names_wrong_attributes_and_groups():
    graph = make_respects()
    wrong = graph.attributes.copy()
    wrong[graph.pairs[graph.pairs[:, 2] == 5][0, 0], 5] = 99
    for changes, message in (
        ({"attributes": graph.attributes[:, :3]}, r"attributes are not \(60, 7\)"),
        ({"attributes": wrong}, "a pair does not agree in its attribute"),
        ({"item_group": graph.item_group[1:]}, "item_group does not have one entry an item"),
        ({"class_links": make_classes().class_links}, "both class links and attributes"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(graph, **changes).validate()


@pytest.mark.parametrize("seed", range(3))
def test_no_split_parts_a_group(seed):
    graph = make_respects(items=400)
    group = np.random.default_rng(seed).permutation(graph.item_group)
    graph = dataclasses.replace(graph, item_group=group)
    splits = split_graph(graph, seed=seed)
    assert splits.disjoint == "item"
    parts = [set(group[splits.items(name)].tolist()) for name in SPLITS]
    assert [len(part) for part in parts] == [70, 10, 20]
    assert len(set.union(*parts)) == 100, "no group is in two splits"
    for name in SPLITS:
        assert set(splits.pairs(name)[:, :2].ravel()) <= set(splits.items(name))
    other = split_graph(graph, seed=seed + 10)
    assert np.any(other.item_split != splits.item_split), "the seed draws the groups"


def test_validate_names_wrong_class_links():
    graph = make_classes()

    def broken(**changes):
        with pytest.raises(UserError) as error:
            dataclasses.replace(graph, **changes).validate()
        return str(error.value)

    links = graph.class_links
    assert "not a <= b" in broken(class_links=links[:, [1, 0, 2]] + [1, 0, 0])
    assert "not (L, 3)" in broken(class_links=links[:, :2])
    assert "class link's relation" in broken(class_links=np.add(links, [0, 0, 99]))
    assert "links are not unique" in broken(class_links=links[::-1])
    assert "label for every item" in broken(labels=np.full(len(graph), -1, np.int32))
    assert "pair is not linked" in broken(class_links=links[:1])
    assert "one entry an item" in broken(item_split=np.zeros(3, np.int8))
    assert "split is out of range" in broken(item_split=np.full(len(graph), 3, np.int8))


def test_relation_splits_share_neither_items_nor_relations():
    graph = make_graph(items=200, relations=10, group=60)
    splits = split_graph(graph, seed=3, disjoint="relation")
    relations, items = [], []
    for name in SPLITS:
        pairs = splits.pairs(name)
        assert len(pairs) > 0
        relations.append(set(pairs[:, 2].tolist()))
        items.append(set(splits.items(name).tolist()))
        assert set(pairs[:, :2].ravel().tolist()) <= items[-1]
    assert [len(x) for x in relations] == [7, 1, 2]
    for parts in (relations, items):
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))
    # Items as with "item"; with few relations each split has one of them.
    for name in SPLITS:
        expected = split_graph(graph, seed=3).items(name)
        np.testing.assert_array_equal(splits.items(name), expected)
    few = make_graph(items=200, relations=3, group=60)
    few = split_graph(few, seed=0, disjoint="relation")
    assert [len(set(few.pairs(name)[:, 2])) for name in SPLITS] == [1, 1, 1]
    with pytest.raises(UserError, match="three relations"):
        split_graph(make_graph(relations=2), seed=0, disjoint="relation")


def test_domain_splits_test_on_other_labels(toy):
    splits = split_graph(toy, seed=0, domain="one, x*")
    assert (splits.disjoint, splits.by_items) == ("domain", True)
    np.testing.assert_array_equal(splits.items("test"), np.flatnonzero(toy.labels == 1))
    counts = [len(splits.items(name)) for name in SPLITS]
    assert counts == [35, 5, 20]
    with pytest.raises(UserError, match="matches every item"):
        split_graph(dataclasses.replace(toy, labels=np.abs(toy.labels)), seed=0, domain="*e*")


@pytest.mark.parametrize("classes", [False, True])
def test_a_graph_of_some_pairs_knows_no_others(toy, classes):
    graph = make_classes(classes=12, each=5).validate() if classes else toy
    splits = split_graph(graph, seed=0, disjoint="pair")
    known = graph.only(splits.pair_split == 0).validate()
    train, test = splits.pairs("train"), splits.pairs("test")
    assert known.linked(*train.T).all()
    assert known.related_values(train[:, 0], train[:, 1]).all()
    if not classes:
        assert not known.related_values(test[:, 0], test[:, 1]).any()
    # Of labels that no training pair links nothing is known.
    linked = {(*sorted(graph.labels[[a, b]]), e) for a, b, e in train} if classes else ()
    assert not classes or len(linked) == len(known.class_links)
    assert 0 < len(known.pairs) < len(graph.pairs)
    alone = graph.without_pairs().validate()
    np.testing.assert_array_equal(alone.related().toarray(), np.eye(len(graph), dtype=bool))


def test_splits_depend_on_the_seed_alone(toy):
    for disjoint in ("item", "pair", "relation"):
        one = split_graph(toy, seed=1, disjoint=disjoint).pair_split
        np.testing.assert_array_equal(one, split_graph(toy, seed=1, disjoint=disjoint).pair_split)
        assert np.any(one != split_graph(toy, seed=2, disjoint=disjoint).pair_split)


@pytest.mark.parametrize(
    "arguments",
    [
        {"disjoint": "user"},
        {"domain": "nothing"},
        {"domain": "*", "disjoint": "pair"},
        {"fractions": (0.5, 0.5, 0.5)},
        {"fractions": (1, 0)},
    ],
)
def test_wrong_split_arguments_are_user_errors(toy, arguments):
    with pytest.raises(UserError):
        split_graph(toy, seed=0, **arguments)
    with pytest.raises(UserError, match="train, validation, test"):
        split_graph(toy, seed=0).pairs("dev")


def test_validate_names_what_is_wrong(toy):
    assert toy.validate() is toy
    n = len(toy)

    def broken(**changes):
        with pytest.raises(UserError) as error:
            dataclasses.replace(toy, **changes).validate()
        return str(error.value)

    assert "not unique" in broken(ids=("x",) * n)
    assert "text is empty" in broken(texts=(" ",) * n)
    assert "sentence is empty" in broken(relations=("",) * len(toy.relations))
    assert "label is out of range" in broken(labels=np.full(n, 2, np.int32))
    assert "a < b" in broken(pairs=toy.pairs[:, [1, 0, 2]])
    assert "relation is out of range" in broken(relations=toy.relations[:3])
    assert "unique and sorted" in broken(pairs=toy.pairs[::-1].copy())
    assert "images" in broken(images=[])
    assert "one entry a pair" in broken(pair_split=np.zeros(3, np.int8))
    units = toy.pair_units()
    double = np.flatnonzero(np.diff(units) == 0)[0]
    split = np.zeros(len(units), np.int8)
    split[double] = 2
    assert "two splits" in broken(pair_split=split)


def test_paraphrases_for_training_and_for_the_test(toy):
    assert toy.training_sentences(3) == (toy.relations[3],)
    assert toy.held_out_sentences() == []
    said = tuple((s, f"{s}, again", f"{s}, unseen", f"{s}, kept") for s in toy.relations)
    graph = dataclasses.replace(toy, paraphrases=said, held_out=2).validate()
    assert graph.training_sentences(3) == said[3][:2]
    assert graph.held_out_sentences() == [tuple(x[k] for x in said) for k in (2, 3)]

    def broken(**changes):
        with pytest.raises(UserError) as error:
            dataclasses.replace(graph, **changes).validate()
        return str(error.value)

    assert "no paraphrase left" in broken(held_out=4)
    assert "not the relations' sentences" in broken(paraphrases=said[1:])
    assert "paraphrase is empty" in broken(paraphrases=tuple((*x[:3], " ") for x in said))

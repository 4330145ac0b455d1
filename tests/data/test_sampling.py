"""What the samplers draw, and the arrays that the collator makes of a relation batch."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
import scipy.stats

from rcml_jax.data import sampling
from rcml_jax.data.images import ImageBank
from rcml_jax.data.relation_graph import Splits, normalize_pairs, split_graph
from rcml_jax.data.sampling import (
    BatchSizes,
    EpochSampler,
    RelationSampler,
    batch_iterator,
    collator,
)
from rcml_jax.data.tokenizer import StoredTexts, train_tokenizer
from rcml_jax.errors import UserError
from tests import reference
from tests.data.conftest import make_graph

SIZES = BatchSizes(relations=4, pairs=3, intra_pairs=5, items=30)


@pytest.fixture(params=["item", "pair"])
def splits(toy, request):
    return split_graph(toy, seed=0, disjoint=request.param)


def sample(graph, splits, sizes=SIZES, seed=1):
    return RelationSampler(graph, splits, sizes, seed)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_plan_is_a_function_of_the_seed_and_its_number(toy, splits):
    sampler = sample(toy, splits)
    plans = [sampler[k] for k in (0, 1, 2, 10**9)]
    others = [sample(toy, splits)[k] for k in (10**9, 2, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(plans, others, strict=True))
    assert not any(same(plans[0], plan) for plan in plans[1:])
    assert not same(plans[0], sample(toy, splits, seed=2)[0])


def test_pairs_are_of_their_relation_and_of_the_train_split(toy, splits):
    sampler = sample(toy, splits)
    train = {tuple(pair) for pair in splits.pairs("train").tolist()}
    for k in range(30):
        plan = sampler[k]
        assert plan["relations"][0] == -1
        assert len(set(plan["relations"].tolist())) == SIZES.relations + 1
        for row in range(1, SIZES.relations + 1):
            count = plan["pair_valid"][row].sum()
            assert 1 <= count <= SIZES.pairs
            assert plan["pair_valid"][row, :count].all()
            pairs = [
                (plan["items"][a], plan["items"][b], plan["relations"][row])
                for a, b in zip(plan["anchor"][row], plan["positive"][row], strict=True)
            ][:count]
            assert set(pairs) <= train
            assert len(set(pairs)) == count


def test_items_are_distinct_and_of_the_train_split(toy, splits):
    sampler = sample(toy, splits)
    train = set(splits.items("train").tolist())
    seen = set()
    for k in range(30):
        items = sampler[k]["items"].tolist()
        assert len(items) == len(set(items)) == SIZES.items
        assert set(items) <= train
        seen |= set(items)
    assert seen == train


def test_self_pairs_are_drawn_from_all_items(toy, splits):
    sampler = sample(toy, splits)
    places = set()
    for k in range(30):
        plan = sampler[k]
        count = SIZES.intra_pairs
        np.testing.assert_array_equal(plan["anchor"][0], plan["positive"][0])
        np.testing.assert_array_equal(plan["pair_valid"][0], np.arange(5) < count)
        assert len(set(plan["anchor"][0, :count].tolist())) == count
        places |= set(plan["anchor"][0].tolist())
    assert len(places) > 25


def test_every_training_pair_comes_up(toy, splits):
    sampler = sample(toy, splits)
    found = set()
    for k in range(300):
        plan = sampler[k]
        rows, columns = np.nonzero(plan["pair_valid"][1:])
        a, b = (plan["items"][plan[name][1:][rows, columns]] for name in ("anchor", "positive"))
        relation = plan["relations"][1:][rows]
        found |= set(zip(a.tolist(), b.tolist(), relation.tolist(), strict=True))
    assert found == {tuple(pair) for pair in splits.pairs("train").tolist()}


def outcomes(draw, count):
    """How often each batch comes up: its pairs in their order and its items."""
    found = Counter()
    for k in range(count):
        drawn, items = draw(k)
        found[tuple(map(tuple, drawn)), tuple(sorted(items))] += 1
    return found


def test_batches_have_the_distribution_of_draws_from_lists():
    """Pairs and filling items together, on a graph so small that every batch comes up often."""
    pairs, _ = normalize_pairs([(0, 1, 0), (0, 2, 0), (1, 2, 1), (3, 4, 1), (4, 5, 2)])
    graph = dataclasses.replace(
        make_graph(items=7, relations=3, group=2), pairs=pairs, pair_split=np.zeros(5)
    )
    splits = Splits(np.array([0] * 6 + [2], np.int8), np.zeros(5, np.int8), "item", pairs)
    sampler = sample(graph, splits, BatchSizes(relations=2, pairs=1, intra_pairs=2, items=5))
    rng = np.random.default_rng(0)
    triples = list(map(tuple, pairs.tolist()))

    def ours(k):
        plan = sampler[k]
        row, column = np.nonzero(plan["pair_valid"][1:])
        a, b = (plan["items"][plan[name][1:][row, column]] for name in ("anchor", "positive"))
        drawn = np.stack([a, b, plan["relations"][1:][row]], axis=1)
        return drawn.tolist(), plan["items"].tolist()

    def theirs(k):
        return reference.relation_batch(rng, range(6), triples, relations=2, each=1, size=5)

    a, b = outcomes(ours, 2500), outcomes(theirs, 2500)
    table = np.array([[a[x], b[x]] for x in a.keys() | b.keys()]).T
    assert table.shape[1] > 30
    assert table.sum(axis=0).min() > 10
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_the_numbers_that_are_left_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        taken = np.flatnonzero(rng.random(20) < 0.4)
        rest = np.setdiff1d(np.arange(20), taken)
        np.testing.assert_array_equal(sampling._not_among(taken, np.arange(len(rest))), rest)


def test_rows_short_of_pairs_are_padded():
    graph = make_graph(relations=3, group=3)  # at most three pairs a relation
    splits = split_graph(graph, seed=0, disjoint="pair", fractions=(1.0, 0.0, 0.0))
    sizes = BatchSizes(relations=3, pairs=5, intra_pairs=0, items=30)
    with pytest.raises(UserError, match="larger than the training split"):
        sizes.check(len(splits.items("train")))
    splits = split_graph(make_graph(relations=3, group=3), seed=3, fractions=(1.0, 0.0, 0.0))
    plan = sample(graph, splits, sizes)[0]
    assert plan["pair_valid"].shape == (4, 5)
    np.testing.assert_array_equal(plan["pair_valid"].sum(axis=1), [0, 3, 3, 3])
    assert len(set(plan["items"].tolist())) == 30


def test_the_paraphrases_are_drawn_by_seed_and_step(toy, splits):
    one, two = (sample(toy, splits)[0]["paraphrase"] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert len(one) == len(sample(toy, splits)[0]["relations"])
    others = sample(toy, splits)[1]["paraphrase"]
    assert not np.array_equal(one, others)


def test_self_pairs_only(toy, splits):
    plan = sample(toy, splits, BatchSizes(relations=0, pairs=3, intra_pairs=30, items=30))[0]
    np.testing.assert_array_equal(plan["relations"], [-1])
    assert plan["pair_valid"].shape == (1, 30)
    assert plan["pair_valid"].all()
    assert sorted(plan["anchor"][0].tolist()) == list(range(30))


@pytest.fixture
def collated(toy):
    splits = split_graph(toy, seed=0)
    plan = sample(toy, splits)[0]
    tokenizer = train_tokenizer(toy.texts + toy.relations, 300)

    def sentence(relation, drawn):
        return toy.intra_relation if relation < 0 else toy.relations[relation]

    collate = collator(toy, tokenizer, ImageBank(toy.images, 8), sentence, 24)
    return plan, tokenizer, collate


def test_the_arrays_of_a_batch(toy, collated):
    plan, tokenizer, collate = collated
    batch = collate(plan)
    items, shared = batch["items"], batch["shared"]
    assert {name: x.dtype for name, x in items.items()} == {"ids": np.int32, "images": np.uint8}
    assert items["images"].shape == (30, 8, 8, 3)
    np.testing.assert_array_equal(items["images"][:, 0, 0, 0], plan["items"])  # see `png`
    for row, item in enumerate(plan["items"]):
        text = tokenizer.decode(items["ids"][row])
        assert text == toy.texts[item]
    assert tokenizer.decode(shared["relation_ids"][1]) == toy.relations[plan["relations"][1]]
    np.testing.assert_array_equal(shared["intra"], [True, False, False, False, False])
    np.testing.assert_array_equal(shared["labels"], toy.labels[plan["items"]])
    assert shared["valid"].all()
    for name in ("anchor", "positive", "pair_valid"):
        np.testing.assert_array_equal(shared[name], plan[name])


@pytest.mark.parametrize("texts_per_row", [1, 3])
def test_stored_texts_make_the_same_batch(toy, collated, tmp_path, texts_per_row):
    plan, tokenizer, _ = collated
    toy = dataclasses.replace(
        toy, texts=tuple(f"{t} {t}" if i % 5 else t for i, t in enumerate(toy.texts))
    )
    stored = StoredTexts(tmp_path, toy.name, tokenizer, toy.texts, 24)
    batches = [
        collator(
            toy,
            tokenizer,
            ImageBank(toy.images, 8),
            lambda r, k: toy.relations[r],
            24,
            texts_per_row=texts_per_row,
            encoded=encoded,
        )(plan)
        for encoded in (stored, None)
    ]
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_related_is_symmetric_with_a_true_diagonal_and_of_the_whole_graph(toy, collated):
    plan, _, collate = collated
    related = collate(plan)["shared"]["related"]
    assert related.dtype == bool
    np.testing.assert_array_equal(related, related.T)
    assert related.diagonal().all()
    linked = {frozenset(pair) for pair in toy.pairs[:, :2].tolist()}
    for i, a in enumerate(plan["items"].tolist()):
        for j, b in enumerate(plan["items"].tolist()):
            assert related[i, j] == (i == j or frozenset((a, b)) in linked)
    assert not related.all()


def test_linked_is_by_relation_of_the_whole_graph(toy, collated):
    plan, _, collate = collated
    linked = collate(plan)["shared"]["linked"]
    pairs = {tuple(pair) for pair in toy.pairs.tolist()}
    rows, width = plan["anchor"].shape
    assert linked.shape == (rows, width, rows)
    for r in range(1, rows):
        for g in np.flatnonzero(plan["pair_valid"][r]):
            a, b = sorted(plan["items"][[plan["anchor"][r, g], plan["positive"][r, g]]].tolist())
            for other in range(rows):
                expected = (a, b, plan["relations"][other]) in pairs
                assert linked[r, g, other] == expected
            assert linked[r, g, r]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_restored_iterator_goes_on_with_the_same_batches(toy, collated, threads):
    _, _, collate = collated
    splits = split_graph(toy, seed=0)

    def fresh():
        return batch_iterator(sample(toy, splits), collate, threads)

    iterator = fresh()
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    rest = [next(iterator) for _ in range(4)]
    for other in (fresh(), iterator):
        other.set_state(state)
        for batch in rest:
            again = next(other)
            assert same(batch["items"], again["items"])
            assert same(batch["shared"], again["shared"])
    plan = sample(toy, splits)[3]
    np.testing.assert_array_equal(rest[0]["shared"]["anchor"], plan["anchor"])


def test_a_batch_larger_than_the_training_split():
    message = "^a batch of 43 items is larger than the training split, which has 42; lower"
    with pytest.raises(UserError, match=message):
        BatchSizes(1, 2, 2, 43).check(42)
    BatchSizes(3, 4, 24, 24).check(24)


def test_more_relations_than_have_pairs(toy, splits):
    with pytest.raises(UserError, match=r"config.batch.relations=13, but only 12 relations have"):
        sample(toy, splits, BatchSizes(relations=13, pairs=1, intra_pairs=0, items=30))


# Ten rows of a data set in batches of four: three batches an epoch, two places of padding.
ROWS = np.array([3, 4, 7, 8, 11, 15, 16, 20, 21, 30])


def epoch_of(sampler, epoch):
    """The rows of an epoch in order, without the padding."""
    plans = [sampler[epoch * sampler.per_epoch + place] for place in range(sampler.per_epoch)]
    return np.concatenate([plan["rows"][plan["valid"]] for plan in plans])


@pytest.mark.parametrize(("size", "per_epoch"), [(1, 10), (3, 4), (4, 3), (5, 2), (9, 2), (10, 1)])
def test_an_epoch_has_every_row_once(size, per_epoch):
    sampler = EpochSampler(ROWS, size, seed=0)
    assert (sampler.size, sampler.per_epoch) == (size, per_epoch)
    for epoch in (0, 1, 10**8):
        np.testing.assert_array_equal(np.sort(epoch_of(sampler, epoch)), ROWS)


def test_epochs_differ_in_their_order():
    sampler = EpochSampler(ROWS, 4, seed=0)
    orders = {tuple(epoch_of(sampler, epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20
    assert len({order[0] for order in orders}) > 5


def test_only_the_last_batch_of_an_epoch_is_padded():
    sampler = EpochSampler(ROWS, 4, seed=0)
    for k in range(9):
        plan = sampler[k]
        padding = 2 if k % 3 == 2 else 0
        np.testing.assert_array_equal(plan["valid"], np.arange(4) < 4 - padding)
        assert plan["rows"].shape == (4,)
        assert set(plan["rows"].tolist()) <= set(ROWS.tolist())  # what pads is a row as well


@pytest.mark.parametrize("size", [0, 10])
def test_a_batch_of_all_rows_keeps_their_order(size):
    sampler = EpochSampler(ROWS, size, seed=0)
    assert (sampler.size, sampler.per_epoch) == (10, 1)
    for k in (0, 1, 7):
        np.testing.assert_array_equal(sampler[k]["rows"], ROWS)
        assert sampler[k]["valid"].all()
    assert np.any(sampler[0]["noise"] != sampler[1]["noise"])


def test_a_batch_is_a_function_of_the_seed_and_its_place():
    sampler = EpochSampler(ROWS, 4, seed=1)
    plans = [sampler[k] for k in (0, 1, 5, 10**9)]
    others = [EpochSampler(ROWS, 4, seed=1)[np.int64(k)] for k in (10**9, 5, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(plans, others, strict=True))
    assert len({tuple(plan["noise"].tolist()) for plan in plans}) == 4
    other = EpochSampler(ROWS, 4, seed=2)
    assert np.any(epoch_of(other, 0) != epoch_of(sampler, 0))
    assert np.any(other[0]["noise"] != plans[0]["noise"])
    np.testing.assert_array_equal(ROWS, np.sort(ROWS))  # not shuffled in place


@pytest.mark.parametrize("size", [11, -1])
def test_a_batch_must_fit_the_training_split(size):
    with pytest.raises(UserError, match=rf"batch of {size} samples does not fit .* which has 10;"):
        EpochSampler(ROWS, size, seed=0)


def test_epochs_go_through_the_iterator_and_its_state():
    sampler = EpochSampler(ROWS, 4, seed=0)
    iterator = batch_iterator(sampler, lambda plan: plan)
    for k in range(4):
        assert same(next(iterator), sampler[k])
    state = iterator.get_state()
    other = batch_iterator(EpochSampler(ROWS, 4, seed=0), lambda plan: plan)
    other.set_state(state)
    assert same(next(other), sampler[4])


def test_packed_texts_change_the_order_of_the_items_alone(toy, collated):
    """The same pairs of the same items under the same relations, with their texts and images."""
    plan, tokenizer, collate = collated
    images = ImageBank(toy.images, 8)
    packed = collator(toy, tokenizer, images, lambda r, k: toy.relations[r], 32, texts_per_row=3)(
        plan
    )
    padded = collate(plan)["shared"]
    texts, pixels, shared = *packed["items"].values(), packed["shared"]
    assert pixels.shape == (10, 3, 8, 8, 3)
    items = pixels[..., 0, 0, 0].reshape(-1)  # see `png`
    found = [part for row, ends in zip(*texts, strict=True) for part in np.split(row, ends + 1)]
    del found[3::4]  # padding
    assert [tokenizer.decode(text) for text in found] == [toy.texts[item] for item in items]
    order = [plan["items"].tolist().index(item) for item in items]
    assert order != sorted(order)
    for name in ("anchor", "positive"):
        live = plan["pair_valid"]
        np.testing.assert_array_equal(items[shared[name]][live], plan["items"][plan[name]][live])
    np.testing.assert_array_equal(shared["related"], padded["related"][np.ix_(order, order)])
    np.testing.assert_array_equal(shared["labels"], padded["labels"][order])
    for name in ("intra", "pair_valid", "linked"):
        np.testing.assert_array_equal(shared[name], padded[name])

"""Co-purchase pairs and their caps against slow twins."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rcml_jax.data.sources.copurchases import _unrank, copurchase_pairs, draw_pairs, within_item_cap

NO_CAP = 10**6


def purchases(seed, users=40, items=15):
    """Sorted distinct purchases, and each user's cluster; some users have one purchase or none."""
    rng = np.random.default_rng(seed)
    table = rng.random((users, items)) < rng.random((users, 1)) ** 2
    user, item = (x.astype(np.int32) for x in np.nonzero(table))
    return user, item, rng.integers(0, 3, users).astype(np.int32)


def pairs_twin(user, item, cluster):
    """How many users of each cluster bought both of two items."""
    found = Counter()
    for u in set(user.tolist()):
        for a, b in itertools.combinations(sorted(item[user == u].tolist()), 2):
            found[a, b, int(cluster[u])] += 1
    return found


def cap_twin(ends, items, cap):
    """Pair by pair: it stays if both of its items have room."""
    taken, keep = Counter(), []
    for a, b in ends.tolist():
        keep.append(taken[a] < cap and taken[b] < cap)
        taken.update([a, b] if keep[-1] else [])
    return keep


@pytest.mark.parametrize("seed", range(4))
def test_all_pairs_equal_the_slow_twin(seed):
    user, item, cluster = purchases(seed)
    pairs = copurchase_pairs(
        user, item, cluster, items=15, per_user=NO_CAP, per_item=NO_CAP, seed=0
    )
    assert pairs.dtype == np.int32
    assert list(map(tuple, pairs.tolist())) == sorted(pairs_twin(user, item, cluster))


@pytest.mark.parametrize("cap", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_item_cap_equals_going_through_one_by_one(seed, cap):
    rng = np.random.default_rng(seed)
    ends = (30 * rng.random((400, 2)) ** 3).astype(np.int32)
    ends[:, 1] += 30
    keep = within_item_cap(ends, 60, cap)
    assert keep.tolist() == cap_twin(ends, 60, cap)
    assert 0 < keep.sum() < 400


@pytest.mark.parametrize("per_item", [2, 5])
def test_an_item_keeps_the_pairs_of_most_buyers(per_item):
    user, item, cluster = purchases(1)
    buyers = pairs_twin(user, item, cluster)
    pairs = copurchase_pairs(
        user, item, cluster, items=15, per_user=NO_CAP, per_item=per_item, seed=0
    )
    kept = set(map(tuple, pairs.tolist()))
    degree = Counter(x for a, b, _ in kept for x in (a, b))
    assert max(degree.values()) == per_item
    for a, b, kind in set(buyers) - kept:
        # One of its items is full with pairs of no fewer buyers.
        assert any(
            degree[end] == per_item
            and all(buyers[p] >= buyers[a, b, kind] for p in kept if end in p[:2])
            for end in (a, b)
        )


def test_a_user_gives_at_most_so_many_distinct_pairs():
    user, item, _ = purchases(2)
    a, b, whose = draw_pairs(user, item, 6, np.random.default_rng(0))
    drawn = list(zip(whose.tolist(), a.tolist(), b.tolist(), strict=True))
    assert len(drawn) == len(set(drawn))
    for u in range(40):
        mine = item[user == u].tolist()
        possible = set(itertools.combinations(mine, 2))
        found = {(x, y) for w, x, y in drawn if w == u}
        assert found <= possible
        assert len(found) == min(len(possible), 6)


def test_every_choice_of_a_users_pairs_is_equally_likely():
    users = 20_000
    user, item = np.repeat(np.arange(users), 4), np.tile(np.arange(4), users)  # 6 pairs each
    a, b, whose = draw_pairs(user, item, 3, np.random.default_rng(0))
    order = np.argsort(whose, kind="stable")
    chosen = np.sort((4 * a + b)[order].reshape(users, 3), axis=1)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 20  # three of six
    expected = users / 20
    assert np.sum((counts - expected) ** 2 / expected) < 44  # chi-square, 19 degrees: p = 0.001


def test_a_heavy_buyer_does_not_dominate():
    light = [(u, i) for u in range(50) for i in ((u % 20), (u % 20) + 1)]
    heavy = [(50, i) for i in range(40)]
    user, item = np.array(light + heavy).T
    cluster = np.array([0] * 50 + [1])
    pairs = copurchase_pairs(user, item, cluster, items=40, per_user=10, per_item=100, seed=0)
    assert np.bincount(pairs[:, 2]).tolist() == [20, 10]


@pytest.mark.parametrize("seed", range(3))
def test_baskets_give_pairs_within_them_and_owners_at_most_so_many(seed):
    basket, item, _ = purchases(seed)
    owner = np.arange(40) // 5  # five baskets each
    options = {"items": 15, "per_item": NO_CAP, "seed": seed, "owner": owner}
    cluster = owner  # so that a pair tells its owner
    pairs = copurchase_pairs(basket, item, cluster, per_user=4, **options)
    possible = set(pairs_twin(basket, item, cluster))
    found = set(map(tuple, pairs.tolist()))
    assert found <= possible
    # A pair that two baskets of an owner give counts once: at most four remain of four drawn.
    assert 0 < np.bincount(pairs[:, 2]).max() <= 4
    everything = copurchase_pairs(basket, item, cluster, per_user=NO_CAP, **options)
    assert set(map(tuple, everything.tolist())) == possible


def test_seeds():
    user, item, cluster = purchases(3)
    options = {"items": 15, "per_user": 4, "per_item": 6}
    one, same, other = (
        copurchase_pairs(user, item, cluster, **options, seed=seed).tolist() for seed in (0, 0, 1)
    )
    assert one == same != other


def test_without_purchases():
    nothing = np.zeros(0, np.int32)
    pairs = copurchase_pairs(nothing, nothing, nothing, items=0, per_user=2, per_item=2, seed=0)
    assert pairs.shape == (0, 3)
    single = np.zeros(1, np.int32)
    assert not len(
        copurchase_pairs(single, single, single, items=1, per_user=2, per_item=2, seed=0)
    )


def test_numbers_of_pairs():
    i, j = _unrank(np.arange(5050))
    assert list(zip(j.tolist(), i.tolist(), strict=True)) == [
        (b, a) for b in range(101) for a in range(b)
    ]
    # The last pair with a large j and the first with the next, where a float may round.
    large = np.array([10**6, 94_906_267, 2 * 10**8])
    first = large * (large - 1) // 2
    for number, expected in ((first, (0 * large, large)), (first - 1, (large - 2, large - 1))):
        np.testing.assert_array_equal(_unrank(number), expected)

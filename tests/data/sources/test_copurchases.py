"""The 5-core against a slow twin; shares, clusters and sentences of buyers."""

import sys
from collections import Counter

import numpy as np
import pytest
import scipy.sparse

from rcml_jax.data.sources import copurchases
from rcml_jax.data.sources.copurchases import (
    Purchases,
    category_shares,
    cluster_sentence,
    cluster_sentences,
    cluster_users,
    distinct_purchases,
    k_core,
)
from rcml_jax.errors import UserError


def core_twin(pairs, core=5):
    """The k-core of a set of (user, item) pairs, one rule at a time."""
    pairs = set(pairs)
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = {(u, i) for u, i in pairs if users[u] >= core and items[i] >= core}
        if kept == pairs:
            return pairs
        pairs = kept


def reviews(seed, users=60, items=25, count=500):
    rng = np.random.default_rng(seed)
    names = rng.integers(2**63, 2**64, (2, max(users, items)), dtype=np.uint64)
    user = (users * rng.random(count) ** 2).astype(int)
    item = (items * rng.random(count) ** 2).astype(int)
    return names[0][user], names[1][item]


@pytest.mark.parametrize("seed", range(6))
def test_the_core_equals_its_slow_twin(seed):
    users, items = reviews(seed)
    purchases, counts = distinct_purchases(users, items)
    core = k_core(purchases)
    found = list(zip(core.users[core.user].tolist(), core.items[core.item].tolist(), strict=True))
    expected = core_twin(zip(users.tolist(), items.tolist(), strict=True))
    assert 0 < len(expected) < len(set(zip(users.tolist(), items.tolist(), strict=True)))
    assert found == sorted(expected)
    assert core.users.tolist() == sorted({u for u, _ in expected})
    assert core.items.tolist() == sorted({i for _, i in expected})
    assert core.user.dtype == core.item.dtype == np.int32
    distinct = set(zip(users.tolist(), items.tolist(), strict=True))
    bought = Counter(u for u, _ in distinct)
    assert counts == {
        "repeated": len(users) - len(distinct),
        "single": sum(n == 1 for n in bought.values()),
    }


def test_removal_goes_on_until_nothing_changes():
    """A block of 5 × 5, and a chain in which each user's removal costs an item its fifth buyer."""
    block = [(u, i) for u in range(5) for i in range(5)]
    chain = [(u, 10 + u + k) for u in range(10, 30) for k in range(5)]
    users, items = np.array(block + chain, np.uint64).T
    core = k_core(distinct_purchases(users, items)[0])
    assert core.users.tolist() == core.items.tolist() == list(range(5))


@pytest.mark.parametrize("count", [0, 3])
def test_an_empty_core(count):
    some = np.arange(count, dtype=np.uint64)
    purchases, counts = distinct_purchases(some, some)
    core = k_core(purchases)
    assert [len(x) for x in (core.users, core.items, core.user, core.item)] == [0] * 4
    assert counts == {"repeated": 0, "single": count}


def test_shares_are_distributions_over_known_categories():
    rng = np.random.default_rng(0)
    category = rng.integers(-1, 4, 30)
    user = np.repeat(np.arange(12), 6)
    item = np.concatenate([rng.permutation(30)[:6] for _ in range(12)])
    item[:6] = np.flatnonzero(category < 0)[:1]  # the first user: unknown categories only
    purchases = Purchases(np.arange(12), np.arange(30), user, item)
    shares = category_shares(purchases, category, 4).toarray()
    for u in range(12):
        bought = [c for c in category[item[user == u]] if c >= 0]
        expected = [bought.count(c) / max(len(bought), 1) for c in range(4)]
        np.testing.assert_allclose(shares[u], expected, rtol=1e-6)
    assert not shares[0].any()


def planted(sizes=(30, 50, 20), seed=0):
    """Users of three kinds with noisy shares, in a random order, and one user without any."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    shares = 0.8 * np.eye(len(sizes))[kind] + 0.2 * rng.dirichlet(np.ones(len(sizes)), len(kind))
    rows = np.vstack([shares, np.zeros(len(sizes))]).astype(np.float32)
    return scipy.sparse.csr_array(rows), kind


def test_clusters_are_numbered_by_size():
    shares, kind = planted()
    cluster, means = cluster_users(shares, 3, seed=0)
    assert cluster[-1] == -1
    np.testing.assert_array_equal(cluster[:-1], np.array([1, 0, 2])[kind])
    dense = shares.toarray()
    np.testing.assert_allclose(means, [dense[cluster[:] == k].mean(axis=0) for k in range(3)], 1e-6)


def test_clusters_are_the_same_for_the_same_seed_and_from_a_sample(monkeypatch):
    shares, _ = planted((300, 500, 200))
    cluster, _ = cluster_users(shares, 3, seed=1)
    np.testing.assert_array_equal(cluster, cluster_users(shares, 3, seed=1)[0])
    monkeypatch.setattr(copurchases, "FIT_USERS", 100)
    np.testing.assert_array_equal(cluster, cluster_users(shares, 3, seed=1)[0])


def test_fewer_kinds_than_clusters():
    shares = scipy.sparse.csr_array(np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 1, 2]])
    cluster, means = cluster_users(shares, 10, seed=0)
    assert cluster.tolist() == [0, 0, 1, 0, 1, 2]
    np.testing.assert_array_equal(means, np.eye(3))


def test_no_known_category():
    with pytest.raises(UserError, match="No buyer has bought an item of a known category"):
        cluster_users(scipy.sparse.csr_array((4, 3), dtype=np.float32), 2, seed=0)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r'run: pip install "rcml_jax\[amazon\]"'):
        cluster_users(planted()[0], 3, seed=0)


BABY = ("Safety", "Nursery", "Feeding", "Car Seats & Accessories", "Diapering", "Strollers")


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (
            (0.04, 0.22, 0.12, 0.55, 0.06, 0.01),
            "primarily buy Car Seats & Accessories, along with Nursery and Feeding, while showing "
            "lower engagement in Diapering and Safety, and minimal interest in Strollers.",
        ),
        ((0, 0, 0, 1, 0, 0), "primarily buy Car Seats & Accessories, while showing minimal "
         "interest in Safety, Nursery, and Feeding."),
        ((0.3, 0.4, 0.25, 0.05, 0, 0), "primarily buy Nursery, Safety, and Feeding, while showing "
         "lower engagement in Car Seats & Accessories, and minimal interest in Diapering and "
         "Strollers."),
        ((0.2, 0.2, 0.15, 0.15, 0.15, 0.15), "primarily buy Safety, Nursery, and Feeding."),
    ],
)  # fmt: skip
def test_sentences_follow_sorted_shares(shares, expected):
    sentence = cluster_sentence(np.array(shares), BABY)
    assert sentence == f"Co-purchased by people who {expected}"


def test_equal_sentences_are_told_apart_by_their_shares():
    means = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    first, second, third = cluster_sentences(means, ("A", "B"))
    assert first == "Co-purchased by people who primarily buy A, along with B (A 90.0 %, B 10.0 %)."
    assert second.endswith("along with B (A 80.0 %, B 20.0 %).")
    assert third == "Co-purchased by people who primarily buy B, along with A."

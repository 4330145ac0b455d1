"""Who buys what on Amazon: the 5-core of purchases, kinds of buyers, and a sentence for each kind.

Ids are 64-bit hashes and small integers in NumPy arrays: of a rating nothing else is kept.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from rcml_jax.errors import UserError

CORE = 5
#: k-means is fitted to so many buyers, drawn at random; the others go to the nearest centre.
FIT_USERS = 200_000
RESTARTS = 10
# A share of a kind's purchases from which a category is bought "along" with the primary ones, and
# one from which interest is "lower" and not "minimal". Primary: half of the largest share or more.
ALONG, LOWER = 0.10, 0.03
#: Categories that a sentence names at each level, so that CLIP's 77 tokens can hold it.
NAMED = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Purchases:
    """R purchases, each of a distinct user and item, sorted by user and then by item.

    users (U,), items (N,): uint64 hashes (`amazon_records.identity`), sorted; user (R,), item
    (R,): int32, places in these.
    """

    users: np.ndarray
    items: np.ndarray
    user: np.ndarray
    item: np.ndarray


def distinct_purchases(users: np.ndarray, items: np.ndarray) -> tuple[Purchases, dict[str, int]]:
    """Purchases from hashes of user and item (M,) uint64 in any order, and what was left out.

    Users with fewer than CORE purchases, which no 5-core can hold, are gone already. The counts:
    "repeated" (further reviews of an item by one user), "single" (users with one purchase).
    """
    order = np.lexsort((items, users))
    users, items = users[order], items[order]
    del order
    new_user = _changes(users)
    new = new_user | _changes(items)
    repeated = len(new) - int(new.sum())
    users, items, new_user = users[new], items[new], new_user[new]
    del new
    bought = np.diff(np.append(np.flatnonzero(new_user), len(users)))
    counts = {"repeated": repeated, "single": int(np.sum(bought == 1))}
    keep = np.repeat(bought >= CORE, bought)
    users, items, new_user = users[keep], items[keep], new_user[keep]
    item_ids, item = np.unique(items, return_inverse=True)
    user = (np.cumsum(new_user, dtype=np.int32) - 1).astype(np.int32)
    return Purchases(users[new_user], item_ids, user, item.astype(np.int32)), counts


def five_core(purchases: Purchases, core: int = CORE) -> Purchases:
    """The largest part in which every user and every item has `core` purchases (may be empty).

    Users and items with fewer are removed until there are none.
    """
    user, item = purchases.user, purchases.item
    while True:
        keep_user = np.bincount(user, minlength=len(purchases.users)) >= core
        keep_item = np.bincount(item, minlength=len(purchases.items)) >= core
        keep = keep_user[user] & keep_item[item]
        if keep.all():
            break
        user, item = user[keep], item[keep]
    return Purchases(
        purchases.users[keep_user],
        purchases.items[keep_item],
        _renumber(keep_user)[user],
        _renumber(keep_item)[item],
    )


def category_shares(
    purchases: Purchases, category: np.ndarray, count: int
) -> scipy.sparse.csr_array:
    """Each user's distribution over categories: sparse (U, count) float32, rows add up to 1.

    category (N,): of each item, from 0 to count - 1, or -1 for unknown. A user without a purchase
    of a known category has a row of zeros.
    """
    bought = category[purchases.item]
    known = bought >= 0
    shape = (len(purchases.users), count)
    ones = np.ones(int(known.sum()), np.float32)
    table = scipy.sparse.coo_array((ones, (purchases.user[known], bought[known])), shape).tocsr()
    total = np.asarray(table.sum(axis=1)).ravel()
    table.data /= np.repeat(total, np.diff(table.indptr)).astype(np.float32)
    return table


def cluster_users(
    shares: scipy.sparse.csr_array, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """k-means on category shares: each user's cluster (U,) int32, -1 for a row of zeros.

    Also the clusters' mean shares (K, C) float64. Clusters are numbered from the largest to the
    smallest; K is `clusters`, or fewer where there are fewer distinct buyers. The best of RESTARTS
    fits by k-means++ (Euclidean distance, the shares as they are), on FIT_USERS users at most.

    Raises:
      UserError: scikit-learn is missing, or no user has a known category.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise UserError(
            'Clustering buyers needs scikit-learn; run: pip install "rcml_jax[amazon]"'
        ) from error
    known = np.flatnonzero(np.diff(shares.indptr))
    if not len(known):
        raise UserError(
            "No buyer has bought an item with a second-level category, so there are no kinds of "
            "buyers; check `categories` in the item file."
        )
    rng = np.random.default_rng(seed)
    fit = known
    if len(known) > FIT_USERS:
        fit = np.sort(rng.choice(known, FIT_USERS, replace=False))
    sample = shares[fit]
    model = KMeans(
        n_clusters=min(clusters, _distinct_rows(sample, clusters)),
        n_init=RESTARTS,
        random_state=int(rng.integers(2**31)),
    ).fit(sample)
    found = model.predict(shares[known])
    sizes = np.bincount(found, minlength=model.n_clusters)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    number = np.full(model.n_clusters, -1, np.int32)
    number[order] = np.arange(len(order))
    cluster = np.full(shares.shape[0], -1, np.int32)
    cluster[known] = number[found]
    member = scipy.sparse.csr_array(
        (np.ones(len(known)), (cluster[known], known)), (len(order), shares.shape[0])
    )
    means = (member @ shares).toarray() / sizes[order][:, None]
    return cluster, means


def cluster_sentences(means: np.ndarray, categories: Sequence[str]) -> list[str]:
    """A sentence for each cluster from its mean category shares (K, C).

    Where the plain sentences of clusters agree, their largest shares in percent are added.
    """
    plain = [cluster_sentence(row, categories) for row in means]
    return [
        f"{sentence[:-1]} ({_percentages(row, categories)})."
        if plain.count(sentence) > 1
        else sentence
        for row, sentence in zip(means, plain, strict=True)
    ]


def cluster_sentence(shares: np.ndarray, categories: Sequence[str]) -> str:
    """The paper's manner of writing sorted category shares (C,) as a sentence.

    "Co-purchased by people who primarily buy A, along with B and C, while showing lower engagement
    in D, E, and F, and minimal interest in G." At most NAMED categories are named at each level.
    """
    order = np.argsort(-shares, kind="stable")
    sorted_shares = shares[order]
    level = np.select(
        [sorted_shares >= sorted_shares[0] / 2, sorted_shares >= ALONG, sorted_shares >= LOWER],
        [0, 1, 2],
        3,
    )
    primary, along, lower, minimal = (
        _listed([categories[i] for i in order[level == n][:NAMED]]) for n in range(4)
    )
    sentence = f"Co-purchased by people who primarily buy {primary}"
    if along:
        sentence += f", along with {along}"
    if lower:
        sentence += f", while showing lower engagement in {lower}"
    if minimal:
        sentence += f", {'and' if lower else 'while showing'} minimal interest in {minimal}"
    return sentence + "."


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; true at the first."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _renumber(keep: np.ndarray) -> np.ndarray:
    return (np.cumsum(keep, dtype=np.int32) - 1).astype(np.int32)


def _distinct_rows(table: scipy.sparse.csr_array, enough: int) -> int:
    """The number of distinct rows, or `enough` once there are so many."""
    found: set[bytes] = set()
    for first, last in zip(table.indptr[:-1], table.indptr[1:], strict=True):
        found.add(table.indices[first:last].tobytes() + table.data[first:last].tobytes())
        if len(found) >= enough:
            break
    return len(found)


def _listed(names: list[str]) -> str:
    if len(names) < 3:
        return " and ".join(names)
    return f"{', '.join(names[:-1])}, and {names[-1]}"


def _percentages(shares: np.ndarray, categories: Sequence[str]) -> str:
    order = np.argsort(-shares, kind="stable")[:NAMED]
    return ", ".join(f"{categories[i]} {100 * shares[i]:.1f} %" for i in order)

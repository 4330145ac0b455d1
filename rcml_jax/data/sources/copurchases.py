"""Items that the same kind of buyers buy together: the part shared by sources with purchases.

From purchases to relations: the k-core, kinds of buyers by k-means on what they buy, a sentence for
each kind, and pairs of items that one buyer bought, under caps for buyers and for items. Ids are
64-bit integers in NumPy arrays; nothing else of a purchase is kept.
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
_BLOCK_CELLS = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Purchases:
    """R purchases, each of a distinct user and item, sorted by user and then by item.

    users (U,), items (N,): uint64 ids (hashes or numbers), sorted; user (R,), item (R,): int32,
    indices into these.
    """

    users: np.ndarray
    items: np.ndarray
    user: np.ndarray
    item: np.ndarray


def distinct_purchases(
    users: np.ndarray, items: np.ndarray, core: int = CORE
) -> tuple[Purchases, dict[str, int]]:
    """Purchases from ids of user and item (M,) uint64 in any order, and what was left out.

    Users with fewer than `core` purchases, which no `core`-core can hold, are gone already. The
    counts: "repeated" (purchases of an item that the user had), "single" (users with one purchase).
    """
    user_ids, user = _sorted_ids(users)
    item_ids, item = _sorted_ids(items)
    # One number for both, sorted in place: half the time and memory of a lexsort of the ids.
    key = user.astype(np.int64)
    del user
    key *= len(item_ids)
    key += item
    del item
    key.sort()
    key = key[_changes(key)]
    user = (key // max(len(item_ids), 1)).astype(np.int32)
    bought = np.bincount(user, minlength=len(user_ids))
    counts = {"repeated": len(users) - len(key), "single": int(np.sum(bought == 1))}
    keep_user = bought >= core
    keep = keep_user[user]
    user = _renumber(keep_user)[user[keep]]
    item = (key[keep] % max(len(item_ids), 1)).astype(np.int32)
    del key
    keep_item = np.bincount(item, minlength=len(item_ids)) > 0
    return (
        Purchases(user_ids[keep_user], item_ids[keep_item], user, _renumber(keep_item)[item]),
        counts,
    )


def k_core(purchases: Purchases, core: int = CORE) -> Purchases:
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


def kinds_of_buyers(
    purchases: Purchases,
    category: np.ndarray,
    names: Sequence[str],
    *,
    clusters: int,
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """Kinds of buyers by the categories of what they buy: each user's kind and the sentences.

    category (N,): of each item, an index into `names`, or -1 for unknown. Returns the kind (U,)
    int32, -1 for a user without a known category, and a sentence for each of the `clusters` kinds
    at most.

    Raises:
      UserError: as `cluster_users`.
    """
    shares = category_shares(purchases, category, len(names))
    cluster, means = cluster_users(shares, clusters, seed)
    return cluster, cluster_sentences(means, names)


def merge_kinds(sentences: list[str], cluster: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Kinds with the same sentence as one: the distinct sentences and each user's kind (U,)."""
    relations = list(dict.fromkeys(sentences))
    number = np.array([relations.index(sentence) for sentence in sentences] + [-1], np.int32)
    return relations, number[cluster]  # -1, for no kind, is the last


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
            "No buyer has bought an item of a known category, so there are no kinds of buyers; "
            "check the categories of the items."
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


def copurchase_pairs(
    user: np.ndarray,
    item: np.ndarray,
    cluster: np.ndarray,
    *,
    items: int,
    per_user: int,
    per_item: int,
    seed: int,
    owner: np.ndarray | None = None,
) -> np.ndarray:
    """Pairs (P, 3) int32 of items a < b and the cluster of a buyer of both; unique and sorted.

    user, item (R,): purchases, sorted by user and then by item, without repetition; cluster (U,):
    of each user, from 0 on. `items` is the number of items. Of each user's pairs `per_user` at
    most are drawn, uniformly and without replacement. Then each item keeps `per_item` of its pairs
    at most (under all clusters together): those drawn from more users first, ties at random.

    owner (U,): where a user is one basket of several, whose basket it is. An owner, too, gives
    `per_user` pairs at most, drawn at random from those of all their baskets.
    """
    rng = np.random.default_rng([seed, 1])
    a, b, buyer = draw_pairs(user, item, per_user, rng)
    if owner is not None:
        some = _some_of_each(owner[buyer], per_user, rng)
        a, b, buyer = a[some], b[some], buyer[some]
    relations = int(cluster.max(initial=0)) + 1
    key = (a.astype(np.int64) * items + b) * relations + cluster[buyer]
    del a, b, buyer
    key, buyers = np.unique(key, return_counts=True)
    ends = np.stack(np.divmod(key // relations, items), axis=1).astype(np.int32)
    priority = np.lexsort((rng.random(len(key)), -buyers))
    kept = np.zeros(len(key), bool)
    kept[priority] = within_item_cap(ends[priority], items, per_item)
    return np.column_stack([ends[kept], (key[kept] % relations).astype(np.int32)])


def draw_pairs(
    user: np.ndarray, item: np.ndarray, per_user: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each user's pairs of purchases at most `per_user`: items a < b and the user (D,) int32.

    Every set of so many pairs of a user is equally likely (Floyd's algorithm, for many users at a
    time). Purchases are sorted by user and then by item.
    """
    start = np.flatnonzero(np.diff(user, prepend=-1))
    size = np.diff(np.append(start, len(user)))
    possible = size * (size - 1) // 2
    few = possible <= per_user
    # All the pairs of small users, numbered one after the other.
    number = np.arange(possible[few].sum()) - np.repeat(
        np.cumsum(possible[few]) - possible[few], possible[few]
    )
    parts = [(np.repeat(np.flatnonzero(few), possible[few]), number)]
    many = np.flatnonzero(~few)
    block = max(1, _BLOCK_CELLS // per_user)
    for first in range(0, len(many), block):
        some = many[first : first + block]
        parts.append((np.repeat(some, per_user), _subsets(possible[some], per_user, rng).ravel()))
    whose, number = (np.concatenate(part) for part in zip(*parts, strict=True))
    i, j = _unrank(number)
    return item[start[whose] + i], item[start[whose] + j], user[start[whose]]


def within_item_cap(ends: np.ndarray, items: int, cap: int) -> np.ndarray:
    """Which pairs (P, 2), from the most to the least wanted, stay if an item may have `cap`: (P,).

    The same as going through them one by one and keeping each whose items both have room; here a
    pair is kept at once if it is among as many first pairs, at both its items, as there is room.
    """
    keep = np.zeros(len(ends), bool)
    room = np.full(items, cap)
    open_pairs = np.arange(len(ends))
    while len(open_pairs):
        pair_ends = ends[open_pairs]
        first = np.all(_ranks(pair_ends) < room[pair_ends], axis=1)
        keep[open_pairs[first]] = True
        room -= np.bincount(pair_ends[first].ravel(), minlength=items)
        open_pairs, pair_ends = open_pairs[~first], pair_ends[~first]
        open_pairs = open_pairs[np.all(room[pair_ends] > 0, axis=1)]
    return keep


def _sorted_ids(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, sorted, and the index (M,) int32 of each value in these."""
    order = np.argsort(values)
    ordered = values[order]
    new = _changes(ordered)
    index = np.empty(len(values), np.int32)
    index[order] = _renumber(new)
    return ordered[new], index


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; true at the first."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _renumber(keep: np.ndarray) -> np.ndarray:
    """The number of each kept one among the kept, int32."""
    number = np.cumsum(keep, dtype=np.int32)
    number -= 1
    return number


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


def _some_of_each(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most `count` random members of each group (n,), in ascending order."""
    order = rng.permutation(len(group))
    order = order[np.argsort(group[order], kind="stable")]
    return np.sort(order[_places_in_runs(group[order]) < count])


def _ranks(ends: np.ndarray) -> np.ndarray:
    """The place of each pair (P, 2) among the pairs of either item, in their order: (P, 2)."""
    flat = ends.ravel()
    order = np.argsort(flat, kind="stable")
    ranks = np.empty(len(flat), np.int32)
    ranks[order] = _places_in_runs(flat[order])
    return ranks.reshape(ends.shape)


def _places_in_runs(ordered: np.ndarray) -> np.ndarray:
    """The place of each sorted value, 0 or more, among its equals: 0, 1, 2, ..."""
    start = np.flatnonzero(np.diff(ordered, prepend=-1))
    return np.arange(len(ordered)) - np.repeat(start, np.diff(np.append(start, len(ordered))))


def _subsets(possible: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """For each n in `possible` (H,), all over `size`: that many distinct numbers below n (H, size).

    Floyd's algorithm: for j = n - size, ..., n - 1 draw t from 0 to j, and take j if t is taken.
    """
    drawn = np.empty((len(possible), size), np.int64)
    for k in range(size):
        top = possible - size + k
        number = rng.integers(0, top + 1)
        taken = np.any(drawn[:, :k] == number[:, None], axis=1)
        drawn[:, k] = np.where(taken, top, number)
    return drawn


def _unrank(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair i < j of a number, counting from 0: (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    j = ((1 + np.sqrt(1 + 8.0 * number)) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number  # where rounding has gone too far
    j += j * (j + 1) // 2 <= number
    return number - j * (j - 1) // 2, j

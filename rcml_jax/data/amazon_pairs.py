"""Pairs of items that one user bought, under caps for users and for items."""

import numpy as np

_BLOCK_CELLS = 4_000_000


def copurchase_pairs(
    user: np.ndarray,
    item: np.ndarray,
    cluster: np.ndarray,
    *,
    items: int,
    per_user: int,
    per_item: int,
    seed: int,
) -> np.ndarray:
    """Pairs (P, 3) int32 of items a < b and the cluster of a buyer of both; unique and sorted.

    user, item (R,): purchases, sorted by user and then by item, without repetition; cluster (U,):
    of each user, from 0 on. `items` is the number of items. Of each user's pairs `per_user` at
    most are drawn, uniformly and without replacement. Then each item keeps `per_item` of its pairs
    at most (under all clusters together): those drawn from more users first, ties at random.
    """
    rng = np.random.default_rng([seed, 1])
    a, b, buyer = draw_pairs(user, item, per_user, rng)
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


def _ranks(ends: np.ndarray) -> np.ndarray:
    """The place of each pair (P, 2) among the pairs of either item, in their order: (P, 2)."""
    flat = ends.ravel()
    order = np.argsort(flat, kind="stable")
    start = np.flatnonzero(np.diff(flat[order], prepend=-1))
    sizes = np.diff(np.append(start, len(flat)))
    ranks = np.empty(len(flat), np.int32)
    ranks[order] = np.arange(len(flat)) - np.repeat(start, sizes)
    return ranks.reshape(ends.shape)


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

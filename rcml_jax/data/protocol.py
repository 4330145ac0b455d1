"""Evaluation queries of a relation graph: drawn by a fixed seed, the same for every model."""

import dataclasses

import numpy as np

from rcml_jax.data.graph import RelationGraph, Splits, split_index
from rcml_jax.errors import UserError

# Up to this many items of a split, candidates are drawn by one random number an item and query;
# beyond it, by rejection. Both draw uniformly without replacement.
_DENSE_ITEMS = 4096
_BLOCK_CELLS = 4_000_000


@dataclasses.dataclass(frozen=True)
class RetrievalQueries:
    """Find the partner: query (Q,), candidates (Q, 1 + negatives), relation (Q,), all int32.

    Column 0 of the candidates is the positive. `skipped` counts the queries that were left out,
    because their split has too few items that are unrelated to them.
    """

    query: np.ndarray
    candidates: np.ndarray
    relation: np.ndarray
    skipped: int


@dataclasses.dataclass(frozen=True)
class RelationQueries:
    """Find the relation: a (P,), b (P,), relations (P, C), all int32; column 0 is the true one.

    `skipped` counts the pairs that were left out, because too few relations do not link them.
    """

    a: np.ndarray
    b: np.ndarray
    relations: np.ndarray
    skipped: int


@dataclasses.dataclass(frozen=True)
class ValidityExamples:
    """Does the relation hold: a (M,), b (M,), relation (M,) int32, label (M,) int32, balanced."""

    a: np.ndarray
    b: np.ndarray
    relation: np.ndarray
    label: np.ndarray


def retrieval_queries(
    graph: RelationGraph,
    splits: Splits,
    split: str,
    *,
    negatives: int = 20,
    limit: int = 10_000,
    per_relation: int = 0,
    seed: int,
) -> RetrievalQueries:
    """The pairs of a split, each in both directions, with candidates drawn from its items.

    At most `limit` queries are drawn, and at most `per_relation` pairs of each relation (0: any
    number), so that no relation dominates. The candidates of each are its positive and `negatives`
    items of the split, drawn uniformly without replacement among those that are unrelated to the
    query under any relation.

    Raises:
      UserError: the split has no pair, or no query has enough unrelated items.
    """
    pairs = _pairs_of(splits, split, per_relation, seed)
    rng = np.random.default_rng([seed, split_index(split), 1])
    both = np.concatenate([pairs, pairs[:, [1, 0, 2]]])
    both = both[_some(rng, len(both), limit)]
    drawn, found = _unrelated(graph, both[:, 0], splits.items(split), negatives, rng)
    if not found.any():
        raise UserError(
            f"No item of the {split} split of '{graph.name}' has {negatives} unrelated items in "
            "it; ask for fewer negatives or use more items."
        )
    both = both[found]
    candidates = np.concatenate([both[:, 1:2], drawn[found]], axis=1)
    return RetrievalQueries(
        query=both[:, 0].astype(np.int32),
        candidates=candidates.astype(np.int32),
        relation=both[:, 2].astype(np.int32),
        skipped=int(np.sum(~found)),
    )


def relation_candidates(
    graph: RelationGraph,
    splits: Splits,
    split: str,
    *,
    candidates: int = 10,
    limit: int = 10_000,
    per_relation: int = 0,
    seed: int,
) -> RelationQueries:
    """The pairs of a split, each with its relation and others under which it is not linked.

    C is `candidates`, or the number R of the graph's relations where that is smaller (with one
    relation C is 1, and the task says nothing). Pairs with fewer than C - 1 relations that do not
    link them are left out, so that chance is the same for every query; where that leaves none, C
    is what the pair with the fewest relations allows.

    Raises:
      UserError: the split has no pair.
    """
    pairs = _pairs_of(splits, split, per_relation, seed)
    rng = np.random.default_rng([seed, split_index(split), 2])
    pairs = pairs[_some(rng, len(pairs), limit)]
    free = len(graph.relations) - np.bincount(graph.links_of(pairs)[0], minlength=len(pairs))
    others = min(candidates, len(graph.relations)) - 1
    if np.all(free < others):
        others = int(free.max())
    kept = pairs[free >= others]
    drawn, _ = _unlinked(graph, kept, others, rng)
    return RelationQueries(
        a=kept[:, 0].astype(np.int32),
        b=kept[:, 1].astype(np.int32),
        relations=np.concatenate([kept[:, 2:], drawn], axis=1).astype(np.int32),
        skipped=len(pairs) - len(kept),
    )


def validity_examples(
    graph: RelationGraph,
    splits: Splits,
    split: str,
    *,
    limit: int = 10_000,
    per_relation: int = 0,
    seed: int,
) -> ValidityExamples:
    """True and false (a, b, relation) of a split, half and half, M <= `limit` in random order.

    Every true pair stands beside one false one: for half of them the same items under a relation
    that does not link them, for half the same first item and relation with an unrelated item of
    the split. So neither an item nor a sentence alone tells the answer.

    Raises:
      UserError: the split has fewer than two pairs, or no false ones can be drawn.
    """
    pairs = _pairs_of(splits, split, per_relation, seed)
    rng = np.random.default_rng([seed, split_index(split), 3])
    # Some pairs allow no false one: draw from twice as many as are needed.
    pairs = pairs[rng.permutation(len(pairs))[: max(limit, 2)]]
    swap = rng.random(len(pairs)) < 0.5
    pairs = np.where(swap[:, None], pairs[:, [1, 0, 2]], pairs)
    first, second = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    relation, ok_relation = _unlinked(graph, first, 1, rng)
    item, ok_item = _unrelated(graph, second[:, 0], splits.items(split), 1, rng)
    k = min(int(ok_relation.sum()), int(ok_item.sum()), limit // 4)
    if k == 0:
        raise UserError(
            f"The {split} split of '{graph.name}' gives no false pairs for the validity task; it "
            "needs two pairs, two relations and two unrelated items at least."
        )
    true_first, true_second = first[ok_relation][:k], second[ok_item][:k]
    wrong_relation, wrong_item = true_first.copy(), true_second.copy()
    wrong_relation[:, 2] = relation[ok_relation][:k, 0]
    wrong_item[:, 1] = item[ok_item][:k, 0]
    rows = np.concatenate([true_first, true_second, wrong_relation, wrong_item]).astype(np.int32)
    label = np.repeat(np.array([1, 0], np.int32), 2 * k)
    order = rng.permutation(len(rows))
    rows, label = rows[order], label[order]
    return ValidityExamples(a=rows[:, 0], b=rows[:, 1], relation=rows[:, 2], label=label)


def _pairs_of(splits: Splits, split: str, per_relation: int, seed: int) -> np.ndarray:
    """A split's pairs, at most `per_relation` of each relation (0: all), drawn by the seed."""
    pairs = splits.pairs(split)
    if not len(pairs):
        raise UserError(
            f"The {split} split holds no pair; use another split seed, other fractions or "
            "data.disjoint=pair, or declare a split for more pairs."
        )
    if per_relation:
        order = np.random.default_rng([seed, split_index(split), 0]).permutation(len(pairs))
        order = order[np.argsort(pairs[order, 2], kind="stable")]
        relations = pairs[order, 2]
        place = np.arange(len(order)) - np.searchsorted(relations, relations)
        pairs = pairs[np.sort(order[place < per_relation])]
    return pairs


def _some(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, drawn without replacement, in ascending order."""
    if count <= limit:
        return np.arange(count)
    return np.sort(rng.choice(count, limit, replace=False))


def _unrelated(
    graph: RelationGraph,
    queries: np.ndarray,
    items: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` items unrelated to each query (Q, count), and whether there are so many (Q,)."""
    drawn = np.zeros((len(queries), count), np.int64)
    found = np.zeros(len(queries), bool)
    if len(items) < count:
        return drawn, found
    todo = np.arange(len(queries))
    if len(items) > _DENSE_ITEMS:
        # Of a stream of uniform draws, the first `count` that are new and unrelated are a uniform
        # draw without replacement; queries for which the stream is too short are drawn below.
        tries = items[rng.integers(len(items), size=(len(queries), 2 * count + 8))]
        good = ~graph.linked_any(queries[:, None], tries)
        good &= _first_of_kind(tries)
        found = good.sum(axis=1) >= count
        keep = good & (np.cumsum(good, axis=1) <= count)
        drawn[found] = tries[keep & found[:, None]].reshape(-1, count)
        todo = np.flatnonzero(~found)
    block = max(1, _BLOCK_CELLS // max(len(items), 1))
    for start in range(0, len(todo), block):
        rows = todo[start : start + block]
        keys = rng.random((len(rows), len(items)), dtype=np.float32)
        columns, found[rows] = _lowest(keys, graph.linked_any_block(queries[rows], items), count)
        drawn[rows] = items[columns]
    return drawn, found


def _first_of_kind(values: np.ndarray) -> np.ndarray:
    """Whether an entry (n, m) comes for the first time in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    first = np.ones(values.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    out = np.empty_like(first)
    np.put_along_axis(out, order, first, axis=1)
    return out


def _lowest(keys: np.ndarray, barred: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of each row's `count` lowest keys that are not barred, and whether that many are."""
    found = np.sum(~barred, axis=1) >= count
    keys[barred] = 2.0  # keys are below 1
    columns = np.argpartition(keys, count - 1, axis=1)[:, :count] if count else keys[:, :0]
    return columns.astype(np.int64), found


def _unlinked(
    graph: RelationGraph, pairs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` relations that do not link each pair (P, count), and whether there are so many."""
    total = len(graph.relations)
    drawn = np.zeros((len(pairs), count), np.int64)
    found = np.zeros(len(pairs), bool)
    if total < count:
        return drawn, found
    block = max(1, _BLOCK_CELLS // max(total, 1))
    for low in range(0, len(pairs), block):
        rows = slice(low, min(low + block, len(pairs)))
        linked = np.zeros((len(pairs[rows]), total), bool)
        linked[graph.links_of(pairs[rows])] = True
        keys = rng.random(linked.shape, dtype=np.float32)
        drawn[rows], found[rows] = _lowest(keys, linked, count)
    return drawn, found

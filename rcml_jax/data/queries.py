"""Evaluation queries of a relation graph: drawn by a fixed seed, the same for every model."""

import dataclasses
import itertools

import numpy as np
import scipy.sparse

from rcml_jax.data.relation_graph import RelationGraph, Splits, split_index
from rcml_jax.errors import UserError

# Up to this many items of a split, candidates are drawn by one random number an item and query;
# beyond it, by rejection. Both draw uniformly without replacement.
_DENSE_ITEMS = 4096
_BLOCK_CELLS = 4_000_000
_ROUNDS = 100  # of exchanging wrong relations


#: Kinds of retrieval candidates: the positive; linked to the query under another relation only;
#: linked to other items under this relation; none of these.
POSITIVE, OTHER_RELATION, SAME_RELATION, UNRELATED = range(4)


@dataclasses.dataclass(frozen=True)
class RetrievalQueries:
    """Find the partner: query (Q,), candidates (Q, 1 + negatives), relation (Q,), all int32.

    Column 0 of the candidates is the positive. `kind` (Q, 1 + negatives) int8 is the kind of each.
    `skipped` counts the queries that were left out, because their split has too few items that are
    unrelated to them.
    """

    query: np.ndarray
    candidates: np.ndarray
    relation: np.ndarray
    kind: np.ndarray
    skipped: int

    def shares(self) -> dict[str, float]:
        """The share of the negatives that are of each kind."""
        names = {
            "other_relation": OTHER_RELATION,
            "same_relation": SAME_RELATION,
            "unrelated": UNRELATED,
        }
        return {name: float(np.mean(self.kind[:, 1:] == kind)) for name, kind in names.items()}


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
    rng = np.random.default_rng([seed, split_index(split), 1])
    both = _directed(_pairs_of(splits, split, per_relation, seed), limit, rng)
    drawn, found = _unrelated(graph, both[:, 0], splits.items(split), negatives, rng)
    return _queries(graph, split, both, drawn, np.full(drawn.shape, UNRELATED), found)


def controlled_queries(
    graph: RelationGraph,
    splits: Splits,
    split: str,
    *,
    negatives: int = 20,
    limit: int = 10_000,
    per_relation: int = 0,
    seed: int,
) -> RetrievalQueries:
    """The queries of `retrieval_queries` with candidates that neither half of a query tells apart.

    Half of the negatives are linked to the query under another relation but not under this one;
    those that this relation links to other items come first. The other half are linked to something
    under this relation, but to the query under none. Where a split has too few of either, the rest
    are unrelated items, as in `retrieval_queries`. All are drawn without replacement from the
    split's items, and none is linked to the query under its relation.

    Raises:
      UserError: the split has no pair, or no query has enough other items.
    """
    rng = np.random.default_rng([seed, split_index(split), 1])
    both = _directed(_pairs_of(splits, split, per_relation, seed), limit, rng)
    items = splits.items(split)
    members = _members(graph, splits.pairs(split), items)
    drawn = np.zeros((len(both), negatives), np.int64)
    kind = np.full(drawn.shape, UNRELATED, np.int8)
    found = np.zeros(len(both), bool)
    half = negatives // 2
    barred, is_member = np.zeros((2, len(graph)), bool)
    for row in np.argsort(both[:, 2], kind="stable"):
        query, _, relation = both[row]
        near = items[_linked_indices(graph, query, items)]
        other = near[~graph.linked(query, near, relation) & (near != query)]
        if graph.class_links is not None:  # Items of one label are one thing to a text.
            other = other[graph.labels[other] != graph.labels[query]]
        other = rng.permutation(other)
        is_member[members[relation]] = True
        other = other[np.argsort(~is_member[other], kind="stable")][:half]
        is_member[members[relation]] = False
        barred[near] = True
        same = _sample(rng, members[relation], barred, len(near), half)
        barred[same] = True
        rest = negatives - len(other) - len(same)
        fill = _sample(rng, items, barred, len(near) + len(same), rest)
        barred[near] = barred[same] = False
        found[row] = len(fill) == rest
        if found[row]:
            drawn[row] = np.concatenate([other, same, fill])
            kind[row, : len(other)] = OTHER_RELATION
            kind[row, len(other) : len(other) + len(same)] = SAME_RELATION
    return _queries(graph, split, both, drawn, kind, found)


def _queries(
    graph: RelationGraph,
    split: str,
    both: np.ndarray,
    drawn: np.ndarray,
    kind: np.ndarray,
    found: np.ndarray,
) -> RetrievalQueries:
    """The queries (a, b, relation) for which enough negatives were found."""
    if not found.any():
        raise UserError(
            f"No item of the {split} split of '{graph.name}' has {drawn.shape[1]} unrelated items "
            "in it; ask for fewer negatives or use more items."
        )
    both = both[found]
    kind = np.pad(kind[found], ((0, 0), (1, 0)), constant_values=POSITIVE)
    return RetrievalQueries(
        query=both[:, 0].astype(np.int32),
        candidates=np.concatenate([both[:, 1:2], drawn[found]], axis=1).astype(np.int32),
        relation=both[:, 2].astype(np.int32),
        kind=kind.astype(np.int8),
        skipped=int(np.sum(~found)),
    )


def _directed(pairs: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs in both directions, (2P, 3), at most `limit` of them."""
    both = np.concatenate([pairs, pairs[:, [1, 0, 2]]])
    return both[_some(rng, len(both), limit)]


def _members(graph: RelationGraph, pairs: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
    """For each relation the items, sorted, that the split's pairs or class links link under it."""
    if graph.class_links is None:
        both = np.unique(np.concatenate([pairs[:, [2, 0]], pairs[:, [2, 1]]]), axis=0)
        bounds = np.searchsorted(both[:, 0], np.arange(len(graph.relations) + 1))
        return [both[i:j, 1] for i, j in itertools.pairwise(bounds)]
    linked = np.zeros((len(graph.relations), len(graph.label_names)), bool)
    a, b, relation = graph.class_links.T
    linked[relation, a] = linked[relation, b] = True
    return [items[row[graph.labels[items]]] for row in linked]


def _linked_indices(graph: RelationGraph, query: int, items: np.ndarray) -> np.ndarray:
    """Places in sorted items of those that are linked to a query under any relation, itself too."""
    if graph.class_links is not None:
        return np.flatnonzero(graph.linked_any(np.asarray(query), items))
    near = graph.related_to(query)
    index = np.searchsorted(items, near).clip(max=len(items) - 1)
    return index[items[index] == near]


def _sample(
    rng: np.random.Generator, pool: np.ndarray, barred: np.ndarray, most: int, count: int
) -> np.ndarray:
    """At most `count` of a pool, uniform without replacement, none of which is `barred` (N,).

    most: the number of items that are barred, or more.
    """
    drawn = pool[rng.choice(len(pool), min(len(pool), count + most), replace=False)]
    return drawn[~barred[drawn]][:count]


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

    Wrong relations are drawn without replacement by how often each is the true one of the pairs
    that are asked, so that frequent relations are wrong about as often as they are right. One that
    is true of most pairs cannot be wrong as often: see the frequency control.

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
        others = int(np.max(free))
    kept = pairs[free >= others]
    frequency = np.bincount(pairs[:, 2], minlength=len(graph.relations)) / len(pairs)
    drawn = _unlinked(graph, kept, others, frequency, rng)
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
    the split. The wrong relations are the true ones, exchanged among the pairs: every relation is
    false as often as it is true. So neither an item nor a sentence alone tells the answer.

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
    item, ok = _unrelated(graph, second[:, 0], splits.items(split), 1, rng)
    true_second, item = second[ok], item[ok]
    first, wrong = _exchanged(graph, first[: min(limit // 4, len(item))], rng)
    k = len(first)
    if k == 0:
        raise UserError(
            f"The {split} split of '{graph.name}' gives no false pairs for the validity task; it "
            "needs two pairs, two relations and two unrelated items at least."
        )
    true_first, true_second = first, true_second[:k]
    wrong_relation, wrong_item = true_first.copy(), true_second.copy()
    wrong_relation[:, 2] = wrong
    wrong_item[:, 1] = item[:k, 0]
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
        index = np.arange(len(order)) - np.searchsorted(relations, relations)
        pairs = pairs[np.sort(order[index < per_relation])]
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
    keys[barred] = np.inf
    columns = np.argpartition(keys, count - 1, axis=1)[:, :count] if count else keys[:, :0]
    return columns.astype(np.int64), found


def _unlinked(
    graph: RelationGraph,
    pairs: np.ndarray,
    count: int,
    frequency: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """`count` relations that do not link each pair (P, count), drawn by their frequency (R,).

    Relations of frequency 0 come after all others. Every pair must have so many.
    """
    total = len(graph.relations)
    drawn = np.zeros((len(pairs), count), np.int64)
    # The lowest of exponential variables with these rates are a draw without replacement.
    scale = 1 / np.maximum(frequency, 1e-9)
    block = max(1, _BLOCK_CELLS // max(total, 1))
    for low in range(0, len(pairs), block):
        rows = slice(low, min(low + block, len(pairs)))
        linked = np.zeros((len(pairs[rows]), total), bool)
        linked[graph.links_of(pairs[rows])] = True
        keys = rng.standard_exponential(linked.shape) * scale
        drawn[rows], _ = _lowest(keys, linked, count)
    return drawn


def _exchanged(
    graph: RelationGraph, pairs: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (k, 3), and their relations (k,) in another order in which none links its pair.

    Starts from a random order and exchanges where a relation does link; pairs for which nothing is
    found are left out, and the rest is tried again.
    """
    while len(pairs):
        a, b, relation = pairs.T
        relation = rng.permutation(relation)
        for _ in range(_ROUNDS):
            wrong = np.flatnonzero(graph.linked(a, b, relation))
            if not len(wrong):
                return pairs, relation
            for i, j in zip(wrong, rng.integers(len(pairs), size=len(wrong)), strict=True):
                i_to, j_to = relation[j], relation[i]
                if not graph.linked(a[[i, j]], b[[i, j]], np.array([i_to, j_to])).any():
                    relation[[i, j]] = i_to, j_to
        pairs = pairs[~graph.linked(a, b, relation)]
    return pairs, np.zeros(0, np.int64)


def every_relation(graph: RelationGraph, queries: RelationQueries) -> tuple[np.ndarray, np.ndarray]:
    """All relations for each pair (P, R), the true one first, and which count (P, R) bool.

    The other relations that link the pair do not count: they are correct, too.
    """
    total, pairs = len(graph.relations), np.stack([queries.a, queries.b], axis=1)
    true = queries.relations[:, :1]
    others = np.broadcast_to(np.arange(total), (len(pairs), total))
    relations = np.concatenate([true, others[others != true].reshape(len(pairs), -1)], axis=1)
    linked = np.zeros((len(pairs), total), bool)
    linked[graph.links_of(pairs)] = True
    counts = ~np.take_along_axis(linked, relations, axis=1)
    counts[:, 0] = True
    return relations, counts


# Queries that rank a whole split: every item or text linked to the query is relevant.


@dataclasses.dataclass(frozen=True)
class GalleryQueries:
    """Find every partner: Q queries, (query, relation) each, over a gallery of n items.

    items (n,): the gallery, sorted item numbers. texts (n,): for each, the gallery index of the
    first item with the same text. query (Q,): gallery indices; relation (Q,), sorted.
    relevance (Q, n) sparse bool: items linked to the query under its relation, at least one.
    hidden (Q, n) sparse bool: items that are not ranked: the query itself, and items that pairs of
    another split link to it. left_out: how many queries the limits leave out.
    """

    items: np.ndarray
    texts: np.ndarray
    query: np.ndarray
    relation: np.ndarray
    relevance: scipy.sparse.csr_array
    hidden: scipy.sparse.csr_array
    left_out: int


def gallery_queries(
    graph: RelationGraph,
    splits: Splits,
    split: str,
    *,
    limit: int = 10_000,
    per_relation: int = 0,
    seed: int,
) -> GalleryQueries:
    """Every item of a split under every relation that links it to another of the split.

    At most `per_relation` items under each relation (0: any number) and `limit` queries in all are
    drawn by the seed. With class links or attributes every item that they link is relevant, not
    only the drawn pairs.

    Raises:
      UserError: no item of the split is linked to another.
    """
    items = splits.items(split)
    pairs, by_class = splits.pairs(split), graph.class_links is not None
    queries = _by_class(graph, items) if by_class else _paired(pairs)
    if not len(queries):
        raise UserError(f"No two items of the {split} split of '{graph.name}' are linked.")
    chosen = _draw(queries[:, 1], limit, per_relation, [seed, split_index(split), 4])
    query, relation = queries[chosen].T
    if by_class:
        relevance = _linked_classes(graph, query, relation, items)
        hidden = scipy.sparse.csr_array(relevance.shape, dtype=bool)
    else:
        pairs, every = (_by_sentence(graph, some) for some in (pairs, graph.pairs))
        asked = graph.first_with_sentence(relation)
        relevance = _agreeing(graph, query, relation, items) + _partners(pairs, query, asked, items)
        hidden = _partners(every, query, asked, items) > relevance
    index = np.searchsorted(items, query)
    own = _matrix(np.arange(len(query)), index, relevance.shape)
    first: dict[str, int] = {}
    texts = [first.setdefault(graph.texts[item], i) for i, item in enumerate(items)]
    return GalleryQueries(
        items=items,
        texts=np.array(texts),
        query=index,
        relation=relation,
        relevance=relevance > own,
        hidden=hidden + own,
        left_out=len(queries) - len(chosen),
    )


def _by_sentence(graph: RelationGraph, pairs: np.ndarray) -> np.ndarray:
    """Pairs (p, 3) under the first relation with the same sentence, each once."""
    if graph.same_sentence is None:
        return pairs
    found = np.column_stack([pairs[:, :2], graph.same_sentence[pairs[:, 2]]])
    return np.unique(found, axis=0)


def _paired(pairs: np.ndarray) -> np.ndarray:
    """(item, relation) of both items of every pair, unique, sorted by the relation."""
    both = np.concatenate([pairs[:, [0, 2]], pairs[:, [1, 2]]])
    return np.unique(both[:, ::-1], axis=0)[:, ::-1]


def _by_class(graph: RelationGraph, items: np.ndarray) -> np.ndarray:
    """(item, relation) of every item whose class is linked to that of another item."""
    assert graph.class_links is not None  # asked of graphs with class links only
    a, b, e = graph.class_links.T
    count = np.bincount(graph.labels[items], minlength=len(graph.label_names))
    reached = np.zeros((len(graph.relations), len(count)), bool)
    apart = a != b
    # A class that is linked with itself needs a second item, unless it is linked with another one.
    np.logical_or.at(reached, (e, a), np.where(apart, count[b] > 0, count[a] > 1))
    np.logical_or.at(reached, (e, b), np.where(apart, count[a] > 0, count[a] > 1))
    relation, row = np.nonzero(reached[:, graph.labels[items]])
    return np.stack([items[row], relation], axis=1)


def _draw(relation: np.ndarray, limit: int, per_relation: int, seed: list[int]) -> np.ndarray:
    """Rows to keep, ascending, of queries sorted by relation."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(relation))
    if per_relation:
        order = order[np.argsort(relation[order], kind="stable")]
        index = np.arange(len(order)) - np.searchsorted(relation[order], relation[order])
        order = rng.permutation(order[index < per_relation])
    return np.sort(order[:limit])


def _partners(
    pairs: np.ndarray, query: np.ndarray, relation: np.ndarray, items: np.ndarray
) -> scipy.sparse.csr_array:
    """Which items are paired with each query under its relation: (Q, n) bool."""
    both = np.concatenate([pairs, pairs[:, [1, 0, 2]]]).astype(np.int64)
    base = int(max(np.max(both[:, 2], initial=0), relation.max())) + 1
    both = both[np.isin(both[:, 1], items)]
    both = both[np.argsort(both[:, 0] * base + both[:, 2], kind="stable")]
    keys, asked = both[:, 0] * base + both[:, 2], query.astype(np.int64) * base + relation
    start = np.searchsorted(keys, asked, "left")
    counts = np.searchsorted(keys, asked, "right") - start
    rows = np.repeat(np.arange(len(query)), counts)
    offset = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = np.searchsorted(items, both[np.repeat(start, counts) + offset, 1])
    return _matrix(rows, columns, (len(query), len(items)))


def _agreeing(
    graph: RelationGraph, query: np.ndarray, relation: np.ndarray, items: np.ndarray
) -> scipy.sparse.csr_array:
    """Which items agree with each query in its relation's attribute, itself too: (Q, n) bool."""
    rows, columns = [np.zeros(0, int)], [np.zeros(0, int)]
    for respect in graph.respects:
        asked = np.flatnonzero(relation == respect)
        row, column = np.nonzero(graph.agree(query[asked][:, None], items, respect))
        rows.append(asked[row])
        columns.append(column)
    shape = (len(query), len(items))
    return _matrix(np.concatenate(rows), np.concatenate(columns), shape)


def _linked_classes(
    graph: RelationGraph, query: np.ndarray, relation: np.ndarray, items: np.ndarray
) -> scipy.sparse.csr_array:
    """Which items are linked with each query by its relation, the query itself too: (Q, n) bool."""
    labels, one_of = np.unique(graph.labels[items], return_index=True)
    linked = graph.linked(query[:, None], items[one_of], relation[:, None])
    members = _matrix(
        np.searchsorted(labels, graph.labels[items]),
        np.arange(len(items)),
        (len(labels), len(items)),
    )
    return (scipy.sparse.csr_array(linked) @ members).astype(bool)


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((np.ones(len(rows), bool), (rows, columns)), shape=shape)

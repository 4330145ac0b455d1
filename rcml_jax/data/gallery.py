"""Queries that rank a whole split: every item or text that is linked to the query is right."""

import dataclasses

import numpy as np
import scipy.sparse

from rcml_jax.data.graph import RelationGraph, Splits, split_index
from rcml_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GalleryQueries:
    """Find every partner: Q queries, (query, relation) each, over a gallery of n items.

    items (n,): the gallery, sorted item numbers. texts (n,): for each, the place in the gallery of
    the first item with the same text. query (Q,): places in the gallery; relation (Q,), sorted.
    right (Q, n) sparse bool: what is linked to the query under its relation, one at least.
    hidden (Q, n) sparse bool: what is not ranked, the query itself and what another split's pairs
    link to it. left_out: how many queries the limits leave out.
    """

    items: np.ndarray
    texts: np.ndarray
    query: np.ndarray
    relation: np.ndarray
    right: scipy.sparse.csr_array
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
    drawn by the seed. With class links or attributes all that they link is right, not only the
    drawn pairs.

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
        right = _linked_classes(graph, query, relation, items)
        hidden = scipy.sparse.csr_array(right.shape, dtype=bool)
    else:
        right = _agreeing(graph, query, relation, items) + _partners(pairs, query, relation, items)
        hidden = _partners(graph.pairs, query, relation, items) > right
    place = np.searchsorted(items, query)
    own = _matrix(np.arange(len(query)), place, right.shape)
    first: dict[str, int] = {}
    texts = [first.setdefault(graph.texts[item], i) for i, item in enumerate(items)]
    return GalleryQueries(
        items=items,
        texts=np.array(texts),
        query=place,
        relation=relation,
        right=right > own,
        hidden=hidden + own,
        left_out=len(queries) - len(chosen),
    )


def _paired(pairs: np.ndarray) -> np.ndarray:
    """(item, relation) of both items of every pair, unique, sorted by the relation."""
    both = np.concatenate([pairs[:, [0, 2]], pairs[:, [1, 2]]])
    return np.unique(both[:, ::-1], axis=0)[:, ::-1]


def _by_class(graph: RelationGraph, items: np.ndarray) -> np.ndarray:
    """(item, relation) of every item whose class is linked to that of another item."""
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
        place = np.arange(len(order)) - np.searchsorted(relation[order], relation[order])
        order = rng.permutation(order[place < per_relation])
    return np.sort(order[:limit])


def _partners(
    pairs: np.ndarray, query: np.ndarray, relation: np.ndarray, items: np.ndarray
) -> scipy.sparse.csr_array:
    """Which items are paired with each query under its relation: (Q, n) bool."""
    both = np.concatenate([pairs, pairs[:, [1, 0, 2]]]).astype(np.int64)
    base = int(max(both[:, 2].max(initial=0), relation.max())) + 1
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

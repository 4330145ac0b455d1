"""Relation graphs: items, relation sentences, the pairs that they link, and splits of them."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import scipy.sparse
from PIL import Image

from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError

SPLITS = ("train", "validation", "test")
INTRA_RELATION = "These two items represent the same product. Align their features accordingly."
#: Rounds of draws that `agreeing_pairs` makes at most.
_DRAWS = 20


class ItemImages(Protocol):
    """The images of a graph's items, in the order of the items."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int) -> Image.Image:
        """The RGB image of one item, decoded on demand."""
        ...

    def encoded(self, index: int) -> bytes:
        """The PNG or JPEG bytes of one item's image."""
        ...


@dataclasses.dataclass(frozen=True)
class RelationGraph:
    """Items (text and image) and undirected pairs of them under relation sentences.

    N items, R relations, P pairs. `ids` and `texts` (N,) are tuples or, of a prepared graph,
    columns that are mapped from files and equal the tuples. `labels` (N,) int32 is the class for
    the label-supervised baseline, -1 where it is unknown. `pairs` (P, 3) int32 holds item a < item
    b and the relation, unique and sorted. `pair_split` (P,) int8 is the declared split (an index
    into SPLITS), or -1 where none is declared. `item_split` (N,) int8 is that of the items, where
    the source declares one for items.

    `class_links` (L, 3) int32 is for items whose relations follow from their labels, such as
    photographs of products: label a <= label b and a relation that links every item of the one
    with every other item of the other, unique and sorted. Items of one label are then the same
    thing to a text and never each other's negatives, and `pairs` are a sample of what is linked.

    `attributes` (N, R) int32 is for relations that say in which respect two items agree, such as
    "the same colour": the value of each item under a relation, -1 for none. A relation links all
    items of one value, and `pairs` are a sample of what is linked. Not together with class links.

    `item_group` (N,) int32 numbers groups of items that no split may part, such as the colours of
    one product: items are then drawn into splits group by group.

    `relation_ids`, if there are any, are the source's names of the relations, for messages.
    `same_sentence` (R,) int32, where some relations have one and the same sentence as the towers
    take it, is the first relation with the sentence of each: what links two items under one of them
    links them under the others, since no model can tell these apart.

    `paraphrases`, if there are any, has for each relation its sentences, the one in `relations`
    first; the last `held_out` of each are for the test alone.
    """

    name: str
    ids: Sequence[str]
    texts: Sequence[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    relations: tuple[str, ...]
    pairs: np.ndarray
    pair_split: np.ndarray
    images: ItemImages
    intra_relation: str = INTRA_RELATION
    item_split: np.ndarray | None = None
    class_links: np.ndarray | None = None
    item_group: np.ndarray | None = None
    attributes: np.ndarray | None = None
    paraphrases: tuple[tuple[str, ...], ...] = ()
    held_out: int = 0
    relation_ids: tuple[str, ...] = ()
    same_sentence: np.ndarray | None = None

    def training_sentences(self, relation: int) -> tuple[str, ...]:
        """The sentences of a relation that training may see, its own one first."""
        if not self.paraphrases:
            return (self.relations[relation],)
        sentences = self.paraphrases[relation]
        return sentences[: len(sentences) - self.held_out]

    def held_out_sentences(self) -> list[tuple[str, ...]]:
        """For each held-out paraphrase the sentences of all relations; none without any."""
        if not (self.paraphrases and self.held_out):
            return []
        return list(zip(*(x[-self.held_out :] for x in self.paraphrases), strict=True))

    def __len__(self) -> int:
        return len(self.ids)

    def related(self) -> scipy.sparse.csr_array:
        """Whether two items are paired under any relation: sparse (N, N) bool, true diagonal.

        With class links, also whether they have the same label. Links that `pairs` leave out do not
        count: one as wide as a department would leave no negatives to learn kinds from. What is
        true of two items is `linked` and `linked_any`.
        """
        n = len(self)
        pairs = self.pairs[:, :2]
        if self.class_links is not None:
            classes = [np.flatnonzero(self.labels == c) for c in range(len(self.label_names))]
            pairs = np.concatenate([pairs, pairs_within(classes)[:, :2]])
        units = np.unique(pairs, axis=0)
        a, b = units[:, 0], units[:, 1]
        diagonal = np.arange(n, dtype=a.dtype)
        rows, cols = np.concatenate([a, b, diagonal]), np.concatenate([b, a, diagonal])
        matrix = scipy.sparse.csr_array((np.ones(len(rows), bool), (rows, cols)), shape=(n, n))
        matrix.sort_indices()
        return matrix

    @functools.cached_property
    def _adjacency(self) -> "_Adjacency":
        return _Adjacency(self.pairs, len(self))

    @functools.cached_property
    def _unit_adjacency(self) -> "_Adjacency":
        if self.class_links is None:
            return self._adjacency
        return _Adjacency(self.class_links, self._units)

    def related_block(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Rows (n,) against columns (m,) of `related()`, dense (n, m) bool.

        The cost is that of the pairs of the rows or of the columns, whichever are fewer.
        """
        rows, cols = np.asarray(rows), np.asarray(cols)
        if not len(cols):
            return np.zeros((len(rows), 0), bool)
        if len(cols) < len(rows):
            return self.related_block(cols, rows).T
        names, column = np.unique(cols, return_inverse=True)
        found, index, _ = self._adjacency.meet(rows, names)
        own, known = _find(names, rows)
        found = np.concatenate([found, np.flatnonzero(known)])
        index = np.concatenate([index, own[known]])
        block = np.zeros((len(rows), len(names)), bool)
        if len(names) == len(cols):
            block[found, np.argsort(column)[index]] = True
        else:  # a column comes twice
            block[found, index] = True
            block = block[:, column]
        return block if self.class_links is None else block | self._one_label(rows[:, None], cols)

    def related_values(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """`related()` of single cells: two index arrays of one shape to bool of that shape."""
        rows, cols = np.asarray(rows), np.asarray(cols)
        start, stop = self._adjacency.between(rows.ravel(), cols.ravel())
        values = (start < stop).reshape(rows.shape) | (rows == cols)
        return values if self.class_links is None else values | self._one_label(rows, cols)

    def related_to(self, item: int) -> np.ndarray:
        """The items, sorted, that `related()` has in one row; the item itself is one of them."""
        found = self._adjacency.around(item)
        if self.class_links is None:
            return found
        return np.union1d(found, np.flatnonzero(self.labels == self.labels[item]))

    def _one_label(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.labels[a] == self.labels[b]

    def linked(self, a: np.ndarray, b: np.ndarray, relation: np.ndarray) -> np.ndarray:
        """Whether items a and b are linked by a relation: indices that broadcast → bool.

        With class links this goes by their labels, else by the pairs and the attributes.
        """
        keys = self._unit_keys(a, b) * max(len(self.relations), 1) + self.first_with_sentence(
            relation
        )
        paired = _contains(self._sentence_keys, keys)
        return paired if self.attributes is None else paired | self.agree(a, b, relation)

    def first_with_sentence(self, relation: np.ndarray) -> np.ndarray:
        """The first relation that has the same sentence, for relations of any shape."""
        return relation if self.same_sentence is None else self.same_sentence[relation]

    def agree(self, a: np.ndarray, b: np.ndarray, relation: np.ndarray | int) -> np.ndarray:
        """Whether items have one value under a relation of attributes: broadcasts → bool."""
        assert self.attributes is not None  # asked of relations that go by attributes only
        value = self.attributes[a, relation]
        return (value >= 0) & (value == self.attributes[b, relation])

    @functools.cached_property
    def respects(self) -> list[int]:
        """The relations that go by attributes, ascending."""
        if self.attributes is None:
            return []
        return np.flatnonzero(np.any(self.attributes >= 0, axis=0)).tolist()

    def linked_any(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether items are linked by any relation, or have one label: broadcasts → bool.

        Without class links and attributes it is `related` of single cells.
        """
        if self.class_links is None:
            return self._or_agreeing(self.related_values(*np.broadcast_arrays(a, b)), a, b)
        linked = _contains(self._unit_links, self._unit_keys(a, b))
        return linked | self._one_label(a, b)

    def linked_any_block(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Rows (n,) against columns (m,) of `linked_any`, dense (n, m) bool."""
        a, b = np.asarray(rows)[:, None], np.asarray(cols)
        if self.class_links is None:
            return self._or_agreeing(self.related_block(rows, cols), a, b)
        return self.linked_any(a, b)

    def linked_under(self, a: np.ndarray, b: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """Whether items a and b, of one shape S, are linked by each of R relations: (*S, R) bool.

        The relations are distinct. Relation −1, the intra-sample one, links no two items.
        """
        order = np.argsort(relations)
        row, relation = self.links_of(np.stack([np.ravel(a), np.ravel(b)], axis=1))
        index, known = _find(relations[order], relation)
        linked = np.zeros((np.size(a), len(relations)), bool)
        linked[row[known], order[index[known]]] = True
        return linked.reshape(*np.shape(a), len(relations))

    def linked_blocks(
        self, rows: np.ndarray, cols: np.ndarray, relations: np.ndarray
    ) -> np.ndarray:
        """Whether rows (n,) and columns (m,) are linked under each of R relations: (R, n, m) bool.

        An item is linked to itself under each. Rows and relations are distinct. Relation −1, the
        intra-sample one, links an item to itself alone. The cost is that of the columns' links.
        """
        order = np.argsort(rows)
        if self.class_links is None:
            column, index, relation = self._adjacency.meet(cols, rows[order])
            found, relation = self._with_same_sentence(np.arange(len(column)), relation)
            row, column = order[index[found]], column[found]
        else:
            a, b = np.nonzero(self.linked_any_block(rows, cols))
            among, relation = self.links_of(np.stack([rows[a], cols[b]], axis=1))
            row, column = a[among], b[among]
        by_number = np.argsort(relations)
        index, known = _find(relations[by_number], relation)
        blocks = np.zeros((len(relations), len(rows), len(cols)), bool)
        blocks[by_number[index[known]], row[known], column[known]] = True
        for block, relation in zip(blocks, relations.tolist(), strict=True):
            if relation in self.respects:
                block |= self.agree(rows[:, None], cols, relation)
        own, known = _find(rows[order], cols)
        blocks[:, order[own[known]], np.flatnonzero(known)] = True
        return blocks

    def _or_agreeing(self, linked: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        for relation in self.respects:
            linked = linked | self.agree(a, b, relation)
        return linked

    def links_of(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The relations that link each of some pairs (p, 2): rows (k,) and relations (k,)."""
        a, b = pairs[:, 0], pairs[:, 1]
        if self.class_links is not None:
            a, b = self.labels[a], self.labels[b]
        rows, link = _ranges(*self._unit_adjacency.between(a, b))
        relations = self._links[link, 2]
        if not self.respects:
            return self._with_same_sentence(rows, relations)
        agree = self.agree(pairs[:, :1], pairs[:, 1:2], np.array(self.respects))
        more, column = np.nonzero(agree)
        found = np.concatenate(
            [np.stack([rows, relations]), [more, np.array(self.respects)[column]]], axis=1
        )
        rows, relations = np.unique(found, axis=1)
        return self._with_same_sentence(rows, relations)

    def _with_same_sentence(
        self, rows: np.ndarray, relations: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and relations (k,), and the relations that have the sentences of these."""
        if self.same_sentence is None:
            return rows, relations
        order = np.argsort(self.same_sentence, kind="stable")
        first, wanted = self.same_sentence[order], self.same_sentence[relations]
        start = np.searchsorted(first, wanted, "left")
        counts = np.searchsorted(first, wanted, "right") - start
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        more = order[np.repeat(start, counts) + offset]
        rows, relations = np.unique(np.stack([np.repeat(rows, counts), more]), axis=1)
        return rows, relations

    @property
    def _links(self) -> np.ndarray:
        """The links (L, 3) of units: labels where there are class links, else items."""
        return self.pairs if self.class_links is None else self.class_links

    @property
    def _units(self) -> int:
        return len(self) if self.class_links is None else len(self.label_names)

    def _unit_keys(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """One number for the two units of items a and b, whatever their order."""
        if self.class_links is not None:
            a, b = self.labels[a], self.labels[b]
        return np.minimum(a, b).astype(np.int64) * self._units + np.maximum(a, b)

    @functools.cached_property
    def _unit_links(self) -> np.ndarray:
        return self._links[:, 0].astype(np.int64) * self._units + self._links[:, 1]

    @functools.cached_property
    def _link_keys(self) -> np.ndarray:
        return _pair_keys(self._links, self._units, len(self.relations))

    @functools.cached_property
    def _sentence_keys(self) -> np.ndarray:
        """The sorted keys of what is linked, by the first relation with the same sentence."""
        if self.same_sentence is None:
            return self._link_keys
        links = self._links.copy()
        links[:, 2] = self.same_sentence[links[:, 2]]
        return np.unique(_pair_keys(links, self._units, len(self.relations)))

    def only(self, chosen: np.ndarray) -> "RelationGraph":
        """The graph of some of its pairs (P,) bool, with the class links that they are drawn from.

        Its `related` and `linked` know nothing of the other pairs.
        """
        pairs, links = self.pairs[chosen], self.class_links
        if links is not None:
            known = np.column_stack([np.sort(self.labels[pairs[:, :2]], axis=1), pairs[:, 2]])
            keys = _pair_keys(known, self._units, len(self.relations))
            links = links[np.isin(self._link_keys, keys)]
        return dataclasses.replace(
            self, pairs=pairs, pair_split=self.pair_split[chosen], class_links=links
        )

    def without_pairs(self) -> "RelationGraph":
        """The items without any pair or link: each is related to itself alone."""
        return dataclasses.replace(
            self, pairs=self.pairs[:0], pair_split=self.pair_split[:0], class_links=None
        )

    def pair_units(self) -> np.ndarray:
        """The number (P,) of each pair's unordered item pair; one number for all its relations."""
        if not len(self.pairs):
            return np.zeros(0, np.int64)
        new = np.any(np.diff(self.pairs[:, :2], axis=0) != 0, axis=1)
        return np.concatenate([[0], np.cumsum(new)])

    def validate(self, *, strings: bool = True) -> "RelationGraph":
        """The graph itself if it is whole; strings: whether each id and text is looked at.

        Raises:
          UserError: an array has a wrong shape, or an item, a relation, a label or a split is out
            of range, or pairs are not unique and sorted, or a text or a relation is empty.
        """
        n, r, p = len(self.ids), len(self.relations), len(self.pairs)

        def check(good: bool, problem: str) -> None:
            if not good:
                raise UserError(f"Relation graph '{self.name}' is not valid: {problem}.")

        check(n > 0, "it has no items")
        if strings:
            ids = self.ids if isinstance(self.ids, StringColumn) else StringColumn.of(self.ids)
            check(ids.is_unique(), "item ids are not unique")
            check(all(t.strip() for t in self.texts), "an item's text is empty")
        check(len(self.texts) == n, f"{n} ids but {len(self.texts)} texts")
        check(len(self.images) == n, f"{n} ids but {len(self.images)} images")
        check(self.labels.shape == (n,), f"labels have shape {self.labels.shape}, not ({n},)")
        check(all(s.strip() for s in self.relations), "a relation sentence is empty")
        check(bool(self.intra_relation.strip()), "the intra-sample sentence is empty")
        check(self.pairs.shape == (p, 3), f"pairs have shape {self.pairs.shape}, not (P, 3)")
        check(self.pair_split.shape == (p,), "pair_split does not have one entry a pair")
        top = len(self.label_names)
        check(bool(np.all((self.labels >= -1) & (self.labels < top))), "a label is out of range")
        if p:
            a, b, e = self.pairs.T
            check(bool(np.all((a >= 0) & (a < b) & (b < n))), "a pair is not two items a < b")
            check(bool(np.all((e >= 0) & (e < r))), "a pair's relation is out of range")
            ok = np.all(np.diff(_pair_keys(self.pairs, n, r)) > 0)
            check(bool(ok), "pairs are not unique and sorted")
            s = self.pair_split
            check(bool(np.all((s >= -1) & (s < len(SPLITS)))), "a declared split is out of range")
            self._check_declared()
        if self.item_split is not None:
            s = self.item_split
            check(s.shape == (n,), "item_split does not have one entry an item")
            check(bool(np.all((s >= -1) & (s < len(SPLITS)))), "a declared split is out of range")
        if self.item_group is not None:
            check(self.item_group.shape == (n,), "item_group does not have one entry an item")
        if self.attributes is not None:
            check(self.attributes.shape == (n, r), f"attributes are not ({n}, {r})")
            check(self.class_links is None, "it has both class links and attributes")
            a, b, e = self.pairs[np.isin(self.pairs[:, 2], self.respects)].T
            check(bool(np.all(self.agree(a, b, e))), "a pair does not agree in its attribute")
        if self.class_links is not None:
            self._check_class_links(check)
        check(self.held_out >= 0, "held_out is negative")
        check(len(self.relation_ids) in (0, r), f"{r} relations but other relation ids")
        if self.paraphrases:
            first = tuple(x[0] if x else "" for x in self.paraphrases)
            check(first == self.relations, "the first paraphrases are not the relations' sentences")
            enough = all(len(x) > self.held_out for x in self.paraphrases)
            check(enough, "a relation has no paraphrase left for training")
            check(all(s.strip() for x in self.paraphrases for s in x), "a paraphrase is empty")
        return self

    def _check_class_links(self, check: Callable[[bool, str], None]) -> None:
        links, top = np.asarray(self.class_links), len(self.label_names)
        check(links.ndim == 2 and links.shape[1] == 3, "class links are not (L, 3)")
        a, b, e = links.T
        check(bool(np.all((a >= 0) & (a <= b) & (b < top))), "a class link is not a <= b")
        good = (e >= 0) & (e < len(self.relations))
        check(bool(np.all(good)), "a class link's relation is out of range")
        check(bool(np.all(np.diff(self._link_keys) > 0)), "class links are not unique and sorted")
        check(bool(np.all(self.labels >= 0)), "class links need a label for every item")
        check(bool(np.all(self.linked(*self.pairs.T))), "a pair is not linked by the class links")

    def _check_declared(self) -> None:
        """One item pair in two declared splits would leak from one into the other."""
        declared = self.pair_split >= 0
        units, split = self.pair_units()[declared], self.pair_split[declared]
        clash = np.flatnonzero((np.diff(units) == 0) & (np.diff(split) != 0))
        if len(clash):
            a, b, _ = self.pairs[declared][clash[0]]
            raise UserError(
                f"Items '{self.ids[a]}' and '{self.ids[b]}' of '{self.name}' are a pair in two "
                "splits; declare one split for all the relations of a pair."
            )


#: A unit with so many links for each one that is looked for is searched, not gone through.
_MANY_LINKS = 16


class _Adjacency:
    """Links (L, 3) between units, a <= b and sorted, as lists of neighbors.

    Three arrays of L and two of the units, int32: looking something up costs the neighbors of what
    is asked for, and no array of all units is made for it.
    """

    def __init__(self, links: np.ndarray, units: int):
        self._relation = links[:, 2]
        counts = np.bincount(links[:, 0], minlength=units)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._above = np.ascontiguousarray(links[:, 1])
        self._units = units

    @functools.cached_property
    def _below(self) -> scipy.sparse.csc_array:
        """Of each unit the lower neighbors, ascending, with the numbers of the links."""
        numbers = np.arange(len(self._above), dtype=np.int32)
        shape = (self._units, self._units)
        return scipy.sparse.csr_array((numbers, self._above, self._first), shape=shape).tocsc()

    def between(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The links of units (k,) with others (k,): numbers from start to before stop."""
        low, high = np.minimum(a, b), np.maximum(a, b)
        first, last = self._first[low], self._first[low + 1]
        start = _lower_bound(self._above, first, last, high)
        return start, _lower_bound(self._above, start, last, high + 1)

    def around(self, unit: int) -> np.ndarray:
        """A unit and its neighbors, ascending."""
        below, above = self._below, self._above
        lower = below.indices[below.indptr[unit] : below.indptr[unit + 1]]
        upper = above[self._first[unit] : self._first[unit + 1]]
        found = np.concatenate([lower, np.array([unit], above.dtype), upper])
        new = np.ones(len(found), bool)
        np.not_equal(found[1:], found[:-1], out=new[1:])
        return found[new]

    def meet(self, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All links of units (n,) with sorted, distinct units (m,): row, column and relation."""
        ordered, below = cols.astype(self._above.dtype), self._below
        row, column, link = _meet(self._above, self._first, rows, ordered)
        lower_row, lower_column, entry = _meet(below.indices, below.indptr, rows, ordered)
        link = np.concatenate([link, below.data[entry]])
        row, column = np.concatenate([[row, column], [lower_row, lower_column]], axis=1)
        return row, column, self._relation[link]


def _meet(
    neighbors: np.ndarray, bounds: np.ndarray, rows: np.ndarray, ordered: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where lists of neighbors have one of some sorted units: row, index among these, and entry."""
    start, stop = bounds[rows], bounds[rows + 1]
    many = stop - start > _MANY_LINKS * len(ordered)
    row, entry = _ranges(start, np.where(many, start, stop))
    index, known = _find(ordered, neighbors[entry])
    parts = [(row[known], index[known], entry[known])]
    for i in np.flatnonzero(many):
        own = neighbors[start[i] : stop[i]]
        left, right = (np.searchsorted(own, ordered, side) for side in ("left", "right"))
        index, entry = _ranges(start[i] + left, start[i] + right)
        parts.append((np.full(len(index), i), index, entry))
    row, index, entry = (np.concatenate(x) for x in zip(*parts, strict=True))
    return row, index, entry


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of k ranges one after the other: of which range each is, and the number."""
    counts = stop - start
    rows = np.repeat(np.arange(len(start)), counts)
    offset = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, np.repeat(start, counts) + offset


def empty_graph(name: str, images: ItemImages, intra_relation: str) -> RelationGraph:
    """A graph of no items and no relations."""
    none = np.zeros((0, 3), np.int32)
    return RelationGraph(
        name, (), (), none[:, 0], (), (), none, none[:, 0].astype(np.int8), images, intra_relation
    )


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values are in a sorted array of one at least, and whether they are."""
    index = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return index, ordered[index] == values


def _lower_bound(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The first index from low to before high whose value is no less than the key, else high.

    low, high, keys (k,); values ascend in every such range.
    """
    while np.any(todo := low < high):
        middle = np.where(todo, (low + high) // 2, 0)
        smaller = values[middle] < keys
        low = np.where(todo & smaller, middle + 1, low)
        high = np.where(todo & ~smaller, middle, high)
    return low


def _contains(ordered: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each key is in a sorted array."""
    if not len(ordered):
        return np.zeros(np.shape(keys), bool)
    return ordered[np.searchsorted(ordered[:-1], keys)] == keys


def _pair_keys(pairs: np.ndarray, items: int, relations: int) -> np.ndarray:
    a, b, e = pairs.astype(np.int64).T
    return (a * items + b) * max(relations, 1) + e


def normalize_pairs(
    pairs: np.ndarray, pair_split: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Undirected, unique, sorted pairs (P, 3) int32 and splits (P,) int8 from pairs in any order.

    Of a pair that comes twice the first one's split is kept; pairs of an item with itself go.
    """
    pairs = np.asarray(pairs, np.int32).reshape(-1, 3)
    if pair_split is None:
        pair_split = np.full(len(pairs), -1)
    ordered = np.concatenate([np.sort(pairs[:, :2], axis=1), pairs[:, 2:]], axis=1)
    keep = ordered[:, 0] != ordered[:, 1]
    unique, first = np.unique(ordered[keep], axis=0, return_index=True)
    return unique.astype(np.int32), np.asarray(pair_split)[keep][first].astype(np.int8)


def numbered_relations(parts: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Relations that have pairs, and the pairs and splits of these as of `normalize_pairs`.

    parts: of each relation its pairs (P, 2). A relation without a pair is left out, and the others
    are numbered anew: the first result is the place in `parts` of each.
    """
    used = [relation for relation, part in enumerate(parts) if len(part)]
    numbered = [np.insert(parts[r], 2, number, axis=1) for number, r in enumerate(used)]
    return used, *normalize_pairs(np.concatenate([np.zeros((0, 3), np.int32), *numbered]))


def pairs_within(groups: list[np.ndarray]) -> np.ndarray:
    """Every two items of each group under the group's number: (P, 3), unique and sorted."""
    blocks = [np.zeros((0, 3), np.int32)]
    for relation, members in enumerate(groups):
        i, j = np.triu_indices(len(members), 1)
        members = np.asarray(members)
        blocks.append(np.stack([members[i], members[j], np.full(len(i), relation)], axis=1))
    return normalize_pairs(np.concatenate(blocks))[0]


def agreeing_pairs(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most `most` pairs (P, 2) of items a < b with one value (N,), -1 for none; distinct.

    Every item is drawn equally often, with a partner of its value: a value has pairs in proportion
    to its items, not to their square, so that the most common value does not take them all.
    """
    order = np.argsort(values, kind="stable")
    order = order[values[order] >= 0]
    start = np.flatnonzero(np.diff(values[order], prepend=-1))
    size = np.diff(np.append(start, len(order)))
    possible = int(np.sum(size.astype(np.int64) * (size - 1) // 2))
    if possible <= most:
        return pairs_within(np.split(order, start[1:]))[:, :2]
    run = np.repeat(np.arange(len(size)), size)
    shared = np.flatnonzero(size[run] > 1)
    found = np.zeros(0, np.int64)
    for _ in range(_DRAWS):
        first = rng.choice(shared, most)
        step = rng.integers(1, size[run[first]])
        second = start[run[first]] + (first - start[run[first]] + step) % size[run[first]]
        ends = np.sort(np.stack([order[first], order[second]]), axis=0).astype(np.int64)
        key = np.concatenate([found, ends[0] * len(values) + ends[1]])
        found = key[np.sort(np.unique(key, return_index=True)[1])]
        if len(found) >= most:
            break
    return np.stack(np.divmod(found[:most], len(values)), axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The split of every item (N,) and pair (P,) int8: an index into SPLITS, -1 for unused.

    `disjoint` says what no two splits share: "item", "declared item" (as the source declares them),
    "relation" (items and relations), "domain" (items, those of test being of other labels), "pair"
    or "declared" (pairs, as the source declares them). Under the last two items have no split of
    their own (all -1).
    """

    item_split: np.ndarray
    pair_split: np.ndarray
    disjoint: str
    graph_pairs: np.ndarray = dataclasses.field(repr=False)

    @property
    def by_items(self) -> bool:
        """Whether no item is in two splits."""
        return self.disjoint not in ("pair", "declared")

    def pairs(self, split: str) -> np.ndarray:
        """The pairs of one split: (a, b, relation) rows, (k, 3) int32."""
        return self.graph_pairs[self.pair_split == split_index(split)]

    def items(self, split: str) -> np.ndarray:
        """The items of one split, sorted (k,): its own ones, or those of its pairs."""
        if self.by_items:
            return np.flatnonzero(self.item_split == split_index(split))
        return np.unique(self.pairs(split)[:, :2]).astype(np.int64)


def split_index(split: str) -> int:
    """The number of a split's name; UserError for any other name."""
    if split not in SPLITS:
        raise UserError(f"There is no split '{split}'; use one of {', '.join(SPLITS)}.")
    return SPLITS.index(split)


def split_graph(
    graph: RelationGraph,
    *,
    seed: int,
    disjoint: Literal["item", "pair", "relation"] = "item",
    domain: str = "",
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> Splits:
    """Items or pairs drawn into train, validation and test by a fixed seed.

    With `disjoint="item"` a pair belongs to a split if both its items do, and is unused
    otherwise; items of one `item_group` stay together, and the fractions are of groups. With "pair"
    the unordered item pairs are split, each with all its relations. With "relation" items are split
    as with "item" and relations by the same fractions, one at least in each split, and a pair
    belongs to a split if both its items and its relation do: neither the items nor the sentence of
    a test pair were seen.

    domain: label names, with commas between them and * for any letters ("food-*,animal-*"). Items
    with such a label are the test split, the others train and validation, by their fractions.

    Splits that the graph declares override `disjoint`, but for "relation" and a domain; pairs
    without one are then unused.

    Raises:
      UserError: an unknown `disjoint`, fractions that are negative or do not add up to 1, fewer
        than three relations for "relation", or a domain that leaves a side empty.
    """
    if disjoint not in ("item", "pair", "relation"):
        raise UserError(f"data.disjoint is '{disjoint}'; use 'item', 'pair' or 'relation'.")
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"The split fractions {fractions} are not three shares that add up to 1.")
    rng = np.random.default_rng(seed)
    if domain:
        if disjoint != "item":
            raise UserError("data.domain_split needs data.disjoint=item; leave one of them out.")
        return _by_items(graph, _by_domain(graph, domain, rng, fractions), "domain")
    item_split = graph.item_split
    if disjoint == "relation":
        drawn = _draw_items(graph, rng, fractions) if item_split is None else item_split
        return _by_relations(graph, drawn, rng, fractions)
    if item_split is not None:
        return _by_items(graph, item_split, "declared item")
    nowhere = np.full(len(graph), -1, np.int8)
    if np.any(graph.pair_split >= 0):
        return Splits(nowhere, graph.pair_split.astype(np.int8), "declared", graph.pairs)
    if disjoint == "item":
        return _by_items(graph, _draw_items(graph, rng, fractions), "item")
    units = graph.pair_units()
    count = int(units[-1]) + 1 if len(units) else 0
    return Splits(nowhere, _draw(rng, count, fractions)[units], "pair", graph.pairs)


def _by_domain(
    graph: RelationGraph, domain: str, rng: np.random.Generator, fractions: tuple[float, ...]
) -> np.ndarray:
    """The split (N,) of items: test for those whose label matches one of the patterns."""
    patterns = [pattern.strip() for pattern in domain.split(",")]
    matched = [any(fnmatch.fnmatchcase(x, p) for p in patterns) for x in graph.label_names]
    # The last index stands for items without a label.
    inside = np.array([*matched, False])[graph.labels]
    if inside.all() or not inside.any():
        raise UserError(
            f"data.domain_split='{domain}' matches {'every' if inside.all() else 'no'} item of "
            f"'{graph.name}'; name some of its labels, such as {', '.join(graph.label_names[:3])}."
        )
    rest = fractions[0] + fractions[1]
    if not rest:
        raise UserError("A domain split needs a share for training; raise the first fraction.")
    split = np.full(len(graph), SPLITS.index("test"), np.int8)
    shares = fractions[0] / rest, fractions[1] / rest, 0.0
    split[~inside] = _draw(rng, int(np.sum(~inside)), shares)
    return split


def _by_relations(
    graph: RelationGraph,
    item_split: np.ndarray,
    rng: np.random.Generator,
    fractions: tuple[float, ...],
) -> Splits:
    """A pair belongs to a split if both its items and its relation do."""
    count = len(graph.relations)
    if count < len(SPLITS):
        raise UserError(
            f"data.disjoint=relation needs three relations at least; '{graph.name}' has {count}."
        )
    relation_split = _draw(rng, count, fractions)
    for split in range(len(SPLITS)):  # one at least: taken from the largest split
        if fractions[split] and not np.any(relation_split == split):
            largest = np.argmax(np.bincount(relation_split))
            relation_split[np.flatnonzero(relation_split == largest)[0]] = split
    splits = _by_items(graph, item_split, "relation")
    own = relation_split[graph.pairs[:, 2]]
    return dataclasses.replace(
        splits, pair_split=np.where(own == splits.pair_split, own, -1).astype(np.int8)
    )


def _by_items(graph: RelationGraph, item_split: np.ndarray, disjoint: str) -> Splits:
    """A pair belongs to a split if both its items do."""
    a, b = item_split[graph.pairs[:, 0]], item_split[graph.pairs[:, 1]]
    return Splits(item_split, np.where(a == b, a, -1).astype(np.int8), disjoint, graph.pairs)


def _draw_items(
    graph: RelationGraph, rng: np.random.Generator, fractions: tuple[float, ...]
) -> np.ndarray:
    """A split (N,) int8 for each item; items of one group have one split."""
    if graph.item_group is None:
        return _draw(rng, len(graph), fractions)
    groups, group = np.unique(graph.item_group, return_inverse=True)
    return _draw(rng, len(groups), fractions)[group]


def _draw(rng: np.random.Generator, count: int, fractions: tuple[float, ...]) -> np.ndarray:
    """A split (count,) int8 for each; sizes are the fractions to the nearest whole number."""
    ends = np.rint(np.cumsum(fractions) * count).astype(int)
    split = np.searchsorted(ends, np.arange(count), side="right").clip(max=len(SPLITS) - 1)
    return rng.permutation(split.astype(np.int8))

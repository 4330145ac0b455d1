"""Embedding a catalogue into a table of LanceDB, and the items of it most related to a query.

model = open_model("runs/rcml")
table = embed_table(model, read_items("my_catalogue"), ["both are red"], "lance://catalogue")
TableSearcher(table).search("both are red", item="cup", where="price < 20 AND brand = 'X'")
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.parsing import argument_text
from rcml_jax.search.catalogue import (
    Match,
    Model,
    check_alike,
    check_model,
    check_question,
    check_sentence,
    embed_chunk,
    embed_query,
    fill,
    relation_number,
    sentences_of,
)
from rcml_jax.search.embedding_store import MODALITIES, Plan
from rcml_jax.search.items import Items
from rcml_jax.search.lance_table import (
    MANY,
    LanceTable,
    TableWriter,
    hold_table,
    open_table,
    vectors_of,
)
from rcml_jax.training import sharding

#: Candidates that an index is asked for, for each of the k items, and at least.
_CANDIDATES, _LEAST_CANDIDATES = 20, 200
_FEW = 1000  # items whose vectors are fetched by their numbers


def embed_table(
    model: Model,
    items: Items,
    relations: Sequence[str],
    to: str,
    *,
    dtype: str = "float32",
    shard: int = 1024,
    strict: bool = False,
    index: str = "auto",
    note: Callable[[int, int], None] | None = None,
) -> LanceTable | None:
    """Embed items into a table, or go on there; as `catalogue.embed_catalogue`, which see.

    to: its address: lance://DIRECTORY, or lance+s3://BUCKET/PATH and the like. The items' further
    columns are kept, too. index: of the vectors, as of `lance_table.TableWriter.finish`.

    Raises UserError for an empty sentence, for what `TableWriter` refuses, and where LanceDB is not
    installed.
    """
    sentences = sentences_of(model, relations)
    check_alike(model, items, sentences)
    with model.running(), contextlib.ExitStack() as stack:
        sharding.on_primary(lambda: stack.enter_context(hold_table(to)))
        embedder = model.method.embedder(model.params, sentences[1:], model.devices)
        plan = Plan(model.about, items, sentences, embedder.shapes, dtype, shard)
        writer = sharding.on_primary(lambda: TableWriter(to, plan))
        embed = functools.partial(embed_chunk, embedder)
        fill(writer, model, items, embed, strict=strict, note=note)
        sharding.on_primary(functools.partial(_finish, writer, index))
    return sharding.on_primary(lambda: open_table(to))


def _finish(writer: TableWriter | None, index: str) -> None:
    assert writer is not None  # it is the primary's
    writer.finish(index)


class TableSearcher:
    """Finds the items of a table that are most related to a query, as `catalogue.Searcher` does.

    Raises UserError for a model that is not the table's.
    """

    def __init__(self, table: LanceTable, model: Model | None = None):
        if model is not None:
            check_model(table, model)
        self.table, self.model = table, model

    def search(
        self,
        relation: str | None = None,
        *,
        item: str | None = None,
        text: str | None = None,
        image: pathlib.Path | str | np.ndarray | None = None,
        k: int = 10,
        against: str = "both",
        where: str = "",
        words: str = "",
        exact: bool | None = None,
    ) -> list[Match]:
        """The k items most related to an item, a text or an image under a sentence, best first.

        As `catalogue.Searcher.search`. where: a condition in SQL that a found item fulfils; words:
        its text has all of them, compared by their stems. Words alone, without item, text and
        image, are a query, too: then a score is BM25's. exact: compare with every item, by default
        below a million; else the index gives candidates, and these are ranked exactly. A search
        with words is exact.

        Raises UserError as there, for a filter that is malformed or names a column that is not
        there, without an index where it is needed, and where nothing is found.
        """
        if relation is not None:
            check_sentence(relation)
        number = relation_number(self.table, relation)
        alone = words if item is text is image is None and words else None
        names = check_question(k, against, item, text, image, alone)
        if where:
            self.table.check_filter(argument_text(where))
        matching = self.table.matching(argument_text(words), where) if words else None
        if alone is not None:
            assert matching is not None
            numbers, scores = np.array([*matching], np.int64), np.array([*matching.values()])
            return self._matches(*_best(numbers, scores, k), names, where, words)
        own, query = self._query(number, item, text, image)
        total = np.sum(query, axis=0)
        columns = {name: self.table.column(name, number) for name in names}
        if exact is None:
            exact = len(self.table) < MANY or not {*columns.values()} & {*self.table.indices}
        wanted = None if matching is None else np.array([*matching], np.int64)
        if exact or wanted is not None:
            batches = self._batches(columns, where, wanted)
        else:
            batches = self._candidates(columns, total, where, k)
        found = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for batch in batches:
            numbers, scores = _scores(batch, columns, total, len(query))
            keep = numbers != (-1 if own is None else own)
            if wanted is not None:
                keep &= np.isin(numbers, wanted)
            numbers = np.concatenate([found[0], numbers[keep]])
            found = _best(numbers, np.concatenate([found[1], scores[keep]]), k)
        return self._matches(*found, names, where, words)

    def _query(
        self, relation: int, item: str | None, text: str | None, image: Any
    ) -> tuple[int | None, list[np.ndarray]]:
        """The number of the item that asks, if one does, and the query's vectors."""
        if item is None:
            sentences = () if relation == 0 else (self.table.relations[relation],)
            return None, list(embed_query(self.model, sentences, text, image).values())
        columns = [self.table.column(name, relation) for name in MODALITIES]
        row = self.table.item(item, columns)
        found = [vectors_of(row, name)[0] for name in columns]
        query = [vectors[0] for vectors in found if len(vectors)]
        if not query:
            raise UserError(f"the item {item!r} has no embedding: no text and no readable image")
        return row["item_number"][0].as_py(), query

    def _batches(self, columns: dict[str, str], where: str, wanted: np.ndarray | None) -> Any:
        """All rows that a filter keeps, or those that are wanted and some others."""
        if wanted is not None and len(wanted) <= _FEW:
            if not len(wanted):
                return ()
            where = f"item_number IN ({', '.join(map(str, wanted.tolist()))})"
        return self.table.scan(["item_number", *columns.values()], where)

    def _candidates(
        self, columns: dict[str, str], total: np.ndarray, where: str, k: int
    ) -> list[Any]:
        """Rows that are near the query in one of the columns, each once."""
        if not {*columns.values()} & {*self.table.indices}:
            raise UserError(
                f"the vectors of {self.table.directory} have no index; start the command that "
                "embeds again with --index ivf-pq, or search exactly"
            )
        count = max(_CANDIDATES * k, _LEAST_CANDIDATES)
        wanted = ["item_number", *columns.values()]
        seen: set[int] = set()
        found = []
        for column in columns.values():
            rows = self.table.candidates(column, total, count, wanted, where)
            new = np.array([number not in seen for number in rows["item_number"].to_pylist()], bool)
            rows = rows.take(np.flatnonzero(new))
            seen.update(rows["item_number"].to_pylist())
            found.append(rows)
        return found

    def _matches(
        self, numbers: np.ndarray, scores: np.ndarray, names: Sequence[str], where: str, words: str
    ) -> list[Match]:
        if not len(numbers):
            filters = f" that fulfils {where!r}" if where else ""
            filters += f" whose text has {words!r}" if words else ""
            raise UserError(
                f"{self.table.directory} holds no other item with {' or '.join(names)}{filters}"
            )
        rows = self.table.rows(numbers.tolist(), ["id", "text"])
        return [
            Match(int(number), row["id"], row["text"], float(score))
            for number, row, score in zip(numbers, rows, scores, strict=True)
        ]


def _scores(
    rows: Any, columns: dict[str, str], total: np.ndarray, asked: int
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and the mean cosines of the rows that have one of the vectors."""
    scores = np.zeros(len(rows), np.float32)
    count = np.zeros(len(rows), np.float32)
    for column in columns.values():
        vectors, has = vectors_of(rows, column)
        scores[has] += vectors @ total
        count += has
    numbers = np.asarray(rows["item_number"])
    return numbers[count > 0], (scores / (asked * np.maximum(count, 1)))[count > 0]


def _best(numbers: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores, best first; of equal ones the smallest number comes first."""
    if len(scores) > k:
        keep = scores >= np.partition(scores, -k)[-k]
        numbers, scores = numbers[keep], scores[keep]
    order = np.lexsort((numbers, -scores))[:k]
    return numbers[order], scores[order]

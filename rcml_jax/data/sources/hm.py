"""H&M Personalized Fashion Recommendations: photographs of garments, and who bought them.

The published layout, in one folder: `articles.csv`, `transactions_train.csv` and photographs
`images/0NN/0NNNNNNNNN.jpg`. In full it has 105,542 articles and 31.8 million transactions; a part
of it works as well. The data belong to a competition and may not be passed on: nothing is
downloaded, and the user needs a copy.

An item is an article with its photograph; the text is its name, colour, type and description. The
label is its garment group. The colours of one product (`product_code`) form a group of items that
no split parts. Relations:

- kinds of buyers, as from Amazon's reviews (`rcml_jax.data.sources.copurchases`): a customer is a
  distribution over `CATEGORY`, k-means finds kinds of customers, and two articles that one customer
  bought are a pair under the sentence of the customer's kind;
- two articles that one customer bought on one day;
- one product in two colours;
- respects in which two articles agree (RESPECTS), such as "the same pattern": the sentence names
  the respect, and the query tells the value. All articles of one value are linked; the pairs are a
  sample of them.
"""

import csv
import datetime
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcml_jax.data import images, prepared
from rcml_jax.data.relation_graph import (
    RelationGraph,
    agreeing_pairs,
    numbered_relations,
    pairs_within,
)
from rcml_jax.data.sources.copurchases import (
    copurchase_pairs,
    distinct_purchases,
    kinds_of_buyers,
    merge_kinds,
    within_item_cap,
)
from rcml_jax.data.stages import HERE, Runner, digest, file_state
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import NO_TEXT, CsvRows, read_file, user_path

# The files of H&M Personalized Fashion Recommendations, read as they are published.


#: The columns of articles.csv that are read beside the names of attributes.
COLUMNS = ("article_id", "product_code", "prod_name", "detail_desc")
_TEXT_COLUMNS = ("colour_group_name", "product_type_name")
_TRANSACTION_COLUMNS = ("t_dat", "customer_id", "article_id")
_ID_LENGTH = 10
_UNKNOWN = ("", "unknown", "undefined")
_CHUNK = 8 * 2**20  # characters of transactions read at a time
_FIRST_DAY, _DAYS = datetime.date(1970, 1, 1).toordinal(), 2**15


class Article(NamedTuple):
    """A row of articles.csv; `values` are those of the attributes asked for, "" for unknown."""

    id: str
    product: str
    text: str
    values: tuple[str, ...]
    where: str


class Photograph(NamedTuple):
    """A file and what changes when it does."""

    path: Path
    size: int
    time: int


class Transactions(NamedTuple):
    """Distinct transactions (R,), int32, sorted by customer, day and article.

    customer: numbered as they first occur; day: since 1970-01-01; article: an index.
    """

    customer: np.ndarray
    day: np.ndarray
    article: np.ndarray


def read_articles(
    path: Path, attributes: Sequence[str], counts: Counter, *, strict: bool = False
) -> list[Article]:
    """The articles in their order, with the columns named `attributes` as their values.

    An id has ten digits; one that lost its leading zero gets it back. The text is what a shop
    shows: the name, colour and type, and the description, where there is one.

    Raises:
      UserError: the file cannot be read, lacks a column or holds no article; or, with `strict`, a
        row is malformed or repeats an id.
    """
    articles: dict[str, Article] = {}
    wanted = dict.fromkeys((*COLUMNS, *_TEXT_COLUMNS, *attributes))
    for number, header, row in _csv_rows(path):
        if row is None:
            _check_columns(path, header, wanted)
            continue
        where = f"{path}, line {number}"
        value = dict(zip(header, (" ".join(v.split()) for v in row), strict=False))
        if problem := _article_problem(header, row, value):
            _malformed(where, problem, "articles", counts, strict)
            continue
        key = value["article_id"].zfill(_ID_LENGTH)
        if key in articles:
            if strict:
                raise UserError(
                    f"{where}: article {key} is listed before ({articles[key].where}); remove one "
                    "line, or turn strict off to keep the first."
                )
            counts["repeated articles"] += 1
            continue
        counts["articles without a description"] += not value["detail_desc"]
        values = tuple(known(value[name]) for name in attributes)
        articles[key] = Article(key, value["product_code"], item_text(value), values, where)
    if not articles:
        raise UserError(f"{path} holds no article; take the published file.")
    return list(articles.values())


def known(value: str) -> str:
    """The value of an attribute, "" where the file says that it is unknown."""
    return "" if value.lower() in _UNKNOWN else value


def item_text(value: dict[str, str]) -> str:
    """An article's text: "Name. Colour type. Description"."""
    colour, kind = (known(value[name]) for name in _TEXT_COLUMNS)
    shown = f"{colour} {kind}".strip()
    parts = [part.rstrip(".") + "." for part in (value["prod_name"], shown) if part]
    return " ".join([*parts, value["detail_desc"]]).strip()


def find_photographs(root: Path) -> dict[str, Photograph]:
    """The photographs `images/0NN/0NNNNNNNNN.jpg` below a folder, by the article's id.

    Raises:
      UserError: there is no folder `images`, or it cannot be read.
    """
    folder = root / "images"
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder images; add the photographs as images/0NN/0NNNNNNNNN.jpg."
        )
    found = {}
    try:
        for part in sorted(folder.iterdir()):
            if not part.is_dir():
                continue
            with os.scandir(part) as entries:
                for entry in entries:
                    stem, ending = os.path.splitext(entry.name)
                    if ending.lower() == ".jpg" and entry.is_file():
                        state = entry.stat()
                        path = Path(entry.path)
                        found[stem] = Photograph(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error}); check the folder.") from error
    return found


def read_transactions(
    path: Path, articles: Sequence[Article], counts: Counter, *, strict: bool = False
) -> Transactions:
    """The distinct transactions of known articles; further units bought on one day count once.

    Memory: the customers' ids (about 300 MB for 1.4 million) and 8 bytes a distinct transaction,
    three times that at the end.

    Raises:
      UserError: the file cannot be read or lacks a column; or, with `strict`, a row is malformed or
        names an article that is not in articles.csv.
    """
    index = {article.id: i for i, article in enumerate(articles)}
    # Spreadsheets drop the leading zero.
    index |= {key.lstrip("0"): i for key, i in index.items() if key.lstrip("0") not in index}
    reader = _TransactionReader(path, index, len(articles), counts, strict)
    keys = np.unique(np.concatenate([np.zeros(0, np.int64), *reader.chunks()]))
    counts["customers"] = len(reader.customers)
    visit, article = np.divmod(keys, len(articles))
    del keys
    customer, day = np.divmod(visit, _DAYS)
    return Transactions(*(values.astype(np.int32) for values in (customer, day, article)))


class _Numbers(dict):
    """Ids → 0, 1, 2, ... as they first occur."""

    def __missing__(self, key: str) -> int:
        self[key] = number = len(self)
        return number


class _Days(dict):
    """ISO dates → days since 1970-01-01, -1 for what is no date."""

    def __missing__(self, text: str) -> int:
        try:
            day = datetime.date.fromisoformat(text).toordinal() - _FIRST_DAY
        except ValueError:
            return -1
        if not 0 <= day < _DAYS:
            return -1
        self[text] = day
        return day


class _TransactionReader:
    """Goes through the file once; `chunks` gives sorted distinct keys of the transactions.

    The key of a transaction is ((customer · _DAYS) + day) · articles + article.
    """

    def __init__(self, path: Path, index: dict, articles: int, counts: Counter, strict: bool):
        self.customers, self._days = _Numbers(), _Days()
        self._path, self._index, self._articles = path, index, articles
        self._counts, self._strict = counts, strict

    def chunks(self) -> Iterator[np.ndarray]:
        try:
            with self._path.open(encoding="utf-8-sig", errors="replace") as file:
                header = _unquoted(file.readline()).rstrip("\n").split(",")
                _check_columns(self._path, header, _TRANSACTION_COLUMNS)
                indices = [header.index(name) for name in _TRANSACTION_COLUMNS]
                first = 2
                while text := file.read(_CHUNK):
                    text += file.readline()
                    # A last line is as whole as the others, whether it ends in a new line or not.
                    lines = _unquoted(text).removesuffix("\n").split("\n")
                    yield self._keys(lines, first, indices, len(header))
                    first += len(lines)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read ({error}); check the file.") from error

    def _keys(self, lines: list[str], first: int, indices: list[int], width: int) -> np.ndarray:
        rows = [line.split(",") for line in lines]
        if set(map(len, rows)) != {width}:
            empty = [""] * width  # fails the checks below
            rows = [row if len(row) == width else empty for row in rows]
        columns = list(zip(*rows, strict=True))
        date, customer_id, article_id = (columns[index] for index in indices)
        count, get = len(rows), self._index.get
        day = np.fromiter(map(self._days.__getitem__, date), np.int64, count)
        whole = (day >= 0) & np.fromiter(map(bool, customer_id), bool, count)
        article = np.fromiter((get(key, -1) for key in article_id), np.int64, count)
        blank = np.zeros(count, bool)
        if not whole.all():
            blank = np.array([not line.strip() for line in lines])
        self._report(lines, first, ~whole & ~blank, whole & (article < 0))
        self._counts["transactions"] += count - int(blank.sum())
        good = whole & (article >= 0)
        numbers = self.customers
        customer = np.fromiter(
            (numbers[key] for key, ok in zip(customer_id, good.tolist(), strict=True) if ok),
            np.int64,
            int(good.sum()),
        )
        return np.unique((customer * _DAYS + day[good]) * self._articles + article[good])

    def _report(
        self, lines: list[str], first: int, malformed: np.ndarray, unknown: np.ndarray
    ) -> None:
        if self._strict and np.any(malformed | unknown):
            index = int(np.argmax(malformed | unknown))
            where = f"{self._path}, line {first + index}"
            if malformed[index]:
                _malformed(where, f"{lines[index][:80]!r}", "transactions", self._counts, True)
            raise UserError(
                f"{where}: its article is not in articles.csv; complete that file, or turn strict "
                "off to leave such transactions out."
            )
        self._counts["malformed transactions"] += int(malformed.sum())
        self._counts["transactions of articles outside articles.csv"] += int(unknown.sum())


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str], list[str] | None]]:
    """(line, header, row) of each row; None in the place of the row for the header itself."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = CsvRows(file, strict=False)
            header = [name.strip() for name in next(rows, (1, []))[1]]
            yield 1, header, None
            while True:
                try:
                    number, row = next(rows)
                except StopIteration:
                    return
                except csv.Error:
                    number, row = rows.line, ["malformed CSV"]
                yield number, header, row
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def _article_problem(header: list[str], row: list[str], value: dict[str, str]) -> str:
    """What is wrong with a row of articles.csv, "" where nothing is."""
    if len(row) != len(header):
        return f"{len(row)} values for {len(header)} columns"
    if wrong := NO_TEXT.search("".join(row)):  # bytes that are no UTF-8 were read as surrogates
        return "a NUL" if wrong[0] == "\0" else "not UTF-8"
    if not (value["article_id"].isascii() and value["article_id"].isdecimal()):
        return f"article_id {value['article_id'][:20]!r} is no number"
    for name in ("product_code", "prod_name"):
        if not value[name]:
            return f"no {name}"
    return ""


def _malformed(where: str, problem: str, kind: str, counts: Counter, strict: bool) -> None:
    if strict:
        raise UserError(
            f"{where}: malformed row ({problem}); mend or remove the line, or turn strict off to "
            "leave such lines out."
        )
    counts[f"malformed {kind}"] += 1


def _check_columns(path: Path, header: Sequence[str], wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in header:
            raise UserError(f"{path} has no column '{name}'; take the published file.")


def _unquoted(text: str) -> str:
    """Transactions hold no text, so that quotes around values may go."""
    return text.replace('"', "") if '"' in text else text


NAME = "hm"
#: Columns of articles.csv and the sentences that name them as respects.
RESPECTS = {
    "product_type_name": "They are the same type of product.",
    "garment_group_name": "They belong to the same group of garments.",
    "colour_group_name": "They have the same colour.",
    "perceived_colour_value_name": "Their colours are equally light or dark.",
    "graphical_appearance_name": "They have the same pattern.",
    "section_name": "They are sold in the same section of the shop.",
    "index_group_name": "They are made for the same group of customers.",
}
SAME_DAY = "They were bought by one customer on the same day."
OTHER_COLOUR = "They are the same product in another colour."
#: What a customer's purchases are counted by, and what the classes are.
CATEGORY, LABEL, COLOUR = "product_type_name", "garment_group_name", "colour_group_name"
CLUSTERS = 10
#: Customers who bought fewer articles are of no kind: too little is known of them.
MIN_PURCHASES = 5
PAIRS_PER_USER = 10
PAIRS_PER_ITEM = 50
PAIRS_PER_RESPECT = 20_000
RECIPE = 1  # counts changes of what is made from the same files and options

_LARGEST_SIDE = 512
_ABOUT = {
    "license": (
        "Competition data, to be used under the rules of the competition. No licence to pass them "
        "on is given."
    ),
    "citation": (
        "@misc{hm2022, title={H\\&M Personalized Fashion Recommendations}, publisher={Kaggle}, "
        "year={2022}}"
    ),
    "homepage": (
        "https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations"
    ),
}

Log = Callable[[str], None]


class _Options(NamedTuple):
    """What a graph depends on beside its files."""

    strict: bool
    clusters: int
    min_purchases: int
    pairs_per_user: int
    pairs_per_item: int
    pairs_per_respect: int
    seed: int


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph of `config.data`: the arguments of `load` under their names.

    Raises UserError without a path.
    """
    if not data.path:
        raise UserError(
            "the hm source needs the files of the H&M competition, which cannot be fetched for "
            "you: --config rcml:hm,path=DIRECTORY"
        )
    names = ("strict", "clusters", "min_purchases", "pairs_per_user", "pairs_per_item")
    options = {name: data[name] for name in (*names, "pairs_per_respect")}
    return load(cache, data.path, runner=Runner.from_config(data), **options)


def load(
    cache: str | Path,
    path: str | Path,
    *,
    strict: bool = False,
    clusters: int = CLUSTERS,
    min_purchases: int = MIN_PURCHASES,
    pairs_per_user: int = PAIRS_PER_USER,
    pairs_per_item: int = PAIRS_PER_ITEM,
    pairs_per_respect: int = PAIRS_PER_RESPECT,
    seed: int = 0,
    runner: Runner = HERE,
    log: Log | None = None,
) -> RelationGraph:
    """The graph of a folder in the published layout; prepared in `cache` the first time, then read.

    clusters: kinds of customers (fewer if there are fewer distinct customers); customers who bought
    fewer than `min_purchases` articles are of none. A customer gives at most `pairs_per_user`
    pairs, drawn at random, to their kind and as many to the same day. An article keeps at most
    `pairs_per_item` pairs of each of these two (those of the most customers first) and of other
    colours. At most `pairs_per_respect` pairs of a respect are drawn. `seed` draws and starts
    k-means. `runner` says where photographs are decoded.

    Left out, counted, and reported to `log`: malformed rows, repeated articles, articles without a
    photograph or with a damaged one, and transactions of unknown articles. With `strict` the first
    of them is an error with file and line. Articles without a description stay, by their names.

    Raises:
      UserError: an option is wrong; a file is missing or is not as published; scikit-learn is
        missing (extra `amazon`); no two articles are linked; or as said under `strict`.
    """
    options = _Options(
        strict, clusters, min_purchases, pairs_per_user, pairs_per_item, pairs_per_respect, seed
    )
    for name, value in options._asdict().items():
        if name not in ("strict", "seed") and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    root = user_path(path)
    articles, bought = (_file(root, name) for name in ("articles.csv", "transactions_train.csv"))
    photographs = find_photographs(root)
    versions = sorted((key, photo.size, photo.time) for key, photo in photographs.items())
    state = [[file_state(articles), file_state(bought)], versions]
    fingerprint = digest([RECIPE, _LARGEST_SIDE, options, state])

    whole = functools.partial(
        images.decode_problems,
        read=read_file,
        kept=prepared.unfinished_folder(user_path(cache), NAME, fingerprint),
        runner=runner,
    )
    return prepared.load_or_prepare(
        user_path(cache),
        NAME,
        lambda: _build(articles, bought, photographs, options, whole, log or log_line),
        fingerprint=fingerprint,
        runner=runner,
        log=log,
        description=(
            "Articles of H&M's competition with their photographs. Relations: "
            f"{clusters} kinds of customers (k-means on {CATEGORY}), bought on one day, the same "
            f"product in another colour, and {len(RESPECTS)} respects in which articles agree. At "
            f"most {pairs_per_user} pairs of a customer, drawn at random, {pairs_per_item} of an "
            f"article, and {pairs_per_respect} of a respect."
        ),
        **_ABOUT,
    )


def _file(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise UserError(
            f"There is no {name} in {root}; give the folder with the files of the H&M competition: "
            "--config rcml:hm,path=DIRECTORY"
        )
    return root / name


def _build(
    articles_file: Path,
    transactions_file: Path,
    photographs: dict[str, Photograph],
    options: _Options,
    decode_problems: Callable[[list[str]], list[str]],
    log: Log,
) -> RelationGraph:
    counts: Counter[str] = Counter()
    articles = read_articles(articles_file, tuple(RESPECTS), counts, strict=options.strict)
    found = [photographs.get(article.id) for article in articles]
    whole = decode_problems([str(p.path) for p in found if p])
    paths = _photograph_paths(articles, found, whole, counts, options.strict)
    log(f"Reading {transactions_file} ({transactions_file.stat().st_size / 1e6:,.1f} MB)")
    bought = read_transactions(transactions_file, articles, counts, strict=options.strict)
    chosen = np.flatnonzero([path is not None for path in paths])
    if not len(chosen):
        raise UserError(
            f"No article of {articles_file} has a photograph that can be decoded; add images/."
        )
    graph = _graph(articles, [path for path in paths if path is not None], chosen, bought, options)
    total, customers, empty = (
        counts.pop(name, 0)
        for name in ("transactions", "customers", "articles without a description")
    )
    problems = [counted(number, name) for name, number in counts.items() if number]
    for sentence, number in zip(graph.relations, np.bincount(graph.pairs[:, 2]), strict=True):
        log(f"{counted(int(number), 'pairs'):>15}: {sentence}")
    log(
        f"H&M: {counted(len(articles), 'articles')}, {counted(total, 'transactions')}, "
        f"{counted(customers, 'customers')} of these articles; "
        f"{counted(len(graph), 'articles have', 'article has')} a photograph. Left out: "
        f"{', '.join(problems) or 'nothing'}. Kept by their names: "
        f"{counted(empty, 'articles')} without a description."
    )
    return graph


def _photograph_paths(
    articles: list[Article],
    found: list[Photograph | None],
    problems: list[str],
    counts: Counter,
    strict: bool,
) -> list[Path | None]:
    """Each article's photograph, None where there is none or it cannot be decoded.

    problems: what is wrong with each photograph that was found.
    """
    known = iter(problems)
    paths: list[Path | None] = []
    for article, photograph in zip(articles, found, strict=True):
        problem = next(known) if photograph else "there is no such file"
        name = photograph.path if photograph else f"images/{article.id[:3]}/{article.id}.jpg"
        if problem and strict:
            raise UserError(
                f"{article.where}: the photograph {name} cannot be decoded ({problem}); add or "
                "replace it, or turn strict off to leave such articles out."
            )
        kind = "with a damaged photograph" if photograph else "without a photograph"
        counts[f"articles {kind}"] += bool(problem)
        paths.append(None if problem or not photograph else photograph.path)
    return paths


def _graph(
    articles: list[Article],
    paths: list[Path],
    chosen: np.ndarray,
    bought: Transactions,
    options: _Options,
) -> RelationGraph:
    """The graph of the articles with a photograph (`chosen`); the others count for the kinds."""
    columns = dict(zip(RESPECTS, zip(*(a.values for a in articles), strict=True), strict=True))
    items = [articles[i] for i in chosen]
    products, product = np.unique([item.product for item in items], return_inverse=True)
    values = np.stack([_numbered(column)[1][chosen] for column in columns.values()], axis=1)
    colour = values[:, list(columns).index(COLOUR)]
    sentences, parts = _purchase_relations(columns[CATEGORY], chosen, bought, options)
    parts.append(_other_colours(product, colour, len(products), options))
    rng = np.random.default_rng([options.seed, 3])
    parts += [agreeing_pairs(v, options.pairs_per_respect, rng) for v in values.T]
    sentences += [OTHER_COLOUR, *RESPECTS.values()]
    attributes = np.full((len(items), len(sentences)), -1, np.int32)
    attributes[:, -len(RESPECTS) :] = values
    # A sentence without a pair is no relation.
    used, pairs, pair_split = numbered_relations(parts)
    if not used:
        raise UserError("No two of these articles are linked; give a larger part of the data.")
    names, label = _numbered(columns[LABEL])
    present = np.unique(label[chosen])
    present = present[present >= 0]
    renumbered = np.full(len(names) + 1, -1, np.int32)
    renumbered[present] = np.arange(len(present))
    return RelationGraph(
        name=NAME,
        ids=tuple(item.id for item in items),
        texts=tuple(item.text for item in items),
        labels=renumbered[label[chosen]],
        label_names=tuple(names[i] for i in present),
        relations=tuple(sentences[r] for r in used),
        pairs=pairs,
        pair_split=pair_split,
        images=images.EncodedImages([str(path) for path in paths], _encoded),
        item_group=product.astype(np.int32),
        attributes=attributes[:, used],
    )


def _numbered(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values, sorted, and the number of each (N,) int32; -1 for ""."""
    names, number = np.unique(values, return_inverse=True)
    missing = int(len(names) > 0 and names[0] == "")
    return names[missing:].tolist(), (number - missing).astype(np.int32)


def _purchase_relations(
    categories: Sequence[str], chosen: np.ndarray, bought: Transactions, options: _Options
) -> tuple[list[str], list[np.ndarray]]:
    """Sentences of the kinds of customers and of the same day; the item pairs (P, 2) of each."""
    index = np.full(len(categories), -1, np.int32)
    index[chosen] = np.arange(len(chosen))
    caps: dict[str, Any] = {
        "items": len(chosen),
        "per_user": options.pairs_per_user,
        "per_item": options.pairs_per_item,
        "seed": options.seed,
    }
    ids = (bought.customer.astype(np.uint64), bought.article.astype(np.uint64))
    purchases, _ = distinct_purchases(*ids, options.min_purchases)
    if not len(purchases.user):
        raise UserError(
            f"No customer has bought {options.min_purchases} articles of articles.csv; lower "
            "--config.data.min_purchases or give a larger part of the data."
        )
    article = purchases.items.astype(np.int64)
    names, category = _numbered(categories)
    cluster, sentences = kinds_of_buyers(
        purchases, category[article], names, clusters=options.clusters, seed=options.seed
    )
    sentences, cluster = merge_kinds(sentences, cluster)
    item = index[article[purchases.item]]
    keep = (item >= 0) & (cluster[purchases.user] >= 0)
    pairs = copurchase_pairs(purchases.user[keep], item[keep], cluster, **caps)
    parts = [pairs[pairs[:, 2] == kind, :2] for kind in range(len(sentences))]

    item = index[bought.article]
    customer, day, item = (x[item >= 0] for x in (bought.customer, bought.day, item))
    new = np.ones(len(item), bool)
    new[1:] = (np.diff(customer) != 0) | (np.diff(day) != 0)
    basket = np.cumsum(new, dtype=np.int32) - 1
    owner, one_kind = customer[new], np.zeros(int(new.sum()), np.int32)
    pairs = copurchase_pairs(basket, item, one_kind, owner=owner, **caps)
    return [*sentences, SAME_DAY], [*parts, pairs[:, :2]]


def _other_colours(
    product: np.ndarray, colour: np.ndarray, products: int, options: _Options
) -> np.ndarray:
    """Pairs (P, 2) of one product in two colours, at most `pairs_per_item` of an article."""
    members = np.split(np.argsort(product, kind="stable"), np.bincount(product).cumsum()[:-1])
    pairs = pairs_within([group for group in members if len(group) > 1])[:, :2]
    one, other = colour[pairs].T
    pairs = pairs[(one != other) & (one >= 0) & (other >= 0)]
    pairs = np.random.default_rng([options.seed, 2]).permutation(pairs)
    return pairs[within_item_cap(pairs, len(product), options.pairs_per_item)]


def _encoded(path: str) -> bytes:
    try:
        return images.storable(read_file(path), _LARGEST_SIDE)
    except images.DECODE_ERRORS as error:
        raise UserError(f"The photograph {path} cannot be read ({error}); replace it.") from error

"""The files of H&M Personalized Fashion Recommendations, read as they are published.

`articles.csv` is small. `transactions_train.csv` has 31.8 million lines and is a stream: of a
transaction three small integers are kept, and every distinct one once. A row that is no record is
counted in `counts` and left out; with `strict` it is an error with file and line.
"""

import csv
import datetime
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcml_jax.errors import UserError

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
                places = [header.index(name) for name in _TRANSACTION_COLUMNS]
                first = 2
                while text := file.read(_CHUNK):
                    text += file.readline()
                    # A last line is as whole as the others, whether it ends in a new line or not.
                    lines = _unquoted(text).removesuffix("\n").split("\n")
                    yield self._keys(lines, first, places, len(header))
                    first += len(lines)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read ({error}); check the file.") from error

    def _keys(self, lines: list[str], first: int, places: list[int], width: int) -> np.ndarray:
        rows = [line.split(",") for line in lines]
        if set(map(len, rows)) != {width}:
            empty = [""] * width  # fails the checks below
            rows = [row if len(row) == width else empty for row in rows]
        columns = list(zip(*rows, strict=True))
        date, customer_id, article_id = (columns[place] for place in places)
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
            place = int(np.argmax(malformed | unknown))
            where = f"{self._path}, line {first + place}"
            if malformed[place]:
                _malformed(where, f"{lines[place][:80]!r}", "transactions", self._counts, True)
            raise UserError(
                f"{where}: its article is not in articles.csv; complete that file, or turn strict "
                "off to leave such transactions out."
            )
        self._counts["malformed transactions"] += int(malformed.sum())
        self._counts["transactions of articles that are not in articles.csv"] += int(unknown.sum())


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str], list[str] | None]]:
    """(line, header, row) of each row; None in the place of the row for the header itself."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            yield 1, header, None
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    row = ["malformed CSV"]
                if row:
                    yield reader.line_num, header, row
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def _article_problem(header: list[str], row: list[str], value: dict[str, str]) -> str:
    """What is wrong with a row of articles.csv, "" where nothing is."""
    if len(row) != len(header):
        return f"{len(row)} values for {len(header)} columns"
    try:
        "".join(row).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 were read as surrogates
        return "not UTF-8"
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


def _check_columns(path: Path, header: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in header:
            raise UserError(f"{path} has no column '{name}'; take the published file.")


def _unquoted(text: str) -> str:
    """Transactions hold no text, so that quotes around values may go."""
    return text.replace('"', "") if '"' in text else text

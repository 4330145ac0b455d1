"""Records of Amazon Reviews 2023: JSON lines, plain or gzipped, read one by one.

Lines are parsed by orjson where it is installed (extra `amazon`). What it refuses, the parser of
the standard library judges, so that the same lines are malformed with and without it.

Two views of the same records are in circulation, the raw files and the Hugging Face data set; both
are read. Reviews name an item by `asin` (one variant, say a size) and by `parent_asin`; the latter
is the item's id here.
"""

import functools
import gzip
import html
import io
import itertools
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rcml_jax.data.sources.copurchases import CORE, distinct_purchases, k_core
from rcml_jax.data.stages import Arrays, pack
from rcml_jax.errors import UserError
from rcml_jax.parsing import NO_TEXT, TextGate, read_json, replaced


def _fast_parser() -> Callable[[bytes], Any] | None:
    try:
        import orjson
    except ImportError:
        return None
    return orjson.loads


_fast_json = _fast_parser()

# A longer line is no record: without a limit, a foreign file could fill the memory.
LONGEST_LINE = 16 * 2**20
_BUFFER = 2**20
_WIDTH = re.compile("[1-9][0-9]{1,4}w")
_BATCH = 2**12  # reviews whose ids are hashed together


class Item(NamedTuple):
    """A product: `title` and `image` (the address of its MAIN image) are "" where missing."""

    id: str
    title: str
    image: str
    categories: tuple[str, ...]
    price: float | None
    details: dict[str, Any]
    main_category: str = ""

    @property
    def category(self) -> str:
        """The second-level category, "" where there is none."""
        return self.categories[1] if len(self.categories) > 1 else ""


def records(path: Path, counts: Counter, *, strict: bool = False) -> Iterator[tuple[int, dict]]:
    """(line number, JSON object) of each line of a `.jsonl` or `.jsonl.gz` file, as a stream.

    A line that is no JSON object adds to `counts["malformed"]`; with `strict` it is an error. At
    the end of a gzipped file its checksum has been verified.

    Raises:
      UserError: the file cannot be read, or is cut or damaged, or a malformed line (`strict`).
    """
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                try:
                    record = parse_line(line)
                    if not isinstance(record, dict):
                        raise ValueError("no JSON object")
                except ValueError as error:
                    if line.strip():
                        malformed(path, number, str(error), counts, strict)
                    continue
                yield number, record
    except EOFError as error:
        raise UserError(
            f"{path} is cut: its compressed data end in the middle, after line {number:,}; "
            "delete it and download it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no whole gzip file ({error}, after line {number:,}); delete it and "
            "download it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def malformed(path: Path, number: int, problem: str, counts: Counter, strict: bool) -> None:
    """Count a line that is no usable record, or raise UserError for it if `strict`."""
    if strict:
        raise UserError(
            f"{path}, line {number}: malformed record ({problem}); mend or remove the line, or "
            "turn strict off to leave such lines out."
        )
    counts["malformed"] += 1


def parse_line(line: bytes) -> Any:
    """The value of a line of JSON, as `read_json`; numbers of 20 digits or more may be floats.

    Raises ValueError where it is malformed.
    """
    if _fast_json is not None:
        try:
            return _fast_json(line)
        except ValueError:
            # Half of a surrogate pair, a byte order mark, UTF-16 and the like may still be read.
            pass
    return read_json(line)


def review_ids(record: dict[str, Any]) -> tuple[str, str] | None:
    """User and item of a review of either view; None if it does not tell one of them."""
    user: Any = record.get("user_id")
    item: Any = record.get("parent_asin")
    return (user, item) if _is_id(user) and _is_id(item) else None


def parse_item(record: dict, check: Callable[[str], str] = replaced) -> Item | None:
    """An item from either view; None if it has no `parent_asin`.

    HTML entities in the title and the categories become the characters that they stand for. check:
    what these go through, such as a `TextGate`.
    """
    key: Any = record.get("parent_asin")
    if not _is_id(key):
        return None
    categories = record.get("categories")
    return Item(
        id=key,
        title=_text(record.get("title"), check),
        image=main_image(record.get("images")),
        categories=tuple(_text(x, check) for x in categories)
        if isinstance(categories, list)
        else (),
        price=_price(record.get("price")),
        details=_details(record.get("details")),
        main_category=_text(record.get("main_category"), check),
    )


def main_image(images: Any) -> str:
    """The MAIN image's address, in high resolution where there is one; "" without any.

    images: a list of objects (raw files), or one object of lists (Hugging Face). Items of Prime
    Video have their widths as keys, such as "720w"; of these the smallest that is wide enough for
    the store is taken.
    """
    if isinstance(images, dict):
        lists = {key: value for key, value in images.items() if isinstance(value, list)}
        length = max(map(len, lists.values()), default=0)
        images = [
            {key: value[i] for key, value in lists.items() if i < len(value)} for i in range(length)
        ]
    for image in images if isinstance(images, list) else ():
        if not isinstance(image, dict):
            continue
        widths = _widths(image)
        if image.get("variant") == "MAIN" or (widths and "variant" not in image):
            for size in ("hi_res", "large", *widths):
                address = image.get(size)
                if isinstance(address, str) and address.startswith(("http://", "https://")):
                    return address
    return ""


_STORED_WIDTH = 512


def _widths(image: dict) -> list[str]:
    """The keys that are widths, such as "720w": the smallest that is enough, larger, smaller."""
    found = [int(key[:-1]) for key in image if _WIDTH.fullmatch(key)]
    enough = sorted(width for width in found if width >= _STORED_WIDTH)
    smaller = sorted((width for width in found if width < _STORED_WIDTH), reverse=True)
    return [f"{width}w" for width in (*enough, *smaller)]


def identity(key: str) -> int:
    """64 bits of a hash of an id, the same on every machine.

    Among 20 million ids, any two agree with a probability of about 1e-5.
    """
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


def identities(keys: Sequence[str]) -> np.ndarray:
    """The `identity` of each of n ids, (n,) uint64."""
    digests = [blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), _BUFFER)
    return path.open("rb", _BUFFER)


def _is_id(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    # The first is what nearly all are, and quickly seen.
    return (value.isascii() and value.isalnum()) or (value != "" and value == _clean(value))


def _clean(value: Any) -> str:
    """Text in one line; "" for anything but Unicode text."""
    return " ".join(value.split()) if isinstance(value, str) and not NO_TEXT.search(value) else ""


def _text(value: Any, check: Callable[[str], str]) -> str:
    """Text in one line for people to read, HTML entities replaced; "" for anything but text."""
    if not isinstance(value, str):
        return ""
    while (plain := html.unescape(value)) != value:  # "&amp;quot;" was escaped twice
        value = plain
    return " ".join(check(value).split())


def _number(value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _price(value: Any) -> float | None:
    """Hugging Face has text, such as "12.99" or "None"."""
    return _number(value.strip().lstrip("$") if isinstance(value, str) else value, float)


def _details(value: Any) -> dict[str, Any]:
    """Hugging Face has a JSON text."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


# The two passes over Amazon's files: the 5-core of the reviews, and the records of its items.


def read_purchases(path: Path, *, strict: bool = False) -> Arrays:
    """The 5-core of a review file, as a stage: the arrays of `Purchases`, and packed `counts`.

    counts: reviews, malformed review lines, repeated reviews, users with one purchase. The last
    two are no mistakes, and allowed with `strict`.

    Raises:
      UserError: the file is cut or cannot be read, its 5-core is empty, or a malformed line
        (`strict`).
    """
    problems: Counter[str] = Counter()
    users, items = array("Q"), array("Q")
    rows = _review_ids(path, problems, strict)
    while batch := list(itertools.islice(rows, _BATCH)):
        for hashes, keys in zip((users, items), zip(*batch, strict=True), strict=True):
            hashes.frombytes(identities(keys).tobytes())
    purchases, left_out = distinct_purchases(
        np.frombuffer(users, np.uint64), np.frombuffer(items, np.uint64)
    )
    core = k_core(purchases)
    if not len(core.user):
        raise UserError(
            f"{path} holds no users and items with {CORE} purchases each ({len(users):,} reviews); "
            "give a larger file."
        )
    counts = {
        "reviews": len(users),
        "malformed review lines": problems["malformed"],
        "repeated reviews": left_out["repeated"],
        "users with one purchase": left_out["single"],
    }
    return {
        "users": core.users,
        "items": core.items,
        "user": core.user,
        "item": core.item,
        "counts": pack(counts),
    }


def _review_ids(path: Path, problems: Counter, strict: bool) -> Iterator[tuple[str, str]]:
    """User and item of each review that tells both."""
    for number, record in records(path, problems, strict=strict):
        ids = review_ids(record)
        if ids is None:
            malformed(path, number, "no user_id or parent_asin", problems, strict)
        else:
            yield ids


def read_items(
    path: Path, items: np.ndarray, *, strict: bool = False, local: Container[str] = ()
) -> Arrays:
    """The records of the items with hashes (N,) uint64, as a stage.

    ids, titles, images: packed lists of N strings, "" where something is missing; category (N,)
    int32, an index into the packed list `categories`, -1 for unknown; `by`: what these are (see
    `categories_of`); packed `counts`. Of several records of one item the first with a title and an
    image counts.

    With `strict` an item lacks no record, title, second-level category, or image (unless it is in
    `local`).

    Raises:
      UserError: the file is cut or cannot be read, none of the items is in it, or one that is not
        whole (`strict`), with file and line.
    """
    index = {key: i for i, key in enumerate(items.tolist())}
    found: list[Item | None] = [None] * len(items)
    problems: Counter[str] = Counter()
    gate = TextGate(strict)
    for number, record in records(path, problems, strict=strict):
        key: Any = record.get("parent_asin")
        if not _is_id(key):
            malformed(path, number, "no parent_asin", problems, strict)
            continue
        i = index.get(identity(key))
        if i is None:
            continue
        where = f"{path}, line {number}"
        check = functools.partial(gate, where=where)
        item = parse_item(record, check)
        assert item is not None  # it has an id
        if strict:
            _check(item, local, where)
        known = found[i]
        problems["repeated"] += known is not None
        if known is None or (not (known.title and known.image) and item.title and item.image):
            # Only what the graph needs: records are long.
            found[i] = item._replace(details={}, categories=item.categories[:2])
    whole = [item or Item("", "", "", (), None, {}) for item in found]
    missing = found.count(None)
    if missing == len(found) or (strict and missing):
        raise UserError(
            f"{path} has no record of {missing:,} of the {len(found):,} items that the reviews "
            "name; give the item file of the same domain, whole"
            + (", or turn strict off." if missing < len(found) else ".")
        )
    of_item, by = categories_of(whole)
    categories = sorted({*of_item} - {""})
    number_of = {name: i for i, name in enumerate(categories)} | {"": -1}
    category = np.array([number_of[name] for name in of_item], np.int32)
    counts = {
        "malformed item lines": problems["malformed"],
        "repeated item records": problems["repeated"],
        "items without a record": missing,
        "items without a title": sum(not item.title for item in whole) - missing,
        f"items without {'a second-level category' if by == CATEGORIES else by}": (
            int(np.sum(category < 0)) - missing
        ),
        "texts with a NUL or half of a surrogate pair, replaced": gate.replaced,
    }
    return {
        "ids": pack([item.id for item in whole]),
        "titles": pack([item.title for item in whole]),
        "images": pack([item.image for item in whole]),
        "category": category,
        "categories": pack(categories),
        "by": pack(by),
        "counts": pack(counts),
    }


#: What items are sorted into, in the order of preference.
CATEGORIES, MAIN_CATEGORIES, WORDS = "second-level categories", "main categories", "words of titles"
_MOST_WORDS = 50
_WORD = re.compile(r"[^\W\d_]{3,}")
_FILLERS = frozenset(
    {"and", "the", "for", "with", "without", "from", "your", "you", "our", "set", "pack", "pcs",
     "piece", "pieces", "new", "inch", "size", "count", "box", "kit", "all", "best", "free"}
)  # fmt: skip


def categories_of(items: Sequence[Item]) -> tuple[list[str], str]:
    """A category for each item, "" where none is known, and which kind of category it is.

    The second-level categories, where any item has one. Whole domains have none: then the main
    categories, where there are two at least, else the words of titles: of the commonest words that
    at most half of the titles have, each item has the commonest of its own.
    """
    second = [item.category for item in items]
    if any(second):
        return second, CATEGORIES
    main = [item.main_category for item in items]
    if len({*main} - {""}) > 1:
        return main, MAIN_CATEGORIES
    words = [dict.fromkeys(_WORD.findall(item.title.lower())) for item in items]
    count = Counter(word for mine in words for word in mine if word not in _FILLERS)
    titled = sum(bool(mine) for mine in words)
    usable = [(word, n) for word, n in count.items() if 1 < n <= titled / 2]
    rank = dict(sorted(usable, key=lambda x: (-x[1], x[0]))[:_MOST_WORDS])
    own = [[word for word in mine if word in rank] for mine in words]
    return [max(mine, key=rank.__getitem__, default="") for mine in own], WORDS


def _check(item: Item, local: Container[str], where: str) -> None:
    lacks = {
        "title": not item.title,
        "MAIN image": not item.image and item.id not in local,
        "second-level category": not item.category,
    }
    for part, missing in lacks.items():
        if missing:
            raise UserError(
                f"{where}: item {item.id} has no {part}; complete the record, or turn strict off "
                "to leave such items out."
            )

"""Records of Amazon Reviews 2023: JSON lines, plain or gzipped, read one by one.

Two views of the same records are in circulation, the raw files and the Hugging Face data set; both
are read. Reviews name an item by `asin` (one variant, say a size) and by `parent_asin`; the latter
is the item's id here.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rcml_jax.errors import UserError

# A longer line is no record: without a limit, a foreign file could fill the memory.
LONGEST_LINE = 16 * 2**20
_BUFFER = 2**20
_TIME_NAMES = ("timestamp", "sort_timestamp", "sortTimestamp")
_VOTE_NAMES = ("helpful_vote", "helpful_votes")


class Review(NamedTuple):
    """Who bought what; `timestamp` in milliseconds; a number that is not there is None."""

    user: str
    item: str
    rating: float | None
    timestamp: int | None
    helpful_votes: int | None


class Item(NamedTuple):
    """A product: `title` and `image` (the address of its MAIN picture) are "" where missing."""

    id: str
    title: str
    image: str
    categories: tuple[str, ...]
    price: float | None
    details: dict[str, Any]

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
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("no JSON object")
                except (ValueError, RecursionError) as error:
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


def parse_review(record: dict) -> Review | None:
    """A review from either view and spelling; None if it does not tell the user or the item."""
    user, item = record.get("user_id"), record.get("parent_asin")
    if not (_is_id(user) and _is_id(item)):
        return None
    return Review(
        user,
        item,
        _number(record.get("rating"), float),
        _number(_first(record, _TIME_NAMES), int),
        _number(_first(record, _VOTE_NAMES), int),
    )


def parse_item(record: dict) -> Item | None:
    """An item from either view; None if it has no `parent_asin`."""
    key = record.get("parent_asin")
    if not _is_id(key):
        return None
    categories = record.get("categories")
    return Item(
        id=key,
        title=_clean(record.get("title")),
        image=main_image(record.get("images")),
        categories=tuple(map(_clean, categories)) if isinstance(categories, list) else (),
        price=_price(record.get("price")),
        details=_details(record.get("details")),
    )


def main_image(images: Any) -> str:
    """The MAIN picture's address, in high resolution where there is one; "" without any.

    images: a list of objects (raw files), or one object of lists (Hugging Face).
    """
    if isinstance(images, dict):
        lists = {key: value for key, value in images.items() if isinstance(value, list)}
        length = max(map(len, lists.values()), default=0)
        images = [
            {key: value[i] for key, value in lists.items() if i < len(value)} for i in range(length)
        ]
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and image.get("variant") == "MAIN":
            for size in ("hi_res", "large"):
                address = image.get(size)
                if isinstance(address, str) and address.startswith(("http://", "https://")):
                    return address
    return ""


def identity(key: str) -> int:
    """64 bits of a hash of an id, the same on every machine.

    Among 20 million ids, any two agree with a probability of about 1e-5.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), _BUFFER)
    return path.open("rb", _BUFFER)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value == _clean(value)


def _clean(value: Any) -> str:
    """Text in one line that UTF-8 can hold; "" for anything but text."""
    if not isinstance(value, str):
        return ""
    return " ".join(value.encode("utf-8", "ignore").decode("utf-8").split())


def _first(record: dict, names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


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
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}

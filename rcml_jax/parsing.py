"""What enters the library from outside: texts, JSON, CSV rows, lines and paths, each checked once.

Images have their own gate, `rcml_jax.data.images`.
"""

import contextlib
import csv
import json
import math
import os
import re
import stat
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rcml_jax.errors import UserError
from rcml_jax.log import counted

# Texts

#: Characters that are no Unicode text.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextGate:
    """Checks the texts of one source: ids, labels, captions, sentences.

    A NUL and half of a surrogate pair are no Unicode text: tokenizers, UTF-8 and file names refuse
    them. With `strict` the first one is an error. Without it each becomes U+FFFD, `replaced` counts
    the texts that had one, and `first` says where the first was.
    """

    def __init__(self, strict: bool = False):
        self.strict, self.replaced, self.first = strict, 0, ""

    def __call__(self, text: str, where: str) -> str:
        """The text as it may enter; where: file and line, for messages.

        Raises UserError with `strict`.
        """
        if not NO_TEXT.search(text):
            return text
        if self.strict:
            raise UserError(
                f"{where}: {_shown(text)} holds a NUL or half of a surrogate pair, which is no "
                "Unicode text; correct it, or leave `strict` off, so that it is replaced."
            )
        self.replaced += 1
        self.first = self.first or where
        return replaced(text)

    def report(self, log: Callable[[str], None]) -> None:
        """Tell in one line how many texts were changed, where there are any."""
        if self.replaced:
            log(
                f"{counted(self.replaced, 'texts')} held a NUL or half of a surrogate pair, which "
                f"is now U+FFFD; the first is in {self.first}."
            )


def replaced(text: str) -> str:
    """The text with U+FFFD in place of each NUL and each half of a surrogate pair."""
    return NO_TEXT.sub(_REPLACEMENT, text)


def argument_text(text: str) -> str:
    """A text of the command line. Raises UserError where its bytes were not UTF-8."""
    if NO_TEXT.search(text):
        raise UserError(
            f"the argument {_shown(text)} is not UTF-8 text; write it in UTF-8, or set PYTHONUTF8=1"
        )
    return text


def _shown(text: str) -> str:
    """The beginning of a text in ASCII, so that any terminal can show it."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


# Files of text


def text_lines(text: str) -> list[str]:
    r"""The lines of a text, split at "\n" and "\r\n" alone.

    `str.splitlines` also splits at U+2028, U+0085, form feeds and others, which captions contain.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError where it is malformed, or has NaN or Infinity.

    unique: names that come twice in an object are malformed, too; without it the last one counts.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return (_JSON_UNIQUE if unique else _JSON).decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in an object")
    return found


_JSON = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
_JSON_UNIQUE = json.JSONDecoder(
    parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_no_twins
)
_limit_lock = threading.Lock()


class CsvRows:
    """(number of its first line, values) of each row of a CSV file, empty lines left out.

    A value may have any length. strict: as of `csv.reader`. `line` is where the last row begins,
    also one that raised csv.Error; the next call goes on after it.
    """

    # A generator would end at its first error.

    def __init__(self, file: Iterable[str], *, strict: bool = True):
        self._reader, self.line = csv.reader(file, strict=strict), 0

    def __iter__(self) -> "CsvRows":
        return self

    def __next__(self) -> tuple[int, list[str]]:
        while True:
            self.line = self._reader.line_num + 1
            with _long_fields():
                row = next(self._reader)
            if row:
                return self.line, row


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts csv's limit of 128 KiB a value, which the whole process shares, for a moment.

    The lock keeps two readers from restoring each other's limit.
    """
    with _limit_lock:
        before = csv.field_size_limit(2**31 - 1)  # the most that every platform takes
        try:
            yield
        finally:
            csv.field_size_limit(before)


# Paths

# Two letters at least: "C:/" is a drive. A `Path` has joined the two slashes of a URL.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_LONGEST_NAME = 255  # bytes; the limit of nearly all file systems
_LONGEST_PATH = 4095  # bytes, of Linux


def user_path(given: str | os.PathLike) -> Path:
    """The path that a user gives, with a leading ~ expanded.

    The one place where text becomes a path. Addresses on object storage are for
    `rcml_jax.remote`, which gives their local mirrors.

    Raises UserError for an empty one, which is no current directory, for a URL such as
    gs://bucket/run, for a name that this system cannot encode, and where the home directory of ~
    is unknown.
    """
    text = os.fspath(given)
    if not text:
        raise UserError("a path is empty; give one, or a dot for the current directory")
    if scheme := _SCHEME.match(text):
        raise UserError(
            f"the path {_shown(text)} is a URL, and {scheme[1]}:// is not supported here; give a "
            "local path, or mount the storage (--workdir, --to and --embeddings of the commands "
            "and config.data.dir take gs:// and s3://)"
        )
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded == text:
            raise UserError(
                f"the home directory of {text.partition('/')[0]!r} is unknown; set HOME, or write "
                f"the whole path in place of {_shown(text)}"
            )
        text = expanded
    try:
        # The working directory, too: nearly everything makes paths absolute sooner or later.
        absolute = os.path.abspath(text)
        absolute.encode("utf-8")
        names = os.fsencode(absolute).split(os.fsencode(os.sep))
    except (UnicodeEncodeError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(
                "the working directory was removed; change to one that exists"
            ) from error
        raise UserError(
            f"the path {_shown(absolute)} cannot be encoded as a file name here; rename it in "
            "UTF-8, and set PYTHONUTF8=1 or a UTF-8 locale such as LC_ALL=C.UTF-8"
        ) from error
    size = sum(map(len, names)) + len(names)
    if "\0" in text or max(map(len, names)) > _LONGEST_NAME or size > _LONGEST_PATH:
        raise UserError(
            f"the path {_shown(text)} has a NUL, a name of more than {_LONGEST_NAME} bytes, or "
            f"more than {_LONGEST_PATH:,} bytes; correct it"
        )
    return Path(text)


def user_cache() -> str | None:
    """The user's own folder for caches; None for a user id that the system does not know."""
    home = os.path.expanduser("~")
    known = None if home == "~" else os.path.join(home, ".cache")
    return os.environ.get("XDG_CACHE_HOME", "") or known


def checkpoint_name(name: str) -> str:
    """A checkpoint's directory or name on the hub, with a leading ~ expanded; "" stays.

    Raises UserError as `user_path`.
    """
    return str(user_path(name)) if name.startswith("~") or _SCHEME.match(name) else name


def read_file(path: str | os.PathLike, most: int = 2**30) -> bytes:
    """The content of a regular file of at most `most` bytes, such as an image.

    Raises OSError for anything else: reading a pipe or a device would never end. Raises ValueError
    for a path with a NUL or one that cannot be encoded.
    """
    with open(path, "rb", opener=_no_wait) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError(f"{os.fspath(path)} is no regular file")
        if state.st_size > most:
            raise OSError(f"{os.fspath(path)} has more than {most:,} bytes")
        return file.read()


#: What NumPy raises of a damaged .npy or .npz file: its header is source text, its size anything.
ARRAY_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def _no_wait(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

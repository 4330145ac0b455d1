"""Columns of many strings as two arrays, mapped from a file; no process holds the strings."""

import array
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcml_jax import files
from rcml_jax.parsing import ARRAY_ERRORS

_BLOCK = 2**22  # bytes that are hashed or copied at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers are no zeros
_MIXER = np.uint64(0xD6E8FEB86659FD93)


class StringBuilder:
    """Takes strings one by one, and makes a `StringColumn` in memory of them."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array.array("q", [0])

    def append(self, text: str) -> None:
        """Add a string at the end."""
        # Half of a surrogate pair has no UTF-8, but may stand in a source's texts.
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def build(self) -> "StringColumn":
        """The column; nothing can be added any more."""
        return StringColumn(
            np.frombuffer(self._ends, np.int64), np.frombuffer(self._data, np.uint8)
        )


class StringColumn(Sequence):
    """n strings: string i is bytes offsets[i] to before offsets[i + 1] of the data, in UTF-8.

    offsets: (n + 1,) int64; data: uint8. An index gives a string; a slice, or an array of indices,
    a list. It equals a tuple of the same strings. A column of a file is copied to other processes
    by its path. `index` sorts a hash of each string, once: 16 bytes a string.
    """

    def __init__(self, offsets: np.ndarray, data: np.ndarray, path: Path | None = None):
        # Plain arrays: of a memmap every result would be one, too.
        self._offsets, self._data = np.asarray(offsets), np.asarray(data)
        self._path = path
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, strings: Iterable[str]) -> "StringColumn":
        """A column in memory."""
        builder = StringBuilder()
        for text in strings:
            builder.append(text)
        return builder.build()

    @classmethod
    def open(cls, path: Path) -> "StringColumn":
        """The column in a file, mapped. Raises OSError or ValueError where none is whole there."""
        with path.open("rb") as file:
            offsets = _map_array(file, path)
            data = _map_array(file, path)
        if offsets.dtype != np.int64 or len(offsets) < 1 or offsets[-1] != len(data):
            raise ValueError(f"{path.name} is no whole column of strings")
        return cls(offsets, data, path)

    def save(self, path: Path) -> None:
        """Write a file for `open`, whole or not at all, whatever other processes do."""
        with files.atomic_file(path, shared=True) as file:
            for array in (self._offsets, self._data):
                np.lib.format.write_array(file, array, allow_pickle=False)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._range(*index.indices(len(self)))
        if isinstance(index, np.ndarray | list):
            chosen = np.asarray(index)
            if chosen.dtype == bool:
                chosen = np.flatnonzero(chosen)
            return [self._at(int(i)) for i in chosen.tolist()]
        return self._at(operator.index(index))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringColumn):
            return np.array_equal(self._offsets, other._offsets) and np.array_equal(
                self._data, other._data
            )
        if isinstance(other, tuple):
            return len(self) == len(other) and all(map(operator.eq, self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and self._find(value) is not None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def __reduce__(self) -> tuple:
        if self._path is not None:
            return StringColumn.open, (self._path,)
        return StringColumn, (self._offsets, self._data)

    def __repr__(self) -> str:
        return f"StringColumn({len(self):,} strings)"

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """The first index of a string. Raises ValueError where it is not there."""
        found = self._find(value)
        if found is None or not start <= found < (len(self) if stop is None else stop):
            raise ValueError(f"{value!r} is not in the column")
        return found

    def is_unique(self) -> bool:
        """Whether no string comes twice."""
        hashes, order = self._by_hash()
        same = np.flatnonzero(hashes[1:] == hashes[:-1])
        # Strings of one hash are rare, and compared as they are.
        for value in np.unique(hashes[same]):
            start, stop = np.searchsorted(hashes, value), np.searchsorted(hashes, value, "right")
            alike = self[order[start:stop]]
            if len(set(alike)) < len(alike):
                return False
        return True

    def take(self, indices: np.ndarray) -> "StringColumn":
        """The column, in memory, of some strings (k,) in another order."""
        lengths = np.diff(self._offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(offsets[-1], np.uint8)
        for first, last in _blocks(offsets):
            part = slice(offsets[first], offsets[last])
            shift = self._offsets[indices[first:last]] - offsets[first:last]
            places = np.arange(part.start, part.stop) + np.repeat(shift, lengths[first:last])
            data[part] = self._data[places]
        return StringColumn(offsets, data)

    def _at(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        index %= len(self)
        start, stop = self._offsets[index], self._offsets[index + 1]
        return self._data[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def _range(self, start: int, stop: int, step: int) -> list[str]:
        if step != 1:
            return [self._at(i) for i in range(start, stop, step)]
        ends = self._offsets[start : max(start, stop) + 1].tolist()
        base = ends[0]
        data = self._data[base : ends[-1]].tobytes()
        return [
            data[a - base : b - base].decode("utf-8", "surrogatepass")
            for a, b in itertools.pairwise(ends)
        ]

    def _find(self, value: str) -> int | None:
        hashes, order = self._by_hash()
        wanted = StringColumn.of([value])._hashes()[0]
        start, stop = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
        return next((i for i in order[start:stop].tolist() if self._at(i) == value), None)

    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted hashes (n,), and whose each is; of equal ones the first string is first."""
        if self._sorted is None:
            hashes = self._hashes()
            order = np.argsort(hashes, kind="stable")
            self._sorted = hashes[order], order
        return self._sorted

    def _hashes(self) -> np.ndarray:
        """A number (n,) uint64 of each string: its bytes as digits, and its length."""
        lengths = np.diff(self._offsets)
        hashes = np.empty(len(self), np.uint64)
        powers = np.full(int(lengths.max(initial=0)) + 1, _FACTOR)
        np.multiply.accumulate(powers, out=powers)
        for first, last in _blocks(self._offsets):
            starts = self._offsets[first : last + 1] - self._offsets[first]
            part = self._data[self._offsets[first] : self._offsets[last]]
            position = np.arange(len(part)) - np.repeat(starts[:-1], lengths[first:last])
            digits = np.concatenate([np.zeros(1, np.uint64), powers[position] * part])
            np.add.accumulate(digits, out=digits)
            own = digits[starts[1:]] - digits[starts[:-1]]
            hashes[first:last] = (own ^ (own >> np.uint64(32))) * _MIXER + lengths[
                first:last
            ].astype(np.uint64)
        return hashes


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of strings of about `_BLOCK` bytes each, one string at least."""
    first, n = 0, len(offsets) - 1
    while first < n:
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK, side="right")) - 1
        last = min(max(last, first + 1), n, first + _BLOCK)
        yield first, last
        first = last


def _map_array(file: Any, path: Path) -> np.ndarray:
    """The array that stands next in an open file, mapped; the file is left behind it."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{path.name} is of another version")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ARRAY_ERRORS as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    start, size = file.tell(), int(np.prod(shape)) * dtype.itemsize
    file.seek(start + size)
    if not size:  # nothing can be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)

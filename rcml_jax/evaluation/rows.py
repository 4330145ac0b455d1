"""Rows of embeddings to search: arrays, memory-mapped files, or a model that embeds as it goes."""

import dataclasses
import tempfile
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.answers import named

_CHUNK_BYTES = 8 * 2**20


class Blocks(Protocol):
    """Rows that come in blocks: `len()`, a `width` and `block(start, stop)` in any float type."""

    width: int

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A matrix (n, d), in memory or mapped, under the name that error messages use."""

    name: str
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.values.shape[1]

    def take(self, index: np.ndarray | slice, size: int) -> np.ndarray:
        """The rows of an index or a slice in float32, with zeros after them up to `size` rows."""
        values = self.values[index]
        block = np.zeros((size, self.width), np.float32)
        block[: len(values)] = values
        return block


Source = np.ndarray | jax.Array | Blocks | Rows


def open_rows(name: str, source: Source, *, memory: int) -> Rows:
    """The rows of a source; UserError if it is no matrix of numbers or is empty.

    A `Blocks` is asked for each of its rows once, in order. They are kept in memory if they need at
    most `memory` bytes, else in a temporary file.
    """
    if isinstance(source, Rows):
        return source
    if hasattr(source, "block"):
        values = _collect(name, source, memory)
    else:
        values = source if isinstance(source, np.ndarray) else np.asarray(source)
    if values.ndim != 2 or not (values.dtype.kind in "fiu" or values.dtype == jnp.bfloat16):
        raise UserError(
            f"{name} must be a matrix of numbers with a row for each vector; its shape is "
            f"{values.shape} and its type {values.dtype}"
        )
    if 0 in values.shape:
        raise UserError(f"{name} is empty: its shape is {values.shape}")
    return Rows(name, values)


def check_rows(rows: Rows, similarity: str) -> None:
    """Raise UserError, naming them, for rows that have no score under a similarity.

    These are rows with NaN or infinite entries, zero vectors under "cosine", and under the other
    similarities entries so large that a score could overflow.
    """
    limits = np.finfo(np.float32)
    cosine = similarity == "cosine"
    most = np.inf if cosine else np.sqrt(limits.max / (4 * rows.width))
    faults: dict[str, list[np.ndarray]] = {}
    step = max(1, _CHUNK_BYTES // (4 * rows.width))
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # of float64 that float32 cannot hold
            part = np.asarray(rows.values[start : start + step], np.float32)
        largest = np.abs(part).max(axis=1)
        finite = np.isfinite(largest)
        for fault, wrong in (
            ("NaN or infinite entries", ~finite),
            ("entries whose scores could overflow", finite & (largest > most)),
            ("only zeros, whose cosine is not defined,", (largest < limits.tiny) & cosine),
        ):
            if wrong.any():
                faults.setdefault(fault, []).append(start + np.flatnonzero(wrong))
    for fault, parts in faults.items():
        raise UserError(f"{rows.name} has {fault} in {named('row', np.concatenate(parts))}")


def check_widths(first: Rows, second: Rows) -> None:
    """Raise UserError unless both have the same width."""
    if first.width != second.width:
        raise UserError(
            f"{first.name} has width {first.width} and {second.name} {second.width}; similarities "
            "need the same width: project the wider one"
        )


def _collect(name: str, source: Blocks, memory: int) -> np.ndarray:
    shape = len(source), source.width
    if 4 * shape[0] * shape[1] <= memory:
        values = np.empty(shape, np.float32)
    else:
        with tempfile.TemporaryFile() as file:  # gone with the map
            values = np.memmap(file, np.float32, "w+", shape=shape)
    step = max(1, min(1024, _CHUNK_BYTES // (4 * max(1, shape[1]))))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = np.asarray(source.block(start, stop))
        if block.shape != (stop - start, shape[1]):
            raise UserError(
                f"{name} gave a block of shape {block.shape} for its rows {start} to {stop} of "
                f"width {shape[1]}"
            )
        values[start:stop] = block
    return values

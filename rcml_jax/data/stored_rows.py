"""Rows that are slow to compute, kept in a memory-mapped `.npy` as they come."""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from rcml_jax.errors import UserError

_STEP = 1024
_SECONDS = 10.0


class _Blocks(Protocol):
    shape: tuple[int, ...]
    dtype: type

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> np.ndarray: ...


def stored_rows(
    path: pathlib.Path, blocks: _Blocks, *, log: Callable[[str], None] | None = None
) -> np.ndarray:
    """The rows of `blocks`, (n, *shape), mapped read-only from an `.npy` file.

    What the file lacks is computed, once, in steps; killed in the middle, the next call goes on
    after the last whole step. `log` is told now and then how far it is. Raises UserError where the
    file cannot be written.
    """
    if path.is_file():
        return np.load(path, mmap_mode="r")
    part, done = path.with_name(path.name + ".part"), path.with_name(path.name + ".rows")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = int(done.read_text()) if done.is_file() and part.is_file() else 0
        options = {"mode": "r+"} if start else _new(blocks)
        values = np.lib.format.open_memmap(part, **options)
        told = time.monotonic()
        for first in range(start, len(blocks), _STEP):
            last = min(first + _STEP, len(blocks))
            values[first:last] = blocks.block(first, last)
            values.flush()
            done.write_text(str(last))
            if log and time.monotonic() - told > _SECONDS:
                log(f"{path.stem}: {last:,} of {len(blocks):,} rows")
                told = time.monotonic()
        del values
        os.replace(part, path)
        done.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, then start the same "
            "command again to go on"
        ) from error
    return np.load(path, mmap_mode="r")


def _new(blocks: _Blocks) -> dict:
    return {"mode": "w+", "dtype": blocks.dtype, "shape": (len(blocks), *blocks.shape)}

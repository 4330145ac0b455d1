"""The stages of a long preparation: finished results that are kept, and where they are made.

Results are files that are whole or not there; one that is there is not made again, so a preparation
that was killed goes on where it was.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rcml_jax import files
from rcml_jax.errors import UserError
from rcml_jax.log import Progress
from rcml_jax.parsing import ARRAY_ERRORS

Arrays = dict[str, np.ndarray]


class Stages:
    """A folder of results, each named by what it was made from; nothing in it is ever unpickled.

    A result whose file is missing or damaged is made anew. Results of other inputs or options lie
    beside it and may be deleted.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, name: str, key: Any, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of stage `name`; `compute` runs if there are none for this `key` (JSON).

        Raises:
          UserError: the disk is full or cannot be written.
        """
        path = self._folder / f"{name}-{digest(key)[:16]}.npz"
        arrays = load_arrays(path)
        if arrays is None:
            arrays = compute()
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                save_arrays(path, arrays)
        return arrays


def digest(key: Any) -> str:
    """A name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def file_state(path: Path) -> list:
    """What changes when a file does: its name, size and time."""
    state = path.stat()
    return [path.name, state.st_size, state.st_mtime_ns]


def pack(value: Any) -> np.ndarray:
    """Strings, numbers, lists and dictionaries of them as an array of bytes, for a stage."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpack(array: np.ndarray) -> Any:
    """What `pack` was given."""
    return json.loads(array.tobytes())


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError of writing below `folder` into a UserError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No room is left on the disk of {folder}; free some and run the same command "
                "again, which goes on from what is there, or set data.dir (or --workdir, if it is "
                "there) to another disk."
            ) from error
        raise UserError(
            f"{folder} cannot be written ({error}); set data.dir (or --workdir, if it is there) to "
            "a folder that can."
        ) from error


def load_arrays(path: Path) -> Arrays | None:
    """The arrays of a `.npz` file; None where it is missing or damaged."""
    try:
        # Opened here: of a damaged file NumPy would leave its own handle open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ARRAY_ERRORS:
        return None


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a `.npz` file whole or not at all, whatever other processes do."""
    with files.atomic_file(path, shared=True) as file:
        values: dict[str, Any] = arrays  # or `allow_pickle` might be one of them
        np.savez(file, **values)


# Rows that are slow to compute, kept in a memory-mapped `.npy` as they come.


_STEP, _STEP_BYTES = 1024, 64 * 2**20  # rows computed at a time, and their size


class _Blocks(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> np.ndarray: ...


def stored_rows(
    path: pathlib.Path, blocks: _Blocks, *, log: Callable[[str], None] | None = None
) -> np.ndarray:
    """The rows of `blocks`, (n, *shape), mapped read-only from an `.npy` file.

    What the file lacks is computed, once, in steps; killed in the middle, the next call goes on
    after the last whole step. Another process that wants the same file waits for it. `log` is told
    now and then how far it is. Raises UserError where the file cannot be written, or is damaged.
    """
    if path.is_file():
        return _mapped(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock")
        with files.exclusive(lock, f"is writing {path}", wait=True, log=log):
            if not path.is_file():
                _write_rows(path, blocks, log)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, then start the same "
            "command again to go on"
        ) from error
    return _mapped(path)


class MappedRows:
    """The rows of an `.npy` file as plain arrays; a pickled copy maps the file again."""

    def __init__(self, path: Path):
        # The plain array: of a memmap every result would be one, too.
        self._path, self._rows = path, np.asarray(_mapped(path))

    def __getitem__(self, rows: Any) -> Any:
        return self._rows[rows]

    def __reduce__(self) -> tuple:
        return MappedRows, (self._path,)


def mapped_rows(
    path: pathlib.Path, blocks: _Blocks, *, log: Callable[[str], None] | None = None
) -> MappedRows:
    """As `stored_rows`, for an owner that is copied into other processes."""
    stored_rows(path, blocks, log=log)
    return MappedRows(path)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made anew") from error


def _write_rows(path: Path, blocks: _Blocks, log: Callable[[str], None] | None) -> None:
    """Write what `<path>.part` lacks; `<path>.rows` holds the number of its rows."""
    part, done = path.with_name(path.name + ".part"), path.with_name(path.name + ".rows")
    start = int(done.read_text()) if done.is_file() and part.is_file() else 0
    shape, dtype = (len(blocks), *blocks.shape), np.dtype(blocks.dtype)
    row_bytes = math.prod(blocks.shape) * dtype.itemsize
    step = min(_STEP, max(1, _STEP_BYTES // max(1, row_bytes)))
    # By ordinary calls: where the disk is full a write to a map would kill the process.
    with part.open("r+b" if start else "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        file.seek(start * row_bytes, os.SEEK_CUR)
        told = Progress(
            len(blocks),
            done=start,
            count=lambda n, total: f"{path.stem}: {n:,} of {total:,} rows",
            unit="rows",
            log=log or (lambda _: None),
        )
        with told as progress:
            for first in range(start, len(blocks), step):
                last = min(first + step, len(blocks))
                file.write(np.ascontiguousarray(blocks.block(first, last), dtype))
                file.flush()
                os.fsync(file.fileno())
                with files.atomic_file(done) as count:
                    count.write(str(last).encode())
                progress.update(last)
    os.replace(part, path)
    done.unlink(missing_ok=True)


# Parts of a preparation: ranges of items whose result is one file each. They run in this process,
# in several, or as an Apache Beam pipeline; the result does not depend on where.


#: The file of a part, and what gives the arrays that it is made from.
Part = tuple[Path, Callable[[], Arrays]]
_FEWEST, _MOST, _PARTS = 256, 16_384, 64


def ranges(count: int) -> list[tuple[int, int]]:
    """Start and stop of the ranges of `count` items, a function of that number alone.

    About 64 of them, but each of 256 to 16,384 items (the last may have fewer).
    """
    size = min(max(-(-count // _PARTS), _FEWEST), _MOST)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Where the parts of a preparation run.

    workers: number of processes; 1: this one. beam: options of a Beam pipeline in one string, such
    as `--runner=DirectRunner`; empty: no Beam.
    """

    workers: int = 1
    beam: str = ""

    @classmethod
    def from_config(cls, data: Any) -> "Runner":
        """The runner of `config.data`: `prepare_workers` and `beam`."""
        return cls(data.get("prepare_workers", 1), data.get("beam", ""))

    @property
    def elsewhere(self) -> bool:
        """Whether parts run in other processes than this one."""
        return self.workers > 1 or bool(self.beam)

    def run(self, function: Callable[[Path, Arrays], None], parts: Iterable[Part]) -> None:
        """Call `function(path, arrays())` for every part whose file is missing.

        The function writes the file whole or not at all. What it raises is raised here, of several
        failures the first in the order of the parts.

        Raises:
          UserError: the function cannot be sent to other processes, Beam is missing or its options
            are wrong, a process was killed, or a file of a pipeline is not to be seen from here.
        """
        if self.elsewhere:
            _check_sendable(function)
        missing = [part for part in parts if not part[0].exists()]
        if self.beam:
            _run_pipeline(function, missing, self.beam)
        elif self.workers > 1 and len(missing) > 1:
            _run_processes(function, missing, self.workers)
        else:
            for path, arrays in missing:
                function(path, arrays())


#: Everything in this process.
HERE = Runner()


def _check_sendable(function: Callable) -> None:
    try:
        ForkingPickler.dumps(function)
    except Exception as error:  # of many kinds
        raise UserError(
            f"The images of this source cannot be prepared by other processes ({error}); set "
            "config.data.prepare_workers=1 and config.data.beam=''."
        ) from error


def _run_processes(
    function: Callable[[Path, Arrays], None], parts: Sequence[Part], workers: int
) -> None:
    workers = min(workers, len(parts))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    waiting: collections.deque[Future] = collections.deque()
    try:
        for path, arrays in parts:
            waiting.append(pool.submit(function, path, arrays()))
            if len(waiting) > 2 * workers:  # the arrays of all would take much memory
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A process of the preparation was killed, perhaps for lack of memory; start the same "
            "command again, which goes on from what is there, with a lower "
            "config.data.prepare_workers."
        ) from error
    except BaseException:  # a part may take minutes: do not wait for those that run
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Beam: arrays go through files, as the graph of a job has to be small.


def _run_pipeline(
    function: Callable[[Path, Arrays], None], parts: Sequence[Part], options: str
) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            'config.data.beam needs Apache Beam: pip install "rcml_jax[beam]"'
        ) from error
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
    except (ValueError, ImportError, SystemExit) as error:  # argparse exits
        raise UserError(f"config.data.beam={options!r} is refused by Beam ({error})") from error
    for path, arrays in parts:
        _beside(path, "error").unlink(missing_ok=True)
        save_arrays(_beside(path, "npz"), arrays())
    if parts:
        with pipeline:
            _ = (
                pipeline
                | "Ranges" >> beam.Create([str(path) for path, _ in parts])
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.Map(functools.partial(_run_task, function))
            )
    for path, _ in parts:
        if (told := _beside(path, "error")).is_file():
            raise UserError(told.read_text("utf-8"))
        if not path.exists():
            raise UserError(
                f"The Beam pipeline has ended, but {path} is not there; data.dir must be storage "
                "that this machine and every worker see under one path."
            )
        _beside(path, "npz").unlink(missing_ok=True)


def _run_task(function: Callable[[Path, Arrays], None], file: str) -> None:
    """Run one part with the arrays beside its file; the sentence of a UserError is written there.

    Raises OSError where the arrays are not to be seen.
    """
    path = Path(file)
    if path.exists():  # Beam starts a bundle of tasks anew when one of them fails
        return
    arrays = load_arrays(_beside(path, "npz"))
    if arrays is None:
        raise OSError(f"{_beside(path, 'npz')} is not there, or is damaged")
    try:
        function(path, arrays)
    except UserError as error:
        with files.atomic_file(_beside(path, "error"), shared=True) as out:
            out.write(str(error).encode())


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")

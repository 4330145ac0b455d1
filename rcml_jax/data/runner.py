"""Runs the parts of a preparation: in this process, in several, or as an Apache Beam pipeline.

A part is a range of items whose result is one file. A file that is there is not made again, so a
preparation that was killed goes on where it was. The result does not depend on the runner.
"""

import collections
import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rcml_jax.errors import UserError
from rcml_jax.files import atomic_file

#: The file of a part, and a function that returns what else the part's function takes.
Part = tuple[Path, Callable[[], tuple]]
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
    as `--runner=DirectRunner`; empty: no Beam. Functions and arguments must be picklable unless
    everything runs in this process.
    """

    workers: int = 1
    beam: str = ""

    @classmethod
    def from_config(cls, data: Any) -> "Runner":
        """The runner of `config.data`: `prepare_workers` and `beam`."""
        return cls(data.get("prepare_workers", 1), data.get("beam", ""))

    @property
    def copies(self) -> bool:
        """Whether parts may run in other processes, so that they have to be picklable."""
        return self.workers > 1 or bool(self.beam)

    def run(self, function: Callable[..., None], parts: Iterable[Part]) -> None:
        """Call `function(path, *arguments())` for every part whose file is missing.

        The function writes the file whole or not at all. What it raises is raised here, of several
        failures the first in the order of the parts.

        Raises:
          UserError: Beam is missing or its options are wrong, a process was killed, or a file of
            a pipeline is not to be seen from here.
        """
        missing = [part for part in parts if not part[0].exists()]
        if self.beam:
            _run_pipeline(function, missing, self.beam)
        elif self.workers > 1 and len(missing) > 1:
            _run_processes(function, missing, self.workers)
        else:
            for path, arguments in missing:
                function(path, *arguments())


#: Everything in this process.
HERE = Runner()


def _run_processes(function: Callable[..., None], parts: Sequence[Part], workers: int) -> None:
    workers = min(workers, len(parts))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    waiting: collections.deque[Future] = collections.deque()
    try:
        for path, arguments in parts:
            waiting.append(pool.submit(function, path, *arguments()))
            if len(waiting) > 2 * workers:  # the arguments of all would take much memory
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


# Beam: the function and its arguments go through files, as the graph of a job has to be small.


def _run_pipeline(function: Callable[..., None], parts: Sequence[Part], options: str) -> None:
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
    tasks = []
    for path, arguments in parts:
        content = pickle.dumps((function, arguments()))
        _beside(path, "error").unlink(missing_ok=True)
        with atomic_file(_beside(path, "task")) as file:
            file.write(content)
        tasks.append((str(path), hashlib.sha256(content).hexdigest()))
    if tasks:
        with pipeline:
            _ = (
                pipeline
                | "Ranges" >> beam.Create(tasks)
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.Map(_run_task)
            )
    for path, _ in parts:
        if (told := _beside(path, "error")).is_file():
            raise UserError(told.read_text("utf-8"))
        if not path.exists():
            raise UserError(
                f"The Beam pipeline has ended, but {path} is not there; data.dir must be storage "
                "that this machine and every worker see under one path."
            )
        _beside(path, "task").unlink(missing_ok=True)


def _run_task(task: tuple[str, str]) -> None:
    """Run one part from its file; the sentence of a UserError is written beside it."""
    path, digest = Path(task[0]), task[1]
    content = _beside(path, "task").read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise OSError(f"{path}.task is not what was written")
    function, arguments = pickle.loads(content)
    try:
        function(path, *arguments)
    except UserError as error:
        with atomic_file(_beside(path, "error"), shared=True) as file:
            file.write(str(error).encode())


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")

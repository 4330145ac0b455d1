"""How much of a training run is outside of the compiled step?

    python -m benchmarks.profile
    python -m benchmarks.profile --config configs/rcml.py:grocery --config.log_every=5

The loop itself, `rcml_jax.training.loop`, on a configuration's own data: the sampler, collation,
transfers, metrics and checkpoints are those of a run, only the validation is left out. Measured are

- idle time: a thread waits for the result of each step; from there until the next step has been
  dispatched nothing is computed. It is given as a share of the time from result to result.
- the work of the loop's thread by part, whether a step is computed meanwhile or not. All of it
  together is what a loop without any overlap would lose.
- rounds of the loop beside the same steps on the same batches, which are on the devices already.
  What reading ahead takes from the cores that compute is in here, too.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from rcml_jax.cli.commands import load_config_file, parse_flags
from rcml_jax.methods import build
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs

LIMIT = 0.03
LOOP, ALONE = "the loop", "its steps alone"
READ, PUT, DISPATCH, LOG, TAKE, SAVE = PARTS = ("read", "put", "dispatch", "log", "take", "save")
START = "start"  # of a round; the idle time before its first step is none of the loop's


@dataclasses.dataclass
class Step:
    """When a step had been dispatched and its result was there; what the loop did before it."""

    after: str
    dispatched: float
    ready: float = 0.0


class Clock:
    """Seconds of the parts of a loop, and its steps as a thread sees them end."""

    def __init__(self):
        self.running = False
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.steps: list[Step] = []
        self._queue: queue.Queue = queue.Queue()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done meanwhile."""
        start = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - start)

    def note(self, name: str, seconds: float) -> None:
        """Add to a part what was timed elsewhere."""
        if self.running:
            self.seconds[name].append(seconds)

    def dispatched(self, after: str, result: Any) -> None:
        """Note that a step has been given to the devices."""
        self._queue.put((Step(after, time.perf_counter()), result))

    def wait(self) -> None:
        """Wait until all of these steps have ended."""
        self._queue.join()

    def _watch(self) -> None:
        while True:
            step, result = self._queue.get()
            jax.block_until_ready(result)
            step.ready = time.perf_counter()
            self.steps.append(step)
            self._queue.task_done()


class Profiled(loop.Run):
    """A run that is measured in rounds of `size` steps after a round and a half to warm up.

    So what the loop does every `size` steps is in the middle of a round.
    """

    def __init__(self, clock: Clock, rounds: int, size: int, *args: Any):
        super().__init__(*args)
        self.clock, self.size = clock, size
        self._start, self._count = size + size // 2, rounds
        # The last step, after which a checkpoint is written in any case, is in no round.
        self.steps = self._start + rounds * size + 1
        self.rounds: dict[str, list[np.ndarray]] = {LOOP: [], ALONE: []}
        self._batches: list[Any] = []
        self._after, self._begin, self._compiled = START, np.zeros(2), 0
        self._fetching, self._taken = 0.0, False
        checkpoints: Any = self.checkpoints  # one of its methods is replaced
        self._start_save, checkpoints.start = checkpoints.start, self._save_taken

    @property
    def compilations(self) -> int:
        """How many forms of the step have been compiled since the warm-up."""
        return sum(step._cache_size() for _, step in self.phases) - self._compiled

    def step_at(self, step: int) -> Any:
        """The compiled step, which is noted."""
        if step >= self._start and (step - self._start) % self.size == 0:
            self._turn(step)
        compiled = super().step_at(step)

        def noted(state: Any, batch: Any) -> tuple:
            with self.clock.part(DISPATCH):
                state, metrics = compiled(state, batch)
            if self.clock.running:
                self._batches.append(batch)
                self.clock.dispatched(self._after, metrics)
            self._after = ""
            return state, metrics

        return noted

    def _turn(self, step: int) -> None:
        """End a round and replay it; begin the next one."""
        jax.block_until_ready(self.state)
        if self.clock.running:
            self.rounds[LOOP].append(_now() - self._begin)
            self.clock.wait()
            self.rounds[ALONE].append(self._replay(step - self.size))
        else:
            self._compiled = self.compilations
        self.clock.running = len(self.rounds[LOOP]) < self._count
        self._batches, self._after, self._begin = [], START, _now()

    def _replay(self, first: int) -> np.ndarray:
        """Wall-clock and processor seconds of a round's steps alone."""
        # Not the run's own state, which a step may use up.
        state = self.devices.put_state(jax.tree.map(lambda x: x.copy(), self._saved()))
        steps = [super(Profiled, self).step_at(first + i) for i in range(self.size)]
        jax.block_until_ready(state)
        begin = _now()
        for step, batch in zip(steps, self._batches, strict=True):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return _now() - begin

    def _fetch_metrics(self) -> None:
        # As it does itself: that is the step, and no work of the loop's own.
        jax.block_until_ready(self.pending[-1:])
        self._fetching = time.perf_counter()
        super()._fetch_metrics()

    def _log(self, step: int) -> None:
        super()._log(step)
        self.clock.note(LOG, time.perf_counter() - self._fetching)
        self._after = LOG

    def _save(self, *args: Any) -> None:
        with self.clock.part(TAKE):
            super()._save(*args)
        self._after, self._taken = TAKE, True

    def _save_taken(self) -> None:
        """Of the loop's calls, those that have something to save are its work."""
        taken, self._taken = self._taken, False
        if not taken:
            self._start_save()
            return
        with self.clock.part(SAVE):
            self._start_save()
        self._after = SAVE


class Reader:
    """A data iterator whose reading is timed."""

    def __init__(self, data: Any, clock: Clock):
        self._data, self._clock = data, clock
        self.get_state, self.set_state = data.get_state, data.set_state

    def __next__(self) -> Any:
        with self._clock.part(READ):
            return next(self._data)


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def profiled(config: Any, workdir: pathlib.Path, rounds: int, size: int) -> Profiled:
    """Train a configuration for some rounds in a new work directory, measured."""
    config.patience = 0
    workdirs.prepare(workdir, config)
    clock = Clock()
    # Some of their methods are replaced.
    method: Any = build(config, workdir)
    devices: Any = sharding.build(
        config.parallel,
        sharding.pick_devices(config.platform, config.devices),
        state_devices=config.get("fsdp_devices", 0),
    )
    batches, put = method.batches, devices.put_batch

    def putting(batch: Any) -> Any:
        with clock.part(PUT):
            return put(batch)

    measures: Any = 0.0
    for name in reversed(method.selection.split("/")):
        measures = {name: measures}
    method.batches = lambda: Reader(batches(), clock)
    method.validate = lambda params: measures
    devices.put_batch = putting
    run = Profiled(clock, rounds, size, config, workdir, method, devices)
    with loop.Interrupt() as interrupt:
        run.train(interrupt)
    return run


def times_of(steps: list[Step]) -> dict[str, np.ndarray]:
    """Of steps in order, by what the loop did before them: (n, 2) seconds from the result before.

    The first column is idle time, to the dispatch; the second is all of it, to the result.
    """
    times: dict[str, list] = {"": [], LOG: [], TAKE: [], SAVE: []}
    for before, step in itertools.pairwise(steps):
        if step.after != START:
            idle = max(0.0, step.dispatched - before.ready)
            times[step.after].append((idle, step.ready - before.ready))
    return {after: np.array(rows) for after, rows in times.items() if rows}


def summarise(run: Profiled) -> dict:
    """The figures: idle shares of steps, work by part, and the loop beside its steps alone."""
    kinds = times_of(run.clock.steps)
    kinds["all"] = np.concatenate(list(kinds.values()))
    plain = float(np.median(kinds[""][:, 1]))
    times = {name: np.array(rounds) for name, rounds in run.rounds.items()}
    steps = len(run.clock.steps)
    step = float(np.median(times[ALONE][:, 0])) / run.size
    work = {
        part: {
            "calls": len(seconds),
            "median": float(np.median(seconds)),
            "max": float(np.max(seconds)),
            "per_step": sum(seconds) / steps,
            "share": sum(seconds) / steps / step,
        }
        for part, seconds in run.clock.seconds.items()
        if seconds
    }
    return {
        "steps": steps,
        "seconds_per_step": step,
        "compilations": run.compilations,
        "idle": {name or "plain": _shares(rows, plain) for name, rows in kinds.items()},
        "work": work,
        "work_share": sum(row["share"] for row in work.values()),
        "ratio": timing.ratio(times, LOOP, ALONE, 1 / (1 - LIMIT)),
        "seconds": timing.summarise(times),
    }


def _shares(rows: np.ndarray, plain: float) -> dict:
    """The spread of idle shares, how many exceed the limit, and the time beside a plain step's."""
    values = rows[:, 0] / rows[:, 1]
    return {
        "steps": len(values),
        "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "above": int((values > LIMIT).sum()),
        "time": float(np.median(rows[:, 1])) / plain,
    }


def show(figures: dict) -> None:
    """Print the tables."""
    names = ("median", "p90", "max", "mean")
    columns = (*(f"{name} %" for name in names), f"above {100 * LIMIT:.0f} %", "time")
    print(f"\n{'idle before a step, of its time':<34}{'steps':>7}", end="")
    print("".join(f"{c:>11}" for c in columns))
    titles = {
        "plain": "a plain step",
        LOG: "after metrics",
        TAKE: "after a checkpoint was taken",
        SAVE: "after the step beside its saving",
    }
    for kind, row in figures["idle"].items():
        cells = [*(f"{100 * row[n]:.2f}" for n in names), row["above"], f"{row['time']:.3f}"]
        print(f"{titles.get(kind, 'all steps'):<34}{row['steps']:>7}", end="")
        print("".join(f"{c:>11}" for c in cells))
    columns = ("calls", "median", "max", "per step", "of a step %")
    print(f"\n{'work of the loop, ms':<40}" + "".join(f"{c:>12}" for c in columns))
    for part, row in figures["work"].items():
        cells = [f"{1e3 * row[name]:.2f}" for name in ("median", "max", "per_step")]
        cells = [row["calls"], *cells, f"{100 * row['share']:.2f}"]
        print(f"{part:<40}" + "".join(f"{c:>12}" for c in cells))
    print(f"{'all of it':<40}{100 * figures['work_share']:>60.2f}")
    print(f"\ncompilations after the warm-up: {figures['compilations']}")


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--config", default="configs/rcml.py", help="FILE.py[:ARGUMENT]")
    parser.add_argument("--steps", type=int, default=25, help="steps of a round (25)")
    args, overrides = parser.parse_known_args()
    config = parse_flags(overrides, load_config_file(args.config)).config
    run_of = " ".join([args.config, *overrides])
    machine = timing.start(f"{run_of}: {args.repeats} rounds of {args.steps} steps")
    # The thread that waits for results is to see them when they come.
    sys.setswitchinterval(1e-4)
    with tempfile.TemporaryDirectory() as directory:
        run = profiled(config, pathlib.Path(directory) / "run", args.repeats, args.steps)
    figures = summarise(run)
    show(figures)
    times = {name: np.array(rounds) for name, rounds in run.rounds.items()}
    timing.print_times(times, per=args.steps, unit="step")
    timing.print_ratios([figures["ratio"]])
    timing.write_json(args.json, {"machine": machine, "run": run_of, **figures})


if __name__ == "__main__":
    main()

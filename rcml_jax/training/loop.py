"""The training loop: steps, validation, checkpoints, early stopping, a clean end on a signal."""

import contextlib
import functools
import math
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from flax.errors import FlaxError

from rcml_jax.config import fold_seed
from rcml_jax.errors import UserError
from rcml_jax.log import Progress, log_line
from rcml_jax.methods import build as build_method
from rcml_jax.methods import method_class
from rcml_jax.methods.base import Method
from rcml_jax.parsing import user_path
from rcml_jax.registry import call, is_path
from rcml_jax.schema import validate
from rcml_jax.training import optimizer as optimizers
from rcml_jax.training import sharding
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import Checkpoints, read_params
from rcml_jax.training.gradcache import check, parts_of
from rcml_jax.training.step import create, make_step
from rcml_jax.training.writer import MetricsWriter, read_history

#: JAX_TRANSFER_GUARD is for the steps: what stands between them moves numbers as it needs to.
_HOST = jax.transfer_guard("allow")

# Batches on the devices, one ahead of the step, at the position of the batches that were taken.


class Prefetched(grain.DatasetIterator):
    """A grain iterator whose next batch may be on the devices already.

    data: the iterator over host batches; put: a host batch → one on the devices.

    `fetch` loads one batch ahead and starts its transfer; `next` takes it. The state is the point
    after the last batch that was taken, as if nothing had been read ahead, so that a checkpoint may
    be saved at any moment.
    """

    def __init__(self, data: grain.DatasetIterator, put: Callable[[Any], Any]):
        super().__init__()
        self._data, self._put = data, put
        self._ahead: Any = None  # (batch, what loading it raised)
        self._place: Any = None

    def fetch(self) -> None:
        """Load the next batch and start its transfer, unless that is done already.

        What is wrong with it is raised by `next`: the steps before it are no concern of it.
        """
        if self._ahead is not None:
            return
        self._place = self._data.get_state()
        try:
            self._ahead = self._put(next(self._data)), None
        except Exception as error:
            self._ahead = None, error

    def __next__(self) -> Any:
        """The next batch, on the devices. Raises what reading or putting it raised."""
        self.fetch()
        batch, error = self._ahead
        if error is not None:
            raise error
        self._ahead = self._place = None
        return batch

    def get_state(self) -> dict:
        """The position after the last batch that was taken."""
        return self._data.get_state() if self._ahead is None else self._place

    def set_state(self, state: dict) -> None:
        """Go to a position; batches loaded ahead are dropped."""
        self._ahead = self._place = None
        self._data.set_state(state)


class Interrupt:
    """While entered, SIGINT and SIGTERM set a flag instead of killing; a second SIGINT kills."""

    def __init__(self):
        self.asked = False
        self._before: dict = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train_and_evaluate(
    config: Any,
    workdir: pathlib.Path | str,
    *,
    after_step: Callable[[int | None], None] | None = None,
) -> dict | None:
    """Train as the configuration says, resuming what is there, and evaluate the best checkpoint.

    after_step: called after every step with the newest step of which a checkpoint is whole, or None
    while one is being written.

    Returns what is written to `eval.json`; None where a signal ended the run, whose next start goes
    on from there. Raises UserError for whatever a user can mend.
    """
    validate(config)
    devices = sharding.pick_devices(config.platform, config.devices)
    workdir = user_path(workdir)
    with _alone(workdir):
        config = _completed(config, workdir)
        workdir = _prepare(workdir, config)
        with jax.default_device(sharding.first_local(devices)):
            method = _build(config, workdir)
            with Interrupt() as interrupt:
                place = sharding.build(
                    config.parallel,
                    devices,
                    method.in_place,
                    method.split_shared,
                    config.get("fsdp_devices", 0),
                )
                run = Run(config, workdir, method, place, after_step)
                finished = run.train(interrupt)
            return _evaluate(config, workdir, "test", method) if finished else None


def evaluate_untrained(config: Any, workdir: pathlib.Path | str, split: str = "test") -> dict:
    """Evaluate a method without parameters; makes the work directory.

    Writes what `evaluate` does. Raises UserError where the directory holds anything else.
    """
    validate(config)
    workdir = user_path(workdir)
    with _alone(workdir):
        return _evaluate(config, _prepare(workdir, config), split)


def evaluate(config: Any, workdir: pathlib.Path | str, split: str = "test") -> dict:
    """Evaluate the best checkpoint of a work directory.

    Writes `eval.json`, or `eval_<split>.json` for a split other than test. Raises UserError where
    there is no checkpoint, or one of another model, and while another process trains there: its
    best checkpoint may go at any time.
    """
    validate(config)
    workdir = user_path(workdir)
    with _alone(workdir) if workdir.is_dir() else contextlib.nullcontext():
        return _evaluate(config, workdir, split)


@_HOST
def _evaluate(config: Any, workdir: pathlib.Path, split: str, method: Method | None = None) -> dict:
    devices = sharding.of_process(sharding.pick_devices(config.platform))
    try:
        with jax.default_device(devices[0]):
            method = method or build_method(config, workdir)
            method.devices = devices[: config.get("devices", 0) or None]
            params = read_params(workdir, method.evaluated) if method.evaluated else {}
            params = jax.tree.map(jax.numpy.asarray, params)
            result = method.evaluate(params, split, read_history(workdir))
    except FlaxError as error:
        raise UserError(
            f"{workdir} holds the checkpoint of another model than its config.json describes; "
            "restore that file, or train anew in another --workdir"
        ) from error
    predictions = result.pop("predictions", None)
    result = workdirs.json_value(result)
    if sharding.is_primary():
        suffix = "" if split == "test" else f"_{split}"
        workdirs.write_json(workdir / f"eval{suffix}.json", result)
        if predictions is not None:
            workdirs.write_arrays(workdir / f"predictions{suffix}.npz", predictions)
    return result


def _completed(config: Any, workdir: pathlib.Path) -> Any:
    """The configuration with what the method reads from checkpoints.

    A run of a version that did not read it goes on without.
    """
    begun = (workdir / "config.json").is_file()
    saved = workdirs.load_config(workdir) if begun else config
    model = config.get("model", {})
    if "preprocessing" in model and "preprocessing" not in saved.get("model", {}):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            del config.model.preprocessing
    return method_class(config.method).completed(config)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path | str) -> Iterator[None]:
    """Hold a work directory; of the processes of one run the primary does it for all."""
    with contextlib.ExitStack() as stack:
        refused = None
        if sharding.is_primary():
            try:
                stack.enter_context(workdirs.hold(workdir))
            except UserError as error:
                refused = error
        # The others would wait for a primary that has ended.
        if sharding.any_process(refused is not None):
            raise refused or UserError(f"process 0 cannot use {workdir}; see its message")
        yield


def _prepare(workdir: pathlib.Path, config: Any) -> pathlib.Path:
    """The primary process makes the work directory; then all check it."""
    if sharding.is_primary():
        workdirs.prepare(workdir, config)
    sharding.wait_for_all("work directory")
    return workdirs.prepare(workdir, config)


@_HOST
def _build(config: Any, workdir: pathlib.Path) -> Method:
    """The primary process makes what all share on the disk, as a tokenizer; then the others."""
    if sharding.is_primary():
        method = build_method(config, workdir)
    sharding.wait_for_all("data")
    return method if sharding.is_primary() else build_method(config, workdir)


class Run:
    """One run in a work directory; `train` may be called once."""

    @_HOST
    def __init__(
        self,
        config: Any,
        workdir: pathlib.Path,
        method: Method,
        devices: Any,
        after_step: Callable[[int | None], None] | None = None,
    ):
        self.config, self.workdir, self.method, self.devices = config, workdir, method, devices
        self.after_step = after_step
        self.steps, self.validate_every = method.steps, method.validate_every
        method.devices = sharding.of_process(devices.devices)
        method.split_shared = devices.split_shared
        several = jax.process_count() > 1
        source = method.batches(devices.local_rows) if several else method.batches()
        self.data = Prefetched(source, devices.put_batch)
        self.checkpoints = Checkpoints(workdir)
        # The counters of early stopping travel in the checkpoint.
        self.best, self.bad, self.stopped = -math.inf, 0, False
        # Metrics of the steps since the last line of metrics.jsonl: they travel in it, too.
        self.pending: list = []
        latest = self.checkpoints.latest()
        self.state, phases = self._first_state(source)
        if latest is not None:
            self.state, loop = self.checkpoints.restore(latest, self._saved(), self.data)
            self.state = self.devices.put_state(self.state)
            self.best, self.bad, self.stopped = loop["best"], loop["bad"], loop["stopped"]
            self.pending = loop["pending"]
        self.first = latest or 0
        self.writer = MetricsWriter(workdir, step=self.first, tensorboard=config.tensorboard)
        self.phases = [(first, devices.compile(step)) for first, step in phases]
        self.progress = Progress(
            self.steps,
            done=self.first,
            count=lambda step, steps: f"step {step}/{steps}",
            rate=lambda speed: f"{self.examples * speed:,.0f} examples/s",
            log=log_line if sharding.is_primary() else lambda line: None,
        )
        if latest is not None and not self._over(self.first):
            self.progress.note(f"resuming from step {latest}")

    def _first_state(self, source: Any) -> tuple[Any, Any]:
        """The state before the first step, by the first batch, and the step of each phase."""
        config = self.config
        init_key, run_key = jax.random.split(jax.random.key(fold_seed(config.seed)))
        place = source.get_state()
        batch = self._whole(next(source))
        rows, each = _rows(batch), self.method.examples_per_row
        count = len(self.devices.devices)
        if rows % count:
            raise UserError(
                f"a batch of {rows * each} examples cannot be split over {count} devices; make "
                f"config.batch.size a multiple of {each * count}, or lower config.devices"
            )
        accumulation = config.get("accumulation", "exact")
        micro_batch = config.get("micro_batch", 0)
        parts = parts_of(rows, micro_batch // each)
        gathered = count if config.parallel == "pmap" else 1
        check(accumulation, self.method, batch, parts, gathered)
        self.examples = rows * each
        source.set_state(place)
        params = self.method.init(init_key, batch)
        _check_loss(config.method, self.method, params, batch)
        if self.method.sources and self.checkpoints.latest() is None:
            found: dict = {}
            for other in map(user_path, self.method.sources):
                _check_tokenizer(self.workdir, other)  # before the checkpoint, which may be large
                found = self.method.joined(found, read_params(other))
            params = self.method.adopt(params, found)
        frozen = self.method.frozen(params)
        transform, self.rate = optimizers.build(
            config.optimizer,
            self.steps,
            frozen,
            self.method.decayed(params),
            self.method.absent,
        )
        phases = [
            (first, make_step(method, transform, self.steps, accumulation, parts))
            for first, method in self.method.phases()
        ]
        return self.devices.put_state(create(params, transform, run_key)), phases

    def _whole(self, batch: dict) -> dict:
        """A batch of this process's part with the shapes of the whole batch.

        Its first row, or column of `split_shared`, comes again. Nothing is copied.
        """
        if jax.process_count() == 1:
            return batch
        devices = self.devices.devices
        mine = len(sharding.of_process(devices))

        def whole(x: np.ndarray) -> np.ndarray:
            return np.broadcast_to(x[:1], (len(x) // mine * len(devices), *x.shape[1:]))

        split = self.devices.split_shared
        shared = {n: whole(x.T).T if n in split else x for n, x in batch["shared"].items()}
        return {"items": jax.tree.map(whole, batch["items"]), "shared": shared}

    def _saved(self) -> Any:
        return self.devices.get_state(self.state)

    def _over(self, step: int) -> bool:
        return self.stopped or step >= self.steps

    def train(self, interrupt: Interrupt) -> bool:
        """Step to the end, or to the step in which a signal came. True if the run is over."""
        step = self.first
        try:
            if self._over(step):
                return True
            asked = self._steps(step, interrupt)
            self.checkpoints.wait()
            return not asked or self.stopped
        finally:
            self.progress.close()
            self.writer.close()
            self.checkpoints.close()

    def _steps(self, step: int, interrupt: Interrupt) -> bool:
        """Whether a signal came; then everything up to it is saved."""
        config, asked = self.config, sharding.any_process(interrupt.asked)
        while not self._over(step) and not asked:
            self.state, metrics = self.step_at(step)(self.state, next(self.data))
            step += 1
            # While the devices compute, and before anything below waits for them.
            self.checkpoints.start()
            if step < self.steps:
                self.data.fetch()
            # One step may wait behind the one that runs: each of them holds its batch.
            self._fetch_metrics()
            self.pending.append(metrics)
            validate = step % self.validate_every == 0 or step == self.steps
            if step % config.log_every == 0 or step == self.first + 1 or validate:
                self._log(step)
            else:
                self.progress.update(step)
            if validate:
                self._validate(step)
            if self.after_step is not None:
                self.after_step(self.checkpoints.whole())
            asked = self._asked(step, interrupt)
        if asked and not self._over(step):
            self._log(step)
            self._save(step)
            self.progress.note(f"stopped after step {step}; start again to go on")
        return asked

    def _asked(self, step: int, interrupt: Interrupt) -> bool:
        """Whether to stop. Several processes agree on it where they wait for the metrics anyway.

        A signal reaches them in different steps, and the last checkpoint is written by all.
        """
        if jax.process_count() == 1:
            return interrupt.asked
        return step % self.config.log_every == 0 and sharding.any_process(interrupt.asked)

    def step_at(self, step: int) -> Any:
        """The compiled step of the phase that a step is in."""
        return next(compiled for first, compiled in reversed(self.phases) if step >= first)

    def _fetch_metrics(self) -> None:
        """Wait for the latest pending metrics; the others have been numbers since their turn."""
        self.pending[-1:] = jax.tree.map(_scalar, jax.device_get(self.pending[-1:]))

    @_HOST
    def _log(self, step: int) -> None:
        """Write the mean of the pending metrics; stop the run where a loss is not finite."""
        if not self.pending:
            return
        # Before the metrics are waited for.
        rate, scale = float(self.rate(step - 1)), optimizers.reduction(self.state.opt_state)
        self._fetch_metrics()
        mean = {name: float(np.mean([m[name] for m in self.pending])) for name in self.pending[0]}
        # A finite loss with such a gradient has ruined the parameters all the same.
        if not math.isfinite(mean["loss"] + mean["gradient_norm"]):
            norms = [m["loss"] + m["gradient_norm"] for m in self.pending]
            bad = next(i for i, norm in enumerate(norms) if not math.isfinite(norm))
            raise UserError(
                "the loss or its gradient is not finite at step "
                f"{step - len(self.pending) + bad + 1}; the last good checkpoint is kept: lower "
                "config.optimizer.learning_rate, or set config.optimizer.clip_norm, in a new "
                "--workdir"
            )
        self.progress.update(step, f"loss {mean['loss']:.4f}")
        if step % self.config.log_every == 0 or step == self.steps:
            rate *= _scalar(jax.device_get(scale))
            self.writer.write(step, "train", mean | {"learning_rate": rate})
            self.pending = []

    @_HOST
    def _validate(self, step: int) -> None:
        metrics = self.method.validate(self.devices.local(self.state.params))
        value: Any = metrics
        for name in self.method.selection.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise UserError(
                f"validate of config.method={self.config.method!r} returns no "
                f"{self.method.selection!r}, by which the best checkpoint is selected; add it"
            )
        self.writer.write(step, "validation", metrics)
        self.progress.note(f"step {step}  validation {self.method.selection} {value:.4f}")
        self.best, self.bad = (value, 0) if value > self.best else (self.best, self.bad + 1)
        patience = self.config.patience
        self.stopped = 0 < patience <= self.bad
        if self.stopped and step < self.steps:
            self.progress.note(f"no better for {patience} validations: stopping early")
        if self.config.optimizer.get("schedule") == "plateau":
            state = self._saved()
            opt_state = optimizers.observe(self.config.optimizer, state.opt_state, value)
            self.state = self.devices.put_state(state._replace(opt_state=opt_state))
        every = self.config.get("checkpoint_every", 0)
        if self.stopped or step == self.steps or not every or step % every == 0:
            self._save(step, value)

    @_HOST
    def _save(self, step: int, selection: float | None = None) -> None:
        """Take what a checkpoint holds; it is written while the next step runs, or at the end."""
        counters = {"best": self.best, "bad": self.bad, "stopped": self.stopped}
        loop = counters | {"pending": list(self.pending)}
        state = self.devices.snapshot(self.state)
        self.checkpoints.put_off(step, state, self.data, loop, selection)


def _check_tokenizer(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Raise UserError where another run's text tower has learned other tokens than this run's."""
    ours, theirs = workdir / "tokenizer.json", other / "tokenizer.json"
    if ours.is_file() and theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
        raise UserError(
            f"config.model.init_from: {other} splits texts into other tokens, which its tower has "
            "learned; name a run on the same data and with the same options of texts"
        )


def _check_loss(name: str, method: Method, params: Any, batch: dict) -> None:
    """Trace the loss of a method by its import path. Raises UserError where it is none."""
    if is_path(name):
        call(
            name,
            functools.partial(jax.eval_shape, method.loss),
            "config.method",
            "its loss takes (params, batch, key, progress) and returns a scalar and its terms",
            params,
            batch,
            jax.random.key(0),
            jax.numpy.float32(0),
            accepts=lambda found: isinstance(found, tuple) and len(found) == 2,
        )


def _rows(batch: dict) -> int:
    return len(jax.tree.leaves(batch["items"])[0])


def _scalar(x: Any) -> float:
    """A metric of one device, or the first of equal ones."""
    return float(np.ravel(x)[0])

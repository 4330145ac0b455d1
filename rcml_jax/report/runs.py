"""Read runs, sweeps and alignment studies from directories; open and time their models."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.methods import EMBEDDINGS, METHODS, build, family_of
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.report.page import LeftOutError
from rcml_jax.training import sharding
from rcml_jax.training.checkpoint import read_params
from rcml_jax.training.workdir import leaves, load_config

_NEEDED = {
    "relational": ("retrieval", "relation_type", "relation_validity", "protocol"),
    "classification": ("classification", "checkpoint", "protocol"),
    "alignment": ("precision", "modality_gap", "protocol"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The work directory of a run; `result` is its `eval.json`, None where there is none yet."""

    label: str
    path: pathlib.Path
    config: Any
    result: Any

    @property
    def family(self) -> str:
        """ "relational" or "classification"."""
        return family_of(self.config.method)

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str((self.result or {}).get("dataset", self.config.data.name))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A directory of `rcml-sweep`: variants by label, each with the runs of its seeds."""

    label: str
    path: pathlib.Path
    variants: Mapping[str, tuple[Run, ...]]

    @property
    def firsts(self) -> tuple[Run, ...]:
        """The first run of each variant."""
        return tuple(runs[0] for runs in self.variants.values())

    @property
    def family(self) -> str:
        """ "relational" or "classification"."""
        return self.firsts[0].family


@dataclasses.dataclass(frozen=True)
class Study:
    """A work directory of the alignment study."""

    label: str
    path: pathlib.Path
    result: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sources:
    """All inputs of a report, in the order of the command line."""

    runs: tuple[Run, ...]
    sweeps: tuple[Sweep, ...]
    studies: tuple[Study, ...]


def groups(sources: Sources, family: str) -> dict[str, tuple[list[Run], list[Sweep]]]:
    """Group the runs and sweeps of a family by their data set."""
    found: dict[str, tuple[list[Run], list[Sweep]]] = {}
    for run in sources.runs:
        if run.family == family:
            found.setdefault(run.dataset, ([], []))[0].append(run)
    for sweep in sources.sweeps:
        if sweep.family == family:
            found.setdefault(sweep.firsts[0].dataset, ([], []))[1].append(sweep)
    return found


def read_sources(paths: Sequence[pathlib.Path]) -> Sources:
    """Open work directories, sweeps and studies; a directory given twice counts once.

    Raises UserError for a directory that is none of them, or whose files are not whole.
    """
    if not paths:
        raise UserError("there is nothing to report on; give --workdir, once or several times")
    runs, sweeps, studies = [], [], []
    paths = list(dict.fromkeys(pathlib.Path(path) for path in paths))
    for path, label in zip(paths, labels_of(paths), strict=True):
        if not path.is_dir():
            raise UserError(f"there is no directory {path}; give the --workdir of a run or a sweep")
        if not (path / "config.json").is_file() and any(path.glob("*/seed*/config.json")):
            sweeps.append(_sweep(path, label))
            continue
        config = load_config(path)
        if config.method == "alignment":
            studies.append(_study(path, label))
        else:
            runs.append(_run(path, label, config))
    return Sources(tuple(runs), tuple(sweeps), tuple(studies))


def labels_of(paths: Sequence[pathlib.Path]) -> list[str]:
    """Short unique names of directories: as many of the last path parts as needed."""
    parts = [[part for part in path.absolute().parts if part != "/"] for path in paths]
    found = []
    for own in parts:
        others = [other for other in parts if other != own]
        depth = 1
        while depth < len(own) and _label(own, depth) in {_label(o, depth) for o in others}:
            depth += 1
        found.append(_label(own, depth))
    return found


def _label(parts: Sequence[str], depth: int) -> str:
    # "seed42" alone says nothing of a run of a sweep.
    depth += bool(re.fullmatch(r"seed\d+", parts[-1]))
    return ", ".join(part.replace("_", " ") for part in parts[-depth:])


def _run(path: pathlib.Path, label: str, config: Any) -> Run:
    family = family_of(config.method)
    if not family:
        raise UserError(
            f"{path} is of the method {config.method!r}, of which there are no figures; give runs "
            f"of {', '.join(METHODS)}, sweeps of them or alignment studies"
        )
    result = read_result(path)
    if result is not None:
        _check(path, result, config.method, family)
    return Run(label, path, config, result)


def _sweep(path: pathlib.Path, label: str) -> Sweep:
    names = _variant_names(path)
    variants: dict[str, list[Run]] = {}
    for config in sorted(path.glob("*/seed*/config.json"), key=_by_seed):
        directory = config.parent
        folder = directory.parent.name
        name = names.get(folder, folder.replace("_", " "))
        run = _run(directory, f"{name}, {directory.name}", load_config(directory))
        if run.result is not None:
            variants.setdefault(name, []).append(run)
    if not variants:
        raise UserError(f"no run of the sweep {path} is finished; start the sweep again to go on")
    order = [name for name in names.values() if name in variants]
    order += [name for name in variants if name not in order]
    families = {run.family for runs in variants.values() for run in runs}
    if len(families) > 1:
        raise UserError(f"{path} mixes runs of {' and '.join(sorted(families))}; report on each")
    return Sweep(label, path, {name: tuple(variants[name]) for name in order})


def _by_seed(path: pathlib.Path) -> tuple:
    number = re.sub(r"\D", "", path.parent.name)
    return path.parent.parent.name, int(number or 0)


def _variant_names(path: pathlib.Path) -> dict[str, str]:
    """Folder → label of a sweep's variants, in the order of its table."""
    if (path / "variants.json").is_file():
        listed = read_json(path / "variants.json", "start the sweep again")
        return {folder: entry["variant"] for folder, entry in listed.items()}
    if not (path / "table.json").is_file():
        return {}
    table = read_json(path / "table.json", "start the sweep again")
    rows = table.get("rows", []) if isinstance(table, dict) else table
    labels = [row["variant"] for row in rows if isinstance(row, dict) and "variant" in row]
    found = {}
    for label in labels:
        for folder in (label, label.replace(" ", "_")):
            if (path / folder).is_dir():
                found[folder] = label
    return found


def _study(path: pathlib.Path, label: str) -> Study:
    result = read_result(path)
    if result is None:
        raise UserError(
            f"{path} holds no eval.json, so the study is not finished; start it again: "
            f"rcml-eval --workdir {path}"
        )
    _check(path, result, "alignment", "alignment")
    return Study(label, path, result)


def read_result(path: pathlib.Path) -> dict | None:
    """Read `eval.json` of a work directory; None if missing. Raises UserError if it is damaged."""
    file = path / "eval.json"
    if not file.is_file():
        return None
    again = f"evaluate again: rcml-eval --workdir {path}"
    result = read_json(file, again)
    if not isinstance(result, dict):
        raise UserError(f"{file} holds no evaluation; {again}")
    return result


def read_json(path: pathlib.Path, remedy: str) -> Any:
    """Read a JSON file. Raises UserError, with the remedy, if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error


def _check(path: pathlib.Path, result: Mapping, method: str, family: str) -> None:
    again = f"evaluate again: rcml-eval --workdir {path}"
    if result.get("method") != method:
        raise UserError(
            f"{path} was trained by {method}, but its eval.json is of {result.get('method')!r}; "
            f"{again}"
        )
    left_out = result.get("left_out", {})  # what a file of embeddings cannot answer
    missing = [name for name in _NEEDED[family] if name not in result and name not in left_out]
    if missing:
        raise UserError(f"{path / 'eval.json'} lacks {', '.join(missing)}; {again}")


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Options in which runs differ: dotted name → value for each run, None if unset."""
    flat = [leaves(run.config.to_dict()) for run in runs]
    names = dict.fromkeys(name for options in flat for name in options)
    found = {name: [options.get(name) for options in flat] for name in names}
    return {name: row for name, row in found.items() if any(value != row[0] for value in row)}


# Trained models of work directories, opened once each for all the figures that need one.


class Opened(NamedTuple):
    """A run's method with its data, and the parameters of the checkpoint that was evaluated."""

    run: Run
    method: Any
    params: Any


class Models:
    """Opens runs on demand and keeps the last few.

    data_dir, data_path: if given, replace `config.data.dir` and `config.data.path` of every run.
    """

    def __init__(self, data_dir: str = "", data_path: str = "", keep: int = 4):
        self._options = {"dir": data_dir, "path": data_path}
        self._keep = keep
        self._opened: dict[pathlib.Path, Opened | LeftOutError] = {}

    def open(self, run: Run) -> Opened:
        """Open a run's model. Raises LeftOutError, with the reason, if that fails."""
        if run.path not in self._opened:
            while len(self._opened) >= self._keep:
                del self._opened[next(iter(self._opened))]
            self._opened[run.path] = self._try(run)
        found = self._opened[run.path]
        if isinstance(found, LeftOutError):
            raise found
        return found

    def _try(self, run: Run) -> Opened | LeftOutError:
        if run.config.method == EMBEDDINGS:
            return LeftOutError(f"{run.label} is of a file of embeddings and has no model")
        if not (run.path / "checkpoints").is_dir():  # building a model would write a tokenizer
            return LeftOutError(f"the model of {run.label} cannot be opened: it has no checkpoints")
        config = run.config.copy_and_resolve_references()
        for name, value in self._options.items():
            if value:
                config.data[name] = value
        try:
            with on_device(config):
                method = build(config, run.path)
                params = read_params(run.path, method.evaluated)
                return Opened(run, method, jax.tree.map(jax.numpy.asarray, params))
        except UserError as error:
            return LeftOutError(f"the model of {run.label} cannot be opened: {error}")


def on_device(config: Any) -> contextlib.AbstractContextManager[None]:
    """Compute on the platform that the configuration names."""
    return sharding.working_on(sharding.first_local(sharding.pick_devices(config.platform)))


# Latency and parameters of the relational methods, measured when a report is made.


BATCH, REPEATS, RELATIONS = 64, 15, 10


class _Row(NamedTuple):
    """One way to embed: its call, its parameters (those trained: NaN if no run), and its setting.

    Rows of one setting have towers and inputs of the same shapes.
    """

    name: str
    method: str
    call: Callable[[], Any]
    used: float
    trained: float
    setting: Any


def cost(runs: Sequence[Opened]) -> dict[str, Any]:
    """Columns model, method, used, trained, milliseconds, fastest, slowest, relative and more.

    A sample is one item, text and image; a call embeds a batch of test items with the run's method.
    Times are per sample: median, fastest and slowest call. RCML embeds under one relation and under
    several; its call includes encoding their sentences. Calls alternate, so that a slow moment
    affects all of them. used: parameters that embed; trained: those that training
    changes, also where only the loss uses them. relative: median ratio to the time in the same turn
    of the towers alone, which are a baseline's, or RCML's with CLIP's pooling without a baseline.
    """
    rows = [row for opened in runs for row in _rows(opened)]
    plain = [row.setting for row in rows if row.method not in ("rcml", "")]
    rows = [row for row in rows if row.method or row.setting not in plain]
    times = measure({place: row.call for place, row in enumerate(rows)}, REPEATS)
    per_sample = [1e3 * times[place] / BATCH for place in range(len(rows))]
    alone: dict[Any, np.ndarray] = {}
    for row, value in zip(rows, per_sample, strict=True):
        if row.method != "rcml":
            alone.setdefault(row.setting, value)
    return {
        "model": [row.name for row in rows],
        "method": [row.method or "towers alone" for row in rows],
        "used": [row.used for row in rows],
        "trained": [row.trained for row in rows],
        "milliseconds": [float(np.median(x)) for x in per_sample],
        "fastest": [float(np.min(x)) for x in per_sample],
        "slowest": [float(np.max(x)) for x in per_sample],
        "relative": [
            float(np.median(x / alone[row.setting]))
            for row, x in zip(rows, per_sample, strict=True)
        ],
        "batch": [BATCH] * len(rows),
        "repeats": [REPEATS] * len(rows),
        "machine": [machine()] * len(rows),
    }


def _rows(opened: Opened) -> Iterator[_Row]:
    """Ways to embed one batch of test items; `method` is empty for RCML's towers alone."""
    method, task, params = opened.method, opened.method.task, opened.params
    label, name = opened.run.label, opened.run.config.method
    items = np.resize(task.splits.items("test"), BATCH)
    ids = jnp.asarray(task.encode([task.graph.texts[i] for i in items]))
    pixels = jnp.asarray(task.images(items))
    shapes = jax.tree.map(jnp.shape, (params["towers"], ids, pixels))
    setting = repr((str(method.dtype), shapes))
    towers, trained = parameters(params["towers"]), trained_parameters(method, params)
    if not hasattr(type(method.model), "pool_text"):
        embed = jax.jit(lambda p, *inputs: method.model.apply({"params": p}, *inputs))
        call = functools.partial(embed, params["towers"], ids, pixels)
        yield _Row(label, name, call, towers, trained, setting)
        return

    def own(module: Any, ids: jax.Array, pixels: jax.Array) -> tuple:
        states = module.towers.text_states(ids), module.towers.image_states(pixels)
        return tuple(l2_normalize(x.pooled) for x in states)

    variables = {"params": {name: params[name] for name in ("towers", "head")}}
    alone = jax.jit(lambda *inputs: method.model.apply(*inputs, method=own))
    call = functools.partial(alone, variables, ids, pixels)
    yield _Row(f"{label}, CLIP's pooling", "", call, towers, np.nan, setting)
    embed, used = jax.jit(method.model.apply), parameters(variables)
    for count in sorted({1, min(RELATIONS, len(task.sentences))}):
        relation = jnp.asarray(task.encode(task.sentences[:count]))
        call = functools.partial(embed, variables, relation, ids, pixels)
        said = f"{label}, {count} relation{'s' * (count > 1)}"
        yield _Row(said, name, call, used, trained, setting)


def measure(functions: Mapping[Any, Callable], repeats: int) -> dict[Any, np.ndarray]:
    """Seconds (repeats,) of each function, called alternately after a first call that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in times.items()}


def parameters(tree: Any) -> int:
    """The number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def trained_parameters(method: Any, params: Any) -> int:
    """Number of trained parameters: all but frozen towers and statistics."""
    frozen = jax.tree.leaves(method.frozen(params))
    leaves = jax.tree.leaves(params)
    return sum(int(np.size(x)) for x, f in zip(leaves, frozen, strict=True) if not f)


def machine() -> str:
    """Name of the device; of a CPU its architecture and number of usable cores."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} core{'s' * (cores != 1)}"

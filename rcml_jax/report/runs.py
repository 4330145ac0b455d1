"""What a report is made of: runs, sweeps of runs and alignment studies, read from directories."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from rcml_jax.errors import UserError
from rcml_jax.methods import EMBEDDINGS, METHODS, build, family_of
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
    result: Mapping[str, Any] | None

    @property
    def family(self) -> str:
        """ "relational" or "classification"."""
        return family_of(self.config.method)

    @property
    def dataset(self) -> str:
        """The name of its data."""
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
    """Everything that a report is given, in the order of the command line."""

    runs: tuple[Run, ...]
    sweeps: tuple[Sweep, ...]
    studies: tuple[Study, ...]


def groups(sources: Sources, family: str) -> dict[str, tuple[list[Run], list[Sweep]]]:
    """The runs and sweeps of a family by the name of their data."""
    found: dict[str, tuple[list[Run], list[Sweep]]] = {}
    for run in sources.runs:
        if run.family == family:
            found.setdefault(run.dataset, ([], []))[0].append(run)
    for sweep in sources.sweeps:
        if sweep.family == family:
            found.setdefault(sweep.firsts[0].dataset, ([], []))[1].append(sweep)
    return found


def read_sources(paths: Sequence[pathlib.Path]) -> Sources:
    """Open work directories, sweeps and studies; a directory that is named twice counts once.

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
    """Short names of directories: the last parts of each that tell it from the others."""
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
    """The `eval.json` of a work directory; None without one. Raises UserError where it is cut."""
    file = path / "eval.json"
    if not file.is_file():
        return None
    again = f"evaluate again: rcml-eval --workdir {path}"
    result = read_json(file, again)
    if not isinstance(result, dict):
        raise UserError(f"{file} holds no evaluation; {again}")
    return result


def read_json(path: pathlib.Path, remedy: str) -> Any:
    """A JSON file's value. Raises UserError, with the remedy, where it is not whole."""
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
    """The options in which runs differ: dotted name → a value for each; None where it is unset."""
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
    """Opens runs when they are asked for, and keeps the last few.

    data_dir and data_path, where they are given, stand for `config.data.dir` and
    `config.data.path` of every run: data may lie elsewhere than where a run was trained.
    """

    def __init__(self, data_dir: str = "", data_path: str = "", keep: int = 4):
        self._options = {"dir": data_dir, "path": data_path}
        self._keep = keep
        self._opened: dict[pathlib.Path, Opened | LeftOutError] = {}

    def open(self, run: Run) -> Opened:
        """The run's model. Raises LeftOutError, with the reason, where it cannot be opened."""
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
        except (AttributeError, KeyError) as error:  # an option that its version did not have
            reason = str(error.args[0] if error.args else error).strip("\"'").splitlines()[0]
            return LeftOutError(
                f"the model of {run.label} cannot be opened: its config.json is of another version "
                f"of this library ({reason})"
            )


@contextlib.contextmanager
def on_device(config: Any) -> Iterator[None]:
    """Compute on the platform that the configuration names."""
    device = sharding.first_local(sharding.pick_devices(config.platform))
    with jax.default_device(device):
        yield

"""Trained models of work directories, opened once each for all the figures that need one."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from rcml_jax.errors import UserError
from rcml_jax.methods import EMBEDDINGS, build
from rcml_jax.report.arrays import LeftOutError
from rcml_jax.report.sources import Run
from rcml_jax.training import parallel
from rcml_jax.training.checkpoint import read_params


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
    device = parallel.first_local(parallel.pick_devices(config.platform))
    with jax.default_device(device):
        yield

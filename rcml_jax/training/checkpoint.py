"""Orbax checkpoints of the state, the data iterator's position and the loop's counters."""

import errno
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from rcml_jax import files
from rcml_jax.errors import UserError
from rcml_jax.training.workdir import LOCK

_METRIC = "selection"


class Checkpoints:
    """`<workdir>/checkpoints/<step>/`: the latest one, and the best by the selection measure."""

    def __init__(self, workdir: pathlib.Path):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._waiting: Callable[[], None] | None = None
        measure = lambda metrics: metrics[_METRIC]  # noqa: E731
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=measure,
                best_mode="max",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(1),
                        policies.BestN(
                            get_metric_fn=measure, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """The newest step there is a checkpoint of."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest selection measure; the newest of equal or unmeasured ones."""
        best = self._manager.best_step()
        return self.latest() if best is None else best

    def whole(self) -> int | None:
        """The newest step of which a checkpoint is whole; None while one is being written."""
        return None if self._manager.is_saving_in_progress() else self.latest()

    def put_off(
        self, step: int, state: Any, data: Any, loop: dict, selection: float | None = None
    ) -> None:
        """Take what a checkpoint holds now; `start`, `wait` or `close` has it written.

        state: arrays that must not be donated until then. data: the iterator, which may advance.
        loop: a JSON value that must not be changed.
        """
        self.start()
        place = data.get_state()
        self._waiting = functools.partial(self._save, step, state, place, loop, selection)

    def start(self) -> None:
        """Start to write the pending checkpoint, if there is one.

        Orbax needs host time, about a third of a millisecond per array of the state, so call this
        while the devices compute. Raises UserError if the disk is full.
        """
        save, self._waiting = self._waiting, None
        if save is not None:
            save()

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Start to write a checkpoint at once; the arguments are those of `put_off`."""
        self.put_off(*args, **kwargs)
        self.start()

    def _save(
        self, step: int, state: Any, place: dict, loop: dict, selection: float | None
    ) -> None:
        """Start to write a checkpoint; Orbax waits until the one before it is whole."""
        if step in self._manager.all_steps():
            return
        metrics = None if selection is None else {_METRIC: float(selection)}
        # Asked first: a write that fails half-way leaves Orbax's threads complaining on stderr.
        if shutil.disk_usage(self.directory).free < sum(x.nbytes for x in jax.tree.leaves(state)):
            raise self._no_room()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(_Place(place)),
                    loop=ocp.args.JsonSave(loop),
                ),
                metrics=metrics,
            )
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Wait until all checkpoints are written, and report a failure if there is one."""
        self.start()
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._explain(error) from error

    def restore(self, step: int, state: Any, data: Any) -> tuple[Any, dict]:
        """The state of a step, shaped and placed like `state`, and the loop's counters.

        `data`, the iterator, is set to its saved position. Raises UserError if the checkpoint is
        damaged or of another model.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, state)),
            loop=ocp.args.JsonRestore(),
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                saved = _saved_params(reader, self.directory / str(step) / "state")
            _check_shapes(saved, state.params)
            place = _saved_place(self.directory / str(step) / "data")
            restored = self._manager.restore(step, args=args)
            data.set_state(place)
        except Exception as error:
            raise self._damaged(step, error) from error
        return restored["state"], restored["loop"]

    def restore_params(self, step: int) -> Any:
        """The parameters of a step as NumPy arrays, whatever devices they were saved from."""
        directory = self.directory / str(step) / "state"
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                saved = _saved_params(reader, directory)
                wanted = {"params": jax.tree.map(_empty, saved, is_leaf=_has_shape)}
                as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
                args = ocp.args.PyTreeRestore(
                    wanted,
                    restore_args=jax.tree.map(lambda _: as_numpy, wanted),
                    partial_restore=True,
                )
                return reader.restore(directory, args=args)["params"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(
            f"{self.directory / str(step)} is damaged or the checkpoint of another model "
            f"({reason[0][:200]}); train into another --workdir, or remove that folder to go on "
            "from an older checkpoint"
        )

    def _explain(self, error: Exception) -> UserError | Exception:
        text = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text or "ENOSPC" in text:
            return self._no_room()
        return error

    def _no_room(self) -> UserError:
        return UserError(
            f"no room on the disk for a checkpoint in {self.directory}; free some and start "
            "again: the run goes on from the last whole checkpoint"
        )

    def close(self) -> None:
        """Write the pending checkpoint, wait for all writes and release the threads."""
        try:
            self.start()
        finally:
            try:
                self._manager.close()
            except Exception as error:
                raise self._explain(error) from error


class _Place:
    """The saved position of a data iterator that has advanced since, for grain's handler."""

    def __init__(self, place: dict):
        self._place = place

    def get_state(self) -> bytes:
        return json.dumps(self._place, indent=4).encode()


def _saved_params(reader: ocp.Checkpointer, directory: pathlib.Path) -> Any:
    """The tree of the saved parameters: their shapes and types, not their values."""
    return reader.metadata(directory).item_metadata.tree["params"]


def _saved_place(directory: pathlib.Path) -> dict:
    """The data iterator's state, the same in all processes, whose number may be another now."""
    return json.loads(min(directory.glob("process_*.json")).read_text())


def _check_shapes(saved: Any, params: Any) -> None:
    """Raise ValueError where saved parameters are not those of the model."""
    saved = dict(jax.tree_util.tree_leaves_with_path(saved, is_leaf=_has_shape))
    ours = dict(jax.tree_util.tree_leaves_with_path(params))
    for path in saved.keys() ^ ours.keys():
        raise ValueError(f"{jax.tree_util.keystr(path)} is only in one of the two")
    for path, leaf in ours.items():
        if tuple(saved[path].shape) != leaf.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} has the shape {tuple(saved[path].shape)}, not {leaf.shape}")


def _has_shape(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _empty(leaf: Any) -> np.ndarray:
    return np.empty(leaf.shape, leaf.dtype)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def read_params(workdir: pathlib.Path | str, step: int | str = "best") -> Any:
    """The parameters of a work directory as NumPy arrays: "best", "latest" or those of a step.

    Raises UserError where there is no checkpoint.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise UserError(
            f"{workdir} holds no checkpoints, so nothing was trained there; train first: "
            f"rcml-train --config rcml --workdir {workdir}"
        )
    checkpoints = Checkpoints(pathlib.Path(workdir))
    try:
        number: int | None
        if isinstance(step, str):
            number = checkpoints.latest() if step == "latest" else checkpoints.best()
        else:
            number = step
        if number is None:
            raise UserError(f"{directory} holds no whole checkpoint; train first, or let it finish")
        return checkpoints.restore_params(number)
    except UserError as error:
        # What is being written or replaced is not damaged.
        if other := files.holder(pathlib.Path(workdir) / LOCK):
            raise UserError(
                f"{other} is training in {workdir}, and no checkpoint could be read there; wait "
                "until it ends"
            ) from error
        raise
    finally:
        checkpoints.close()


def best_step(workdir: pathlib.Path | str) -> int | None:
    """The step of the best checkpoint of a work directory; None where there is none."""
    checkpoints = Checkpoints(pathlib.Path(workdir))
    try:
        return checkpoints.best()
    finally:
        checkpoints.close()

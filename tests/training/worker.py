"""What test_two_processes.py starts twice.

    python -m tests.training.worker toy DIRECTORY
    python -m tests.training.worker rcml DIRECTORY CATALOGUE
    python -m tests.training.worker shares DIRECTORY CATALOGUE RUN
    python -m tests.training.worker unequal DIRECTORY

The environment names the coordinator. Each parallel mode has its run in DIRECTORY/<mode>.
"""

import json
import os
import pathlib
import signal
import sys
import threading

import grain
import jax
import numpy as np
import optax

from rcml_jax.data.images import ImageBank
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.tasks import relations
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import Checkpoints, read_params
from rcml_jax.training.step import create, make_step
from tests.toy import tiny_config

MODES = tuple(sharding.PARALLEL)
#: Those of the toy: also with a copy of the state for every two devices.
TOYS = (*MODES, "fsdp-2")
STOP = 4
SHARES = {
    "devices": 0,
    "steps": 20,
    "log_every": 1,
    "validate_every": 20,
    "data.pixels": "encoded",
    "batch.image_shift": 2,
    "batch.image_flip": True,
    "batch.texts_per_row": 2,
}
#: With a mask for each relation; SHARES has one for all.
RCML = {
    "devices": 0,
    "steps": 24,
    "log_every": 1,
    "validate_every": 24,
    "loss.negatives": "unlinked",
}


def places():
    """A data iterator that has given as many batches as there are steps."""
    data = iter(grain.MapDataset.range(100).to_iter_dataset())
    for _ in range(STOP):
        next(data)
    return data


def toy_run(mode, devices):
    """Some steps with mixing, noise and parts: the mode, the state and the losses."""
    # It makes a random key, which may not be before the processes have joined.
    from tests.training.test_gradcache import BATCH, BOTH, KEY, normals

    # Large enough to be split over devices.
    params = {"w": normals(0, 64, 32), "scale": normals(1, 32)}
    items = {"a": 0.2 * normals(2, 16, 64), "b": 0.2 * normals(3, 16, 64)}
    name, _, parts = mode.partition("-")
    place = sharding.build(name, devices, state_devices=int(parts or 0))
    adam = optax.adam(1e-2)
    state = place.put_state(create(params, adam, KEY))
    step = place.compile(make_step(BOTH, adam, 10, parts=2))
    losses = []
    for _ in range(STOP):
        mine = place.local_rows(len(items["a"]))
        rows = {name: x[mine] for name, x in items.items()}
        state, metrics = step(state, place.put_batch(BATCH | {"items": rows}))
        losses.append(float(np.ravel(jax.device_get(metrics["loss"]))[0]))
    return place, state, losses


def check_masks(mode):
    """Masks of which each process puts its own columns are those that were cut."""
    whole = np.random.default_rng(0).random((3, 24, 24)) < 0.5
    devices, (name, _, parts) = jax.devices(), mode.partition("-")
    # As they come, in turn, and more of the one process than of the other.
    for some in (devices, devices[::2] + devices[1::2], devices[:6]):
        place = sharding.build(name, some, False, ("related",), int(parts or 0))
        mine = {"related": whole[..., place.local_rows(24)]}
        put = place.put_batch({"items": {}, "shared": mine})["shared"]["related"]
        assert put.shape == whole.shape
        for shard in put.addressable_shards:
            assert shard.data.shape == (3, 24, 24 // len(some))
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def toy(mode, directory):
    # As on accelerators, a step uses the state up; a checkpoint of it is written thereafter.
    sharding.donated = lambda *_: (0,)
    if mode != "pmap":
        check_masks(mode)
    place, state, losses = toy_run(mode, jax.devices())
    checkpoints, data = Checkpoints(directory), places()
    checkpoints.put_off(STOP, place.snapshot(state), data, {"losses": losses})
    next(data)
    more = place.compile(lambda state, batch, axis: (state._replace(step=state.step + 1), {}))
    jax.block_until_ready(more(state, {}))
    assert state.step.is_deleted()
    checkpoints.wait()
    checkpoints.close()


class Signalled(loop.Run):
    """Before the last step a signal reaches the last process alone."""

    def step_at(self, step):
        if step + 1 == STOP and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step_at(step)


def rcml(mode, directory, catalogue):
    loop.Run = Signalled
    assert loop.train_and_evaluate(tiny_config(catalogue, parallel=mode, **RCML), directory) is None


class Counting(ImageBank):
    """Counts the images of each call, by whether the main thread, as in the evaluation, asks."""

    read: dict[bool, list[int]] = {True: [], False: []}  # noqa: RUF012

    def __call__(self, indices):
        self.read[threading.current_thread() is threading.main_thread()].append(len(indices))
        return super().__call__(indices)


def tables(run):
    """Embeddings of all items by a run's best checkpoint, over all devices."""
    config = workdirs.load_config(pathlib.Path(run))
    method = build(config, pathlib.Path(run))
    method.devices = jax.local_devices()[: config.devices or None]
    table = method.tables(read_params(pathlib.Path(run), "best"), np.arange(60))["relation"]
    return [table.text.tolist(), table.image.tolist()]


def train_alone(config, workdir):
    """Train without the evaluation at the end."""
    evaluate, loop._evaluate = loop._evaluate, lambda *_: None
    try:
        loop.train_and_evaluate(config, workdir)
    finally:
        loop._evaluate = evaluate


def shares(directory, catalogue, run):
    """Train, then evaluate the run of one process; write what was read."""
    relations.ImageBank = Counting
    config = tiny_config(catalogue, **SHARES)
    train_alone(config, pathlib.Path(directory) / "shares")
    Counting.read[True].clear()
    result = loop.evaluate(workdirs.load_config(pathlib.Path(run)), run)
    here = list(Counting.read[True])
    found = {"ahead": Counting.read[False], "here": here, "result": result, "tables": tables(run)}
    path = pathlib.Path(directory) / f"shares{jax.process_index()}.json"
    path.write_text(json.dumps(found))


def unequal():
    """The processes have different numbers of devices: what each of them says."""
    try:
        sharding.pick_devices()
    except UserError as error:
        print(f"refused: {error}")


def main(kind: str, directory: str, *rest: str) -> None:
    sharding.initialize_distributed()
    if kind == "shares":
        shares(directory, *rest)
        return
    if kind == "unequal":
        unequal()
        return
    for mode in {"toy": TOYS, "rcml": MODES}[kind]:
        {"toy": toy, "rcml": rcml}[kind](mode, pathlib.Path(directory) / mode, *rest)
        print(mode, jax.process_count(), len(jax.devices()), len(jax.local_devices()))


if __name__ == "__main__":
    main(*sys.argv[1:])

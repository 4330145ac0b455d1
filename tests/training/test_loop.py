"""Whole runs of twelve steps: resuming, stopping, failing; every one real, on one device."""

import json
import math
import os
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from rcml_jax import schema
from rcml_jax.errors import UserError
from rcml_jax.methods import build as build_method
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import Checkpoints, read_params
from rcml_jax.training.optimizer import schedule
from tests.toy import arguments, read_metrics, start, tiny_config

# Steps 3 and 5 fall between two lines of metrics.jsonl and between two validations.
EVERY = {"log_every": 2, "validate_every": 2}


def train(config, workdir, after=lambda step: None) -> bool:
    """`train_and_evaluate` without the evaluation; `after` is called after each step."""
    workdir = workdirs.prepare(pathlib.Path(workdir), config)
    devices = sharding.pick_devices(config.platform, config.devices)
    with loop.Interrupt() as interrupt:
        method = build_method(config, workdir)
        place = sharding.build(config.parallel, devices, method.in_place)
        run = loop.Run(config, workdir, method, place)
        step_at = run.step_at

        def stepping(step):
            def one(state, batch):
                out = step_at(step)(state, batch)
                after(step + 1)
                return out

            return one

        run.step_at = stepping
        return run.train(interrupt)


@pytest.mark.parametrize(("mode", "columns"), [("jit", 8), ("fsdp", 8), ("pmap", 16)])
def test_a_process_has_a_batch_of_the_whole_shape_before_the_first_step(mode, columns, monkeypatch):
    """What is whole already stays so."""
    devices = sharding.pick_devices("cpu", 4)
    run = loop.Run.__new__(loop.Run)
    run.devices = sharding.build(mode, devices, split_shared=("related",))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "of_process", lambda devices: devices[:2])
    shared = {"related": np.ones((3, 16, columns), bool), "linked": np.ones((3, 4, 3), bool)}
    found = run._whole({"items": {"ids": np.ones((8, 5), np.int32)}, "shared": shared})
    shapes = {"ids": (16, 5), "related": (3, 16, 16), "linked": (3, 4, 3)}
    assert {n: x.shape for n, x in (found["items"] | found["shared"]).items()} == shapes


def at(wanted, number):
    """A callback that sends this process a signal after a step."""
    return lambda step: step == wanted and os.kill(os.getpid(), number)


def assert_same_end(workdir, reference, step=12):
    """The same parameters to the bit, and the same metrics.jsonl."""
    ours, theirs = read_params(workdir, step), read_params(reference, step)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in ("metrics.jsonl", "config.json", "tokenizer.json"):
        assert (workdir / name).read_text() == (reference / name).read_text()


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(catalogue, tmp_path_factory):
    """An uninterrupted run of twelve steps: its directory and what train_and_evaluate returned."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, loop.train_and_evaluate(tiny_config(catalogue, **EVERY), workdir)


def test_a_run_leaves_its_files(whole):
    workdir, result = whole
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "eval.json"}
    assert json.loads((workdir / "eval.json").read_text()) == result
    lines = read_metrics(workdir)
    assert [(x["step"], x["kind"]) for x in lines] == [
        (step, kind) for step in (2, 4, 6, 8, 10, 12) for kind in ("train", "validation")
    ]
    assert all(math.isfinite(value) for x in lines for value in x.values() if value != x["kind"])


def test_the_learning_rate_in_the_metrics_is_that_of_the_step(whole, catalogue):
    config = tiny_config(catalogue)
    rate = schedule(config.optimizer, config.steps)
    lines = [x for x in read_metrics(whole[0]) if x["kind"] == "train"]
    # The line of step k is about the update that took the run from step k − 1 to k.
    expected = [float(rate(x["step"] - 1)) for x in lines]
    assert [x["learning_rate"] for x in lines] == expected
    assert len(set(expected)) == 6


@pytest.mark.parametrize(
    ("stop", "number"),
    [
        (3, signal.SIGTERM),
        (4, signal.SIGINT),
        pytest.param(3, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_bit(whole, catalogue, tmp_path, stop, number, capsys):
    config = tiny_config(catalogue, **EVERY)
    handler = signal.getsignal(number)
    assert not train(config, tmp_path, after=at(stop, number))
    assert signal.getsignal(number) is handler
    assert stop in steps_of(tmp_path)
    assert f"stopped after step {stop}; start again to go on" in capsys.readouterr().err
    first = []
    assert train(config, tmp_path, after=first.append)
    assert first == list(range(stop + 1, 13))
    assert f"resuming from step {stop}" in capsys.readouterr().err
    assert_same_end(tmp_path, whole[0])


def test_a_run_stopped_by_a_signal_is_not_evaluated(catalogue, tmp_path, monkeypatch):
    config = tiny_config(catalogue, **EVERY)
    train(config, tmp_path, after=at(1, signal.SIGTERM))
    assert steps_of(tmp_path) == [1]
    assert not (tmp_path / "eval.json").exists()
    # A signal during the start stops the run before its next step, and nothing is lost.
    enter = loop.Interrupt.__enter__

    def signalled(self):
        enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    monkeypatch.setattr(loop.Interrupt, "__enter__", signalled)
    assert loop.train_and_evaluate(config, tmp_path) is None
    assert steps_of(tmp_path) == [1]
    assert not (tmp_path / "eval.json").exists()


class Killed(BaseException):
    """What no handler of the loop catches: the run ends as if it had been killed."""


def kill(at):
    """A callback that ends the run once a step has been dispatched."""

    def after(step):
        if step == at:
            raise Killed

    return after


def test_a_killed_run_goes_on_to_the_bit_from_its_last_checkpoint(whole, catalogue, tmp_path):
    config = tiny_config(catalogue, **EVERY)
    with pytest.raises(Killed):
        train(config, tmp_path, after=kill(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kind": "train", "loss": 1.0}\n{"step": 5, "ki')
    assert max(steps_of(tmp_path)) == 4
    assert train(config, tmp_path)
    assert_same_end(tmp_path, whole[0])


def test_a_run_killed_before_its_checkpoint_was_begun(whole, catalogue, tmp_path, monkeypatch):
    """The validation of step 4 is in the metrics, its checkpoint is not on the disk."""
    config, saving = tiny_config(catalogue, **EVERY), Checkpoints._save

    def dying(self, step, *args):
        if step == 4:
            raise Killed
        saving(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", dying)
        with pytest.raises(Killed):
            train(config, tmp_path)
    assert read_metrics(tmp_path)[-1] == read_metrics(whole[0])[3]
    assert max(steps_of(tmp_path)) == 2
    assert train(config, tmp_path)
    assert_same_end(tmp_path, whole[0])


def test_a_checkpoint_is_of_its_step_though_the_next_one_uses_its_state_up(
    whole, catalogue, tmp_path, monkeypatch
):
    """As on accelerators: the state is donated to a step that runs while it is being saved."""
    config = tiny_config(catalogue, **EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "donated", lambda *_: (0,))
        with pytest.raises(Killed):
            train(config, tmp_path, after=kill(6))
    assert max(steps_of(tmp_path)) == 4
    trained = []
    assert train(config, tmp_path, after=trained.append)
    assert trained[0] == 5
    assert_same_end(tmp_path, whole[0])


def test_a_signal_during_a_validation(whole, catalogue, tmp_path, monkeypatch):
    """Its checkpoint is saved once, with its measure, by which it may be the best."""
    config, writing = tiny_config(catalogue, **EVERY), loop.MetricsWriter.write

    def signalled(self, step, kind, metrics):
        writing(self, step, kind, metrics)
        if (step, kind) == (4, "validation"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsWriter, "write", signalled)
        assert not train(config, tmp_path)
    measures = [x["hit@5/avg"] for x in read_metrics(tmp_path) if x["kind"] == "validation"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 4
    assert checkpoints.best() == (4 if measures[1] >= measures[0] else 2)
    checkpoints.close()
    assert train(config, tmp_path)
    assert_same_end(tmp_path, whole[0])


def test_a_process_killed_by_sigkill_goes_on_to_the_bit(whole, catalogue, tmp_path):
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    process = start("train.py", arguments(catalogue, workdir, **EVERY))
    deadline = time.monotonic() + 300
    try:
        while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "eval.json").exists()
    trained = []
    assert train(tiny_config(catalogue, **EVERY), workdir, after=trained.append)
    assert trained[0] > 1
    assert_same_end(workdir, whole[0])


def test_a_finished_run_is_only_evaluated_again(whole, catalogue, capsys):
    workdir, result = whole
    before = (workdir / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert loop.train_and_evaluate(tiny_config(catalogue, **EVERY), workdir) == result
    assert (workdir / "metrics.jsonl").read_text() == before
    assert capsys.readouterr().err == ""


def test_early_stopping_keeps_and_evaluates_the_best_checkpoint(catalogue, tmp_path, capsys):
    # A rate so small that no validation is better than the first one.
    options = {"steps": 6, "validate_every": 1, "patience": 2, "optimizer.learning_rate": 1e-30}
    config = tiny_config(catalogue, **options)
    result = loop.train_and_evaluate(config, tmp_path)
    assert "no better for 2 validations: stopping early" in capsys.readouterr().err
    validations = [x for x in read_metrics(tmp_path) if x["kind"] == "validation"]
    assert [x["step"] for x in validations] == [1, 2, 3]
    assert max(steps_of(tmp_path)) == 3
    # Started again, it is over: no further step, the same figures.
    trained = []
    assert train(config, tmp_path, after=trained.append)
    assert trained == []
    assert loop.evaluate(config, tmp_path) == result


def test_the_evaluated_checkpoint_is_the_best_one(whole):
    workdir, _ = whole
    checkpoints = Checkpoints(workdir)
    best = checkpoints.best()
    checkpoints.close()
    scores = {x["step"]: x["hit@5/avg"] for x in read_metrics(workdir) if x["kind"] == "validation"}
    assert scores[best] == max(scores.values())
    assert steps_of(workdir) == sorted({best, 12})
    jax.tree.map(np.testing.assert_array_equal, read_params(workdir, best), read_params(workdir))


def test_a_loss_that_is_not_finite_stops_the_run(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda config: None)  # which refuses such a rate
    monkeypatch.setattr(schema, "validate", lambda config: None)
    # Warm-up starts at a rate of 0: the checkpoint of step 1 is good, the update after it is not.
    options = {"validate_every": 1, "log_every": 1, "optimizer.learning_rate": 1e30}
    config = tiny_config(catalogue, **options)
    with pytest.raises(UserError, match=r"not finite at step [23]; .*learning_rate"):
        loop.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "eval.json").exists()
    assert 1 in steps_of(tmp_path)
    params = read_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, read_params(tmp_path, 1))


def test_tensorboard_files_are_written_when_asked(catalogue, tmp_path):
    config = tiny_config(catalogue, tensorboard=True, **EVERY)
    train(config, tmp_path, after=at(2, signal.SIGTERM))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"train/loss", b"train/learning_rate", b"validation/hit_5/avg"):
        assert tag in content


def test_without_tensorboard_there_are_no_files(whole):
    assert not (whole[0] / "tensorboard").exists()


def test_no_room_for_the_metrics(catalogue, tmp_path):
    config = tiny_config(catalogue)
    workdirs.prepare(tmp_path, config)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left"):
        train(config, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_no_room_for_a_checkpoint(catalogue, small_disk):
    workdir = small_disk.parent
    workdirs.write_json(workdir / "config.json", tiny_config(catalogue, **EVERY).to_dict())
    # In a process of its own: Orbax leaves broken threads behind.
    process = start("train.py", arguments(catalogue, workdir, **EVERY))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: no room on the disk for a checkpoint in {small_disk}; free")
    assert err.endswith(line + "\n")


@pytest.mark.parametrize("name", ["steps", "validate_every", "log_every"])
def test_counts_must_be_positive(catalogue, tmp_path, name):
    config = tiny_config(catalogue, **{name: 0})
    with pytest.raises(UserError, match=rf"config.{name}=0 must be at least 1"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

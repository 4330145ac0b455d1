"""Batches read ahead: the same ones, in time, and at the place of those that were taken."""

import grain
import jax
import numpy as np
import pytest

from rcml_jax.data.sampling import batch_iterator
from rcml_jax.methods import build as build_method
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import Checkpoints
from rcml_jax.training.loop import Prefetched
from rcml_jax.training.step import TrainState
from tests.toy import tiny_config


def numbers():
    """The library's own iterator, which reads ahead in threads of its own."""
    return batch_iterator(range(1000), lambda i: np.float32(i), threads=2)


def put(x):
    return x + 0.5


@pytest.fixture
def counted():
    """An iterator, and what has been put by it so far."""
    done = []

    def putting(x):
        done.append(float(x))
        return put(x)

    return Prefetched(numbers(), putting), done


def test_one_batch_is_put_ahead_and_each_once(counted):
    data, done = counted
    assert next(data) == 0.5
    assert done == [0]
    data.fetch()
    data.fetch()
    assert done == [0, 1]
    assert next(data) == 1.5
    assert done == [0, 1]
    assert next(data) == 2.5
    assert done == [0, 1, 2]


def test_the_state_is_that_of_what_was_taken():
    plain, ours = numbers(), Prefetched(numbers(), put)
    start = ours.get_state()
    assert start == plain.get_state()
    rng = np.random.default_rng(0)
    for action in rng.integers(3, size=200):
        if action == 0:
            ours.fetch()
        elif action == 1:
            assert next(ours) == put(next(plain))
        else:
            # What another process would go on with.
            other = numbers()
            other.set_state(ours.get_state())
            state = plain.get_state()
            assert next(other) == next(plain)
            plain.set_state(state)
        assert ours.get_state() == plain.get_state()
    ours.fetch()
    ours.set_state(start)
    assert next(ours) == 0.5


def test_what_is_wrong_with_a_batch_is_raised_when_it_is_taken():
    def putting(x):
        if x == 2:
            raise ValueError("batch 2")
        return put(x)

    data = Prefetched(numbers(), putting)
    assert [next(data), next(data)] == [0.5, 1.5]
    place = data.get_state()
    data.fetch()
    assert data.get_state() == place
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 2"):
            next(data)
    assert data.get_state() == place
    data.set_state(numbers().get_state())
    assert next(data) == 0.5


def test_an_end_is_an_end():
    data = Prefetched(iter(grain.MapDataset.range(2).to_iter_dataset()), put)
    data.fetch()
    assert list(data) == [0.5, 1.5]


def test_a_checkpoint_holds_the_place_of_what_was_taken(tmp_path):
    data = Prefetched(numbers(), put)
    taken = [next(data) for _ in range(3)]
    data.fetch()
    params = {"w": jax.numpy.zeros(2)}
    state = TrainState(jax.numpy.int32(3), params, (), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, data, {})
    taken.append(next(data))
    data.fetch()
    checkpoints.wait()
    for again in (numbers(), Prefetched(numbers(), lambda x: x)):
        checkpoints.restore(3, state, again)
        assert put(next(again)) == taken[3]
    checkpoints.close()


def test_the_loop_saves_and_puts_before_it_waits_for_the_step(catalogue, tmp_path, monkeypatch):
    config = tiny_config(catalogue, steps=5, log_every=1, validate_every=2)
    workdirs.prepare(tmp_path, config)
    method = build_method(config, tmp_path)
    monkeypatch.setattr(method, "validate", lambda params: {"hit@5": {"avg": 0.5}})
    run = loop.Run(config, tmp_path, method, sharding.build("jit", sharding.pick_devices("cpu", 1)))
    events = []
    log, putting, saving = run._log, run.devices.put_batch, run.checkpoints._save

    def stepping(step):
        """A step that leaves the state as it is and need not be compiled."""
        events.append(f"step {step + 1}")
        return lambda state, batch: (state, {"loss": 0.0, "gradient_norm": 0.0})

    def logging(step):
        events.append(f"wait {step}")
        log(step)

    def counting(batch):
        events.append("put")
        return putting(batch)

    def saved(step, *args):
        events.append(f"save {step}")
        saving(step, *args)

    monkeypatch.setattr(run, "step_at", stepping)
    monkeypatch.setattr(run.checkpoints, "_save", saved)
    monkeypatch.setattr(run, "_log", logging)
    monkeypatch.setattr(run.data, "_put", counting)
    with loop.Interrupt() as interrupt:
        assert run.train(interrupt)
    assert events == [
        *("step 1", "put", "put", "wait 1"),
        *("step 2", "put", "wait 2"),
        *("step 3", "save 2", "put", "wait 3"),
        *("step 4", "put", "wait 4"),
        *("step 5", "save 4", "wait 5", "save 5"),
    ]

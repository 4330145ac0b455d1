"""Checkpoints: what goes in comes out, which ones are kept, and what is said of foreign ones."""

import pathlib
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.training import sharding
from rcml_jax.training.checkpoint import Checkpoints, read_params
from rcml_jax.training.sharding import pick_devices
from rcml_jax.training.step import TrainState


class Moments(NamedTuple):
    """An optimizer's state like optax's: named tuples in tuples."""

    count: jax.Array
    mu: dict


def make_state(seed=0, width=3):
    rng = np.random.default_rng(seed)
    params = {
        "towers": {"w": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "log_temperature": jnp.float32(rng.normal()),
    }
    moments = Moments(jnp.int32(seed), jax.tree.map(lambda p: p + 1, params))
    return TrainState(jnp.int32(seed), params, (moments, ()), jax.random.key(seed))


def make_data():
    return iter(grain.MapDataset.range(1000).seed(3).shuffle().to_iter_dataset())


def assert_same(a, b):
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path)
    yield made
    made.close()


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_what_is_saved_is_restored(checkpoints, tmp_path):
    data = make_data()
    seen = [next(data) for _ in range(7)]
    loop = {"best": -float("inf"), "bad": 2, "stopped": False, "pending": [{"loss": 0.1 + 0.2}]}
    checkpoints.save(5, make_state(5), data, loop)
    rest = [next(data) for _ in range(5)]
    assert not set(seen) & set(rest)
    checkpoints.wait()
    other = make_data()
    again = Checkpoints(tmp_path)
    state, counters = again.restore(again.latest(), make_state(0), other)
    again.close()
    assert_same(state, make_state(5))
    assert isinstance(state, TrainState)
    assert counters == loop
    assert [next(other) for _ in range(5)] == rest


def test_the_best_and_the_latest_are_kept(checkpoints, tmp_path):
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    for step, selection in enumerate([0.1, 0.9, 0.5, None, 0.3], start=1):
        checkpoints.save(step, make_state(step), make_data(), {}, selection)
        checkpoints.wait()
        assert checkpoints.latest() == step
        assert checkpoints.best() == min(step, 2)
    assert steps_of(tmp_path) == [2, 5]
    np.testing.assert_array_equal(
        read_params(tmp_path)["towers"]["w"], make_state(2).params["towers"]["w"]
    )
    np.testing.assert_array_equal(
        read_params(tmp_path, 5)["towers"]["w"], make_state(5).params["towers"]["w"]
    )


def test_without_a_measure_the_latest_is_the_best(checkpoints, tmp_path):
    for step in (1, 2):
        checkpoints.save(step, make_state(step), make_data(), {})
        checkpoints.wait()
    assert checkpoints.best() == 2
    assert steps_of(tmp_path) == [2]


def test_of_equally_good_ones_the_newest_is_the_best(checkpoints, tmp_path):
    for step, selection in enumerate([0.5, 0.5, 0.4], start=1):
        checkpoints.save(step, make_state(step), make_data(), {}, selection)
        checkpoints.wait()
    assert checkpoints.best() == 2
    assert steps_of(tmp_path) == [2, 3]


def test_a_step_is_saved_once(checkpoints):
    checkpoints.save(1, make_state(1), make_data(), {}, 0.5)
    checkpoints.save(1, make_state(2), make_data(), {})
    checkpoints.wait()
    state, _ = checkpoints.restore(1, make_state(0), make_data())
    assert_same(state, make_state(1))


@pytest.mark.parametrize("end", ["start", "wait", "close", "put_off", "save"])
def test_what_was_put_off_is_written_as_it_was(tmp_path, end):
    checkpoints, data = Checkpoints(tmp_path), make_data()
    next(data)
    checkpoints.put_off(1, make_state(1), data, {"bad": 3}, 0.5)
    expected = [next(data) for _ in range(3)]
    assert checkpoints.latest() is None
    more = (2, make_state(2), data, {}, 0.1) if end in ("put_off", "save") else ()
    getattr(checkpoints, end)(*more)
    assert checkpoints.latest() == (2 if end == "save" else 1)
    checkpoints.close()
    other, again = make_data(), Checkpoints(tmp_path)
    state, loop = again.restore(1, make_state(0), other)
    assert (again.latest(), again.best()) == (2 if more else 1, 1)
    again.close()
    assert_same(state, make_state(1))
    assert loop == {"bad": 3}
    assert [next(other) for _ in range(3)] == expected


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_saved_on_eight_devices_restored_on_any(checkpoints, mode):
    eight = sharding.build(mode, pick_devices("cpu", 8))
    placed = eight.put_state(make_state(4))
    checkpoints.save(4, eight.get_state(placed), make_data(), {})
    checkpoints.wait()
    for other, count in (("jit", 1), ("jit", 8), ("pmap", 8), ("pmap", 2)):
        place = sharding.build(other, pick_devices("cpu", count))
        template = place.get_state(place.put_state(make_state(0)))
        state, _ = checkpoints.restore(4, template, make_data())
        state = place.put_state(state)
        assert len(state.params["towers"]["w"].devices()) == count
        assert_same(place.get_state(state), make_state(4))


def test_parameters_come_as_numpy_arrays(checkpoints, tmp_path):
    eight = sharding.build("jit", pick_devices("cpu", 8))
    state = eight.put_state(make_state(4))
    checkpoints.save(4, state, make_data(), {})
    checkpoints.wait()
    params = read_params(tmp_path)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_same(params, jax.device_get(make_state(4).params))


@pytest.mark.parametrize("change", ["shape", "missing", "surplus"])
def test_a_checkpoint_of_another_model_is_named(checkpoints, change):
    checkpoints.save(3, make_state(3), make_data(), {})
    checkpoints.wait()
    template = make_state(0, width=5 if change == "shape" else 3)
    if change == "missing":
        del template.params["log_temperature"]
    elif change == "surplus":
        template.params["bias"] = jnp.zeros(2)
    with pytest.raises(UserError) as error:
        checkpoints.restore(3, template, make_data())
    place = checkpoints.directory / "3"
    assert str(error.value).startswith(f"{place} is damaged or the checkpoint of another model")
    wanted = {"shape": "towers", "missing": "log_temperature", "surplus": "bias"}
    assert wanted[change] in str(error.value)
    # Nothing is touched: the right model still reads it.
    assert_same(checkpoints.restore(3, make_state(0), make_data())[0], make_state(3))


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is damaged or the checkpoint of another model|no whole"):
        read_params(tmp_path)
    assert (tmp_path / "checkpoints" / "7" / "notes.txt").read_text() == "mine"


def test_no_checkpoints_at_all(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints, so nothing was trained there"):
        read_params(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no whole checkpoint; train first"):
        read_params(tmp_path)


def test_an_unfinished_write_is_not_taken_for_a_checkpoint(checkpoints, tmp_path):
    checkpoints.save(1, make_state(1), make_data(), {}, 0.5)
    checkpoints.wait()
    half = pathlib.Path(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    (half / "state").mkdir(parents=True)
    again = Checkpoints(tmp_path)
    assert (again.latest(), again.best()) == (1, 1)
    again.close()

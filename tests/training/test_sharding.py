"""Losses under pmap, batches and states on any devices, and whole runs on one and on eight."""

import functools
import pickle
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.topologies import collective_bytes
from rcml_jax.errors import UserError
from rcml_jax.losses.clip import clip
from rcml_jax.losses.rcml import relation_contrastive, relation_identification
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce
from rcml_jax.losses.unicl import label_supervised
from rcml_jax.methods import build as build_method
from rcml_jax.training import loop, sharding
from rcml_jax.training.sharding import across_devices, pick_devices
from rcml_jax.training.step import create
from tests.toy import read_metrics, tiny_config
from tests.training.test_loop import at, train

N, D = 16, 6


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relation(embedded, temperature):
    """Eq. 1–2 over (N, R, D) embeddings with padded pairs, as RCML's objective calls it."""
    rng = np.random.default_rng(5)
    related = np.eye(N, dtype=bool)
    anchor, positive = rng.integers(N, size=(2, 3, 4))
    related[anchor, positive] = related[positive, anchor] = True
    valid = np.ones(N, bool)
    valid[3] = False
    return relation_contrastive(
        jnp.swapaxes(embedded["text"], 0, 1),
        jnp.swapaxes(embedded["image"], 0, 1),
        anchor,
        positive,
        pair_valid=rng.random((3, 4)) < 0.8,
        related=related,
        valid=valid,
        intra=np.array([True, False, False]),
        temperature=temperature,
    )[0]


def pair_loss(loss, **options):
    return lambda x, temperature: loss(x["text"], x["image"], temperature=temperature, **options)


LABELS = np.arange(N) % 5
LOSSES = {
    "info_nce": pair_loss(info_nce),
    "clip": pair_loss(clip, where=np.arange(N) != 7),
    "sigmoid": pair_loss(sigmoid, bias=-3.0),
    "label_supervised": pair_loss(label_supervised, labels=LABELS),
    "relation": relation,
}


@pytest.mark.parametrize("name", LOSSES)
def test_across_devices_makes_any_loss_right_under_pmap(name):
    shape = (N, 3, D) if name == "relation" else (N, D)
    inputs = {"text": normals(1, *shape), "image": normals(2, *shape)}
    params = {"w": normals(3, D, D), "temperature": np.float32(0.5)}
    objective = LOSSES[name]

    def value(params, inputs, objective):
        embedded = jax.tree.map(lambda x: jnp.tanh(x @ params["w"]), inputs)
        return objective(embedded, params["temperature"])

    plain = jax.jit(jax.value_and_grad(functools.partial(value, objective=objective)))
    loss, gradient = plain(params, inputs)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0))
    def parts(params, inputs):
        gathered = functools.partial(value, objective=across_devices(objective))
        loss, gradient = jax.value_and_grad(gathered)(params, inputs)
        return loss, jax.lax.pmean(gradient, "data")

    split = jax.tree.map(lambda x: x.reshape(8, N // 8, *x.shape[1:]), inputs)
    losses, gradients = parts(params, split)
    np.testing.assert_allclose(losses, np.full(8, loss), rtol=1e-5)
    assert np.abs(gradient["w"]).max() > 1e-4
    for mine, whole in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
        scale = np.abs(whole).max()
        np.testing.assert_allclose(mine, np.stack([whole] * 8), rtol=1e-5, atol=1e-5 * scale)


def test_a_batch_must_be_a_multiple_of_the_devices(catalogue, tmp_path):
    config = tiny_config(catalogue, devices=3)
    with pytest.raises(UserError, match=r"batch of 16 examples cannot be split over 3 devices"):
        loop.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_batches_keep_their_values_on_any_devices(mode):
    batch = {
        "items": {"ids": np.arange(48).reshape(16, 3), "images": np.ones((16, 2, 2, 3), np.uint8)},
        "shared": {"intra": np.array([True, False]), "labels": np.arange(16)},
    }
    place = sharding.build(mode, pick_devices("cpu", 8))
    put = place.put_batch(batch)
    for name, leaf in batch["items"].items():
        assert len(put["items"][name].addressable_shards) == 8
        np.testing.assert_array_equal(np.reshape(put["items"][name], leaf.shape), leaf)
    for name, leaf in batch["shared"].items():
        for shard in put["shared"][name].addressable_shards:
            np.testing.assert_array_equal(np.reshape(shard.data, leaf.shape), leaf)


def test_a_state_goes_to_the_devices_and_back():
    state = {"w": normals(0, 3, 4), "key": jax.random.key(7), "step": jnp.int32(3)}
    for mode in sharding.PARALLEL:
        place = sharding.build(mode, pick_devices("cpu", 8))
        back = place.get_state(place.put_state(state))
        np.testing.assert_array_equal(back["w"], state["w"])
        assert jnp.issubdtype(back["key"].dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*map(jax.random.key_data, (back["key"], state["key"])))
        assert int(back["step"]) == 3


@pytest.mark.parametrize("mode", sharding.PARALLEL)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_snapshot_outlives_the_next_step(mode, in_place):
    place = sharding.build(mode, pick_devices("cpu", 8), in_place)
    params = {"w": normals(0, 64, 32), "b": normals(1, 3)}
    before = place.put_state(create(params, optax.adam(1e-2), jax.random.key(7)))

    def step(state, batch, axis):
        del batch, axis
        return state._replace(
            step=state.step + 1, params=jax.tree.map(jnp.negative, state.params)
        ), {}

    kept = place.snapshot(before)
    after, _ = place.compile(step)(before, {})
    jax.block_until_ready(after)
    assert before.params["w"].is_deleted() == in_place
    np.testing.assert_array_equal(place.get_state(after).params["w"], -params["w"])
    np.testing.assert_array_equal(jax.random.key_data(kept.key), [0, 7])
    assert int(kept.step) == 0
    for name, leaf in params.items():
        np.testing.assert_array_equal(kept.params[name], leaf)
    if mode == "fsdp":
        assert kept.opt_state[0].mu["w"].sharding.shard_shape((64, 32)) == (8, 32)


def test_pick_devices():
    assert pick_devices("cpu") == jax.devices("cpu")
    assert pick_devices() == jax.devices()
    assert pick_devices("cpu", 3) == jax.devices("cpu")[:3]


@pytest.mark.parametrize(
    ("platform", "count", "message"),
    [
        ("tpu", 0, "no device of the kind 'tpu'; JAX sees 'cpu' here: leave config.platform empty"),
        ("quantum", 0, "no device of the kind 'quantum'"),
        ("cpu", 9, "config.devices=9 is too many: 8 devices of the kind 'cpu' here; lower it"),
    ],
)
def test_pick_devices_says_what_is_missing(platform, count, message):
    with pytest.raises(UserError) as error:
        pick_devices(platform, count)
    assert str(error.value).startswith(message)


def test_a_coordinator_without_counts_is_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole"):
        sharding.initialize_distributed()


# Both tests below compile the same steps: the second finds those of the first in the cache.
RUN = {"steps": 24, "log_every": 1, "validate_every": 24}
MODES = ("jit", "pmap", "fsdp")


@pytest.fixture(scope="module")
def straight(catalogue, tmp_path_factory):
    """The work directory of twenty steps on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    assert not train(tiny_config(catalogue, **RUN), workdir, after=at(20, signal.SIGTERM))
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 21))
    return workdir


@pytest.mark.parametrize(
    ("mode", "state_devices"),
    [pytest.param("jit", 0, marks=pytest.mark.slow), ("pmap", 0), ("fsdp", 0), ("fsdp", 4)],
)
def test_eight_devices_have_the_losses_of_one_for_twenty_steps(
    straight, catalogue, tmp_path, mode, state_devices
):
    config = tiny_config(catalogue, devices=8, parallel=mode, fsdp_devices=state_devices, **RUN)
    assert not train(config, tmp_path, after=at(20, signal.SIGTERM))
    mine, theirs = ([x["loss"] for x in read_metrics(d)] for d in (tmp_path, straight))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert theirs[-1] < 0.9 * theirs[0]


def test_a_run_moves_between_devices(straight, catalogue, tmp_path):
    """A step on eight devices in every mode and one on one: as all on one."""
    places = [{"devices": 8, "parallel": mode} for mode in MODES]
    places += [{"devices": 8, "parallel": "fsdp", "fsdp_devices": 4}, {}]
    for stop, options in enumerate(places, start=1):
        config = tiny_config(catalogue, **RUN, **options)
        assert not train(config, tmp_path, after=at(stop, signal.SIGTERM))
    lines = read_metrics(straight)[: len(places)]
    for mine, theirs in zip(read_metrics(tmp_path), lines, strict=True):
        assert mine.pop("kind") == theirs.pop("kind") == "train"
        for name, value in theirs.items():
            if "accuracy" not in name:  # Rounding may turn a win that hangs on it.
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_fsdp_splits_the_state_over_the_devices(catalogue, tmp_path):
    config = tiny_config(catalogue, model__width=64, model__embed_dim=64, data__threads=0)
    method = build_method(config, tmp_path)
    batch = next(method.batches())
    params = jax.eval_shape(method.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    state = create(params, optax.adamw(1e-3), jax.random.key(1))
    place = sharding.build("fsdp", pick_devices("cpu", 8))
    put = place.put_state(state)
    bytes_of = dict.fromkeys(place.devices, 0)
    for leaf in jax.tree.leaves((put.params, put.opt_state)):
        for shard in leaf.addressable_shards:
            bytes_of[shard.device] += shard.data.nbytes
    total = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert len(set(bytes_of.values())) == 1
    assert total / 8 < bytes_of[place.devices[0]] < 1.25 * total / 8
    # It stays so, and is whole for one device.
    again = jax.tree.map(lambda a, b: a is b, place.put_state(put), put)
    assert all(jax.tree.leaves((again.params, again.opt_state)))
    whole = place.local(put.params)
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert len(ours.sharding.device_set) == 1
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), ()),
        ((2048,), ("data",)),
        ((1016,), ()),  # small
        ((64, 128), (None, "data")),
        ((128, 64), ("data",)),
        ((129, 64), (None, "data")),
        ((3, 1025), ()),  # nothing to divide
        ((4, 4, 3, 64), (None, None, None, "data")),
    ],
)
def test_fsdp_splits_the_largest_axis_that_divides(shape, spec):
    place = sharding.build("fsdp", pick_devices("cpu", 8))
    assert place.sharding_of(np.zeros(shape)).spec == jax.sharding.PartitionSpec(*spec)


def test_fsdp_over_some_of_the_devices_has_a_copy_in_each_group():
    devices = pick_devices("cpu", 8)
    place = sharding.build("fsdp", devices, split_shared=("related",), state_devices=4)
    state = {"w": normals(0, 64, 128), "b": np.ones(3, np.float32)}
    put = place.put_state(state)
    assert put["w"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert put["b"].is_fully_replicated
    for shard in put["w"].addressable_shards:
        first = devices.index(shard.device) % 4 * 32
        np.testing.assert_array_equal(shard.data, state["w"][:, first : first + 32])
    batch = place.put_batch(
        {
            "items": {"ids": np.arange(16).reshape(16, 1)},
            "shared": {"related": np.eye(16, dtype=bool)},
        }
    )
    for shard in batch["items"]["ids"].addressable_shards:
        first = 2 * devices.index(shard.device)
        np.testing.assert_array_equal(shard.data[:, 0], [first, first + 1])
    assert {x.data.shape for x in batch["shared"]["related"].addressable_shards} == {(16, 2)}
    np.testing.assert_array_equal(place.local(put)["w"], state["w"])


def test_fsdp_over_all_devices_is_the_default():
    for count in (0, 8):
        place = sharding.build("fsdp", pick_devices("cpu", 8), state_devices=count)
        assert place.sharding_of(np.zeros((64, 32))).spec == jax.sharding.PartitionSpec("data")


def test_fsdp_over_a_number_that_does_not_divide_the_devices():
    with pytest.raises(UserError, match=r"fsdp_devices=3 does not divide 8 devices; choose one"):
        sharding.build("fsdp", pick_devices("cpu", 8), state_devices=3)


def test_fsdp_leaves_a_step_with_its_parts():
    """What a compiled step gives back lies as it did, and no device holds all of a split array."""
    place = sharding.build("fsdp", pick_devices("cpu", 8))
    adam = optax.adam(1e-2)
    params = {"w": np.ones((64, 32), np.float32), "b": np.ones(3, np.float32)}
    state = place.put_state(create(params, adam, jax.random.key(0)))
    batch = place.put_batch({"items": normals(0, 16, 64), "shared": {}})

    def step(state, batch, axis):
        assert axis is None
        loss = lambda p: jnp.sum((batch["items"] @ p["w"]) ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = adam.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), value

    after, value = place.compile(step)(state, batch)
    before = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, after)) == jax.tree.leaves(before)
    assert after.opt_state[0].mu["w"].sharding.shard_shape((64, 32)) == (8, 32)
    assert value.is_fully_replicated
    one, expected = jax.jit(step, static_argnums=2)(
        create(params, adam, jax.random.key(0)), {"items": normals(0, 16, 64)}, None
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(after.params["w"], one.params["w"], rtol=1e-5)


def test_the_rows_of_a_process_are_those_of_its_devices():
    rows = sharding.rows_on(jax.devices())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))(16), np.arange(16))
    mine = (False, True, False, True)
    np.testing.assert_array_equal(sharding._rows_where(mine, 8), [2, 3, 6, 7])
    with pytest.raises(UserError, match="a batch of 6 rows cannot be split over 4 devices"):
        sharding._rows_where(mine, 6)


def test_masks_over_the_examples_are_split_along_them():
    batch = {
        "items": {"ids": np.arange(16).reshape(16, 1)},
        "shared": {"related": np.random.default_rng(0).random((3, 16, 16)) < 0.5},
    }
    devices = pick_devices("cpu", 8)
    for mode in ("jit", "fsdp"):
        put = sharding.build(mode, devices, split_shared=("related",)).put_batch(batch)
        shards = put["shared"]["related"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(3, 16, 2)}
        np.testing.assert_array_equal(put["shared"]["related"], batch["shared"]["related"])
    whole = sharding.build("jit", devices).put_batch(batch)["shared"]["related"]
    assert {shard.data.shape for shard in whole.addressable_shards} == {(3, 16, 16)}
    every = sharding.build("pmap", devices, split_shared=("related",))
    assert every.split_shared == ()
    assert every.put_batch(batch)["shared"]["related"].shape == (8, 3, 16, 16)


def compiled_loss(relations, items, width=16, identification=False):
    """The gradient of RCML's loss compiled for 8 devices, of items/2 pairs, from shapes.

    identification: of the identification term alone.
    """
    pairs = items // 2 // relations
    place = sharding.build("jit", pick_devices("cpu", 8), split_shared=("related",))

    def shape(*sizes, dtype=bool):
        return jax.ShapeDtypeStruct(sizes, dtype)

    embeddings = shape(items, relations, width, dtype=np.float32)
    shared = {
        **dict.fromkeys(("anchor", "positive"), shape(relations, pairs, dtype=np.int32)),
        "pair_valid": shape(relations, pairs),
        "valid": shape(items),
        "intra": shape(relations),
    }
    term = relation_identification if identification else relation_contrastive
    name, sizes = ("linked", (pairs, relations)) if identification else ("related", (items, items))
    shared[name] = shape(relations, *sizes)
    batch = {"items": dict.fromkeys(("text", "image"), embeddings), "shared": shared}

    def loss(items, shared):
        text, image = (jnp.swapaxes(items[name], 0, 1) for name in ("text", "image"))
        return term(text, image, **shared)[0]

    _, batch = place.abstract({}, batch)
    placed = jax.tree.map(lambda x: x.sharding, batch["items"])
    gradient = jax.jit(jax.grad(loss), out_shardings=placed)
    return gradient.lower(batch["items"], batch["shared"]).compile()


def test_what_rcml_exchanges_does_not_grow_with_the_relations():
    """Candidates and masks stay where they are; only the rows of the pairs are exchanged."""
    items, width = 128, 16
    sent = {}
    for relations in (2, 8):
        found = collective_bytes(compiled_loss(relations, items, width).as_text())
        assert set(found) == {"all-reduce"}
        sent[relations] = sum(size for _, size in found.values())
    # Two modalities of one row an item, forward and backward, and a few numbers a row.
    rows = 2 * 2 * items * width * 4
    assert rows <= sent[2] < sent[8] * 1.05 < 1.3 * rows


def test_identification_sends_an_items_features_once():
    """A round, of one relation, is in a loop, which counts once; similarities are summed."""
    relations, items, width = 8, 128, 64
    found = collective_bytes(compiled_loss(relations, items, width, identification=True).as_text())
    # What a device gives: both modalities of its own items, forward, and their gradient.
    assert found["all-to-all"][1] == 2 * 2 * items // 8 * width * 4
    assert found["all-reduce"][1] == 4 * items // 2 * 4
    assert set(found) == {"all-to-all", "all-reduce"}


def test_each_device_holds_its_part_of_the_masks():
    arguments = [
        compiled_loss(8, items).memory_analysis().argument_size_in_bytes for items in (128, 256)
    ]
    masks = [8 * items * items // 8 for items in (128, 256)]
    embeddings = [2 * items * 8 * 16 * 4 // 8 for items in (128, 256)]
    for found, mask, embedded in zip(arguments, masks, embeddings, strict=True):
        assert mask + embedded <= found < 1.2 * (mask + embedded)

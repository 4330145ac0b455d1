"""One step on one device, on eight, in parts and with packed texts: the same loss and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcml_jax.methods import build as build_method
from rcml_jax.models.rcml import RCML
from rcml_jax.training import sharding
from rcml_jax.training.sharding import pick_devices
from rcml_jax.training.step import create, make_step
from tests.methods.m3col_data import omics_config, write_tables
from tests.toy import tiny_config


@functools.cache
def step_of(folder, directory, method, mode, devices, parts=1, texts_per_row=0):
    """The update of one SGD step (the gradient, with the sign turned) and the metrics.

    texts_per_row: 1 or more without augmentation, which packing gives to other images.
    """
    config = tiny_config(folder, method=method, loss__learn_temperature=True, data__threads=0)
    if texts_per_row:
        config.batch.update(texts_per_row=texts_per_row, image_shift=0)
    built = build_method(config, directory)
    batch = next(built.batches())
    params = built.init(jax.random.key(0), batch)
    # The towers start so small that the embeddings hardly differ: move them apart. With this key no
    # share of wins of RCML hangs on less than 2e-5 of a similarity, a hundred times its rounding.
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)
    params["log_temperature"] = jnp.log(0.5)
    return sgd_step(built, params, batch, mode, devices, parts)


def sgd_step(method, params, batch, mode, devices, parts):
    sgd = optax.sgd(1.0)
    place = sharding.build(mode, pick_devices("cpu", devices))
    state = place.put_state(create(params, sgd, jax.random.key(2)))
    before = jax.device_get(params)
    step = place.compile(make_step(method, sgd, steps=10, parts=parts))
    state, metrics = step(state, place.put_batch(batch))
    after = jax.device_get(place.get_state(state).params)
    shift = jax.tree.map(lambda a, b: a - b, after, before)
    # All copies of the state are the same after the step.
    for leaf in jax.tree.leaves(state.params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == devices
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])
    return shift, jax.tree.map(lambda x: float(np.ravel(x)[0]), jax.device_get(metrics))


def assert_same_step(found, expected):
    """The same metrics and gradient up to rounding."""
    one, metrics = expected
    many, others = found
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=2e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one))
    assert largest > 1e-3
    for whole, mine in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        # The update is a difference of parameters of size 1: its own rounding is about 1e-7.
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=2e-6 + 1e-5 * largest)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("method", ["rcml", "clip", slow("siglip"), slow("unicl"), slow("declip")])
def test_eight_devices_give_the_loss_and_gradients_of_one(
    catalogue, tmp_path_factory, method, mode
):
    directory = tmp_path_factory.getbasetemp() / f"tokenizer_{method}"
    directory.mkdir(exist_ok=True)
    one = step_of(catalogue, directory, method, "jit", 1)
    assert_same_step(step_of(catalogue, directory, method, mode, 8), one)


@pytest.mark.parametrize(
    ("method", "mode", "devices", "parts"),
    [
        ("rcml", "jit", 8, 2),
        ("rcml", "pmap", 8, 2),
        ("clip", "jit", 1, 3),  # 6, 6 and 4 examples
        ("declip", "pmap", 4, 2),
        slow("declip", "jit", 1, 3),
        slow("siglip", "jit", 1, 4),
        slow("unicl", "pmap", 8, 2),
    ],
)
def test_parts_give_the_loss_and_gradients_of_the_whole_batch(
    catalogue, tmp_path_factory, method, mode, devices, parts
):
    directory = tmp_path_factory.getbasetemp() / f"tokenizer_{method}"
    directory.mkdir(exist_ok=True)
    one = step_of(catalogue, directory, method, "jit", 1)
    assert_same_step(step_of(catalogue, directory, method, mode, devices, parts), one)


@pytest.mark.parametrize(
    ("method", "texts_per_row", "mode", "devices", "parts"),
    [
        ("rcml", 4, "jit", 1, 1),
        ("rcml", 2, "pmap", 4, 2),
        ("clip", 2, "jit", 8, 1),
        slow("rcml", 2, "jit", 8, 1),
        slow("rcml", 4, "jit", 1, 3),
        slow("unicl", 2, "pmap", 8, 1),
        slow("siglip", 4, "jit", 2, 2),
    ],
)
def test_packed_texts_give_the_loss_and_gradients_of_padded_ones(
    catalogue, tmp_path_factory, method, texts_per_row, mode, devices, parts
):
    directory = tmp_path_factory.getbasetemp() / f"tokenizer_{method}"
    directory.mkdir(exist_ok=True)
    one = step_of(catalogue, directory, method, "jit", 1, texts_per_row=1)
    found = step_of(catalogue, directory, method, mode, devices, parts, texts_per_row)
    assert_same_step(found, one)


def test_a_step_under_pmap_shares_the_sentences(catalogue, tmp_path, monkeypatch):
    counted, shares = [], RCML._shares

    def spy(model, sentences, texts):
        counted.append(shares(model, sentences, texts))
        return counted[-1]

    monkeypatch.setattr(RCML, "_shares", spy)
    one = step_of(catalogue, tmp_path, "rcml", "jit", 1, texts_per_row=1)
    assert set(counted) == {1}
    counted.clear()
    assert_same_step(step_of(catalogue, tmp_path, "rcml", "pmap", 4, 1, 2), one)
    assert 4 in counted


@functools.cache
def m3col_step(folder, directory, mode, devices, parts):
    """One of M3CoL with mixing and dropout, on 40 patients."""
    options = {"seeds": 1, "data__folds": 0, "model__dropout": 0.5, "loss__contrastive": "m3co"}
    method = build_method(omics_config(folder, **options), directory)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    return sgd_step(method, params, batch, mode, devices, parts)


@pytest.mark.parametrize(
    ("mode", "devices", "parts"),
    [slow("jit", 1, 3), slow("jit", 8, 1), slow("jit", 8, 5), slow("pmap", 8, 1), ("pmap", 8, 3)],
)
def test_mixing_and_dropout_are_those_of_the_whole_batch(tmp_path_factory, mode, devices, parts):
    tables = tmp_path_factory.getbasetemp() / "tables"
    if not tables.exists():
        write_tables(tables)
    one = m3col_step(tables, tables, "jit", 1, 1)
    assert_same_step(m3col_step(tables, tables, mode, devices, parts), one)

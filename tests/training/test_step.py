"""The optimizer and one step: schedule, clipping, weight decay, frozen towers, random keys."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from rcml_jax.errors import UserError
from rcml_jax.methods import build as build_method
from rcml_jax.methods.base import Method
from rcml_jax.training import optimizer
from rcml_jax.training.step import create, make_step
from tests.toy import tiny_config


def settings(**options):
    values = {
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.98,
        "clip_norm": 0.0,
    }
    return ml_collections.ConfigDict(values | options)


PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "temperature": jnp.float32(1.0)}
TRAINED = jax.tree.map(lambda _: False, PARAMS)


def updates(config, gradients, frozen=TRAINED, steps=10, count=2):
    """The parameters after `count` steps under constant gradients."""
    transform, _ = optimizer.build(config, steps, frozen)
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(count):
        update, state = transform.update(gradients, state, params)
        params = optax.apply_updates(params, update)
    return params


def test_the_schedule_is_a_linear_warm_up_and_a_cosine():
    rate = optimizer.schedule(0.5, warmup_steps=4, steps=20)
    for step in range(21):
        if step < 4:
            expected = 0.5 * step / 4
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)


def test_the_schedule_without_warm_up_starts_at_the_top():
    assert float(optimizer.schedule(0.5, warmup_steps=0, steps=20)(0)) == 0.5


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_positive(rate):
    with pytest.raises(UserError, match=r"learning_rate=.* must be above 0"):
        optimizer.schedule(rate, 1, 10)


def test_warm_up_must_leave_a_step():
    with pytest.raises(UserError, match=r"warmup_steps=10 leaves no step of config\.steps=10"):
        optimizer.schedule(0.1, 10, 10)


def test_the_first_updates_are_those_of_adamw():
    gradients = jax.tree.map(lambda p: 0.3 * jnp.ones_like(p), PARAMS)
    moved = updates(settings(weight_decay=0.1), gradients, count=3)
    expected = {"kernel": 1.0, "bias": 1.0, "temperature": 1.0}
    for step in range(3):
        rate = 1e-2 * min(step / 2, 1)
        for name in expected:
            # Under a constant gradient g the corrected moments are g and g².
            decay = 0.1 * expected[name] if name == "kernel" else 0.0
            expected[name] -= rate * (0.3 / (0.3 + 1e-8) + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(moved[name], np.full(PARAMS[name].shape, value), rtol=1e-6)


def test_weight_decay_leaves_vectors_and_scalars_alone():
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    moved = updates(settings(weight_decay=0.1), nothing)
    assert np.all(moved["kernel"] < 1)
    np.testing.assert_array_equal(moved["bias"], PARAMS["bias"])
    np.testing.assert_array_equal(moved["temperature"], PARAMS["temperature"])


def test_clipping_bounds_the_norm_of_all_gradients_together():
    # Adam's first moments show what came through: m = (1 − b1) g after one step.
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 10.0), PARAMS)
    norm = 10.0 * math.sqrt(10)
    for clip_norm, scale in ((0.0, 1.0), (2.0, 2.0 / norm), (1000.0, 1.0)):
        transform, _ = optimizer.build(settings(clip_norm=clip_norm), 10, TRAINED)
        _, state = transform.update(gradients, transform.init(PARAMS), PARAMS)
        moments = optax.tree.get(state, "mu")
        for name, gradient in gradients.items():
            np.testing.assert_allclose(moments[name], 0.1 * scale * gradient, rtol=1e-6)


def test_frozen_parameters_do_not_move_and_hold_no_moments():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    frozen = TRAINED | {"kernel": True}
    moved = updates(settings(weight_decay=0.1), gradients, frozen)
    np.testing.assert_array_equal(moved["kernel"], PARAMS["kernel"])
    assert np.all(moved["bias"] < 1)
    assert float(moved["temperature"]) < 1
    transform, _ = optimizer.build(settings(), 10, frozen)
    assert all(leaf.shape != (2, 3) for leaf in jax.tree.leaves(transform.init(PARAMS)))


class Echo(Method):
    """A method whose loss is made of the key and the progress that it is given."""

    selection = "none"

    def batches(self):
        raise NotImplementedError

    init = validate = evaluate = batches

    def embed(self, params, batch, key):
        return params * jax.random.normal(key, batch["items"].shape)

    def objective(self, params, embedded, batch, progress):
        return jnp.sum(embedded * batch["items"]), {"progress": progress}


def test_random_keys_and_progress_are_functions_of_the_step():
    sgd = optax.sgd(0.1)
    step = jax.jit(make_step(Echo(), sgd, steps=4), static_argnums=2)
    batch = {"items": jnp.arange(1.0, 5.0)}
    first = create(jnp.float32(2.0), sgd, jax.random.key(0))
    second, metrics = step(first, batch, None)
    assert float(metrics["progress"]) == 0.0
    again, repeated = step(first, batch, None)
    jax.tree.map(np.testing.assert_array_equal, metrics, repeated)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (4,))
    gradient = float(noise @ batch["items"])
    np.testing.assert_allclose(metrics["loss"], 2.0 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], abs(gradient), rtol=1e-5)
    np.testing.assert_allclose(second.params, 2.0 - 0.1 * gradient, rtol=1e-5)
    assert int(second.step) == int(again.step) == 1
    _, later = step(second, batch, None)
    assert float(later["progress"]) == 0.25
    assert float(later["gradient_norm"]) != pytest.approx(abs(gradient))


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("image", {"vision_model", "visual_projection"}),
        ("both", {"text_model", "text_projection", "vision_model", "visual_projection"}),
    ],
)
def test_frozen_towers_do_not_move_while_the_rest_does(catalogue, tmp_path, freeze, still):
    config = tiny_config(catalogue, model__freeze=freeze, data__threads=0)
    method = build_method(config, tmp_path)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    transform, _ = optimizer.build(settings(weight_decay=0.1), 10, method.frozen(params))
    step = jax.jit(make_step(method, transform, 10), static_argnums=2)
    state = create(params, transform, jax.random.key(1))
    for _ in range(2):  # the rate of the first step is 0
        state, metrics = step(state, batch, None)
    assert math.isfinite(metrics["loss"])
    for name, tower in params["towers"].items():
        same = [
            np.array_equal(before, after)
            for before, after in zip(
                jax.tree.leaves(tower), jax.tree.leaves(state.params["towers"][name]), strict=True
            )
        ]
        if name in still:
            assert all(same), name
        elif name != "logit_scale":  # CLIP's own temperature, which this loss does not use
            assert not all(same), name
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), params["head"], state.params["head"]
    )
    assert moved["output"]
    assert moved["query"]

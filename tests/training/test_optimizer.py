"""Adam and AdamW, the schedules, clipping, rates of parts and frozen parameters."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from rcml_jax.errors import UserError
from rcml_jax.training import optimizer


def settings(**options):
    """`config.optimizer` with constant AdamW, where the options do not say otherwise."""
    values = {
        "name": "adamw",
        "schedule": "constant",
        "learning_rate": 1e-2,
        "rates": {},
        "warmup_steps": 2,
        "step_size": 3,
        "factor": 0.2,
        "plateau_patience": 2,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.98,
        "clip_norm": 0.0,
    }
    return ml_collections.ConfigDict(values | options)


PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "temperature": jnp.float32(1.0)}
NONE = jax.tree.map(lambda _: False, PARAMS)
DECAYED = NONE | {"kernel": True}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def run(config, gradients, params=PARAMS, frozen=None, decayed=None, steps=10):
    """The parameters after each of the gradients, and the state after the last."""
    none = jax.tree.map(lambda _: False, params)
    transform, _ = optimizer.build(config, steps, frozen or none, decayed or none)
    state, path = transform.init(params), []

    @jax.jit
    def move(gradient, state, params):
        update, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, update), state

    for gradient in gradients:
        params, state = move(gradient, state, params)
        path.append(params)
    return path, state


def adam(param, gradients, rate, decay, b1=0.9, b2=0.98, epsilon=1e-8):
    """PyTorch's Adam with its coupled weight decay, in float64; the parameter after each step."""
    param, path = np.asarray(param, np.float64), []
    m, v = np.zeros_like(param), np.zeros_like(param)
    for step, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, np.float64) + decay * param
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        corrected = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + epsilon)
        param = param - rate(step - 1) * corrected
        path.append(param)
    return path


def draws(count=6, scale=1.0):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, PARAMS) for _ in range(count)]


# Adam and AdamW


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_adam_adds_the_decay_to_the_gradient_of_every_parameter(schedule):
    gradients = draws()
    config = settings(name="adam", weight_decay=0.5, schedule=schedule)
    path, _ = run(config, gradients, decayed=DECAYED)
    rate = lambda step: 1e-2 * (0.2 ** (step // 3) if schedule == "step" else 1)  # noqa: E731
    for name in PARAMS:
        expected = adam(PARAMS[name], [g[name] for g in gradients], rate, 0.5)
        np.testing.assert_allclose([p[name] for p in path], expected, rtol=1e-5)


def test_adam_is_not_adamw():
    # With a gradient of 0 the coupled decay is all of Adam's gradient, whose size it loses.
    nothing = [jax.tree.map(jnp.zeros_like, PARAMS)]
    for decay in (0.1, 0.5):
        (coupled,), _ = run(settings(name="adam", weight_decay=decay), nothing)
        np.testing.assert_allclose(coupled["kernel"], np.full((2, 3), 1 - 1e-2), rtol=1e-6)
        (decoupled,), _ = run(settings(weight_decay=decay), nothing, decayed=DECAYED)
        np.testing.assert_allclose(decoupled["kernel"], np.full((2, 3), 1 - 1e-2 * decay))


def test_the_first_updates_are_those_of_adamw():
    gradients = [jax.tree.map(lambda p: 0.3 * p, ONES)] * 3
    config = settings(weight_decay=0.1, schedule="cosine")
    path, _ = run(config, gradients, decayed=DECAYED)
    expected = {"kernel": 1.0, "bias": 1.0, "temperature": 1.0}
    for step in range(3):
        rate = 1e-2 * min(step / 2, 1)
        for name in expected:
            # Under a constant gradient g the corrected moments are g and g².
            decay = 0.1 * expected[name] if name == "kernel" else 0.0
            expected[name] -= rate * (0.3 / (0.3 + 1e-8) + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(path[-1][name], np.full(PARAMS[name].shape, value), rtol=1e-6)


def test_adamw_decays_what_the_mask_says():
    nothing = [jax.tree.map(jnp.zeros_like, PARAMS)]
    for decayed in (DECAYED, NONE | {"bias": True}, NONE):
        (moved,), _ = run(settings(weight_decay=0.1), nothing, decayed=decayed)
        for name, chosen in decayed.items():
            expected = np.full(PARAMS[name].shape, 1 - 1e-2 * 0.1 * chosen)
            np.testing.assert_allclose(moved[name], expected, rtol=1e-6)


def test_adamw_and_the_cosine_are_what_is_meant_without_a_name():
    config = settings()
    del config.name, config.schedule, config.rates
    expected, _ = run(settings(schedule="cosine"), draws(3))
    found, _ = run(config, draws(3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert optimizer.observe(config, {"state": 1}, 0.5) == {"state": 1}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_clipping_bounds_the_norm_of_all_gradients_together(name):
    # Adam's first moments show what came through: m = (1 − b1) g after one step.
    gradients = jax.tree.map(lambda p: 10.0 * p, ONES)
    norm = 10.0 * math.sqrt(10)
    for clip_norm, scale in ((0.0, 1.0), (2.0, 2.0 / norm), (1000.0, 1.0)):
        _, state = run(settings(name=name, clip_norm=clip_norm), [gradients])
        moments = optax.tree.get(state, "mu")
        for key, gradient in gradients.items():
            np.testing.assert_allclose(moments[key], 0.1 * scale * gradient, rtol=1e-6)


# Schedules


def test_the_cosine_is_a_linear_warm_up_and_a_cosine():
    options = {"schedule": "cosine", "learning_rate": 0.5}
    rate = optimizer.schedule(settings(**options, warmup_steps=4), steps=20)
    for step in range(21):
        if step < 4:
            expected = 0.5 * step / 4
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)
    assert float(optimizer.schedule(settings(**options, warmup_steps=0), steps=20)(0)) == 0.5


@pytest.mark.parametrize(("step_size", "factor"), [(250, 0.2), (1, 0.5), (3, 1.0)])
def test_the_step_schedule_is_steplr(step_size, factor):
    config = settings(schedule="step", learning_rate=2e-3, step_size=step_size, factor=factor)
    rate = optimizer.schedule(config, steps=500)
    for step in (0, 1, 2, 3, 5, 249, 250, 251, 499, 500):
        assert float(rate(step)) == pytest.approx(2e-3 * factor ** (step // step_size), rel=1e-5)


@pytest.mark.parametrize("kind", ["constant", "plateau"])
def test_the_others_are_constant(kind):
    config = settings(schedule=kind, warmup_steps=100)  # more than steps, but not theirs
    assert [float(optimizer.schedule(config, 10)(k)) for k in (0, 9)] == pytest.approx([0.01] * 2)


def test_a_warm_up_that_takes_all_steps_of_the_epochs():
    message = r"^config\.optimizer\.warmup_steps=10 leaves no step of config\.steps=10"
    with pytest.raises(UserError, match=message):
        optimizer.build(settings(schedule="cosine", warmup_steps=10), 10, NONE, NONE)


# The plateau


def reduce_on_plateau(measures, factor, patience, threshold=1e-4):
    """The scales after each epoch: PyTorch's ReduceLROnPlateau(mode="max"), without cooldown."""
    best, bad, scale, scales = -math.inf, 0, 1.0, []
    for measure in measures:
        if measure > best * (1 + threshold):
            best, bad = measure, 0
        else:
            bad += 1
        if bad > patience:
            scale, bad = scale * factor, 0
        scales.append(scale)
    return scales


SEQUENCES = {
    "rising": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
    "still": [0.5] * 12,
    "falling": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    "a peak between": [0.3, 0.2, 0.2, 0.4, 0.3, 0.3, 0.3, 0.35, 0.5, 0.1, 0.1],
    "up from nothing": [0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1],
    "all right": [0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_the_plateau_reduces_as_pytorch_does(patience):
    config = settings(schedule="plateau", plateau_patience=patience)
    transform, _ = optimizer.build(config, 10, NONE, NONE)

    def look(state, measure):
        state = optimizer.observe(config, state, measure)
        return state, optimizer.reduction(state)

    scan = jax.jit(lambda measures: jax.lax.scan(look, transform.init(PARAMS), measures)[1])
    for name, measures in SEQUENCES.items():
        # Looks at the end that the sequence does not have fall after all others.
        padded = np.float32(measures + [0.0] * (12 - len(measures)))
        expected = reduce_on_plateau(measures, 0.2, patience)
        found = scan(padded)[: len(measures)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
    assert min(reduce_on_plateau(SEQUENCES["still"], 0.2, patience)) <= 0.2**3


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("frozen", [False, True])
def test_only_looks_change_the_scale_and_it_scales_the_updates(name, frozen):
    config = settings(
        name=name, schedule="plateau", plateau_patience=1, weight_decay=0.1, clip_norm=1.0
    )
    still = NONE | {"kernel": frozen}
    transform, rate = optimizer.build(config, 10, still, DECAYED)
    state = transform.init(PARAMS)
    update = jax.jit(transform.update)
    before, moved = update(ONES, state, PARAMS)
    assert float(optimizer.reduction(moved)) == 1.0
    for measure, scale in ((0.5, 1.0), (0.4, 1.0), (0.5, 0.2), (0.5, 0.2), (0.5, 0.04)):
        state = optimizer.observe(config, state, measure)
        assert float(optimizer.reduction(state)) == pytest.approx(scale)
    after, moved = update(ONES, state, PARAMS)
    for key in PARAMS:
        np.testing.assert_allclose(after[key], 0.04 * before[key], rtol=1e-5)
        assert np.all(before[key] == 0) == still[key]
    assert float(optimizer.reduction(moved)) == pytest.approx(0.04)  # as it was before the update
    assert float(rate(3)) == pytest.approx(1e-2)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_other_schedules_know_no_reduction(schedule):
    config = settings(schedule=schedule)
    transform, _ = optimizer.build(config, 10, NONE | {"bias": True}, DECAYED)
    state = transform.init(PARAMS)
    assert optimizer.reduction(state) == 1
    jax.tree.map(np.testing.assert_array_equal, optimizer.observe(config, state, 0.5), state)


# Rates of parts and frozen parameters

PARTS = {
    "encoders_image": {"low": jnp.ones(2), "mlp": {"kernel": jnp.ones((2, 2))}},
    "encoders_text": {"kernel": jnp.ones((2, 2))},
    "fusion": {"kernel": jnp.ones((2, 2))},
    "heads_image": {"kernel": jnp.ones((2, 2))},
    "heads_text": {"kernel": jnp.ones((2, 2))},
}


def rates_of(config, frozen=None, count=1):
    """Each part's rate: under the gradient 1, Adam's first step is the rate."""
    gradient = jax.tree.map(jnp.ones_like, PARTS)
    path, _ = run(config, [gradient] * count, PARTS, frozen)
    before = path[-2] if count > 1 else PARTS
    steps = jax.tree.map(lambda a, b: float(jnp.mean(a - b)), before, path[-1])
    return {part: max(jax.tree.leaves(leaves)) for part, leaves in steps.items()}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_parts_have_their_own_rates(name):
    rates = {"encoders_text": 2e-3, "heads": 5e-2}
    found = rates_of(settings(name=name, rates=rates))
    expected = dict.fromkeys(PARTS, 1e-2)
    expected |= {"encoders_text": 2e-3, "heads_image": 5e-2, "heads_text": 5e-2}
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_longest_name_of_a_part_counts():
    found = rates_of(settings(rates={"heads_text": 1e-3, "heads": 5e-2, "encoders": 3e-3}))
    expected = {"heads_image": 5e-2, "heads_text": 1e-3, "fusion": 1e-2}
    expected |= {"encoders_image": 3e-3, "encoders_text": 3e-3}
    assert found == pytest.approx(expected, rel=1e-4)


def test_rates_of_parts_follow_the_schedule_and_decay():
    config = settings(schedule="step", step_size=2, rates={"heads": 5e-2}, b1=0.0, b2=0.0)
    found = rates_of(config, count=3)
    assert found["heads_text"] == pytest.approx(5e-2 * 0.2, rel=1e-3)
    assert found["fusion"] == pytest.approx(1e-2 * 0.2, rel=1e-3)
    # Decoupled decay goes with the rate of the part.
    config = settings(weight_decay=0.5, rates={"heads": 5e-2})
    everything = jax.tree.map(lambda _: True, PARTS)
    (moved,), _ = run(config, [jax.tree.map(jnp.zeros_like, PARTS)], PARTS, decayed=everything)
    np.testing.assert_allclose(moved["heads_text"]["kernel"], np.full((2, 2), 1 - 0.5 * 5e-2))
    np.testing.assert_allclose(moved["fusion"]["kernel"], np.full((2, 2), 1 - 0.5 * 1e-2))


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "plateau", "constant"])
def test_frozen_parameters_do_not_move_and_hold_no_moments(name, schedule):
    config = settings(
        name=name, schedule=schedule, weight_decay=0.1, clip_norm=1.0, rates={"bias": 1e-3}
    )
    frozen = NONE | {"kernel": True}
    path, state = run(config, [ONES] * 3, frozen=frozen, decayed=DECAYED)
    np.testing.assert_array_equal(path[-1]["kernel"], PARAMS["kernel"])
    assert np.all(path[-1]["bias"] < 1)
    assert float(path[-1]["temperature"]) < 1
    assert all(leaf.shape != (2, 3) for leaf in jax.tree.leaves(state))


def test_frozen_leaves_within_a_part_and_rates_go_together():
    frozen = jax.tree.map(lambda _: False, PARTS)
    frozen["encoders_image"]["low"] = True
    config = settings(name="adam", weight_decay=0.5, rates={"encoders_image": 3e-2})
    gradient = jax.tree.map(jnp.ones_like, PARTS)
    (moved,), _ = run(config, [gradient], PARTS, frozen)
    np.testing.assert_array_equal(moved["encoders_image"]["low"], np.ones(2))
    kernel = moved["encoders_image"]["mlp"]["kernel"]
    np.testing.assert_allclose(kernel, np.full((2, 2), 1 - 3e-2), rtol=1e-5)

"""One step: random keys, progress, what is decayed, frozen towers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcml_jax.methods import build as build_method
from rcml_jax.methods.base import Method
from rcml_jax.training import optimizer
from rcml_jax.training.step import create, make_step
from tests.toy import tiny_config
from tests.training.test_optimizer import settings


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
    step = jax.jit(make_step(Echo(None), sgd, steps=4), static_argnums=2)
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


def test_matrices_are_decayed_and_vectors_are_not():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "temperature": jnp.float32(1.0)}
    assert Echo(None).decayed(params) == {"kernel": True, "bias": False, "temperature": False}
    assert not any(jax.tree.leaves(Echo(None).frozen(params)))


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
    config = settings(schedule="cosine", weight_decay=0.1)
    transform, _ = optimizer.build(config, 10, method.frozen(params), method.decayed(params))
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

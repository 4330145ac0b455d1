"""Accumulated gradients against those of the whole batch, and against the mean over its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcml_jax import mixup
from rcml_jax.losses.contrastive import info_nce
from rcml_jax.methods.base import Method
from rcml_jax.training import parallel
from rcml_jax.training.accumulation import ACCUMULATIONS, exact, micro
from rcml_jax.training.step import create, make_step

N, F, D = 16, 5, 4
KEY = jax.random.key(3)
PROGRESS = np.float32(0.25)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"w": normals(0, F, D), "scale": normals(1, D)}
BATCH = {
    "items": {"a": normals(2, N, F), "b": normals(3, N, F)},
    "shared": {"target": normals(4, N), "valid": np.arange(N) < N - 3},
}


class Toy(Method):
    """Two views contrasted, and a target predicted; noise in the embedding, mixing before it."""

    selection = "none"

    def __init__(self, noise=0.0, mixes=False):
        self.noise, self.prepares = noise, mixes

    def batches(self):
        raise NotImplementedError

    init = validate = evaluate = batches

    def prepare(self, batch, key):
        if not self.prepares:
            return batch
        share = jax.random.uniform(key, batch["shared"]["valid"].shape)
        partner = mixup.partners(key, len(share), where=batch["shared"]["valid"])
        items = mixup.mix(batch["items"], share, partner)
        return {"items": items, "shared": batch["shared"] | {"share": share}}

    def embed(self, params, batch, key):
        z = {name: jnp.tanh(x @ params["w"]) for name, x in batch["items"].items()}
        # Like dropout, so that gradients go through the noise.
        noise = jax.random.uniform(key, z["b"].shape, minval=-1) if self.noise else 0.0
        return {"a": z["a"], "b": (1 + self.noise * noise) * z["b"]}

    def objective(self, params, embedded, batch, progress):
        shared = batch["shared"]
        weight = shared["valid"] * shared.get("share", 1.0)
        # Parameters of the objective have their gradient from it directly, `w` in both ways.
        error = embedded["b"] @ (params["scale"] + params["w"][0]) - shared["target"]
        regression = jnp.sum(weight * error**2) / jnp.sum(weight)
        contrastive = info_nce(embedded["a"], embedded["b"], temperature=0.2, weights=weight)
        return regression + contrastive, {"contrastive": contrastive, "progress": progress}


CALM, MIXING, NOISY, BOTH = Toy(), Toy(mixes=True), Toy(noise=0.8), Toy(0.8, mixes=True)


@functools.cache
def whole_loss(method):
    return jax.jit(jax.value_and_grad(method.loss, has_aux=True))


def whole(method, batch=BATCH, key=KEY):
    return whole_loss(method)(PARAMS, batch, key, PROGRESS)


@functools.cache
def accumulated(scheme, method, parts):
    function = jax.jit(functools.partial(scheme, method, parts=parts))
    return function(PARAMS, BATCH, KEY, PROGRESS)


def halves(batch):
    """Every other row, so that on many devices each has its share of both parts."""
    return [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]


def assert_same(found, expected, rtol=1e-5):
    """The same loss, metrics and gradient."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize(("method", "parts"), [(CALM, 2), (CALM, 4), (MIXING, 4)])
def test_exact_is_the_whole_batch(method, parts):
    # What is mixed is mixed with samples of the whole batch, not of its part.
    (loss, metrics), grads = expected = whole(method)
    assert_same(accumulated(exact, method, parts), expected)
    assert metrics["progress"] == PROGRESS
    assert loss > metrics["contrastive"] > 0
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("method", [CALM, BOTH])
def test_micro_is_the_mean_over_its_parts(method):
    parts = [
        whole(method, half, jax.random.fold_in(KEY, i)) for i, half in enumerate(halves(BATCH))
    ]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parts)
    assert_same(accumulated(micro, method, 2), expected)


def test_micro_has_fewer_negatives_than_exact():
    small, large = accumulated(micro, CALM, 2), accumulated(exact, CALM, 2)
    assert small[0][1]["contrastive"] < large[0][1]["contrastive"] - 0.1
    assert np.abs(small[1]["w"] - large[1]["w"]).max() > 1e-2


def test_both_passes_of_exact_draw_the_same_noise():
    keys = [jax.random.split(KEY, 2)[i] for i in range(2)]

    def loss(params):
        parts = zip(halves(BATCH), keys, strict=True)
        pieces = [NOISY.embed(params, half, key) for half, key in parts]
        joined = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(N, -1), *pieces)
        return NOISY.objective(params, joined, BATCH, PROGRESS)

    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    found = accumulated(exact, NOISY, 2)
    assert_same(found, expected)
    assert abs(float(found[0][0] - accumulated(exact, CALM, 2)[0][0])) > 1e-2


@functools.cache
def one_step(method, devices, **options):
    """The gradient (an SGD step with its sign turned) and the metrics of a compiled step."""
    sgd = optax.sgd(1.0)
    place = parallel.build("jit", parallel.pick_devices("cpu", devices))
    state = place.put_state(create(PARAMS, sgd, KEY))
    step = place.compile(make_step(method, sgd, 10, **options))
    after, metrics = step(state, place.put_batch(BATCH))
    return jax.tree.map(lambda a, b: a - np.asarray(b), PARAMS, after.params), metrics


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    expected = one_step(MIXING, 1)
    assert set(expected[1]) == {"loss", "contrastive", "progress", "gradient_norm"}
    assert_same(one_step(MIXING, 1, accumulation="exact", parts=4), expected, 1e-4)
    small = one_step(MIXING, 1, accumulation="micro", parts=4)
    assert abs(float(small[1]["loss"] - expected[1]["loss"])) > 1e-2


@pytest.mark.parametrize("scheme", ACCUMULATIONS)
def test_eight_devices_accumulate_as_one(scheme):
    options = {"accumulation": scheme, "parts": 4}
    assert_same(one_step(BOTH, 8, **options), one_step(BOTH, 1, **options), 1e-4)


@pytest.mark.parametrize("scheme", ACCUMULATIONS)
def test_parts_are_split_over_devices(scheme):
    """Each of eight devices embeds its own rows of a part, and not all of them."""
    size, parts = 64, 2
    seen = []

    class Seen(Toy):
        def embed(self, params, batch, key):
            embedded = super().embed(params, batch, key)
            jax.debug.inspect_array_sharding(embedded["a"], callback=seen.append)
            return embedded

    batch = jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), BATCH)
    place = parallel.build("jit", parallel.pick_devices("cpu", 8))
    function = functools.partial(ACCUMULATIONS[scheme], Seen(), parts=parts)
    jax.jit(function).lower(PARAMS, place.put_batch(batch), KEY, PROGRESS).compile()
    shapes = [sharding.shard_shape((size // parts, D)) for sharding in seen]
    assert set(shapes) == {(size // parts // 8, D)}

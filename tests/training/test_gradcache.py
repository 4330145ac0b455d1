"""Accumulated gradients against those of the whole batch, and against the mean over its parts."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcml_jax.errors import UserError
from rcml_jax.losses.clip import clip
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce
from rcml_jax.losses.unicl import label_supervised
from rcml_jax.methods.base import Method
from rcml_jax.ops import mixup
from rcml_jax.training import loop, sharding
from rcml_jax.training.gradcache import ACCUMULATIONS, accumulated, check, exact, micro, parts_of
from rcml_jax.training.step import create, make_step
from tests.toy import read_metrics, tiny_config
from tests.training.test_loop import at, train

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
def accumulated_by(scheme, method, parts):
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


@pytest.mark.parametrize(
    ("method", "parts"),
    # Three parts of six rows are two more than there are.
    [(CALM, 2), (CALM, 4), (CALM, 3), (MIXING, 4), (NOISY, 4), (NOISY, 3), (BOTH, 2)],
)
def test_exact_is_the_whole_batch(method, parts):
    # What is mixed is mixed with samples of the whole batch, not of its part, and what is dropped
    # does not depend on the part.
    (loss, metrics), grads = expected = whole(method)
    assert_same(accumulated_by(exact, method, parts), expected)
    assert metrics["progress"] == PROGRESS
    assert loss > metrics["contrastive"] > 0
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(grads))


def test_the_noise_is_seen():
    assert abs(float(whole(NOISY)[0][0] - whole(CALM)[0][0])) > 1e-2


@pytest.mark.parametrize("method", [CALM, BOTH])
def test_micro_is_the_mean_over_its_parts(method):
    parts = [
        whole(method, half, jax.random.fold_in(KEY, i)) for i, half in enumerate(halves(BATCH))
    ]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parts)
    assert_same(accumulated_by(micro, method, 2), expected)


def test_micro_has_fewer_negatives_than_exact():
    small, large = accumulated_by(micro, CALM, 2), accumulated_by(exact, CALM, 2)
    assert small[0][1]["contrastive"] < large[0][1]["contrastive"] - 0.1
    assert np.abs(small[1]["w"] - large[1]["w"]).max() > 1e-2


LOSSES = {
    "info_nce": info_nce,
    "clip": clip,
    "sigmoid": functools.partial(sigmoid, bias=-3.0),
    "label_supervised": functools.partial(label_supervised, labels=np.arange(N) % 5),
    "clip, chunks": functools.partial(clip, chunk_size=5),
}


def encode(params, inputs, key):
    """Two views, one of them with dropout."""
    kept = jax.random.bernoulli(key, 0.7, (len(inputs["a"]), D))
    return jnp.tanh(inputs["a"] @ params["w"]), jnp.where(kept, inputs["b"] @ params["w"], 0)


@functools.cache
def of_any_loss(name, micro_batch, devices=1, mode="jit"):
    """Value, auxiliary and gradient of a loss with a learned temperature."""
    params = {"w": PARAMS["w"], "temperature": np.float32(0.5)}

    def loss(params, embedded, scale):
        value = LOSSES[name](*embedded, temperature=params["temperature"])
        return scale * value, {"plain": value}

    options = {"micro_batch": micro_batch, "has_aux": True}
    scale = np.float32(2.0)
    if mode == "plain":
        whole = lambda p: loss(p, encode(p, BATCH["items"], KEY), scale)  # noqa: E731
        return jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    if mode == "jit":
        place = sharding.build("jit", sharding.pick_devices("cpu", devices))
        items = place.put_batch({"items": BATCH["items"], "shared": {}})["items"]
        return jax.jit(accumulated(loss, encode, **options))(params, items, KEY, scale)
    function = accumulated(loss, encode, **options, axis_name="data")
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), BATCH["items"])
    mapped = jax.pmap(function, axis_name="data", in_axes=(None, 0, None, None))
    return mapped(params, split, KEY, scale)


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_and_its_encoders_are_wrapped(name):
    expected = of_any_loss(name, N, mode="plain")
    assert_same(of_any_loss(name, 6), expected)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize(
    ("micro_batch", "devices", "mode"),
    # Under pmap a micro-batch is that of one device, here of two, two and four rows.
    [(3, 8, "jit"), (N, 8, "jit"), (1, 8, "pmap"), (2, 8, "pmap"), (3, 4, "pmap")],
)
def test_a_wrapped_loss_on_many_devices(micro_batch, devices, mode):
    expected = of_any_loss("clip", N, mode="plain")
    found = of_any_loss("clip", micro_batch, devices, mode)
    for i in range(devices if mode == "pmap" else 1):
        mine = jax.tree.map(lambda x, i=i: x[i], found) if mode == "pmap" else found
        assert_same(mine, expected)


def test_encoders_without_a_key_and_losses_without_extras():
    function = accumulated(
        lambda params, z: jnp.sum(params["scale"] * z**3),
        lambda params, x, key: x @ params["w"] if key is None else None,
        micro_batch=5,
    )
    x = BATCH["items"]["a"]
    value, grads = jax.jit(function)(PARAMS, x, None)
    whole = jax.value_and_grad(lambda p: jnp.sum(p["scale"] * (x @ p["w"]) ** 3))
    assert_same((value, grads), whole(PARAMS))


def test_a_micro_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="micro_batch=0 must be at least 1"):
        accumulated(info_nce, encode, micro_batch=0)


def test_the_activations_of_one_part_are_held():
    # Eight layers outweigh the loss's own arrays of (n, n), 5.9 MB that are needed in any case. The
    # whole batch's activations take another 12.6 MB on jax 0.10 and 8.4 MB on jax 0.12.
    n, width, layers = 512, 256, 8
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = {"w": of(layers, width, width)}

    def deep(params, x, key):
        del key
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(layer, x, params["w"])[0][:, :8]

    def planned(micro_batch):
        loss = lambda params, z: info_nce(z, z[::-1])  # noqa: E731
        function = accumulated(loss, deep, micro_batch=micro_batch)
        plan = jax.jit(function).lower(params, of(n, width), None).compile()
        return plan.memory_analysis().temp_size_in_bytes

    assert planned(32) < planned(n) / 2


@pytest.mark.parametrize(
    ("size", "micro_batch", "parts"),
    [(16, 0, 1), (16, 64, 1), (16, 16, 1), (16, 8, 2), (100, 64, 2)],
)
def test_parts_have_no_more_than_the_micro_batch(size, micro_batch, parts):
    assert parts_of(size, micro_batch) == parts
    assert parts == 1 or -(-size // parts) <= micro_batch


class Whole(Toy):
    """A method whose loss is not an objective of embeddings, as that of several models."""

    def loss(self, params, batch, key, progress):
        return super().loss(params, batch, key, progress)


PAIRS = BATCH | {"shared": BATCH["shared"] | {"anchor": np.zeros((4, 3), np.int32)}}


@pytest.mark.parametrize(
    ("scheme", "method", "batch", "parts", "devices", "text"),
    [
        ("micro", CALM, PAIRS, 2, 1, "pairs lie across the parts"),
        ("micro", CALM, BATCH, 3, 1, "batch of 16 examples cannot be accumulated in 3 parts"),
        ("micro", CALM, BATCH, 4, 8, "cannot be accumulated in 4 parts of one size on 8 devices"),
        ("exact", Whole(), BATCH, 2, 1, "exact accumulation trains one model"),
    ],
)
def test_what_cannot_be_accumulated_is_said(scheme, method, batch, parts, devices, text):
    with pytest.raises(UserError, match=text):
        check(scheme, method, batch, parts, devices)
    check(scheme, method, batch, 1, devices)
    if devices == 1:  # A library's user meets the same sentence.
        with pytest.raises(UserError, match=text):
            ACCUMULATIONS[scheme](method, PARAMS, batch, KEY, PROGRESS, parts)


@functools.cache
def one_step(method, devices, mode="jit", **options):
    """The gradient (an SGD step with its sign turned) and the metrics of a compiled step."""
    sgd = optax.sgd(1.0)
    place = sharding.build(mode, sharding.pick_devices("cpu", devices))
    state = place.put_state(create(PARAMS, sgd, KEY))
    step = place.compile(make_step(method, sgd, 10, **options))
    after, metrics = step(state, place.put_batch(BATCH))
    params = place.get_state(after).params
    shift = jax.tree.map(lambda a, b: a - np.asarray(b), PARAMS, params)
    return shift, jax.tree.map(lambda x: np.ravel(x)[0], metrics)


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    expected = one_step(MIXING, 1)
    assert set(expected[1]) == {"loss", "contrastive", "progress", "gradient_norm"}
    assert_same(one_step(MIXING, 1, accumulation="exact", parts=4), expected, 1e-4)
    small = one_step(MIXING, 1, accumulation="micro", parts=4)
    assert abs(float(small[1]["loss"] - expected[1]["loss"])) > 1e-2


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize(("scheme", "parts"), [("exact", 4), ("micro", 2)])
def test_eight_devices_accumulate_as_one(scheme, parts, mode):
    options = {"accumulation": scheme, "parts": parts}
    one = one_step(BOTH, 1, **options)
    assert_same(one_step(BOTH, 8, mode, **options), one, 1e-4)
    if scheme == "exact":
        assert_same(one, one_step(BOTH, 1), 1e-4)


def test_eight_devices_draw_the_noise_of_one():
    one = one_step(BOTH, 1)
    for mode in ("jit", "pmap"):
        assert_same(one_step(BOTH, 8, mode), one, 1e-4)


@pytest.fixture(scope="module")
def whole_run(catalogue, tmp_path_factory):
    """The work directory of two steps of CLIP on whole batches of 16."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert not train(clip_config(catalogue), workdir, after=at(2, signal.SIGTERM))
    return workdir


def clip_config(catalogue, **options):
    return tiny_config(catalogue, method="clip", log_every=1, validate_every=12, **options)


@pytest.mark.parametrize(
    "options", [{"micro_batch": 6}, {"micro_batch": 8, "devices": 8, "parallel": "pmap"}]
)
def test_a_run_in_micro_batches_is_that_of_whole_ones(whole_run, catalogue, tmp_path, options):
    assert not train(clip_config(catalogue, **options), tmp_path, after=at(2, signal.SIGTERM))
    for mine, theirs in zip(read_metrics(tmp_path), read_metrics(whole_run), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_negative_micro_batch_is_refused(catalogue, tmp_path):
    with pytest.raises(UserError, match=r"config.micro_batch=-1 must be at least 0"):
        loop.train_and_evaluate(tiny_config(catalogue, micro_batch=-1), tmp_path)


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
    place = sharding.build("jit", sharding.pick_devices("cpu", 8))
    function = functools.partial(ACCUMULATIONS[scheme], Seen(), parts=parts)
    jax.jit(function).lower(PARAMS, place.put_batch(batch), KEY, PROGRESS).compile()
    shapes = [sharding.shard_shape((size // parts, D)) for sharding in seen]
    assert set(shapes) == {(size // parts // 8, D)}

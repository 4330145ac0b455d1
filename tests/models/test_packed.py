"""Texts that share a row of tokens: the states, embeddings and gradients of texts alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.data.packing import PackedTexts, pack
from rcml_jax.models.rcml import RCML
from rcml_jax.models.two_towers import TwoTowers
from tests.models.test_encoders import tiny

LENGTHS, PER_ROW, LIMIT, END = (10, 2, 5, 9, 10, 10, 3, 4, 2, 2, 7, 10), 3, 10, 3


@functools.cache
def texts():
    """Twelve texts of 2 to 10 tokens, padded, and the same packed; rows are longer than 10."""
    rng = np.random.default_rng(0)
    lengths = np.asarray(LENGTHS)[:, None]
    places = np.arange(LIMIT)
    ids = rng.integers(4, 50, (len(lengths), LIMIT))
    ids = np.select([places < lengths - 1, places == lengths - 1], [ids, END], 0).astype(np.int32)
    packed = pack(ids, places < lengths, PER_ROW)
    assert packed.ids.shape[1] > LIMIT
    return jnp.asarray(ids), PackedTexts(*map(jnp.asarray, packed))


def shaken(params):
    """Far from the small weights of the beginning, where attention is uniform."""
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)


def assert_close(found, expected):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6 * largest),
        found,
        expected,
    )


@pytest.mark.parametrize("projected", [True, False])
def test_each_token_has_the_state_that_it_has_alone(projected):
    ids, packed = texts()
    towers = TwoTowers(tiny())
    params = shaken(towers.init(jax.random.key(0), ids[:1], jnp.zeros((1, 16, 16, 3)))["params"])
    states = functools.partial(
        towers.apply, {"params": params}, projected=projected, method="text_states"
    )
    alone, together = states(ids), states(packed)
    assert together.mask.shape == (4, PER_ROW, packed.ids.shape[1])
    for number, length in enumerate(LENGTHS):
        row, slot = divmod(number, PER_ROW)
        own = together.states[row][together.mask[row, slot]]
        np.testing.assert_allclose(own, alone.states[number, :length], rtol=1e-4, atol=1e-5)
    pooled = together.pooled
    assert pooled.shape == (4, PER_ROW, alone.states.shape[-1])
    np.testing.assert_allclose(
        pooled.reshape(alone.pooled.shape), alone.pooled, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("remat", "pooling"),
    [("", {}), ("layers", {}), ("dots", {}), ("", {"pooled_prior": 2.0, "beta": 0.9})],
)
def test_embeddings_and_gradients_are_those_of_texts_alone(remat, pooling):
    ids, packed = texts()
    relations, intra = ids[:3], jnp.asarray([True, False, False])

    def graded(remat, inputs):
        model = RCML(tiny(), FrozenDict(pooling), remat=remat)

        def value(params):
            out = model.apply({"params": params}, relations, inputs, None, intra)
            z = out["text"].reshape(len(LENGTHS), 3, -1)
            return jnp.sum(jnp.sin(3 * z + jnp.arange(z.size).reshape(z.shape))), z

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    init = RCML(tiny(), FrozenDict(pooling)).init
    params = shaken(init(jax.random.key(0), relations, ids[:1])["params"])
    (_, alone), gradient = graded("", ids)(params)
    (_, together), found = graded(remat, packed)(params)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert_close(found, gradient)


def test_the_other_texts_of_a_row_change_nothing():
    _, packed = texts()
    towers = TwoTowers(tiny())
    params = shaken(
        towers.init(jax.random.key(0), packed.ids[:1, :LIMIT], jnp.zeros((1, 16, 16, 3)))["params"]
    )
    embed = jax.jit(lambda texts: towers.apply({"params": params}, texts)["text"])
    before = embed(packed)
    # Another word in the second text of the first row.
    changed = embed(packed._replace(ids=packed.ids.at[0, packed.ends[0, 1] - 1].set(49)))
    same = np.ones((4, PER_ROW), bool)
    same[0, 1] = False
    np.testing.assert_array_equal(before[same], changed[same])
    assert np.abs(before[0, 1] - changed[0, 1]).max() > 1e-3


def test_clip_in_bfloat16_stays_close():
    ids, packed = texts()
    towers = TwoTowers(tiny(), jnp.bfloat16)
    params = towers.init(jax.random.key(0), ids[:1], jnp.zeros((1, 16, 16, 3)))["params"]
    alone, together = (towers.apply({"params": params}, x)["text"] for x in (ids, packed))
    np.testing.assert_allclose(together.reshape(alone.shape), alone, atol=0.03)


def sentences(count):
    """As many padded sentences of 2 to 10 tokens."""
    return np.resize(np.asarray(texts()[0])[::-1], (count, LIMIT))


def over_eight_devices():
    """Twenty-four texts, a row each and packed, split over eight devices, and what is not split."""
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "fsdp"))
    whole, rows = (
        NamedSharding(mesh, P) for P in (PartitionSpec(), PartitionSpec(mesh.axis_names))
    )
    twice = jax.tree.map(lambda x: np.resize(x, (2 * len(x), *x.shape[1:])), texts())
    return jax.device_put(twice, rows), functools.partial(jax.device_put, device=whole), twice


@pytest.mark.parametrize("count", [1, 8, 9])
@pytest.mark.parametrize("form", ["a row each", "packed", "a row each, shorter than sentences"])
def test_sentences_beside_texts_on_several_devices_equal_those_of_one(form, count):
    split, everywhere, alone = over_eight_devices()
    number = int(form == "packed")
    spare = 5 if form.endswith("sentences") else 0  # padding, which makes them longer
    asked = np.pad(sentences(count), ((0, 0), (0, spare)))
    model = RCML(tiny(max_length=LIMIT + spare))
    images = jnp.zeros((1, 16, 16, 3))
    params = shaken(model.init(jax.random.key(0), asked[:1], asked[:1], images)["params"])

    def loss(params, asked, texts):
        found = model.apply({"params": params}, asked, texts)
        return jnp.sin(3 * found["text"]).sum() + jnp.cos(found["relation"]).sum(), found

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected = gradient(params, asked, alone[number])
    found = gradient(*everywhere((params, asked)), split[number])
    assert_close(jax.device_get(found), jax.device_get(expected))


def by_device(tree):
    """Rows of eight devices → an axis of devices first, as `pmap` takes it."""
    return jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), tree)


@pytest.mark.parametrize("count", [1, 8, 9])
@pytest.mark.parametrize("form", ["a row each", "packed"])
def test_sentences_beside_texts_under_pmap_equal_those_of_one_device(form, count):
    alone, asked = over_eight_devices()[2][form == "packed"], sentences(count)
    model, images = RCML(tiny(), axis_name="data"), jnp.zeros((1, 16, 16, 3))
    params = shaken(model.init(jax.random.key(0), asked[:1], asked[:1], images)["params"])

    def loss(params, texts, axis_name, devices):
        found = model.clone(axis_name=axis_name).apply({"params": params}, asked, texts)
        # Every device has the relation embeddings: one share each.
        shares = jnp.cos(found["relation"]).sum() / devices
        return jnp.sin(3 * found["text"]).sum() + shares, found

    gradient = jax.grad(loss, has_aux=True)
    expected, whole = jax.device_get(jax.jit(lambda params: gradient(params, alone, "", 1))(params))

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0))
    def mapped(params, texts):
        summed, found = gradient(params, texts, "data", 8)
        return jax.lax.psum(summed, "data"), found

    summed, found = jax.device_get(mapped(params, by_device(alone)))
    assert_close(found["text"].reshape(whole["text"].shape), whole["text"])
    for device in range(8):
        assert_close(found["relation"][device], whole["relation"])
        assert_close(jax.tree.map(lambda x, i=device: x[i], summed), expected)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("number", [0, 1])
def test_each_device_encodes_its_share_of_the_sentences(number, mode):
    split, everywhere, alone = over_eight_devices()
    model = RCML(tiny(), axis_name="data" if mode == "pmap" else "")
    params = model.init(jax.random.key(0), sentences(1), sentences(1), jnp.zeros((1, 16, 16, 3)))
    encode = functools.partial(model.apply, method="_relation_and_texts")

    def flops(count):
        if mode == "pmap":
            mapped = jax.pmap(encode, axis_name="data", in_axes=(None, None, 0))
            lowered = mapped.lower(params, sentences(count), by_device(alone[number]))
        else:
            placed = everywhere((params, sentences(count)))
            lowered = jax.jit(encode).lower(*placed, split[number])
        return lowered.compile().cost_analysis()["flops"]

    assert flops(8) < 1.01 * flops(4)
    assert flops(16) > 1.1 * flops(8)


def test_more_tokens_than_all_sentences_have_are_no_share():
    """Two sentences of 3 tokens are fewer than a row of texts, so each device has both."""
    split, everywhere, _ = over_eight_devices()
    model = RCML(tiny())
    count = functools.partial(model.apply, {}, method="_shares")
    placed = everywhere(sentences(2)[:, :3])
    assert count(placed, split[0]) == 1
    assert count(everywhere(sentences(2)), split[0]) == 8
    assert count(everywhere(sentences(2)), split[1]) == 1  # rows of more than 20 tokens
    assert count(everywhere(sentences(4)), split[1]) == 8


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("bare", ["texts", "sentences", "params", "states"])
def test_arrays_that_are_not_all_placed_have_the_same_embeddings(bare, number, jitted):
    split, everywhere, alone = over_eight_devices()
    model, asked = RCML(tiny()), sentences(8)
    params = model.init(jax.random.key(0), asked[:1], asked[:1], jnp.zeros((1, 16, 16, 3)))
    apply = jax.jit(model.apply) if jitted else model.apply
    placed = {"params": everywhere(params), "sentences": everywhere(asked), "texts": split[number]}
    expected = jax.device_get(model.apply(params, asked, alone[number]))
    if bare == "states":
        own = {"params": placed["params"]["params"]["towers"]}
        states = functools.partial(TwoTowers(tiny()).apply, projected=False, method="text_states")
        placed["texts"] = jax.jit(states)(own, split[number])
    else:
        own = {"params": params, "sentences": asked, "texts": alone[number]}[bare]
        placed[bare] = jax.device_get(own)
    found = apply(placed["params"], placed["sentences"], placed["texts"])
    assert_close(jax.device_get(found), expected)

"""The transformer of every tower: its parts against NumPy, packed texts, and what is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.towers.clip import LAYER_NAMES
from rcml_jax.models.towers.transformer import (
    Encoder,
    Layer,
    LayerConfig,
    TokenStates,
    activation,
    attention,
    packed_positions,
    quick_gelu,
    segment_ids,
    segment_mask,
    with_pooled,
)
from tests import reference

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "swish"
)  # fmt: skip
LAYER = LayerConfig(
    width=6,
    hidden=10,
    heads=2,
    activation="quick_gelu",
    epsilon=1e-3,
    names=LAYER_NAMES,
    init=nn.initializers.normal(0.5),
)


# Activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas_in_value_and_gradient(name):
    x = np.linspace(-6, 6, 25) + 0.01  # not 0, where relu has no gradient
    value, slope = jax.vmap(jax.value_and_grad(activation(name)))(jnp.asarray(x, jnp.float32))
    expected = np.array([reference.activation(name, v) for v in x])
    np.testing.assert_allclose(value, expected, atol=2e-6)
    step = 1e-5
    slopes = [
        (reference.activation(name, v + step) - reference.activation(name, v - step)) / (2 * step)
        for v in x
    ]
    np.testing.assert_allclose(slope, slopes, atol=5e-6)


def test_quick_gelu_is_finite_everywhere():
    x = jnp.asarray([-1e30, -100.0, 0.0, 100.0, 1e30])
    value, slope = jax.vmap(jax.value_and_grad(quick_gelu))(x)
    np.testing.assert_allclose(value, [0, 0, 0, 100, np.float32(1e30)])
    np.testing.assert_allclose(slope, [0, 0, 0.5, 1, 1])


def test_an_unknown_activation():
    for make in (activation, lambda name: dataclasses.replace(LAYER, activation=name)):
        with pytest.raises(
            UserError, match=r"'mish' is unknown; a tower's hidden_act is one of ge"
        ):
            make("mish")


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match=r"width of 6 is not a multiple of its 4 heads; use a conf"):
        dataclasses.replace(LAYER, heads=4)


# Attention

SHAPE = (2, 4, 2, 3)  # n, T, heads, d
MASKS = {
    "all keys": None,
    "padding": np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)[:, None, None, :],
    "segments": np.array([[0, 0, 1, 1], [0, 1, 1, 2]])[:, None, :, None]
    == np.array([[0, 0, 1, 1], [0, 1, 1, 2]])[:, None, None, :],
    "by head": np.random.default_rng(1).random((2, 2, 4, 4)) < 0.5,
}
MASKS["by head"] |= np.eye(4, dtype=bool)


def qkv(seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    return [rng.normal(scale=scale, size=SHAPE) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_its_twin_in_value_and_gradient(mask, causal):
    mask, arrays = MASKS[mask], qkv()
    weight = np.random.default_rng(2).normal(size=SHAPE)
    given = [jnp.asarray(x, jnp.float32) for x in arrays]
    ours = functools.partial(
        attention, mask=None if mask is None else jnp.asarray(mask), causal=causal
    )
    theirs = functools.partial(reference.attention, mask=mask, causal=causal)
    np.testing.assert_allclose(ours(*given), theirs(*arrays), atol=1e-5)
    loss = lambda *x: jnp.sum(weight * ours(*x))  # noqa: E731
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
    expected = reference.gradient(lambda *x: np.sum(weight * theirs(*x)), *arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_without_a_key_is_finite(dtype):
    mask = jnp.asarray(MASKS["padding"]).at[0].set(False)
    given = [jnp.asarray(x, dtype) for x in qkv()]
    loss = lambda *x: jnp.sum(attention(*x, mask=mask).astype(jnp.float32) ** 2)  # noqa: E731
    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*given)
    assert np.isfinite(value)
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in grads)
    # It has no part in the other rows.
    alone = attention(*(x[1:] for x in given), mask=mask[1:])
    np.testing.assert_array_equal(attention(*given, mask=mask)[1:], alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_float32(dtype):
    given = [jnp.asarray(x, dtype) for x in qkv()]
    found = attention(*given, causal=True)
    assert found.dtype == dtype
    full = attention(*(x.astype(jnp.float32) for x in given), causal=True)
    np.testing.assert_allclose(found.astype(jnp.float32), full, atol=0.03)


def test_dropout_acts_on_the_weights():
    given = [jnp.asarray(x, jnp.float32) for x in qkv()]
    seen = []

    def first_key_alone(weights):
        seen.append(weights)
        return jnp.zeros_like(weights).at[..., 0].set(1.0)

    found = attention(*given, causal=True, dropout=first_key_alone)
    np.testing.assert_allclose(found, jnp.broadcast_to(given[2][:, :1], SHAPE), atol=1e-6)
    assert seen[0].shape == (2, 2, 4, 4)
    np.testing.assert_allclose(seen[0].sum(-1), 1.0, atol=1e-6)


# Layers


@functools.cache
def layer_inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 6))
    params = Layer(LAYER).init(jax.random.key(0), jnp.zeros((1, 1, 6)))["params"]
    params = jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), params)
    return params, x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_is_its_twin(pre_norm, causal):
    params, x = layer_inputs()
    config = dataclasses.replace(LAYER, pre_norm=pre_norm, causal=causal)
    mask = MASKS["padding"]
    options = {"heads": 2, "name": "quick_gelu", "epsilon": 1e-3, "pre_norm": pre_norm}
    twin = functools.partial(
        reference.transformer_layer, params=params, mask=mask, causal=causal, **options
    )
    apply = lambda x: Layer(config).apply({"params": params}, x, jnp.asarray(mask))  # noqa: E731
    given = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(apply(given), twin(x), atol=1e-5)
    weight = np.random.default_rng(3).normal(size=x.shape)
    found = jax.grad(lambda x: jnp.sum(weight * apply(x)))(given)
    (expected,) = reference.gradient(lambda x: np.sum(weight * twin(x)), x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_layers_act_one_after_another_under_their_numbers():
    params, x = layer_inputs()
    x = jnp.asarray(x, jnp.float32)
    other = jax.tree.map(lambda p: 1.1 * p, params)
    tree = {"layer": {"0": params, "1": other}}
    found = Encoder(LAYER, 2, "layer").apply({"params": tree}, x)
    expected = x
    for one in (params, other):
        expected = Layer(LAYER).apply({"params": one}, expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    shapes = jax.eval_shape(Encoder(LAYER, 2, "layer").init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(np.shape, tree)


def test_projections_may_have_no_bias():
    config = dataclasses.replace(LAYER, qkv_bias=False)
    shapes = jax.eval_shape(Layer(config).init, jax.random.key(0), jnp.zeros((1, 1, 6)))["params"]
    parts = {name: set(part) for name, part in shapes["self_attn"].items()}
    assert parts.pop("out_proj") == {"kernel", "bias"}
    assert parts == {f"{part}_proj": {"kernel"} for part in "qkv"}


def test_bfloat16_keeps_float32_parameters():
    config = dataclasses.replace(LAYER, dtype=jnp.bfloat16)
    params, x = layer_inputs()
    made = Layer(config).init(jax.random.key(0), jnp.zeros((1, 1, 6)))["params"]
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(made))
    half = Layer(config).apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    full = Layer(LAYER).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.1)


# Packed texts and pooled states


def test_segments_of_packed_texts():
    texts = PackedTexts(jnp.zeros((2, 8), jnp.int32), jnp.asarray([[2, 4], [0, 7]]))
    segments = segment_ids(texts)
    np.testing.assert_array_equal(segments, [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    positions = packed_positions(texts, segments)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
    mask = segment_mask(segments)
    assert mask.shape == (2, 1, 8, 8)
    for row, ids in zip(mask[:, 0], np.asarray(segments), strict=True):
        np.testing.assert_array_equal(row, ids[:, None] == ids)


def test_a_pooled_state_stands_before_the_tokens():
    states = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    found = with_pooled(states, mask)
    np.testing.assert_array_equal(found.pooled, [[1, 2], [8, 9]])  # the mean of what is no padding
    np.testing.assert_array_equal(found.states[:, 1:], states)
    np.testing.assert_array_equal(found.mask, np.pad(mask, ((0, 0), (1, 0)), constant_values=True))
    given = with_pooled(states, mask, jnp.full((2, 2), 7.0))
    np.testing.assert_array_equal(given.pooled, np.full((2, 2), 7.0))


def test_pooled_states_are_found_by_their_index():
    states = jnp.arange(24.0).reshape(2, 4, 3)
    mask = jnp.ones((2, 4), bool)
    np.testing.assert_array_equal(
        TokenStates(states, mask, jnp.asarray([3, 0])).pooled, states[jnp.arange(2), [3, 0]]
    )
    packed = TokenStates(states, mask[:, None], jnp.asarray([[1, 3], [0, 2]])).pooled
    np.testing.assert_array_equal(packed, np.stack([states[0, [1, 3]], states[1, [0, 2]]]))

"""The pooling head against its NumPy twin, and the two forms in which it is CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.models.relation_pooling import RelationPooling
from rcml_jax.models.towers.transformer import TokenStates
from tests import reference

N, T, R, D = 5, 7, 3, 8


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    pooled = rng.integers(1, T, N)
    tokens = TokenStates(
        states=jnp.asarray(rng.normal(size=(N, T, D)), jnp.float32),
        mask=jnp.asarray(np.arange(T) <= pooled[:, None]),
        pooled_index=jnp.asarray(pooled),
    )
    relation = jnp.asarray(rng.normal(size=(R, D)), jnp.float32)
    return tokens, relation, jnp.asarray([True, False, False])


def random_params(head, inputs):
    params = head.init(jax.random.key(1), *inputs)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def twin(params, inputs, **options):
    tokens, relation, intra = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    return reference.relation_pooling(
        tokens.states,
        tokens.mask.astype(bool),
        tokens.pooled_index.astype(int),
        relation,
        intra.astype(bool),
        **{name: np.asarray(params[name], np.float64) for name in params},
        **options,
    )


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prior", [0.0, 2.0])
@pytest.mark.parametrize("gate", [False, True])
def test_equals_the_twin(inputs, beta, prior, gate):
    head = RelationPooling(D, beta=beta, pooled_logit=1.5, pooled_prior=prior, gate=gate)
    params = random_params(head, inputs)
    expected = twin(params, inputs, beta=beta, pooled_logit=1.5, pooled_prior=prior)
    np.testing.assert_allclose(head.apply({"params": params}, *inputs), expected, atol=2e-5)


def test_a_gate_starts_as_the_paper_s_head(inputs):
    head = RelationPooling(D, gate=True)
    params = head.init(jax.random.key(1), *inputs)["params"]
    assert params["gate"].shape == (D, D)
    plain = {name: x for name, x in params.items() if name != "gate"}
    np.testing.assert_array_equal(
        head.apply({"params": params}, *inputs),
        RelationPooling(D).apply({"params": plain}, *inputs),
    )


@pytest.mark.parametrize("gate", [False, True])
def test_gradient_equals_the_twins(inputs, gate):
    head = RelationPooling(D, gate=gate)
    params = random_params(head, inputs)
    weights = np.random.default_rng(3).normal(size=(N, R, D))
    grads = jax.grad(lambda p: jnp.sum(head.apply({"params": p}, *inputs) * weights))(params)
    for name in params:
        (numeric,) = reference.gradient(
            lambda x, name=name: np.sum(twin({**params, name: x}, inputs, beta=0.6) * weights),
            params[name],
        )
        np.testing.assert_allclose(grads[name], numeric, atol=2e-3, rtol=2e-3)
        assert np.abs(numeric).max() > 1e-3


def test_padding_gets_no_attention_and_changes_nothing(inputs):
    tokens, relation, intra = inputs
    head = RelationPooling(D)
    params = random_params(head, inputs)
    weights = head.apply({"params": params}, *inputs, method="attention")
    assert np.all(np.asarray(weights)[~np.repeat(tokens.mask[:, None], R, 1)] == 0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    noisy = tokens._replace(states=jnp.where(tokens.mask[..., None], tokens.states, 1e3))
    np.testing.assert_array_equal(
        head.apply({"params": params}, noisy, relation, intra),
        head.apply({"params": params}, *inputs),
    )


def test_pooled_bias_acts_under_the_intra_relation_alone(inputs):
    tokens = inputs[0]
    head = RelationPooling(D, beta=0.5, pooled_logit=50.0)
    weights = head.apply({"params": random_params(head, inputs)}, *inputs, method="attention")
    on_pooled = np.take_along_axis(
        np.asarray(weights), np.asarray(tokens.pooled_index)[:, None, None], axis=2
    )[..., 0]
    assert np.all(on_pooled[:, 0] > 0.999)
    assert np.all(on_pooled[:, 1:] < 0.999)


def test_hard_selection_is_the_pooled_token(inputs):
    head = RelationPooling(D, beta=1.0, pooled_logit=1e4)
    params = head.init(jax.random.key(0), *inputs)["params"]
    z = head.apply({"params": params}, *inputs)
    pooled = inputs[0].pooled
    expected = pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(z[:, 0], expected, atol=1e-6)


def test_initialisations(inputs):
    identity = RelationPooling(D).init(jax.random.key(0), *inputs)["params"]
    np.testing.assert_array_equal(identity["value"], np.eye(D))
    np.testing.assert_array_equal(identity["output"], np.eye(D))
    assert 0 < np.abs(identity["query"]).max() < 0.2
    plain = RelationPooling(D, head_init="plain").init(jax.random.key(0), *inputs)["params"]
    assert np.abs(plain["value"] - np.eye(D)).max() > 0.1
    with pytest.raises(ValueError, match="identity"):
        RelationPooling(D, head_init="zeros").init(jax.random.key(0), *inputs)


def test_learned_prior_is_a_parameter(inputs):
    head = RelationPooling(D, pooled_prior=3.0, learn_pooled_prior=True)
    params = head.init(jax.random.key(0), *inputs)["params"]
    assert params["pooled_prior"] == 3.0
    grads = jax.grad(lambda p: head.apply({"params": p}, *inputs)[..., 0].sum())(params)
    assert grads["pooled_prior"] != 0


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("is_intra", [False, True])
def test_a_folded_head_is_the_head(inputs, gate, is_intra):
    """The pass over a catalogue's states takes the head apart from them (`fold`)."""
    tokens, relation, _ = inputs
    intra = jnp.full(R, is_intra)
    head = RelationPooling(dim=D, gate=gate, pooled_prior=0.7, head_init="plain")
    variables = {"params": random_params(head, inputs)}
    folded = head.apply(variables, relation, intra, method="fold")
    logits = jnp.einsum("ntd,rd->nrt", tokens.states, folded.query)
    pooled = jnp.arange(T) == tokens.pooled_index[:, None]
    logits += jnp.where(pooled[:, None], folded.pooled_logit[:, None], 0)
    weights = jax.nn.softmax(logits, axis=-1, where=tokens.mask[:, None])
    z = jnp.einsum("nrt,ntd,rde->nre", weights, tokens.states, folded.matrix)
    z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
    expected = head.apply(variables, tokens, relation, intra)
    np.testing.assert_allclose(z, expected, atol=2e-5)

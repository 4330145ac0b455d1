"""RCML as a whole: its size, its parts, and its reduction to CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from transformers import CLIPConfig

from rcml_jax.losses.clip import clip
from rcml_jax.losses.rcml import relation_contrastive
from rcml_jax.models.rcml import RCML
from rcml_jax.models.two_towers import TwoTowers
from tests.models.test_encoders import batch, tiny

assert batch  # a fixture


def build(batch, **pooling):
    ids, images = batch
    model = RCML(tiny(), FrozenDict(pooling))
    return model, jax.jit(model.init)(jax.random.key(0), ids, ids, images)


def test_vit_b32_has_the_papers_parameters():
    model = RCML(CLIPConfig())
    ids = jnp.ones((1, 8), jnp.int32)
    shapes = jax.eval_shape(
        lambda key: model.init(key, ids, ids, jnp.zeros((1, 224, 224, 3))), jax.random.key(0)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 152_325_889


def test_text_only_and_image_only_calls(batch):
    ids, images = batch
    model, variables = build(batch)
    relations = ids[:2]
    both = model.apply(variables, relations, ids, images)
    assert both["text"].shape == both["image"].shape == (3, 2, 12)
    text, image = (
        model.apply(variables, relations, ids),
        model.apply(variables, relations, None, images),
    )
    assert set(text) == {"relation", "text"}
    assert set(image) == {"relation", "image"}
    np.testing.assert_allclose(text["text"], both["text"], atol=1e-6)
    np.testing.assert_allclose(image["image"], both["image"], atol=1e-6)


def test_one_relation_at_a_time_is_the_same(batch):
    ids, images = batch
    model, variables = build(batch)
    intra = jnp.asarray([True, False, False])
    together = model.apply(variables, ids, ids, images, intra)
    for r in range(3):
        alone = model.apply(variables, ids[r : r + 1], ids, images, intra[r : r + 1])
        np.testing.assert_allclose(alone["text"][:, 0], together["text"][:, r], atol=1e-6)
        np.testing.assert_allclose(alone["image"][:, 0], together["image"][:, r], atol=1e-6)


def test_reduces_to_clip_in_model_loss_and_gradient(batch):
    """Eq. 7–8: β = 1, a hard selection, self pairs and cross-modal terms only."""
    ids, images = batch
    model, variables = build(batch, beta=1.0, pooled_logit=1e4)
    n = len(ids)

    def rcml_loss(params):
        out = model.apply({"params": params}, ids[:1], ids, images, jnp.ones(1, bool))
        return relation_contrastive(
            out["text"].swapaxes(0, 1),
            out["image"].swapaxes(0, 1),
            jnp.arange(n)[None],
            jnp.arange(n)[None],
            pair_valid=jnp.ones((1, n), bool),
            related=jnp.eye(n, dtype=bool),
            valid=jnp.ones(n, bool),
            intra=jnp.ones(1, bool),
        )[0]

    def clip_loss(towers):
        out = TwoTowers(tiny()).apply({"params": towers}, ids, images)
        return clip(out["text"], out["image"], temperature=0.1)

    params = variables["params"]
    value, grads = jax.jit(jax.value_and_grad(rcml_loss))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(clip_loss))(params["towers"])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(grads["towers"]), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_pooled_prior_starts_from_clips_own_embedding(batch):
    """Zero-shot retrieval with the head is what it is without, under every relation."""
    ids, images = batch
    model, variables = build(batch, pooled_prior=12.0)
    with_head = model.apply(variables, ids[:2], ids, images)
    towers = {"params": variables["params"]["towers"]}
    without = TwoTowers(tiny()).apply(towers, ids, images)
    for name in ("text", "image"):
        for r in range(2):
            np.testing.assert_allclose(with_head[name][:, r], without[name], atol=1e-3)
    order = np.argsort(-without["text"] @ without["image"].T, axis=1)
    for r in range(2):
        scores = with_head["text"][:, r] @ with_head["image"][:, r].T
        np.testing.assert_array_equal(np.argsort(-scores, axis=1), order)


def test_the_relation_changes_the_embedding(batch):
    ids, images = batch
    model, variables = build(batch, head_init="plain")
    out = model.apply(variables, ids[:2], ids, images)
    for name in ("text", "image"):
        assert np.abs(out[name][:, 0] - out[name][:, 1]).max() > 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_are_float32_unit_vectors(batch, dtype):
    ids, images = batch
    model = RCML(tiny(), FrozenDict(), dtype)
    variables = model.init(jax.random.key(0), ids, ids, images)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    for value in model.apply(variables, ids, ids, images).values():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(value, axis=-1), 1, atol=1e-5)


def test_noise_is_added_to_the_sentences_in_multiples_of_their_length(batch):
    ids, images = batch
    model, variables = build(batch, gate=True)
    noise = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    found = model.apply(variables, ids, ids, images, noise=noise)
    relation = model.apply(variables, ids, method="relation")
    length = np.linalg.norm(relation, axis=1, keepdims=True)
    intra = jnp.zeros(3, bool)
    for name, inputs in (("text", ids), ("image", images)):
        method = f"pool_{name}"
        expected = model.apply(variables, inputs, relation + noise * length, intra, method=method)
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    plain = model.apply(variables, ids, ids, images)
    assert np.abs(plain["relation"] - found["relation"]).max() > 1e-2
    silent = model.apply(variables, ids, ids, images, noise=0 * noise)
    np.testing.assert_allclose(silent["text"], plain["text"], atol=1e-6)

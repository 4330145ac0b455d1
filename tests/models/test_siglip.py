"""SigLIP's towers: shapes, the pooled states, padding, the pooling head, RCML on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.rcml import RCML
from rcml_jax.models.towers.siglip import PoolingHead
from rcml_jax.models.two_towers import TwoTowers, joint_width, set_special_tokens, takes_packed
from tests import reference
from tests.models.checkpoints_on_disk import make_model
from tests.models.test_checkpoints import tiny_siglip

END, PAD, LONGEST, WIDTH = 1, 0, 12, 16


@pytest.fixture(scope="module")
def model():
    return make_model(tiny_siglip(), shake=lambda noise: 0.2 * noise)


@pytest.fixture(scope="module")
def batch():
    """Three texts of 4, 9 and 6 tokens, padded to 9, and images."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, (3, 9))
    for row, length in enumerate((4, 9, 6)):
        ids[row, length - 1], ids[row, length:] = END, PAD
    return jnp.asarray(ids), jnp.asarray(rng.integers(0, 256, (3, 16, 16, 3)), jnp.uint8)


def states(model, modality, given, **options):
    return model.apply(given, method=f"{modality}_states", **options)


def test_a_pooled_state_stands_before_the_tokens(model, batch):
    ids, images = batch
    text, image = states(model, "text", ids), states(model, "image", images)
    assert (text.states.shape, image.states.shape) == ((3, 10, WIDTH), (3, 5, WIDTH))
    for tokens in (text, image):
        np.testing.assert_array_equal(tokens.pooled_index, [0, 0, 0])
        np.testing.assert_array_equal(tokens.pooled, tokens.states[:, 0])
    assert image.mask.all()
    lengths = np.array([[4], [9], [6]])
    np.testing.assert_array_equal(text.mask, np.arange(10) <= lengths)
    assert joint_width(model.config) == WIDTH
    assert not takes_packed(model.config)


def test_the_pooled_text_is_the_last_position_of_the_padded_text(model, batch):
    ids, _ = batch
    text = model.params["text_model"]
    towers = model.module.bind(model.variables)
    hidden = np.asarray(towers.text_model.tokens(ids), np.float64)
    assert hidden.shape == (3, LONGEST, WIDTH)
    found = states(model, "text", ids)
    np.testing.assert_allclose(
        found.pooled, reference.dense(hidden[:, -1], text["head"]), atol=1e-5
    )
    expected = reference.dense(hidden[:, :9], text["head"])
    np.testing.assert_allclose(found.states[:, 1:], expected, atol=1e-5)
    # SigLIP's towers end in the joint space.
    own = states(model, "text", ids, projected=False)
    np.testing.assert_array_equal(own.states, found.states)


def test_what_pads_a_text_and_how_far_change_nothing(model, batch):
    ids, _ = batch
    embed = jax.jit(lambda ids: model.apply(ids)["text"])
    expected = embed(ids)
    after_end = jnp.cumsum(ids == END, axis=1) - (ids == END) > 0
    np.testing.assert_allclose(embed(jnp.where(after_end, 7, ids)), expected, atol=1e-6)
    longer = jnp.pad(ids, ((0, 0), (0, LONGEST - 9)), constant_values=END)
    np.testing.assert_allclose(embed(longer), expected, atol=1e-6)
    np.testing.assert_allclose(embed(ids[:1, :4]), expected[:1], atol=1e-6)
    # But the words themselves do.
    assert np.abs(embed(ids.at[:, 0].add(1)) - expected).max() > 1e-3


def test_a_text_may_lack_its_end(model, batch):
    """As a text that was cut off by another tokenizer: all of it is the text."""
    ids = batch[0].at[0].set(5)
    assert states(model, "text", ids).mask[0].all()


def test_the_tokenizers_ids_replace_the_configurations(model, batch):
    """The config.json of SigLIP's checkpoints has the ids of another tokenizer."""
    config = tiny_siglip(text={"eos_token_id": 49407, "pad_token_id": 1})
    set_special_tokens(config, end_id=END, pad_id=PAD)
    found = TwoTowers(config).apply(model.variables, batch[0])
    np.testing.assert_array_equal(found["text"], model.apply(batch[0])["text"])


@functools.cache
def head():
    config = tiny_siglip(vision={"layer_norm_eps": 1e-3, "num_attention_heads": 4}).vision_config
    module = PoolingHead(config)
    params = module.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(p + 0.2 * rng.normal(size=p.shape)), params)
    return module, params, rng.normal(size=(2, 3, WIDTH))


def test_the_pooling_head_is_its_twin_in_value_and_gradient():
    module, params, x = head()
    options = {"heads": 4, "name": "gelu_pytorch_tanh", "epsilon": 1e-3}
    twin = functools.partial(reference.attention_pooling, params=params, **options)
    pooled = lambda x: module.apply({"params": params}, x)[0]  # noqa: E731
    given = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(pooled(given), twin(x), atol=2e-5)
    weight = np.random.default_rng(2).normal(size=(2, WIDTH))
    found = jax.grad(lambda x: jnp.sum(weight * pooled(x)))(given)
    (expected,) = reference.gradient(lambda x: np.sum(weight * twin(x)), x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_tokens_own_state_is_what_the_head_makes_of_it_alone():
    module, params, x = head()
    apply = jax.jit(lambda x: module.apply({"params": params}, x))
    given = jnp.asarray(x, jnp.float32)
    pooled, own = apply(given)
    assert (pooled.shape, own.shape) == ((2, WIDTH), (2, 3, WIDTH))
    for t in range(3):
        alone, token = apply(given[:, t : t + 1])
        np.testing.assert_allclose(alone, own[:, t], atol=2e-6)
        np.testing.assert_allclose(token[:, 0], alone, atol=2e-6)
    # Not their mean: the MLP and the softmax lie between.
    assert np.abs(pooled - own.mean(1)).max() > 1e-2


@pytest.mark.parametrize("prior", [0.0, 100.0])
def test_rcml_on_siglip(model, batch, prior):
    ids, images = batch
    rcml = RCML(model.config, FrozenDict(pooled_prior=prior))
    inputs = ids[:2], ids, images
    params = jax.jit(rcml.init)(jax.random.key(0), *inputs)["params"]
    assert set(params["towers"]) == {"text_model", "vision_model", "logit_scale", "logit_bias"}
    assert {x.shape for x in params["head"].values()} == {(WIDTH, WIDTH)}
    params = {"towers": model.params, "head": params["head"]}
    out = jax.jit(rcml.apply)({"params": params}, *inputs)
    own = model.apply(ids, images)
    for name in ("text", "image"):
        assert out[name].shape == (3, 2, WIDTH)
        same = np.abs(out[name] - own[name][:, None]).max() < 1e-5
        assert same == (prior > 0)  # under a large prior the head gives the tower's embedding
    np.testing.assert_allclose(out["relation"], own["text"][:2], atol=1e-6)

    def loss(params):
        out = rcml.apply({"params": params}, *inputs)
        return jnp.sum(jnp.sin(3 * out["text"] * out["image"][::-1])) + jnp.sum(out["relation"][0])

    flat = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    assert all(np.isfinite(g).all() for g in flat.values())
    dead = {name for name, g in flat.items() if not np.abs(g).max() > 0}
    # Keys' biases shift every logit of a softmax alike; scale and bias are the loss's to use.
    used = {name for name in dead if not name.endswith(("k_proj/bias", "/logit_scale", "_bias"))}
    assert used <= ({"head/query", "head/key"} if prior else set())


def test_parameters_have_the_checkpoints_names(model):
    names = {name.replace("/", ".") for name in flatten_dict(model.params, sep="/")}
    assert {
        "text_model.embeddings.token_embedding.embedding",
        "text_model.head.bias",
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.encoder.layers.1.self_attn.out_proj.kernel",
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj.kernel",
        "vision_model.head.layernorm.scale",
        "logit_bias",
    } < names
    assert not any("class_embedding" in name or "pre_layrnorm" in name for name in names)


def test_bfloat16_computes_near_float32(model, batch):
    full = model.apply(*batch)
    half = TwoTowers(model.config, jnp.bfloat16).apply(model.variables, *batch)
    for name in full:
        assert half[name].dtype == jnp.float32
        assert np.sum(full[name] * half[name], axis=1).min() > 0.99


@pytest.mark.parametrize("remat", ["layers", "dots"])
def test_rematerialised_towers_are_the_plain_ones(model, batch, remat):
    def graded(remat):
        towers = TwoTowers(model.config, remat=remat)
        value = lambda p: sum(jnp.sum(jnp.sin(3 * x)) for x in towers.apply(p, *batch).values())  # noqa: E731
        return jax.jit(jax.value_and_grad(value))(model.variables)

    ours, theirs = graded(remat), graded("")
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *(x[1] for x in (ours, theirs)),
    )


# What is refused


def test_packed_texts(model, batch):
    packed = PackedTexts(batch[0], jnp.asarray([[1, 3]] * 3))
    with pytest.raises(UserError, match="only CLIP's text tower takes packed texts; give one text"):
        model.apply(packed)


def test_a_text_that_is_too_long(model):
    ids = jnp.ones((1, LONGEST + 1), jnp.int32)
    with pytest.raises(
        UserError, match=r"of 13 tokens is too long for the text tower, .* takes 12"
    ):
        model.apply(ids)


def test_images_of_another_size(model):
    with pytest.raises(UserError, match="takes 16×16 images, not"):
        model.apply(None, jnp.zeros((1, 24, 24, 3)))

"""Rematerialised towers: the plain ones in value, gradient and dropout, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import RobertaConfig

from rcml_jax.methods import build as build_method
from rcml_jax.models.towers.bert import Bert, small_bert_config
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.models.towers.vit import ViT, small_vit_config
from rcml_jax.models.two_towers import PairConfig, TwoTowers, build_towers
from tests.data.imagetext import write_news
from tests.methods.m3col_data import news_config
from tests.toy import tiny_config

SIZES = {"width": 16, "layers": 2, "heads": 2}
BERT = small_bert_config(**SIZES, vocab_size=50, pad_token_id=0, max_length=10, dropout=0.3)
VIT = small_vit_config(**SIZES, image_size=16, patch_size=8, dropout=0.3)
RNG = np.random.default_rng(0)
IDS = RNG.integers(4, 50, (4, 8)).astype(np.int32)
IMAGES = RNG.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
KEY = jax.random.key(7)


def clip_config(**sizes):
    options = {"vocab_size": 50, "eos_token_id": 3, "embed_dim": 12, "image_size": 16}
    return small_clip_config(**(options | {"patch_size": 8, "max_length": 10} | SIZES | sizes))


def roberta_config():
    return RobertaConfig(
        **{name: getattr(BERT, name) for name in ("hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=12,
        pad_token_id=1,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
    )


def clip(remat):
    return TwoTowers(clip_config(), remat=remat), (IDS, IMAGES), {}


def pair(remat):
    config = PairConfig(BERT, VIT, 12)
    return build_towers(config, remat=remat), (IDS, IMAGES), {}


def text(config, remat):
    mask = np.arange(8) < np.array([[8], [5], [3], [8]])
    options = {"deterministic": False, "rngs": {"dropout": KEY}}
    return Bert(config, remat=remat), (IDS, mask), options


def image(remat):
    options = {"deterministic": False, "rngs": {"dropout": KEY}}
    return ViT(VIT, remat=remat), (IMAGES,), options


MODELS = {
    "clip": clip,
    "bert and vit": pair,
    "bert with dropout": functools.partial(text, BERT),
    "roberta with dropout": functools.partial(text, roberta_config()),
    "vit with dropout": image,
}


def graded(make, remat):
    """A function from parameters to a value, in which every output has a part, and its gradient."""
    model, inputs, options = make(remat)

    def value(params):
        out = model.apply({"params": params}, *inputs, **options)
        return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(out))

    return jax.value_and_grad(value)


def assert_close(ours, theirs):
    """Within float32 rounding of the largest gradient; keys' biases have one of rounding alone."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), ours, theirs
    )


@functools.cache
def start(name):
    """Parameters of a plain model, and its value and gradient."""
    model, inputs, _ = MODELS[name]("")
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    return params, jax.jit(graded(MODELS[name], ""))(params)


@pytest.mark.parametrize(
    ("name", "remat"),
    [*((name, "layers") for name in MODELS), ("clip", "dots"), ("bert with dropout", "dots")],
)
def test_value_and_gradient_are_those_of_the_plain_model(name, remat):
    params, (value, gradient) = start(name)
    found = jax.jit(graded(MODELS[name], remat))(params)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert_close(found[1], gradient)


def test_dropout_is_drawn_by_the_key():
    """Else the comparison above would say nothing about it."""
    model, inputs, options = image("layers")
    params = start("vit with dropout")[0]
    apply = jax.jit(lambda key: model.apply({"params": params}, *inputs, **options | {"rngs": key}))
    first, again, other = (apply({"dropout": k}) for k in (KEY, KEY, jax.random.key(8)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_the_same(name):
    params, _ = start(name)
    model, inputs, _ = MODELS[name]("layers")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(params)]
    if name == "clip":
        again = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_models_side_by_side():
    """Under vmap, each with its own parameters and dropout."""
    params, _ = start("bert with dropout")
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
    keys = jax.random.split(KEY, 2)

    def value(remat, params, key):
        model, inputs, options = text(BERT, remat)
        out = model.apply({"params": params}, *inputs, **options | {"rngs": {"dropout": key}})
        return jnp.sum(jnp.sin(3 * out))

    def total(remat, params):
        return jnp.sum(jax.vmap(functools.partial(value, remat))(params, keys))

    ours, theirs = (jax.jit(jax.grad(functools.partial(total, r)))(both) for r in ("layers", ""))
    assert_close(ours, theirs)


def test_sharded_over_devices():
    params, (value, gradient) = start("clip")
    split = NamedSharding(Mesh(np.asarray(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    model = TwoTowers(clip_config(), remat="layers")

    def loss(params, *inputs):
        out = model.apply({"params": params}, *inputs)
        return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(out))

    inputs = [jax.device_put(x, split) for x in (IDS, IMAGES)]
    found = jax.jit(jax.value_and_grad(loss))(params, *inputs)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert_close(found[1], gradient)


def temporaries(make, remat):
    """Bytes beside inputs and outputs that the compiler plans for value and gradient."""
    model, inputs, _ = make(remat)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    compiled = jax.jit(graded(make, remat)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_less_memory_for_activations():
    config = clip_config(width=32, layers=6, image_size=32)
    images = np.random.default_rng(1).random((32, 32, 32, 3))

    def make(remat):
        return TwoTowers(config, remat=remat), (None, images), {}

    plain, dots, layers = (temporaries(make, remat) for remat in ("", "dots", "layers"))
    assert layers < dots < plain
    assert layers < 0.4 * plain


def test_less_memory_with_dropout():
    """Its masks are not kept either."""
    config = small_vit_config(width=32, layers=3, heads=2, image_size=32, patch_size=8, dropout=0.3)
    images = np.random.default_rng(1).random((32, 32, 32, 3))
    options = {"deterministic": False, "rngs": {"dropout": KEY}}

    def make(remat):
        return ViT(config, remat=remat), (images,), options

    assert temporaries(make, "layers") < 0.6 * temporaries(make, "")


def test_the_configuration_says_it(catalogue, tmp_path):
    for method in ("rcml", "clip"):
        built = build_method(tiny_config(catalogue, method=method, model__remat="dots"), tmp_path)
        model = built.model.bind({})
        assert (model.towers if method == "rcml" else model).remat == "dots"
    news = write_news(tmp_path / "news")
    built = build_method(news_config(news, model__remat="layers"), tmp_path)
    assert [encoder.remat for encoder in built.model.encoders.values()] == ["layers", "layers"]

"""A pair of towers: each encoder's own numbers, padding, the parameters' names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from rcml_jax.models.backbones import build_backbone, example_input
from rcml_jax.models.checkpoints import expected_params
from rcml_jax.models.rcml import RCML
from rcml_jax.models.two_towers import PairConfig, TwoTowers, build_towers
from tests.models import test_classification_encoders as encoders
from tests.models import test_encoders as clip
from tests.models.hugging_face import ORACLES, flax_model

DIM, PAD, WORDS = 12, 1, encoders.VOCABULARY
MODELS = {"bert": "FlaxBertModel", "roberta": "FlaxRobertaModel", "vit": "FlaxViTModel"}
PAIRS = [("bert", "clip"), ("roberta", "vit"), ("clip", "vit")]
CLIP = clip.tiny(image_size=8, patch_size=4, vocab_size=WORDS, layers=1)


def config_of(text, image):
    """Tiny towers of the width 16."""
    return PairConfig(
        CLIP.text_config if text == "clip" else encoders.tiny(text, layers=1),
        CLIP.vision_config if image == "clip" else encoders.tiny("vit", layers=1),
        DIM,
    )


@pytest.fixture(scope="module")
def inputs():
    """Three texts of different lengths, which end in the id 3, padded with the id 1; images."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, WORDS, (3, 9))
    ids[:, 0] = 2
    for row, end in enumerate((3, 8, 5)):
        ids[row, end], ids[row, end + 1 :] = 3, PAD
    return jnp.asarray(ids), jnp.asarray(rng.integers(0, 256, (3, 8, 8, 3)), jnp.uint8)


def states(towers, variables, ids, images):
    """Everything that a pair gives, to be compiled once."""
    one = {}
    for name, given in (("text", ids), ("image", images)):
        for projected in (True, False):
            options = {"projected": projected, "method": f"{name}_states"}
            one[f"{name} projected" if projected else name] = towers.apply(
                variables, given, **options
            )
    return one | {"both": towers.apply(variables, ids, images)}


@pytest.fixture(scope="module")
def built(inputs):
    """Towers, parameters away from their usual start and what they give, of a pair."""
    made = {}

    def build(text, image):
        if (text, image) not in made:
            towers = build_towers(config_of(text, image))
            rng = np.random.default_rng(1)
            shapes = jax.eval_shape(towers.init, jax.random.key(0), *inputs)
            variables = jax.tree.map(
                lambda x: np.float32(rng.normal(size=x.shape) * x.shape[0] ** -0.5), shapes
            )
            out = jax.jit(functools.partial(states, towers))(variables, *inputs)
            made[text, image] = towers, variables, out
        return made[text, image]

    return build


def hidden(oracle, kind, config, params, *given):
    """The states of a single encoder, Hugging Face's or ours, called by hand."""
    if oracle == "ours":
        apply = functools.partial(build_backbone(config).apply, method="tokens")
        return jax.jit(lambda p, *x: apply({"params": p}, *x))(params, *given)
    if kind == "vit":
        given = (jnp.moveaxis(given[0], 3, 1),)
    model = flax_model(MODELS[kind], config, add_pooling_layer=False)
    return jax.jit(lambda p, *x: model(*x, params=p).last_hidden_state)(params, *given)


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize(("text", "image"), PAIRS[:2])
def test_text_states_are_the_encoders_projected_and_their_mean(oracle, text, image, built, inputs):
    towers, variables, out = built(text, image)
    params, mask = variables["params"], np.asarray(inputs[0] != PAD)
    config = towers.config.text_config
    theirs = hidden(oracle, text, config, params["text_model"], inputs[0], jnp.asarray(mask))
    expected = theirs @ params["text_projection"]["kernel"]
    mean = np.stack([row[m].mean(0) for row, m in zip(expected, mask, strict=True)])
    tokens = out["text projected"]
    assert tokens.states.shape == (3, 10, DIM)
    np.testing.assert_allclose(tokens.states[:, 1:], expected, atol=2e-5)
    np.testing.assert_allclose(tokens.pooled, mean, atol=2e-5)
    np.testing.assert_array_equal(tokens.mask[:, 1:], mask)
    assert tokens.mask[:, 0].all()
    assert tokens.mask.dtype == bool
    np.testing.assert_allclose(out["text"].states[:, 1:], theirs, atol=2e-5)


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize(("text", "image"), PAIRS[1:])
def test_image_states_are_the_encoders_projected(oracle, text, image, built, inputs):
    towers, variables, out = built(text, image)
    params = variables["params"]
    pixels, config = inputs[1] / np.float32(127.5) - np.float32(1), towers.config.vision_config
    theirs = hidden(oracle, "vit", config, params["vision_model"], pixels)
    expected = theirs @ params["visual_projection"]["kernel"]
    tokens = out["image projected"]
    assert tokens.states.shape == (3, 5, DIM)
    np.testing.assert_allclose(tokens.states, expected, atol=2e-5)
    np.testing.assert_allclose(tokens.pooled, expected[:, 0], atol=2e-5)
    assert tokens.mask.all()
    np.testing.assert_allclose(out["image"].states, theirs, atol=2e-5)


def test_a_pair_of_clips_towers_is_clip(built, inputs):
    parts = [built("clip", "vit")[1]["params"], built("bert", "clip")[1]["params"]]
    params = {name: parts[0][name] for name in ("text_model", "text_projection")}
    params |= {name: parts[1][name] for name in ("vision_model", "visual_projection")}
    pair, whole = TwoTowers(config_of("clip", "clip")), TwoTowers(CLIP)
    ours = jax.jit(pair.apply)({"params": params}, *inputs)
    theirs = jax.jit(whole.apply)({"params": params | {"logit_scale": jnp.float32(1)}}, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    # A tower does not change with the one beside it.
    np.testing.assert_allclose(built("clip", "vit")[2]["both"]["text"], theirs["text"], atol=1e-6)
    np.testing.assert_allclose(
        built("bert", "clip")[2]["both"]["image"], theirs["image"], atol=1e-6
    )
    np.testing.assert_array_equal(built("clip", "vit")[2]["text"].pooled_index, [3, 8, 5])


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize(("text", "image"), PAIRS)
def test_parameters_have_clips_names_and_each_encoders_own_under_them(oracle, text, image, built):
    towers, variables, _ = built(text, image)
    params, config = variables["params"], towers.config
    assert set(params) == {
        "text_model", "text_projection", "vision_model", "visual_projection"
    }  # fmt: skip
    for kind, own, name in (
        (text, config.text_config, "text_model"),
        (image, config.vision_config, "vision_model"),
    ):
        if kind != "clip":
            if oracle == "ours":
                shapes = expected_params(
                    build_backbone(own), *example_input(own), method="__call__"
                )
            else:
                model = flax_model(MODELS[kind], own, add_pooling_layer=False)
                shapes = dict(model.params_shape_tree)
            assert jax.tree.map(np.shape, params[name]) == jax.tree.map(lambda x: x.shape, shapes)
    for name in ("text_projection", "visual_projection"):
        assert {k: v.shape for k, v in params[name].items()} == {"kernel": (16, DIM)}


def test_towers_of_different_widths_meet_in_one_space(inputs):
    config = PairConfig(encoders.tiny("bert", width=24), encoders.tiny("vit", width=8), DIM)
    out, variables = jax.eval_shape(TwoTowers(config).init_with_output, jax.random.key(0), *inputs)
    assert out["text"].shape == out["image"].shape == (3, DIM)
    shapes = [variables["params"][f"{n}_projection"]["kernel"].shape for n in ("text", "visual")]
    assert shapes == [(24, DIM), (8, DIM)]


@pytest.mark.parametrize(("text", "image"), PAIRS)
def test_padding_changes_nothing(text, image, built, inputs):
    towers, variables, out = built(text, image)
    longer = jnp.pad(inputs[0], ((0, 0), (0, 1)), constant_values=PAD)
    found = jax.jit(towers.apply)(variables, longer)
    assert set(found) == {"text"}
    np.testing.assert_allclose(found["text"], out["both"]["text"], atol=1e-5)
    # Nor does it change a token.
    assert not out["text"].mask[0].all()


def test_a_text_of_padding_alone_is_finite(built, inputs):
    towers, variables, _ = built("bert", "clip")
    ids = jnp.full_like(inputs[0], PAD)
    tokens = jax.jit(lambda v, x: towers.apply(v, x, method="text_states"))(variables, ids)
    assert np.isfinite(tokens.states).all()
    np.testing.assert_array_equal(tokens.mask[0], np.arange(10) < 2)


@pytest.mark.parametrize(("text", "image"), PAIRS[:2])
def test_an_image_alone(text, image, built, inputs):
    towers, variables, out = built(text, image)
    found = jax.jit(towers.apply)(variables, None, inputs[1])
    assert set(found) == {"image"}
    np.testing.assert_allclose(found["image"], out["both"]["image"], atol=1e-6)


@pytest.mark.parametrize(("text", "image"), PAIRS[:2])
def test_gradients_reach_every_parameter(text, image, built, inputs):
    towers, variables, _ = built(text, image)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = towers.apply({"params": params}, *inputs)
        return jnp.sum(out["text"] * out["image"][::-1])

    flat = flatten_dict(gradient(variables["params"]), sep="/")
    dead = [name for name, g in flat.items() if not np.abs(g).max() > 0]
    # Keys' biases shift every logit of a softmax alike.
    assert all(name.endswith(("key/bias", "k_proj/bias")) for name in dead)


def test_bfloat16_computes_near_float32(built, inputs):
    towers, variables, out = built("roberta", "vit")
    half = build_towers(towers.config, jnp.bfloat16)
    found = jax.jit(functools.partial(states, half))(variables, *inputs)
    for name, value in out["both"].items():
        assert found[f"{name} projected"].states.dtype == jnp.bfloat16
        assert found["both"][name].dtype == jnp.float32
        assert np.sum(value * found["both"][name], axis=1).min() > 0.98


@pytest.mark.parametrize(("text", "image"), PAIRS[:2])
def test_rcml_on_a_pair(text, image, built, inputs):
    """Under a prior on the pooled token the head gives the towers' own embeddings."""
    ids, images = inputs
    towers, variables, given = built(text, image)
    model = RCML(towers.config, FrozenDict(pooled_prior=100.0))
    made = jax.eval_shape(model.init, jax.random.key(0), ids, ids, images)["params"]
    shapes = jax.tree.map(np.shape, variables["params"])
    assert jax.tree.map(lambda x: x.shape, made["towers"]) == shapes
    head = dict.fromkeys(("query", "key"), jnp.zeros((DIM, DIM)))
    head |= dict.fromkeys(("value", "output"), jnp.eye(DIM))
    assert {name: x.shape for name, x in made["head"].items()} == dict.fromkeys(head, (DIM, DIM))
    params = {"towers": variables["params"], "head": head}
    out = jax.jit(model.apply)({"params": params}, ids[:2], ids, images)
    for name, own in given["both"].items():
        assert out[name].shape == (3, 2, DIM)
        for r in range(2):
            np.testing.assert_allclose(out[name][:, r], own, atol=1e-5)
    np.testing.assert_allclose(out["relation"], given["both"]["text"][:2], atol=1e-6)

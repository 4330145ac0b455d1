"""The towers: Hugging Face's numbers, checkpoints on disk, and what a user can get wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rcml_jax.errors import UserError
from rcml_jax.models.towers.clip import IMAGE_MEAN, IMAGE_STD, small_clip_config
from rcml_jax.models.two_towers import TwoTowers, load_pretrained
from tests.models.checkpoints_on_disk import LAYOUTS, make_model, save_checkpoint
from tests.models.hugging_face import flax_model, needs_flax_classes


def tiny(**sizes):
    options = {"vocab_size": 50, "eos_token_id": 3, "width": 16, "layers": 2, "heads": 2}
    options |= {"embed_dim": 12, "image_size": 16, "patch_size": 8, "max_length": 10}
    return small_clip_config(**(options | sizes))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 50, (3, 10))
    ids[:, 0] = 1
    for row, end in enumerate((4, 9, 6)):
        ids[row, end] = 3
        ids[row, end + 1 :] = 0
    return jnp.asarray(ids), jnp.asarray(rng.integers(0, 256, (3, 16, 16, 3)), jnp.uint8)


@pytest.fixture(scope="module")
def model():
    return make_model(tiny())


def pixels(images):
    return (images / 255.0 - np.asarray(IMAGE_MEAN)) / np.asarray(IMAGE_STD)


@needs_flax_classes
def test_equals_hugging_face(batch, model):
    ids, images = batch
    theirs, params = flax_model("FlaxCLIPModel", model.config), {"params": model.params}
    shapes = jax.tree.map(lambda x: x.shape, dict(theirs.params_shape_tree))
    assert jax.tree.map(np.shape, model.params) == shapes
    out = model.apply(ids, images)
    attention = (jnp.cumsum(ids == 3, axis=1) - (ids == 3)) == 0
    text = theirs.get_text_features(ids, attention_mask=attention.astype(jnp.int32), **params)
    image = theirs.get_image_features(jnp.moveaxis(pixels(images), 3, 1), **params)
    for ours, theirs in ((out["text"], text), (out["image"], image)):
        theirs = theirs / jnp.linalg.norm(theirs, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_image_statistics_are_clips():
    constants = pytest.importorskip("transformers.image_utils")
    assert list(IMAGE_MEAN) == constants.OPENAI_CLIP_MEAN
    assert list(IMAGE_STD) == constants.OPENAI_CLIP_STD


def test_tokens_after_the_end_change_nothing(batch, model):
    ids, _ = batch
    short = model.apply(ids[:1, :5])["text"]
    np.testing.assert_allclose(model.apply(ids[:1])["text"], short, atol=1e-6)


def test_one_modality_may_be_missing(batch, model):
    ids, images = batch
    assert set(model.apply(ids)) == {"text"}
    assert set(model.apply(None, images)) == {"image"}


@needs_flax_classes
def test_every_image_token_passes_the_post_layer_norm(batch, model):
    _, images = batch
    tokens = model.apply(images, method="image_states")
    hidden = flax_model("FlaxCLIPModel", model.config).module.apply(
        {"params": model.params},
        pixels(images),
        method=lambda module, x: module.vision_model(pixel_values=x, return_dict=True)[0],
    )
    norm = model.params["vision_model"]["post_layernorm"]
    mean, deviation = hidden.mean(-1, keepdims=True), hidden.std(-1, keepdims=True)
    normed = (hidden - mean) / jnp.sqrt(deviation**2 + 1e-5) * norm["scale"] + norm["bias"]
    expected = normed @ model.params["visual_projection"]["kernel"]
    assert tokens.states.shape == expected.shape == (3, 5, 12)
    np.testing.assert_allclose(tokens.states, expected, atol=1e-4)


def test_legacy_end_token_is_the_largest_id(model):
    config = tiny()
    config.text_config.eos_token_id = 2
    ids = jnp.asarray([[1, 5, 49, 0, 0], [1, 49, 0, 0, 0]])
    tokens = TwoTowers(config).apply({"params": model.params}, ids, method="text_states")
    np.testing.assert_array_equal(tokens.pooled_index, [2, 1])


def test_bfloat16_computes_near_float32(batch, model):
    ids, images = batch
    full = model.apply(ids, images)
    half = TwoTowers(model.config, jnp.bfloat16).apply(model.variables, ids, images)
    for name in full:
        assert half[name].dtype == jnp.float32
        assert np.sum(full[name] * half[name], axis=1).min() > 0.99


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_load_in_every_layout(tmp_path, batch, model, layout):
    save_checkpoint(model, tmp_path, layout=layout)
    config, params = load_pretrained(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    found, expected = TwoTowers(config).apply({"params": params}, *batch), model.apply(*batch)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-6)


@needs_flax_classes
@pytest.mark.parametrize("safe", [False, True])
def test_what_hugging_faces_class_wrote_is_read(tmp_path, model, safe):
    theirs = flax_model("FlaxCLIPModel", model.config)
    theirs.save_pretrained(tmp_path, params=model.params, safe_serialization=safe)
    found = load_pretrained(str(tmp_path))[1]
    jax.tree.map(np.testing.assert_array_equal, found, model.params)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no model.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "never unpickled"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "names no shards"),
        ({"config.json": json.dumps(tiny().to_dict()), "model.safetensors": "x"}, "cannot load"),
    ],
)
def test_unusable_checkpoints_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path))


def test_unreachable_hub_name_is_one_sentence():
    with pytest.raises(UserError, match=r"cannot load a CLIP or SigLIP .* 'nobody/nothing'"):
        load_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"width": 15}, "heads"), ({"image_size": 15}, "patch_size"), ({"eos_token_id": 2}, "id 2")],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        tiny(**sizes)


def test_gradients_reach_every_parameter(batch, model):
    ids, images = batch

    def loss(params):
        out = model.module.apply({"params": params}, ids, images)
        return jnp.sum(out["text"] * out["image"][::-1])

    flat = flatten_dict(jax.grad(loss)(model.params))
    # Keys' biases shift every logit of a softmax alike, and logit_scale is the loss's to use.
    dead = {"/".join(p) for p, g in flat.items() if not np.abs(g).max() > 0}
    assert all("k_proj/bias" in name or name == "logit_scale" for name in dead)

"""The towers: Hugging Face's numbers, checkpoints on disk, and what a user can get wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import FlaxCLIPModel

from rcml_jax.errors import UserError
from rcml_jax.models.clip import IMAGE_MEAN, IMAGE_STD, small_clip_config
from rcml_jax.models.two_towers import TwoTowers, load_pretrained


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
def hugging_face():
    return FlaxCLIPModel(tiny(), seed=1)


def pixels(images):
    return (images / 255.0 - np.asarray(IMAGE_MEAN)) / np.asarray(IMAGE_STD)


def save_as_torch_would(model, directory, prefix=()):
    """PyTorch names and layouts in one safetensors file, written without torch."""
    tensors = {}
    for path, value in flatten_dict(model.params).items():
        value = np.asarray(value)
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        last = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
        tensors[".".join((*prefix, *path[:-1], last))] = value.copy(order="C")
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(model.config.to_json_string())


def test_equals_hugging_face(batch, hugging_face):
    ids, images = batch
    towers = TwoTowers(hugging_face.config)
    out = towers.apply({"params": hugging_face.params}, ids, images)
    attention = (jnp.cumsum(ids == 3, axis=1) - (ids == 3)) == 0
    text = hugging_face.get_text_features(ids, attention_mask=attention.astype(jnp.int32))
    image = hugging_face.get_image_features(jnp.moveaxis(pixels(images), 3, 1))
    for ours, theirs in ((out["text"], text), (out["image"], image)):
        theirs = theirs / jnp.linalg.norm(theirs, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_image_statistics_are_clips():
    constants = pytest.importorskip("transformers.image_utils")
    assert list(IMAGE_MEAN) == constants.OPENAI_CLIP_MEAN
    assert list(IMAGE_STD) == constants.OPENAI_CLIP_STD


def test_tokens_after_the_end_change_nothing(batch, hugging_face):
    ids, _ = batch
    towers = TwoTowers(hugging_face.config)
    variables = {"params": hugging_face.params}
    short = towers.apply(variables, ids[:1, :5])["text"]
    np.testing.assert_allclose(towers.apply(variables, ids[:1])["text"], short, atol=1e-6)


def test_one_modality_may_be_missing(batch, hugging_face):
    ids, images = batch
    towers, variables = TwoTowers(hugging_face.config), {"params": hugging_face.params}
    assert set(towers.apply(variables, ids)) == {"text"}
    assert set(towers.apply(variables, None, images)) == {"image"}


def test_every_image_token_passes_the_post_layer_norm(batch, hugging_face):
    _, images = batch
    towers = TwoTowers(hugging_face.config)
    tokens = towers.apply({"params": hugging_face.params}, images, method="image_states")
    assert tokens.states.shape == (3, 5, 12)
    hidden = hugging_face.module.apply(
        {"params": hugging_face.params},
        pixels(images),
        method=lambda module, x: module.vision_model(pixel_values=x, return_dict=True)[0],
    )
    norm = hugging_face.params["vision_model"]["post_layernorm"]
    mean, deviation = hidden.mean(-1, keepdims=True), hidden.std(-1, keepdims=True)
    normed = (hidden - mean) / jnp.sqrt(deviation**2 + 1e-5) * norm["scale"] + norm["bias"]
    expected = normed @ hugging_face.params["visual_projection"]["kernel"]
    np.testing.assert_allclose(tokens.states, expected, atol=1e-4)


def test_legacy_end_token_is_the_largest_id(hugging_face):
    config = tiny()
    config.text_config.eos_token_id = 2
    ids = jnp.asarray([[1, 5, 49, 0, 0], [1, 49, 0, 0, 0]])
    tokens = TwoTowers(config).apply({"params": hugging_face.params}, ids, method="text_states")
    np.testing.assert_array_equal(tokens.pooled_index, [2, 1])


def test_bfloat16_computes_near_float32(batch, hugging_face):
    ids, images = batch
    variables = {"params": hugging_face.params}
    full = TwoTowers(hugging_face.config).apply(variables, ids, images)
    half = TwoTowers(hugging_face.config, jnp.bfloat16).apply(variables, ids, images)
    for name in full:
        assert half[name].dtype == jnp.float32
        assert np.sum(full[name] * half[name], axis=1).min() > 0.99


def test_loads_flax_and_pytorch_named_checkpoints(tmp_path, batch, hugging_face):
    ids, images = batch
    expected = TwoTowers(hugging_face.config).apply({"params": hugging_face.params}, ids, images)
    hugging_face.save_pretrained(tmp_path / "flax")
    save_as_torch_would(hugging_face, tmp_path / "torch")
    for name in ("flax", "torch"):
        config, params = load_pretrained(str(tmp_path / name))
        found = TwoTowers(config).apply({"params": params}, ids, images)
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-6)


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


def test_gradients_reach_every_parameter(batch, hugging_face):
    ids, images = batch
    towers = TwoTowers(hugging_face.config)

    def loss(params):
        out = towers.apply({"params": params}, ids, images)
        return jnp.sum(out["text"] * out["image"][::-1])

    flat = flatten_dict(jax.grad(loss)(hugging_face.params))
    # Keys' biases shift every logit of a softmax alike, and logit_scale is the loss's to use.
    dead = {"/".join(p) for p, g in flat.items() if not np.abs(g).max() > 0}
    assert all("k_proj/bias" in name or name == "logit_scale" for name in dead)

"""Frozen towers of checkpoints: the models' numbers and Hugging Face's, and what is refused."""

import numpy as np
import pytest
from transformers import ResNetConfig

from rcml_jax.errors import UserError
from rcml_jax.models.frozen import load_towers
from tests.models import towers as saved
from tests.models.hugging_face import ORACLES, flax_model


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    models = {}
    for name in ("clip", "vit", "resnet", "bert"):
        (root / name).mkdir()
        models[name] = getattr(saved, f"save_{name}")(root / name)
    (root / "mean").mkdir()
    models["mean"] = saved.save_bert(root / "mean", mean=True)
    return root, models


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


IDS = np.array([[2, 4, 5, 3, 0], [2, 9, 10, 5, 3]])
MASK = (IDS != 0).astype(np.int32)


def load(directories, *names, **options):
    root, _ = directories
    return load_towers("+".join(str(root / name) for name in names), **options)


def normalized(pixels, mean, std):
    return (pixels / 255 - np.asarray(mean)) / np.asarray(std)


def nchw(pixels):
    return np.moveaxis(pixels, 3, 1)


def states(oracle, name, model, *inputs):
    """The token states of a ViT or a BERT, by our module or by Hugging Face's."""
    if oracle == "ours":
        return model.apply(*inputs, method="tokens")
    if name == "FlaxViTModel":
        inputs = (nchw(inputs[0]),)
    theirs = flax_model(name, model.config, add_pooling_layer=False)
    return theirs(*inputs, params=model.params).last_hidden_state


@pytest.mark.parametrize("oracle", ORACLES)
def test_clip_projected_is_clips_embedding(oracle, directories, pixels):
    image, text = load(directories, "clip")
    model = directories[1]["clip"]
    ids = np.array([[1, 7, 3, 0], [1, 9, 8, 3]])
    assert (image.width, image.size, text.width, text.size) == (8, 16, 8, 32)
    assert (text.directory / "tokenizer.json").is_file()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    given = normalized(pixels, mean, std)
    if oracle == "ours":
        expected = {
            "image": model.apply(given, method="image_states").pooled,
            "text": model.apply(ids, method="text_states").pooled,
        }
    else:
        theirs = flax_model("FlaxCLIPModel", model.config)
        expected = {
            "image": theirs.get_image_features(nchw(given), params=model.params),
            "text": theirs.get_text_features(ids, params=model.params),
        }
    # Their quick_gelu has a sigmoid in the place of our tanh, which rounds otherwise.
    np.testing.assert_allclose(image.embed(pixels), expected["image"], rtol=1e-4, atol=3e-5)
    np.testing.assert_allclose(text.embed(ids), expected["text"], rtol=1e-4, atol=3e-5)


def test_clip_penultimate_is_what_is_projected(directories, pixels):
    params = directories[1]["clip"].params
    projected, penultimate = (
        load(directories, "clip", layer=layer) for layer in ("projected", "penultimate")
    )
    given = {"image": pixels, "text": np.array([[1, 7, 3, 0]])}
    for name, a, b in zip(("image", "text"), penultimate, projected, strict=True):
        kernel = params[{"image": "visual", "text": "text"}[name] + "_projection"]["kernel"]
        assert a.width == 16
        found = np.asarray(a.embed(given[name])) @ kernel
        np.testing.assert_allclose(found, b.embed(given[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("oracle", ORACLES)
def test_vit_and_bert_give_their_first_state(oracle, directories, pixels):
    image, text = load(directories, "vit", "bert")
    models = directories[1]
    given = normalized(pixels, 0.5, 0.5)
    expected = states(oracle, "FlaxViTModel", models["vit"], given)[:, 0]
    np.testing.assert_allclose(image.embed(pixels), expected, rtol=1e-4, atol=1e-5)
    expected = states(oracle, "FlaxBertModel", models["bert"], IDS, MASK)[:, 0]
    np.testing.assert_allclose(text.embed(IDS, MASK), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("oracle", ORACLES)
def test_the_mean_where_the_checkpoint_says_so(oracle, directories):
    _, text = load(directories, "vit", "mean")
    own = np.asarray(states(oracle, "FlaxBertModel", directories[1]["mean"], IDS, MASK))
    expected = [own[0, :4].mean(0), own[1].mean(0)]
    np.testing.assert_allclose(text.embed(IDS, MASK), expected, rtol=1e-4, atol=1e-5)
    _, first = load(directories, "vit", "mean", pooling="first")
    np.testing.assert_allclose(first.embed(IDS, MASK), own[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("oracle", ORACLES)
def test_resnet_gives_its_pooled_map_by_its_own_statistics(oracle, directories, pixels):
    image, _ = load(directories, "resnet", "bert")
    assert (image.width, image.size) == (6, 16)
    given, model = (
        normalized(pixels, (0.5, 0.4, 0.3), (0.229, 0.224, 0.225)),
        directories[1]["resnet"],
    )
    if oracle == "ours":
        expected = model.apply(given)
    else:
        theirs = flax_model("FlaxResNetModel", model.config)
        expected = theirs(nchw(given), params=model.params).pooler_output.reshape(2, 6)
    np.testing.assert_allclose(image.embed(pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_clip_tower_may_stand_on_either_side(directories, pixels):
    image, text = load(directories, "clip", "bert")
    assert (image.kind, text.kind) == ("clip", "bert")
    assert image.embed(pixels).shape == (2, 8)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("vit",), {}, "no text tower"),
        (("bert", "vit"), {}, "no image tower"),
        (("", "bert"), {}, "no config.json"),
        (("clip",), {"layer": "last"}, "layer='last' is unknown"),
        (("clip",), {"pooling": "max"}, "pooling='max' is unknown"),
    ],
)
def test_what_is_refused(directories, names, options, message):
    with pytest.raises(UserError, match=message):
        load(directories, *names, **options)


def test_a_missing_side():
    for name in ("+x", "x+", ""):
        with pytest.raises(UserError, match="lack a side"):
            load_towers(name)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_that_pytorch_saved(tmp_path, layer_type):
    """Batch statistics included, whose names transformers gets wrong for the basic layer."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    from transformers import ResNetModel

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    model = ResNetModel(ResNetConfig(**sizes, layer_type=layer_type)).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value)
    model.save_pretrained(tmp_path / "resnet")
    (tmp_path / "bert").mkdir()
    saved.save_bert(tmp_path / "bert")
    image, _ = load_towers(f"{tmp_path / 'resnet'}+{tmp_path / 'bert'}")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    given = nchw(normalized(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    given = given.astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(given)).pooler_output.numpy().reshape(2, -1)
    np.testing.assert_allclose(image.embed(pixels), expected, rtol=1e-4)

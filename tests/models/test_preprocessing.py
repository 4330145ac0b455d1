"""What a checkpoint's files say about images, pooling and tokens, beside Hugging Face's classes."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

from rcml_jax.data.images import to_array
from rcml_jax.data.tokenizer import Tokenizer, train_tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models.frozen import load_towers
from rcml_jax.models.preprocessing import (
    CLIP_STATISTICS,
    check_tokenizer,
    image_preprocessing,
    image_statistics,
    normalize,
    read_pooling,
)
from rcml_jax.models.towers.bert import Bert, small_bert_config
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.tasks.towers import inputs, towers_config
from rcml_jax.training.loop import _completed
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.models.towers import WORDS, save_bert, save_clip
from tests.toy import tiny_config


def processor(kind, options):
    """Hugging Face's processor, that of transformers 5 which needs no torchvision."""
    options = {k: v for k, v in options.items() if k != "image_processor_type"}
    try:
        module = importlib.import_module(
            f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}"
        )
        return getattr(module, f"{kind}ImageProcessorPil")(**options)
    except ImportError:
        return getattr(transformers, f"{kind}ImageProcessor")(**options)


def image(width, height):
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FILES = {
    "clip": ("CLIP", {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    "clip, halves": ("CLIP", {"size": 24, "crop_size": 24} | HALF),
    "clip, a margin": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": 24, "resample": 2}),
    "clip, floats": ("CLIP", {"size": 24, "crop_size": 24, "do_normalize": False}),
    "clip, other floats": ("CLIP", {"size": 24, "crop_size": 24, "rescale_factor": 1 / 127.5}),
    "vit": ("ViT", {"size": {"height": 24, "width": 24}}),
    "vit, lanczos": ("ViT", {"size": {"height": 24, "width": 24}, "resample": 1}),
    "siglip": ("Siglip", {"size": {"height": 24, "width": 24}}),
    "deit": ("DeiT", {"size": {"height": 32, "width": 32}, "crop_size": 24}),
    "resnet": ("ConvNext", {"size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 3}),
}


@pytest.mark.parametrize("name", FILES)
def test_images_are_those_of_the_processor(name):
    kind, options = FILES[name]
    found = image_preprocessing(options | {"image_processor_type": f"{kind}ImageProcessor"}, "", "")
    assert found.size == 24
    for width, height in ((60, 41), (33, 70), (24, 24)):
        pixels = jnp.asarray(to_array(image(width, height), found))[None]
        ours = normalize(pixels, found.mean, found.std, jnp.float32)[0]
        theirs = processor(kind, options)(image(width, height))["pixel_values"][0]
        np.testing.assert_allclose(ours, np.transpose(theirs, (1, 2, 0)), atol=2e-5)


def test_a_rescale_factor_is_folded_into_mean_and_deviation():
    options = {"size": 8, "crop_size": 8, "rescale_factor": 0.25} | HALF
    found = image_preprocessing(options, "clip", "x")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    ours = normalize(jnp.asarray(pixels), found.mean, found.std, jnp.float32)
    np.testing.assert_allclose(ours, (pixels * 0.25 - 0.5) / 0.5, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_processor_type": "LlavaImageProcessor"}, "is a LlavaImageProcessor"),
        ({"do_pad": True}, "has do_pad set"),
        ({"do_resize": False}, "does not resize"),
        ({"resample": 9}, "resample=9"),
        ({"size": {"longest_edge": 30}}, "longest_edge"),
        ({"size": {"height": 30, "width": 20}}, "'width': 20"),
        ({"size": {"shortest_edge": 24}, "crop_size": 32}, "crops 32 out of"),
        ({"do_center_crop": False}, "keeps the proportions"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_std": "half"}, "image_std"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0}, "crop_pct=0"),
        ({"image_processor_type": 7}, "is a 7"),
    ],
)
def test_what_is_not_done_here_is_refused(options, message):
    with pytest.raises(UserError, match=f"(?s)'x' .*{message}.*not supported"):
        image_preprocessing({"image_processor_type": "CLIPImageProcessor"} | options, "clip", "x")


def test_an_image_of_another_size_than_the_towers_is_refused():
    with pytest.raises(UserError, match=r"images of 24 pixels, its tower takes 32"):
        image_preprocessing({"size": 24, "crop_size": 24}, "clip", "x", size=32)


# Checkpoints on disk


@pytest.fixture
def clip(tmp_path):
    """A CLIP with a processor of other habits than OpenAI's."""
    (tmp_path / "clip").mkdir()
    save_clip(tmp_path / "clip")
    options = {"size": {"shortest_edge": 20}, "crop_size": 16, "resample": 2}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(options | HALF))
    return tmp_path / "clip"


def test_a_run_writes_down_what_the_files_say(clip, catalogue, tmp_path):
    config = tiny_config(catalogue, model__pretrained=str(clip))
    done = _completed(config, tmp_path / "run")
    written = json.loads(json.dumps(done.to_dict()))["model"]["preprocessing"]
    assert written["image"] == {
        "size": 16, "resize": 20, "squash": False, "resample": 2, "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }  # fmt: skip
    tokenizer = Tokenizer.from_pretrained_dir(clip)
    for model in (config.model, done.model):
        statistics = image_statistics(towers_config(model, tokenizer).vision_config)
        assert statistics == ((0.5,) * 3, (0.5,) * 3)
        framing = inputs(model).framing
        assert (framing.size, framing.resize, framing.resample) == (16, 20, 2)
    # What was written holds, whatever becomes of the file; a run without it is older.
    (clip / "preprocessor_config.json").unlink()
    assert inputs(done.model).framing.resize == 20
    assert inputs(config.model).framing.resize == 0
    with config.unlocked():
        del config.model.preprocessing
    assert _completed(config, tmp_path / "run") is config
    found = towers_config(config.model, tokenizer)
    assert image_statistics(found.vision_config) == CLIP_STATISTICS


def test_frozen_towers_take_the_checkpoints_statistics(clip):
    image, _ = load_towers(str(clip))
    assert (image.framing.resize, image.framing.resample) == (20, 2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    half = image.embed(pixels)
    np.testing.assert_allclose(half, image.embed(pixels / np.float32(127.5) - 1), atol=1e-5)
    # Without the file they are OpenAI's, and the embeddings are others.
    (clip / "preprocessor_config.json").unlink()
    assert np.abs(np.asarray(load_towers(str(clip))[0].embed(pixels)) - half).max() > 1e-3


def test_a_damaged_processor_file_is_named(clip):
    for text in ("{", "[]", "3", "null"):
        (clip / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=r"preprocessor_config\.json is damaged"):
            load_towers(str(clip))


# Pooling


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls_token"),
        ({"pooling_mode_mean_tokens": False}, "nothing"),
    ],
)
def test_the_pooling_is_the_files(tmp_path, options, expected):
    assert read_pooling(str(tmp_path)) == ""
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(options))
    if expected in ("cls", "mean"):
        assert read_pooling(str(tmp_path)) == expected
        return
    with pytest.raises(UserError, match=f"pools its tokens by .*{expected}"):
        read_pooling(str(tmp_path))


def test_layers_behind_the_pooling_are_refused(tmp_path):
    names = ("Transformer", "Pooling", "Dense")
    modules = [{"type": f"sentence_transformers.models.{name}", "path": name} for name in names]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="a layer Dense behind its transformer"):
        read_pooling(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert read_pooling(str(tmp_path)) == "cls"
    (tmp_path / "modules.json").write_text('["Pooling"]')
    with pytest.raises(UserError, match=r"modules\.json of .* is damaged"):
        read_pooling(str(tmp_path))


def test_the_pooled_state_is_the_first_token_or_the_mean():
    config = small_bert_config(
        vocab_size=9, pad_token_id=0, width=8, layers=1, heads=2, max_length=6
    )
    ids = np.array([[1, 5, 6, 2, 0, 0], [1, 3, 2, 0, 0, 0]], np.int32)
    params = Bert(config).init(jax.random.key(0), ids, ids > 0)
    pool = lambda: Bert(config).apply(  # noqa: E731
        params, ids, lambda x: x, method="token_states"
    )
    states = Bert(config).apply(params, ids, ids > 0, method="tokens")
    mean = np.stack([states[0, :4].mean(0), states[1, :3].mean(0)])
    np.testing.assert_allclose(pool().pooled, mean, atol=1e-6)
    config.pooling = "cls"
    found = pool()
    np.testing.assert_allclose(found.pooled, states[:, 0], atol=1e-6)
    np.testing.assert_array_equal(found.mask, ids > 0)


def test_a_sentence_model_of_the_cls_token(tmp_path, catalogue):
    for name in ("text", "clip"):
        (tmp_path / name).mkdir()
    save_bert(tmp_path / "text")
    pooling = tmp_path / "text" / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_cls_token": true}')
    config = tiny_config(catalogue, model__text_pretrained=str(tmp_path / "text"))
    done = _completed(config, tmp_path / "run")
    assert done.model.preprocessing.pooling == "cls"
    tokenizer = Tokenizer.from_pretrained_dir(tmp_path / "text")
    assert towers_config(done.model, tokenizer).text_config.pooling == "cls"


# Tokens


def test_a_tokenizer_larger_than_its_embedding_and_another_end_token(tmp_path):
    tokenizer = train_tokenizer(WORDS, 300)
    count = tokenizer.vocab_size
    clip = small_clip_config(vocab_size=count, eos_token_id=3).text_config
    check_tokenizer("x", clip, tokenizer, 3)
    with pytest.raises(UserError, match="ends a text at token 49407, its tokenizer with token 3"):
        check_tokenizer("x", clip, tokenizer, 49407)
    clip.vocab_size = count - 1
    with pytest.raises(UserError, match=f"has {count} ids, its text tower embeds {count - 1}"):
        check_tokenizer("x", clip, tokenizer, 3)
    sizes = {"width": 8, "layers": 1, "heads": 2, "max_length": 8}
    bert = small_bert_config(**sizes, vocab_size=count, pad_token_id=1)
    with pytest.raises(UserError, match="pads with token 0, its text tower with 1"):
        check_tokenizer("x", bert, tokenizer)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"eos_token_id": 7}, "ends a text at token 7"), ({"vocab_size": 10}, "embeds 10")],
)
def test_frozen_towers_check_their_tokenizer(tmp_path, sizes, message):
    tokenizer = train_tokenizer(WORDS, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    options = {"vocab_size": tokenizer.vocab_size, "eos_token_id": 3} | sizes
    config = small_clip_config(**options, width=16, layers=1, heads=2, embed_dim=8, image_size=16)
    save_checkpoint(make_model(config), tmp_path, layout="torch")
    with pytest.raises(UserError, match=message):
        load_towers(str(tmp_path))

"""Texts and images beside Hugging Face's CLIP processor, which needs no torch for either."""

import importlib.util
import io
import json

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import images
from rcml_jax.data.packing import LENGTHS
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models.towers.clip import IMAGE_MEAN, IMAGE_STD
from tests.parity.vocabulary import (
    write_siglip2_vocabulary,
    write_siglip_vocabulary,
    write_vocabulary,
)

transformers = pytest.importorskip("transformers")
try:  # transformers 5 calls so what needs no torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

TEXTS = [
    "red heart",
    "Both of them SHOW a heart",
    "  white \t space \n\r and\u00a0more\u2003of it  ",
    "don't we've I'M they'll 'S it''s",
    "in 2024: 1,234.50 € (½ off!!) ... ???",
    "snake_case a-b c/d #tag @name x=y",
    "São Tomé & Príncipe; e\u0301te\u0301 ÉTÉ; Straße; İstanbul",
    "漢字 и кириллица, עברית العربية ไทย",
    "🍎 👩‍👩‍👧‍👦 🏳️‍🌈 ☎️",
    "zero\u200bwidth \u00ad soft, \u0000 nul and \u2028 line",
    "<p>a &amp; b</p>",
    "",
    "   ",
    "heart " * 200,
    "unbreakable" * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hugging_face(folder):
    return transformers.CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def rows(ids, mask):
    """The ids of each text without its padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.astype(bool), strict=True)]


@pytest.mark.parametrize("length", [77, 16])
def test_tokens_are_equal(folder, hugging_face, length):
    ours = Tokenizer.from_pretrained_dir(folder)
    ids, mask = ours.encode(TEXTS, length, lengths=())
    theirs = hugging_face(
        TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, theirs["attention_mask"])
    lengths = {len(row) for row in rows(ids, mask)}
    assert {2, length} < lengths
    assert len(rows(ids, mask)[0]) == 4  # start, "red", "heart", end: the merges are used
    assert (ours.start_id, ours.end_id, ours.pad_id) == (
        hugging_face.bos_token_id,
        hugging_face.eos_token_id,
        hugging_face.pad_token_id,
    )


def test_a_saved_tokenizer_is_read_as_it_is(folder, hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    for source in (tmp_path, folder):
        ids, mask = Tokenizer.from_pretrained_dir(source).encode(TEXTS, 77)
        assert rows(ids, mask) == hugging_face(TEXTS, truncation=True)["input_ids"]
        assert ids.shape[1] in LENGTHS


def test_only_hugging_face_takes_a_special_token_from_a_text(folder, hugging_face):
    texts = ["a <|endoftext|> b", "<|startoftext|>"]
    ours = Tokenizer.from_pretrained_dir(folder)
    found = rows(*ours.encode(texts, 77))
    assert found == hugging_face(texts, split_special_tokens=True)["input_ids"]
    assert found != hugging_face(texts, split_special_tokens=False)["input_ids"]
    assert all(row.count(ours.end_id) == 1 for row in found)


# --- SigLIP ---------------------------------------------------------------------------------------

SIGLIP_TEXTS = [*TEXTS, "a ▁ b▁", "!!", "! ab", "ab !", "ΣΑΣ ＡＢＣ", "\uff0c a，b", "a</s>b <pad>"]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    return write_siglip_vocabulary(tmp_path_factory.mktemp("siglip"), TEXTS)


def test_siglips_tokens_are_equal(siglip_folder):
    ours = Tokenizer.from_pretrained_dir(siglip_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(siglip_folder)
    # A text that spells a special token has here the ids of its letters.
    special = {text for text in SIGLIP_TEXTS if "</s>" in text}
    found = dict(zip(SIGLIP_TEXTS, rows(*ours.encode(SIGLIP_TEXTS, 64)), strict=True))
    for text in SIGLIP_TEXTS:
        if text not in special:
            assert found[text] == theirs(text, truncation=True, max_length=64)["input_ids"], text
    assert found["a</s>b <pad>"] == rows(*ours.encode(["asb pad"], 64))[0]
    assert {len(ids) for ids in found.values()} > {1, 64}
    assert (ours.start_id, ours.end_id, ours.pad_id) == (None, 1, theirs.pad_token_id)
    assert ours.decode(found["red heart"]) == "red heart"


def test_a_missing_sentencepiece_is_named(siglip_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name)
    )
    with pytest.raises(UserError, match=r"rcml_jax\[siglip\]"):
        Tokenizer.from_pretrained_dir(siglip_folder)


def test_siglip_2s_tokens_are_those_of_lower_case_texts(tmp_path):
    write_siglip2_vocabulary(tmp_path, TEXTS)
    ours = Tokenizer.from_pretrained_dir(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in TEXTS if "İ" not in text]  # Python and Rust lower it in their ways.
    expected = [
        [*theirs(text.lower(), add_special_tokens=False)["input_ids"][:63], 1] for text in texts
    ]
    assert rows(*ours.encode(texts, 64)) == expected
    assert len({tuple(ids) for ids in expected}) == len(texts)
    assert (ours.start_id, ours.end_id, ours.pad_id) == (None, 1, 0)


# --- Images -------------------------------------------------------------------------------------

SIZES = [(64, 64), (65, 64), (97, 31), (31, 97), (224, 224), (225, 224), (500, 333), (333, 500)]
# (An image one pixel high is to Hugging Face one whose channels come first.)
SIZES += [(640, 479), (7, 5), (5, 7), (2, 2), (2, 9), (255, 32)]


def noise(width, height, grain=8):
    """An image of blurred colours, each about `grain` pixels wide."""
    shape = (height // grain + 2, width // grain + 2, 3)
    small = np.random.default_rng(width).integers(0, 256, shape).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data):
    """What Hugging Face's processor is given: the image decoded in full."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def ours(data, size):
    return images.to_array(images.open_rgb(data), size)


def theirs(image, size, normalise=False):
    """CLIPImageProcessor's image: uint8, or normalised float32 (size, size, 3)."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_normalize=normalise,
        do_rescale=normalise,
    )
    return processor(image)["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", [32, 33, 224])
def test_png_images_are_equal(size):
    for width, height in SIZES:
        data = encoded(noise(width, height))
        found = ours(data, size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, theirs(opened(data), size), str((width, height)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_opaque_images_of_every_mode_are_equal(mode):
    image = noise(90, 61).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert opened(data).mode == mode
    np.testing.assert_array_equal(ours(data, 32), theirs(opened(data), 32))


def test_transparent_parts_are_white_here_and_hidden_colours_there():
    image = noise(90, 61).convert("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    data = encoded(image)
    canvas = Image.new("RGBA", image.size, "white")
    white = Image.alpha_composite(canvas, image).convert("RGB")
    np.testing.assert_array_equal(ours(data, 32), theirs(white, 32))


def test_normalised_pixels_are_equal():
    data = encoded(noise(100, 80))
    pixels = (ours(data, 32).astype(np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
    np.testing.assert_allclose(pixels, theirs(opened(data), 32, True), atol=1e-5)


@pytest.mark.parametrize("shape", [(700, 50), (50, 1001), (33, 320), (3, 2000)])
def test_long_strips_are_within_two_grey_levels(shape):
    data = encoded(noise(*shape))
    difference = np.abs(ours(data, 32).astype(int) - theirs(opened(data), 32))
    assert difference.max() <= 2


@pytest.mark.parametrize("shape", [(1001, 667), (667, 1001), (999, 1333), (2017, 1511), (900, 901)])
def test_jpegs_decoded_small_stay_near(shape):
    """A JPEG decoded at its own smaller scale is not the full one, but shows the same cut-out.

    Bounds, in grey levels of 255 on images as restless as these: 1.5 on average, 12 at most.
    """
    data = encoded(noise(*shape, grain=16), "JPEG", quality=92)
    for size in (32, 224):
        difference = np.abs(ours(data, size).astype(int) - theirs(opened(data), size))
        assert difference.mean() < 1.5
        assert difference.max() <= 12
    # Those that are not decoded at a smaller scale are equal.
    for kind in ("RGB", "L"):
        data = encoded(noise(*shape).resize((120, 90)).convert(kind), "JPEG")
        np.testing.assert_array_equal(ours(data, 64), theirs(opened(data), 64))


def test_the_vocabulary_is_in_clips_format(folder):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert list(vocab.values()) == list(range(len(vocab)))
    assert [len([t for t in vocab if len(t) == 1]), vocab["heart</w>"] > 512] == [256, True]
    assert (folder / "merges.txt").read_text("utf-8").startswith("#version: 0.2\n")

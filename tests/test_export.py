"""The export of a run: what it writes is what was trained, and every kind of bad input."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tokenizers
from flax.core import FrozenDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from rcml_jax.cli import export
from rcml_jax.cli.export import export_run
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.export.towers import save_clip
from rcml_jax.methods import build
from rcml_jax.models.rcml import RCML
from rcml_jax.models.two_towers import TwoTowers, load_pretrained
from rcml_jax.training import step, workdir
from rcml_jax.training.checkpoint import Checkpoints, read_params
from tests.toy import ROOT, tiny_config

#: What tests/parity/test_export.py compares, too.
TEXTS = ["kind3 place7", "Kind 11,  place0", "an <end> in a text", "kind1 " * 40]
SENTENCES = ["both kind3", "both place7", "something else"]


def write_run(catalogue, directory, **options):
    """A work directory with a checkpoint of random parameters, as if its one step were done."""
    config = tiny_config(catalogue, **{"steps": 1, "optimizer__warmup_steps": 0} | options)
    workdir.prepare(directory, config)
    method = build(config, directory)
    data = method.batches()
    batch = next(data)
    params = method.init(jax.random.key(0), batch)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    # Biases, norms and a head of which no two numbers are the same.
    leaves = [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    state = step.create(jax.tree.unflatten(tree, leaves), optax.sgd(0.1), jax.random.key(1))
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, data, {"best": 0.0, "bad": 0, "stopped": False, "pending": []}, 0.5)
    checkpoints.wait()
    checkpoints.close()
    return method


RESULT = {
    "method": "rcml",
    "dataset": "catalogue",
    "split": "test",
    "retrieval": {
        "hit@5": {"tt": 0.5, "ii": 0.25, "ti": 0.125, "it": 0.375, "avg": 0.4375},
        "queries": 40,
    },
    "relation_type": {"top3": {"avg": 0.625}},
    "relation_validity": {"accuracy": 0.75},
    "protocol": {"ties": "count against the model", "scoring": {"relation": "pooled"}},
}


@pytest.fixture(scope="module")
def runs(catalogue, tmp_path_factory):
    """Name → (method, work directory, exported directory) of RCML and a baseline."""
    folder = tmp_path_factory.mktemp("export")
    options = {
        "rcml": {
            "model__learn_pooled_prior": True,
            "model__pooled_logit": 3.0,
            "model__gate": True,
        },
        "siglip": {"loss__learn_temperature": True, "method": "siglip"},
    }
    found = {}
    for name, chosen in options.items():
        directory, target = folder / name, folder / "exported" / name
        method = write_run(catalogue, directory, **chosen)
        if name == "rcml":
            (directory / "eval.json").write_text(json.dumps(RESULT))
        export_run(directory, target)
        found[name] = (method, directory, target)
    return found


def item_images(method, count=5):
    return method.task.images(np.arange(count))


def main(capsys, *args):
    """(status, stdout, stderr) of the command."""
    capsys.readouterr()
    status = export.main(["export", *map(str, args)])
    return status, *capsys.readouterr()


# --- What works -----------------------------------------------------------------------------------


def test_the_files_of_an_export(runs):
    clip = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    clip |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {p.name for p in runs["siglip"][2].iterdir()} == clip
    assert {p.name for p in runs["rcml"][2].iterdir()} == clip | {"relation_pooling.safetensors"}
    assert {p.name for p in runs["rcml"][2].parent.iterdir()} == {"rcml", "siglip"}  # no leftovers
    assert len({p.stat().st_mode for p in runs["rcml"][2].iterdir()}) == 1


def test_towers_come_back_to_the_bit(runs):
    for method, directory, target in runs.values():
        params = read_params(directory)["towers"]
        config, found = load_pretrained(str(target))
        scale = found.pop("logit_scale")
        params.pop("logit_scale")
        jax.tree.map(np.testing.assert_array_equal, found, params)
        assert config.text_config.eos_token_id == method.task.tokenizer.end_id == 3
        temperature = float(method.temperature(read_params(directory)))
        np.testing.assert_allclose(np.exp(-scale), temperature, rtol=1e-6)
    tokenizer = Tokenizer.from_pretrained_dir(target)
    ids, _ = tokenizer.encode(TEXTS, 16)
    np.testing.assert_array_equal(ids, method.task.encode(TEXTS))
    images = item_images(method)
    towers = TwoTowers(config).apply({"params": found | {"logit_scale": scale}}, ids, images)
    params = jax.tree.map(jnp.asarray, read_params(directory))
    batch = {"items": {"ids": ids, "images": images}}
    ours = method.embed(params, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ours, towers)


def test_the_head_gives_the_same_embeddings(runs):
    method, directory, target = runs["rcml"]
    params = read_params(directory)
    config, towers = load_pretrained(str(target))
    head = load_file(target / "relation_pooling.safetensors")
    with safe_open(target / "relation_pooling.safetensors", "np") as file:
        options = json.loads(file.metadata()["options"])
    assert (options["beta"], options["pooled_logit"]) == (0.6, 3.0)
    assert options["intra_relation"] == method.task.sentence(-1)
    pooling = FrozenDict(beta=0.6, pooled_logit=3.0, learn_pooled_prior=True, gate=True)
    assert head["gate"].any()
    inputs = method.task.encode(SENTENCES), method.task.encode(TEXTS), item_images(method)
    intra = jnp.array([False, True, False])
    model = RCML(config, pooling)
    found = model.apply({"params": {"towers": towers, "head": head}}, *inputs, intra)
    ours = method.model.apply({"params": params}, *inputs, intra)
    jax.tree.map(np.testing.assert_array_equal, found, ours)
    assert found["text"].shape == (4, 3, 16)


def test_a_prior_that_is_not_learned_is_in_the_file(runs, tmp_path):
    _, directory, _ = runs["rcml"]
    config = workdir.load_config(directory)
    config.model.pooled_prior = 2.5
    head = dict(read_params(directory)["head"])
    del head["pooled_prior"]
    export._save_head(tmp_path / "head.safetensors", config.model, head)
    assert load_file(tmp_path / "head.safetensors")["pooled_prior"] == 2.5


def test_images_and_tokens_are_processed_as_here(runs):
    method, _, target = runs["rcml"]
    processor = json.loads((target / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": method.task.images.size}
    assert processor["resample"] == 3
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == method.task.max_length == 16
    names = json.loads((target / "special_tokens_map.json").read_text())
    assert names == {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    text = json.loads((target / "config.json").read_text())["text_config"]
    ids = [method.task.tokenizer.start_id, method.task.tokenizer.end_id]
    assert [text["bos_token_id"], text["eos_token_id"]] == ids


def test_transformers_reads_the_tokenizer(runs):
    auto = pytest.importorskip("transformers").AutoTokenizer
    method, _, target = runs["rcml"]
    tokenizer = auto.from_pretrained(target)
    found = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="np")
    assert set(found) == {"input_ids", "attention_mask"}
    ids, mask = method.task.tokenizer.encode(TEXTS, 16, lengths=())
    np.testing.assert_array_equal(found["input_ids"], ids)
    np.testing.assert_array_equal(found["attention_mask"], mask)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == TEXTS[0]


def test_the_card_has_figures_and_code(runs):
    card = (runs["rcml"][2] / "README.md").read_text()
    assert "| 50.0 | 25.0 | 12.5 | 37.5 | 43.8 | 62.5 | 75.0 |" in card
    assert "The test split of catalogue (40 queries), percent:" in card
    assert "- ties: count against the model" in card
    assert "- scoring:\n  - relation: pooled" in card
    assert "weight of the identification term 1" in card
    assert str(ROOT.parent) not in card
    card = (runs["siglip"][2] / "README.md").read_text()
    assert "This run was not evaluated" in card
    assert "- SigLIP's bias -9." in card
    assert "identification" not in card
    assert "relation_pooling" not in card
    for _, _, target in runs.values():
        text = (target / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        compile(code, "README.md", "exec")
        for name in re.findall(r"`(\w+\.safetensors)`", text):
            assert (target / name).is_file()


def test_the_command_without_torch_into_an_empty_directory(runs, tmp_path):
    target = tmp_path / "empty"
    target.mkdir()
    code = (
        "import sys\n"
        "from rcml_jax.cli.export import main\n"
        "status = main(sys.argv)\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"--workdir={runs['rcml'][1]}", "--to", str(target)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{target}: README.md, config.json, model.safetensors")
    for path in runs["rcml"][2].iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()


# --- What does not --------------------------------------------------------------------------------


def fails(capsys, *args):
    """The sentence on stderr of a command that ends with status 2."""
    status, out, err = main(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


@pytest.fixture
def copy(runs, tmp_path):
    """A work directory of RCML that may be changed."""
    return pathlib.Path(shutil.copytree(runs["rcml"][1], tmp_path / "run"))


def change(directory, **options):
    path = directory / "config.json"
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in options.items()})
    path.write_text(json.dumps(config.to_dict()))


def test_options_that_are_missing_or_unknown(capsys, tmp_path):
    assert "needs --workdir" in fails(capsys, "--to=x")
    assert "needs --to" in fails(capsys, "--workdir=x")
    assert "--force" in fails(capsys, "--workdir=x", "--to=y", "--force")
    assert "no config.json" in fails(capsys, "--workdir", tmp_path, "--to", tmp_path / "out")


def test_nothing_is_overwritten(capsys, copy, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("mine")
    for place in (target, target / "file"):
        assert "exists already" in fails(capsys, "--workdir", copy, "--to", place)
    assert [p.read_text() for p in target.iterdir()] == ["mine"]
    assert "cannot write" in fails(capsys, "--workdir", copy, "--to", target / "file" / "deeper")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "mine"}


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_leaves_nothing_behind(capsys, copy, tmp_path, monkeypatch, kind):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device") if kind is OSError else kind("No space left")

    monkeypatch.setattr(export, "save_file", full)  # the head's: the towers are written by then
    out = tmp_path / "out"
    message = fails(capsys, "--workdir", copy, "--to", out)
    assert f"cannot write {out}: No space left" in message
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_another_method_and_a_run_that_is_not_finished(capsys, copy, tmp_path):
    to = ("--to", tmp_path / "out")
    change(copy, steps=12)
    (copy / "eval.json").unlink()
    assert "not finished: it stands at step 1 of 12" in fails(capsys, "--workdir", copy, *to)
    change(copy, steps=1, method="m3col")
    assert "config.method='m3col' is unknown" in fails(capsys, "--workdir", copy, *to)
    change(copy, method="rcml")
    shutil.rmtree(copy / "checkpoints" / "1")
    assert "no whole checkpoint" in fails(capsys, "--workdir", copy, *to)
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoints" in fails(capsys, "--workdir", copy, *to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: change(run, model__width=32), "another model than config.json describes"),
        (lambda run: (run / "tokenizer.json").unlink(), "no tokenizer file"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "damaged"),
        (lambda run: (run / "eval.json").write_text("{"), "eval.json is damaged"),
    ],
)
def test_damaged_runs_leave_nothing_behind(capsys, copy, tmp_path, spoil, message):
    spoil(copy)
    assert message in fails(capsys, "--workdir", copy, "--to", tmp_path / "new" / "out")
    assert list(tmp_path.glob("new/*")) == []


def test_an_end_token_that_pytorch_would_not_find(runs, tmp_path):
    config, params = load_pretrained(str(runs["rcml"][2]))
    ids = {"start_id": 1, "end_id": 5, "pad_id": 0}
    with pytest.raises(UserError, match="end a text at token 3, the tokenizer with token 5"):
        save_clip(tmp_path, config, params, **ids, temperature=0.1)
    # Before transformers 4.31: the largest id ends the text, and 2 in the configuration says so.
    config.text_config.eos_token_id = 2
    last = config.text_config.vocab_size - 1
    with pytest.raises(UserError, match=f"end a text at token {last}, the tokenizer with token 5"):
        save_clip(tmp_path, config, params, **ids, temperature=0.1)
    assert list(tmp_path.iterdir()) == []
    save_clip(tmp_path, config, params, **(ids | {"end_id": last}), temperature=0.1)
    assert load_pretrained(str(tmp_path))[0].text_config.eos_token_id == last


def test_towers_that_are_not_clips(capsys, copy, tmp_path, monkeypatch):
    from rcml_jax.models.two_towers import PairConfig
    from rcml_jax.tasks import towers

    pair = PairConfig(None, None, 16)
    monkeypatch.setattr(towers, "towers_config", lambda model, tokenizer: pair)
    assert "only CLIP's own towers" in fails(capsys, "--workdir", copy, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_start_token(tmp_path):
    words = tokenizers.models.WordLevel({"<eos>": 0, "<pad>": 1, "cat": 2}, unk_token="<pad>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").start_id is None
    with pytest.raises(UserError, match="has no start token"):
        export.write_tokenizer_files(tmp_path / "out", tmp_path / "tokenizer.json", 8)

"""eval.py on work directories whose config.json lacks options of today."""

import json
import shutil

import pytest

from rcml_jax.cli import commands
from rcml_jax.training import loop
from rcml_jax.training.workdir import load_config
from tests.cli.test_commands import fails, run
from tests.toy import tiny_config
from tests.toy_run import make_run


@pytest.fixture(scope="module")
def made(catalogue, tmp_path_factory):
    """A work directory, and what eval.py prints and writes of it."""
    workdir = make_run(catalogue, tmp_path_factory.mktemp("older") / "run")
    status = commands.evaluate(["eval.py", f"--workdir={workdir}"])
    assert status == 0
    return workdir, json.loads((workdir / "eval.json").read_text())


def older(made, tmp_path, *names):
    """A copy whose configuration lacks options, given as dotted names."""
    workdir = tmp_path / "older"
    shutil.copytree(made[0], workdir)
    (workdir / "eval.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    for name in names:
        *sections, last = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        del section[last]
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_options_that_are_off_or_of_the_evaluation_take_their_defaults(made, tmp_path, capsys):
    names = "model.text_pretrained", "model.freeze", "loss.block", "evaluation", "data.threads"
    # Nothing asks for the last one, so that its value does not matter.
    workdir = older(made, tmp_path, *names, "loss.identification_weight")
    before = (workdir / "config.json").read_text()
    status, _, err = run(commands.evaluate, [f"--workdir={workdir}"], capsys)
    assert status == 0, err
    assert json.loads((workdir / "eval.json").read_text()) == made[1]
    assert (workdir / "config.json").read_text() == before


def test_an_option_that_was_lacking_may_be_given(made, tmp_path, capsys):
    workdir = older(made, tmp_path, "evaluation.similarity")
    fails(
        commands.evaluate, [f"--workdir={workdir}", "--config.evaluation.similarity=cosin"], capsys,
        "evaluation.similarity='cosin' is unknown",
    )  # fmt: skip


def test_an_option_that_is_needed_is_named(made, tmp_path, capsys):
    workdir = older(made, tmp_path, "model.beta", "selection")
    fails(
        commands.evaluate, [f"--workdir={workdir}"], capsys,
        f"{workdir} was trained by an older version, without config.model.beta",
        workdir / "config.json", "(the default is 0.6 now)",
    )  # fmt: skip
    assert not (workdir / "eval.json").exists()


def test_other_errors_are_not_taken_for_it(made, tmp_path, monkeypatch):
    workdir = older(made, tmp_path, "model.beta")

    def broken(*_):
        raise KeyError("unrelated")

    monkeypatch.setattr(loop, "evaluate", broken)
    with pytest.raises(KeyError, match="unrelated"):
        commands.evaluate(["eval.py", f"--workdir={workdir}"])


def test_what_is_there_is_left_as_it_is(catalogue):
    config = tiny_config(catalogue)
    before = config.to_dict()
    assert commands.complete(config) == {}
    assert config.to_dict() == before


@pytest.mark.parametrize("method", ["clip", "m3col", "alignment"])
def test_defaults_are_those_of_the_methods_file(method, made, tmp_path):
    config = load_config(older(made, tmp_path))
    for section in ("loss", "model", "optimizer"):
        del config[section]
    config.method = method
    lacking = commands.complete(config)
    expected = {
        "clip": ("loss.identification_weight", "model.freeze"),
        "m3col": ("loss.unimodal_weight", "model.remat"),
        "alignment": ("towers.layer", "towers.names"),
    }
    on, off = expected[method]
    assert lacking[on]
    assert config[off] in ("", 0)


def test_a_source_of_ones_own(made, tmp_path):
    config = load_config(older(made, tmp_path, "model.freeze", "model.beta"))
    config.data.name = "mine"
    assert commands.complete(config) == {"model.beta": 0.6}
    assert config.model.freeze == ""

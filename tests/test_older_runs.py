"""eval.py on work directories whose config.json lacks options of today."""

import json
import shutil

import pytest

from rcml_jax.cli import commands
from tests.cli.test_commands import fails, run
from tests.toy_run import make_run


@pytest.fixture(scope="module")
def made(catalogue, tmp_path_factory):
    """A work directory, and what eval.py prints and writes of it."""
    workdir = make_run(catalogue, tmp_path_factory.mktemp("older") / "run")
    status = commands.evaluate(["eval.py", f"--workdir={workdir}"])
    assert status == 0
    return workdir, json.loads((workdir / "eval.json").read_text())


def changed(made, tmp_path, change):
    """A copy whose configuration was changed by a function."""
    workdir = tmp_path / "older"
    shutil.copytree(made[0], workdir)
    (workdir / "eval.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    change(config)
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_options_have_the_values_of_before_they_existed(made, tmp_path, capsys):
    def change(config):
        del config["model"]["store_frozen"], config["loss"]["function"]
        del config["batch"]["sentence_noise"]

    workdir = changed(made, tmp_path, change)
    before = (workdir / "config.json").read_text()
    status, _, err = run(commands.evaluate, [f"--workdir={workdir}"], capsys)
    assert status == 0, err
    assert json.loads((workdir / "eval.json").read_text()) == made[1]
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize("name", ["model.beta", "evaluation.similarity"])
def test_any_other_option_is_named(made, tmp_path, capsys, name):
    section, last = name.split(".")
    workdir = changed(made, tmp_path, lambda config: config[section].pop(last))
    fails(
        commands.evaluate, [f"--workdir={workdir}"], capsys,
        f"{workdir} is of an older version, without config.{name}: train anew, or write",
        workdir / "config.json", "rcml-train --help",
    )  # fmt: skip
    assert not (workdir / "eval.json").exists()


def test_a_value_that_was_spoilt_is_named_with_its_file(made, tmp_path, capsys):
    workdir = changed(made, tmp_path, lambda config: config["loss"].update(temperature=-1.0))
    path = workdir / "config.json"
    wanted = f"{path}: config.loss.temperature=-1.0 must be from"
    fails(commands.evaluate, [f"--workdir={workdir}"], capsys, wanted)

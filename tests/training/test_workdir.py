"""The work directory: made once, of one configuration, never over something else."""

import json
import math

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation.measures import values_at
from rcml_jax.parsing import read_json
from rcml_jax.training.workdir import load_config, prepare, write_json
from tests.methods.m3col_data import news_config
from tests.toy import tiny_config


def trained(workdir, config):
    """A work directory that looks as if it held a checkpoint."""
    prepare(workdir, config)
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "tokenizer.json").write_text("{}")
    return workdir


def test_a_new_work_directory_holds_its_configuration(tmp_path):
    config = tiny_config(tmp_path / "data")
    workdir = prepare(tmp_path / "a" / "b", config)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert load_config(workdir).to_dict() == config.to_dict()
    before = (workdir / "config.json").read_text()
    assert prepare(workdir, config) == workdir
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
    "options",
    [
        {"data.dir": "elsewhere"},
        {"data.threads": 4},
        {"log_every": 7},
        {"tensorboard": True},
        {"evaluation.similarity": "all"},
        {"platform": "cpu"},
        {"devices": 8},
        {"parallel": "pmap"},
        {"model.remat": "layers"},
        {"micro_batch": 4},
        {"loss.chunk_size": 2},
        {"loss.pair_chunk_size": 2},
    ],
)
def test_what_does_not_touch_the_figures_may_change(tmp_path, options):
    trained(tmp_path / "run", tiny_config(tmp_path))
    prepare(tmp_path / "run", tiny_config(tmp_path, **options))


def test_parts_that_are_contrasted_by_themselves_may_not_change(tmp_path):
    workdir = trained(tmp_path / "run", news_config(tmp_path, accumulation="micro", micro_batch=4))
    with pytest.raises(UserError, match=r"micro_batch \(4 there, 2 here\)"):
        prepare(workdir, news_config(tmp_path, accumulation="micro", micro_batch=2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 1}, "seed (42 there, 1 here)"),
        ({"model.width": 32}, "model.width (16 there, 32 here)"),
        ({"data.split_seed": 1}, "data.split_seed (0 there, 1 here)"),
        ({"method": "clip"}, "method ('rcml' there, 'clip' here)"),
    ],
)
def test_anything_else_is_another_configuration(tmp_path, options, text):
    workdir = trained(tmp_path / "run", tiny_config(tmp_path))
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError) as error:
        prepare(workdir, tiny_config(tmp_path, **options))
    assert str(error.value).startswith(f"{workdir} was trained with another configuration: {text}")
    assert "give another --workdir, or the old values" in str(error.value)
    assert (workdir / "config.json").read_text() == before
    assert (workdir / "tokenizer.json").exists()


def test_at_most_three_differences_are_shown(tmp_path):
    workdir = trained(tmp_path / "run", tiny_config(tmp_path))
    other = tiny_config(tmp_path, **{f"model.{n}": 2 for n in ("width", "layers", "embed_dim")})
    other.seed, other.steps = 1, 1
    with pytest.raises(UserError, match=r"model.embed_dim .*; model.layers .*; .* and more; give"):
        prepare(workdir, other)


def test_options_that_one_side_lacks_are_differences(tmp_path):
    config = tiny_config(tmp_path)
    workdir = trained(tmp_path / "run", config)
    with config.unlocked():
        config.novelty = 3
    with pytest.raises(UserError, match=r"novelty \('unset' there, 3 here\)"):
        prepare(workdir, config)


def test_a_start_that_failed_leaves_the_directory_free(tmp_path):
    workdir = prepare(tmp_path / "run", tiny_config(tmp_path, method="clip"))
    (workdir / "tokenizer.json").write_text("{}")
    config = tiny_config(tmp_path)
    prepare(workdir, config)
    assert load_config(workdir).method == "rcml"
    assert not (workdir / "tokenizer.json").exists()


def test_other_folders_are_not_taken(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is not empty and holds no config.json; give an empty"):
        prepare(tmp_path, tiny_config(tmp_path))
    with pytest.raises(UserError, match=r"cannot make the work directory .*file"):
        prepare(tmp_path / "file", tiny_config(tmp_path))
    with pytest.raises(UserError, match=r"cannot make the work directory .*Not a directory"):
        prepare(tmp_path / "file" / "below", tiny_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_kill_before_the_configuration_was_whole(tmp_path):
    (tmp_path / "config.json.part").write_text('{"me')
    prepare(tmp_path, tiny_config(tmp_path))
    assert load_config(tmp_path).method == "rcml"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_damaged_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is not valid|config.json lacks"):
        load_config(tmp_path)


def test_what_json_lacks_is_null(tmp_path):
    path = tmp_path / "eval.json"
    value = {"a": {"values": [math.nan, 0.5]}, "b": (np.float32(math.inf), np.int64(3)), "c": 2.5}
    write_json(path, value | {"d": np.array([1.0, -math.inf])})
    text = path.read_text()
    expected = {"a": {"values": [None, 0.5]}, "b": [None, 3], "c": 2.5, "d": [1.0, None]}
    assert read_json(text) == expected  # it refuses NaN and Infinity
    assert values_at(expected, "a") == values_at(expected, "e") == []
    assert values_at(expected, "c") == [2.5]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    (tmp_path / "full.json.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*full.json: No space left"):
        write_json(tmp_path / "full.json", {})
    assert not (tmp_path / "full.json").exists()

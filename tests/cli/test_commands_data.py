"""train.py on data in which something is wrong: one sentence, or a report of what was left out."""

import json
import pathlib
import shutil

import pytest

from rcml_jax.cli import commands
from tests.cli.test_commands import fails
from tests.toy import arguments, start, write_rows


@pytest.fixture
def own_catalogue(catalogue, tmp_path):
    """A copy of the catalogue to be spoilt."""
    folder = tmp_path / "catalogue"
    shutil.copytree(catalogue, folder, ignore=shutil.ignore_patterns(".cache"))
    return folder


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_empty_relation(own_catalogue, tmp_path, capsys):
    path = own_catalogue / "relations.jsonl"
    rows = rows_of(path)
    rows[4]["sentence"] = "  "
    write_rows(path, rows)
    args = arguments(own_catalogue, tmp_path / "run")
    fails(commands.train, args, capsys, "relations.jsonl, line 5: 'sentence' is empty")


def test_a_corrupt_image_is_an_error_when_strict(own_catalogue, tmp_path, capsys):
    image = own_catalogue / "images" / "7.png"
    image.write_bytes(image.read_bytes()[:40])
    args = arguments(own_catalogue, tmp_path / "run", **{"data.strict": True})
    fails(commands.train, args, capsys, "items.jsonl, line 8", image, "cannot be decoded")


def test_a_corrupt_image_is_left_out_and_reported(own_catalogue, tmp_path):
    image = own_catalogue / "images" / "7.png"
    image.write_bytes(image.read_bytes()[:40])
    workdir = tmp_path / "run"
    # A process of its own, stopped at once by an option that is found wrong after the data.
    process = start("train.py", arguments(own_catalogue, workdir, **{"batch.size": 60}))
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: a batch of 60 items is larger than")
    (line,) = [line for line in err.splitlines() if "left out" in line]
    assert "1 of 60 items left out with all pairs" in line
    assert "i7" in line


def test_a_split_that_is_too_small_to_be_evaluated(own_catalogue, tmp_path, capsys):
    """It is told before the first step, although only a validation draws candidates."""
    items = rows_of(own_catalogue / "items.jsonl")[:20]
    kept = {row["id"] for row in items}
    pairs = rows_of(own_catalogue / "pairs.jsonl")
    write_rows(own_catalogue / "items.jsonl", items)
    write_rows(own_catalogue / "pairs.jsonl", [p for p in pairs if {p["a"], p["b"]} <= kept])
    named = {row["relation"] for row in rows_of(own_catalogue / "pairs.jsonl")}
    relations = rows_of(own_catalogue / "relations.jsonl")
    write_rows(own_catalogue / "relations.jsonl", [r for r in relations if r["id"] in named])
    workdir, small = tmp_path / "run", {"batch.size": 12, "batch.intra_pairs": 2}
    args = arguments(own_catalogue, workdir, **small)
    fails(commands.train, args, capsys, "the validation split", "unrelated items", "more items")
    assert not (workdir / "metrics.jsonl").exists()

"""rcml-report: what it prints and leaves behind, and every kind of bad input."""

import builtins
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from rcml_jax.cli.report import main
from tests.report.runs import (
    classification_result,
    relational_lines,
    relational_result,
    small_config,
    write_run,
)


def run(args, capsys):
    capsys.readouterr()
    status = main(["report", *map(str, args)])
    return status, *capsys.readouterr()


def fails(args, capsys, *parts):
    status, out, err = run(args, capsys)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.fixture
def workdir(tmp_path):
    """A run with an evaluation, but no checkpoint: nothing is computed and little drawn."""
    return write_run(tmp_path / "m3col", small_config("m3col"), classification_result())


def test_a_report_says_where_it_is(workdir, tmp_path, capsys):
    status, out, err = run(["--workdir", workdir, "--out", tmp_path / "deep" / "report"], capsys)
    assert status == 0, err
    page = tmp_path / "deep" / "report" / "index.html"
    assert out.startswith(f"wrote {page} in ")
    assert "Accuracy by epoch" in err
    text = page.read_text("utf-8")
    assert "<code>rcml-report --workdir" in text
    assert "Report: m3col" in text


def test_a_report_takes_the_place_of_an_older_one(workdir, tmp_path, capsys):
    lines = [{"step": 2, "kind": "train", "loss": 1.0}]
    other = write_run(tmp_path / "rcml", small_config(), None, lines)
    report = tmp_path / "report"
    assert run(["--workdir", other, "--out", report], capsys)[0] == 0
    assert (report / "curve-relational-loss.svg").is_file()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert run(["--workdir", workdir, "--out", report], capsys)[0] == 0
    assert not (report / "curve-relational-loss.svg").exists()
    assert "Report: m3col" in (report / "index.html").read_text("utf-8")
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_files_of_the_user_in_a_report_stay(workdir, tmp_path, capsys):
    report = tmp_path / "report"
    args = ["--workdir", workdir, "--out", report]
    assert run(args, capsys)[0] == 0
    mine = [report / name for name in ("notes.txt", "old.svg", "data/mine.csv", "own/a.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert run(args, capsys)[0] == 0
    assert [path.read_text() for path in mine] == ["mine"] * 4


def test_a_file_of_the_user_is_not_replaced_by_a_new_figure(workdir, tmp_path, capsys):
    report = tmp_path / "report"
    assert run(["--workdir", workdir, "--out", report], capsys)[0] == 0
    page = (report / "index.html").read_bytes()
    (report / "curve-relational-loss.svg").write_text("mine")
    other = write_run(tmp_path / "rcml", small_config(), None, relational_lines())
    status, _, err = run(["--workdir", other, "--out", report], capsys)
    assert status == 2
    assert "curve-relational-loss.svg is no file of the older report" in err
    assert (report / "curve-relational-loss.svg").read_text() == "mine"
    assert (report / "index.html").read_bytes() == page


def test_a_report_without_a_list_of_its_files_is_not_replaced(workdir, tmp_path, capsys):
    (tmp_path / "report").mkdir()
    page = tmp_path / "report" / "index.html"
    page.write_text('<meta name="generator" content="rcml_jax.report">')
    fails(["--workdir", workdir, "--out", page.parent], capsys, "no list of its files")
    assert page.is_file()


@pytest.mark.parametrize("name", ["notes.txt", "index.html"])
def test_nothing_else_is_overwritten(workdir, tmp_path, capsys, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("<html>my own page</html>")
    args = ["--workdir", workdir, "--out", tmp_path / "mine"]
    fails(args, capsys, "holds something else than a report; give another --out")
    assert (tmp_path / "mine" / name).read_text() == "<html>my own page</html>"


def test_what_a_killed_report_left_is_removed(workdir, tmp_path, capsys):
    """A folder of a dead process goes; that of a living one and the user's own stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    who = {"host": socket.gethostname(), "since": ""}
    notes = {"dead": who | {"pid": ended.pid}, "living": who | {"pid": os.getppid()}}
    for name, note in notes.items():
        part = tmp_path / f"report.part{name}"
        part.mkdir()
        (part / "half.svg").touch()
        (part / ".lock").touch()
        (part / ".lock.json").write_text(json.dumps(note))
    (tmp_path / f"report.part{ended.pid}").mkdir()
    (tmp_path / f"report.part{ended.pid}" / "mine.txt").write_text("mine")
    (tmp_path / "report.partial.txt").write_text("mine")
    assert run(["--workdir", workdir, "--out", tmp_path / "report"], capsys)[0] == 0
    left = {path.name for path in tmp_path.glob("report.part*")}
    assert left == {"report.partliving", f"report.part{ended.pid}", "report.partial.txt"}
    assert (tmp_path / f"report.part{ended.pid}" / "mine.txt").read_text() == "mine"
    assert not list((tmp_path / "report").glob(".lock*"))


def test_an_empty_folder_is_taken(workdir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["--workdir", workdir, "--out", tmp_path / "empty"], capsys)[0] == 0


def test_a_file_in_the_way_is_said(workdir, tmp_path, capsys):
    (tmp_path / "file").touch()
    fails(["--workdir", workdir, "--out", tmp_path / "file"], capsys, "give another --out")
    inside = ["--workdir", workdir, "--out", tmp_path / "file" / "report"]
    fails(inside, capsys, "cannot write the report")


def test_bad_arguments(workdir, tmp_path, capsys):
    out = ["--out", tmp_path / "report"]
    fails(out, capsys, "give --workdir")
    fails(["--workdir", tmp_path / "nowhere", *out], capsys, "there is no directory")
    fails(["--workdir", workdir, "--seed", "-1", *out], capsys, "must not be negative")
    (workdir / "eval.json").write_text('{"method": "m3')
    fails(["--workdir", workdir, *out], capsys, "eval.json is not valid JSON", "evaluate again")
    assert not (tmp_path / "report").exists()
    for option in ("--relation", "--data-dir", "--data-path"):
        fails(["--workdir", workdir, option, "caf\udce9"], capsys, "is not UTF-8 text")


def test_without_matplotlib_the_extra_is_named(workdir, tmp_path, capsys, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    fails(["--workdir", workdir, "--out", tmp_path / "r"], capsys, 'pip install "rcml_jax[plots]"')


def test_a_run_that_is_still_training_has_its_curves(tmp_path, capsys):
    workdir = write_run(tmp_path / "run", small_config(), None, relational_lines())
    status, _, err = run(["--workdir", workdir, "--out", tmp_path / "report"], capsys)
    assert status == 0, err
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert f"run has no eval.json yet: rcml-eval --workdir {workdir}" in text
    assert (tmp_path / "report" / "curve-relational-loss.svg").is_file()


def test_an_evaluation_with_holes_leaves_figures_out(tmp_path, capsys):
    result = relational_result()
    result["retrieval"] = result["relation_type"] = {}
    result["relation_validity"], result["protocol"] = {"accuracy": 0.5}, {}
    workdir = write_run(tmp_path / "run", small_config(), result)
    status, _, err = run(["--workdir", workdir, "--out", tmp_path / "report"], capsys)
    assert status == 0, err
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert f"eval.json has no controls; evaluate again: rcml-eval --workdir {workdir}" in text
    for what in ("retrieval/hit@5/tt", "relation_type/top3/tt", "relation_validity/probe"):
        assert f"lacks {what}; evaluate again" in text
    assert "metrics.jsonl is missing or empty in run" in text


def test_a_sweep_alone_is_a_report(tmp_path, capsys):
    for name, contrastive in (("full", "scheduled"), ("soft", "multi_soft_clip")):
        config = small_config("m3col", loss__contrastive=contrastive)
        result = classification_result((0.5, 0.7))
        write_run(tmp_path / "sweep" / name / "seed42", config, result)
    status, _, err = run(["--workdir", tmp_path / "sweep", "--out", tmp_path / "report"], capsys)
    assert status == 0, err
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "Variants: sweep" in text
    assert "lacks the variants full and “only &lt;modality&gt;”" in text
    assert (tmp_path / "report" / "variants-sweep.svg").is_file()


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    paths = [
        write_run(tmp_path / x / "run", small_config(model__beta=b), relational_result())
        for x, b in (("a", 0.1), ("b", 0.2))
    ]
    args = [part for path in paths for part in ("--workdir", path)]
    assert run([*args, "--out", tmp_path / "report"], capsys)[0] == 0
    rows = (tmp_path / "report" / "data" / "differences.csv").read_text().splitlines()
    assert rows == ['option,"a, run","b, run"', "model.beta,0.1,0.2"]


def test_an_error_analysis_needs_the_modalities_alone(tmp_path, capsys):
    import numpy as np

    right = {"full": [1, 1, 0, 0], "only_image": [1, 0, 1, 0], "only_text": [1, 0, 0, 0]}
    for name, hits in right.items():
        path = tmp_path / "sweep" / name / "seed42"
        modalities = name.removeprefix("only_") if name != "full" else ""
        config = small_config("m3col", data__modalities=modalities)
        result = classification_result()
        result["protocol"]["classes"] = ["cup", "mug", "jar & lid", "lid", "no sample"]
        write_run(path, config, result)
        labels = np.array([0, 1, 2, 0])
        heads = ("image", "text") if name == "full" else ()
        arrays = {"seed42/rows": labels, "seed42/labels": labels}
        arrays["seed42/fused"] = np.where(np.array(hits) == 1, labels, labels + 1)
        np.savez(path / "predictions.npz", **arrays, **{f"seed42/{head}": labels for head in heads})
    rows = [{"variant": name} for name in ("full", "only image", "only text")]
    (tmp_path / "sweep" / "table.json").write_text(json.dumps({"rows": rows}))
    assert run(["--workdir", tmp_path / "sweep", "--out", tmp_path / "report"], capsys)[0] == 0
    rows = (tmp_path / "report" / "data" / "errors-sweep.csv").read_text().splitlines()
    assert rows[:2] == ["image,text,multimodal right,multimodal wrong", "right,right,0.25,0.0"]
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "Error analysis: sweep" in text
    # Of the full method: the classes with errors first, none without a test sample.
    rows = (tmp_path / "report" / "data" / "confusions.csv").read_text().splitlines()
    assert rows[1:] == ["cup,cup,1.0", "cup,mug,1.0", "mug,mug,1.0", "jar & lid,lid,1.0"]
    cells = re.sub(r"\s*<[^>]*>\s*", "|", text[text.index("taken for</th>") :])
    expected = ("cup|2|50.0|mug 1.0", "jar &amp; lid|1|0.0|lid 1.0", "mug|1|100.0|–")
    assert re.sub(r"\|+", "|", cells).split("taken for|")[1].startswith("|".join(expected))

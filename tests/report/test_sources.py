"""Work directories, sweeps and studies as a report reads them, and every kind of bad one."""

import json
import pathlib

import pytest

from rcml_jax.errors import UserError
from rcml_jax.report.runs import differences, groups, labels_of, read_sources
from tests.report.runs import (
    classification_result,
    relational_result,
    small_config,
    write_run,
)


def write_sweep(path, table=None, method="rcml", finished=True):
    result = relational_result(method) if finished else None
    for folder, seed in (("model.beta=0", 42), ("model.beta=0", 7), ("no_relation_text", 42)):
        write_run(path / folder / f"seed{seed}", small_config(method, seed=seed), result)
    if table is not None:
        (path / "table.json").write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/rcml"], ["rcml"]),
        (["runs/rcml", "runs/no_relation_text"], ["rcml", "no relation text"]),
        (["a/run", "b/run", "b/clip"], ["a, run", "b, run", "clip"]),
        (["beta/full/seed42", "beta"], ["full, seed42", "beta"]),
        (["x/full/seed42", "y/full/seed42"], ["x, full, seed42", "y, full, seed42"]),
    ],
)
def test_labels_are_short_and_different(paths, labels):
    assert labels_of([pathlib.Path(path) for path in paths]) == labels


def test_runs_sweeps_and_studies_are_told_apart(tmp_path):
    run = write_run(tmp_path / "rcml", small_config(), relational_result())
    sweep = write_sweep(tmp_path / "sweep")
    study = {"method": "alignment", "precision": {}, "modality_gap": {}, "protocol": {}}
    study = write_run(tmp_path / "study", small_config("alignment"), study)
    classifier = write_run(tmp_path / "m3col", small_config("m3col"), classification_result())
    found = read_sources([run, sweep, study, classifier, run])
    assert [x.label for x in found.runs] == ["rcml", "m3col"]
    assert [x.family for x in found.runs] == ["relational", "classification"]
    assert [x.label for x in found.sweeps] == ["sweep"]
    assert [x.label for x in found.studies] == ["study"]
    assert list(groups(found, "relational")) == ["catalogue"]
    assert list(groups(found, "classification")) == ["toy"]
    runs, sweeps = groups(found, "relational")["catalogue"]
    assert (len(runs), len(sweeps)) == (1, 1)


def test_a_sweep_has_its_seeds_in_order(tmp_path):
    (sweep,) = read_sources([write_sweep(tmp_path / "sweep")]).sweeps
    assert list(sweep.variants) == ["model.beta=0", "no relation text"]
    assert [run.config.seed for run in sweep.variants["model.beta=0"]] == [7, 42]
    assert [run.label for run in sweep.firsts] == [
        "model.beta=0, seed7",
        "no relation text, seed42",
    ]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_table_gives_a_sweep_its_labels_and_order(tmp_path, wrapped):
    rows = [{"variant": "no relation text"}, {"variant": "model.beta=0"}, {"variant": "not run"}]
    path = write_sweep(tmp_path / "sweep", {"rows": rows} if wrapped else rows)
    (sweep,) = read_sources([path]).sweeps
    assert list(sweep.variants) == ["no relation text", "model.beta=0"]


def test_differences_are_those_of_nested_options(tmp_path):
    one = write_run(tmp_path / "one", small_config(), relational_result())
    other = write_run(
        tmp_path / "other", small_config("clip", model__beta=1.0), relational_result("clip")
    )
    runs = read_sources([one, other]).runs
    assert differences(runs) == {"method": ["rcml", "clip"], "model.beta": [0.6, 1.0]}
    assert differences(runs[:1]) == {}


def test_a_run_without_an_evaluation_is_kept(tmp_path):
    (run,) = read_sources([write_run(tmp_path / "run", small_config())]).runs
    assert run.result is None
    assert run.dataset == "openmoji"


BAD = {
    "nothing": (lambda p: [], "give --workdir"),
    "no directory": (lambda p: [p / "nowhere"], "there is no directory"),
    "a file": (lambda p: [_touch(p / "file")], "there is no directory"),
    "nothing trained": (lambda p: [_mkdir(p / "empty")], "holds no config.json"),
    "another method": (
        lambda p: [write_run(p / "run", small_config("imagebind"))],
        "config.method='imagebind' is unknown",
    ),
    "config cut": (lambda p: [_cut(_run(p), "config.json")], "config.json is not valid JSON"),
    "evaluation cut": (lambda p: [_cut(_run(p), "eval.json")], "evaluate again: rcml-eval"),
    "no evaluation in it": (lambda p: [_write(_run(p), "eval.json", "[]")], "holds no evaluation"),
    "parts missing": (
        lambda p: [_write(_run(p), "eval.json", '{"method": "rcml", "protocol": {}}')],
        "lacks retrieval, relation_type, relation_validity",
    ),
    "evaluation of another method": (
        lambda p: [write_run(p / "run", small_config("clip"), relational_result("rcml"))],
        "was trained by clip, but its eval.json is of 'rcml'",
    ),
    "unfinished sweep": (
        lambda p: [write_sweep(p / "sweep", finished=False)],
        "no run of the sweep",
    ),
    "sweep's table cut": (
        lambda p: [_write(write_sweep(p / "sweep"), "table.json", '{"rows": [')],
        "table.json is not valid JSON",
    ),
    "sweep of two families": (
        lambda p: [_mixed(p / "sweep")],
        "mixes runs of classification and relational",
    ),
    "unfinished study": (
        lambda p: [write_run(p / "study", small_config("alignment"))],
        "so the study is not finished",
    ),
}


def _touch(path):
    path.touch()
    return path


def _mkdir(path):
    path.mkdir()
    return path


def _run(path):
    return write_run(path / "run", small_config(), relational_result())


def _write(path, name, text):
    (path / name).write_text(text)
    return path


def _cut(path, name):
    text = (path / name).read_text()
    return _write(path, name, text[: len(text) // 2])


def _mixed(path):
    write_sweep(path)
    write_run(path / "classifier" / "seed42", small_config("m3col"), classification_result())
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_end_in_one_sentence(case, tmp_path):
    make, message = BAD[case]
    with pytest.raises(UserError) as caught:
        read_sources(make(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

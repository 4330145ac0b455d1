"""The sweep: its variants, its table, and that nothing is run twice."""

import json
import re

import numpy as np
import pytest

from rcml_jax.cli import sweep
from rcml_jax.cli.sweep import folders_of, read_variants
from rcml_jax.errors import UserError
from rcml_jax.evaluation.display import collect, markdown
from rcml_jax.evaluation.measures import columns
from tests.toy import CONFIG, TINY, cache_of


def test_values_of_one_option_are_variants():
    assert read_variants("model.beta=0,0.6", []) == {
        "model.beta=0": ["--config.model.beta=0"],
        "model.beta=0.6": ["--config.model.beta=0.6"],
    }


def test_variants_of_their_own():
    assert read_variants("", ["full", "none:loss.a=0,model.b=x=y"]) == {
        "full": [],
        "none": ["--config.loss.a=0", "--config.model.b=x=y"],
    }
    assert list(read_variants("a=1", ["full"])) == ["a=1", "full"]


@pytest.mark.parametrize(
    ("vary", "variants", "message"),
    [
        ("model.beta", [], "--vary 'model.beta' must be NAME=VALUE"),
        ("model.beta=", [], "--vary 'model.beta=' must be NAME=VALUE"),
        ("", [":a=1"], "--variant ':a=1' needs a label of its own"),
        ("", ["x:a=1", "x:a=2"], "--variant 'x:a=2' needs a label of its own"),
        ("", [], "nothing to run: give --vary"),
    ],
)
def test_wrong_variants(vary, variants, message):
    with pytest.raises(UserError) as error:
        read_variants(vary, variants)
    assert message in str(error.value)


def test_folders_are_safe_and_unique():
    plain = ["full", "no gate", "model.beta=0.6", "data.modalities=image"]
    assert folders_of(plain) == {x: x.replace(" ", "_") for x in plain}
    labels = [
        "model.init_from=/runs/a", "model.init_from=/runs/b", "model.init_from=runs-a", "../../x",
        "..", ".hidden", "a/b", "a-b", "a b", "a_b", "A B", "x" * 300, "x" * 301, "β=1", "γ=1",
        "c:d*?\"<>|", "-", "Full", "full",
    ]  # fmt: skip
    folders = folders_of(labels)
    assert list(folders) == labels
    assert len({name.lower() for name in folders.values()}) == len(labels)
    for name in folders.values():
        assert re.fullmatch(r"[A-Za-z0-9_=+,-][A-Za-z0-9_=.,+-]{0,79}", name), name
    assert folders_of(labels) == folders
    # A digest follows the label alone, so that another sweep over it goes on.
    assert folders_of(["a/b"])["a/b"] == folders["a/b"]


def write_result(folder, value):
    """An eval.json whose columns hold value, value + 0.01, ..."""
    result = {}
    for place, (path, _) in enumerate(columns("relational").values()):
        *parents, last = path.split("/")
        inner = result
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value + place / 100
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(result))


def test_the_table_holds_means_and_deviations_over_seeds(tmp_path):
    values = [0.5, 0.6, 0.1]
    for seed, value in enumerate(values):
        write_result(tmp_path / "full" / f"seed{seed}", value)
    write_result(tmp_path / "one" / "seed2", 0.3)
    folders = {"the full": "full", "missing": "missing", "one": "one"}
    table = collect(tmp_path, folders, [0, 1, 2])
    assert table.keys() == {"rows"}
    full, one = table["rows"]
    assert (full["variant"], full["seeds"], one["variant"], one["seeds"]) == (
        "the full",
        3,
        "one",
        1,
    )
    for place, column in enumerate(columns("relational")):
        shifted = np.array(values) + place / 100
        assert full[column]["mean"] == pytest.approx(np.mean(shifted))
        expected = np.sqrt(np.sum((shifted - shifted.mean()) ** 2) / 2)
        assert full[column]["std"] == pytest.approx(expected)
        assert one[column] == {"mean": pytest.approx(0.3 + place / 100), "std": 0.0}
    header, rule, first, second = markdown(table).splitlines()
    assert header.startswith("| variant | seeds | Hit@5 TT |")
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| the full | 3 | 40.0 ± 26.5 |")
    assert second.startswith("| one | 1 | 30.0 |")


def arguments(catalogue, workdir, *more):
    values = {"data.dir": cache_of(catalogue)} | TINY | {"steps": 2, "validate_every": 2}
    options = [f"--config.{name}={value}" for name, value in values.items()]
    source = f"{CONFIG}:folder,path={catalogue}"
    return ["sweep", "--config", source, "--workdir", str(workdir), *options, *more]


def test_a_sweep_runs_each_variant_once(catalogue, tmp_path, capsys):
    # Early stopping has no effect on two steps: the two variants are the same but for the seed.
    args = arguments(catalogue, tmp_path, "--vary", "patience=0,3", "--seeds", "1,2")
    assert sweep.main(args) == 0
    out, err = capsys.readouterr()
    labels = [f"patience={p}, seed {s}" for p in (0, 3) for s in (1, 2)]
    assert [line for line in err.splitlines() if line in labels] == labels
    for patience in (0, 3):
        for seed in (1, 2):
            directory = tmp_path / f"patience={patience}" / f"seed{seed}"
            config = json.loads((directory / "config.json").read_text())
            assert (config["patience"], config["seed"]) == (patience, seed)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table == collect(tmp_path, {x: x for x in ("patience=0", "patience=3")}, [1, 2])
    rows = [row for row in table["rows"] if "control" not in row]
    assert [row["seeds"] for row in rows] == [2, 2]
    # The controls follow the first variant; those of the second one are the same.
    beside = table["rows"][1:-1]
    assert beside[0]["variant"] == "patience=0: chance"
    assert [row["control"] for row in beside if row["control"] == "query only"] == ["query only"]
    assert all("AVG, random" in row for row in beside if row["control"] == "relation only")
    assert {k: v for k, v in rows[0].items() if k != "variant"} == {
        k: v for k, v in rows[1].items() if k != "variant"
    }
    assert (tmp_path / "table.md").read_text() == markdown(table)
    assert json.loads((tmp_path / "variants.json").read_text()) == {
        name: {"variant": name, "options": [name]} for name in ("patience=0", "patience=3")
    }
    assert "patience=3" in out

    # Compared by seed, without another run.
    assert sweep.main([*args, "--paired"]) == 0
    out, err = capsys.readouterr()
    assert (err, "patience=0 less each variant, paired by seed" in out) == ("", True)

    # What is finished is not run again; what is not, goes on.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")}
    gone = tmp_path / "patience=3" / "seed2" / "eval.json"
    gone.unlink()
    assert sweep.main(args) == 0
    _, err = capsys.readouterr()
    assert err == "patience=3, seed 2\n"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")}
    assert after.keys() == times.keys()
    assert [path for path in times if after[path] != times[path]] == [gone]
    assert json.loads((tmp_path / "table.json").read_text()) == table


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--vary", "model.betta=1,2"], "betta"),
        (["--variant", "x:steps=many"], "many"),
        (["--vary", "patience=1", "--seeds", "1,2,1"], "--seeds '1,2,1' names a seed twice"),
        (["--vary", "data.path=caf\udce9"], "the argument 'data.path=caf\\udce9' is not UTF-8"),
        (["--vary", "patience=1", "--seeds"], "argument --seeds: expected one argument"),
        (["--vary", "patience=1", "--seeds", "1,two"], "--seeds '1,two' must be whole numbers"),
    ],
)
def test_a_mistyped_sweep_starts_no_run(catalogue, tmp_path, capsys, more, text):
    workdir = tmp_path / "sweep"
    assert sweep.main(arguments(catalogue, workdir, *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert text in err
    assert err.count("\n") == 1
    assert not workdir.exists()

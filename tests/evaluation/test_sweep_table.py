"""The table of classifiers: pooled seeds, missing measures, the error analysis."""

import json

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.evaluation.display import collect, markdown
from rcml_jax.evaluation.measures import columns
from rcml_jax.evaluation.paired import compare


def write_run(folder, accuracies, heads, right, *, f1=True, held_out=True):
    """An `eval.json` and `predictions.npz` of models seed0, seed1, ...: 4 test samples each."""
    folder.mkdir(parents=True)
    measure = lambda values: {"mean": 0.0, "std": 0.0, "values": list(values)}  # noqa: E731
    summary = {"accuracy": measure(accuracies)} | ({"f1": measure(accuracies)} if f1 else {})
    classification = {"last": summary, "best_test_epoch": summary}
    if held_out:
        classification["validation_selected"] = {"accuracy": measure(accuracies)}
    (folder / "eval.json").write_text(json.dumps({"classification": classification}))
    labels = np.array([0, 1, 2, 0])
    arrays = {}
    for seed in range(len(accuracies)):
        arrays[f"seed{seed}/rows"] = arrays[f"seed{seed}/labels"] = labels
        arrays[f"seed{seed}/fused"] = np.where(right[seed], labels, labels + 1)
        arrays |= {f"seed{seed}/{head}": labels for head in heads}
    np.savez(folder / "predictions.npz", **arrays)


FOLDERS = {"full": "full", "only image": "only_image", "only text": "only_text"}
RIGHT = {
    "full": [[1, 1, 1, 0], [1, 1, 0, 0]],
    "only_image": [[1, 1, 0, 0], [1, 0, 0, 0]],
    "only_text": [[1, 0, 1, 0], [1, 0, 1, 0]],
}


@pytest.fixture
def workdir(tmp_path):
    for name, right in RIGHT.items():
        heads = ["image", "text"] if name == "full" else []
        right = np.array(right, bool)
        write_run(tmp_path / name / "seed42", right.mean(1), heads, right)
    return tmp_path


def test_seeds_of_one_run_and_of_several_are_pooled(workdir):
    full = np.array([[1, 1, 1, 1]], bool)
    write_run(workdir / "full" / "seed44", [0.25], ["image", "text"], full, held_out=False)
    row = collect(workdir, FOLDERS, [42, 43, 44])["rows"][0]
    assert (row["variant"], row["seeds"]) == ("full", 3)
    values = np.array([0.75, 0.5, 0.25])
    assert row["accuracy, last"] == {"mean": pytest.approx(0.5), "std": pytest.approx(0.25)}
    assert row["accuracy, last"]["std"] == pytest.approx(values.std(ddof=1))
    # One of the runs has no validation split, and none has an AUC.
    assert "validation-selected" not in row
    assert "AUC, last" not in row


def test_the_error_analysis_needs_every_modality_alone(workdir):
    table = collect(workdir, FOLDERS, [42])
    right = {name: np.array(x, bool) for name, x in RIGHT.items()}
    assert len(table["error_analysis"]) == 4
    for row in table["error_analysis"]:
        here = (right["only_image"] == (row["image"] == "right")) & (
            right["only_text"] == (row["text"] == "right")
        )
        assert row["multimodal right"] == pytest.approx(np.mean(here & right["full"]))
        assert row["multimodal wrong"] == pytest.approx(np.mean(here & ~right["full"]))
    for missing in FOLDERS:
        fewer = {name: folder for name, folder in FOLDERS.items() if name != missing}
        assert "error_analysis" not in collect(workdir, fewer, [42])
    assert "error_analysis" not in collect(workdir, FOLDERS, [43])


def test_the_first_variant_is_compared_with_the_others_by_seed(tmp_path):
    rates = {"full": [0.9, 0.7, 0.8], "close": [0.8, 0.65, 0.75], "same": [0.9, 0.7, 0.8]}
    right = np.ones((3, 4), bool)
    for name, values in (rates | {"fewer": [0.1, 0.2]}).items():
        write_run(tmp_path / name / "seed42", values, [], right[: len(values)], held_out=False)
    folders = {name: name for name in ("full", "close", "same", "fewer", "absent")}
    assert "paired" not in collect(tmp_path, folders, [42])
    table = collect(tmp_path, folders, [42], paired=True)
    first, second = table["paired"]
    assert (first["variant"], first["measure"]) == ("close", "accuracy, last")
    expected = compare(rates["full"], rates["close"])
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert first["p_holm"] == first["p"]  # the other one has no test
    assert (second["variant"], second["difference"], second["p"]) == ("same", 0, None)
    lines = markdown(table).splitlines()
    place = lines.index("full less each variant, paired by seed, in points:")
    close, same = lines[place + 4 : place + 6]
    assert close.startswith("| close | accuracy, last | 3 | +6.7 (-0.5 to +13.8) | +2.31 | 0.057 |")
    assert same == "| same | accuracy, last | 3 | +0.0 (+0.0 to +0.0) | – | – | – |"


def test_the_table_as_markdown(workdir):
    lines = markdown(collect(workdir, FOLDERS, [42])).splitlines()
    assert lines[0].startswith("| variant | seeds | accuracy, last | validation-selected |")
    assert lines[2].startswith("| full | 2 | 62.5 ± 17.7 | 62.5 ± 17.7 |")
    assert lines[8] == "| image | text | multimodal right | multimodal wrong |"
    assert lines[10] == "| right | right | 25.0 | 0.0 |"
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "AUC, last" in columns("classification")
    assert "AUC" not in lines[0]


def test_a_variant_without_a_measure_gets_a_dash(workdir):
    labels = np.array([[1, 1, 1, 1]], bool)
    write_run(workdir / "bare" / "seed42", [0.5], [], labels, f1=False)
    table = markdown(collect(workdir, {"full": "full", "bare": "bare"}, [42]))
    assert "| bare | 1 | 50.0 | 50.0 | 50.0 | – |" in table


def test_controls_follow_their_variant_and_come_once_where_they_know_no_model(tmp_path):
    def rates(value):
        return {"hit@5": {"tt": value, "avg": value}}

    for number, name in enumerate(("full", "other")):
        for seed in (1, 2):
            folder = tmp_path / name / f"seed{seed}"
            folder.mkdir(parents=True)
            result = {
                "retrieval": rates(0.8),
                "controls": {
                    "relation_only": {"retrieval": rates(0.1 * seed + number)},
                    "words": {"retrieval": {"hit@5": {"tt": 0.4}}},
                },
            }
            (folder / "eval.json").write_text(json.dumps(result))
    table = collect(tmp_path, {"full": "full", "other": "other"}, [1, 2])
    lines = markdown(table).splitlines()
    assert lines[0] == "| variant | seeds | Hit@5 TT | AVG |"
    assert lines[2:] == [
        "| full | 2 | 80.0 ± 0.0 | 80.0 ± 0.0 |",
        "| full: relation only | 2 | 15.0 ± 7.1 | 15.0 ± 7.1 |",
        "| full: word overlap | 2 | 40.0 ± 0.0 | – |",
        "| other | 2 | 80.0 ± 0.0 | 80.0 ± 0.0 |",
        "| other: relation only | 2 | 115.0 ± 7.1 | 115.0 ± 7.1 |",
    ]


def test_only_values_of_the_same_seeds_are_paired(tmp_path):
    one = np.ones((1, 4), bool)
    for name, there in {"a": (1, 2, 3), "b": (1, 2, 3), "late": (2, 3)}.items():
        for seed in there:
            rate = seed / 10 + 0.05 * (name == "a")
            write_run(tmp_path / name / f"seed{seed}", [rate], [], one, held_out=False)
    folders = {name: name for name in ("a", "b", "late")}
    (found,) = collect(tmp_path, folders, [1, 2, 3], paired=True)["paired"]
    assert (found["variant"], found["pairs"]) == ("b", 3)
    assert found["difference"] == pytest.approx(0.05)
    # As many values, but not of the same seeds.
    (tmp_path / "a" / "seed3" / "eval.json").unlink()
    assert "paired" not in collect(tmp_path, folders, [1, 2, 3], paired=True)


def test_a_damaged_evaluation_is_named(workdir):
    path = workdir / "only_text" / "seed42" / "eval.json"
    for text in (path.read_text()[:-5], "", "[1]", "3"):
        path.write_text(text)
        with pytest.raises(
            UserError, match=r"eval\.json is damaged .* rcml-eval --workdir .*seed42"
        ):
            collect(workdir, FOLDERS, [42])


def test_a_label_is_one_cell(tmp_path):
    write_run(tmp_path / "x" / "seed1", [0.5], [], np.ones((1, 4), bool), held_out=False)
    line = markdown(collect(tmp_path, {"a|b\nc": "x"}, [1])).splitlines()[2]
    assert line.startswith(r"| a\|b c | 1 | 50.0 |")

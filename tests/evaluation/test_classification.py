"""Measures against scikit-learn; protocols and tables by hand."""

import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from rcml_jax.errors import UserError
from rcml_jax.evaluation.classification import (
    PROTOCOLS,
    auc,
    confidence,
    confusion,
    error_analysis,
    measures,
    protocols,
    read_predictions,
    summarize,
    validation,
)


def sure(predicted, classes):
    """Probabilities (n, classes) that predict those classes."""
    return np.where(np.arange(classes) == np.asarray(predicted)[:, None], 0.9, 0.1 / (classes - 1))


def scikit(predicted, labels, average):
    return f1_score(labels, predicted, average=average, zero_division=0)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), 60).astype(np.float32)
    labels = rng.choice(classes, 60, p=rng.dirichlet(np.full(classes, 3.0))).astype(np.int32)
    found, predicted = measures(probabilities, labels), probabilities.argmax(axis=1)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "weighted_f1": scikit(predicted, labels, "weighted"),
        "macro_f1": scikit(predicted, labels, "macro"),
    }
    if classes == 2:
        expected["f1"] = scikit(predicted, labels, "binary")
        expected["auc"] = roc_auc_score(labels, probabilities[:, 1])
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ([0, 0, 1, 1, 0], [0, 2, 1, 2, 0]),  # class 2 is never predicted
        ([0, 2, 1, 1, 0], [0, 0, 1, 1, 0]),  # class 2 is not among the labels
        ([0, 0, 1, 1, 0], [0, 1, 1, 0, 0]),  # class 2 is nowhere
        ([1, 1, 1, 1, 1], [0, 0, 2, 2, 0]),  # nothing is right
    ],
)
def test_classes_that_are_missing(predicted, labels):
    found = measures(sure(predicted, 3), np.array(labels))
    assert found["weighted_f1"] == pytest.approx(scikit(predicted, labels, "weighted"))
    assert found["macro_f1"] == pytest.approx(scikit(predicted, labels, "macro"))


def test_a_class_that_is_never_predicted_has_the_f1_0():
    found = measures(sure([0, 0, 1, 1], 3), np.array([0, 2, 1, 1]))
    # F1 = 2 right / (labels + predictions): 2/3, 1 and 0 for one, two and one of the labels.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["weighted_f1"] == pytest.approx((2 / 3 + 2 * 1 + 0) / 4)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_have_no_auc(label):
    found = measures(sure([0, 0, 1], 2), np.full(3, label))
    assert set(found) == {"accuracy", "weighted_f1", "macro_f1", "f1"}
    assert found["f1"] == pytest.approx(0.5 if label else 0.0)
    assert measures(sure([0, 0], 2), np.zeros(2, int))["f1"] == 0.0


def test_auc_counts_ties_half():
    rng = np.random.default_rng(0)
    for levels in (1, 2, 4):
        scores, positive = rng.integers(levels, size=50) / 4, rng.random(50) < 0.4
        wins = [
            (a > b) + (a == b) / 2
            for a, b in itertools.product(scores[positive], scores[~positive])
        ]
        assert auc(scores, positive) == pytest.approx(np.mean(wins))
        assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert auc(np.full(5, 0.3), np.arange(5) < 2) == 0.5
    assert auc(np.arange(5.0), np.arange(5) > 2) == 1.0


# Accuracies by look. Every look's "place" tells which one it is.
TEST = {"a": [1, 8, 8, 7], "b": [9, 1, 2, 3], "c": [1, 2, 9, 4], "d": [9, 5, 5, 5]}
VALIDATION = {"c": [6, 6, 2, 1], "d": [1, 1, 1, 1]}


def looks():
    def one(values, place):
        return {"accuracy": values[place] / 10, "place": float(place)}

    return [
        {name: {"test": one(values, place)} for name, values in TEST.items() if name in "ab"}
        | {
            name: {"test": one(TEST[name], place), "validation": one(values, place)}
            for name, values in VALIDATION.items()
        }
        for place in range(4)
    ]


def values(summary):
    return {name: row["values"] for name, row in summary.items()}


def test_each_model_has_its_own_best_look():
    found = protocols(looks(), trained_on_all=("a", "b"), held_out=("c", "d"))
    assert found.keys() == PROTOCOLS.keys()
    assert values(found["last"]) == {"accuracy": [0.7, 0.3], "place": [3, 3]}
    # Of equal ones the later look for validation, the first for test.
    assert values(found["validation_selected"]) == {"accuracy": [0.2, 0.5], "place": [1, 3]}
    assert values(found["best_test_epoch"]) == {"accuracy": [0.8, 0.9], "place": [1, 0]}


def test_one_model_may_stand_for_all_protocols():
    found = protocols(looks(), trained_on_all=("c",), held_out=("c",))
    assert [values(found[name])["place"] for name in PROTOCOLS] == [[3], [1], [2]]


def test_without_validation_nothing_is_selected_on_it():
    found = protocols(looks(), trained_on_all=("a", "b"), held_out=())
    assert list(found) == ["last", "best_test_epoch"]


def test_validation_shows_no_test_measure():
    found = validation(looks(), ("c", "d"))
    assert values(found["last"]) == {"accuracy": [0.1, 0.1], "place": [3, 3]}
    assert values(found["selected"]) == {"accuracy": [0.6, 0.1], "place": [1, 3]}


def test_summaries_have_the_deviation_of_a_sample():
    rows = [{"accuracy": x, "auc": 1.0} for x in (0.1, 0.2, 0.6)]
    found = summarize([*rows, {"accuracy": 0.3}])
    assert set(found) == {"accuracy"}  # the last row has no auc
    assert found["accuracy"]["mean"] == pytest.approx(0.3)
    squares = 0.2**2 + 0.1**2 + 0.3**2 + 0
    assert found["accuracy"]["std"] == pytest.approx(np.sqrt(squares / 3))
    assert found["accuracy"]["values"] == [0.1, 0.2, 0.6, 0.3]
    assert summarize(rows)["auc"] == {"mean": 1.0, "std": 0.0, "values": [1.0, 1.0, 1.0]}
    assert summarize(rows[:1])["accuracy"] == {"mean": 0.1, "std": 0.0, "values": [0.1]}
    json.dumps(found)


def test_confidence_is_of_the_top_score():
    top = np.random.default_rng(0).permutation(0.5 + 0.005 * np.arange(101))
    swap = np.arange(101) % 2 == 0
    found = confidence(np.stack([np.where(swap, top, 1 - top), np.where(swap, 1 - top, top)], 1))
    expected = {"q05": 0.525, "q25": 0.625, "q50": 0.75, "q75": 0.875, "q95": 0.975}
    assert found == pytest.approx({"mean": 0.75} | expected)


def test_error_analysis_by_hand():
    right = lambda text: np.array([c == "x" for c in text])  # noqa: E731
    image, text, both = right("xxxx..x..."), right("xx..xx...."), right("x.xx.x.x..")
    names = ("image", "text", "multimodal right", "multimodal wrong")
    rows = [
        ("right", "right", 0.1, 0.1),
        ("right", "wrong", 0.2, 0.1),
        ("wrong", "right", 0.1, 0.1),
        ("wrong", "wrong", 0.1, 0.2),
    ]
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert error_analysis({"image": image, "text": text}, both) == expected


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_error_analysis_is_a_partition(modalities):
    rng = np.random.default_rng(modalities)
    alone = {f"m{m}": rng.random(40) < 0.6 for m in range(modalities)}
    both = rng.random(40) < 0.8
    rows = error_analysis(alone, both)
    assert len({tuple(row[name] for name in alone) for row in rows}) == len(rows) == 2**modalities
    for row in rows:
        hits = [
            both[i]
            for i in range(40)
            if all(row[name] == ("right" if alone[name][i] else "wrong") for name in alone)
        ]
        assert row["multimodal right"] == pytest.approx(sum(hits) / 40)
        assert row["multimodal wrong"] == pytest.approx((len(hits) - sum(hits)) / 40)
    shares = [row["multimodal right"] + row["multimodal wrong"] for row in rows]
    assert sum(shares) == pytest.approx(1)


def test_confusions_are_those_of_scikit_learn():
    labels, predicted = np.random.default_rng(0).integers(0, 6, (2, 80))  # of seven classes
    expected = confusion_matrix(labels, predicted, labels=range(7))
    np.testing.assert_array_equal(confusion(labels, predicted, 7), expected)


def test_predictions_are_read_by_model_and_head(tmp_path):
    path, rows = tmp_path / "predictions.npz", np.arange(3)
    np.savez(path, **{"a/rows": rows, "a/fused": rows + 1, "b/fused": rows + 2})
    found = read_predictions(path)
    assert {model: list(heads) for model, heads in found.items()} == {
        "a": ["rows", "fused"],
        "b": ["fused"],
    }
    np.testing.assert_array_equal(found["b"]["fused"], rows + 2)
    for damaged in (path.read_bytes()[:100], b"", b"a table"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged .*make it again: rcml-eval --workdir"):
            read_predictions(path)

"""Classification: measures, the three protocols of reporting, and the error analysis."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from rcml_jax.errors import UserError
from rcml_jax.parsing import ARRAY_ERRORS

#: Names of the protocols and what they mean; `eval.json` holds these sentences.
PROTOCOLS = {
    "last": "the last epoch, trained on all of train",
    "validation_selected": "the epoch of the highest validation accuracy, the later of equal ones",
    "best_test_epoch": "the epoch of the highest test accuracy, chosen on the test split itself",
}
_QUANTILES = (5, 25, 50, 75, 95)


def measures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Rates of the predictions argmax_c p_c, for probabilities (n, C) and labels (n,) int.

    accuracy; weighted_f1 and macro_f1, the averages of the classes' F1, by their share of the
    labels or plain, over the classes that are among the labels or the predictions. With two classes
    also f1, that of class 1, and auc, the area under its ROC curve, if both classes occur. A class
    that is never predicted has the F1 0.
    """
    classes = probabilities.shape[1]
    predicted = np.argmax(probabilities, axis=1)
    f1, support, seen = _f1(predicted, labels, classes)
    result = {
        "accuracy": float(np.mean(predicted == labels)),
        "weighted_f1": float(np.sum(f1 * support) / np.sum(support)),
        "macro_f1": float(np.mean(f1[seen])),
    }
    if classes == 2:
        result["f1"] = float(f1[1])
        if 0 < support[1] < len(labels):
            result["auc"] = auc(probabilities[:, 1], labels == 1)
    return result


def _f1(
    predicted: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1 and number of labels of each class, and whether it occurs at all."""
    count = lambda x: np.bincount(x, minlength=classes)  # noqa: E731
    right, support = count(labels[predicted == labels]), count(labels)
    total = support + count(predicted)
    return 2 * right / np.maximum(total, 1), support, total > 0


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive's score exceeds a negative's, ties counting half.

    scores (n,), positive (n,) bool with both values in it: Mann and Whitney's U.
    """
    ranks = scipy.stats.rankdata(scores)
    count = int(np.sum(positive))
    u = np.sum(ranks[positive]) - count * (count + 1) / 2
    return float(u / (count * (len(scores) - count)))


def protocols(
    looks: Sequence[Mapping[str, dict]],
    *,
    trained_on_all: Sequence[str],
    held_out: Sequence[str],
) -> dict[str, dict]:
    """Summaries over models under each of PROTOCOLS.

    looks: at each look of training, model → {"test": measures, "validation": measures}; the last
    look is that of the last epoch. trained_on_all: the models of "last" and "best_test_epoch";
    held_out: those with a validation split, of "validation_selected", which is left out if empty.
    """
    final = looks[-1]
    result = {"last": summarize([final[model]["test"] for model in trained_on_all])}
    if held_out:
        chosen = [_best(looks, model, "validation", later=True)[model] for model in held_out]
        result["validation_selected"] = summarize([look["test"] for look in chosen])
    best = [_best(looks, model, "test", later=False)[model]["test"] for model in trained_on_all]
    result["best_test_epoch"] = summarize(best)
    return result


def validation(looks: Sequence[Mapping[str, dict]], held_out: Sequence[str]) -> dict[str, dict]:
    """Measures on the validation split, at the last epoch and the best: what tuning may look at."""
    best = [_best(looks, model, "validation", later=True)[model] for model in held_out]
    return {
        "last": summarize([looks[-1][model]["validation"] for model in held_out]),
        "selected": summarize([look["validation"] for look in best]),
    }


def _best(
    looks: Sequence[Mapping[str, dict]], model: str, split: str, *, later: bool
) -> Mapping[str, dict]:
    """The look with the model's highest accuracy on a split."""
    order = reversed(looks) if later else looks
    return max(order, key=lambda look: look[model][split]["accuracy"])


def summarize(rows: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """Mean, standard deviation (n − 1; 0 for one) and values of each measure that all rows have."""
    result = {}
    for name in rows[0]:
        if all(name in row for row in rows):
            values = np.array([row[name] for row in rows])
            result[name] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                "values": values.tolist(),
            }
    return result


def confidence(probabilities: np.ndarray) -> dict[str, float]:
    """How sure a model is: mean and quantiles of the top softmax score of (n, C)."""
    top = np.max(probabilities, axis=1)
    quantiles = {f"q{q:02d}": float(np.percentile(top, q)) for q in _QUANTILES}
    return {"mean": float(top.mean())} | quantiles


def error_analysis(
    unimodal: Mapping[str, np.ndarray], multimodal: np.ndarray
) -> list[dict[str, float | str]]:
    """Shares of the samples by which models are right.

    unimodal: modality → (n,) bool, whether the model trained on it alone is right; multimodal: (n,)
    bool. A row for each combination: a column for each modality ("right" or "wrong"), and the
    shares of all samples where the multimodal model is right and where it is wrong.
    """
    rows = []
    for pattern in itertools.product((True, False), repeat=len(unimodal)):
        here = np.ones(len(multimodal), bool)
        for right, wanted in zip(unimodal.values(), pattern, strict=True):
            here &= right == wanted
        words = dict(zip(unimodal, ("right" if p else "wrong" for p in pattern), strict=True))
        rows.append(
            words
            | {
                "multimodal right": float(np.mean(here & multimodal)),
                "multimodal wrong": float(np.mean(here & ~multimodal)),
            }
        )
    return rows


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrix (C, C): how many samples of class a, a row, are predicted as class b.

    labels and predicted: (n,) int.
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def read_predictions(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Read the `predictions.npz` of an evaluation: model → (n,) int by name.

    Names: "rows", "labels", and the heads, whose class is the predicted one. Raises UserError for
    a damaged file.
    """
    models: dict[str, dict[str, np.ndarray]] = {}
    try:
        # NumPy leaves a damaged file open that it has opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name in arrays:
                model, head = name.split("/")
                models.setdefault(model, {})[head] = arrays[name]
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{path} is damaged ({error}); make it again: rcml-eval --workdir {path.parent}"
        ) from error
    return models

"""The table of a sweep: means and deviations over seeds, and the error analysis of classifiers."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax.evaluation.classification import error_analysis
from rcml_jax.evaluation.controls import rows_of

#: Label and path into `eval.json` of the columns, for results that have the first of them.
RELATIONAL = {
    "Hit@5 TT": "retrieval/hit@5/tt",
    "II": "retrieval/hit@5/ii",
    "TI": "retrieval/hit@5/ti",
    "IT": "retrieval/hit@5/it",
    "AVG": "retrieval/hit@5/avg",
    "AVG, by relation": "retrieval/macro/hit@5/avg",
    "AVG, random": "retrieval_random/hit@5/avg",
    "mAP IT, all": "retrieval_all/map/it",
    "mAP AVG, all": "retrieval_all/map/avg",
    "Top-3": "relation_type/top3/avg",
    "validity": "relation_validity/accuracy",
}
CLASSIFICATION = {
    "accuracy, last": "classification/last/accuracy",
    "validation-selected": "classification/validation_selected/accuracy",
    "best test epoch": "classification/best_test_epoch/accuracy",
    "F1, last": "classification/last/f1",
    "weighted F1, last": "classification/last/weighted_f1",
    "macro F1, last": "classification/last/macro_f1",
    "AUC, last": "classification/last/auc",
    "on validation, last": "validation/last/accuracy",
    "selected": "validation/selected/accuracy",
    "confidence on noise": "random_inputs/mean",
}


def collect(workdir: pathlib.Path, folders: Mapping[str, str], seeds: Sequence[int]) -> dict:
    """The finished runs' rows, one for each variant, and the error analysis if it can be made.

    folders: label → folder of the variant. A row has the number of seeds and, for each column that
    the results have, mean and standard deviation (n − 1) over the seeds; a run that trains several
    seeds at once counts as so many. The controls of a variant follow it, with their name under
    "control"; those that know no model come once.
    """
    rows, found = [], {}
    for label, folder in folders.items():
        paths = [workdir / folder / f"seed{seed}" / "eval.json" for seed in seeds]
        found[label] = [json.loads(path.read_text()) for path in paths if path.is_file()]
    controls = rows_of(found)
    for label, results in found.items():
        if not results:
            continue
        columns = CLASSIFICATION if "classification" in results[0] else RELATIONAL
        rows.append(_row(label, results, columns))
        for method, control, measured in controls:
            if method == label:
                rows.append(_row(f"{label}: {control}", measured, columns) | {"control": control})
    table: dict[str, Any] = {"rows": rows}
    analysis = _error_analysis(workdir, folders, seeds)
    if analysis:
        table["error_analysis"] = analysis
    return table


def _row(label: str, results: Sequence[dict], columns: Mapping[str, str]) -> dict[str, Any]:
    """Mean and deviation of each column that all the results have."""
    row: dict[str, Any] = {"variant": label, "seeds": 0}
    for column, path in columns.items():
        found = [_values(result, path) for result in results]
        if all(found):
            values = np.concatenate(found)
            deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            row[column] = {"mean": float(values.mean()), "std": deviation}
            row["seeds"] = max(row["seeds"], len(values))
    return row


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, rates in percent."""
    rows = table["rows"]
    known = [*RELATIONAL, *CLASSIFICATION]
    columns = [column for column in known if any(column in row for row in rows)]
    lines = ["| variant | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    lines += [
        f"| {row['variant']} | {row['seeds']} | "
        + " | ".join(_cell(row.get(column), row["seeds"]) for column in columns)
        + " |"
        for row in rows
    ]
    analysis = table.get("error_analysis")
    if analysis:
        names = list(analysis[0])
        lines += [
            "",
            "Shares of the test samples (%), each modality trained alone:",
            "",
            "| " + " | ".join(names) + " |",
            "|---" * len(names) + "|",
        ]
        lines += [
            "| "
            + " | ".join(x if isinstance(x, str) else f"{100 * x:.1f}" for x in row.values())
            + " |"
            for row in analysis
        ]
    return "\n".join(lines) + "\n"


def _cell(measure: dict | None, seeds: int) -> str:
    if measure is None:
        return "–"
    mean = f"{100 * measure['mean']:.1f}"
    return f"{mean} ± {100 * measure['std']:.1f}" if seeds > 1 else mean


def _values(result: dict, path: str) -> list[float]:
    """The measure's value, or its values over seeds; none where the result lacks it."""
    node: Any = result
    for name in path.split("/"):
        if not isinstance(node, dict) or name not in node:
            return []
        node = node[name]
    return list(node["values"]) if isinstance(node, dict) else [float(node)]


def _error_analysis(
    workdir: pathlib.Path, folders: Mapping[str, str], seeds: Sequence[int]
) -> list[dict]:
    """The mean over models of the variant "full" against those named "only <modality>"."""
    tables = []
    for seed in seeds if "full" in folders else ():
        files = {x: workdir / f / f"seed{seed}" / "predictions.npz" for x, f in folders.items()}
        alone = {name: files.get(f"only {name}") for name in _heads(files["full"])}
        if not alone or not all(path and path.is_file() for path in alone.values()):
            continue
        right = {name: _right(path) for name, path in alone.items()}
        for model, fused in _right(files["full"]).items():
            if all(model in found for found in right.values()):
                unimodal = {name: found[model] for name, found in right.items()}
                tables.append(error_analysis(unimodal, fused))
    return [_mean_row(rows) for rows in zip(*tables, strict=True)]


def _mean_row(rows: Sequence[dict]) -> dict:
    mean = lambda name: float(np.mean([row[name] for row in rows]))  # noqa: E731
    return {n: value if isinstance(value, str) else mean(n) for n, value in rows[0].items()}


def _heads(path: pathlib.Path) -> list[str]:
    """The modalities that a model has classifiers of, in order; none without the file."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        names = [name.split("/")[1] for name in arrays]
    return [n for n in dict.fromkeys(names) if n not in ("rows", "labels", "fused")]


def _right(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Model → whether its prediction for each test sample is right."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            name.removesuffix("/fused"): arrays[name] == arrays[name.replace("/fused", "/labels")]
            for name in arrays
            if name.endswith("/fused")
        }

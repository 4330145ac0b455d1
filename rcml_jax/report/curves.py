"""Training curves: loss, its terms, the learning rate and the validation measure."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rcml_jax.report import style
from rcml_jax.report.arrays import Arrays, LeftOutError
from rcml_jax.report.sources import Run

MOST_RUNS = 8
#: What a training line holds beside the loss and its terms.
_NO_TERMS = ("loss", "learning_rate", "gradient_norm", "pairs", "accuracy", "relation_accuracy")
_SELECTION = {"relational": "hit@5/avg", "classification": "accuracy"}
_MEASURE = {"relational": "validation Hit@5 AVG (%)", "classification": "validation accuracy (%)"}
_TERMS = {
    "tt": "text to text",
    "ii": "image to image",
    "ti": "text to image",
    "it": "image to text",
    "identification": "identification",
    "fused": "fused classifier",
    "contrastive": "contrastive",
}


def read_lines(run: Run) -> list[dict]:
    """The whole lines of a run's `metrics.jsonl`, in order; one that a kill cut is left out."""
    path = run.path / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "kind"} <= row.keys():
            rows.append(row)
    return rows


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns run, name, step, value: "loss", "learning_rate", "validation" and "term/...".

    Of runs of one family, the first 8. Raises LeftOutError where none of them wrote a line.
    """
    columns: dict[str, list] = {"run": [], "name": [], "step": [], "value": []}
    for run in runs[:MOST_RUNS]:
        for line in read_lines(run):
            for name, value in _named(line, run.family).items():
                for column, cell in zip(
                    columns.values(), (run.label, name, line["step"], value), strict=True
                ):
                    column.append(cell)
    if not columns["run"]:
        names = ", ".join(run.label for run in runs)
        raise LeftOutError(f"metrics.jsonl is missing or empty in {names}; train first")
    return columns


def _named(line: dict, family: str) -> dict[str, float]:
    if line["kind"] == "validation":
        value = line.get(_SELECTION[family])
        return {} if value is None else {"validation": value}
    found = {name: line[name] for name in ("loss", "learning_rate") if name in line}
    for name, value in line.items():
        number = isinstance(value, (int, float)) and name != "step"
        if number and name not in _NO_TERMS:
            found[f"term/{name}"] = value
    return found


def _of(arrays: Arrays, run: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    here = (arrays["run"].astype(str) == run) & (arrays["name"].astype(str) == name)
    return arrays["step"][here], arrays["value"][here]


def labels(arrays: Arrays, column: str = "run") -> list[str]:
    """The different cells of a column, in order."""
    return list(dict.fromkeys(arrays[column].astype(str).tolist()))


def draw_runs(arrays: Arrays, path: pathlib.Path, name: str, family: str) -> pathlib.Path:
    """A line for each run that has it: the loss, a term of it, the learning rate or validation.

    The best step of validation is ringed.
    """
    rate = 100 if name == "validation" else 1
    runs = [run for run in labels(arrays) if len(_of(arrays, run, name)[0])]
    several = len(labels(arrays)) > 1
    with style.drawing(style.PANEL, 3.3 + 0.25 * len(runs) * several) as figure:
        axes = figure.add_subplot()
        for place, run in enumerate(labels(arrays)):
            steps, values = _of(arrays, run, name)
            if not len(steps):
                continue
            look = style.series(place) | {"markevery": max(1, len(steps) // 8)}
            axes.plot(steps, rate * values, label=style.short(run, 40), **look)
            if name == "validation":
                best = int(np.argmax(values))
                axes.plot(
                    steps[best], rate * values[best], "o", markersize=13, fillstyle="none",
                    color=look["color"],
                )  # fmt: skip
        axes.set(xlabel="step", ylabel=what(name, family))
        if name != "validation":
            values = arrays["value"][arrays["name"].astype(str) == name]
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            axes.set_ylim(1.06 * low, 1.06 * high or 1)
        if several:
            style.below(figure, *axes.get_legend_handles_labels(), columns=1)
        return style.save(figure, path)


def what(name: str, family: str) -> str:
    """How a curve is called."""
    if name.startswith("term/"):
        term = name.removeprefix("term/")
        return f"term: {_TERMS.get(term, f'{term} classifier')}"
    names = {"loss": "training loss", "learning_rate": "learning rate"}
    return names.get(name) or _MEASURE[family]

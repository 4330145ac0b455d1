"""The list of measures: label, path in `eval.json`, direction, chance.

The printed table, sweeps, the report, the model card, checkpoint selection and the gains over
controls read this list. To add a measure of ranks, add a line here: it is computed for the method
and for every control. Any other measure also needs an evaluation that writes it under its path.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of an evaluation.

    path: its path in `eval.json`, "task/name" or longer. A relational measure has a number for each
        of `SCORES` there, except where `columns` has the key "". A classification measure has the
        mean, standard deviation and values over the models.
    label: its name in figures and the printed table.
    family: "relational" or "classification".
    title: its line in the printed table, a format of the task's part of `eval.json`, such as
        "Top-3 of {candidates}"; "": no line.
    columns: score → heading in the tables of sweeps, reports and model cards; "" for a measure
        without scores.
    higher_is_better: whether larger values are better; tables mark the best value by it.
    chance: value of a random order or guess: a number, or its path in `eval.json`, where it may
        have a value for each score; None where it is not known.
    main: whether it is the main measure of its task: scorings and controls are compared by it.
    headline: whether figures of sweeps show it.
    of_ranks: 0-based ranks (q,) of the positive → the value of each query (q,).
    """

    path: str
    label: str
    family: str = "relational"
    title: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    higher_is_better: bool = True
    chance: float | str | None = None
    main: bool = False
    headline: bool = False
    of_ranks: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def task(self) -> str:
        """The first part of the path, such as "retrieval"."""
        return self.path.partition("/")[0]

    @property
    def name(self) -> str:
        """The path without the task, such as "hit@5" or "macro/hit@5"."""
        return self.path.partition("/")[2]


def hit_at(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function of 0-based ranks: whether each is below k."""
    return lambda ranks: ranks < k


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """1/(rank + 1) of 0-based ranks."""
    return 1 / (ranks + 1)


_HITS = {"tt": "Hit@5 TT", "ii": "II", "ti": "TI", "it": "IT", "avg": "AVG"}


def _ranked(path: str, label: str, **options: Any) -> Measure:
    """A measure of ranks, whose chance stands among the controls."""
    return Measure(path, label, chance=f"controls/chance/{path}", **options)


def _gallery(name: str, label: str, **options: Any) -> Measure:
    path = f"retrieval_all/{name}"
    return Measure(path, label, chance=f"retrieval_all/chance/{name}", **options)


def _classified(path: str, label: str, **options: Any) -> Measure:
    return Measure(path, label, "classification", columns={"": label}, **options)


#: All measures, in the order of every table.
MEASURES = (
    _ranked(
        "retrieval/hit@5",
        "Hit@5",
        title="Hit@5",
        columns=_HITS,
        main=True,
        headline=True,
        of_ranks=hit_at(5),
    ),
    Measure(
        "retrieval/macro/hit@5",
        "Hit@5, mean over relations",
        title="Hit@5, mean over relations",
        columns={"avg": "AVG, by relation"},
    ),
    _ranked("retrieval/hit@1", "Hit@1", title="Hit@1", of_ranks=hit_at(1)),
    _ranked("retrieval/mrr", "MRR", title="MRR", of_ranks=reciprocal_rank),
    _ranked(
        "retrieval_random/hit@5",
        "Hit@5, random candidates",
        title="Hit@5, random candidates",
        columns={"avg": "AVG, random"},
        main=True,
    ),
    _gallery("hit@5", "Hit@5, all items", title="Hit@5, all {gallery[items]:,} items"),
    _gallery("r_precision", "R-precision, all items"),
    _gallery(
        "map",
        "mAP, all items",
        title="mAP, all items",
        columns={"it": "mAP IT, all", "avg": "mAP AVG, all"},
        main=True,
    ),
    _ranked(
        "relation_type/top3",
        "Top-3",
        title="relation type, Top-3 of {candidates}",
        columns={"avg": "Top-3"},
        main=True,
        headline=True,
        of_ranks=hit_at(3),
    ),
    Measure(
        "relation_type/macro/top3",
        "Top-3, mean over relations",
        title="Top-3, mean over relations",
    ),
    _ranked(
        "relation_type/top1",
        "Top-1",
        title="relation type, Top-1 of {candidates}",
        of_ranks=hit_at(1),
    ),
    Measure(
        "relation_type_all/top3",
        "Top-3 of all relations",
        title="Top-3 of all {candidates} relations",
        main=True,
    ),
    Measure(
        "relation_validity/accuracy",
        "relation validity",
        columns={"": "validity"},
        chance=0.5,
        main=True,
        headline=True,
    ),
    _classified("classification/last/accuracy", "accuracy, last", headline=True),
    _classified(
        "classification/validation_selected/accuracy", "validation-selected", headline=True
    ),
    _classified("classification/best_test_epoch/accuracy", "best test epoch"),
    _classified("classification/last/f1", "F1, last"),
    _classified("classification/last/weighted_f1", "weighted F1, last"),
    _classified("classification/last/macro_f1", "macro F1, last"),
    _classified("classification/last/auc", "AUC, last", chance=0.5),
    _classified("validation/last/accuracy", "on validation, last"),
    _classified("validation/selected/accuracy", "selected"),
    _classified("random_inputs/mean", "confidence on noise", higher_is_better=False),
)


def of_task(task: str) -> list[Measure]:
    """The measures of a task, in order."""
    return [measure for measure in MEASURES if measure.task == task]


def main_of(task: str) -> Measure:
    """The main measure of a task."""
    return next(measure for measure in of_task(task) if measure.main)


def main_measures() -> list[Measure]:
    """The main measures of the relational tasks, in order."""
    return [measure for measure in MEASURES if measure.main]


def headlines(family: str) -> dict[str, str]:
    """Label → path in `eval.json` of the headline measures; AVG where there are scores."""
    found = {}
    for measure in MEASURES:
        if measure.headline and measure.family == family:
            scored = "" not in measure.columns
            path = f"{measure.path}/avg" if scored else measure.path
            found[measure.label + " AVG" * scored] = path
    return found


def printed() -> list[Measure]:
    """The measures with a line in the printed table, in order."""
    return [measure for measure in MEASURES if measure.title]


def of_ranks(task: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name → function of ranks, for the rank measures of a task."""
    return {measure.name: measure.of_ranks for measure in of_task(task) if measure.of_ranks}


def columns(*families: str) -> dict[str, tuple[str, Measure]]:
    """Heading → (path in `eval.json`, measure) of the columns of tables; families: all, or some."""
    return {
        heading: (f"{measure.path}/{score}" if score else measure.path, measure)
        for measure in MEASURES
        if not families or measure.family in families
        for score, heading in measure.columns.items()
    }


def at(result: Any, path: str) -> Any:
    """The value at a path of an `eval.json`; None where there is none."""
    for name in path.split("/"):
        if not isinstance(result, Mapping) or name not in result:
            return None
        result = result[name]
    return result


def values_at(result: Mapping[str, Any], path: str) -> list[float]:
    """A measure's value, or its values over models; an empty list if one of them is missing."""
    node = at(result, path)
    values = node.get("values", ()) if isinstance(node, Mapping) else (node,)
    return [] if None in values else [float(value) for value in values]


def chance_of(measure: Measure, result: Mapping[str, Any], score: str = "avg") -> float | None:
    """The value of a random order or guess for a score; None where it is not known."""
    found = at(result, measure.chance) if isinstance(measure.chance, str) else measure.chance
    return found.get(score) if isinstance(found, Mapping) else found


def selections() -> list[str]:
    """Valid values of `config.selection` without their scores, such as "hit@5" of "hit@5/avg".

    Measures of the task "retrieval" are named without the task.
    """
    tasks = ("retrieval", "retrieval_all", "relation_type")
    found = [m for task in tasks for m in of_task(task) if m.higher_is_better]
    return [selection_of(measure) for measure in found]


def selection_of(measure: Measure) -> str:
    """A relational measure in what `validate` returns, without a score."""
    return measure.path.removeprefix("retrieval/")

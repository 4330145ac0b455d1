"""Measures of runs and sweeps side by side: bars, and lines against an option that was varied."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax.evaluation.controls import headline, rows_of
from rcml_jax.evaluation.scores import SCORES
from rcml_jax.report import style
from rcml_jax.report.arrays import Arrays, LeftOutError
from rcml_jax.report.curves import labels
from rcml_jax.report.sources import Run, Sweep
from rcml_jax.training.workdir import leaves

#: Names and paths into `eval.json` of what a sweep shows, by family.
MEASURES = {
    "relational": {
        "Hit@5 AVG": "retrieval/hit@5/avg",
        "Top-3 AVG": "relation_type/top3/avg",
        "validity": "relation_validity/accuracy",
    },
    "classification": {
        "last epoch": "classification/last/accuracy",
        "selected on validation": "classification/validation_selected/accuracy",
    },
}
#: Names, tasks and measures that controls have beside a run: one figure, a picture for each row.
BESIDE = (
    (
        ("Hit@5, controlled", "retrieval", "hit@5"),
        ("Hit@5, random", "retrieval_random", "hit@5"),
    ),
    (
        ("relation type, Top-3", "relation_type", "top3"),
        ("relation validity", "relation_validity", "accuracy"),
    ),
)
_FREE = ("seed", "seeds", "platform", "devices", "tensorboard", "data.dir", "data.threads")


def by_score(runs: Sequence[Run], task: str, measure: str) -> dict[str, Any]:
    """Columns run, group, value: a measure of a task under TT, II, TI, IT and AVG."""
    rows = [
        (run.label, score.upper(), required(run, f"{task}/{measure}/{score}"))
        for run in runs
        for score in SCORES
        if not _left_out(run, f"{task}/{measure}/{score}")
    ]
    return _drawn(rows, task)


def by_similarity(runs: Sequence[Run], task: str, measure: str) -> dict[str, Any]:
    """Columns run, group, value: a measure of a task by AVG under each similarity of the sweep.

    Raises LeftOutError where no evaluation has more than one similarity.
    """
    rows = [
        (
            run.label,
            name.replace("_", "-"),
            required(run, f"similarities/{name}/{task}/{measure}/avg"),
        )
        for run in runs
        for name in run.result.get("similarities", {})
        if not _left_out(run, f"similarities/{name}/{task}/{measure}/avg")
    ]
    if not rows:
        raise LeftOutError(
            "the evaluation has the cosine only; evaluate with all similarities: python eval.py "
            f"--workdir {runs[0].path} --config.evaluation.similarity=all"
        )
    return _columns(("run", "group", "value"), rows)


def validity(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns run, group (the probe), value: accuracy of relation validity."""
    rows = [
        (
            run.label,
            f"{required(run, 'relation_validity/probe')} probe",
            required(run, "relation_validity/accuracy"),
        )
        for run in runs
        if not _left_out(run, "relation_validity/accuracy")
    ]
    return _drawn(rows, "relation_validity")


def beside_controls(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns row, kind ("run" or "control"), measure, score, value, gain: runs, then controls.

    Score is AVG, the one modality that a row has, or "" for validity. Gain is a run's value above
    that of its best control; NaN for a control. Runs without controls have no row. Raises
    LeftOutError where no run has any.
    """
    having = [run for run in runs if run.result.get("controls")]
    if not having:
        raise LeftOutError(
            f"{runs[0].path / 'eval.json'} has no controls; evaluate again: python eval.py "
            f"--workdir {runs[0].path}"
        )
    found = rows_of({run.label: [run.result] for run in having})
    names = [label for _, label, _ in found]
    shown = [(run.label, "run", run.result) for run in having]
    # A control that knows a model has a row for each run, next to each other.
    shown += [
        (label if names.count(label) == 1 else f"{label}, {run}", "control", result)
        for run, label, (result,) in sorted(found, key=lambda row: names.index(row[1]))
    ]
    rows = []
    for row, kind, result in shown:
        gains = result.get("gain_over_best_control", {})
        for name, task, measure in (entry for picture in BESIDE for entry in picture):
            values = _at(result, f"{task}/{measure}")
            if values is not None:
                score, value = headline(values)
                gain = gains.get(task, {}).get("gain", np.nan)
                rows.append((row, kind, name, score.upper(), value, gain))
    return _columns(("row", "kind", "measure", "score", "value", "gain"), rows)


def sweep_measures(sweep: Sweep) -> dict[str, Any]:
    """Columns variant, measure, mean, std (n − 1; 0 for one seed) and seeds of a sweep."""
    rows = []
    for label, runs in sweep.variants.items():
        for name, path in MEASURES[sweep.family].items():
            values = [v for run in runs for v in values_at(run.result, path)]
            if values:
                std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                rows.append((label, name, float(np.mean(values)), std, len(values)))
    return _columns(("variant", "measure", "mean", "std", "seeds"), rows)


def varied_option(sweep: Sweep) -> tuple[str, dict[str, float]] | None:
    """The one option with numbers in which a sweep's variants differ, and each variant's value.

    None where they differ in several options, or in one whose values are no numbers.
    """
    flat = {n: leaves(runs[0].config.to_dict()) for n, runs in sweep.variants.items()}
    names = dict.fromkeys(name for options in flat.values() for name in options)
    differ = [
        name
        for name in names
        if name not in _FREE and len({repr(options.get(name)) for options in flat.values()}) > 1
    ]
    if len(differ) != 1 or len(flat) < 3:
        return None
    values = {label: options.get(differ[0]) for label, options in flat.items()}
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values.values()):
        return None
    return differ[0], {label: float(value) for label, value in values.items()}


def against_option(sweep: Sweep, values: Mapping[str, float]) -> dict[str, Any]:
    """Columns panel, option, measure, mean, std, seeds: measures for each value of an option.

    Of relational methods one panel has Hit@5 by every score, the other the measures of `MEASURES`.
    """
    panels = {"accuracy": MEASURES[sweep.family]}
    if sweep.family == "relational":
        hits = {f"Hit@5 {s.upper()}": f"retrieval/hit@5/{s}" for s in reversed(SCORES)}
        panels = {"Hit@5": hits, "other": MEASURES[sweep.family]}
    rows = []
    for panel, measures in panels.items():
        for label in sorted(values, key=values.get):
            for name, path in measures.items():
                found = [v for run in sweep.variants[label] for v in values_at(run.result, path)]
                if found:
                    std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
                    rows.append(
                        (panel, values[label], name, float(np.mean(found)), std, len(found))
                    )
    return _columns(("panel", "option", "measure", "mean", "std", "seeds"), rows)


def values_at(result: Mapping[str, Any], path: str) -> list[float]:
    """A measure's value, or its values over seeds; none where the result lacks it."""
    node = _at(result, path)
    if isinstance(node, Mapping):
        return list(node.get("values", ()))
    return [] if node is None else [float(node)]


def required(run: Run, path: str) -> Any:
    """What a run's evaluation has at a path. Raises LeftOutError where it lacks it."""
    found = _at(run.result, path)
    if found is None:
        raise LeftOutError(
            f"{run.path / 'eval.json'} lacks {path}; evaluate again: python eval.py --workdir "
            f"{run.path}"
        )
    return found


def _left_out(run: Run, path: str) -> bool:
    """Whether an evaluation says that it cannot have a measure, and so has none."""
    return "left_out" in run.result and _at(run.result, path) is None


def _drawn(rows: list[tuple], task: str) -> dict[str, list]:
    """Columns run, group, value. Raises LeftOutError where every run leaves the task out."""
    if not rows:
        raise LeftOutError(f"no run has {task.replace('_', ' ')}; eval.json says why (left_out)")
    return _columns(("run", "group", "value"), rows)


def _at(node: Any, path: str) -> Any:
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def _columns(names: Sequence[str], rows: Sequence[tuple]) -> dict[str, list]:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


# Drawing


def draw_groups(arrays: Arrays, path: pathlib.Path, what: str, chance: float = 0.0) -> pathlib.Path:
    """Bars of rates in percent, a colour and a hatch for each run; a line where chance is."""
    runs, groups = labels(arrays), labels(arrays, "group")
    legend = len(runs) > 1 or chance > 0
    width, drawn = 0.8 / len(runs), set()
    with style.drawing(style.WIDE, 3.6 + 0.25 * len(runs) * legend) as figure:
        axes = figure.add_subplot()
        for place, run in enumerate(runs):
            for number, group in enumerate(groups):
                here = (arrays["run"].astype(str) == run) & (arrays["group"].astype(str) == group)
                if not here.any():
                    continue
                value = 100 * float(arrays["value"][here][0])
                x = number + (place - (len(runs) - 1) / 2) * width
                axes.bar(
                    x, value, 0.92 * width, color=style.COLOURS[place % 8], edgecolor="white",
                    hatch=style.HATCHES[place % 8],
                    label=style.short(run, 60) if run not in drawn else None,
                )  # fmt: skip
                drawn.add(run)
                if len(runs) * len(groups) <= 20:
                    # On white, so that the line of chance does not cross it.
                    axes.annotate(
                        f"{value:.0f}", (x, value), xytext=(0, 2), textcoords="offset points",
                        ha="center", va="bottom", fontsize=10, zorder=4,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                    )  # fmt: skip
        if chance:
            axes.axhline(100 * chance, color="black", linestyle="--", linewidth=1.5, label="chance")
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylabel=what, ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
        if legend:
            style.below(
                figure, *axes.get_legend_handles_labels(), columns=1 if len(runs) > 3 else 2
            )
        return style.save(figure, path)


def draw_controls(
    arrays: Arrays, path: pathlib.Path, measures: Sequence[str]
) -> pathlib.Path | None:
    """Horizontal bars of runs, and under them of controls in grey: a panel for each measure.

    A run's number has its gain beside it, and one that is not of AVG its score. None, and no file,
    where no row has any of the measures.
    """
    mine = np.isin(arrays["measure"].astype(str), measures)
    if not mine.any():
        return None
    arrays = {name: column[mine] for name, column in arrays.items()}
    rows = labels(arrays, "row")
    runs = labels({"run": arrays["row"][arrays["kind"].astype(str) == "run"]})
    with style.drawing(style.WIDE, 1.1 + 0.36 * len(rows)) as figure:
        panels = figure.subplots(1, len(measures), sharey=True)
        for axes, measure in zip(np.atleast_1d(panels), measures, strict=True):
            for place in np.flatnonzero(arrays["measure"].astype(str) == measure):
                row, value = str(arrays["row"][place]), 100 * float(arrays["value"][place])
                number = runs.index(row) % 8 if row in runs else None
                axes.barh(
                    rows.index(row), value, 0.72, edgecolor="white",
                    color="#B5B5B5" if number is None else style.COLOURS[number],
                    hatch="" if number is None else style.HATCHES[number],
                )  # fmt: skip
                axes.annotate(
                    _said(value, arrays["gain"][place], str(arrays["score"][place])),
                    (value, rows.index(row)), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=9.5, weight="normal" if number is None else "bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
            axes.set_title(measure, loc="left", fontsize=11)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.set(xlabel="percent", xlim=(0, 165), xticks=(0, 50, 100))
        axes.set_yticks(range(len(rows)), [style.wrap(row, 24, 2) for row in rows])
        axes.invert_yaxis()
        return style.save(figure, path)


def _said(value: float, gain: float, score: str) -> str:
    """A bar's number in percent, with its gain (a fraction) and its score where there is one."""
    text = f"{value:.1f}"
    if np.isfinite(gain):
        text += f" ({100 * gain:+.1f})".replace("-", "−")
    return text if score in ("", "AVG") else f"{text} {score}"


def draw_variants(arrays: Arrays, path: pathlib.Path) -> pathlib.Path:
    """Horizontal bars of a sweep's variants, one for each measure, with deviations over seeds."""
    variants, measures = labels(arrays, "variant"), labels(arrays, "measure")
    height = 0.84 / len(measures)
    with style.drawing(style.WIDE, 1.3 + 0.33 * len(variants) * len(measures)) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for place, measure in enumerate(measures):
            here = arrays["measure"].astype(str) == measure
            names = arrays["variant"].astype(str)[here]
            y = [variants.index(n) + (place - (len(measures) - 1) / 2) * height for n in names]
            mean, std = 100 * arrays["mean"][here], 100 * arrays["std"][here]
            axes.barh(
                y, mean, 0.9 * height, color=style.COLOURS[place], hatch=style.HATCHES[place],
                edgecolor="white", label=measure,
                xerr=np.where(arrays["seeds"][here] > 1, std, np.nan), ecolor="black", capsize=3,
            )  # fmt: skip
            for at, value, spread in zip(y, mean, std, strict=True):
                axes.annotate(
                    f"{value:.1f}", (value + spread, at), xytext=(5, 0), va="center",
                    textcoords="offset points", fontsize=10,
                )  # fmt: skip
        axes.set_yticks(range(len(variants)), [style.wrap(v, 26) for v in variants])
        axes.invert_yaxis()
        axes.set(xlabel="percent", xlim=(0, 112), xticks=range(0, 101, 20))
        style.below(figure, *axes.get_legend_handles_labels(), columns=len(measures))
        return style.save(figure, path)


def draw_against(arrays: Arrays, path: pathlib.Path, option: str, panel: str) -> pathlib.Path:
    """One panel's measures in percent against an option, a line each; the first one is thick."""
    mine = arrays["panel"].astype(str) == panel
    arrays = {name: column[mine] for name, column in arrays.items()}
    measures, values = labels(arrays, "measure"), np.unique(arrays["option"])
    with style.drawing(style.PANEL, 3.4 + 0.25 * -(-len(measures) // 2)) as figure:
        axes = figure.add_subplot()
        for place, measure in enumerate(measures):
            here = arrays["measure"].astype(str) == measure
            several = arrays["seeds"][here] > 1
            axes.errorbar(
                arrays["option"][here], 100 * arrays["mean"][here],
                yerr=np.where(several, 100 * arrays["std"][here], np.nan), capsize=3,
                label=measure, **style.series(place) | {"linewidth": 1.6 if place else 3},
            )  # fmt: skip
        axes.set(xlabel=option, ylabel="percent")
        if len(values) < 9:
            axes.set_xticks(values)
        style.below(figure, *axes.get_legend_handles_labels(), columns=2)
        return style.save(figure, path)

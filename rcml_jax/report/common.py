"""Figures of any run: results, differences, sweeps, training curves."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax.config import READING
from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.controls import headline, rows_of
from rcml_jax.evaluation.measures import (
    Measure,
    at,
    headlines,
    main_measures,
    main_of,
    selection_of,
    values_at,
)
from rcml_jax.evaluation.measures import columns as columns_of
from rcml_jax.report import page
from rcml_jax.report.page import (
    Arrays,
    Figure,
    Folder,
    LeftOutError,
    Section,
    Table,
    columns,
    labels,
    mean_std,
    percent,
    plain,
    slug,
    where,
)
from rcml_jax.report.runs import Run, Sweep, differences
from rcml_jax.training.workdir import leaves

# Training curves: loss, its terms, the learning rate and the validation measure.


MOST_RUNS = 8
#: What a training line holds beside the loss and its terms.
_NO_TERMS = ("loss", "learning_rate", "gradient_norm", "pairs", "accuracy", "relation_accuracy")
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
    """Lines of a run's `metrics.jsonl`, in order; a line cut by a kill is left out."""
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
    rows = [
        (run.label, name, line["step"], value)
        for run in runs[:MOST_RUNS]
        for line in read_lines(run)
        for name, value in _named(line, run.family).items()
    ]
    if not rows:
        names = ", ".join(run.label for run in runs)
        raise LeftOutError(f"metrics.jsonl is missing or empty in {names}; train first")
    return columns(("run", "name", "step", "value"), rows)


def _named(line: dict, family: str) -> dict[str, float]:
    if line["kind"] == "validation":
        value = line.get(_followed(family)[0])
        return {} if value is None else {"validation": value}
    found = {name: line[name] for name in ("loss", "learning_rate") if name in line}
    for name, value in line.items():
        number = isinstance(value, (int, float)) and name != "step"
        if number and name not in _NO_TERMS:
            found[f"term/{name}"] = value
    return found


def _followed(family: str) -> tuple[str, str]:
    """The measure of validation that curves show: its name in `metrics.jsonl`, and its label."""
    if family == "classification":
        return "accuracy", "accuracy"
    measure = main_of("retrieval")
    return f"{selection_of(measure)}/avg", f"{measure.label} AVG"


def draw_runs(arrays: Arrays, path: pathlib.Path, name: str, family: str) -> pathlib.Path:
    """A line for each run that has it: the loss, a term of it, the learning rate or validation.

    The best step of validation is ringed.
    """
    rate, runs = 100 if name == "validation" else 1, labels(arrays)
    arrays = where(arrays, name=name)
    several, shown = len(runs) > 1, labels(arrays)
    height = 3.3 + 0.25 * len(shown) * several
    with page.panel(path, page.PANEL, height, legend=int(several)) as axes:
        for run in shown:
            steps, values = (where(arrays, run=run)[column] for column in ("step", "value"))
            look = page.series(runs.index(run)) | {"markevery": max(1, len(steps) // 8)}
            axes.plot(steps, rate * values, label=page.short(run, 40), **look)
            if name == "validation":
                best = int(np.argmax(values))
                axes.plot(
                    steps[best], rate * values[best], "o", markersize=13, fillstyle="none",
                    color=look["color"],
                )  # fmt: skip
        axes.set(xlabel="step", ylabel=what(name, family))
        if name != "validation":
            values = arrays["value"]
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            axes.set_ylim(1.06 * low, 1.06 * high or 1)
    return path


def what(name: str, family: str) -> str:
    """Name of a curve in words."""
    if name.startswith("term/"):
        term = name.removeprefix("term/")
        return f"term: {_TERMS.get(term, f'{term} classifier')}"
    names = {"loss": "training loss", "learning_rate": "learning rate"}
    return names.get(name) or f"validation {_followed(family)[1]} (%)"


# Measures of runs and sweeps side by side: bars, and lines against an option that was varied.


_FREE = ("seed", "seeds", "platform", "devices", "tensorboard", *READING)


def by_score(runs: Sequence[Run], measure: Measure) -> dict[str, Any]:
    """Columns run, group, value: a measure under TT, II, TI, IT and AVG."""
    rows = [
        (run.label, score.upper(), required(run, f"{measure.path}/{score}"))
        for run in runs
        for score in SCORES
        if not _left_out(run, f"{measure.path}/{score}")
    ]
    return _drawn(rows, measure.task)


def by_similarity(runs: Sequence[Run], measure: Measure) -> dict[str, Any]:
    """Columns run, group, value: a measure by AVG under each similarity of the sweep.

    Raises LeftOutError where no evaluation has more than one similarity.
    """
    rows = [
        (
            run.label,
            name.replace("_", "-"),
            required(run, f"similarities/{name}/{measure.path}/avg"),
        )
        for run in runs
        for name in run.result.get("similarities", {})
        if not _left_out(run, f"similarities/{name}/{measure.path}/avg")
    ]
    if not rows:
        raise LeftOutError(
            "the evaluation has the cosine only; evaluate with all similarities: rcml-eval "
            f"--workdir {runs[0].path} --config.evaluation.similarity=all"
        )
    return columns(("run", "group", "value"), rows)


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
            f"{runs[0].path / 'eval.json'} has no controls; evaluate again: rcml-eval "
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
    rows, beside = [], with_controls(having)
    for row, kind, result in shown:
        gains = result.get("gain_over_best_control", {})
        for measure in beside:
            values = at(result, measure.path)
            if values is not None:
                score, value = headline(values)
                gain = gains.get(measure.task, {}).get("gain", np.nan)
                rows.append((row, kind, measure.label, score.upper(), value, gain))
    return columns(("row", "kind", "measure", "score", "value", "gain"), rows)


def with_controls(runs: Sequence[Run]) -> list[Measure]:
    """Main measures that some run's controls have too."""
    controls = [row for run in runs for row in run.result.get("controls", {}).values()]
    return [m for m in main_measures() if any(at(row, m.path) is not None for row in controls)]


def sweep_measures(sweep: Sweep) -> dict[str, Any]:
    """Columns variant, measure, mean, std (n − 1; 0 for one seed) and seeds of a sweep."""
    rows = [
        (label, name, *spread)
        for label, runs in sweep.variants.items()
        for name, path in headlines(sweep.family).items()
        for spread in _spread(runs, path)
    ]
    return columns(("variant", "measure", "mean", "std", "seeds"), rows)


def _spread(runs: Sequence[Run], path: str) -> list[tuple[float, float, int]]:
    """Mean, deviation and number of a measure's values over runs; nothing where none has it."""
    values = [value for run in runs for value in values_at(run.result, path)]
    return [(*mean_std(values), len(values))] if values else []


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
    values: dict[str, Any] = {label: options.get(differ[0]) for label, options in flat.items()}
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values.values()):
        return None
    return differ[0], {label: float(value) for label, value in values.items()}


def against_option(sweep: Sweep, values: Mapping[str, float]) -> dict[str, Any]:
    """Columns panel, option, measure, mean, std, seeds: measures for each value of an option.

    Of relational methods one panel has Hit@5 by every score, the other the headlines.
    """
    panels = {"accuracy": headlines(sweep.family)}
    if sweep.family == "relational":
        hit = main_of("retrieval")
        hits = {f"{hit.label} {s.upper()}": f"{hit.path}/{s}" for s in reversed(SCORES)}
        panels = {hit.label: hits, "other": headlines(sweep.family)}
    rows = [
        (panel, values[label], name, *spread)
        for panel, measures in panels.items()
        for label in sorted(values, key=values.__getitem__)
        for name, path in measures.items()
        for spread in _spread(sweep.variants[label], path)
    ]
    return columns(("panel", "option", "measure", "mean", "std", "seeds"), rows)


def required(run: Run, path: str) -> Any:
    """Value at a path of a run's evaluation. Raises LeftOutError if it is missing."""
    found = at(run.result, path)
    if found is None:
        raise LeftOutError(
            f"{run.path / 'eval.json'} lacks {path}; evaluate again: rcml-eval --workdir {run.path}"
        )
    return found


def _left_out(run: Run, path: str) -> bool:
    """Whether an evaluation names parts that it left out, and lacks this measure."""
    return "left_out" in run.result and at(run.result, path) is None


def _drawn(rows: list[tuple], task: str) -> dict[str, list]:
    """Columns run, group, value. Raises LeftOutError if every run left the task out."""
    if not rows:
        raise LeftOutError(f"no run has {task.replace('_', ' ')}; eval.json says why (left_out)")
    return columns(("run", "group", "value"), rows)


# Drawing

_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw_groups(arrays: Arrays, path: pathlib.Path, what: str, chance: float = 0) -> pathlib.Path:
    """Bars of rates in percent, a colour and a hatch for each run; a line where chance is."""
    runs, groups = labels(arrays), labels(arrays, "group")
    width, legend = 0.8 / len(runs), (1 if len(runs) > 3 else 2) * (len(runs) > 1 or chance > 0)
    height = 3.6 + 0.25 * len(runs) * bool(legend)
    with page.panel(path, page.WIDE, height, legend) as axes:
        for index, run in enumerate(runs):
            mine = where(arrays, run=run)
            at = [groups.index(str(group)) for group in mine["group"]]
            x = np.array(at) + (index - (len(runs) - 1) / 2) * width
            bars = axes.bar(
                x, 100 * mine["value"], 0.92 * width, color=page.COLOURS[index % 8],
                edgecolor="white", hatch=page.HATCHES[index % 8], label=page.short(run, 60),
            )  # fmt: skip
            if len(runs) * len(groups) <= 20:
                # On white, so that the line of chance does not cross it.
                axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=10, zorder=4, bbox=_ON_WHITE)
        if chance:
            axes.axhline(100 * chance, color="black", linestyle="--", linewidth=1.5, label="chance")
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylabel=what, ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
    return path


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
    with page.drawing(page.WIDE, 1.1 + 0.36 * len(rows)) as figure:
        panels = figure.subplots(1, len(measures), sharey=True)
        for axes, measure in zip(np.atleast_1d(panels), measures, strict=True):
            for index in np.flatnonzero(arrays["measure"].astype(str) == measure):
                row, value = str(arrays["row"][index]), 100 * float(arrays["value"][index])
                number = runs.index(row) % 8 if row in runs else None
                axes.barh(
                    rows.index(row), value, 0.72, edgecolor="white",
                    color="#B5B5B5" if number is None else page.COLOURS[number],
                    hatch="" if number is None else page.HATCHES[number],
                )  # fmt: skip
                axes.annotate(
                    _said(value, arrays["gain"][index], str(arrays["score"][index])),
                    (value, rows.index(row)), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=9.5, weight="normal" if number is None else "bold",
                    bbox=_ON_WHITE,
                )  # fmt: skip
            axes.set_title(measure, loc="left", fontsize=11)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.set(xlabel="percent", xlim=(0, 165), xticks=(0, 50, 100))
        axes.set_yticks(range(len(rows)), [page.wrap(row, 24, 2) for row in rows])
        axes.invert_yaxis()
        return page.save_figure(figure, path)


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
    tall = 1.3 + 0.33 * len(variants) * len(measures)
    with page.panel(path, page.WIDE, tall, legend=len(measures)) as axes:
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for index, measure in enumerate(measures):
            mine = where(arrays, measure=measure)
            at = [variants.index(str(name)) for name in mine["variant"]]
            y = np.array(at) + (index - (len(measures) - 1) / 2) * height
            mean, std = 100 * mine["mean"], 100 * mine["std"]
            axes.barh(
                y, mean, 0.9 * height, color=page.COLOURS[index], hatch=page.HATCHES[index],
                edgecolor="white", label=measure,
                xerr=np.where(mine["seeds"] > 1, std, np.nan), ecolor="black", capsize=3,
            )  # fmt: skip
            for row, value, spread in zip(y, mean, std, strict=True):
                axes.annotate(
                    f"{value:.1f}", (value + spread, row), xytext=(5, 0), va="center",
                    textcoords="offset points", fontsize=10,
                )  # fmt: skip
        axes.set_yticks(range(len(variants)), [page.wrap(v, 26) for v in variants])
        axes.invert_yaxis()
        axes.set(xlabel="percent", xlim=(0, 112), xticks=range(0, 101, 20))
    return path


def draw_against(arrays: Arrays, path: pathlib.Path, option: str, panel: str) -> pathlib.Path:
    """One panel's measures in percent against an option, a line each; the first one is thick."""
    arrays = where(arrays, panel=panel)
    measures, values = labels(arrays, "measure"), np.unique(arrays["option"])
    height = 3.4 + 0.25 * -(-len(measures) // 2)
    with page.panel(path, page.PANEL, height, legend=2) as axes:
        for index, measure in enumerate(measures):
            mine = where(arrays, measure=measure)
            axes.errorbar(
                mine["option"], 100 * mine["mean"],
                yerr=np.where(mine["seeds"] > 1, 100 * mine["std"], np.nan), capsize=3,
                label=measure, **page.series(index) | {"linewidth": 1.6 if index else 3},
            )  # fmt: skip
        axes.set(xlabel=option, ylabel="percent")
        if len(values) < 9:
            axes.set_xticks(values)
    return path


FAMILIES = {"relational": "relation graphs", "classification": "classification"}


def results(folder: Folder, runs: Sequence[Run]) -> Section:
    """A table of measures for each data set, and one of the options in which the runs differ."""
    figures = []
    by_data: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_data.setdefault((run.family, run.dataset), []).append(run)
    for (family, dataset), found in by_data.items():
        both = len({other for other, name in by_data if name == dataset}) > 1
        title = f"Measures on {dataset}" + f", {FAMILIES[family]}" * both
        make = functools.partial(_results, folder, family, found, title)
        figures.append(folder.attempt(title, make))
    for family in FAMILIES:
        found = [run for run in runs if run.family == family]
        if len(found) > 1:
            make = functools.partial(_differences, folder, found)
            figures.append(folder.attempt("What differs", make))
    return Section("Results", tuple(figures))


def _results(folder: Folder, family: str, runs: Sequence[Run], title: str) -> Figure:
    scored = [run for run in runs if run.result is not None]
    without = "; ".join(
        f"{run.label} has no eval.json yet: rcml-eval --workdir {run.path}"
        for run in runs
        if run.result is None
    )
    if not scored:
        raise LeftOutError(without)
    listed = columns_of(family)
    measures = {
        name: path
        for name, (path, _) in listed.items()
        if any(values_at(run.result, path) for run in scored)
    }
    # The controls stand below the runs; those that know no model once.
    shown = [(run.label, run.config.method, run.result) for run in scored]
    beside = rows_of({run.label: [run.result] for run in scored})
    shown += [(f"{label}: {control}", "control", rows[0]) for label, control, rows in beside]
    found = [
        (label, name, *mean_std(values_at(result, path)), len(values_at(result, path)))
        for label, _, result in shown
        for name, path in measures.items()
    ]
    names = ("run", "measure", "mean", "std", "values")
    path, saved = folder.save(f"results-{slug(scored[0].dataset)}.csv", columns(names, found))
    shape = len(shown), len(measures)
    mean, std, count = (saved[name].reshape(shape) for name in ("mean", "std", "values"))
    rows = [
        [label, method, str(scored[0].result["split"])]
        + [
            percent(mean[i, j]) + (f" ± {percent(std[i, j])}" if count[i, j] > 1 else "")
            for j in range(len(measures))
        ]
        for i, (label, method, _) in enumerate(shown)
    ]
    best = np.nanmax(np.where(np.isnan(mean), -1, mean), axis=0)
    marked = frozenset(
        (int(i), int(j) + 3)
        for i, j in zip(*np.nonzero(mean == best), strict=True)
        if len(rows) > 1 and listed[list(measures)[j]][1].higher_is_better
    )
    return Figure(
        title,
        f"In percent, as in eval.json. {_protocol(scored[0])}"
        + (f" {without}." if without else ""),
        table=Table(["run", "method", "split", *measures], rows, marked),
        data=(path,),
    )


def _protocol(run: Run) -> str:
    said = run.result["protocol"]
    names = (
        "split_seed",
        "disjoint",
        "items",
        "selection",
        "ties",
        "samples",
        "validation",
        "looks",
    )
    parts = [f"{name.replace('_', ' ')}: {plain(said[name])}" for name in names if name in said]
    return f"Protocol of {run.label}: " + "; ".join(parts) + "."


def _differences(folder: Folder, runs: Sequence[Run]) -> Figure:
    found = differences(runs)
    if not found:
        raise LeftOutError("all runs have the same configuration")
    labels = [run.label for run in runs]
    path, _ = folder.save(
        "differences.csv",
        {"option": list(found)}
        | {label: [_shown(row[i]) for row in found.values()] for i, label in enumerate(labels)},
    )
    rows = [[name, *map(_shown, row)] for name, row in found.items()]
    marked = frozenset(
        (i, j + 1)
        for i, row in enumerate(found.values())
        for j, value in enumerate(row)
        if value != row[0]
    )
    return Figure(
        "What differs",
        "Options of config.json that are not the same in all runs; marked where they differ from "
        "the first run's.",
        table=Table(["option", *labels], rows, marked),
        data=(path,),
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else "(empty)" if value == "" else str(value)


def training(folder: Folder, runs: Sequence[Run]) -> Section:
    """Curves of the runs, those of one family on the same axes."""
    figures = []
    for family, what in FAMILIES.items():
        mine = [run for run in runs if run.family == family]
        if mine:
            title = "Training curves" if len({r.family for r in runs}) == 1 else f"Curves: {what}"
            figures.append(
                folder.attempt(title, functools.partial(_curves, folder, title, mine, family))
            )
    return Section("Training", tuple(figures))


def _curves(folder: Folder, title: str, runs: Sequence[Run], family: str) -> Figure:
    path, saved = folder.save(f"curves-{family}.csv", curves(runs))
    names, images = labels(saved, "name"), []
    terms = [name for name in names if name.startswith("term/")]
    for name in ("loss", "validation", "learning_rate", *terms):
        if name in names:
            file, alt = (
                f"curve-{family}-{slug(name)}.svg",
                f"{what(name, family)} against the step.",
            )
            images.append(folder.draw(file, alt, draw_runs, saved, name, family))
    silent = [run.label for run in runs[:MOST_RUNS] if run.label not in labels(saved)]
    rest = len(runs) - MOST_RUNS
    return Figure(
        title,
        "From metrics.jsonl: training figures are means over the steps since the line before; the "
        "ring is the best validation. Terms are as the loss has them before their weights."
        + (f" The first {MOST_RUNS} of {len(runs)} runs." if rest > 0 else "")
        + (f" Without a metrics.jsonl: {', '.join(silent)}." if silent else ""),
        tuple(images),
        data=(path,),
    )


def sweep(folder: Folder, found: Sweep) -> Section:
    """Lines where a sweep varied one number; bars of its variants where it varied other things."""
    name, varied = slug(found.label), varied_option(found)
    if varied:
        option, values = varied
        title = f"Against {option}"
        figure = folder.attempt(title, lambda: _against(folder, found, name, option, values))
    else:
        figure = folder.attempt("Variants", lambda: _variants(folder, found, name))
    return Section(f"Sweep: {found.label}", (figure,))


def _seeds(sweep: Sweep) -> str:
    counts = {len(runs) for runs in sweep.variants.values()}
    if counts == {1}:
        return "one run each"
    several = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    return f"{several} runs each, mean and standard deviation (n − 1) over them"


def _variants(folder: Folder, found: Sweep, name: str) -> Figure:
    path, saved = folder.save(f"variants-{name}.csv", sweep_measures(found))
    alt = f"Bars of {', '.join(labels(saved, 'measure'))} for each variant."
    image = folder.draw(f"variants-{name}.svg", alt, draw_variants, saved)
    return Figure(
        f"Variants: {found.label}",
        f"Test figures of the finished runs in {found.path}, {_seeds(found)}. A run that trains "
        "several seeds at once counts as so many.",
        (image,),
        data=(path,),
    )


def _against(folder: Folder, found: Sweep, name: str, option: str, values: dict) -> Figure:
    path, saved = folder.save(f"against-{name}.csv", against_option(found, values))
    label = "β of the pooling head (model.beta)" if option == "model.beta" else option
    images = []
    for panel in labels(saved, "panel"):
        file, alt = f"against-{name}-{slug(panel)}.svg", f"{panel} against {option}."
        images.append(folder.draw(file, alt, draw_against, saved, label, panel))
    what = main_of("retrieval").label if found.family == "relational" else "Accuracy"
    return Figure(
        f"{what} against {'β' if option == 'model.beta' else option}",
        f"Test figures of the finished runs in {found.path}, {_seeds(found)}.",
        tuple(images),
        data=(path,),
    )

"""What is shown of any run: results, differences, sweeps, curves; and alignment studies."""

import functools
import importlib.util
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from rcml_jax.evaluation.controls import rows_of
from rcml_jax.report import bars, curves
from rcml_jax.report.arrays import LeftOutError, load, slug
from rcml_jax.report.folder import Figure, Folder, Picture, Section, Table, percent
from rcml_jax.report.sources import Run, Study, Sweep, differences

_RESULTS = {
    "relational": {
        "Hit@5 TT": "retrieval/hit@5/tt",
        "II": "retrieval/hit@5/ii",
        "TI": "retrieval/hit@5/ti",
        "IT": "retrieval/hit@5/it",
        "AVG": "retrieval/hit@5/avg",
        "AVG, by relation": "retrieval/macro/hit@5/avg",
        "AVG, random": "retrieval_random/hit@5/avg",
        "type, Top-3": "relation_type/top3/avg",
        "validity": "relation_validity/accuracy",
    },
    "classification": {
        "accuracy, last epoch": "classification/last/accuracy",
        "selected on validation": "classification/validation_selected/accuracy",
        "best test epoch": "classification/best_test_epoch/accuracy",
        "macro F1, last": "classification/last/macro_f1",
        "confidence on noise": "random_inputs/mean",
    },
}
#: Measures of which more is not better.
_NOT_BETTER = ("confidence on noise",)
FAMILIES = {"relational": "relation graphs", "classification": "classification"}


def results(folder: Folder, runs: Sequence[Run]) -> Section:
    """A table of measures for each data set, and one of the options in which the runs differ."""
    figures, by_data = [], {}
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
        f"{run.label} has no eval.json yet: python eval.py --workdir {run.path}"
        for run in runs
        if run.result is None
    )
    if not scored:
        raise LeftOutError(without)
    measures = {
        name: path
        for name, path in _RESULTS[family].items()
        if any(bars.values_at(run.result, path) for run in scored)
    }
    columns: dict[str, list] = {"run": [], "measure": [], "mean": [], "std": [], "values": []}
    # The controls stand below the runs; those that know no model once.
    shown = [(run.label, run.config.method, run.result) for run in scored]
    beside = rows_of({run.label: [run.result] for run in scored})
    shown += [(f"{label}: {control}", "control", rows[0]) for label, control, rows in beside]
    for label, _, result in shown:
        for name, path in measures.items():
            values = np.array(bars.values_at(result, path))
            columns["run"].append(label)
            columns["measure"].append(name)
            columns["mean"].append(values.mean() if len(values) else np.nan)
            columns["std"].append(values.std(ddof=1) if len(values) > 1 else 0.0)
            columns["values"].append(len(values))
    path, saved = folder.save(f"results-{slug(scored[0].dataset)}.csv", columns)
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
        if len(rows) > 1 and list(measures)[j] not in _NOT_BETTER
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
    parts = [f"{name.replace('_', ' ')}: {_plain(said[name])}" for name in names if name in said]
    return f"Protocol of {run.label}: " + "; ".join(parts) + "."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items())
    return str(value)


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
                folder.attempt(title, lambda t=title, r=mine, f=family: _curves(folder, t, r, f))
            )
    return Section("Training", tuple(figures))


def _curves(folder: Folder, title: str, runs: Sequence[Run], family: str) -> Figure:
    path, saved = folder.save(f"curves-{family}.csv", curves.curves(runs))
    names, pictures = curves.labels(saved, "name"), []
    terms = [name for name in names if name.startswith("term/")]
    for name in ("loss", "validation", "learning_rate", *terms):
        if name in names:
            file = folder.picture(f"curve-{family}-{slug(name)}.svg")
            picture = curves.draw_runs(saved, file, name, family)
            pictures.append(Picture(picture, f"{curves.what(name, family)} against the step."))
    silent = [
        run.label for run in runs[: curves.MOST_RUNS] if run.label not in curves.labels(saved)
    ]
    rest = len(runs) - curves.MOST_RUNS
    return Figure(
        title,
        "From metrics.jsonl: training figures are means over the steps since the line before; the "
        "ring is the best validation. Terms are as the loss has them before their weights."
        + (f" The first {curves.MOST_RUNS} of {len(runs)} runs." if rest > 0 else "")
        + (f" Without a metrics.jsonl: {', '.join(silent)}." if silent else ""),
        tuple(pictures),
        data=(path,),
    )


def sweep(folder: Folder, found: Sweep) -> Section:
    """Lines where a sweep varied one number; bars of its variants where it varied other things."""
    name, varied = slug(found.label), bars.varied_option(found)
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
    path, saved = folder.save(f"variants-{name}.csv", bars.sweep_measures(found))
    picture = bars.draw_variants(saved, folder.picture(f"variants-{name}.svg"))
    alt = f"Bars of {', '.join(curves.labels(saved, 'measure'))} for each variant."
    return Figure(
        f"Variants: {found.label}",
        f"Test figures of the finished runs in {found.path}, {_seeds(found)}. A run that trains "
        "several seeds at once counts as so many.",
        (Picture(picture, alt),),
        data=(path,),
    )


def _against(folder: Folder, found: Sweep, name: str, option: str, values: dict) -> Figure:
    path, saved = folder.save(f"against-{name}.csv", bars.against_option(found, values))
    label = "β of the pooling head (model.beta)" if option == "model.beta" else option
    pictures = []
    for panel in curves.labels(saved, "panel"):
        file = folder.picture(f"against-{name}-{slug(panel)}.svg")
        picture = bars.draw_against(saved, file, label, panel)
        pictures.append(Picture(picture, f"{panel} against {option}."))
    what = "Hit@5" if found.family == "relational" else "Accuracy"
    return Figure(
        f"{what} against {'β' if option == 'model.beta' else option}",
        f"Test figures of the finished runs in {found.path}, {_seeds(found)}.",
        tuple(pictures),
        data=(path,),
    )


def study(folder: Folder, found: Study) -> Section:
    """The pictures that `report.alignment` draws of an alignment study."""
    title = f"Alignment: {found.label}"
    return Section(
        title, (folder.attempt("Alignment of two modalities", lambda: _study(folder, found)),)
    )


def _study(folder: Folder, found: Study) -> Figure:
    arrays = found.path / "similarities.npz"
    if not arrays.is_file():
        raise LeftOutError(
            f"{found.path} holds no similarities.npz; evaluate again: python eval.py --workdir "
            f"{found.path}"
        )
    if importlib.util.find_spec("rcml_jax.report.alignment") is None:
        raise LeftOutError("this version draws no figures of alignment studies")
    from rcml_jax.report import alignment

    name = slug(found.label)
    copied = folder.root / "data" / f"similarities-{name}.npz"
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arrays, copied)
    drawn = alignment.draw(found.result, load(copied), folder.root / f"alignment-{name}")
    names = {
        "similarities": "Histograms of the cosines of matched and of random pairs.",
        "gap": "The modality gap against retrieval.",
        "plane": "Both modalities in a plane, as they are and centred.",
    }
    pictures = tuple(Picture(path, names.get(path.stem, path.stem)) for path in drawn)
    return Figure(
        "Alignment of two modalities", _alignment_caption(found), pictures, data=(copied,)
    )


def _alignment_caption(found: Study) -> str:
    parts = [f"{name}: {_plain(value)}" for name, value in found.result["protocol"].items()]
    return (
        "For each source the cosines of matched and of random pairs; the modality gap against "
        "retrieval with each calibration; and both modalities on their first two principal axes "
        f"before and after centring. Protocol: {'; '.join(parts)}."
    )

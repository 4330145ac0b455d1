"""Tables of an evaluation for the terminal, and tables of sweeps."""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rcml_jax.errors import UserError
from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.classification import error_analysis, read_predictions
from rcml_jax.evaluation.controls import label_of, rows_of
from rcml_jax.evaluation.measures import (
    Measure,
    at,
    columns,
    headlines,
    main_of,
    of_task,
    printed,
    values_at,
)
from rcml_jax.evaluation.paired import compare, holm
from rcml_jax.log import counted

#: Columns of what is no terminal: more than any table has.
_WIDEST = 1000
#: Measures of the alignment study in the order of its tables' columns; those of its gap, as shown.
ALIGNMENT = ("p@1", "r@5", "r@10", "mrr", "map@10", "median_rank")
_DIRECTIONS = ("image_to_text", "text_to_image")
GAP = {
    "centroid": "centroid",
    "wasserstein2": "W2",
    "matched_cosine": "matched",
    "random_cosine": "random",
}
_PAIRED = (
    "less", "measure", "pairs", "difference (95 % interval)", "effect size", "p, Holm",
    "pairs needed",
)  # fmt: skip
_PAIRED_NOTE = (
    "Effect size: mean over deviation of the differences. Pairs needed: for a paired t-test at 5 % "
    "with a power of 80 %, if that is the true effect size."
)


def make_console(stream: Any = None) -> Console:
    """A console on a stream, by default stdout; tables are cut to the width of a terminal alone."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else _WIDEST
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_evaluation(result: dict, stream: Any = None) -> None:
    """Print the figures of an `eval.json`, rates in percent."""
    console = make_console(stream)
    if result["method"] == "alignment":
        _print_alignment(result, console)
    elif "checkpoint" in result:
        _print_classification(result, console)
    elif "retrieval" in result:
        _print_relational(result, console)
    else:
        _print_numbers(result, console)


def _table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = ""
) -> Table:
    """A table of labels on the left and figures on the right; in need the labels are folded."""
    table = Table(title=title, caption=note or None, caption_justify="left")
    table.add_column(header[0], overflow="fold", min_width=min(16, len(header[0])))
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _print_numbers(result: dict, console: Console) -> None:
    """Of a method with measures of its own: every number of the evaluation."""
    title = f"{result.get('method', '')} on {result.get('dataset', '')}"
    rows = [(path, f"{value:.4g}") for path, value in _numbers(result)]
    console.print(_table(title, ("measure", "value"), rows))


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of all numbers of an `eval.json` but those of its protocol."""
    if isinstance(node, Mapping):
        for name, inner in node.items():
            if name != "protocol":
                yield from _numbers(inner, f"{path}/{name}".lstrip("/"))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path, node


def _print_alignment(result: dict, console: Console) -> None:
    """A table for each direction, sources and similarities as rows; then the gap of each source."""
    header = ["source, similarity", *(name.replace("_", " ") for name in ALIGNMENT)]
    for direction in _DIRECTIONS:
        table = _table(f"{direction.replace('_', ' ')} on {result['dataset']}", header, ())
        for source, found in result["sources"].items():
            rows = dict(found["precision"][direction])
            names = {"centred": "cosine, centred", "whitened": "cosine, whitened"}
            rows |= {names[k]: v[direction] for k, v in found["calibration"].items() if k in names}
            rows |= {f"{k} (learned)": v[direction] for k, v in found["learned"].items()}
            for label, row in rows.items():
                cells = (
                    _number(row[n], 0) if n == "median_rank" else _percent(row[n])
                    for n in ALIGNMENT
                )
                table.add_row(f"{source}, {label.replace('_', '-')}", *cells)
            table.add_section()
        console.print(table)
    gaps = []
    for source, found in result["sources"].items():
        gap = found["modality_gap"]
        ranks = ", ".join(_number(gap["effective_rank"][m], 1) for m in ("image", "text"))
        cones = ", ".join(_number(gap["random_within"][m], 2) for m in ("image", "text"))
        values = (_number(gap[name]) for name in GAP)
        gaps.append((source, *values, cones, ranks, ", ".join(gap["collapsed"]) or "no"))
    titles = ("source", *GAP.values(), "cone", "rank", "collapsed")
    note = "cone: mean cosine of random images, of random texts; rank: their effective ranks"
    console.print(_table("modality gap", titles, gaps, note))
    for source, found in result["sources"].items():
        _print_alignments(source, found, console)


def _print_alignments(source: str, found: dict, console: Console) -> None:
    """Of one source: the gap before and after each alignment, signs, and figures by pairs."""
    moved = {**found["calibration"], **found["learned"]}
    header = ("alignment", "centroid", "W2", "R@10 image to text", "R@10 text to image")
    table = _table(f"{source}: gap before and after each alignment", header, ())
    for name, row in moved.items():
        if "wasserstein2" in row:
            cells = (_number(row[key]) for key in ("centroid", "wasserstein2"))
            table.add_row(name.replace("_", "-"), *cells, *_recalls(row))
    console.print(table)
    aligned = {k: v["similarities"] for k, v in found["learned"].items() if v.get("similarities")}
    if aligned:
        names = list(next(iter(aligned.values())))
        table = _table(
            f"{source}: R@10 in the space of each alignment, by similarity (%)",
            ("alignment", *(name.replace("_", "-") for name in names)),
            (),
            "image to text, text to image; the first seed",
        )
        for name, rows in aligned.items():
            cells = (", ".join(_recalls(rows[similarity])) for similarity in names)
            table.add_row(name.replace("_", "-"), *cells)
        console.print(table)
    signed = {k: v for k, v in found.get("signed", {}).items() if "left_out" not in v}
    if signed:
        table = _table(
            f"{source}: unrelated pairs below zero, matched pairs above (%)",
            ("similarity", "below, above", "fitted", "ECE", "R@10"),
            (),
            "with zero as it is, and fitted on validation pairs; ECE: expected calibration "
            "error by sigmoid, isotonic; R@10: image to text, text to image",
        )
        for name, row in signed.items():
            shares = [
                ", ".join(_percent(row[k][how]) for k in ("unrelated_negative", "matched_positive"))
                for how in ("plain", "shifted")
            ]
            errors = row["calibration_error"]
            error = ", ".join(
                _percent(errors[k]) if k in errors else "–" for k in ("sigmoid", "isotonic")
            )
            table.add_row(name.replace("_", "-"), *shares, error, ", ".join(_recalls(row)))
        console.print(table)
    by_pairs = found.get("by_pairs", {})
    for direction in _DIRECTIONS if by_pairs else ():
        counts = ["map", *(f"{int(count):,}" for count in next(iter(by_pairs.values())))]
        title = f"{source}: R@10 {direction.replace('_', ' ')} by training pairs (%)"
        table = _table(title, counts, ())
        for name, rows in by_pairs.items():
            table.add_row(
                name.replace("_", "-"), *(_recall(row[direction]) for row in rows.values())
            )
        console.print(table)


def _recalls(row: dict) -> list[str]:
    return [_recall(row[direction]) for direction in _DIRECTIONS]


def _recall(measures: dict) -> str:
    """R@10 in percent, with its deviation over seeds where there are several."""
    mean = _percent(measures["r@10"])
    return f"{mean} ± {_percent(measures['std']['r@10'])}" if "std" in measures else mean


def _percent(rate: float | None, sign: str = "") -> str:
    return "–" if rate is None else f"{100 * rate:{sign}.1f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _print_classification(result: dict, console: Console) -> None:
    protocol = result["protocol"]
    rows = dict(result.get("classification", {}))
    rows[f"checkpoint ({result['checkpoint']['which']})"] = result["checkpoint"]
    if "ensemble" in result:
        rows["mean of the models' probabilities"] = result["ensemble"]
    rows |= {f"{name} alone (its classifier)": x for name, x in result.get("unimodal", {}).items()}
    rows |= {f"{name} replaced by noise": x for name, x in result.get("corrupted", {}).items()}
    for _, label, (row,) in rows_of({"": [result]}):
        rows[f"– {label}"] = row["classification"]["last"]
    every = [m.name.removeprefix("last/") for m in of_task("classification")]
    measures = [name for name in dict.fromkeys(every) if all(name in row for row in rows.values())]
    count, split = protocol["samples"][result["split"]], result["split"]
    table = _table(
        f"{result['method']} on {result['dataset']}: {split}, {counted(count, 'samples')}, "
        f"{counted(protocol['seeds'], 'seeds')}",
        ["measure (%)", *(name.replace("_", " ") for name in measures)],
        [
            (label.replace("_", " "), *(_spread(row[name]) for name in measures))
            for label, row in rows.items()
        ],
        "\n".join(f"{name}: {protocol[name]}" for name in result.get("classification", {})),
    )
    console.print(table)
    if found := result.get("gain_over_best_control", {}).get("classification"):
        console.print(
            f"Gain over the best control, {label_of(found['control'])}: "
            f"{_percent(found['gain'], '+')} points of accuracy at the last epoch"
        )
    if "random_inputs" in result:
        mean = _spread(result["random_inputs"]["mean"])
        chance = 100 / len(protocol["classes"])
        console.print(
            f"Confidence on random inputs (mean top softmax score, lowest possible {chance:.0f}): "
            f"{mean} %"
        )


def _spread(measure: dict) -> str:
    mean = _percent(measure["mean"])
    return f"{mean} ± {_percent(measure['std'])}" if len(measure["values"]) > 1 else mean


def _print_relational(result: dict, console: Console) -> None:
    queries = result["retrieval"]["queries"]
    method = result["method"]
    if method == "embeddings":
        method = f"embeddings of {result['embeddings']['file']}"
    rows = []
    for label, row, sign in _rows(result):
        cells = (_percent(row[n], sign) if n in row else "" for n in SCORES)
        rows.append((label, *cells))
    asked = counted(queries, "queries", "query")
    table = _table(
        f"{method} on {result['dataset']}: {result['split']}, {asked}",
        ["measure (%)", *(name.upper() for name in SCORES)],
        rows,
        f"Queries: {result['protocol']['retrieval']}. Ties count against the model. Lines "
        "with a dash are controls; a gain is one over the best of them.",
    )
    console.print(table)
    for name, reason in result.get("left_out", {}).items():
        console.print(f"Left out: {name.replace('_', ' ')} ({reason})")
    if "relation_validity" not in result:
        return
    validity = result["relation_validity"]
    beside = [
        f"; {label} {_percent(row['relation_validity']['accuracy'])}"
        for _, label, (row,) in rows_of({"": [result]})
        if "relation_validity" in row
    ]
    console.print(
        f"Relation validity ({validity['probe']} probe, {counted(validity['pairs'], 'triples')}): "
        f"{_percent(validity['accuracy'])} %" + "".join(beside)
    )


def _rows(result: dict) -> Iterator[tuple[str, dict, str]]:
    """(label, rates by score, sign) of the table's lines: a measure, then the controls' under it.

    sign: "+" where the rates are differences, which are shown with their sign.
    """
    for measure in printed():
        values = at(result, measure.path)
        if values is not None:
            yield measure.title.format_map(result[measure.task]), values, ""
            if measure.main:
                yield from _controls(result, measure)
    for number, unseen in enumerate(result.get("unseen_sentences", []), 1):
        yield from _under(unseen, f"unseen sentence {number}")
    if product := result.get("training_free_product"):
        yield from _under(product, "cos·cos product")
    if frozen := result.get("pretrained_clip"):
        yield from _under(frozen, "pretrained CLIP as it is")
    for name, variant in result.get("variants", {}).items():
        yield from _under({"retrieval": variant["retrieval"]}, f"scored {name}")
    for name, scores in result.get("similarities", {}).items():
        yield from _under(scores, name)


def _under(found: dict, how: str) -> Iterator[tuple[str, dict, str]]:
    """The main measures of retrieval and relation type of another way to score."""
    for measure in (main_of("retrieval"), main_of("relation_type")):
        if measure.task in found:
            yield f"{measure.label}, {how}", at(found, measure.path), ""


def _controls(result: dict, measure: Measure) -> Iterator[tuple[str, dict, str]]:
    for _, label, (row,) in rows_of({"": [result]}):
        if values := at(row, measure.path):
            yield f"– {label}", values, ""
    if found := result.get("gain_over_best_control", {}).get(measure.task):
        yield f"= gain over {label_of(found['control'])}", {"avg": found["gain"]}, "+"


# The table of a sweep: means and deviations over seeds, and the error analysis of classifiers.


def collect(
    workdir: pathlib.Path, folders: Mapping[str, str], seeds: Sequence[int], *, paired: bool = False
) -> dict:
    """Collect a row of finished runs for each variant, and the error analysis where possible.

    folders: label → folder of the variant. A row has the number of seeds and, for each column that
    the results have, mean and standard deviation (n − 1) over the seeds; a run that trains several
    seeds at once counts as so many. The controls of a variant follow it, with their name under
    "control"; those that know no model come once. paired: compare the first variant with each
    other one, too.
    """
    rows, by_seed = [], {}
    for label, folder in folders.items():
        by_seed[label] = [_evaluation(workdir / folder / f"seed{seed}") for seed in seeds]
    found = {label: [run for run in runs if run] for label, runs in by_seed.items()}
    controls = rows_of(found)
    for label, results in found.items():
        if not results:
            continue
        rows.append(_row(label, results))
        for method, control, measured in controls:
            if method == label:
                rows.append(_row(f"{label}: {control}", measured) | {"control": control})
    table: dict[str, Any] = {"rows": rows}
    if paired and (compared := paired_rows(by_seed)):
        table["paired"] = compared
    analysis = _error_analysis(workdir, folders, seeds)
    if analysis:
        table["error_analysis"] = analysis
    return table


def _evaluation(run: pathlib.Path) -> dict:
    """The `eval.json` of a run, empty where there is none. Raises UserError for a damaged one."""
    path = run / "eval.json"
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); make it again: rcml-eval --workdir {run}"
        ) from error


def paired_rows(results: Mapping[str, Sequence[dict]]) -> list[dict[str, Any]]:
    """The first variant less each other one, over the same seeds, in each headline measure.

    results: variant → the `eval.json` of each seed, empty where there is none; those of one seed,
    or of several in one run, in the same order. A variant that lacks a value where the first has
    one, or the other way round, is left out. A row has "variant", "measure", the keys of
    `paired.compare`, and "p_holm", which is adjusted for the number of variants that are compared
    in the measure.
    """
    (first, *others), rows = list(results), []
    measures = headlines("relational") | headlines("classification")
    for label, path in measures.items():
        values = {name: [values_at(run, path) for run in runs] for name, runs in results.items()}
        sizes = {name: [len(run) for run in runs] for name, runs in values.items()}
        flat = {name: [value for run in runs for value in run] for name, runs in values.items()}
        compared = [
            {"variant": name, "measure": label} | compare(flat[first], flat[name])
            for name in others
            if sizes[name] == sizes[first] and len(flat[first]) > 1
        ]
        tested = [(row, p) for row in compared if isinstance(p := row["p"], float)]
        for (row, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            row["p_holm"] = adjusted
        rows += compared
    return rows


def _row(label: str, results: Sequence[dict]) -> dict[str, Any]:
    """Mean and deviation of each column that all the results have."""
    row: dict[str, Any] = {"variant": label, "seeds": 0}
    for column, (path, _) in columns().items():
        found = [values_at(result, path) for result in results]
        if all(found):
            values = np.concatenate(found)
            deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            row[column] = {"mean": float(values.mean()), "std": deviation}
            row["seeds"] = max(row["seeds"], len(values))
    return row


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, rates in percent."""
    rows = table["rows"]
    shown = [column for column in columns() if any(column in row for row in rows)]
    lines = _lines(
        ["variant", "seeds", *shown],
        [
            [row["variant"], str(row["seeds"]), *(_cell(row.get(c), row["seeds"]) for c in shown)]
            for row in rows
        ],
    )
    if paired := table.get("paired"):
        lines += ["", f"{rows[0]['variant']} less each variant, paired by seed, in points:", ""]
        lines += _lines(_PAIRED, [_paired_cells(row) for row in paired])
        lines += ["", _PAIRED_NOTE]
    if analysis := table.get("error_analysis"):
        lines += ["", "Shares of the test samples (%), each modality trained alone:", ""]
        cells = [[x if isinstance(x, str) else _percent(x) for x in r.values()] for r in analysis]
        lines += _lines(list(analysis[0]), cells)
    return "\n".join(lines) + "\n"


def _paired_cells(row: dict) -> list[str]:
    mean, low, high = (_percent(row[name], "+") for name in ("difference", "low", "high"))
    needed, p = row["needed"], row.get("p_holm")
    return [
        row["variant"],
        row["measure"],
        str(row["pairs"]),
        f"{mean} ({low} to {high})",
        "–" if row["effect"] is None else f"{row['effect']:+.2f}",
        "< 0.001" if p is not None and p < 0.001 else _number(p),
        "–" if needed is None else f"{needed:,}",
    ]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    plain = lambda cell: " ".join(cell.replace("|", r"\|").split("\n"))  # noqa: E731
    first, *rest = (f"| {' | '.join(map(plain, cells))} |" for cells in (header, *rows))
    return [first, "|---" * len(header) + "|", *rest]


def _cell(measure: dict | None, seeds: int) -> str:
    if measure is None:
        return "–"
    mean = _percent(measure["mean"])
    return f"{mean} ± {_percent(measure['std'])}" if seeds > 1 else mean


def _error_analysis(
    workdir: pathlib.Path, folders: Mapping[str, str], seeds: Sequence[int]
) -> list[dict]:
    """The mean over models of the variant "full" against those named "only <modality>"."""
    tables = []
    for seed in seeds if "full" in folders else ():
        files = {x: workdir / f / f"seed{seed}" / "predictions.npz" for x, f in folders.items()}
        models = read_predictions(files["full"]) if files["full"].is_file() else {}
        alone = {name: files.get(f"only {name}") for name in _heads(models)}
        if not alone or not all(path and path.is_file() for path in alone.values()):
            continue
        right = {name: _right(read_predictions(path)) for name, path in alone.items() if path}
        for model, fused in _right(models).items():
            if all(model in found for found in right.values()):
                unimodal = {name: found[model] for name, found in right.items()}
                tables.append(error_analysis(unimodal, fused))
    return [_mean_row(rows) for rows in zip(*tables, strict=True)]


def _mean_row(rows: Sequence[dict]) -> dict:
    mean = lambda name: float(np.mean([row[name] for row in rows]))  # noqa: E731
    return {n: value if isinstance(value, str) else mean(n) for n, value in rows[0].items()}


def _heads(models: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The modalities that models of `read_predictions` have classifiers of, in order."""
    names = dict.fromkeys(name for heads in models.values() for name in heads)
    return [name for name in names if name not in ("rows", "labels", "fused")]


def _right(models: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Model → whether its prediction for each test sample is right."""
    return {name: heads["fused"] == heads["labels"] for name, heads in models.items()}

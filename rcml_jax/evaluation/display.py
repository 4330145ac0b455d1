"""What the terminal shows of an evaluation."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rcml_jax.evaluation.classification import error_analysis
from rcml_jax.evaluation.controls import LABELS, rows_of
from rcml_jax.evaluation.scores import SCORES

#: Measures of the alignment study in the order of its tables' columns; those of its gap, as shown.
ALIGNMENT = ("p@1", "p@5", "r@5", "r@10", "mrr", "median_rank")
GAP = {
    "centroid": "centroid",
    "wasserstein2": "W2",
    "matched_cosine": "matched",
    "random_cosine": "random",
}
#: Measures of classification in the order of the table's columns.
MEASURES = ("accuracy", "f1", "weighted_f1", "macro_f1", "auc")


def print_evaluation(result: dict, stream: Any = None) -> None:
    """Print the figures of an `eval.json`, rates in percent."""
    console = Console(file=stream, highlight=False)
    if result["method"] == "alignment":
        _print_alignment(result, console)
    elif "checkpoint" in result:
        _print_classification(result, console)
    else:
        _print_relational(result, console)


def _print_alignment(result: dict, console: Console) -> None:
    """A table for each direction, sources and similarities as rows; then the gap of each source."""
    for direction in ("image_to_text", "text_to_image"):
        table = Table(title=f"{direction.replace('_', ' ')} on {result['dataset']}")
        table.add_column("source, similarity", no_wrap=True)
        for name in ALIGNMENT:
            table.add_column(name.replace("_", " "), justify="right")
        for source, found in result["sources"].items():
            rows = dict(found["precision"][direction])
            names = {"centred": "cosine, centred", "whitened": "cosine, whitened"}
            rows |= {names[k]: v[direction] for k, v in found["calibration"].items() if k in names}
            rows |= {f"{k} (learned)": v[direction] for k, v in found["learned"].items()}
            for label, row in rows.items():
                cells = (
                    f"{row[n]:.0f}" if n == "median_rank" else _percent(row[n]) for n in ALIGNMENT
                )
                table.add_row(f"{source}, {label.replace('_', '-')}", *cells)
            table.add_section()
        console.print(table)
    table = Table(title="modality gap", caption="rank: effective rank of images, of texts")
    table.add_column("source")
    for name in (*GAP.values(), "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("collapsed")
    for source, found in result["sources"].items():
        gap = found["modality_gap"]
        ranks = ", ".join(f"{gap['effective_rank'][m]:.1f}" for m in ("image", "text"))
        cells = (f"{gap[name]:.3f}" for name in GAP)
        table.add_row(source, *cells, ranks, ", ".join(gap["collapsed"]) or "no")
    console.print(table)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _print_classification(result: dict, console: Console) -> None:
    protocol = result["protocol"]
    rows = dict(result.get("classification", {}))
    rows[f"checkpoint ({result['checkpoint']['which']})"] = result["checkpoint"]
    if "ensemble" in result:
        rows["mean of the models' probabilities"] = result["ensemble"]
    rows |= {f"{name} alone (its classifier)": x for name, x in result.get("unimodal", {}).items()}
    rows |= {f"{name} replaced by noise": x for name, x in result.get("corrupted", {}).items()}
    measures = [name for name in MEASURES if all(name in row for row in rows.values())]
    count, split = protocol["samples"][result["split"]], result["split"]
    table = Table(
        title=f"{result['method']} on {result['dataset']}: {split}, {count:,} samples, "
        f"{protocol['seeds']} seed{'s' * (protocol['seeds'] > 1)}",
        caption="\n".join(f"{name}: {protocol[name]}" for name in result.get("classification", {})),
        caption_justify="left",
    )
    table.add_column("measure (%)")
    for name in measures:
        table.add_column(name.replace("_", " "), justify="right")
    for label, row in rows.items():
        table.add_row(label.replace("_", " "), *(_spread(row[name]) for name in measures))
    console.print(table)
    if "random_inputs" in result:
        mean = _spread(result["random_inputs"]["mean"])
        chance = 100 / len(protocol["classes"])
        console.print(
            f"Confidence on random inputs (mean top softmax score, lowest possible {chance:.0f}): "
            f"{mean} %"
        )


def _spread(measure: dict) -> str:
    mean = f"{100 * measure['mean']:.1f}"
    return f"{mean} ± {100 * measure['std']:.1f}" if len(measure["values"]) > 1 else mean


def _print_relational(result: dict, console: Console) -> None:
    queries = result["retrieval"]["queries"]
    method = result["method"]
    if method == "embeddings":
        method = f"embeddings of {result['embeddings']['file']}"
    table = Table(
        title=f"{method} on {result['dataset']}: {result['split']}, {queries:,} queries",
        caption=f"Queries: {result['protocol']['retrieval']}. Ties count against the model. Lines "
        "with a dash are controls; a gain is one over the best of them.",
        caption_justify="left",
    )
    table.add_column("measure (%)")
    for name in SCORES:
        table.add_column(name.upper(), justify="right")
    for label, row in _rows(result):
        form = "+.1f" if label.startswith("= ") else ".1f"
        cells = (f"{100 * row[name]:{form}}" if name in row else "" for name in SCORES)
        table.add_row(label, *cells)
    console.print(table)
    for name, reason in result.get("left_out", {}).items():
        console.print(f"Left out: {name.replace('_', ' ')} ({reason})")
    if "relation_validity" not in result:
        return
    validity = result["relation_validity"]
    beside = [
        f"{label} {100 * row['relation_validity']['accuracy']:.1f}"
        for _, label, (row,) in rows_of({"": [result]})
        if "relation_validity" in row
    ]
    console.print(
        f"Relation validity ({validity['probe']} probe, {validity['pairs']:,} triples): "
        f"{100 * validity['accuracy']:.1f} %" + "".join(f"; {said}" for said in beside)
    )


def _rows(result: dict):
    """The lines of the table: a measure of the method first, then the controls' under it."""
    retrieval = result["retrieval"]
    yield from _with_controls(result, "retrieval", "hit@5", "Hit@5")
    if "macro" in retrieval:
        yield "Hit@5, mean over relations", retrieval["macro"]["hit@5"]
    yield "Hit@1", retrieval["hit@1"]
    yield "MRR", retrieval["mrr"]
    if "retrieval_random" in result:
        yield from _with_controls(result, "retrieval_random", "hit@5", "Hit@5, random candidates")
    if whole := result.get("retrieval_all"):
        yield f"Hit@5, all {whole['gallery']['items']:,} items", whole["hit@5"]
        yield "mAP, all items", whole["map"]
    if types := result.get("relation_type"):
        title = f"relation type, Top-3 of {types['candidates']}"
        yield from _with_controls(result, "relation_type", "top3", title)
        if "macro" in types:
            yield "Top-3, mean over relations", types["macro"]["top3"]
        yield f"relation type, Top-1 of {types['candidates']}", types["top1"]
    if every := result.get("relation_type_all"):
        yield f"Top-3 of all {every['candidates']} relations", every["top3"]
    for number, unseen in enumerate(result.get("unseen_sentences", []), 1):
        yield f"Hit@5, unseen sentence {number}", unseen["retrieval"]["hit@5"]
        yield f"Top-3, unseen sentence {number}", unseen["relation_type"]["top3"]
    if product := result.get("training_free_product"):
        yield "Hit@5, cos·cos product", product["retrieval"]["hit@5"]
        yield "Top-3, cos·cos product", product["relation_type"]["top3"]
    if frozen := result.get("pretrained_clip"):
        yield "Hit@5, pretrained CLIP as it is", frozen["retrieval"]["hit@5"]
        yield "Top-3, pretrained CLIP as it is", frozen["relation_type"]["top3"]
    for name, variant in result.get("variants", {}).items():
        yield f"Hit@5, scored {name}", variant["retrieval"]["hit@5"]
    for name, scores in result.get("similarities", {}).items():
        yield f"Hit@5, {name}", scores["retrieval"]["hit@5"]
        if "relation_type" in scores:
            yield f"Top-3, {name}", scores["relation_type"]["top3"]


def _with_controls(result: dict, task: str, measure: str, title: str):
    yield title, result[task][measure]
    for _, label, (row,) in rows_of({"": [result]}):
        if task in row:
            yield f"– {label}", row[task][measure]
    if found := result.get("gain_over_best_control", {}).get(task):
        yield f"= gain over {LABELS[found['control']]}", {"avg": found["gain"]}


# The table of a sweep: means and deviations over seeds, and the error analysis of classifiers.


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

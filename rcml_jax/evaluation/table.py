"""What the terminal shows of an evaluation."""

from typing import Any

from rich.console import Console
from rich.table import Table

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

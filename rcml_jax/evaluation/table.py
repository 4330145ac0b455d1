"""What the terminal shows of an evaluation."""

from typing import Any

from rich.console import Console
from rich.table import Table

from rcml_jax.evaluation.scores import SCORES


def print_evaluation(result: dict, stream: Any = None) -> None:
    """Print the figures of an `eval.json` of a relational method, rates in percent."""
    console = Console(file=stream, highlight=False)
    queries = result["retrieval"]["queries"]
    table = Table(
        title=f"{result['method']} on {result['dataset']}: {result['split']}, {queries:,} queries",
        caption=f"Queries: {result['protocol']['retrieval']}. Ties count against the model.",
        caption_justify="left",
    )
    table.add_column("measure (%)")
    for name in SCORES:
        table.add_column(name.upper(), justify="right")
    for label, row in _rows(result):
        table.add_row(label, *(f"{100 * row[name]:.1f}" for name in SCORES))
    console.print(table)
    validity = result["relation_validity"]
    console.print(
        f"Relation validity ({validity['probe']} probe, {validity['pairs']:,} triples, chance 50): "
        f"{100 * validity['accuracy']:.1f} %"
    )


def _rows(result: dict):
    retrieval, types = result["retrieval"], result["relation_type"]
    yield "Hit@5", retrieval["hit@5"]
    yield "Hit@1", retrieval["hit@1"]
    yield "MRR", retrieval["mrr"]
    yield f"relation type, Top-3 of {types['candidates']}", types["top3"]
    yield f"relation type, Top-1 of {types['candidates']}", types["top1"]
    product = result["training_free_product"]
    yield "Hit@5, cos·cos product", product["retrieval"]["hit@5"]
    yield "Top-3, cos·cos product", product["relation_type"]["top3"]
    for name, variant in result.get("variants", {}).items():
        yield f"Hit@5, scored {name}", variant["retrieval"]["hit@5"]
    for name, scores in result.get("similarities", {}).items():
        yield f"Hit@5, {name}", scores["retrieval"]["hit@5"]
        yield f"Top-3, {name}", scores["relation_type"]["top3"]

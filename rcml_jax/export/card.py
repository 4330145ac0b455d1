"""The model card of an exported run: what it is, its figures, and the code to use it in PyTorch."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from rcml_jax.evaluation.measures import at, columns

_DATA = {
    "openmoji": "emoji drawn by [OpenMoji](https://openmoji.org), CC BY-SA 4.0, with the names of "
    "Unicode (Unicode License v3)",
    "grocery": "the [Grocery Store photographs](https://github.com/marcusklasson/"
    "GroceryStoreDataset), MIT",
    "amazon": "[Amazon Reviews 2023](https://amazon-reviews-2023.github.io); no licence is stated",
    "hm": "the [H&M competition](https://www.kaggle.com/competitions/"
    "h-and-m-personalized-fashion-recommendations), under its rules",
    "flickr8k": "Flickr8k (Hodosh et al., 2013), for research",
    "folder": "a catalogue of the exporter's own; its licence is not known to the software that "
    "wrote this card",
}
#: Method → its name, and what it is.
METHODS = {
    "rcml": (
        "RCML",
        "RCML ([arXiv 2508.17497](https://arxiv.org/abs/2508.17497)): embeddings of texts and "
        "images under a relation written in plain language",
    ),
    "clip": ("CLIP", "CLIP's loss, the baseline of RCML"),
    "siglip": ("SigLIP", "SigLIP's loss, a baseline of RCML"),
    "unicl": ("UniCL", "UniCL's loss, a baseline of RCML"),
    "declip": ("DeCLIP", "DeCLIP's loss, a baseline of RCML"),
}


def model_card(config: Any, params: Any, result: dict | None, *, temperature: float) -> ModelCard:
    """The model card of an exported run.

    config: the run's; params: its parameters; result: its `eval.json`, None where there is none;
    temperature: of its loss, fixed or learned.
    """
    name, method = METHODS[config.method]
    head = params["head"] if config.method == "rcml" else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["clip", config.method, "rcml_jax"],
    )
    return ModelCard.from_template(
        data,
        template_str=pathlib.Path(__file__).with_name("card.md.jinja").read_text("utf-8"),
        name=name,
        method=method,
        dataset=result["dataset"] if result else config.data.name,
        parameters=sum(np.size(x) for x in jax.tree.leaves(params["towers"])),
        head_width=len(head["query"]) if head else 0,
        data=_DATA.get(config.data.name, config.data.name),
        pretrained=_started_from(config.model),
        training=list(_training(config, params, temperature)),
        result=result,
        queries=at(result, "retrieval/queries") or 0,
        figures=figures(result or {}),
    )


def figures(result: dict) -> dict[str, str]:
    """Heading → figure in percent of the measures that an evaluation has."""
    found = {name: at(result, path) for name, (path, _) in columns("relational").items()}
    return {name: f"{100 * x:.1f}" for name, x in found.items() if isinstance(x, int | float)}


def _started_from(model: Any) -> str:
    """The checkpoint that the towers started from, by name: a directory's path is private."""
    name = model.pretrained
    return pathlib.Path(name).resolve().name if name and pathlib.Path(name).is_dir() else name


def _training(config: Any, params: Any, temperature: float) -> Iterator[str]:
    batch, loss = config.batch, config.loss
    yield f"up to {config.steps} steps of {batch.size} items"
    yield f"seed {config.seed}, split seed {config.data.split_seed}"
    yield f"learning rate {config.optimizer.learning_rate:g}"
    yield f"temperature {temperature:g}, in `logit_scale`"
    if config.method == "rcml":
        each = f"{batch.relations} relations × {batch.pairs_per_relation} pairs"
        yield f"batches of {each} and {batch.intra_pairs} intra-sample pairs"
        yield f"weight of the intra-modal terms {loss.intra_modal_weight:g}"
        yield f"weight of the identification term {loss.identification_weight:g}"
    if "bias" in params:
        bias = float(params["bias"])
        yield f"SigLIP's bias {bias:g}: a pair's logit is exp(`logit_scale`) · cosine + bias"
    if config.model.freeze:
        yield f"frozen: {config.model.freeze}"

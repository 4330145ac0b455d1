"""The model card of an exported run: what it is, its figures, and the code to use it in PyTorch."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rcml_jax.evaluation.measures import at, columns

_DATA = {
    "openmoji": "emoji drawn by [OpenMoji](https://openmoji.org), CC BY-SA 4.0, with the names of "
    "Unicode (Unicode License v3)",
    "grocery": "the [Grocery Store photographs](https://github.com/marcusklasson/"
    "GroceryStoreDataset), MIT",
    "amazon": "[Amazon Reviews 2023](https://amazon-reviews-2023.github.io); no licence is stated",
    "hm": "the [H&M competition](https://www.kaggle.com/competitions/"
    "h-and-m-personalized-fashion-recommendations), under its rules",
    "folder": "a catalogue of the exporter's own; its licence is not known to the software that "
    "wrote this card",
}
_NAMES = {
    "rcml": "RCML",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "unicl": "UniCL",
    "declip": "DeCLIP",
}
_METHODS = {
    "rcml": "RCML ([arXiv 2508.17497](https://arxiv.org/abs/2508.17497)): embeddings of texts and "
    "images under a relation written in plain language",
    "clip": "CLIP's loss, the baseline of RCML",
    "siglip": "SigLIP's loss, a baseline of RCML",
    "unicl": "UniCL's loss, a baseline of RCML",
    "declip": "DeCLIP's loss, a baseline of RCML",
}
_CLIP_IMPORTS = """\
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
"""
_RCML_IMPORTS = """\
import json

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
"""
_LOAD = """
FOLDER = "."  # this directory
model = CLIPModel.from_pretrained(FOLDER).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
processor = CLIPImageProcessor.from_pretrained(FOLDER)
"""
_CLIP_CODE = """

@torch.no_grad()
def embed_texts(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    states = model.text_projection(model.text_model(**inputs).pooler_output)
    return torch.nn.functional.normalize(states, dim=-1)


@torch.no_grad()
def embed_images(pictures):
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    states = model.visual_projection(model.vision_model(pixels).pooler_output)
    return torch.nn.functional.normalize(states, dim=-1)
"""
_RCML_CODE = """\
with safe_open(f"{FOLDER}/relation_pooling.safetensors", "pt") as file:
    head = {name: file.get_tensor(name) for name in file.keys()}
    options = json.loads(file.metadata()["options"])
beta, summary_logit = options["beta"], options["summary_logit"]


@torch.no_grad()
def text_tokens(texts):
    \"\"\"H_T (n, T, d), where it is no padding (n, T), and the place of the end token (n,).\"\"\"
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    states = model.text_projection(model.text_model(**inputs).last_hidden_state)
    end = (inputs["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
    return states, torch.arange(states.shape[1]) <= end[:, None], end


@torch.no_grad()
def image_tokens(pictures):
    \"\"\"H_I (n, T, d) of CLS and the patches, all ones (n, T), and the place of CLS (n,).\"\"\"
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    hidden = model.vision_model(pixels).last_hidden_state
    states = model.visual_projection(model.vision_model.post_layernorm(hidden))
    return states, torch.ones(states.shape[:2], dtype=bool), torch.zeros(len(states), dtype=int)


@torch.no_grad()
def embed(tokens, sentences, intra=False):
    \"\"\"Unit vectors (n, R, d) of n texts or images under R relation sentences (Eq. 3-6).

    intra: the one sentence is options["intra_relation"], which asks for the item itself.
    \"\"\"
    states, mask, summary = tokens
    relation, _, end = text_tokens(sentences)
    relation = relation[torch.arange(len(end)), end]  # h_E
    keys, queries = states @ head["key"].T, relation @ head["query"].T
    chosen = (torch.arange(states.shape[1]) == summary[:, None])[:, None].float()  # B
    logits = (1 - beta) * torch.einsum("ntd,rd->nrt", keys, queries) / states.shape[-1] ** 0.5
    logits = logits + (beta * summary_logit * intra + head["summary_prior"]) * chosen
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    pooled = weights @ (states @ head["value"].T)
    if "gate" in head:
        said = torch.nn.functional.normalize(relation, dim=-1)
        pooled = pooled * (1 + states.shape[-1] ** 0.5 * said @ head["gate"].T)
    return torch.nn.functional.normalize(pooled @ head["output"], dim=-1)


sentences = ["both of them show a heart", "they have the same colour"]
texts = embed(text_tokens(["a red heart", "a blue heart"]), sentences)
print(texts[0] @ texts[1].T)  # its diagonal: how alike the two are under either sentence
"""
_HEAD = """\
## The head

`relation_pooling.safetensors`, float32, one token a row of H:
z = norm(softmax((1 − β) · (W_Q h_E)·(H W_Kᵀ)ᵀ/√d + (β · summary_logit · intra + summary_prior) · B)
· H W_Vᵀ · W_o), where B is 1 at the pooled token (the text's end, the image's CLS).
With a gate, what stands before W_o is multiplied by 1 + √d · W_G h_E/‖h_E‖, element by element.

| name | shape | what it is |
|---|---|---|
| `query`, `key`, `value`, `output` | ({d}, {d}) | W_Q, W_K, W_V, W_o |
| `gate`, in some runs | ({d}, {d}) | W_G |
| `summary_prior` | () | the pooled token's logit under every relation |
| metadata `options`, JSON | | `beta` and `summary_logit`, β and the logit of B under the \
intra-sample relation, and `intra_relation`, that relation's sentence |

In JAX, `rcml_jax.models.two_towers.load_pretrained(folder)` gives the towers' configuration and
parameters, and `safetensors.numpy.load_file` the head's, for `rcml_jax.models.rcml.RCML` with
`beta`, `summary_logit`, `learn_summary_prior=True` and, where it has a gate, `gate=True`.
"""


def model_card(config: Any, params: Any, result: dict | None, *, temperature: float) -> str:
    """The README.md of an exported run, in Markdown.

    config: the run's; params: its parameters; result: its `eval.json`, None where there is none;
    temperature: of its loss, fixed or learned.
    """
    is_rcml, data = config.method == "rcml", config.data.name
    count = sum(np.size(x) for x in jax.tree.leaves(params["towers"]))
    code = _RCML_IMPORTS + _LOAD + _RCML_CODE if is_rcml else _CLIP_IMPORTS + _LOAD + _CLIP_CODE
    name = result["dataset"] if result else data
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: feature-extraction\n"
        f"tags: [clip, {config.method}, rcml_jax]\n---\n",
        f"# {_NAMES[config.method]} towers trained on {name}\n",
        f"CLIP's two towers, {count:,} parameters, trained by `rcml_jax`.\n\n"
        f"Method: {_METHODS[config.method]}.\n\n"
        "The towers load as `transformers.CLIPModel`; tokenizer and image processor are beside them"
        + (", and RCML's head in a file of its own.\n" if is_rcml else ".\n"),
        "## Data and licence\n",
        f"Trained on {_DATA.get(data, data)}.{_started_from(config.model)} "
        "What is derived from data may be bound to its licence.\n",
        "## Training\n",
        *_training(config, params, temperature),
        "\n## Evaluation\n",
        _evaluation(result),
        "## Use in PyTorch\n",
        f"```python\n{code}```\n",
        "In training the transparent parts of pictures were white, and large JPEGs were decoded at "
        "a reduced size, which moves a pixel by a grey level or two on average.\n",
    ]
    if is_rcml:
        parts.append(_HEAD.format(d=len(params["head"]["query"])))
    return "\n".join(parts)


def _started_from(model: Any) -> str:
    """What the towers were before, by name; a directory's place is nobody's concern."""
    name = model.pretrained
    if not name:
        return ""
    name = pathlib.Path(name).resolve().name if pathlib.Path(name).is_dir() else name
    return f" The towers started from the checkpoint `{name}`, whose licence applies, too."


def _training(config: Any, params: Any, temperature: float) -> Iterator[str]:
    batch, loss = config.batch, config.loss
    yield f"- up to {config.steps} steps of {batch.size} items"
    yield f"- seed {config.seed}, split seed {config.data.split_seed}"
    yield f"- learning rate {config.optimizer.learning_rate:g}"
    yield f"- temperature {temperature:g}, in `logit_scale`"
    if config.method == "rcml":
        each = f"{batch.relations} relations × {batch.pairs_per_relation} pairs"
        yield f"- batches of {each} and {batch.intra_pairs} intra-sample pairs"
        yield f"- weight of the intra-modal terms {loss.intra_modal_weight:g}"
        yield f"- weight of the identification term {loss.identification_weight:g}"
    if "bias" in params:
        bias = float(params["bias"])
        yield f"- SigLIP's bias {bias:g}: a pair's logit is exp(`logit_scale`) · cosine + bias"
    if config.model.freeze:
        yield f"- frozen: {config.model.freeze}"


def _evaluation(result: dict | None) -> str:
    """The figures in percent and the protocol that they were measured by."""
    if result is None:
        return "This run was not evaluated: its work directory had no `eval.json`.\n"
    figures = {name: at(result, path) for name, (path, _) in columns("relational").items()}
    figures = {name: f"{100 * x:.1f}" for name, x in figures.items() if isinstance(x, int | float)}
    queries = at(result, "retrieval/queries") or 0
    return "\n".join(
        [
            f"The {result['split']} split of {result['dataset']} ({queries:,} queries), percent:\n",
            f"| {' | '.join(figures)} |",
            "|---" * len(figures) + "|",
            f"| {' | '.join(figures.values())} |\n",
            "Protocol:\n",
            *_protocol(result["protocol"]),
            "",
        ]
    )


def _protocol(rules: dict, indent: str = "") -> Iterator[str]:
    for name, rule in rules.items():
        label = f"{indent}- {name.replace('_', ' ')}:"
        if isinstance(rule, dict):
            yield label
            yield from _protocol(rule, indent + "  ")
        else:
            yield f"{label} {rule}"

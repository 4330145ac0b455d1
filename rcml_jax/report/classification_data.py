"""The arrays behind M3CoL's figures, computed from opened runs or read from their files."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.methods import report as analyses
from rcml_jax.methods.members import Members
from rcml_jax.report.arrays import LeftOutError
from rcml_jax.report.models import Opened
from rcml_jax.report.projection import silhouette, umap
from rcml_jax.report.sources import Run
from rcml_jax.training.writer import read_history

CLASSES = 10
_SAMPLES = 1500
_WORDS = 3


def embedding_map(opened: Opened, seed: int) -> dict[str, Any]:
    """UMAP of each modality's embeddings and of the fused ones, test samples of at most 10 classes.

    Fused are the modalities' embeddings one after the other, which the fusion classifier is given.
    points (parts, n, 2), silhouette (parts,) by cosine in the full space. Raises LeftOutError where
    there are too few samples, or none of a second class.
    """
    method, data = opened.method, opened.method.task.data
    rows = data.rows("test")
    classes, counts = np.unique(data.labels[rows], return_counts=True)
    classes = np.sort(classes[np.argsort(-counts, kind="stable")][:CLASSES])
    if len(classes) < 2:
        raise LeftOutError(
            f"the test split of {data.name} has one class only; there is nothing to part"
        )
    rows = rows[np.isin(data.labels[rows], classes)]
    if len(rows) > _SAMPLES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _SAMPLES, replace=False))
    embeddings = {n: x[_first_model(method)] for n, x in _embeddings(opened, rows).items()}
    if len(embeddings) > 1:
        embeddings["fused"] = np.concatenate(list(embeddings.values()), axis=1)
    labels = data.labels[rows]
    return {
        "parts": list(embeddings),
        "points": np.stack([umap(x) for x in embeddings.values()]),
        "class": np.searchsorted(classes, labels),
        "classes": [data.label_names[c] for c in classes],
        "silhouette": [silhouette(x, labels) for x in embeddings.values()],
        "row": rows,
    }


def _embeddings(opened: Opened, rows: np.ndarray) -> dict[str, np.ndarray]:
    return opened.method.embeddings(opened.params, rows)


def _first_model(method: Any) -> int:
    return method.models().reported[0]


# Heat maps


def drawn_samples(opened: Opened, seed: int, count: int = 3) -> np.ndarray:
    """A few test samples of different classes, drawn by the seed.

    Raises LeftOutError where the data have no pictures and texts.
    """
    data = opened.method.task.data
    _names(opened)
    rows = np.random.default_rng(seed).permutation(data.rows("test"))
    _, first = np.unique(data.labels[rows], return_index=True)
    return rows[np.sort(first)[:count]]


def heat_maps(opened: Opened, rows: np.ndarray) -> list[dict[str, Any]]:
    """Cosine of the words of each sample's class name with its picture's patches.

    A word's embedding is the mean of its tokens' states, the word being encoded as a text of its
    own; a patch's is its state; both before pooling. heat (words, g, g), pixels (H, W, 3): the
    picture as the model is given it.
    """
    method, params = _single(opened)
    data, task = method.task.data, method.task
    names, module = _names(opened), method.model
    states = jax.jit(
        lambda p, n, x: module.apply({"params": p}, x, method=_tokens(n)), static_argnums=1
    )
    pixels = task.inputs(rows)[names["image"]][0]
    patches = np.asarray(states(params, names["image"], (pixels,)), np.float32)[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise LeftOutError(f"the image encoder of {opened.run.label} has no square of patches")
    found = []
    for row, picture, of_patches in zip(rows, pixels, patches, strict=True):
        label = data.label_names[data.labels[row]]
        words = class_words(label)
        ids, mask = task.tokenizer.encode(words, task.max_length)
        tokens = np.asarray(states(params, names["text"], (ids, mask)), np.float32)
        inner = (
            mask.astype(bool) & (ids != task.tokenizer.start_id) & (ids != task.tokenizer.end_id)
        )
        means = [t[i].mean(axis=0) if i.any() else t[0] for t, i in zip(tokens, inner, strict=True)]
        heat = _unit(np.stack(means)) @ _unit(of_patches).T
        found.append(
            {
                "class": label,
                "words": words,
                "heat": heat.reshape(len(words), side, side),
                "pixels": picture,
                "row": row,
            }
        )
    return found


def _names(opened: Opened) -> dict[str, str]:
    """Kind → name of a picture and a text. Raises LeftOutError where there are not just these."""
    modalities = opened.method.task.data.modalities
    if sorted(m.kind for m in modalities) != ["image", "text"]:
        raise LeftOutError(f"{opened.run.label} has not a picture and a text of each sample")
    return {m.kind: m.name for m in modalities}


def _tokens(name: str) -> Any:
    """The method of the model that gives the states of one modality's tokens."""
    return lambda module, inputs: module.encoders[name].tokens(*inputs)


def _single(opened: Opened) -> tuple[Any, Any]:
    """The first model alone, where several were trained side by side."""
    method, params = opened.method, opened.params
    if not isinstance(method, Members):
        return method, params
    place = _first_model(method)
    return method.single, jax.tree.map(lambda x: x[place], params)


def class_words(label: str) -> list[str]:
    """The words of a class name, a few at most; the name itself where it has none."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", label.replace("_", " "))[:_WORDS] or [label]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# Confidence


def noise_confidence(opened: Opened) -> np.ndarray:
    """Top softmax scores (models × samples,) of the fused prediction on random inputs.

    Every modality is Gaussian noise with the mean and variance of the training split, as in
    `eval.json`; as many samples as the test split has.
    """
    method, params = opened.method, opened.params
    noise = analyses.noise_inputs(method, params, len(method.task.data.rows("test")))
    fused = np.asarray(method.classify_all(params, noise)["fused"])
    return np.concatenate([fused[place].max(axis=-1) for place in method.models().reported])


# Accuracy by epoch


def accuracy_by_epoch(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns run, split, step, epoch (NaN where unknown), mean and std over models, of all looks.

    Raises LeftOutError where no run has looks in its `metrics.jsonl`.
    """
    columns: dict[str, list] = {
        name: [] for name in ("run", "split", "step", "epoch", "mean", "std", "models")
    }
    for run in runs:
        steps = _steps_of_epoch(run)
        for line in read_history(run.path):
            for split, values in _accuracies(line).items():
                step = line["step"]
                row = (
                    run.label,
                    split,
                    step,
                    step / steps if steps else math.nan,
                    float(np.mean(values)),
                    float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                    len(values),
                )
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
    if not columns["run"]:
        raise LeftOutError("no metrics.jsonl of these runs holds a look at validation or test")
    return columns


def _accuracies(line: Mapping[str, float]) -> dict[str, list[float]]:
    """Split → the accuracies of its models: on test of those trained on all of train."""
    found: dict[str, list[float]] = {}
    for name, value in line.items():
        parts = name.split("/")
        if parts[0] == "look" and parts[3] == "accuracy":
            if parts[2] == "test" and parts[1].startswith("held-out"):
                continue
            found.setdefault(parts[2], []).append(value)
    return found


def _steps_of_epoch(run: Run) -> float:
    """Steps an epoch has, from the configuration and the number of steps in the protocol."""
    looks = str((run.result or {}).get("protocol", {}).get("looks", ""))
    total = re.search(r" of (\d+)$", looks)
    epochs = run.config.get("epochs", 0)
    return int(total[1]) / epochs if total and epochs and not run.config.steps else 0.0

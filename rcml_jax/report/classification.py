"""The figures of M3CoL and its ablations."""

import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.evaluation.classification import confusion, read_predictions
from rcml_jax.evaluation.display import collect
from rcml_jax.evaluation.measures import at
from rcml_jax.methods import classification as analyses
from rcml_jax.methods.seeds import SeedEnsemble
from rcml_jax.report import page
from rcml_jax.report.page import (
    NEIGHBOURS,
    Arrays,
    Figure,
    Folder,
    LeftOutError,
    Section,
    Table,
    box,
    columns,
    frame,
    labels,
    mean_std,
    overlay,
    percent,
    scatter,
    silhouette,
    slug,
    umap,
    where,
)
from rcml_jax.report.runs import Models, Opened, Run, Sweep, on_device
from rcml_jax.training.writer import read_history

# The arrays behind M3CoL's figures, computed from opened runs or read from their files.


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

    Raises LeftOutError where the data have no images and texts.
    """
    data = opened.method.task.data
    _names(opened)
    rows = np.random.default_rng(seed).permutation(data.rows("test"))
    _, first = np.unique(data.labels[rows], return_index=True)
    return rows[np.sort(first)[:count]]


def heat_maps(opened: Opened, rows: np.ndarray) -> list[dict[str, Any]]:
    """Cosine of the words of each sample's class name with its image's patches.

    A word's embedding is the mean of its tokens' states, the word being encoded as a text of its
    own; a patch's is its state; both before pooling, and projected where the model projects. heat
    (words, g, g), pixels (H, W, 3): the image as the model is given it.
    """
    method, params = _single(opened)
    data, task = method.task.data, method.task
    names, module = _names(opened), method.model
    states = jax.jit(
        lambda p, n, x: module.apply({"params": p}, n, x, method="tokens"), static_argnums=1
    )
    pixels = task.inputs(rows)[names["image"]][0]
    patches = np.asarray(states(params, names["image"], (pixels,)), np.float32)
    if patches.shape[1] != math.isqrt(patches.shape[1]) ** 2:
        patches = patches[:, 1:]  # [CLS], which a convolutional network lacks
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise LeftOutError(f"the image encoder of {opened.run.label} has no square of patches")
    found = []
    for row, image, of_patches in zip(rows, pixels, patches, strict=True):
        label = data.label_names[data.labels[row]]
        words = class_words(label)
        ids, mask = task.tokenizer.encode(words, task.max_length)
        tokens = np.asarray(states(params, names["text"], (ids, mask)), np.float32)
        if tokens.shape[-1] != of_patches.shape[-1]:
            raise LeftOutError(f"the encoders of {opened.run.label} have states of two widths")
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
                "pixels": image,
                "row": row,
            }
        )
    return found


def _names(opened: Opened) -> dict[str, str]:
    """Kind → name of an image and a text. Raises LeftOutError where there are not just these."""
    modalities = opened.method.task.data.modalities
    if sorted(m.kind for m in modalities) != ["image", "text"]:
        raise LeftOutError(f"{opened.run.label} has not an image and a text of each sample")
    return {m.kind: m.name for m in modalities}


def _single(opened: Opened) -> tuple[Any, Any]:
    """The first model alone, where several were trained side by side."""
    method, params = opened.method, opened.params
    if not isinstance(method, SeedEnsemble):
        return method, params
    index = _first_model(method)
    return method.single, jax.tree.map(lambda x: x[index], params)


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
    return np.concatenate([fused[index].max(axis=-1) for index in method.models().reported])


# Classes that are taken for one another


def confusions(run: Run) -> dict[str, Any]:
    """Confusion matrices (models, C, C) on the test split, and the names of the C classes.

    Raises LeftOutError for a run without `predictions.npz`.
    """
    path = run.path / "predictions.npz"
    names = (run.result or {}).get("protocol", {}).get("classes")
    if not names or not path.is_file():
        raise LeftOutError(
            f"{run.label} has no predictions.npz, or no names of the classes in eval.json; "
            f"evaluate it: rcml-eval --workdir {run.path}"
        )
    models = read_predictions(path).values()
    matrices = [confusion(model["labels"], model["fused"], len(names)) for model in models]
    return {"classes": names, "samples": np.stack(matrices)}


# Accuracy by epoch


def accuracy_by_epoch(runs: Sequence[Run]) -> dict[str, Any]:
    """Columns run, split, step, epoch (NaN where unknown), mean and std over models, of all looks.

    Raises LeftOutError where no run has looks in its `metrics.jsonl`.
    """
    rows = [
        (run.label, split, line["step"], _epoch(run, line["step"]), *mean_std(values), len(values))
        for run in runs
        for line in read_history(run.path)
        for split, values in _accuracies(line).items()
    ]
    if not rows:
        raise LeftOutError("no metrics.jsonl of these runs holds a look at validation or test")
    return columns(("run", "split", "step", "epoch", "mean", "std", "models"), rows)


def _accuracies(line: Mapping[str, float]) -> dict[str, list[float]]:
    """Split → the accuracies of its models: on test of those trained on all of train.

    Where samples are held out from some models, those alone are looked at on validation, too.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        parts = name.split("/")
        if parts[0] == "look" and parts[3] == "accuracy":
            found.setdefault(parts[2], {})[parts[1]] = value
    held_out = set(found.get("validation", ()))
    if set(found.get("test", ())) - held_out:
        found["test"] = {n: x for n, x in found["test"].items() if n not in held_out}
    return {split: list(values.values()) for split, values in found.items()}


def _epoch(run: Run, step: float) -> float:
    """The epoch of a step; NaN where the run does not count epochs or was not evaluated."""
    steps, epochs = at(run.result or {}, "protocol/steps"), run.config.get("epochs", 0)
    return step * epochs / steps if steps and epochs and not run.config.steps else math.nan


# M3CoL's figures, drawn from saved arrays.


BINS = 25


def draw_map(arrays: Arrays, path: pathlib.Path, index: int) -> pathlib.Path:
    """The plane of a modality's or the fused embeddings: a colour and a mark for each class."""
    with page.panel(path, page.PANEL, 5.2, legend=2) as axes:
        scatter(axes, arrays["points"][index], arrays["class"], [str(c) for c in arrays["classes"]])
        score = f"silhouette {page.signed(arrays['silhouette'][index])}"
        axes.set_title(f"{arrays['parts'][index]}, {score}", loc="left")
    return path


def upsample(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Patches (h, w) → (H, W), bilinear between the patches' centres, constant beyond them."""
    rows, columns = (_weights(n, g) for n, g in zip(size, heat.shape, strict=True))
    return rows @ heat @ columns.T


def _weights(pixels: int, patches: int) -> np.ndarray:
    """How much each pixel of a line has of each patch, (pixels, patches)."""
    centre = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    distance = np.abs(np.clip(centre, 0, patches - 1)[:, None] - np.arange(patches))
    return np.maximum(1 - distance, 0)


# Inches: a cell of the heat maps with its margin, and what is left, above and below them.
_CELL, _MARGIN, _LEFT, _ABOVE, _BELOW = 1.22, 0.08, 0.5, 0.35, 0.75


def draw_heat(arrays: Arrays, path: pathlib.Path) -> pathlib.Path:
    """A line for each run: the image, and over it the cosine of each word with its patches."""
    words = [str(word) for word in arrays["words"]]
    heat, limits = arrays["heat"], (float(arrays["heat"].min()), float(arrays["heat"].max()))
    step = _CELL + _MARGIN
    width, across = max(page.PANEL, _LEFT + step * (1 + len(words))), step * (1 + len(words))
    height = _ABOVE + step * len(heat) + _BELOW
    with page.drawing(width, height) as figure:
        figure.set_layout_engine("none")
        for row, (run, pixels) in enumerate(zip(arrays["runs"], arrays["pixels"], strict=True)):
            top = _ABOVE + step * row
            shown = box(figure, _LEFT, top, _CELL)
            shown.imshow(pixels)
            frame(shown)
            shown.set_ylabel(page.wrap(str(run), 16, 2), fontsize=10)
            cells = [box(figure, _LEFT + step * (i + 1), top, _CELL) for i in range(len(words))]
            for cell, found in zip(cells, heat[row], strict=True):
                image = overlay(cell, pixels, upsample(found, pixels.shape[:2]), limits)
            for cell, title in zip([shown, *cells], ["image", *words], strict=True):
                cell.set_title("" if row else page.short(title, 13), fontsize=11)
        bounds = (_LEFT / width, 0.52 / height, (across - _MARGIN) / width, 0.13 / height)
        bar = figure.colorbar(image, cax=figure.add_axes(bounds), orientation="horizontal")
        bar.ax.locator_params(nbins=4)
        bar.set_label("cosine of word and patch")
        return page.save_figure(figure, path)


def draw_confidence(arrays: Arrays, path: pathlib.Path, chance: float) -> pathlib.Path:
    """Histograms of top softmax scores on random inputs, an outline for each run."""
    runs = labels(arrays)
    with page.panel(path, page.WIDE, 3.8 + 0.25 * len(runs), legend=1) as axes:
        edges = np.linspace(chance, 1, BINS + 1)
        for index, run in enumerate(runs):
            values = where(arrays, run=run)["confidence"]
            share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(
                share, edges, label=f"{page.short(run, 46)} (mean {100 * values.mean():.0f} %)",
                color=page.COLOURS[index % 8], linestyle=page.LINES[index % 4], linewidth=2.2,
            )  # fmt: skip
        axes.set(xlabel="top softmax score", ylabel="samples (%)", xlim=(chance, 1))
        axes.set_ylim(bottom=0)
    return path


def draw_accuracy(arrays: Arrays, path: pathlib.Path, split: str) -> pathlib.Path:
    """Accuracy on a split at each look, a line for each run; bands of deviation for two at most."""
    arrays = where(arrays, split=split)
    runs, unit = labels(arrays), "step" if np.isnan(arrays["epoch"]).any() else "epoch"
    with page.panel(path, page.WIDE, 3.6 + 0.25 * len(runs), legend=1) as axes:
        for index, run in enumerate(runs):
            mine = where(arrays, run=run)
            x, mean, std = mine[unit], 100 * mine["mean"], 100 * mine["std"]
            look = page.series(index) | {"markevery": max(1, len(x) // 8)}
            axes.plot(x, mean, label=page.short(run, 46), **look)
            if len(runs) <= 2 and np.any(std > 0):
                axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15)
        axes.set(xlabel=unit, ylabel=f"{split} accuracy (%)")
    return path


_MOST, _MOST_CURVES, _MOST_CLASSES = 6, 10, 20


def section(
    folder: Folder, runs: Sequence[Run], sweeps: Sequence[Sweep], models: Models, *, seed: int
) -> Section:
    """Figures of classifiers of one data set: the runs, and the first of each sweep's variants."""
    shown: dict[pathlib.Path, Run] = {}
    for run in (*runs, *(run for sweep in sweeps for run in sweep.firsts)):
        shown.setdefault(run.path.resolve(), run)
    make = _Figures(folder, list(shown.values()), models, seed)
    figures = [folder.attempt("Accuracy by epoch", make.accuracy)]
    figures.append(folder.attempt("Embeddings of each modality and fused", make.maps))
    figures += make.heat_maps()
    figures.append(folder.attempt("Confidence on random inputs", make.confidence))
    figures.append(folder.attempt("Classes with most errors", make.classes))
    figures += [
        folder.attempt("Error analysis", functools.partial(_errors, folder, sweep))
        for sweep in sweeps
    ] or [Figure("Error analysis", left_out=_NO_SWEEP)]
    return Section(f"Multimodal classification: {make.runs[0].dataset}", tuple(figures))


_NO_SWEEP = (
    "it compares a model with others that were trained on one modality alone; give the directory "
    "of a sweep that has them: rcml-sweep ... --ablations"
)


class _Figures:
    def __init__(self, folder: Folder, runs: Sequence[Run], models: Models, seed: int):
        self.folder, self.runs, self.models, self.seed = folder, runs, models, seed

    def accuracy(self) -> Figure:
        """Accuracy at every look of training."""
        shown = self.runs[:_MOST_CURVES]
        path, saved = self.folder.save("accuracy-by-epoch.csv", accuracy_by_epoch(shown))
        images = [
            self.folder.draw(
                f"accuracy-by-epoch-{split}.svg",
                f"{split} accuracy against the epoch.",
                draw_accuracy, saved, split,
            )
            for split in labels(saved, "split")
        ]  # fmt: skip
        rest = len(self.runs) - len(shown)
        several = ""
        if np.max(saved["models"]) > 1:
            band = "; the band is their standard deviation" * (len(shown) <= 2)
            several = f" Mean over the models trained together{band}."
        return Figure(
            "Accuracy by epoch",
            "Accuracy of the fused prediction at every look of training; validation samples were "
            "held out from the models that are scored on them."
            + several
            + (f" The first {_MOST_CURVES} of {len(self.runs)} runs." if rest > 0 else ""),
            tuple(images),
            data=(path,),
        )

    def maps(self) -> Figure:
        """UMAP of the first run's embeddings."""
        opened = self.models.open(self.runs[0])
        with on_device(opened.run.config):
            arrays = embedding_map(opened, self.seed)
        path, saved = self.folder.save("umap.npz", arrays)
        images = [
            self.folder.draw(
                f"umap-{slug(str(part))}.svg",
                f"Scatter plot of {part} embeddings by class.",
                draw_map, saved, index,
            )
            for index, part in enumerate(saved["parts"])
        ]  # fmt: skip
        return Figure(
            "Embeddings of each modality and fused",
            f"{self.runs[0].label}: UMAP ({NEIGHBOURS} neighbours, minimum distance 0.1, cosine, a "
            f"fixed seed) of {len(saved['class'])} test samples of {len(saved['classes'])} classes "
            f"(at most {CLASSES}, the most frequent). Fused: the modalities' "
            "embeddings one after the other, which the fusion classifier is given. Silhouette of "
            "the classes by cosine in the full space, not in the plane.",
            tuple(images),
            data=(path,),
        )

    def heat_maps(self) -> list[Figure]:
        """An image for each of a few samples, a line in it for each run."""
        title = "Words of the class name over the image"
        self.folder.log(title)
        shown, found, reasons = [], [], []
        rows = None
        for run in _with_images_and_texts(self.runs)[:_MOST]:
            try:
                opened = self.models.open(run)
                if rows is None:
                    rows, data = self._samples(opened), opened.method.task.data
                elif not _same_samples(data, opened.method.task.data):
                    raise LeftOutError(f"{run.label} has other samples")
                with on_device(run.config):
                    found.append(heat_maps(opened, rows))
                shown.append(run.label)
            except LeftOutError as error:
                reasons.append(str(error))
        if not shown:
            return [Figure(title, left_out=reasons[0] if reasons else self._no_maps())]
        return [self._heat_figure(title, shown, found)]

    def _no_maps(self) -> str:
        if any(run.config.data.get("towers", "") for run in self.runs):
            return (
                "these runs classify embeddings of frozen towers, which have no patches and no "
                "words; train towers: --config m3col:SOURCE,towers=none"
            )
        return "no run has an image and a text of each sample"

    def _samples(self, opened: Opened) -> np.ndarray:
        return drawn_samples(opened, self.seed)

    def _heat_figure(self, title: str, shown: list[str], found: list[list[dict]]) -> Figure:
        images, files = [], []
        for number, maps in enumerate(zip(*found, strict=True), 1):
            arrays = {name: maps[0][name] for name in ("class", "words", "row")}
            arrays |= {name: np.stack([m[name] for m in maps]) for name in ("heat", "pixels")}
            path, saved = self.folder.save(f"heat-{number}.npz", arrays | {"runs": shown})
            alt = f"Heat maps of {', '.join(maps[0]['words'])} over an image of {maps[0]['class']}."
            images.append(self.folder.draw(f"heat-{number}.svg", alt, draw_heat, saved))
            files.append(path)
        return Figure(
            title,
            "Dot product of each word of the sample's class name with each patch of its image: "
            "the encoders' states before pooling (projected where the model projects), normalised "
            "(so the cosine), a word's being the mean over its tokens; bilinear upsampling from "
            "the patches to the pixels. The image is what the model is given. Test samples of "
            f"different classes, drawn by the seed {self.seed}; a line for each run, one colour "
            "scale for each sample.",
            tuple(images),
            data=tuple(files),
        )

    def confidence(self) -> Figure:
        """Histograms of the full method and of its ablations with several modalities."""
        rows, reasons, chances = [], [], []
        for run in _chosen(self.runs):
            try:
                opened = self.models.open(run)
                with on_device(run.config):
                    values = noise_confidence(opened)
            except LeftOutError as error:
                reasons.append(str(error))
                continue
            rows += [(run.label, value) for value in values.tolist()]
            chances.append(1 / opened.method.task.data.classes)
        if not rows:
            raise LeftOutError(reasons[0])
        path, saved = self.folder.save("confidence.csv", columns(("run", "confidence"), rows))
        alt = "Histograms of the top softmax score."
        image = self.folder.draw("confidence.svg", alt, draw_confidence, saved, min(chances))
        return Figure(
            "Confidence on random inputs",
            "Top softmax score of the fused prediction where every modality is Gaussian noise with "
            "the mean and variance of the training split (pixels and tables at the input, texts at "
            f"the encoder's output). The lowest possible score is {100 * min(chances):.0f} %.",
            (image,),
            data=(path,),
        )

    def classes(self) -> Figure:
        """Recall of the first run's classes, and the classes that they are taken for."""
        run = self.runs[0]
        found = confusions(run)
        names, matrices = found["classes"], found["samples"]
        mean = matrices.mean(axis=0)
        cells = [(names[a], names[b], mean[a, b]) for a, b in np.argwhere(mean)]
        header = ("class", "predicted", "samples")
        path, _ = self.folder.save("confusions.csv", columns(header, cells))
        wrong, total = mean * ~np.eye(len(names), dtype=bool), matrices[0].sum(axis=1)
        order = [a for a in np.argsort(-wrong.sum(axis=1), kind="stable") if total[a]]
        rows = []
        for a in order[:_MOST_CLASSES]:
            recall, std = map(percent, mean_std(matrices[:, a, a] / total[a]))
            others = [b for b in np.argsort(-wrong[a], kind="stable")[:2] if wrong[a, b]]
            taken = "; ".join(f"{names[b]} {wrong[a, b]:.1f}" for b in others)
            several = f" ± {std}" * (len(matrices) > 1)
            rows.append([names[a], str(total[a]), recall + several, taken or "–"])
        return Figure(
            "Classes with most errors",
            f"{run.label}: recall (%) of the test samples of a class by the fused prediction, and "
            "the one or two other classes that they are most often taken for, with the number of "
            f"samples{', means over the models' * (len(matrices) > 1)}. At most {_MOST_CLASSES} "
            "classes; the file has the whole confusion matrix.",
            table=Table(["class", "test samples", "recall (%)", "taken for"], rows),
            data=(path,),
        )


def _chosen(runs: Sequence[Run]) -> list[Run]:
    """The full method and MultiSClip alone where both are there, else the first few runs."""
    several = [run for run in runs if len(_kinds(run)) != 1]
    full = [run for run in several if run.config.loss.contrastive == "scheduled"]
    soft = [run for run in several if run.config.loss.contrastive == "multi_soft_clip"]
    return [full[0], soft[0]] if full and soft else list(several or runs)[:_MOST]


def _kinds(run: Run) -> list[str]:
    """The kinds of a run's modalities, from its evaluation; nothing without one."""
    protocol = (run.result or {}).get("protocol", {})
    return sorted(protocol.get("modalities", {}).values())


def _with_images_and_texts(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if _kinds(run) in ([], ["image", "text"])]


def _same_samples(a, b) -> bool:
    return (
        a.name == b.name
        and a.label_names == b.label_names
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.split, b.split)
    )


def _errors(folder: Folder, sweep: Sweep) -> Figure:
    """The table of the sweep: who is right where."""
    folders = {label: runs[0].path.parent.name for label, runs in sweep.variants.items()}
    seeds = sorted(
        {
            int(run.path.name.removeprefix("seed"))
            for runs in sweep.variants.values()
            for run in runs
        }
    )
    rows = collect(sweep.path, folders, seeds).get("error_analysis")
    if not rows:
        raise LeftOutError(
            f"{sweep.label} lacks the variants full and “only <modality>” of one seed with their "
            "predictions.npz; run them: rcml-sweep ... --ablations"
        )
    path, _ = folder.save(
        f"errors-{slug(sweep.label)}.csv", {name: [row[name] for row in rows] for name in rows[0]}
    )
    cells = [[x if isinstance(x, str) else percent(x) for x in row.values()] for row in rows]
    return Figure(
        f"Error analysis: {sweep.label}",
        "Shares of the test samples (%) by which models are right, every modality trained alone; "
        "mean over the seeds.",
        table=Table(list(rows[0]), cells),
        data=(path,),
    )

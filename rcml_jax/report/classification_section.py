"""The figures of M3CoL and its ablations."""

import pathlib
from collections.abc import Sequence

import numpy as np

from rcml_jax.report import classification, classification_data
from rcml_jax.report.arrays import LeftOutError, slug
from rcml_jax.report.curves import labels
from rcml_jax.report.folder import Figure, Folder, Picture, Section, Table, percent
from rcml_jax.report.models import Models, Opened, on_device
from rcml_jax.report.projection import NEIGHBOURS
from rcml_jax.report.sources import Run, Sweep
from rcml_jax.sweep_table import collect

_MOST = 6


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
    figures += [
        folder.attempt("Error analysis", lambda sweep=sweep: _errors(folder, sweep))
        for sweep in sweeps
    ] or [Figure("Error analysis", left_out=_NO_SWEEP)]
    return Section(f"Multimodal classification: {make.runs[0].dataset}", tuple(figures))


_NO_SWEEP = (
    "it compares a model with others that were trained on one modality alone; give the directory "
    "of a sweep that has them: python -m rcml_jax.sweep ... --ablations"
)


class _Figures:
    def __init__(self, folder: Folder, runs: Sequence[Run], models: Models, seed: int):
        self.folder, self.runs, self.models, self.seed = folder, runs, models, seed

    def accuracy(self) -> Figure:
        """Accuracy at every look of training."""
        shown = self.runs[:_MOST]
        path, saved = self.folder.save(
            "accuracy-by-epoch.csv", classification_data.accuracy_by_epoch(shown)
        )
        pictures = []
        for split in labels(saved, "split"):
            file = self.folder.picture(f"accuracy-by-epoch-{split}.svg")
            picture = classification.draw_accuracy(saved, file, split)
            pictures.append(Picture(picture, f"{split} accuracy against the epoch."))
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
            + (f" The first {_MOST} of {len(self.runs)} runs." if rest > 0 else ""),
            tuple(pictures),
            data=(path,),
        )

    def maps(self) -> Figure:
        """UMAP of the first run's embeddings."""
        opened = self.models.open(self.runs[0])
        with on_device(opened.run.config):
            arrays = classification_data.embedding_map(opened, self.seed)
        path, saved = self.folder.save("umap.npz", arrays)
        pictures = []
        for place, part in enumerate(saved["parts"]):
            name = f"umap-{slug(str(part))}.svg"
            picture = classification.draw_map(saved, self.folder.picture(name), place)
            pictures.append(Picture(picture, f"Scatter plot of {part} embeddings by class."))
        return Figure(
            "Embeddings of each modality and fused",
            f"{self.runs[0].label}: UMAP ({NEIGHBOURS} neighbours, minimum distance 0.1, cosine, a "
            f"fixed seed) of {len(saved['class'])} test samples of {len(saved['classes'])} classes "
            f"(at most {classification_data.CLASSES}, the most frequent). Fused: the modalities' "
            "embeddings one after the other, which the fusion classifier is given. Silhouette of "
            "the classes by cosine in the full space, not in the plane.",
            tuple(pictures),
            data=(path,),
        )

    def heat_maps(self) -> list[Figure]:
        """A picture for each of a few samples, a line in it for each run."""
        title = "Words of the class name over the picture"
        self.folder.log(title)
        shown, found, reasons = [], [], []
        rows = None
        for run in _with_pictures_and_texts(self.runs)[:_MOST]:
            try:
                opened = self.models.open(run)
                if rows is None:
                    rows, data = self._samples(opened), opened.method.task.data
                elif not _same_samples(data, opened.method.task.data):
                    raise LeftOutError(f"{run.label} has other samples")
                with on_device(run.config):
                    found.append(classification_data.heat_maps(opened, rows))
                shown.append(run.label)
            except LeftOutError as error:
                reasons.append(str(error))
        if not shown:
            why = reasons[0] if reasons else "no run has a picture and a text of each sample"
            return [Figure(title, left_out=why)]
        return [self._heat_figure(title, shown, found)]

    def _samples(self, opened: Opened) -> np.ndarray:
        return classification_data.drawn_samples(opened, self.seed)

    def _heat_figure(self, title: str, shown: list[str], found: list[list[dict]]) -> Figure:
        pictures, files = [], []
        for number, maps in enumerate(zip(*found, strict=True), 1):
            arrays = {name: maps[0][name] for name in ("class", "words", "row")}
            arrays |= {name: np.stack([m[name] for m in maps]) for name in ("heat", "pixels")}
            path, saved = self.folder.save(f"heat-{number}.npz", arrays | {"runs": shown})
            picture = classification.draw_heat(saved, self.folder.picture(f"heat-{number}.svg"))
            alt = (
                f"Heat maps of {', '.join(maps[0]['words'])} over a picture of {maps[0]['class']}."
            )
            pictures.append(Picture(picture, alt))
            files.append(path)
        return Figure(
            title,
            "Dot product of each word of the sample's class name with each patch of its picture: "
            "the encoders' states before pooling, normalised (so the cosine), a word's being the "
            "mean over its tokens; bilinear upsampling from the patches to the pixels. The picture "
            "is what the model is given. Test samples of different classes, drawn by the seed "
            f"{self.seed}; a line for each run, one colour scale for each sample.",
            tuple(pictures),
            data=tuple(files),
        )

    def confidence(self) -> Figure:
        """Histograms of the full method and of its ablations with several modalities."""
        columns: dict[str, list] = {"run": [], "confidence": []}
        reasons, chances = [], []
        for run in _chosen(self.runs):
            try:
                opened = self.models.open(run)
                with on_device(run.config):
                    values = classification_data.noise_confidence(opened)
            except LeftOutError as error:
                reasons.append(str(error))
                continue
            columns["run"] += [run.label] * len(values)
            columns["confidence"] += values.tolist()
            chances.append(1 / opened.method.task.data.classes)
        if not columns["run"]:
            raise LeftOutError(reasons[0])
        path, saved = self.folder.save("confidence.csv", columns)
        picture = classification.draw_confidence(
            saved, self.folder.picture("confidence.svg"), min(chances)
        )
        return Figure(
            "Confidence on random inputs",
            "Top softmax score of the fused prediction where every modality is Gaussian noise with "
            "the mean and variance of the training split (pixels and tables at the input, texts at "
            f"the encoder's output). The lowest possible score is {100 * min(chances):.0f} %.",
            (Picture(picture, "Histograms of the top softmax score."),),
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


def _with_pictures_and_texts(runs: Sequence[Run]) -> list[Run]:
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
            "predictions.npz; run them: python -m rcml_jax.sweep ... --ablations"
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

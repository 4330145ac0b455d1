"""M3CoL's figures, drawn from saved arrays."""

import pathlib

import numpy as np

from rcml_jax.report import style
from rcml_jax.report.arrays import Arrays
from rcml_jax.report.curves import labels
from rcml_jax.report.relational import box, frame, overlay, scatter

BINS = 25


def draw_map(arrays: Arrays, path: pathlib.Path, place: int) -> pathlib.Path:
    """The plane of a modality's or the fused embeddings: a colour and a mark for each class."""
    with style.drawing(style.PANEL, 5.2) as figure:
        axes = figure.add_subplot()
        scatter(axes, arrays["points"][place], arrays["class"], [str(c) for c in arrays["classes"]])
        score = f"silhouette {style.signed(arrays['silhouette'][place])}"
        axes.set_title(f"{arrays['parts'][place]}, {score}", loc="left")
        style.below(figure, *axes.get_legend_handles_labels(), columns=2)
        return style.save(figure, path)


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
    """A line for each run: the picture, and over it the cosine of each word with its patches."""
    words = [str(word) for word in arrays["words"]]
    heat, limits = arrays["heat"], (float(arrays["heat"].min()), float(arrays["heat"].max()))
    step = _CELL + _MARGIN
    width, across = max(style.PANEL, _LEFT + step * (1 + len(words))), step * (1 + len(words))
    height = _ABOVE + step * len(heat) + _BELOW
    with style.drawing(width, height) as figure:
        figure.set_layout_engine("none")
        for row, (run, pixels) in enumerate(zip(arrays["runs"], arrays["pixels"], strict=True)):
            top = _ABOVE + step * row
            picture = box(figure, _LEFT, top, _CELL)
            picture.imshow(pixels)
            frame(picture)
            picture.set_ylabel(style.wrap(str(run), 16, 2), fontsize=10)
            cells = [box(figure, _LEFT + step * (i + 1), top, _CELL) for i in range(len(words))]
            for cell, found in zip(cells, heat[row], strict=True):
                image = overlay(cell, pixels, upsample(found, pixels.shape[:2]), limits)
            for cell, title in zip([picture, *cells], ["picture", *words], strict=True):
                cell.set_title("" if row else style.short(title, 13), fontsize=11)
        place = (_LEFT / width, 0.52 / height, (across - _MARGIN) / width, 0.13 / height)
        bar = figure.colorbar(image, cax=figure.add_axes(place), orientation="horizontal")
        bar.ax.locator_params(nbins=4)
        bar.set_label("cosine of word and patch")
        return style.save(figure, path)


def draw_confidence(arrays: Arrays, path: pathlib.Path, chance: float) -> pathlib.Path:
    """Histograms of top softmax scores on random inputs, an outline for each run."""
    runs = labels(arrays)
    with style.drawing(style.WIDE, 3.8 + 0.25 * len(runs)) as figure:
        axes = figure.add_subplot()
        edges = np.linspace(chance, 1, BINS + 1)
        for place, run in enumerate(runs):
            values = arrays["confidence"][arrays["run"].astype(str) == run]
            share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(
                share, edges, label=f"{style.short(run, 46)} (mean {100 * values.mean():.0f} %)",
                color=style.COLOURS[place % 8], linestyle=style.LINES[place % 4], linewidth=2.2,
            )  # fmt: skip
        axes.set(xlabel="top softmax score", ylabel="samples (%)", xlim=(chance, 1))
        axes.set_ylim(bottom=0)
        style.below(figure, *axes.get_legend_handles_labels(), columns=1)
        return style.save(figure, path)


def draw_accuracy(arrays: Arrays, path: pathlib.Path, split: str) -> pathlib.Path:
    """Accuracy on a split at each look, a line for each run; bands of deviation for two at most."""
    here = arrays["split"].astype(str) == split
    arrays = {name: column[here] for name, column in arrays.items()}
    runs = labels(arrays)
    by_epoch = not np.isnan(arrays["epoch"]).any()
    with style.drawing(style.WIDE, 3.6 + 0.25 * len(runs)) as figure:
        axes = figure.add_subplot()
        for place, run in enumerate(runs):
            mine = arrays["run"].astype(str) == run
            x = arrays["epoch" if by_epoch else "step"][mine]
            mean, std = 100 * arrays["mean"][mine], 100 * arrays["std"][mine]
            look = style.series(place) | {"markevery": max(1, len(x) // 8)}
            axes.plot(x, mean, label=style.short(run, 46), **look)
            if len(runs) <= 2 and np.any(std > 0):
                axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15)
        axes.set(xlabel="epoch" if by_epoch else "step", ylabel=f"{split} accuracy (%)")
        style.below(figure, *axes.get_legend_handles_labels(), columns=1)
        return style.save(figure, path)

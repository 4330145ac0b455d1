"""RCML's figures, drawn from saved arrays."""

import pathlib

import numpy as np

from rcml_jax.report import style
from rcml_jax.report.arrays import Arrays

SCORES = {
    "tt": "text – text",
    "ii": "image – image",
    "ti": "text – image",
    "it": "image – text",
    "avg": "average",
}


def draw_map(arrays: Arrays, path: pathlib.Path, place: int) -> pathlib.Path:
    """One run's plane: a colour and a mark for each kind."""
    kinds = [str(kind) for kind in arrays["kinds"]]
    points = arrays["points"][place]
    with style.drawing(style.PANEL, 4.9) as figure:
        axes = figure.add_subplot()
        scatter(axes, points, arrays["kind"], kinds)
        score = f"silhouette {style.signed(arrays['silhouette'][place])}"
        axes.set_title(f"{style.wrap(arrays['runs'][place], 40)}\n{score}", loc="left")
        style.below(figure, *axes.get_legend_handles_labels(), columns=2)
        return style.save(figure, path)


def scatter(axes, points: np.ndarray, kind: np.ndarray, names: list[str]) -> None:
    """Points (n, 2) by kind on axes without ticks: a plane of t-SNE or UMAP has no units."""
    for number, name in enumerate(names):
        here, marker = kind == number, style.MARKERS[number % 10]
        axes.scatter(
            *points[here].T, s=70 if marker == "*" else 34, marker=marker, edgecolors="white",
            color=style.COLOURS[number % 8], label=style.short(name, 24), linewidths=0.5,
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#BBBBBB")


# Inches: the margins, the query's picture, a candidate's picture, and the lines of a case study.
_LEFT, _TOP, _QUERY, _SIZE = 0.1, 0.12, 0.95, 0.8
_TEXT, _ROW, _COLUMNS_AT, _COLUMN = 0.19, 1.54, 1.36, 0.96


def draw_case(arrays: Arrays, path: pathlib.Path) -> pathlib.Path:
    """A case study: the query above, a line of the top candidates for each similarity below."""
    sentence = style.wrap(f"under: {arrays['relation']}", 52, 5)
    head = _TOP + _QUERY + 0.1 + _TEXT * (1 + sentence.count("\n")) + 0.32
    with style.drawing(style.PANEL, head + _ROW * len(arrays["order"])) as figure:
        figure.set_layout_engine("none")
        _query(figure, arrays)
        _write(figure, _LEFT, _TOP + _QUERY + 0.08, sentence, fontsize=10.5)
        for row, name in enumerate(arrays["scores"]):
            _line(figure, arrays, row, str(name), head + _ROW * row)
        return style.save(figure, path)


def box(figure, left: float, top: float, size: float):
    """Axes for a square picture, placed in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))


def _write(figure, left: float, top: float, text: str, **options) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, va="top", **options)


def _query(figure, arrays: Arrays) -> None:
    axes = box(figure, _LEFT, _TOP, _QUERY)
    axes.imshow(arrays["query_picture"])
    frame(axes, "#444444", 1.5)
    top = _TOP - 0.02
    lines = (
        (str(arrays["query"]), {"weight": "bold"}),
        (f"truth: {arrays['candidates'][0]}", {"color": "#00664B"}),
    )
    for text, options in lines:
        broken = style.wrap(text, 34, 2)
        _write(figure, _LEFT + _QUERY + 0.12, top, broken, fontsize=11, **options)
        top += _TEXT * (1 + broken.count("\n")) + 0.1


def _line(figure, arrays: Arrays, row: int, name: str, top: float) -> None:
    count = len(arrays["pictures"])
    said = f"{SCORES.get(name, name)}\ntruth is\n{arrays['rank'][row]}. of {count}"
    _write(figure, _LEFT, top + 0.12, said, fontsize=11)
    for column, place in enumerate(arrays["order"][row]):
        left = _COLUMNS_AT + _COLUMN * column
        axes = box(figure, left, top, _SIZE)
        axes.imshow(arrays["pictures"][place])
        right = place == 0
        frame(axes, style.RIGHT if right else "#BBBBBB", 4 if right else 1)
        title = f"{column + 1}. {style.signed(arrays['score'][row, column])}"
        axes.set_title(f"{title} ✓" if right else title, fontsize=10, pad=4)
        text = style.wrap(str(arrays["candidates"][place]), 14, 3)
        _write(figure, left + _SIZE / 2, top + _SIZE + 0.06, text, fontsize=8.5, ha="center")


def frame(axes, colour: str = "#BBBBBB", width: float = 1) -> None:
    """A box around a picture, without ticks."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set(visible=True, color=colour, linewidth=width)


def draw_attention(arrays: Arrays, path: pathlib.Path, place: int) -> pathlib.Path:
    """Weights of patches over the picture, and of tokens as bars, under one relation."""
    tokens = [str(token) for token in arrays["tokens"]]
    top = 100 * float(max(arrays["image"].max(), arrays["image_summary"].max()))
    longest = 100 * float(arrays["text"].max())
    with style.drawing(style.PANEL, max(3.9, 1.5 + 0.26 * len(tokens))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        heat = overlay(left, arrays["pixels"], 100 * arrays["image"][place], (0, top))
        bar = figure.colorbar(heat, ax=left, orientation="horizontal", pad=0.03, aspect=12)
        bar.set_label("weight of a patch (%)")
        left.set_anchor("N")
        left.set_title(f"[CLS] {100 * arrays['image_summary'][place]:.0f} %", fontsize=11)
        right.barh(range(len(tokens)), 100 * arrays["text"][place], color=style.COLOURS[0])
        right.set_yticks(range(len(tokens)), [style.short(token, 10) for token in tokens])
        right.invert_yaxis()
        right.grid(visible=False, axis="y")
        right.grid(visible=True, axis="x")
        right.set(xlabel="of a token (%)", xlim=(0, 1.08 * longest))
        sentence = style.wrap(str(arrays["relations"][place]), 40, 2)
        # Always two lines, so that pictures side by side are of one height.
        figure.suptitle(sentence + "\n " * ("\n" not in sentence), fontsize=11.5)
        return style.save(figure, path)


def overlay(axes, pixels: np.ndarray, heat: np.ndarray, limits: tuple[float, float]):
    """A heat map (h, w) over the grey of a picture (H, W, 3); the map's own image is returned."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(axis=-1), cmap="gray", vmin=0, vmax=255)
    image = axes.imshow(
        heat, cmap=style.HEAT, alpha=0.65, vmin=limits[0], vmax=limits[1],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    frame(axes)
    return image

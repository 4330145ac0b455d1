"""Figures of the alignment study, drawn from its `eval.json` and `similarities.npz`."""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rcml_jax.report import page
from rcml_jax.report.page import (
    Figure,
    FigureImage,
    Folder,
    LeftOutError,
    Section,
    load,
    plain,
    slug,
)

_BLUE, _ORANGE, _GREEN = page.COLOURS[:3]
_CALIBRATIONS = {"none": ("o", _BLUE), "centred": ("s", _ORANGE), "whitened": ("^", _GREEN)}
_COLUMNS = 2
_HEIGHT = 2.7  # inches of one of several panels


def draw(
    result: Mapping[str, Any], arrays: Mapping[str, np.ndarray], directory: pathlib.Path
) -> list[pathlib.Path]:
    """Write `similarities.svg`, `gap.svg` and `plane.svg` into a directory, made if need be.

    result: the study's `eval.json`; arrays: its `similarities.npz`. They show the cosines of
    matched and of random pairs, the gap against retrieval with each calibration, and both
    modalities on their first two principal axes before and after centring. Raises UserError
    without matplotlib (extra `plots`).
    """
    page.require()
    directory.mkdir(parents=True, exist_ok=True)
    count = len(result["sources"])
    rows = math.ceil(count / _COLUMNS)
    width = page.WIDE if count > 1 else page.PANEL
    figures = (
        ("similarities", _histograms, (width, _HEIGHT * rows + 0.5)),
        ("gap", _gap, (page.WIDE, 4.6)),
        ("plane", _planes, (page.WIDE, _HEIGHT * count + 0.5)),
    )
    paths = []
    for name, function, size in figures:
        with page.drawing(*size) as figure:
            function(figure, result, arrays)
            paths.append(page.save_figure(figure, directory / f"{name}.svg"))
    return paths


def _grid(figure: Any, sources: list[str]) -> list[Any]:
    """An axis for each source, two beside each other."""
    columns = min(_COLUMNS, len(sources))
    axes = figure.subplots(math.ceil(len(sources) / columns), columns, squeeze=False).ravel()
    for axis in axes[len(sources) :]:
        axis.remove()
    return list(axes[: len(sources)])


def _histograms(figure: Any, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    sources = list(result["sources"])
    for axis, source in zip(_grid(figure, sources), sources, strict=True):
        edges = arrays[f"{source}/edges"]
        for name, colour in (("random", _ORANGE), ("matched", _BLUE)):
            share = 100 * arrays[f"{source}/{name}"]
            axis.stairs(share, edges, color=colour, fill=True, alpha=0.35)
            axis.stairs(share, edges, color=colour, label=f"{name} pairs")
        axis.set(title=page.short(source, 28), xlabel="cosine", xlim=(-1, 1), yticks=[])
        axis.set_ylabel("share of pairs")
    page.below(figure, *axis.get_legend_handles_labels(), columns=2)


def _gap(figure: Any, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    del arrays
    axis = figure.subplots()
    for number, (name, (marker, colour)) in enumerate(_CALIBRATIONS.items()):
        # A collapsed embedding has no whitened form.
        of_source = {
            source: found["calibration"][name]
            for source, found in result["sources"].items()
            if name in found["calibration"]
        }
        points = [(found["centroid"], _recall(found)) for found in of_source.values()]
        x, y = zip(*points, strict=True) if points else ((), ())
        label = {"none": "as it is"}.get(name, name)
        axis.plot(x, y, marker, color=colour, label=label, markersize=6, alpha=0.9)
        if number == 0:
            for source, point in zip(of_source, points, strict=True):
                axis.annotate(source, point, xytext=(6, 5), textcoords="offset points")
    axis.set(
        xlabel="modality gap: distance between centroids of unit vectors",
        ylabel="r@1, mean of both directions (%)",
    )
    axis.set_xlim(left=-0.03)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.15, y=0.12)
    axis.grid(axis="both")
    page.below(figure, *axis.get_legend_handles_labels(), columns=3)


def _recall(found: dict) -> float:
    return 50 * (found["image_to_text"]["r@1"] + found["text_to_image"]["r@1"])


def _planes(figure: Any, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    sources = list(result["sources"])
    grid = figure.subplots(len(sources), 2, squeeze=False)
    for row, source in zip(grid, sources, strict=True):
        for axis, (name, title) in zip(
            row, (("none", "as they are"), ("centred", "centred")), strict=True
        ):
            sides = [arrays[f"{source}/{name}/{side}"] for side in ("image", "text")]
            shown = min(len(sides[0]), 60)
            lines = np.stack([side[:shown] for side in sides])  # (2, pairs, 2)
            axis.plot(lines[..., 0], lines[..., 1], color="0.8", linewidth=0.6, zorder=1)
            for side, marker, colour, label in (
                (sides[0], "o", _BLUE, "images"),
                (sides[1], "^", _ORANGE, "texts"),
            ):
                axis.scatter(*side.T, s=9, marker=marker, color=colour, label=label, alpha=0.7)
            axis.set(title=f"{page.short(source, 18)}: {title}", xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
    page.below(figure, *grid[0, 0].get_legend_handles_labels(), columns=2)


def study(folder: Folder, label: str, path: pathlib.Path, result: Mapping[str, Any]) -> Section:
    """The section of an alignment study: its work directory and its `eval.json`."""
    title = "Alignment of two modalities"
    make = functools.partial(_study, folder, title, slug(label), path, result)
    return Section(f"Alignment: {label}", (folder.attempt(title, make),))


def _study(
    folder: Folder, title: str, name: str, path: pathlib.Path, result: Mapping[str, Any]
) -> Figure:
    arrays = path / "similarities.npz"
    if not arrays.is_file():
        raise LeftOutError(
            f"{path} holds no similarities.npz; evaluate again: rcml-eval --workdir {path}"
        )
    copied, found = folder.save(f"similarities-{name}.npz", load(arrays))
    drawn = draw(result, found, folder.root / f"alignment-{name}")
    names = {
        "similarities": "Histograms of the cosines of matched and of random pairs.",
        "gap": "The modality gap against retrieval.",
        "plane": "Both modalities in a plane, as they are and centred.",
    }
    images = tuple(FigureImage(x, names.get(x.stem, x.stem)) for x in drawn)
    protocol = "; ".join(f"{name}: {plain(value)}" for name, value in result["protocol"].items())
    return Figure(
        title,
        "For each source the cosines of matched and of random pairs; the modality gap against "
        "retrieval with each calibration; and both modalities on their first two principal axes "
        f"before and after centring. Protocol: {protocol}.",
        images,
        data=(copied,),
    )

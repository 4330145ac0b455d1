"""Figures of the alignment study, drawn from its `eval.json` and `similarities.npz`."""

import functools
import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping
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
    matched and of random pairs, the gap against retrieval before and after each alignment, and both
    modalities on their first two principal axes before and after centring. `pairs.svg`, retrieval
    by the number of training pairs, follows where the study has asked for it. Raises UserError
    without matplotlib (extra `plots`).
    """
    page.require()
    directory.mkdir(parents=True, exist_ok=True)
    count = len(result["sources"])
    rows = math.ceil(count / _COLUMNS)
    width = page.WIDE if count > 1 else page.PANEL
    figures = [
        ("similarities", _histograms, (width, _HEIGHT * rows + 0.5)),
        ("gap", _gap, (page.WIDE, 5.4)),
        ("plane", _planes, (page.WIDE, _HEIGHT * count + 0.5)),
    ]
    if by_pairs := _by_pairs(result):
        figures.append(("pairs", _pairs, (page.WIDE, _HEIGHT * len(by_pairs) + 1.7)))
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
        axis.set_xticks([-1, -0.5, 0, 0.5, 1])
        axis.set_ylabel("share of pairs")
    page.below(figure, *axis.get_legend_handles_labels(), columns=2)


def _gap(figure: Any, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    del arrays
    axes = figure.subplots(1, len(_GAPS), sharey=True)
    for axis, (measure, label) in zip(axes, _GAPS.items(), strict=True):
        _gap_panel(axis, result, measure)
        axis.set_xlabel(label)
        axis.set_xlim(left=-0.03)
        axis.margins(x=0.15, y=0.12)
        axis.grid(axis="both")
    axes[0].set_ylabel("r@1, mean of both directions (%)")
    axes[0].set_ylim(bottom=0)
    page.below(figure, *axes[0].get_legend_handles_labels(), columns=3)


#: Distances of the modalities, of unit vectors.
_GAPS = {"centroid": "distance between centroids", "wasserstein2": "Wasserstein-2 distance"}


def _gap_panel(axis: Any, result: Mapping[str, Any], measure: str) -> None:
    for number, (name, (marker, colour)) in enumerate(_CALIBRATIONS.items()):
        points = _gap_points(result, "calibration", name, measure)
        label = {"none": "as it is"}.get(name, name)
        style = {"color": colour, "markersize": 6, "alpha": 0.9}
        axis.plot(*_columns(points.values()), marker, label=label, **style)
        if number == 0:
            middle = sum(x for x, _ in points.values()) / max(len(points), 1)
            for source, point in points.items():
                # The name of a point on the right stands on its left, within the axes.
                side, align = (-6, "right") if point[0] >= middle else (6, "left")
                place = {"xytext": (side, 5), "textcoords": "offset points", "ha": align}
                axis.annotate(page.short(source, 28), point, **place)
    maps = dict.fromkeys(
        n for found in result["sources"].values() for n in found.get("learned", ())
    )
    for number, name in enumerate(maps):
        if points := _gap_points(result, "learned", name, measure):
            # Other colours and marks than those of the calibrations.
            style = page.series(number + len(_CALIBRATIONS)) | {
                "linestyle": "",
                "fillstyle": "none",
            }
            axis.plot(*_columns(points.values()), label=name, **style)


def _gap_points(
    result: Mapping[str, Any], kind: str, name: str, measure: str
) -> dict[str, tuple[float, float]]:
    """(gap by the measure, r@1) of each source under one calibration or map.

    A collapsed embedding has no whitened form, and a similarity of pairs no gap.
    """
    return {
        source: (found[kind][name][measure], _recall(found[kind][name]))
        for source, found in result["sources"].items()
        if measure in found.get(kind, {}).get(name, {})
    }


def _columns(points: Iterable[tuple]) -> tuple:
    return tuple(zip(*points, strict=True)) or ((), ())


def _by_pairs(result: Mapping[str, Any]) -> dict[str, dict]:
    """Of each source that has them: by map, {training pairs: figures}, all pairs among them."""
    return {
        source: {
            name: {**{int(n): row for n, row in rows.items()}, count: found["learned"][name]}
            for name, rows in found["by_pairs"].items()
        }
        for source, found in result["sources"].items()
        if found.get("by_pairs") and (count := found.get("training_pairs"))
    }


def _pairs(figure: Any, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    del arrays
    by_pairs = _by_pairs(result)
    grid = figure.subplots(len(by_pairs), 2, squeeze=False, sharey="row")
    for row, (source, found) in zip(grid, by_pairs.items(), strict=True):
        for axis, direction in zip(row, ("image_to_text", "text_to_image"), strict=True):
            for number, (name, rows) in enumerate(found.items()):
                recalls = [100 * rows[n][direction]["r@10"] for n in rows]
                axis.plot(list(rows), recalls, label=name, markersize=5, **page.series(number))
            title = f"{page.short(source, 26)}:\n{direction.replace('_', ' ')}"
            axis.set(xscale="log", title=title, xlabel="training pairs")
            counts = sorted(set(itertools.chain(*found.values())))
            axis.set_xticks(counts, [f"{n:,}" for n in counts], rotation=45, ha="right")
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
        row[0].set_ylabel("r@10 (%)")
    page.below(figure, *grid[0, 0].get_legend_handles_labels(), columns=3)


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
        "gap": "The modality gap against retrieval, before and after each alignment.",
        "plane": "Both modalities in a plane, as they are and centred.",
        "pairs": "Retrieval by the number of training pairs.",
    }
    images = tuple(FigureImage(x, names.get(x.stem, x.stem)) for x in drawn)
    protocol = "; ".join(f"{name}: {plain(value)}" for name, value in result["protocol"].items())
    return Figure(
        title,
        "For each source the cosines of matched and of random pairs; the modality gap against "
        "retrieval before and after each alignment; both modalities on their first two principal "
        "axes before and after centring; and retrieval by the number of training pairs, where it "
        f"was asked for. Protocol: {protocol}.",
        images,
        data=(copied,),
    )

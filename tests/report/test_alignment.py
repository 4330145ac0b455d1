"""The alignment study's figures, drawn from its arrays."""

import xml.etree.ElementTree

import numpy as np
import pytest

from rcml_jax.evaluation.modality_gap import BINS, POINTS, cosine_histograms, plane

DIRECTIONS = ("image_to_text", "text_to_image")
SOURCES = ("ours", "theirs", "others", "more")


def study(rng):
    """What a study of four sources leaves: its result and arrays."""
    result, arrays = {"sources": {}}, {}
    for source in SOURCES:
        pairs = rng.normal(size=(30, 4)), rng.normal(size=(60, 4)), np.arange(60) % 30
        drawn = cosine_histograms(*pairs)
        calibration = {}
        for name in ("none", "centred", "whitened"):
            rows = plane(*pairs)
            drawn |= {f"{name}/{side}": rows[side] for side in rows}
            recall = {"r@1": rng.random()}
            directions = {"image_to_text": recall, "text_to_image": recall}
            gap = {"centroid": rng.random(), "wasserstein2": 2 + rng.random()}
            calibration[name] = gap | directions
        gap = {"centroid": 0.1, "wasserstein2": 0.7}
        learned = {"cca": gap | directions, "attention": directions}
        result["sources"][source] = {"calibration": calibration, "learned": learned}
        arrays |= {f"{source}/{key}": value for key, value in drawn.items()}
    return result, arrays


def test_three_figures_that_name_every_source(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    from rcml_jax.report.alignment import draw

    paths = draw(*study(np.random.default_rng(0)), tmp_path / "new")
    assert [path.name for path in paths] == ["similarities.svg", "gap.svg", "plane.svg"]
    for path in paths:
        xml.etree.ElementTree.parse(path)
        # Letters are drawn as paths; beside them stands what they say.
        assert all(f"<!-- {source}" in path.read_text() for source in SOURCES)
    again = draw(*study(np.random.default_rng(0)), tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_retrieval_by_pairs_ends_with_all_of_them(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    from matplotlib.axes import Axes

    from rcml_jax.report.alignment import draw

    result, arrays = study(np.random.default_rng(0))
    for number, name in enumerate(SOURCES[:2]):
        found = result["sources"][name]
        recalls = {"50": 0.1, "200": 0.2 + number / 10, "all": 0.6}
        rows = {n: {d: {"r@10": r} for d in DIRECTIONS} for n, r in recalls.items()}
        for direction in DIRECTIONS:
            found["learned"]["cca"][direction] |= rows["all"][direction]
        found["by_pairs"] = {"cca": {n: rows[n] for n in ("50", "200")}}
        found["training_pairs"] = 900
    lines, plot = [], Axes.plot

    def kept(axis, x, y, *args, **more):
        lines.append((list(x), list(y)))
        return plot(axis, x, y, *args, **more)

    monkeypatch.setattr(Axes, "plot", kept)
    *_, path = draw(result, arrays, tmp_path)
    assert path.name == "pairs.svg"
    text = path.read_text()
    assert [f"<!-- {source}" in text for source in SOURCES] == [True, True, False, False]
    expected = [([50, 200, 900], pytest.approx([10, 20 + 10 * i, 60])) for i in (0, 0, 1, 1)]
    assert [line for line in lines if line[0] == [50, 200, 900]] == expected


def test_maps_have_a_mark_beside_the_calibrations(tmp_path):
    """But those that score pairs, which have no gap."""
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    from rcml_jax.report.alignment import draw

    text = draw(*study(np.random.default_rng(0)), tmp_path)[1].read_text()
    assert "<!-- cca" in text
    assert "<!-- attention" not in text


def test_the_gap_has_a_panel_for_each_distance(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    from matplotlib.axes import Axes

    from rcml_jax.report.alignment import draw

    points, plot = {}, Axes.plot

    def kept(axis, x, y, *args, **more):
        points.setdefault(axis, {})[more.get("label")] = list(zip(x, y, strict=True))
        return plot(axis, x, y, *args, **more)

    monkeypatch.setattr(Axes, "plot", kept)
    result, arrays = study(np.random.default_rng(0))
    draw(result, arrays, tmp_path)
    found = [axis for axis in points if "cca" in points[axis]]
    for axis, measure in zip(found, ("centroid", "wasserstein2"), strict=True):
        for label, kind, name in (("centred", "calibration", "centred"), ("cca", "learned", "cca")):
            rows = [source[kind][name] for source in result["sources"].values()]
            recall = [50 * sum(row[d]["r@1"] for d in DIRECTIONS) for row in rows]
            expected = list(zip([row[measure] for row in rows], recall, strict=True))
            np.testing.assert_allclose(points[axis][label], expected)


def test_histograms_are_shares_of_the_pairs_cosines():
    rng = np.random.default_rng(0)
    image, text, rows = rng.normal(size=(5, 3)), rng.normal(size=(9, 3)), np.arange(9) % 5
    found = cosine_histograms(3 * image, text, rows, pairs=500, seed=1)
    x, y = image[rows], text
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    expected = [np.mean((cosines >= a) & (cosines < a + 2 / BINS)) for a in found["edges"][:-1]]
    np.testing.assert_allclose(found["matched"], expected, atol=1e-12)
    assert found["random"].sum() == pytest.approx(1)
    assert (found["random"] > 0).sum() > 5


def test_the_plane_is_that_of_most_variance():
    """Rows that lie on a plane turned in space keep their distances on it."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(POINTS, 2))
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    turned = flat @ np.linalg.qr(rng.normal(size=(5, 5)))[0][:2]
    found = plane(turned, turned[::-1].copy(), np.arange(POINTS))
    np.testing.assert_allclose(found["image"][::-1], found["text"], atol=1e-12)
    for i, j in ((0, 1), (5, 200)):
        expected = np.linalg.norm(flat[i] - flat[j])
        assert np.linalg.norm(found["image"][i] - found["image"][j]) == pytest.approx(expected)


def test_no_more_points_than_are_seen():
    rng = np.random.default_rng(0)
    found = plane(rng.normal(size=(500, 1)), rng.normal(size=(900, 1)), np.arange(900) % 500)
    assert found["image"].shape == found["text"].shape == (POINTS, 2)

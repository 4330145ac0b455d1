"""Every figure is drawn from arrays alone and has the labels that a reader needs."""

import numpy as np
import pytest

from rcml_jax.evaluation.measures import main_of
from rcml_jax.report import classification, common, page, relational
from rcml_jax.report.page import LeftOutError, load, save
from rcml_jax.report.runs import read_sources
from tests.report.runs import (
    classification_lines,
    classification_result,
    measure,
    relational_lines,
    relational_result,
    small_config,
    with_controls,
    write_run,
)

RNG = np.random.default_rng(0)


def said(path):
    """The texts in an image: matplotlib writes each as a comment beside its outlines."""
    return [part.split("-->")[0].strip() for part in path.read_text().split("<!--")[1:]]


def check(path, *texts):
    shown = said(path)
    for text in texts:
        assert any(text in line for line in shown), (text, shown)
    return shown


def saved(tmp_path, arrays, name="a.npz"):
    """As the report has them: out of a file."""
    return save(tmp_path / name, arrays)


def plane(**options):
    arrays = {
        "runs": ["rcml", "clip"],
        "points": RNG.normal(size=(2, 12, 2)),
        "kind": np.arange(12) % 3,
        "kinds": ["fruit", "price in $", "動物"],
        "silhouette": [0.41, -0.03],
    }
    return arrays | options


def test_a_plane_names_its_kinds_and_score(tmp_path):
    arrays = saved(tmp_path, plane())
    first = relational.draw_map(arrays, tmp_path / "a.svg", 0)
    check(first, "rcml", "silhouette 0.41", "fruit", "price in $")
    check(relational.draw_map(arrays, tmp_path / "b.svg", 1), "clip", "silhouette −0.03")


def test_the_same_arrays_give_the_same_image(tmp_path):
    arrays = saved(tmp_path, plane())
    one = relational.draw_map(arrays, tmp_path / "a.svg", 0).read_bytes()
    assert relational.draw_map(arrays, tmp_path / "b.svg", 0).read_bytes() == one
    png = relational.draw_map(arrays, tmp_path / "a.png", 0).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert relational.draw_map(arrays, tmp_path / "b.png", 0).read_bytes() == png


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    import matplotlib

    matplotlib.rcParams["font.size"] = 7.5
    relational.draw_map(plane(), tmp_path / "a.svg", 0)
    assert matplotlib.rcParams["font.size"] == 7.5
    assert matplotlib.rcParams["text.parse_math"] is True
    matplotlib.rcdefaults()


def case(**options):
    images = RNG.integers(0, 255, (21, 8, 8, 3)).astype(np.uint8)
    arrays = {
        "query": "red apple",
        "relation": "both of them cost $5 and more, so that $10 buys one",
        "candidates": ["green apple", *(f"thing {i}" for i in range(1, 21))],
        "query_image": images[0],
        "images": images,
        "scores": ["tt", "ii", "ti", "it", "avg"],
        "order": [[0, 1, 2], [3, 0, 4], [5, 6, 7], [1, 2, 0], [8, 0, 9]],
        "score": np.linspace(0.9, -0.5, 15).reshape(5, 3),
        "rank": [1, 2, 17, 3, 2],
    }
    return arrays | options


def test_a_case_study_marks_the_truth_in_every_line(tmp_path):
    shown = check(
        relational.draw_case(saved(tmp_path, case()), tmp_path / "a.svg"),
        "red apple", "under: both of them cost $5", "truth: green apple", "text – text",
        "average", "17. of 21", "3. of 21", "1. 0.90 ✓", "−0.50", "thing 5",
    )  # fmt: skip
    assert sum("✓" in line for line in shown) == 4  # in every line but the one where it ranks 17th


def test_long_and_strange_texts_stay_inside_a_case_study(tmp_path):
    arrays = case(query="x" * 500, relation="word " * 100, candidates=["語" * 90] * 21)
    shown = said(relational.draw_case(arrays, tmp_path / "a.svg"))
    assert max(map(len, shown)) < 60


def test_attention_shows_every_token_and_its_relation(tmp_path):
    arrays = saved(
        tmp_path,
        {
            "relations": ["both red", "same kind of thing, as far as one can say of such things"],
            "tokens": ["[start]", "red", "$", "[end]"],
            "text": [[0.1, 0.6, 0.2, 0.1], [0.25] * 4],
            "image": np.full((2, 2, 2), 0.2),
            "image_pooled": [0.2, 0.2],
            "pixels": np.zeros((8, 8, 3), np.uint8),
        },
    )
    check(
        relational.draw_attention(arrays, tmp_path / "a.svg", 0),
        "both red", "[start]", "red", "$", "[CLS] 20 %", "weight of a patch (%)",
    )  # fmt: skip
    check(relational.draw_attention(arrays, tmp_path / "b.svg", 1), "same kind of thing")


def read_runs(tmp_path, results, lines=()):
    paths = []
    for name, result in results.items():
        config = small_config(result["method"] if result else "rcml")
        paths.append(write_run(tmp_path / "runs" / name, config, result, lines))
    return read_sources(paths).runs


def test_bars_by_score(tmp_path):
    runs = read_runs(
        tmp_path, {"rcml": relational_result(base=0.5), "clip": relational_result("clip", 0.25)}
    )
    arrays = saved(tmp_path, common.by_score(runs, main_of("retrieval")), "b.csv")
    np.testing.assert_allclose(arrays["value"][:5], [0.5, 0.52, 0.54, 0.56, 0.58])
    shown = check(
        common.draw_groups(arrays, tmp_path / "a.svg", "Hit@5 (%)", 0.238),
        "Hit@5 (%)", "TT", "AVG", "rcml", "clip", "chance", "25",
    )  # fmt: skip
    assert shown.count("58") == 1


def test_bars_by_similarity_need_a_sweep(tmp_path):
    runs = read_runs(tmp_path, {"one": relational_result(similarities=("cosine", "chi_square"))})
    arrays = saved(tmp_path, common.by_similarity(runs, main_of("relation_type")), "b.csv")
    assert arrays["group"].tolist() == ["cosine", "chi-square"]
    np.testing.assert_allclose(arrays["value"], 0.58)
    with pytest.raises(LeftOutError, match=r"config\.evaluation\.similarity=all"):
        common.by_similarity(
            read_runs(tmp_path, {"other": relational_result()}), main_of("relation_type")
        )


def test_bars_of_validity_and_what_an_evaluation_lacks(tmp_path):
    (run,) = read_runs(tmp_path, {"one": relational_result(base=0.75)})
    arrays = saved(tmp_path, common.validity([run]), "b.csv")
    check(common.draw_groups(arrays, tmp_path / "a.svg", "accuracy (%)", 0.5), "linear probe", "75")
    del run.result["relation_validity"]["accuracy"]
    with pytest.raises(LeftOutError, match="lacks relation_validity/accuracy; evaluate again"):
        common.validity([run])


def test_runs_stand_beside_their_controls(tmp_path):
    runs = read_runs(
        tmp_path,
        {
            "rcml": with_controls(relational_result(base=0.5)),
            "clip": with_controls(relational_result("clip", 0.25), relation_only=0.2),
            "bare": relational_result(),
        },
    )
    arrays = saved(tmp_path, common.beside_controls(runs), "c.csv")
    columns = [arrays[name].tolist() for name in ("row", "measure", "kind", "score", "value")]
    found = {(row, measure): rest for row, measure, *rest in zip(*columns, strict=True)}
    controlled, random = (main_of(x).label for x in ("retrieval", "retrieval_random"))
    assert found["rcml", controlled] == ["run", "AVG", pytest.approx(0.58)]
    assert found["rcml", "relation validity"] == ["run", "", 0.5]
    # Of the controls that both runs have the same, one row; TT where there is no AVG.
    assert found["word overlap", random] == ["control", "TT", 0.4]
    assert found["relation only, rcml", controlled] == ["control", "AVG", pytest.approx(0.38)]
    assert found["relation only, clip", controlled] == ["control", "AVG", pytest.approx(0.28)]
    assert found["one-hot of the relation", "relation validity"] == ["control", "", 0.51]
    assert ("one-hot of the relation", controlled) not in found
    assert list(dict.fromkeys(columns[0])) == [
        "rcml", "clip", "relation only, rcml", "relation only, clip", "one-hot of the relation",
        "word overlap",
    ]  # fmt: skip
    gain = dict(zip(zip(columns[0], columns[1], strict=True), arrays["gain"], strict=True))
    assert gain["rcml", controlled] == pytest.approx(0.58 - 0.4)
    assert gain["clip", "relation validity"] == pytest.approx(0.25 - 0.51)
    assert all(np.isnan(gain[key]) == (rest[0] == "control") for key, rest in found.items())

    draw = lambda names: common.draw_controls(arrays, tmp_path / "a.svg", names)  # noqa: E731
    shown = check(
        draw([controlled, random]),
        controlled, random, "58.0 (+18.0)", "33.0 (−7.0)", "40.0 TT", "relation only, clip",
    )  # fmt: skip
    assert "one-hot of the relation" not in shown  # it answers neither of the two
    assert shown.count("38.0") == 2  # once on each set of candidates
    check(draw(["relation validity"]), "51.0", "25.0 (−26.0)", "one-hot of the relation")
    assert draw(["something else"]) is None


def test_an_evaluation_without_controls_has_none_to_show(tmp_path):
    runs = read_runs(tmp_path, {"old": relational_result()})
    with pytest.raises(
        LeftOutError, match=r"eval\.json has no controls; evaluate again: rcml-eval"
    ):
        common.beside_controls(runs)


def sweep_of(tmp_path, variants, result=relational_result, method="rcml"):
    for name, (options, bases) in variants.items():
        for seed, base in enumerate(bases):
            config = small_config(method, seed=seed, **options)
            write_run(tmp_path / "sweep" / name / f"seed{seed}", config, result(base=base))
    return read_sources([tmp_path / "sweep"]).sweeps[0]


def test_variants_have_means_and_deviations(tmp_path):
    sweep = sweep_of(
        tmp_path, {"full": ({}, [0.2, 0.4]), "none": ({"loss__negatives": "unrelated"}, [0.5])}
    )
    assert common.varied_option(sweep) is None
    arrays = saved(tmp_path, common.sweep_measures(sweep), "b.csv")
    here = arrays["measure"] == "relation validity"
    np.testing.assert_allclose(arrays["mean"][here], [0.3, 0.5])
    np.testing.assert_allclose(arrays["std"][here], [np.std([0.2, 0.4], ddof=1), 0])
    np.testing.assert_array_equal(arrays["seeds"][here], [2, 1])
    check(
        common.draw_variants(arrays, tmp_path / "a.svg"),
        "full", "none", "Hit@5 AVG", "Top-3 AVG", "relation validity", "30.0", "percent",
    )  # fmt: skip


def test_a_number_that_was_varied_is_an_axis(tmp_path):
    variants = {f"beta={b}": ({"model__beta": b}, [b / 2, b / 4]) for b in (0.0, 1.0, 0.5)}
    sweep = sweep_of(tmp_path, variants)
    option, values = common.varied_option(sweep)
    assert option == "model.beta"
    assert values == {f"beta={b}": b for b in (0.0, 1.0, 0.5)}
    arrays = saved(tmp_path, common.against_option(sweep, values), "b.csv")
    here = arrays["measure"] == "relation validity"
    np.testing.assert_allclose(arrays["option"][here], [0, 0.5, 1])
    np.testing.assert_allclose(arrays["mean"][here], [0, 3 / 16, 3 / 8])
    assert page.labels(arrays, "panel") == ["Hit@5", "other"]
    path = common.draw_against(arrays, tmp_path / "a.svg", "β", "Hit@5")
    check(path, "β", "percent", "Hit@5 AVG", "Hit@5 TT")


def test_training_curves(tmp_path):
    results = {"one": relational_result(), "two": relational_result()}
    runs = read_runs(tmp_path, results, relational_lines())
    # A kill may cut the last line.
    with (runs[0].path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "tra')
    arrays = saved(tmp_path, common.curves(runs), "c.csv")
    here = (arrays["run"] == "one") & (arrays["name"] == "loss")
    np.testing.assert_array_equal(arrays["step"][here], [2, 4, 6])
    np.testing.assert_array_equal(arrays["value"][here], [10, 8, 6])
    terms = {n for n in arrays["name"] if n.startswith("term/")}
    assert terms == {"term/tt", "term/identification"}
    draw = lambda name: common.draw_runs(arrays, tmp_path / "a.svg", name, "relational")  # noqa: E731
    check(draw("loss"), "training loss", "step", "one", "two")
    check(draw("validation"), "validation Hit@5 AVG (%)")
    check(draw("learning_rate"), "learning rate")
    check(draw("term/tt"), "term: text to text")


def test_curves_of_nothing_are_left_out(tmp_path):
    with pytest.raises(LeftOutError, match=r"metrics\.jsonl is missing or empty in one"):
        common.curves(read_runs(tmp_path, {"one": None}))


def test_classifier_terms_are_called_by_their_modality(tmp_path):
    (run,) = read_runs(tmp_path, {"m": classification_result()}, classification_lines())
    arrays = saved(tmp_path, common.curves([run]), "c.csv")
    assert set(arrays["name"]) == {"loss", "learning_rate", "validation", "term/mrna"}
    assert common.what("term/mrna", "classification") == "term: mrna classifier"


def test_classes_in_planes_of_each_part(tmp_path):
    arrays = plane(parts=["image", "fused"]) | {"class": np.arange(12) % 10}
    arrays["classes"] = [f"class {i}" for i in range(10)]
    path = classification.draw_map(saved(tmp_path, arrays), tmp_path / "a.svg", 1)
    check(path, "fused, silhouette −0.03", *(f"class {i}" for i in range(10)))


def test_many_points_hide_no_kind(tmp_path):
    """Of two kinds in one place neither is below the other, and each has its own colour."""
    from matplotlib import image

    n = 2000
    points, kinds = np.random.default_rng(0).uniform(size=(n, 2)) * 0.2, [str(i) for i in range(10)]
    arrays = plane(parts=["fused"], points=points[None]) | {
        "class": np.repeat([0, 1], n // 2),
        "classes": kinds,
    }
    saved_arrays = saved(tmp_path, arrays)
    drawn = image.imread(classification.draw_map(saved_arrays, tmp_path / "a.png", 0))[..., :3]
    share = []
    for kind in (0, 1):
        colour = page.CLASS_COLOURS[kind]
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        share.append(np.mean(np.abs(drawn - rgb).max(axis=-1) < 0.02))
    assert min(share) > 0.02
    assert 0.5 < share[0] / share[1] < 2
    assert len(set(page.CLASS_COLOURS)) == 10
    # As pixels the plane is small, whatever the number of points.
    small = classification.draw_map(saved_arrays, tmp_path / "a.svg", 0)
    assert small.stat().st_size < 200_000
    check(small, *kinds)


def test_heat_maps_have_a_line_for_each_run(tmp_path):
    arrays = {
        "runs": ["full", "only M3Co"],
        "words": ["Food", "Drink"],
        "heat": RNG.uniform(-1, 1, (2, 2, 4, 4)),
        "pixels": RNG.integers(0, 255, (2, 16, 16, 3)).astype(np.uint8),
    }
    path = classification.draw_heat(saved(tmp_path, arrays), tmp_path / "a.svg")
    check(path, "full", "only M3Co", "Food", "Drink", "image", "cosine of word and patch")


def test_histograms_of_confidence(tmp_path):
    arrays = {"run": ["a"] * 50 + ["b"] * 20, "confidence": [0.5] * 50 + [0.9] * 20}
    path = classification.draw_confidence(saved(tmp_path, arrays, "c.csv"), tmp_path / "a.svg", 0.1)
    check(path, "top softmax score", "samples (%)", "a (mean 50 %)", "b (mean 90 %)")


@pytest.mark.parametrize("epochs", [True, False])
def test_accuracy_by_epoch_or_step(tmp_path, epochs):
    x = np.arange(1.0, 5)
    arrays = {"run": ["a"] * 4, "split": ["test"] * 4, "step": 2 * x, "mean": x / 5, "std": x / 50}
    arrays |= {"epoch": x if epochs else np.full(4, np.nan), "models": [2] * 4}
    path = classification.draw_accuracy(
        saved(tmp_path, arrays, "c.csv"), tmp_path / "a.svg", "test"
    )
    shown = check(path, "test accuracy (%)", "a")
    assert ("epoch" in shown, "step" in shown) == (epochs, not epochs)


def test_upsampling_is_bilinear():
    heat = np.array([[0.0, 1.0], [2.0, 3.0]])
    found = classification.upsample(heat, (8, 8))
    assert found.shape == (8, 8)
    # Beyond the centres of the outer patches it is constant, between them linear.
    np.testing.assert_allclose(found[0], np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1))
    np.testing.assert_allclose(found[:, 0], 2 * np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1))
    np.testing.assert_allclose(classification.upsample(np.full((3, 3), 7.0), (10, 6)), 7)
    np.testing.assert_allclose(classification.upsample(np.ones((1, 1)), (4, 4)), 1)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_series_differ_in_more_than_their_colour():
    looks = [page.series(i) for i in range(8)]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 8
    assert len({look["color"] for look in looks}) == 8
    more = [page.series(i) for i in range(16)]
    assert len({(look["color"], look["linestyle"]) for look in more}) == 16
    # Nothing as pale as yellow on white.
    assert max(luminance(look["color"]) for look in looks) < 0.5


def test_texts_are_cut_to_what_fits():
    assert page.short("a  b\nc", 10) == "a b c"
    assert page.short("abcdefgh", 5) == "abcd…"
    assert page.wrap("one two three four", 8, 2).split("\n") == ["one two", "three …"]
    assert page.signed(-0.031) == "−0.03"


def test_what_is_measured_keeps_its_values_over_seeds():
    assert common.values_at({"a": {"b": measure(0.1, 0.2)}}, "a/b") == [0.1, 0.2]
    assert common.values_at({"a": {"b": 0.5}}, "a/b") == [0.5]
    assert common.values_at({"a": {}}, "a/b") == []


def test_saved_arrays_are_read_by_name(tmp_path):
    save(tmp_path / "x.npz", case())
    assert set(load(tmp_path / "x.npz")) == set(case())

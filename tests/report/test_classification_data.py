"""What is computed of classifiers: looks of training, planes, heat maps, confidence."""

import re

import jax
import numpy as np
import pytest

from rcml_jax.report import classification, page
from rcml_jax.report.page import LeftOutError
from rcml_jax.report.runs import Models, read_sources
from tests.data.imagetext import write_news
from tests.methods.m3col_data import news_config, omics_config, write_tables
from tests.report.runs import (
    classification_lines,
    classification_result,
    save_untrained,
    small_config,
    write_run,
)

MODELS, HELD_OUT = ("all-seed42", "all-seed43"), ("a", "b", "c")


def untrained(path, config):
    write_run(path, config, classification_result(), classification_lines())
    save_untrained(path, config)
    return Models().open(read_sources([path]).runs[0])


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    folder = tmp_path_factory.mktemp("news")
    return untrained(folder / "run", news_config(write_news(folder / "data")))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two seeds, each once on all of train and once without a fold."""
    folder = tmp_path_factory.mktemp("tables")
    return untrained(folder / "run", omics_config(write_tables(folder / "data")))


def test_accuracy_by_epoch_has_the_models_of_each_split(tmp_path):
    lines = classification_lines(models=MODELS, held_out=HELD_OUT)
    config = small_config("m3col", steps=0) | {"epochs": 4}
    path = write_run(tmp_path / "run", config, classification_result(), lines)
    (run,) = read_sources([path]).runs
    found = {n: np.array(x) for n, x in classification.accuracy_by_epoch([run]).items()}
    test = found["split"] == "test"
    np.testing.assert_array_equal(found["step"][test], [2, 4, 6, 8])
    np.testing.assert_allclose(found["epoch"][test], [1, 2, 3, 4])  # 8 steps are 4 epochs
    # Only the models trained on all of train are those of the test split.
    np.testing.assert_array_equal(found["models"][test], 2)
    np.testing.assert_allclose(found["mean"][test], np.array([0.2, 0.4, 0.6, 0.8]) - 0.005)
    np.testing.assert_allclose(found["std"][test], np.std([0.0, 0.01], ddof=1))
    np.testing.assert_array_equal(found["models"][~test], 3)


def test_without_epochs_the_axis_is_the_step(tmp_path):
    path = write_run(tmp_path / "r", small_config("m3col"), None, classification_lines())
    (run,) = read_sources([path]).runs
    assert np.isnan(classification.accuracy_by_epoch([run])["epoch"]).all()


def test_no_looks_no_figure(tmp_path):
    path = write_run(tmp_path / "r", small_config("m3col"), classification_result())
    with pytest.raises(LeftOutError, match=r"no metrics\.jsonl"):
        classification.accuracy_by_epoch(read_sources([path]).runs)


def first_columns(vectors):
    return vectors[:, :2]


def test_planes_of_modalities_and_fused(tables, monkeypatch):
    monkeypatch.setattr(classification, "umap", first_columns)
    arrays = classification.embedding_map(tables, seed=0)
    assert arrays["parts"] == ["mrna", "methylation", "mirna", "fused"]
    assert arrays["points"].shape == (4, 20, 2)
    data = tables.method.task.data
    rows = data.rows("test")
    np.testing.assert_array_equal(arrays["row"], rows)
    assert [arrays["classes"][c] for c in arrays["class"]] == [
        data.label_names[label] for label in data.labels[rows]
    ]
    # Fused are the embeddings in a row, of the first model that is reported.
    embedded = tables.method.embeddings(tables.params, rows)
    np.testing.assert_allclose(arrays["points"][0], embedded["mrna"][0, :, :2], atol=1e-5)
    np.testing.assert_allclose(arrays["points"][3], arrays["points"][0])


def test_one_class_is_nothing_to_part(tables, monkeypatch):
    data = tables.method.task.data
    monkeypatch.setitem(data.__dict__, "labels", np.zeros_like(data.labels))
    with pytest.raises(LeftOutError, match="one class only"):
        classification.embedding_map(tables, seed=0)


def test_few_samples_have_no_umap(news):
    with pytest.raises(LeftOutError, match="needs more than 15 samples"):
        classification.embedding_map(news, seed=0)


def test_umap_is_left_out_where_it_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(LeftOutError, match=r"umap-learn cannot be imported .*plots"):
        page.umap(np.eye(40))


@pytest.mark.slow  # compiles for half a minute
def test_umap_keeps_far_things_apart():
    pytest.importorskip("umap")
    far = np.eye(3)[np.arange(60) % 3] + np.random.default_rng(0).normal(0, 0.05, (60, 3))
    points = page.umap(far)
    assert points.shape == (60, 2)
    assert page.silhouette(points - points.mean(axis=0), np.arange(60) % 3) > 0.5


@pytest.mark.parametrize("projection", [0, 8])
def test_heat_maps_are_cosines_of_words_and_patches(projection, tmp_path):
    config = news_config(write_news(tmp_path / "data"), model__projection=projection)
    news = untrained(tmp_path / "run", config)
    rows = classification.drawn_samples(news, seed=0)
    data, task = news.method.task.data, news.method.task
    assert len(set(data.labels[rows])) == len(rows) == 3
    found = classification.heat_maps(news, rows)
    assert [x["class"] for x in found] == [data.label_names[label] for label in data.labels[rows]]
    for x in found:
        assert x["words"] == [x["class"]]
        assert x["heat"].shape == (1, 2, 2)
        assert np.abs(x["heat"]).max() <= 1 + 1e-5
    # One of them by the model itself, token by token.
    module, params = news.method.model, {"params": news.params}

    def states(name, *inputs):
        look = lambda m, x: m.encoders[name].tokens(*x)  # noqa: E731
        found = np.asarray(jax.jit(lambda p, x: module.apply(p, x, method=look))(params, inputs))
        return found @ news.params[f"projections_{name}"]["kernel"] if projection else found

    patches = states("image", found[0]["pixels"][None])[0, 1:]
    ids, mask = task.tokenizer.encode([found[0]["class"]], task.max_length)
    word = states("text", ids, mask)[0, 1 : mask.sum() - 1].mean(axis=0)
    cosine = patches @ word / np.linalg.norm(patches, axis=1) / np.linalg.norm(word)
    np.testing.assert_allclose(found[0]["heat"].ravel(), cosine, atol=1e-5)


def test_tables_have_no_words_over_images(tables):
    with pytest.raises(LeftOutError, match="has not an image and a text"):
        classification.drawn_samples(tables, seed=0)


@pytest.mark.parametrize(
    ("towers", "reason"),
    [
        ("efficientnet-lite0+minilm", "embeddings of frozen towers, .*towers=none"),
        ("", "no run has an image and a text of each sample"),
    ],
)
def test_the_page_says_why_it_has_no_heat_maps(towers, reason, tmp_path):
    result = classification_result()
    result["protocol"]["modalities"] = {"image": "table", "text": "table"}
    write_run(
        tmp_path / "run", small_config("m3col", data__towers=towers, batch__image_shift=0), result
    )
    runs = read_sources([tmp_path / "run"]).runs
    work = classification._Figures(page.Folder(tmp_path), runs, Models(), 0)
    (figure,) = work.heat_maps()
    assert re.search(reason, figure.left_out)


def test_the_page_says_which_model_has_no_heat_maps(tmp_path):
    """Its modalities are not known, and it cannot be opened."""
    write_run(tmp_path / "run", small_config("m3col"))
    runs = read_sources([tmp_path / "run"]).runs
    work = classification._Figures(page.Folder(tmp_path), runs, Models(), 0)
    (figure,) = work.heat_maps()
    assert re.search("the model of run cannot be opened: .* no checkpoints", figure.left_out)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("Animals & Nature", ["Animals", "Nature"]),
        ("apple_pie", ["apple", "pie"]),
        ("one two three four", ["one", "two", "three"]),
        ("&", ["&"]),
    ],
)
def test_words_of_class_names(label, words):
    assert classification.class_words(label) == words


def test_confidence_is_that_of_every_reported_model(tables):
    found = classification.noise_confidence(tables)
    data = tables.method.task.data
    assert found.shape == (2 * len(data.rows("test")),)
    assert (found >= 1 / data.classes - 1e-6).all()
    assert (found <= 1).all()

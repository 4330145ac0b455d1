"""What is computed of a relational run, on an untrained model of the toy catalogue."""

import dataclasses

import jax
import numpy as np
import pytest

from rcml_jax.report import relational
from rcml_jax.report.page import PERPLEXITY, Folder, LeftOutError, load, silhouette, tsne, umap
from rcml_jax.report.runs import BATCH, Models, Run, _rows, cost, measure, parameters


def with_graph(opened, **changes):
    """The same run on a changed graph."""
    task = opened.method.task
    graph = dataclasses.replace(task.graph, **changes)
    method = type("Changed", (), {"task": dataclasses.replace(task, graph=graph)})
    return opened._replace(method=method)


def test_items_are_of_the_most_frequent_kinds(opened):
    items = relational.chosen_items(opened, seed=0)
    graph = opened.method.task.graph
    kinds = graph.labels[items]
    every = graph.labels[opened.method.task.splits.items("test")]
    counts = np.sort(np.bincount(every))[::-1]
    assert len(np.unique(kinds)) == relational.KINDS
    assert sorted(np.bincount(kinds)[np.unique(kinds)])[::-1] == counts[:6].tolist()
    np.testing.assert_array_equal(items, np.sort(items))
    np.testing.assert_array_equal(items, relational.chosen_items(opened, seed=0))


@pytest.mark.parametrize("label", [0, -1])
def test_one_kind_is_nothing_to_colour_by(opened, label):
    same = np.full(len(opened.method.task.graph), label, np.int32)
    with pytest.raises(LeftOutError, match=r"fewer than two kinds .* give the items labels"):
        relational.chosen_items(with_graph(opened, labels=same), seed=0)


def test_the_relation_is_that_with_most_pairs_or_the_one_asked_for(opened):
    task = opened.method.task
    chosen = relational.chosen_relation(opened, "")
    counts = np.bincount(task.splits.pairs("test")[:, 2])
    assert counts[chosen] == counts.max()
    assert task.graph.relations[relational.chosen_relation(opened, "BOTH kind1")] == "both kind1"
    with pytest.raises(LeftOutError, match="is in 0 sentences"):
        relational.chosen_relation(opened, "colour of money")
    with pytest.raises(LeftOutError, match="is in 22 sentences"):
        relational.chosen_relation(opened, "both")


def test_the_same_items_of_two_runs(opened, opened_clip):
    assert relational.same_items(opened, opened_clip)
    items = relational.chosen_items(opened, seed=0)
    if len(items) <= PERPLEXITY:
        items = opened.method.task.splits.items("test")
    tables = [relational.table_of(run, items) for run in (opened, opened_clip)]
    arrays = relational.embedding_map([opened, opened_clip], tables, items, 3)
    assert arrays["points"].shape == (2, len(items), 2)
    assert np.isfinite(arrays["points"]).all()
    graph = opened.method.task.graph
    for kind, item in zip(arrays["kind"], items, strict=True):
        assert arrays["kinds"][kind] == graph.label_names[graph.labels[item]]
    # The silhouette is that of the averaged embeddings under the relation.
    rows = tables[0].rows(items)
    both = tables[0].text[3, rows] + tables[0].image[3, rows]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    assert arrays["silhouette"][0] == pytest.approx(
        slow_silhouette(both, graph.labels[items]), abs=1e-4
    )
    # CLIP's does not depend on the relation.
    assert arrays["silhouette"][1] == pytest.approx(arrays["mean_silhouette"][1])
    with pytest.raises(LeftOutError, match="needs more than 30 items"):
        relational.embedding_map([opened], tables[:1], items[:30], 3)


def slow_silhouette(x, labels):
    """Rousseeuw's, by cosine distance: the mean of (b − a) / max(a, b)."""
    distance = 1 - x @ x.T
    values = []
    for i, label in enumerate(labels):
        own = (labels == label) & (np.arange(len(x)) != i)
        if not own.any():
            values.append(0.0)
            continue
        a = distance[i, own].mean()
        b = min(distance[i, labels == k].mean() for k in set(labels) - {label})
        values.append((b - a) / max(a, b))
    return np.mean(values)


def test_silhouettes_and_planes_of_degenerate_embeddings():
    x = np.eye(4)[[0, 0, 1, 1]]
    assert silhouette(x, np.array([0, 0, 1, 1])) == pytest.approx(1)
    assert np.isnan(silhouette(x, np.zeros(4)))
    assert np.isnan(silhouette(x, np.arange(4)))
    # On equal rows scikit-learn would end the whole process.
    for plane in (tsne, umap):
        with pytest.raises(LeftOutError, match="the model has collapsed"):
            plane(np.ones((40, 4), np.float32))
        with pytest.raises(LeftOutError, match="the training has diverged"):
            plane(np.full((40, 4), np.nan))


def test_case_studies_are_ranked_as_the_evaluation_ranks(opened):
    task = opened.method.task
    places = relational.drawn_queries(opened, seed=0)
    items = relational.items_of_queries(opened, places)
    table = relational.table_of(opened, items)
    cases = relational.case_studies(opened, table, places)
    outcomes = [case["outcome"] for case in cases]
    assert outcomes == sorted(outcomes, reverse=True)  # successes first
    assert max(outcomes.count(o) for o in set(outcomes)) <= relational.CASES
    queries = task.retrieval_queries("test")
    for case in cases:
        rank = dict(zip(case["scores"], case["rank"], strict=True))
        assert (rank["avg"] <= 3) == (case["outcome"] == "success")
        assert case["drawn"] == len(places)
        assert 1 <= min(case["rank"]) <= max(case["rank"]) <= len(case["candidates"])
        for order, score, found in zip(case["order"], case["score"], case["rank"], strict=True):
            assert list(score) == sorted(score, reverse=True)
            assert (0 in order) == (found <= 3)
            if 0 in order:
                assert list(order).index(0) == found - 1
        assert case["images"].shape == (len(case["candidates"]), 96, 96, 3)
    # The text-text scores of the first case are the cosines of the table's embeddings.
    first = cases[0]
    row = next(
        p for p in places
        if task.graph.texts[queries.query[p]] == first["query"]
        and [task.graph.texts[i] for i in queries.candidates[p]] == first["candidates"]
        and task.sentences[queries.relation[p]] == first["relation"]
    )  # fmt: skip
    text = table.text[queries.relation[row]]
    a = text[table.rows(queries.query[row : row + 1])]
    cosine = (text[table.rows(queries.candidates[row])] @ a.T)[:, 0]
    np.testing.assert_allclose(first["score"][0], np.sort(cosine)[::-1][:3], atol=1e-5)


def test_attention_is_the_heads_own(opened):
    arrays = relational.attention(opened, seed=0)
    total = arrays["image"].sum(axis=(1, 2)) + arrays["image_pooled"]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    np.testing.assert_allclose(arrays["text"].sum(axis=1), 1, atol=1e-5)
    assert arrays["image"].shape[1:] == (2, 2)  # 16 pixels, patches of 8
    assert arrays["tokens"][0] == "[start]"
    assert arrays["tokens"][-1] == "[end]"
    assert "".join(arrays["tokens"][1:-1]).replace(" ", "") == arrays["item"].replace(" ", "")
    # Pooling the tokens with these weights gives the model's own embedding.
    method, params = opened.method, opened.params
    task = method.task
    item = task.graph.texts.index(arrays["item"])
    relation = task.sentences.index(arrays["relations"][0])
    table = method.tables(params, np.array([item]))["relation"]
    variables = {"params": {name: params[name] for name in ("towers", "head")}}
    look = lambda m, ids: m.towers.text_states(ids)  # noqa: E731
    states = jax.jit(lambda v, ids: method.model.apply(v, ids, method=look))(
        variables, task.encode([arrays["item"]])
    )
    pooled = arrays["text"][0] @ np.asarray(states.states)[0, : len(arrays["tokens"])]
    pooled = pooled @ np.asarray(params["head"]["value"]).T @ np.asarray(params["head"]["output"])
    expected = pooled / np.linalg.norm(pooled)
    np.testing.assert_allclose(table.text[relation, 0], expected, atol=1e-4)


def test_a_baseline_has_no_pooling_head(opened_clip):
    with pytest.raises(LeftOutError, match="has no pooling head"):
        relational.attention(opened_clip, seed=0)


@pytest.fixture
def twice(monkeypatch):
    """Calls that are measured twice; RCML under one relation alone."""
    monkeypatch.setattr("rcml_jax.report.runs.REPEATS", 2)
    monkeypatch.setattr("rcml_jax.report.runs.RELATIONS", 1)


def ordered(found):
    times = (found[name] for name in ("fastest", "milliseconds", "slowest"))
    return all(0 < low <= mid <= high for low, mid, high in zip(*times, strict=True))


def test_cost_of_rcml_alone_is_beside_its_own_towers(opened, twice):
    found = cost([opened])
    assert found["model"] == ["rcml, CLIP's pooling", "rcml, 1 relation"]
    assert found["method"] == ["towers alone", "rcml"]
    towers = parameters(opened.params["towers"])
    assert found["used"] == [towers, towers + 4 * 16**2]
    np.testing.assert_array_equal(found["trained"], [np.nan, towers + 4 * 16**2])
    assert ordered(found)
    assert found["relative"][0] == 1


def test_cost_of_every_method_on_the_same_towers(
    opened, opened_clip, opened_siglip, opened_declip, twice
):
    runs = [opened, opened_clip, opened_siglip, opened_declip]
    found = cost(runs)
    assert found["model"] == ["rcml, 1 relation", "clip", "siglip", "declip"]
    assert found["method"] == ["rcml", "clip", "siglip", "declip"]
    towers = parameters(opened.params["towers"])
    assert found["used"] == [towers + 4 * 16**2, towers, towers, towers]
    heads = sum(parameters(opened_declip.params[name]) for name in ("simsiam", "token_head"))
    assert heads > 16**2
    # SigLIP's bias and DeCLIP's heads are trained, but nothing is embedded by them.
    assert found["trained"] == [towers + 4 * 16**2, towers, towers + 1, towers + heads]
    assert ordered(found)
    assert found["relative"][1] == 1
    assert found["relative"][0] > 0


def test_other_towers_have_a_measure_of_their_own(opened, opened_clip, opened_frozen, twice):
    found = cost([opened_clip, opened_frozen])
    assert found["model"] == ["clip", "frozen, CLIP's pooling", "frozen, 1 relation"]
    assert found["relative"][:2] == [1, 1]
    towers = opened_frozen.params["towers"]
    frozen = parameters(towers["text_model"]) + parameters(towers["text_projection"])
    assert frozen > 16**2
    assert found["used"][2] == parameters(towers) + 4 * 16**2
    assert found["trained"][2] == found["used"][2] - frozen


def test_one_table_of_cost_for_the_runs_whose_models_differ(opened, opened_clip, twice, tmp_path):
    configs = [opened.run.config.copy_and_resolve_references() for _ in range(2)]
    configs[0].seed, configs[1].model.beta = 7, 0.25
    runs = [opened.run, opened_clip.run, Run("other seed", opened.run.path, configs[0], None)]
    runs.append(Run("lost", tmp_path, configs[1], None))
    work = relational._Models(Folder(tmp_path), runs[0], runs[1:], Models(), 0)
    figure = work.cost()
    assert [row[0] for row in figure.table.rows] == ["rcml, 1 relation", "clip"]
    assert figure.table.rows[1][-1] == "1.00"
    assert load(figure.data[0])["model"].tolist() == ["rcml, 1 relation", "clip"]
    assert "Left out: other seed has the same model as rcml." in figure.caption
    assert "Left out: the model of lost cannot be opened" in figure.caption
    with pytest.raises(LeftOutError, match="the model of lost cannot be opened"):
        relational._Models(Folder(tmp_path), runs[3], [], Models(), 0).cost()


def test_calls_embed_as_the_methods_do(opened, opened_clip):
    for run in (opened, opened_clip):
        *_, row = _rows(run)
        out = row.call()
        items = np.resize(run.method.task.splits.items("test"), BATCH)
        table = next(iter(run.method.tables(run.params, np.unique(items)).values()))
        # The last row of RCML embeds under its first relations.
        text = out["text"][:, 0] if run is opened else out["text"]
        image = out["image"][:, 0] if run is opened else out["image"]
        rows = table.rows(items)
        np.testing.assert_allclose(text, table.text[0, rows], atol=1e-4)
        np.testing.assert_allclose(image, table.image[0, rows], atol=1e-4)


def test_functions_are_measured_in_turn():
    called = []
    functions = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = measure(functions, 3)
    assert called == ["a", "b"] + ["a", "b"] * 3  # the first call of each compiles
    assert {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3}


def test_a_run_without_checkpoint_has_no_model(rcml_dir, opened, tmp_path):
    run = Run("rcml", tmp_path, opened.run.config, None)
    models = Models()
    for _ in range(2):  # the reason is kept, the data are not read again
        with pytest.raises(
            LeftOutError, match=r"the model of rcml cannot be opened: .* no checkpoints"
        ):
            models.open(run)

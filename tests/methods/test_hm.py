"""RCML and CLIP on a made-up copy of H&M's files, from the command line's option to scores."""

import jax
import numpy as np
import pytest

from rcml_jax.cli.commands import load_config_file
from rcml_jax.data.stages import HERE
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.tasks.relations import RelationTask, load_graph
from tests.data.hm_copy import GROUPS, write_copy
from tests.toy import CONFIG, TINY


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("hm") / "copy", products=20)


def tiny(copy, **options):
    config = load_config_file(f"{CONFIG}:hm,path={copy}")
    values = TINY | {
        "data.dir": str(copy / "cache"),
        "data.disjoint": "item",
        "data.clusters": GROUPS,
        "model.max_length": 48,
    }
    config.update_from_flattened_dict(values | options)
    return config


@pytest.mark.parametrize("method", [pytest.param("rcml", marks=pytest.mark.slow), "clip"])
def test_unseen_products_are_scored(copy, tmp_path, method):
    method = build(tiny(copy, method=method), tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    method.validate(params)
    result = method.evaluate(params)
    assert result["dataset"] == "hm"
    assert result["protocol"]["disjoint"] == "item"
    assert 0 < result["retrieval"]["hit@5"]["avg"] <= 1
    assert 0 < result["relation_type"]["top3"]["avg"] <= 1
    assert 0 < result["retrieval_all"]["chance"]["map"]["avg"] < 1


def test_no_candidate_and_no_wrong_relation_is_true_by_an_attribute(copy, tmp_path):
    """Only some pairs of a respect are drawn; what the others link is no wrong answer."""
    task = RelationTask.load(
        tiny(copy, **{"data.pairs_per_respect": 300, "data.queries": 200}), tmp_path
    )
    graph, drawn = task.graph, {tuple(row) for row in task.graph.pairs.tolist()}
    queries = task.retrieval_queries("train", "random")
    wrong = queries.candidates[:, 1:]
    assert not graph.linked(queries.query[:, None], wrong, queries.relation[:, None]).any()
    found = task.relation_queries("train")
    linked = graph.linked(found.a[:, None], found.b[:, None], found.relations)
    assert linked[:, 0].all()
    assert not linked[:, 1:].any()
    examples = task.validity_examples("train")
    holds = graph.linked(examples.a, examples.b, examples.relation)
    np.testing.assert_array_equal(holds, examples.label == 1)
    # There are links that were not drawn, which these would otherwise hit.
    every = np.arange(len(graph))
    links = sum(graph.agree(every[:, None], every, r).sum() for r in graph.respects)
    assert links > 5 * len(drawn)


def test_what_the_source_is_loaded_with(copy, tmp_path, monkeypatch):
    from rcml_jax.data.sources import hm

    given = []
    graph = load_graph(tiny(copy).data)
    monkeypatch.setattr(hm, "load", lambda *args, **options: given.append((args, options)) or graph)
    config = load_config_file(f"{CONFIG}:hm,path=raw")
    config.data.dir = str(tmp_path)
    load_graph(config.data)
    ((args, options),) = given
    assert args == (tmp_path, "raw")
    assert options.pop("runner") == HERE
    defaults = {name: getattr(hm, name.upper()) for name in options if name != "strict"}
    assert options == {"strict": False} | defaults
    assert set(defaults) > {"clusters", "min_purchases", "pairs_per_respect"}


def test_without_a_path(tmp_path):
    config = load_config_file(f"{CONFIG}:hm")
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError, match=r"rcml:hm,path=DIRECTORY"):
        load_graph(config.data)

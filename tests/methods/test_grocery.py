"""RCML and CLIP on a made-up copy of the Grocery Store photographs, from files to scores."""

import functools
import json
import operator

import jax
import numpy as np
import pytest

from rcml_jax.cli.commands import load_config_file
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.tasks.relations import RelationTask, load_graph
from tests.data.grocery_copy import PRODUCTS, write_copy
from tests.toy import CONFIG, TINY

COUNTS = {"train": 6, "val": 8, "test": 6}
SCORES = ("tt", "ii", "ti", "it", "avg")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("grocery") / "copy", COUNTS)


def tiny(copy, **options):
    config = load_config_file(f"{CONFIG}:grocery,path={copy}")
    values = TINY | {"data.dir": str(copy / "cache"), "model.max_length": 48} | options
    config.update_from_flattened_dict(values)
    return config


@pytest.mark.parametrize("method", [pytest.param("rcml", marks=pytest.mark.slow), "clip"])
def test_the_official_test_split_is_scored(copy, tmp_path, method):
    method = build(tiny(copy, method=method), tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    value = functools.reduce(operator.getitem, method.selection.split("/"), method.validate(params))
    assert method.selection == "retrieval_all/map/it"
    assert 0 < value < 1
    result = method.evaluate(params)
    assert json.loads(json.dumps(result)) == result
    assert method.selection in result["protocol"]["selection"]
    assert result["dataset"] == "grocery"
    assert result["protocol"]["disjoint"] == "declared item"
    assert result["protocol"]["items"] == len(PRODUCTS) * COUNTS["test"]
    found = result["retrieval_all"]
    assert found["gallery"] == {"items": len(PRODUCTS) * COUNTS["test"], "texts": len(PRODUCTS)}
    # Photographs ask each for themselves, texts once under each relation.
    assert 0 < found["queries"]["tt"] < found["queries"]["ti"] < found["queries"]["ii"] <= 40
    assert found["queries"]["it"] == found["queries"]["ii"] == found["queries"]["avg"]
    for measure in ("hit@5", "r_precision", "map"):
        for rates in (found[measure], found["chance"][measure]):
            assert tuple(rates) == SCORES
            assert all(0 <= rate <= 1 for rate in rates.values())
    if "variants" in result:
        scored = [variant["retrieval_all"] for variant in result["variants"].values()]
        assert scored[0] != scored[1]
        assert found["map"]["avg"] == max(variant["map"]["avg"] for variant in scored)


def test_photographs_of_a_product_are_not_each_others_negatives(copy, tmp_path):
    task = RelationTask.load(tiny(copy), tmp_path)
    batches = task.batches()
    for _ in range(3):
        batch = next(batches)
        shared = batch["shared"]
        same = shared["labels"][:, None] == shared["labels"]
        assert same.sum() > len(same)
        assert shared["related"][same].all()
        assert not shared["related"].all()
        # Wider relations that were not drawn leave negatives to learn from.
        rows, columns = np.nonzero(~shared["related"])
        assert np.any(shared["labels"][rows] != shared["labels"][columns])
    queries = task.retrieval_queries("test")
    texts = np.array(task.graph.texts)
    assert not np.any(texts[queries.candidates[:, 1:]] == texts[queries.query][:, None])


def test_what_the_sources_are_loaded_with(copy, tmp_path, monkeypatch):
    from rcml_jax.data.sources import amazon
    from rcml_jax.data.stages import Runner

    given = []
    graph = load_graph(tiny(copy).data)
    monkeypatch.setattr(
        amazon, "load", lambda *args, **options: given.append((args, options)) or graph
    )
    config = load_config_file(f"{CONFIG}:amazon,domain=Baby_Products,path=raw,pretrained=none")
    config.data.dir = str(tmp_path)
    load_graph(config.data)
    ((args, options),) = given
    assert args == (tmp_path, "Baby_Products")
    caps = {"clusters": 10, "pairs_per_user": 10, "pairs_per_item": 50}
    assert (
        options
        == {"path": "raw", "strict": False, "runner": Runner.from_config(config.data)} | caps
    )
    config.data.name = "amazons"
    with pytest.raises(UserError, match="choose one of openmoji, folder, grocery, amazon"):
        load_graph(config.data)

"""How often something is compiled: a step once for each text length, an evaluation once."""

import contextlib
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.data.packing import LENGTHS
from rcml_jax.methods import build as build_method
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs
from tests.methods.m3col_data import omics_config, write_tables
from tests.toy import tiny_config, write_catalogue, write_rows

STEPS = 30
_COMPILING = re.compile(r"Compiling (\S+)")


@contextlib.contextmanager
def compiled():
    """The names of what is compiled meanwhile, operations outside of any jit included."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            names.extend(_COMPILING.findall(record.getMessage()))

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


def test_the_count_counts():
    doubled = jax.jit(lambda x: 2 * x)
    inputs = [jnp.zeros(n) for n in (3, 4, 3, 5)]
    with compiled() as names:
        for x in inputs:
            doubled(x)
    assert len(names) == doubled._cache_size() == 3


@pytest.fixture(scope="module")
def catalogue_of_lengths(tmp_path_factory):
    """The toy catalogue with texts of 3 to 30 words; a long one is in about half of the batches."""
    folder = write_catalogue(tmp_path_factory.mktemp("lengths") / "catalogue")
    path = folder / "items.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    rng = np.random.default_rng(0)
    for place, item in enumerate(items):
        words = rng.integers(22, 29) if place % 20 == 0 else rng.integers(1, 6)
        item["text"] += " more" * int(words)
    write_rows(path, items)
    return folder


@pytest.fixture(scope="module")
def run(catalogue_of_lengths, tmp_path_factory):
    """A run that was stopped after thirty steps, and the text lengths that it saw."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    options = {"steps": 2 * STEPS, "log_every": 10, "validate_every": 2 * STEPS}
    config = tiny_config(catalogue_of_lengths, model__max_length=48, **options)
    workdirs.prepare(workdir, config)
    method = build_method(config, workdir)
    run = loop.Run(config, workdir, method, sharding.build("jit", sharding.pick_devices("cpu", 1)))
    lengths, step_at = [], run.step_at

    def stepping(step):
        def one(state, batch):
            lengths.append(
                (batch["items"]["ids"].shape[1], batch["shared"]["relation_ids"].shape[1])
            )
            interrupt.asked = step + 1 == STEPS
            return step_at(step)(state, batch)

        return one

    run.step_at = stepping
    with loop.Interrupt() as interrupt:
        run.train(interrupt)
    return run, lengths


def test_a_step_is_compiled_once_for_each_text_length(run):
    run, lengths = run
    assert len(lengths) == STEPS
    ((_, step),) = run.phases
    # Of items and of relation sentences: one of the few lengths, whatever the texts are.
    assert {length for pair in lengths for length in pair} <= {*LENGTHS, 48}
    assert 1 < len({items for items, _ in lengths}) <= 4
    assert step._cache_size() == len(set(lengths))


def test_a_second_evaluation_compiles_nothing(run):
    run, _ = run
    params = run.devices.local(run.state.params)
    more = jax.tree.map(lambda x: x + 0.01, params)
    for call in (run.method.validate, lambda p: run.method.evaluate(p, "test", [])):
        with compiled() as names:
            first = call(params)
        assert names
        with compiled() as names:
            second = call(more)
        assert names == []
        assert first != second


def test_neither_does_one_of_several_classifiers(tmp_path):
    config = omics_config(write_tables(tmp_path / "data"), data__folds=0)
    workdirs.prepare(tmp_path / "run", config)
    method = build_method(config, tmp_path / "run")
    params = method.init(jax.random.key(0), next(method.batches()))
    method.validate(params)
    with compiled() as names:
        method.validate(params)
    assert names == []

"""Latency and parameters of the relational methods, measured when a report is made."""

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.report.models import Opened
from rcml_jax.similarity import l2_normalize

BATCH, REPEATS, RELATIONS = 64, 15, 10


class _Row(NamedTuple):
    """One way to embed: its call, its parameters (those trained: NaN if no run), and its setting.

    Rows of one setting have towers and inputs of the same shapes.
    """

    name: str
    method: str
    call: Callable[[], Any]
    used: float
    trained: float
    setting: Any


def cost(runs: Sequence[Opened]) -> dict[str, Any]:
    """Columns model, method, used, trained, milliseconds, fastest, slowest, relative and more.

    A sample is one item, text and picture; a call embeds a batch of test items as the run's method
    does it. Times are a sample's: median, fastest and slowest call. RCML embeds under one relation
    and under several, and its call encodes their sentences. All calls are made in turn, so that a
    slow moment falls on all of them. used: parameters that embed; trained: those that training
    changes, also where only the loss uses them. relative: median ratio to the time in the same turn
    of the towers alone, which are a baseline's, or RCML's with CLIP's pooling without a baseline.
    """
    rows = [row for opened in runs for row in _rows(opened)]
    plain = [row.setting for row in rows if row.method not in ("rcml", "")]
    rows = [row for row in rows if row.method or row.setting not in plain]
    times = measure({place: row.call for place, row in enumerate(rows)}, REPEATS)
    per_sample = [1e3 * times[place] / BATCH for place in range(len(rows))]
    alone: dict[Any, np.ndarray] = {}
    for row, value in zip(rows, per_sample, strict=True):
        if row.method != "rcml":
            alone.setdefault(row.setting, value)
    return {
        "model": [row.name for row in rows],
        "method": [row.method or "towers alone" for row in rows],
        "used": [row.used for row in rows],
        "trained": [row.trained for row in rows],
        "milliseconds": [float(np.median(x)) for x in per_sample],
        "fastest": [float(np.min(x)) for x in per_sample],
        "slowest": [float(np.max(x)) for x in per_sample],
        "relative": [
            float(np.median(x / alone[row.setting]))
            for row, x in zip(rows, per_sample, strict=True)
        ],
        "batch": [BATCH] * len(rows),
        "repeats": [REPEATS] * len(rows),
        "machine": [machine()] * len(rows),
    }


def _rows(opened: Opened) -> Iterator[_Row]:
    """The run's ways to embed the same batch of test items; RCML's towers alone have no method."""
    method, task, params = opened.method, opened.method.task, opened.params
    label, name = opened.run.label, opened.run.config.method
    items = np.resize(task.splits.items("test"), BATCH)
    ids = jnp.asarray(task.encode([task.graph.texts[i] for i in items]))
    pixels = jnp.asarray(task.images(items))
    shapes = jax.tree.map(jnp.shape, (params["towers"], ids, pixels))
    setting = repr((str(method.dtype), shapes))
    towers, trained = parameters(params["towers"]), trained_parameters(method, params)
    if not hasattr(type(method.model), "pool_text"):
        embed = jax.jit(lambda p, *inputs: method.model.apply({"params": p}, *inputs))
        call = functools.partial(embed, params["towers"], ids, pixels)
        yield _Row(label, name, call, towers, trained, setting)
        return

    def own(module: Any, ids: jax.Array, pixels: jax.Array) -> tuple:
        states = module.towers.text_states(ids), module.towers.image_states(pixels)
        return tuple(l2_normalize(x.pooled) for x in states)

    variables = {"params": {name: params[name] for name in ("towers", "head")}}
    alone = jax.jit(lambda *inputs: method.model.apply(*inputs, method=own))
    call = functools.partial(alone, variables, ids, pixels)
    yield _Row(f"{label}, CLIP's pooling", "", call, towers, np.nan, setting)
    embed, used = jax.jit(method.model.apply), parameters(variables)
    for count in sorted({1, min(RELATIONS, len(task.sentences))}):
        relation = jnp.asarray(task.encode(task.sentences[:count]))
        call = functools.partial(embed, variables, relation, ids, pixels)
        said = f"{label}, {count} relation{'s' * (count > 1)}"
        yield _Row(said, name, call, used, trained, setting)


def measure(functions: Mapping[Any, Callable], repeats: int) -> dict[Any, np.ndarray]:
    """Seconds (repeats,) of each function, called in turn; the first call, which compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in times.items()}


def parameters(tree: Any) -> int:
    """The number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def trained_parameters(method: Any, params: Any) -> int:
    """The number of parameters that training changes: all but frozen towers and statistics."""
    frozen = jax.tree.leaves(method.frozen(params))
    leaves = jax.tree.leaves(params)
    return sum(int(np.size(x)) for x, f in zip(leaves, frozen, strict=True) if not f)


def machine() -> str:
    """What computed: the device, and of a CPU its architecture and the cores at hand."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} core{'s' * (cores != 1)}"

"""Latency and parameters of RCML and of CLIP on the same towers, measured when a report is made."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.report.arrays import LeftOutError
from rcml_jax.report.models import Opened
from rcml_jax.similarity import l2_normalize

BATCH, REPEATS, RELATIONS = 64, 15, 10


def cost(opened: Opened) -> dict[str, Any]:
    """Columns model, parameters, milliseconds a sample (median, fastest, slowest), and the setting.

    A sample is one item, text and picture; a call embeds a batch of test items. CLIP is the run's
    own towers with CLIP's pooling. RCML's relation sentences are encoded in the call. The calls are
    made in turn, so that a slow moment falls on all of them. Raises LeftOutError for a method
    without a pooling head.
    """
    method = opened.method
    if not hasattr(type(method.model), "pool_text"):
        raise LeftOutError(
            f"{opened.run.label} has no pooling head to be compared with CLIP; give the work "
            "directory of RCML"
        )
    functions = _functions(opened)
    times = measure(functions, REPEATS)
    towers = parameters(opened.params["towers"])
    per_sample = {name: 1e3 * x / BATCH for name, x in times.items()}
    return {
        "model": list(functions),
        "parameters": [
            towers + (0 if name.startswith("CLIP") else parameters(opened.params["head"]))
            for name in functions
        ],
        "milliseconds": [float(np.median(x)) for x in per_sample.values()],
        "fastest": [float(np.min(x)) for x in per_sample.values()],
        "slowest": [float(np.max(x)) for x in per_sample.values()],
        "batch": [BATCH] * len(functions),
        "repeats": [REPEATS] * len(functions),
        "machine": [machine()] * len(functions),
    }


def _functions(opened: Opened) -> dict[str, Callable[[], Any]]:
    """The calls by name, each compiled for the same batch of test items."""
    method, task = opened.method, opened.method.task
    items = np.resize(task.splits.items("test"), BATCH)
    ids = jnp.asarray(task.encode([task.graph.texts[i] for i in items]))
    pixels = jnp.asarray(task.images(items))
    variables = {"params": {name: opened.params[name] for name in ("towers", "head")}}

    def own(module: Any, ids: jax.Array, pixels: jax.Array) -> tuple:
        states = module.towers.text_states(ids), module.towers.image_states(pixels)
        return tuple(l2_normalize(x.pooled) for x in states)

    clip = jax.jit(lambda v, ids, pixels: method.model.apply(v, ids, pixels, method=own))
    rcml = jax.jit(lambda v, r, ids, pixels: method.model.apply(v, r, ids, pixels))
    functions = {"CLIP": lambda: clip(variables, ids, pixels)}
    for count in sorted({1, min(RELATIONS, len(task.sentences))}):
        relation = jnp.asarray(task.encode(task.sentences[:count]))
        name = f"RCML, {count} relation{'s' * (count > 1)}"
        functions[name] = lambda relation=relation: rcml(variables, relation, ids, pixels)
    return functions


def measure(functions: Mapping[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """Seconds (repeats,) of each function, called in turn; the first call, which compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in times.items()}


def parameters(tree: Any) -> int:
    """The number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def machine() -> str:
    """What computed: the device, and of a CPU its architecture and the cores at hand."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} core{'s' * (cores != 1)}"

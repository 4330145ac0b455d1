"""Alternating timing: what is compared runs in turn, so that a loaded machine slows all of it."""

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Times = dict[str, np.ndarray]
_SPREAD = ("median", "p10", "p90")


def machine() -> dict:
    """What the figures were measured on, the load at the start included."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def alternate(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2, pause: float = 0.0
) -> Times:
    """Seconds of every function in each of `repeats` rounds, in an order drawn anew each round.

    The functions return arrays, which are waited for. `warmup` calls of each, compilation among
    them, are not timed. `pause` seconds go before each timed call: the threads of some libraries
    spin for a while after their work, and would be counted against the next one. Returns
    (repeats, 2) for each: wall-clock and processor seconds, the latter summed over threads, which
    other programs on the machine hardly change.
    """
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    times = {name: np.zeros((repeats, 2)) for name in functions}
    rng = np.random.default_rng(0)
    for turn in range(repeats):
        for name in rng.permutation(list(functions)):
            time.sleep(pause)
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(functions[name]())
            times[name][turn] = time.perf_counter() - start[0], time.process_time() - start[1]
    return times


def ratio(times: Times, name: str, peer: str, target: float | None = None) -> dict:
    """How many times as long `name` takes as `peer`.

    The median, 10th and 90th percentile of the wall-clock ratios within a round, beside them the
    ratio of the two shortest times and the median ratio of processor seconds (`cpu`). `target` is
    the most that the median may be.
    """
    ratios = times[name] / times[peer]
    shortest = times[name][:, 0].min() / times[peer][:, 0].min()
    result = {"of": name, "to": peer, **_spread(ratios[:, 0]), "min": float(shortest)}
    if jax.default_backend() == "cpu":
        result["cpu"] = float(np.median(ratios[:, 1]))
    if target is None:
        return result
    return {**result, "target": target, "met": result["median"] <= target}


def summarise(times: Times) -> dict:
    """Median, 10th and 90th percentile and minimum of each function's wall-clock seconds."""
    return {
        name: {**_spread(seconds[:, 0]), "min": float(seconds[:, 0].min())}
        for name, seconds in times.items()
    }


def _spread(values: np.ndarray) -> dict:
    return dict(zip(_SPREAD, np.percentile(values, (50, 10, 90)).tolist(), strict=True))


def print_times(times: Times, per: int = 1, unit: str = "call") -> None:
    """A row a function, in milliseconds; `per` divides the times, e.g. by the items of a call."""
    columns = (*_SPREAD, "min")
    print(f"\n{f'ms per {unit}':<40}" + "".join(f"{column:>9}" for column in columns))
    for name, row in summarise(times).items():
        print(f"{name:<40}" + "".join(f"{1e3 * row[column] / per:>9.2f}" for column in columns))


def print_ratios(ratios: list[dict]) -> None:
    """A row a ratio: median and spread, of minima, of processor time, and the target, if any."""
    columns = (*_SPREAD, "min", "cpu")
    print(f"\n{'ratio':<40}" + "".join(f"{column:>9}" for column in columns) + "  target")
    for r in ratios:
        cells = "".join(f"{r.get(column, float('nan')):>9.3f}" for column in columns)
        target = f"  {r['target']:.2f} {'met' if r['met'] else 'missed'}" if "target" in r else ""
        print(f"{r['of'] + ' / ' + r['to']:<40}{cells}{target}")


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    result.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    return result


def start(title: str) -> dict:
    """Print the title and the machine line, and return the latter for the JSON file."""
    found = machine()
    print(title)
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def write_json(path: pathlib.Path | None, figures: dict) -> None:
    """Write the figures if a path was asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")

"""One row: compile a program, run it, and read off time, memory and utilisation."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import timing


class Program(NamedTuple):
    """What is timed.

    call: one step, or one pass; its result is waited for. facts: what is known before the first
    call, of the fields of a row: seconds of lowering and compiling, planned bytes, XLA's FLOPs.
    text: the compiled program, where there is one.
    """

    call: Callable[[], Any]
    facts: dict[str, Any]
    text: Callable[[], str] = str


class Work(NamedTuple):
    """A row to be measured.

    name, mode ("" for what has no parallel mode) and devices say which it is. items: how many of
    the `unit` a call takes; flops: the model FLOPs of a call, None where there are none to speak
    of. build: places and compiles.
    """

    name: str
    mode: str
    devices: Sequence[jax.Device]
    items: int
    unit: str
    flops: int | None
    build: Callable[[], Program]


def compile_program(function: Any, arguments: Sequence[Any], *, carries: bool = False) -> Program:
    """Lower and compile a jitted or pmapped function for arguments that are on their devices.

    carries: the first result is the first argument of the next call, as a donated state is.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    facts = {
        "lower_s": middle - start,
        "compile_s": time.perf_counter() - middle,
        "planned_bytes": _planned(compiled),
        "xla_flops_per_device": _counted(compiled),
    }
    held = list(arguments)

    def call() -> Any:
        out = compiled(*held)
        if carries:
            held[0] = out[0]
        return out

    return Program(call, facts, compiled.as_text)


def _planned(compiled: Any) -> int | None:
    """Bytes on a device that XLA plans with: arguments, results beside them, temporaries."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    beside = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + beside + found.temp_size_in_bytes


def _counted(compiled: Any) -> float | None:
    """FLOPs of a device as XLA counts them: element-wise ones, too, and a loop's body once."""
    return (compiled.cost_analysis() or {}).get("flops")


def measure(work: Work, *, steps: int, peak: float | None) -> dict[str, Any]:
    """The row of a piece of work: its fields by name, in seconds, bytes and FLOPs.

    steps: timed calls, after two that are not. peak: FLOP/s of one device, None if unknown. A row
    that does not fit into memory has the field `error` instead of times.
    """
    row: dict[str, Any] = {
        "name": work.name,
        "mode": work.mode,
        "devices": len(work.devices),
        "unit": work.unit,
        "items": work.items,
    }
    before = _process_peak(work.devices)
    try:
        row |= _run(work, steps)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"error": "out of memory"}
    return row | _memory(work.devices, before, row) | _utilisation(work, row["median_s"], peak)


def _run(work: Work, steps: int) -> dict[str, Any]:
    """Build, call once, warm up once and time."""
    program = work.build()
    start = time.perf_counter()
    jax.block_until_ready(program.call())
    first = time.perf_counter() - start
    seconds = timing.summarise(timing.alternate({"": program.call}, repeats=steps, warmup=1))[""]
    facts = {"compile_source": "lowered and compiled"} | program.facts
    if "compile_s" not in facts:
        facts |= {"lower_s": 0.0, "compile_s": max(0.0, first - seconds["median"])}
        facts["compile_source"] = "the first call beyond the median"
    return facts | {
        "first_call_s": first,
        **{f"{name}_s": value for name, value in seconds.items()},
        "items_per_second": work.items / seconds["median"],
    }


def _process_peak(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes in use on any of the devices since the process began, where they know it."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((x for x in found if x is not None), default=None)


def _memory(devices: Sequence[jax.Device], before: int | None, row: dict) -> dict[str, Any]:
    """The peak of the row on a device.

    A backend's peak is of the process and cannot be reset: it is the row's where the row raised it,
    and otherwise, as on CPUs, which report none, the plan stands in for it.
    """
    after = _process_peak(devices)
    if after is not None and (before is None or after > before):
        return {"peak_bytes": after, "peak_source": "measured"}
    planned = row.get("planned_bytes")
    return {"peak_bytes": planned, "peak_source": "planned" if planned is not None else None}


def _utilisation(work: Work, median: float, peak: float | None) -> dict[str, Any]:
    """Model FLOPs and what share they are of what the devices could have done meanwhile."""
    if work.flops is None:
        return {"model_flops": None, "model_flops_per_second": None, "mfu": None}
    rate = work.flops / median
    mfu = rate / (peak * len(work.devices)) if peak else None
    return {"model_flops": work.flops, "model_flops_per_second": rate, "mfu": mfu}

"""How fast is a configuration on these devices: training steps, embedding, evaluation, scaling?

    python -m benchmarks.throughput --config configs/rcml.py:amazon --devices all
    python -m benchmarks.throughput --config configs/rcml.py:amazon --config.model.dtype=bfloat16
    python -m benchmarks.throughput --config configs/rcml.py:amazon --parallel jit,pmap,fsdp
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.throughput \\
        --config configs/rcml.py:amazon --only clip,rcml

For whoever compares TPUs and GPUs. The configuration says the sizes of the model and of the batch,
the optimizer, the precision, the micro-batches and the loss, with `--config.name=value` as in
train.py; weights and data are random, and nothing is fetched. On a CPU the sizes are small ones
unless `--no-small` is given: the towers of configs/rcml.py and 64 items.

A step is the one that train.py compiles: towers, loss, backward pass and optimizer. The batch of
the configuration is that on all devices; for weak scaling each device keeps its share of it.
M3CoL's sizes are those of `--m3col`, by default the paper's for N24News (ViT-B/16 and RoBERTa), and
small those of configs/m3col.py; its precision is that of `--config`. Embedding (with the sentences
encoded ahead) and evaluation run on one device, as in the product.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from benchmarks import throughput_flops, timing
from benchmarks import throughput_models as models
from benchmarks.throughput_measure import measure
from benchmarks.throughput_work import SUBJECTS, Plan
from rcml_jax.cli.commands import guard, load_config_file, parse_flags
from rcml_jax.errors import UserError
from rcml_jax.training.sharding import PARALLEL, pick_devices

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
_COLUMNS = (
    f"{'':<27}{'mode':<6}{'devices':>7}{'items':>8}{'items/s':>10}{'median ms':>11}{'p90 ms':>10}"
    f"{'compile s':>11}{'MiB':>9}{'GFLOP':>10}{'MFU':>8}"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides of the configuration."""
    parser = _Parser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.NAME=VALUE overrides a value of the configuration, as in train.py.",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="e.g. configs/rcml.py:amazon")
    add("--m3col", metavar="FILE[:ARG]", help="M3CoL's configuration, of images and texts")
    add("--devices", default="all", help="all, or how many (all)")
    add("--parallel", help="modes of steps: jit, pmap, fsdp, with commas (config.parallel)")
    add("--only", help=f"of {','.join(SUBJECTS)}, with commas (all)")
    add("--small", action=argparse.BooleanOptionalAction, help="small sizes (on a CPU)")
    add("--scaling", action=argparse.BooleanOptionalAction, default=True,
        help="steps on 1, 2, 4, ... devices, too (yes)")  # fmt: skip
    add("--steps", type=int, help="timed steps (20; small: 10)")
    add("--text-length", type=int, help="tokens of a text (32, or what the tower takes)")
    add("--sentence-length", type=int, help="tokens of a relation sentence (likewise)")
    add("--embedded", type=int, help="items of a call that embeds (256; small: 64)")
    add("--queries", type=int, help="queries of the evaluation (100000; small: 10000)")
    add("--gallery", type=int, help="items of the evaluation (10000; small: 2000)")
    add("--peak-tflops", type=float, help="peak of one device, for the utilisation")
    add("--json", type=pathlib.Path, help="write the figures to this file")
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [x for x in rest if x.startswith("-") and not x.startswith("--config.")]:
        raise UserError(f"unknown option {unknown[0]!r}; --help lists them")
    for name in ("steps", "embedded", "queries", "gallery", "peak_tflops"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    return arguments, rest


def _chosen(given: str, known: Sequence[str], option: str) -> list[str]:
    """The names in a list with commas, in the order of the known ones."""
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option}: {unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return [name for name in known if name in names]


def _devices(given: str, platform: str) -> list[jax.Device]:
    """All devices of the platform, or the first few. One process's: see `jax.distributed`."""
    devices = pick_devices(platform)
    if given == "all":
        return devices
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"--devices {given}: give all or a number from 1 on")
    if int(given) > len(devices):
        raise UserError(
            f"--devices {given}: JAX sees {len(devices)} of the kind {devices[0].device_kind!r} "
            "here; lower it"
        )
    return devices[: int(given)]


def _subjects(only: str | None, classifies: bool) -> list[str]:
    """What is measured: of M3CoL's configuration nothing but its own step."""
    subjects = _chosen(only, SUBJECTS, "--only") if only else list(SUBJECTS)
    if not classifies:
        return subjects
    if only and subjects != ["m3col"]:
        raise UserError(
            "--config is M3CoL's, which says nothing of the other subjects of --only; give "
            "RCML's, as configs/rcml.py"
        )
    return ["m3col"]


def make_plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Plan, bool]:
    """What to measure, and whether the sizes are small. Raises UserError for what cannot be."""
    config = load_config_file(arguments.config)
    classifies = models.is_classifier(config)
    # A first look at the overrides: they may name the platform, which decides on the sizes.
    platform = parse_flags(overrides, load_config_file(arguments.config)).config.platform
    devices = _devices(arguments.devices, platform)
    small = devices[0].platform == "cpu" if arguments.small is None else arguments.small
    if small:
        models.shrink(config)
    config = parse_flags(overrides, config).config
    default = CONFIGS / "m3col.py"
    m3col = load_config_file(arguments.m3col or (str(default) if small else f"{default}:n24news"))
    if not models.is_classifier(m3col):
        raise UserError(f"--m3col {arguments.m3col} is no configuration of M3CoL")
    if small:
        models.shrink(m3col)
    m3col.model.dtype = config.model.dtype
    most = len(devices)
    counts = {most} | {1 << i for i in range(most.bit_length()) if arguments.scaling}
    plan = Plan(
        subjects=_subjects(arguments.only, classifies),
        config=None if classifies else config,
        m3col=config if classifies else m3col,
        modes=_chosen(arguments.parallel or config.parallel, tuple(PARALLEL), "--parallel"),
        devices=devices,
        counts=sorted(counts),
        text_length=arguments.text_length,
        sentence_length=arguments.sentence_length,
        embedded=arguments.embedded or (64 if small else 256),
        queries=arguments.queries or (10_000 if small else 100_000),
        gallery=arguments.gallery or (2_000 if small else 10_000),
    )
    plan.check()
    return plan, small


def scaling(rows: Sequence[dict]) -> list[dict]:
    """Weak scaling: of steps that were measured on several numbers of devices, a row for each.

    efficiency: the time on one device over that on n, which do n times the work. speedup: the
    items per second on n devices over those on one, n times the efficiency.
    """
    found = []
    for row in rows:
        alike = [r for r in rows if (r["name"], r["mode"]) == (row["name"], row["mode"])]
        one = next((r for r in alike if r["devices"] == 1 and "error" not in r), None)
        if one is None or len(alike) < 2 or "error" in row:
            continue
        found.append(
            {name: row[name] for name in ("name", "mode", "devices", "items", "median_s")}
            | {
                "efficiency": one["median_s"] / row["median_s"],
                "speedup": row["items_per_second"] / one["items_per_second"],
            }
        )
    return found


def _print_row(row: dict) -> None:
    start = f"{row['name']:<27}{row['mode'] or '-':<6}{row['devices']:>7}{row['items']:>8}"
    if "error" in row:
        print(f"{start}  {row['error']}", flush=True)
        return
    memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    memory += "p" if row["peak_source"] == "planned" else " "
    needed = "-" if row["model_flops"] is None else f"{row['model_flops'] / 1e9:.4g}"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    print(
        f"{start}{row['items_per_second']:>10.4g}{1e3 * row['median_s']:>11.2f}"
        f"{1e3 * row['p90_s']:>10.2f}{row['lower_s'] + row['compile_s']:>11.2f}{memory:>9}"
        f"{needed:>10}{mfu:>8}",
        flush=True,
    )


def _print_scaling(rows: Sequence[dict]) -> None:
    print(f"\n{'weak scaling':<27}{'mode':<6}{'devices':>7}{'items':>8}{'median ms':>11}", end="")
    print(f"{'efficiency':>12}{'speedup':>9}")
    for row in rows:
        print(
            f"{row['name']:<27}{row['mode']:<6}{row['devices']:>7}{row['items']:>8}"
            f"{1e3 * row['median_s']:>11.2f}{row['efficiency']:>12.2f}{row['speedup']:>9.2f}"
        )


def notes(plan: Plan, peak: float | None) -> list[str]:
    """What a reader has to know about the figures."""
    found = [
        "MiB: on one device; p: as planned by XLA, where the backend gives no peak of the row",
        "GFLOP: matrix products of towers, heads and classifiers, backward pass included, by "
        "formula; the queries' time has no such measure",
    ]
    if peak is None:
        found.append(
            f"the peak of {plan.devices[0].device_kind!r} at this precision is not known: give "
            "--peak-tflops for the utilisation (MFU)"
        )
    else:
        found.append(f"MFU: of {peak / 1e12:g} TFLOP/s a device")
    if plan.devices[0].platform == "cpu" and plan.counts[-1] > 1:
        found.append(
            f"the {plan.counts[-1]} devices are virtual and share {os.cpu_count()} cores: no "
            "speedup is to be expected, and what efficiency falls below 1 / devices is what "
            "splitting the step costs"
        )
    if cache := jax.config.jax_compilation_cache_dir:
        found.append(f"compile times may be those of reading the cache in {cache}")
    return found


def _settings(plan: Plan) -> dict[str, Any]:
    """The sizes, for the file of figures."""
    configs = {"config": plan.config, "m3col": plan.m3col}
    return {
        **{k: c.copy_and_resolve_references().to_dict() for k, c in configs.items() if c},
        "text_length": plan.text_length,
        "sentence_length": plan.sentence_length,
        "embedded": plan.embedded,
        "queries": plan.queries,
        "gallery": plan.gallery,
    }


def run(argv: Sequence[str]) -> int:
    """Measure, print and write; raises UserError for a wrong option."""
    arguments, overrides = parse(argv)
    plan, small = make_plan(arguments, overrides)
    config, device = plan.config or plan.m3col, plan.devices[0]
    waiting = list(plan.work())  # all of it first: what cannot be is told before any is measured
    dtype, steps = config.model.dtype, arguments.steps or (10 if small else 20)
    sizes = "small sizes" if small else "the configuration's sizes"
    machine = timing.start(f"Throughput of {arguments.config}, {sizes}, {dtype}")
    machine |= {
        "backend": device.platform,
        "device": device.device_kind,
        "devices": len(plan.devices),
        "dtype": dtype,
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }
    peak = arguments.peak_tflops and 1e12 * arguments.peak_tflops
    peak = peak or throughput_flops.peak(device.device_kind, dtype)
    print(f"{len(plan.devices)} x {device.device_kind}\n\n{_COLUMNS}", flush=True)
    rows = []
    with jax.default_device(device):
        while waiting:
            rows.append(measure(waiting.pop(0), steps=steps, peak=peak))
            _print_row(rows[-1])
    scaled = scaling(rows)
    if scaled:
        _print_scaling(scaled)
    remarks = notes(plan, peak)
    print("", *remarks, sep="\n")
    timing.write_json(
        arguments.json,
        {
            "machine": machine,
            "small": small,
            "steps": steps,
            "peak_flops_per_device": peak,
            "settings": _settings(plan),
            "rows": rows,
            "scaling": scaled,
            "notes": remarks,
        },
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its status, 2 for a mistake of the user's."""
    return guard(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

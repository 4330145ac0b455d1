"""Checks and measures the library on one GPU in one call of at most 9 minutes.

    bash benchmarks/gpu.sh OUT                              # everything
    bash benchmarks/gpu.sh OUT --stages correctness,speed   # a part of it
    bash benchmarks/gpu.sh OUT --small                      # tiny sizes, to try it on a CPU

Each stage is a process of its own, so that JAX and PyTorch do not share memory, and writes
OUT/STAGE.json after each of its parts. A stage that fails or overruns its time is recorded and the
next one starts. OUT/log.txt has what the stages print, OUT/summary.txt the table that is printed at
the end. No data set, no checkpoint and no network is needed; weights and inputs are random.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import gpu_summary

#: The most characters of the printed summary.
SUMMARY_LENGTH = 11_000


class Stage(NamedTuple):
    """A function `stage(report, small)` of a module, and its seconds.

    timed: whether speed is measured, so that nothing may run beside it. jax_platforms: what JAX may
    use in it, "" for all.
    """

    function: str
    seconds: float
    timed: bool = True
    jax_platforms: str = ""


#: In this order; the seconds sum up to less than 9 minutes.
STAGES = {
    "correctness": Stage("benchmarks.gpu_checks:correctness", 85, timed=False),
    "training": Stage("benchmarks.gpu_checks:training", 65, timed=False),
    "ceilings": Stage("benchmarks.gpu_speed:ceilings", 30),
    "speed": Stage("benchmarks.gpu_speed:speed", 140),
    "peers": Stage("benchmarks.gpu_peers:peers", 135, jax_platforms="cpu"),
    "profile": Stage("benchmarks.gpu_speed:profile", 65),
}
LIMIT = 525.0
#: The stage whose compilation is begun beside the untimed ones.
WARMED = "peers"


class Report:
    """The figures of a stage, written to its file after each part."""

    def __init__(self, path: pathlib.Path, warm_up: bool = False):
        self.path, self.warm_up = path, warm_up
        self.figures: dict[str, Any] = {}
        self.errors: dict[str, str] = {}

    def other(self, stage: str) -> dict[str, Any]:
        """The figures of another stage of this folder, {} where it has not run."""
        return read(self.path.with_name(f"{stage}.json")).get("figures", {})

    def add(self, **figures: Any) -> None:
        """Add figures and write the file."""
        self.figures |= figures
        if not self.warm_up:
            write(self.path, {"figures": self.figures, "errors": self.errors})

    def part(self, name: str, function: Callable[[], Any]) -> Any:
        """Add what the function returns under a name; an error is recorded instead."""
        start = time.perf_counter()
        try:
            found = function()
        except Exception as error:  # What is found out afterwards is worth having all the same.
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"[:400]
            self.add()
            return None
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        self.add(**{name: found})
        return found


def read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file, {} where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def write(path: pathlib.Path, figures: dict[str, Any]) -> None:
    """Write JSON whole or not at all: a stage may be ended at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    part.replace(path)


def environment(stage: Stage, caches: pathlib.Path) -> dict[str, str]:
    """The environment of a stage's process: compiled programs are kept for the stages after it."""
    found = dict(os.environ)
    found |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    found |= {"HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if stage.jax_platforms:
        found["JAX_PLATFORMS"] = stage.jax_platforms
    found.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "jax"))
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    found.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    return found


class Process:
    """A stage in a process and a process group of its own."""

    def __init__(
        self, name: str, out: pathlib.Path, caches: pathlib.Path, log: Any, options: Sequence[str]
    ):
        stage = STAGES[name]
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--stage", name]
        self.start = time.monotonic()
        self._process = subprocess.Popen(
            [*command, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(stage, caches),
            start_new_session=True,
        )

    def wait(self, seconds: float) -> str:
        """Wait for the end, at most so many seconds: "done", "failed" or "overran"."""
        try:
            return "done" if self._process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            self.end()
            return "overran"

    def end(self) -> None:
        """End the process and those that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run(
    out: pathlib.Path,
    names: Sequence[str],
    limit: float,
    options: Sequence[str],
    about: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Run the stages one after the other; their status and seconds by name.

    What a stage leaves of its time goes to the ones after it.
    """
    end = time.monotonic() + limit
    share = min(1.0, limit / sum(STAGES[name].seconds for name in names))
    statuses: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root, (out / "log.txt").open("w") as log:
        caches, warming = pathlib.Path(root), None
        try:
            for place, name in enumerate(names):
                # Nothing else may run beside what is timed.
                beside = not STAGES[name].timed and "--small" not in options
                if beside and WARMED in names and warming is None:
                    warming = Process(WARMED, out, caches, log, [*options, "--warm-up"])
                if STAGES[name].timed and warming is not None:
                    warming.end()
                later = sum(share * STAGES[n].seconds for n in names[place + 1 :])
                seconds = max(end - time.monotonic() - later, 1.0)
                (out / f"{name}.json").unlink(missing_ok=True)
                print(f"== {name}: at most {seconds:.0f} s", file=log, flush=True)
                process = Process(name, out, caches, log, options)
                try:
                    status = process.wait(seconds)
                finally:
                    process.end()
                statuses[name] = {"status": status, "seconds": time.monotonic() - process.start}
                found = {"figures": {}, "errors": {}} | read(out / f"{name}.json")
                if status == "failed":
                    last = (out / "log.txt").read_text("utf-8", "replace").rstrip().splitlines()[-1]
                    found["errors"]["the stage"] = last[-400:]
                write(out / f"{name}.json", {"about": about, **statuses[name], **found})
                print(f"{name}: {status}, {statuses[name]['seconds']:.0f} s", flush=True)
        finally:
            if warming is not None:
                warming.end()
    return statuses


def versions() -> dict[str, str]:
    """The versions of what is measured, those of the packages that are there."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "open_clip_torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def card() -> str:
    """Name, memory and driver of the GPU as nvidia-smi gives them, or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA GPU"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="the folder of the figures")
    add("--small", action="store_true", help="tiny sizes")
    add("--stages", default=",".join(STAGES), help="of " + ",".join(STAGES))
    add("--limit", type=float, default=LIMIT, help=f"seconds of all stages ({LIMIT:.0f})")
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)
    add("--warm-up", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.stages = arguments.stages.split(",")
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"--stages has no {', '.join(sorted(unknown))}; choose of {', '.join(STAGES)}")
    return arguments


def run_stage(name: str, report: Report, small: bool) -> None:
    """Run one stage in this process."""
    module, _, function = STAGES[name].function.partition(":")
    getattr(importlib.import_module(module), function)(report, small)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print the summary; 1 where a stage or a check failed."""
    arguments = _arguments(argv)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        report = Report(out / f"{arguments.stage}.json", arguments.warm_up)
        run_stage(arguments.stage, report, arguments.small)
        return 0
    start, names = time.monotonic(), [name for name in STAGES if name in arguments.stages]
    options = ["--small"] if arguments.small else []
    about: dict[str, Any] = {
        "command": shlex.join(
            ["bash", "benchmarks/gpu.sh", "OUT", "--stages", ",".join(names), *options]
        ),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": card(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }
    statuses = run(out, names, arguments.limit, options, about)
    about |= {"stages": statuses, "seconds": time.monotonic() - start}
    found = {name: read(out / f"{name}.json") for name in STAGES if name in names}
    text = gpu_summary.table(about, found)[:SUMMARY_LENGTH]
    (out / "summary.txt").write_text(text + "\n", "utf-8")
    print(text)
    good = all(row["status"] == "done" for row in statuses.values())
    good = good and not any(stage["errors"] for stage in found.values())
    return 0 if good and not gpu_summary.failed_checks(found) else 1


if __name__ == "__main__":
    sys.exit(main())

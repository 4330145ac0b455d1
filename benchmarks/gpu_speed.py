"""Speed and memory of JAX's side on a device, and what its step is made of.

Steps are timed a few in a row, so that the host's part of one is hidden by the one before, as in
training; each round is waited for. What is compared runs in turn.
"""

import collections
import functools
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_work, throughput, throughput_flops, timing
from benchmarks import throughput_models as models
from benchmarks.item_batches import Sizes, item_batch
from benchmarks.throughput_measure import Program, Work, measure
from benchmarks.throughput_work import step_program
from rcml_jax.training import sharding

CLIP, RCML, PAPER = "CLIP step", "RCML step, amazon's loss", "RCML step, Eq. 1-2"
#: Steps in a row.
IN_A_ROW = 4
_PRODUCT, _SMALL_PRODUCT = 8192, 256
_COPY_BYTES, _SMALL_COPY_BYTES = 2**32, 2**20


def ceilings(report: Any, small: bool) -> None:
    """The stage: a matrix product in bfloat16 and a pass over memory, on random data."""
    device = jax.devices()[0]
    report.add(device=device.device_kind, memory_stats=device.memory_stats())
    size, count = _SMALL_PRODUCT if small else _PRODUCT, 2 if small else 20

    def product() -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
        seconds = _seconds(jax.jit(jnp.matmul), (a, b), count)
        return {"size": size, "seconds": seconds, "flops_per_second": 2 * size**3 / seconds}

    def copy() -> dict[str, Any]:
        length = (_SMALL_COPY_BYTES if small else _COPY_BYTES) // 4
        x = jax.random.normal(jax.random.key(1), (length,), jnp.float32)
        seconds = _seconds(jax.jit(lambda x: -x), (x,), count)
        return {"bytes": 8 * length, "seconds": seconds, "bytes_per_second": 8 * length / seconds}

    report.part("product", product)
    report.part("copy", copy)
    report.add(data_sheet_flops_per_second=throughput_flops.peak(device.device_kind, "bfloat16"))


def _seconds(function: Callable, arguments: tuple, count: int) -> float:
    """The median over five rounds of one call's share of `count` calls in a row."""
    times = timing.alternate({"": _repeated(lambda: function(*arguments), count)}, repeats=5)
    return timing.summarise(times)[""]["median"] / count


def _repeated(call: Callable[[], Any], count: int) -> Callable[[], Any]:
    """The function called so many times in a row; the last result."""

    def repeated() -> Any:
        for _ in range(count - 1):
            call()
        return call()

    return repeated


# Speed


def speed(report: Any, small: bool) -> None:
    """The stage: steps of CLIP, RCML and M3CoL, embedding and evaluation."""
    product = report.other("ceilings").get("product", {}).get("flops_per_second")
    rounds = 2 if small else 10
    report.add(product_flops_per_second=product, in_a_row=1 if small else IN_A_ROW, rounds=rounds)
    steps = _Steps(small, gpu_work.sizes(small))
    report.add(batch=steps.about())
    rows = {title: report.part(title, _measured(steps, title, product)) for title in TITLES}
    if all(rows[title] and "error" not in rows[title] for title in TITLES):
        report.part("in turn", functools.partial(_in_turn, steps, rounds, product, small))
    # Other sizes need the memory of these.
    del steps
    options = "embedding,evaluation,m3col"
    for work in _other_work(small, options):
        report.part(work.name, functools.partial(measure, work, steps=rounds, peak=product))
    if small:
        return
    for count in (32, 128):
        sizes = gpu_work.PAPER._replace(pairs=count, self_pairs=count)
        around = _Steps(small, sizes)
        for title in (CLIP, RCML):
            name = f"{title}, {sizes.items} items"
            report.part(name, _measured(around, title, product))
        del around


TITLES = (CLIP, RCML, PAPER)


class _Steps:
    """Training steps on one batch; each is compiled when it is asked for."""

    def __init__(self, small: bool, sizes: Sizes):
        config = gpu_work.configuration(small, sizes)
        paper = gpu_work.paper_loss(config)
        self.methods = {
            CLIP: gpu_work.method("clip", config),
            RCML: gpu_work.method("rcml", config),
            PAPER: gpu_work.method("rcml", paper),
        }
        self.sizes = sizes
        self.batch = item_batch(self.methods[RCML].towers_config, sizes).packed
        self.device = jax.devices()[0]
        self._params = functools.cache(lambda: models.random_params(self.methods[RCML]))
        self.programs: dict[str, Program] = {}
        self.losses: dict[str, float] = {}

    def about(self) -> dict[str, Any]:
        """What the batch is."""
        ids = self.batch["items"]["ids"].ids
        sentences = self.batch["shared"]["relation_ids"]
        return {
            **self.sizes._asdict(),
            "items": self.sizes.items,
            "rows_of_titles": list(ids.shape),
            "sentences": list(sentences.shape),
            "dtype": self.methods[RCML].config.model.dtype,
        }

    def build(self, title: str) -> Program:
        """Compile a step; the loss of the first one, before any update, is kept."""
        method = self.methods[title]
        params = {k: x for k, x in self._params().items() if title != CLIP or k != "head"}
        placed = sharding.build("jit", [self.device])
        self.programs[title] = step_program(method, params, self.batch, placed)
        _, metrics = self.programs[title].call()
        self.losses[title] = float(metrics["loss"])
        return self.programs[title]

    def flops(self, title: str) -> int:
        """Model FLOPs of a step."""
        relations = 0 if title == CLIP else self.sizes.relations + 1
        return gpu_work.step_flops(self.methods[title], self.batch, relations)


def _measured(steps: _Steps, title: str, product: float | None) -> Callable[[], dict]:
    """A row of a step that is waited for, for its memory and compilation."""
    build = functools.partial(steps.build, title)
    work = Work(title, "jit", [steps.device], steps.sizes.items, "items", steps.flops(title), build)

    def run() -> dict[str, Any]:
        row = measure(work, steps=3, peak=product)
        return row | {"first_loss": steps.losses.get(title)}

    return run


def _in_turn(steps: _Steps, rounds: int, product: float | None, small: bool) -> dict[str, Any]:
    """Seconds of the steps several in a row, and their ratios to CLIP's within a round."""
    count = 1 if small else IN_A_ROW
    calls = {title: _repeated(steps.programs[title].call, count) for title in TITLES}
    # The first again under another name: what differs between the two is noise.
    calls["CLIP step, again"] = _repeated(steps.programs[CLIP].call, count)
    times = timing.alternate(calls, repeats=rounds, warmup=1)
    times = {title: seconds / count for title, seconds in times.items()}
    rows = timing.summarise(times)
    for title, row in rows.items():
        needed = steps.flops(CLIP if title not in TITLES else title)
        row["items_per_second"] = steps.sizes.items / row["median"]
        row["model_flops"] = needed
        row["mfu"] = needed / row["median"] / product if product else None
    targets = {RCML: 1.10, PAPER: 1.10}
    ratios = [timing.ratio(times, t, CLIP, targets.get(t)) for t in times if t != CLIP]
    return {"rows": rows, "ratios": ratios}


def _other_work(small: bool, subjects: str) -> list[Work]:
    """Rows of benchmarks/throughput.py: embedding, evaluation and M3CoL, in bfloat16."""
    argv = ["--config", f"{gpu_work.CONFIGS / 'rcml.py'}:amazon", "--only", subjects]
    argv += ["--devices", "1", "--no-scaling", "--small" if small else "--no-small"]
    overrides: dict[str, Any] = {"model.dtype": "bfloat16"}
    if small:
        overrides |= gpu_work.TINY
        argv += ["--text-length", "8", "--sentence-length", "8", "--embedded", "4"]
        argv += ["--queries", "40", "--gallery", "30"]
    else:
        argv += ["--embedded", "1024"]
    arguments, rest = throughput.parse(
        [*argv, *(f"--config.{name}={value}" for name, value in overrides.items())]
    )
    plan, _ = throughput.make_plan(arguments, rest)
    # ViT-B/32 in the place of the paper's ViT-B/16.
    if small:
        known = {name: x for name, x in gpu_work.TINY.items() if name != "model.embed_dim"}
        plan.m3col.update_from_flattened_dict(known)
        plan.m3col.batch.size = 8
    else:
        plan.m3col.model.image_pretrained = "google/vit-base-patch32-224-in21k"
        plan.m3col.batch.size = 1024
    found = list(plan.work())
    # M3CoL's last: two long compilations, which may overrun.
    return sorted(found, key=lambda work: work.name.startswith("M3CoL"))


# What a step is made of


def profile(report: Any, small: bool) -> None:
    """The stage: the ten longest operations of RCML's step, its kernels and host transfers."""
    steps = _Steps(small, gpu_work.sizes(small))
    report.add(device=steps.device.device_kind)
    row = report.part("again", _measured(steps, RCML, None))
    if not row or "error" in row:
        return
    program, count = steps.programs[RCML], 1 if small else 3
    text = program.text()
    report.add(compiled=compiled_facts(text))
    report.part("longest", lambda: traced(program.call, count, operations(text)))


#: Opcodes that move data between host and device, or call back.
_TRANSFERS = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_CALLBACK = re.compile(r'custom_call_target="[^"]*(callback|host)[^"]*"', re.IGNORECASE)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?[\]})] ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
#: What takes no kernel.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
}


def compiled_facts(text: str) -> dict[str, Any]:
    """Counts of a compiled program's entry: instructions by kind, and transfers anywhere.

    kernels: what the entry launches, fusions and library calls among them; a loop counts once.
    """
    entry = text.partition("\nENTRY ")[2].partition("\n}")[0]
    kinds = collections.Counter(
        found[2] for line in entry.splitlines() if (found := _INSTRUCTION.match(line))
    )
    everywhere = collections.Counter(
        found[2] for line in text.splitlines() if (found := _INSTRUCTION.match(line))
    )
    transfers = sum(everywhere[name] for name in _TRANSFERS) + len(_CALLBACK.findall(text))
    return {
        "kernels": sum(count for kind, count in kinds.items() if kind not in _FREE),
        "kinds": dict(kinds.most_common()),
        "host_transfers": transfers,
        "good": transfers == 0,
    }


def operations(text: str) -> dict[str, str]:
    """Where in the model each instruction of a compiled program comes from.

    A fusion that does not say it itself comes from where most of its instructions do.
    """
    found: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            if source := _OP_NAME.search(line):
                found[instruction[1]] = source[1]
                inside[computation][source[1]] += 1
            elif called := _CALLED.search(line):
                calls[instruction[1]] = called[1]
    for name, computation in calls.items():
        if inside[computation]:
            found[name] = inside[computation].most_common(1)[0][0]
    return found


#: Parts of a step, by what is in the name of an operation; the first that is found counts.
_PARTS = {
    "image tower": ("vision_model", "visual_projection"),
    "text tower": ("text_model", "text_projection"),
    "pooling head": ("head",),
}


def part_of_step(source: str) -> str:
    """The part of the step that an operation's source names."""
    for part, words in _PARTS.items():
        if any(word in source for word in words):
            return part
    return "loss, optimizer and others" if source else "unknown"


def traced(call: Callable[[], Any], count: int, sources: dict[str, str]) -> dict[str, Any]:
    """A profile of some calls: device time by operation and by part of the step, each a call.

    sources: where instructions come from. Where the profile has no device of its own, as on CPUs,
    the host's lines of compiled code are taken.
    """
    with tempfile.TemporaryDirectory() as root:
        with jax.profiler.trace(root):
            for _ in range(count):
                out = call()
            jax.block_until_ready(out)
        (path,) = Path(root).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        return summarise_planes(planes, count, sources)


def summarise_planes(planes: Iterable[Any], count: int, sources: dict[str, str]) -> dict[str, Any]:
    """What `traced` returns, of planes of lines of events."""
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    # Streams have the kernels; other lines of a device repeat them by operation or by module.
    lines = [line for plane in devices for line in plane.lines if "Stream" in line.name]
    measured = "device" if lines else "host"
    lines = lines or [line for plane in planes for line in plane.lines]
    time: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    parts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for line in lines:
        for event in line.events:
            stats = dict(event.stats)
            name = str(stats.get("hlo_op") or event.name)
            if measured == "host" and "hlo_op" not in stats:
                continue
            time[name] += event.duration_ns
            calls[name] += 1
            parts[part_of_step(sources.get(name, ""))] += event.duration_ns
            kinds[_kind(event.name)] += 1
    total = sum(time.values())
    longest = [
        {
            "name": name,
            "source": sources.get(name, "")[-120:],
            "ms": 1e-6 * spent / count,
            "calls": calls[name] / count,
            "share": spent / total,
        }
        for name, spent in time.most_common(10)
    ]
    return {
        "measured": measured,
        "lines": sorted({line.name for line in lines})[:8],
        "device_ms": 1e-6 * total / count,
        "kernels": sum(calls.values()) / count,
        "copies": {kind: n / count for kind, n in kinds.items() if kind != "kernel"},
        "parts_ms": {part: 1e-6 * spent / count for part, spent in parts.most_common()},
        "longest": longest,
    }


def _kind(name: str) -> str:
    """A kernel, or a copy by its direction, as CUDA's profiler names it."""
    found = re.match(r"mem(cpy|set)(\w*)", name, re.IGNORECASE)
    return f"mem{found[1].lower()}{found[2]}" if found else "kernel"

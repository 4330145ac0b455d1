"""Does a training step fit a TPU, and what does it send, without a TPU?

    pip install libtpu
    python -m benchmarks.topologies --config configs/rcml.py:amazon --config.model.dtype=bfloat16
    python -m benchmarks.topologies --config configs/rcml.py:amazon --topology v5e:4x4 --items 8192

The step that train.py compiles is compiled for a TPU topology, from shapes alone: no weights, no
data and no TPU. Printed for one chip, as the compiler plans it: memory (arguments and temporaries),
FLOP, bytes moved, the compiler's own estimate of a step's time, and the bytes that each kind of
collective gives out; with --kernels also what a step runs one after the other. An operation in a
loop, such as the blocks of a loss, counts once.

--only also names m3col (a step of each phase, of the sizes of --m3col), embedding (the items of the
batch under 1 and 10 relations, split over the chips with the parameters whole on each) and
evaluation (one call of the retrieval among candidates, on one chip), as they run in the product.

--items is the batch on all chips; without it every chip has --per-chip items, so that the batch
grows with the topology. Of n items there are n/2 pairs, an eighth of them intra-sample, under the
configuration's relations. M3CoL's batch is not divided into micro-batches.

--loss compiles CLIP's or RCML's loss alone, with its gradient by the embeddings, which takes
seconds instead of minutes. --model takes a CLIP of another size than the configuration's, and
--layers towers with fewer layers than their own: they compile sooner, and what grows with batch and
chips is the same.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline, timing
from benchmarks import throughput_flops as flops
from benchmarks import throughput_models as models
from benchmarks import throughput_work as work
from benchmarks.throughput import CONFIGS
from rcml_jax.cli.commands import guard, load_config_file, parse_flags
from rcml_jax.errors import UserError
from rcml_jax.evaluation import scores
from rcml_jax.methods.base import Method
from rcml_jax.methods.m3col import M3CoLMethod
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.training import optimizer, sharding, step
from rcml_jax.training.gradcache import parts_of

#: Memory of a chip in bytes, from the pages on TPU versions of Google Cloud's documentation.
MEMORY = {"TPU v5 lite": 16 << 30, "TPU v5": 95 << 30, "TPU v6 lite": 32 << 30, "TPU v4": 32 << 30}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
#: Items of the evaluation, and queries, of which a call takes what fits.
GALLERY, QUERIES = 10_000, 100_000
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "s4": 4, "u4": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z\d-]*)\(")
#: Instructions that run nothing: names of values, and the second half of what began elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id",
    "after-all", "opt-barrier",
}  # fmt: skip
_HOST = re.compile(
    r"\b(?:infeed|outfeed)\(|is_host_transfer=true|custom_call_target=\"[^\"]*callback[^\"]*\""
)


def collective_bytes(text: str) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program: kind → (how many, bytes of their results on a chip).

    text: the program as HLO. Of an asynchronous pair the start counts, its last operand-free array
    being the result. "all-reduce-scatter" is an all-reduce that gives each chip its part alone, as
    TPUs have it; its bytes are those of what is summed.
    """
    found: dict[str, tuple[int, int]] = {}
    computation = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match is None:
            continue
        shapes, kind, start = match.groups()
        if kind == "all-reduce" and computation.startswith("%all-reduce-scatter"):
            kind = "all-reduce-scatter"
        arrays = [_bytes(*array) for array in _ARRAY.findall(shapes)]
        # A start gives (operands, results, ...): as many of each.
        size = max(arrays, default=0) if start else sum(arrays)
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + size
    return found


def kernels(text: str) -> dict[str, tuple[int, int]]:
    """What a compiled program runs one after the other: kind → (how many, bytes of results).

    text: the program as HLO; the instructions of its entry count, a loop as one. Kinds are opcodes,
    "fusion" the kernels that XLA made of several operations. Of an asynchronous pair the start
    counts, with the largest of its arrays.
    """
    found: dict[str, tuple[int, int]] = {}
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    if entry is None:
        raise ValueError("the program has no entry")
    for line in entry.group().splitlines()[1:]:
        match = _INSTRUCTION.match(line)
        if match is None or match[2] in _FREE or match[2].endswith(("-done", "-update")):
            continue
        sizes = [_bytes(*array) for array in _ARRAY.findall(match[1])]
        kind = match[2].removesuffix("-start")
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + (sum(sizes) if kind == match[2] else max(sizes, default=0))
    return found


def host_transfers(text: str) -> list[str]:
    """What a compiled program, as HLO, sends to the host or asks of it while it runs."""
    return [match.group() for match in _HOST.finditer(text)]


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return int(np.prod([int(x) for x in shape.split(",") if x], dtype=np.int64)) * bits // 8


def abstract_batch(method: RelationalMethod, text: int, sentence: int) -> dict:
    """The shapes of a relational method's batch; lengths in tokens.

    Made of two small batches: a shape's entries that grow with the items or pairs are scaled.
    """
    sizes = method.config.batch
    small = [_resized(method, factor) for factor in (1, 2)]
    one, two = (models.relation_batch(m, text, sentence) for m in small)
    factor = sizes.size // small[0].config.batch.size

    def scaled(x: np.ndarray, y: np.ndarray) -> jax.ShapeDtypeStruct:
        pairs = zip(np.shape(x), np.shape(y), strict=True)
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(tuple(a + (b - a) * (factor - 1) for a, b in pairs), dtype)

    batch = jax.tree.map(scaled, one, two)
    if method.config.method == "rcml" and method.config.loss.negatives == "unlinked":
        related = batch["shared"]["related"]
        under = (sizes.relations + 1, *related.shape)
        batch["shared"]["related"] = jax.ShapeDtypeStruct(under, related.dtype)
    return batch


def abstract_class_batch(method: M3CoLMethod, text: int) -> dict:
    """The shapes of M3CoL's batch; text: tokens of each."""
    rows = method.config.batch.size

    def scaled(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(scaled, models.class_batch(method, 2, text))


def _resized(method: RelationalMethod, factor: int) -> Any:
    """The method's towers with `factor` times the smallest batch whose parts are those of its own.

    Not a method built anew: its configuration names no checkpoint any more, whose sizes it has.
    """
    batch = method.config.batch
    smallest = math.gcd(batch.size, batch.pairs_per_relation, batch.intra_pairs)
    config = models.part_of(method.config, factor, smallest)
    return types.SimpleNamespace(config=config, towers_config=method.towers_config)


def compile_step(method: Method, batch: dict, devices: Any) -> Any:
    """The compiled step of a method for the devices of a topology, from shapes."""
    config = method.config
    key = jax.eval_shape(lambda: jax.random.key(0))
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), batch["items"]
    )
    example = {"items": example, "shared": batch["shared"]}
    params = jax.eval_shape(method.init, key, example)
    transform, _ = optimizer.build(
        config.optimizer, method.steps, method.frozen(params), method.decayed(params)
    )
    state = jax.eval_shape(functools.partial(step.create, optimizer=transform), params, key=key)
    parts = parts_of(config.batch.size, config.get("micro_batch", 0))
    made = step.make_step(
        method, transform, method.steps, config.get("accumulation", "exact"), parts
    )
    state, batch = devices.abstract(state, batch)
    return devices.compile(made).lower(state, batch).compile()


def compile_loss(method: Method, batch: dict, devices: Any) -> Any:
    """The compiled loss and its gradient by the embeddings, for the devices of a topology."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(method.init, key, batch)
    embedded = jax.eval_shape(method.embed, params, batch, key)

    def loss(params: Any, batch: dict) -> Any:
        def objective(embedded: dict) -> jax.Array:
            return method.objective(params, embedded, batch, jnp.zeros(()))[0]

        return jax.value_and_grad(objective)(batch["items"])

    params, batch = devices.abstract(params, {"items": embedded, "shared": batch["shared"]})
    placed = jax.tree.map(lambda x: x.sharding, batch["items"])
    return jax.jit(loss, out_shardings=(None, placed)).lower(params, batch).compile()


def compile_embedding(method: RelationalMethod, count: int, batch: dict, devices: list[Any]) -> Any:
    """The compiled pooling of a batch's items under `count` relations encoded ahead.

    The items are split over the devices, each of which holds the parameters whole.
    """
    params = jax.eval_shape(method.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    relation = jax.ShapeDtypeStruct((count, method.towers_config.projection_dim), jnp.float32)
    whole = {"items": batch["items"], "shared": {"relation": relation}}
    params, placed = sharding.build("jit", devices).abstract(params, whole)
    items = placed["items"]
    pool = work.pooling(method)
    return pool.lower(params, items["ids"], items["images"], placed["shared"]["relation"]).compile()


def compile_evaluation(width: int, blocks: tuple[int, int], device: Any) -> Any:
    """One compiled call of the retrieval among candidates on a device; blocks: how many, of what.

    Of a gallery of `GALLERY` items under `RELATIONS` relations.
    """
    one = jax.sharding.SingleDeviceSharding(device)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    side = array(jnp.float32, work.RELATIONS, GALLERY, width)
    sentence = array(jnp.float32, work.RELATIONS, width)
    index = (array(jnp.int32, *blocks, n) for n in (1, work.CANDIDATES, 1))
    return scores.scores_of_blocks.lower(
        side, side, sentence, None, *index, similarity="cosine"
    ).compile()


def facts(compiled: Any) -> dict[str, Any]:
    """What the compiler says of one chip."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text()
    collectives = collective_bytes(text)
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_moved": cost.get("bytes accessed"),
        # Negative where the compiler has no estimate.
        "estimated_s": cost.get("optimal_seconds", -1.0),
        "collectives": {kind: {"count": n, "bytes": b} for kind, (n, b) in collectives.items()},
        "kernels": {kind: {"count": n, "bytes": b} for kind, (n, b) in kernels(text).items()},
        "host_transfers": len(host_transfers(text)),
    }


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology such as "v5e:2x4". Raises UserError where there is none."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's own, of several kinds
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {name}: {reason}; install libtpu, and give a name like v5e:2x4, v6e:4x4 "
            "or v5p:2x2x2"
        ) from error


def sized(config: Any, items: int) -> Any:
    """The configuration with a batch of so many items, half as many pairs."""
    config = config.copy_and_resolve_references()
    batch = config.batch
    batch.size = items
    batch.intra_pairs = max(1, items // 16)
    batch.pairs_per_relation = max(1, (items // 2 - batch.intra_pairs) // batch.relations)
    return config


def method_of(title: str, config: Any, model: str | None, layers: int | None) -> RelationalMethod:
    """The method of a configuration; model, layers: the options --model and --layers."""
    if model is None and layers is None:
        return models.relational(title, config)
    towers = roofline.clip_config(model or "vit-b-32")
    for sizes in (towers.text_config, towers.vision_config):
        sizes.num_hidden_layers = min(layers or sizes.num_hidden_layers, sizes.num_hidden_layers)
    config = config.copy_and_resolve_references()
    with tempfile.TemporaryDirectory() as directory:
        towers.save_pretrained(directory)
        config.model.pretrained = directory
        return models.relational(title, config)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.topologies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="e.g. configs/rcml.py:amazon")
    add("--topology", default="v5e:2x4", help="TPU topologies, with commas (v5e:2x4)")
    add("--m3col", metavar="FILE[:ARG]", help="M3CoL's configuration, of images and texts")
    add(
        "--only", default="clip,rcml", help=f"of {','.join(work.SUBJECTS)}, with commas (clip,rcml)"
    )
    add("--parallel", default="jit", help="jit, fsdp, pmap, with commas (jit)")
    add("--items", help="items of the batch on all chips, with commas")
    add("--per-chip", type=int, default=128, help="items a chip, where --items is left out (128)")
    add("--model", choices=tuple(roofline.MODELS), help="CLIP of this size (the configuration's)")
    add("--layers", type=int, help="at most so many layers of each tower (all)")
    add("--loss", action="store_true", help="the loss and its gradient instead of the step")
    add("--kernels", action="store_true", help="print the kernels of a step by kind, and bytes")
    add("--json", type=timing.pathlib.Path, help="write the figures to this file")
    return parser.parse_known_args(argv)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compiled, for so many chips.

    mode: parallel mode, "" where there is but one. items: of a call, on all chips; flops: the
    model's products, likewise, None if there are none to speak of.
    """

    title: str
    mode: str
    items: int
    chips: int
    flops: int | None
    compile: Callable[[], Any]


def subjects(
    arguments: argparse.Namespace, config: Any, m3col: Any, items: int, devices: list[Any]
) -> Iterator[Subject]:
    """What --only and --parallel name, for a batch of so many items."""
    modes, chips = arguments.parallel.split(","), len(devices)
    for name in arguments.only.split(","):
        if name == "m3col":
            for title, phase in phases(m3col, items):
                text = models.text_length(phase, None)
                needed = work.class_flops(phase, text)
                batch = abstract_class_batch(phase, text)
                for mode in modes:
                    made = functools.partial(_step, compile_step, mode, phase, batch, devices)
                    yield Subject(title, mode, items, chips, needed, made)
            continue
        relational = "rcml" if name in ("embedding", "evaluation") else name
        method = method_of(relational, sized(config, items), arguments.model, arguments.layers)
        towers, text = method.towers_config, models.text_length(method, None)
        if name == "evaluation":
            width = towers.projection_dim
            blocks = scores.block_sizes(QUERIES, 1 + work.CANDIDATES, width, on_cpu=False)
            made = functools.partial(compile_evaluation, width, blocks, devices[0])
            yield Subject(name, "", math.prod(blocks), 1, None, made)
            continue
        batch = abstract_batch(method, text, text)
        if name == "embedding":
            for count in work.EMBEDDED_UNDER:
                parts = flops.relational(towers, items=items, text_length=text, relations=count)
                made = functools.partial(compile_embedding, method, count, batch, devices)
                title = f"{name}, {count}"
                yield Subject(title, "", items, chips, sum(parts.values()), made)
            continue
        parts = flops.relational(
            towers,
            items=items,
            text_length=text,
            relations=method.config.batch.relations + 1 if name == "rcml" else 0,
            sentence_length=text,
        )
        what = compile_loss if arguments.loss else compile_step
        for mode in modes:
            made = functools.partial(_step, what, mode, method, batch, devices)
            yield Subject(name, mode, items, chips, flops.training(parts), made)


def run(argv: Sequence[str]) -> int:
    """Compile, print and write; raises UserError for a wrong option."""
    arguments, overrides = parse(argv)
    config = parse_flags(overrides, load_config_file(arguments.config)).config
    m3col = load_config_file(arguments.m3col or f"{CONFIGS / 'm3col.py'}:n24news")
    m3col.model.dtype = config.model.dtype
    rows = []
    print(
        f"{'':<24}{'topology':<12}{'mode':<6}{'items':>7}{'chips':>7}"
        f"{'args MiB':>10}{'temp MiB':>10}"
        f"{'of chip':>9}{'GFLOP':>9}{'model':>9}{'GB moved':>10}{'est. ms':>9}{'compile s':>11}"
        "  collectives: kind number MiB"
    )
    for name in arguments.topology.split(","):
        devices = topology(name)
        for items in arguments.items.split(",") if arguments.items else [None]:
            total = int(items) if items else arguments.per_chip * len(devices)
            for subject in subjects(arguments, config, m3col, total, devices):
                rows.append(_row(name, devices[0].device_kind, subject))
                _print(rows[-1])
                if arguments.kernels and "error" not in rows[-1]:
                    _print_kernels(rows[-1])
    timing.write_json(arguments.json, {"jax": jax.__version__, "rows": rows})
    return 0


def phases(config: Any, items: int) -> list[tuple[str, M3CoLMethod]]:
    """The steps of M3CoL's phases, each with its name."""
    config = config.copy_and_resolve_references()
    config.batch.size, config.micro_batch = items, 0
    found = models.classifier(config).phases()
    return [(f"m3col, {work.PHASES[method.contrastive]}", method) for _, method in found]


def _step(what: Callable, mode: str, method: Method, batch: dict, devices: list[Any]) -> Any:
    state_devices = method.config.get("fsdp_devices", 0)
    placed = sharding.build(
        mode, devices, split_shared=method.split_shared, state_devices=state_devices
    )
    return what(method, batch, placed)


def _row(name: str, kind: str, subject: Subject) -> dict[str, Any]:
    row = {
        "method": subject.title,
        "topology": name,
        "mode": subject.mode,
        "items": subject.items,
        "chips": subject.chips,
        "model_flops": None if subject.flops is None else subject.flops / subject.chips,
        "memory": MEMORY.get(kind),
    }
    begin = time.perf_counter()
    try:
        compiled = subject.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return row | {"error": str(error).splitlines()[0][:160]}
    return row | facts(compiled) | {"compile_s": time.perf_counter() - begin}


def _print(row: dict[str, Any]) -> None:
    start = (
        f"{row['method']:<24}{row['topology']:<12}{row['mode'] or '-':<6}"
        f"{row['items']:>7}{row['chips']:>7}"
    )
    if "error" in row:
        print(f"{start}  {row['error']}", flush=True)
        return
    share = f"{row['total_bytes'] / row['memory']:.1%}" if row["memory"] else "-"
    kinds = ", ".join(
        f"{kind} {x['count']} {x['bytes'] / 2**20:.1f}" for kind, x in row["collectives"].items()
    )
    estimate, model = row["estimated_s"], row["model_flops"]
    print(
        f"{start}{row['argument_bytes'] / 2**20:>10.0f}{row['temporary_bytes'] / 2**20:>10.0f}"
        f"{share:>9}{row['flops'] / 1e9:>9.0f}{'-' if model is None else f'{model / 1e9:.0f}':>9}"
        f"{row['bytes_moved'] / 1e9:>10.2f}{1e3 * estimate if estimate > 0 else float('nan'):>9.2f}"
        f"{row['compile_s']:>11.1f}  {kinds}",
        flush=True,
    )


def _print_kernels(row: dict[str, Any]) -> None:
    made = sorted(row["kernels"].items(), key=lambda x: -x[1]["bytes"])
    kinds = ", ".join(f"{kind} {x['count']} {x['bytes'] / 2**20:.1f}" for kind, x in made)
    print(f"      kernels: kind number MiB: {kinds}")
    print(f"      transfers to or from the host: {row['host_transfers']}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its status, 2 for a mistake of the user's."""
    return guard(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

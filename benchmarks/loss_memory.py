"""Does the memory of RCML's loss grow with pairs x candidates x width, and what is its time?

    python -m benchmarks.loss_memory

Value and gradient of `relation_contrastive` with respect to the embeddings, against the naive form,
which gathers the candidates of every pair: (pairs, items, d). Memory is what XLA plans for
temporaries, inputs and gradients apart, and with --rss also the peak of a process of its own.

A last table has what batches of thousands need, compiled but not run (with --rss, the chunked form
is): RCML's loss in chunks of relations and of pairs, and the plain losses in chunks of rows.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs, timing
from rcml_jax.losses.clip import clip
from rcml_jax.losses.rcml import relation_contrastive
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce

OURS, CHUNKED, NAIVE = "ours", "ours, chunk_size=1", "naive"
PAIRS = "ours, chunk_size=1, pair_chunk_size=128"
ROWS = 512  # of the plain losses, a chunk
TEMPERATURE, INTRA_MODAL_WEIGHT = 0.1, 0.5
MEBIBYTE = 2**20


def naive(text, image, anchor, positive, *, pair_valid, related, valid, intra) -> jax.Array:
    """The loss pair by pair: every pair has a copy of all candidates under its relation."""
    rows, width = anchor.shape
    relation = jnp.repeat(jnp.arange(rows), width)
    anchor, positive = anchor.reshape(-1), positive.reshape(-1)
    live = pair_valid.reshape(-1) & valid[anchor] & valid[positive]
    candidates = {"t": text[relation], "i": image[relation]}  # (pairs, N, d) each
    place = jnp.arange(len(relation))
    loss: Any = 0.0
    for x in "ti":
        for y in "ti":
            counted = live if x != y else live & ~intra[relation]
            total: Any = 0.0
            for i, j in ((anchor, positive), (positive, anchor)):
                logits = jnp.einsum("pd,pnd->pn", candidates[x][place, i], candidates[y])
                logits /= TEMPERATURE
                target = logits[place, j]
                keep = valid & ~related[i] | (jnp.arange(text.shape[1]) == j[:, None])
                log_sum = jax.nn.logsumexp(jnp.where(keep, logits, -jnp.inf), axis=1)
                total += jnp.sum(jnp.where(counted, log_sum - target, 0))
            weight = 0.5 if x != y else INTRA_MODAL_WEIGHT
            loss += weight * total / jnp.maximum(2 * jnp.sum(counted), 1)
    return loss


def ours(*args, chunk_size=None, pair_chunk_size=None, **kwargs) -> jax.Array:
    """The library's loss, without its metrics."""
    return relation_contrastive(
        *args,
        **kwargs,
        temperature=TEMPERATURE,
        intra_modal_weight=INTRA_MODAL_WEIGHT,
        chunk_size=chunk_size,
        pair_chunk_size=pair_chunk_size,
    )[0]


FORMS: dict[str, Callable] = {
    OURS: ours,
    CHUNKED: functools.partial(ours, chunk_size=1),
    NAIVE: naive,
}
LARGE = FORMS | {PAIRS: functools.partial(ours, chunk_size=1, pair_chunk_size=128)}
PLAIN: dict[str, Callable] = {"info_nce": info_nce, "clip": clip, "sigmoid": sigmoid}


def arguments(pairs: int, relations: int, width: int) -> tuple[tuple, dict]:
    """Embeddings of 2 * pairs items under all relations, and about `pairs` pairs among them."""
    rng = np.random.default_rng(0)
    group = -(-pairs // relations)
    drawn = inputs.pair_indices(rng, 2 * pairs, relations - 1, group, group)
    shape = (2, relations, 2 * pairs, width)
    embeddings = rng.standard_normal(shape, np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    batch = {name: jnp.asarray(value) for name, value in drawn.items()}
    del batch["linked"]  # Of another loss.
    index = batch.pop("anchor"), batch.pop("positive")
    return (*(jnp.asarray(e) for e in embeddings), *index), batch


def compile_form(form: str, args: tuple, kwargs: dict):
    """Value and gradient with respect to the embeddings, compiled for these sizes."""
    graded = jax.jit(jax.value_and_grad(LARGE[form], argnums=(0, 1)))
    return graded.lower(*args, **kwargs).compile()


def check(relations: int) -> float:
    """The largest difference of the forms, in value and gradient, on a small batch.

    Leaves the program where it is not tiny.
    """
    args, kwargs = arguments(16, relations, 32)
    results = [jax.tree.leaves(compile_form(form, args, kwargs)(*args, **kwargs)) for form in LARGE]
    pairs = [(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True)]
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    if not difference < 1e-5:
        raise SystemExit(f"the forms differ by {difference}; nothing was measured")
    return difference


def peak_resident(form: str, pairs: int, relations: int, width: int) -> float:
    """MiB that a fresh process grows by, at the peak, when it runs the form once."""
    sizes = (str(pairs), str(relations), str(width))
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--measure", form, *sizes]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure_resident(form: str, pairs: int, relations: int, width: int) -> float:
    """What `peak_resident` runs in its process; it needs Linux's /proc."""
    args, kwargs = arguments(pairs, relations, width)
    compiled = compile_form(form, args, kwargs)
    # Compilation has a peak of its own: forget it.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    jax.block_until_ready(compiled(*args, **kwargs))
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def row_of(pairs: int, options: argparse.Namespace, width: int, timed: bool) -> tuple[dict, dict]:
    """Memory of every form at one size, and times of those that fit under --limit."""
    args, kwargs = arguments(pairs, options.relations, width)
    compiled = {form: compile_form(form, args, kwargs) for form in FORMS}
    bytes_of = {f: c.memory_analysis().temp_size_in_bytes for f, c in compiled.items()}
    row: dict[str, Any] = {"pairs": pairs, "items": 2 * pairs, "width": width}
    row |= {"temporaries": bytes_of, "pairs_x_items_x_width": 4 * pairs * 2 * pairs * width}
    fits = {f: c for f, c in compiled.items() if bytes_of[f] < options.limit * 2**30}
    if options.rss:
        row["resident_mib"] = {f: peak_resident(f, pairs, options.relations, width) for f in fits}
    times = {}
    if timed:
        functions = {f: functools.partial(c, *args, **kwargs) for f, c in fits.items()}
        times = timing.alternate(functions, repeats=options.repeats, warmup=1)
        row["seconds"] = timing.summarise(times)
    return row, times


def print_rows(rows: list[dict]) -> None:
    """Three tables: planned temporaries, growth at the peak, and times; each with the ratio."""
    tables = {
        "temporaries": ("temporaries, MiB", lambda x: x / MEBIBYTE),
        "resident_mib": ("growth of the process at its peak, MiB", lambda x: x),
        "seconds": ("median time, ms", lambda x: 1e3 * x["median"]),
    }
    sizes = ("pairs", "items", "width")
    for key, (title, show) in tables.items():
        if not any(key in row for row in rows):
            continue
        print(f"\n{title}\n" + "".join(f"{name:>7}" for name in sizes), end="")
        print(f"{'p x i x w, MiB':>16}" + "".join(f"{f:>14}" for f in FORMS) + "  naive / ours")
        for row in (row for row in rows if key in row):
            cells = {form: show(value) for form, value in row[key].items()}
            print("".join(f"{row[name]:>7}" for name in sizes), end="")
            print(f"{row['pairs_x_items_x_width'] / MEBIBYTE:>16.0f}", end="")
            print("".join(f"{cells.get(form, float('nan')):>14.1f}" for form in FORMS), end="")
            print(f"{cells.get(NAIVE, float('nan')) / cells[OURS]:>14.1f}")


def planned(compiled) -> dict[str, int]:
    """Bytes of a compiled function: its temporaries, and with inputs and results."""
    plan = compiled.memory_analysis()
    ends = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return {"temporaries": plan.temp_size_in_bytes, "all": plan.temp_size_in_bytes + ends}


def large_rows(pairs: int, options: argparse.Namespace, width: int) -> list[dict]:
    """What value and gradient need for many pairs, and the plain losses of as many items."""
    sizes: dict[str, Any] = {"pairs": pairs, "items": 2 * pairs, "width": width}
    rows = []
    for relations in (options.relations, 1):
        args, kwargs = arguments(pairs, relations, width)
        for form in LARGE:
            name = f"{form}, {relations} relation{'s' * (relations > 1)}"
            rows.append(sizes | {"form": name} | planned(compile_form(form, args, kwargs)))
            if options.rss and form == PAIRS:
                rows[-1]["resident_mib"] = peak_resident(form, pairs, relations, width)
    pair = [jax.ShapeDtypeStruct((2 * pairs, width), jnp.float32)] * 2
    for name, loss in PLAIN.items():
        for chunk_size in (None, ROWS):
            graded = jax.jit(
                jax.value_and_grad(functools.partial(loss, chunk_size=chunk_size), (0, 1))
            )
            form = f"{name}, chunk_size={chunk_size}"
            rows.append(sizes | {"form": form} | planned(graded.lower(*pair).compile()))
    return rows


def print_large(rows: list[dict]) -> None:
    """One line a form."""
    print(f"\n{'MiB':<48}{'pairs':>7}{'items':>7}{'width':>7}", end="")
    print(f"{'temporaries':>13}{'all':>10}{'peak growth':>13}")
    for row in rows:
        print(f"{row['form']:<48}{row['pairs']:>7}{row['items']:>7}{row['width']:>7}", end="")
        print(f"{row['temporaries'] / MEBIBYTE:>13.0f}{row['all'] / MEBIBYTE:>10.0f}", end="")
        print(f"{row['resident_mib']:>13.0f}" if "resident_mib" in row else "")


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--relations", type=int, default=11, help="the self pairs' among them")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--limit", type=float, default=8.0, help="GiB beyond which nothing is run")
    parser.add_argument("--large", type=int, nargs="*", default=[4096], help="pairs, compiled only")
    parser.add_argument("--rss", action="store_true", help="peaks of processes, too (Linux)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        form, *sizes = options.measure
        print(json.dumps(measure_resident(form, *(int(size) for size in sizes))))
        return
    width, most = max(options.widths), max(options.pairs)
    machine = timing.start(f"Value and gradient of the loss under {options.relations} relations")
    print(f"largest difference of the forms on a small batch: {check(options.relations):.1e}")
    sizes = [(p, width) for p in options.pairs] + [(most, w) for w in options.widths if w != width]
    measured = [row_of(p, options, w, timed=w == width) for p, w in sizes]
    rows = [row for row, _ in measured]
    print_rows(rows)
    ratios = []
    for row, times in measured:
        if NAIVE in times:
            ratios.append({**timing.ratio(times, OURS, NAIVE), "pairs": row["pairs"]})
    large = [row for pairs in options.large for row in large_rows(pairs, options, width)]
    print_large(large)
    figures = {"machine": machine, "rows": rows, "ratios": ratios, "large": large}
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()

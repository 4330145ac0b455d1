"""How long does ranking take that is asked of cached embeddings, beside plain NumPy and PyTorch?

    python -m benchmarks.evaluation         # 100,000 queries; about 4 minutes on 2 cores
    python -m benchmarks.evaluation --queries 10000 --items 2000

Texts and images of the items are embedded under every relation: random vectors of length one. Each
query has a relation and 21 candidates, of which the first is right: Hit@1, Hit@5 and MRR by TT, II,
TI, IT and AVG. As many pairs have the true relation to be found among all: Top-1 and Top-3 by the
same scores. The peers do the same as one would write it: 1,000 queries at a time, vectors gathered,
an einsum a score, ranks counted. PyTorch is left out where it is not installed.
"""

import argparse
import dataclasses
import importlib.util
import resource
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import timing
from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.relation_probes import relation_type
from rcml_jax.evaluation.relation_retrieval import retrieval
from rcml_jax.evaluation.scores import RelationEmbeddings

OURS, NUMPY, TORCH = "ours", "plain NumPy", "plain PyTorch"
ALLOWED_S = 10.0  # for both tasks, compilation included
_PEER_QUERIES = 1000
#: Peers round otherwise, which turns a rank where two scores are the same up to rounding.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Asked:
    """A table and what is asked of it.

    query (q,), candidates (q, c), relation (q,); pairs (q, 2), relations (q, R). The right one of
    the candidates and of the relations is the first.
    """

    table: RelationEmbeddings
    query: np.ndarray
    candidates: np.ndarray
    relation: np.ndarray
    pairs: np.ndarray
    relations: np.ndarray


def ask(options: argparse.Namespace) -> Asked:
    """Random embeddings and queries; the candidates of a query are distinct and not itself."""
    rng = np.random.default_rng(0)
    shape = options.relations, options.items, options.width
    text, image = units(rng, shape), units(rng, shape)
    table = RelationEmbeddings(np.arange(options.items), text, image, units(rng, shape[::2]))
    count = options.queries
    # Steps of a walk around the items: no two ends of one query are the same.
    steps = rng.integers(
        1, (options.items - 1) // options.candidates + 1, (count, 1 + options.candidates)
    )
    rows = (rng.integers(options.items, size=(count, 1)) + steps.cumsum(axis=1)) % options.items
    relations = np.argsort(rng.random((count, options.relations)), axis=1)
    return Asked(table, rows[:, 0], rows[:, 1:], relations[:, 0], rows[:, :2], relations)


def units(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 vectors of length one."""
    result = rng.standard_normal(shape, np.float32)
    result /= np.linalg.norm(result, axis=-1, keepdims=True)
    return result


def ours(asked: Asked) -> dict:
    """The evaluators of the product, as its methods call them."""
    a, b = asked.pairs.T
    types = relation_type(asked.table, a, b, asked.relations)
    found = retrieval(asked.table, asked.query, asked.candidates, asked.relation)
    return {name: found[name] for name in ("hit@1", "hit@5", "mrr")} | {
        name: types[name] for name in ("top1", "top3")
    }


def plain(xp: ModuleType, text, image, asked: Asked) -> dict:
    """The same with the arrays of NumPy or PyTorch, whose functions have the same names."""

    def ranks(a, b, relation) -> dict[str, np.ndarray]:
        parts: dict = {name: [] for name in SCORES}
        for start in range(0, len(a), _PEER_QUERIES):
            rows = slice(start, start + _PEER_QUERIES)
            for name, scores in block(a[rows], b[rows], relation[rows]).items():
                parts[name].append(np.asarray((scores[:, 1:] >= scores[:, :1]).sum(1)))
        return {name: np.concatenate(found) for name, found in parts.items()}

    def block(a, b, relation) -> dict:
        ta, ia, tb, ib = (x[relation, rows] for rows in (a, b) for x in (text, image))
        both = [x / xp.linalg.norm(x, axis=-1, keepdims=True) for x in (ta + ia, tb + ib)]
        pairs = (ta, tb), (ia, ib), (ta, ib), (ia, tb), both
        return {name: dot(*pair) for name, pair in zip(SCORES, pairs, strict=True)}

    def dot(x, y):
        """Of one vector with all candidates, or with one each."""
        if x.shape[1] == 1:
            return xp.einsum("qd,qcd->qc", x[:, 0], y)
        return xp.einsum("qcd,qcd->qc", x, y)

    found = ranks(asked.query[:, None], asked.candidates, asked.relation[:, None])
    types = ranks(asked.pairs[:, :1], asked.pairs[:, 1:], asked.relations)
    mean = {
        "hit@1": lambda name: np.mean(found[name] < 1),
        "hit@5": lambda name: np.mean(found[name] < 5),
        "mrr": lambda name: np.mean(1 / (found[name] + 1)),
        "top1": lambda name: np.mean(types[name] < 1),
        "top3": lambda name: np.mean(types[name] < 3),
    }
    return {measure: {n: float(of(n)) for n in SCORES} for measure, of in mean.items()}


def peers(asked: Asked) -> dict[str, Callable[[], dict]]:
    """NumPy, and PyTorch if it is there, on the same memory."""
    text, image = asked.table.text, asked.table.image
    found = {NUMPY: lambda: plain(np, text, image, asked)}
    if importlib.util.find_spec("torch"):
        import torch

        both = torch.from_numpy(text), torch.from_numpy(image)
        names = "query", "candidates", "relation", "pairs", "relations"
        index: dict[str, Any] = {name: torch.from_numpy(getattr(asked, name)) for name in names}
        there = dataclasses.replace(asked, **index)
        found[TORCH] = lambda: plain(torch, *both, there)
    return found


def peak_gib() -> float:
    """The most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def difference(one: dict, other: dict) -> float:
    """The largest difference of two results in any measure of any score."""
    return max(abs(one[m][s] - other[m][s]) for m in one for s in SCORES)


def first_call(asked: Asked) -> tuple[dict, dict]:
    """Result of the first call, and its seconds and memory, compilation included."""
    before = peak_gib()
    start = time.perf_counter()
    result = ours(asked)
    seconds = time.perf_counter() - start
    inputs = (asked.table.text.nbytes + asked.table.image.nbytes) / 2**30
    return result, {
        "seconds": seconds,
        "allowed_s": ALLOWED_S,
        "met": seconds < ALLOWED_S,
        "inputs_gib": inputs,
        "peak_before_gib": before,
        "peak_gib": peak_gib(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--candidates", type=int, default=21)
    parser.add_argument("--relations", type=int, default=10)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    if options.items <= options.candidates + 1:
        parser.error(f"--items={options.items} are too few for {options.candidates} candidates")
    machine = timing.start(
        f"{options.queries} queries of {options.candidates} candidates, and as many pairs under "
        f"{options.relations} relations; {options.items} items, width {options.width}"
    )
    asked = ask(options)
    result, first = first_call(asked)
    print(
        f"first call, compiling included: {first['seconds']:.2f} s, asked: under {ALLOWED_S:.0f}\n"
        f"embeddings {first['inputs_gib']:.2f} GiB; peak of the process before the call "
        f"{first['peak_before_gib']:.2f} GiB, after it {first['peak_gib']:.2f}",
        flush=True,
    )
    functions = peers(asked)
    apart = {name: difference(result, function()) for name, function in functions.items()}
    print("largest difference of a measure:", ", ".join(f"{n} {d:.1e}" for n, d in apart.items()))
    if max(apart.values()) > max(_TOLERANCE, 2 / options.queries):
        raise SystemExit("the results differ; nothing was timed")
    functions = {OURS: lambda: ours(asked), **functions}
    times = timing.alternate(functions, repeats=options.repeats, warmup=0, pause=0.3)
    ratios = [timing.ratio(times, OURS, peer, 1.0) for peer in functions if peer != OURS]
    timing.print_times(times)
    timing.print_ratios(ratios)
    seconds = timing.summarise(times)
    figures = {"machine": machine, "first": first, "seconds": seconds, "ratios": ratios}
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()

"""What does feeding a step cost, and does it cost more, the larger the catalogue is?

    python -m benchmarks.feeding                           # 10 thousand to 10 million items
    python -m benchmarks.feeding --items 10000 368000      # smaller ones
    python -m benchmarks.feeding --loading --plot growth.svg   # and memory, and opening a graph
    python -m benchmarks.feeding --batches                 # whole batches with their images

The plan of a batch of 1,024 items (8 relations of 64 pairs, 64 self pairs, as with a pretrained
CLIP) and its masks (which items are related, which pairs are linked), on random graphs of up to
four pairs an item under ten relations. Plans are compared with those on the smallest graph. Beside
them stands the earlier way, on the smallest graph and, with --earlier, on all: the filling items
drawn from a list of all that the pairs leave out.

With --loading: what a process holds of a prepared graph with ids and texts, and how long opening it
takes (`benchmarks.loading`); with --tuples also with ids and texts as tuples of strings. --plot
draws all this against the number of items, both axes logarithmic.

With --batches: plan, token ids, packing, masks and 1,024 images of 224 pixels, on a prepared data
set of JPEGs of 256 pixels. The images are copied from the file of stored pixels, in the page cache;
or decoded, in this process or by one or two workers. Processor time is that of a core in this
process and in the workers, which other programs change least. "On 2 free cores" is what follows
from it, where all processes share two cores and none of them waits.
"""

import argparse
import functools
import multiprocessing
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import images, loading, timing
from benchmarks.loading import SIZES
from rcml_jax.data.images import ImageBank, StoredPixels
from rcml_jax.data.relation_graph import RelationGraph, Splits, split_graph
from rcml_jax.data.sampling import RelationSampler, batch_iterator, collator
from rcml_jax.data.tokenizer import StoredTexts, train_tokenizer

RELATIONS, PAIRS_PER_ITEM = 10, 4
MOST_MILLISECONDS, MOST_GROWTH = 3.0, 1.2
MOST_BATCH_MILLISECONDS, LEAST_OF_TWO = 60.0, 1.8
_IMAGES, _SIDE, _SIZE, _TEXT_LENGTH, _TEXTS_PER_ROW = 2048, 256, 224, 64, 4
_IDLE_SECONDS = 3.0


class NoTexts:
    """So many items whose ids, texts and images nobody asks for."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count


def random_graph(items: int, seed: int = 0) -> tuple[RelationGraph, Splits]:
    """Up to four pairs an item, far apart, under ten relations; 70% of the items for training."""
    rng = np.random.default_rng(seed)
    # Each item's partners ascend, so that no large array has to be sorted.
    partners = rng.integers(1, max(items // 5, 2), (items, PAIRS_PER_ITEM), np.int32)
    partners = partners.cumsum(axis=1, dtype=np.int32) + np.arange(items, dtype=np.int32)[:, None]
    rows, columns = np.nonzero(partners < items)
    pairs = np.empty((len(rows), 3), np.int32)
    pairs[:, 0], pairs[:, 1] = rows, partners[rows, columns]
    pairs[:, 2] = rng.integers(RELATIONS, size=len(rows), dtype=np.int32)
    del partners, rows, columns
    nothing: Any = NoTexts(items)
    graph = RelationGraph(
        name="random",
        ids=nothing,
        texts=nothing,
        images=nothing,
        labels=np.zeros(items, np.int32),
        label_names=("any",),
        relations=tuple(f"relation {r}" for r in range(RELATIONS)),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
    )
    item_split = np.where(rng.random(items, np.float32) < 0.7, 0, 2).astype(np.int8)
    a, b = item_split[pairs[:, 0]], item_split[pairs[:, 1]]
    return graph, Splits(item_split, np.where(a == b, a, -1).astype(np.int8), "item", pairs)


def earlier_fill(items: np.ndarray, drawn: np.ndarray, step: int) -> np.ndarray:
    """The items that fill a batch, drawn from a list of all that the pairs leave out."""
    rest = np.setdiff1d(items, drawn)
    return np.random.default_rng(step).choice(rest, SIZES.items - len(drawn), replace=False)


class Feeder:
    """What a step needs of one graph; every call is of the next step."""

    def __init__(self, items: int):
        start = time.perf_counter()
        self.graph, splits = random_graph(items)
        self.splits = splits
        made = time.perf_counter()
        self.sampler = RelationSampler(self.graph, splits, SIZES, seed=0)
        self.items = splits.items("train")
        self.step = 0
        self.masks()  # makes the lists of neighbors
        print(
            f"{items:,} items, {len(self.graph.pairs):,} pairs: graph {made - start:.1f} s, "
            f"sampler and lists of neighbors {time.perf_counter() - made:.1f} s, peak memory of "
            f"the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
            flush=True,
        )

    def plan(self) -> np.ndarray:
        """One plan."""
        self.step += 1
        return self.sampler[self.step]["items"]

    def plans(self, count: int) -> None:
        """Several plans."""
        for _ in range(count):
            self.plan()

    def same_plan(self, count: int) -> None:
        """One plan several times: all that it reads is in the processor's caches."""
        for _ in range(count):
            self.sampler[0]

    def masks(self) -> np.ndarray:
        """The plan of a step and the masks that its batch has."""
        self.step += 1
        plan = self.sampler[self.step]
        items = plan["items"]
        pairs = items[plan["anchor"]], items[plan["positive"]]
        self.graph.linked_under(*pairs, plan["relations"])
        return self.graph.related_block(items, items)

    def earlier(self) -> np.ndarray:
        """The filling items alone, the earlier way."""
        plan = self.sampler[self.step]
        live = plan["pair_valid"].copy()
        live[0] = False
        places = np.unique([plan["anchor"][live], plan["positive"][live]])
        return earlier_fill(self.items, plan["items"][places], self.step)


def print_processor_time(times: timing.Times, most: float | None = None) -> None:
    """The median of each in milliseconds of a core, which other programs change least."""
    print()
    for name, seconds in times.items():
        median = 1e3 * float(np.median(seconds[:, 1]))
        met = "" if most is None else f", target {most:.0f} {'met' if median <= most else 'missed'}"
        print(f"{name}: {median:.2f} ms of a core{met}")


class Batches:
    """Batches of 1,024 items with their images, stored or decoded, of one prepared data set."""

    def __init__(self, folder: pathlib.Path):
        graph = images.prepare(folder, _SIDE, _IMAGES, RELATIONS)
        splits = split_graph(graph, seed=0, disjoint="pair")
        self.sampler = RelationSampler(graph, splits, SIZES, seed=0)
        tokenizer = train_tokenizer([*graph.texts, *graph.relations], 1000)
        texts = StoredTexts(folder / "ids", "ids", tokenizer, graph.texts, _TEXT_LENGTH)
        banks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "stored": StoredPixels(folder / "pixels", "pixels", graph.images, _SIZE),
            "decoded": ImageBank(graph.images, _SIZE, cache_bytes=0, threads=1),
        }
        self.collate = {
            name: collator(
                graph,
                tokenizer,
                bank,
                functools.partial(images._sentence, graph),
                _TEXT_LENGTH,
                texts_per_row=_TEXTS_PER_ROW,
                encoded=texts,
            )
            for name, bank in banks.items()
        }
        self.step = 0

    def read(self, images: str) -> np.ndarray:
        """The next batch, in this process and its one thread."""
        self.step += 1
        return self.collate[images](self.sampler[self.step])["items"]["images"]

    def by_workers(self, workers: int, count: int) -> tuple[float, float, float]:
        """Seconds of a batch of decoded images: of the clock, of this process, of the workers."""
        batches = batch_iterator(self.sampler, self.collate["decoded"], workers=workers)
        next(batches)
        clocks = [~child.pid << 3 | 2 for child in multiprocessing.active_children() if child.pid]

        def spent() -> float:
            return sum(time.clock_gettime(clock) for clock in clocks)

        # Before and after, as many batches are read ahead as may be.
        before, _ = _settled(spent)
        start, own = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(batches)
        own = time.process_time() - own
        after, end = _settled(spent)
        batches.close()
        return (end - start) / count, own / count, (after - before) / count


def _settled(spent: Callable[[], float]) -> tuple[float, float]:
    """What has been spent once nothing more is, and the time since when."""
    most, since = spent(), time.perf_counter()
    while time.perf_counter() - since < _IDLE_SECONDS:
        time.sleep(0.05)
        now = spent()
        if now > most + 0.005:
            most, since = now, time.perf_counter()
    return most, since


def whole_batches(options: argparse.Namespace, machine: dict) -> None:
    """Measure, print and write what whole batches cost."""
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(pathlib.Path(folder))
        kinds = {kind: functools.partial(batches.read, kind) for kind in batches.collate}
        stored = timing.alternate({"stored": kinds["stored"]}, repeats=options.repeats)
        decoded = timing.alternate({"decoded": kinds["decoded"]}, repeats=3, warmup=1)
        timing.print_times(stored | decoded, unit="batch of 1,024")
        print_processor_time(stored, MOST_BATCH_MILLISECONDS)
        print_processor_time(decoded)
        alone = float(np.median(decoded["decoded"][:, 1]))
        rows = {}
        for workers in (1, 2):
            wall, own, theirs = batches.by_workers(workers, options.batch_count)
            # Two cores for all; of one worker a core is its own.
            rate = 2 / (own + theirs) if workers == 2 else 1 / max(own, theirs)
            rows[workers] = {"clock": wall, "own": own, "workers": theirs, "gain": rate * alone}
            print(
                f"{workers} workers: {wall:.2f} s of the clock, {own:.3f} s of a core in this "
                f"process and {theirs:.2f} s in the workers; on 2 free cores {rate * alone:.2f} "
                "times one process",
                flush=True,
            )
        met = "met" if rows[2]["gain"] >= LEAST_OF_TWO else "missed"
        print(f"target of 2 workers: {LEAST_OF_TWO} times one process, {met}")
    figures = {**timing.summarise(stored | decoded), "workers": rows, "alone": alone}
    timing.write_json(options.json, {"machine": machine, **figures})


Growth = dict[str, list[dict[str, float]]]
_KINDS = {"columns": (), "tuples": ("--tuples",)}


def measure_loading(feeders: dict[str, Feeder], repeats: int, tuples: bool) -> Growth:
    """For columns and, with `tuples`, for these: the medians of each graph, small to large."""
    kinds = {kind: _KINDS[kind] for kind in (_KINDS if tuples else ("columns",))}
    found: Growth = {kind: [] for kind in kinds}
    print(f"\n{'opening a prepared graph':<28}{'GiB':>9}{'ready':>9}{'open s':>9}{'ready s':>9}")
    for name, feeder in feeders.items():
        with tempfile.TemporaryDirectory() as root:
            folder = pathlib.Path(root) / "graph"
            loading.write_prepared(folder, feeder.graph, feeder.splits)
            if tuples:
                loading.write_earlier(folder)
            runs = [
                {kind: loading.run(folder, *options) for kind, options in kinds.items()}
                for _ in range(max(1, min(repeats, 3_000_000 // len(feeder.graph))))
            ]
        for kind, rows in found.items():
            row = {key: float(np.median([run[kind][key] for run in runs])) for key in runs[0][kind]}
            rows.append(row)
            gib = (row["open bytes"] / 2**30, row["ready bytes"] / 2**30)
            seconds = (row["open seconds"], row["ready seconds"])
            cells = "".join(f"{x:>9.3f}" for x in (*gib, *seconds))
            print(f"{f'{name}, {kind}':<28}{cells}", flush=True)
    return found


def plot_growth(path: pathlib.Path, times: dict[str, list[float]], growth: Growth) -> None:
    """Draw milliseconds of plans, bytes of memory and seconds of opening against the items."""
    from matplotlib.figure import Figure

    items = [row["items"] for row in growth["columns"]]
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "planning a batch, ms of a core": times,
        "memory of a process, GiB": {
            f"ids and texts as {kind}": [row["ready bytes"] / 2**30 for row in rows]
            for kind, rows in growth.items()
        },
        "opening the graph, s of a core": {
            f"ids and texts as {kind}": [row["open seconds"] for row in rows]
            for kind, rows in growth.items()
        },
    }
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, values in lines.items():
            axis.loglog(items, values, marker="o", label=label)
        axis.set(title=title, xlabel="items of the catalogue")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylim(0.1, 10)
    figure.savefig(path)


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=40)
    parser.add_argument("--batches", action="store_true", help="whole batches with their images")
    parser.add_argument("--batch-count", type=int, default=6, help="batches read by workers")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 368_000, 10_000_000])
    parser.add_argument("--plans", type=int, default=20, help="plans in one timed call")
    parser.add_argument("--loading", action="store_true", help="memory, and opening a graph")
    parser.add_argument("--tuples", action="store_true", help="with --loading: the earlier way")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the growth; implies --loading")
    parser.add_argument("--earlier", action="store_true", help="the earlier way on every graph")
    options = parser.parse_args()
    machine = timing.start(f"batches of {SIZES.items} items: {SIZES}")
    if options.batches:
        whole_batches(options, machine)
        return
    feeders = {f"{items:,} items": Feeder(items) for items in options.items}
    first = next(iter(feeders))

    kinds = {name: functools.partial(x.plans, options.plans) for name, x in feeders.items()}
    kinds |= {
        f"same plan again, {name}": functools.partial(x.same_plan, options.plans)
        for name, x in feeders.items()
    }
    plans = timing.alternate(kinds, repeats=options.repeats)
    plans = {name: seconds / options.plans for name, seconds in plans.items()}
    timing.print_times(plans, unit="plan")
    ratios = [timing.ratio(plans, name, first, MOST_GROWTH) for name in feeders if name != first]
    again = {name: f"same plan again, {name}" for name in feeders}
    ratios += [timing.ratio(plans, again[x], again[first]) for x in feeders if x != first]
    timing.print_ratios(ratios)
    print_processor_time({f"plan, {name}": x for name, x in plans.items()}, MOST_MILLISECONDS)

    others = {f"plan and masks, {name}": x.masks for name, x in feeders.items()}
    slow = feeders if options.earlier else {first: feeders[first]}
    others |= {f"earlier filling alone, {name}": x.earlier for name, x in slow.items()}
    masks = timing.alternate(others, repeats=max(3, options.repeats // 4), warmup=1)
    timing.print_times(masks)
    print_processor_time(masks)
    figures = {"plans": timing.summarise(plans), "others": timing.summarise(masks)}
    if options.loading or options.plot:
        growth = measure_loading(feeders, 3, options.tuples)
        figures["loading"] = growth
        if options.plot:
            median = lambda x: 1e3 * float(np.median(x[:, 1]))  # noqa: E731
            times = {"plan": [median(plans[name]) for name in feeders]}
            times["plan and masks"] = [median(masks[f"plan and masks, {x}"]) for x in feeders]
            plot_growth(options.plot, times, growth)
    timing.write_json(options.json, {"machine": machine, **figures, "ratios": ratios})


if __name__ == "__main__":
    main()

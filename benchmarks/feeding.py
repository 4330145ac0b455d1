"""Does feeding a step cost more, the larger the catalogue is?

    python -m benchmarks.feeding                           # 10 thousand to 10 million items
    python -m benchmarks.feeding --items 10000 368000      # smaller ones

The plan of a batch of 1,024 items (8 relations of 64 pairs, 64 self pairs, as with a pretrained
CLIP) and its masks (which items are related, which pairs are linked), on random graphs of up to
four pairs an item under ten relations. Plans are compared with those on the smallest graph. Beside
them stands the earlier way, on the smallest graph and, with --earlier, on all: the filling items
drawn from a list of all that the pairs leave out.
"""

import functools
import resource
import time

import numpy as np

from benchmarks import timing
from rcml_jax.data.relation_graph import RelationGraph, Splits
from rcml_jax.data.sampling import BatchSizes, RelationSampler

SIZES = BatchSizes(relations=8, pairs=64, intra_pairs=64, items=1024)
RELATIONS, PAIRS_PER_ITEM = 10, 4
MOST_MILLISECONDS, MOST_GROWTH = 3.0, 1.2


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
    nothing = NoTexts(items)
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


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=40)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 368_000, 10_000_000])
    parser.add_argument("--plans", type=int, default=20, help="plans in one timed call")
    parser.add_argument("--earlier", action="store_true", help="the earlier way on every graph")
    options = parser.parse_args()
    machine = timing.start(f"batches of {SIZES.items} items: {SIZES}")
    feeders = {f"{items:,} items": Feeder(items) for items in options.items}
    first = next(iter(feeders))

    plans = timing.alternate(
        {name: functools.partial(x.plans, options.plans) for name, x in feeders.items()},
        repeats=options.repeats,
    )
    plans = {name: seconds / options.plans for name, seconds in plans.items()}
    timing.print_times(plans, unit="plan")
    ratios = [timing.ratio(plans, name, first, MOST_GROWTH) for name in feeders if name != first]
    timing.print_ratios(ratios)
    print_processor_time({f"plan, {name}": x for name, x in plans.items()}, MOST_MILLISECONDS)

    others = {f"plan and masks, {name}": x.masks for name, x in feeders.items()}
    slow = feeders if options.earlier else {first: feeders[first]}
    others |= {f"earlier filling alone, {name}": x.earlier for name, x in slow.items()}
    masks = timing.alternate(others, repeats=max(3, options.repeats // 4), warmup=1)
    timing.print_times(masks)
    print_processor_time(masks)
    figures = {"plans": timing.summarise(plans), "others": timing.summarise(masks)}
    timing.write_json(options.json, {"machine": machine, **figures, "ratios": ratios})


if __name__ == "__main__":
    main()

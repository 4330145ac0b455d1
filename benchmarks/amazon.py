"""How long do Amazon's reviews take until they are a graph, and how much memory?

    python -m benchmarks.amazon                                   # 100,000 and 1 million reviews
    python -m benchmarks.amazon --reviews 1000000 10000000 44000000   # 9 GB of disk for the last
    python -m benchmarks.amazon --corpus DIRECTORY ...            # made before, or real (--domain)
    python -m benchmarks.amazon --drawn 44000000                  # no files: all but the reading

Made-up corpora without images, with as many users and items a review as Electronics has
(`tests.data.planted_amazon`, `--reviews`). Each size is read in a process of its own, which nothing
is cached for: *reading* is decompression, JSON and ids, whose shares are measured on the first
200,000 lines; *5-core* finds the distinct purchases of those who have five; then the records of the
items, the kinds of buyers (k-means), and the pairs with the graph itself. Every item counts as
having an image. Processor time; peak memory is that of the whole process, libraries included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from rcml_jax.data.sources import amazon, amazon_records
from rcml_jax.data.sources.copurchases import (
    Purchases,
    distinct_purchases,
    k_core,
    kinds_of_buyers,
)
from rcml_jax.data.stages import Arrays, pack, unpack
from tests.data import planted_amazon

USERS, ITEMS = 0.416, 0.0364  # of a review, in Electronics
_SAMPLE = 200_000
STAGES = ("reading", "5-core", "items", "kinds", "graph")


def measure(folder: Path, domain: str) -> dict:
    """Seconds of processor time by stage, and what came of it."""
    source = amazon._local(folder, domain)
    shares = sample(source.reviews)
    run = Run()
    for name in ("distinct_purchases", "k_core"):
        function = getattr(amazon_records, name)
        wrapped = lambda *args, function=function: run.timed("5-core", function, *args)  # noqa: E731
        setattr(amazon_records, name, wrapped)
    core = run.timed("reading", amazon_records.read_purchases, source.reviews)
    run.seconds["reading"] -= run.seconds["5-core"]
    items = run.timed("items", amazon_records.read_items, source.items, core["items"])
    more = {"bytes": source.reviews.stat().st_size, "shares": shares}
    return run.graph(unpack(core["counts"])["reviews"], core, items) | more


def measure_drawn(reviews: int) -> dict:
    """The same from ids that were drawn, 16 bytes a review, instead of read."""
    rng = np.random.default_rng(0)
    users, items = np.empty((2, reviews), np.uint64)
    for first in range(0, reviews, _SAMPLE):
        part = slice(first, min(first + _SAMPLE, reviews))
        count = part.stop - part.start
        users[part], items[part] = planted_amazon.draw_large(count, *sizes(reviews), rng)
    run = Run()
    purchases, _ = run.timed("5-core", distinct_purchases, users, items)
    core = vars(run.timed("5-core", k_core, purchases))
    names = planted_amazon.CATEGORIES
    texts = [f"P{item:09d}" for item in core["items"].tolist()]
    found = {name: pack(texts) for name in ("ids", "titles", "images")}
    category = (core["items"] % len(names)).astype(np.int32)
    del users, items, purchases, texts
    return run.graph(reviews, core, found | {"category": category, "categories": pack(names)})


class Run:
    """The stages of one size."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._start = time.perf_counter()

    def timed(self, stage: str, function: Callable, *args: Any, **options: Any) -> Any:
        """What the function returns; its seconds are the stage's."""
        start = time.process_time()
        result = function(*args, **options)
        self.seconds[stage] += time.process_time() - start
        return result

    def graph(self, reviews: int, core: Arrays, items: Arrays) -> dict:
        """The last two stages, and the figures of all."""
        cluster, sentences = self.timed(
            "kinds",
            kinds_of_buyers,
            Purchases(*(core[name] for name in ("users", "items", "user", "item"))),
            items["category"],
            unpack(items["categories"]),
            clusters=amazon.CLUSTERS,
            seed=0,
        )
        options = amazon._Options(
            False, amazon.CLUSTERS, amazon.PAIRS_PER_USER, amazon.PAIRS_PER_ITEM, 0, False
        )
        kinds = {"cluster": cluster, "sentences": pack(sentences)}
        images = [Path("image")] * len(core["items"])
        graph, _ = self.timed("graph", amazon._graph, "x", core, items, kinds, images, options)
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "reviews": reviews,
            "purchases": len(core["user"]),
            "users": len(core["users"]),
            "items": len(graph),
            "pairs": len(graph.pairs),
            "seconds": self.seconds,
            "wall": time.perf_counter() - self._start,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "shares": {},
        }


def sample(path: Path) -> dict[str, float]:
    """Microseconds a review: reading lines, JSON, and ids with their hashes."""
    lines = []
    start = time.process_time()
    with amazon_records._open(path) as file:
        for _ in range(_SAMPLE):
            lines.append(file.readline())
    times = {"decompression": time.process_time() - start}
    times["JSON"] = times["ids"] = 0.0
    for first in range(0, len(lines), 4096):
        batch = [line for line in lines[first : first + 4096] if line]
        start = time.process_time()
        for line in batch:  # a record is not kept, as in the reading
            amazon_records.parse_line(line)
        times["JSON"] += time.process_time() - start
        records = [amazon_records.parse_line(line) for line in batch]
        start = time.process_time()
        for keys in zip(*map(amazon_records.review_ids, records), strict=True):
            amazon_records.identities(keys)
        times["ids"] += time.process_time() - start
    return {name: value / len(lines) * 1e6 for name, value in times.items()}


def sizes(reviews: int) -> tuple[int, int]:
    """Users and items for so many reviews."""
    return max(1, int(USERS * reviews)), max(100, int(ITEMS * reviews))


def corpora(options: argparse.Namespace) -> Iterator[Path]:
    """The folders to read; made ones are removed when they have been read."""
    if options.corpus is not None:
        yield from options.corpus
        return
    for reviews in options.reviews:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            users, items = sizes(reviews)
            yield planted_amazon.write_large(
                Path(folder), reviews=reviews, users=users, items=items
            )


def report(row: dict) -> str:
    """A row of the table."""
    total = sum(row["seconds"].values())
    cells = [f"{row['reviews']:,}", f"{row['purchases']:,}", f"{row['items']:,}"]
    cells += [f"{row['pairs']:,}", *(f"{row['seconds'][stage]:.1f}" for stage in STAGES)]
    cells += [f"{total:.1f}", f"{row['reviews'] / total:,.0f}", f"{row['wall']:.0f}"]
    cells.append(f"{row['peak'] / 2**30:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reviews", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--corpus", type=Path, nargs="+", help="folders to read instead")
    parser.add_argument("--drawn", type=int, help="so many reviews without files")
    parser.add_argument("--domain", default=planted_amazon.DOMAIN)
    parser.add_argument("--directory", type=Path, help="where to make corpora, with the room")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.domain)))
        return
    print(timing.machine())
    header = ("reviews", "5-core", "items", "pairs", *(f"{stage}, s" for stage in STAGES))
    header += ("together, s", "reviews/s", "by the clock, s", "peak, GiB")
    print(f"| {' | '.join(header)} |\n|{'---:|' * len(header)}")
    rows = []
    if options.drawn:
        rows.append(measure_drawn(options.drawn))
        print(report(rows[-1]))
        options.corpus = options.corpus or []
    for folder in corpora(options):
        command = [sys.executable, "-m", "benchmarks.amazon", "--measure", str(folder)]
        done = subprocess.run(
            [*command, "--domain", options.domain], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(report(rows[-1]), flush=True)
    for row in filter(lambda row: row["shares"], rows):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["shares"].items())
        print(f"{row['reviews']:,}: microseconds a review of reading: {parts}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

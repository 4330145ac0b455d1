"""How long do Amazon's reviews take until they are a graph, and how much memory?

    python -m benchmarks.amazon                                   # 100,000 and 1 million reviews
    python -m benchmarks.amazon --reviews 1000000 10000000 44000000   # 9 GB of disk for the last
    python -m benchmarks.amazon --corpus DIRECTORY ...            # made before, or real (--domain)

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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import timing
from rcml_jax.data.sources import amazon, amazon_records
from rcml_jax.data.sources.copurchases import Purchases, kinds_of_buyers
from rcml_jax.data.stages import unpack
from tests.data import planted_amazon

USERS, ITEMS = 0.416, 0.0364  # of a review, in Electronics
_SAMPLE = 200_000
STAGES = ("reading", "5-core", "items", "kinds", "graph")


def measure(folder: Path, domain: str) -> dict:
    """Seconds of processor time by stage, and what came of it."""
    source = amazon._local(folder, domain)
    shares = sample(source.reviews)
    seconds: dict[str, float] = Counter()

    def timed(stage: str, function: Callable, *args: Any, **options: Any) -> Any:
        start = time.process_time()
        result = function(*args, **options)
        seconds[stage] += time.process_time() - start
        return result

    clock = time.perf_counter()
    for name in ("distinct_purchases", "k_core"):
        function = getattr(amazon_records, name)
        wrapped = lambda *args, function=function: timed("5-core", function, *args)  # noqa: E731
        setattr(amazon_records, name, wrapped)
    core = timed("reading", amazon_records.read_purchases, source.reviews)
    seconds["reading"] -= seconds["5-core"]
    items = timed("items", amazon_records.read_items, source.items, core["items"])
    bought = Purchases(*(core[name] for name in ("users", "items", "user", "item")))
    cluster, sentences = timed(
        "kinds",
        kinds_of_buyers,
        bought,
        items["category"],
        unpack(items["categories"]),
        clusters=amazon.CLUSTERS,
        seed=0,
    )
    options = amazon._Options(
        False, amazon.CLUSTERS, amazon.PAIRS_PER_USER, amazon.PAIRS_PER_ITEM, 0, False
    )
    kinds = {"cluster": cluster, "sentences": amazon.pack(sentences)}
    images = [Path("image")] * len(core["items"])
    graph, _ = timed("graph", amazon._graph, domain, core, items, kinds, images, options)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "reviews": unpack(core["counts"])["reviews"],
        "bytes": source.reviews.stat().st_size,
        "purchases": len(core["user"]),
        "users": len(core["users"]),
        "items": len(graph),
        "pairs": len(graph.pairs),
        "seconds": dict(seconds),
        "wall": time.perf_counter() - clock,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "shares": shares,
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


def corpora(options: argparse.Namespace) -> Iterator[Path]:
    """The folders to read; made ones are removed when they have been read."""
    yield from options.corpus or ()
    for reviews in () if options.corpus else options.reviews:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            users, items = max(1, int(USERS * reviews)), max(100, int(ITEMS * reviews))
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
    for folder in corpora(options):
        command = [sys.executable, "-m", "benchmarks.amazon", "--measure", str(folder)]
        done = subprocess.run(
            [*command, "--domain", options.domain], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(report(rows[-1]), flush=True)
    for row in rows:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["shares"].items())
        print(f"{row['reviews']:,}: microseconds a review of reading: {parts}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

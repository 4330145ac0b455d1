"""What does an index of vectors lose, and what does it gain, beside the exact search?

    pip install -e ".[lance]"
    python -m benchmarks.index                           # 10,000 and 100,000 items, both indices
    python -m benchmarks.index --items 1000000 --kinds ivf-pq

Made-up unit vectors: centres drawn at random, about a thousand items around each, one modality and
one relation. Items of the catalogue are the queries. *npy* is the scan of memory-mapped files,
*exact* that of the table, and the indices give candidates that are ranked exactly, all of them as
`rcml-search` has them. Recall@10 is the share of the exact form's ten items that an index finds,
and bytes a vector are those of the index alone: the vectors stay beside it.
"""

import pathlib
import tempfile
import time

import numpy as np

from benchmarks import timing
from rcml_jax.search.catalogue import Searcher
from rcml_jax.search.embedding_store import Plan, Writer, open_embeddings
from rcml_jax.search.items import Items
from rcml_jax.search.lance_search import TableSearcher
from rcml_jax.search.lance_table import INDICES, TableWriter, open_table

K = 10
_AROUND = 1000  # items of a cluster
_NOISE = 0.7  # length of what is added to a centre, whose length is 1
_SHARD = 10_000


def make_plan(count: int, width: int) -> Plan:
    """The plan of a catalogue of texts."""
    names = tuple(map(str, range(count)))
    items = Items(names, names, ("",) * count, lambda _: b"")
    about = {"workdir": "", "method": "", "step": 0, "digest": ""}
    shapes = {"text": (1, width), "image": (1, width)}
    return Plan(about, items, ("These are the same.",), shapes, shard=_SHARD)


def fill(writer: Writer | TableWriter, count: int, width: int) -> None:
    """Write clustered vectors, the same ones into every store."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, count // _AROUND), width), np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for rows in writer.shards():
        n = len(rows)
        vectors = rng.standard_normal((n, width), np.float32) * (_NOISE / np.sqrt(width))
        vectors += centres[rng.integers(0, len(centres), n)]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        has = {"text": np.ones(n, bool), "image": np.zeros(n, bool)}
        writer.write(rows.start, {"text": vectors[None]}, has)
        writer.mark({})


def measure(directory: pathlib.Path, count: int, options) -> dict:
    """The figures of one size."""
    plan, width = make_plan(count, options.width), options.width
    fill(Writer(directory / "npy", plan), count, width)
    files = Searcher(open_embeddings(directory / "npy"))
    address = f"lance://{directory / 'table'}"
    start = time.perf_counter()
    writer = TableWriter(address, plan)
    fill(writer, count, width)
    writer.finish("none")
    print(f"\n{count:,} items, {width} wide: table written in {time.perf_counter() - start:.0f} s")
    keys = [str(i) for i in np.random.default_rng(1).integers(0, count, options.queries)]

    def ask(search, **given) -> tuple[list[set[int]], np.ndarray]:
        """What is found, and the median wall-clock and processor seconds of a query."""
        found, seconds = [], []
        for key in keys:
            start = time.perf_counter(), time.process_time()
            found.append({m.index for m in search(item=key, k=K, against="text", **given)})
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        return found, np.median(seconds, axis=0)

    table = TableSearcher(open_table(address))
    files.search(item=keys[0])
    figures: dict = {}

    def report(name: str, found: list, seconds: np.ndarray, built=(0.0, 0.0), size=0) -> None:
        shares = [len(a & b) / len(b) for a, b in zip(found, exact, strict=True)]
        figures[name] = {
            "recall": float(np.mean(shares)),
            "queries_per_second": 1 / float(seconds[0]),
            "processor_seconds": float(seconds[1]),
            "bytes_per_vector": size / count,
            "seconds_to_build": built,
        }
        print(
            f"{name:<8} recall@{K} {np.mean(shares):.3f}  {1 / seconds[0]:8.1f} queries/s  "
            f"{1e3 * seconds[1]:8.1f} ms of a processor  {size / count:7.1f} bytes a vector  "
            f"built in {built[0]:.0f} s, {built[1]:.0f} of a processor",
            flush=True,
        )

    exact, seconds = ask(files.search)
    report("npy", exact, seconds)
    report("exact", *ask(table.search, exact=True))
    for kind in options.kinds:
        begun = time.perf_counter(), time.process_time()
        TableWriter(address, plan).finish(kind)
        built = time.perf_counter() - begun[0], time.process_time() - begun[1]
        table = TableSearcher(open_table(address))
        size = table.table.indices["vector_text_0"].size_bytes
        table.search(item=keys[0], exact=False)
        report(kind, *ask(table.search, exact=False), built, size)
    return figures


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__ or "", repeats=1)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=INDICES, default=INDICES)
    parser.add_argument("--directory", help="where the stores go for a while")
    options = parser.parse_args()
    figures: dict = {"machine": timing.start(f"clustered vectors, {options.width} wide")}
    for count in options.items:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            figures[str(count)] = measure(pathlib.Path(directory), count, options)
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()

"""What does a catalogue of many items cost `rcml-embed`, apart from embedding it?

    python -m benchmarks.catalogue_items                        # 1,000,000 rows of items.jsonl
    python -m benchmarks.catalogue_items --form parquet --items 100000

Ids of 10 characters, texts of 62 and names of images that are not there. *read* is `read_items`,
*begin* a new store of one relation and vectors of width 1, *again* a store that is whole, which
compares all items with those of before. Seconds are of a processor, and memory is how much the peak
of the process grew beyond what its imports take.
"""

import argparse
import json
import pathlib
import resource
import tempfile
import time

import numpy as np

from rcml_jax.search.embedding_store import Plan, Writer, open_embeddings
from rcml_jax.search.items import read_items

_ROWS = 50_000  # of a part of a Parquet file, and of a shard


def write_table(folder: pathlib.Path, count: int, form: str) -> None:
    """A table of made-up items, written in parts."""
    parts = (
        [
            {
                "id": f"{n:010d}",
                "text": f"item {n:08d} of a made-up catalogue, whose text has 62 letters"[:62],
                "image": f"images/{n:010d}.jpg",
            }
            for n in range(start, min(start + _ROWS, count))
        ]
        for start in range(0, count, _ROWS)
    )
    if form == "jsonl":
        with (folder / "items.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for rows in parts for row in rows)
        return
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "image")])
    with pyarrow.parquet.ParquetWriter(folder / "items.parquet", schema) as writer:
        for rows in parts:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def plan_of(folder: pathlib.Path) -> Plan:
    """The plan of a store of the table."""
    about = {"workdir": "", "method": "", "step": 0, "digest": ""}
    shapes = {"text": (1, 1), "image": (1, 1)}
    return Plan(about, read_items(folder), ("These are the same.",), shapes, shard=_ROWS)


def main() -> None:
    """Print seconds and memory of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("jsonl", "parquet"), default="jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_table(folder, options.items, options.form)
        before, start = _peak(), time.process_time()

        def tell(what: str) -> None:
            nonlocal start
            seconds, start = time.process_time() - start, time.process_time()
            print(f"{what}: {seconds:.1f} s, {_peak() - before:.3f} GiB so far", flush=True)

        plan = plan_of(folder)
        tell("read")
        writer = Writer(folder / "store", plan)
        tell("begin")
        for rows in writer.shards():
            has = {"text": np.ones(len(rows), bool), "image": np.zeros(len(rows), bool)}
            writer.write(rows.start, {"text": np.ones((1, len(rows), 1), np.float32)}, has)
            writer.mark({})
        Writer(folder / "store", plan)
        tell("again")
        open_embeddings(folder / "store").number(f"{options.items - 1:010d}")
        tell("open, and find an item")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()

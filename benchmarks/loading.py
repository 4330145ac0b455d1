"""What does a process hold of a prepared graph, and how long does it take to open it?

    python -m benchmarks.loading FOLDER             # ids and texts as columns: as it is
    python -m benchmarks.loading FOLDER --tuples    # as tuples of strings: the earlier way

One measurement, in a process of its own, of a folder that `write_prepared` made; `feeding.py` runs
it for every size. It prints a line of JSON: seconds until the graph is open and until the sampler
and the lists of neighbors are made, and bytes of memory that belong to the process alone
(anonymous; mapped files are the page cache's, and are not counted), then and at the peak.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from rcml_jax.data import prepared
from rcml_jax.data.relation_graph import RelationGraph, Splits
from rcml_jax.data.sampling import BatchSizes, RelationSampler
from rcml_jax.data.stages import load_arrays, save_arrays
from rcml_jax.data.strings import StringColumn

SIZES = BatchSizes(relations=8, pairs=64, intra_pairs=64, items=1024)
_TEXT = b", a text of sixty characters, as long as a shop's is"


def write_prepared(folder: pathlib.Path, graph: RelationGraph, splits: Splits) -> None:
    """What `prepared` keeps of a graph, with ids and texts, but without records of images."""
    folder.mkdir(parents=True)
    n = len(graph)
    names = ("graph_name", "relations", "relation_ids", "intra_relation", "label_names")
    values: tuple = (graph.name, graph.relations, [], graph.intra_relation, graph.label_names)
    metadata = dict(zip(names, values, strict=True))
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "dataset_info.json").write_text(json.dumps({"splits": [{"shardLengths": [str(n)]}]}))
    for path in prepared._shards(folder, [n]):
        path.touch()
    numbered(n, b"").save(folder / "ids.strings")
    numbered(n, _TEXT).save(folder / "texts.strings")
    save_arrays(
        folder / "graph.npz",
        {
            "positions": np.arange(n),
            "labels": graph.labels,
            "item_split": splits.item_split,
            "pairs": graph.pairs,
            "pair_split": graph.pair_split,
        },
    )


def numbered(count: int, text: bytes) -> StringColumn:
    """Strings of ten digits, the number of each, and the same text behind it."""
    width = 10 + len(text)
    data = np.empty((count, width), np.uint8)
    data[:, 10:] = np.frombuffer(text, np.uint8)
    number = np.arange(count)
    for place in range(9, -1, -1):
        data[:, place] = number % 10 + ord("0")
        number //= 10
    return StringColumn(np.arange(count + 1) * width, data.ravel())


def write_earlier(folder: pathlib.Path) -> None:
    """The two columns as the JSON texts that were in `graph.npz` before, in a file of their own."""
    columns = {name: StringColumn.open(folder / f"{name}.strings") for name in ("ids", "texts")}
    lists = {name: json.dumps(column[:]).encode() for name, column in columns.items()}
    save_arrays(folder / "earlier.npz", {k: np.frombuffer(x, np.uint8) for k, x in lists.items()})


def run(folder: pathlib.Path, *options: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def memory() -> int:
    """Bytes of anonymous memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def measure(folder: pathlib.Path, tuples: bool) -> dict[str, float]:
    """Open the graph, then make what feeding needs; seconds and bytes."""
    before = memory()
    start = time.process_time()
    graph = prepared._read_graph(folder)
    if tuples:
        stored = load_arrays(folder / "earlier.npz") or {}
        strings: dict[str, Any] = {k: tuple(json.loads(x.tobytes())) for k, x in stored.items()}
        del stored
        graph = dataclasses.replace(graph, **strings).validate()
        assert isinstance(graph.ids, tuple)
    opened, held = time.process_time(), memory()
    assert graph.item_split is not None
    a, b = graph.item_split[graph.pairs[:, 0]], graph.item_split[graph.pairs[:, 1]]
    pair_split = np.where(a == b, a, -1).astype(np.int8)
    sampler = RelationSampler(
        graph, Splits(graph.item_split, pair_split, "item", graph.pairs), SIZES, seed=0
    )
    items = sampler[0]["items"]
    graph.related_block(items, items)
    texts = graph.texts[items] if isinstance(graph.texts, StringColumn) else ()
    assert tuples or len(texts) == SIZES.items
    del a, b, texts
    return {
        "items": len(graph),
        "pairs": len(graph.pairs),
        "open seconds": opened - start,
        "ready seconds": time.process_time() - start,
        "open bytes": held - before,
        "ready bytes": memory() - before,
        "peak bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tuples", action="store_true", help="the earlier way")
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.tuples)))
    os._exit(0)  # to free millions of strings takes seconds


if __name__ == "__main__":
    main()

"""What does it cost to prepare a folder of images, and how much faster are two processes?

    python -m benchmarks.preparation                # 5,000 JPEGs of 800 pixels, three turns
    python -m benchmarks.preparation --items 1000

The source `folder` prepares the same images in this process and in two others, in turns; all the
files that they write must be the same. Processor time is that of all processes; two need two free
cores to show their gain.
"""

import hashlib
import pathlib
import resource
import tempfile
import time

import numpy as np

from rcml_jax.data.sources import folder
from rcml_jax.data.stages import Runner

_SIDE = 800


def main() -> None:
    """Measure, print and write."""
    # Workers import this module: only what they need stands at its top.
    from benchmarks import timing

    parser = timing.parser(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--items", type=int, default=5000)
    options = parser.parse_args()
    machine = timing.start(f"{options.items:,} JPEGs of {_SIDE} pixels")
    with tempfile.TemporaryDirectory() as root:
        catalogue = pathlib.Path(root, "catalogue")
        _write_catalogue(catalogue, options.items)
        rows: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for turn in range(options.repeats):
            for workers, found in rows.items():
                before, start = _processor_time(), time.perf_counter()
                cache = pathlib.Path(root, f"{turn}-{workers}")
                folder.load(catalogue, cache, runner=Runner(workers), log=lambda line: None)
                clock, spent = time.perf_counter() - start, _processor_time() - before
                found.append({"clock": clock, "processor": spent})
                print(f"{workers} processes: {clock:.1f} s, {spent:.1f} s of a core", flush=True)
            one, two = (_digests(pathlib.Path(root, f"{turn}-{workers}")) for workers in rows)
            if one != two:
                raise SystemExit("one and two processes have written other files")
    clocks = {workers: np.array([x["clock"] for x in found]) for workers, found in rows.items()}
    gain = float(np.median(clocks[1] / clocks[2]))
    print(f"two processes: {gain:.2f} times as fast as one; the files are the same")
    timing.write_json(options.json, {"machine": machine, "preparation": rows, "gain": gain})


def _write_catalogue(root: pathlib.Path, count: int) -> None:
    """A folder of `count` items, each with a JPEG and a pair with the next one."""
    from benchmarks.images import photograph

    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    drawn = [photograph(rng, _SIDE) for _ in range(20)]
    for i in range(count):
        (root / "images" / f"{i}.jpg").write_bytes(drawn[i % len(drawn)])
    tables = {
        "items": ["id,text,image", *(f"{i},item {i},images/{i}.jpg" for i in range(count))],
        "relations": ["id,sentence", "next,One comes after the other."],
        "pairs": ["item_a,item_b,relation", *(f"{i},{i + 1},next" for i in range(count - 1))],
    }
    for name, lines in tables.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")


def _processor_time() -> float:
    """Seconds of this process and of those that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _digests(root: pathlib.Path) -> dict[str, str]:
    files = {path for path in root.rglob("*") if path.is_file()}
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


if __name__ == "__main__":
    main()

"""How many questions a second does `rcml-serve` answer, alone and 32 at once, and does it grow?

    python -m benchmarks.service --workdir runs/rcml
    python -m benchmarks.service --workdir runs/rcml --embeddings embeddings --json service.json

The service runs in a process of its own, as the command starts it; this process asks over loopback,
one question after the other and then 32 at a time. Kinds of questions: an *item* under a known
sentence, a *text* under a known sentence, an *image* under a known sentence, and an item under a
*new* sentence, none of them asked before, which is one pass over all token states. Memory is the
resident set of the service's process after all kinds were asked in turn, 32 at a time.
"""

import asyncio
import base64
import contextlib
import io
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
from PIL import Image

from benchmarks import timing
from rcml_jax.search.embedding_store import open_embeddings

AT_ONCE = 32
MARKS = (100, 1_000, 3_000)


@contextlib.contextmanager
def started(module: str, *args: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address that a command prints once it serves, and its process, which is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *args, "--port=0"],
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        try:
            while not (found := re.search(r"http://[^\s]+", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            yield found[0], process
        finally:
            process.terminate()
            process.wait(30)


def kinds(embeddings: pathlib.Path) -> dict[str, Callable[[int], dict]]:
    """Of each kind what makes the question of a number."""
    store = open_embeddings(embeddings)
    known, items = store.relations[1:] or ("",), store.items
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 8, 8, 3), np.uint8)

    def image(n: int) -> str:
        out = io.BytesIO()
        Image.fromarray(pixels[n % 64]).resize((256, 256)).save(out, "PNG")
        return base64.b64encode(out.getvalue()).decode()

    images = [image(n) for n in range(64)]
    said = lambda n: known[n % len(known)]  # noqa: E731
    key = lambda n: items.ids[n % len(items)]  # noqa: E731
    text = lambda n: items.texts[n % len(items)] or "something"  # noqa: E731
    found = {
        "item": lambda n: {"item": key(n), "relation": said(n)},
        "text": lambda n: {"text": text(n), "relation": said(n)},
        "image": lambda n: {"image": images[n % 64], "relation": said(n)},
    }
    if store.tokens is not None:
        found["new sentence"] = lambda n: {"item": key(n), "relation": f"both have the number {n}"}
    return found


async def ask(client: httpx.AsyncClient, questions: Iterator[dict], at_once: int) -> np.ndarray:
    """Seconds of each answer, `at_once` questions being on their way all the time."""
    seconds = []

    async def one_after_another() -> None:
        for question in questions:
            start = time.perf_counter()
            answer = await client.post("/search", json=question)
            assert answer.status_code == 200, answer.text
            seconds.append(time.perf_counter() - start)

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return np.array(seconds)


def resident(process: subprocess.Popen) -> float:
    """MiB of the resident set of a process (Linux)."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


async def measure(address: str, process: subprocess.Popen, made: dict, count: int) -> dict:
    """Questions a second and the memory, printed as they come."""
    figures: dict = {"rates": {}, "memory": {}}
    numbers = itertools.count()
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        print(f"\n{'questions a second':<24}{'alone':>10}{AT_ONCE:>10}{'ms alone':>10}{'ms':>10}")
        for kind, question in made.items():
            row = {}
            # A first round is not timed: sizes and lengths that are new are compiled.
            for at_once, some in ((AT_ONCE, 2 * AT_ONCE), (1, count // 4), (AT_ONCE, count)):
                asked = (question(next(numbers)) for _ in range(some))
                start = time.perf_counter()
                seconds = await ask(client, asked, at_once)
                rate = len(seconds) / (time.perf_counter() - start)
                row[at_once] = {"rate": rate, "ms": 1e3 * float(np.median(seconds))}
            figures["rates"][kind] = row
            cells = [row[n][x] for x in ("rate", "ms") for n in (1, AT_ONCE)]
            print(f"{kind:<24}" + "".join(f"{x:>10.1f}" for x in cells), flush=True)
        print("\nMiB of the service after questions of all kinds in turn")
        turns, done = itertools.cycle(made.values()), 0
        for mark in MARKS:
            asked = (next(turns)(next(numbers)) for _ in range(mark - done))
            await ask(client, asked, AT_ONCE)
            done, figures["memory"][mark] = mark, resident(process)
            print(f"{mark:>8,}{figures['memory'][mark]:>10.0f}", flush=True)
    return figures


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__ or "", repeats=256)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--embeddings", type=pathlib.Path)
    options, overrides = parser.parse_known_args()
    figures = {"machine": timing.start(f"rcml-serve, {AT_ONCE} at once")}
    args = [f"--workdir={options.workdir}", *overrides]
    if options.embeddings:
        args.append(f"--embeddings={options.embeddings}")
    start = time.perf_counter()
    with started("rcml_jax.cli.serve", *args) as (address, process):
        print(f"started in {time.perf_counter() - start:.1f} s, {resident(process):.0f} MiB")
        made = kinds(options.embeddings or options.workdir / "explorer")
        figures |= asyncio.run(measure(address, process, made, options.repeats))
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()

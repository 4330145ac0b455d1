"""Does reading images keep up with a training step of ViT-B/32?

    python -m benchmarks.images                     # about 5 minutes on 2 cores
    python -m benchmarks.images --steps-together 0  # without the step on read batches

The images are JPEGs of 800 and of 500 pixels, noise with the spectrum of photographs, prepared as
a data set and read back as in training: an ArrayRecord file, Pillow, CLIP's resize to 224 pixels,
collation, grain. The memory cache is off, so that every image is decoded. The step is that of
`benchmarks.train_step`. First each runs alone, in turn, then the step takes the batches that are
read; it is waited for before the next batch is asked for, so that all waiting shows.
"""

import argparse
import functools
import io
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from PIL import Image

from benchmarks import timing, train_step
from rcml_jax.data import prepared
from rcml_jax.data.images import EncodedImages, ImageBank, augment
from rcml_jax.data.relation_graph import RelationGraph, pairs_within, split_graph
from rcml_jax.data.sampling import BatchSizes, RelationSampler, batch_iterator, collator
from rcml_jax.data.tokenizer import train_tokenizer
from rcml_jax.training import optimizer, step
from rcml_jax.training.sharding import ShardedJit

STEP = "training step"
SIDES = (800, 500)
TARGET = 1 / 3  # of the step's time for an image
WAITING = 0.02  # of the time, at most
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty")
_TEXT_LENGTH = 16
_IMAGES = 32
_SKIPPED = 16  # batches that may have been read ahead while something else was timed


def photograph(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG whose longer side is `side`: noise with an amplitude of 1/f, as photographs have."""
    height, width = side, round(side * rng.uniform(0.65, 1.0))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((3, height, width)))
    grey, *colours = np.fft.irfft2(noise / frequency, s=(height, width))
    planes = np.stack([grey + 0.3 * colour for colour in (colours[0], 0.0 * grey, colours[1])], -1)
    pixels = 128 + 50 * (planes - planes.mean()) / planes.std()
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def prepare(folder: pathlib.Path, side: int, items: int, relations: int) -> RelationGraph:
    """A data set of random items on the disk; its images come again after every 32."""
    rng = np.random.default_rng(side)
    images = [photograph(rng, side) for _ in range(min(items, _IMAGES))]
    size = sum(map(len, images)) / len(images) / 1024
    print(f"{side} pixels: {size:.0f} KiB an image", flush=True)
    texts = [" ".join(rng.choice(WORDS, 10)) for _ in range(items + relations)]
    pairs = pairs_within([np.arange(items)[r::relations] for r in range(relations)])
    graph = RelationGraph(
        name=f"images_{side}",
        ids=tuple(map(str, range(items))),
        texts=tuple(texts[:items]),
        labels=np.full(items, -1, np.int32),
        label_names=(),
        relations=tuple(f"{text} {r}" for r, text in enumerate(texts[items:])),
        intra_relation=" ".join(WORDS),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=EncodedImages(items, lambda index: images[index % len(images)]),
    )
    prepared.prepare(folder, graph)
    return prepared.load(folder, graph.name)


def source(config, graph: RelationGraph, image_size: int) -> tuple[RelationSampler, Callable]:
    """What `RelationTask.batches` gives to grain: batch plans, and a function that reads them."""
    splits = split_graph(graph, seed=0, disjoint="item")
    batch = config.batch
    sizes = BatchSizes(
        batch.relations, batch.pairs_per_relation, batch.intra_pairs, items=batch.size
    )
    sizes.check(len(splits.items("train")))
    collate = collator(
        graph,
        train_tokenizer([*graph.texts, *graph.relations], 1000),
        ImageBank(graph.images, image_size, cache_bytes=0),
        functools.partial(_sentence, graph),
        _TEXT_LENGTH,
        functools.partial(augment, shift=batch.image_shift, flip=batch.image_flip),
    )
    return RelationSampler(graph, splits, sizes, seed=0), collate


def _sentence(graph: RelationGraph, relation: int, drawn: int) -> str:
    return graph.intra_relation if relation < 0 else graph.relations[relation]


def pipelines(config, graphs: dict[int, RelationGraph], image_size: int) -> dict[str, Iterator]:
    """Iterators over batches: every size as by default, the largest in other ways, too."""
    default = config.data.threads
    result = {}
    for side, graph in graphs.items():
        sampler, collate = source(config, graph, image_size)
        result[_name(side, default)] = batch_iterator(sampler, collate, default)
        if side == max(graphs):
            for threads in sorted({1, 2, 4} - {default}):
                result[_name(side, threads)] = batch_iterator(sampler, collate, threads)
            for workers in (1, 2):
                result[f"{side} pixels, {workers} processes"] = batch_iterator(
                    sampler, collate, workers=workers
                )
    return result


def _name(side: int, threads: int) -> str:
    return f"{side} pixels, threads={threads}"


def training_step(config, clip_config, batch: dict) -> Callable[[dict], None]:
    """A function that takes one training step on a batch, as the loop compiles it, to its end."""
    method = train_step.build_method("rcml", config, clip_config, small=False)
    devices = ShardedJit(jax.devices()[:1])
    params = jax.device_get(jax.jit(method.init_params)(jax.random.key(0), batch))
    trained = method.frozen(params), method.decayed(params)
    adamw, _ = optimizer.build(method.config.optimizer, 1000, *trained)
    compiled = devices.compile(step.make_step(method, adamw, 1000))
    state = [devices.put_state(step.create(params, adamw, jax.random.key(1)))]

    def run(batch: dict) -> None:
        state[0], metrics = compiled(state[0], devices.put_batch(batch))
        jax.block_until_ready((state[0], metrics))

    return run


def alone(args, run: Callable, batch: dict, sources: dict[str, Iterator]) -> timing.Times:
    """Seconds an image of the step and of every pipeline, in an order drawn anew each round.

    (repeats, 2) each: wall-clock and processor seconds; the latter not of other processes.
    """
    names = [STEP, *sources]
    times = {name: np.full((args.repeats, 2), np.nan) for name in names}
    size = len(batch["items"]["ids"])
    for _ in range(2):
        run(batch)  # compiles, and is slow once more
    rng = np.random.default_rng(0)
    for turn in range(args.repeats):
        for name in rng.permutation(names):
            count = 1 if name == STEP else args.batches
            for _ in range(0 if name == STEP else _SKIPPED):
                next(sources[name])
            start = time.perf_counter(), time.process_time()
            for _ in range(count):
                if name == STEP:
                    run(batch)
                else:
                    next(sources[name])
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            times[name][turn] = np.array(spent) / (count * size)
            if "processes" in name:
                times[name][turn, 1] = np.nan
            time.sleep(0.3)  # what is read ahead now must not slow what comes next
    return times


def together(run: Callable, iterator: Iterator, steps: int) -> tuple[float, float]:
    """The share of the time that the step waits for data, and the median seconds of a step."""
    run(next(iterator))
    waited, stepped = np.zeros(steps), np.zeros(steps)
    for turn in range(steps):
        start = time.perf_counter()
        batch = next(iterator)
        ready = time.perf_counter()
        run(batch)
        waited[turn], stepped[turn] = ready - start, time.perf_counter() - ready
    return float(waited.sum() / (waited.sum() + stepped.sum())), float(np.median(stepped))


def report(args, run: Callable, sources: dict[str, Iterator], times: timing.Times, size: int):
    """Print what was measured alone, and measure and print the rest."""
    speed = {name: float(1 / np.median(t[:, 0])) for name, t in times.items()}
    print("\nimages per second, alone" + " " * 16 + "   images   times the step's")
    for name, rate in speed.items():
        print(f"{name:<40}{rate:>9.1f}{rate / speed[STEP]:>10.1f}")
    if not args.steps_together:
        return speed, {}
    waits = {}
    print("\nthe step on read batches" + " " * 16 + "  waits %   step's time to alone")
    for name, iterator in sources.items():
        share, seconds = together(run, iterator, args.steps_together)
        slower = seconds * speed[STEP] / size
        met = "met" if share < WAITING else "missed"
        print(f"{name:<40}{100 * share:>9.2f}{slower:>10.2f}   under {WAITING:.0%} {met}")
        waits[name] = {"waiting": share, "step_to_alone": slower, "met": share < WAITING}
    return speed, waits


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--batch", type=int, default=16, help="items a step")
    parser.add_argument("--relations", type=int, default=4, help="relations a step")
    parser.add_argument("--batches", type=int, default=10, help="batches read in a round")
    parser.add_argument("--steps-together", type=int, default=6, help="steps on read batches")
    parser.add_argument("--items", type=int, default=128, help="items of the data set")
    args = parser.parse_args()
    config, clip_config = train_step.configuration(argparse.Namespace(small=False, **vars(args)))
    image_size = clip_config.vision_config.image_size
    machine = timing.start(
        f"Reading images for training steps of ViT-B/32 on {config.batch.size} items"
    )
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            side: prepare(pathlib.Path(folder), side, args.items, 2 * args.relations)
            for side in SIDES
        }
        sources = pipelines(config, graphs, image_size)
        batch = next(sources[_name(SIDES[0], config.data.threads)])
        run = training_step(config, clip_config, batch)
        times = alone(args, run, batch, sources)
        timing.print_times(times, unit="image")
        ratios = [timing.ratio(times, name, STEP, TARGET) for name in sources]
        timing.print_ratios(ratios)
        speed, waits = report(args, run, sources, times, config.batch.size)
    figures = {"machine": machine, "images_per_second": speed, "ratios": ratios, "waits": waits}
    timing.write_json(args.json, figures)


if __name__ == "__main__":
    main()

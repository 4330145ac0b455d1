"""What does an option of configs/rcml.py cost a training step, at two sizes of the batch?

    python -m benchmarks.options
    python -m benchmarks.options --config configs/rcml.py:openmoji,text=minilm --of stored
    python -m benchmarks.options --items 256,1024 --repeats 10

Each variant is a method on the configuration's own data, as `train.py` builds it: reading its
batches (planning, tokens, images, masks) and its compiled step are timed in turn with those of the
variant that it is compared with.
"""

import pathlib
import tempfile
from typing import Any

import jax

from benchmarks import timing
from rcml_jax.cli.commands import load_config_file, parse_flags
from rcml_jax.methods import build
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.training import optimizer, step
from rcml_jax.training.sharding import ShardedJit
from rcml_jax.training.workdir import prepare

#: Options by name: what is measured, and beside what; "rcml" and "clip" are those methods as given.
COMPARISONS = {
    "gate": ("model.gate=True", "model.gate=False"),
    "negatives": ("loss.negatives=unlinked", "loss.negatives=unrelated"),
    "identification": ("loss.identification_weight=1.0", "loss.identification_weight=0.0"),
    "noise": ("batch.sentence_noise=1.0", "batch.sentence_noise=0.0"),
    "mask": ("method=clip,loss.mask_related=True", "method=clip,loss.mask_related=False"),
    "rcml": ("method=rcml", "method=clip"),
    "declip": ("method=declip", "method=clip"),
    "stored": ("model.store_frozen=True", "model.store_frozen=False"),
}


class Variant:
    """A method, the iterator over its batches and its step, whose state is kept here."""

    def __init__(self, config: str, overrides: list[str], items: int, directory: pathlib.Path):
        values = parse_flags(overrides, load_config_file(config)).config
        scale = items / values.batch.size
        values.batch.size = items
        values.data.threads = 0  # A batch is read when it is asked for, not ahead.
        for name in ("pairs_per_relation", "intra_pairs"):
            values.batch[name] = round(values.batch[name] * scale)
        prepare(directory, values)
        method = build(values, directory)
        assert isinstance(method, RelationalMethod)
        devices = ShardedJit(jax.devices()[:1])
        self._batches = method.batches()
        batch = next(self._batches)
        params = jax.jit(method.init_params)(jax.random.key(0), batch)
        adamw, _ = optimizer.build(
            values.optimizer, 1000, method.frozen(params), method.decayed(params)
        )
        self._step = devices.compile(step.make_step(method, adamw, 1000))
        self._state = devices.put_state(step.create(params, adamw, jax.random.key(1)))
        self._batch = devices.put_batch(batch)

    def read(self) -> Any:
        """The next batch, on the host."""
        return next(self._batches)

    def train(self) -> Any:
        """One step, always on the same batch."""
        self._state, metrics = self._step(self._state, self._batch)
        return metrics


def compare(name: str, config: str, overrides: list[str], items: int, repeats: int) -> list[dict]:
    """The ratios of an option: its step and its reading of a batch."""
    variants = {}
    with tempfile.TemporaryDirectory() as directory:
        for place, changes in enumerate(COMPARISONS[name]):
            options = [f"--config.{change}" for change in changes.split(",")]
            workdir = pathlib.Path(directory) / str(place)
            variants[changes] = Variant(config, [*overrides, *options], items, workdir)
        ratios = []
        for part in ("train", "read"):
            functions = {title: getattr(variant, part) for title, variant in variants.items()}
            times = timing.alternate(functions, repeats=repeats)
            one, other = functions
            found = timing.ratio(times, one, other)
            baseline = timing.summarise(times)[found["to"]]["median"]
            ratios.append(
                {"option": name, "items": items, "part": part, "ms": 1e3 * baseline} | found
            )
    return ratios


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=10)
    parser.add_argument("--config", default="configs/rcml.py", help="FILE.py[:ARGUMENT]")
    parser.add_argument("--items", default="256,1024", help="distinct items of a batch")
    parser.add_argument(
        "--of",
        default="gate,negatives,identification,noise,mask,rcml,declip",
        help=f"some of {','.join(COMPARISONS)}",
    )
    args, overrides = parser.parse_known_args()
    machine = timing.start(f"Options of {args.config}: step and reading of a batch")
    columns = "".join(f"{column:>8}" for column in ("ratio", "p10", "p90"))
    print(f"\n{'option':<16}{'items':>6}  {'part':<6}{'without, ms':>12}{columns}")
    rows = []
    for name in args.of.split(","):
        for items in map(int, args.items.split(",")):
            for row in compare(name, args.config, overrides, items, args.repeats):
                rows.append(row)
                print(
                    f"{name:<16}{items:>6}  {row['part']:<6}{row['ms']:>12.1f}"
                    f"{row['median']:>8.3f}{row['p10']:>8.3f}{row['p90']:>8.3f}",
                    flush=True,
                )
    timing.write_json(args.json, {"machine": machine, "config": args.config, "ratios": rows})


if __name__ == "__main__":
    main()

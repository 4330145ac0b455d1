"""What does a sentence cost that a catalogue was never embedded under?

    python -m benchmarks.search                         # 100,000 items; 12 GB of disk
    python -m benchmarks.search --items 1914
    python -m benchmarks.search --types int8 --directory /fast/disk
    python -m benchmarks.search --workdir runs/rcml     # a run's own items, or --embeddings DIR

Made-up token states of ViT-B/32's shapes: 50 of an image and 24 of a text, 512 wide. *Exact*
encodes the sentence with a text tower of ViT-B/32's size, folds it into the pooling head, pools
every item anew and ranks all of them for one item. *Two-stage* pools only those 1,000 that are
nearest under a known sentence. *Known sentence* is the scan of embeddings that are there already,
which a new sentence cannot be cheaper than. Weights and states are random: times and sizes mean
something, what is found does not. `--workdir` measures a trained run on real items instead, which
are embedded into `WORKDIR/explorer` if they are not there yet, as `rcml-explore` does it.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from transformers import CLIPConfig

from benchmarks import timing
from rcml_jax.cli.explore import open_explorer
from rcml_jax.methods.relational import TokenReader
from rcml_jax.models.rcml import RCML
from rcml_jax.search.catalogue import Model, Searcher
from rcml_jax.search.embedding_store import MODALITIES, Embeddings
from rcml_jax.search.items import Items
from rcml_jax.search.token_store import TYPES, TokenLayout, TokenWriter

WIDTH = 512
LENGTHS = {"text": 24, "image": 50}
CANDIDATES = 1000
_SENTENCE_TOKENS = 24


class Reader(TokenReader):
    """The relation side of RCML on ViT-B/32 with random weights; sentences are random tokens."""

    width, image_length = WIDTH, LENGTHS["image"]

    def __init__(self):
        self.model = RCML(CLIPConfig(), FrozenDict(gate=True))
        rng = np.random.default_rng(0)
        inputs = np.zeros((1, 8), np.int32), None, np.zeros((1, 224, 224, 3), np.uint8)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *inputs)
        draw = lambda x: 0.02 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
        self.variables = jax.tree.map(lambda x: jnp.asarray(draw(x)), shapes)
        self.call = jax.jit(
            lambda name, variables, *inputs: self.model.apply(variables, *inputs, method=name),
            static_argnums=0,
        )

    def relations(self, sentences):
        """(R, 512)."""
        rng = np.random.default_rng(len(sentences[0]))
        ids = rng.integers(1, 40_000, (len(sentences), _SENTENCE_TOKENS))
        ids[:, -1] = 49407  # the end token
        return self.call("relation", self.variables, ids)

    def fold(self, relation, intra):
        """As of the head."""
        return self.call("fold", self.variables, relation, intra)

    def _unused(self, *_):
        raise NotImplementedError("an item asks, so that no text and no image is embedded")

    text = image = text_lengths = pool = attention = _unused


class Method:
    """What a `Searcher` needs of a method."""

    def __init__(self, reader):
        self.reader = reader

    def token_reader(self, params):
        """The reader, whatever the parameters."""
        return self.reader


def make_store(directory: pathlib.Path, items: Items, dtype: str) -> Embeddings:
    """A store of random token states and embeddings, in files as `rcml-embed` writes them."""
    n, rng = len(items), np.random.default_rng(0)
    row = np.arange(n, dtype=np.int32)
    places = {
        name: np.stack([np.full_like(row, length), row, np.full_like(row, length), 0 * row], 1)
        for name, length in LENGTHS.items()
    }
    layout = TokenLayout(dtype, WIDTH, places)
    TokenWriter(directory, layout, items, begun=False)
    for name, length in LENGTHS.items():
        states = np.load(directory / f"states_{name}_{length}.npy", mmap_mode="r+")
        for start in range(0, n, 1000):
            part = states[start : start + 1000]
            noise = rng.integers(-127, 128, part.shape, np.int8)
            part[:] = noise if dtype == "int8" else noise * np.float16(0.01)
        states.flush()
        if dtype == "int8":
            scales = np.load(directory / f"scales_{name}_{length}.npy", mmap_mode="r+")
            scales[:] = 0.01
            scales.flush()
    vectors = {}
    for name in MODALITIES:
        vectors[name] = rng.standard_normal((2, n, WIDTH), np.float32)
        vectors[name] /= np.linalg.norm(vectors[name], axis=-1, keepdims=True)
    has = {name: np.ones(n, bool) for name in MODALITIES}
    about = {"workdir": "", "step": 0, "digest": ""}
    relations = ("These are the same.", "Both are known.")
    return Embeddings(directory, items, relations, vectors, has, about, {}, layout.manifest())


def made_up(embeddings: Embeddings, reader: Reader) -> Searcher:
    """A searcher of a store of `make_store`."""
    about = {"workdir": "", "digest": ""}
    return Searcher(embeddings, Model(Method(reader), None, about, (jax.devices()[0],)))  # type: ignore[arg-type]


def measure(searcher: Searcher, repeats: int) -> timing.Times:
    """Seconds of one query under a known sentence, exactly and in two stages under a new one."""
    embeddings, reader = searcher.embeddings, searcher._reader
    item = embeddings.items.ids[0]

    def forget():
        searcher._pooled.clear()
        searcher._last = None, None

    def exact():
        forget()
        return searcher.search("a sentence that is new", item=item)

    def two_stage():
        forget()
        return searcher.search("a sentence that is new", item=item, candidates=CANDIDATES)

    known = lambda: searcher.search(embeddings.relations[1], item=item)  # noqa: E731
    sentence = lambda: reader.relations(["a sentence that is new"])  # noqa: E731
    functions = {"known sentence": known, "two-stage": two_stage, "exact": exact}
    functions["the text tower"] = sentence
    return timing.alternate(functions, repeats=repeats)


def report(searcher: Searcher, repeats: int) -> dict:
    """Measure and print one catalogue; returns the figures."""
    tokens, items = searcher.embeddings.tokens, len(searcher.embeddings.items)
    assert tokens is not None
    size = tokens["bytes"]
    print(f"\n{tokens['dtype']}: {size / items:,.0f} bytes an item, {size / 2**20:,.1f} MiB")
    times = measure(searcher, repeats)
    timing.print_times(times)
    processor = {name: float(np.median(t[:, 1])) for name, t in times.items()}
    print("processor seconds: " + ", ".join(f"{n} {s:.3f}" for n, s in processor.items()))
    return timing.summarise(times) | {"bytes": size}


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__ or "", repeats=5)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--directory", help="where the states go for a while")
    parser.add_argument("--workdir", type=pathlib.Path, help="a run of rcml, with real items")
    parser.add_argument("--embeddings", type=pathlib.Path, help="of rcml-embed --tokens")
    options, overrides = parser.parse_known_args()
    if options.workdir:
        searcher = open_explorer(options.workdir, options.embeddings, overrides).searcher
        count = len(searcher.embeddings.items)
        machine = timing.start(f"{count:,} items of {options.workdir}")
        figures = {"machine": machine, "items": count} | report(searcher, options.repeats)
        timing.write_json(options.json, figures)
        return
    if overrides:
        parser.error(f"unknown argument {overrides[0]}")
    figures = {"machine": timing.start(f"{options.items:,} items, ViT-B/32's shapes")}
    names = tuple(map(str, range(options.items)))
    items = Items(names, names, names, lambda _: b"")
    reader = Reader()
    for dtype in options.types:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            embeddings = make_store(pathlib.Path(directory), items, dtype)
            figures[dtype] = report(made_up(embeddings, reader), options.repeats)
            del embeddings
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()

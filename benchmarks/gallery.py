"""What does searching a gallery cost beside NumPy, scikit-learn and SciPy?

    python -m benchmarks.gallery            # Flickr30K's size; about 4 minutes on 2 cores
    python -m benchmarks.gallery --images 3000 --sample 0.2

Cosine: the ten best texts of every image and the ten best images of every text, with exact ranks of
the right ones, from one pass; beside it a blocked NumPy matmul with argpartition, with and without
ranks, `jax.lax.top_k` of one part of the gallery after the other, and scikit-learn's
NearestNeighbors (brute force), which has none. All need a pass for each direction. They search the
whole gallery for a sample of the queries, and their times are scaled to all queries.
Manhattan and chi-square: lists and ranks for a few queries among all texts, beside
SciPy's and scikit-learn's bare distances of the same queries. Vectors are random, of length one,
for chi-square not negative.
"""

import argparse
import resource

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import additive_chi2_kernel
from sklearn.neighbors import NearestNeighbors

from benchmarks import timing
from rcml_jax.evaluation.cross_modal import search, search_both

TOP = 10
_NUMPY_BLOCK = 128
_LAX_QUERIES, _LAX_PART = 1024, 4096


def vectors(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Random float32 vectors of length one."""
    result = rng.standard_normal((rows, width), np.float32)
    return result / np.linalg.norm(result, axis=1, keepdims=True)


def numpy_search(queries, gallery, right=None):
    """The ten best by a blocked product and argpartition; ranks if `right` (q,) is given."""
    scores = np.empty((_NUMPY_BLOCK, len(gallery)), np.float32)
    lists, ranks = [], []
    for start in range(0, len(queries), _NUMPY_BLOCK):
        block = queries[start : start + _NUMPY_BLOCK]
        part = np.matmul(block, gallery.T, out=scores[: len(block)])
        top = np.argpartition(part, -TOP, axis=1)[:, -TOP:]
        order = np.argsort(-np.take_along_axis(part, top, axis=1), axis=1)
        lists.append(np.take_along_axis(top, order, axis=1))
        if right is not None:
            bar = part[np.arange(len(block)), right[start : start + len(block)]]
            ranks.append(np.count_nonzero(part >= bar[:, None], axis=1) - 1)
    return np.concatenate(lists), np.concatenate(ranks) if ranks else None


@jax.jit
def _merge(best, queries, gallery, offset, bar):
    """The ten best of each query, their places and the counts, with one more part of a gallery."""
    scores = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    values, places = jax.lax.top_k(scores, TOP)
    values = jnp.concatenate([best[0], values], axis=1)
    places = jnp.concatenate([best[1], places + offset], axis=1)
    values, chosen = jax.lax.top_k(values, TOP)
    count = best[2] + jnp.sum(scores >= bar[:, None], axis=1)
    return values, jnp.take_along_axis(places, chosen, axis=1), count


def lax_search(queries, gallery, right):
    """The ten best by `jax.lax.top_k` of one part of the gallery after the other, and ranks."""
    lists, ranks = [], []
    for start in range(0, len(queries), _LAX_QUERIES):
        block = queries[start : start + _LAX_QUERIES]
        bar = jnp.einsum("nd,nd->n", block, gallery[right[start : start + _LAX_QUERIES]])
        shape = len(block), TOP
        best = jnp.full(shape, -jnp.inf), jnp.full(shape, -1), jnp.zeros(len(block), jnp.int32)
        for first in range(0, len(gallery), _LAX_PART):
            best = _merge(best, block, gallery[first : first + _LAX_PART], first, bar)
        lists.append(np.asarray(best[1]))
        ranks.append(np.asarray(best[2]) - 1)
    return np.concatenate(lists), np.concatenate(ranks)


def scikit_learn_search(queries, gallery):
    """The ten best by Euclidean distance, which orders vectors of length one as the cosine does."""
    return NearestNeighbors(n_neighbors=TOP, algorithm="brute").fit(gallery).kneighbors(queries)


def cosine(options: argparse.Namespace) -> tuple[timing.Times, float]:
    """Seconds of the searches in both directions, the peers' scaled up; and our peak memory."""
    rng = np.random.default_rng(0)
    images, texts = options.images, 5 * options.images
    image, text = vectors(rng, images, options.width), vectors(rng, texts, options.width)
    image_of_text = np.arange(texts) % images
    sides = []
    for queries, gallery, right in ((image, text, np.arange(images)), (text, image, image_of_text)):
        sample = rng.choice(len(queries), max(1, round(options.sample * len(queries))), False)
        sides.append((queries[sample], gallery, right[sample]))

    def ours():
        return search_both(image, text, image_of_text, similarity="cosine", k=TOP)[0].indices

    def of_sides(function, with_right=False):
        return lambda: [function(*(side if with_right else side[:2])) for side in sides]

    found = search(sides[0][0][:64], text, positives=sides[0][2][:64], similarity="cosine")
    lists, ranks = numpy_search(sides[0][0][:64], text, sides[0][2][:64])
    print(f"lists that agree with NumPy's: {np.mean(found.indices == lists):.4f}")
    print(f"largest difference of ranks: {np.abs(found.rank - ranks).max()}")
    ours()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process so far, inputs included: {peak:.2f} GiB", flush=True)
    peers = {
        "NumPy, top 10": of_sides(numpy_search),
        "NumPy, top 10 and ranks": of_sides(numpy_search, True),
        "lax.top_k by parts and ranks": of_sides(lax_search, True),
        "NearestNeighbors, top 10": of_sides(scikit_learn_search),
    }
    peers["lax.top_k by parts and ranks"]()  # compiles
    times = timing.alternate({"ours": ours, **peers}, repeats=options.repeats, warmup=0, pause=0.3)
    return {n: t if n == "ours" else t / options.sample for n, t in times.items()}, peak


def distances(options: argparse.Namespace) -> dict[str, timing.Times]:
    """Seconds of a few queries among all texts under Manhattan and chi-square."""
    rng = np.random.default_rng(1)
    queries = vectors(rng, options.queries, options.width)
    text = vectors(rng, 5 * options.images, options.width)
    right = np.arange(options.queries)
    result = {}
    for name, peer, function in (
        ("manhattan", "cdist", lambda x, y: cdist(x, y, "cityblock")),
        ("chi_square", "additive_chi2_kernel", additive_chi2_kernel),
    ):
        x, y = (np.abs(v) if name == "chi_square" else v for v in (queries, text))

        def ours(x=x, y=y, name=name):
            return search(x, y, positives=right, similarity=name, k=TOP).indices

        functions = {name: ours, peer: lambda x=x, y=y, function=function: function(x, y)}
        result[name] = timing.alternate(functions, repeats=options.repeats, warmup=1)
    return result


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--images", type=int, default=31_783, help="five times as many texts")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sample", type=float, default=0.05, help="share of the peers' queries")
    parser.add_argument("--queries", type=int, default=64, help="for Manhattan and chi-square")
    options = parser.parse_args()
    machine = timing.start(
        f"{options.images} images, {5 * options.images} texts, width {options.width}; NumPy and "
        f"NearestNeighbors: {options.sample:.0%} of the queries, scaled"
    )
    times, peak = cosine(options)
    timing.print_times(times)
    ratios = [timing.ratio(times, "ours", peer, 1 / 3) for peer in times if peer != "ours"]
    timing.print_ratios(ratios)
    for name, of_distance in distances(options).items():
        timing.print_times(of_distance, options.queries, "query")
        peer = next(other for other in of_distance if other != name)
        ratios.append(timing.ratio(of_distance, name, peer, 1 / 3))
        timing.print_ratios(ratios[-1:])
    timing.write_json(options.json, {"machine": machine, "peak_gib": peak, "ratios": ratios})


if __name__ == "__main__":
    main()

"""The arrays behind RCML's figures, computed from opened runs."""

import functools
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.scores import SCORES, EmbeddingTable, pair_scores
from rcml_jax.ops.ranking import candidate_ranks
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.report.page import LeftOutError
from rcml_jax.report.runs import Opened

# Latency and parameters of the relational methods, measured when a report is made.


BATCH, REPEATS, RELATIONS = 64, 15, 10


class _Row(NamedTuple):
    """One way to embed: its call, its parameters (those trained: NaN if no run), and its setting.

    Rows of one setting have towers and inputs of the same shapes.
    """

    name: str
    method: str
    call: Callable[[], Any]
    used: float
    trained: float
    setting: Any


def cost(runs: Sequence[Opened]) -> dict[str, Any]:
    """Columns model, method, used, trained, milliseconds, fastest, slowest, relative and more.

    A sample is one item, text and picture; a call embeds a batch of test items as the run's method
    does it. Times are a sample's: median, fastest and slowest call. RCML embeds under one relation
    and under several, and its call encodes their sentences. All calls are made in turn, so that a
    slow moment falls on all of them. used: parameters that embed; trained: those that training
    changes, also where only the loss uses them. relative: median ratio to the time in the same turn
    of the towers alone, which are a baseline's, or RCML's with CLIP's pooling without a baseline.
    """
    rows = [row for opened in runs for row in _rows(opened)]
    plain = [row.setting for row in rows if row.method not in ("rcml", "")]
    rows = [row for row in rows if row.method or row.setting not in plain]
    times = measure({place: row.call for place, row in enumerate(rows)}, REPEATS)
    per_sample = [1e3 * times[place] / BATCH for place in range(len(rows))]
    alone: dict[Any, np.ndarray] = {}
    for row, value in zip(rows, per_sample, strict=True):
        if row.method != "rcml":
            alone.setdefault(row.setting, value)
    return {
        "model": [row.name for row in rows],
        "method": [row.method or "towers alone" for row in rows],
        "used": [row.used for row in rows],
        "trained": [row.trained for row in rows],
        "milliseconds": [float(np.median(x)) for x in per_sample],
        "fastest": [float(np.min(x)) for x in per_sample],
        "slowest": [float(np.max(x)) for x in per_sample],
        "relative": [
            float(np.median(x / alone[row.setting]))
            for row, x in zip(rows, per_sample, strict=True)
        ],
        "batch": [BATCH] * len(rows),
        "repeats": [REPEATS] * len(rows),
        "machine": [machine()] * len(rows),
    }


def _rows(opened: Opened) -> Iterator[_Row]:
    """The run's ways to embed the same batch of test items; RCML's towers alone have no method."""
    method, task, params = opened.method, opened.method.task, opened.params
    label, name = opened.run.label, opened.run.config.method
    items = np.resize(task.splits.items("test"), BATCH)
    ids = jnp.asarray(task.encode([task.graph.texts[i] for i in items]))
    pixels = jnp.asarray(task.images(items))
    shapes = jax.tree.map(jnp.shape, (params["towers"], ids, pixels))
    setting = repr((str(method.dtype), shapes))
    towers, trained = parameters(params["towers"]), trained_parameters(method, params)
    if not hasattr(type(method.model), "pool_text"):
        embed = jax.jit(lambda p, *inputs: method.model.apply({"params": p}, *inputs))
        call = functools.partial(embed, params["towers"], ids, pixels)
        yield _Row(label, name, call, towers, trained, setting)
        return

    def own(module: Any, ids: jax.Array, pixels: jax.Array) -> tuple:
        states = module.towers.text_states(ids), module.towers.image_states(pixels)
        return tuple(l2_normalize(x.pooled) for x in states)

    variables = {"params": {name: params[name] for name in ("towers", "head")}}
    alone = jax.jit(lambda *inputs: method.model.apply(*inputs, method=own))
    call = functools.partial(alone, variables, ids, pixels)
    yield _Row(f"{label}, CLIP's pooling", "", call, towers, np.nan, setting)
    embed, used = jax.jit(method.model.apply), parameters(variables)
    for count in sorted({1, min(RELATIONS, len(task.sentences))}):
        relation = jnp.asarray(task.encode(task.sentences[:count]))
        call = functools.partial(embed, variables, relation, ids, pixels)
        said = f"{label}, {count} relation{'s' * (count > 1)}"
        yield _Row(said, name, call, used, trained, setting)


def measure(functions: Mapping[Any, Callable], repeats: int) -> dict[Any, np.ndarray]:
    """Seconds (repeats,) of each function, called in turn; the first call, which compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in times.items()}


def parameters(tree: Any) -> int:
    """The number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def trained_parameters(method: Any, params: Any) -> int:
    """The number of parameters that training changes: all but frozen towers and statistics."""
    frozen = jax.tree.leaves(method.frozen(params))
    leaves = jax.tree.leaves(params)
    return sum(int(np.size(x)) for x, f in zip(leaves, frozen, strict=True) if not f)


def machine() -> str:
    """What computed: the device, and of a CPU its architecture and the cores at hand."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} core{'s' * (cores != 1)}"


# Planes of embeddings, t-SNE and UMAP, and how well kinds hold together: the silhouette.


PERPLEXITY = 30
NEIGHBOURS = 15
SEED = 0


def tsne(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by t-SNE (cosine, perplexity 30, PCA at the start, a fixed seed).

    Raises LeftOutError where all rows are the same, or not finite.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError('t-SNE needs scikit-learn: pip install "rcml_jax[plots]"') from error

    _check(vectors)
    model = TSNE(perplexity=PERPLEXITY, metric="cosine", init="pca", random_state=SEED)
    return model.fit_transform(np.ascontiguousarray(vectors))


def _check(vectors: np.ndarray) -> None:
    """Raise LeftOutError for what has no plane; scikit-learn's t-SNE crashes on equal rows."""
    if not np.isfinite(vectors).all():
        raise LeftOutError("the embeddings are not finite; the training has diverged")
    if np.ptp(vectors, axis=0).max() < 1e-6:
        raise LeftOutError("all embeddings are the same; the model has collapsed")


def silhouette(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw, 1987) of rows (n, d) by cosine distance, from −1 to 1.

    NaN where there is one label only, or as many labels as rows.
    """
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise UserError(
            'the silhouette needs scikit-learn: pip install "rcml_jax[plots]"'
        ) from error
    if not 1 < len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(vectors, labels, metric="cosine"))


def umap(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by UMAP (cosine, 15 neighbours, minimum distance 0.1, a fixed seed).

    Raises LeftOutError where umap-learn cannot be imported, there are not more rows than
    neighbours, or all rows are the same or not finite.
    """
    if len(vectors) <= NEIGHBOURS:
        raise LeftOutError(
            f"UMAP with {NEIGHBOURS} neighbours needs more than {NEIGHBOURS} samples; there are "
            f"{len(vectors)}"
        )
    _check(vectors)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Tensorflow not installed", category=ImportWarning
        )
        try:
            from umap import UMAP
        except Exception as error:  # numba fails in ways of its own where it does not fit NumPy
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeftOutError(
                f'umap-learn cannot be imported ({reason}): pip install "rcml_jax[plots]"'
            ) from error
        # Said where the neighbours' graph falls apart and the start is drawn at random instead.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap\.")
        model = UMAP(
            n_neighbors=NEIGHBOURS, min_dist=0.1, metric="cosine", random_state=SEED, n_jobs=1
        )
        return model.fit_transform(np.ascontiguousarray(vectors, np.float32))


KINDS = 6
_ITEMS_OF_KIND, _FEWEST_OF_KIND = 60, 3
CASES, TOP = 3, 3
_QUERIES = 60
_PICTURE = 96


def chosen_items(opened: Opened, seed: int) -> np.ndarray:
    """Test items of the most frequent kinds, sorted; a kind with very many gives some of them.

    Raises LeftOutError where fewer than two kinds have items enough.
    """
    graph, items = opened.method.task.graph, opened.method.task.splits.items("test")
    items = items[graph.labels[items] >= 0]
    kinds, counts = np.unique(graph.labels[items], return_counts=True)
    kinds = kinds[np.argsort(-counts, kind="stable")][
        : min(KINDS, np.sum(counts >= _FEWEST_OF_KIND))
    ]
    if len(kinds) < 2:
        raise LeftOutError(
            f"fewer than two kinds have {_FEWEST_OF_KIND} test items in {graph.name}, so there is "
            "nothing to colour by; give the items labels"
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(items[graph.labels[items] == kind])[:_ITEMS_OF_KIND] for kind in kinds]
    return np.sort(np.concatenate(drawn))


def chosen_relation(opened: Opened, asked: str) -> int:
    """The relation whose sentence holds the asked text; else that with the most test pairs.

    Raises LeftOutError where no sentence, or more than one, holds it.
    """
    graph, pairs = opened.method.task.graph, opened.method.task.splits.pairs("test")
    if not asked:
        if not len(pairs):
            raise LeftOutError(f"the test split of {graph.name} has no pair")
        return int(np.argmax(np.bincount(pairs[:, 2])))
    found = [i for i, sentence in enumerate(graph.relations) if asked.lower() in sentence.lower()]
    exact = [i for i in found if graph.relations[i].lower() == asked.lower()]
    if len(exact or found) != 1:
        raise LeftOutError(
            f"--relation {asked!r} is in {len(found)} sentences of {graph.name}; give the whole of "
            "one of its relation sentences"
        )
    return (exact or found)[0]


def same_items(first: Opened, other: Opened) -> bool:
    """Whether two runs have the same data, and the same test items of it."""
    a, b = first.method.task, other.method.task
    return a.graph.ids == b.graph.ids and np.array_equal(
        a.splits.items("test"), b.splits.items("test")
    )


def table_of(opened: Opened, items: np.ndarray) -> EmbeddingTable:
    """The items (sorted) as the run's method embeds them in its first way of scoring."""
    return next(iter(opened.method.tables(opened.params, items).values()))


def _averaged(table: EmbeddingTable, relation: int, items: np.ndarray) -> np.ndarray:
    """What the AVG score compares: text and image under a relation, averaged and renormalised."""
    rows = table.rows(items)
    both = [x[relation if len(x) > 1 else 0, rows] for x in (table.text, table.image)]
    return np.asarray(l2_normalize(jnp.asarray(both[0] + both[1])))


def embedding_map(
    runs: Sequence[Opened], tables: Sequence[EmbeddingTable], items: np.ndarray, relation: int
) -> dict[str, Any]:
    """t-SNE of the same items under one relation for each run, and silhouettes of their kinds.

    points (runs, n, 2); silhouette (runs,) under the relation and mean_silhouette (runs,) over all
    relations of the test split, both by cosine in the full space. Raises LeftOutError where the
    items are not more than the perplexity.
    """
    task = runs[0].method.task
    if len(items) <= PERPLEXITY:
        raise LeftOutError(
            f"t-SNE at a perplexity of {PERPLEXITY} needs more than {PERPLEXITY} items; the kinds "
            f"that are drawn have {len(items)}"
        )
    labels = task.graph.labels[items]
    asked = np.unique(task.splits.pairs("test")[:, 2])
    points, under, over = [], [], []
    for table in tables:
        vectors = _averaged(table, relation, items)
        points.append(tsne(vectors))
        under.append(silhouette(vectors, labels))
        relations = asked if len(table.text) > 1 or len(table.image) > 1 else asked[:1]
        over.append(np.mean([silhouette(_averaged(table, r, items), labels) for r in relations]))
    kinds, counts = np.unique(labels, return_counts=True)
    kinds = kinds[np.argsort(-counts, kind="stable")]
    return {
        "runs": [opened.run.label for opened in runs],
        "points": np.stack(points),
        "kind": np.searchsorted(np.sort(kinds), labels),
        "kinds": [task.graph.label_names[k] for k in np.sort(kinds)],
        "item": [task.graph.texts[i] for i in items],
        "relation": task.sentences[relation],
        "silhouette": under,
        "mean_silhouette": over,
        "relations": len(asked),
    }


# Case studies


def drawn_queries(opened: Opened, seed: int) -> np.ndarray:
    """Places of a few of the test split's retrieval queries, in an order drawn by the seed.

    Raises LeftOutError where the split has none.
    """
    try:
        queries = opened.method.task.retrieval_queries("test")
    except UserError as error:
        raise LeftOutError(str(error)) from error
    return np.random.default_rng(seed).permutation(len(queries.query))[:_QUERIES]


def items_of_queries(opened: Opened, places: np.ndarray) -> np.ndarray:
    """The queries' items and candidates, sorted."""
    queries = opened.method.task.retrieval_queries("test")
    return np.union1d(queries.query[places], queries.candidates[places])


def case_studies(opened: Opened, table: EmbeddingTable, places: np.ndarray) -> list[dict[str, Any]]:
    """The first successes and the first failures of the drawn queries, by the AVG score.

    A success has the truth among the top 3. Each case: the query's text, picture and relation; for
    each of the five scores the top 3 (places in the candidates) with texts, pictures and scores,
    and the 1-based rank of the truth, ties counted against the model.
    """
    task = opened.method.task
    queries = task.retrieval_queries("test")
    query, candidates = queries.query[places], queries.candidates[places]
    relation = queries.relation[places]
    scores = pair_scores(
        table, table.rows(query)[:, None], table.rows(candidates), relation[:, None]
    )
    ranks = {name: np.asarray(candidate_ranks(x)) + 1 for name, x in scores.items()}
    won = ranks["avg"] <= TOP
    cases = []
    for outcome, rows in (("success", np.flatnonzero(won)), ("failure", np.flatnonzero(~won))):
        for row in rows[:CASES]:
            case = _case(task, query[row], candidates[row], int(relation[row]))
            # Sorted as they are ranked: the truth, column 0, after others of the same score.
            order = np.stack(
                [np.lexsort((np.arange(x.shape[1]) == 0, -x[row]))[:TOP] for x in scores.values()]
            )
            by_name = {name: x[row] for name, x in scores.items()}
            cases.append(
                case
                | {
                    "outcome": outcome,
                    "scores": list(SCORES),
                    "order": order,
                    "score": np.stack([by_name[n][o] for n, o in zip(scores, order, strict=True)]),
                    "rank": [ranks[name][row] for name in scores],
                    "successes": int(won.sum()),
                    "drawn": len(places),
                }
            )
    return cases


def _case(task: Any, query: int, candidates: np.ndarray, relation: int) -> dict[str, Any]:
    texts = task.graph.texts
    return {
        "query": texts[query],
        "relation": task.sentences[relation],
        "candidates": [texts[i] for i in candidates],
        "query_picture": picture(task.graph, query),
        "pictures": np.stack([picture(task.graph, i) for i in candidates]),
    }


def picture(graph: Any, item: int, size: int = _PICTURE) -> np.ndarray:
    """An item's picture as uint8 (size, size, 3), whole, on white. Raises LeftOutError without."""
    from PIL import Image, ImageOps

    try:
        found = graph.images[int(item)].convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise LeftOutError(f"the picture of {graph.ids[item]} cannot be read ({error})") from error
    if max(found.size) < size:
        found = ImageOps.contain(found, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.pad(found, (size, size), Image.Resampling.BICUBIC, color="white"))


# Attention


def attention(opened: Opened, seed: int, relations: int = 3) -> dict[str, Any]:
    """Where the pooling head looks in one item under a few relations (Eq. 5–6).

    The item is drawn by the seed among the test items that have so many relations, or the most that
    any has; so are its relations. image (R, g, g) and text (R, T): weights of the patches and of
    the tokens; image_summary (R,): that of the token that is no patch. Raises LeftOutError where
    the method has no such head, or its image tokens are no square of patches.
    """
    method = opened.method
    if not hasattr(type(method.model), "pool_text"):
        raise LeftOutError(
            f"{opened.run.label} has no pooling head; give the work directory of RCML"
        )
    task = method.task
    item, drawn = _item_with_relations(task, seed, relations)
    variables = {"params": {name: opened.params[name] for name in ("towers", "head")}}
    sentences = [task.sentences[r] for r in drawn]
    ids = task.encode([task.graph.texts[item]])
    pixels = task.images(np.array([item]))
    found = jax.device_get(_weights(method.model, variables, task.encode(sentences), ids, pixels))
    (text, text_mask, _), (image, _, image_summary) = found["text"], found["image"]
    kept = np.flatnonzero(text_mask[0])
    patches = np.delete(image[0], image_summary[0], axis=1)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise LeftOutError(f"the image tower of {opened.run.label} has no square of patches")
    return {
        "item": task.graph.texts[item],
        "picture": picture(task.graph, item),
        "pixels": pixels[0],
        "relations": sentences,
        "tokens": [_token(task.tokenizer, int(ids[0, place])) for place in kept],
        "text": text[0][:, kept],
        "image": patches.reshape(len(drawn), side, side),
        "image_summary": image[0][:, image_summary[0]],
    }


def _item_with_relations(task: Any, seed: int, wanted: int) -> tuple[int, np.ndarray]:
    pairs = task.splits.pairs("test")
    if not len(pairs):
        raise LeftOutError(f"the test split of {task.graph.name} has no pair")
    of_item = np.unique(np.concatenate([pairs[:, [0, 2]], pairs[:, [1, 2]]]), axis=0)
    items, counts = np.unique(of_item[:, 0], return_counts=True)
    wanted = min(wanted, counts.max())
    rng = np.random.default_rng(seed)
    item = int(rng.choice(items[counts >= wanted]))
    drawn = rng.permutation(of_item[of_item[:, 0] == item, 1])[:wanted]
    return item, np.sort(drawn)


def _weights(model: Any, variables: Mapping, relation_ids: Any, ids: Any, pixels: Any) -> dict:
    """Attention (n, R, T), mask (n, T) and pooled index (n,) of texts and of images."""

    def look(module: Any, relation_ids: Any, ids: Any, pixels: Any) -> dict:
        relation = module.relation(relation_ids)
        intra = jnp.zeros(len(relation_ids), bool)
        found = {}
        states = {
            "text": module.towers.text_states(ids),
            "image": module.towers.image_states(pixels),
        }
        for name, tokens in states.items():
            weights = module.head.attention(tokens, relation, intra)
            found[name] = weights, tokens.mask, tokens.pooled_index
        return found

    apply = jax.jit(lambda *inputs: model.apply(*inputs, method=look))
    return apply(variables, relation_ids, ids, pixels)


def _token(tokenizer: Any, token: int) -> str:
    names = {tokenizer.start_id: "[start]", tokenizer.end_id: "[end]"}
    return names.get(token) or tokenizer.decode([token]) or "·"

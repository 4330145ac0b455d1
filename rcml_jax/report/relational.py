"""Figures of RCML and its baselines: arrays computed from opened runs, and their drawings."""

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.measures import Measure, chance_of, main_of
from rcml_jax.evaluation.scores import RelationEmbeddings, pair_scores
from rcml_jax.ops.ranking import candidate_ranks
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.report import common, page
from rcml_jax.report.page import (
    PERPLEXITY,
    Arrays,
    Figure,
    FigureImage,
    Folder,
    LeftOutError,
    Section,
    Table,
    box,
    frame,
    overlay,
    scatter,
    silhouette,
    slug,
    tsne,
)
from rcml_jax.report.runs import Models, Opened, Run, cost, on_device

# What the figures need of opened runs: items, planes, case studies, attention.

KINDS = 6
_ITEMS_OF_KIND, _FEWEST_OF_KIND = 60, 3
CASES, TOP = 3, 3
_QUERIES = 60
_PIXELS = 96


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


def table_of(opened: Opened, items: np.ndarray) -> RelationEmbeddings:
    """Embeddings of items (sorted) for the first scoring of the run's method."""
    return next(iter(opened.method.tables(opened.params, items).values()))


def _averaged(table: RelationEmbeddings, relation: int, items: np.ndarray) -> np.ndarray:
    """Embeddings of the AVG score: mean of text and image under a relation, normalised."""
    rows = table.rows(items)
    both = [x[relation if len(x) > 1 else 0, rows] for x in (table.text, table.image)]
    return np.asarray(l2_normalize(jnp.asarray(both[0] + both[1])))


def embedding_map(
    runs: Sequence[Opened], tables: Sequence[RelationEmbeddings], items: np.ndarray, relation: int
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
    """Indices of a few of the test split's retrieval queries, in an order drawn by the seed.

    Raises LeftOutError where the split has none.
    """
    try:
        queries = opened.method.task.retrieval_queries("test")
    except UserError as error:
        raise LeftOutError(str(error)) from error
    return np.random.default_rng(seed).permutation(len(queries.query))[:_QUERIES]


def items_of_queries(opened: Opened, indices: np.ndarray) -> np.ndarray:
    """Items of the queries and their candidates, sorted."""
    queries = opened.method.task.retrieval_queries("test")
    return np.union1d(queries.query[indices], queries.candidates[indices])


def case_studies(
    opened: Opened, table: RelationEmbeddings, indices: np.ndarray
) -> list[dict[str, Any]]:
    """The first successes and the first failures of the drawn queries, by the AVG score.

    A success has the truth among the top 3. Each case: the query's text, image and relation; for
    each of the five scores the top 3 (indices of the candidates) with texts, images and scores,
    and the 1-based rank of the truth, ties counted against the model.
    """
    task = opened.method.task
    queries = task.retrieval_queries("test")
    query, candidates = queries.query[indices], queries.candidates[indices]
    relation = queries.relation[indices]
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
                    "drawn": len(indices),
                }
            )
    return cases


def _case(task: Any, query: int, candidates: np.ndarray, relation: int) -> dict[str, Any]:
    texts = task.graph.texts
    return {
        "query": texts[query],
        "relation": task.sentences[relation],
        "candidates": [texts[i] for i in candidates],
        "query_image": item_image(task.graph, query),
        "images": np.stack([item_image(task.graph, i) for i in candidates]),
    }


def item_image(graph: Any, item: int, size: int = _PIXELS) -> np.ndarray:
    """An item's image as uint8 (size, size, 3), whole, on white. Raises LeftOutError without."""
    from PIL import Image, ImageOps

    try:
        found = graph.images[int(item)].convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise LeftOutError(f"the image of {graph.ids[item]} cannot be read ({error})") from error
    if max(found.size) < size:
        found = ImageOps.contain(found, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.pad(found, (size, size), Image.Resampling.BICUBIC, color="white"))


# Attention


def attention(opened: Opened, seed: int, relations: int = 3) -> dict[str, Any]:
    """Where the pooling head looks in one item under a few relations (Eq. 5–6).

    The item is drawn by the seed among the test items that have so many relations, or the most that
    any has; so are its relations. image (R, g, g) and text (R, T): weights of the patches and of
    the tokens; image_pooled (R,): that of the token that is no patch. Raises LeftOutError where
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
    (text, text_mask, _), (image, _, image_pooled) = found["text"], found["image"]
    kept = np.flatnonzero(text_mask[0])
    patches = np.delete(image[0], image_pooled[0], axis=1)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise LeftOutError(f"the image tower of {opened.run.label} has no square of patches")
    return {
        "item": task.graph.texts[item],
        "pixels": pixels[0],
        "relations": sentences,
        "tokens": [_token(task.tokenizer, int(ids[0, index])) for index in kept],
        "text": text[0][:, kept],
        "image": patches.reshape(len(drawn), side, side),
        "image_pooled": image[0][:, image_pooled[0]],
    }


def _item_with_relations(task: Any, seed: int, wanted: int) -> tuple[int, np.ndarray]:
    pairs = task.splits.pairs("test")
    if not len(pairs):
        raise LeftOutError(f"the test split of {task.graph.name} has no pair")
    of_item = np.unique(np.concatenate([pairs[:, [0, 2]], pairs[:, [1, 2]]]), axis=0)
    items, counts = np.unique(of_item[:, 0], return_counts=True)
    wanted = min(wanted, int(np.max(counts)))
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


# RCML's figures, drawn from saved arrays.


_SCORE_NAMES = {
    "tt": "text – text",
    "ii": "image – image",
    "ti": "text – image",
    "it": "image – text",
    "avg": "average",
}


def draw_map(arrays: Arrays, path: pathlib.Path, index: int) -> pathlib.Path:
    """One run's plane: a colour and a mark for each kind."""
    kinds = [str(kind) for kind in arrays["kinds"]]
    points = arrays["points"][index]
    with page.panel(path, page.PANEL, 4.9, legend=2) as axes:
        scatter(axes, points, arrays["kind"], kinds)
        score = f"silhouette {page.signed(arrays['silhouette'][index])}"
        axes.set_title(f"{page.wrap(arrays['runs'][index], 40)}\n{score}", loc="left")
    return path


# Inches: the margins, the query's image, a candidate's image, and the lines of a case study.
_LEFT, _TOP, _QUERY, _SIZE = 0.1, 0.12, 0.95, 0.8
_TEXT, _ROW, _COLUMNS_AT, _COLUMN = 0.19, 1.54, 1.36, 0.96


def draw_case(arrays: Arrays, path: pathlib.Path) -> pathlib.Path:
    """A case study: the query above, a line of the top candidates for each similarity below."""
    sentence = page.wrap(f"under: {arrays['relation']}", 52, 5)
    head = _TOP + _QUERY + 0.1 + _TEXT * (1 + sentence.count("\n")) + 0.32
    with page.drawing(page.PANEL, head + _ROW * len(arrays["order"])) as figure:
        figure.set_layout_engine("none")
        _query(figure, arrays)
        _write(figure, _LEFT, _TOP + _QUERY + 0.08, sentence, fontsize=10.5)
        for row, name in enumerate(arrays["scores"]):
            _line(figure, arrays, row, str(name), head + _ROW * row)
        return page.save_figure(figure, path)


def _write(figure, left: float, top: float, text: str, **options) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, va="top", **options)


def _query(figure, arrays: Arrays) -> None:
    axes = box(figure, _LEFT, _TOP, _QUERY)
    axes.imshow(arrays["query_image"])
    frame(axes, "#444444", 1.5)
    top = _TOP - 0.02
    lines = (
        (str(arrays["query"]), {"weight": "bold"}),
        (f"truth: {arrays['candidates'][0]}", {"color": "#00664B"}),
    )
    for text, options in lines:
        broken = page.wrap(text, 34, 2)
        _write(figure, _LEFT + _QUERY + 0.12, top, broken, fontsize=11, **options)
        top += _TEXT * (1 + broken.count("\n")) + 0.1


def _line(figure, arrays: Arrays, row: int, name: str, top: float) -> None:
    count = len(arrays["images"])
    said = f"{_SCORE_NAMES.get(name, name)}\ntruth is\n{arrays['rank'][row]}. of {count}"
    _write(figure, _LEFT, top + 0.12, said, fontsize=11)
    for column, index in enumerate(arrays["order"][row]):
        left = _COLUMNS_AT + _COLUMN * column
        axes = box(figure, left, top, _SIZE)
        axes.imshow(arrays["images"][index])
        right = index == 0
        frame(axes, page.RIGHT if right else "#BBBBBB", 4 if right else 1)
        title = f"{column + 1}. {page.signed(arrays['score'][row, column])}"
        axes.set_title(f"{title} ✓" if right else title, fontsize=10, pad=4)
        text = page.wrap(str(arrays["candidates"][index]), 14, 3)
        _write(figure, left + _SIZE / 2, top + _SIZE + 0.06, text, fontsize=8.5, ha="center")


def draw_attention(arrays: Arrays, path: pathlib.Path, index: int) -> pathlib.Path:
    """Weights of patches over the image, and of tokens as bars, under one relation."""
    tokens = [str(token) for token in arrays["tokens"]]
    top = 100 * float(max(arrays["image"].max(), arrays["image_pooled"].max()))
    longest = 100 * float(arrays["text"].max())
    with page.drawing(page.PANEL, max(3.9, 1.5 + 0.26 * len(tokens))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        heat = overlay(left, arrays["pixels"], 100 * arrays["image"][index], (0, top))
        bar = figure.colorbar(heat, ax=left, orientation="horizontal", pad=0.03, aspect=12)
        bar.set_label("weight of a patch (%)")
        left.set_anchor("N")
        left.set_title(f"[CLS] {100 * arrays['image_pooled'][index]:.0f} %", fontsize=11)
        right.barh(range(len(tokens)), 100 * arrays["text"][index], color=page.COLOURS[0])
        right.set_yticks(range(len(tokens)), [page.short(token, 10) for token in tokens])
        right.invert_yaxis()
        right.grid(visible=False, axis="y")
        right.grid(visible=True, axis="x")
        right.set(xlabel="of a token (%)", xlim=(0, 1.08 * longest))
        sentence = page.wrap(str(arrays["relations"][index]), 40, 2)
        # Always two lines, so that images side by side are of one height.
        figure.suptitle(sentence + "\n " * ("\n" not in sentence), fontsize=11.5)
        return page.save_figure(figure, path)


_MOST_MAPS, _MOST_BARS, _MOST_COSTS = 4, 8, 6
_PLURAL = {"success": "successes", "failure": "failures"}
_COMPARED = (
    "TT, II, TI and IT compare A's text or image with B's; AVG compares the averages of both, "
    "renormalised"
)


def section(
    folder: Folder, runs: Sequence[Run], models: Models, *, seed: int, relation: str
) -> Section:
    """Figures of runs on one relation graph; those that need a model are of the first RCML run."""
    scored = [run for run in runs if run.result is not None]
    figures = []
    if scored:
        title = "Beside the controls"
        make = functools.partial(_controls, folder, title, scored[:_MOST_BARS])
        figures += [folder.attempt(title, make), *_bars(folder, scored)]
    first = next((run for run in runs if run.config.method == "rcml"), runs[0])
    others = [run for run in runs if run is not first]
    work = _Models(folder, first, others, models, seed)
    figures.append(folder.attempt("The same items under one relation", lambda: work.maps(relation)))
    figures += work.cases()
    figures.append(folder.attempt("Where the pooling head looks", work.attention))
    figures.append(folder.attempt("Latency and parameters", work.cost))
    return Section(f"Relation-conditioned retrieval: {first.dataset}", tuple(figures))


def _controls(folder: Folder, title: str, runs: Sequence[Run]) -> Figure:
    """Runs and their controls: one image of retrieval, one of the relation tasks."""
    path, saved = folder.save("controls.csv", common.beside_controls(runs))
    images = []
    measures = common.with_controls(runs)
    for number, retrieval in enumerate((True, False), 1):
        names = [m.label for m in measures if m.task.startswith("retrieval") == retrieval]
        drawn = common.draw_controls(saved, folder.image_path(f"controls-{number}.svg"), names)
        if drawn:
            alt = f"Bars of runs and controls: {', '.join(names)}."
            images.append(FigureImage(drawn, alt))
    bare = [run.label for run in runs if run.label not in saved["row"]]
    return Figure(
        title,
        "In percent by AVG; a control that compares one modality alone has that score behind its "
        "number (TT: texts). In brackets what a run has above the best control of its own "
        "evaluation. Controls, in grey, leave out a part of the question; relation only and query "
        "only are of the run's model, the others know none. A row without a bar does not answer "
        "the task. Controlled candidates are linked to the query or under the relation, random "
        "ones are unrelated to the query. Ties count against the model."
        + f" Without controls, so not shown: {', '.join(bare)}."
        * bool(bare),
        tuple(images),
        data=(path,),
    )


def _bars(folder: Folder, runs: Sequence[Run]) -> list[Figure]:
    protocol = collections.defaultdict(str, runs[0].result["protocol"])
    asked = [run.result["relation_type"] for run in runs if "relation_type" in run.result]
    candidates = asked[0].get("candidates", 10) if asked else 10
    runs = runs[:_MOST_BARS]
    hit, top = main_of("retrieval"), main_of("relation_type")

    def chance(measure: Measure) -> float:
        """Chance of the first run that has it; 0 if none has."""
        told = (chance_of(measure, run.result) for run in runs)
        return next((value for value in told if value is not None), 0.0)

    def figure(title: str, name: str, arrays: Callable, task: str, what: str, caption: str):
        path, saved = folder.save(f"{name}.csv", arrays())
        alt = f"Bars: {what} by {', '.join(page.labels(saved, 'group'))}."
        least = chance(main_of(task))
        image = folder.draw(f"{name}.svg", alt, common.draw_groups, saved, what, least)
        return Figure(title, caption, (image,), data=(path,))

    types = (
        f"The true relation of a test pair among {candidates}: {protocol['relation_type']}. "
        "Ties count against the model."
    )
    figures = (
        (
            f"Retrieval: {hit.label}", "retrieval",
            lambda: common.by_score(runs, hit), "retrieval", f"{hit.label} (%)",
            f"Queries: {protocol['retrieval']}. {_COMPARED}. Ties count against the model.",
        ),
        (
            f"Relation type: {top.label}", "relation-type",
            lambda: common.by_score(runs, top), "relation_type", f"{top.label} (%)",
            f"{types} {_COMPARED}.",
        ),
        (
            f"Relation type: {top.label} by similarity", "relation-type-by-similarity",
            lambda: common.by_similarity(runs, top), "relation_type", f"{top.label} by AVG (%)",
            f"{types} Scored by AVG under each similarity.",
        ),
        (
            "Relation validity", "validity",
            lambda: common.validity(runs), "relation_validity", "accuracy (%)",
            f"Does the relation hold? A {protocol['relation_validity']}.",
        ),
    )  # fmt: skip
    return [folder.attempt(row[0], functools.partial(figure, *row)) for row in figures]


class _Models:
    """Figures that need the models of runs."""

    def __init__(
        self, folder: Folder, first: Run, others: Sequence[Run], models: Models, seed: int
    ):
        self.folder, self.first, self.others = folder, first, others
        self.models, self.seed = models, seed

    def maps(self, asked: str) -> Figure:
        """t-SNE of the same items, an image for each run."""
        first = self.models.open(self.first)
        relation = chosen_relation(first, asked)
        items = chosen_items(first, self.seed)
        runs, skipped = [first], []
        for run in self.others[: _MOST_MAPS - 1]:
            try:
                other = self.models.open(run)
            except LeftOutError as error:
                skipped.append(str(error))
                continue
            if same_items(first, other):
                runs.append(other)
            else:
                skipped.append(f"{run.label} was tested on other items")
        arrays = self._map(runs, items, relation)
        path, saved = self.folder.save("map.npz", arrays)
        images = [
            self.folder.draw(
                f"map-{slug(str(label))}.svg",
                f"Scatter plot of {len(items)} items of {label}, coloured by kind.",
                draw_map, saved, index,
            )
            for index, label in enumerate(saved["runs"])
        ]  # fmt: skip
        return Figure(
            "The same items under one relation",
            _map_caption(saved, bool(asked)) + "".join(f" Left out: {why}." for why in skipped),
            tuple(images),
            data=(path,),
        )

    def _map(self, runs: list[Opened], items: np.ndarray, relation: int) -> dict:
        tables = []
        for opened in runs:
            with on_device(opened.run.config):
                tables.append(table_of(opened, items))
        return embedding_map(runs, tables, items, relation)

    def cases(self) -> list[Figure]:
        """Case studies of the first run, the successes before the failures."""
        title = "Case studies"
        try:
            opened = self.models.open(self.first)
            self.folder.log(title)
            with on_device(opened.run.config):
                indices = drawn_queries(opened, self.seed)
                items = items_of_queries(opened, indices)
                table = table_of(opened, items)
                cases = case_studies(opened, table, indices)
        except LeftOutError as error:
            return [Figure(title, left_out=str(error))]
        by_outcome: dict[str, list[dict]] = {"success": [], "failure": []}
        for case in cases:
            by_outcome[case["outcome"]].append(case)
        return [
            self._case_figure(f"{title}: {_PLURAL[outcome]}", outcome, found, cases[0])
            if found
            else Figure(
                f"{title}: {_PLURAL[outcome]}",
                left_out=f"none of the {len(indices)} queries that were drawn is a {outcome}",
            )
            for outcome, found in by_outcome.items()
        ]

    def _case_figure(self, title: str, outcome: str, cases: list[dict], any_case: dict) -> Figure:
        images, files = [], []
        for number, case in enumerate(cases, 1):
            path, saved = self.folder.save(f"case-{outcome}-{number}.npz", case)
            best = case["candidates"][case["order"][-1][0]]
            alt = (
                f"Query {case['query']}, {case['relation']}; truth {case['candidates'][0]}; "
                f"first by average: {best}."
            )
            name = f"case-{outcome}-{number}.svg"
            images.append(self.folder.draw(name, alt, draw_case, saved))
            files.append(path)
        top, count = TOP, len(cases[0]["candidates"])
        return Figure(
            title,
            f"{self.first.label}: queries of the test split, each with the top {top} of {count} "
            "candidates by cosine, one line a score, the truth framed and ticked in green and its "
            f"rank beside. Drawn by the seed {self.seed}, not chosen: of {any_case['drawn']} "
            f"queries {any_case['successes']} have the truth among the top {top} by average (a "
            f"success); these are the first {len(cases)} {_PLURAL[outcome]} in the order drawn. "
            "Ties count against the truth.",
            tuple(images),
            data=tuple(files),
        )

    def attention(self) -> Figure:
        """One image for each of the relations."""
        opened = self.models.open(self.first)
        with on_device(opened.run.config):
            arrays = attention(opened, self.seed)
        path, saved = self.folder.save("attention.npz", arrays)
        images = [
            self.folder.draw(
                f"attention-{index + 1}.svg",
                f"Attention over patches and tokens of {saved['item']} under: {sentence}",
                draw_attention, saved, index,
            )
            for index, sentence in enumerate(saved["relations"])
        ]  # fmt: skip
        patches, tokens = saved["image"][0].size, len(saved["tokens"])
        return Figure(
            "Where the pooling head looks",
            f"{self.first.label}: weights of the relation-guided pooling (Eq. 5) for the test item "
            f"“{saved['item']}” under {len(saved['relations'])} of its relations; item and "
            f"relations are drawn by the seed {self.seed}. The {patches} patches and [CLS] add up "
            f"to 100 %, so do the {tokens} tokens; were all alike, each would have "
            f"{100 / (patches + 1):.0f} % and {100 / tokens:.0f} %. One scale for all images.",
            tuple(images),
            data=(path,),
        )

    def cost(self) -> Figure:
        """The table of latency and parameters: the runs whose models differ."""
        opened: list[Any] = []
        skipped: list[str] = []
        known: dict[str, Any] = {}
        for run in (self.first, *self.others):
            config = run.config
            # What makes no difference to the model, as a seed, is no second row.
            model = repr((config.method, config.get("model"), config.loss.get("learn_temperature")))
            if model in known:
                skipped.append(f"{run.label} has the same model as {known[model]}")
            elif len(opened) == _MOST_COSTS:
                skipped.append(f"{run.label}, of more than {_MOST_COSTS} models")
            elif opened and config.platform != opened[0].run.config.platform:
                skipped.append(f"{run.label} has another config.platform")
            else:
                try:
                    opened.append(self.models.open(run))
                    known[model] = run.label
                except LeftOutError as error:
                    skipped.append(str(error))
        if not opened:
            raise LeftOutError(skipped[0])
        with on_device(opened[0].run.config):
            path, saved = self.folder.save("cost.csv", cost(opened))
        rows = [
            (
                str(model),
                str(saved["method"][i]),
                f"{int(saved['used'][i]):,}",
                "–" if np.isnan(saved["trained"][i]) else f"{int(saved['trained'][i]):,}",
                f"{saved['milliseconds'][i]:.3f}",
                f"{saved['fastest'][i]:.3f} to {saved['slowest'][i]:.3f}",
                f"{saved['relative'][i]:.2f}",
            )
            for i, model in enumerate(saved["model"])
        ]
        header = (
            "model", "method", "parameters that embed", "trained", "ms a sample, median",
            "fastest to slowest", "towers alone = 1",
        )  # fmt: skip
        return Figure(
            "Latency and parameters",
            f"Measured when this page was made, on {saved['machine'][0]}: embedding one item, text "
            f"and image, in batches of {saved['batch'][0]:.0f}; median of "
            f"{saved['repeats'][0]:.0f} calls after the one that compiles, the models called in "
            "turn. RCML's time includes encoding its relation sentences, once a batch. The last "
            "column is the median ratio to the same towers alone in the same turn: a baseline's, "
            "or RCML's own with CLIP's pooling. Baselines on the same towers compute the same; "
            "what they differ by is noise. Trained are the parameters that training changes: "
            "frozen towers do not count, heads and scalars that only the loss uses do."
            + "".join(f" Left out: {why}." for why in skipped),
            table=Table(header, rows),
            data=(path,),
        )


def _map_caption(saved: dict, asked: bool) -> str:
    found = "; ".join(
        f"{run}: {page.signed(under)} under it, {page.signed(over)} on average over the "
        f"{int(saved['relations'])} relations of the test split"
        for run, under, over in zip(
            saved["runs"], saved["silhouette"], saved["mean_silhouette"], strict=True
        )
    )
    rule = "asked for" if asked else "the one with the most test pairs"
    return (
        f"t-SNE (perplexity {PERPLEXITY}, cosine, a fixed seed) of {len(saved['kind'])} test items "
        f"of the {len(saved['kinds'])} most frequent kinds under the relation "
        f"“{saved['relation']}” ({rule}): text and image averaged and renormalised, as the "
        "score AVG compares them; baselines embed the items alone. Silhouette of the kinds by "
        f"cosine in the full space, not in the plane: {found}."
    )

"""The figures of RCML and its baselines."""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from rcml_jax.report import bars, relational, relational_data, style
from rcml_jax.report.arrays import LeftOutError, slug
from rcml_jax.report.cost import cost
from rcml_jax.report.folder import Figure, Folder, Picture, Section, Table
from rcml_jax.report.models import Models, Opened, on_device
from rcml_jax.report.projection import PERPLEXITY
from rcml_jax.report.sources import Run

_MOST_MAPS, _MOST_BARS, _MOST_COSTS = 4, 8, 6
_PLURAL = {"success": "successes", "failure": "failures"}
_SCORES = (
    "TT, II, TI and IT compare A's text or picture with B's; AVG compares the averages of both, "
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
    """Runs and their controls: one picture of retrieval, one of the relation tasks."""
    path, saved = folder.save("controls.csv", bars.beside_controls(runs))
    pictures = []
    for number, entries in enumerate(bars.BESIDE, 1):
        names = [name for name, _, _ in entries]
        drawn = bars.draw_controls(saved, folder.picture(f"controls-{number}.svg"), names)
        if drawn:
            alt = f"Bars of runs and controls: {', '.join(names)}."
            pictures.append(Picture(drawn, alt))
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
        tuple(pictures),
        data=(path,),
    )


def _bars(folder: Folder, runs: Sequence[Run]) -> list[Figure]:
    protocol = collections.defaultdict(str, runs[0].result["protocol"])
    asked = [run.result["relation_type"] for run in runs if "relation_type" in run.result]
    candidates = asked[0].get("candidates", 10) if asked else 10
    runs = runs[:_MOST_BARS]

    def figure(title, name, arrays, what, chance, caption) -> Figure:
        path, saved = folder.save(f"{name}.csv", arrays)
        picture = bars.draw_groups(saved, folder.picture(f"{name}.svg"), what, chance)
        alt = f"Bars: {what} by {', '.join(dict.fromkeys(map(str, arrays['group'])))}."
        return Figure(title, caption, (Picture(picture, alt),), data=(path,))

    types = (
        f"The true relation of a test pair among {candidates}: {protocol['relation_type']}. "
        "Ties count against the model."
    )
    return [
        folder.attempt(
            "Retrieval: Hit@5",
            lambda: figure(
                "Retrieval: Hit@5", "retrieval", bars.by_score(runs, "retrieval", "hit@5"),
                "Hit@5 (%)", _chance(protocol["retrieval"]),
                f"Queries: {protocol['retrieval']}. {_SCORES}. Ties count against the model.",
            ),
        ),
        folder.attempt(
            "Relation type: Top-3",
            lambda: figure(
                "Relation type: Top-3", "relation-type",
                bars.by_score(runs, "relation_type", "top3"), "Top-3 (%)",
                min(1.0, 3 / candidates), f"{types} {_SCORES}.",
            ),
        ),
        folder.attempt(
            "Relation type: Top-3 by similarity",
            lambda: figure(
                "Relation type: Top-3 by similarity", "relation-type-by-similarity",
                bars.by_similarity(runs, "relation_type", "top3"), "Top-3 by AVG (%)",
                min(1.0, 3 / candidates), f"{types} Scored by AVG under each similarity.",
            ),
        ),
        folder.attempt(
            "Relation validity",
            lambda: figure(
                "Relation validity", "validity", bars.validity(runs), "accuracy (%)", 0.5,
                f"Does the relation hold? A {protocol['relation_validity']}.",
            ),
        ),
    ]  # fmt: skip


def _chance(said: str) -> float:
    """The chance of Hit@5 that the protocol's sentence ends with; 0 where it names none."""
    try:
        return float(said.rpartition("chance of Hit@5 ")[2])
    except ValueError:
        return 0.0


class _Models:
    """What is computed from the models: one table of embeddings for all figures of a run."""

    def __init__(
        self, folder: Folder, first: Run, others: Sequence[Run], models: Models, seed: int
    ):
        self.folder, self.first, self.others = folder, first, others
        self.models, self.seed = models, seed

    def maps(self, asked: str) -> Figure:
        """t-SNE of the same items, a picture for each run."""
        first = self.models.open(self.first)
        relation = relational_data.chosen_relation(first, asked)
        items = relational_data.chosen_items(first, self.seed)
        runs, skipped = [first], []
        for run in self.others[: _MOST_MAPS - 1]:
            try:
                other = self.models.open(run)
            except LeftOutError as error:
                skipped.append(str(error))
                continue
            if relational_data.same_items(first, other):
                runs.append(other)
            else:
                skipped.append(f"{run.label} was tested on other items")
        arrays = self._map(runs, items, relation)
        path, saved = self.folder.save("map.npz", arrays)
        pictures = []
        for place, label in enumerate(saved["runs"]):
            name = f"map-{slug(str(label))}.svg"
            picture = relational.draw_map(saved, self.folder.picture(name), place)
            alt = f"Scatter plot of {len(items)} items of {label}, coloured by kind."
            pictures.append(Picture(picture, alt))
        return Figure(
            "The same items under one relation",
            _map_caption(saved, bool(asked)) + "".join(f" Left out: {why}." for why in skipped),
            tuple(pictures),
            data=(path,),
        )

    def _map(self, runs: list[Opened], items: np.ndarray, relation: int) -> dict:
        tables = []
        for opened in runs:
            with on_device(opened.run.config):
                tables.append(relational_data.table_of(opened, items))
        return relational_data.embedding_map(runs, tables, items, relation)

    def cases(self) -> list[Figure]:
        """Case studies of the first run, the successes before the failures."""
        title = "Case studies"
        try:
            opened = self.models.open(self.first)
            self.folder.log(title)
            with on_device(opened.run.config):
                places = relational_data.drawn_queries(opened, self.seed)
                items = relational_data.items_of_queries(opened, places)
                table = relational_data.table_of(opened, items)
                cases = relational_data.case_studies(opened, table, places)
        except LeftOutError as error:
            return [Figure(title, left_out=str(error))]
        by_outcome = {"success": [], "failure": []}
        for case in cases:
            by_outcome[case["outcome"]].append(case)
        return [
            self._case_figure(f"{title}: {_PLURAL[outcome]}", outcome, found, cases[0])
            if found
            else Figure(
                f"{title}: {_PLURAL[outcome]}",
                left_out=f"none of the {len(places)} queries that were drawn is a {outcome}",
            )
            for outcome, found in by_outcome.items()
        ]

    def _case_figure(self, title: str, outcome: str, cases: list[dict], any_case: dict) -> Figure:
        pictures, files = [], []
        for number, case in enumerate(cases, 1):
            path, saved = self.folder.save(f"case-{outcome}-{number}.npz", case)
            picture = relational.draw_case(
                saved, self.folder.picture(f"case-{outcome}-{number}.svg")
            )
            best = case["candidates"][case["order"][-1][0]]
            alt = (
                f"Query {case['query']}, {case['relation']}; truth {case['candidates'][0]}; "
                f"first by average: {best}."
            )
            pictures.append(Picture(picture, alt))
            files.append(path)
        top, count = relational_data.TOP, len(cases[0]["candidates"])
        return Figure(
            title,
            f"{self.first.label}: queries of the test split, each with the top {top} of {count} "
            "candidates by cosine, one line a score, the truth framed and ticked in green and its "
            f"rank beside. Drawn by the seed {self.seed}, not chosen: of {any_case['drawn']} "
            f"queries {any_case['successes']} have the truth among the top {top} by average (a "
            f"success); these are the first {len(cases)} {_PLURAL[outcome]} in the order drawn. "
            "Ties count against the truth.",
            tuple(pictures),
            data=tuple(files),
        )

    def attention(self) -> Figure:
        """One picture for each of the relations."""
        opened = self.models.open(self.first)
        with on_device(opened.run.config):
            arrays = relational_data.attention(opened, self.seed)
        path, saved = self.folder.save("attention.npz", arrays)
        pictures = []
        for place, sentence in enumerate(saved["relations"]):
            picture = relational.draw_attention(
                saved, self.folder.picture(f"attention-{place + 1}.svg"), place
            )
            alt = f"Attention over patches and tokens of {saved['item']} under: {sentence}"
            pictures.append(Picture(picture, alt))
        patches, tokens = saved["image"][0].size, len(saved["tokens"])
        return Figure(
            "Where the pooling head looks",
            f"{self.first.label}: weights of the relation-guided pooling (Eq. 5) for the test item "
            f"“{saved['item']}” under {len(saved['relations'])} of its relations; item and "
            f"relations are drawn by the seed {self.seed}. The {patches} patches and [CLS] add up "
            f"to 100 %, so do the {tokens} tokens; were all alike, each would have "
            f"{100 / (patches + 1):.0f} % and {100 / tokens:.0f} %. One scale for all pictures.",
            tuple(pictures),
            data=(path,),
        )

    def cost(self) -> Figure:
        """The table of latency and parameters: the runs whose models differ."""
        opened, skipped, known = [], [], {}
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
            f"and picture, in batches of {saved['batch'][0]:.0f}; median of "
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
        f"{run}: {style.signed(under)} under it, {style.signed(over)} on average over the "
        f"{int(saved['relations'])} relations of the test split"
        for run, under, over in zip(
            saved["runs"], saved["silhouette"], saved["mean_silhouette"], strict=True
        )
    )
    rule = "asked for" if asked else "the one with the most test pairs"
    return (
        f"t-SNE (perplexity {PERPLEXITY}, cosine, a fixed seed) of {len(saved['kind'])} test items "
        f"of the {len(saved['kinds'])} most frequent kinds under the relation "
        f"“{saved['relation']}” ({rule}): text and picture averaged and renormalised, as the "
        "score AVG compares them; baselines embed the items alone. Silhouette of the kinds by "
        f"cosine in the full space, not in the plane: {found}."
    )

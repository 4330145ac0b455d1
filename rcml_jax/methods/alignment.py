"""The alignment study of a configuration: read or compute embeddings, and measure them."""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.config import fold_seed
from rcml_jax.data.images import ChosenImages
from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import captions, openmoji
from rcml_jax.data.sources.captions import CaptionedImages
from rcml_jax.data.sources.embeddings import (
    Pairs,
    join_pairs,
    project_to_narrower,
    read_npz,
    select_pairs,
    split_pairs,
)
from rcml_jax.data.stages import Stages, pack, unpack
from rcml_jax.errors import UserError
from rcml_jax.evaluation import CLOSED, LEARNERS
from rcml_jax.evaluation import modality_gap as gap
from rcml_jax.evaluation.calibration import SPACES as SIGNED
from rcml_jax.evaluation.calibration import fit_space, pair_scores, score_measures
from rcml_jax.evaluation.cross_modal import check_pairs, pair_retrieval, retrieval
from rcml_jax.evaluation.learned_similarity.networks import read_options
from rcml_jax.evaluation.learned_similarity.training import (
    GRIDS,
    SPACES,
    Learned,
    draw_pairs,
    fit_best,
    search,
)
from rcml_jax.evaluation.modality_gap import (
    calibrate,
    cosine_histograms,
    modality_gap,
    negative_share,
    plane,
    unmatched_pairs,
)
from rcml_jax.log import Progress, counted, log_line
from rcml_jax.methods import build
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.models.frozen import tower_types
from rcml_jax.ops.similarity import SIMILARITIES
from rcml_jax.parsing import user_path
from rcml_jax.remote import shared
from rcml_jax.schema import validate
from rcml_jax.tasks.frozen_embeddings import tower_embeddings
from rcml_jax.tasks.relations import cache_directory
from rcml_jax.training import loop, sharding
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import read_params

# Where the alignment study's embeddings come from: runs of ours, towers of checkpoints, files.


_CAPTIONED = ("flickr8k", "flickr30k", "coco")
#: Train, validation and test pairs of a source.
Splits = list[Pairs]
_SHARES = (0.6, 0.2, 0.2)


def sources(config: Any, workdir: pathlib.Path) -> dict[str, Callable[[], Splits]]:
    """Functions that read the splits of each source, by name.

    The runs in `config.runs` have to be trained already.

    Raises UserError for two sources of one name, and towers that cannot be read.
    """
    data, towers = config.data, [t for t in config.towers.names.split(",") if t]
    if data.name in ("npz", "runs"):
        return {"npz": lambda: _npz(config)} if data.name == "npz" else _runs(data.path)
    found: dict[str, Callable[[], Splits]] = {}
    if data.name == "openmoji":
        found = {
            "rcml": lambda: _run(workdir / "runs" / "rcml", config.runs.rcml),
            "clip": lambda: _run(workdir / "runs" / "clip", config.runs.clip),
            "apart": lambda: _apart(config, workdir),
        }
    data_once = functools.cache(lambda: _captioned(config))  # the same for all towers
    for name in towers:
        tower_types(name)
        label = "+".join(pathlib.PurePath(side).name for side in name.split("+"))
        if label in found:
            raise UserError(f"two sources are called {label!r}; rename one of the directories")
        found[label] = functools.partial(_loaded_towers, name, data_once, config.towers, workdir)
    return found


def _npz(config: Any) -> Splits:
    pairs = read_npz(config.data.path)
    # Checked before it is split, so that errors name rows of the file.
    whole = project_to_narrower(Pairs(*gap.check_pairs(*pairs.arrays())), 0)
    asked = config.evaluation.similarity
    known = tuple(SIMILARITIES) if asked == "all" else tuple(asked.split(","))
    check_pairs(*whole.arrays(), similarities=known)
    return split_pairs(pairs, _SHARES, config.data.split_seed)


def _runs(paths: str) -> dict[str, Callable[[], Splits]]:
    directories = [user_path(path) for path in paths.split(",") if path]
    if not directories:
        raise UserError("name work directories: --config alignment:runs,path=DIRECTORY")
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        raise UserError("two of the work directories have the same name; rename one")
    return {
        name: functools.partial(_loaded_run, directory)
        for name, directory in zip(names, directories, strict=True)
    }


def _loaded_run(directory: pathlib.Path) -> Splits:
    return _run(directory, workdirs.load_config(directory))


def _run(directory: pathlib.Path, config: Any) -> Splits:
    """The towers of a relational method, each text with its item's image."""
    method = build(config, directory)
    if not isinstance(method, RelationalMethod):
        raise UserError(
            f"{directory} holds a run of {config.method!r}, whose images and texts share no space; "
            "name a run of the recipe rcml"
        )
    params = jax.tree.map(jax.numpy.asarray, read_params(directory))
    found = []
    for split in SPLITS:
        items = np.sort(method.task.splits.items(split))
        image, text = method.own_embeddings(params, items)
        images = method.task.graph.images
        shown = images.indices[items] if isinstance(images, ChosenImages) else items
        _, first, rows = np.unique(shown, return_index=True, return_inverse=True)
        found.append(Pairs(image[first], text, rows))
    return found


def _apart(config: Any, workdir: pathlib.Path) -> Splits:
    """An image and a text encoder that were trained apart, on the same items."""
    sides = {}
    for modality in ("image", "text"):
        name = f"apart_{modality}"
        directory = workdir / "runs" / name
        method: Any = build(config.runs[name], directory)
        params = jax.tree.map(jax.numpy.asarray, read_params(directory))
        sides[modality] = [
            method.embeddings(params, method.task.data.rows(split))[modality][0] for split in SPLITS
        ]
    return [
        Pairs(image, text, np.arange(len(text)))
        for image, text in zip(sides["image"], sides["text"], strict=True)
    ]


# Towers of checkpoints, on any data


def _captioned(config: Any) -> CaptionedImages:
    """The images and texts that towers of checkpoints embed."""
    data = config.data
    if data.name in _CAPTIONED:
        load, cache = getattr(captions, data.name), cache_directory(data.dir)
        strict = data.get("strict", False)
        with shared(data.dir):
            return load(data.path, seed=data.split_seed, strict=strict, cache=cache)
    with shared(data.dir):
        graph = openmoji.load(cache_directory(data.dir))
    run = config.runs.rcml.data  # its items, so that all sources are asked the same
    splits = split_graph(graph, seed=run.split_seed, disjoint=run.disjoint)
    split = np.zeros(len(graph), np.int8)
    for place, name in enumerate(SPLITS):
        split[splits.items(name)] = place
    return CaptionedImages(
        graph.name, graph.images, tuple(graph.texts), np.arange(len(graph)), split
    )


def _loaded_towers(
    name: str, data: Callable[[], CaptionedImages], asked: Any, workdir: pathlib.Path
) -> Splits:
    return _towers(name, data(), asked, workdir)


def _towers(name: str, data: CaptionedImages, asked: Any, workdir: pathlib.Path) -> Splits:
    """The data's pairs embedded by towers of checkpoints, once; kept in the work directory."""
    options = {"layer": asked.layer, "pooling": asked.pooling, "max_length": asked.max_length}
    sides = tower_embeddings(name, data.images, data.texts, workdir / "embeddings", **options)
    pairs = Pairs(sides["image"], sides["text"], data.image_of_text)
    return [select_pairs(pairs, np.flatnonzero(data.split == i)) for i in range(len(SPLITS))]


ARRAYS = "similarities.npz"


def study(config: Any, workdir: pathlib.Path | str) -> dict | None:
    """Compare similarities, gaps and learned similarities on every source; writes `eval.json`.

    `similarities.npz` beside it has the data of the figures: for each source the histograms of
    cosines and, for each calibration, the plane of `evaluation.modality_gap`. Runs in `config.runs`
    that the work directory lacks are trained first, under <workdir>/runs. Returns None if a signal
    stopped one of them. Raises UserError for a mistake of the user.
    """
    workdir = user_path(workdir)
    validate(config)
    similarities = _names(config.evaluation.similarity, tuple(SIMILARITIES))
    learners = _names(config.evaluation.learned, LEARNERS)
    _pair_counts(config)
    _learner_options(config, learners)
    readers = sources(config, workdir)
    device = sharding.first_local(sharding.pick_devices(config.platform))
    with workdirs.hold(workdir):
        return _study(config, workdir, device, readers, similarities, learners)


def _study(
    config: Any,
    workdir: pathlib.Path,
    device: jax.Device,
    readers: dict[str, Callable],
    similarities: tuple[str, ...],
    learners: tuple[str, ...],
) -> dict | None:
    workdirs.prepare(workdir, config)
    if not train_missing(config, workdir):
        return None
    found: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    with sharding.working_on(device):
        for name, read in readers.items():
            splits = read()
            once = _once(workdir / "learned", splits, config)
            found[name], drawn = _study_source(splits, config, similarities, learners, once)
            arrays |= {f"{name}/{key}": value for key, value in drawn.items()}
    first = next(iter(found))
    result = {
        "method": "alignment",
        "dataset": config.data.name,
        "protocol": _protocol(config, first),
        **found[first],
        "sources": found,
    }
    result = workdirs.json_value(result)
    workdirs.write_arrays(workdir / ARRAYS, arrays)
    workdirs.write_json(workdir / "eval.json", result)
    return result


def train_missing(config: Any, workdir: pathlib.Path) -> bool:
    """Train the runs that are not finished. Returns false if a signal stopped one."""
    for name, run in config.runs.items():
        directory = workdir / "runs" / name
        run = _with_data_dir(run, config.data.dir)
        if (directory / "eval.json").is_file():
            workdirs.prepare(directory, run)  # refuses what was trained otherwise
            continue
        log_line(f"training {name}")
        if loop.train_and_evaluate(run, directory) is None:
            return False
    return True


def _with_data_dir(run: Any, directory: str) -> Any:
    run = run.copy_and_resolve_references()
    run.data.dir = run.data.dir or directory
    return run


def _names(value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """ "all", or names with commas between, or nothing → names."""
    return known if value == "all" else tuple(name for name in value.split(",") if name)


def _pair_counts(config: Any) -> list[int]:
    """The numbers of training pairs to compare learners on. Raises UserError for no numbers."""
    value = config.evaluation.get("pair_counts", "")
    counts = [x for x in value.split(",") if x]
    if not all(x.isdecimal() and int(x) > 1 for x in counts):
        raise UserError(
            f"config.evaluation.pair_counts={value!r}: give whole numbers above 1 with commas "
            "between"
        )
    return sorted({int(x) for x in counts})


def _learner_options(config: Any, learners: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Learner → the options that are fixed for it. Raises UserError for what is none."""
    value, found = config.evaluation.get("learner_options", ""), {}
    for part in (x for x in value.replace(" ", "").split(";") if x):
        name, _, options = part.partition(":")
        if name not in learners:
            raise UserError(
                f"config.evaluation.learner_options names {name!r}, which is not among "
                f"config.evaluation.learned ({', '.join(learners)})"
            )
        if name in found:
            raise UserError(f"config.evaluation.learner_options names {name} twice; give it once")
        try:
            pairs = [option.split("=") for option in options.split(",")]
            found[name] = {option: json.loads(number) for option, number in pairs}
            if len(found[name]) < len(pairs):
                raise ValueError("an option is given twice")
        except ValueError as error:
            raise UserError(
                f"config.evaluation.learner_options: {part!r} is not of the form "
                f"LEARNER:NAME=NUMBER,NAME=NUMBER ({error})"
            ) from error
        try:
            read_options(name, found[name])
        except UserError as error:
            raise UserError(f"config.evaluation.learner_options, {name}: {error}") from error
    return found


# Measuring a source


#: Of a name, what else the result depends on and a function that computes it: the result.
_Once = Callable[[str, Any, Callable[[], dict]], dict]
#: Counts changes of what is fitted to the same embeddings under the same options.
_RECIPE = 4
#: Options that change nothing about a learned similarity.
_OF_OTHERS = ("learned", "learner_options", "pair_counts", "similarity", "gallery")


def _once(directory: pathlib.Path, splits: list[Pairs], config: Any) -> _Once:
    """Keeps results on these embeddings under these options, for a study that is interrupted."""
    stages, arrays = Stages(directory), hashlib.sha256()
    for pairs in splits:
        for array in pairs.arrays():
            arrays.update(np.ascontiguousarray(array).data)
    options = {k: v for k, v in config.evaluation.items() if k not in _OF_OTHERS}
    common = [_RECIPE, config.seed, options, arrays.hexdigest()]

    def once(name: str, key: Any, compute: Callable[[], dict]) -> dict:
        kept = lambda: {"result": pack(workdirs.json_value(compute()))}  # noqa: E731
        return unpack(stages.get(name, [*common, key], kept)["result"])

    return once


def _study_source(
    splits: list[Pairs],
    config: Any,
    similarities: tuple[str, ...],
    learners: tuple[str, ...],
    once: _Once,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Retrieval under each similarity, the gap, calibration, learned similarities; and arrays."""
    options, seed = config.evaluation, fold_seed(config.seed)
    widths = [splits[0].image.shape[1], splits[0].text.shape[1]]
    narrow = [project_to_narrower(pairs, seed) for pairs in splits]
    train, validation, test = (pairs.arrays() for pairs in narrow)
    whole = join_pairs(narrow).arrays() if options.gallery == "all" else test
    memory, bootstrap = options.memory_mb * 2**20, options.get("bootstrap", 0)

    def score(pairs: tuple, names: tuple[str, ...]) -> dict:
        return retrieval(*pairs, similarities=names, memory=memory, bootstrap=bootstrap)

    gap = modality_gap(*whole, wasserstein=options.wasserstein, seed=seed)
    for warning in gap["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    result = {
        "images": len(whole[0]),
        "texts": len(whole[1]),
        "training_pairs": len(train[1]),
        "widths": widths,
        "precision": score(whole, similarities),
        "modality_gap": gap,
    }
    calibration, arrays = {}, cosine_histograms(*whole, seed=seed)
    for name, moved in _calibrations(train, test).items():
        calibration[name] = _calibrated(moved, score, config)
        points = plane(*moved, seed=seed)
        arrays |= {f"{name}/{modality}": rows for modality, rows in points.items()}
    result["calibration"] = calibration
    signed = _signed_spaces(SIGNED, [train, validation, test], score, config)
    fixed = _learner_options(config, learners)
    learned: dict[str, dict] = {}
    by_pairs: dict[str, dict] = {}
    for name in learners:
        # Learners take towers of unequal widths as they are.
        own = [x.arrays() for x in (narrow if name == "mlp_cosine" else splits)]
        given = [fixed[name]] if name in fixed else []
        measured = functools.partial(_learned, name, own, config, score, fixed=fixed.get(name))
        asked = [*similarities, *given]
        of_all = once(name, asked, functools.partial(_on_all_pairs, measured, own, score, config))
        learned[name] = of_all["learned"]
        signed |= of_all["signed"]
        chosen = learned[name]["options"]
        key = [chosen, *given]
        by_pairs[name] = {
            str(n): once(f"{name}-{n}", key, functools.partial(_of_pairs, measured, n, chosen))
            for n in _pair_counts(config)
            if n <= len(own[0][1])
        }
    by_pairs = {name: found for name, found in by_pairs.items() if found}
    return result | {"signed": signed, "learned": learned, "by_pairs": by_pairs}, arrays


def _on_all_pairs(measured: Callable, splits: list[Any], score: Callable, config: Any) -> dict:
    """A learner's figures, and its signs and probabilities where it embeds."""
    found, first = measured()
    signed = {}
    if first.embeds:
        held_out, shown = (_embedded(first, pairs) for pairs in splits[1:])
        signed[first.name] = _signed(held_out, shown, score, config)
        if shown[0].shape[1] <= _WIDEST:
            spaces = [space for space in SIGNED if space != "cosine"]
            embedded = (_embedded(first, splits[0]), held_out, shown)
            own = [_aligned(first, pairs) for pairs in embedded]
            moved = _signed_spaces(spaces, own, score, config)
            signed |= {f"{first.name}, {space}": row for space, row in moved.items()}
    return {"learned": found, "signed": signed}


def _of_pairs(measured: Callable, pairs: int, chosen: dict) -> dict:
    """A learner's figures on so many training pairs."""
    return measured(pairs=pairs, chosen=chosen)[0]


def _calibrations(train: tuple, test: tuple) -> dict[str, tuple]:
    """The test pairs as they are, centred, and centred and whitened, as fitted on train."""
    found = {"none": test}
    for name, whiten in (("centred", False), ("whitened", True)):
        try:
            fitted = calibrate(train[0], train[1], whiten=whiten)
        except UserError as error:  # a collapsed embedding: the rest of the study stands
            print(f"warning: not {name}: {error}", file=sys.stderr)
            continue
        found[name] = fitted.image(test[0]), fitted.text(test[1]), test[2]
    return found


def _calibrated(pairs: tuple, score: Callable, config: Any) -> dict:
    """Cosine retrieval, the gap that is left, and the share of unrelated pairs below 0."""
    return {
        "negative_share": negative_share(*pairs, seed=fold_seed(config.seed)),
        **_gap_left(pairs, config),
        **_of(score(pairs, ("cosine",)), "cosine"),
    }


def _gap_left(pairs: tuple, config: Any) -> dict[str, float]:
    """How far apart modalities are that were moved, rows brought to length one.

    Nothing is said of more than `_WIDEST` dimensions, whose covariances take minutes.
    """
    if pairs[0].shape[1] > _WIDEST:
        return {}
    kind = config.evaluation.wasserstein
    gap = modality_gap(*pairs, wasserstein=kind, pairs=1, seed=fold_seed(config.seed))
    return {name: gap[name] for name in ("centroid", "wasserstein2")}


def _under_similarities(pairs: tuple, config: Any, score: Callable) -> dict[str, dict]:
    """Retrieval under each similarity in the space of an alignment, of at most `_WIDEST`."""
    if pairs[0].shape[1] > _WIDEST:
        return {}
    names = _names(config.evaluation.similarity, tuple(SIMILARITIES))
    found = score(pairs, names)
    return {"similarities": {name: _of(found, name) for name in names}}


def _of(found: dict, similarity: str) -> dict:
    return {direction: measures[similarity] for direction, measures in found.items()}


_WIDEST = 2048
#: Pairs that signs and probabilities are looked at on.
_SIGNED_PAIRS = 100_000


def _signed(held_out: tuple, test: tuple, score: Callable, config: Any) -> dict:
    """Signs and probabilities of a similarity, a dot product, and what its order retrieves.

    held_out, test: embeddings (images, texts, image_of_text); the zero and the probabilities are
    fitted on the first.
    """
    scores: list[Any] = []
    for image, text, rows in (held_out, test):
        unrelated = unmatched_pairs(len(image), rows, _SIGNED_PAIRS, fold_seed(config.seed))
        pairs = (rows, np.arange(len(text))), unrelated
        scores.append(tuple(pair_scores(image, text, *indices) for indices in pairs))
    level = config.evaluation.get("negative_level", 0.99)
    try:
        found = score_measures(*scores, level=level)
    except UserError as error:
        return {"left_out": str(error)}
    return found | _of(score(test, ("dot",)), "dot")


def _signed_spaces(
    spaces: Sequence[str], splits: list[Any], score: Callable, config: Any
) -> dict[str, dict]:
    """`_signed` of embeddings in each space that is fitted on the first of the splits."""
    train, *rest = splits
    found = {}
    for space in spaces:
        try:
            fitted = fit_space(space, *train[:2], seed=fold_seed(config.seed))
        except UserError as error:  # a collapsed embedding
            found[space] = {"left_out": str(error)}
            continue
        held_out, shown = ((fitted.image(x), fitted.text(y), rows) for x, y, rows in rest)
        found[space] = _signed(held_out, shown, score, config)
    return found


def _learned(
    name: str,
    splits: list[Any],
    config: Any,
    score: Callable,
    *,
    pairs: int | None = None,
    chosen: dict | None = None,
    fixed: dict | None = None,
) -> tuple[dict, Learned]:
    """A similarity fitted on train, stopped by validation, scored on test, over the seeds.

    pairs: training pairs to draw by each seed, or None for all; chosen: options that a search on
    all pairs found. A closed form is searched again, as its best shrinkage depends on the number of
    pairs; without a search it takes the best of a grid (`learned_similarity.GRIDS`). fixed: options
    that are neither searched nor varied. Returns means over the seeds, their deviations and values,
    and the first seed's learner.
    """
    train, validation, test = splits
    asked = config.evaluation
    fixed = fixed or {}
    told = f" on {counted(pairs, 'pairs')}" if pairs else ""
    log_line(f"fitting {name}{told}")
    seeds = [fold_seed(config.seed + i) for i in range(asked.get("learner_seeds", 1))]
    if not pairs and name in CLOSED and name != "optimal_transport":
        seeds = seeds[:1]  # on which only the validation rows of its grid depend
    patience = asked.get("learner_patience", 10)
    options = {"steps": asked.learner_steps, "patience": patience} | (chosen or {}) | fixed
    searched: dict[str, int] = {}
    runs, learners = [], []
    for seed in seeds:
        image, text, rows = train
        if pairs:
            image, text, rows = draw_pairs(image, text, rows, pairs, seed)
        options["batch_size"] = min(fixed.get("batch_size", asked.learner_batch), len(text))
        again = chosen is None or name in CLOSED
        free = SPACES.get(name, {}).keys() - fixed.keys()
        if asked.search_trials and free and again and seed == seeds[0]:
            base = {k: v for k, v in options.items() if k not in SPACES[name] or k in fixed}
            trials = asked.search_trials
            with Progress(trials, unit="trials") as progress:
                found = search(
                    name,
                    image,
                    text,
                    rows,
                    validation,
                    trials=trials,
                    options=base,
                    seed=seed,
                    note=progress.update,
                )
            kept = [trial for trial in found.trials if not trial["pruned"]]
            best = max(kept, key=lambda trial: trial["mrr"])["options"]
            options, learned = base | best, found.best
            searched = {"trials": len(found.trials), "pruned": len(found.trials) - len(kept)}
        else:
            learned = fit_best(name, image, text, rows, validation, options=options, seed=seed)
        learners.append(learned)
        runs.append(_scored(learned, test, config, score))
    if learners[0].embeds and not pairs:
        moved = _aligned(learners[0], _embedded(learners[0], test))
        runs[0] |= _gap_left(moved, config) | _under_similarities(moved, config, score)
    values = {
        direction: {k: [run[direction][k] for run in runs] for k in runs[0][direction]}
        for direction in ("image_to_text", "text_to_image")
    }
    result: dict[str, Any] = {
        "validation": learners[0].best,
        "options": {
            k: v for k, v in options.items() if k in fixed or k not in ("steps", "batch_size")
        },
        "grid": {k: getattr(learners[0].options, k) for k in GRIDS.get(name, {})},
        "search": searched,
        "seeds": seeds,
        **{k: v for k, v in runs[0].items() if k not in values},
    }
    for direction, of_direction in values.items():
        intervals = of_direction.pop("interval", None)
        result[direction] = {k: float(np.mean(v)) for k, v in of_direction.items()}
        if intervals and len(runs) == 1:
            result[direction]["interval"] = intervals[0]
        if len(runs) > 1:
            spread = {k: float(np.std(v, ddof=1)) for k, v in of_direction.items()}
            result[direction] |= {"std": spread, "values": of_direction}
    return result, learners[0]


def _scored(learned: Learned, test: tuple, config: Any, score: Callable) -> dict:
    """Retrieval of both directions."""
    if learned.embeds:
        return _of(score(_embedded(learned, test), ("dot",)), "dot")
    memory, bootstrap = config.evaluation.memory_mb * 2**20, config.evaluation.get("bootstrap", 0)
    return pair_retrieval(learned.score, *test, memory=memory, bootstrap=bootstrap)


def _embedded(learned: Learned, pairs: tuple) -> tuple:
    image, text, rows = pairs
    return np.asarray(learned.embed_image(image)), np.asarray(learned.embed_text(text)), rows


def _aligned(learned: Learned, embedded: tuple) -> tuple:
    """What `_embedded` returns, without the last entry of two_tower_sigmoid: the logit's bias."""
    image, text, rows = embedded
    if learned.name == "two_tower_sigmoid":
        image, text = image[:, :-1], text[:, :-1]
    return image, text, rows


def _protocol(config: Any, first: str) -> dict:
    return {
        "split": "test items or images, unseen by the calibration, the learners and towers of ours",
        "precision on": {
            "test": "the test split",
            "all": "all splits together; calibration and learned similarities on test alone",
        }[config.evaluation.gallery],
        "ties": "count against the model",
        "ranks": "exact, over the whole gallery of the split",
        "precision": "p@k: share of the top k that is right; r@k: any of the top k is right",
        "calibration": "means and whitening of each modality, fitted on the training split",
        "learned": "fitted on the training split, stopped by validation; means over the seeds; "
        "closed forms take shrinkage, power and kept entries from a grid by validation",
        "similarities": "of learned: its first seed's space under each similarity; what it was "
        "trained or fitted for is the dot product",
        "by_pairs": "as learned, on so many training pairs drawn by each seed, images first",
        "signed": "LEARNER, SPACE: the learner's embeddings in a space fitted on the training "
        "split; zero and probabilities fitted on validation pairs; probabilities at equal shares"
        " of matched and unrelated pairs; both maps rise strictly, so that the order is that of "
        "the space's own score",
        "interval": "95 %, bootstrap over images, each with all its texts",
        "widths": "where they differ, the wider one is projected by a random orthonormal basis; "
        "learned similarities but mlp_cosine take both as they are",
        "top level": f"the figures of the source {first!r}; all of them are under sources",
        "seed": config.seed,
    }

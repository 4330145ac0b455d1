"""The alignment study of a configuration: embeddings from its sources, and what is said of them."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rcml_jax.alignment_sources import sources
from rcml_jax.data.embeddings import Pairs, join_pairs, project_to_narrower
from rcml_jax.errors import UserError
from rcml_jax.evaluation.alignment import retrieval
from rcml_jax.evaluation.gap import calibrate, modality_gap, negative_share
from rcml_jax.evaluation.histograms import cosine_histograms, plane
from rcml_jax.evaluation.learned import LEARNERS, SPACES, fit, search
from rcml_jax.evaluation.pair_search import pair_retrieval
from rcml_jax.similarity import SIMILARITIES
from rcml_jax.training import loop, parallel
from rcml_jax.training import workdir as workdirs

ARRAYS = "similarities.npz"
GALLERIES = ("test", "all")


def study(config: Any, workdir: pathlib.Path | str) -> dict | None:
    """Compare similarities, gaps and learned similarities on every source; writes `eval.json`.

    Beside it `similarities.npz` has what pictures are drawn from: for each source the histograms of
    cosines and, for each calibration, the plane of `evaluation.histograms`. Runs that `config.runs`
    names and the work directory lacks are trained first, under <workdir>/runs. Returns None where a
    signal ended one of them. Raises UserError for what a user can mend.
    """
    workdir = pathlib.Path(workdir)
    similarities = _names("similarity", config.evaluation.similarity, tuple(SIMILARITIES))
    learners = _names("learned", config.evaluation.learned, LEARNERS)
    gallery = config.evaluation.gallery
    if gallery not in GALLERIES:
        raise UserError(f"config.evaluation.gallery={gallery!r} is unknown; choose test or all")
    readers = sources(config, workdir)
    device = parallel.first_local(parallel.pick_devices(config.platform))
    workdirs.prepare(workdir, config)
    if not train_missing(config, workdir):
        return None
    found, arrays = {}, {}
    with jax.default_device(device):
        for name, read in readers.items():
            found[name], drawn = _study_source(read(), config, similarities, learners)
            arrays |= {f"{name}/{key}": value for key, value in drawn.items()}
    first = next(iter(found))
    result = {
        "method": "alignment",
        "dataset": config.data.name,
        "protocol": _protocol(config, first),
        **found[first],
        "sources": found,
    }
    workdirs.write_arrays(workdir / ARRAYS, arrays)
    workdirs.write_json(workdir / "eval.json", result)
    return result


def train_missing(config: Any, workdir: pathlib.Path) -> bool:
    """Train the configuration's runs that are not finished; false where a signal ended one."""
    for name, run in config.runs.items():
        directory = workdir / "runs" / name
        run = _with_data_dir(run, config.data.dir)
        if (directory / "eval.json").is_file():
            workdirs.prepare(directory, run)  # refuses what was trained otherwise
            continue
        print(f"training {name}", file=sys.stderr, flush=True)
        if loop.train_and_evaluate(run, directory) is None:
            return False
    return True


def _with_data_dir(run: Any, directory: str) -> Any:
    run = run.copy_and_resolve_references()
    run.data.dir = run.data.dir or directory
    return run


def _names(option: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """ "all", or names with commas between, or nothing. Raises UserError for an unknown one."""
    if value == "all":
        return tuple(known)
    names = tuple(name for name in value.split(",") if name)
    unknown = [name for name in names if name not in known]
    if unknown or (option == "similarity" and not names):
        raise UserError(
            f"config.evaluation.{option}={value!r}: choose all or from {', '.join(known)}"
        )
    return names


# What is said of a source


def _study_source(
    splits: list[Pairs], config: Any, similarities: tuple[str, ...], learners: tuple[str, ...]
) -> tuple[dict, dict[str, np.ndarray]]:
    """Retrieval under each similarity, the gap, calibration, learned similarities; and arrays."""
    options, seed = config.evaluation, config.seed
    widths = [splits[0].image.shape[1], splits[0].text.shape[1]]
    narrow = [project_to_narrower(pairs, seed) for pairs in splits]
    train, test = narrow[0].arrays(), narrow[2].arrays()
    whole = join_pairs(narrow).arrays() if options.gallery == "all" else test
    memory = options.memory_mb * 2**20

    def score(pairs: tuple, names: tuple[str, ...]) -> dict:
        return retrieval(*pairs, similarities=names, memory=memory)

    gap = modality_gap(*whole, wasserstein=options.wasserstein, seed=seed)
    for warning in gap["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    result = {
        "images": len(whole[0]),
        "texts": len(whole[1]),
        "widths": widths,
        "precision": score(whole, similarities),
        "modality_gap": gap,
    }
    calibration, arrays = {}, cosine_histograms(*whole, seed=seed)
    for name, moved in _calibrations(train, test).items():
        calibration[name] = _calibrated(moved, score, seed)
        points = plane(*moved, seed=seed)
        arrays |= {f"{name}/{modality}": rows for modality, rows in points.items()}
    result["calibration"] = calibration
    result["learned"] = {name: _learned(name, narrow, config, score) for name in learners}
    return result, arrays


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


def _calibrated(pairs: tuple, score: Callable, seed: int) -> dict:
    """Cosine retrieval, the gap that is left, and the share of unrelated pairs below 0."""
    found = score(pairs, ("cosine",))
    return {
        "negative_share": negative_share(*pairs, seed=seed),
        "centroid": modality_gap(*pairs, pairs=1)["centroid"],
        "image_to_text": found["image_to_text"]["cosine"],
        "text_to_image": found["text_to_image"]["cosine"],
    }


def _learned(name: str, splits: list[Pairs], config: Any, score: Callable) -> dict:
    """A similarity fitted on train, stopped by validation, scored on test."""
    train, validation, test = (pairs.arrays() for pairs in splits)
    asked, seed = config.evaluation, config.seed
    print(f"fitting {name}", file=sys.stderr, flush=True)
    options = {"steps": asked.learner_steps, "batch_size": min(asked.learner_batch, len(train[1]))}
    if asked.search_trials and name in SPACES:
        found = search(
            name, *train, validation, trials=asked.search_trials, options=options, seed=seed
        )
        learned = found.best
    else:
        learned = fit(name, *train, validation, options=options, seed=seed)
    if learned.embeds:
        moved = np.asarray(learned.embed_image(test[0])), np.asarray(learned.embed_text(test[1]))
        found = score((*moved, test[2]), ("dot",))
        found = {direction: measures["dot"] for direction, measures in found.items()}
    else:
        memory = config.evaluation.memory_mb * 2**20
        found = pair_retrieval(learned.score, *test, memory=memory)
    return {"validation": learned.best, **found}


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
        "learned": "fitted on the training split, stopped by validation",
        "widths": "where they differ, the wider one is projected by a random orthonormal basis",
        "top level": f"the figures of the source {first!r}; all of them are under sources",
        "seed": config.seed,
    }

"""The alignment study of a configuration: embeddings from its sources, and what is said of them."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rcml_jax.data.embeddings import Pairs, project_to_narrower, read_npz, split_pairs
from rcml_jax.errors import UserError
from rcml_jax.evaluation.alignment import retrieval
from rcml_jax.evaluation.gap import calibrate, modality_gap, negative_share
from rcml_jax.evaluation.learned import LEARNERS, SPACES, fit, search
from rcml_jax.evaluation.pair_search import pair_retrieval
from rcml_jax.methods import build
from rcml_jax.similarity import SIMILARITIES
from rcml_jax.training import loop, parallel
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import read_params

SPLITS = ("train", "validation", "test")
_SHARES = (0.6, 0.2, 0.2)


def study(config: Any, workdir: pathlib.Path | str) -> dict | None:
    """Compare similarities, gaps and learned similarities on every source; writes `eval.json`.

    Runs that `config.runs` names and the work directory lacks are trained first, under
    <workdir>/runs. Returns None where a signal ended one of them. Raises UserError for what a user
    can mend.
    """
    workdir = pathlib.Path(workdir)
    similarities = _names("similarity", config.evaluation.similarity, tuple(SIMILARITIES))
    learners = _names("learned", config.evaluation.learned, LEARNERS)
    device = parallel.first_local(parallel.pick_devices(config.platform))
    workdirs.prepare(workdir, config)
    sources: dict[str, Callable[[], list[Pairs]]] = {}
    if config.data.name == "npz":
        sources["npz"] = lambda: _npz(config)
    elif config.data.name == "openmoji":
        if not train_missing(config, workdir):
            return None
        sources = {
            "rcml": lambda: _towers(config.runs.rcml, workdir / "runs" / "rcml"),
            "clip": lambda: _towers(config.runs.clip, workdir / "runs" / "clip"),
            "apart": lambda: _apart(config, workdir),
        }
    else:
        raise UserError(f"config.data.name={config.data.name!r} is unknown; choose openmoji or npz")
    with jax.default_device(device):
        found = {
            name: _study_source(read(), config, similarities, learners)
            for name, read in sources.items()
        }
    first = next(iter(found))
    result = {
        "method": "alignment",
        "dataset": config.data.name,
        "protocol": _protocol(config, first),
        **found[first],
        "sources": found,
    }
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


# Sources: each gives train, validation and test pairs.


def _npz(config: Any) -> list[Pairs]:
    pairs = read_npz(config.data.path)
    # Measured once on the whole, so that what is wrong with it is said before it is split.
    modality_gap(*project_to_narrower(pairs, 0).arrays(), pairs=1)
    return split_pairs(pairs, _SHARES, config.data.split_seed)


def _towers(run: Any, directory: pathlib.Path) -> list[Pairs]:
    """The towers of a relational method, each item with itself."""
    method = build(run, directory)
    params = jax.tree.map(jax.numpy.asarray, read_params(directory))
    found = []
    for split in SPLITS:
        items = np.sort(method.task.splits.items(split))
        image, text = method.own_embeddings(params, items)
        found.append(Pairs(image, text, np.arange(len(items))))
    return found


def _apart(config: Any, workdir: pathlib.Path) -> list[Pairs]:
    """An image and a text encoder that were trained apart, on the same items."""
    sides = {}
    for modality in ("image", "text"):
        name = f"apart_{modality}"
        directory = workdir / "runs" / name
        method = build(config.runs[name], directory)
        params = jax.tree.map(jax.numpy.asarray, read_params(directory))
        sides[modality] = [
            method.embeddings(params, method.task.data.rows(split))[modality][0] for split in SPLITS
        ]
    return [
        Pairs(image, text, np.arange(len(text)))
        for image, text in zip(sides["image"], sides["text"], strict=True)
    ]


# What is said of a source


def _study_source(
    splits: list[Pairs], config: Any, similarities: tuple[str, ...], learners: tuple[str, ...]
) -> dict:
    """Retrieval under each similarity, the gap, calibration and learned similarities, on test."""
    options, seed = config.evaluation, config.seed
    widths = [splits[0].image.shape[1], splits[0].text.shape[1]]
    narrow = [project_to_narrower(pairs, seed) for pairs in splits]
    train, test = narrow[0].arrays(), narrow[2].arrays()
    memory = options.memory_mb * 2**20

    def score(pairs: tuple, names: tuple[str, ...]) -> dict:
        return retrieval(*pairs, similarities=names, memory=memory)

    gap = modality_gap(*test, wasserstein=options.wasserstein, seed=seed)
    for warning in gap["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    result = {
        "images": len(test[0]),
        "texts": len(test[1]),
        "widths": widths,
        "precision": score(test, similarities),
        "modality_gap": gap,
        "calibration": {"none": _calibrated(test, score, seed)},
    }
    for name, whiten in (("centred", False), ("whitened", True)):
        calibration = calibrate(train[0], train[1], whiten=whiten)
        moved = calibration.image(test[0]), calibration.text(test[1]), test[2]
        result["calibration"][name] = _calibrated(moved, score, seed)
    result["learned"] = {name: _learned(name, narrow, config, score) for name in learners}
    return result


def _calibrated(pairs: tuple, score: Callable, seed: int) -> dict:
    """Cosine retrieval, and the share of unrelated pairs with a negative cosine."""
    found = score(pairs, ("cosine",))
    return {
        "negative_share": negative_share(*pairs, seed=seed),
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
        "split": "test items or images, unseen by the towers, the calibration and the learners",
        "ties": "count against the model",
        "ranks": "exact, over the whole gallery of the split",
        "precision": "p@k: share of the top k that is right; r@k: any of the top k is right",
        "calibration": "means and whitening of each modality, fitted on the training split",
        "learned": "fitted on the training split, stopped by validation",
        "widths": "where they differ, the wider one is projected by a random orthonormal basis",
        "top level": f"the figures of the source {first!r}; all of them are under sources",
        "seed": config.seed,
    }

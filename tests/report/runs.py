"""Made-up work directories: configurations, evaluations and curves, and untrained models."""

import json

import jax
import numpy as np
import optax

from configs import alignment as alignment_recipe
from configs import m3col as m3col_recipe
from configs import rcml as rcml_recipe
from rcml_jax.evaluation.controls import gains
from rcml_jax.methods import build
from rcml_jax.training.checkpoint import Checkpoints
from rcml_jax.training.step import create
from rcml_jax.training.workdir import write_json
from tests.toy import tiny_config

SCORES = ("tt", "ii", "ti", "it", "avg")


def rates(base):
    return {name: base + 0.02 * place for place, name in enumerate(SCORES)}


def relational_result(method="rcml", base=0.5, similarities=()):
    """An `eval.json` as `RelationalMethod.evaluate` makes it."""
    retrieval = {"queries": 40, **{name: rates(base) for name in ("hit@1", "hit@5", "mrr")}}
    types = {"pairs": 20, "candidates": 10, "top1": rates(base), "top3": rates(base)}
    result = {
        "method": method,
        "dataset": "catalogue",
        "split": "test",
        "protocol": {
            "split_seed": 0,
            "items": 60,
            "retrieval": "pairs in both directions; chance of Hit@5 0.238",
            "relation_type": "drawn by a fixed seed",
            "relation_validity": "probe on frozen features",
            "ties": "count against the model",
        },
        "retrieval": retrieval,
        "relation_type": types,
        "relation_validity": {"pairs": 20, "probe": "linear", "accuracy": base},
    }
    if similarities:
        one = {"retrieval": retrieval, "relation_type": types}
        result["similarities"] = dict.fromkeys(similarities, one)
    return result


def with_controls(result, relation_only=0.3):
    """The same `eval.json` with some controls of each sort: five scores, TT alone, a rate."""
    names = ("retrieval", "retrieval_random")
    words = {name: {"hit@5": {"tt": 0.4}, "mrr": {"tt": 0.2}} for name in names}
    controls = {
        "relation_only": {name: {"hit@5": rates(relation_only)} for name in names},
        "relation_one_hot": {"relation_validity": {"accuracy": 0.51}},
        "words": words | {"relation_type": {"top3": {"tt": 0.65}}},
    }
    result = result | {"retrieval_random": result["retrieval"], "controls": controls}
    return result | {"gain_over_best_control": gains(result)}


def measure(*values):
    return {"mean": float(np.mean(values)), "std": 0.0, "values": list(values)}


def classification_result(accuracies=(0.5,), kinds=None):
    """An `eval.json` as `methods.report.report` makes it."""
    accuracy = {"accuracy": measure(*accuracies), "macro_f1": measure(*accuracies)}
    protocols = ("last", "validation_selected", "best_test_epoch")
    return {
        "method": "m3col",
        "dataset": "toy",
        "split": "test",
        "protocol": {
            "samples": {"train": 40, "test": 20},
            "modalities": kinds or {"mrna": "table", "mirna": "table"},
            "steps": 8,
            "looks": "one every 2 steps of 8",
        },
        "classification": dict.fromkeys(protocols, accuracy),
        "checkpoint": {"which": "best", **accuracy},
        "random_inputs": {"mean": measure(0.6)},
    }


def relational_lines(steps=(2, 4, 6)):
    lines = []
    for step in steps:
        terms = {"tt": 3.0, "identification": 2.0}
        train = {"loss": 12 - step, "learning_rate": 1e-3 / step, "gradient_norm": 1.0, **terms}
        lines.append({"step": step, "kind": "train", **train})
        lines.append({"step": step, "kind": "validation", "hit@5/avg": 0.1 * step})
    return lines


def classification_lines(steps=(2, 4, 6, 8), models=("seed42",), held_out=()):
    """Lines as the loop writes them: where samples are held out, only of those on validation."""
    lines = []
    for step in steps:
        train = {"loss": 9 - step, "learning_rate": 1e-3, "mrna": 1.0}
        lines.append({"step": step, "kind": "train", **train})
        both = (*models, *held_out)
        looks = {f"look/{m}/test/accuracy": 0.1 * step - 0.01 * i for i, m in enumerate(both)}
        looks |= {f"look/{m}/validation/accuracy": 0.09 * step for m in held_out or models}
        lines.append({"step": step, "kind": "validation", "accuracy": 0.09 * step, **looks})
    return lines


def write_run(path, config, result=None, lines=()):
    """A work directory without checkpoints."""
    path.mkdir(parents=True)
    write_json(path / "config.json", config if isinstance(config, dict) else config.to_dict())
    if result is not None:
        write_json(path / "eval.json", result)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def small_config(method="rcml", **options):
    """The configuration of a recipe, as of a run of eight steps."""
    recipe = {"m3col": m3col_recipe, "alignment": alignment_recipe}.get(method, rcml_recipe)
    config = recipe.get_config().to_dict() | {"method": method, "seed": 42}
    if method != "alignment":
        config["steps"] = 8
    if "warmup_steps" in config.get("optimizer", {}):
        config["optimizer"]["warmup_steps"] = 0
    for name, value in options.items():
        part = config
        *parents, last = name.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    return config


def save_untrained(path, config):
    """A checkpoint of the parameters as they are before the first step."""
    method = build(config, path)
    batches = method.batches()
    params = jax.jit(method.init)(jax.random.key(0), next(batches))
    checkpoints = Checkpoints(path)
    state = create(params, optax.sgd(0.1), jax.random.key(1))
    checkpoints.save(1, state, batches, {"best": 0.0}, 0.5)
    checkpoints.wait()
    checkpoints.close()
    return method, params


def write_relational(path, catalogue, method="rcml", **options):
    """A whole work directory of an untrained RCML or CLIP on the toy catalogue."""
    config = tiny_config(catalogue, method=method, **options)
    write_run(path, config, relational_result(method), relational_lines())
    save_untrained(path, config)
    return path

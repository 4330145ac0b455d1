"""Train several variants of a configuration over several seeds, and write one table.

    python -m rcml_jax.sweep --config configs/rcml.py --workdir runs/beta \
        --vary model.beta=0,0.2,0.4,0.6,0.8,1 --seeds 42,43,44
    python -m rcml_jax.sweep --config configs/rcml.py --workdir runs/ablations \
        --variant full --variant no_intra_modal_loss:loss.intra_modal_weight=0

`--vary NAME=a,b,c` makes a variant of each value; `--variant LABEL:NAME=VALUE,NAME=VALUE` one of
its own. Each run has the work directory <workdir>/<variant>/seed<k>; what is finished is not run
again, what was interrupted goes on. `table.md` and `table.json` hold means and deviations over the
seeds of all that is finished.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from rcml_jax.commands import guard, load_config_file, parse_flags
from rcml_jax.errors import UserError
from rcml_jax.training.loop import train_and_evaluate
from rcml_jax.training.workdir import load_config, write_json

#: Label and path into `eval.json` of the table's columns.
COLUMNS = {
    "Hit@5 TT": "retrieval/hit@5/tt",
    "II": "retrieval/hit@5/ii",
    "TI": "retrieval/hit@5/ti",
    "IT": "retrieval/hit@5/it",
    "AVG": "retrieval/hit@5/avg",
    "Top-3": "relation_type/top3/avg",
    "validity": "relation_validity/accuracy",
}


def main(argv: Sequence[str]) -> int:
    """Run the sweep that the command line asks for."""
    return guard(_sweep, argv)


def _sweep(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rcml_jax.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--vary", default="")
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--seeds", default="42")
    args, overrides = parser.parse_known_args(argv[1:])
    variants = read_variants(args.vary, args.variant)
    seeds = _seeds(args.seeds)
    # Every configuration is read before the first run, so that a mistyped one costs nothing.
    runs = [
        (label, seed, _config(args.config, [*overrides, *options], seed))
        for label, options in variants.items()
        for seed in seeds
    ]
    for label, seed, config in runs:
        directory = args.workdir / label / f"seed{seed}"
        if not _finished(directory, config):
            print(f"{label}, seed {seed}", file=sys.stderr, flush=True)
            if train_and_evaluate(config, directory) is None:
                return 0
        rows = collect(args.workdir, list(variants), seeds)
        write_json(args.workdir / "table.json", rows)
        (args.workdir / "table.md").write_text(markdown(rows))
    print(markdown(collect(args.workdir, list(variants), seeds)), end="")
    return 0


def read_variants(vary: str, variants: Sequence[str]) -> dict[str, list[str]]:
    """Labels of variants → the options of each, as arguments of a command line."""
    found: dict[str, list[str]] = {}
    if vary:
        name, equals, values = vary.partition("=")
        if not equals or not values:
            raise UserError(f"--vary {vary!r} must be NAME=VALUE,VALUE,...")
        for value in values.split(","):
            found[f"{name}={value}"] = [f"--config.{name}={value}"]
    for variant in variants:
        label, _, options = variant.partition(":")
        if not label or label in found or "/" in label:
            raise UserError(f"--variant {variant!r} needs a label of its own, without a slash")
        found[label] = [f"--config.{option}" for option in options.split(",") if option]
    if not found:
        raise UserError("nothing to run: give --vary NAME=VALUE,... or --variant LABEL:NAME=VALUE")
    return found


def collect(workdir: pathlib.Path, labels: Sequence[str], seeds: Sequence[int]) -> list[dict]:
    """Mean, standard deviation over seeds (n − 1) and count of each column for each variant."""
    rows = []
    for label in labels:
        paths = [workdir / label / f"seed{seed}" / "eval.json" for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.is_file()]
        if not results:
            continue
        row: dict[str, Any] = {"variant": label, "seeds": len(results)}
        for column, path in COLUMNS.items():
            values = np.array([_at(result, path) for result in results])
            deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            row[column] = {"mean": float(values.mean()), "std": deviation}
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The table as Markdown, rates in percent."""
    lines = [
        "| variant | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> list[str]:
    figures = [f"{100 * row[c]['mean']:.1f} ± {100 * row[c]['std']:.1f}" for c in COLUMNS]
    return [row["variant"], str(row["seeds"]), *figures]


def _at(result: dict, path: str) -> float:
    for name in path.split("/"):
        result = result[name]
    return float(result)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r} must be whole numbers, such as 42,43,44") from error


def _config(path: str, options: Sequence[str], seed: int) -> ml_collections.ConfigDict:
    config = parse_flags(options, load_config_file(path)).config
    config.seed = seed
    return config


def _finished(directory: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Whether the very same configuration was already run to its end there."""
    if not (directory / "eval.json").is_file():
        return False
    return load_config(directory).to_dict() == json.loads(json.dumps(config.to_dict()))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Train several variants of a configuration over several seeds, and write one table.

    rcml-sweep --config rcml --workdir runs/beta \
        --vary model.beta=0,0.2,0.4,0.6,0.8,1 --seeds 42,43,44
    rcml-sweep --config m3col:rosmap --workdir runs/rosmap --ablations
    rcml-sweep --config rcml --workdir runs/weights \
        --variant full --variant no_intra_modal_loss:loss.intra_modal_weight=0

`--vary NAME=a,b,c` makes a variant of each value; `--variant LABEL:NAME=VALUE,NAME=VALUE` one of
its own; `--ablations` those that `get_ablations` of the configuration file lists. Each run has the
work directory <workdir>/<variant>/seed<k>; what is finished is not run again, what was interrupted
goes on. `table.md` and `table.json` hold means and deviations over the seeds of all that is
finished; for classifiers also the error analysis, where each modality was trained alone.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import ml_collections

from rcml_jax.cli.commands import (
    call_config_file,
    guard,
    load_config_file,
    parse_flags,
    read_config,
)
from rcml_jax.errors import UserError
from rcml_jax.evaluation.display import collect, markdown
from rcml_jax.files import write_whole
from rcml_jax.training.loop import train_and_evaluate
from rcml_jax.training.workdir import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep that the command line asks for."""
    return guard(_sweep, argv)


def _sweep(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rcml-sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--vary", default="")
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--seeds", default="42")
    args, overrides = parser.parse_known_args(argv[1:])
    listed = call_config_file(args.config, "get_ablations") if args.ablations else {}
    named = [f"{label}:{options}" for label, options in listed.items()]
    variants = read_variants(args.vary, [*named, *args.variant])
    seeds = _seeds(args.seeds)
    # Every configuration is read before the first run, so that a mistyped one costs nothing.
    runs = [
        (label, seed, _config(args.config, [*overrides, *options], seed))
        for label, options in variants.items()
        for seed in seeds
    ]
    for label, seed, config in runs:
        directory = args.workdir / folder(label) / f"seed{seed}"
        if not _finished(directory, config):
            print(f"{label}, seed {seed}", file=sys.stderr, flush=True)
            if train_and_evaluate(config, directory) is None:
                return 0
        table = collect(args.workdir, {label: folder(label) for label in variants}, seeds)
        write_json(args.workdir / "table.json", table)
        write_whole(args.workdir / "table.md", markdown(table))
    print((args.workdir / "table.md").read_text(), end="")
    return 0


def folder(label: str) -> str:
    """The directory of a variant's runs."""
    return label.replace(" ", "_")


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
        raise UserError(
            "nothing to run: give --vary NAME=VALUE,..., --variant LABEL:NAME=VALUE or --ablations"
        )
    return found


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
    return read_config(directory).to_dict() == json.loads(json.dumps(config.to_dict()))


if __name__ == "__main__":
    sys.exit(main())

"""Train several variants of a configuration over several seeds, and write one table.

    rcml-sweep --config rcml --workdir runs/beta \
        --vary model.beta=0,0.2,0.4,0.6,0.8,1 --seeds 42,43,44
    rcml-sweep --config m3col:rosmap --workdir runs/rosmap --ablations
    rcml-sweep --config rcml --workdir runs/weights \
        --variant full --variant no_intra_modal_loss:loss.intra_modal_weight=0

`--vary NAME=a,b,c` makes a variant of each value; `--variant LABEL:NAME=VALUE,NAME=VALUE` one of
its own; `--ablations` those that `get_ablations` of the configuration file lists. Each run has the
work directory <workdir>/<variant>/seed<k>; what is finished is not run again, what was interrupted
goes on. A variant whose label is no safe folder name, such as one with a path in it, has a short
name there; `variants.json` says which folder is which variant. `table.md` and `table.json` hold
means and deviations over the seeds of all that is finished; for classifiers also the error
analysis, where each modality was trained alone. `--paired` compares the first variant with each
other one over the same seeds: difference, 95 % interval, effect size, p-value and the number of
seeds that would be needed. Several seeds are `--seeds`, or those of one compiled step:

    rcml-sweep --config m3col:rosmap --workdir runs/paired --ablations --paired --config.seeds=20
"""

import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence

import ml_collections

from rcml_jax.cli.commands import guard, parse_flags, take_option, wants_help
from rcml_jax.cli.embed import Parser
from rcml_jax.config import call_config_file, load_config_file
from rcml_jax.errors import UserError
from rcml_jax.evaluation.display import collect, markdown
from rcml_jax.files import write_whole
from rcml_jax.parsing import argument_text
from rcml_jax.remote import Place, path_or_address, written
from rcml_jax.schema import help_text, validate
from rcml_jax.training.loop import train_and_evaluate
from rcml_jax.training.workdir import load_config, write_json

_LONGEST = 80  # characters of a folder's name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep that the command line asks for."""
    return guard(_sweep, argv)


def _sweep(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-sweep", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=path_or_address)
    parser.add_argument("--vary", default="", type=argument_text)
    parser.add_argument("--variant", action="append", default=[], type=argument_text)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--paired", action="store_true")
    if wants_help(argv):
        print(parser.format_help())
        print(help_text(take_option(argv, "config")[0] or "rcml"))
        return 0
    args, overrides = parser.parse_known_args(argv[1:])
    listed = call_config_file(args.config, "get_ablations") if args.ablations else {}
    named = [f"{label}:{options}" for label, options in listed.items()]
    variants = read_variants(args.vary, [*named, *args.variant])
    seeds = _seeds(args.seeds)
    folders = folders_of(variants)
    # Every configuration is read and checked before the first run: a mistyped one costs nothing.
    runs = [
        (label, seed, _config(args.config, [*overrides, *options], seed))
        for label, options in variants.items()
        for seed in seeds
    ]
    for _, _, config in runs:
        validate(config)
    with written(args.workdir) as place:
        return _run(place, args.paired, variants, folders, seeds, runs)


def _run(
    place: Place,
    paired: bool,
    variants: Mapping[str, Sequence[str]],
    folders: Mapping[str, str],
    seeds: Sequence[int],
    runs: Sequence[tuple[str, int, ml_collections.ConfigDict]],
) -> int:
    workdir = place.path
    for label, seed, config in runs:
        directory = workdir / folders[label] / f"seed{seed}"
        if not _finished(directory, config):
            print(f"{label}, seed {seed}", file=sys.stderr, flush=True)
            if train_and_evaluate(config, directory, after_step=place.after_step) is None:
                return 0
        table = collect(workdir, folders, seeds, paired=paired)
        write_json(workdir / "table.json", table)
        known = {folders[label]: _described(label, given) for label, given in variants.items()}
        write_json(workdir / "variants.json", known)
        write_whole(workdir / "table.md", markdown(table))
    print((workdir / "table.md").read_text("utf-8"), end="")
    return 0


def folders_of(labels: Collection[str]) -> dict[str, str]:
    """Labels of variants → names of their folders, unique also where upper case is lower case.

    Spaces become underscores. Where anything else has to change, or two names are the same, the
    name ends in a digest of the label.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for label in labels:
        name = label.replace(" ", "_")
        safe = re.sub(r"[^\w=.,+-]+", "-", name, flags=re.ASCII).lstrip(".-")[:_LONGEST]
        if safe != name or safe.lower() in taken:
            digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            safe = f"{safe[: _LONGEST - 9]}-{digest}"
        taken.add(safe.lower())
        found[label] = safe
    return found


def _described(label: str, options: Sequence[str]) -> dict:
    return {"variant": label, "options": [o.removeprefix("--config.") for o in options]}


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
        if not label or label in found:
            raise UserError(f"--variant {variant!r} needs a label of its own")
        found[label] = [f"--config.{option}" for option in options.split(",") if option]
    if not found:
        raise UserError(
            "nothing to run: give --vary NAME=VALUE,..., --variant LABEL:NAME=VALUE or --ablations"
        )
    return found


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r} must be whole numbers, such as 42,43,44") from error
    if len(set(seeds)) < len(seeds):  # it would count twice in the means
        raise UserError(f"--seeds {text!r} names a seed twice; give each once")
    return seeds


def _config(path: str, options: Sequence[str], seed: int) -> ml_collections.ConfigDict:
    config = parse_flags(options, load_config_file(path)).config
    config.seed = seed
    return config


def _finished(directory: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Whether the very same configuration was already run to its end there."""
    if not (directory / "eval.json").is_file():
        return False
    there, here = load_config(directory).to_dict(), json.loads(json.dumps(config.to_dict()))
    for values in (there, here):  # the run itself writes what its checkpoints ask for
        values.get("model", {}).pop("preprocessing", None)
    return there == here


if __name__ == "__main__":
    sys.exit(main())

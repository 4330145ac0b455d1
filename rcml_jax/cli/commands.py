"""What `rcml-train` and `rcml-eval` do: read the command line, run, and end with a status.

Status 0 means done, or stopped by a signal with everything saved; 2 a mistake that the printed
sentence tells how to mend.
"""

import contextlib
import importlib.util
import inspect
import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from rcml_jax.data.gates import user_path
from rcml_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]
#: The folder of the recipes: a wheel has it inside the package, a clone beside the package.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
#: Options that leave the model unchanged; they may be overridden at evaluation.
_OF_EVALUATION = ("evaluation.", "data.dir", "data.path", "data.threads", "platform")


def train(argv: Sequence[str] | None = None) -> int:
    """Train a method, or resume its training, and evaluate the best checkpoint.

        rcml-train --config rcml --workdir runs/rcml [--config.steps=1000 ...]
        rcml-train --config rcml:folder,path=my_catalogue --workdir runs/mine
        rcml-train --config my_recipe.py --workdir runs/other

    --config names a packaged recipe, such as rcml or m3col, or a Python file with a function
    get_config. The argument after the colon is the recipe's: the data source and its options.
    --config.NAME=VALUE overrides any value of the configuration.
    """
    return guard(_train, argv, train.__doc__)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Evaluate the best checkpoint of a work directory again, embeddings of a file, or a study.

        rcml-eval --workdir runs/rcml [--split=validation] [--config.evaluation.similarity=all]
        rcml-eval --config alignment --workdir runs/alignment
        rcml-eval --config rcml:SOURCE --embeddings FILE.npz --workdir runs/theirs
        rcml-eval --config rcml:SOURCE --list DIRECTORY

    The second form runs the alignment study; the third scores the vectors of a file. Both make the
    work directory. The last writes the items, images and relation sentences of a source, so that
    another model can embed them.
    """
    return guard(_evaluate, argv, evaluate.__doc__)


def guard(
    command: Callable[[Sequence[str]], int], argv: Sequence[str] | None, usage: str | None = None
) -> int:
    """Run a command and return its exit status.

    argv: the program's name and its arguments, by default `sys.argv`. usage: what `--help` prints,
    for commands that do not parse it themselves. A mistake of the user ends in one sentence on
    stderr and status 2.
    """
    argv = sys.argv if argv is None else argv
    if usage and {"--help", "-h"} & set(argv[1:]):
        print(inspect.cleandoc(usage))
        return 0
    # A failed write is told in a sentence; Orbax and asyncio would log its stack traces, too.
    logging.set_verbosity(logging.FATAL)
    # transformers 5 says at its import that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII locale cannot print every title
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _quiet_about_orbax(sys.unraisablehook)
    try:
        return command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; start the same command again to go on", file=sys.stderr)
        return 130


def _quiet_about_orbax(hook: Callable) -> Callable:
    """The hook without what Orbax's threads throw at an event loop that a failed read closed."""
    if getattr(hook, "quiet", False):
        return hook

    def quiet(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not sys.is_finalizing():
            hook(unraisable)

    quiet.quiet = True
    return quiet


def _train(argv: Sequence[str]) -> int:
    config_path, rest = take_option(argv, "config")
    if config_path is None:
        raise UserError("training needs --config, for example --config rcml")
    values = parse_flags(rest, load_config_file(config_path), workdir="")
    if not values.workdir:
        raise UserError("training needs --workdir, a directory of its own for the run")
    from rcml_jax.evaluation.display import print_evaluation
    from rcml_jax.training.loop import train_and_evaluate
    from rcml_jax.training.sharding import initialize_distributed, is_primary

    initialize_distributed()
    result = train_and_evaluate(values.config, values.workdir)
    if result is not None and is_primary():
        print_evaluation(result)
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    workdir, rest = take_option(argv, "workdir")
    path, rest = take_option(["", *rest], "config")
    listing, rest = take_option(["", *rest], "list")
    embeddings, rest = take_option(["", *rest], "embeddings")
    if (listing or embeddings) and not path:
        raise UserError(
            f"--{'list' if listing else 'embeddings'} needs --config rcml:SOURCE, the catalogue"
        )
    if listing:
        return _list(load_config_file(path), listing, rest)
    if workdir is None:
        raise UserError(
            "the evaluation needs --workdir, the work directory of a run, or a new one with "
            "--embeddings"
        )
    from rcml_jax.training.workdir import load_config

    if embeddings:
        return _evaluate_embeddings(load_config_file(path), embeddings, workdir, rest)
    if path:
        config = load_config_file(path)
        if config.get("method") != "alignment":
            raise UserError(
                "the evaluation takes --config only for the alignment study (--config alignment) "
                "and with --embeddings or --list; otherwise the work directory has the "
                "configuration: leave --config out"
            )
        return _study(config, workdir, rest)
    config = load_config(user_path(workdir))
    with _naming(complete(config), workdir):
        if config.method == "alignment":
            return _study(config, workdir, rest)
        return _evaluate_run(config, workdir, rest)


def _evaluate_run(config: ml_collections.ConfigDict, workdir: str, rest: Sequence[str]) -> int:
    values = parse_flags(rest, config, split="test")
    _check_overrides(rest)
    _check_split(values.split)
    from rcml_jax.evaluation.display import print_evaluation
    from rcml_jax.training.loop import evaluate as evaluate_workdir

    print_evaluation(evaluate_workdir(values.config, workdir, values.split))
    return 0


def _evaluate_embeddings(
    config: ml_collections.ConfigDict, embeddings: str, workdir: str, rest: Sequence[str]
) -> int:
    values = parse_flags(rest, config, split="test")
    _check_split(values.split)
    from rcml_jax.evaluation.display import print_evaluation
    from rcml_jax.methods.embeddings import embeddings_config
    from rcml_jax.training.loop import evaluate_untrained

    config = embeddings_config(values.config, embeddings)
    print_evaluation(evaluate_untrained(config, workdir, values.split))
    return 0


def _check_split(split: str) -> None:
    from rcml_jax.data.relation_graph import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split={split} is unknown; choose one of {', '.join(SPLITS)}")


def _list(config: ml_collections.ConfigDict, directory: str, rest: Sequence[str]) -> int:
    values = parse_flags(rest, config)
    from rcml_jax.methods.task import load_graph
    from rcml_jax.search.items import write_listing

    graph = load_graph(values.config.data)
    write_listing(graph, directory)
    print(f"{directory}: {len(graph):,} items, {len(graph.relations)} relations")
    return 0


def complete(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Give the configuration of an older run, in place, the options that came after it.

    Those that are off by default, or that make no other model, take the default of the current
    configuration file of the method. Returns the others that it lacks, as dotted names → today's
    defaults: what the run had in their place is not known.
    """
    from flax.traverse_util import unflatten_dict

    from rcml_jax.training.workdir import leaves

    defaults = leaves(_current_defaults(config).to_dict())
    has = leaves(config.to_dict())
    lacking = {name: value for name, value in defaults.items() if name not in has}
    known = {n: v for n, v in lacking.items() if not v or n.startswith(_OF_EVALUATION)}
    with config.unlocked():
        config.update(unflatten_dict(known, sep="."))
    return {name: value for name, value in lacking.items() if name not in known}


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """A work directory's configuration, with the options that came after it: see `complete`.

    Raises UserError where there is none.
    """
    from rcml_jax.training.workdir import load_config

    config = load_config(workdir)
    complete(config)
    return config


def _current_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Today's configuration of the method and its data source."""
    recipe = config.method if config.method in ("m3col", "alignment") else "rcml"
    try:
        return load_config_file(f"{recipe}:{config.data.get('name', '')}")
    except UserError:  # a source of the user's own
        return load_config_file(recipe)


@contextlib.contextmanager
def _naming(unknown: dict[str, Any], workdir: str) -> Iterator[None]:
    """Where an option that `complete` left out is needed, say so in a sentence."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        missing = [name for name in unknown if repr(name.split(".")[-1]) in str(error)]
        if not missing:
            raise
        name = missing[0]
        raise UserError(
            f"{workdir} was trained by an older version, without config.{name}: write the value "
            f"that it had into {pathlib.Path(workdir) / 'config.json'} (the default is "
            f"{unknown[name]!r} now), or train anew"
        ) from error


def _study(config: ml_collections.ConfigDict, workdir: str, rest: Sequence[str]) -> int:
    values = parse_flags(rest, config)
    from rcml_jax.evaluation.display import print_evaluation
    from rcml_jax.methods.alignment import ARRAYS, study
    from rcml_jax.report.alignment import draw

    result = study(values.config, workdir)
    if result is None:
        return 0
    print_evaluation(result)
    directory = user_path(workdir)
    try:
        with np.load(directory / ARRAYS) as arrays:
            paths = draw(result, arrays, directory / "figures")
        print("figures:", *paths)
    except UserError as error:  # what was asked for is there
        print(f"no figures: {error}", file=sys.stderr)
    return 0


def _check_overrides(args: Sequence[str]) -> None:
    """Only options that leave the model unchanged may be overridden at evaluation."""
    for arg in args:
        name = arg.lstrip("-").split("=")[0]
        option = name.removeprefix("config.")
        if name != option and not option.startswith(_OF_EVALUATION):
            raise UserError(
                f"the evaluation takes the configuration of the work directory; --{name} would "
                "evaluate another model: train it with rcml-train"
            )


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name value` or `--name=value` out of the arguments (without the program's name)."""
    rest, value = [], None
    arguments = iter(argv[1:])
    for argument in arguments:
        flag, equals, after = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = after if equals else next(arguments, None)
            if not value:
                raise UserError(f"--{name} needs a value")
        else:
            rest.append(argument)
    return value, rest


def load_config_file(path_and_argument: str) -> ml_collections.ConfigDict:
    """The configuration of a recipe, "NAME[:ARGUMENT]" or "FILE.py[:ARGUMENT]".

    NAME is that of a packaged recipe. Raises UserError where `get_config` cannot be called.
    """
    config = call_config_file(path_and_argument, "get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        path = path_and_argument.partition(":")[0]
        raise UserError(f"get_config of {path} must return an ml_collections.ConfigDict")
    return config


def recipe_path(name: str) -> str:
    """The file of a packaged recipe such as "rcml"; any other name is a path and is returned as is.

    Raises UserError where there is no such file.
    """
    path = str(RECIPES / f"{name}.py" if name.isidentifier() else user_path(name))
    if not pathlib.Path(path).is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.py")))
        kind = "packaged recipe" if name.isidentifier() else "configuration file"
        raise UserError(
            f"there is no {kind} {name}; give a packaged recipe ({known}) or the path of a Python "
            "file"
        )
    return path


def call_config_file(path_and_argument: str, function: str) -> Any:
    """What a function of a recipe returns, which is named as for `load_config_file`.

    Raises UserError where it fails.
    """
    name, _, argument = path_and_argument.partition(":")
    path = recipe_path(name)
    spec = importlib.util.spec_from_file_location("rcml_jax_config_file", path)
    module = importlib.util.module_from_spec(spec) if spec else None
    if module is None:
        raise UserError(f"{path} is no Python file; give one with a function {function}")
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"{path} has no function {function}; {RECIPES / 'rcml.py'} has one")
        call = getattr(module, function)
        return call(argument) if argument else call()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{path} fails with {type(error).__name__}: {error}") from error


def parse_flags(
    args: Sequence[str], config: ml_collections.ConfigDict, **options: str
) -> flags.FlagValues:
    """Parse `--config.name=value` overrides and the given string options with their defaults.

    Raises UserError for a mistyped option or a value of the wrong type.
    """
    values = flags.FlagValues()
    for name, default in options.items():
        flags.DEFINE_string(name, default, name, flag_values=values)
    argv = ["", *args]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        raise UserError(f"wrong option: {reason}") from error
    if rest[1:]:
        raise UserError(f"unknown argument {rest[1]!r}; options are written --name=value")
    return values

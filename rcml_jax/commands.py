"""What `train.py` and `eval.py` do: read the command line, run, and end with a status.

Status 0 means done, or stopped by a signal with everything saved; 2 a mistake that the printed
sentence tells how to mend.
"""

import importlib.util
import logging as python_logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from rcml_jax.errors import UserError


def train(argv: Sequence[str]) -> int:
    """`python train.py --config FILE[:ARGUMENT] --workdir DIRECTORY [--config.name=value ...]`."""
    return guard(_train, argv)


def evaluate(argv: Sequence[str]) -> int:
    """`python eval.py --workdir DIRECTORY [--split=test] [--config.evaluation.name=value ...]`.

    With `--config configs/alignment.py` the alignment study, whose work directory it makes.
    """
    return guard(_evaluate, argv)


def guard(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; a mistake of the user ends in one sentence on stderr and status 2."""
    # A failed write is told in a sentence; Orbax and asyncio would log its stack traces, too.
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
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
        raise UserError("train.py needs --config, for example --config configs/rcml.py")
    values = parse_flags(rest, load_config_file(config_path), workdir="")
    if not values.workdir:
        raise UserError("train.py needs --workdir, a directory of its own for the run")
    from rcml_jax.evaluation.table import print_evaluation
    from rcml_jax.training.loop import train_and_evaluate
    from rcml_jax.training.parallel import initialize_distributed, is_primary

    initialize_distributed()
    result = train_and_evaluate(values.config, values.workdir)
    if result is not None and is_primary():
        print_evaluation(result)
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    workdir, rest = take_option(argv, "workdir")
    if workdir is None:
        raise UserError("eval.py needs --workdir, the directory that train.py wrote")
    from rcml_jax.training.workdir import load_config

    path, rest = take_option(["", *rest], "config")
    config = load_config_file(path) if path else load_config(pathlib.Path(workdir))
    if config.get("method") == "alignment":
        return _study(config, workdir, rest)
    if path:
        raise UserError(
            "eval.py takes --config for the alignment study only (configs/alignment.py); for "
            "anything else it takes the configuration of the work directory: leave --config out"
        )
    values = parse_flags(rest, load_config(pathlib.Path(workdir)), split="test")
    _check_overrides(rest)
    from rcml_jax.data.graph import SPLITS
    from rcml_jax.evaluation.table import print_evaluation
    from rcml_jax.training.loop import evaluate as evaluate_workdir

    if values.split not in SPLITS:
        raise UserError(f"--split={values.split} is unknown; choose one of {', '.join(SPLITS)}")
    print_evaluation(evaluate_workdir(values.config, workdir, values.split))
    return 0


def _study(config: ml_collections.ConfigDict, workdir: str, rest: Sequence[str]) -> int:
    values = parse_flags(rest, config)
    from rcml_jax.alignment import ARRAYS, study
    from rcml_jax.evaluation.table import print_evaluation
    from rcml_jax.report.alignment import draw

    result = study(values.config, workdir)
    if result is None:
        return 0
    print_evaluation(result)
    directory = pathlib.Path(workdir)
    try:
        with np.load(directory / ARRAYS) as arrays:
            paths = draw(result, arrays, directory / "figures")
        print("figures:", *paths)
    except UserError as error:  # what was asked for is there
        print(f"no figures: {error}", file=sys.stderr)
    return 0


def _check_overrides(args: Sequence[str]) -> None:
    """Only what does not make another model of it may be given to eval.py."""
    for arg in args:
        name = arg.lstrip("-").split("=")[0]
        allowed = ("config.evaluation.", "config.data.dir", "config.platform", "config.data.path")
        if name.startswith("config.") and not name.startswith(allowed):
            raise UserError(
                f"eval.py takes the configuration of the work directory; --{name} would evaluate "
                "another one: train it with train.py"
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
    """Call `get_config` of "file.py" or "file.py:argument". Raises UserError where it cannot."""
    config = call_config_file(path_and_argument, "get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        path = path_and_argument.partition(":")[0]
        raise UserError(f"get_config of {path} must return an ml_collections.ConfigDict")
    return config


def call_config_file(path_and_argument: str, function: str) -> Any:
    """What a function of "file.py" or "file.py:argument" returns; UserError where it fails."""
    path, _, argument = path_and_argument.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no configuration file {path}; see the folder configs")
    spec = importlib.util.spec_from_file_location("rcml_jax_config_file", path)
    module = importlib.util.module_from_spec(spec) if spec else None
    if module is None:
        raise UserError(f"{path} is no Python file; give one with a function {function}")
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"{path} has no function {function}; see the folder configs")
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

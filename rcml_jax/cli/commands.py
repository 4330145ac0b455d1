"""What `rcml-train` and `rcml-eval` do: read the command line, run, and end with a status.

Status 0 means done, or stopped by a signal with everything saved; 2 a mistake that the printed
sentence tells how to mend.
"""

import difflib
import inspect
import logging as python_logging
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from rcml_jax import remote
from rcml_jax.config import READING, load_config_file
from rcml_jax.errors import ProcessLost, UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import argument_text, user_path

#: Options that leave the model unchanged; they may be overridden at evaluation.
_OF_EVALUATION = ("evaluation.", *READING, "data.path", "platform")


def train(argv: Sequence[str] | None = None) -> int:
    """Train a method, or resume its training, and evaluate the best checkpoint.

        rcml-train --config rcml --workdir runs/rcml [--config.steps=1000 ...]
        rcml-train --config rcml:folder,path=my_catalogue --workdir runs/mine
        rcml-train --config my_recipe.py --workdir runs/other

    --config names a packaged recipe, such as rcml or m3col, or a Python file with a function
    get_config. The argument after the colon is the recipe's: the data source and its options. The
    work directory may be on object storage: gs://BUCKET/DIRECTORY or s3://BUCKET/DIRECTORY.
    --config.NAME=VALUE overrides any value of the configuration. --help prints every option with
    its default; --help --config rcml:hm the defaults of that recipe.
    """
    return guard(_train, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Evaluate the best checkpoint of a work directory again, embeddings of a file, or a study.

        rcml-eval --workdir runs/rcml [--split=validation] [--config.evaluation.similarity=all]
        rcml-eval --config alignment --workdir runs/alignment
        rcml-eval --config rcml:SOURCE --embeddings FILE.npz --workdir runs/theirs
        rcml-eval --config rcml:SOURCE --list DIRECTORY

    The second form runs the alignment study; the third scores the vectors of a file. Both make the
    work directory. The last writes the items, images and relation sentences of a source, so that
    another model can embed them. --help prints the options that may be overridden; --help --config
    alignment those of the study.
    """
    return guard(_evaluate, argv)


def guard(
    command: Callable[[Sequence[str]], int], argv: Sequence[str] | None, usage: str | None = None
) -> int:
    """Run a command and return its exit status.

    argv: the program's name and its arguments, by default `sys.argv`. usage: what `--help` prints,
    for commands that do not parse it themselves. A mistake of the user, and a file that the system
    refuses, end in one sentence on stderr and status 2. Where the reader of the output has gone
    the command ends silently.
    """
    argv = sys.argv if argv is None else argv
    # A failed write is told in a sentence; Orbax and asyncio would log its stack traces, too.
    logging.set_verbosity(logging.FATAL)
    # transformers 5 says at its import that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for quiet in ("asyncio", "gcsfs"):
        python_logging.getLogger(quiet).setLevel(python_logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII locale cannot print every title
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _quiet_about_orbax(sys.unraisablehook)
    try:
        try:
            if usage and wants_help(argv):
                print(inspect.cleandoc(usage))
                return 0
            return command(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        return 141  # as a program that SIGPIPE ends
    except UserError as error:
        print(f"error: {remote.named(str(error))}", file=sys.stderr)
        return _leave(2) if isinstance(error, ProcessLost) else 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: cannot use {error.filename!a}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; start the same command again to go on", file=sys.stderr)
        return _leave(130)


def _leave(status: int) -> int:
    """The status; where there are other processes, the end at once.

    JAX would wait for them for minutes, while they wait for this one, and abort then.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_closed(stream: Any) -> bool:
    """Whether the reader of a pipe, such as `head`, has gone; what is left then goes nowhere."""
    try:
        stream.write("\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _quiet_about_orbax(hook: Callable) -> Callable:
    """The hook without what Orbax's threads throw at an event loop that a failed read closed."""
    if getattr(hook, "quiet", False):
        return hook

    def quiet(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not sys.is_finalizing():
            hook(unraisable)

    marked: Any = quiet
    marked.quiet = True
    return marked


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line, the program's name first, asks for help."""
    return bool({"--help", "-h"} & set(argv[1:]))


def _train(argv: Sequence[str]) -> int:
    if wants_help(argv):
        return _help(train.__doc__, argv)
    config_path, rest = take_option(argv, "config")
    if config_path is None:
        raise UserError("training needs --config, for example --config rcml")
    values = parse_flags(rest, load_config_file(config_path), workdir="")
    if not values.workdir:
        raise UserError("training needs --workdir, a directory of its own for the run")
    from rcml_jax.schema import validate

    validate(values.config)  # before the slow imports: a mistake is told at once
    from rcml_jax.evaluation.display import print_evaluation
    from rcml_jax.training.loop import train_and_evaluate
    from rcml_jax.training.sharding import initialize_distributed, is_primary

    initialize_distributed()
    _check_one_process(values.workdir, values.config.data.dir)
    with remote.written(values.workdir) as place:
        result = train_and_evaluate(values.config, place.path, after_step=place.after_step)
    if result is not None and is_primary():
        print_evaluation(result)
    try:
        with remote.shared(values.config.data.dir):
            pass  # token ids, pixels and what else was stored beside the prepared data
    except UserError as error:  # only the next machine misses them
        log_line(f"token ids and pixels were not sent: {error}")
    return 0


def _check_one_process(*directories: str) -> None:
    """Raises UserError for a directory on object storage that several processes would need."""
    import jax

    for directory in directories:
        if remote.is_remote(directory) and jax.process_count() > 1:
            raise UserError(
                f"several processes need a directory that all of them see, and each would have a "
                f"mirror of its own of {directory}; mount the bucket (gcsfuse, mount-s3), or give "
                "a disk that they share"
            )


def _help(
    usage: str | None, argv: Sequence[str], only: Callable[[str], bool] = lambda _: True
) -> int:
    """Print how a command is used, and the options of its --config (rcml without one).

    only: which options are shown where there is no --config.
    """
    from rcml_jax.schema import help_text

    path, _ = take_option(argv, "config")
    print(inspect.cleandoc(usage or ""))
    print()
    print(help_text(path) if path else help_text("rcml", only))
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    if wants_help(argv):
        return _help(evaluate.__doc__, argv, lambda name: name.startswith(_OF_EVALUATION))
    workdir, rest = take_option(argv, "workdir")
    path, rest = take_option(["", *rest], "config")
    listing, rest = take_option(["", *rest], "list")
    embeddings, rest = take_option(["", *rest], "embeddings")
    if (listing or embeddings) and not path:
        raise UserError(
            f"--{'list' if listing else 'embeddings'} needs --config rcml:SOURCE, the catalogue"
        )
    if listing and path:
        return _list(load_config_file(path), listing, rest)
    if workdir is None:
        raise UserError(
            "the evaluation needs --workdir, the work directory of a run, or a new one with "
            "--embeddings"
        )
    with remote.written(workdir) as place:
        return _evaluate_in(str(place.path), path, embeddings, rest)


def _evaluate_in(
    workdir: str, path: str | None, embeddings: str | None, rest: Sequence[str]
) -> int:
    from rcml_jax.training.workdir import load_config

    if embeddings and path:
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
    from rcml_jax.methods import family_of
    from rcml_jax.schema import validate
    from rcml_jax.search.items import write_listing
    from rcml_jax.tasks.relations import load_graph

    validate(values.config)
    if family_of(values.config.method) != "relational":
        raise UserError("--list writes the items of a relation graph; give --config rcml:SOURCE")
    graph = load_graph(values.config.data)
    write_listing(graph, directory)
    items, relations = len(graph), len(graph.relations)
    print(f"{directory}: {counted(items, 'items')}, {counted(relations, 'relations')}")
    return 0


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
        print("figures:", *(remote.named(str(path)) for path in paths))
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


def _make_room(config: ml_collections.ConfigDict, name: str) -> None:
    """Add an option whose last part is the user's to choose, such as a part's learning rate."""
    path, _, last = name.removeprefix("config.").rpartition(".")
    if "[" in last:
        return
    values = config.to_dict()
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict) and last and last not in values:
        from rcml_jax.schema import open_type

        kind = open_type(path)
        if kind is not None:
            with config.unlocked():
                config.update_from_flattened_dict({f"{path}.{last}": kind()})


def _check_name(config: ml_collections.ConfigDict, name: str) -> None:
    """Raises UserError for a name below `config.` that the configuration has not."""
    parts = name.partition("[")[0].split(".")  # config.a[0] is the first value of a tuple
    section: Any = config
    for depth, part in enumerate(parts[1:], 1):
        path = ".".join(parts[:depth])
        if not isinstance(section, ml_collections.ConfigDict):
            raise UserError(f"wrong option: {path} is a value and has no part {part!r}")
        if part not in section:
            near = {key: f"{path}.{key}" for key in section}
            meant = _meant(part, {**_names(config), **near})
            raise UserError(f"wrong option: {path} has no {part!r}{meant}")
        section = section[part]
    if isinstance(section, ml_collections.ConfigDict):
        if not section:
            raise UserError(f"wrong option: {name} is a section, which has no value")
        raise UserError(f"wrong option: {name} has parts; set one, such as --{name}.{min(section)}")


def _names(section: ml_collections.ConfigDict, path: str = "config") -> dict[str, str]:
    """The last part of each option's name → the whole name."""
    found = {}
    for key, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            found.update(_names(value, f"{path}.{key}"))
        found[key] = f"{path}.{key}"
    return found


def _meant(name: str, known: Mapping[str, str]) -> str:
    """A hint at the option that is nearest by its last part; known: last part → name."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {known[close[0]]}?" if close else "; --help lists all options"


def parse_flags(
    args: Sequence[str], config: ml_collections.ConfigDict, **options: str
) -> flags.FlagValues:
    """Parse `--config.name=value` overrides and the given string options with their defaults.

    Raises UserError for a mistyped option or a value of the wrong type.
    """
    for argument in args:
        name = argument_text(argument.partition("=")[0]).lstrip("-")
        if name.startswith("config."):
            if argument.startswith("-"):
                _make_room(config, name)
            _check_name(config, name)
        elif argument.startswith("--") and name not in options and "config." not in name:
            near = {option: f"--{option}" for option in options}
            raise UserError(f"wrong option: --{name} is unknown{_meant(name, near)}")
    values = flags.FlagValues()
    for name, default in options.items():
        flags.DEFINE_string(name, default, name, flag_values=values)
    argv = ["", *args]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        reason = textwrap.shorten(reason, 300, placeholder=" ...")
        raise UserError(f"wrong option: {reason}") from error
    if rest[1:]:
        raise UserError(f"unknown argument {rest[1]!r}; options are written --name=value")
    return values

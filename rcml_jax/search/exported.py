"""A run that `rcml-export` wrote, read back: a local directory, or a repository on the hub."""

import pathlib
import re
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from rcml_jax.config import load_config_file
from rcml_jax.data.images import EncodedImages, ImageBank
from rcml_jax.data.relation_graph import INTRA_RELATION, empty_graph
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods import RELATIONAL, method_class
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.models.checkpoints import TOKENIZER_FILES, hub_reason, pretrained_directory
from rcml_jax.models.two_towers import joint_width, load_pretrained
from rcml_jax.parsing import NO_TEXT, read_json, user_path
from rcml_jax.tasks.relations import RelationTask, cache_directory
from rcml_jax.tasks.towers import inputs

#: The head of RCML, and the key of config.json that says what a directory is an export of.
HEAD, MARK = "relation_pooling.safetensors", "rcml_jax"
_FILES = ("model.safetensors", HEAD, "preprocessor_config.json", *TOKENIZER_FILES)
_LARGEST_LOGIT = 1e6  # as of the option model.pooled_logit
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def export_mark(directory: pathlib.Path) -> dict[str, Any] | None:
    """The method and the step that a directory is an export of; None where it is no export."""
    try:
        config = read_json((directory / "config.json").read_bytes())
        mark = config[MARK]
        return mark if mark["method"] in RELATIONAL else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_export(name: pathlib.Path | str) -> pathlib.Path | None:
    """The directory of an export: a local one, or that of a repository, which is downloaded.

    None for a local directory of another kind, and what can be no repository's name.

    Raises UserError for a checkpoint that is no export, where the hub has no such repository or
    cannot be reached, and where the repository is no export.
    """
    path, text = user_path(name), str(name)
    if path.exists() or not _REPOSITORY.fullmatch(text):
        if export_mark(path) is not None:
            return path
        if (path / "model.safetensors").is_file():
            raise UserError(
                f"{path} is a checkpoint, but no export of a run by this version; write it again "
                "with rcml-export"
            )
        return None
    try:
        # config.json alone first: what is no export may be large.
        if export_mark(pretrained_directory(text, files=())) is not None:
            return pretrained_directory(text, files=_FILES)
    except UserError as error:
        reason = error.__cause__
        raise UserError(
            f"there is no directory {text}, and no repository of that name can be had "
            f"({hub_reason(reason if isinstance(reason, Exception) else error)}); give a work "
            "directory, or what rcml-export wrote or pushed"
        ) from error
    raise UserError(
        f"the repository {text} is no export of a run; give one that rcml-export pushed"
    )


def export_config(directory: pathlib.Path) -> Any:
    """The configuration of an export: the recipe's, but for what embeds.

    Raises UserError where a file is missing or damaged.
    """
    mark = export_mark(directory)
    assert mark is not None  # `find_export` has looked
    config = load_config_file("rcml")
    with config.unlocked():
        config.method = mark["method"]
        config.model.pretrained = str(directory)
        config.model.max_length = _max_length(directory)
        if mark["method"] == "rcml":
            options, names = _head(directory)[1:]
            config.model.update({name: float(options[name]) for name in ("beta", "pooled_logit")})
            config.model.gate = "gate" in names
            config.model.learn_pooled_prior = True
    return config


def load_export(directory: pathlib.Path, config: Any) -> tuple[RelationalMethod, Any]:
    """The method of an export, on no items, and its parameters.

    config: of `export_config`. Raises UserError where a file is missing or damaged.
    """
    towers_config, towers = load_pretrained(str(directory))
    params: dict[str, Any] = {"towers": towers}
    intra = INTRA_RELATION
    if config.method == "rcml":
        params["head"], options, _ = _head(directory)
        _check_head(directory, params["head"], joint_width(towers_config))
        intra = options["intra_relation"]
    taken = inputs(config.model)
    images = EncodedImages(0, lambda index: b"")
    graph = empty_graph(directory.name, images, intra)
    task = RelationTask(
        config,
        graph,
        None,  # type: ignore[arg-type]  # there is nothing to split
        Tokenizer.from_pretrained_dir(directory),
        ImageBank(images, taken.framing),
        taken.max_length,
        cache_directory(),
    )
    method: Any = method_class(config.method)
    return method(config, task), jax.tree.map(jax.numpy.asarray, params)


def _head(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The arrays of RCML's head, what is not learned, and the arrays' names.

    Raises UserError where the file is missing or damaged, or a value cannot be.
    """
    path = directory / HEAD
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            options = read_json(file.metadata()["options"])
            arrays = {name: file.get_tensor(name) for name in names}
        intra, beta, logit = (options[x] for x in ("intra_relation", "beta", "pooled_logit"))
        if not isinstance(intra, str) or not intra.strip() or NO_TEXT.search(intra):
            raise ValueError("its sentence for the item itself is no text")
        if not (0 <= float(beta) <= 1 and abs(float(logit)) <= _LARGEST_LOGIT):
            raise ValueError(f"beta={beta} or pooled_logit={logit} is out of range")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); export the run again") from error
    return arrays, options, names


def _check_head(directory: pathlib.Path, arrays: dict[str, Any], width: int) -> None:
    """Raise UserError where a head has other arrays than towers of this width need, or NaN."""
    matrices = {"query", "key", "value", "output"} | ({"gate"} & arrays.keys())
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(sorted(matrices), (width, width))
    wanted["pooled_prior"] = ()
    for name, shape in wanted.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise UserError(
                f"{directory / HEAD} has no finite {name} of the shape {shape}, which its towers "
                "need; export the run again"
            )


def _max_length(directory: pathlib.Path) -> int:
    path = directory / "tokenizer_config.json"
    try:
        return int(read_json(path.read_bytes())["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); export the run again") from error

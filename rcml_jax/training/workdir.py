"""The work directory: its configuration, and whether it is the one that is asked for."""

import contextlib
import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from rcml_jax import files, schema
from rcml_jax.config import READING, leaves
from rcml_jax.errors import UserError

_ALWAYS = ("seed", "steps", "method", "parallel", "data")
# What may change between two starts of one run: nothing here touches the figures. The last five
# change the order of sums and so their rounding, as other devices do: a run that goes on with the
# same ones goes on to the bit.
_FREE = {
    *READING,
    "log_every",
    "checkpoint_every",
    "tensorboard",
    "evaluation",
    "platform",
    "devices",
    "parallel",
    "fsdp_devices",
    "model.remat",
    "micro_batch",
    "loss.chunk_size",
    "loss.pair_chunk_size",
    "embeddings.path",
}


#: The lock of a work directory, and what a kill may leave of the making of one.
LOCK = ".lock"
_OF_THE_START = (LOCK, f"{LOCK}.json", f"{LOCK}.json.part", "config.json.part")


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The configuration that a work directory was trained with, checked by the schema.

    Options that came after it have the values that the schema gives to runs before them. Raises
    UserError where there is none, and for one that lacks an option without such a value.
    """
    config, path = _read_config(workdir), pathlib.Path(workdir) / "config.json"
    if missing := schema.complete(config):
        raise UserError(
            f"{workdir} is of an older version, without config.{missing[0]}: train anew, or write "
            f"the value that the run had into {path} (rcml-train --help explains every option)"
        )
    try:
        schema.validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} holds no config.json, so nothing was trained there; train first: "
            f"rcml-train --config rcml --workdir {workdir}"
        )
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or train anew") from error
    missing = [name for name in _ALWAYS if name not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; restore it or train anew")
    return config


def prepare(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Make a work directory of a configuration, or check that it is one already.

    One that holds neither a checkpoint nor an evaluation, because its start failed, takes the new
    configuration. Raises UserError where it was made with another configuration or is no directory
    of ours.
    """
    workdir = make(workdir)
    path = workdir / "config.json"
    if path.is_file():
        _check_same(path, config)
    else:
        write_json(path, config.to_dict())
    return workdir


def make(workdir: pathlib.Path | str) -> pathlib.Path:
    """Make a directory that holds nothing, or check that it is a work directory or empty.

    Raises UserError where it is neither, or cannot be made.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in workdir.iterdir()}
    except OSError as error:
        raise UserError(f"cannot make the work directory {workdir}: {error.strerror}") from error
    if "config.json" not in names and names - set(_OF_THE_START):
        raise UserError(
            f"{workdir} is not empty and holds no config.json; give an empty or a new --workdir"
        )
    return workdir


def hold(workdir: pathlib.Path | str) -> contextlib.AbstractContextManager[None]:
    """Keep other processes out of a work directory, which is made, while a block runs.

    Raises UserError, which names the other process, where one is training or evaluating there.
    """
    workdir = make(workdir)
    return files.exclusive(
        workdir / LOCK,
        f"is training or evaluating in {workdir}",
        remedy="wait until it ends, or give another --workdir",
    )


def _check_same(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    there = _read_config(path.parent)
    schema.complete(there)
    old = leaves(there.to_dict())
    new = leaves(json.loads(json.dumps(config.to_dict())))
    changed = [
        f"{name} ({old.get(name, 'unset')!r} there, {new.get(name, 'unset')!r} here)"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...) and not _free(name, new)
    ]
    if not changed:
        return
    trained = _has_checkpoint(path.parent)
    if not trained and not any(path.parent.glob("eval*.json")):
        # The tokenizer may be one of other texts or another size.
        (path.parent / "tokenizer.json").unlink(missing_ok=True)
        write_json(path, config.to_dict())
    else:
        shown = "; ".join(changed[:3]) + (" and more" if len(changed) > 3 else "")
        raise UserError(
            f"{path.parent} was {'trained' if trained else 'evaluated'} with another "
            f"configuration: {shown}; "
            "give another --workdir, or the old values"
        )


def _has_checkpoint(workdir: pathlib.Path) -> bool:
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def _free(name: str, config: dict[str, Any]) -> bool:
    """Whether an option may change in a run of a configuration, given as dotted names → values."""
    if name == "micro_batch" and config.get("accumulation", "exact") != "exact":
        return False  # Then it is the batch that is contrasted.
    return name in _FREE or name.split(".")[0] in _FREE


def write_arrays(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Write an `.npz` file whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_whole(path, buffer.getbuffer())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write the JSON of a value, as of `json_value`, whole or not at all."""
    text = json.dumps(json_value(value), indent=2, allow_nan=False)
    files.write_whole(path, text + "\n")


def json_value(value: Any) -> Any:
    """A value in JSON's types: arrays and their scalars become lists and numbers.

    NaN and infinities, which JSON lacks, become None: a measure that has no value.
    """
    if isinstance(value, Mapping):
        return {name: json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

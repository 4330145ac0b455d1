"""Checkpoints on disk or on the hub: read without torch, and what is wrong with them said."""

import functools
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from rcml_jax.errors import UserError


def pretrained_directory(name: str, *, kind: str = "CLIP") -> pathlib.Path:
    """The directory with the tokenizer of a checkpoint: its own, or a copy from the hub.

    `kind` is what an error calls the checkpoint.
    """
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = ["tokenizer*.json", "vocab.json", "merges.txt"]
        return pathlib.Path(snapshot_download(name, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise unreachable(name, error, kind) from error


def read(model_class: type, name: str, kind: str, **options) -> tuple:
    """Configuration and float32 NumPy parameters of one of Hugging Face's Flax classes.

    Raises UserError where the checkpoint cannot be read, or lacks a part of the model.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model = _empty(model_class).from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise unreachable(name, error, kind) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
    missing = [".".join(path) for path, x in flatten_dict(params).items() if np.isnan(x).any()]
    if missing:
        raise UserError(
            f"the {kind} checkpoint {name!r} lacks {len(missing)} arrays that its configuration "
            f"asks for, {missing[0]} among them; save the whole model again"
        )
    return model.config, params


def _empty(model_class: type) -> type:
    """A class whose parameters begin as NaN; itself, it fills what a file lacks with noise."""

    class Empty(model_class):
        def init_weights(self, rng, input_shape, params=None):
            init = functools.partial(model_class.init_weights, self, input_shape=input_shape)
            nan = np.float32(np.nan)
            return jax.tree.map(lambda x: np.broadcast_to(nan, x.shape), jax.eval_shape(init, rng))

    return Empty


def unreachable(name: str, error: Exception, kind: str) -> UserError:
    """The error for a checkpoint that cannot be found, fetched or read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot load a {kind} checkpoint from {name!r} ({reason}); give a directory written by "
        "save_pretrained, or a name on the Hugging Face hub that this machine can reach"
    )


def check_directory(directory: pathlib.Path, kind: str) -> None:
    """Say what is missing before transformers says it in a page of its own."""
    if not directory.exists():  # then it is a name on the hub
        return
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is no {kind} checkpoint")
    names = {path.name for path in directory.iterdir()}
    if names & {"model.safetensors", "flax_model.msgpack"}:
        return
    if "model.safetensors.index.json" in names:
        raise UserError(
            f"{directory} holds sharded safetensors, which the Flax classes cannot read; "
            "save it again with max_shard_size='100GB'"
        )
    if "pytorch_model.bin" in names:
        raise UserError(
            f"{directory} holds pickled weights only (pytorch_model.bin), which are never "
            "unpickled here; save it again with safe_serialization=True"
        )
    raise UserError(f"{directory} holds no model.safetensors and no flax_model.msgpack")

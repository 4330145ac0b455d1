"""Methods and batches of a configuration's sizes, with random weights and no data set."""

import contextlib
import pathlib
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from transformers import BertConfig, CLIPConfig, RobertaConfig, ViTConfig

from benchmarks import inputs
from configs import m3col as m3col_config
from configs import rcml as rcml_config
from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.sampling import BatchSizes
from rcml_jax.errors import UserError
from rcml_jax.methods import RELATIONAL
from rcml_jax.methods.base import Params
from rcml_jax.methods.baselines import BaselineMethod
from rcml_jax.methods.classification import ClassificationTask
from rcml_jax.methods.m3col import M3CoLMethod
from rcml_jax.methods.rcml import RCMLMethod
from rcml_jax.methods.relational import RelationalMethod
from rcml_jax.models.backbones import encoder_config
from rcml_jax.models.towers.bert import max_text_length
from rcml_jax.models.towers.clip import end_token
from rcml_jax.models.two_towers import pretrained_config
from rcml_jax.tasks.towers import inputs as tower_inputs

# Checkpoints of configs/ whose sizes are known, so that they need not be fetched.
_SIZES = {
    "openai/clip-vit-base-patch32": CLIPConfig,
    "google/vit-base-patch16-224-in21k": ViTConfig,
    "google/vit-base-patch32-224-in21k": lambda: ViTConfig(patch_size=32),
    "bert-base-uncased": BertConfig,
    "roberta-base": lambda: RobertaConfig(max_position_embeddings=514, type_vocab_size=1),
}
_CHECKPOINTS = ("pretrained", "text_pretrained", "image_pretrained")
_MODEL_SIZES = (
    *_CHECKPOINTS,
    "width",
    "layers",
    "heads",
    "embed_dim",
    "image_size",
    "patch_size",
    "vocab_size",
    "max_length",
    "classifier_layers",
    "hidden",
)
#: Classes of the data that M3CoL's configurations name.
_CLASSES = {"openmoji": 9, "n24news": 24, "food101": 101}
_TEXT_LENGTH = 32
_SPREAD = 0.02  # of random weights, as Hugging Face starts CLIP's
_STEPS = 1000  # of a schedule that counts epochs of a data set


def is_classifier(config: Any) -> bool:
    """Whether a configuration is M3CoL's. Raises UserError for one that trains nothing here."""
    if config.get("method") not in (*RELATIONAL, "m3col"):
        raise UserError(
            f"config.method={config.get('method')!r} cannot be measured; give a configuration "
            "like configs/rcml.py or configs/m3col.py"
        )
    return config.method == "m3col"


def shrink(config: Any) -> None:
    """Give a configuration the small towers of its kind and a batch for a processor, in place."""
    classifies = is_classifier(config)
    small = (m3col_config if classifies else rcml_config).get_config()
    for name in _MODEL_SIZES:
        if name in config.model:
            config.model[name] = small.model[name]
    config.batch.size = 64
    config.micro_batch = 0
    if not classifies:
        config.batch.relations = 4
        config.batch.pairs_per_relation = 8
        config.batch.intra_pairs = 16


def check_batch(config: Any, devices: int) -> None:
    """Raise UserError where a batch cannot be made or split over so many devices."""
    batch = config.batch
    if batch.size < 1:
        raise UserError("config.batch.size=0 takes a whole data set, and there is none; set it")
    if not is_classifier(config):
        sizes = batch.relations, batch.pairs_per_relation, batch.intra_pairs, batch.size
        BatchSizes(*sizes).check(batch.size)
    if batch.size % devices or batch.size < 2 * devices:
        raise UserError(
            f"a batch of {batch.size} examples ({config.method}) cannot be split over {devices} "
            "devices, two a device at least; make config.batch.size a multiple of their number, "
            "or lower --devices"
        )


def part_of(config: Any, share: int, shares: int) -> Any:
    """The configuration with `share` of `shares` equal parts of its batch.

    Items, pairs and the examples embedded at a time are cut; the relations stay.
    """
    part = config.copy_and_resolve_references()
    names = ("size", "pairs_per_relation", "intra_pairs")
    for values, name in [(part.batch, name) for name in names] + [(part, "micro_batch")]:
        if values.get(name, 0):
            values[name] = max(1, values[name] * share // shares)
    return part


def relational(name: str, config: Any) -> RelationalMethod:
    """RCML ("rcml") or a baseline as `train.py` builds it, on a task without data."""
    config = config.copy_and_resolve_references()
    config.method = name
    with _sizes_alone(config.model):
        longest = tower_inputs(config.model).max_length
        task: Any = types.SimpleNamespace(tokenizer=_tokenizer(config.model), max_length=longest)
        return (RCMLMethod if name == "rcml" else BaselineMethod)(config, task)


def classifier(config: Any) -> M3CoLMethod:
    """M3CoL on images and texts, one model, on a task without data."""
    config = config.copy_and_resolve_references()
    if config.data.name not in _CLASSES:
        raise UserError(
            f"config.data.name={config.data.name!r} is not of images and texts; give M3CoL's "
            f"configuration of {', '.join(_CLASSES)}, or run benchmarks.m3col_seeds for tables"
        )
    if config.seeds != 1:
        raise UserError(f"config.seeds={config.seeds}: one model is measured; set it to 1")
    rows = config.batch.size
    config.steps = config.steps or _STEPS
    data = ClassificationData(
        name=config.data.name,
        modalities=(Modality("image", "image", ()), Modality("text", "text", ())),
        labels=np.zeros(rows, np.int32),
        label_names=tuple(map(str, range(_CLASSES[config.data.name]))),
        split=np.zeros(rows, np.int8),
    )
    with _sizes_alone(config.model):
        tokenizer, longest = _tokenizer(config.model), config.model.max_length
        if config.model.text_pretrained:
            sizes = encoder_config(config.model.text_pretrained, modality="text")
            longest = min(longest, max_text_length(sizes))
        return M3CoLMethod(config, ClassificationTask(config, data, tokenizer, {}, longest))


def random_params(method: RelationalMethod | M3CoLMethod) -> Params:
    """Random parameters of the method, on the host.

    Drawn by NumPy: only their shapes are asked of the model, so that nothing is compiled. The same
    in every process.
    """
    if isinstance(method, M3CoLMethod):
        batch = class_batch(method, 1, 2)
    else:
        ids, images = random_items(method, 1, 2)
        batch = {"items": {"ids": ids, "images": images}, "shared": {"relation_ids": ids}}
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)

    def draw(path: tuple, x: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias") or x.ndim == 0:
            return np.full(x.shape, name == "scale", x.dtype)
        drawn = _SPREAD * rng.standard_normal(x.shape, np.float32).astype(x.dtype)
        # As RelationPooling starts, so that what is pooled has a direction.
        return drawn + np.eye(*x.shape, dtype=x.dtype) if name in ("value", "output") else drawn

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text_length(
    method: RelationalMethod | M3CoLMethod, asked: int | None, option: str = "--text-length"
) -> int:
    """The tokens of a text, at most what the text tower takes."""
    longest = method.task.max_length
    if asked is not None and not 2 <= asked <= longest:
        raise UserError(f"{option} {asked}: the text tower takes from 2 to {longest} tokens")
    return asked or min(_TEXT_LENGTH, longest)


def relation_batch(method: RelationalMethod, text: int, sentence: int) -> dict:
    """A random batch as the data of a relational method gives it; lengths in tokens."""
    return inputs.relation_batch(_view(method), method.config.batch, text, sentence)


def random_items(method: RelationalMethod, count: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (count, text) and images (count, H, W, 3) uint8 of a relational method's items."""
    rng, view = np.random.default_rng(0), _view(method)
    return inputs.token_ids(rng, count, text, view), inputs.images(rng, count, view)


def class_batch(method: M3CoLMethod, rows: int, text: int) -> dict:
    """A random batch as the data of M3CoL gives it; text: tokens of each."""
    rng = np.random.default_rng(0)
    encoders = encoder_configs(method)
    view = _view_of(encoders["text"], encoders["image"])
    ids = inputs.token_ids(rng, rows, text, view)
    classes = method.task.data.classes
    return {
        "items": {"image": (inputs.images(rng, rows, view),), "text": (ids, np.ones_like(ids))},
        "shared": {
            "rows": np.arange(rows, dtype=np.int32),
            "valid": np.ones(rows, bool),
            "labels": rng.integers(0, classes, rows, dtype=np.int32),
        },
    }


def encoder_configs(method: M3CoLMethod) -> dict[str, Any]:
    """The configurations of M3CoL's encoders, by modality."""
    return {name: encoder.config for name, encoder in method.model.encoders.items()}


def _view(method: RelationalMethod) -> Any:
    towers = method.towers_config
    return _view_of(towers.text_config, towers.vision_config)


def _view_of(text: Any, vision: Any) -> Any:
    """What random inputs need to know; the last id ends a text where the tower names no other."""
    end = text.eos_token_id or 0
    end = end if end > 2 else text.vocab_size - 1
    return types.SimpleNamespace(
        text_config=types.SimpleNamespace(vocab_size=text.vocab_size, eos_token_id=end),
        vision_config=vision,
    )


def _tokenizer(model: Any) -> Any:
    """What a model asks of its tokenizer: that of the text tower, or of one fitted in full."""
    vocab_size, pad_id = model.vocab_size, 0
    if model.get("pretrained") and not model.text_pretrained:
        text = pretrained_config(model.pretrained).text_config
        return types.SimpleNamespace(
            vocab_size=text.vocab_size, end_id=end_token(text), pad_id=text.pad_token_id
        )
    if model.text_pretrained:
        sizes = encoder_config(model.text_pretrained, modality="text")
        vocab_size, pad_id = sizes.vocab_size, sizes.pad_token_id
    return types.SimpleNamespace(vocab_size=vocab_size, end_id=vocab_size - 1, pad_id=pad_id)


@contextlib.contextmanager
def _sizes_alone(model: Any) -> Iterator[None]:
    """Inside, checkpoints of known sizes are directories that say them; after it none is named.

    So a method gets the sizes of its checkpoints, and random weights.
    """
    named = [field for field in _CHECKPOINTS if model.get(field)]
    with tempfile.TemporaryDirectory() as root:
        for field in named:
            if model[field] in _SIZES:
                directory = pathlib.Path(root, field)
                _SIZES[model[field]]().save_pretrained(directory)
                model[field] = str(directory)
        yield
    for field in named:
        model[field] = ""

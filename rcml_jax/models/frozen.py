"""Frozen towers of any checkpoint, for studies of embeddings: a vector for each input."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.data.images import Framing
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models import LAYERS, POOLINGS
from rcml_jax.models.backbones import build_backbone, load_encoder
from rcml_jax.models.checkpoints import checkpoint_location, pretrained_directory, read_config
from rcml_jax.models.preprocessing import (
    check_tokenizer,
    read_image_preprocessing,
    read_pooling,
    set_statistics,
)
from rcml_jax.models.towers.bert import max_text_length
from rcml_jax.models.towers.clip import end_token
from rcml_jax.models.towers.efficientnet import NAME as EFFICIENTNET
from rcml_jax.models.towers.resnet import ResNet, load_resnet
from rcml_jax.models.two_towers import TwoTowers, joint_width, load_pretrained, set_special_tokens

_JOINT = ("clip", "siglip")
_TYPES = {
    "image": (*_JOINT, "vit", "resnet", EFFICIENTNET),
    "text": (*_JOINT, "bert", "roberta"),
}
_KIND = "CLIP, SigLIP, ViT, ResNet, BERT or RoBERTa"
_RESNET_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Tower:
    """One side of a pair of encoders, frozen.

    modality: "image" or "text"; kind: the type of its model; width: of its embeddings; size: the
    side of its square images in pixels, or the most tokens of a text; directory: of a text tower,
    where its tokenizer is; framing: of an image tower, how an image becomes its
    input. embed: images (n, size, size, 3) uint8, or ids and mask (n, T), to
    (n, width) float32; jitted, not normalised.
    """

    modality: str
    kind: str
    width: int
    size: int
    embed: Callable[..., jax.Array]
    directory: pathlib.Path | None = None
    framing: Framing | None = None


def load_towers(
    name: str, *, layer: str = "projected", pooling: str = "auto"
) -> tuple[Tower, Tower]:
    """The image and the text tower that a name asks for.

    name: a CLIP or SigLIP checkpoint, whose two towers were trained together, or "IMAGE+TEXT", two
    that were trained apart: CLIP, SigLIP, ViT or ResNet, and CLIP, SigLIP, BERT or RoBERTa; each a
    directory, a name on the hub, "minilm" or (image) "efficientnet-lite0". layer: of CLIP, the
    joint space or what is projected to it ("penultimate"); of SigLIP, which projects nothing,
    always the joint space. pooling: of the others' tokens, the first one or the mean; "auto": the
    mean where the checkpoint says so, as those of sentence-transformers do. A convolutional network
    has its own, the mean of all positions.
    Raises UserError for an option that is unknown and a checkpoint that cannot be read.
    """
    for option, value, known in (("layer", layer, LAYERS), ("pooling", pooling, POOLINGS)):
        if value not in known:
            raise UserError(f"{option}={value!r} is unknown; choose one of {', '.join(known)}")
    towers = []
    for modality, (kind, side) in tower_types(name).items():
        if kind in _JOINT:
            towers.append(_joint(side, modality, layer))
        elif kind == "resnet":
            towers.append(_resnet(side))
        elif kind == EFFICIENTNET:
            towers.append(_efficientnet())
        else:
            towers.append(_transformer(side, modality, kind, pooling))
    return towers[0], towers[1]


def tower_types(name: str) -> dict[str, tuple[str, str]]:
    """By modality the model type and the directory or hub name that `load_towers` would load.

    Reads no weights. Raises UserError for a checkpoint that is missing or of the wrong modality.
    """
    image, plus, text = name.partition("+")
    if not image or (plus and not text):
        raise UserError(f"the towers {name!r} lack a side; give CLIP, or IMAGE+TEXT")
    return {"image": _type(image, "image"), "text": _type(text or image, "text")}


def _type(name: str, modality: str) -> tuple[str, str]:
    """The model type of a checkpoint, and its directory or name."""
    name = checkpoint_location(name)
    if name == EFFICIENTNET and modality == "image":
        return name, name
    kind = read_config(name, _KIND, {x for types in _TYPES.values() for x in types}).model_type
    if kind not in _TYPES[modality]:
        # One name was given for both sides, or the sides are the wrong way round.
        raise UserError(
            f"{name!r} is a checkpoint of the type {kind!r}, which is no {modality} tower; give "
            f"one CLIP, or IMAGE+TEXT, with {' or '.join(_TYPES[modality])} for the {modality} side"
        )
    return kind, name


def _joint(name: str, modality: str, layer: str) -> Tower:
    """One side of CLIP or SigLIP."""
    config, params = load_pretrained(name)
    own = config.vision_config if modality == "image" else config.text_config
    directory = framing = None
    if modality == "text":
        directory = pretrained_directory(name, kind=_KIND)
        tokenizer = Tokenizer.from_pretrained_dir(directory)
        set_special_tokens(config, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
        end = end_token(own) if config.model_type == "clip" else None
        check_tokenizer(name, own, tokenizer, end)
    else:
        framing = _framing(name, config.model_type, own)
    model, projected = TwoTowers(config), layer == "projected"

    def embed(params, *inputs):
        found: Any = model.apply(
            {"params": params}, inputs[0], projected=projected, method=f"{modality}_states"
        )
        return found.pooled

    return Tower(
        modality,
        config.model_type,
        joint_width(config) if projected else own.hidden_size,
        own.image_size if modality == "image" else own.max_position_embeddings,
        _with(embed, jax.tree.map(jnp.asarray, params)),
        directory,
        framing,
    )


def _framing(name: str, kind: str, config: Any) -> Framing:
    """How an image becomes a tower's input; its configuration gets the mean and deviation."""
    found = read_image_preprocessing(name, kind, size=config.image_size)
    set_statistics(config, found)
    return found or Framing(config.image_size)


def _transformer(name: str, modality: str, kind: str, pooling: str) -> Tower:
    config, params = load_encoder(name, modality=modality)
    text = modality == "text"
    directory = framing = None
    if text:
        directory = pretrained_directory(name, kind=_KIND)
        check_tokenizer(name, config, Tokenizer.from_pretrained_dir(directory))
    else:
        framing = _framing(name, kind, config)
    model = build_backbone(config)
    mean = pooling == "mean" or (text and pooling == "auto" and read_pooling(name) == "mean")

    def embed(params, *inputs):
        states: Any = model.apply({"params": params}, *inputs, method="tokens")
        if not mean:
            return states[:, 0]
        mask = inputs[1] if modality == "text" else jnp.ones(states.shape[:2])
        mask = mask[..., None].astype(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    return Tower(
        modality,
        kind,
        config.hidden_size,
        max_text_length(config) if text else config.image_size,
        _with(embed, jax.tree.map(jnp.asarray, params)),
        directory,
        framing,
    )


def _resnet(name: str) -> Tower:
    config, variables = load_resnet(name)
    found = read_image_preprocessing(name, "resnet")
    set_statistics(config, found)
    framing = found or Framing(_RESNET_SIZE)
    embed = _with(ResNet(config).apply, jax.tree.map(jnp.asarray, variables))
    width = config.hidden_sizes[-1]
    return Tower("image", "resnet", width, framing.size, embed, framing=framing)


def _efficientnet() -> Tower:
    config, params = load_encoder(EFFICIENTNET, modality="image")
    model = build_backbone(config)
    embed = lambda params, pixels: model.apply({"params": params}, pixels)  # noqa: E731
    params = jax.tree.map(jnp.asarray, params)
    size = config.image_size
    return Tower(
        "image", EFFICIENTNET, config.hidden_size, size, _with(embed, params), framing=Framing(size)
    )


def _with(function: Callable, params: Any) -> Callable[..., jax.Array]:
    """The jitted function of its other arguments; the parameters are no constants of it."""
    jitted = jax.jit(function)
    return lambda *inputs: jitted(params, *inputs)

"""The two towers that a configuration names: their sizes, checkpoints and frozen parts."""

from typing import Any, NamedTuple

from rcml_jax.config import frozen_modalities
from rcml_jax.data.images import Framing
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods.base import Params
from rcml_jax.models.backbones import TowerSizes, encoder_config, load_encoder
from rcml_jax.models.preprocessing import check_tokenizer, preprocessing_of, set_statistics
from rcml_jax.models.towers.bert import max_text_length
from rcml_jax.models.towers.clip import end_token, small_clip_config
from rcml_jax.models.towers.efficientnet import NAME as EFFICIENTNET
from rcml_jax.models.two_towers import (
    PairConfig,
    TowersConfig,
    joint_width,
    load_pretrained,
    pretrained_config,
    set_special_tokens,
    takes_packed,
)

_TOWER = {"text": "text_model", "image": "vision_model"}
_PROJECTION = {"text": "text_projection", "image": "visual_projection"}


class Inputs(NamedTuple):
    """Sizes of the towers' inputs, and their tokenizer.

    tokenizer: the checkpoint whose tokenizer it is, "" for one of our own; kind: what an error
    calls that checkpoint; framing: how an image becomes the tower's input; max_length: of texts, in
    tokens.
    """

    tokenizer: str
    kind: str
    framing: Framing
    max_length: int


def inputs(model: Any) -> Inputs:
    """The inputs of the towers of `config.model`; texts are cut at its `max_length`."""
    (text, image), (_, own_image) = _given(model), _own(model)
    kind, tokenizer = "CLIP", model.pretrained
    image_size, longest = model.image_size, model.max_length
    if model.pretrained and not (text and image):
        kind = "CLIP or SigLIP"
        sizes = pretrained_config(model.pretrained)
        image_size = sizes.vision_config.image_size
        longest = sizes.text_config.max_position_embeddings
    if text:
        kind, tokenizer = "BERT or RoBERTa", text
        longest = max_text_length(encoder_config(text, modality="text"))
    if image:
        image_size = encoder_config(image, modality="image").image_size
    if own_image:
        image_size = model.image_size
    framing = preprocessing(model)["image"] or Framing(image_size)
    if framing.size != image_size:
        raise UserError(
            f"the image processor of the checkpoint makes images of {framing.size} pixels, its "
            f"tower takes {image_size}; correct preprocessor_config.json or config.json"
        )
    return Inputs(tokenizer, kind, framing, min(model.max_length, longest))


def preprocessing(model: Any) -> dict[str, Any]:
    """What the checkpoints of `config.model` ask of their inputs, as of `preprocessing_of`."""
    (text, image), (own_text, own_image) = _given(model), _own(model)
    asked = None
    if image and image != EFFICIENTNET:
        asked = image, encoder_config(image, modality="image").model_type
    elif model.pretrained and not (image or own_image):
        asked = model.pretrained, pretrained_config(model.pretrained).model_type
    return preprocessing_of(model, image=asked, text="" if own_text else text)


def towers_config(model: Any, tokenizer: Tokenizer) -> TowersConfig:
    """The configuration of the towers of `config.model`: CLIP's, or the ones named instead.

    `pretrained` names a CLIP or SigLIP checkpoint, without which CLIP's towers are small ones;
    `text_pretrained` a BERT or RoBERTa and `image_pretrained` a ViT beside the other tower;
    `text_tower` and `image_tower` a tower of another package by its import path. Raises UserError
    for what does not fit each other.
    """
    text, image = _given(model)
    own_text, own_image = _own(model)
    if model.pretrained:
        clip = pretrained_config(model.pretrained)
        if not (text or own_text):
            set_special_tokens(clip, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
            end = end_token(clip.text_config) if clip.model_type == "clip" else None
            check_tokenizer(model.pretrained, clip.text_config, tokenizer, end)
    else:
        clip = small_clip_config(
            vocab_size=tokenizer.vocab_size,
            # The rule that CLIP has for the id of this token is no concern of another tower.
            eos_token_id=0 if text or own_text else tokenizer.end_id,
            width=model.width,
            layers=model.layers,
            heads=model.heads,
            embed_dim=model.embed_dim,
            image_size=model.image_size,
            patch_size=model.patch_size,
            max_length=model.max_length,
        )
    habits = preprocessing(model)
    if not (text or image or own_text or own_image):
        set_statistics(clip.vision_config, habits["image"])
        return clip
    parts = {"text": clip.text_config, "image": clip.vision_config}
    for modality, given, own in (("text", text, own_text), ("image", image, own_image)):
        if own:
            parts[modality] = _sizes(own, modality, model, tokenizer)
        elif given:
            parts[modality] = encoder_config(given, modality=modality)
    if not own_image and image != EFFICIENTNET:
        set_statistics(parts["image"], habits["image"])
    if text:
        check_tokenizer(text, parts["text"], tokenizer)
        parts["text"].pooling = habits["pooling"] or "mean"
    return PairConfig(parts["text"], parts["image"], joint_width(clip))


def load_checkpoints(model: Any, towers: Params) -> Params:
    """Replace the towers' parameters by those of the checkpoints that `config.model` names.

    A tower other than CLIP's has no projection in its checkpoint; its projection stays random.
    """
    text, image = _given(model)
    towers = dict(towers)
    if model.pretrained:
        own = {
            name
            for modality, *replaced in zip(_TOWER, (text, image), _own(model), strict=True)
            if any(replaced)
            for name in (_TOWER[modality], _PROJECTION[modality])
        }
        found = load_pretrained(model.pretrained)[1]
        towers |= {name: found[name] for name in towers if name in found and name not in own}
    for modality, given in (("text", text), ("image", image)):
        if given:
            towers[_TOWER[modality]] = checkpoint_tower(model, modality)
    return towers


def checkpoint_tower(model: Any, modality: str) -> Params:
    """The parameters of one tower of the checkpoint that `config.model` names for it."""
    given = dict(zip(("text", "image"), _given(model), strict=True))[modality]
    if given:
        return load_encoder(given, modality=modality)[1]
    return load_pretrained(model.pretrained)[1][_TOWER[modality]]


def frozen_parts(config: TowersConfig, freeze: str) -> frozenset[str]:
    """Names under "towers" of the parameters that `config.model.freeze` keeps fixed.

    The projections of two separate towers are always trained: they have no joint space yet.
    """
    modalities = frozen_modalities(freeze)
    parts = {_TOWER[modality] for modality in modalities}
    if not isinstance(config, PairConfig):
        parts |= {_PROJECTION[modality] for modality in modalities}
    return frozenset(parts)


def check_packing(config: TowersConfig) -> None:
    """Raise UserError for a text tower that cannot take several texts in one row."""
    if not takes_packed(config):
        raise UserError(
            "config.batch.texts_per_row above 1 is for CLIP's text tower, not for BERT or RoBERTa; "
            "set it to 1"
        )


def _given(model: Any) -> tuple[str, str]:
    """The checkpoints of the text and the image tower that replace CLIP's, "" for none."""
    return model.text_pretrained, model.image_pretrained


def _own(model: Any) -> tuple[str, str]:
    """Import paths of the text and the image tower of other packages, "" for none."""
    return model.text_tower, model.image_tower


def _sizes(path: str, modality: str, model: Any, tokenizer: Tokenizer) -> TowerSizes:
    return TowerSizes(
        model_type=path,
        modality=modality,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        image_size=model.image_size,
        patch_size=model.patch_size,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=model.max_length,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.end_id,
    )

"""The two towers that a configuration names: their sizes, checkpoints and frozen parts."""

from typing import Any, NamedTuple

from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods.base import Params
from rcml_jax.models.backbones import TowerSizes, encoder_config, load_encoder
from rcml_jax.models.bert import max_text_length
from rcml_jax.models.checkpoints import resolve
from rcml_jax.models.clip import end_token, small_clip_config
from rcml_jax.models.transformer import check_remat
from rcml_jax.models.two_towers import (
    PairConfig,
    TowersConfig,
    joint_width,
    load_pretrained,
    pretrained_config,
    set_special_tokens,
    takes_packed,
)
from rcml_jax.registry import is_path

_TOWER = {"text": "text_model", "image": "vision_model"}
_PROJECTION = {"text": "text_projection", "image": "visual_projection"}
_FROZEN = {"": (), "text": ("text",), "image": ("image",), "both": ("text", "image")}


class Inputs(NamedTuple):
    """Sizes of the towers' inputs, and their tokenizer.

    tokenizer: the checkpoint to take the tokenizer from, "" to train one; kind: the name of that
    checkpoint's kind in errors; image_size: in pixels; max_length: of texts, in tokens.
    """

    tokenizer: str
    kind: str
    image_size: int
    max_length: int


class Came(NamedTuple):
    """Which towers are from a checkpoint, and whether both are from one, with a joint space."""

    text: bool
    image: bool
    joint: bool


def from_checkpoint(model: Any) -> Came:
    """The towers of `config.model` that start from a checkpoint."""
    text, image = _given(model)
    own_text, own_image = _own(model)
    joint = bool(model.pretrained) and not (text or image or own_text or own_image)
    return Came(
        text=bool(text or (model.pretrained and not own_text)),
        image=bool(image or (model.pretrained and not own_image)),
        joint=joint,
    )


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
    return Inputs(tokenizer, kind, image_size, min(model.max_length, longest))


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
            _check_vocabulary(model.pretrained, clip.text_config, tokenizer)
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
    if not (text or image or own_text or own_image):
        return clip
    parts = {"text": clip.text_config, "image": clip.vision_config}
    for modality, given, own in (("text", text, own_text), ("image", image, own_image)):
        if own:
            parts[modality] = _sizes(own, modality, model, tokenizer)
        elif given:
            parts[modality] = encoder_config(given, modality=modality)
    pair = PairConfig(parts["text"], parts["image"], joint_width(clip))
    if text:
        _check_tokenizer(text, pair.text_config, tokenizer)
    return pair


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


def frozen_modalities(freeze: str) -> tuple[str, ...]:
    """The modalities of `config.model.freeze`, text, image or both. Raises UserError for others."""
    if freeze not in _FROZEN:
        raise UserError(f"config.model.freeze={freeze!r} is unknown; choose text, image or both")
    return _FROZEN[freeze]


def stored_modalities(model: Any) -> tuple[str, ...]:
    """Modalities whose token states are stored: frozen towers, with `config.model.store_frozen`."""
    # The configurations of older runs have not this name.
    if not model.get("store_frozen", False):
        return ()
    came = from_checkpoint(model)
    return tuple(name for name in frozen_modalities(model.freeze) if getattr(came, name))


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


def remat(model: Any) -> str:
    """The value of `config.model.remat`. Raises UserError for an unknown one."""
    # The configurations of older runs have not this name.
    return check_remat(model.get("remat", ""))


def _given(model: Any) -> tuple[str, str]:
    """The checkpoints of the text and the image tower that replace CLIP's, "" for none."""
    # The configurations of older runs have not these names.
    names = (model.get(f"{modality}_pretrained", "") for modality in ("text", "image"))
    text, image = (resolve(name) for name in names)
    return text, image


def _own(model: Any) -> tuple[str, str]:
    """Import paths of the text and the image tower of other packages, "" for none.

    Raises UserError for what is no path, and where a checkpoint is named for the same tower.
    """
    # The configurations of older runs have not these names.
    text, image = (model.get(f"{modality}_tower", "") for modality in ("text", "image"))
    for modality, path in (("text", text), ("image", image)):
        if path and not is_path(path):
            raise UserError(
                f"config.model.{modality}_tower={path!r} must be an import path, "
                "package.module:NAME"
            )
        if path and model.get(f"{modality}_pretrained", ""):
            raise UserError(
                f"config.model.{modality}_tower and config.model.{modality}_pretrained both name "
                f"the {modality} tower; leave one of them empty"
            )
    return text, image


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


def _check_vocabulary(name: str, config: Any, tokenizer: Tokenizer) -> None:
    # An id beyond the table would silently be another word, and another end token no end.
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {name!r} has {tokenizer.vocab_size} ids, its text tower embeds "
            f"{config.vocab_size}; save both again into one directory"
        )
    if config.model_type == "clip_text_model" and end_token(config) != tokenizer.end_id:
        raise UserError(
            f"the text tower of {name!r} ends a text at token {end_token(config)}, its tokenizer "
            f"with token {tokenizer.end_id}; give both the same end token (eos_token_id in "
            "config.json)"
        )


def _check_tokenizer(name: str, config: Any, tokenizer: Tokenizer) -> None:
    # An id beyond the table would silently be another word, and unknown padding a part of the text.
    if tokenizer.pad_id != config.pad_token_id or tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {name!r} ({tokenizer.vocab_size} ids, padding {tokenizer.pad_id}) "
            f"does not fit its model ({config.vocab_size} ids, padding {config.pad_token_id}); "
            "save both again into one directory"
        )

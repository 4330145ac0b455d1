"""M3CoL's model as the configuration describes it, small or with pretrained encoders."""

from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.config import compute_dtype
from rcml_jax.errors import UserError
from rcml_jax.methods.base import Params
from rcml_jax.methods.relational_towers import remat
from rcml_jax.methods.samples import ClassificationTask
from rcml_jax.models.backbones import encoder_config, load_encoder
from rcml_jax.models.bert import Bert, small_bert_config
from rcml_jax.models.m3col import M3CoL, TableEncoder
from rcml_jax.models.vit import ViT, small_vit_config

_PRETRAINED = {"image": "image_pretrained", "text": "text_pretrained"}


def build_model(config: Any, task: ClassificationTask) -> M3CoL:
    """An encoder for each modality of the data, and the classifiers.

    Raises UserError for sizes that do not fit: a contrastive loss needs embeddings of one width.
    """
    model, dtype = config.model, compute_dtype(config.model.dtype)
    encoders, widths = {}, {}
    for modality in task.data.modalities:
        if modality.kind == "table":
            sizes = (model.width, model.width)
            encoders[modality.name] = TableEncoder(sizes, model.dropout, dtype)
            widths[modality.name] = model.width
        else:
            sizes = _transformer(modality.kind, model, task)
            encoder = ViT if modality.kind == "image" else Bert
            encoders[modality.name] = encoder(sizes, dtype, remat(model))
            widths[modality.name] = sizes.hidden_size
    if len(set(widths.values())) > 1 and config.loss.contrastive != "none":
        raise UserError(
            f"the encoders' embeddings have different widths ({widths}), which cannot be "
            "contrasted; take encoders of one width"
        )
    several = len(encoders) > 1
    return M3CoL(
        encoders,
        classes=task.data.classes,
        hidden=(model.hidden or model.width,) * (model.classifier_layers - 1),
        # The only modality's own classifier would be the fusion classifier twice.
        unimodal=several and config.loss.unimodal_weight > 0,
        dropout=model.dropout,
        dtype=dtype,
    )


def _transformer(kind: str, model: Any, task: ClassificationTask) -> Any:
    """The sizes of an image or text encoder: a checkpoint's, or small ones."""
    name = model[_PRETRAINED[kind]]
    if name:
        return encoder_config(name, modality=kind)
    sizes = {"width": model.width, "layers": model.layers, "heads": model.heads}
    if kind == "image":
        return small_vit_config(
            **sizes,
            image_size=model.image_size,
            patch_size=model.patch_size,
            dropout=model.dropout,
        )
    return small_bert_config(
        **sizes,
        vocab_size=task.tokenizer.vocab_size,
        pad_token_id=task.tokenizer.pad_id,
        max_length=model.max_length,
        dropout=model.dropout,
    )


def load_pretrained_parts(config: Any, kinds: dict[str, str], params: Params) -> Params:
    """The parameters with those encoders replaced for which a checkpoint is named."""
    for name, kind in kinds.items():
        checkpoint = config.model[_PRETRAINED[kind]] if kind in _PRETRAINED else ""
        if checkpoint:
            _, found = load_encoder(checkpoint, modality=kind)
            params = {**params, f"encoders_{name}": jax.tree.map(jnp.asarray, found)}
    return params

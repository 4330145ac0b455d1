"""What the configurations of models trained from scratch have in common."""

from rcml_jax.errors import UserError


def transformer_sizes(width: int, layers: int, heads: int, dropout: float | None = None) -> dict:
    """Names and values as CLIP's, ViT's and BERT's configurations take them."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if dropout is not None:
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return sizes


def check_sizes(width: int, heads: int, image_size: int = 1, patch_size: int = 1) -> None:
    """Raises UserError where the sizes do not fit each other."""
    if width % heads:
        raise UserError(f"model.width={width} is not a multiple of model.heads={heads}; change one")
    if image_size % patch_size:
        raise UserError(
            f"model.image_size={image_size} is not a multiple of model.patch_size={patch_size}"
        )

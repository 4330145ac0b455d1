"""Relation-conditioned and mixup-contrastive multimodal learning in JAX and Flax."""

__version__ = "0.1.0"

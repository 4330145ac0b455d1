"""A trained run as a directory that `transformers` (PyTorch) loads: `python -m rcml_jax.export`."""

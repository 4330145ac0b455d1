"""A trained run as a directory that `transformers` (PyTorch) loads: the command `rcml-export`."""

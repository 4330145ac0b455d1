"""Train a method of rcml_jax, resume it, and evaluate it at the end.

python train.py --config configs/rcml.py --workdir runs/rcml [--config.steps=1000 ...]
"""

import sys

from rcml_jax.cli.commands import train

if __name__ == "__main__":
    sys.exit(train())

"""Evaluate the best checkpoint of a work directory again.

python eval.py --workdir runs/rcml [--config.evaluation.similarity=all] [--split=validation]
python eval.py --config configs/rcml.py --embeddings FILE.npz --workdir runs/theirs
python eval.py --config configs/rcml.py --list DIRECTORY
"""

import sys

from rcml_jax.cli.commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())

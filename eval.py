"""Evaluate the best checkpoint of a work directory again.

python eval.py --workdir runs/rcml [--config.evaluation.similarity=all] [--split=validation]
"""

import sys

from rcml_jax.commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv))

"""Write a trained run as a directory that `transformers` (PyTorch) loads as CLIP.

    python -m rcml_jax.export --workdir runs/rcml --to exported/rcml

The best checkpoint of a run of rcml, clip, siglip, unicl or declip, its tokenizer and image
processor in Hugging Face's files, RCML's head in `relation_pooling.safetensors`, and a model card,
`README.md`, with the figures and the code to use both in PyTorch. Needs neither torch nor the data
set.
"""

import pathlib
import sys
from collections.abc import Sequence

from rcml_jax.cli.commands import guard, take_option
from rcml_jax.errors import UserError
from rcml_jax.export.run import export_run


def main(argv: Sequence[str]) -> int:
    """Export the run that the command line names."""
    return guard(_export, argv)


def _export(argv: Sequence[str]) -> int:
    workdir, rest = take_option(argv, "workdir")
    target, rest = take_option(["", *rest], "to")
    if workdir is None:
        raise UserError("the export needs --workdir, the directory that train.py wrote")
    if target is None:
        raise UserError("the export needs --to, a new directory to write to")
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; the export takes --workdir and --to only")
    export_run(workdir, target)
    files = ", ".join(sorted(path.name for path in pathlib.Path(target).iterdir()))
    print(f"{target}: {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

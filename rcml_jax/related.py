"""The items of an embedded catalogue that are most related to one, under a relation sentence.

    python -m rcml_jax.related --embeddings embeddings --item ID --relation "both show a heart"
    python -m rcml_jax.related --embeddings embeddings --image cup.jpg --html page.html
    python -m rcml_jax.related --embeddings embeddings --text "a red cup" --k 20 --against image

The sentence is one that the catalogue was embedded under; left out, the items are compared as what
they are. `--against text` or `image` compares with that of the candidates alone. `--html` also
writes a page with the pictures in it. `--workdir` says where the model is if it was moved.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcml_jax.catalogue import Match, open_model, related, relation_number
from rcml_jax.commands import guard
from rcml_jax.data.embedding_store import MODALITIES, Embeddings, open_embeddings
from rcml_jax.data.images import DECODE_ERRORS
from rcml_jax.embed import Parser, model_config
from rcml_jax.errors import UserError
from rcml_jax.methods.task import load_graph
from rcml_jax.related_page import Card, page

_SHOWN = 200


def main(argv: Sequence[str]) -> int:
    """Find and print what the command line asks for."""
    return guard(_related, argv)


def _related(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="rcml_jax.related", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--embeddings", required=True, type=pathlib.Path)
    parser.add_argument("--workdir", type=pathlib.Path)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--item")
    query.add_argument("--image", type=pathlib.Path)
    query.add_argument("--text")
    parser.add_argument("--relation")
    parser.add_argument("--k", default=10, type=int)
    parser.add_argument("--against", default="both", choices=("both", *MODALITIES))
    parser.add_argument("--html", type=pathlib.Path)
    args, overrides = parser.parse_known_args(argv[1:])
    embeddings = open_embeddings(args.embeddings)
    relation = embeddings.relations[relation_number(embeddings, args.relation)]
    workdir = args.workdir or pathlib.Path(embeddings.model["workdir"])
    # An item needs no model, but a mistyped option must not pass.
    config = model_config(workdir, overrides) if overrides or args.item is None else None
    model = open_model(workdir, config) if args.item is None else None
    found = related(
        embeddings,
        relation,
        item=args.item,
        text=args.text,
        image=args.image,
        model=model,
        k=args.k,
        against=args.against,
    )
    _print(relation, found)
    if args.html:
        read = _reader(embeddings, workdir, overrides)
        query = _query_card(embeddings, args, read)
        cards = [Card(m.id, m.text, _bytes(read, m.index), m.score) for m in found]
        step, method = embeddings.model["step"], embeddings.model["method"]
        note = f"{len(embeddings.items):,} items, embedded by {method} after step {step}"
        _write(args.html, page(relation, query, cards, note))
    return 0


def _print(relation: str, found: Sequence[Match]) -> None:
    table = Table(title=Text(_printable(relation)), title_justify="left")
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id")
    table.add_column("text")
    for number, match in enumerate(found, 1):
        words = (Text(_printable(value)) for value in (match.id, match.text))
        table.add_row(str(number), f"{match.score:.3f}", *words)
    Console(highlight=False).print(table)


def _printable(text: str) -> str:
    """A text that cannot steer the terminal, cut where it is very long."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _reader(
    embeddings: Embeddings, workdir: pathlib.Path, overrides: Sequence[str]
) -> Callable[[int], bytes]:
    """What gives the bytes of an item's picture: its file, or the data set of the model's run."""
    if embeddings.items.root is not None:
        return embeddings.items.read
    graph = load_graph(model_config(workdir, overrides).data)
    if graph.ids != embeddings.items.ids:
        raise UserError(
            f"the data set of {workdir} has other items than {embeddings.directory}; embed anew, "
            "or leave --html out"
        )
    return graph.images.encoded


def _query_card(
    embeddings: Embeddings, args: argparse.Namespace, read: Callable[[int], bytes]
) -> Card:
    if args.item is not None:
        index = embeddings.items.ids.index(args.item)
        return Card(args.item, embeddings.items.texts[index], _bytes(read, index))
    if args.image is not None:
        return Card(text=args.image.name, picture=args.image.read_bytes())
    return Card(text=args.text)


def _bytes(read: Callable[[int], bytes], index: int) -> bytes | None:
    try:
        return read(index)
    except DECODE_ERRORS:
        return None


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))

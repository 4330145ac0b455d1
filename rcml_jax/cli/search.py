"""Search an embedded catalogue for the items most related to a query, under a relation sentence.

    rcml-search --embeddings embeddings --item ID --relation "both show a heart"
    rcml-search --embeddings embeddings --image cup.jpg --html page.html
    rcml-search --embeddings embeddings --text "a red cup" --k 20 --against image

The sentence is one that the catalogue was embedded under or, where it was embedded with --tokens,
any sentence; left out, the items are compared as what they are. `--candidates N` pools only the N
items under a new sentence that are nearest under the known one most like it, and `--recall` says
what that loses against the exact search. `--against text` or `image` compares with that of the
candidates alone. `--html` also writes a page with the images in it. `--workdir` says where the
model is if it was moved.

A table of LanceDB (`--embeddings lance://DIRECTORY`) also takes filters and words:

    rcml-search --embeddings lance://catalogue --item ID --where "price < 20 AND brand = 'X'"
    rcml-search --embeddings lance://catalogue --text "a red cup" --words "cup"
    rcml-search --embeddings lance://catalogue --words "red cup"

`--where` is a condition in SQL on the items' columns; `--words` are in an item's text, all of them;
alone they are the query. From a million items on an index gives candidates that are then ranked
exactly; `--exact` compares with every item, `--no-exact` uses the index of a smaller table.
"""

import argparse
import base64
import dataclasses
import html
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rcml_jax.cli.commands import guard
from rcml_jax.cli.embed import Parser, model_config
from rcml_jax.data.images import DECODE_ERRORS
from rcml_jax.errors import UserError
from rcml_jax.evaluation.display import make_console
from rcml_jax.files import write_whole
from rcml_jax.log import counted
from rcml_jax.parsing import argument_text, read_file, user_path
from rcml_jax.remote import is_remote, local_directory, path_or_address, pulled
from rcml_jax.search.embedding_store import MODALITIES, Store, ids_digest, open_embeddings
from rcml_jax.search.items import thumbnail
from rcml_jax.search.lance_table import is_table, open_table, table_or_path
from rcml_jax.tasks.relations import load_graph

if TYPE_CHECKING:
    from rcml_jax.search.catalogue import Match

# A page of related items: one HTML file with its images in it, and nothing from elsewhere.


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5d646d; --card: #f4f5f7;
  --line: #dfe2e6; --accent: #2557a7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8eaed; --soft: #9aa2ad;
  --card: #1f2329; --line: #333941; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem; background: var(--paper);
  color: var(--ink); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 1rem; }
.query { display: flex; gap: 1rem; align-items: center; padding: 1rem; margin-bottom: 1.5rem;
  border: 1px solid var(--line); border-left: 4px solid var(--accent); border-radius: .75rem; }
.query .frame { flex: 0 0 7rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  overflow: hidden; }
li > div:last-child { padding: .6rem .75rem .8rem; }
.frame { aspect-ratio: 1; display: grid; place-items: center; background: #fff; color: #6b7280;
  font-size: .85rem; border-radius: .5rem; overflow: hidden; }
li .frame { border-radius: 0; border-bottom: 1px solid var(--line); }
.frame img { width: 100%; height: 100%; object-fit: contain; display: block; }
p { margin: 0; }
.score, .id, footer { color: var(--soft); font-size: .85rem; }
.score { font-variant-numeric: tabular-nums; }
footer { margin-top: 1.5rem; }
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What is shown of the query or of an item that was found; image: the bytes of its file."""

    id: str = ""
    text: str = ""
    image: bytes | None = None
    score: float | None = None


def page(relation: str, query: Card, found: Sequence[Card], note: str = "") -> str:
    """The page of what was found for a query under a relation, best first; note: the last line.

    All texts are escaped. An image that cannot be decoded is shown as missing.
    """
    frame = _frame(query) if query.image is not None or query.id else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(query.text or query.id)}: related items</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(relation)}</h1>
<section class="query" aria-label="Query">{frame}<div>{words(query)}</div></section>
<main><ol aria-label="Related items, the most related first">
{listing(found)}
</ol></main>
<footer>{escape(note)}</footer>
</body>
</html>
"""


def listing(found: Sequence[Card]) -> str:
    """What was found as the rows of an HTML list."""
    return "\n".join(
        f"<li>{_frame(card)}<div><p class=score>{number} · {card.score:.3f}</p>{words(card)}"
        "</div></li>"
        for number, card in enumerate(found, 1)
    )


def words(card: Card) -> str:
    """The text and the id of a card as HTML."""
    text = f"<p>{escape(card.text)}</p>" if card.text else ""
    return text + (f"<p class=id>{escape(card.id)}</p>" if card.id else "")


def _frame(card: Card) -> str:
    small = None if card.image is None else thumbnail(card.image)
    if small is None:
        return '<div class="frame">no image</div>'
    data = base64.b64encode(small).decode()
    alt = escape(card.text or card.id or "the query")
    return f'<div class="frame"><img src="data:image/jpeg;base64,{data}" alt="{alt}"></div>'


def escape(text: str) -> str:
    """A text as HTML."""
    # Half of a surrogate pair, which JSON can hold, has no UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode())


_SHOWN = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Find and print what the command line asks for."""
    return guard(_search, argv)


def _search(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-search", description=__doc__, allow_abbrev=False)
    parser.add_argument("--embeddings", required=True, type=table_or_path)
    parser.add_argument("--workdir", type=path_or_address)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--item", type=argument_text)
    asked.add_argument("--image", type=user_path)
    asked.add_argument("--text", type=argument_text)
    parser.add_argument("--words", default="", type=argument_text)
    parser.add_argument("--where", default="", type=argument_text)
    parser.add_argument("--relation", type=argument_text)
    parser.add_argument("--k", default=10, type=int)
    parser.add_argument("--candidates", default=0, type=int)
    parser.add_argument("--recall", action="store_true")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction)
    parser.add_argument("--against", default="both", choices=("both", *MODALITIES))
    parser.add_argument("--html", type=user_path)
    args, overrides = parser.parse_known_args(argv[1:])
    if args.item is args.image is args.text is None and not args.words:
        parser.error("one of the arguments --item --image --text is required")
    search = _search_table if is_table(args.embeddings) else _search_files
    _write_page(args, overrides, *search(args, overrides))
    return 0


def _search_files(
    args: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Store, str, pathlib.Path, "list[Match]"]:
    """Search files of embeddings and print; the store, the sentence, the model's run, the items."""
    if args.where or args.words or args.exact is False:
        option = "--where" if args.where else "--words" if args.words else "--no-exact"
        raise UserError(
            f"{option} needs a table of LanceDB; embed anew with --to lance://DIRECTORY"
        )
    # Imported here: a wrong option is reported before the models' classes are loaded.
    from rcml_jax.search.catalogue import Searcher, is_new, open_model, relation_number

    embeddings = open_embeddings(pulled(args.embeddings))
    new = embeddings.tokens is not None and is_new(embeddings, args.relation)
    if args.recall and not (new and args.candidates):
        raise UserError(
            "--recall needs --candidates, token states, and a sentence that is new to the catalogue"
        )
    relation = args.relation
    if not new:
        relation = embeddings.relations[relation_number(embeddings, args.relation)]
    needs_model = args.item is None or new
    workdir = _workdir(args, embeddings, bool(overrides or needs_model))
    # An item needs no model, but a mistyped option must not pass.
    config = model_config(workdir, overrides) if overrides or needs_model else None
    searcher = Searcher(embeddings, open_model(workdir, config) if needs_model else None)
    found = searcher.search(
        relation,
        item=args.item,
        text=args.text,
        image=args.image,
        k=args.k,
        against=args.against,
        candidates=args.candidates,
    )
    _print(relation, found)
    if args.recall:
        share, asked = searcher.recall(relation, k=args.k, candidates=args.candidates)
        print(
            f"recall@{args.k} of {args.candidates:,} candidates against the exact search: "
            f"{share:.3f} ({asked} items asked)"
        )
    return embeddings, relation, workdir, found


def _search_table(
    args: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Store, str, pathlib.Path, "list[Match]"]:
    """As `_search_files`, in a table."""
    if args.candidates or args.recall:
        raise UserError("--candidates and --recall need token states, which no table keeps")
    from rcml_jax.search.catalogue import open_model, relation_number
    from rcml_jax.search.lance_search import TableSearcher

    table = open_table(args.embeddings)
    relation = table.relations[relation_number(table, args.relation)]
    needs_model = args.image is not None or args.text is not None
    workdir = _workdir(args, table, bool(overrides or needs_model))
    config = model_config(workdir, overrides) if overrides or needs_model else None
    found = TableSearcher(table, open_model(workdir, config) if needs_model else None).search(
        relation,
        item=args.item,
        text=args.text,
        image=args.image,
        k=args.k,
        against=args.against,
        where=args.where,
        words=args.words,
        exact=args.exact,
    )
    title = relation if needs_model or args.item is not None else args.words
    _print(title, found)
    return table, title, workdir, found


def _workdir(args: argparse.Namespace, store: Store, needed: bool) -> pathlib.Path:
    """The model's work directory; one on object storage is fetched where it is needed."""
    given = args.workdir or store.model["workdir"]
    if is_remote(given) and not (needed or args.html):
        return local_directory(given)
    return pulled(given)


def _write_page(
    args: argparse.Namespace,
    overrides: Sequence[str],
    store: Store,
    title: str,
    workdir: pathlib.Path,
    found: "Sequence[Match]",
) -> None:
    """The page of what was found, if one was asked for."""
    if not args.html:
        return
    read = image_reader(store, workdir, overrides)
    query = _query_card(store, args, read)
    cards = [Card(m.id, m.text, _bytes(read, m.index), m.score) for m in found]
    step, method = store.model["step"], store.model["method"]
    note = f"{counted(len(store), 'items')}, embedded by {method} after step {step}"
    write_whole(args.html, page(title, query, cards, note))


def _print(relation: str, found: "Sequence[Match]") -> None:
    table = Table(title=Text(_printable(relation)), title_justify="left")
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id")
    table.add_column("text")
    for number, match in enumerate(found, 1):
        words = (Text(_printable(value)) for value in (match.id, match.text))
        table.add_row(str(number), f"{match.score:.3f}", *words)
    make_console().print(table)


def _printable(text: str) -> str:
    """A text that cannot steer the terminal, cut where it is very long."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def image_reader(
    store: Store, workdir: pathlib.Path, overrides: Sequence[str]
) -> Callable[[int], bytes]:
    """What gives the bytes of an item's image: its file, or the data set of the model's run."""
    if store.root is not None:
        return store.image
    graph = load_graph(model_config(workdir, overrides).data)
    if ids_digest(graph.ids) != store.digest:
        raise UserError(
            f"the data set of {workdir} has other items than {store.directory}; embed anew, "
            "or leave --html out"
        )
    return graph.images.encoded


def _query_card(store: Store, args: argparse.Namespace, read: Callable[[int], bytes]) -> Card:
    if args.item is not None:
        number = store.number(args.item)
        return Card(args.item, store.text(number), _bytes(read, number))
    if args.image is not None:
        return Card(text=args.image.name, image=read_file(args.image))
    return Card(text=args.text or args.words)


def _bytes(read: Callable[[int], bytes], index: int) -> bytes | None:
    try:
        return read(index)
    except DECODE_ERRORS:
        return None


if __name__ == "__main__":
    sys.exit(main())

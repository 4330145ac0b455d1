"""Explore a catalogue in a browser: pick an item, type a relation, see what is related.

    rcml-explore --workdir runs/rcml
    rcml-explore --workdir runs/rcml --embeddings embeddings --port 8000

`--embeddings` is a directory of rcml-embed; embedded with --tokens, it answers under any sentence.
Left out, the items of the run's own data set are embedded into `WORKDIR/explorer`, with token
states and under the run's relations, which happens once. The page is served to this machine alone;
`--host 0.0.0.0` shows it to others, without any password. It loads nothing from elsewhere and tells
nobody anything. `--candidates N` pools only N items under a new sentence, for large catalogues.
Needs pip install "rcml_jax[explore]".
"""

import argparse
import base64
import importlib.util
import io
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rcml_jax.cli.commands import guard
from rcml_jax.cli.embed import Parser, model_config
from rcml_jax.cli.search import Card, escape, image_reader, listing, words
from rcml_jax.errors import UserError
from rcml_jax.log import Progress, log_line
from rcml_jax.parsing import read_file
from rcml_jax.remote import named, path_or_address, pulled
from rcml_jax.search.embedding_store import open_embeddings

if TYPE_CHECKING:
    from rcml_jax.search.catalogue import Match
    from rcml_jax.search.explorer import Attention, Explorer, View

_KINDS = {"an item": "item", "a text": "text", "an image": "image"}
_GREY = (200, 200, 200)
#: The browser itself refuses whatever would come from elsewhere.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'none'"
)
_CSS = """
.gradio-container { width: 100%; max-width: 76rem !important; margin: 0 auto; }
.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); overflow-wrap: anywhere; }
.cards li { border: 1px solid var(--border-color-primary); border-radius: .6rem;
  overflow: hidden; margin: 0; }
.cards li > div:last-child { padding: .4rem .6rem .6rem; }
.cards p, .asked p { margin: 0; }
.cards .id, .asked .id { opacity: .7; font-size: .8rem; }
.cards .score { font-variant-numeric: tabular-nums; font-size: .85rem; }
.frame { aspect-ratio: 1; display: grid; place-items: center; background: #fff; color: #6b7280; }
.frame img { width: 100%; height: 100%; object-fit: contain; display: block; margin: 0; }
.asked { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; margin: 0 0 .8rem; }
.asked img { width: 7rem; height: 7rem; object-fit: contain; background: #fff; margin: 0; }
.token { display: inline-block; margin: .1rem 0; padding: .1rem .25rem; border-radius: .25rem; }
#grid .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)) !important; }
#grid .caption-label { font-size: .65rem; padding: 0 .25rem; max-width: 100%; }
#left, #right { flex: 1 1 300px; min-width: min(300px, 100%) !important; align-self: flex-start; }
#right:not(:has(.cards)) { display: none; }
h1, h2 { overflow-wrap: anywhere; }
.problem { border-left: 4px solid #c22; padding: .6rem .9rem; }
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted."""
    return guard(_explore, argv)


def _explore(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-explore", description=__doc__, allow_abbrev=False)
    add_options(parser, port=7860)
    args, overrides = parser.parse_known_args(argv[1:])
    check_options(args)
    require_gradio()
    explorer = open_explorer(*pulled_options(args), overrides)
    serve(explorer, host=args.host, port=args.port, candidates=args.candidates)
    return 0


def add_options(parser: Parser, *, port: int) -> None:
    """Add the options of a command that serves an explorer; port: the default."""
    parser.add_argument("--workdir", required=True, type=path_or_address)
    parser.add_argument("--embeddings", type=path_or_address)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=port, type=int)
    parser.add_argument("--candidates", default=0, type=int)


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for a port or a number of candidates that cannot be."""
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port} is no port; give one from 1 to {2**16 - 1}")
    if args.candidates < 0:
        raise UserError(f"--candidates {args.candidates} must not be negative")


def pulled_options(args: argparse.Namespace) -> tuple[pathlib.Path, pathlib.Path | None]:
    """The work directory and the embeddings of the options, those on object storage fetched."""
    embeddings = None if args.embeddings is None else pulled(args.embeddings)
    return pulled(args.workdir), embeddings


def require_gradio() -> None:
    """Raise UserError where gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "the explorer needs a package that is missing; pip install 'rcml_jax[explore]'"
        )


def open_explorer(
    workdir: pathlib.Path, embeddings: pathlib.Path | None = None, overrides: Sequence[str] = ()
) -> "Explorer":
    """The explorer of a run on embeddings, by default on those of its own items, made if missing.

    Raises UserError as `open_model`, `open_embeddings` and `embed_catalogue`.
    """
    # Imported here: a wrong option is reported before the models' classes are loaded.
    from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model
    from rcml_jax.search.explorer import Explorer
    from rcml_jax.search.items import from_graph

    config = model_config(workdir, overrides)
    # Read before the model, so that a mistake in it is said at once.
    found = None if embeddings is None else open_embeddings(embeddings)
    model = open_model(workdir, config)
    if found is None:
        task = model.method.task
        items = from_graph(task.graph)
        if not len(items):
            raise UserError(f"{workdir} is an export, which has no items; give --embeddings")
        with Progress(len(items)) as progress:
            found = embed_catalogue(
                model,
                items,
                task.sentences,
                workdir / "explorer",
                dtype="float16",
                tokens="float16" if config.method == "rcml" else "",
                note=lambda done, _: progress.update(done),
            )
            assert found is not None  # of one process
    searcher = Searcher(found, model)
    if found.tokens is not None:
        _ = searcher.tokens  # what is damaged is said now
    return Explorer(searcher, image_reader(found, workdir, overrides))


def serve(
    explorer: "Explorer",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    candidates: int = 0,
    wait: bool = True,
) -> tuple[Any, str]:
    """Serve the page; returns its gradio Blocks and its address at once if not `wait`.

    port: 0 for any free one. Raises UserError where the port is taken.
    """
    import gradio

    blocks = page(explorer, candidates=candidates)
    log_line("Compiling what a new sentence needs")
    explorer.warm_up()
    try:
        app, address, _ = blocks.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            mcp_server=False,
            max_file_size="20mb",
            footer_links=[],
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_CSS,
            app_kwargs={"middleware": [_policy()]},
        )
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port}: {error}; give another --port") from error
    del app
    directory = named(str(explorer.searcher.embeddings.directory))
    log_line(f"The explorer of {directory}: {address}")
    if wait:
        threading.Event().wait()
    return blocks, address


def _policy() -> Any:
    """A middleware that adds `_POLICY` to every answer."""
    from starlette.middleware import Middleware

    class Policy:
        def __init__(self, app: Callable):
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    pairs = [*message.get("headers", [])]
                    pairs.append((b"content-security-policy", _POLICY.encode()))
                    pairs.append((b"referrer-policy", b"no-referrer"))
                    message = {**message, "headers": pairs}
                await send(message)

            await self._app(scope, receive, sent)

    return Middleware(Policy)


# The page


def page(explorer: "Explorer", *, candidates: int = 0) -> Any:
    """The gradio Blocks of an explorer."""
    import gradio as gr

    from rcml_jax.search.explorer import MOST_BYTES, View, labels

    first = explorer.items()
    known = ["", *explorer.relations]
    hint = "any sentence" if explorer.any_sentence else "one of the known sentences"

    def asked(kind: str, item: str, text: str, file: str | None, *rest: Any) -> View:
        first, second, k, against = rest
        kind, image = _KINDS[kind], None
        if kind == "image" and file:
            image = _upload(file, MOST_BYTES)
        return View(
            item=item.strip() if kind == "item" else "",
            text=text if kind == "text" else "",
            image=image,
            relation=first.strip(),
            other=second.strip(),
            k=int(k),
            against=against,
            candidates=candidates,
        )

    def answer(*values: Any) -> tuple:
        nothing = gr.update(choices=[], value=None)
        try:
            view = asked(*values)
            found = explorer.search(view)
            left = _column(explorer, view, found)
            right = ""
            if view.other:
                other = explorer.search(view, other=True)
                right = _column(explorer, view, other, second=True)
            choices = [(name, m.index) for name, m in zip(labels(found), found, strict=True)]
            chosen = gr.update(choices=choices, value=found[0].index)
            link = view.link()
            said = "An uploaded image is in no link."
            if link:
                said = f'<a id="view-link" href="{escape(link)}">Link to this view</a>'
            return left, right, said, chosen, _common(explorer, view, found[0].index)
        except UserError as error:
            return _problem(error), "", "", nothing, ""

    def common(chosen: int | None, *values: Any) -> str:
        if chosen is None:
            return ""
        try:
            return _common(explorer, asked(*values), chosen)
        except UserError as error:
            return _problem(error)

    def shown(words: str) -> tuple[Any, list[int]]:
        found = explorer.items(words)
        return _grid(explorer, found), found

    def picked(indices: list[int], event: gr.SelectData) -> tuple[str, str]:
        return "an item", explorer.searcher.embeddings.items.ids[indices[event.index]]

    def opened(request: gr.Request) -> tuple:
        """The inputs and results of the view that the address names."""
        values = dict(request.query_params)
        # Without a view nothing changes: somebody may have picked an item meanwhile.
        same: list[Any] = [gr.update() for _ in (*restored, *outputs)]
        if not {"item", "text"} & values.keys():
            return tuple(same)
        try:
            view = View.from_link(values)
        except UserError as error:
            same[len(restored)] = _problem(error)
            return tuple(same)
        kind = "an item" if view.item else "a text"
        inputs = (view.relation, view.other, view.k, view.against)
        found = answer(kind, view.item, view.text, None, *inputs)
        return (kind, view.item, view.text, *inputs, *found)

    with gr.Blocks(title="Related items", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# {len(explorer.searcher.embeddings.items):,} items, related in plain words")
        indices = gr.State(first)
        with gr.Row():
            with gr.Column(min_width=300):
                words_box = gr.Textbox(label="Items with the words", elem_id="filter")
                gallery = gr.Gallery(
                    _grid(explorer, first),
                    label="Pick an item",
                    height=320,
                    allow_preview=False,
                    interactive=False,
                    elem_id="grid",
                )
            with gr.Column(min_width=300):
                kind = gr.Radio(list(_KINDS), value="an item", label="Ask with", elem_id="kind")
                item = gr.Textbox(label="Item", elem_id="item")
                text = gr.Textbox(label="Text", elem_id="text")
                file = gr.File(
                    label="Image", file_types=["image"], type="filepath", elem_id="file", height=120
                )
        boxes = []
        with gr.Row():
            for name, label in (("relation", "Relation"), ("other", "Compare with")):
                with gr.Column(min_width=300):
                    box = gr.Textbox(label=f"{label}: {hint}", elem_id=name)
                    menu = gr.Dropdown(known, value="", label="Known", elem_id=f"{name}-known")
                    boxes.append((box, menu))
        with gr.Row():
            k = gr.Slider(1, 48, value=12, step=1, label="Results", elem_id="k")
            against = gr.Radio(
                ["both", "text", "image"], value="both", label="Compare the items'", elem_id="side"
            )
            button = gr.Button("Search", variant="primary", elem_id="search")
        link = gr.HTML(elem_id="link")
        with gr.Row():
            left, right = gr.HTML(elem_id="left"), gr.HTML(elem_id="right")
        chosen = gr.Dropdown([], label="What it has in common with the query", elem_id="chosen")
        together = gr.HTML(elem_id="common")

        relation, other = (box for box, _ in boxes)
        inputs = [kind, item, text, file, relation, other, k, against]
        outputs = [left, right, link, chosen, together]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        search: dict[str, Any] = {"fn": answer, "inputs": inputs, "outputs": outputs, **private}
        words_box.submit(shown, words_box, [gallery, indices], **private)
        gallery.select(picked, indices, [kind, item], **private).then(**search)
        text.submit(lambda: "a text", None, kind, **private).then(**search)
        file.upload(lambda: "an image", None, kind, **private).then(**search)
        item.submit(lambda: "an item", None, kind, **private).then(**search)
        for box, menu in boxes:
            menu.input(lambda sentence: sentence, menu, box, **private).then(**search)
            box.submit(**search)
        button.click(**search)
        chosen.input(common, [chosen, *inputs], together, **private)
        restored = [kind, item, text, relation, other, k, against]
        blocks.load(opened, None, restored + outputs, **private)
    return blocks


def _upload(file: str, most: int) -> bytes:
    """The bytes of an uploaded file, of which gradio decodes nothing."""
    try:
        return read_file(file, most)
    except OSError as error:
        raise UserError(f"the image cannot be read ({error}); give another one") from error


def _grid(explorer: "Explorer", indices: Sequence[int]) -> list:
    """(image, caption) of items; grey where one has no image."""
    from PIL import Image

    items = explorer.searcher.embeddings.items
    cells = []
    for index in indices:
        small = explorer.thumbnail(index)
        if small is None:
            image = Image.new("RGB", (64, 64), _GREY)
        else:
            image = Image.open(io.BytesIO(small))
            image.thumbnail((128, 128))
        cells.append((image, items.texts[index][:60] or items.ids[index][:60]))
    return cells


def _column(
    explorer: "Explorer", view: "View", found: "Sequence[Match]", *, second: bool = False
) -> str:
    """The query with its attention, and what was found under one of two sentences."""
    sentence = (view.other if second else view.relation) or "as what they are"
    looks = explorer.attention(view, other=second)
    cards = [Card(m.id, m.text, explorer.thumbnail(m.index), m.score) for m in found]
    name = "Related items, the most related first"
    return (
        f"<h2>{escape(sentence)}</h2>{_query(explorer, view, looks)}"
        f'<ol class="cards" aria-label="{name}">{listing(cards)}</ol>'
    )


def _query(explorer: "Explorer", view: "View", looks: "Attention | None") -> str:
    """The query: its image, red where the head looks, and its words, the darker the more."""
    parts = []
    if looks is not None and looks.image is not None:
        alt = "the query, red where the pooling head looks"
        parts.append(f'<img class="heat" src="{_data(looks.image, "png")}" alt="{alt}">')
    said = []
    if looks is not None and looks.words:
        most = max(weight for _, weight in looks.words) or 1.0
        tokens = (
            f'<span class="token" title="{weight:.3f}" '
            f'style="background: rgba(220, 30, 30, {0.6 * weight / most:.2f})">'
            f"{escape(word)}</span>"
            for word, weight in looks.words
        )
        said.append(f"<p>{' '.join(tokens)}</p>")
    elif view.text:
        said.append(words(Card(text=view.text)))
    if view.item:
        said.append(words(Card(id=view.item)))
    return f'<div class="asked">{"".join(parts)}<div>{"".join(said)}</div></div>'


def _common(explorer: "Explorer", view: "View", index: int) -> str:
    """The known sentences that a query and an item have most in common."""
    if not explorer.relations:
        return "<p>The catalogue was embedded under no sentence.</p>"
    rows = "".join(
        f"<tr><td>{score:.3f}</td><td>{escape(sentence)}</td></tr>"
        for sentence, score in explorer.common(view, index)
    )
    return f"<table><thead><tr><th>score</th><th>relation</th></tr></thead>{rows}</table>"


def _problem(error: UserError) -> str:
    return f'<p class="problem" role="alert">{escape(str(error))}</p>'


def _data(encoded: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


if __name__ == "__main__":
    sys.exit(main())

"""Serve a catalogue over HTTP: search and embed in JSON, for programs.

    rcml-serve --workdir runs/rcml
    rcml-serve --workdir runs/rcml --embeddings embeddings --port 8000
    curl -H 'content-type: application/json' http://127.0.0.1:8000/search \
        -d '{"text": "a red heart", "relation": "both of them are red", "k": 5}'

The options are those of rcml-explore, which shows the same to people. `POST /search` takes one of
`item`, `text` and `image` (base64), and `relation`, `k`, `against`; `POST /embed` takes `text` or
`image`, and `relation`; `GET /health` says what is served. Errors are `{"error": "one sentence"}`.
What is asked at the same time is answered in one batch. Served to this machine alone; `--host
0.0.0.0` serves others, without any password. Needs pip install "rcml_jax[explore]".
"""

import contextlib
import importlib.util
import sys
from collections.abc import Sequence

from rcml_jax.cli.commands import guard
from rcml_jax.cli.embed import Parser
from rcml_jax.cli.explore import add_options, check_options, open_explorer, pulled_options
from rcml_jax.errors import UserError
from rcml_jax.log import log_line
from rcml_jax.remote import named


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal."""
    return guard(_serve, argv)


def _serve(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-serve", description=__doc__, allow_abbrev=False)
    add_options(parser, port=8000)
    args, overrides = parser.parse_known_args(argv[1:])
    check_options(args)
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError(
            "the service needs a package that is missing; pip install 'rcml_jax[explore]'"
        )
    explorer = open_explorer(*pulled_options(args), overrides)
    from rcml_jax.search.service import create_app, make_server, warm_up

    # The port first: a taken one is told before the minute that compiling may take.
    served = make_server(
        create_app(explorer, candidates=args.candidates), host=args.host, port=args.port
    )
    log_line("Compiling what queries need")
    warm_up(explorer)
    directory = named(str(explorer.searcher.embeddings.directory))
    log_line(f"The service of {directory}: {served.address}")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has answered what was asked
        served.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

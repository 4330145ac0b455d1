"""Embed a catalogue under relation sentences with a trained work directory.

    rcml-embed --workdir runs/rcml --items my_catalogue --to embeddings \
        --relation "both of them show a heart" --relation "co-purchased by anglers"

`--items` is a folder with `items.csv` or `items.jsonl`, or such a file: columns `id`, `text`,
`image`; or Parquet files, a saved Hugging Face data set, or tar shards as img2dataset writes them;
left out, the items of the run's own data set. Beside the given relations the items are
embedded as what they are. An interrupted command goes on when it is started again. `--dtype
float16` halves the files; `--shard N` sets how many items are between two points to go on from;
`--strict` makes an image that cannot be read an error. `--tokens` also keeps the token states of
RCML's towers, in float16 or, with `--tokens int8`, in about half of that, so that `rcml-search` can
ask under any sentence. Then `rcml-search` finds related items.

`--to s3://BUCKET/DIRECTORY` or `gs://` sends the embeddings there at least every half minute or so
(extra `s3` or `gs`); `--workdir` may be there, too. `--to lance://DIRECTORY` or
`lance+s3://BUCKET/PATH` (also `lance+gs://`, `lance+az://`) writes a table of LanceDB instead
(extra `lance`), with the further columns of the items. `--index ivf-pq` or `hnsw` also indexes its
vectors, which happens by itself from a million items on.

As many devices of a process are used as the run's `config.devices` says, all by default;
`--config.devices=N` uses N of them, 0 all. Several processes, such as one on each host, divide the
items and the first one writes: they find each other by the same environment variables as those of
`rcml-train`, JAX_COORDINATOR_ADDRESS and others.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rcml_jax.cli.commands import guard, parse_flags
from rcml_jax.errors import UserError
from rcml_jax.log import Progress
from rcml_jax.parsing import argument_text, user_path
from rcml_jax.remote import Place, named, path_or_address, pulled, written
from rcml_jax.search.embedding_store import DTYPES, Embeddings
from rcml_jax.search.items import Items, from_graph, read_items
from rcml_jax.search.lance_table import INDICES, LanceTable, is_table, table_or_path

#: Types of token states, as of `token_store`, which is not imported before the options are read.
TYPES = ("float16", "int8")
#: Least seconds between two snapshots of embeddings on object storage.
_BETWEEN = 30.0
_FREE = ("config.data.dir", "config.data.path", "config.platform")


def main(argv: Sequence[str] | None = None) -> int:
    """Embed what the command line asks for."""
    return guard(_embed, argv)


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the lines of its description and raises UserError."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage."""
        raise UserError(f"{message}; see --help")


def model_config(
    workdir: pathlib.Path, overrides: Sequence[str], allowed: Sequence[str] = _FREE
) -> Any:
    """A work directory's configuration with what may be overridden: where data and devices are."""
    for argument in overrides:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name not in allowed:
            raise UserError(
                f"--{name} would make another model of {workdir}; only "
                f"{', '.join(f'--{free}' for free in allowed)} can be given"
            )
    # Imported here: a wrong option is reported before the models' classes are loaded.
    from rcml_jax.search.exported import export_config, find_export
    from rcml_jax.training.workdir import load_config

    export = find_export(workdir)
    config = load_config(workdir) if export is None else export_config(export)
    return parse_flags(overrides, config).config


def _embed(argv: Sequence[str]) -> int:
    parser = Parser(prog="rcml-embed", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=path_or_address)
    parser.add_argument("--items", type=user_path)
    parser.add_argument("--relation", action="append", default=[], type=argument_text)
    parser.add_argument("--to", required=True, type=table_or_path)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--tokens", nargs="?", const="float16", default="", choices=TYPES)
    parser.add_argument("--index", choices=("auto", "none", *INDICES))
    parser.add_argument("--shard", default=1024, type=int)
    parser.add_argument("--strict", action="store_true")
    args, overrides = parser.parse_known_args(argv[1:])
    if is_table(args.to) and args.tokens:
        raise UserError("--tokens needs a directory of files; leave lance:// out of --to")
    if not is_table(args.to) and args.index:
        raise UserError("--index needs a table; write --to lance://DIRECTORY")
    from rcml_jax.search.catalogue import embed_catalogue, open_model
    from rcml_jax.search.lance_search import embed_table
    from rcml_jax.training import sharding

    sharding.initialize_distributed()

    def read() -> tuple[pathlib.Path, Any, Items | None]:
        """The work directory, its configuration and the items, the same in all processes."""
        workdir = pulled(args.workdir)
        config = model_config(workdir, overrides, (*_FREE, "config.devices"))
        if any(x.lstrip("-").partition("=")[0] == "config.devices" for x in overrides):
            sharding.check_count(config.platform, config.devices)
        # Read before the model, so that a mistake in it is said at once.
        items = None if args.items is None else read_items(args.items, strict=args.strict)
        return workdir, config, items

    workdir, config, items = sharding.everywhere(read)
    model = open_model(workdir, config)
    if items is None:
        items = from_graph(model.method.task.graph)
    if not len(items):
        raise UserError(f"{args.workdir} is an export, which has no items; give --items")
    options: dict[str, Any] = {name: getattr(args, name) for name in ("dtype", "shard", "strict")}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(len(items)))
        if is_table(args.to):
            options["note"] = lambda done, _: progress.update(done)
            index = args.index or "auto"
            table = embed_table(model, items, args.relation, args.to, index=index, **options)
            if table is not None:
                _report_table(table)
            return 0
        # The primary process alone writes and sends; the others know no place.
        sending = stack.enter_context(contextlib.ExitStack())
        found = sharding.on_primary(lambda: sending.enter_context(written(args.to, every=_BETWEEN)))
        place = found or Place(pathlib.Path())

        def note(done: int, total: int) -> None:
            progress.update(done)
            if place.after_step is not None:
                place.after_step(done)

        options |= {"tokens": args.tokens, "note": note}
        embeddings = embed_catalogue(model, items, args.relation, place.path, **options)
        if embeddings is not None:
            _report(embeddings)
        sharding.on_primary(sending.close)
    return 0


def _report_table(table: LanceTable) -> None:
    shapes = ", ".join(
        f"{name} {(lead, len(table), d)}" for name, (lead, d) in table.shapes.items()
    )
    kinds = {found.index_type for name, found in table.indices.items() if "vector" in name}
    index = f"; index {' and '.join(sorted(kinds))}" if kinds else ""
    print(f"{table.directory}: {shapes}, {table.dtype}{index}")
    _warn(table.problems())


def _report(embeddings: Embeddings) -> None:
    shapes = ", ".join(f"{name} {x.shape}" for name, x in embeddings.vectors.items())
    dtype = next(iter(embeddings.vectors.values())).dtype
    tokens = embeddings.tokens
    kept = "" if tokens is None else f"; token states, {tokens['dtype']}"
    print(f"{named(str(embeddings.directory))}: {shapes}, {dtype}{kept}")
    _warn(embeddings.problems)


def _warn(problems: dict[str, dict[str, Any]]) -> None:
    for name, what in (
        ("unreadable", "images that cannot be read, left out"),
        ("empty", "items with neither text nor image"),
    ):
        problem = problems.get(name, {"count": 0, "first": []})
        count, ids = problem["count"], problem["first"]
        if count:
            listed = ", ".join(ids) + (", ..." if count > len(ids) else "")
            print(f"warning: {what}: {count:,} ({listed})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

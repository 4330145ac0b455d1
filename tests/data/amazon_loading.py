"""Loading a planted corpus, reading what was reported, and spoiling its files."""

import json

from rcml_jax.data.sources import amazon
from tests.data.planted_amazon import DOMAIN


def load(cache, path="", lines=None, **options):
    lines = [] if lines is None else lines
    return amazon.load(cache, DOMAIN, path=path, log=lines.append, **options)


def report(lines):
    """The one line of counts: name → number."""
    (line,) = (line for line in lines if line.startswith(f"Amazon {DOMAIN}: "))
    problems = line.partition("Left out or incomplete: ")[2].rstrip(".").split(", ")
    return {name: int(n.replace(",", "")) for n, _, name in (p.partition(" ") for p in problems)}


def change(path, edit):
    """Rewrites the records of a `.jsonl` file; `edit` changes one in place or returns a line."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        lines.append(edit(number, record) or json.dumps(record))
    path.write_text("\n".join(lines) + "\n")

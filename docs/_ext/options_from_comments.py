"""The options of a recipe as Markdown, read from its configuration and the comments in its file.

Used while `rcml_jax.schema.option_table` is missing.
"""

import io
import pathlib
import re
import tokenize

from rcml_jax.cli.commands import load_config_file, recipe_path
from rcml_jax.training.workdir import leaves

_ASSIGNED = re.compile(r"\s*config\.([\w.]+) = ")


def option_table(recipe: str) -> str:
    """The options of a recipe as Markdown, described by the comments in its file."""
    said = comments(pathlib.Path(recipe_path(recipe)).read_text())
    values = leaves(load_config_file(recipe).to_dict())
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, value in values.items():
        if name.startswith("runs."):  # configurations of other recipes
            continue
        text = said.get(name, "").replace("|", "\\|")
        rows.append(f"| `{name}` | `{value!r}` | {text} |")
    return "\n".join(rows)


def comments(source: str) -> dict[str, str]:
    """Option → the comment on its line or on the lines right above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(source.splitlines(), start=1):
        assigned = _ASSIGNED.match(line)
        if line.strip().startswith("#"):
            above.append(by_line[number])
            continue
        if assigned and assigned[1] not in found:
            found[assigned[1]] = " ".join([*above, by_line.get(number, "")]).strip()
        above = []
    return found

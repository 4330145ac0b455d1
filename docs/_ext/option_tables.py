"""The directive `option-table`: every option of a recipe, with its default and help text.

    ```{option-table} rcml
    ```

The rows are those of `rcml_jax.schema.option_table(recipe)`, Markdown. Without that module they are
the options of the recipe's configuration, with the comments beside them in its file.
"""

import io
import pathlib
import re
import tokenize
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from rcml_jax.cli.commands import load_config_file, recipe_path
from rcml_jax.training.workdir import leaves

try:
    from rcml_jax.schema import option_table
except ImportError:
    option_table = None

_ASSIGNED = re.compile(r"\s*config\.([\w.]+) = ")


def table_of_comments(recipe: str) -> str:
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


class OptionTable(Directive):
    """Insert the table of a recipe's options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown table into nodes."""
        (recipe,) = self.arguments
        markdown = (option_table or table_of_comments)(recipe)
        container = nodes.Element()
        self.state.nested_parse(markdown.splitlines(), self.content_offset, container)
        return container.children


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("option-table", OptionTable)
    return {"parallel_read_safe": True}

"""The directive `option-table`: every option of a recipe, with its default and help text.

    ```{option-table} rcml
    ```

The rows are those of `rcml_jax.schema.option_table(recipe)`, Markdown.
"""

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from rcml_jax.schema import option_table


class OptionTable(Directive):
    """Insert the table of a recipe's options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown table into nodes."""
        (recipe,) = self.arguments
        markdown = option_table(recipe)
        container = nodes.Element()
        self.state.nested_parse(markdown.splitlines(), self.content_offset, container)
        return container.children


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("option-table", OptionTable)
    return {"parallel_read_safe": True}

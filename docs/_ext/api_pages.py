"""Write a page for each public package, with its modules in alphabetical order.

The pages are made at the start of a build, in `reference/api/`, so a new module needs no line.
"""

import ast
import pathlib
from typing import Any

import rcml_jax

#: The packages that other code imports; commands and reports are described by their own pages.
PACKAGES = {
    "losses": "Losses",
    "ops": "Operations on arrays",
    "models": "Models",
    "models.towers": "Towers",
    "data": "Data",
    "data.sources": "Data sources",
    "evaluation": "Evaluation",
    "evaluation.learned_similarity": "Learned similarities",
    "tasks": "Tasks",
    "methods": "Methods",
    "training": "Training",
    "search": "Search",
}


def page(package: str, title: str) -> str:
    """The Markdown of a package's page."""
    folder = pathlib.Path(rcml_jax.__file__).parent.joinpath(*package.split("."))
    names = sorted(path.stem for path in folder.glob("*.py"))
    parts = [f"# {title}: `rcml_jax.{package}`\n"]
    init = folder / "__init__.py"
    if len(ast.parse(init.read_text()).body) > 1:  # more than its docstring
        parts.append(_automodule(f"rcml_jax.{package}"))
    else:
        parts.append((ast.get_docstring(ast.parse(init.read_text())) or "") + "\n")
    for name in names:
        if not name.startswith("_"):
            parts.append(f"## {name}\n\n" + _automodule(f"rcml_jax.{package}.{name}"))
    return "\n".join(parts)


def _automodule(name: str) -> str:
    return f"```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def write(app: Any) -> None:
    """Write the pages that changed."""
    folder = pathlib.Path(app.srcdir) / "reference" / "api"
    folder.mkdir(exist_ok=True)
    for package, title in PACKAGES.items():
        path = folder / f"{package.replace('.', '-')}.md"
        text = page(package, title)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}

"""Links from the guides to files outside `docs/` lead to the pages that include these files."""

from typing import Any

PAGES = {
    "../benchmarks/README.md": "/benchmarks.md",
    "../CONTRIBUTING.md": "/contributing.md",
    "../CHANGELOG.md": "/changelog.md",
}


def replace(app: Any, name: str, source: list[str]) -> None:
    """Change the links of a page in place."""
    del app, name
    for link, page in PAGES.items():
        source[0] = source[0].replace(f"]({link})", f"]({page})")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", replace)
    return {"parallel_read_safe": True}

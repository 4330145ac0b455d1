"""Render the docstrings of this library, plain text with single backticks, as reStructuredText.

A docstring has paragraphs; lines such as "text, image: (n, d)." that describe arguments; indented
lines that continue such a line; and code, indented as a paragraph of its own. Sections such as
"Args:" and "Raises:" are left to napoleon.
"""

import re
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Raises|References|Examples?|Yields|Note|Notes|Attributes):$")
_ENTRY = re.compile(r"(?:\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ")
_CODE = re.compile(r"`+([^`]+)`+")


def escape(text: str) -> str:
    """Plain text whose code is in backticks → the same in reStructuredText."""
    parts = re.split(r"(`+[^`]+`+)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{_CODE.fullmatch(part)[1].strip()}``\\ "
        else:
            parts[i] = re.sub(r"([\\*|]|\w_(?!\w))", _escape_one, part)
    return "".join(parts)


def _escape_one(match: re.Match) -> str:
    found = match[0]
    return found[0] + "\\_" if found.endswith("_") else "\\" + found


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines between empty ones."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line.rstrip())
        elif found[-1]:
            found.append([])
    return [part for part in found if part]


def render(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    in_section = False
    for part in paragraphs(lines):
        indented = all(line.startswith("    ") for line in part)
        if _SECTION.match(part[0]) or (in_section and part[0].startswith(" ")):
            in_section = True
            out += [part[0], *map(escape, part[1:])] if _SECTION.match(part[0]) else part
        elif indented:
            out += ["::", "", *part]
        elif part[0].lstrip().startswith(">>> "):
            out += part
        elif part[0].startswith("- "):
            in_section = False
            out += map(escape, part)
        else:
            in_section = False
            out += _entries(part)
        out.append("")
    return out


def _entries(part: list[str]) -> list[str]:
    """A paragraph; where its lines describe arguments, a list with an item for each."""
    items: list[str] = []
    listed = []
    for line in part:
        entry = bool(_ENTRY.match(line))
        if entry or not items:
            items.append(line)
            listed.append(entry)
        else:
            items[-1] += " " + line.strip()
    if not any(listed):
        return [escape(items[0])]
    out: list[str] = []
    for text, entry in zip(items, listed, strict=True):
        if entry:
            name, _, said = text.partition(": ")
            names = ", ".join(f"``{one.strip()}``" for one in name.split(","))
            out.append(f"- {names}: {escape(said)}")
        else:
            out += [escape(text), ""]
    return out


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace the lines of a docstring in place."""
    del app, what, name, obj, options
    lines[:] = render(lines)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, whose docstrings say nothing."""
    del app, what, name, skipped, options
    documented = getattr(obj, "__doc__", None) or ""
    return True if documented.startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}

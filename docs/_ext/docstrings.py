"""Render the docstrings of this library, plain text with single backticks, as reStructuredText.

A docstring has paragraphs; lines such as "text, image: (n, d)." that describe arguments; indented
lines that continue such a line; and code, indented as a paragraph of its own. Sections such as
"Args:" and "Raises:" are left to napoleon.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Collection
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Raises|References|Examples?|Yields|Note|Notes|Attributes):$")
#: "name: ", or "name, name: " or "name and name: ".
_ENTRY = re.compile(r"(\w+(?:(?:, | and )\w+)*): ")
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


def render(lines: list[str], names: Collection[str] = ()) -> list[str]:
    """The lines of a docstring as reStructuredText; names: of what it may describe."""
    out: list[str] = []
    in_section = False
    for number, part in enumerate(paragraphs(lines)):
        indented = all(line.startswith("    ") for line in part)
        if _SECTION.match(part[0]):
            in_section = True
            out += [part[0], *map(escape, part[1:])]
        elif in_section and part[0].startswith(" "):
            out += map(escape, part)
        elif indented:
            out += ["::", "", *part]
        elif part[0].lstrip().startswith(">>> "):
            out += part
        elif part[0].startswith(("- ", "1. ")):
            in_section = False
            out += map(escape, part)
        else:
            in_section = False
            out += _entries(part, names if number else ())
        out.append("")
    return out


def _entries(part: list[str], names: Collection[str]) -> list[str]:
    """A paragraph; what describes arguments becomes a list with an item for each description."""
    text = " ".join(line.strip() for line in part)
    starts = [
        match
        for match in _ENTRY.finditer(text)
        if text[: match.start()].rstrip()[-1:] in ("", ".", ";")
        and all(name in names for name in re.split(", | and ", match[1]))
    ]
    if not starts:
        return [escape(text)]
    out = [escape(text[: starts[0].start()].strip()), ""]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    after = ""
    for match, end in zip(starts, ends, strict=True):
        said = text[match.end() : end].strip().removesuffix(";")
        if end == len(text):  # what follows the last description
            said, raises, after = said.partition(" Raises ")
            after = raises + after
        described = ", ".join(f"``{name}``" for name in re.split(", | and ", match[1]))
        out.append(f"- {described}: {escape(said)}")
    return [*out, "", escape(after.strip())]


def described(obj: Any) -> set[str]:
    """The names of what a docstring may describe: parameters, and fields of a class."""
    names: set[str] = set()
    if inspect.isclass(obj):
        names |= set(getattr(obj, "__annotations__", ())) | set(getattr(obj, "_fields", ()))
        if dataclasses.is_dataclass(obj):
            names |= {field.name for field in dataclasses.fields(obj)}
    with contextlib.suppress(TypeError, ValueError):  # an object without a signature
        names |= set(inspect.signature(obj).parameters)
    return names


_of_data: dict[str, list[str]] = {}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace the lines of a docstring in place."""
    del app, options
    lines[:] = render(lines, described(obj))
    if what in ("data", "attribute"):
        _of_data[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon does to comments on data: it takes what precedes a colon for a type."""
    del app, obj, options
    if what in ("data", "attribute") and name in _of_data:
        lines[:] = _of_data.pop(name)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, whose docstrings say nothing."""
    del app, what, name, skipped, options
    documented = getattr(obj, "__doc__", None) or ""
    return True if documented.startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore, priority=600)  # after it
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}

"""The page: an HTML file beside its figures, readable without a server, on a phone, in the dark."""

import html
import pathlib
import re
from collections.abc import Sequence
from urllib.parse import quote

from rcml_jax.report.arrays import slug
from rcml_jax.report.folder import Figure, Section, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b616a; --paper: #f6f7f8;
  --card: #ffffff; --line: #d9dce0; --link: #0b5cad; --mark: #ffe9a8; --mark-ink: #3a2c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3a9b2; --paper: #15171a; --card: #1f2226; --line: #3a3f46;
    --link: #8ab8f0; --mark: #5a4708; --mark-ink: #ffeebb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .6em 0 .2em; }
h2 { font-size: 1.3rem; margin: 1.4em 0 0; border-bottom: 1px solid var(--line);
  padding-bottom: .2em; }
h3 { font-size: 1.05rem; margin: 0 0 .6em; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3em 1.2em; }
p, li, h1, h2, h3, figcaption, .left-out { overflow-wrap: anywhere; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
section { display: grid; gap: 20px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 641px), 1fr)); }
h2, figure.wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; padding: 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 75em; margin-top: .8em; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.pictures a { background: #ffffff; border-radius: 6px; padding: 6px; max-width: 100%;
  line-height: 0; }
.pictures img { max-width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .35em .7em; border-bottom: 1px solid var(--line); text-align: left;
  min-width: 4.5em; }
th:first-child { min-width: 8em; }
th { vertical-align: bottom; font-weight: 600; }
.number { text-align: right; }
td.marked { background: var(--mark); color: var(--mark-ink); font-weight: 600; }
.left-out { color: var(--soft); }
.left-out b { color: var(--ink); }
"""


def write_page(
    path: pathlib.Path, title: str, intro: Sequence[str], sections: Sequence[Section]
) -> None:
    """Write the page; links are relative to its folder. `intro` is HTML, the rest is escaped."""
    links = "".join(
        f'<li><a href="#{_anchor(section.title)}">{html.escape(section.title)}</a></li>'
        for section in sections
    )
    body = "\n".join(_section(section, path.parent) for section in sections)
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="rcml_jax.report">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{"".join(f"<p>{paragraph}</p>" for paragraph in intro)}
<nav><ul>{links}</ul></nav>
{body}
</main>
</body>
</html>
""",
        encoding="utf-8",
    )


def is_ours(path: pathlib.Path) -> bool:
    """Whether a page was written by `write_page`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return 'content="rcml_jax.report"' in file.read(2000)


def _anchor(title: str) -> str:
    return slug(title)


def _section(section: Section, root: pathlib.Path) -> str:
    figures = "\n".join(_figure(figure, root) for figure in section.figures)
    title = html.escape(section.title)
    return f'<section id="{_anchor(section.title)}">\n<h2>{title}</h2>\n{figures}\n</section>'


def _figure(figure: Figure, root: pathlib.Path) -> str:
    title = html.escape(figure.title)
    if figure.left_out:
        reason = html.escape(figure.left_out)
        return f'<figure class="wide left-out"><b>{title}</b>, left out: {reason}</figure>'
    wide = bool(figure.table) or len(figure.pictures) > 1
    parts = [f"<figure{' class=wide' * wide}>\n<h3>{title}</h3>"]
    if figure.table:
        parts.append(_table(figure.table))
    if figure.pictures:
        pictures = "".join(
            f'<a href="{_link(p.path, root)}"><img src="{_link(p.path, root)}" '
            f'alt="{html.escape(p.alt)}"></a>'
            for p in figure.pictures
        )
        parts.append(f'<div class="pictures">{pictures}</div>')
    data = ", ".join(
        f'<a href="{_link(path, root)}">{html.escape(path.name)}</a>' for path in figure.data
    )
    numbers = f" Numbers: {data}." if data else ""
    parts.append(f"<figcaption>{html.escape(figure.caption)}{numbers}</figcaption>\n</figure>")
    return "\n".join(parts)


def _link(path: pathlib.Path, root: pathlib.Path) -> str:
    return html.escape(quote(path.relative_to(root).as_posix()))


def _table(table: Table) -> str:
    # A column of numbers stands at the right, with its heading.
    numbers = [all(map(_is_number, column)) for column in zip(*table.rows, strict=True)]
    head = "".join(
        _cell("th", cell, ["number"] * number)
        for cell, number in zip(table.header, numbers, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            _cell("td", cell, ["number"] * numbers[j] + ["marked"] * ((i, j) in table.marked))
            for j, cell in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return (
        '<div class="table" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(tag: str, text: str, classes: Sequence[str]) -> str:
    said = f' class="{" ".join(classes)}"' if classes else ""
    return f"<{tag}{said}>{html.escape(text)}</{tag}>"


def _is_number(cell: str) -> bool:
    number = r"[−-]?\d[\d.,]*"
    return re.fullmatch(rf"{number}( (±|to) {number})?|–", cell) is not None

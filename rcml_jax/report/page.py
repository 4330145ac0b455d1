"""The page: an HTML file beside its figures, readable without a server, on a phone, in the dark."""

import contextlib
import csv
import dataclasses
import html
import pathlib
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.training.workdir import write_arrays

# How all figures look: sizes, colours that colour-blind readers tell apart, how they are saved.


#: Okabe and Ito's colours, those with contrast on white first; the yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "ooo")
RIGHT = "#009E73"
#: From low to high, light to dark in grey, too.
HEAT = "viridis"
#: Width in inches of a figure, and of one of several side by side: two or three fit a page.
WIDE, PANEL = 6.2, 4.2

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
    # Names of items and classes are shown as they are, dollar signs and all.
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "rcml_jax",
}


def require() -> None:
    """Raise UserError, naming the extra, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('the report needs matplotlib: pip install "rcml_jax[plots]"') from error


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A new figure of so many inches, in the report's style while it is drawn and saved."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    # Not matplotlib's own state: a file of settings in the user's home changes nothing here.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        # Names may be in any script; the font's empty box is shown instead.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Write a figure to `.svg` or `.png`, the same bytes for the same figure."""
    # A PNG has two dots for each pixel of the page.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=192, metadata=metadata)
    return path


def series(index: int) -> dict[str, Any]:
    """Colour, mark and line of the series with this number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def short(text: str, width: int) -> str:
    """A text on one line of at most so many characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def wrap(text: str, width: int, lines: int = 3) -> str:
    """A text broken into a few lines of at most so many characters; the rest is cut off."""
    text = " ".join(str(text).split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or " "


def signed(value: float) -> str:
    """A number with two decimals and a true minus."""
    return f"{value:.2f}".replace("-", "−")


def below(figure: Any, handles: list, labels: list[str], *, columns: int) -> None:
    """A legend under the axes, where it covers nothing."""
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handletextpad=0.4,
        columnspacing=1.2,
    )  # fmt: skip


# The numbers behind figures: saved as CSV or `.npz`, and read back to be drawn.


Arrays = Mapping[str, np.ndarray]


class LeftOutError(Exception):
    """A figure that cannot be drawn; the message is the reason that the page gives."""


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write columns of one length to `.csv`, or any arrays to `.npz`; returns what `load` reads.

    Raises UserError where the file cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            _write_csv(path, arrays)
        else:
            write_arrays(path, arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return load(path)


def _write_csv(path: pathlib.Path, columns: Mapping[str, np.ndarray]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a saved file; columns of a table are numbers where all cells are."""
    if path.suffix != ".csv":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return {name: _column(cells) for name, cells in zip(header, columns, strict=True)}


def _column(cells: Sequence[str]) -> np.ndarray:
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        return np.array(cells)


def slug(text: str) -> str:
    """A text as part of a file's name: lower case letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


# A report's folder, figures beside the page and numbers under `data`; and what a page holds.


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure's file and what it shows, in words."""

    path: pathlib.Path
    alt: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown; `marked` holds (row, column) of those to be seen first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()


@dataclasses.dataclass(frozen=True)
class Figure:
    """An entry of the page: pictures or a table with a caption, or the reason why there is none."""

    title: str
    caption: str = ""
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    data: tuple[pathlib.Path, ...] = ()
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with its figures."""

    title: str
    figures: tuple[Figure, ...]


class Folder:
    """Names files of a report and saves arrays there; every name is given out once."""

    def __init__(self, root: pathlib.Path, log: Callable[[str], None] = lambda line: None):
        self.root, self.log = root, log
        self._given: set[str] = set()

    def save(self, name: str, arrays: Mapping[str, Any]) -> tuple[pathlib.Path, dict]:
        """Save arrays as `data/<name>`, `.csv` or `.npz`; gives the file and what is read back."""
        path = self._path("data", name)
        return path, save(path, arrays)

    def picture(self, name: str) -> pathlib.Path:
        """Where the picture of this name is to be drawn."""
        return self._path("", name)

    def _path(self, folder: str, name: str) -> pathlib.Path:
        stem, _, suffix = name.rpartition(".")
        number = 1
        while f"{folder}/{name}" in self._given:
            number += 1
            name = f"{stem}-{number}.{suffix}"
        self._given.add(f"{folder}/{name}")
        return self.root / folder / name

    def attempt(self, title: str, make: Callable[[], Figure]) -> Figure:
        """The figure, or in its place the reason why it cannot be drawn."""
        self.log(title)
        try:
            return make()
        except (LeftOutError, UserError) as error:
            return Figure(title, left_out=str(error))


def percent(rate: float) -> str:
    """A rate as a table shows it, in percent."""
    return "–" if np.isnan(rate) else f"{100 * rate:.1f}"


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

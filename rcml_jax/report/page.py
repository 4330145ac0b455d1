"""The page of a report: style of figures, saved arrays, and the HTML file that shows them."""

import contextlib
import csv
import dataclasses
import html.parser
import json
import pathlib
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.training.workdir import write_arrays

# How all figures look: sizes, colours that colour-blind readers tell apart, how they are saved.


#: Okabe and Ito's colours, those with contrast on white first; the yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#7F7F7F")
#: Those of the classes of a plane, where ten differ by colour: small marks look alike.
CLASS_COLOURS = (*COLOURS, "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "ooo")
RIGHT = "#009E73"
#: From low to high, light to dark in grey, too.
HEAT = "viridis"
#: Width in inches of a figure, and of one of several side by side: two or three fit a page.
WIDE, PANEL = 6.2, 4.2

_RC: dict[Any, Any] = {
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
    """A new figure, width and height in inches, in the report's style inside the context."""
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
        "linestyle": LINES[(index + index // len(COLOURS)) % len(LINES)],
    }


def short(text: str, width: int) -> str:
    """Shorten a text to one line of at most `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def wrap(text: str, width: int, lines: int = 3) -> str:
    """Wrap a text to at most `lines` lines of at most `width` characters."""
    text = " ".join(str(text).split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or " "


def signed(value: float) -> str:
    """Format a number with two decimals and a minus sign (U+2212)."""
    return f"{value:.2f}".replace("-", "−")


def below(figure: Any, handles: list, labels: list[str], *, columns: int) -> None:
    """Add a legend below the axes."""
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handletextpad=0.4,
        columnspacing=1.2,
    )  # fmt: skip


# Parts of several figures.


_FEW_POINTS, _TURNS = 400, 10


def scatter(axes, points: np.ndarray, kind: np.ndarray, names: list[str]) -> None:
    """Points (n, 2) by kind on axes without ticks: a plane of t-SNE or UMAP has no units.

    Many points are smaller, and pixels inside the SVG. They are drawn in turns, so that no kind
    lies on top of all the others.
    """
    many = len(points) > _FEW_POINTS
    size, edge = (34.0, 0.5) if not many else (max(10.0, 34 * _FEW_POINTS / len(points)), 0.25)
    turns = _TURNS if many else 1
    turn = np.arange(len(points)) % turns
    for now in range(turns):
        for number in range(len(names)):
            here, marker = (kind == number) & (turn == now), MARKERS[number % 10]
            axes.scatter(
                *points[here].T, s=size * (2 if marker == "*" else 1), marker=marker,
                edgecolors="white", color=CLASS_COLOURS[number % 10], linewidths=edge,
                rasterized=many,
            )  # fmt: skip
    for number, name in enumerate(names):  # marks of the legend, as large as those of few points
        axes.scatter(
            [], [], s=70 if MARKERS[number % 10] == "*" else 34, marker=MARKERS[number % 10],
            color=CLASS_COLOURS[number % 10], edgecolors="white", linewidths=0.5,
            label=short(name, 24),
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#BBBBBB")


def box(figure, left: float, top: float, size: float):
    """Axes for a square image, placed in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))


def frame(axes, colour: str = "#BBBBBB", width: float = 1) -> None:
    """A box around an image, without ticks."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set(visible=True, color=colour, linewidth=width)


def overlay(axes, pixels: np.ndarray, heat: np.ndarray, limits: tuple[float, float]):
    """A heat map (h, w) over the grey of an image (H, W, 3); the map's own image is returned."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(axis=-1), cmap="gray", vmin=0, vmax=255)
    image = axes.imshow(
        heat, cmap=HEAT, alpha=0.65, vmin=limits[0], vmax=limits[1],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    frame(axes)
    return image


@contextlib.contextmanager
def panel(path: pathlib.Path, width: float, height: float, legend: int = 0) -> Iterator[Any]:
    """Axes of a new figure, saved to `path` in the end; legend: columns of one below, 0: none."""
    with drawing(width, height) as figure:
        axes = figure.add_subplot()
        yield axes
        if legend:
            below(figure, *axes.get_legend_handles_labels(), columns=legend)
        save_figure(figure, path)


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
    """Read the arrays of a saved file; a CSV column is numeric if all its cells are."""
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


def columns(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Transpose rows of cells into columns by name."""
    rows = list(rows)
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def labels(arrays: Arrays, column: str = "run") -> list[str]:
    """Distinct cells of a column, in order of appearance."""
    return list(dict.fromkeys(map(str, arrays[column].tolist())))


def where(arrays: Arrays, **cells: str) -> Arrays:
    """Select the rows in which the named columns have these cells."""
    parts = [arrays[name].astype(str) == cell for name, cell in cells.items()]
    here = np.all(parts, axis=0)
    return {name: column[here] for name, column in arrays.items()}


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1; 0 of one value); NaN and 0 of none."""
    if not len(values):
        return np.nan, 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def slug(text: str) -> str:
    """Make a text part of a file name: lower-case letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


# Planes of embeddings, t-SNE and UMAP, and how well kinds hold together: the silhouette.


PERPLEXITY = 30
NEIGHBOURS = 15
SEED = 0


def tsne(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by t-SNE (cosine, perplexity 30, PCA at the start, a fixed seed).

    Raises LeftOutError where all rows are the same, or not finite.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError('t-SNE needs scikit-learn: pip install "rcml_jax[plots]"') from error

    _check(vectors)
    model = TSNE(perplexity=PERPLEXITY, metric="cosine", init="pca", random_state=SEED)
    return model.fit_transform(np.ascontiguousarray(vectors))


def _check(vectors: np.ndarray) -> None:
    """Raise LeftOutError for rows that are equal or not finite; t-SNE would crash on them."""
    if not np.isfinite(vectors).all():
        raise LeftOutError("the embeddings are not finite; the training has diverged")
    if np.ptp(vectors, axis=0).max() < 1e-6:
        raise LeftOutError("all embeddings are the same; the model has collapsed")


def silhouette(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw, 1987) of rows (n, d) by cosine distance, from −1 to 1.

    NaN where there is one label only, or as many labels as rows.
    """
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise UserError(
            'the silhouette needs scikit-learn: pip install "rcml_jax[plots]"'
        ) from error
    if not 1 < len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(vectors, labels, metric="cosine"))


def umap(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, d) → (n, 2) by UMAP (cosine, 15 neighbours, minimum distance 0.1, a fixed seed).

    Raises LeftOutError where umap-learn cannot be imported, there are not more rows than
    neighbours, or all rows are the same or not finite.
    """
    if len(vectors) <= NEIGHBOURS:
        raise LeftOutError(
            f"UMAP with {NEIGHBOURS} neighbours needs more than {NEIGHBOURS} samples; there are "
            f"{len(vectors)}"
        )
    _check(vectors)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Tensorflow not installed", category=ImportWarning
        )
        try:
            from umap import UMAP
        except Exception as error:  # numba fails in ways of its own where it does not fit NumPy
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeftOutError(
                f'umap-learn cannot be imported ({reason}): pip install "rcml_jax[plots]"'
            ) from error
        # Said where the neighbours' graph falls apart and the start is drawn at random instead.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap\.")
        model = UMAP(
            n_neighbors=NEIGHBOURS, min_dist=0.1, metric="cosine", random_state=SEED, n_jobs=1
        )
        return model.fit_transform(np.ascontiguousarray(vectors, np.float32))


# A report's folder, figures beside the page and numbers under `data`; and what a page holds.


@dataclasses.dataclass(frozen=True)
class FigureImage:
    """A figure's file and what it shows, in words."""

    path: pathlib.Path
    alt: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Formatted cells; `marked` holds (row, column) of highlighted ones."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()

    @property
    def numbers(self) -> list[bool]:
        """Whether all cells of a column are numbers, for each column."""
        number = r"[−-]?\d[\d.,]*"
        form = re.compile(rf"{number}( (±|to) {number})?|–")
        columns = zip(*self.rows, strict=True)
        return [all(form.fullmatch(cell) for cell in column) for column in columns]


@dataclasses.dataclass(frozen=True)
class Figure:
    """An entry of the page: images or a table with a caption, or the reason why there is none."""

    title: str
    caption: str = ""
    images: tuple[FigureImage, ...] = ()
    table: Table | None = None
    data: tuple[pathlib.Path, ...] = ()
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A text above the sections, with pieces of code after it."""

    text: str
    code: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with its figures."""

    title: str
    figures: tuple[Figure, ...]


class Folder:
    """Names files of a report and saves arrays there; no name is given twice."""

    def __init__(self, root: pathlib.Path, log: Callable[[str], None] = lambda line: None):
        self.root, self.log = root, log
        self._given: set[str] = set()

    def save(self, name: str, arrays: Mapping[str, Any]) -> tuple[pathlib.Path, dict]:
        """Save arrays as `data/<name>`, `.csv` or `.npz`; returns the path and the saved arrays."""
        path = self._path("data", name)
        return path, save(path, arrays)

    def image_path(self, name: str) -> pathlib.Path:
        """Where the image of this name is to be drawn."""
        return self._path("", name)

    def draw(self, name: str, alt: str, function: Callable, *arguments: Any) -> FigureImage:
        """Draw `function(arrays, path, ...)` as the image of this name; alt: what it shows."""
        arrays, *options = arguments
        return FigureImage(function(arrays, self.image_path(name), *options), alt)

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


def plain(value: Any) -> str:
    """Format a value of a protocol."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {x}" for name, x in value.items())
    return str(value)


def percent(rate: float) -> str:
    """Format a rate in percent; a dash for NaN."""
    return "–" if np.isnan(rate) else f"{100 * rate:.1f}"


def write_page(
    path: pathlib.Path,
    title: str,
    intro: Sequence[Paragraph],
    sections: Sequence[Section],
    files: Sequence[str] = (),
) -> None:
    """Write the page; links are relative to its folder. All texts are escaped.

    files: names of all files of the report, relative to its folder, for `written_files`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = slug
    environment.filters["link"] = lambda p: quote(p.relative_to(path.parent).as_posix())
    template = environment.get_template("page.html.jinja")
    page = template.render(
        title=title, intro=intro, sections=sections, files=json.dumps(list(files))
    )
    path.write_text(page + "\n", encoding="utf-8")


class _Head(html.parser.HTMLParser):
    """The named meta elements of a page."""

    def __init__(self):
        super().__init__()
        self.meta: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each start tag."""
        attributes = dict(attrs)
        name = attributes.get("name")
        if tag == "meta" and name is not None:
            self.meta[name] = attributes.get("content") or ""


def written_files(path: pathlib.Path) -> list[str] | None:
    """Names of the files that were written together with a page; None for a page of others.

    Names that lead out of the page's folder are left out. Empty for a page without a list.
    """
    head = _Head()
    head.feed(path.read_text("utf-8", errors="replace"))
    if head.meta.get("generator") != "rcml_jax.report":
        return None
    try:
        names = [str(name) for name in json.loads(head.meta["files"])]
    except (KeyError, TypeError, ValueError):
        return []
    parts = {name: pathlib.PurePath(name) for name in names}
    return [n for n, p in parts.items() if not p.is_absolute() and ".." not in p.parts]

"""How all figures look: sizes, colours that colour-blind readers tell apart, how they are saved.

Every series has a mark or a line style of its own besides its colour.
"""

import contextlib
import pathlib
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

from rcml_jax.errors import UserError

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


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
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

"""Draw docs/figures/openmoji.png: what each respect of the embedded data set links, and what not.

    python -m docs.openmoji_card
    python -m docs.openmoji_card --data-dir ~/.cache/rcml_jax --seed 11

A line a respect: a query, three emoji that it links to the query, and two that only other respects
link to it, as the controlled candidates of the evaluation are. The first partners are printed as
the example pairs of docs/openmoji.md. Items are drawn by the seed. Needs matplotlib (the extra
"plots").
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rcml_jax.data.relation_graph import RelationGraph
from rcml_jax.data.sources import openmoji
from rcml_jax.data.sources.openmoji import SENTENCES, colours, outline
from rcml_jax.report import page
from rcml_jax.report.page import box, frame
from rcml_jax.tasks.relations import cache_directory

PARTNERS, WRONG = 3, 2
FIGURE = pathlib.Path(__file__).parent / "figures" / "openmoji.png"
_SOURCE = "Emoji: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"
# Inches: the text of a line, an image, the way from one to the next, the gaps, a line's height.
_LEFT, _SIZE, _STEP, _GAP, _HEIGHT, _HEAD = 1.9, 0.62, 0.98, 0.22, 1.22, 0.42


class Example(NamedTuple):
    """A line of the image: a respect, items, and of each wrong one the respects that link it."""

    relation: int
    query: int
    partners: np.ndarray
    wrong: np.ndarray
    linked: tuple[tuple[int, ...], ...]


def examples(graph: RelationGraph, seed: int) -> list[Example]:
    """One example for each relation with enough pairs, drawn by the seed.

    The wrong items are linked to the query by different respects where there are any.
    """
    rng = np.random.default_rng(seed)
    links = np.zeros((len(graph.relations), len(graph), len(graph)), bool)
    a, b, relation = graph.pairs.T
    links[relation, a, b] = links[relation, b, a] = True
    found = []
    for relation, mine in enumerate(links):
        others = np.delete(links, relation, axis=0).any(axis=0) & ~mine
        enough = (mine.sum(axis=1) >= PARTNERS) & (others.sum(axis=1) >= WRONG)
        if not enough.any():
            continue
        query = int(rng.choice(np.flatnonzero(enough)))
        partners = rng.permutation(np.flatnonzero(mine[query]))[:PARTNERS]
        wrong: list[int] = []
        respects = rng.permutation(np.flatnonzero((links[:, query] & others[query]).any(axis=1)))
        for respect in np.resize(respects, 2 * WRONG):
            free = np.flatnonzero(links[respect, query] & others[query])
            free = free[~np.isin(free, wrong)]
            if len(free) and len(wrong) < WRONG:
                wrong.append(int(rng.choice(free)))
        linked = tuple(tuple(np.flatnonzero(links[:, query, w]).tolist()) for w in wrong)
        found.append(Example(relation, query, partners, np.array(wrong), linked))
    return found


def value(respect: str, pixels: np.ndarray) -> str:
    """What a drawing has in a respect that a reader cannot see at once; "" for other respects."""
    if respect in ("colour", "second colour"):
        return dict(enumerate(colours(pixels))).get(int(respect != "colour"), "")
    if respect != "outline":
        return ""
    width, fill = outline(pixels)
    widths = ("tall", "rather tall", "about square", "rather wide", "wide")
    fills = ("under 35 %", "35 to 55 %", "55 to 75 %", "over 75 %")
    return f"{widths[width]}, {fills[fill]} of its box filled"


def grey_pairs(graph: RelationGraph) -> tuple[int, int]:
    """How many recoloured pairs have two greys as their main colours, and how many there are."""
    pairs = graph.pairs[graph.pairs[:, 2] == list(SENTENCES).index("recoloured"), :2]
    main = {item: colours(_pixels(graph, item))[0] for item in np.unique(pairs).tolist()}
    grey = [all("grey" in main[item] for item in pair) for pair in pairs.tolist()]
    return sum(grey), len(grey)


def _pixels(graph: RelationGraph, item: int) -> np.ndarray:
    return np.asarray(graph.images[int(item)].convert("RGB"))


def draw(graph: RelationGraph, found: list[Example], path: pathlib.Path) -> pathlib.Path:
    """The image of the examples, a line each, as PNG."""
    names = list(SENTENCES)
    partners = _LEFT + _STEP + _GAP
    wrong = partners + PARTNERS * _STEP + _GAP
    width, height = wrong + WRONG * _STEP + 0.1, _HEAD + _HEIGHT * len(found) + 0.25
    with page.drawing(width, height) as figure:
        figure.set_layout_engine("none")

        def write(left: float, top: float, text: str, **options: Any) -> None:
            figure.text(left / width, 1 - top / height, text, va="top", **options)

        for left, text in (
            (_LEFT, "query"),
            (partners, "linked"),
            (wrong, "in other respects only"),
        ):
            write(left, 0.12, text, fontsize=10, weight="bold")
        for number, line in enumerate(found):
            top = _HEAD + _HEIGHT * number
            write(0.1, top, names[line.relation], fontsize=11, weight="bold")
            sentence = page.wrap(graph.relations[line.relation], 23, 4)
            write(0.1, top + 0.21, sentence, fontsize=8.5)
            said = value(names[line.relation], _pixels(graph, line.query))
            if said:
                below = top + 0.26 + 0.145 * (1 + sentence.count("\n"))
                said = page.wrap(f"(here: {said})", 26, 2)
                write(0.1, below, said, fontsize=7.5, style="italic", color="#666666")
            shown = [(_LEFT, line.query, "", "#444444")]
            shown += [
                (partners + _STEP * i, x, "", page.RIGHT) for i, x in enumerate(line.partners)
            ]
            for i, (item, linked) in enumerate(zip(line.wrong, line.linked, strict=True)):
                said = " and ".join(names[r] for r in linked)
                shown.append((wrong + _STEP * i, item, said, "#BBBBBB"))
            for left, item, said, colour in shown:
                axes = box(figure, left, top, _SIZE)
                axes.imshow(_pixels(graph, item))
                frame(axes, colour, 1.5)
                name = page.wrap(graph.texts[item], 14, 3 - bool(said))
                write(left, top + _SIZE + 0.04, name, fontsize=7.5)
                if said:
                    below = top + _SIZE + 0.04 + 0.125 * (1 + name.count("\n"))
                    said = page.wrap(f"({said})", 17, 2)
                    write(left, below, said, fontsize=7, style="italic", color="#666666")
        write(0.1, height - 0.2, _SOURCE, fontsize=8, color="#444444")
        page.save_figure(figure, path)
    # Drawings of few colours: a palette is a third of the size and looks the same.
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path


def main() -> None:
    """Draw the image, and print the example pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="", help="where the data set is prepared")
    parser.add_argument("--seed", default=11, type=int)
    parser.add_argument("--out", default=FIGURE, type=pathlib.Path)
    args = parser.parse_args()
    graph = openmoji.load(cache_directory(args.data_dir))
    found = examples(graph, args.seed)
    for line in found:
        pair = f"{graph.texts[line.query]} – {graph.texts[line.partners[0]]}"
        print(f"{list(SENTENCES)[line.relation]}: {pair}")
    print("recoloured pairs of two greys: {} of {}".format(*grey_pairs(graph)))
    path = draw(graph, found, args.out)
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()

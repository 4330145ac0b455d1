"""A tiny made-up copy of the Grocery Store data set in its published layout."""

import io
import pathlib

import numpy as np
from PIL import Image

HEADER = (
    "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),"
    "Iconic Image Path (str),Product Description Path (str)"
)
#: Name, kind, department, description of each product, in the order of their numbers.
PRODUCTS = (
    ("Granny-Smith", "Apple", "Fruit", "A green apple, good for dessert."),
    ("Royal-Gala", "Apple", "Fruit", "A crispy and juicy one."),
    ("Orange", "Orange", "Fruit", "Round and orange. Suits a dessert."),
    ("Bravo-Apple-Juice", "Juice", "Packages", "Juice for the breakfast table."),
    ("Tropicana-Smooth", "Juice", "Packages", "Pressed on apples and\noranges."),
    ("Arla-Milk", "Milk", "Packages", "Milk for breakfast."),
    ("Arla-Ecological-Milk", "Milk", "Packages", "Milk from organic farms."),
    ("Oatly-Oat-Milk", "Oat-Milk", "Packages", "A drink made of oats."),
    ("Carrots", "Carrots", "Vegetables", "Orange roots for soups."),
    ("Leek", "Leek", "Vegetables", "Used in soup."),
    ("Garlic", "Garlic", "Vegetables", "It smells."),
)
LISTS = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
#: Photographs of each product in each split.
COUNTS = {"train": 5, "val": 2, "test": 4}


def photograph(product: int, number: int, size: int = 20) -> bytes:
    """A JPEG in a colour of the product's own, a little different each time."""
    colour = np.array([37 * product % 256, 91 * product % 256, 23 * product % 256])
    noise = np.random.default_rng((product, number)).integers(0, 20, (size, size, 3))
    out = io.BytesIO()
    pixels = (colour + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_copy(folder: pathlib.Path, counts: dict[str, int] | None = None) -> pathlib.Path:
    """The whole data set: lists, classes, descriptions and photographs; returns the folder."""
    folder = pathlib.Path(folder)
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in PRODUCTS))
    lines, lists = [HEADER], {name: [] for name in LISTS}
    numbers = iter(range(10_000))
    for number, (name, kind, department, description) in enumerate(PRODUCTS):
        inside = f"{department}/{name}" if name == kind else f"{department}/{kind}/{name}"
        stem = f"iconic-images-and-descriptions/{inside}/{name}"
        lines.append(
            f"{name},{number},{kind},{kinds.index(kind)},/{stem}_Iconic.jpg,/{stem}_Description.txt"
        )
        (folder / stem).parent.mkdir(parents=True)
        (folder / f"{stem}_Description.txt").write_text(description, "utf-8")
        for split, count in (counts or COUNTS).items():
            (folder / split / inside).mkdir(parents=True)
            for i in range(1, count + 1):
                path = f"{split}/{inside}/{name}_{i:03d}.jpg"
                (folder / path).write_bytes(photograph(number, next(numbers)))
                lists[split].append(f"{path}, {number}, {kinds.index(kind)}\n")
    # As published: classes.csv has the line ends of Windows, and none after the last line.
    (folder / "classes.csv").write_bytes("\r\n".join(lines).encode())
    for split, rows in lists.items():
        (folder / LISTS[split]).write_text("".join(rows))
    return folder

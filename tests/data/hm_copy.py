"""A MADE-UP copy of the H&M competition's layout: no such article, customer or purchase exists.

There are TYPES of product, three to each group of customers, and products of each in COLOURS.
Customers of a group buy only its types, but for one purchase in ten. A customer shops on several
days.
"""

import csv
import io
import pathlib

import numpy as np
from PIL import Image

HEADER = (
    *("article_id", "product_code", "prod_name", "product_type_no", "product_type_name"),
    *("product_group_name", "graphical_appearance_name", "colour_group_name"),
    *("perceived_colour_value_name", "index_group_name", "section_name", "garment_group_name"),
    "detail_desc",
)
TYPES = (
    *("Kite", "Lamp", "Mug", "Clock", "Vase", "Tray"),
    *("Rug", "Scarf", "Bottle", "Apron", "Box", "Frame"),
)
GROUPS = 4
COLOURS = {"Red": "Medium", "Yellow": "Light", "Blue": "Dark", "Black": "Dark"}
PATTERNS = ("Plain", "Dotted", "Checked", "Striped", "Printed", "Knitted")
CUSTOMERS, DAYS, VISIT = 80, 4, 3


def rows(products: int = 4) -> list[dict[str, str]]:
    """The rows of articles.csv: 12 types × so many products × 4 colours."""
    found = []
    for kind, name in enumerate(TYPES):
        for product in range(products):
            code = f"{100000 + kind * products + product:07d}"
            for variant, colour in enumerate(COLOURS, 1):
                if product == 3 and variant == 4:
                    colour = "Red"  # a second red one: not another colour
                row = dict.fromkeys(HEADER, "x")
                row |= {
                    "article_id": f"{code}{variant:03d}",
                    "product_code": code.lstrip("0"),
                    "prod_name": f"{name} No. {product}",
                    "product_type_name": name,
                    "graphical_appearance_name": PATTERNS[product % len(PATTERNS)],
                    "colour_group_name": colour,
                    "perceived_colour_value_name": COLOURS[colour],
                    "index_group_name": f"Range {kind % 4}",
                    "section_name": f"Section {kind // 2}",
                    "garment_group_name": f"Group {kind // 3}",
                    "detail_desc": f'A {name.lower()}, "made up",\nfor the café.',
                }
                found.append(row)
    return found


def transactions(articles: list[dict[str, str]], seed: int = 0) -> list[list[str]]:
    """The rows of transactions_train.csv in order of their days; some come twice."""
    rng = np.random.default_rng(seed)
    found, each = [], len(articles) // len(TYPES)
    for customer in range(CUSTOMERS):
        group = customer % GROUPS
        for day in range(DAYS):
            for _ in range(VISIT):
                kind = rng.integers(3) + 3 * group if rng.random() < 0.9 else rng.integers(12)
                article = articles[int(kind) * each + rng.integers(each)]
                row = [f"2020-09-{10 + day}", f"made-up-{customer:03d}", article["article_id"]]
                found += [[*row, "0.02", "2"]] * (1 + (rng.random() < 0.1))
    return sorted(found)


def photograph(number: int) -> bytes:
    """A JPEG that tells its article."""
    out = io.BytesIO()
    Image.new("RGB", (12, 18), (number % 12 * 20, number // 12 * 3, 90)).save(out, "JPEG")
    return out.getvalue()


def write_copy(folder: pathlib.Path, products: int = 4) -> pathlib.Path:
    """The whole copy; returns its folder."""
    folder, articles = pathlib.Path(folder), rows(products)
    folder.mkdir(parents=True)
    with (folder / "articles.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(articles)
    lines = ["t_dat,customer_id,article_id,price,sales_channel_id"]
    lines += [",".join(row) for row in transactions(articles)]
    (folder / "transactions_train.csv").write_text("\n".join(lines) + "\n")
    for number, row in enumerate(articles):
        path = photograph_path(folder, row["article_id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(number))
    return folder


def photograph_path(folder: pathlib.Path, article_id: str) -> pathlib.Path:
    """Where the layout has an article's photograph."""
    return folder / "images" / article_id[:3] / f"{article_id}.jpg"

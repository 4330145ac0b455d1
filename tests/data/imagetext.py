"""Small directories in the layouts of the image-text sources."""

import csv
import io
import json

from PIL import Image

DISHES = ("apple_pie", "baklava", "crepes")


def jpeg(shade: int, size: int = 12) -> bytes:
    """A plain grey image."""
    out = io.BytesIO()
    Image.new("RGB", (size, size + 4), (shade, shade, shade)).save(out, "JPEG")
    return out.getvalue()


def news_record(part: str, number: int, section: str) -> dict:
    key = f"{part}{number}"
    texts = {field: f"{field} {key}" for field in ("headline", "caption", "abstract", "article")}
    return {**texts, "section": section, "image_id": key}


def news_records() -> dict[str, list[dict]]:
    """Six training records and three of the others, of three sections."""
    sections = ("Science", "Dance", "Food")
    return {
        part: [news_record(part, n, sections[n % 3]) for n in range(count)]
        for part, count in (("train", 6), ("dev", 3), ("test", 3))
    }


def write_news(root, records=None):
    """N24News: the images' shades are ten times the record's number, plus 100 in test."""
    (root / "news").mkdir(parents=True)
    (root / "imgs").mkdir()
    for part, entries in (news_records() if records is None else records).items():
        write_news_file(root, part, entries)
        for number, entry in enumerate(entries):
            shade = 10 * number + 100 * (part == "test")
            (root / "imgs" / f"{entry['image_id']}.jpg").write_bytes(jpeg(shade))
    return root


def write_news_file(root, part, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "news" / f"nytimes_{part}.json").write_text(text, "utf-8")


def food_rows() -> dict[str, list[dict]]:
    """Ten training rows and two test rows of each dish."""
    return {
        part: [
            {
                "id": f"{dish}_{number}.jpg",
                "text": f"Title, {dish} n° {number}!",
                "annotation": dish,
                "label": label,
            }
            for label, dish in enumerate(DISHES)
            for number in numbers
        ]
        for part, numbers in (("train", range(10)), ("test", range(10, 12)))
    }


def write_food(root, rows=None, *, pages=False):
    """UPMC Food-101; with `pages` the text files too, which say "Page <dish> a <number>"."""
    for part, entries in (food_rows() if rows is None else rows).items():
        write_food_file(root, part, entries)
        for row in entries:
            image = root / "images" / part / row["annotation"] / row["id"]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(jpeg(80 * DISHES.index(row["annotation"])))
            if pages:
                page = root / "texts_txt" / row["annotation"] / row["id"].replace(".jpg", ".txt")
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(f"Page {row['annotation']} a {row['id']}", "utf-8")
    return root


def write_food_file(root, part, content):
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
        if isinstance(content, str):
            file.write(content)
            return
        writer = csv.DictWriter(file, ["id", "text", "annotation", "label"])
        writer.writeheader()
        writer.writerows(content)

"""Bad input: counted and reported, one sentence where strict, and mended by the whole file."""

import numpy as np
import pytest

from rcml_jax.data.sources import amazon
from rcml_jax.errors import UserError
from tests.data.amazon_loading import change, load, report
from tests.data.planted_amazon import CATEGORIES, DOMAIN


def test_flaws_are_left_out_and_counted_in_one_line(tiny, tmp_path):
    reviews, meta = tiny / f"{DOMAIN}.jsonl", tiny / f"meta_{DOMAIN}.jsonl"
    with reviews.open("a") as file:
        file.write('{"cut off\n{"user_id": "U"}\n[]\n')

    def spoil(number, record):
        if number == 0:
            return "no JSON"
        if number == 1:
            del record["title"]
        if number in (2, 3):
            record["categories"] = record["categories"][:1]
        if number == 4:
            record["images"] = []
            (tiny / "images" / f"{record['parent_asin']}.png").unlink()
        if number == 5:
            (tiny / "images" / f"{record['parent_asin']}.png").write_bytes(b"no image")
            record["images"] = []

    change(meta, spoil)
    lines = []
    graph = load(tmp_path / "cache", tiny, lines)
    counts = report(lines)
    assert counts.pop("repeated reviews") > 0
    assert counts.pop("users with one purchase") > 0
    assert counts == {
        "malformed review lines": 3,
        "malformed item line": 1,
        "item without a record": 1,
        "item without a title": 1,
        "items without a second-level category": 2,
        "item without an image": 1,
        "damaged local image": 1,
    }
    assert len(graph) == 96
    unknown = np.flatnonzero(graph.labels < 0)
    assert [graph.ids[i] for i in unknown] == [f"P{n:09d}" for n in (2, 3)]
    assert graph.label_names[graph.labels[graph.ids.index("P000000007")]] == CATEGORIES[7]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"title": None}, "item P000000003 has no title"),
        ({"images": []}, "item P000000003 has no MAIN image"),
        ({"categories": ["Made up"]}, "item P000000003 has no second-level category"),
        ({"parent_asin": None}, r"malformed record \(no parent_asin\)"),
    ],
)
def test_strict_names_the_line_of_an_item(tiny, tmp_path, flaw, message):
    (tiny / "images" / "P000000003.png").unlink()

    def spoil(number, record):
        if number == 3:
            record.update(flaw)

    change(tiny / f"meta_{DOMAIN}.jsonl", spoil)
    with pytest.raises(UserError, match=rf"meta_{DOMAIN}\.jsonl, line 4: {message}"):
        load(tmp_path / "cache", tiny, strict=True)


def test_strict_names_the_line_of_a_review_even_after_a_lenient_run(tiny, tmp_path):
    change(tiny / f"{DOMAIN}.jsonl", lambda number, record: "{" if number == 9 else None)
    load(tmp_path / "cache", tiny)
    with pytest.raises(UserError, match=rf"{DOMAIN}\.jsonl, line 10: malformed record"):
        load(tmp_path / "cache", tiny, strict=True)


def test_strict_takes_what_is_whole(tiny, tmp_path):
    graph, lenient = (load(tmp_path / "cache", tiny, strict=strict) for strict in (True, False))
    np.testing.assert_array_equal(graph.pairs, lenient.pairs)
    meta = tiny / f"meta_{DOMAIN}.jsonl"
    meta.write_text("".join(meta.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="has no record of 1 of the 100 items"):
        load(tmp_path / "cache", tiny, strict=True)


@pytest.mark.parametrize("name", [DOMAIN, f"meta_{DOMAIN}"])
def test_a_cut_gz_is_one_sentence_and_mended_by_the_whole_file(corpus, tmp_path, name):
    for file in (f"{DOMAIN}.jsonl.gz", f"meta_{DOMAIN}.jsonl.gz", "images"):
        (tmp_path / file).symlink_to(corpus / file)
    cut = tmp_path / f"{name}.jsonl.gz"
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz is cut: .*; delete it") as error:
        load(tmp_path / "cache", tmp_path)
    assert "\n" not in str(error.value)
    cut.write_bytes(whole)
    assert len(load(tmp_path / "cache", tmp_path)) == 400


@pytest.mark.parametrize(
    ("domain", "options", "message"),
    [
        ("../x", {}, "There is no domain '../x'; use for instance Electronics,"),
        ("", {}, "There is no domain ''"),
        (DOMAIN, {"clusters": 0}, "clusters=0 must be at least 1"),
        (DOMAIN, {"pairs_per_user": 0}, "pairs_per_user=0 must be"),
        (DOMAIN, {"pairs_per_item": -1}, "pairs_per_item=-1 must be"),
        (DOMAIN, {"path": "none/such"}, "There is no folder none/such"),
        ("Other", {}, r"has neither Other\.jsonl\.gz nor Other\.jsonl"),
    ],
)
def test_wrong_options_are_one_sentence(corpus, tmp_path, domain, options, message):
    with pytest.raises(UserError, match=message):
        amazon.load(tmp_path, domain, **{"path": corpus} | options)


def test_nothing_left_is_one_sentence(tiny, tmp_path):
    reviews, meta = tiny / f"{DOMAIN}.jsonl", tiny / f"meta_{DOMAIN}.jsonl"
    lines, items = reviews.read_text(), meta.read_text()
    reviews.write_text("".join(lines.splitlines(keepends=True)[:50]))
    with pytest.raises(UserError, match=r"holds no users and items with 5 purchases each \(50 rev"):
        load(tmp_path / "cache", tiny)
    reviews.write_text("")
    with pytest.raises(UserError, match="holds no users and items"):
        load(tmp_path / "cache", tiny)
    reviews.write_text(lines)
    meta.write_text("{}\n")
    with pytest.raises(UserError, match="has no record of 100 of the 100 items"):
        load(tmp_path / "cache", tiny)
    meta.write_text(items)
    for image in (tiny / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="No user of Planted has bought two items with title and"):
        load(tmp_path / "cache", tiny, fetch_images=False)

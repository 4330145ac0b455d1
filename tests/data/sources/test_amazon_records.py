"""Amazon's records: both views and spellings, malformed lines, cut and damaged files, memory."""

import gzip
import hashlib
import json
import tracemalloc
from collections import Counter

import pytest

from rcml_jax.data.sources import amazon_records
from rcml_jax.data.sources.amazon_records import (
    categories_of,
    identity,
    main_image,
    parse_item,
    records,
    review_ids,
)
from rcml_jax.data.stages import unpack
from rcml_jax.errors import UserError
from rcml_jax.parsing import TextGate, read_json
from tests.data import planted_amazon

REVIEW = {"user_id": "U1", "parent_asin": "B1", "asin": "B1-red", "rating": 4.0}
HIGH, LARGE = "https://host/high.jpg", "https://host/large.jpg"
RAW_IMAGES = [
    {"thumb": "t", "large": "https://host/other.jpg", "variant": "PT01", "hi_res": None},
    {"thumb": "t", "large": LARGE, "variant": "MAIN", "hi_res": HIGH},
]
ITEM = {
    "parent_asin": "B1",
    "title": " A  kettle\n",
    "images": RAW_IMAGES,
    "categories": ["Home", "Kettles", "Small"],
    "price": 12.5,
    "details": {"Brand": "x"},
}


def transposed(images):
    return {key: [image[key] for image in images] for key in images[0]}


def write(path, lines):
    data = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("field", ["user_id", "parent_asin"])
@pytest.mark.parametrize("value", [None, "", 7, ["B1"], " B1", "B 1 ", "\0B", "\ud800"])
def test_a_review_without_user_or_item_is_none(field, value):
    assert review_ids(REVIEW) == ("U1", "B1")
    assert review_ids(REVIEW | {field: value}) is None
    assert parse_item({field: value}) is None


def test_both_views_give_one_item():
    item = parse_item(ITEM)
    assert item[:-1] == ("B1", "A kettle", HIGH, ("Home", "Kettles", "Small"), 12.5, {"Brand": "x"})
    assert item.category == "Kettles"
    view = {"images": transposed(RAW_IMAGES), "details": '{"Brand": "x"}', "price": "12.5"}
    assert parse_item(ITEM | view) == item


def test_what_an_item_lacks_is_empty():
    bare = parse_item({"parent_asin": "B1"})
    assert bare[:-1] == ("B1", "", "", (), None, {})
    assert bare.category == ""
    broken = {"title": 3, "images": "x", "categories": "Home", "price": "None", "details": "{"}
    assert parse_item(ITEM | broken) == bare
    assert parse_item(ITEM | {"categories": ["Home"]}).category == ""
    assert parse_item(ITEM | {"categories": [None, 3]}).category == ""
    assert parse_item(ITEM | {"price": "$7.99"}).price == 7.99
    assert parse_item(ITEM | {"details": "[1]"}).details == {}
    assert parse_item(ITEM | {"title": "half \ud83d emoji"}).title == "half \ufffd emoji"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RAW_IMAGES, HIGH),
        ([RAW_IMAGES[1] | {"hi_res": None}], LARGE),
        ([RAW_IMAGES[1] | {"hi_res": "None"}], LARGE),
        (transposed([RAW_IMAGES[0], RAW_IMAGES[1] | {"hi_res": None}]), LARGE),
        ([RAW_IMAGES[0]], ""),
        ([RAW_IMAGES[1] | {"hi_res": 1, "large": None}], ""),
        ([], ""),
        ({}, ""),
        (None, ""),
        ([None, "x"], ""),
        ({"variant": ["PT01", "MAIN"], "large": [LARGE]}, ""),  # lists of different lengths
        ({"variant": "MAIN", "large": LARGE}, ""),
    ],
)
def test_main_image(images, expected):
    assert main_image(images) == expected


def test_ids_may_be_of_any_characters():
    for key in ("B 1", "b-1_é", "日本", "B\N{VARIATION SELECTOR-16}"):
        assert review_ids(REVIEW | {"user_id": key}) == (key, "B1")


@pytest.fixture(params=["orjson", "json"])
def parser(request, monkeypatch):
    """Both parsers of lines, one after the other."""
    if request.param == "json":
        monkeypatch.setattr(amazon_records, "_fast_json", None)
    else:
        pytest.importorskip("orjson")


# Lines that parsers judge differently, and whether they are JSON to ours.
LINES = {
    b'{"user_id": "A", "parent_asin": "B"}\r': True,
    b'{"user_id": "A", "text": "half \\ud83d"}': True,
    b'{"user_id": "A", "text": "half \xed\xa0\xbd"}': True,
    b'\xef\xbb\xbf{"user_id": "A"}': True,
    b'{"user_id": "A", "user_id": "B"}': True,
    b'{"user_id": "A", "rating": NaN}': False,
    b'{"user_id": "A", "rating": 1e999}': False,
    b'{"user_id": "A", "rating": 01}': False,
    b'{"user_id": "A", "text": "\xff"}': False,
    b'{"user_id": "A", "text": "a\tb"}': False,
    b'{"user_id": "A"} {}': False,
    b'{"user_id": "A", "rating": 1' + b"0" * 5000 + b"}": False,
}


@pytest.mark.parametrize("line", LINES)
def test_what_is_malformed_does_not_depend_on_the_parser(parser, tmp_path, line):
    path = write(tmp_path / "x.jsonl", [line + b"\n", "{}"])
    counts = Counter()
    found = list(records(path, counts))
    assert counts["malformed"] == (not LINES[line])
    assert found[-1] == (2, {})
    assert found[:-1] == ([(1, read_json(line))] if LINES[line] else [])


def read_slowly(path):
    """The twin of `read_purchases`: one line, one rule at a time, sets and the standard library."""
    pairs, counts = [], Counter()
    for line in path.read_bytes().split(b"\n"):
        try:
            record = read_json(line)
            user, item = record["user_id"], record["parent_asin"]
            assert user == " ".join(user.split())
            assert item == " ".join(item.split())
            pairs.append((user, item))
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            counts["malformed"] += line.strip() != b""
    bought = Counter(user for user, _ in set(pairs))
    counts["repeated"] = len(pairs) - len(set(pairs))
    counts["single"] = sum(n == 1 for n in bought.values())
    kept, before = set(pairs), None
    while kept != before:
        users, items = (Counter(pair[side] for pair in kept) for side in (0, 1))
        before = kept
        kept = {(u, i) for u, i in kept if users[u] >= 5 and items[i] >= 5}
    hashes = [(slow_identity(user), slow_identity(item)) for user, item in kept]
    return sorted(hashes), len(pairs), counts


def slow_identity(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


@pytest.mark.parametrize("batch", [7, 4096])
def test_purchases_equal_their_slow_twin(parser, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(amazon_records, "_BATCH", batch)
    planted_amazon.write_large(tmp_path, reviews=4000, users=500, items=100)
    with gzip.open(tmp_path / f"{planted_amazon.DOMAIN}.jsonl.gz") as file:
        lines = file.read().split(b"\n")[:-1]
    lines[100] = lines[100][:50]  # cut
    lines[200] = b""
    lines[300] = b'{"user_id": "A"}'
    lines[400] = lines[400].replace(b'"text": "', b'"text": "half \\ud83d ')
    lines[500] = lines[500].replace(b'"user_id": "', b'"user_id": " ')
    path = write(tmp_path / "x.jsonl", [line + b"\n" for line in lines])
    expected, reviews, twin_counts = read_slowly(path)
    found = amazon_records.read_purchases(path)
    users, items = found["users"][found["user"]], found["items"][found["item"]]
    assert 1000 < len(expected) < reviews == 3996
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == expected
    assert unpack(found["counts"]) == {
        "reviews": reviews,
        "malformed review lines": 3,
        "repeated reviews": twin_counts["repeated"],
        "users with one purchase": twin_counts["single"],
    }
    assert twin_counts["malformed"] == 3
    assert min(twin_counts.values()) > 0
    with pytest.raises(UserError, match=r"x\.jsonl, line 101: malformed record"):
        amazon_records.read_purchases(path, strict=True)


def test_hashes_tell_ids_apart_in_64_bits():
    keys = [f"user {i}" for i in range(1000)]
    found = [identity(key) for key in keys]
    assert len(set(found)) == 1000
    assert 2**63 < max(found) < 2**64


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_malformed_lines_are_counted(tmp_path, ending):
    lines = ['{"a": 1}', "", "{", "[1]", "null", b"\xff\xfe\n", "[" * 100_000, '  {"a": 2} ', "{}"]
    path = write(tmp_path / f"x{ending}", lines)
    counts = Counter()
    assert list(records(path, counts)) == [(1, {"a": 1}), (8, {"a": 2}), (9, {})]
    assert counts == {"malformed": 5}


@pytest.mark.parametrize("line", ["{", "[1]", b"\xff\n"])
def test_strict_names_file_and_line(tmp_path, line):
    path = write(tmp_path / "x.jsonl", ['{"a": 1}', line])
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: malformed record \(.+\); mend"):
        list(records(path, Counter(), strict=True))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon_records, "LONGEST_LINE", 50)
    counts = Counter()
    path = write(tmp_path / "x.jsonl", [json.dumps({"text": "x" * 180}), "{}"])
    assert list(records(path, counts)) == [(5, {})]
    assert counts == {"malformed": 4}


def test_a_gz_cut_in_the_middle_is_one_sentence(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", [json.dumps({"n": n}) for n in range(50_000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    read = []
    with pytest.raises(UserError, match=r"x\.jsonl\.gz is cut: .*delete it and download") as error:
        read.extend(number for number, _ in records(path, Counter()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["crc", "html"])
def test_a_damaged_gz_is_one_sentence(tmp_path, damage):
    path = write(tmp_path / "x.jsonl.gz", [json.dumps({"n": n}) for n in range(1000)])
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data if damage == "crc" else b"<html>")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz is no whole gzip file"):
        list(records(path, Counter()))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(records(tmp_path / "none.jsonl", Counter()))


def test_of_a_review_two_hashes_are_kept(tmp_path):
    text = "x" * 2000
    rows = (
        json.dumps({"user_id": f"U{n % 1000}", "parent_asin": f"B{n % 7}", "text": text})
        for n in range(20_000)
    )
    path = write(tmp_path / "x.jsonl", rows)
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    arrays = amazon_records.read_purchases(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(arrays["user"]) == 7000
    assert peak < 6e6  # a buffer of 1 MB; 16 bytes a review, a few times


def test_items_of_prime_video_have_images():
    widths = {f"{w}w": f"https://images/{w}.jpg" for w in (360, 480, 720, 1080, 1440, 1920)}
    images = [{"variant": "PT01", "720w": "https://no"}, {**widths, "variant": "MAIN"}]
    assert main_image(images) == "https://images/720.jpg"
    assert main_image([widths]) == "https://images/720.jpg"
    assert main_image([{"360w": "https://a", "480w": "https://b"}]) == "https://b"
    columns = {key: [value] for key, value in (images[1]).items()}
    assert main_image(columns) == "https://images/720.jpg"
    assert main_image([{"variant": "MAIN", "0w": "https://a", "720w": None}]) == ""


@pytest.mark.parametrize(
    "title", ['24" TV & more', "24&quot; TV &amp; more", "24&amp;quot; TV &amp; more"]
)
def test_titles_have_no_html_entities(title):
    item = parse_item({"parent_asin": "B1", "title": title, "categories": ["A", "B &amp; C"]})
    assert item.title == '24" TV & more'
    assert item.category == "B & C"


def test_texts_of_items_are_checked():
    gate = TextGate()
    record = {"parent_asin": "B1", "title": "cup \ud83d", "categories": ["A", "B\0"]}
    item = parse_item(record, lambda text: gate(text, "here"))
    assert (item.title, item.category, gate.replaced) == ("cup \ufffd", "B\ufffd", 2)
    assert parse_item({"parent_asin": "B1\ud83d", "title": "cup"}) is None


def test_domains_without_categories():
    def items(titles, main=None):
        main = main or [""] * len(titles)
        return [
            parse_item({"parent_asin": f"B{i}", "title": t, "main_category": m, "categories": []})
            for i, (t, m) in enumerate(zip(titles, main, strict=True))
        ]

    titles = ["Hair brush", "Hair clip for you", "Nail file", "Nail polish", "Soap", ""]
    found, by = categories_of(items(titles, ["Beauty", "Beauty", "Health", "", "Health", "Beauty"]))
    assert (found, by) == (
        ["Beauty", "Beauty", "Health", "", "Health", "Beauty"],
        "main categories",
    )
    found, by = categories_of(items(titles, ["All Beauty"] * 6))
    assert (found, by) == (["hair", "hair", "nail", "nail", "", ""], "words of titles")
    one = parse_item({"parent_asin": "B9", "categories": ["A", "B"]})
    found, by = categories_of([*items(titles), one])
    assert (found, by) == ([""] * 6 + ["B"], "second-level categories")

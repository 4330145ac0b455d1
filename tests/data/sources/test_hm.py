"""H&M's layout, made up: planted customers, relations against slow twins, splits, and flaws."""

import csv
import itertools
import os
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import hm
from rcml_jax.errors import UserError
from tests.data import hm_copy
from tests.data.hm_copy import photograph_path, write_copy

NO_CAP = {"pairs_per_user": 10**6, "pairs_per_item": 10**6, "pairs_per_respect": 10**6}
HEADER = hm_copy.HEADER
ROWS = hm_copy.rows()
BY_ID = {row["article_id"]: row for row in ROWS}
BOUGHT = {tuple(row[:3]) for row in hm_copy.transactions(ROWS)}


def load(folder, cache, lines=None, **options):
    lines = [] if lines is None else lines
    return hm.load(cache, folder, log=lines.append, **({"clusters": hm_copy.GROUPS} | options))


def report(lines):
    """The counts of what was left out: name → number."""
    (line,) = (line for line in lines if line.startswith("H&M: "))
    found = line.partition("Left out: ")[2].partition(". Kept")[0].split(", ")
    return {name: int(number) for number, _, name in (part.partition(" ") for part in found)}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The folder of a whole copy; not to be changed."""
    return write_copy(tmp_path_factory.mktemp("hm") / "copy")


@pytest.fixture(scope="module")
def prepared(copy, tmp_path_factory):
    """(the graph without caps, what was logged)."""
    lines = []
    return load(copy, tmp_path_factory.mktemp("cache"), lines, **NO_CAP), lines


@pytest.fixture
def own(tmp_path):
    """A copy to be changed by a test."""
    return write_copy(tmp_path / "own")


def found_pairs(graph, sentence):
    """The pairs of a relation as sets of two ids."""
    relation = graph.relations.index(sentence)
    pairs = graph.pairs[graph.pairs[:, 2] == relation]
    return {frozenset((graph.ids[a], graph.ids[b])) for a, b, _ in pairs}


# ---------------------------------------------------------------- what is planted is found


def test_items_are_articles_as_a_shop_shows_them(prepared):
    graph, lines = prepared
    assert list(graph.ids) == [row["article_id"] for row in ROWS]
    assert all(len(key) == 10 and key.startswith("0") for key in graph.ids)
    assert graph.texts[0] == 'Kite No. 0. Red Kite. A kite, "made up", for the café.'
    assert graph.label_names == tuple(f"Group {i}" for i in range(4))
    names = [graph.label_names[label] for label in graph.labels]
    assert names == [row["garment_group_name"] for row in ROWS]
    assert graph.images.encoded(5) == hm_copy.photograph(5)
    assert len(graph) == 12 * 4 * 4
    (line,) = (line for line in lines if line.startswith("H&M: "))
    count = len(hm_copy.transactions(ROWS))
    assert f"192 articles, {count:,} transactions, 80 customers" in line
    assert "Left out: nothing." in line


def test_planted_kinds_of_customers_are_recovered(prepared):
    graph, _ = prepared
    kinds = [s for s in graph.relations if s.startswith("Co-purchased by people who primarily")]
    assert len(kinds) == hm_copy.GROUPS
    met = set()
    for sentence in kinds:
        named = sentence.partition(", while")[0]
        (group,) = (
            g
            for g in range(hm_copy.GROUPS)
            if all(name in named for name in hm_copy.TYPES[3 * g : 3 * g + 3])
        )
        met.add(group)
        expected = set()
        for customer in range(group, hm_copy.CUSTOMERS, hm_copy.GROUPS):
            mine = {a for _, c, a in BOUGHT if c == f"made-up-{customer:03d}"}
            expected |= {frozenset(pair) for pair in itertools.combinations(mine, 2)}
        # All pairs of exactly the customers of that group.
        assert found_pairs(graph, sentence) == expected
    assert met == set(range(hm_copy.GROUPS))


def test_pairs_of_one_day_equal_their_twin(prepared):
    baskets = defaultdict(set)
    for day, customer, article in BOUGHT:
        baskets[customer, day].add(article)
    expected = {
        frozenset(pair) for basket in baskets.values() for pair in itertools.combinations(basket, 2)
    }
    assert found_pairs(prepared[0], hm.SAME_DAY) == expected


def test_colours_and_respects_equal_their_twins(prepared):
    graph, _ = prepared
    pairs = list(itertools.combinations(BY_ID, 2))

    def agree(column):
        return {frozenset(p) for p in pairs if BY_ID[p[0]][column] == BY_ID[p[1]][column]}

    variants, red = agree("product_code"), agree("colour_group_name")
    assert found_pairs(graph, hm.OTHER_COLOUR) == variants - red
    assert variants & red
    for column, sentence in hm.RESPECTS.items():
        assert found_pairs(graph, sentence) == agree(column)
    linked = [graph.relations[r] for r in graph.respects]
    assert linked == list(hm.RESPECTS.values())


@pytest.mark.parametrize("seed", range(3))
def test_colours_of_a_product_are_in_one_split_which_the_seed_draws(prepared, seed):
    graph, _ = prepared
    splits = split_graph(graph, seed=seed)
    codes = [{BY_ID[graph.ids[i]]["product_code"] for i in splits.items(s)} for s in SPLITS]
    assert all(codes)
    assert sum(map(len, codes)) == len(set.union(*codes)) == 48
    assert all(len(splits.pairs(split)) for split in SPLITS)
    other = split_graph(graph, seed=seed + 1)
    assert np.any(other.item_split != splits.item_split)


def test_caps_are_kept_and_what_is_not_drawn_is_linked_all_the_same(copy, prepared, tmp_path):
    caps = {"pairs_per_user": 3, "pairs_per_item": 2, "pairs_per_respect": 50}
    graph = load(copy, tmp_path, **caps)
    whole, _ = prepared
    size = dict(zip(graph.relations, np.bincount(graph.pairs[:, 2]), strict=True))
    assert graph.relations == whole.relations
    assert all(size[sentence] == 50 for sentence in hm.RESPECTS.values())
    for sentence in graph.relations:
        assert found_pairs(graph, sentence) <= found_pairs(whole, sentence)
    kinds = [r for r, s in enumerate(graph.relations) if s.startswith("Co-purchased")]
    purchased = graph.pairs[np.isin(graph.pairs[:, 2], kinds), :2]
    for pairs in (purchased, graph.pairs[graph.pairs[:, 2] == len(kinds), :2]):
        assert np.bincount(pairs.ravel()).max() == 2
    relation = graph.relations.index(hm.RESPECTS["colour_group_name"])
    every = np.arange(len(graph))
    colour = np.array([BY_ID[key]["colour_group_name"] for key in graph.ids])
    np.testing.assert_array_equal(
        graph.linked(every[:, None], every, relation), colour[:, None] == colour
    )
    again = load(copy, tmp_path / "again", **caps)
    np.testing.assert_array_equal(again.pairs, graph.pairs)
    other = load(copy, tmp_path, **caps, seed=1)
    assert other.pairs.tolist() != graph.pairs.tolist()


def test_a_customer_gives_at_most_so_many_pairs_whatever_the_days(copy, prepared, tmp_path):
    graph = load(copy, tmp_path, **NO_CAP | {"pairs_per_user": 3})
    found, whole = (found_pairs(one, hm.SAME_DAY) for one in (graph, prepared[0]))
    # Every customer has four days with three articles: 12 pairs, but for repetitions.
    assert 200 < len(found) <= 3 * hm_copy.CUSTOMERS < len(whole)
    assert found <= whole


@pytest.mark.parametrize("most", [40, 10**6])
def test_agreeing_pairs(most):
    values = np.array([0] * 60 + [1] * 30 + [2] + [-1] * 9)
    values = np.random.default_rng(0).permutation(values)
    pairs = hm.agreeing_pairs(values, most, np.random.default_rng(1))
    found = set(map(tuple, pairs.tolist()))
    assert len(found) == len(pairs) == min(most, 60 * 59 // 2 + 30 * 29 // 2)
    assert all(a < b and values[a] == values[b] >= 0 for a, b in found)


def test_a_value_has_pairs_in_proportion_to_its_items():
    values = np.repeat([0, 1], [2000, 1000])
    counts = Counter()
    for seed in range(5):
        pairs = hm.agreeing_pairs(values, 3000, np.random.default_rng(seed))
        counts.update(values[pairs[:, 0]].tolist())
    assert counts.total() == 15_000
    # A third, within 5 standard deviations; all pairs alike would give a fifth.
    assert abs(counts[1] / 15_000 - 1 / 3) < 5 * np.sqrt(2 / 9 / 15_000)


# ---------------------------------------------------------------- files as people have them


def test_saved_anew_by_a_spreadsheet(own, prepared, tmp_path):
    """Ids without the leading zero, quotes around values, Windows line ends, a byte order mark."""
    path = own / "articles.csv"
    path.write_bytes(b"\xef\xbb\xbf" + re.sub(rb"\n0(\d{9},)", rb"\n\1", path.read_bytes()))
    path = own / "transactions_train.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines = [",".join(f'"{value.lstrip("0")}"' for value in line) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    graph = load(own, tmp_path / "cache", **NO_CAP)
    whole, _ = prepared
    assert (graph.ids, graph.texts) == (whole.ids, whole.texts)
    np.testing.assert_array_equal(graph.pairs, whole.pairs)


@pytest.mark.parametrize("chunk", [10, 300, 10**7])
def test_transactions_are_the_same_in_chunks_of_any_size(copy, monkeypatch, chunk):
    monkeypatch.setattr(hm, "_CHUNK", chunk)
    counts = Counter()
    articles = hm.read_articles(copy / "articles.csv", (), counts)
    found = hm.read_transactions(copy / "transactions_train.csv", articles, counts)
    place = {article.id: i for i, article in enumerate(articles)}
    customers, expected = {}, set()
    for day, customer, article in sorted(BOUGHT):
        number = customers.setdefault(customer, len(customers))
        days = (np.datetime64(day) - np.datetime64("1970-01-01")).astype(int)
        expected.add((number, int(days), place[article]))
    rows = list(zip(found.customer.tolist(), found.day.tolist(), found.article, strict=True))
    assert rows == sorted(expected)
    assert counts["transactions"] == len(hm_copy.transactions(ROWS)) > len(expected)
    assert counts["customers"] == hm_copy.CUSTOMERS


def test_a_prepared_graph_is_read_and_a_changed_file_makes_it_anew(own, tmp_path):
    cache, first, second, third, fourth = tmp_path / "cache", [], [], [], []
    load(own, cache, first)
    load(own, cache, second)
    assert first
    assert not second
    path = photograph_path(own, "0100000001")
    os.utime(path, (1, 1))
    load(own, cache, third)
    assert third
    with (own / "transactions_train.csv").open("a") as file:
        file.write(f"2020-10-01,new,{ROWS[0]['article_id']},0.1,2\n")
    load(own, cache, fourth)
    assert "81 customers" in fourth[-2]


# ---------------------------------------------------------------- flaws


def change_articles(folder, change):
    """Rewrites articles.csv; `change` gets the list of rows, header first."""
    path = folder / "articles.csv"
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    change(table)
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows(table)


def test_flaws_are_left_out_and_counted_in_one_line(own, tmp_path):
    description, name = HEADER.index("detail_desc"), HEADER.index("prod_name")

    def spoil(table):
        table[1][description] = ""
        table[2][name] = "Caf\udce9"  # Latin-1
        table[3] = table[3][:4]
        table[4][0] = "none"
        table[5][1] = ""
        table.append(table[6])
        for column in ("colour_group_name", "perceived_colour_value_name"):
            table[7][HEADER.index(column)] = "Unknown"
        table[8][HEADER.index("garment_group_name")] = "Unknown"

    change_articles(own, spoil)
    photograph_path(own, ROWS[9]["article_id"]).unlink()
    photograph_path(own, ROWS[10]["article_id"]).write_bytes(b"no image")
    path = own / "transactions_train.csv"
    with path.open("ab") as file:
        key = ROWS[20]["article_id"].encode()
        file.write(b"cut off\n\n2020-02-30,c," + key + b",0.1,2\n2020-02-20,," + key + b",0.1,2\n")
        file.write(b"2020-02-20,c,0999999999,0.1,2\n\xff\xfe,c," + key + b",0.1,2\n")
    lines = []
    graph = load(own, tmp_path / "cache", lines, **NO_CAP)
    gone = {ROWS[i]["article_id"] for i in (1, 2, 3, 4)}
    unknown = sum(row[2] in gone for row in hm_copy.transactions(ROWS))
    assert unknown > 0
    assert report(lines) == {
        "malformed articles": 4,
        "repeated article": 1,
        "article without a photograph": 1,
        "article with a damaged photograph": 1,
        "malformed transactions": 4,
        "transactions of articles outside articles.csv": unknown + 1,
    }
    (line,) = (line for line in lines if line.startswith("H&M: "))
    assert line.endswith("Kept by their names: 1 article without a description.")
    gone |= {ROWS[i]["article_id"] for i in (9, 10)}
    assert graph.ids == tuple(key for key in BY_ID if key not in gone)
    assert graph.texts[0] == "Kite No. 0. Red Kite."
    colourless = graph.ids.index(ROWS[6]["article_id"])
    assert graph.texts[colourless].startswith("Kite No. 1. Kite. A kite")
    colour = graph.relations.index(hm.RESPECTS["colour_group_name"])
    assert graph.attributes[colourless, colour] == -1
    assert graph.labels[graph.ids.index(ROWS[7]["article_id"])] == -1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda row: row[:4], r"malformed row \(4 values for 13 columns\)"),
        (lambda row: ["x1", *row[1:]], r"malformed row \(article_id 'x1' is no number\)"),
        (lambda row: [row[0], "", *row[2:]], r"malformed row \(no product_code\)"),
        (lambda row: [*row[:2], "\udce9", *row[3:]], r"malformed row \(not UTF-8\)"),
        (lambda row: ["0100000001", *row[1:]], r"article 0100000001 is listed before \(.*line 2\)"),
    ],
)
def test_strict_articles_name_file_and_line(own, tmp_path, row, message):
    def spoil(table):
        table[5] = row(table[5])

    change_articles(own, spoil)
    # Descriptions have two lines each: the fifth row begins in the line 10.
    with pytest.raises(UserError, match=rf"articles.csv, line 10: {message}"):
        load(own, tmp_path / "cache", strict=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2020-09-10,c,0100000001,0.1", "malformed row .'2020-09-10,c,0100000001,0.1'"),
        ("10.9.2020,c,0100000001,0.1,2", "malformed row"),
        ("2020-09-10,,0100000001,0.1,2", "malformed row"),
        ("2020-09-10,c,0999999999,0.1,2", "its article is not in articles.csv"),
    ],
)
@pytest.mark.parametrize("chunk", [200, 10**6])
def test_strict_transactions_name_file_and_line(own, tmp_path, monkeypatch, line, message, chunk):
    monkeypatch.setattr(hm, "_CHUNK", chunk)
    path = own / "transactions_train.csv"
    lines = path.read_text().splitlines()
    lines[700:700] = [line, "", "also cut"]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"transactions_train.csv, line 701: {message}"):
        load(own, tmp_path / "cache", strict=True)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_strict_photographs_name_file_and_line(own, tmp_path, damage):
    path = photograph_path(own, "0100000002")
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    message = "there is no such file" if damage == "missing" else "no JPEG, PNG"
    with pytest.raises(UserError, match=rf"articles.csv, line 4: .*0100000002.jpg.*{message}"):
        load(own, tmp_path / "cache", strict=True)


def test_a_whole_copy_is_strict(copy, prepared, tmp_path):
    graph = load(copy, tmp_path, strict=True, **NO_CAP)
    np.testing.assert_array_equal(graph.pairs, prepared[0].pairs)


def test_missing_files_and_columns(own, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"no articles.csv in .*rcml:hm,path=DIRECTORY"):
        load(tmp_path / "nowhere", cache)
    text = (own / "transactions_train.csv").read_text()
    (own / "transactions_train.csv").write_text(text.replace("customer_id", "customer", 1))
    with pytest.raises(UserError, match=r"transactions_train\.csv has no column 'customer_id'"):
        load(own, cache)
    (own / "transactions_train.csv").write_text("t_dat,customer_id,article_id\n")
    with pytest.raises(UserError, match="No customer has bought 5 articles"):
        load(own, cache)
    text = (own / "articles.csv").read_text("utf-8")
    (own / "articles.csv").write_text(text.replace("section_name", "section", 1), "utf-8")
    with pytest.raises(UserError, match=r"articles\.csv has no column 'section_name'"):
        load(own, cache)
    (own / "articles.csv").write_text(",".join(HEADER), "utf-8")
    with pytest.raises(UserError, match="holds no article"):
        load(own, cache)
    (own / "images").rename(own / "photographs")
    with pytest.raises(UserError, match="has no folder images"):
        load(own, cache)


@pytest.mark.parametrize("name", ["clusters", "min_purchases", "pairs_per_respect"])
def test_options_are_at_least_one(copy, tmp_path, name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        load(copy, tmp_path, **{name: 0})

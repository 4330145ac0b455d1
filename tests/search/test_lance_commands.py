"""rcml-embed and rcml-search with a table of LanceDB, and what they refuse."""

import json
import re
import shutil
import sys

import pytest

from rcml_jax.cli import embed, search
from rcml_jax.search.lance_table import hold_table
from tests.cli.test_commands import fails, run
from tests.search.conftest import SENTENCES
from tests.search.test_embed_and_search import check_page


@pytest.fixture(scope="module")
def shop(runs, catalogue, tmp_path_factory):
    """A folder of the catalogue's items with prices and brands, embedded by the command."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copytree(catalogue / "images", folder / "images")
    lines = (catalogue / "items.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"price": n + 0.5, "brand": "XY"[n % 2]} for n, row in enumerate(rows)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_from_a_table_of_items_to_a_page(runs, shop, tmp_path, capsys):
    to, html = f"lance://{tmp_path}/t", tmp_path / "page.html"
    args = ["--workdir", runs(), "--items", shop, "--to", to, f"--relation={SENTENCES[0]}"]
    for _ in range(2):  # the second finds nothing to do
        status, out, err = run(embed.main, args, capsys)
        assert status == 0, err
        assert out == f"{to}: text (2, 60, 16), image (2, 60, 16), float32\n"
        assert "warning" not in err
    asked = ["--embeddings", to, "--relation", SENTENCES[0], "--k", 4, "--html", html]
    ids = lambda out: re.findall(r" (i\d+) ", out)  # noqa: E731
    status, out, err = run(search.main, [*asked, "--item=i17"], capsys)
    assert (status, err) == (0, "")
    unfiltered = ids(out)
    page = check_page(html, cards=4, images=5)
    places = [" ".join(page.words).index(f" {key} ") for key in unfiltered]
    assert places == sorted(places)
    where = "price < 30 AND brand = 'Y'"
    status, out, err = run(search.main, [*asked, "--item=i17", "--where", where], capsys)
    assert (status, err) == (0, "")
    assert len(ids(out)) == 4
    assert all(int(key[1:]) < 30 and int(key[1:]) % 2 for key in ids(out))
    assert ids(out) != unfiltered
    options = ["--text", "kind5 place7", "--words", "kind5", "--exact"]
    status, out, err = run(search.main, [*asked, *options], capsys)
    assert status == 0, err
    assert out.count("kind5") == len(ids(out)) > 0
    status, out, err = run(search.main, [*asked, "--words", "kind3"], capsys)
    assert status == 0, err
    assert out.splitlines()[0].strip() == "kind3"
    assert out.count("kind3") == len(ids(out)) + 1 > 1
    assert "kind3" in " ".join(check_page(html, cards=len(ids(out)), images=len(ids(out))).words)

    def wrong(args, *parts):
        html.unlink(missing_ok=True)
        fails(search.main, [*asked, *args], capsys, *parts)
        assert not html.exists()

    wrong([], "one of the arguments --item --image --text is required")
    wrong(["--item=i1", "--where=prize < 20"], "'prize < 20' cannot be used", "brand")
    wrong(["--item=i1", "--where=price <"], "'price <' cannot be used")
    wrong(["--item=i1", "--where=price > 99"], "no other item", "fulfils 'price > 99'")
    wrong(["--item=i99"], "has no item 'i99'; did you mean")
    wrong(["--item=i1", "--relation=both kind6"], "was not embedded under 'both kind6'")
    wrong(["--item=i1", "--no-exact"], "have no index", "--index ivf-pq")
    wrong(["--item=i1", "--candidates=20"], "--candidates and --recall need token states")
    wrong(["--text=x", "--workdir", runs(seed=1)], "was embedded by another model")

    good = {"--workdir": runs(), "--items": shop, "--to": to, "--relation": SENTENCES[0]}

    def wrong_embed(*parts, **changes):
        values = good | {f"--{name}": value for name, value in changes.items()}
        fails(embed.main, [f"{name}={value}" for name, value in values.items()], capsys, *parts)

    wrong_embed("holds embeddings of another model", workdir=runs(seed=1))
    wrong_embed("holds embeddings of other relations (2 sentences)", relation=SENTENCES[1])
    wrong_embed("has too few items for an index", index="hnsw")
    wrong_embed("--tokens needs a directory of files", tokens="int8")
    wrong_embed("--index needs a table", index="hnsw", to=tmp_path / "files")
    wrong_embed("write lance+s3://bucket", to="lance://s3://bucket")
    with hold_table(to):
        wrong_embed("is embedding into lance://", "wait until it ends")
    lines = (shop / "items.jsonl").read_text().splitlines()
    (tmp_path / "items.jsonl").write_text("\n".join(lines[:-1]))
    wrong_embed("holds embeddings of other items", items=tmp_path / "items.jsonl")


def test_the_items_of_the_runs_own_data(runs, tmp_path, capsys):
    to, html = f"lance://{tmp_path}/t", tmp_path / "page.html"
    status, _, err = run(embed.main, ["--workdir", runs(), "--to", to], capsys)
    assert status == 0, err
    status, _, err = run(search.main, ["--embeddings", to, "--item=i17", "--html", html], capsys)
    assert status == 0, err
    check_page(html, cards=10, images=11)


def test_what_a_table_and_an_extra_are_needed_for(
    embedded, patchy, runs, tmp_path, monkeypatch, capsys
):
    for option in ("--where=price < 3", "--words=cup", "--no-exact"):
        args = ["--embeddings", embedded.directory, "--item=i1", option]
        fails(search.main, args, capsys, f"{option.partition('=')[0]} needs a table of LanceDB")
    status, out, _ = run(
        search.main, ["--embeddings", embedded.directory, "--item=i1", "--exact"], capsys
    )
    assert status == 0
    assert "i1" in out
    (tmp_path / "t" / "items.lance").mkdir(parents=True)
    to = f"lance://{tmp_path}/t"
    fails(search.main, ["--embeddings", to, "--item=i1"], capsys, "there is no table in lance://")
    monkeypatch.setitem(sys.modules, "lancedb", None)
    install = 'pip install "rcml_jax[lance]"'
    fails(search.main, ["--embeddings", to, "--item=i1"], capsys, install)
    args = ["--workdir", runs(), "--items", patchy, "--to", f"lance://{tmp_path}/new"]
    fails(embed.main, args, capsys, install)

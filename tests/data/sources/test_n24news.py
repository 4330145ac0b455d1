import os
import pickle
import re
import sys

import numpy as np
import pytest

from rcml_jax.data import N24NEWS_TEXTS
from rcml_jax.data.images import ImageBank
from rcml_jax.data.sources import n24news
from rcml_jax.errors import UserError
from tests.data.imagetext import jpeg, news_record, news_records, write_news, write_news_file


@pytest.fixture
def news(tmp_path):
    return write_news(tmp_path / "N24News")


def fail(line):
    raise AssertionError(line)


def load(directory, **options):
    return n24news.load(directory, **{"log": fail, **options})


def test_the_published_layout(news):
    data = load(news)
    assert data.name == "n24news"
    assert [(m.name, m.kind) for m in data.modalities] == [("image", "image"), ("text", "text")]
    assert data.label_names == ("Dance", "Food", "Science")
    np.testing.assert_array_equal(data.labels, [2, 0, 1] * 4)
    np.testing.assert_array_equal(data.split, [0] * 6 + [1] * 3 + [2] * 3)
    assert (data.labels.dtype, data.split.dtype) == (np.int32, np.int8)
    images, texts = (modality.values for modality in data.modalities)
    assert isinstance(texts, tuple)
    assert texts[:2] == ("headline train0", "headline train1")
    assert texts[6] == "headline dev0"
    assert len(images) == 12
    assert images.encoded(10) == jpeg(110)
    assert images[10].size == (12, 16)


@pytest.mark.parametrize("text", N24NEWS_TEXTS)
def test_every_text(news, text):
    assert load(news, text=text).modalities[1].values[-1] == f"{text} test2"


def test_another_text_is_an_error(news):
    with pytest.raises(UserError, match="no text 'title'; choose one of headline, caption"):
        load(news, text="title")


def test_the_bank_reads_the_images(news):
    bank = ImageBank(load(news).modalities[0].values, 8)
    rows = np.array([5, 9, 5, 2, 11, 0])
    shades = np.array([50, 100, 50, 20, 120, 0])
    for _ in range(2):  # decoded, then from memory
        np.testing.assert_allclose(bank(rows)[..., 0], shades[:, None, None] + np.zeros((8, 8)))
    copy = pickle.loads(pickle.dumps(bank))
    np.testing.assert_array_equal(copy(rows), bank(rows))


@pytest.mark.parametrize("content", [b"no image", b"", jpeg(0, 400)[:-400]])
def test_damaged_images_are_found_by_load(news, content, tmp_path):
    path = news / "imgs" / "dev1.jpg"
    whole = path.read_bytes()
    path.write_bytes(content)
    lines, cache = [], tmp_path / "cache"
    for _ in range(2):
        data = load(news, log=lines.append, cache=cache)
        assert len(data) == 11
        ImageBank(data.modalities[0].values, 8)(np.arange(11))
    assert "1 of 12 records skipped (0 without an image, 1 with a damaged one" in lines[1]
    assert f"the image {path} cannot be decoded" in lines[1]
    with pytest.raises(UserError, match=r"nytimes_dev\.json, record 2: .* cannot be decoded"):
        load(news, strict=True, cache=cache)
    path.write_bytes(whole)  # the state of the file is part of what is remembered
    assert len(load(news, cache=cache)) == 12


def test_an_image_that_vanishes_after_load_is_named(news):
    path = news / "imgs" / "dev1.jpg"
    bank = ImageBank(load(news).modalities[0].values, 8)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        bank(np.arange(12))
    path.write_bytes(jpeg(0, 400)[:-400])
    with pytest.raises(UserError, match="jpg cannot be decoded"):
        bank(np.arange(12))


def test_records_without_an_image_or_a_text_are_skipped(news):
    records = news_records()["train"]
    records[4].update(headline=None)
    records[5].update(headline=" \n")
    write_news_file(news, "train", records)
    (news / "imgs" / "train3.jpg").unlink()
    (news / "imgs" / "train5.jpg").unlink()
    lines = []
    data = load(news, log=lines.append)
    np.testing.assert_array_equal(data.labels[:4], [2, 0, 1, 2])
    np.testing.assert_array_equal(data.split, [0] * 3 + [1] * 3 + [2] * 3)
    assert data.modalities[0].values.encoded(3) == jpeg(0)
    assert data.modalities[1].values[3] == "headline dev0"
    (line,) = lines
    assert "3 of 12 records skipped (2 without an image, 1 without a text)" in line
    assert "news/nytimes_train.json, record 4: there is no image" in line
    assert str(news / "imgs" / "train3.jpg") in line
    with pytest.raises(
        UserError, match=r"record 4: there is no image .*train3\.jpg; mend or add it"
    ):
        load(news, strict=True)
    assert len(load(news, text="caption", log=lines.append)) == 10
    (news / "imgs" / "train3.jpg").write_bytes(jpeg(0))
    with pytest.raises(
        UserError, match=r"record 5: there is no text in 'headline'; mend or add it"
    ):
        load(news, strict=True)


def test_the_line_goes_to_standard_error(news, capsys):
    (news / "imgs" / "dev0.jpg").unlink()
    assert len(n24news.load(news)) == 11
    out, err = capsys.readouterr()
    assert out == ""
    assert "nytimes_dev.json, record 1" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_most_images_missing_means_that_they_are_elsewhere(news, strict):
    for name in ("dev0", "dev1"):
        (news / "imgs" / f"{name}.jpg").unlink()
    place = re.escape(str(news / "imgs" / "<image_id>.jpg"))
    with pytest.raises(UserError, match=f"2 of the 3 validation records.*expected as {place}"):
        load(news, strict=strict)
    (news / "imgs").rename(news / "images")
    with pytest.raises(UserError, match=f"6 of the 6 train records.*record 1, .*{place}"):
        load(news, strict=strict)


def test_most_texts_missing(news):
    write_news_file(news, "test", [{**r, "article": ""} for r in news_records()["test"]])
    assert len(load(news)) == 12
    with pytest.raises(UserError, match=r"3 of the 3 test records.*field 'article'"):
        load(news, text="article")


def test_no_data(news, tmp_path, monkeypatch):
    remedy = r"billywzh717/N24News.*imgs.*--config m3col:n24news,path=DIRECTORY"
    with pytest.raises(UserError, match=f"There is no directory .*absent; .*{remedy}"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match=f"No directory of N24News is given; .*{remedy}"):
        load("")
    (news / "news" / "nytimes_dev.json").unlink()
    with pytest.raises(UserError, match=rf"it has no news/nytimes_dev\.json; .*{remedy}"):
        load(str(news))
    write_news_file(news, "dev", [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/N24News").rows("validation").size == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[\n{"section": }]', r"nytimes_train\.json is malformed JSON .*line 2 column 13"),
        ("", r"malformed JSON .*line 1 column 1"),
        ("[" * 100_000, "malformed JSON"),
        ('{"section": "Food"}', "no list of records"),
        ('["Food"]', "record 1 is no JSON object"),
    ],
)
def test_malformed_files(news, content, problem):
    write_news_file(news, "train", content)
    with pytest.raises(UserError, match=problem):
        load(news)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"section": None}, "record 2: 'section' is empty"),
        ({"headline": ["a"]}, "record 2: 'headline' is neither text nor a number"),
        ({"image_id": True}, "record 2: 'image_id' is neither"),
        ({"section": "Sports"}, "record 2: no training record has the section 'Sports'"),
    ],
)
def test_bad_values(news, change, problem):
    records = news_records()["test"]
    records[1].update(change)
    write_news_file(news, "test", records)
    with pytest.raises(UserError, match=rf"nytimes_test\.json, {problem}"):
        load(news)


@pytest.mark.parametrize("field", ["headline", "section", "image_id"])
def test_a_field_is_lacking(news, field):
    records = news_records()["dev"]
    del records[2][field]
    write_news_file(news, "dev", records)
    with pytest.raises(UserError, match=rf"nytimes_dev\.json, record 3 has no '{field}'"):
        load(news)


def test_fields_that_are_not_asked_for_may_lack(news):
    records = [{**r} for r in news_records()["train"]]
    for record in records:
        del record["article"]
    write_news_file(news, "train", records)
    assert len(load(news)) == 12


def test_encodings(news):
    path = news / "news" / "nytimes_train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(news).modalities[1].values[0] == "headline train0"
    path.write_bytes(path.read_bytes().replace(b"headline train0", b"caf\xe9"))
    with pytest.raises(UserError, match=r"nytimes_train\.json is not UTF-8 text"):
        load(news)
    records = news_records()["train"]
    records[0]["headline"] = "café \ud83d"  # half a pair, as a cut emoji leaves it
    write_news_file(news, "train", records)
    lines = []
    assert load(news, log=lines.append).modalities[1].values[0] == "café \N{REPLACEMENT CHARACTER}"
    assert "1 text held a NUL or half of a surrogate pair" in lines[0]
    assert lines[0].endswith("the first is in news/nytimes_train.json, record 1, 'headline'.")
    with pytest.raises(UserError, match=r"nytimes_train\.json, record 1, 'headline': .* surrogate"):
        load(news, strict=True)


def test_numbers_as_names_of_images(news):
    record = {**news_record("test", 3, "Food"), "image_id": 17}
    write_news_file(news, "test", [*news_records()["test"], record])
    (news / "imgs" / "17.jpg").write_bytes(jpeg(9))
    assert load(news).modalities[0].values.encoded(12) == jpeg(9)


def test_a_class_whose_training_images_are_all_missing(news):
    for name in ("train0", "train3"):
        (news / "imgs" / f"{name}.jpg").unlink()
    with pytest.raises(UserError, match="no training sample has the class 'Science'"):
        load(news, log=lambda line: None)


def test_an_empty_test_file(news):
    write_news_file(news, "test", [])
    with pytest.raises(UserError, match="no test samples"):
        load(news)


@pytest.mark.skipif(
    sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0),
    reason="the permissions do not keep this user out",
)
def test_a_file_that_may_not_be_read(news):
    path = news / "news" / "nytimes_train.json"
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load(news)

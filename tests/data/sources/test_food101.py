import csv
import re
import threading

import numpy as np
import pytest

from rcml_jax.data.images import ImageBank
from rcml_jax.data.sources import food101
from rcml_jax.errors import UserError
from tests.data.imagetext import DISHES, food_rows, write_food, write_food_file

HEADER = "id,text,annotation,label\n"


@pytest.fixture
def food(tmp_path):
    return write_food(tmp_path / "food")


def fail(line):
    raise AssertionError(line)


def load(directory, **options):
    return food101.load(directory, **{"log": fail, **options})


def test_the_published_layout(food):
    data = load(food, validation=0)
    assert data.name == "food101"
    assert [(m.name, m.kind) for m in data.modalities] == [("image", "image"), ("text", "text")]
    assert data.label_names == DISHES
    np.testing.assert_array_equal(data.labels, np.repeat([0, 1, 2, 0, 1, 2], [10] * 3 + [2] * 3))
    np.testing.assert_array_equal(data.split, [0] * 30 + [2] * 6)
    assert (data.labels.dtype, data.split.dtype) == (np.int32, np.int8)
    texts = data.modalities[1].values
    assert isinstance(texts, tuple)
    assert texts[0] == "title apple pie"


def test_texts_come_from_the_pages_where_there_are_any(tmp_path):
    write_food(tmp_path, pages=True)
    rows = food_rows()["train"]
    for row in rows:
        row["text"] = ""  # not looked at
    write_food_file(tmp_path, "train", rows)
    (tmp_path / "texts_txt" / "baklava" / "baklava_3.txt").write_bytes(b"caf\xe9 NOIR\x00\r\nb 12")
    texts = load(tmp_path).modalities[1].values
    assert texts[0] == "page apple pie apple pie jpg"
    assert texts[13] == "caf noir"  # a byte that is not UTF-8 is no letter
    (tmp_path / "texts_txt" / "baklava" / "baklava_3.txt").unlink()
    with pytest.raises(UserError, match=r"train\.csv, line 15: there is no text in .*va_3\.txt"):
        load(tmp_path, strict=True)
    lines = []
    assert len(load(tmp_path, log=lines.append)) == 35
    assert len(lines) == 1
    (tmp_path / "texts_txt").rename(tmp_path / "pages")
    (tmp_path / "texts_txt").mkdir()
    with pytest.raises(UserError, match=r"30 of the 30 train .*texts_txt/<annotation>/<id with"):
        load(tmp_path)


def test_a_table_of_pages_needs_no_text_column(tmp_path):
    write_food(tmp_path, pages=True)
    for part, rows in food_rows().items():
        lines = [f"{row['annotation']},{row['id']}" for row in rows]
        write_food_file(tmp_path, part, "\r\n".join(["annotation,id", *lines]))
    assert len(load(tmp_path)) == 36


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apple-Pie: 12 easy STEPS", "apple pie easy steps"),
        ("a b c d", ""),
        ("it's a b-side\n\tI like", "it side like"),
        ("jalapeño ½ cup", "jalape cup"),
        ("", ""),
        (" \ud83d ok", "ok"),
        (b"\xff\xfeOK\x00no", "ok no"),
    ],
)
def test_clean(text, expected):
    assert food101.clean(text) == expected


def test_clean_is_the_rule_spelled_as_a_pattern():
    signs = np.random.default_rng(0).choice(list("abYZ .-_'\n0é[`{@"), 5000)
    text = "".join(signs)
    words = re.sub("[^a-zA-Z]", " ", text).lower().split()
    assert food101.clean(text) == " ".join(word for word in words if len(word) > 1)


def test_the_bank_reads_the_images(food):
    images = load(food).modalities[0].values
    rows = np.array([0, 15, 29, 34, 33])
    shades = np.array([0, 80, 160, 160, 80])
    np.testing.assert_allclose(
        ImageBank(images, 8)(rows)[..., 1], shades[:, None, None] + np.zeros((8, 8))
    )


def test_a_stratified_part_is_held_out(food):
    data = load(food, validation=4)
    held = data.rows("validation")
    assert len(held) == 4
    assert sorted(np.bincount(data.labels[held])) == [1, 1, 2]
    assert len(data.rows("train")) == 26
    np.testing.assert_array_equal(data.rows("test"), np.arange(30, 36))
    np.testing.assert_array_equal(load(food, validation=4).split, data.split)
    splits = [load(food, validation=4, seed=seed) for seed in range(8)]
    assert len({tuple(s.rows("validation")) for s in splits}) > 4
    doubled = {int(np.argmax(np.bincount(s.labels[s.rows("validation")]))) for s in splits}
    assert len(doubled) > 1  # not always the first class


def test_no_more_than_a_fifth_is_held_out(food):
    for validation in (6, 5000):
        data = load(food, validation=validation)
        np.testing.assert_array_equal(np.bincount(data.labels[data.rows("validation")]), [2, 2, 2])
    with pytest.raises(UserError, match="-1 samples cannot be held out"):
        load(food, validation=-1)


def test_shares_follow_the_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [1, 2, 37, 60]))
    for seed in range(5):
        held = food101._held_out(labels, 20, seed)
        assert np.all(np.diff(held) > 0)
        # 20 % are 0.2, 0.4, 7.4 and 12 samples: one of the two .4 is rounded up.
        shares = np.bincount(labels[held], minlength=4).tolist()
        assert shares in ([0, 1, 7, 12], [0, 0, 8, 12])
    # Classes of one sample keep it, even if fewer are held out then.
    assert food101._held_out(np.arange(10), 2, 0).size == 0
    assert food101._held_out(np.array([0, 1, 2, 3, 3]), 1, 0)[0] in (3, 4)


def test_the_published_sizes():
    labels = np.arange(67_972) % 101
    held = np.bincount(labels[food101._held_out(labels, 5000, 0)])
    assert held.sum() == 5000
    assert held.min() >= 49
    assert held.max() <= 50


def test_rows_without_an_image_or_a_text_are_skipped(food):
    rows = food_rows()
    rows["test"][5]["text"] = "n° 3"
    rows["train"][4]["id"] = ""
    for part in rows:
        write_food_file(food, part, rows[part])
    (food / "images" / "train" / "baklava" / "baklava_2.jpg").unlink()
    lines = []
    data = load(food, log=lines.append)
    np.testing.assert_array_equal(np.bincount(data.labels), [11, 11, 11])
    assert len(data.rows("validation")) == 5  # a fifth of the 28 that are left
    (line,) = lines
    assert "3 of 36 records skipped (2 without an image, 1 without a text)" in line
    assert "train.csv, line 6: there is no image" in line
    with pytest.raises(UserError, match=r"train\.csv, line 6: there is no image"):
        load(food, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_most_images_missing_means_that_they_are_elsewhere(food, strict):
    (food / "images" / "test").rename(food / "images" / "valid")
    with pytest.raises(
        UserError, match=r"6 of the 6 test records.*images/{train,test}/<annotation>/<id>"
    ):
        load(food, strict=strict)


def test_no_data(food, tmp_path):
    remedy = r"visiir\.isir\.upmc\.fr/explore.*images/{train,test}.*:food101,path=DIRECTORY"
    with pytest.raises(UserError, match=f"There is no directory .*absent; .*{remedy}"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match=f"No directory of UPMC Food-101 is given; .*{remedy}"):
        load("")
    (food / "test.csv").unlink()
    with pytest.raises(UserError, match=rf"it has no test\.csv; .*{remedy}"):
        load(str(food))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", r"train\.csv has no column 'id'"),
        ("id,text,class,label\n", r"has no column 'annotation'; its first line must be id,text"),
        ("id,annotation\n", "has no column 'text'"),
        (HEADER + '1.jpg,"a\nb",baklava,0\n2.jpg,a,b,baklava,0\n', "line 4: there are 5 values"),
        (HEADER + "1.jpg,baklava\n", "line 2: there are 2 values for 4"),
        (HEADER + "\n1.jpg,a, ,0\n", "line 3: 'annotation' is empty"),
        (HEADER + '1.jpg,"a,baklava,0\n\n', "row that starts in line 2 is malformed CSV"),
        (HEADER + '1.jpg,"a"b,baklava,0\n', "row that starts in line 2 is malformed CSV"),
        (HEADER, "no training record has the annotation 'apple_pie'"),
    ],
)
def test_malformed_tables(food, content, problem):
    write_food_file(food, "train", content)
    with pytest.raises(UserError, match=problem):
        load(food)


def test_a_class_that_train_lacks(food):
    rows = food_rows()["test"]
    rows[3]["annotation"] = "dumplings"
    write_food_file(food, "test", rows)
    with pytest.raises(UserError, match=r"test\.csv, line 5: no training record .*'dumplings'"):
        load(food)


def test_encodings_and_headers(food):
    path = food / "train.csv"
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content.replace(b"annotation", b" Annotation", 1))
    assert len(load(food)) == 36
    path.write_bytes(content.replace("°".encode(), b"\xb0"))
    with pytest.raises(UserError, match=r"train\.csv is not UTF-8 text"):
        load(food)


def test_long_pages_leave_the_limit_of_csv_alone(food):
    rows = food_rows()["train"]
    rows[0]["text"] = 'she said "no", ' * 20_000 + "\r\nend"
    write_food_file(food, "train", rows)
    limit = csv.field_size_limit(1000)
    try:
        found = []
        threads = [threading.Thread(target=lambda: found.append(load(food))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert csv.field_size_limit() == 1000
        for data in found:
            assert data.modalities[1].values[0] == "she said no " * 20_000 + "end"
        assert len(found) == 4
        write_food_file(food, "train", HEADER + '1.jpg,"' + "a" * 5000)
        with pytest.raises(UserError, match="malformed CSV"):
            load(food)
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)

"""Omics tables read from a folder: made-up ones, and ROSMAP where a copy is at hand."""

import subprocess
import sys

import numpy as np
import pytest

from rcml_jax.data.sources import omics
from rcml_jax.errors import UserError
from tests.toy import ROOT

ROSMAP = ROOT.parent / "shared" / "data" / "rosmap"
FEATURES = (4, 3, 2)
ROWS = {"tr": 6, "te": 4}


def made_up(features=FEATURES, classes=2, seed=0):
    """File names and their tables: for each split the views and the labels, all classes in each."""
    rng = np.random.default_rng(seed)
    tables = {}
    for split, rows in ROWS.items():
        tables[f"labels_{split}.csv"] = (np.arange(rows) % classes)[:, None].astype(float)
        for view, columns in enumerate(features, 1):
            tables[f"{view}_{split}.csv"] = rng.normal(size=(rows, columns))
    return tables


def write(folder, tables, names=True):
    """As MOGONET writes them; with a file of feature names for each view."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        np.savetxt(folder / name, table, delimiter=",")
        if names and name.endswith("_tr.csv") and not name.startswith("labels"):
            lines = [f"gene{column}\n" for column in range(table.shape[1])]
            (folder / name.replace("_tr", "_featname")).write_text("".join(lines))
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "own", made_up())


def read(folder, name="rosmap"):
    """Loads a local copy; whatever would use the cache or the network fails."""
    return omics.load(name, "/dev/null/none", directory=folder, log=None)


def message(folder, name="rosmap"):
    with pytest.raises(UserError) as error:
        read(folder, name)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def edit(path, line, change):
    """Change one line, counted from 1."""
    lines = path.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n")


def cell(column, value):
    """A change of one cell of a line, counted from 1."""

    def change(line):
        cells = line.split(",")
        cells[column - 1] = value
        return ",".join(cells)

    return change


# What is loaded


def test_train_rows_come_first_then_test_rows(data):
    tables = made_up()
    loaded = read(data)
    assert [m.name for m in loaded.modalities] == ["mrna", "methylation", "mirna"]
    for view, modality in enumerate(loaded.modalities, 1):
        expected = np.concatenate([tables[f"{view}_tr.csv"], tables[f"{view}_te.csv"]])
        assert modality.kind == "table"
        assert modality.values.dtype == np.float32
        np.testing.assert_array_equal(modality.values, expected.astype(np.float32))
    assert loaded.name == "rosmap"
    assert loaded.label_names == ("control", "alzheimers")
    np.testing.assert_array_equal(loaded.rows("train"), np.arange(6))
    np.testing.assert_array_equal(loaded.rows("test"), np.arange(6, 10))
    assert len(loaded.rows("validation")) == 0
    np.testing.assert_array_equal(loaded.labels, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    assert (loaded.labels.dtype, loaded.split.dtype) == (np.int32, np.int8)


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ((5,), ["view1"]),
        ((2, 2), ["view1", "view2"]),
        ((2,) * 11, [f"view{k}" for k in range(1, 12)]),
        ((1, 1, 1), ["mrna", "methylation", "mirna"]),
    ],
)
def test_any_number_of_views(tmp_path, features, names):
    loaded = read(write(tmp_path, made_up(features), names=False))
    assert [m.name for m in loaded.modalities] == names
    assert [m.values.shape for m in loaded.modalities] == [(10, n) for n in features]


def test_class_names_are_the_published_ones_if_their_number_is(tmp_path):
    folder = write(tmp_path, made_up(classes=3))
    assert read(folder).label_names == ("0", "1", "2")
    edit(folder / "labels_tr.csv", 4, lambda _: "3")
    edit(folder / "labels_tr.csv", 5, lambda _: "4")
    names = ("Normal-like", "Basal-like", "HER2-enriched", "Luminal A", "Luminal B")
    assert read(folder, "brca").label_names == names


def awkward(folder):
    """Unequal widths, constant columns, repeated samples and classes of one sample or none."""
    tables = made_up((7, 1, 3), classes=3)
    tables["labels_tr.csv"][:, 0] = [0, 0, 1, 1, 0, 2]
    tables["labels_te.csv"][:, 0] = [0, 0, 1, 0]
    for view in (1, 2, 3):
        train, test = tables[f"{view}_tr.csv"], tables[f"{view}_te.csv"]
        train[3] = train[0]  # the same values, another label
        test[1] = train[4]  # the same sample, in the test split, too
        train[:, 0] = 2.5  # constant in training only
        test[1, 0] = 2.5
    return write(folder, tables, names=False)


def test_what_is_odd_and_does_no_harm_is_told(tmp_path):
    lines = []
    data = omics.load("rosmap", "/dev/null", directory=awkward(tmp_path), log=lines.append)
    assert [m.values.shape for m in data.modalities] == [(10, 7), (10, 1), (10, 3)]
    assert lines[0] == (
        "rosmap: 1 column of 7 of mrna with one value in all training samples, so without effect."
    )
    assert "1 column of 1 of methylation" in lines[1]
    # Views alone may repeat (methylation is constant); samples repeat where all views do.
    assert lines[3:] == [
        "rosmap: 4 samples have the same values in every view as another one: 2 of them beside "
        "another label, and 1 test samples that are among those of training.",
        "rosmap: train has one sample of 2.",
        "rosmap: test has one sample of 1.",
        "rosmap: test has no sample of 2.",
    ]


def test_tables_without_oddities_are_read_in_silence(tmp_path):
    lines = []
    omics.load("rosmap", "/dev/null", directory=write(tmp_path, made_up()), log=lines.append)
    assert lines == []


@pytest.mark.parametrize("child", ["", "ROSMAP", "rosmap"])
def test_the_folder_itself_or_one_that_holds_it(tmp_path, child):
    write(tmp_path / child, made_up())
    assert len(read(tmp_path)) == 10
    assert len(read(str(tmp_path))) == 10


def test_line_ends_blank_lines_at_the_end_spaces_and_a_byte_order_mark(data):
    expected = read(data).modalities[0].values
    path = data / "1_tr.csv"
    text = path.read_text().replace(",", " , ").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n \r\n")
    np.testing.assert_array_equal(read(data).modalities[0].values, expected)


def test_large_values_and_whole_numbers(data):
    edit(data / "3_tr.csv", 1, lambda _: "3e38,-7")
    np.testing.assert_array_equal(read(data).modalities[2].values[0], np.float32([3e38, -7]))


# Bad input

MISSING = "the cell is missing"
WRONG_CELLS = {
    "empty": (lambda line: cell(2, "")(line), 2, MISSING),
    "spaces": (lambda line: cell(2, "  ")(line), 2, MISSING),
    "last one empty": (lambda line: cell(4, "")(line), 4, MISSING),
    "too few": (lambda line: line.rpartition(",")[0], 4, MISSING),
    "too many": (lambda line: line + ",1", 5, "line 1 has 4 columns only"),
    "blank line": (lambda line: "", 1, MISSING),
    "word": (lambda line: cell(3, "NA")(line), 3, "'NA' is no finite"),
    "underscore": (lambda line: cell(3, "1_0")(line), 3, "'1_0' is no finite"),
    "quoted": (lambda line: cell(3, '"1"')(line), 3, "'\"1\"' is no finite"),
    "comment": (lambda line: cell(3, "#1")(line), 3, "'#1' is no finite"),
    "nan": (lambda line: cell(1, "nan")(line), 1, "'nan' is no finite"),
    "inf": (lambda line: cell(2, "-inf")(line), 2, "'-inf' is no finite"),
    "too large": (lambda line: cell(2, "1e39")(line), 2, "'1e39' is no finite float32"),
    "semicolons": (lambda line: line.replace(",", ";"), 1, "is no finite"),
}


@pytest.mark.parametrize("case", WRONG_CELLS)
def test_a_wrong_cell_is_named_by_file_line_and_column(data, case):
    change, column, reason = WRONG_CELLS[case]
    path = data / "1_tr.csv"
    edit(path, 3, change)
    assert message(data).startswith(f"{path}, line 3, column {column}: ")
    assert reason in message(data)


def test_the_first_of_several_wrong_cells(data):
    path = data / "2_te.csv"
    edit(path, 4, cell(1, "x"))
    edit(path, 2, cell(3, "x"))
    edit(path, 2, cell(2, "x"))
    assert message(data).startswith(f"{path}, line 2, column 2: ")


def test_a_header_is_told_from_a_wrong_number(data):
    path = data / "1_tr.csv"
    path.write_text("a,b,c,d\n" + path.read_text())
    assert "line 1, column 1: 'a' is no finite float32 number (the files have no header)" in (
        message(data)
    )


@pytest.mark.parametrize("name", ["2_tr.csv", "3_te.csv"])
def test_different_row_counts(data, name):
    path = data / name
    path.write_text(path.read_text().partition("\n")[2])
    split = name[2:4]
    assert message(data).startswith(
        f"{path} has {ROWS[split] - 1} rows, but labels_{split}.csv has {ROWS[split]};"
    )


def test_different_column_counts_of_train_and_test(data):
    path = data / "2_te.csv"
    path.write_text("".join(f"{line},0\n" for line in path.read_text().splitlines()))
    assert message(data).startswith(f"{path} has 4 columns, but 2_tr.csv has 3;")


def test_feature_names_that_do_not_fit(data):
    path = data / "3_featname.csv"
    path.write_text("one\ntwo\nthree\n\n")
    assert message(data).startswith(f"{path} has 3 lines, but 3_tr.csv has 2 columns;")
    path.unlink()
    assert len(read(data)) == 10


@pytest.mark.parametrize(
    ("name", "label", "reason"),
    [
        ("labels_tr.csv", "0.5", "0.5 is no class; number the classes 0, 1, 2"),
        ("labels_tr.csv", "-1", "-1 is no class; number the classes 0, 1, 2"),
        ("labels_tr.csv", "1e18", r"1e+18 is no class; number the classes 0, 1, 2"),
        ("labels_tr.csv", "nan", "'nan' is no finite"),
        ("labels_tr.csv", "AD", "'AD' is no finite"),
        ("labels_tr.csv", "", "the cell is missing"),
        ("labels_te.csv", "2", "2 is no class; write one of the classes of labels_tr.csv, 0 to 1"),
        ("labels_te.csv", "-1", "-1 is no class"),
        ("labels_te.csv", "1.5", "1.5 is no class"),
    ],
)
def test_wrong_labels(data, name, label, reason):
    edit(data / name, 3, lambda _: label)
    assert message(data).startswith(f"{data / name}, line 3, column 1: ")
    assert reason in message(data)


def test_labels_of_two_columns_or_one_class_or_with_a_gap(data):
    path = data / "labels_tr.csv"
    path.write_text("0\n2\n" * 3)
    (data / "labels_te.csv").write_text("0\n2\n" * 2)
    with pytest.raises(UserError, match="no training sample has the class '1'"):
        read(data)
    path.write_text("0\n" * 6)
    assert message(data).startswith(f"{path} has one class only")
    path.write_text("0,1\n" * 6)
    assert message(data).startswith(f"{path}, line 1, column 2: labels are one column")


@pytest.mark.parametrize("name", ["labels_tr.csv", "labels_te.csv", "1_tr.csv", "2_te.csv"])
def test_missing_empty_and_unreadable_files(data, name):
    path = data / name
    path.write_text("\n \n")
    assert message(data).startswith(f"{path} is empty")
    path.write_bytes("1,é\n".encode("latin-1"))
    assert message(data).startswith(f"{path} is not UTF-8 text")
    path.unlink()
    assert message(data).startswith(f"There is no file {path};")
    path.mkdir()
    assert message(data).startswith(f"{path} cannot be read")


def test_a_gap_in_the_numbers_of_the_views_is_a_missing_file(data):
    (data / "2_tr.csv").unlink()
    (data / "2_te.csv").unlink()
    assert message(data).startswith(f"There is no file {data / '2_tr.csv'};")


def test_a_wrong_folder_or_name(tmp_path):
    assert message(tmp_path / "x").startswith(f"There is no folder {tmp_path / 'x'}")
    assert "nor a folder BRCA with them; correct --config.data.path" in message(tmp_path, "brca")
    assert "no omics data set 'kipan'; use rosmap or brca" in message(tmp_path, "kipan")


@pytest.mark.parametrize(
    ("content", "blob"),
    [  # git hash-object
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ],
)
def test_the_blob_id_is_that_of_git(content, blob):
    assert omics.blob_id(content) == blob


def test_importing_does_nothing_to_the_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError\n"
        "socket.socket.connect = refuse\n"
        "import rcml_jax.data.sources.omics, sys\n"
        "assert 'pandas' not in sys.modules and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The published files


@pytest.mark.skipif(not ROSMAP.is_dir(), reason="no copy of ROSMAP at hand")
def test_the_published_rosmap(tmp_path, monkeypatch):
    for name, blob in omics.BLOBS["rosmap"].items():
        assert omics.blob_id((ROSMAP / name).read_bytes()) == blob, name
    loaded = read(ROSMAP)
    assert {m.name: m.values.shape for m in loaded.modalities} == {
        "mrna": (351, 200),
        "methylation": (351, 200),
        "mirna": (351, 200),
    }
    assert len(loaded.rows("train")) == 245
    assert len(loaded.rows("test")) == 106
    # Wang et al., Table 1: 169 normal controls and 182 patients.
    np.testing.assert_array_equal(np.bincount(loaded.labels), [169, 182])
    # Verified as a cache, without a network.
    monkeypatch.setattr(omics, "SOURCE", "http://127.0.0.1:9")
    (tmp_path / "omics").mkdir()
    (tmp_path / "omics" / "ROSMAP").symlink_to(ROSMAP)
    cached = omics.load("rosmap", tmp_path)
    for a, b in zip(cached.modalities, loaded.modalities, strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_the_tables_of_blob_ids_are_whole():
    wanted = {f"{view}_{kind}.csv" for view in (1, 2, 3) for kind in ("tr", "te", "featname")}
    wanted |= {"labels_tr.csv", "labels_te.csv"}
    for name, blobs in omics.BLOBS.items():
        assert set(blobs) == wanted
        assert len(set(blobs.values())) == len(blobs)
        assert all(len(blob) == 40 and int(blob, 16) for blob in blobs.values())
        assert name in omics.LABEL_NAMES

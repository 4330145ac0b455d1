"""Flickr8k, Flickr30K and MS-COCO from small copies in their published layouts."""

import json

import numpy as np
import pytest

from rcml_jax.data.images import image_states
from rcml_jax.data.sources import captions
from rcml_jax.errors import UserError
from tests.data.imagetext import jpeg


def caption_of(number, place):
    return f"caption {place} of {number}"


def write_flickr(root, *, karpathy=True, images=6, caption=caption_of):
    """Two captions a image; with the Karpathy split the last two are validation and test."""
    (root / "flickr30k-images").mkdir(parents=True)
    entries, lines = [], []
    for n in range(images):
        name = f"{n}.jpg"
        (root / "flickr30k-images" / name).write_bytes(jpeg(10 * n))
        split = {images - 2: "val", images - 1: "test"}.get(n, "train")
        texts = [caption(n, k) for k in range(2)]
        entries.append({"filename": name, "split": split, "sentences": [{"raw": t} for t in texts]})
        lines += [f"{name}#{k}\t{t}" for k, t in enumerate(texts)]
    if karpathy:
        (root / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))
    (root / "results_20130124.token").write_text("\n".join(lines) + "\n")
    return root


LISTS = ("train", "dev", "test")


def write_flickr8k(root, *, images=6, ends="\n", mark=""):
    """The published layout: the last two images are validation and test; one is in no list."""
    (root / "Flicker8k_Dataset").mkdir(parents=True)
    (root / "Flickr8k_text").mkdir()
    lines, lists = [], {part: [] for part in LISTS}
    for n in range(images + 1):
        name = f"{n}.jpg"
        (root / "Flicker8k_Dataset" / name).write_bytes(jpeg(10 * n))
        lines += [f"{name}#{k}\t{caption_of(n, k)}" for k in range(2)]
        if n < images:
            lists[{images - 2: "dev", images - 1: "test"}.get(n, "train")].append(name)
    write_lines(root, "Flickr8k.token.txt", lines, ends, mark)
    for part, names in lists.items():
        write_lines(root, f"Flickr_8k.{part}Images.txt", names, ends, mark)
    return root


def write_lines(root, name, lines, ends="\n", mark=""):
    content = mark + "".join(line + ends for line in lines)
    (root / "Flickr8k_text" / name).write_bytes(content.encode("utf-8"))


def add_line(root, name, line):
    with (root / "Flickr8k_text" / name).open("a") as file:
        file.write(line + "\n")


def write_coco(root, *, train=20, val=3):
    """Captions in another order than the images; ids that are no rows."""
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        (root / f"{part}2017").mkdir()
        images = [{"id": 100 + n, "file_name": f"{n:012}.jpg"} for n in range(count)]
        notes = [
            {"id": k * count + n, "image_id": 100 + n, "caption": f"{part} {n}, caption {k}"}
            for k in range(2)
            for n in range(count)
        ]
        for n, image in enumerate(images):
            (root / f"{part}2017" / image["file_name"]).write_bytes(jpeg(n))
        file = root / "annotations" / f"captions_{part}2017.json"
        file.write_text(json.dumps({"images": images, "annotations": notes}))
    return root


def check(found):
    """Every text stands beside its own image."""
    assert len(found.texts) == 2 * len(found.images) == len(found.image_of_text)
    for text, row in zip(found.texts, found.image_of_text, strict=True):
        number = int(found.images.paths[row].rsplit("/", 1)[1].split(".")[0])
        assert f" {number}" in text


@pytest.mark.parametrize(("ends", "mark"), [("\n", ""), ("\r\n", "\ufeff")])
def test_flickr8k_with_the_official_lists(tmp_path, ends, mark):
    lines = []
    found = captions.flickr8k(write_flickr8k(tmp_path, ends=ends, mark=mark), log=lines.append)
    check(found)
    assert found.split.tolist() == [0, 0, 0, 0, 1, 2]
    assert [text[-1] for text in found.texts[:2]] == ["0", "0"]
    assert lines == ["flickr8k: also left out: 1 image in no list"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_flickr8k_with_the_karpathy_split_in_another_folder(tmp_path, mark):
    root = write_flickr(tmp_path)
    official, file = captions.flickr30k(root), root / "dataset_flickr30k.json"
    text = json.dumps(json.loads(file.read_text()), indent=1)
    file.rename(root / "dataset_flickr8k.json")
    (root / "results_20130124.token").unlink()
    (root / "dataset_flickr8k.json").write_bytes((mark + text).replace("\n", "\r\n").encode())
    found = captions.flickr8k(root)
    check(found)
    assert (found.name, found.texts) == ("flickr8k", official.texts)
    np.testing.assert_array_equal(found.split, official.split)


def test_what_flickr8k_lacks_or_has_twice_is_counted(tmp_path):
    root, lines = write_flickr8k(tmp_path, images=9), []
    (root / "Flicker8k_Dataset" / "1.jpg").unlink()
    # A caption of an image that is nowhere, as the published file has; a caption that is there
    # already; a name that a list has twice; one without captions. U+2028 ends no line.
    add_line(root, "Flickr8k.token.txt", "77.jpg.1#0\tcaption 0 of 77")
    add_line(root, "Flickr8k.token.txt", "2.jpg#1\tanother caption of 2")
    add_line(root, "Flickr8k.token.txt", "2.jpg#2\tone\u2028more of 2")
    add_line(root, "Flickr_8k.trainImages.txt", "3.jpg")
    add_line(root, "Flickr_8k.testImages.txt", "none.jpg")
    found = captions.flickr8k(root, log=lines.append)
    names = [path.rsplit("/", 1)[1] for path in found.images.paths]
    assert names == ["0.jpg", "2.jpg", "3.jpg", *(f"{n}.jpg" for n in range(4, 9))]
    assert [t for t, row in zip(found.texts, found.image_of_text, strict=True) if row == 1] == [
        "caption 0 of 2",
        "caption 1 of 2",
        "one\u2028more of 2",
    ]
    assert lines == [
        "flickr8k: 2 of 10 images left out (2 without a file, 0 without a caption)",
        "flickr8k: also left out: 2 repeated records, 1 image in no list, "
        "1 captioned image without a file in no list",
    ]


def test_flickr8k_that_cannot_be_is_one_sentence(tmp_path):
    root = write_flickr8k(tmp_path / "copy")
    add_line(root, "Flickr_8k.testImages.txt", "0.jpg")
    with pytest.raises(UserError, match=r"0.jpg is both in .*trainImages.txt and in .*testImages"):
        captions.flickr8k(root)
    write_lines(root, "Flickr_8k.testImages.txt", [])
    with pytest.raises(UserError, match="the split test has no images"):
        captions.flickr8k(root)
    write_lines(root, "Flickr_8k.testImages.txt", [f"no{n}.jpg" for n in range(6)])
    with pytest.raises(UserError, match="6 of 11 images missing"):
        captions.flickr8k(root)
    (root / "Flickr8k_text" / "Flickr_8k.testImages.txt").write_bytes("é.jpg".encode("latin-1"))
    with pytest.raises(UserError, match=r"testImages.txt is not UTF-8"):
        captions.flickr8k(root)
    (root / "Flickr8k_text" / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(UserError, match=r"because it has no Flickr_8k.testImages.txt"):
        captions.flickr8k(root)
    (root / "Flickr8k_text" / "Flickr8k.token.txt").unlink()
    with pytest.raises(UserError, match=r"neither dataset_flickr8k.json nor Flickr8k.token"):
        captions.flickr8k(root)
    with pytest.raises(UserError, match="has no image folder"):
        captions.flickr8k(tmp_path)


def test_an_image_with_two_records(tmp_path):
    root, lines = write_flickr(tmp_path), []
    file = root / "dataset_flickr30k.json"
    content = json.loads(file.read_text())
    content["images"].append(content["images"][0] | {"sentences": [{"raw": "again"}]})
    file.write_text(json.dumps(content))
    check(captions.flickr30k(root, log=lines.append))
    assert lines == ["flickr30k: also left out: 1 repeated record"]
    content["images"][-1]["split"] = "test"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"0.jpg stands in two splits"):
        captions.flickr30k(root)


def test_a_caption_with_two_records(tmp_path):
    root, lines = write_flickr(tmp_path), []
    file = root / "dataset_flickr30k.json"
    content = json.loads(file.read_text())
    for entry in content["images"]:  # as in converted files: from 0 in each image
        for number, sentence in enumerate(entry["sentences"]):
            sentence["sentid"] = number
    content["images"][0]["sentences"].append({"raw": "again", "sentid": 1})
    content["images"][1]["sentences"].append(content["images"][1]["sentences"][0])
    file.write_text(json.dumps(content))
    check(captions.flickr30k(root, log=lines.append))
    assert lines == ["flickr30k: also left out: 2 repeated records"]


def test_ids_that_coco_has_twice(tmp_path):
    root, lines = write_coco(tmp_path), []
    file = root / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append(content["annotations"][0])
    content["images"].append(content["images"][0])
    file.write_text(json.dumps(content))
    check(captions.coco(root, log=lines.append))
    assert lines == ["coco: also left out: 2 repeated records"]
    content["images"][-1] = content["images"][1] | {"id": content["images"][0]["id"]}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="two images have the id 100"):
        captions.coco(root)


def test_flickr30k_with_the_karpathy_split(tmp_path):
    found = captions.flickr30k(write_flickr(tmp_path))
    check(found)
    assert found.split.tolist() == [0, 0, 0, 0, 1, 2]
    assert found.images[5].size == (12, 16)


def test_flickr30k_without_it_is_split_by_the_seed(tmp_path):
    root = write_flickr(tmp_path, karpathy=False, images=10)
    found = captions.flickr30k(root, seed=1)
    check(found)
    assert np.bincount(found.split).tolist() == [6, 2, 2]
    np.testing.assert_array_equal(captions.flickr30k(root, seed=1).split, found.split)
    assert (captions.flickr30k(root, seed=2).split != found.split).any()


def test_coco(tmp_path):
    found = captions.coco(write_coco(tmp_path))
    check(found)
    assert np.bincount(found.split).tolist() == [19, 1, 3]
    assert all("val2017" in found.images.paths[i] for i in np.flatnonzero(found.split == 2))


def test_images_without_file_or_caption_are_counted(tmp_path):
    root, lines = write_coco(tmp_path), []
    (root / "train2017" / f"{3:012}.jpg").unlink()
    file = root / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 101]
    file.write_text(json.dumps(content))
    found = captions.coco(root, log=lines.append)
    check(found)
    assert len(found.images) == 21
    assert lines == ["coco: 2 of 23 images left out (1 without a file, 1 without a caption)"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset_flickr30k.json", "{", "malformed JSON"),
        ("dataset_flickr30k.json", "[]", "has no list 'images'"),
        ("dataset_flickr30k.json", '{"images": [{"filename": "0.jpg"}]}', "no text 'split'"),
        (
            "dataset_flickr30k.json",
            '{"images": [{"filename": "0.jpg", "split": "rest", "sentences": []}]}',
            "unknown split 'rest'",
        ),
    ],
)
def test_damaged_flickr_files(tmp_path, file, content, message):
    (write_flickr(tmp_path) / file).write_text(content)
    with pytest.raises(UserError, match=message):
        captions.flickr30k(tmp_path)


def test_a_line_that_is_no_caption(tmp_path):
    root = write_flickr(tmp_path, karpathy=False)
    (root / "results_20130124.token").write_text("0.jpg#0\tgood\n0.jpg bad\n")
    with pytest.raises(UserError, match="line 2"):
        captions.flickr30k(root)


def test_a_caption_of_no_picture(tmp_path):
    root = write_coco(tmp_path)
    file = root / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["image_id"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names the image 7"):
        captions.coco(root)


def test_copies_that_are_elsewhere_or_empty(tmp_path):
    for read, name in ((captions.flickr30k, "flickr30k"), (captions.coco, "coco")):
        for place, message in (("", "No directory"), (tmp_path / "no", "There is no directory")):
            with pytest.raises(UserError, match=f"{message}.*alignment:{name}"):
                read(place)
        with pytest.raises(UserError, match="because it has no"):
            read(tmp_path)
    root = write_flickr(tmp_path / "flickr")
    for image in list((root / "flickr30k-images").iterdir())[:3]:
        image.unlink()
    with pytest.raises(UserError, match="3 of 6 images missing"):
        captions.flickr30k(root)


def test_captions_may_hold_every_sign_but_a_newline(tmp_path):
    odd = "a\u2028b\x85c\x0cd\x0be"
    root = write_flickr(tmp_path / "data", karpathy=False, caption=lambda n, k: f"{odd} {n}")
    found = captions.flickr30k(root)
    assert set(found.texts) == {f"{odd} {n}" for n in range(6)}


def test_captions_that_are_no_unicode_text(tmp_path):
    root = write_flickr(tmp_path / "data", caption=lambda n, k: f"cup HALF {n}, {k}")
    file = root / "dataset_flickr30k.json"
    file.write_text(file.read_text().replace("HALF", "\\ud83d"))
    lines = []
    found = captions.flickr30k(root, log=lines.append)
    assert found.texts[0] == "cup \ufffd 0, 0"
    assert lines[0].startswith("flickr30k: 12 texts held")
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json, 0\.jpg: 'cup"):
        captions.flickr30k(root, strict=True)


def test_damaged_images_are_left_out_and_remembered(tmp_path, monkeypatch):
    root = write_flickr(tmp_path / "data")
    path = root / "flickr30k-images" / "1.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    lines, cache = [], tmp_path / "cache"
    found = captions.flickr30k(root, cache=cache, log=lines.append)
    check(found)
    assert len(found.images) == 5
    assert "1 of 6 images left out (0 without a file, 1 that cannot be decoded" in lines[0]
    with pytest.raises(UserError, match=r"1 image cannot be decoded, .*1\.jpg"):
        captions.flickr30k(root, cache=cache, strict=True)
    monkeypatch.setattr("rcml_jax.data.imagetext.decode_problems", None)  # nothing is decoded anew
    assert len(captions.flickr30k(root, cache=cache, log=lines.append).images) == 5
    monkeypatch.undo()
    path.write_bytes(whole)
    assert len(captions.flickr30k(root, cache=cache).images) == 6


def test_the_state_of_a_picture_changes_with_its_file(tmp_path):
    root = write_flickr(tmp_path / "data")
    images = captions.flickr30k(root).images
    before = image_states(images)
    (root / "flickr30k-images" / "2.jpg").write_bytes(jpeg(200))
    after = image_states(images)
    assert [a != b for a, b in zip(before, after, strict=True)] == [0, 0, 1, 0, 0, 0]

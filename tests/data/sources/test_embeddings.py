"""Pairs of embeddings: files, splits, projections."""

import numpy as np
import pytest

from rcml_jax.data.sources.embeddings import Pairs, project_to_narrower, read_npz, split_pairs
from rcml_jax.errors import UserError


def pairs(images=10, texts=25, widths=(6, 6), seed=0):
    rng = np.random.default_rng(seed)
    image, text = (
        rng.normal(size=(n, d)).astype(np.float32)
        for n, d in zip((images, texts), widths, strict=True)
    )
    return Pairs(image, text, np.arange(texts) % images)


def test_a_file_comes_back_as_it_was_saved(tmp_path):
    made = pairs(widths=(6, 4))
    names = ("image", "text", "image_of_text")
    np.savez(tmp_path / "x.npz", **dict(zip(names, made.arrays(), strict=True)))
    for a, b in zip(read_npz(tmp_path / "x.npz").arrays(), made.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_such_file_is_said(tmp_path):
    made = pairs()
    np.save(tmp_path / "one.npy", made.image)
    np.savez(tmp_path / "two.npz", image=made.image, text=made.text)
    objects = np.array([{}, {}], object)
    np.savez(tmp_path / "pickle.npz", image=objects, text=made.text, image_of_text=made.text)
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = (tmp_path / "two.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "three.npz", image=made.image, text=made.text, image_of_text=made.text)
    header = (tmp_path / "three.npz").read_bytes().replace(b"{'descr", b"{'de\0cr")
    (tmp_path / "header.npz").write_bytes(header)
    for name, message in {
        "header.npz": r"is no \.npz file",
        "absent.npz": "there is no file",
        "one.npy": "holds one array",
        "two.npz": "lacks the array 'image_of_text'",
        "pickle.npz": "holds pickled objects",
        "text.npz": r"is no \.npz file",
        "empty.npz": r"is no \.npz file",
        "cut.npz": r"is no \.npz file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_npz(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_parts_share_no_image_and_keep_their_texts():
    whole = pairs(images=20, texts=50)
    parts = split_pairs(whole, (0.6, 0.2, 0.2), seed=1)
    assert [len(part.image) for part in parts] == [12, 4, 4]
    assert sum(len(part.text) for part in parts) == 50
    for part in parts:
        for row, text in zip(part.image_of_text, part.text, strict=True):
            (place,) = np.flatnonzero((whole.text == text).all(axis=1))
            np.testing.assert_array_equal(part.image[row], whole.image[whole.image_of_text[place]])
    rows = [tuple(row) for part in parts for row in part.image.tolist()]
    assert len(set(rows)) == 20
    again = split_pairs(whole, (0.6, 0.2, 0.2), seed=1)
    np.testing.assert_array_equal(parts[2].text, again[2].text)
    assert not np.array_equal(parts[2].image, split_pairs(whole, (0.6, 0.2, 0.2), seed=2)[2].image)


@pytest.mark.parametrize("widths", [(8, 5), (5, 8)])
def test_the_wider_side_is_projected_by_an_orthonormal_basis(widths):
    whole = pairs(widths=widths)
    narrow = project_to_narrower(whole, seed=3)
    assert narrow.image.shape[1] == narrow.text.shape[1] == 5
    name = "image" if widths[0] > widths[1] else "text"
    other = "text" if name == "image" else "image"
    assert getattr(narrow, other) is getattr(whole, other)
    # Vectors in the span of the basis keep their length.
    basis = np.linalg.lstsq(getattr(whole, name), getattr(narrow, name), rcond=None)[0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-4)
    np.testing.assert_array_equal(
        getattr(project_to_narrower(whole, seed=3), name), getattr(narrow, name)
    )


def test_equal_widths_stay():
    whole = pairs()
    assert project_to_narrower(whole, seed=0) is whole

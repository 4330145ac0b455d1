"""Classification data that is whole or not, its splits and modalities, and stratified folds."""

import dataclasses

import numpy as np
import pytest

from rcml_jax.data.classification import ClassificationData, Modality, stratified_folds
from rcml_jax.errors import UserError


def make(**changes):
    rng = np.random.default_rng(0)
    data = ClassificationData(
        name="toy",
        modalities=(
            Modality("mrna", "table", rng.normal(size=(9, 4)).astype(np.float32)),
            Modality("text", "text", tuple(f"sample {i}" for i in range(9))),
            Modality("mirna", "table", rng.normal(size=(9, 2)).astype(np.float32)),
        ),
        labels=np.array([0, 1, 2, 0, 1, 2, 0, 1, 0], np.int32),
        label_names=("zero", "one", "two"),
        split=np.array([0, 0, 0, 2, 2, 0, 0, 1, 2], np.int8),
    )
    return dataclasses.replace(data, **changes)


def test_whole_data_is_valid():
    data = make()
    assert data.validate() is data
    assert (len(data), data.classes) == (9, 3)
    # Without a validation split, too; and test may lack a class.
    make(split=np.array([0, 0, 0, 2, 2, 0, 0, 0, 2], np.int8)).validate()


def test_rows_are_those_of_the_split_in_order():
    data = make()
    found = {split: data.rows(split).tolist() for split in ("train", "validation", "test")}
    assert found == {"train": [0, 1, 2, 5, 6], "validation": [7], "test": [3, 4, 8]}
    assert make(split=np.zeros(9, np.int8)).rows("test").size == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modalities": (*make().modalities[:2], Modality("mirna", "table", np.zeros((8, 2))))},
            r"toy: mirna has 8 rows, but there are 9 labels; every modality needs one row a sample",
        ),
        (
            {"labels": np.array([0, 1, 2, 0, -1, 2, 0, 1, 0])},
            r"toy: sample 4 has the label -1, outside 0 to 2",
        ),
        (
            {"labels": np.array([0, 1, 2, 0, 1, 2, 0, 1, 3])},
            r"toy: sample 8 has the label 3, outside 0 to 2",
        ),
        ({"split": np.full(9, 2, np.int8)}, r"toy has no train samples"),
        ({"split": np.full(9, 0, np.int8)}, r"toy has no test samples"),
        (
            {"labels": np.array([0, 0, 2, 0, 1, 2, 0, 1, 0])},
            r"toy: no training sample has the class 'one'; give one, or drop the class",
        ),
    ],
)
def test_what_is_not_whole_is_named(changes, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        make(**changes).validate()


def test_select_takes_modalities_in_the_given_order():
    data = make()
    found = data.select(["mirna", "mrna"])
    assert [m.name for m in found.modalities] == ["mirna", "mrna"]
    assert found.modalities[1] is data.modalities[0]
    assert found.labels is data.labels
    assert found.validate().select(["mirna"]).modalities == found.modalities[:1]
    assert len(data.modalities) == 3


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["mrna", "image"], "mrna,image"), (["text", "text"], "text,text"), ([], ""), ([""], "")],
)
def test_select_names_what_there_is(names, shown):
    expected = rf"^config\.data\.modalities='{shown}': toy has the modalities mrna, text, mirna; "
    with pytest.raises(UserError, match=expected):
        make().select(names)


@pytest.mark.parametrize("folds", [2, 5])
@pytest.mark.parametrize("sizes", [(17, 3, 1, 40), (5, 5, 5), (1, 1, 1, 1, 1, 1, 1), (6,)])
def test_folds_are_even_in_every_class_and_in_all(sizes, folds):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    fold = stratified_folds(labels, folds, seed=3)
    assert fold.shape == labels.shape
    assert set(fold.tolist()) <= set(range(folds))
    for label in range(len(sizes)):
        assert np.ptp(np.bincount(fold[labels == label], minlength=folds)) <= 1
    assert np.ptp(np.bincount(fold, minlength=folds)) <= 1


def test_folds_are_a_function_of_labels_and_seed():
    labels = np.arange(60) % 4
    fold = stratified_folds(labels, 5, seed=0)
    np.testing.assert_array_equal(fold, stratified_folds(labels, 5, seed=0))
    assert np.any(fold != stratified_folds(labels, 5, seed=1))
    # Samples of a class are dealt at random, not in order.
    assert np.any(np.diff(fold[labels == 0]) % 5 != 1)

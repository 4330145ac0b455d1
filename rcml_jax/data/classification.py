"""Labelled samples of several modalities, split into train, validation and test."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rcml_jax.data.relation_graph import SPLITS
from rcml_jax.errors import UserError

#: A word of a class's name or a text: a run of letters.
WORD = re.compile(r"[^\W\d_]+")
_EMPTY_WORDS = {"and", "of", "the", "or", "with"}


@dataclasses.dataclass(frozen=True, eq=False)
class Modality:
    """One view of every sample.

    values: a float32 array (n, features) for a table, n strings for text, and for images an
    `ItemImages` of n images.
    """

    name: str
    kind: Literal["table", "image", "text"]
    values: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationData:
    """n samples: their modalities, `labels` (n,) int32 and `split` (n,) int8, indices into SPLITS.

    A data set without a declared validation split has no sample there.
    """

    name: str
    modalities: tuple[Modality, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.label_names)

    def rows(self, split: str) -> np.ndarray:
        """The samples of a split, in order."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def select(self, names: Sequence[str]) -> "ClassificationData":
        """The same samples with the named modalities, in the given order; UserError for others."""
        known = {modality.name: modality for modality in self.modalities}
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) < len(names) or not names:
            raise UserError(
                f"config.data.modalities={','.join(names)!r}: {self.name} has the modalities "
                f"{', '.join(known)}; name one or more of them, each once, with commas between"
            )
        return dataclasses.replace(self, modalities=tuple(known[name] for name in names))

    def validate(self) -> "ClassificationData":
        """The data itself if it is whole.

        Raises:
          UserError: modalities of different lengths, labels out of range, an empty train or test
            split, or a class that train lacks.
        """
        for modality in self.modalities:
            if len(modality.values) != len(self):
                raise UserError(
                    f"{self.name}: {modality.name} has {len(modality.values)} rows, but there are "
                    f"{len(self)} labels; every modality needs one row a sample"
                )
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.classes))
        if outside.size:
            raise UserError(
                f"{self.name}: sample {outside[0]} has the label {self.labels[outside[0]]}, "
                f"outside 0 to {self.classes - 1}"
            )
        for split in ("train", "test"):
            if not len(self.rows(split)):
                raise UserError(f"{self.name} has no {split} samples")
        absent = np.setdiff1d(np.arange(self.classes), self.labels[self.rows("train")])
        if absent.size:
            raise UserError(
                f"{self.name}: no training sample has the class {self.label_names[absent[0]]!r}; "
                "give one, or drop the class"
            )
        return self


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold (n,) of each sample: every class is dealt over the folds as evenly as it can be."""
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), np.int64)
    start = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # The next class goes on where this one ended, so that the folds are of one size.
        fold[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return fold


def word_stems(text: str) -> set[str]:
    """The stems of a text's words; "and", "of", "the", "or" and "with" are left out."""
    return {stem(word) for word in WORD.findall(text)} - _EMPTY_WORDS


def stem(word: str) -> str:
    """What a word has in common with its plural: "Dresses" and "dress" give "dress"."""
    word = re.sub(r"ies$", "y", word.casefold())
    return re.sub(r"(?<=[^s])s$", "", word).removesuffix("e")

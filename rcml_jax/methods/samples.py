"""Classification data made ready for training: splits, tokenizer, images, batches."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from rcml_jax.data import food101, n24news, omics, openmoji_groups
from rcml_jax.data.batches import EpochSampler, batch_iterator
from rcml_jax.data.classification import ClassificationData
from rcml_jax.data.degrade import drop_words, hide_patches
from rcml_jax.data.images import ImageBank, augment
from rcml_jax.data.text import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods.task import cache_directory, work_tokenizer
from rcml_jax.models.backbones import encoder_config
from rcml_jax.models.bert import max_text_length

SOURCES = ("openmoji", "rosmap", "brca", "n24news", "food101")


def load_data(data: Any) -> ClassificationData:
    """The data that `config.data` names, with the modalities that it names.

    Raises UserError for an unknown source or modality, and whatever the source finds wrong.
    """
    cache = cache_directory(data.dir)
    if data.name == "openmoji":
        found = openmoji_groups.load(cache, split_seed=data.split_seed)
    elif data.name in ("rosmap", "brca"):
        found = omics.load(data.name, cache, directory=data.path or _copy(data.dir, data.name))
    elif data.name == "n24news":
        found = n24news.load(data.path, text=data.text, strict=data.strict)
    elif data.name == "food101":
        found = food101.load(data.path, strict=data.strict, seed=data.split_seed)
    else:
        raise UserError(
            f"config.data.name={data.name!r} is unknown; choose one of {', '.join(SOURCES)}"
        )
    return found.select(data.modalities.split(",")) if data.modalities else found


def _copy(directory: str, name: str) -> str:
    """`config.data.dir` itself where it is a local copy of a MOGONET data set, else ""."""
    root = pathlib.Path(directory)
    places = (root, root / name.upper())
    found = directory and any((place / "labels_tr.csv").is_file() for place in places)
    return directory if found else ""


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationTask:
    """What the method needs of its data: inputs of rows by modality, and training batches.

    The input of a table is (features,), of images (uint8 pixels,), of text (ids, mask).
    """

    config: Any
    data: ClassificationData
    tokenizer: Tokenizer | None
    banks: dict[str, ImageBank]
    max_length: int

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "ClassificationTask":
        """Prepare or open the data; fit the tokenizer, or read the one in the work directory."""
        model = config.model
        data = load_data(config.data)
        kinds = {modality.kind for modality in data.modalities}
        tokenizer, max_length, image_size = None, model.max_length, model.image_size
        if "text" in kinds:
            tokenizer = work_tokenizer(
                pathlib.Path(workdir),
                lambda: _texts(data),
                model.text_pretrained,
                model.vocab_size,
                kind="BERT or RoBERTa",
            )
            if model.text_pretrained:
                sizes = encoder_config(model.text_pretrained, modality="text")
                max_length = min(max_length, max_text_length(sizes))
        if "image" in kinds and model.image_pretrained:
            image_size = encoder_config(model.image_pretrained, modality="image").image_size
        banks = {
            m.name: ImageBank(m.values, image_size) for m in data.modalities if m.kind == "image"
        }
        return cls(config, data, tokenizer, banks, max_length)

    def inputs(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, tuple]:
        """The arrays of rows (n,) by modality.

        With a generator they are augmented and degraded at random, for training; without, degraded
        in a way that depends on the row alone.
        """
        return {
            modality.name: self._input(modality, rows, rng) for modality in self.data.modalities
        }

    def _input(self, modality: Any, rows: np.ndarray, rng: np.random.Generator | None) -> tuple:
        if modality.kind == "table":
            return (modality.values[rows],)
        if modality.kind == "image":
            return (self._images(modality.name, rows, rng),)
        share = self.config.data.words_dropped
        texts = [modality.values[row] for row in rows]
        if share:
            noise = [rng or self._noise(row) for row in rows]
            texts = [drop_words(t, r, share=share) for t, r in zip(texts, noise, strict=True)]
        return self.tokenizer.encode(texts, self.max_length)

    def _images(self, name: str, rows: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        pictures, config = self.banks[name](rows), self.config
        if rng is not None and (config.batch.image_shift or config.batch.image_flip):
            pictures = augment(
                pictures, rng, shift=config.batch.image_shift, flip=config.batch.image_flip
            )
        share, patch = config.data.patches_hidden, config.data.patch_size
        if not share:
            return pictures
        if rng is not None:
            return hide_patches(pictures, rng, share=share, patch=patch)
        one = functools.partial(hide_patches, share=share, patch=patch)
        hidden = [one(p[None], self._noise(row)) for p, row in zip(pictures, rows, strict=True)]
        return np.concatenate(hidden)

    def _noise(self, row: int) -> np.random.Generator:
        return np.random.default_rng((self.config.data.split_seed, int(row)))

    @functools.cached_property
    def sampler(self) -> EpochSampler:
        """The plans of training batches."""
        return EpochSampler(self.data.rows("train"), self.config.batch.size, self.config.seed)

    def batches(self) -> Any:
        """The grain iterator over training batches."""

        def collate(plan: dict) -> dict:
            rows = plan["rows"]
            return {
                "items": self.inputs(rows, np.random.default_rng(plan["noise"])),
                "shared": {
                    "rows": rows.astype(np.int32),
                    "valid": plan["valid"],
                    "labels": self.data.labels[rows],
                },
            }

        return batch_iterator(self.sampler, collate, self.config.data.threads)


def _texts(data: ClassificationData) -> list[str]:
    rows = data.rows("train")
    return [m.values[row] for m in data.modalities if m.kind == "text" for row in rows]

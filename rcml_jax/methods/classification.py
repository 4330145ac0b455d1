"""Classification data made ready for training: splits, tokenizer, images, batches."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse

from rcml_jax.data.classification import ClassificationData, Modality, stratified_folds
from rcml_jax.data.images import (
    Framing,
    ImageBank,
    PatchesHidden,
    StoredPixels,
    augment,
    drop_words,
    drop_words_of_rows,
    hide_patches,
    hide_patches_of_rows,
)
from rcml_jax.data.relation_graph import SPLITS
from rcml_jax.data.sampling import EpochSampler, batch_iterator
from rcml_jax.data.sources import CLASSIFICATION_SOURCES
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.evaluation import class_controls, classification
from rcml_jax.evaluation.controls import LINEAR
from rcml_jax.methods.base import Metrics, Params, Rows
from rcml_jax.models.backbones import encoder_config
from rcml_jax.models.preprocessing import ImagePreprocessing, preprocessing_of
from rcml_jax.models.towers.bert import max_text_length
from rcml_jax.models.towers.efficientnet import NAME as EFFICIENTNET
from rcml_jax.ops.divided import CHUNK
from rcml_jax.tasks.frozen_embeddings import tower_embeddings
from rcml_jax.tasks.relations import (
    cache_directory,
    image_reader,
    load_source,
    tell_cut_texts,
    work_tokenizer,
)


def load_data(data: Any, workdir: pathlib.Path | None = None) -> ClassificationData:
    """The data that `config.data` names, with the modalities that it names.

    Raises UserError as `load_source`, and for an unknown modality.
    """
    found = load_source(data, CLASSIFICATION_SOURCES, ClassificationData, workdir)
    return found.select(data.modalities.split(",")) if data.modalities else found


def embedded(
    data: ClassificationData, config: Any, workdir: pathlib.Path | None = None
) -> ClassificationData:
    """The data with embeddings of the frozen `config.data.towers` in place of images and texts.

    They are tables then, computed once and kept beside the data sets: of images and texts that are
    degraded as those of the evaluation, in the same way in every epoch. Raises UserError as
    `tower_embeddings`.
    """
    if not config.data.towers:
        return data
    images = next((m.values for m in data.modalities if m.kind == "image"), None)
    texts = next((m.values for m in data.modalities if m.kind == "text"), None)
    if images is not None and config.data.patches_hidden:
        images = PatchesHidden(
            images,
            config.data.split_seed,
            share=config.data.patches_hidden,
            side=config.model.image_size // config.data.patch_size,
        )
    if texts is not None:
        texts = degraded_texts(config.data, texts, np.arange(len(data)))
    found = tower_embeddings(
        config.data.towers,
        images,
        texts,
        cache_directory(config.data.dir, workdir) / "embeddings",
        max_length=config.model.max_length,
    )
    modalities = [
        Modality(m.name, "table", found[m.kind]) if m.kind in found else m for m in data.modalities
    ]
    return dataclasses.replace(data, modalities=tuple(modalities))


def degraded_texts(
    options: Any,
    texts: Sequence[str],
    rows: Sequence[int] | np.ndarray,
    rng: np.random.Generator | None = None,
) -> list[str]:
    """The texts of rows (n,) without a share of their words, `config.data.words_dropped`.

    options: `config.data`. Without a generator the words depend on the row alone.
    """
    share, found = options.words_dropped, [texts[row] for row in rows]
    if not share:
        return found
    if rng is None:
        return drop_words_of_rows(found, rows, options.split_seed, share=share)
    return [drop_words(text, rng, share=share) for text in found]


def image_preprocessing_of(model: Any) -> ImagePreprocessing | None:
    """What the image checkpoint of `config.model` asks of its images, if one is named."""
    name = model.image_pretrained
    asked = (name, "vit") if name and name != EFFICIENTNET else None
    return preprocessing_of(model, image=asked)["image"]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationTask:
    """Classification data for a method: inputs by modality, and training batches.

    The input of a table is (features,), that of images (uint8 pixels,), that of text (ids, mask).
    texts: the texts of each text modality, also where `data` has frozen embeddings of them.
    """

    config: Any
    data: ClassificationData
    tokenizer: Tokenizer | None
    banks: dict[str, ImageBank | StoredPixels]
    max_length: int
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "ClassificationTask":
        """Prepare or open the data; fit the tokenizer, or read the one in the work directory."""
        model = config.model
        loaded = load_data(config.data, workdir)
        texts = {m.name: m.values for m in loaded.modalities if m.kind == "text"}
        data = embedded(loaded, config, workdir)
        kinds = {modality.kind for modality in data.modalities}
        tokenizer, max_length, framing = None, model.max_length, Framing(model.image_size)
        if "text" in kinds:
            new = not (pathlib.Path(workdir) / "tokenizer.json").is_file()
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
            if new:
                for modality in data.modalities:
                    if modality.kind == "text":
                        tell_cut_texts(modality.values, tokenizer, max_length)
        if "image" in kinds and model.image_pretrained:
            size = encoder_config(model.image_pretrained, modality="image").image_size
            framing = image_preprocessing_of(model) or Framing(size)
        size = framing.size
        if "image" in kinds and config.data.patches_hidden and size % config.data.patch_size:
            raise UserError(
                f"config.data.patch_size={config.data.patch_size} does not divide the images of "
                f"{size} pixels; choose another"
            )
        cache = cache_directory(config.data.dir, workdir)
        banks = {
            m.name: image_reader(config.data, f"{data.name}-{m.name}", m.values, framing, cache)
            for m in data.modalities
            if m.kind == "image"
        }
        return cls(config, data, tokenizer, banks, max_length, texts)

    def inputs(
        self,
        rows: np.ndarray,
        rng: np.random.Generator | None = None,
        mine: np.ndarray | None = None,
    ) -> dict[str, tuple]:
        """The arrays of rows (n,) by modality.

        With a generator, for training, they are augmented and degraded at random. Without one they
        are degraded in a way that depends on the row only. mine: indices into the rows, of whose
        inputs there are these alone; other images are not read.
        """
        mine = np.arange(len(rows)) if mine is None else mine
        return {
            modality.name: self._input(modality, rows, rng, mine)
            for modality in self.data.modalities
        }

    def _input(
        self, modality: Any, rows: np.ndarray, rng: np.random.Generator | None, mine: np.ndarray
    ) -> tuple:
        if modality.kind == "table":
            return (modality.values[rows[mine]],)
        if modality.kind == "image":
            return (self._images(modality.name, rows, rng, mine),)
        # All texts: the longest sets the length, and words are lost one text after the other.
        assert self.tokenizer is not None  # there is one wherever there are texts
        texts = degraded_texts(self.config.data, modality.values, rows, rng)
        ids, mask = self.tokenizer.encode(texts, self.max_length)
        return ids[mine], mask[mine]

    def _images(
        self, name: str, rows: np.ndarray, rng: np.random.Generator | None, mine: np.ndarray
    ) -> np.ndarray:
        part, rows = (len(rows), mine), rows[mine]
        images, config = self.banks[name](rows), self.config
        if rng is not None and (config.batch.image_shift or config.batch.image_flip):
            images = augment(
                images, rng, part, shift=config.batch.image_shift, flip=config.batch.image_flip
            )
        share, patch = config.data.patches_hidden, config.data.patch_size
        if not share:
            return images
        if rng is not None:
            return hide_patches(images, rng, part, share=share, patch=patch)
        return hide_patches_of_rows(images, rows, config.data.split_seed, share=share, patch=patch)

    @functools.cached_property
    def sampler(self) -> EpochSampler:
        """The plans of training batches."""
        return EpochSampler(self.data.rows("train"), self.config.batch.size, self.config.seed)

    def batches(self, local_rows: Rows | None = None) -> Any:
        """The grain iterator over training batches; local_rows: as of `Method.batches`."""
        for bank in self.banks.values():
            if isinstance(bank, StoredPixels):
                bank.open()  # Before the first step, so that a full disk is told at the start.

        def collate(plan: dict) -> dict:
            rows = plan["rows"]
            mine = None if local_rows is None else local_rows(len(rows))
            return {
                "items": self.inputs(rows, np.random.default_rng(plan["noise"]), mine),
                "shared": {
                    "rows": rows.astype(np.int32),
                    "valid": plan["valid"],
                    "labels": self.data.labels[rows],
                },
            }

        data = self.config.data
        return batch_iterator(self.sampler, collate, data.threads, data.get("workers", 0))


def _texts(data: ClassificationData) -> list[str]:
    rows = data.rows("train")
    return [m.values[row] for m in data.modalities if m.kind == "text" for row in rows]


# Figures of a classification method: looks during training, `eval.json` at the end.


_NOISE_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that are trained together.

    names: name of each model; reported: indices of the models trained on the whole training split;
    validation: index of a model → rows of the data held out from it, by which it is selected.
    """

    names: tuple[str, ...]
    reported: tuple[int, ...]
    validation: Mapping[int, np.ndarray]


class Classifier(Protocol):
    """The interface between `report` and a method; arrays have a leading axis of models."""

    config: Any
    task: ClassificationTask
    kinds: Mapping[str, str]
    evaluated: str

    @property
    def steps(self) -> int:
        """The number of steps to train."""
        ...

    @property
    def validate_every(self) -> int:
        """The number of steps between two validations."""
        ...

    def models(self) -> Models:
        """The models trained together."""
        ...

    def embeddings(self, params: Params, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Embeddings (models, n, d) of rows by modality."""
        ...

    def encode_inputs(self, params: Params, name: str, inputs: tuple) -> np.ndarray:
        """Embeddings (models, n, d) of given inputs of one modality."""
        ...

    def classify_all(self, params: Params, embeddings: dict) -> dict:
        """Probabilities (models, n, classes) by head, "fused" and the modalities'."""
        ...


def look(method: Classifier, params: Params) -> Metrics:
    """Measures of every model on the test split and, where it has one, its validation split.

    "accuracy" is the mean on validation; 0 where no model has a validation split.
    """
    models, data = method.models(), method.task.data
    probabilities = _Predictions(method, params, _asked(method)).fused
    found: dict[str, dict] = {}
    for index, name in enumerate(models.names):
        splits = {"test": data.rows("test")}
        if index in models.validation:
            splits["validation"] = models.validation[index]
        found[name] = {
            split: classification.measures(probabilities(index, rows), data.labels[rows])
            for split, rows in splits.items()
        }
    accuracies = [look["validation"]["accuracy"] for look in found.values() if "validation" in look]
    return {"accuracy": float(np.mean(accuracies)) if accuracies else 0.0, "look": found}


class _Predictions:
    """Embeddings and probabilities of some rows, looked up by row."""

    def __init__(self, method: Classifier, params: Params, rows: np.ndarray):
        self._place = np.full(len(method.task.data), -1)
        self._place[rows] = np.arange(len(rows))
        self.embeddings = method.embeddings(params, rows)
        found = method.classify_all(params, self.embeddings)
        self.heads = {name: np.asarray(x) for name, x in found.items()}

    def fused(self, model: int, rows: np.ndarray) -> np.ndarray:
        return self.heads["fused"][model, self._place[rows]]

    def head(self, name: str, model: int, rows: np.ndarray) -> np.ndarray:
        return self.heads[name][model, self._place[rows]]


def _asked(method: Classifier) -> np.ndarray:
    parts = [method.task.data.rows("test"), *method.models().validation.values()]
    return np.unique(np.concatenate(parts))


def report(
    method: Classifier, params: Params, split: str, history: Sequence[Mapping[str, float]]
) -> Metrics:
    """The content of `eval.json`: protocols from the looks, analyses from the checkpoint."""
    models, data, config = method.models(), method.task.data, method.config
    result: Metrics = {
        "method": config.method,
        "dataset": data.name,
        "split": split,
        "protocol": _protocol(method),
    }
    if split == "test":
        looks = _looks(history, models)
        held_out = [models.names[index] for index in models.validation]
        reported = [models.names[index] for index in models.reported]
        result["classification"] = classification.protocols(
            looks, trained_on_all=reported, held_out=held_out
        )
        if held_out:
            result["validation"] = classification.validation(looks, held_out)
    rows, indices = _rows_of(models, data, split)
    predictions = _Predictions(method, params, np.unique(np.concatenate(list(rows.values()))))

    def over_models(head: str) -> dict:
        return classification.summarize(
            [
                classification.measures(predictions.head(head, p, rows[p]), data.labels[rows[p]])
                for p in indices
            ]
        )

    result["checkpoint"] = {"which": method.evaluated} | over_models("fused")
    heads = [name for name in predictions.heads if name != "fused"]
    if heads:
        result["unimodal"] = {name: over_models(name) for name in heads}
    if len(indices) > 1 and split != "validation":
        mean = np.mean([predictions.fused(p, rows[p]) for p in indices], axis=0)
        result["ensemble"] = classification.summarize(
            [classification.measures(mean, data.labels[rows[indices[0]]])]
        )
    if split == "test":
        result |= _analyses(method, params, predictions, indices)
        result["controls"] = control_rows(method.task)
        result["gain_over_best_control"] = class_controls.gain(result, result["controls"])
    result["predictions"] = _arrays(models, predictions, rows, data)
    return result


def _rows_of(models: Models, data: Any, split: str) -> tuple[dict[int, np.ndarray], list[int]]:
    """The rows that each model is asked for on a split, and the models that are asked."""
    if split != "validation":
        return {p: data.rows(split) for p in models.reported}, list(models.reported)
    if not models.validation:
        raise UserError("there is no validation split; evaluate --split=test")
    return dict(models.validation), list(models.validation)


def _protocol(method: Classifier) -> dict:
    data, config, models = method.task.data, method.config, method.models()
    counts = {split: len(data.rows(split)) for split in ("train", "validation", "test")}
    chosen = "the declared validation split"
    if not counts["validation"]:
        chosen = f"one of {config.data.folds} stratified folds of train, held out from a second run"
    return {
        "samples": counts,
        "classes": list(data.label_names),
        "modalities": dict(method.kinds),
        "seeds": config.seeds,
        "models": list(models.names),
        "validation": chosen if models.validation else "none",
        "steps": method.steps,
        "looks": f"one every {method.validate_every} steps of {method.steps}",
        **classification.PROTOCOLS,
    }


def _looks(history: Sequence[Mapping[str, float]], models: Models) -> list[dict]:
    """Flat validation lines → model → split → measure."""
    looks = []
    for line in history:
        look: dict = {}
        for name, value in line.items():
            parts = name.split("/")
            if parts[0] == "look":
                _, model, split, measure = parts
                look.setdefault(model, {}).setdefault(split, {})[measure] = value
        looks.append(look)
    if not looks or set(looks[-1]) != set(models.names):
        raise UserError(
            "metrics.jsonl, which holds the looks at validation and test, is missing or of another "
            "run; restore it, or train anew in another --workdir"
        )
    return looks


def _arrays(
    models: Models, predictions: _Predictions, rows: dict[int, np.ndarray], data: Any
) -> dict[str, np.ndarray]:
    """rows/, labels/ and the predicted class by head, for each model."""
    found = {}
    for index, asked in rows.items():
        name = models.names[index]
        found[f"{name}/rows"], found[f"{name}/labels"] = asked, data.labels[asked]
        for head in predictions.heads:
            probabilities = predictions.head(head, index, asked)
            found[f"{name}/{head}"] = np.argmax(probabilities, axis=1).astype(np.int32)
    return found


def _analyses(
    method: Classifier, params: Params, predictions: _Predictions, indices: Sequence[int]
) -> dict:
    """Confidence on noise, and accuracy with one modality replaced by it.

    Noise is Gaussian with the mean and variance of the training split: of each column of a table,
    each channel of the pixels, each dimension of a text encoder's output.
    """
    data = method.task.data
    test = data.rows("test")
    noise = noise_inputs(method, params, len(test))
    clean = {n: x[:, predictions._place[test]] for n, x in predictions.embeddings.items()}

    def classified(embeddings: dict) -> np.ndarray:
        return np.asarray(method.classify_all(params, embeddings)["fused"])

    top = classified(noise)
    confidences = [classification.confidence(top[p]) for p in indices]
    result = {"random_inputs": classification.summarize(confidences)}
    if len(noise) > 1:
        corrupted = {name: classified({**clean, name: noise[name]}) for name in noise}
        result["corrupted"] = {
            name: classification.summarize(
                [classification.measures(x[p], data.labels[test]) for p in indices]
            )
            for name, x in corrupted.items()
        }
    return result


def noise_inputs(method: Classifier, params: Params, count: int) -> dict[str, np.ndarray]:
    """Embeddings (models, count, d) of Gaussian noise in place of each modality."""
    task = method.task
    rng = np.random.default_rng(task.config.data.split_seed)
    train = task.data.rows("train")
    rows = rng.choice(train, min(len(train), _NOISE_ROWS), replace=False)
    noise = {}
    if "text" in method.kinds.values():
        encoded = method.embeddings(params, rows)
    for modality in task.data.modalities:
        name = modality.name
        if modality.kind == "text":
            mean, spread = encoded[name].mean(1, keepdims=True), encoded[name].std(1, keepdims=True)
            shape = (len(mean), count, mean.shape[-1])
            noise[name] = (mean + spread * rng.standard_normal(shape)).astype(np.float32)
            continue
        if modality.kind == "table":
            x = modality.values[rows]
            drawn = rng.normal(x.mean(axis=0), x.std(axis=0), (count, x.shape[1]))
            noise[name] = method.encode_inputs(params, name, (drawn.astype(x.dtype),))
            continue
        parts = _noise_images(rng, *_pixel_statistics(task, name, rows), count)
        found = [method.encode_inputs(params, name, (pixels,)) for pixels in parts]
        noise[name] = np.concatenate(found, axis=1)[:, :count]
    return noise


def _pixel_statistics(
    task: ClassificationTask, name: str, rows: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """The shape of an image, and mean and deviation (channels,) over all pixels of rows."""
    levels, counts, shape = np.arange(256), np.zeros(()), ()
    for start in range(0, len(rows), CHUNK):
        pixels = task.inputs(rows[start : start + CHUNK])[name][0]
        shape = pixels.shape[1:]
        channels = pixels.reshape(-1, shape[-1]).T
        counts = counts + [np.bincount(channel, minlength=256) for channel in channels]
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    return shape, mean, np.sqrt(np.sum(shares * (levels - mean[:, None]) ** 2, axis=1))


def _noise_images(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    mean: np.ndarray,
    spread: np.ndarray,
    count: int,
) -> Iterator[np.ndarray]:
    """Gaussian noise as images (n, H, W, c) uint8, `count` in all; zeros fill up the last part."""
    size = min(count, CHUNK)
    for start in range(0, count, size):
        pixels = np.zeros((size, *shape), np.uint8)
        drawn = rng.normal(mean, spread, (min(size, count - start), *shape))
        pixels[: len(drawn)] = drawn.round().clip(0, 255)
        yield pixels


# Controls: what is reached without the method, on the same splits.


_LINEAR_ROWS = 10_000  # most training samples of a linear control
_TOKENS = 4096  # most tokens whose presence is a feature
_FIELDS = 16  # an image is averaged to so many fields a side


def control_rows(task: ClassificationTask) -> dict[str, dict]:
    """Measures of each control by name (see `controls.label_of`), under the method's paths.

    The largest class; where there are texts, the class whose words stand in them; and logistic
    regression on the modalities' plain features, together and on each alone. Its penalty is chosen
    on validation, or on a fold of train where there is none.
    """
    data = task.data
    train, validation, test = (data.rows(split) for split in SPLITS)
    splits = test, validation
    share = lambda rows: class_controls.majority(data.labels[train], data.classes, len(rows))  # noqa: E731
    found = {"majority": tuple(share(rows) for rows in splits)}
    if task.texts:
        rule = functools.partial(
            class_controls.class_word_probabilities,
            names=data.label_names,
            labels=data.labels[train],
        )
        found["class_words"] = tuple(rule(_joined_texts(task, rows)) for rows in splits)
    found |= _linear_controls(task)
    return {
        name: class_controls.row(
            *(
                classification.measures(probabilities, data.labels[rows]) if len(rows) else None
                for probabilities, rows in zip(on_splits, splits, strict=True)
            )
        )
        for name, on_splits in found.items()
    }


def _joined_texts(task: ClassificationTask, rows: np.ndarray) -> list[str]:
    """All texts of each row, as the model is given them."""
    parts = [degraded_texts(task.config.data, texts, rows) for texts in task.texts.values()]
    return [" ".join(texts) for texts in zip(*parts, strict=True)]


def _linear_controls(task: ClassificationTask) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Probabilities on test and validation of logistic regression, together and by modality."""
    data, options = task.data, task.config.data
    train, validation, test = (data.rows(split) for split in SPLITS)
    if len(train) > _LINEAR_ROWS:
        rng = np.random.default_rng(options.split_seed)
        train = np.sort(rng.choice(train, _LINEAR_ROWS, replace=False))
    rows = np.concatenate([train, validation, test])
    ends = np.cumsum([len(train), len(validation)])
    features, labels = plain_features(task, rows, len(train)), data.labels[rows]
    chosen = {LINEAR + name: [x] for name, x in features.items()}
    if len(features) > 1:
        chosen = {LINEAR.rstrip("_"): list(features.values())} | chosen
    found = {}
    for name, parts in chosen.items():
        x = np.concatenate(parts, axis=1)
        (fit, held_out, asked), (y, y_held_out, _) = np.split(x, ends), np.split(labels, ends)
        penalties: Sequence[float] = class_controls.PENALTIES
        if not len(validation):
            fold = stratified_folds(y, max(2, min(options.folds, len(y))), options.split_seed)
            kept, left = ((fit[mine], y[mine]) for mine in (fold != 0, fold == 0))
            _, penalty = class_controls.linear_probabilities(kept, left, [], data.classes)
            penalties = [penalty]
        (on_test, on_validation), _ = class_controls.linear_probabilities(
            (fit, y), (held_out, y_held_out), [asked, held_out], data.classes, penalties=penalties
        )
        found[name] = on_test, on_validation
    return found


def plain_features(
    task: ClassificationTask, rows: np.ndarray, fitted: int
) -> dict[str, np.ndarray]:
    """What a linear model is given of rows (n,) by modality, (n, features) float32.

    The columns of a table; the mean colours of an image's fields; and whether a text has each of
    the tokens that most of the first `fitted` rows have, which are those of training. Images and
    texts are degraded as those of the evaluation are.
    """
    found: dict[str, list] = {name: [] for name in (m.name for m in task.data.modalities)}
    for start in range(0, len(rows), CHUNK):
        for name, values in task.inputs(rows[start : start + CHUNK]).items():
            if len(values) == 2:
                found[name].append(_token_presence(*values, task.tokenizer))
            else:
                found[name].append(_fields(values[0]) if values[0].ndim == 4 else values[0])
    result = {}
    for name, parts in found.items():
        if scipy.sparse.issparse(parts[0]):
            present = scipy.sparse.vstack(parts).tocsc()
            count = np.asarray(present[:fitted].sum(axis=0)).ravel()
            kept = np.sort(np.argsort(-count, kind="stable")[: min(_TOKENS, np.sum(count > 1))])
            result[name] = present[:, kept].toarray()
        else:
            result[name] = np.concatenate(parts)
    return result


def _token_presence(ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Any:
    """Whether each text has each token, (n, tokens) sparse float32."""
    row, column = np.nonzero(mask)
    pairs = np.unique(np.stack([row, ids[row, column]]), axis=1)
    shape = (len(ids), tokenizer.vocab_size)
    return scipy.sparse.csr_array((np.ones(pairs.shape[1], np.float32), tuple(pairs)), shape=shape)


def _fields(images: np.ndarray) -> np.ndarray:
    """Mean colours of at most 16 × 16 fields of (n, H, W, 3) images, (n, features) float32."""
    edges = [np.unique(np.arange(_FIELDS) * side // _FIELDS) for side in images.shape[1:3]]
    sums = np.add.reduceat(images.astype(np.float32), edges[0], axis=1)
    sums = np.add.reduceat(sums, edges[1], axis=2)
    sizes = [np.diff([*e, side]) for e, side in zip(edges, images.shape[1:3], strict=True)]
    area = (sizes[0][:, None] * sizes[1][None])[None, :, :, None]
    return (sums / area).reshape(len(images), -1)

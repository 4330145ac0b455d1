"""M3CoL (arXiv 2409.17777): classification with a mixup-contrastive, then a soft-target loss."""

import copy
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcml_jax.errors import UserError
from rcml_jax.losses.clip import clip
from rcml_jax.losses.m3co import m3co
from rcml_jax.losses.multi_soft_clip import multi_soft_clip
from rcml_jax.methods.base import Batch, Method, Metrics, Params, Rows, same_shapes
from rcml_jax.methods.classification import (
    ClassificationTask,
    Models,
    image_preprocessing_of,
    look,
    report,
)
from rcml_jax.models.backbones import build_backbone, encoder_config, load_encoder
from rcml_jax.models.m3col import SCALINGS, M3CoL, TableEncoder
from rcml_jax.models.preprocessing import check_tokenizer, set_statistics, with_preprocessing
from rcml_jax.models.towers.bert import small_bert_config
from rcml_jax.models.towers.efficientnet import STATISTICS
from rcml_jax.models.towers.vit import small_vit_config
from rcml_jax.ops import mixup
from rcml_jax.ops.divided import CHUNK, divided
from rcml_jax.ops.similarity import l2_normalize

# M3CoL's model as the configuration describes it, small or with pretrained encoders.


_PRETRAINED = {"image": "image_pretrained", "text": "text_pretrained"}
#: The parts of a modality that another run may have learned.
_LEARNED = "encoders", "projections"


def build_model(config: Any, task: ClassificationTask) -> M3CoL:
    """An encoder for each modality of the data, projections where asked for, and the classifiers.

    Raises UserError for sizes that do not fit: a contrastive loss needs embeddings of one width.
    """
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    encoders: dict[str, nn.Module] = {}
    projections: dict[str, nn.Module] = {}
    width = model.get("projection", 0)
    widths: dict[str, int] = {}
    for modality in task.data.modalities:
        if modality.kind == "table":
            encoders[modality.name] = TableEncoder((model.width,) * 2, model.dropout, dtype)
            widths[modality.name] = model.width
        else:
            sizes = _transformer(modality.kind, model, task)
            encoders[modality.name] = build_backbone(sizes, dtype, model.remat)
            widths[modality.name] = width or sizes.hidden_size
            if width:
                projections[modality.name] = nn.Dense(width, use_bias=False, dtype=dtype)
    if width and not projections:
        raise UserError(
            "config.model.projection maps embeddings of images and texts, which these data have "
            "not; set it to 0"
        )
    if len(set(widths.values())) > 1 and config.loss.contrastive != "none":
        tables = any(modality.kind == "table" for modality in task.data.modalities)
        common = model.width if tables else 256
        raise UserError(
            f"the encoders' embeddings have different widths ({widths}), which cannot be "
            f"contrasted; project those of images and texts (config.model.projection={common}), "
            "take encoders of one width, or set config.loss.contrastive=none"
        )
    several = len(encoders) > 1
    return M3CoL(
        encoders,
        classes=task.data.classes,
        hidden=(model.hidden or model.width,) * (model.classifier_layers - 1),
        # The only modality's own classifier would be the fusion classifier twice.
        unimodal=several and config.loss.unimodal_weight > 0,
        dropout=model.dropout,
        dtype=dtype,
        projections=projections,
    )


def _transformer(kind: str, model: Any, task: ClassificationTask) -> Any:
    """The configuration of an image or text encoder: a checkpoint's, or a small one."""
    name = model[_PRETRAINED[kind]]
    if name:
        found = encoder_config(name, modality=kind)
        if kind == "image":
            set_statistics(found, image_preprocessing_of(model))
        else:
            assert task.tokenizer is not None  # there is one wherever there are texts
            check_tokenizer(name, found, task.tokenizer)
        return found
    sizes = {"width": model.width, "layers": model.layers, "heads": model.heads}
    if kind == "image":
        return small_vit_config(
            **sizes,
            image_size=model.image_size,
            patch_size=model.patch_size,
            dropout=model.dropout,
        )
    assert task.tokenizer is not None  # there is one wherever there are texts
    return small_bert_config(
        **sizes,
        vocab_size=task.tokenizer.vocab_size,
        pad_token_id=task.tokenizer.pad_id,
        max_length=model.max_length,
        dropout=model.dropout,
    )


def load_pretrained_parts(config: Any, kinds: Mapping[str, str], params: Params) -> Params:
    """Replace the parameters of encoders for which a checkpoint is named."""
    for name, kind in kinds.items():
        checkpoint = config.model[_PRETRAINED[kind]] if kind in _PRETRAINED else ""
        if checkpoint:
            _, found = load_encoder(checkpoint, modality=kind)
            params = {**params, f"encoders_{name}": jax.tree.map(jnp.asarray, found)}
    return params


class M3CoLMethod(Method):
    """`config.method="m3col"`: one model on data with a validation split.

    L = β · contrastive + Σ_m CE(y, ŷ^(m)) + CE(y, ŷ) (Eq. 16).
    """

    family = "classification"
    selection = "accuracy"
    prepares = True

    def __init__(self, config: Any, task: ClassificationTask):
        self.config, self.task = config, task
        self.names = tuple(modality.name for modality in task.data.modalities)
        self.kinds: Mapping[str, str] = {m.name: m.kind for m in task.data.modalities}
        several = len(self.names) > 1
        self.contrastive = config.loss.contrastive if several else "none"
        if not config.loss.contrastive_weight:
            self.contrastive = "none"
        #: Which modalities are mixed before the encoder; the others' embeddings are mixed.
        self.mixed_inputs = tuple(
            name
            for name, kind in self.kinds.items()
            if kind != "text" and config.mixup.place == "input"
        )
        #: Whether encoders are not trained; they have no dropout then.
        self.freezes = config.model.get("freeze", "") == "encoders"
        #: Modalities whose encoders begin with random values, but for `sources`.
        self._random = [
            name
            for name, kind in self.kinds.items()
            if kind not in _PRETRAINED or not config.model[_PRETRAINED[kind]]
        ]
        if self.freezes and self._random and not self.sources:
            raise UserError(
                f"config.model.freeze=encoders leaves the encoder of {', '.join(self._random)} at "
                "its random values; name trained runs in config.model.init_from, or train it"
            )
        self.model = build_model(config, task)
        heads = self.names if self.model.unimodal else ()
        self.absent = [f"encoders_{name}" for name in _PRETRAINED if name not in self.names]
        self.absent += [f"heads_{name}" for name in _PRETRAINED if name not in heads]
        projected = self.model.projections
        self.absent += [f"projections_{name}" for name in _PRETRAINED if name not in projected]
        self.embed_all = jax.jit(self._embed_all)
        self.encode_alone = jax.jit(self.encode, static_argnums=1)
        self.classify_all = jax.jit(self._classify_all)

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "M3CoLMethod":
        """One model on the data that `config.data` names."""
        return cls(config, ClassificationTask.load(config, workdir))

    @classmethod
    def completed(cls, config: Any) -> Any:
        """With the preprocessing that the image checkpoint's files ask for."""
        model = config.model
        if not model.get("image_pretrained", "") or "preprocessing" not in model:
            return config
        found = {"image": image_preprocessing_of(model), "pooling": ""}
        return with_preprocessing(config, found)

    @property
    def steps(self) -> int:
        """`config.steps`, or the number of steps in `config.epochs`."""
        return self.config.steps or self.config.epochs * self.task.sampler.per_epoch

    @property
    def validate_every(self) -> int:
        """`config.validate_every`, or the number of steps in `config.validate_epochs`."""
        config = self.config
        return config.validate_every or config.validate_epochs * self.task.sampler.per_epoch

    def phases(self) -> "list[tuple[int, M3CoLMethod]]":
        """By default M3Co for the first int(steps/3) steps, then MultiSClip."""
        if self.contrastive != "scheduled":
            return [(0, self)]
        first, second = copy.copy(self), copy.copy(self)
        first.contrastive, second.contrastive = "m3co", "multi_soft_clip"
        switch = int(self.steps * self.config.loss.m3co_share + 1e-9)
        return [(0, first), (switch, second)] if switch else [(0, second)]

    def batches(self, local_rows: Rows | None = None) -> Any:
        """The grain iterator over training batches."""
        return self.task.batches(local_rows)

    @property
    def sources(self) -> tuple[str, ...]:
        """Work directories, with commas between: one run may have the images, one the texts."""
        return tuple(filter(None, self.config.model.get("init_from", "").split(",")))

    def joined(self, found: Params, other: Params) -> Params:
        """A run that has an encoder brings its projection, or that there is none."""
        stale = {f"projections_{name}" for name in self.names if f"encoders_{name}" in other}
        return {**{name: x for name, x in found.items() if name not in stale}, **other}

    def adopt(self, params: Params, found: Params) -> Params:
        """Take the encoders that other runs have, with their projections where both sides have one.

        Of an encoder that several runs have, the last's. Raises UserError where sizes differ, there
        is none, or one is frozen at random values.
        """
        path = f"config.model.init_from={self.config.model.init_from}"
        parts = {f"{part}_{name}": name for part in _LEARNED for name in self.names}
        theirs = {part: found[part] for part in parts if part in found and part in params}
        missing = [name for name in self.names if f"encoders_{name}" not in theirs]
        if not theirs or (self.freezes and set(missing) & set(self._random)):
            raise UserError(
                f"{path} has no encoder of {', '.join(missing)}; name runs of "
                "config.method=m3col that have one, with commas between"
            )
        for part, values in theirs.items():
            if not same_shapes(params[part], values):
                raise UserError(
                    f"{path}: its {part.partition('_')[0].removesuffix('s')} of {parts[part]} has "
                    "other sizes than this run's; give the same model options and config.seeds "
                    "to both"
                )
        return {**params, **jax.tree.map(jnp.asarray, theirs)}

    def init(self, key: jax.Array, batch: Batch, keep: jax.Array | None = None) -> Params:
        """Random parameters, pretrained encoders where they are named, and the tables' scaling.

        keep: (samples,) bool, the rows of the data that the scaling may see; all of train if None.
        """
        first = jax.tree.map(lambda x: x[:1], batch["items"])
        params = self.model.init(key, first)["params"]
        params = load_pretrained_parts(self.config, self.kinds, params)
        data = self.task.data
        rows = data.rows("train")
        keep = jnp.ones(len(data), bool) if keep is None else keep
        scaling = SCALINGS[self.config.model.get("scaling", "range")]
        for modality in data.modalities:
            if modality.kind == "table":
                low, span = scaling(jnp.asarray(modality.values[rows]), keep[rows])
                part = f"encoders_{modality.name}"
                params = {**params, part: {**params[part], "low": low, "range": span}}
        return jax.tree.map(jnp.asarray, params)

    def frozen(self, params: Params) -> Any:
        """True for frozen encoders, the scaling of tables and the statistics of batch norm."""

        def fixed(path: tuple, _: jax.Array) -> bool:
            scaling = path[-1].key in STATISTICS or path[1].key in ("low", "range")
            return path[0].key.startswith("encoders_") and (self.freezes or scaling)

        return jax.tree_util.tree_map_with_path(fixed, params)

    # One training step

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Draw λ and the partners, and mix inputs where mixup is at the input (Eq. 2–3)."""
        # The classifiers' dropout is drawn in the objective, which is given no key.
        shared = batch["shared"] | {"dropout": jax.random.fold_in(key, 2)}
        if not self._mixes:
            return {**batch, "shared": shared}
        options, items = self.config.mixup, dict(batch["items"])
        valid = shared["valid"]
        key = jax.random.fold_in(key, 1)
        draw, *keys = jax.random.split(key, 1 + len(self.names))
        if options.labels:
            keys = keys[:1] * len(self.names)  # A label has one partner.
        coefficient = mixup.coefficients(
            draw, len(valid), alpha=options.alpha, fraction=options.fraction
        )
        partner = [mixup.partners(k, len(valid), where=valid) for k in keys]
        for index, name in enumerate(self.names):
            if name in self.mixed_inputs:
                # Partners' pixels come from other devices as the bytes that they are.
                others = jax.tree.map(lambda x, rows=partner[index]: x[rows], items[name])
                own, others = (self._floats(name, x) for x in (items[name], others))
                items[f"{name} mixed"] = mixup.mix_with(own, others, coefficient)
        return {
            "items": items,
            "shared": shared | {"coefficient": coefficient, "partner": jnp.stack(partner, axis=1)},
        }

    @property
    def _mixes(self) -> bool:
        return self.config.mixup.labels or self.contrastive == "m3co"

    def _floats(self, name: str, inputs: tuple) -> tuple:
        if self.kinds[name] != "image":
            return inputs
        return (self.model.encoders[name].normalize(inputs[0]),)

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """Raw embeddings by modality, (n, d): "clean", and "mixed" for mixed inputs."""
        items = batch["items"]
        encode = functools.partial(self._encode, params, key=key)
        mixed = self.mixed_inputs if self._mixes else ()
        # Vanilla mixup classifies mixed samples alone.
        clean = [n for n in self.names if not (self.config.mixup.labels and n in mixed)]
        return {
            "clean": {n: encode(n, items[n]) for n in clean},
            "mixed": {n: encode(n, items[f"{n} mixed"]) for n in mixed},
        }

    def _encode(self, params: Params, name: str, inputs: tuple, *, key: jax.Array) -> jax.Array:
        if self.freezes:
            part = f"encoders_{name}"
            fixed = jax.lax.stop_gradient(params[part])
            return self.encode({**params, part: fixed}, name, inputs)
        found: Any = self.model.apply(
            {"params": params}, name, inputs, deterministic=False, rngs={"dropout": key},
            method="encode",
        )  # fmt: skip
        return found

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Eq. 16 over the whole batch, in one of the phases."""
        del progress  # The loss changes with the phase alone.
        config, shared = self.config, batch["shared"]
        valid, labels = shared["valid"], shared["labels"]
        clean, mixed = embedded["clean"], dict(embedded["mixed"])
        if self._mixes:
            for index, name in enumerate(self.names):
                if name not in mixed:
                    mixed[name] = mixup.mix(
                        clean[name], shared["coefficient"], shared["partner"][:, index]
                    )
        targets = jax.nn.one_hot(labels, self.task.data.classes, dtype=jnp.float32)
        if config.mixup.labels:
            targets = mixup.mix(targets, shared["coefficient"], shared["partner"][:, 0])
        seen = mixed if config.mixup.labels else clean
        logits: Any = self.model.apply(
            {"params": params}, seen, deterministic=False,
            rngs={"dropout": shared["dropout"]}, method="classify",
        )  # fmt: skip
        losses = {
            name: _mean(optax.losses.softmax_cross_entropy(x, targets), valid)
            for name, x in logits.items()
        }
        fused = losses.pop("fused")
        value = fused + config.loss.unimodal_weight * sum(losses.values(), start=jnp.float32(0))
        metrics = {"fused": fused} | losses
        if self.contrastive != "none":
            term = self._contrastive(clean, mixed, shared)
            value += config.loss.contrastive_weight * term
            metrics["contrastive"] = term
        hit = jnp.argmax(logits["fused"], axis=1).astype(labels.dtype) == labels
        return value, metrics | {"accuracy": _mean(hit.astype(jnp.float32), valid)}

    def _contrastive(self, clean: dict, mixed: dict, shared: dict) -> jax.Array:
        """The contrastive term of this phase."""
        z = [clean[name] for name in self.names]
        loss = self.config.loss
        options: dict[str, Any] = {"where": shared["valid"], "chunk_size": loss.chunk_size or None}
        if self.contrastive == "m3co":
            return m3co(
                z,
                [mixed[name] for name in self.names],
                shared["coefficient"],
                list(shared["partner"].T),
                temperature=loss.temperature,
                **options,
            )
        if self.contrastive == "multi_soft_clip":
            return multi_soft_clip(
                z,
                temperature=loss.soft_temperature,
                stop_gradient_targets=loss.stop_gradient_targets,
                **options,
            )
        # Twice the average of both directions, which is M3Co at λ = 1.
        pairs = itertools.combinations([l2_normalize(x) for x in z], 2)
        terms = (clip(a, b, temperature=loss.temperature, **options) for a, b in pairs)
        return 2 * sum(terms, start=jnp.float32(0))

    # Evaluation

    def encode(self, params: Params, name: str, inputs: tuple) -> jax.Array:
        """Embeddings (n, d) of one modality's inputs, without dropout."""
        found: Any = self.model.apply({"params": params}, name, inputs, method="encode")
        return found

    def probabilities(self, params: Params, embeddings: dict) -> dict[str, jax.Array]:
        """Class probabilities (n, classes) by head, "fused" and the modalities'."""
        logits = self.model.apply({"params": params}, embeddings, method="classify")
        return jax.tree.map(jax.nn.softmax, logits)

    def _embed_all(self, params: Params, inputs: dict) -> dict:
        """Embeddings by modality with a leading axis of models, of which there is one."""
        return {n: self.encode(params, n, inputs[n])[None] for n in self.names}

    def _classify_all(self, params: Params, embeddings: dict) -> dict:
        one = self.probabilities(params, {name: x[0] for name, x in embeddings.items()})
        return {name: x[None] for name, x in one.items()}

    def models(self) -> Models:
        """One model, trained on the train split, with the declared validation split."""
        return Models((f"seed{self.config.seed}",), (0,), {0: self.task.data.rows("validation")})

    def embeddings(
        self, params: Params, rows: np.ndarray, embed: Callable | None = None
    ) -> dict[str, np.ndarray]:
        """Embeddings (models, n, d) of rows by modality."""
        chunk = len(rows) if "table" in self.kinds.values() else CHUNK
        found = divided(
            embed or self.embed_all,
            (params,),
            lambda indices: (indices, (self.task.inputs(rows[indices]),)),
            len(rows),
            axis=1,
            devices=self.devices,
            chunk=chunk,
        )
        return {name: found[name] for name in self.names}  # a tree's keys are sorted

    def encode_inputs(self, params: Params, name: str, inputs: tuple) -> np.ndarray:
        """Embeddings (models, n, d) of other inputs of one modality."""
        return np.asarray(self.encode_alone(params, name, inputs))[None]

    def validate(self, params: Params) -> Metrics:
        """Measures of every model on validation and test, and the mean validation accuracy."""
        return look(self, params)

    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """The three protocols and the analyses; what `eval.json` holds."""
        return report(self, params, split, history)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)

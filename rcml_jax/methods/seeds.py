"""Train several M3CoL models in one compiled step: one for each seed, or for each seed and fold."""

import copy
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.config import fold_seed, several_models
from rcml_jax.data.classification import stratified_folds
from rcml_jax.errors import UserError
from rcml_jax.methods.base import Batch, Method, Metrics, Params, Rows
from rcml_jax.methods.classification import Models, look, report
from rcml_jax.methods.m3col import M3CoLMethod


class SeedEnsemble(Method):
    """M3CoL models trained in one compiled step, every leaf of their parameters stacked.

    The seeds are `config.seed` and the ones after it. On data without a validation split there are
    two models of each seed. One is trained on the whole training split. The other is trained
    without a stratified fold of it, its validation split; seed s holds out fold s modulo their
    number. All models see the same batches. Initial values, mixing and dropout differ.
    """

    family = "classification"
    selection = "accuracy"
    prepares = True
    in_place = True

    def __init__(self, single: M3CoLMethod):
        self.single, self.config, self.task = single, single.config, single.task
        config, data = self.config, self.task.data
        self.kinds, self.absent = single.kinds, single.absent
        # Of data without a validation split even one seed is two models, which only the data tell.
        optimizer = config.optimizer
        error = several_models(
            config.parallel,
            optimizer.schedule,
            optimizer.clip_norm,
            config.accumulation,
            config.micro_batch,
        )
        if error:
            raise UserError(error)
        self._keep, seeds, self._models = _seed_models(config, data)
        self._seeds = jnp.asarray([fold_seed(seed) for seed in seeds], jnp.uint32)
        # Models with different best steps have no best checkpoint in common.
        self.evaluated = "latest" if len(self._models.names) > 1 else "best"
        self._encode = jax.jit(self._encode_ensemble, static_argnums=1)
        self.classify_all = jax.jit(jax.vmap(single.probabilities))

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> Method:
        """Build the models that `config.seeds` and `config.data.folds` ask for.

        A single model is returned as an `M3CoLMethod`.
        """
        single = M3CoLMethod.load(config, workdir)
        declared = len(single.task.data.rows("validation")) > 0
        alone = config.seeds == 1 and (declared or config.data.folds < 2)
        return single if alone else cls(single)

    @classmethod
    def completed(cls, config: Any) -> Any:
        """As one model alone."""
        return M3CoLMethod.completed(config)

    @property
    def steps(self) -> int:
        """As for a single model."""
        return self.single.steps

    @property
    def validate_every(self) -> int:
        """As for a single model."""
        return self.single.validate_every

    def batches(self, local_rows: Rows | None = None) -> Any:
        """The batches, which all models share."""
        return self.single.batches(local_rows)

    def phases(self) -> list[tuple[int, Method]]:
        """As for a single model."""
        found: list[tuple[int, Method]] = []
        for first, single in self.single.phases():
            phase: Any = copy.copy(self)
            phase.single = single
            found.append((first, phase))
        return found

    def init(self, key: jax.Array, batch: Batch) -> Params:
        """Each model's parameters from its own seed."""
        del key
        one = lambda seed, keep: self.single.init(jax.random.key(seed), batch, keep)  # noqa: E731
        return jax.vmap(one)(self._seeds, self._keep)

    @property
    def sources(self) -> tuple[str, ...]:
        """As for a single model."""
        return self.single.sources

    def joined(self, found: Params, other: Params) -> Params:
        """As of one model."""
        return self.single.joined(found, other)

    def adopt(self, params: Params, found: Params) -> Params:
        """As for a single model, each from that of its place. Raises UserError with folds, too."""
        if len(self._models.names) > len(self._models.reported):
            raise UserError(
                "config.model.init_from may bring encoders that have seen a held-out fold; set "
                "config.data.folds=0"
            )
        return self.single.adopt(params, found)

    def frozen(self, params: Params) -> Any:
        """As for a single model."""
        return self.single.frozen(params)

    def decayed(self, params: Params) -> Any:
        """As for a single model, whose arrays have one axis less."""
        return jax.tree.map(lambda p: p.ndim > 2, params)

    def loss(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Sum of the models' losses, whose gradient is that of each model; the mean is logged."""
        one = self._one(batch, key, progress)
        return _summed(*jax.vmap(one)(params, self._keep, self._seeds))

    def value_and_grad(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        """`loss` and its gradient; on a CPU one model after the other.

        On a CPU batched products are slower than single ones, and one model's arrays stay in the
        cache.
        """
        if (self.config.platform or jax.default_backend()) != "cpu":
            return super().value_and_grad(params, batch, key, progress)
        graded = jax.value_and_grad(self._one(batch, key, progress), has_aux=True)
        found, grads = jax.lax.map(lambda one: graded(*one), (params, self._keep, self._seeds))
        return _summed(*found), grads

    def _one(self, batch: Batch, key: jax.Array, progress: jax.Array) -> Callable:
        """The loss of one model of its parameters, rows and seed."""

        def one(params: Params, keep: jax.Array, seed: jax.Array) -> tuple[jax.Array, Metrics]:
            shared = batch["shared"]
            valid = shared["valid"] & keep[shared["rows"]]
            mine = {**batch, "shared": {**shared, "valid": valid}}
            return self.single.loss(params, mine, jax.random.fold_in(key, seed), progress)

        return one

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> Any:
        """Not used: `loss` is not split into two steps."""
        raise NotImplementedError("several models have one loss, not an embedding and an objective")

    def objective(self, params: Params, embedded: Any, batch: Batch, progress: jax.Array) -> Any:
        """Not used: `loss` is not split into two steps."""
        raise NotImplementedError("several models have one loss, not an embedding and an objective")

    # Evaluation

    def models(self) -> Models:
        """The models, those trained on all of train, and the validation rows of the others."""
        return self._models

    def _encode_ensemble(self, params: Params, name: str, inputs: tuple) -> jax.Array:
        return jax.vmap(lambda one: self.single.encode(one, name, inputs))(params)

    def embeddings(self, params: Params, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Embeddings (models, n, d) of rows by modality."""

        def embed(params: Params, inputs: dict) -> dict:
            return {n: self._encode(params, n, inputs[n]) for n in self.single.names}

        self.single.devices = self.devices
        return self.single.embeddings(params, rows, embed)

    def encode_inputs(self, params: Params, name: str, inputs: tuple) -> np.ndarray:
        """Embeddings (models, n, d) of given inputs of one modality."""
        return np.asarray(self._encode(params, name, inputs))

    def validate(self, params: Params) -> Metrics:
        """Measures of every model, and the mean validation accuracy."""
        return look(self, params)

    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """The three protocols and the analyses over all models."""
        return report(self, params, split, history)


def _summed(values: jax.Array, metrics: Metrics) -> tuple[jax.Array, Metrics]:
    """Losses and metrics of the models → the sum of the losses, and the means."""
    return jnp.sum(values), jax.tree.map(jnp.mean, {"loss": values, **metrics})


def _seed_models(config: Any, data: Any) -> tuple[jax.Array, list[int], Models]:
    """Rows that each model may train on, (models, samples) bool; its seed; and the models."""
    seeds = [config.seed + i for i in range(config.seeds)]
    everything = np.ones(len(data), bool)
    declared = data.rows("validation")
    if len(declared) or config.data.folds < 2:
        names = tuple(f"seed{seed}" for seed in seeds)
        indices = tuple(range(len(seeds)))
        validation = dict.fromkeys(indices, declared) if len(declared) else {}
        keep = jnp.asarray(np.stack([everything] * len(seeds)))
        return keep, seeds, Models(names, indices, validation)
    train = data.rows("train")
    if config.data.folds > len(train):
        raise UserError(
            f"config.data.folds={config.data.folds} is more than the {len(train)} training "
            "samples; lower it"
        )
    fold = np.full(len(data), -1)
    fold[train] = stratified_folds(data.labels[train], config.data.folds, config.data.split_seed)
    kept, validation = [everything] * len(seeds), {}
    for index, seed in enumerate(seeds, start=len(seeds)):
        held_out = fold == seed % config.data.folds
        kept.append(~held_out)
        validation[index] = np.flatnonzero(held_out)
    names = tuple(f"{fold}-seed{seed}" for fold in ("all", "held-out") for seed in seeds)
    models = Models(names, tuple(range(len(seeds))), validation)
    return jnp.asarray(np.stack(kept)), 2 * seeds, models

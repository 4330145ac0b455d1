"""The interface between the training loop and a method.

A new method is one file and one line in `methods.METHODS`."""

import abc
import copy
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.ops.split import split_embeddings

Params = Any
Batch = dict[str, Any]
Metrics = dict[str, Any]
#: Number of rows of a batch → the indices of those of this process's devices.
Rows = Callable[[int], np.ndarray]


def same_shapes(ours: Params, theirs: Params) -> bool:
    """Whether two trees of arrays have the same names and sizes."""
    first, second = (jax.tree.map(lambda x: x.shape, tree) for tree in (ours, theirs))
    return first == second


class Method(abc.ABC):
    """A model, a loss, its batches and its evaluation.

    A batch has two parts. The leaves of `items` have examples (or rows of several) on their leading
    axis and are split over the devices. Every device holds `shared` whole, but for `split_shared`.
    The loss has two steps, so that it is correct on any number of devices: `embed` sees each
    example alone, `objective` sees the embeddings of the whole batch. `prepare` runs before both,
    for work that needs all raw examples.
    """

    config: Any

    #: Family of its measures in `rcml_jax.evaluation.measures`, "relational" or "classification";
    #: "" for a method with measures of its own.
    family = ""
    #: The measure that early stopping maximises, a dotted path into what `validate` returns.
    selection: str
    #: The checkpoint to evaluate: "best" by the selection measure, or "latest"; "" for a method
    #: without parameters.
    evaluated = "best"
    #: Whether the method overrides `prepare`.
    prepares = False
    #: Arrays of a batch's `shared` whose last axis runs over the examples, such as (N, N) masks.
    #: `jit` and `fsdp` split that axis over the devices; the loop sets it to () for `pmap`.
    split_shared: Sequence[str] = ()
    #: Whether the state is donated (updated in place) on CPUs, too.
    in_place = False
    #: Parts of the model that the options leave out, for which a recipe may have learning rates.
    absent: Sequence[str] = ()
    #: Number of examples packed into one batch row.
    examples_per_row = 1
    #: Under `pmap` the name of the axis of devices, over which `embed` may divide what it makes of
    #: `shared`; see `over_axis`.
    axis_name = ""
    #: This process's devices, over which the evaluation may divide its work; the loop sets them.
    devices: Sequence[jax.Device] = ()

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "Method":
        """Build the method of a configuration, on the data that it names.

        workdir: where files are kept that must not change between runs, such as a tokenizer. This
        default needs neither data nor files.
        """
        del workdir
        return cls(config)

    @classmethod
    def completed(cls, config: Any) -> Any:
        """The configuration with what is read from checkpoints, to be kept in `config.json`."""
        return config

    @property
    def steps(self) -> int:
        """The number of steps to train."""
        return self.config.steps

    @property
    def validate_every(self) -> int:
        """The number of steps between two validations."""
        return self.config.validate_every

    @abc.abstractmethod
    def batches(self, local_rows: Rows | None = None) -> Any:
        """A grain iterator over batches (NumPy arrays) with `get_state` and `set_state`.

        local_rows: given where there are several processes; `items` then has these rows alone, and
        each array of `split_shared` the columns of their examples. The rest of `shared` is whole. A
        method that trains in one process only may leave the argument out.
        """

    @abc.abstractmethod
    def init(self, key: jax.Array, batch: Batch) -> Params:
        """Parameters, random or from a checkpoint.

        They must not depend on the values of `items` and of `split_shared`, which differ between
        processes.
        """

    @property
    def sources(self) -> tuple[str, ...]:
        """Work directories of other runs to start from (`config.model.init_from`)."""
        towers = self.config.get("model", {}).get("init_from", "")
        return (towers,) if towers else ()

    def joined(self, found: Params, other: Params) -> Params:
        """The parameters of some runs of `sources` with those of the next, which prevail."""
        return {**found, **other}

    def adopt(self, params: Params, found: Params) -> Params:
        """Initialise `params` from the parameters of the runs of `sources`, taken together."""
        del found
        return params

    def phases(self) -> "Sequence[tuple[int, Method]]":
        """Phases of the training with different losses: (first step, method), in order.

        Each phase is compiled by itself, so that no step computes the loss of another phase. All
        phases have the same parameters.
        """
        return [(0, self)]

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Change a batch by what needs all of its raw examples, such as mixup."""
        del key
        return batch

    @abc.abstractmethod
    def embed(self, params: Params, batch: Batch, key: jax.Array) -> Any:
        """Embeddings of `batch["items"]`, their rows on the leading axis of every leaf."""

    @abc.abstractmethod
    def objective(
        self, params: Params, embedded: Any, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The scalar loss of the whole batch and its terms; `progress` runs from 0 to 1.

        Use only `shared` of the batch: under `pmap`, `items` here are one device's part.
        """

    def loss(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The objective of the embedded batch: what one device, or sharded `jit`, computes."""
        batch = self.prepare(batch, key)
        embedded = split_embeddings(self.embed(params, batch, key))
        return self.objective(params, embedded, batch, progress)

    def over_axis(self, axis_name: str) -> "Method":
        """This method as it is embedded under `pmap`, each device its own part of the items."""
        method = copy.copy(self)
        method.axis_name = axis_name
        return method

    def value_and_grad(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        """`loss` and its gradient; override it where there is a faster way."""
        return jax.value_and_grad(self.loss, has_aux=True)(params, batch, key, progress)

    def frozen(self, params: Params) -> Any:
        """A tree of booleans like `params`: true where a parameter is not trained."""
        return jax.tree.map(lambda _: False, params)

    def decayed(self, params: Params) -> Any:
        """A tree of booleans like `params`: true where weights decay (matrices and up)."""
        return jax.tree.map(lambda p: p.ndim > 1, params)

    @abc.abstractmethod
    def validate(self, params: Params) -> Metrics:
        """Measures of the validation split, for `metrics.jsonl` and checkpoint selection."""

    @abc.abstractmethod
    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """The content of `eval.json`: figures and the protocol.

        history: the results of `validate` during training, in order, as flat names with slashes.
        Arrays under the key "predictions" are written to `predictions.npz` instead.
        """

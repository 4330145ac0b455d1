"""What the loop needs of a method; a new one is one file, and a line in `methods.METHODS`."""

import abc
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

Params = Any
Batch = dict[str, Any]
Metrics = dict[str, Any]


class Method(abc.ABC):
    """A model, a loss, its batches and its evaluation.

    A batch has two parts: `items`, whose leaves have the examples, or rows of so many, on their
    leading axis and are split over devices, and `shared`, which every device holds whole. The loss
    has two steps, so that it is right on any number of devices: `embed` looks at each example
    alone, `objective` at the embeddings of the whole batch. What must see all raw examples goes
    before both: `prepare`.
    """

    config: Any

    #: Which measures of `rcml_jax.evaluation.measures` it has: "relational" or "classification"; ""
    #: for those of its own.
    family = ""
    #: The measure that early stopping maximises, a dotted path into what `validate` returns.
    selection: str
    #: Which checkpoint is evaluated in the end: "best" by the selection measure, or "latest"; ""
    #: for a method without parameters.
    evaluated = "best"
    #: Whether `prepare` does anything.
    prepares = False
    #: Whether a step writes the new state over the old one on CPUs, too.
    in_place = False
    #: Of how many examples a row of a batch's items is.
    examples_per_row = 1

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "Method":
        """The method of a configuration, on the data that it names; here of that alone.

        workdir: for what has to stay the same from run to run, such as a tokenizer.
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
    def batches(self) -> Any:
        """A grain iterator over batches (NumPy arrays) with `get_state` and `set_state`."""

    @abc.abstractmethod
    def init(self, key: jax.Array, batch: Batch) -> Params:
        """Parameters, random or from a checkpoint."""

    def adopt(self, params: Params, found: Params) -> Params:
        """`params` with what another run's parameters can give them."""
        del found
        return params

    def phases(self) -> "list[tuple[int, Method]]":
        """(first step, method) of each part of the training whose loss is another, in order.

        Each is compiled by itself, so that no step computes the loss of another phase. All have the
        same parameters.
        """
        return [(0, self)]

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """The batch after what needs all of its raw examples, such as mixing them in pairs."""
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

        Of the batch only `shared` may be used: under `pmap` the items here are one device's part.
        """

    def loss(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The objective of the embedded batch: what one device, or sharded `jit`, computes."""
        batch = self.prepare(batch, key)
        return self.objective(params, self.embed(params, batch, key), batch, progress)

    def value_and_grad(
        self, params: Params, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        """`loss` and its gradient; to be overridden where there is a faster way to them."""
        return jax.value_and_grad(self.loss, has_aux=True)(params, batch, key, progress)

    def frozen(self, params: Params) -> Any:
        """A tree of booleans like `params`: true where a parameter is not trained."""
        return jax.tree.map(lambda _: False, params)

    def decayed(self, params: Params) -> Any:
        """A tree of booleans like `params`: true where AdamW decays, on matrices and larger."""
        return jax.tree.map(lambda p: p.ndim > 1, params)

    @abc.abstractmethod
    def validate(self, params: Params) -> Metrics:
        """The measures of the validation split that the loop writes and selects by."""

    @abc.abstractmethod
    def evaluate(
        self, params: Params, split: str = "test", history: Sequence[Metrics] = ()
    ) -> Metrics:
        """Everything that goes into `eval.json`, the protocol beside the figures.

        history: what `validate` returned in training, as flat names with slashes, in order. Arrays
        under the key "predictions" go into `predictions.npz` instead.
        """

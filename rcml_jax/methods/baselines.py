"""CLIP, SigLIP and UniCL on the same towers: self pairs, no relation."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.losses import LOSSES
from rcml_jax.methods.base import Batch, Metrics, Params
from rcml_jax.methods.relational import Embedder, RelationalMethod, flat_images, in_rows
from rcml_jax.methods.tower_tables import TowerTables
from rcml_jax.models.two_towers import build_towers, joint_width
from rcml_jax.ops.divided import Placement
from rcml_jax.registry import call, resolve
from rcml_jax.tasks.relations import RelationTask

_BIAS = -10.0  # SigLIP's initial bias: most pairs are negative.


class BaselineMethod(RelationalMethod):
    """`config.method="clip"`, "siglip" or "unicl" (labels: the classes of the data set).

    `config.loss.function` names another loss: one of `LOSSES`, or an import path.
    """

    def __init__(self, config: Any, task: RelationTask):
        super().__init__(config, task)
        self.contrast, self.takes = self._loss_function()
        self.model = build_towers(
            self.towers_config, self.dtype, config.model.remat, config.model.towers
        )
        self.scored = TowerTables(self, self.model)

    def init_params(self, key: jax.Array, batch: Batch) -> Params:
        """Random towers, and SigLIP's bias."""
        params = {"towers": self.model.init(key, *self.one_example(batch))["params"]}
        if "bias" in self.takes:
            params["bias"] = jnp.asarray(_BIAS, jnp.float32)
        return params

    def _loss_function(self) -> tuple[Callable[..., jax.Array], frozenset[str]]:
        """The loss of two towers, checked where it is the user's, and its keyword arguments.

        Only those that are filled in here.

        Raises UserError for one that has no `where`, the mask of items that fill up a batch.
        """
        # DeCLIP's is CLIP's, and more.
        name = self.config.loss.function
        option = "config.loss.function" if name else "config.method"
        own = self.config.method if self.config.method in LOSSES else "clip"
        found = resolve(name or own, LOSSES, option)
        wanted = (
            "a loss takes (text, image, *, where), (N, d) each and the mask of a batch's items, "
            "and returns a scalar"
        )
        try:
            takes = frozenset(inspect.signature(found).parameters)
        except ValueError as error:
            raise UserError(f"{option}={name!r} does not tell its arguments; {wanted}") from error
        if "where" not in takes:
            raise UserError(
                f"{option}={name!r} takes no argument where, the mask of a batch's items; add it"
            )

        def is_scalar(value: Any) -> bool:
            return isinstance(value, jax.Array) and value.shape == ()

        contrast = functools.partial(call, name, found, option, wanted, accepts=is_scalar)
        return contrast, takes & {"temperature", "where", "bias", "labels", "chunk_size"}

    def embed(self, params: Params, batch: Batch, key: jax.Array) -> dict:
        """Embeddings of the items by the towers, (N, d) each; (N/k, k, d) in rows of k texts."""
        del key  # The towers have no dropout.
        towers, items = self.stop_frozen(params)["towers"], batch["items"]
        out: Any = self.model.apply({"params": towers}, items["ids"], flat_images(items["images"]))
        return out | {"image": in_rows(out["image"], items["images"])}

    def objective(
        self, params: Params, embedded: dict, batch: Batch, progress: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The baseline's loss over all items of the batch; relations and pairs are not used."""
        del progress
        shared, config = batch["shared"], self.config
        options = {
            "temperature": self.temperature(params),
            "where": shared["valid"],
            "bias": params.get("bias"),
            "labels": shared["labels"],
            "chunk_size": config.loss.chunk_size or None,
        }
        # From rows of items to items.
        text, image = (x.reshape(-1, x.shape[-1]) for x in (embedded["text"], embedded["image"]))
        if config.loss.mask_related:
            options["where"] = self._unrelated(shared)
        return self.contrast(text, image, **{name: options[name] for name in self.takes}), {}

    def _unrelated(self, shared: dict) -> jax.Array:
        """(N, N) bool: the pairs that are positives, or related under no relation."""
        valid, labels = shared["valid"], shared["labels"]
        own = jnp.eye(len(valid), dtype=bool)
        if "labels" in self.takes:
            own |= (labels[:, None] == labels[None]) & (labels >= 0)[None]
        return valid[:, None] & valid[None] & (own | ~shared["related"])

    def tables(
        self,
        params: Params,
        items: np.ndarray,
        needed: np.ndarray | None = None,
        sentences: Sequence[str] | None = None,
    ) -> dict[str, RelationEmbeddings]:
        """ "plain", "sentence" and "added", as of `TowerTables`."""
        return self.scored.tables(params["towers"], items, needed, sentences)

    def own_embeddings(self, params: Params, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the towers."""
        table = self.tables(params, items)["plain"]
        return table.image[0], table.text[0]

    def embedder(
        self, params: Params, sentences: Sequence[str], devices: Sequence[jax.Device] = ()
    ) -> Embedder:
        """Embeddings of the towers; the sentence of a relation is appended to the text."""
        place = Placement(devices)
        towers, task = place.whole(params["towers"]), self.task

        def text(texts: Sequence[str]) -> np.ndarray:
            tokenizer, limit = task.tokenizer, task.max_length
            encoded = [tokenizer.encode(texts, limit)]
            encoded += [
                tokenizer.encode_with_suffix(texts, [sentence] * len(texts), limit)
                for sentence in sentences
            ]
            return np.stack([self.scored.text(towers, *padded, place) for padded in encoded])

        def image(pixels: np.ndarray) -> np.ndarray:
            return self.scored.images(towers, place.split(pixels))[None]

        width = joint_width(self.towers_config)
        shapes = {"text": (1 + len(sentences), width), "image": (1, width)}
        return Embedder(text, image, shapes, place.count)

    def describe(self) -> dict:
        """The scorings; each task reports the best of them."""
        tried = {f"{weight:g}": found for weight, found in self.scored.tried.items()}
        return {
            "plain": "the items alone; validity always in this way",
            "sentence": "the relation sentence appended to the text, cut at the tower's limit; not "
            "where the text tower's states are stored (config.model.store_frozen)",
            "added": "s(A, B) + w (s(h_E, A) + s(h_E, B)): for a query A the order of candidates "
            "by the query vector A + w h_E; w is the best on validation",
            "weights_on_validation": tried,
            "reported": "for retrieval and relation type the best of these on this split, all "
            "under variants",
        }

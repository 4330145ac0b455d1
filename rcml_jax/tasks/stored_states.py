"""Token states of frozen towers, computed once for all items of a task and kept on disk."""

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rcml_jax.data.images import Framing, ImageBank
from rcml_jax.data.stages import mapped_rows
from rcml_jax.errors import UserError
from rcml_jax.log import log_line
from rcml_jax.models.towers.transformer import TokenStates

_CHUNK = 64
#: Item numbers (n,) → what a tower takes of them, one row each.
Inputs = Callable[[np.ndarray], Any]


class StoredStates:
    """The token states of a frozen tower, in its own width, for items 0 to count − 1.

    Called with item numbers (n,) it returns their `TokenStates` as NumPy arrays. The states are in
    float16, within 0.1% of what the tower computes. All states are in a memory-mapped file, so that
    a batch costs a copy instead of a pass through the tower.
    """

    def __init__(
        self, path: pathlib.Path, apply: Callable[[Any], TokenStates], inputs: Inputs, count: int
    ):
        """Open the file, and compute the states that it lacks.

        apply: inputs → token states. Raises UserError where the file cannot be written.
        """
        # Of the layout alone nothing is computed: XLA leaves the tower out.
        layout = jax.jit(lambda x: apply(x)[1:])
        states = jax.jit(lambda x: apply(x).states.astype(np.float16))
        shape = jax.eval_shape(states, inputs(np.zeros(1, int))).shape[1:]
        self._layout = in_chunks(lambda rows: layout(inputs(rows)), 0, count)
        blocks = _Blocks(count, shape, lambda rows: states(inputs(rows)))
        if not path.is_file():
            size = count * int(np.prod(shape)) * 2 / 2**20
            log_line(f"Storing the token states of a frozen tower, {size:,.0f} MiB: {path}")
        self._states = mapped_rows(path, blocks, log=log_line)

    def __call__(self, items: np.ndarray) -> TokenStates:
        """The token states of items (n,)."""
        items = np.asarray(items)
        mask, pooled_index = self._layout
        return TokenStates(self._states[items], mask[items], pooled_index[items])


def text_inputs(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Inputs, bytes]:
    """Token ids of texts, all of one length, and a digest of them."""
    ids, _ = tokenizer.encode(texts, max_length)
    return ids.__getitem__, hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).digest()


def image_inputs(images: Any, framing: Framing) -> tuple[Inputs, bytes]:
    """Images of one size, none of which is kept in memory, and a digest of files and framing."""
    digest = hashlib.sha256(repr(framing).encode())
    for index in range(len(images)):
        digest.update(hashlib.sha256(images.encoded(index)).digest())
    return ImageBank(images, framing, cache_bytes=0), digest.digest()


def params_digest(params: Any) -> bytes:
    """A digest of a tree of arrays: names, shapes and numbers."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array)
    return digest.digest()


def check_storable(modalities: Sequence[str]) -> None:
    """Raise UserError where several processes would store the states of `modalities`."""
    if modalities and jax.process_count() > 1:
        raise UserError(
            "the states of frozen towers are stored by one process alone; set "
            "config.model.store_frozen=False"
        )


class _Blocks:
    """Rows as `stored_rows` takes them."""

    dtype: type = np.float16

    def __init__(self, count: int, shape: tuple[int, ...], rows: Callable[[np.ndarray], jax.Array]):
        self.shape, self._count, self._rows = shape, count, rows

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> np.ndarray:
        return in_chunks(self._rows, start, stop)


def in_chunks(function: Callable[[np.ndarray], Any], start: int, stop: int) -> Any:
    """A function of item numbers over chunks of one size, the last filled up."""
    parts = []
    for first in range(start, stop, _CHUNK):
        found = function(np.arange(first, first + _CHUNK).clip(max=stop - 1))
        parts.append([np.asarray(x)[: stop - first] for x in jax.tree.leaves(found)])
    joined = [np.concatenate(x) for x in zip(*parts, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(found), joined)

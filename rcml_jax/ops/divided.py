"""Embedding of many items, divided over the processes and the devices of each, and gathered."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

#: Items that a device embeds at a time.
CHUNK = 256
_AXIS = "items"


def divided(
    function: Callable[..., Any],
    constants: Sequence[Any],
    read: Callable[[np.ndarray], tuple[np.ndarray, Sequence[Any]]],
    count: int,
    *,
    axis: int = 0,
    devices: Sequence[jax.Device] = (),
    chunk: int = CHUNK,
) -> Any:
    """What `function(*constants, *inputs)` gives for items 0 to count − 1, as NumPy arrays.

    Every process calls this alike, reads and embeds its share of the items, and gets all results.

    function: the leaves of its result have items on `axis`; what is costly in it is jitted. read:
    indices (n,) → these indices in another order, and the inputs in that order. devices: those of
    this process; the inputs are split over them, unless their leading axes cannot be. chunk: the
    most items of a device at a time. All chunks have one size, the last item filling up the last.
    """
    processes, number = jax.process_count(), jax.process_index()
    over = max(len(devices), 1)
    share = -(-count // (processes * over))
    size = over * min(chunk, 1 << (share - 1).bit_length())
    place = Placement(devices)
    constants = place.whole(constants)
    out: Any = None
    for start in range(0, count, size * processes):
        indices = (start + number * size + np.arange(size)).clip(max=count - 1)
        indices, inputs = read(indices)
        found = jax.tree.map(np.asarray, function(*constants, *place.split(inputs)))
        if processes > 1:
            gathered = multihost_utils.process_allgather((indices.astype(np.int32), found))
            indices, found = gathered
        else:
            indices, found = jax.tree.map(lambda x: x[None], (indices, found))
        if out is None:
            out = jax.tree.map(lambda x: _empty(x[0], axis, count), found)
        # The process of an item's last occurrence decides; an item that fills up comes again.
        for part, rows in enumerate(indices):
            for whole, parts in zip(jax.tree.leaves(out), jax.tree.leaves(found), strict=True):
                whole[(slice(None),) * axis + (rows,)] = parts[part]
    return out


def _empty(part: np.ndarray, axis: int, count: int) -> np.ndarray:
    return np.empty((*part.shape[:axis], count, *part.shape[axis + 1 :]), part.dtype)


class Placement:
    """Arrays split over some devices of this process by their leading axis, or whole on each.

    Of one device or none they stay where they are. count: of the devices, 1 at least.
    """

    def __init__(self, devices: Sequence[jax.Device] = ()):
        self.count = max(len(devices), 1)
        if self.count == 1:
            return
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())

    def whole(self, tree: Any) -> Any:
        """A copy on each device."""
        return tree if self.count == 1 else jax.device_put(tree, self._whole)

    def split(self, tree: Any) -> Any:
        """Its part on each device, or all of it where the number of devices does not divide it."""
        if self.count == 1:
            return tree
        even = all(len(x) % self.count == 0 for x in jax.tree.leaves(tree))
        return jax.device_put(tree, self._split if even else self._whole)

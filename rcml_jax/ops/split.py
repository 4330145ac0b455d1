"""Where an array lies on several devices, inside a program that `jax.jit` splits over them."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def split_over_devices(x: jax.Array, axis: int) -> jax.Array:
    """x, split over the devices along an axis; its gradient is, too.

    As it is where the number of devices does not divide the axis, or the caller places arrays
    itself.
    """
    mesh = jax.typeof(x).sharding.mesh
    devices = math.prod(mesh.shape[name] for name in mesh.auto_axes)
    if devices == 1 or x.shape[axis] % devices:
        return x
    split = PartitionSpec(*[None] * axis, mesh.auto_axes)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, split))


def split_embeddings(embedded: Any) -> Any:
    """A tree of embeddings, split by examples, their leading axis.

    Between towers and loss: a loss that splits its arrays otherwise, as by features, would else
    have the compiler do so in the towers' last layers, and gather whole embeddings for it.
    """
    return jax.tree.map(lambda x: split_over_devices(x, 0), embedded)

"""Where an array lies on several devices, inside a program that `jax.jit` splits over them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def device_count(x: Any) -> int:
    """The number of devices over which the compiler may split an array; 1 for one of NumPy."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in mesh.auto_axes)


def split_over_devices(x: jax.Array, axis: int) -> jax.Array:
    """x, split over the devices along an axis; its gradient is, too.

    As it is where the number of devices does not divide the axis, or the caller places arrays
    itself.
    """
    mesh, devices = jax.typeof(x).sharding.mesh, device_count(x)
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


def rows_beside(split: jax.Array, whole: jax.Array, devices: int, axis_name: str = "") -> jax.Array:
    """Rows (n, ...) split over devices, each device's share of rows (m, ...) behind its own.

    Nothing is sent for it where all devices hold the m rows. The number of devices divides n; the
    last of the m rows is repeated until it divides them, too. axis_name: the axis of devices under
    `pmap`, where n counts this device's rows. `own_rows` and `shared_rows` take them apart.
    """
    spare = [(0, -len(whole) % devices)] + [(0, 0)] * (whole.ndim - 1)
    shares = jnp.pad(whole, spare, mode="edge").reshape(devices, -1, *whole.shape[1:])
    if axis_name:
        return jnp.concatenate([split, shares[jax.lax.axis_index(axis_name)]])
    joined = jnp.concatenate([split.reshape(devices, -1, *split.shape[1:]), shares], axis=1)
    return split_over_devices(joined.reshape(-1, *joined.shape[2:]), 0)


def own_rows(x: jax.Array, n: int, devices: int, axis_name: str = "") -> jax.Array:
    """What was made of the n rows of `rows_beside`, split over the devices."""
    if axis_name:
        return x[:n]
    own = x.reshape(devices, -1, *x.shape[1:])[:, : n // devices]
    return split_over_devices(own.reshape(n, *x.shape[1:]), 0)


def shared_rows(x: jax.Array, n: int, m: int, devices: int, axis_name: str = "") -> jax.Array:
    """What was made of the m rows of `rows_beside`, all of them on every device."""
    if axis_name:
        return jax.lax.all_gather(x[n:], axis_name, tiled=True)[:m]
    shares = x.reshape(devices, -1, *x.shape[1:])[:, n // devices :]
    return shares.reshape(-1, *x.shape[1:])[:m]

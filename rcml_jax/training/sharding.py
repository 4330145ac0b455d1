"""One step on one device or many: `pmap`, or `jit` with sharded batches and optionally state."""

import collections
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.errors import ProcessLost, UserError
from rcml_jax.log import counted

_T = TypeVar("_T")

AXIS = "data"
#: The axis that a state is split over where it is not split over all devices.
_STATE_AXIS = "fsdp"
# Smaller arrays are not worth their part of a collective.
_SMALLEST_SPLIT = 1024


def initialize_distributed() -> None:
    """Join the other processes where the environment says that there are some.

    JAX's own variables (JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID), Slurm
    and Open MPI jobs of several tasks and TPU pods are recognised; anything else is one process.
    """
    env = os.environ
    tasks = int(env.get("SLURM_NTASKS", env.get("OMPI_COMM_WORLD_SIZE", "1")))
    several_hosts = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    if env.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                "whole numbers too"
            ) from error
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
    elif tasks > 1 or several_hosts:
        jax.distributed.initialize()


def is_primary() -> bool:
    """Whether this process is the one that writes what all processes share."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Where there are several processes, wait until each has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; where there are several, each has to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather(value: _T) -> list[_T]:
    """The values of all processes, in their order; where there are several, each has to ask.

    Values are dictionaries by name, lists, texts, numbers, None and arrays, which become NumPy's.
    Raises ProcessLost where another process has ended.
    """
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(msgpack_serialize(jax.device_get([value])), np.uint8)
    try:
        sizes = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
        # Few lengths, as each is compiled: eight between two powers of two.
        step = max(1024, 1 << max(0, int(sizes.max() - 1).bit_length() - 3))
        padded = np.zeros(-(-int(sizes.max()) // step) * step, np.uint8)
        padded[: len(own)] = own
        found = multihost_utils.process_allgather(padded)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(
            "another process has ended, or cannot be reached; see its message, and start the same "
            "command again in all of them to go on"
        ) from error
    rows = zip(found, sizes, strict=True)
    return [msgpack_restore(row[:size].tobytes())[0] for row, size in rows]


def everywhere(work: Callable[[], _T]) -> _T:
    """What `work` returns in this process; every process has to call this.

    Where it raises in one of them, all raise: the others a UserError with the same sentence.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    said = gather(None if failure is None else _sentence(failure))
    if failure is not None:
        raise failure
    for sentence in filter(None, said):
        raise UserError(sentence)
    return result  # type: ignore[return-value]


def _sentence(failure: Exception) -> str:
    if isinstance(failure, UserError):
        return str(failure)
    return f"process {jax.process_index()} failed ({type(failure).__name__}); see its message"


def on_primary(work: Callable[[], _T]) -> _T | None:
    """As `everywhere`, but the primary process alone works; the others get None."""
    return everywhere(lambda: work() if is_primary() else None)


def primary_first(work: Callable[[], _T]) -> _T:
    """As `everywhere`, but the primary works first: it makes files that the others find made."""
    first = on_primary(work)
    return everywhere(lambda: first if is_primary() else work())  # type: ignore[return-value]


def pick_devices(platform: str = "", count: int = 0) -> list[jax.Device]:
    """The devices of a platform ("cpu", "gpu", "tpu"; "" for the default), all or the first few.

    Raises UserError where there are none of the kind, or fewer than asked for; and, in every
    process alike, where the processes have different numbers of devices, or one of them has none
    of those that were picked.
    """
    try:
        devices = jax.devices(platform or None)
    except RuntimeError as error:
        raise UserError(
            f"no device of the kind {platform!r}; JAX sees {jax.default_backend()!r} here: leave "
            "config.platform empty, or install the jax build for that device"
        ) from error
    if count > len(devices):
        raise UserError(
            f"config.devices={count} is too many: {counted(len(devices), 'devices')} of the kind "
            f"{devices[0].platform!r} here; lower it"
        )
    _check_processes(devices, devices[: count or None])
    return devices[: count or None]


def _check_processes(devices: list[jax.Device], picked: list[jax.Device]) -> None:
    """Every process knows the devices of all, so that all of them end with the same sentence."""
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        each = ", ".join(str(counts[process]) for process in sorted(counts))
        raise UserError(
            f"the processes have different numbers of devices ({each}); start every process with "
            "as many as the others, for example by CUDA_VISIBLE_DEVICES"
        )
    idle = counts.keys() - {device.process_index for device in picked}
    if idle:
        raise UserError(
            f"config.devices={len(picked)} leaves process {min(idle)} without a device; raise it "
            f"to {len(devices)}, or to 0 for all, or start fewer processes"
        )


def rows_on(devices: list[jax.Device]) -> Callable[[int], np.ndarray]:
    """A function from the number of a batch's rows to the indices of those of this process.

    It knows no device, so that it can be copied into other processes. It raises UserError for rows
    that cannot be divided by the number of devices.
    """
    mine = tuple(d.process_index == jax.process_index() for d in devices)
    return functools.partial(_rows_where, mine)


def _rows_where(mine: tuple[bool, ...], rows: int) -> np.ndarray:
    """Rows split evenly over devices: those of the devices that are mine."""
    if rows % len(mine):
        raise UserError(
            f"a batch of {rows} rows cannot be split over {len(mine)} devices; make it a multiple "
            "of that by config.batch.size, or lower config.devices"
        )
    return np.flatnonzero(np.repeat(mine, rows // len(mine)))


def of_process(devices: list[jax.Device]) -> list[jax.Device]:
    """Those of the devices that are this process's own."""
    return [d for d in devices if d.process_index == jax.process_index()]


def check_count(platform: str, count: int) -> None:
    """Raise UserError unless this process has so many devices of a platform; 0 is all of them."""
    found = of_process(pick_devices(platform))
    if not 0 <= count <= len(found):
        raise UserError(
            f"config.devices={count} is impossible: {counted(len(found), 'devices')} of the kind "
            f"{found[0].platform!r} in a process here; give as many at most, or 0 for all"
        )


def first_local(devices: list[jax.Device]) -> jax.Device:
    """The first of the devices that is this process's own."""
    return of_process(devices)[0]


@contextlib.contextmanager
def working_on(device: jax.Device) -> Iterator[None]:
    """Compute on a device, and move numbers there and back as needed, while the block runs.

    JAX_TRANSFER_GUARD is for the training steps, which need no such thing.
    """
    with jax.default_device(device), jax.transfer_guard("allow"):
        yield


def donated(devices: list[jax.Device], in_place: bool = False) -> tuple[int, ...]:
    """Argument numbers to donate: the state, except on CPU unless `in_place`.

    On CPU the compiler pays for in-place updates with copies, up to a fifth of a step of a large
    model. Small models gain more, because no new memory is allocated.
    """
    return (0,) if in_place or devices[0].platform != "cpu" else ()


def across_devices(objective: Callable, axis_name: str = AXIS) -> Callable:
    """Make a whole-batch loss correct under `jax.pmap`.

    `objective(embedded, *args, **kwargs)` sees the examples of all devices: each leaf of `embedded`
    is gathered along its leading axis. Every device then computes the same loss; average the
    gradients with `lax.pmean` and they equal the one-device gradients, because the transpose of
    the gather sums what the devices send back.
    """

    def gathered(embedded: Any, *args, **kwargs):
        everyone = jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), embedded)
        return objective(everyone, *args, **kwargs)

    return gathered


class ShardedJit:
    """Data parallel by `jit`: items sharded over a mesh, everything else replicated.

    split_shared: the arrays of `shared` whose last axis is sharded, too; see `Method`.
    """

    def __init__(
        self,
        devices: list[jax.Device],
        in_place: bool = False,
        split_shared: Sequence[str] = (),
    ):
        #: The arrays of `shared` of which a process passes the columns of its examples alone.
        self.split_shared = split_shared
        self.devices, self._donated = devices, donated(devices, in_place)
        #: Number of a batch's rows → those that this process passes to `put_batch`.
        self.local_rows = rows_on(devices)
        self._place_on(Mesh(np.asarray(devices), (AXIS,)))
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def _place_on(self, mesh: Mesh) -> None:
        """Batches are split over all axes of the mesh, in the order of the devices."""
        #: What an axis of an array that is split over all devices is split by.
        self._rows = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(self._rows))

    def put_state(self, state: Any) -> Any:
        """One copy of a state → one copy a device."""
        return jax.tree.map(lambda x: _put(x, self._replicated), state)

    def get_state(self, state: Any) -> Any:
        """The state as one logical copy, fit for a checkpoint and for evaluation."""
        return state

    def snapshot(self, state: Any) -> Any:
        """The result of `get_state`, in arrays that the next step does not donate.

        If the state is donated, this is a copy on the devices, which need memory for both.
        """
        return self._copy(state) if self._donated else state

    def local(self, tree: Any) -> Any:
        """The first of this process's devices' copy, for what one device does, as evaluation."""
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def put_batch(self, batch: dict) -> dict:
        """A host batch → arrays on the devices.

        Every process passes the rows of `local_rows` of `items`, and the columns of the same
        examples of `split_shared`. It passes all else whole.
        """
        if jax.process_count() == 1:
            places = {name: self._place_of(name, x) for name, x in batch["shared"].items()}
            return jax.device_put(batch, {"items": self._split, "shared": places})
        shared = {
            name: self._put_part(x, np.ndim(x) - 1)
            if name in self.split_shared
            else jax.tree.map(functools.partial(_put, sharding=self._replicated), x)
            for name, x in batch["shared"].items()
        }
        return {"items": jax.tree.map(self._put_part, batch["items"]), "shared": shared}

    def _place_of(self, name: str, x: Any) -> NamedSharding:
        """Where an array of `shared` lies."""
        if name not in self.split_shared or np.shape(x)[-1] % len(self.devices):
            return self._replicated
        return self._split_along(np.ndim(x) - 1)

    def _split_along(self, axis: int) -> NamedSharding:
        return NamedSharding(self._split.mesh, PartitionSpec(*(None,) * axis, self._rows))

    def _put_part(self, x: Any, axis: int = 0) -> jax.Array:
        """This process's part of an array along an axis → the whole array."""
        shape, mine = list(np.shape(x)), len(of_process(self.devices))
        shape[axis] = shape[axis] // mine * len(self.devices)
        place = {int(row): index for index, row in enumerate(self.local_rows(shape[axis]))}

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[axis].indices(shape[axis])
            return x[(*index[:axis], slice(place[start], place[start] + stop - start))]

        return jax.make_array_from_callback(tuple(shape), self._split_along(axis), part)

    def sharding_of(self, x: Any) -> NamedSharding:
        """Where an array of the state lies, by its shape alone: whole on every device."""
        del x
        return self._replicated

    def abstract(self, state: Any, batch: dict) -> tuple[Any, dict]:
        """The shapes of a state and of a batch, placed as `put_state` and `put_batch` do.

        To compile a step ahead, on devices that need not be there.
        """
        items = jax.tree.map(lambda x: _shape(x, self._split), batch["items"])
        shared = {
            name: jax.tree.map(functools.partial(_shape, sharding=self._place_of(name, x)), x)
            for name, x in batch["shared"].items()
        }
        state = jax.tree.map(lambda x: _shape(x, self.sharding_of(x)), state)
        return state, {"items": items, "shared": shared}

    def compile(self, step: Callable) -> Callable:
        """Jit `step(state, batch, across) -> (state, metrics)`; see `donated` for its state."""
        return jax.jit(
            lambda state, batch: step(state, batch, None),
            donate_argnums=self._donated,
            out_shardings=self._replicated,
        )


class FullyShardedJit(ShardedJit):
    """Data parallel by `jit`, with parameters and optimizer state split over the devices, too.

    An array is split along its largest axis that the number of parts divides; one of less than
    1,024 elements, or without such an axis, is on every device whole. The compiler gathers weights
    where they are used, and each device updates its own part.

    state_devices: devices that hold a whole state together, the number of parts; 0 for all. With
    fewer there is a copy for each group of so many devices that follow each other, and weights are
    gathered within it. Raises UserError where the number of devices is no multiple of it.
    """

    def __init__(
        self,
        devices: list[jax.Device],
        in_place: bool = False,
        split_shared: Sequence[str] = (),
        state_devices: int = 0,
    ):
        super().__init__(devices, in_place, split_shared)
        self._parts, self._state_axis = state_devices or len(devices), AXIS
        if len(devices) % self._parts:
            raise UserError(
                f"config.fsdp_devices={state_devices} does not divide "
                f"{counted(len(devices), 'devices')}; choose one that does, or 0 to split "
                "parameters over all of them"
            )
        if self._parts < len(devices):
            groups = np.asarray(devices).reshape(-1, self._parts)
            self._place_on(Mesh(groups, (AXIS, _STATE_AXIS)))
            self._state_axis = _STATE_AXIS
        self._whole = jax.jit(lambda tree: tree, out_shardings=self._replicated)

    def sharding_of(self, x: Any) -> NamedSharding:
        """Where an array of the state lies, by its shape alone."""
        shape = np.shape(x)
        divisible = [axis for axis, size in enumerate(shape) if size % self._parts == 0]
        if not divisible or math.prod(shape) < _SMALLEST_SPLIT:
            return self._replicated
        axis = max(divisible, key=lambda axis: shape[axis])
        return NamedSharding(self._split.mesh, PartitionSpec(*(None,) * axis, self._state_axis))

    def put_state(self, state: Any) -> Any:
        """One copy of a state, or one that is split already → each device's part of it."""

        def put(x: Any) -> jax.Array:
            sharding = self.sharding_of(x)
            placed = isinstance(x, jax.Array) and x.sharding == sharding
            return x if placed else _put(x, sharding)

        return jax.tree.map(put, state)

    def local(self, tree: Any) -> Any:
        """All of it on the first of this process's devices; every process must ask for it."""
        return super().local(self._whole(tree))

    def compile(self, step: Callable) -> Callable:
        """Jit `step(state, batch, across) -> (state, metrics)`, the state placed as before."""

        def placed(state: Any, batch: dict) -> tuple:
            state, metrics = step(state, batch, None)
            place = lambda x: lax.with_sharding_constraint(x, self.sharding_of(x))  # noqa: E731
            state = jax.tree.map(place, state)
            return state, lax.with_sharding_constraint(metrics, self._replicated)

        return jax.jit(placed, donate_argnums=self._donated)


class Pmap:
    """Data parallel by `pmap`: each device embeds its items, the embeddings are gathered."""

    #: None, as every device computes the whole loss.
    split_shared: Sequence[str] = ()

    def __init__(
        self,
        devices: list[jax.Device],
        in_place: bool = False,
        split_shared: Sequence[str] = (),
    ):
        del split_shared
        self.devices, self._donated = devices, donated(devices, in_place)
        #: Number of a batch's rows → those that this process passes to `put_batch`.
        self.local_rows = rows_on(devices)
        self._local = of_process(devices)
        self._split = NamedSharding(Mesh(np.asarray(self._local), (AXIS,)), PartitionSpec(AXIS))
        self._everywhere = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec())

    def put_state(self, state: Any) -> Any:
        """One copy of a state → a leading axis of this process's devices."""
        copies = len(self._local)
        return jax.tree.map(lambda x: _put(x, self._split, copies), state)

    def get_state(self, state: Any) -> Any:
        """One logical copy: this process's first, or one that all processes hold together."""
        copy = self.local(state)
        if jax.process_count() == 1:
            return copy
        return jax.tree.map(lambda x: _put(x, self._everywhere), copy)

    def snapshot(self, state: Any) -> Any:
        """What `get_state` gives, in arrays that the next step does not use up."""
        return self.get_state(state)  # It makes arrays of its own.

    def local(self, tree: Any) -> Any:
        """The first of this process's devices' copy."""
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def put_batch(self, batch: dict) -> dict:
        """A host batch → leaves with a leading axis of this process's devices.

        Every process passes all of `shared`, and of `items` the rows of `local_rows`.
        """
        count = len(self._local)

        def split(x):
            parts = np.reshape(x, (count, -1, *np.shape(x)[1:]))
            return jax.device_put(parts, self._split)

        shared = jax.tree.map(lambda x: _put(x, self._split, count), batch["shared"])
        return {"items": jax.tree.map(split, batch["items"]), "shared": shared}

    def abstract(self, state: Any, batch: dict) -> tuple[Any, dict]:
        """The shapes of a state and of a batch with their leading axis of devices."""
        count = len(self.devices)

        def whole(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *x.shape), x.dtype)

        def split(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, x.shape[0] // count, *x.shape[1:]), x.dtype)

        shared = jax.tree.map(whole, batch["shared"])
        items = jax.tree.map(split, batch["items"])
        return jax.tree.map(whole, state), {"items": items, "shared": shared}

    def compile(self, step: Callable) -> Callable:
        """Pmap `step(state, batch, across) -> (state, metrics)`; see `donated` for its state."""
        return jax.pmap(
            lambda state, batch: step(state, batch, AXIS),
            axis_name=AXIS,
            devices=self.devices,
            donate_argnums=self._donated,
        )


def _shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _put(x: Any, sharding: NamedSharding, copies: int = 0) -> jax.Array:
    """Put a host or device array under a sharding, with a leading axis of copies if asked for."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding, copies)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    if copies:
        x = np.broadcast_to(x[None], (copies, *x.shape))
    if jax.process_count() == 1 or copies:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


PARALLEL: dict[str, type[ShardedJit] | type[Pmap]] = {
    "jit": ShardedJit,
    "pmap": Pmap,
    "fsdp": FullyShardedJit,
}


def build(
    name: str,
    devices: list[jax.Device],
    in_place: bool = False,
    split_shared: Sequence[str] = (),
    state_devices: int = 0,
) -> ShardedJit | Pmap:
    """The parallel mode of a name in `PARALLEL`; in_place, split_shared: a method's.

    state_devices: of `FullyShardedJit`; the other modes have no use for it.
    """
    if name == "fsdp":
        return FullyShardedJit(devices, in_place, split_shared, state_devices)
    return PARALLEL[name](devices, in_place, split_shared)

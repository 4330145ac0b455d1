"""ResNet as a plain Flax module, with the parameter tree of Hugging Face's `FlaxResNetModule`.

The network: He et al., "Deep Residual Learning for Image Recognition" (2015),
https://arxiv.org/abs/1512.03385.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import ResNetConfig

from rcml_jax.errors import UserError

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}


class ConvNorm(nn.Module):
    """A convolution without bias and batch norm in inference mode, by the running statistics."""

    width: int
    kernel: int
    stride: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        """Create both; the names are those of Hugging Face."""
        self.convolution = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )
        self.normalization = nn.BatchNorm(use_running_average=True, epsilon=1e-5, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, ⌈H / stride⌉, ⌈W / stride⌉, width)."""
        return self.normalization(self.convolution(x))


class Residual(nn.Module):
    """The convolutions of a block in order, ReLU between them.

    convolutions: name, width, kernel size and stride of each.
    """

    convolutions: tuple[tuple[str, int, int, int], ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, H', W', width)."""
        for i, (name, width, kernel, stride) in enumerate(self.convolutions):
            x = ConvNorm(width, kernel, stride, self.dtype, name=name)(nn.relu(x) if i else x)
        return x


class Block(nn.Module):
    """Residual block: two 3×3 convolutions ("basic"), or 1×1, 3×3, 1×1 ("bottleneck")."""

    config: ResNetConfig
    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, ⌈H / stride⌉, ⌈W / stride⌉, width)."""
        width, stride = self.width, self.stride
        if self.config.layer_type == "bottleneck":
            first, second = (stride, 1) if self.config.downsample_in_bottleneck else (1, stride)
            inner = width // 4
            shapes = ("0", inner, 1, first), ("1", inner, 3, second), ("2", width, 1, 1)
        else:
            shapes = ("layer_0", width, 3, stride), ("layer_1", width, 3, 1)
        result = Residual(shapes, self.dtype, name="layer")(x)
        if x.shape[-1] != width or stride != 1:
            x = ConvNorm(width, 1, stride, self.dtype, name="shortcut")(x)
        return _activation(self.config)(result + x)


class Blocks(nn.Module):
    """Blocks of one width, named "0", "1", ...; the first has the stride."""

    config: ResNetConfig
    width: int
    stride: int
    depth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, c) → (n, ⌈H / stride⌉, ⌈W / stride⌉, width)."""
        for i in range(self.depth):
            stride = 1 if i else self.stride
            x = Block(self.config, self.width, stride, self.dtype, name=str(i))(x)
        return x


class Stage(nn.Module):
    """`Blocks` under the name "layers"."""

    config: ResNetConfig
    width: int
    stride: int
    depth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Blocks`."""
        sizes = self.width, self.stride, self.depth
        return Blocks(self.config, *sizes, self.dtype, name="layers")(x)


class Stages(nn.Module):
    """The stages, named "0", "1", ...; each but the first halves the feature map."""

    config: ResNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Feature map (n, H, W, embedding_size) → (n, H', W', hidden_sizes[-1])."""
        sizes = zip(self.config.hidden_sizes, self.config.depths, strict=True)
        for i, (width, depth) in enumerate(sizes):
            stride = 2 if i or self.config.downsample_in_first_stage else 1
            x = Stage(self.config, width, stride, depth, self.dtype, name=str(i))(x)
        return x


class Encoder(nn.Module):
    """`Stages` under the name "stages"."""

    config: ResNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Stages`."""
        return Stages(self.config, self.dtype, name="stages")(x)


class Embedder(nn.Module):
    """The stem: a 7×7 convolution and 3×3 max pooling, both of stride 2."""

    config: ResNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, channels) → (n, ⌈H / 4⌉, ⌈W / 4⌉, embedding_size)."""
        x = ConvNorm(self.config.embedding_size, 7, 2, self.dtype, name="embedder")(pixels)
        x = _activation(self.config)(x)
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class ResNet(nn.Module):
    """A ResNet without a head: images → a feature map, or its mean.

    The collections "params" and "batch_stats" are those of Hugging Face's `FlaxResNetModule`. Batch
    norm is always in inference mode: the statistics are read and never updated.
    """

    config: ResNetConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Create the stem and the stages."""
        self.embedder = Embedder(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Images (n, H, W, channels) → the last feature map (n, h · w, width), row by row.

        uint8 images are normalised by `normalize_pixels`; floats are taken as they are. Raises
        UserError where the channels are not those of the configuration.
        """
        if pixels.shape[-1] != self.config.num_channels:
            raise UserError(
                f"the ResNet takes images of {self.config.num_channels} channels, "
                f"not {pixels.shape[-1]}; give (n, height, width, channels)"
            )
        if pixels.dtype == jnp.uint8:
            pixels = normalize_pixels(pixels)
        x = self.encoder(self.embedder(pixels.astype(self.dtype)))
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Images as `tokens` takes them → the mean of their tokens (n, width)."""
        return self.tokens(pixels).mean(axis=1)


def normalize_pixels(pixels: jax.Array) -> jax.Array:
    """Images uint8 of three channels → float32, by the usual mean and deviation of ImageNet."""
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)


def _activation(config: ResNetConfig) -> Any:
    """The activation after the stem and each sum. Raises UserError for an unknown one."""
    if config.hidden_act not in _ACTIVATIONS:
        raise UserError(
            f"hidden_act={config.hidden_act!r} of the ResNet is unknown; "
            f"choose one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[config.hidden_act]


_NAMES = {
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "bias": ("params", "bias"),
}


def variables_from_torch(arrays: dict[str, np.ndarray], *, basic: bool) -> dict:
    """PyTorch's ResNet by names → the variables of `ResNet` in float32; a head is left out."""
    flat = {}
    for name, array in arrays.items():
        # Flax names blocks of two convolutions (ResNet-18, -34) otherwise than those of three.
        name = name.replace(".layer.", ".layer.layer_") if basic else name
        path = name.removeprefix("resnet.").split(".")
        if path[0] == "classifier" or path[-1] == "num_batches_tracked":
            continue
        if path[-1] == "weight":
            path[-1:] = ["kernel"] if array.ndim == 4 else ["scale"]
            kind = "params"
        else:
            kind, path[-1] = _NAMES[path[-1]]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        flat[kind, *path] = np.asarray(array, np.float32)
    return unflatten_dict(flat)

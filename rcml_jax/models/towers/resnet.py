"""ResNet as a plain Flax module, with the parameter tree of Hugging Face's `FlaxResNetModule`.

The network: He et al., "Deep Residual Learning for Image Recognition" (2015),
https://arxiv.org/abs/1512.03385.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import ResNetConfig

from rcml_jax.errors import UserError
from rcml_jax.models.checkpoints import read_config, read_params, torch_names
from rcml_jax.models.preprocessing import IMAGENET_STATISTICS, image_statistics, normalize
from rcml_jax.models.towers.transformer import activation

IMAGE_MEAN, IMAGE_STD = IMAGENET_STATISTICS


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
        shapes: tuple[tuple[str, int, int, int], ...]
        if self.config.layer_type == "bottleneck":
            first, second = (stride, 1) if self.config.downsample_in_bottleneck else (1, stride)
            inner = width // 4
            shapes = ("0", inner, 1, first), ("1", inner, 3, second), ("2", width, 1, 1)
        else:
            shapes = ("layer_0", width, 3, stride), ("layer_1", width, 3, 1)
        result = Residual(shapes, self.dtype, name="layer")(x)
        if x.shape[-1] != width or stride != 1:
            x = ConvNorm(width, 1, stride, self.dtype, name="shortcut")(x)
        return activation(self.config.hidden_act)(result + x)


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
        x = activation(self.config.hidden_act)(x)
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

        uint8 images are normalised; floats are taken as they are. Raises
        UserError where the channels are not those of the configuration.
        """
        if pixels.shape[-1] != self.config.num_channels:
            raise UserError(
                f"the ResNet takes images of {self.config.num_channels} channels, "
                f"not {pixels.shape[-1]}; give (n, height, width, channels)"
            )
        pixels = normalize(pixels, *image_statistics(self.config), self.dtype)
        x = self.encoder(self.embedder(pixels))
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Images as `tokens` takes them → the mean of their tokens (n, width)."""
        return self.tokens(pixels).mean(axis=1)


def load_resnet(name: str) -> tuple[ResNetConfig, dict]:
    """Read a ResNet checkpoint, a directory or a name on the Hugging Face hub, without its head.

    Returns the configuration and the variables of `ResNet` as float32 NumPy arrays. Raises
    UserError where it cannot be read or is of another model.
    """
    config = read_config(name, "ResNet", ("resnet",))
    image = jnp.zeros((1, 32, 32, config.num_channels))
    expected = jax.eval_shape(ResNet(config).init, jax.random.key(0), image)
    return config, read_params(name, expected, "ResNet", prefixes=("resnet",), names=_torch_names)


def _torch_names(path: tuple[str, ...]) -> tuple[str, ...]:
    """PyTorch's name of a variable."""
    _, *parents, last = path
    # Flax names blocks of two convolutions (ResNet-18, -34) otherwise than those of three.
    parents = [part.removeprefix("layer_") for part in parents]
    last = {"mean": "running_mean", "var": "running_var"}.get(last, last)
    return torch_names((*parents, last))

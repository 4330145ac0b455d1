"""How many images a second does EfficientNet-Lite0 embed on a CPU, beside the same in PyTorch?

    python -m benchmarks.image_features    # 32 images of 224×224 a call; about a minute on 2 cores
    python -m benchmarks.image_features --train    # the gradients of all weights; a minute

Needs PyTorch and the extra efficientnet. "in parts" maps the network over a few images at a time,
whose feature maps stay in the cache. "grouped convolutions" is ours with the plain form of the
depthwise convolution, which other platforms use. With `--train` the mean square of the features is
differentiated in every weight but the means and variances of batch norm, which stay as they are;
"derived" is ours with the gradient of the depthwise convolution that JAX derives.
"""

import os
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from benchmarks import timing
from benchmarks.torch_efficientnet import features
from rcml_jax.models.towers import efficientnet

OURS, PARTS, GROUPED = "ours", "ours, in parts", "ours, grouped convolutions"
DERIVED = "ours, derived"
TORCH, CHANNELS_LAST = "PyTorch", "PyTorch, channels last"
TARGET = 1.0


def our_functions(pixels: np.ndarray, part: int) -> dict:
    """The module as it is, in parts, and with grouped convolutions; jitted."""
    params, model = _ours()

    def embed(params, pixels):
        return model.apply({"params": params}, pixels)

    def in_parts(params, pixels):
        return jax.lax.map(lambda image: embed(params, image[None])[0], pixels, batch_size=part)

    compiled = {
        name: jax.jit(function).lower(params, pixels).compile()
        for name, function in ((OURS, embed), (PARTS, in_parts))
    }
    compiled[GROUPED] = _compile_with(efficientnet.depthwise_conv, embed, params, pixels)
    return {name: lambda f=f: f(params, pixels) for name, f in compiled.items()}


def our_gradients(pixels: np.ndarray) -> dict:
    """The gradient in the module's parameters, jitted; written out and derived."""
    params, model = _ours()

    def loss(params, pixels):
        return jnp.mean(model.apply({"params": params}, pixels) ** 2)

    compiled = {OURS: jax.jit(jax.grad(loss)).lower(params, pixels).compile()}
    derived = efficientnet._shifted_depthwise_conv.fun
    compiled[DERIVED] = _compile_with(derived, jax.grad(loss), params, pixels)
    return {name: lambda f=f: f(params, pixels) for name, f in compiled.items()}


def _compile_with(convolution: Any, function: Any, params: Any, pixels: np.ndarray) -> Any:
    """A function of both, compiled with another depthwise convolution in the module."""
    with mock.patch.object(efficientnet, "_shifted_depthwise_conv", convolution):
        # Another function, so that what was traced before is not found again.
        jitted = jax.jit(lambda params, pixels: function(params, pixels))
        return jitted.lower(params, pixels).compile()


def _ours() -> tuple:
    params = jax.tree.map(jnp.asarray, efficientnet.load_efficientnet_lite0())
    return params, efficientnet.EfficientNetLite0()


def torch_functions(pixels: np.ndarray) -> dict:
    """The same network in PyTorch, with both of its memory formats."""

    @torch.inference_mode()
    def embed(arrays, nchw):
        return features(arrays, _images(pixels, nchw)).mean((2, 3)).numpy()

    return _formats(embed)


def torch_gradients(pixels: np.ndarray) -> dict:
    """Their gradients, as a tree of the module's form."""
    names = ".weight", ".bias"

    def gradient(arrays, nchw):
        weights = {
            n: x.detach().requires_grad_()
            for n, x in arrays.items()
            if n.endswith(names) and not n.startswith("_fc")
        }
        found = features({**arrays, **weights}, _images(pixels, nchw)).mean((2, 3))
        grads = torch.autograd.grad((found**2).mean(), list(weights.values()))
        arrays = {n: x.numpy() for n, x in zip(weights, grads, strict=True)}
        return efficientnet.params_from_torch(arrays, head=False)

    return _formats(gradient)


def _formats(function: Any) -> dict:
    arrays = torch.load(efficientnet.packaged_file(), weights_only=True)
    last = {
        name: array.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else array
        for name, array in arrays.items()
    }
    first = {name: array.contiguous() for name, array in arrays.items()}
    return {TORCH: lambda: function(first, True), CHANNELS_LAST: lambda: function(last, False)}


def _images(pixels: np.ndarray, nchw: bool) -> torch.Tensor:
    """Images (n, H, W, 3), in memory by channel or by pixel."""
    images = torch.from_numpy(pixels)
    return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if nchw else images


def check(found: dict, expected: dict) -> None:
    """Raise AssertionError where a weight's gradient is not PyTorch's.

    By its length: rounding takes single units over an edge of ReLU6.
    """
    found, flat = flatten_dict(found), flatten_dict(expected)
    for path, gradient in flat.items():
        difference = np.linalg.norm(found[path] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-2, (path, difference)


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--batch", type=int, default=32, help="images a call")
    parser.add_argument("--part", type=int, default=4, help="images at a time of ours, in parts")
    parser.add_argument("--train", action="store_true", help="gradients instead of features")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    pixels = np.random.default_rng(0).integers(0, 256, (args.batch, 224, 224, 3), np.uint8)
    what = "gradients" if args.train else "features"
    machine = timing.start(f"EfficientNet-Lite0, {what} of {args.batch} images of 224×224, float32")
    machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.train:
        functions = our_gradients(pixels) | torch_gradients(pixels)
        expected = functions[TORCH]()
        for name in (OURS, DERIVED):
            check(functions[name](), expected)
    else:
        functions = our_functions(pixels, args.part) | torch_functions(pixels)
        expected = functions[TORCH]()
        for function in functions.values():
            np.testing.assert_allclose(function(), expected, atol=1e-4)
    times = timing.alternate(functions, repeats=args.repeats, warmup=0, pause=0.3)
    ratios = [timing.ratio(times, OURS, peer, TARGET) for peer in (TORCH, CHANNELS_LAST)]
    if args.train:
        ratios += [timing.ratio(times, OURS, DERIVED)]
    else:
        ratios += [timing.ratio(times, PARTS, CHANNELS_LAST), timing.ratio(times, OURS, GROUPED)]
    timing.print_times(times, per=args.batch, unit="image")
    timing.print_ratios(ratios)
    summary = timing.summarise(times)
    rates = {name: args.batch / row["median"] for name, row in summary.items()}
    print("\nimages a second: " + ", ".join(f"{name} {r:.1f}" for name, r in rates.items()))
    figures = {"machine": machine, "ratios": ratios, "images_per_second": rates}
    timing.write_json(args.json, figures | {"seconds": summary})


if __name__ == "__main__":
    main()

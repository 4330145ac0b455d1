"""The features of EfficientNet-Lite0 in plain PyTorch: a peer to measure and compare with."""

import torch
import torch.nn.functional as F

_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_NORM = ("running_mean", "running_var", "weight", "bias")


def features(arrays: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Images (n, H, W, 3) uint8 → the last feature map (n, 1280, h, w).

    arrays: the checkpoint's, by its own names.
    """

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel = arrays[f"{name}.weight"]
        size, groups = kernel.shape[-1], x.shape[1] // kernel.shape[1]
        if stride == 1:
            return F.conv2d(x, kernel, padding=size // 2, groups=groups)
        # TensorFlow's "SAME": the greater half of the zeros comes after.
        pad = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            pad += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pad), kernel, stride=stride, groups=groups)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (arrays[f"{name}.{part}"] for part in _NORM)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=1e-3)

    x = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for i, stride in enumerate(_STRIDES):
        block, y = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in arrays:
            y = F.relu6(norm(conv(y, f"{block}_expand_conv"), f"{block}_bn0"))
        y = F.relu6(norm(conv(y, f"{block}_depthwise_conv", stride), f"{block}_bn1"))
        y = norm(conv(y, f"{block}_project_conv"), f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1"))

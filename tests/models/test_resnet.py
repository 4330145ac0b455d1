"""ResNet beside Hugging Face's Flax and PyTorch classes: the same variables, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import ResNetConfig

from rcml_jax.errors import UserError
from rcml_jax.models.towers.resnet import IMAGE_MEAN, IMAGE_STD, ResNet, load_resnet
from tests import reference

SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
CASES = {
    "basic": {"layer_type": "basic"},
    "bottleneck": {"layer_type": "bottleneck"},
    "gelu_and_early_stride": {
        "layer_type": "bottleneck",
        "hidden_act": "gelu",
        "downsample_in_first_stage": True,
    },
}
PIXELS = np.random.default_rng(0).normal(size=(2, 48, 64, 3)).astype(np.float32)


def config(case="basic", **options):
    return ResNetConfig(**SIZES, **CASES[case], **options)


def shaken(shapes):
    """Random variables of these shapes: no bias or mean is 0, no scale or variance is 1."""
    rng, flat = np.random.default_rng(0), {}
    for path, x in flatten_dict(shapes).items():
        noise = rng.normal(0, 0.2, x.shape)
        positive = path[-1] in ("var", "scale")
        flat[path] = np.float32(0.5 + np.abs(noise) if positive else noise)
    return unflatten_dict(flat)


def variables(model):
    return shaken(jax.eval_shape(model.init, jax.random.key(0), PIXELS[:1]))


@pytest.mark.parametrize("case", CASES)
def test_variables_and_numbers_are_those_of_hugging_face(case):
    theirs = pytest.importorskip(
        "transformers.models.resnet.modeling_flax_resnet",
        reason="this version of transformers has no Flax classes",
        exc_type=ImportError,
    ).FlaxResNetModule(config(case))
    ours = ResNet(config(case))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), PIXELS[:1]) for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    given = shaken(shapes[0])
    expected = theirs.apply(given, PIXELS)
    states = np.asarray(expected.last_hidden_state).transpose(0, 2, 3, 1)
    assert states.std() > 0.1
    tokens = ours.apply(given, PIXELS, method="tokens")
    np.testing.assert_allclose(tokens, states.reshape(2, -1, 24), rtol=1e-5, atol=1e-5)
    pooled = np.asarray(expected.pooler_output).reshape(2, 24)
    np.testing.assert_allclose(ours.apply(given, PIXELS), pooled, rtol=1e-5, atol=1e-5)


def test_the_names_of_the_variables():
    """Stated here once more, for a transformers without Flax classes."""
    found = {case: set(flatten_dict(variables(ResNet(config(case))), sep="/")) for case in CASES}
    stage = "params/encoder/stages/1/layers/0"
    assert "params/embedder/embedder/convolution/kernel" in found["basic"]
    assert f"{stage}/layer/layer_1/normalization/scale" in found["basic"]
    assert f"{stage}/layer/2/convolution/kernel" in found["bottleneck"]
    assert f"{stage}/shortcut/convolution/kernel" in found["basic"] & found["bottleneck"]
    assert "batch_stats/encoder/stages/2/layers/0/layer/0/normalization/var" in found["bottleneck"]
    assert "params/encoder/stages/0/layers/0/shortcut/convolution/kernel" not in found["basic"]


def test_a_block_equals_numpy():
    """One stage of one basic block, on one image, without the stem's pooling."""
    model = ResNet(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    given = variables(model)
    image = PIXELS[0, :16, :16]
    x = model.apply(given, image[None], method=lambda m, x: m.embedder(x))
    path = "encoder", "stages", "0", "layers", "0", "layer"
    params, statistics = given["params"], given["batch_stats"]
    for name in path:
        params, statistics = params[name], statistics[name]

    def layer(x, name):
        norm = params[name]["normalization"] | statistics[name]["normalization"]
        x = reference.conv(x, params[name]["convolution"]["kernel"])
        return reference.batch_norm(x, norm, epsilon=1e-5)

    expected = layer(np.maximum(layer(np.asarray(x[0]), "layer_0"), 0), "layer_1")
    expected = np.maximum(expected + np.asarray(x[0]), 0).reshape(-1, 4)
    assert expected.std() > 0.1
    tokens = model.apply(given, image[None], method="tokens")[0]
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)


def test_uint8_is_normalised_and_floats_are_not():
    model = ResNet(config())
    given = variables(model)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    floats = (pixels / np.float32(255) - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    np.testing.assert_allclose(model.apply(given, pixels), model.apply(given, floats), rtol=1e-4)


def test_bfloat16_is_near_float32():
    given = variables(ResNet(config()))
    half = ResNet(config(), dtype=jnp.bfloat16).apply(given, PIXELS)
    full = ResNet(config()).apply(given, PIXELS)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))


def test_what_is_refused():
    with pytest.raises(UserError, match=r"takes images of 3 channels, not 1; give"):
        ResNet(config()).init(jax.random.key(0), PIXELS[..., :1])
    with pytest.raises(UserError, match=r"the activation 'mish' is unknown"):
        ResNet(ResNetConfig(**SIZES, hidden_act="mish")).init(jax.random.key(0), PIXELS)


@pytest.mark.parametrize("case", [*CASES, "bottleneck_that_strides_first"])
def test_pytorchs_arrays_give_pytorchs_numbers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    from transformers import ResNetModel

    first = case not in CASES
    chosen = config("bottleneck", downsample_in_bottleneck=True) if first else config(case)
    model = ResNetModel(chosen).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value)
        expected = model(torch.tensor(PIXELS.transpose(0, 3, 1, 2))).pooler_output.numpy()
    model.save_pretrained(tmp_path)
    loaded, given = load_resnet(str(tmp_path))
    found = ResNet(loaded).apply(given, PIXELS)
    np.testing.assert_allclose(found, expected.reshape(2, -1), rtol=1e-4, atol=1e-5)

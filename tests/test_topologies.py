"""Compiling for TPU topologies: what can be checked without libtpu."""

import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import throughput_models as models
from benchmarks import topologies
from configs import m3col
from configs.rcml import get_config
from rcml_jax.training.sharding import build

PROGRAM = """
  %all-gather.1 = bf16[8,512]{1,0} all-gather(bf16[1,512]{1,0} %x), dimensions={0}
  %r = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(f32[4]{0} %a, f32[2,2]{1,0} %b), to_apply=%sum
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2]{0} %c), dimensions={0}
  %d = f32[16]{0} all-gather-done((f32[2]{0}, f32[16]{0}) %s)
  %p = pred[3]{0} fusion(%all-gather.1), kind=kLoop
"""


def test_collectives_are_counted_by_kind():
    found = topologies.collective_bytes(PROGRAM)
    assert found == {"all-gather": (2, 8 * 512 * 2 + 16 * 4), "all-reduce": (1, 32)}


STEP = """
%body (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%x)
}

ENTRY %main (a: bf16[2,3]) -> f32[2] {
  %a = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(0)
  %f = (f32[2]{0:T(128)S(1)}, bf16[4]{0}) fusion(%a), kind=kLoop, calls=%body
  %g.1 = f32[2]{0} get-tuple-element(%f), index=0
  %s = (f32[2]{0}, f32[16]{0}, u32[]) all-gather-start(%g.1), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %fusion.2 = f32[2]{0} fusion(%d), kind=kInput, calls=%body
}
"""


def test_an_all_reduce_that_is_scattered_is_a_kind_of_its_own():
    program = """
%all-reduce-scatter.1 (input: f32[16,4]) -> f32[2,4] {
  %all-reduce.9 = f32[16,4]{1,0:T(8,128)} all-reduce(%input), channel_id=11, to_apply=%add.1
  ROOT %slice = f32[2,4]{1,0} dynamic-slice(%all-reduce.9, %i, %zero)
}

ENTRY %main () -> f32[2] {
  %all-reduce.2 = f32[2]{0} all-reduce(%x), to_apply=%add.1
  %fusion = f32[2,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = topologies.collective_bytes(program)
    assert found == {"all-reduce-scatter": (1, 256), "all-reduce": (1, 8)}


def test_kernels_are_counted_in_the_entry_alone():
    found = topologies.kernels(STEP)
    assert found == {"fusion": (2, 8 + 8 + 8), "all-gather": (1, 64)}
    with pytest.raises(ValueError, match="no entry"):
        topologies.kernels(PROGRAM)


def test_what_goes_to_the_host_is_found():
    def printed(x):
        jax.debug.callback(lambda y: None, x)
        return x + 1

    text = jax.jit(printed).lower(jnp.ones(3)).compile().as_text()
    assert len(topologies.host_transfers(text)) == 1
    assert len(topologies.host_transfers("  %o = token[] outfeed(%x, %t)\n")) == 1
    assert topologies.host_transfers(PROGRAM + STEP) == []


@pytest.mark.parametrize("items", [32, 128])
def test_the_shapes_are_those_of_a_batch(items):
    config = get_config()
    models.shrink(config)
    config.loss.negatives = "unrelated"
    method = models.relational("rcml", topologies.sized(config, items))
    shapes = topologies.abstract_batch(method, 8, 6)
    batch = models.relation_batch(method, 8, 6)
    assert len(batch["items"]["ids"]) == items
    assert jax.tree.map(np.shape, batch) == jax.tree.map(lambda x: x.shape, shapes)


def test_the_shapes_of_a_checkpoint_are_its_own():
    method = models.relational("rcml", topologies.sized(get_config("amazon"), 16))
    shapes = topologies.abstract_batch(method, 8, 6)
    assert shapes["items"]["images"].shape == (16, 224, 224, 3)


def test_a_model_and_layers_of_its_own():
    method = topologies.method_of("rcml", topologies.sized(get_config("amazon"), 16), "vit-l-14", 2)
    towers = method.towers_config
    assert (towers.vision_config.hidden_size, towers.vision_config.patch_size) == (1024, 14)
    assert towers.text_config.num_hidden_layers == towers.vision_config.num_hidden_layers == 2
    assert topologies.abstract_batch(method, 8, 6)["items"]["images"].shape == (16, 224, 224, 3)


@pytest.mark.parametrize(
    ("title", "mode", "state_devices"),
    [("rcml", "jit", 0), ("clip", "fsdp", 0), ("rcml", "fsdp", 2)],
)
def test_a_step_is_compiled_from_shapes(title, mode, state_devices):
    config = get_config()
    models.shrink(config)
    config.model.dtype = "bfloat16"
    method = models.relational(title, topologies.sized(config, 32))
    devices = build(mode, jax.devices()[:4], state_devices=state_devices)
    compiled = topologies.compile_step(method, topologies.abstract_batch(method, 8, 6), devices)
    facts = topologies.facts(compiled)
    assert facts["collectives"]
    assert facts["argument_bytes"] > 0
    assert facts["kernels"]["fusion"]["count"] > 10
    assert facts["host_transfers"] == 0


@pytest.mark.parametrize("mode", ["jit", "fsdp"])
def test_embeddings_under_all_relations_stay_on_their_devices(mode):
    """Also in the backward pass, whatever the loss splits by features."""
    config = get_config()
    models.shrink(config)
    method = models.relational("rcml", topologies.sized(config, 64))
    batch, devices = topologies.abstract_batch(method, 8, 6), jax.devices()[:8]
    placed = build(mode, devices, split_shared=method.split_shared)
    text = topologies.compile_step(method, batch, placed).as_text()
    sent = re.findall(r"= (.*?) (?:all-\w+|reduce-scatter)(?:-\w+)?\(", text)
    whole = [64, method.config.batch.relations + 1, method.config.model.embed_dim]
    shapes = [list(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", str(sent))]
    assert any(whole[2] in shape for shape in shapes)  # rows of pairs
    assert all(sorted(shape) != sorted(whole) for shape in shapes)


@pytest.mark.parametrize("title", ["clip", "rcml"])
def test_a_loss_is_compiled_alone(title):
    """Its gradient lies where the embeddings do: a part of it is on each device."""
    config = get_config()
    models.shrink(config)
    method = models.relational(title, topologies.sized(config, 32))
    devices = build("jit", jax.devices()[:4], split_shared=method.split_shared)
    compiled = topologies.compile_loss(method, topologies.abstract_batch(method, 8, 6), devices)
    value, grads = compiled.output_shardings
    assert value.is_fully_replicated
    assert {x.spec for x in jax.tree.leaves(grads)} == {jax.sharding.PartitionSpec("data")}
    assert topologies.facts(compiled)["collectives"]


@pytest.mark.parametrize("title", ["clip", "rcml"])
def test_towers_compute_in_bfloat16_and_the_loss_in_float32(title):
    """Read out of the products of a step: by far the most in bfloat16, the logits' in float32."""
    config = get_config()
    models.shrink(config)
    config.model.dtype = "bfloat16"
    items, dim = 48, 20
    config.model.embed_dim = dim
    method = models.relational(title, topologies.sized(config, items))
    batch = topologies.abstract_batch(method, 8, 6)
    params = jax.eval_shape(method.init, jax.random.key(0), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params, batch, key):
        return method.objective(params, method.embed(params, batch, key), batch, 0.0)[0]

    dtypes = list(_products(jax.make_jaxpr(jax.grad(loss))(params, batch, key).jaxpr))
    logits = {dtype for dtype, shape in dtypes if shape and shape[-1] == items}
    assert logits == {jnp.dtype("float32")}
    narrow = sum(dtype == jnp.bfloat16 for dtype, _ in dtypes)
    assert narrow > 0.8 * len(dtypes)
    value = jax.eval_shape(loss, params, batch, key)
    assert value.dtype == jnp.float32
    grads = jax.eval_shape(jax.grad(loss), params, batch, key)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def _products(jaxpr):
    """Type and shape of the result of each dot_general, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.dtype, equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _products(getattr(inner, "jaxpr", inner))


def _is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_m3col_gathers_partners_pixels_as_bytes():
    """A step of each phase; the partners of mixup come from all devices."""
    config = m3col.get_config()
    models.shrink(config)
    for title, method in topologies.phases(config, 32):
        batch = topologies.abstract_class_batch(method, 8)
        made = jax.tree.map(np.shape, models.class_batch(method, 32, 8))
        assert jax.tree.map(lambda x: x.shape, batch) == made
        compiled = topologies.compile_step(method, batch, build("jit", jax.devices()[:4]))
        gathered = re.findall(r"= (\S+?)\{\S* all-gather", compiled.as_text())
        pixels = [array for array in gathered if array.endswith("[32,32,32,3]")]
        assert bool(pixels) == (title == "m3col, M3Co")
        assert all(array.startswith("u8") for array in pixels)


def test_embedding_sends_nothing_and_evaluation_holds_few_vectors():
    config = get_config()
    models.shrink(config)
    method = models.relational("rcml", topologies.sized(config, 32))
    batch = topologies.abstract_batch(method, 8, 6)
    one, ten = (
        topologies.facts(topologies.compile_embedding(method, n, batch, jax.devices()[:4]))
        for n in (1, 10)
    )
    assert one["collectives"] == ten["collectives"] == {}
    assert one["flops"] < ten["flops"] < 2 * one["flops"]
    shape = 4, 8
    compiled = topologies.compile_evaluation(16, shape, jax.devices()[0])
    vectors = math.prod(shape) * 22 * 16 * 4
    assert topologies.facts(compiled)["temporary_bytes"] < 4 * vectors


@pytest.mark.slow
def test_a_topology_of_tpus_compiles():
    """With libtpu, and no TPU: the loss of RCML for eight chips, whose memory it fits."""
    pytest.importorskip("libtpu")
    options = ["--config", "configs/rcml.py:amazon", "--loss", "--only", "rcml", "--per-chip", "16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    root = pathlib.Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.topologies", *options],
        env=environment, cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    row = found.stdout.splitlines()[-1].split()
    assert row[:5] == ["rcml", "v5e:2x4", "jit", "128", "8"]
    assert "all-reduce" in found.stdout

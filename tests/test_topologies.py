"""Compiling for TPU topologies: what can be checked without libtpu."""

import jax
import numpy as np
import pytest

from benchmarks import throughput_models as models
from benchmarks import topologies
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


@pytest.mark.parametrize("mode", ["jit", "fsdp"])
def test_a_step_is_compiled_from_shapes(mode):
    config = get_config()
    models.shrink(config)
    method = models.relational("rcml", topologies.sized(config, 32))
    devices = build(mode, jax.devices()[:2])
    compiled = topologies.compile_step(method, topologies.abstract_batch(method, 8, 6), devices)
    facts = topologies.facts(compiled)
    assert facts["collectives"]
    assert facts["argument_bytes"] > 0

"""A work directory of the toy catalogue without any training."""

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.methods import build
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import Checkpoints
from rcml_jax.training.step import TrainState
from tests.toy import tiny_config


def make_run(folder, workdir, *, seed=0, method="rcml", options=None):
    """A work directory with a checkpoint of random parameters, the head's noise included.

    options: as of `tiny_config`.
    """
    config = tiny_config(folder, method=method, **(options or {}))
    workdirs.prepare(workdir, config)
    built = build(config, workdir)
    batches = built.batches()
    params = built.init(jax.random.key(seed), next(batches))
    # So far from the start that the relation has a say.
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), params)
    state = TrainState(jnp.int32(7), params, (), jax.random.key(seed))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, state, batches, {})
    checkpoints.wait()
    checkpoints.close()
    return workdir

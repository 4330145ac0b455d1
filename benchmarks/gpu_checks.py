"""Correctness on a device: losses, pooling, towers and training beside the CPU's.

Errors are norms of differences over norms, of values and of gradients. The reference is the CPU in
float32 at the highest precision of products, for bfloat16, too, whose own rounding is then in the
error. The same inputs are drawn for both, and a NaN fails every check.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_work, inputs
from benchmarks import throughput_models as models
from benchmarks.item_batches import Sizes, item_batch
from rcml_jax.cli.commands import load_config_file
from rcml_jax.losses.clip import clip
from rcml_jax.losses.m3co import m3co
from rcml_jax.losses.multi_soft_clip import multi_soft_clip
from rcml_jax.losses.rcml import relation_contrastive, relation_identification
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.unicl import label_supervised
from rcml_jax.methods import build as build_method
from rcml_jax.models.relation_pooling import RelationPooling
from rcml_jax.training import optimizer, sharding, step
from rcml_jax.training.checkpoint import Checkpoints

#: The largest relative error, of a value or a gradient, by precision. "default" is float32 at the
#: backend's own precision of products, on NVIDIA's GPUs TF32.
TOLERANCES = {"highest": 2e-4, "default": 2e-2, "bfloat16": 6e-2}
STEPS, SAVED_AFTER = 20, 10
#: Layers of each tower that is checked, of ViT-B/32's widths.
LAYERS = 4
#: The largest relative difference of a loss of training from the CPU's.
TRAINING_TOLERANCE = 1e-3
#: The same step from the same state may differ by the order in which gradients are summed.
STEP_TOLERANCE = 1e-5


def correctness(report: Any, small: bool) -> None:
    """The stage: value and gradient of every loss, the pooling head and the whole model."""
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    report.add(device=device.device_kind, reference=host.device_kind, tolerances=TOLERANCES)
    report.add(layers=LAYERS)
    for name, function, arguments in _loss_cases(small):
        report.part(name, functools.partial(_compare_dtypes, function, arguments, device, host))
    for name, make, arguments in _model_cases(small):
        report.part(name, functools.partial(_compare_models, make, arguments, device, host))


def _loss_cases(small: bool) -> Iterator[tuple[str, Callable[..., jax.Array], list[np.ndarray]]]:
    """Name, function of arrays to a scalar, and arrays; what has no gradient is in the function."""
    sizes = gpu_work.sizes(small)
    rng = np.random.default_rng(1)
    shared = item_batch(inputs.clip_config(True), sizes).padded["shared"]
    count, width = sizes.items, 16 if small else 512
    relations = len(shared["intra"])
    unit = gpu_work.unit_vectors
    both = [unit(rng, (relations, count, width)) for _ in range(2)]
    pairs = {name: shared[name] for name in ("anchor", "positive", "pair_valid", "valid", "intra")}

    def relation(related: bool, text, image):
        if related:
            return relation_contrastive(text, image, **pairs, related=shared["related"])[0]
        return relation_identification(text, image, **pairs, linked=shared["linked"])[0]

    yield "loss: RCML, Eq. 1-2", functools.partial(relation, True), both
    yield "loss: identification", functools.partial(relation, False), both
    # Scaled, as normalisation is part of these losses.
    rows = [3 * unit(rng, (count, width)) for _ in range(4)]
    labels: Any = rng.integers(0, 5, count)
    yield "loss: CLIP", clip, rows[:2]
    yield "loss: CLIP, in chunks", functools.partial(clip, chunk_size=count // 4), rows[:2]
    yield "loss: SigLIP", sigmoid, rows[:2]
    yield "loss: UniCL", lambda x, y: label_supervised(x, y, labels), rows[:2]
    partner: Any = [rng.permutation(count) for _ in range(2)]
    mixing: Any = rng.uniform(0.2, 1, count).astype(np.float32)
    yield "loss: M3Co", lambda *x: m3co(x[:2], x[2:], mixing, partner), rows
    yield "loss: MultiSClip", lambda *x: multi_soft_clip(x), rows[:2]


def _model_cases(small: bool) -> Iterator[tuple[str, Callable, Any]]:
    """Name, function of a dtype to a function of parameters, and parameters.

    The pooling head alone, both towers of CLIP, and RCML on packed texts with its loss.
    """
    rng = np.random.default_rng(2)
    width, count, tokens = (16, 4, 6) if small else (512, 32, 50)
    states = rng.standard_normal((count, tokens, width), np.float32)
    relation = rng.standard_normal((5, width), np.float32)
    weights = rng.standard_normal((count, 5, width), np.float32)
    head = {name: rng.standard_normal((width, width), np.float32) / width**0.5 for name in _HEAD}

    def pooling(dtype):
        module = RelationPooling(width, dtype=dtype)

        def value(arrays, given):
            del given
            found = gpu_work.token_states(arrays["states"].astype(dtype))
            z: Any = module.apply(
                {"params": arrays["head"]}, found, arrays["relation"], jnp.arange(5) < 1
            )
            return jnp.sum(weights * z), z

        return value

    arrays = {"head": head, "states": states, "relation": relation}
    yield "pooling head", pooling, (arrays, ())
    # Few items, as the CPU has to do them, too, of the sizes that are trained.
    few = Sizes(relations=2, pairs=2, self_pairs=2)
    for title, name in (("CLIP on both towers", "clip"), ("RCML on both towers", "rcml")):
        config = gpu_work.configuration(small, few)
        batch = item_batch(_shallow(name, config).towers_config, few).packed

        def model(dtype, name=name, config=config):
            config = config.copy_and_resolve_references()
            config.model.dtype = jnp.dtype(dtype).name
            method = _shallow(name, config)

            def value(params, given):
                embedded = method.embed(params, given, jax.random.key(0))
                loss, _ = method.objective(params, embedded, given, jnp.zeros(()))
                return loss, embedded

            return value

        yield title, model, (models.random_params(_shallow(name, config)), batch)


def _shallow(name: str, config: Any) -> Any:
    """A method with a few layers of the towers: all of them take minutes to compile six times."""
    method = gpu_work.method(name, config)
    for sizes in (method.towers_config.text_config, method.towers_config.vision_config):
        sizes.num_hidden_layers = min(sizes.num_hidden_layers, LAYERS)
    return method


_HEAD = ("query", "key", "value", "output")


def _compare_dtypes(
    function: Callable, arguments: list, device: jax.Device, host: jax.Device
) -> dict[str, Any]:
    """A loss of arrays in float32 and of the same arrays rounded to bfloat16."""
    graded = lambda *x: (function(*x), jax.grad(function, tuple(range(len(x))))(*x))  # noqa: E731
    found = {}
    for precision in ("highest", "bfloat16"):
        dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
        given = [np.asarray(x, dtype) for x in arguments]
        # The reference of bfloat16 inputs gets the rounded ones.
        reference = [x.astype(np.float32) for x in given]
        expected = _on(host, graded, reference, "highest")
        found[precision] = _errors(_on(device, graded, given, precision), expected, precision)
    return found


def _compare_models(
    make: Callable, arguments: tuple, device: jax.Device, host: jax.Device
) -> dict[str, Any]:
    """A model and its gradient by its parameters, the first argument, in three precisions."""
    graded = lambda dtype: jax.value_and_grad(make(dtype), has_aux=True)  # noqa: E731
    expected = _on(host, graded(jnp.float32), arguments, "highest")
    found = {}
    for precision in TOLERANCES:
        dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
        found[precision] = _errors(
            _on(device, graded(dtype), arguments, precision), expected, precision
        )
    return found


def _on(device: jax.Device, function: Callable, arguments: Sequence, precision: str) -> Any:
    """The function's result on a device, as NumPy arrays."""
    with jax.default_device(device), jax.default_matmul_precision(_PRECISIONS[precision]):
        return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


_PRECISIONS = {"highest": "highest", "default": "default", "bfloat16": "default"}


def _errors(found: tuple, expected: tuple, precision: str) -> dict[str, Any]:
    """Relative errors of the value and of the gradient, and whether both are small enough."""
    value, gradient = (relative_error(a, b) for a, b in zip(found, expected, strict=True))
    good = value <= TOLERANCES[precision] and gradient <= TOLERANCES[precision]
    return {"value": value, "gradient": gradient, "good": bool(good)}


def relative_error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all leaves; NaN where one is."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(b**2)) for _, b in pairs)
    return (difference / size) ** 0.5 if size else float("nan")


# Training


def training(report: Any, small: bool) -> None:
    """The stage: 20 steps of configs/rcml.py beside the CPU's, donation and resume."""
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    report.add(device=device.device_kind, steps=STEPS, tolerance=TRAINING_TOLERANCE)
    # The two are compared closely: products are in float32 on both.
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        method, batches, data = default_run(small, root)
        report.add(data=data)
        with jax.default_device(host):
            params = jax.device_get(jax.jit(method.init)(jax.random.key(0), batches[0]))
        runs = {
            "expected": functools.partial(_run, method, params, batches, host, None),
            "found": functools.partial(_run, method, params, batches, device, root),
        }
        found = report.part("found", runs["found"])
        expected = report.part("expected", runs["expected"])
        if found and expected:
            losses = [np.asarray(run["losses"]) for run in (found, expected)]
            largest = float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[1])))
            fell = bool(losses[1][-1] < losses[1][0])
            good = bool(largest <= TRAINING_TOLERANCE and fell)
            report.add(losses={"largest": largest, "fell": fell, "good": good})


def default_run(small: bool, root: pathlib.Path) -> tuple[Any, list[dict], str]:
    """The method of configs/rcml.py, batches of 20 steps, and which data they are of.

    The emoji where they can be prepared here, otherwise random items.
    """
    config = load_config_file(str(gpu_work.CONFIGS / "rcml.py"))
    if not small:
        try:
            config.data.dir = str(root / "data")
            method = build_method(config, root)
            source = iter(method.batches())
            return method, [next(source) for _ in range(STEPS)], "emoji"
        except Exception as error:  # A package is missing, or its fonts cannot be drawn.
            why = f"random items, as the emoji failed: {type(error).__name__}: {error}"[:300]
            config = load_config_file(str(gpu_work.CONFIGS / "rcml.py"))
    else:
        config.update_from_flattened_dict(gpu_work.TINY)
        why = "random items"
    sizes = Sizes(config.batch.relations, config.batch.pairs_per_relation, config.batch.intra_pairs)
    if small:
        sizes = gpu_work.sizes(small)
    gpu_work.set_sizes(config, sizes)
    method = models.relational("rcml", config)
    # Each item is in one pair, as in no batch of the emoji.
    batches = [item_batch(method.towers_config, sizes, seed).padded for seed in range(STEPS)]
    return method, batches, why


def _run(
    method: Any, params: Any, batches: list[dict], device: jax.Device, root: pathlib.Path | None
) -> dict[str, Any]:
    """Losses of the steps; with a folder the state is saved half-way, too, and gone on from."""
    placed = sharding.build("jit", [device], in_place=True)
    transform, _ = optimizer.build(
        method.config.optimizer, method.steps, method.frozen(params), method.decayed(params)
    )
    compiled = placed.compile(step.make_step(method, transform, method.steps))
    with jax.default_device(device):
        state = placed.put_state(step.create(params, transform, jax.random.key(1)))
        losses, facts = [], {}
        for number, batch in enumerate(batches):
            before, batch = state, placed.put_batch(batch)
            if root is not None and number == SAVED_AFTER:
                facts["resume"] = _resume(root, placed, compiled, state, batch)
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))
            if number == 0:
                facts["donation"] = _donation(before)
    return {"losses": losses, **facts}


def _donation(before: Any) -> dict[str, Any]:
    """How many buffers of the state before a step are gone after it."""
    leaves = jax.tree.leaves(before)
    deleted = sum(x.is_deleted() for x in leaves)
    return {"buffers": len(leaves), "deleted": deleted, "good": deleted == len(leaves)}


def _resume(root: pathlib.Path, placed: Any, compiled: Any, state: Any, batch: dict) -> dict:
    """Save the state, read it into another one, and make the next step of both."""
    checkpoints, place = Checkpoints(root), _Place()
    try:
        checkpoints.save(SAVED_AFTER, placed.snapshot(state), place, {"step": SAVED_AFTER})
        checkpoints.wait()
        restored, counters = checkpoints.restore(SAVED_AFTER, placed.snapshot(state), _Place())
    finally:
        checkpoints.close()
    same = _same(restored, state)
    # The steps are of copies, as each uses up its state; the second shows what a step repeats to.
    steps = [
        jax.device_get(compiled(given, batch)[0].params)
        for given in (restored, placed.snapshot(state), placed.snapshot(state))
    ]
    resumed, repeated = (relative_error(x, steps[2]) for x in steps[:2])
    good = same and counters == {"step": SAVED_AFTER} and resumed <= STEP_TOLERANCE
    return {"same_state": same, "step_error": resumed, "repeated_error": repeated, "good": good}


def _same(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit, random keys included."""

    def values(tree: Any) -> list[np.ndarray]:
        is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
        leaves = jax.tree.leaves(tree)
        return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]

    pairs = zip(values(one), values(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


class _Place:
    """Where a data iterator would be, which a checkpoint holds, too."""

    def __init__(self) -> None:
        self.place: dict = {"next": SAVED_AFTER}

    def get_state(self) -> dict:
        return self.place

    def set_state(self, place: dict) -> None:
        self.place = place

"""What is measured: training steps, embedding and evaluation, each as the product runs it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import throughput_flops as flops
from benchmarks import throughput_models as models
from benchmarks.throughput_measure import Program, Work, compile_program
from rcml_jax.evaluation.relation_retrieval import retrieval
from rcml_jax.evaluation.scores import RelationEmbeddings
from rcml_jax.methods.base import Method, Params
from rcml_jax.methods.m3col import M3CoLMethod
from rcml_jax.training import optimizer, sharding, step
from rcml_jax.training.gradcache import check, parts_of

SUBJECTS = ("clip", "rcml", "m3col", "embedding", "evaluation")
TITLES = {"clip": "CLIP step", "rcml": "RCML step"}
PHASES = {"m3co": "M3Co", "multi_soft_clip": "MultiSClip", "clip": "CLIP", "none": "no contrast"}
EMBEDDED_UNDER = (1, 10)
CANDIDATES, RELATIONS = 21, 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for.

    subjects: of SUBJECTS; config: RCML's, None where M3CoL alone is measured; m3col: M3CoL's;
    modes: of `sharding.PARALLEL`; devices: all that take part; counts: of how many of them steps
    are measured, the last all; texts and sentences in tokens, None for the default; embedded:
    items a call; queries: of the evaluation; gallery: its items.
    """

    subjects: Sequence[str]
    config: Any
    m3col: Any
    modes: Sequence[str]
    devices: Sequence[jax.Device]
    counts: Sequence[int]
    text_length: int | None
    sentence_length: int | None
    embedded: int
    queries: int
    gallery: int

    def check(self) -> None:
        """Raise UserError where a batch cannot be split over the devices, before anything runs."""
        trained = {"clip": self.config, "rcml": self.config, "m3col": self.m3col}
        for subject in self.subjects:
            if subject in trained:
                models.check_batch(trained[subject], self.counts[-1])

    def work(self) -> Iterator[Work]:
        """The rows, one after the other; each is placed and compiled only when it is measured."""
        params = functools.cache(
            lambda: models.random_params(models.relational("rcml", self.config))
        )
        for subject in self.subjects:
            if subject in TITLES:
                yield from _relational_steps(self, subject, params)
            elif subject == "m3col":
                yield from _classifier_steps(self)
            elif subject == "embedding":
                yield from _embedding(self, params)
            else:
                yield _evaluation(self)


def _relational_steps(plan: Plan, name: str, params: Callable[[], Params]) -> Iterator[Work]:
    """RCML's steps, or CLIP's on the same towers; params: RCML's."""

    def own() -> Params:
        return {part: x for part, x in params().items() if part != "head" or name == "rcml"}

    for count in plan.counts:
        method = models.relational(name, models.part_of(plan.config, count, plan.counts[-1]))
        sizes = method.config.batch
        text = models.text_length(method, plan.text_length)
        sentence = models.text_length(method, plan.sentence_length, "--sentence-length")
        forward = flops.relational(
            method.towers_config,
            items=sizes.size,
            text_length=text,
            # Beside those of the batch the intra-sample one.
            relations=sizes.relations + 1 if name == "rcml" else 0,
            sentence_length=sentence,
        )
        needed = flops.training(forward, method.frozen_parts)
        batch = functools.partial(models.relation_batch, method, text, sentence)
        yield from _steps(plan, TITLES[name], method, own, batch, needed, count)


def _classifier_steps(plan: Plan) -> Iterator[Work]:
    params = functools.cache(lambda: models.random_params(models.classifier(plan.m3col)))
    for count in plan.counts:
        whole = models.classifier(models.part_of(plan.m3col, count, plan.counts[-1]))
        size = whole.config.batch.size
        text = models.text_length(whole, plan.text_length)
        batch = functools.partial(models.class_batch, whole, size, text)
        for _, phase in whole.phases():
            title = f"M3CoL step, {PHASES[phase.contrastive]}"
            yield from _steps(plan, title, phase, params, batch, class_flops(phase, text), count)


def class_flops(method: M3CoLMethod, text: int) -> int:
    """The model's products in a step of M3CoL with texts of so many tokens."""
    mixes = method.contrastive == "m3co" or method.config.mixup.labels
    forward = flops.classifier(
        models.encoder_configs(method),
        items=method.config.batch.size,
        text_length=text,
        mixed=method.mixed_inputs if mixes else (),
        hidden=method.model.hidden,
        classes=method.model.classes,
    )
    return flops.training(forward)


def _steps(
    plan: Plan,
    title: str,
    method: Method,
    params: Callable[[], Params],
    batch: Callable[[], dict],
    needed: int,
    count: int,
) -> Iterator[Work]:
    """A training step in each parallel mode on the first `count` devices."""
    devices = plan.devices[:count]
    for mode in plan.modes:

        def build(mode: str = mode) -> Program:
            state_devices = method.config.get("fsdp_devices", 0)
            placed = sharding.build(mode, list(devices), state_devices=state_devices)
            return step_program(method, params(), batch(), placed)

        yield Work(title, mode, devices, method.config.batch.size, "items", needed, build)


def step_program(method: Method, params: Params, batch: dict, devices: Any) -> Program:
    """The training step as `training.loop` builds it for a parallel mode on its devices."""
    config, size = method.config, method.config.batch.size
    accumulation = config.get("accumulation", "exact")
    parts = parts_of(size, config.get("micro_batch", 0))
    gathered = len(devices.devices) if isinstance(devices, sharding.Pmap) else 1
    check(accumulation, method, batch, parts, gathered)
    transform, _ = optimizer.build(
        config.optimizer, method.steps, method.frozen(params), method.decayed(params)
    )
    compiled = devices.compile(step.make_step(method, transform, method.steps, accumulation, parts))
    state = devices.put_state(step.create(params, transform, jax.random.key(1)))
    return compile_program(compiled, (state, devices.put_batch(batch)), carries=True)


def _embedding(plan: Plan, params: Callable[[], Params]) -> Iterator[Work]:
    """Texts and images of items under relations whose sentences are encoded ahead.

    On one device, as in the product's evaluation.
    """
    method = models.relational("rcml", plan.config)
    device, text = plan.devices[0], models.text_length(method, plan.text_length)
    pool = pooling(method)

    for count in EMBEDDED_UNDER:
        sizes = {"items": plan.embedded, "text_length": text, "relations": count}
        needed = sum(flops.relational(method.towers_config, **sizes).values())

        def build(count: int = count) -> Program:
            width = method.towers_config.projection_dim
            relation = np.random.default_rng(0).standard_normal((count, width), np.float32)
            items = models.random_items(method, plan.embedded, text)
            return compile_program(pool, jax.device_put((params(), *items, relation), device))

        title = f"embedding, {count} relation" + "s" * (count > 1)
        yield Work(title, "", [device], plan.embedded, "items", needed, build)


def pooling(method: Any) -> jax.stages.Wrapped:
    """The jitted pooling of items, (params, ids, images, relation) → texts and images (n, R, d)."""

    @jax.jit
    def pool(params: Params, ids: jax.Array, images: jax.Array, relation: jax.Array) -> tuple:
        variables = {"params": {name: params[name] for name in ("towers", "head")}}
        shared = relation, jnp.zeros(len(relation), bool)
        return (
            method.model.apply(variables, ids, *shared, method="pool_text"),
            method.model.apply(variables, images, *shared, method="pool_image"),
        )

    return pool


def _evaluation(plan: Plan) -> Work:
    """Retrieval among candidates from embeddings in the host's memory, the product's function."""
    device = plan.devices[0]

    def build() -> Program:
        rng, queries = np.random.default_rng(0), plan.queries
        width = models.relational("rcml", plan.config).towers_config.projection_dim
        shapes = 2 * [(RELATIONS, plan.gallery, width)] + [(RELATIONS, width)]
        text, image, relations = (_unit(rng.standard_normal(x, np.float32)) for x in shapes)
        table = RelationEmbeddings(np.arange(plan.gallery), text, image, relations)
        query = rng.integers(0, plan.gallery, queries)
        candidates = rng.integers(0, plan.gallery, (queries, CANDIDATES))
        relation = rng.integers(0, RELATIONS, queries)

        def call() -> dict:
            with jax.default_device(device):
                return retrieval(table, query, candidates, relation)

        return Program(call, {})

    title = f"evaluation, {CANDIDATES} candidates"
    return Work(title, "", [device], plan.queries, "queries", None, build)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

"""What does a training step of RCML cost beside a CLIP step on the same items?

    python -m benchmarks.train_step
    python -m benchmarks.train_step --small

The steps are those of `rcml_jax.training.step` with the methods' own losses and optimizer: towers,
loss, backward pass and AdamW, the state donated. The batch is random; loading data is left out.
"""

import tempfile
import types
from collections.abc import Callable
from typing import Any

import jax
from transformers import CLIPConfig

from benchmarks import inputs, timing
from configs.rcml import get_config
from rcml_jax.methods.base import Method
from rcml_jax.methods.baselines import BaselineMethod
from rcml_jax.methods.rcml import RCMLMethod
from rcml_jax.models.towers.clip import end_token
from rcml_jax.training import optimizer, step
from rcml_jax.training.sharding import ShardedJit

TARGET = 1.10
CLASSES: dict[str, type[BaselineMethod | RCMLMethod]] = {"clip": BaselineMethod, "rcml": RCMLMethod}
CLIP, PAPER, RCML = "CLIP step", "RCML step, Eq. 1-2 alone", "RCML step, configs/rcml.py"


def configuration(args):
    """configs/rcml.py with the batch that was asked for, and its CLIP configuration."""
    config = get_config()
    if not args.small:
        config.batch.size = args.batch or 16
        config.batch.relations = args.relations or 4
        config.batch.pairs_per_relation = max(1, config.batch.size // (2 * config.batch.relations))
        config.batch.intra_pairs = config.batch.size // 2
    return config, inputs.clip_config(args.small)


def build_method(
    name: str, config, clip_config: CLIPConfig, small: bool
) -> BaselineMethod | RCMLMethod:
    """A method as `train.py` builds it, but without a data set: losses ask the task for nothing."""
    text = clip_config.text_config
    tokenizer = types.SimpleNamespace(vocab_size=text.vocab_size, end_id=end_token(text), pad_id=0)
    task: Any = types.SimpleNamespace(tokenizer=tokenizer)
    config = config.copy_and_resolve_references()
    config.method = name
    with tempfile.TemporaryDirectory() as directory:
        if not small:
            clip_config.save_pretrained(directory)
            config.model.pretrained = directory  # Its configuration; the weights stay random.
        return CLASSES[name](config, task)


def step_function(method: Method, params: dict, batch: dict) -> Callable:
    """One training step a call, compiled as the loop does; the state is kept here, and donated."""
    devices = ShardedJit(jax.devices()[:1])
    adamw, _ = optimizer.build(
        method.config.optimizer, 1000, method.frozen(params), method.decayed(params)
    )
    compiled = devices.compile(step.make_step(method, adamw, 1000))
    state = [devices.put_state(step.create(params, adamw, jax.random.key(1)))]
    batch = devices.put_batch(batch)

    def run():
        state[0], metrics = compiled(state[0], batch)
        return state[0], metrics

    return run


def step_functions(config, clip_config: CLIPConfig, batch: dict, small: bool) -> dict:
    """The steps that are compared, from the same random towers."""
    weights = {RCML: config.loss.identification_weight, PAPER: 0.0, CLIP: 0.0}
    functions, params = {}, None
    for title, config.loss.identification_weight in weights.items():
        config.model.gate = title == RCML
        name = "clip" if title == CLIP else "rcml"
        method = build_method(name, config, clip_config, small)
        if params is None:
            params = jax.device_get(jax.jit(method.init_params)(jax.random.key(0), batch))
        parts = ("towers",) if title == CLIP else ("towers", "head")
        functions[title] = step_function(method, {part: params[part] for part in parts}, batch)
    return functions


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=10)
    parser.add_argument("--small", action="store_true", help="towers and batch of configs/rcml.py")
    parser.add_argument("--batch", type=int, help="items a step (16)")
    parser.add_argument("--relations", type=int, help="relations a step beside the self pairs' (4)")
    parser.add_argument("--text-length", type=int, default=16, help="tokens a text")
    parser.add_argument("--sentence-length", type=int, default=16, help="tokens a relation")
    args = parser.parse_args()
    if args.small and (args.batch or args.relations):
        parser.error("--small has the batch of configs/rcml.py; leave --batch and --relations out")
    config, clip_config = configuration(args)
    sizes = config.batch
    towers = "small towers" if args.small else "ViT-B/32"
    machine = timing.start(
        f"A training step on {sizes.size} items, {sizes.relations} relations of "
        f"{sizes.pairs_per_relation} pairs and {sizes.intra_pairs} self pairs: {towers}"
    )
    batch = inputs.relation_batch(clip_config, sizes, args.text_length, args.sentence_length)
    functions = step_functions(config, clip_config, batch, args.small)

    times = timing.alternate(functions, repeats=args.repeats)
    ratios = [timing.ratio(times, name, CLIP, TARGET) for name in (PAPER, RCML)]
    timing.print_times(times, unit="step")
    timing.print_ratios(ratios)
    figures = {"machine": machine, "towers": towers, "batch": sizes.to_dict(), "ratios": ratios}
    timing.write_json(args.json, {**figures, "seconds": timing.summarise(times)})


if __name__ == "__main__":
    main()

"""How fast are our CLIP towers beside Hugging Face's own Flax classes?

    pip install "transformers<5"                 # the last version with Flax classes is 4.57.6
    python -m benchmarks.towers                  # ViT-B/32, 16 items; about 6 minutes
    python -m benchmarks.towers --small          # the towers of configs/rcml.py

Both are `TwoTowers` with the same parameters, ours and `implementation="hf"`: forward pass, and the
training step of CLIP's loss with AdamW as the training loop compiles it. Beside the times stand the
seconds of compilation, the least of three in turn, and the bytes that XLA plans beside inputs and
outputs. Before anything is timed the two embeddings are compared.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import inputs, timing
from rcml_jax.losses.clip import clip
from rcml_jax.models.two_towers import build_towers

OURS, PEER = "ours", "Hugging Face"
IMPLEMENTATIONS = {OURS: "", PEER: "hf"}
TARGET = 1.0
_COMPILATIONS = 3


def compile_in_turn(jitted: dict[str, Any], arguments: dict[str, tuple]) -> tuple[dict, dict]:
    """Compiled functions, with the seconds that took and the bytes of temporaries planned."""
    compiled: dict = {}
    seconds: dict = {name: [] for name in jitted}
    for _ in range(_COMPILATIONS):
        for name, function in jitted.items():
            jax.clear_caches()  # Else the second compilation is found there.
            lowered = function.lower(*arguments[name])
            start = time.perf_counter()
            compiled[name] = lowered.compile()
            seconds[name].append(time.perf_counter() - start)
    planned = {
        name: {
            "compile_seconds": min(seconds[name]),
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
        }
        for name in jitted
    }
    calls = {name: functools.partial(compiled[name], *arguments[name]) for name in jitted}
    return calls, planned


def passes(config: Any, ids: np.ndarray, pixels: np.ndarray) -> tuple[dict, dict]:
    """By pass and implementation the functions to time, and what their compilation took."""
    adamw = optax.adamw(1e-4)
    jitted: dict = {"forward": {}, "training step": {}}
    arguments: dict = {"forward": {}, "training step": {}}
    params = None
    for name, implementation in IMPLEMENTATIONS.items():
        towers = build_towers(config, implementation=implementation)
        if params is None:
            params = jax.jit(towers.init)(jax.random.key(0), ids[:1], pixels[:1])["params"]

        def embed(params, ids, pixels, towers=towers):
            return towers.apply({"params": params}, ids, pixels)

        def step(params, state, ids, pixels, embed=embed):
            def loss(params):
                out = embed(params, ids, pixels)
                return clip(out["text"], out["image"], temperature=0.07)

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = adamw.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        jitted["forward"][name] = jax.jit(embed)
        arguments["forward"][name] = (params, ids, pixels)
        jitted["training step"][name] = jax.jit(step)
        arguments["training step"][name] = (params, adamw.init(params), ids, pixels)
    functions, compiled = {}, {}
    for title, pair in jitted.items():
        functions[title], compiled[title] = compile_in_turn(pair, arguments[title])
    found = [function() for function in functions["forward"].values()]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *found)
    return functions, compiled


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=12)
    parser.add_argument("--small", action="store_true", help="the towers of configs/rcml.py")
    parser.add_argument("--batch", type=int, help="items a call (16; 256 with --small)")
    parser.add_argument("--text-length", type=int, default=32, help="tokens a text")
    args = parser.parse_args()
    batch = args.batch or (256 if args.small else 16)
    config, rng = inputs.clip_config(args.small), np.random.default_rng(0)
    ids = inputs.token_ids(rng, batch, args.text_length, config)
    pixels = inputs.images(rng, batch, config)
    towers = "small towers" if args.small else "ViT-B/32"
    machine = timing.start(f"{towers}, {batch} items, texts of {args.text_length} tokens")
    functions, compiled = passes(config, ids, pixels)
    figures: dict = {"machine": machine, "towers": towers, "batch": batch, "passes": {}}
    for title, pair in functions.items():
        print(f"\n{title}")
        times = timing.alternate(pair, repeats=args.repeats)
        ratios = [timing.ratio(times, OURS, PEER, TARGET)]
        timing.print_times(times)
        timing.print_ratios(ratios)
        ours, theirs = (compiled[title][name] for name in (OURS, PEER))
        of = {key: ours[key] / theirs[key] for key in ours}
        print(f"compilation {of['compile_seconds']:.3f}, temporaries {of['temporary_bytes']:.3f}")
        figures["passes"][title] = {
            "ratios": ratios,
            "compiled": compiled[title],
            "seconds": timing.summarise(times),
        }
    timing.write_json(args.json, figures)


if __name__ == "__main__":
    main()

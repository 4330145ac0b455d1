"""How fast is RCML beside PyTorch on the same batch: written plainly, and given our own savings?

    pip install -e ".[parity]"
    python -m benchmarks.peers                       # ViT-B/32, about 10 minutes on 2 cores
    python -m benchmarks.peers --parts embedding     # or training, clip; several with commas
    python -m benchmarks.peers --small --repeats 1   # the towers of configs/rcml.py, to try it

The batch is that of `benchmarks/peer_batches.py`, for ours with four titles in a row of tokens, as
configs/rcml.py:amazon has them. *Plain* PyTorch pads all texts to 77 tokens, encodes items and
sentence of each pair and pools pair by pair; *factored* trims texts to the longest, has each
distinct item and sentence once, and our form of the head and the loss. Both use scaled dot-product
attention and fused AdamW. Before anything is timed, what should be equal is compared.
The part "clip" is our CLIP step beside open_clip's, which pads to 77 tokens; it is left out where
open_clip cannot be imported.
"""

import functools
import gc
import importlib
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import embedding, timing, torch_rcml, train_step
from benchmarks.item_batches import TEXTS_PER_ROW
from benchmarks.peer_batches import SIZES, Workload, build_workload
from rcml_jax.data.packing import LENGTHS, pack

OURS, PLAIN, FACTORED = "ours", "plain PyTorch", "factored PyTorch"
OPEN_CLIP = "open_clip"
PARTS = ("training", "embedding", "clip")
# The most that ours may take of the peer's time.
TRAINING_TARGETS = {PLAIN: 1 / 3, FACTORED: 1 / 1.8}
EMBEDDING_TARGETS = {PLAIN: 1 / 2.5, FACTORED: 1 / 1.8}
EMBEDDED_ITEMS = 32
LOSS_TOLERANCE, EMBEDDING_TOLERANCE = 1e-3, 1e-3

Functions = dict[str, Callable[[], Any]]


# The parts: each builds the functions that are timed in turn


def training(load: Workload, args: Any) -> dict:
    """A step of each: forward, loss, backward, AdamW."""
    method = train_step.build_method("rcml", load.config, load.clip_config, args.small)
    params = jax.jit(method.init_params)(jax.random.key(0), load.ours)
    model = peer_model(load, params).train()
    functions: Functions = {OURS: loss_of(train_step.step_function(method, params, load.packed))}
    # The peers share their parameters and the moments of AdamW, to save memory.
    adamw, options = (
        torch_rcml.torch_adamw(model, load.config),
        torch_rcml.loss_options(load.config),
    )
    for name, loss, batch in (
        (PLAIN, torch_rcml.pairs_loss, load.plain),
        (FACTORED, torch_rcml.items_loss, load.factored),
    ):
        loss = compiler(args)(functools.partial(loss, model, batch, **options))
        functions[name] = torch_rcml.step_function(loss, adamw)
    del params
    # Before any update all have the same weights; the plain loss has other negatives (see there).
    expected = float(functions[FACTORED]())
    np.testing.assert_allclose(float(functions[OURS]()), expected, rtol=LOSS_TOLERANCE)
    functions[PLAIN]()
    return measure(functions, args, load.items, "training", TRAINING_TARGETS)


def embeddings(load: Workload, args: Any) -> dict:
    """Embeddings of items under one and ten relations, without gradients.

    Sentences are encoded ahead by ours and by the factored peer, as for a catalogue. The plain
    peer encodes the items once, padded to the limit, and for each relation the sentence beside each
    item; "sentences ahead" spares it these.
    """
    items = load.ours["items"]
    keep = min(EMBEDDED_ITEMS, load.items)
    longest = max(load.title_lengths[:keep])
    width = next(x for x in (*LENGTHS, load.limit) if longest <= x <= load.limit)
    mask = np.arange(items["ids"].shape[1]) < load.title_lengths[:keep, None]
    texts = jax.tree.map(jnp.asarray, pack(items["ids"][:keep], mask, TEXTS_PER_ROW))
    method = train_step.build_method("rcml", load.config, load.clip_config, args.small)
    params = jax.jit(method.init_params)(jax.random.key(0), load.ours)
    relations = jnp.asarray(load.ours["shared"]["relation_ids"][1:])
    ours = embedding.rcml_functions(
        method.model, {"params": params}, texts, jnp.asarray(items["images"][:keep]), relations
    )
    model = peer_model(load, params).eval()
    del params
    figures = {}
    for count in (1, SIZES.relations):
        functions: Functions = {OURS: ours[embedding.rcml(count, True)]}
        peers = peer_embeddings(model, load, keep, width, count, compiler(args))
        functions |= {name: torch.inference_mode()(function) for name, function in peers.items()}
        expected = [z.reshape(keep, count, -1) for z in functions[OURS]()]
        for name in peers:
            for ours_z, theirs in zip(expected, functions[name](), strict=True):
                np.testing.assert_allclose(theirs, ours_z, atol=EMBEDDING_TOLERANCE, err_msg=name)
        title = f"embedding, {count} relation{'s' * (count > 1)}"
        figures[title] = measure(functions, args, keep, title, EMBEDDING_TARGETS)
    return figures


def peer_embeddings(
    model: torch_rcml.TorchRCML, load: Workload, items: int, width: int, count: int, compile: Any
) -> Functions:
    """z_T and z_I (n, count, d) of the first items under the first relations, three ways."""
    full, pad = load.factored, load.clip_config.text_config.pad_token_id
    trimmed = {name: full[name][:items] for name in ("ids", "mask", "pixels")}
    trimmed |= {name: trimmed[name][:, :width] for name in ("ids", "mask")}
    extra = (0, load.limit - width)
    padded = trimmed | {
        "ids": torch.nn.functional.pad(trimmed["ids"], extra, value=pad),
        "mask": torch.nn.functional.pad(trimmed["mask"], extra, value=False),
    }
    room = (0, load.limit - full["relation_ids"].shape[1])
    sentence_ids = torch.nn.functional.pad(full["relation_ids"][1 : count + 1], room, value=pad)
    sentence_mask = torch.nn.functional.pad(full["relation_mask"][1 : count + 1], room)
    no = torch.zeros(max(items, count), dtype=torch.bool)
    with torch.inference_mode():
        ahead = model.text_states(sentence_ids, sentence_mask).pooled

    def factored() -> tuple:
        states = model.text_states(trimmed["ids"], trimmed["mask"], masked=False)
        text = model.pool_all(states, ahead, no[:count])
        return text, model.pool_all(model.image_states(trimmed["pixels"]), ahead, no[:count])

    def one_by_one(relation: Callable[[int], torch.Tensor]) -> tuple:
        both = (
            model.text_states(padded["ids"], padded["mask"]),
            model.image_states(padded["pixels"]),
        )
        embedded: tuple[list, list] = ([], [])
        for e in range(count):
            h = relation(e)
            for states, out in zip(both, embedded, strict=True):
                out.append(model.pool_rows(states, h, no[:items]))
        return tuple(torch.stack(out, dim=1) for out in embedded)

    def sentence_of_each_row(e: int) -> torch.Tensor:
        ids, mask = [x[e : e + 1].repeat(items, 1) for x in (sentence_ids, sentence_mask)]
        return model.text_states(ids, mask).pooled

    functions = {
        FACTORED: factored,
        PLAIN: functools.partial(one_by_one, sentence_of_each_row),
        f"{PLAIN}, sentences ahead": functools.partial(
            one_by_one, lambda e: ahead[e : e + 1].expand(items, -1)
        ),
    }
    return {name: compile(function) for name, function in functions.items()}


def clip_step(load: Workload, args: Any) -> dict:
    """Our CLIP step beside open_clip's, on the same items."""
    if args.small:
        return {"left_out": "open_clip has no model of these sizes"}
    try:
        open_clip = importlib.import_module("open_clip")
    except (ImportError, RuntimeError, OSError) as error:
        return {"left_out": f"open_clip cannot be imported: {error}"}
    method = train_step.build_method("clip", load.config, load.clip_config, args.small)
    params = jax.jit(method.init_params)(jax.random.key(0), load.ours)
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, output_dict=True).train()
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in model.parameters())
    functions: Functions = {OURS: loss_of(train_step.step_function(method, params, load.packed))}
    del params
    pad = (0, load.limit - load.factored["ids"].shape[1])
    texts = torch.nn.functional.pad(load.factored["ids"], pad)  # open_clip pads with 0
    texts[~torch.nn.functional.pad(load.factored["mask"], pad)] = 0
    criterion = open_clip.ClipLoss()

    def loss() -> torch.Tensor:
        return criterion(**model(load.factored["pixels"], texts))

    adamw = torch_rcml.torch_adamw(model, load.config)
    functions[OPEN_CLIP] = torch_rcml.step_function(compiler(args)(loss), adamw)
    for function in functions.values():
        function()
    return measure(functions, args, load.items, "CLIP training", {OPEN_CLIP: None})


# What the parts share


def peer_model(load: Workload, params: Any) -> torch_rcml.TorchRCML:
    """The PyTorch model with our parameters."""
    head = load.config.model
    model = torch_rcml.TorchRCML(load.clip_config, beta=head.beta, pooled_logit=head.pooled_logit)
    return torch_rcml.load(model, params)


def loss_of(step: Callable) -> Callable[[], jax.Array]:
    """The step, returning its loss; it waits for the new state, too."""

    def run() -> jax.Array:
        state, metrics = step()
        jax.block_until_ready(state)
        return metrics["loss"]

    return run


def compiler(args: Any) -> Callable:
    """What the peers' functions go through: torch.compile, or nothing."""
    return torch.compile if args.compile else lambda function: function


def measure(functions: Functions, args: Any, items: int, title: str, targets: dict) -> dict:
    """Time what has been called once already, and print times, ratios and items per second."""
    # PyTorch's threads spin for a while after their work.
    times = timing.alternate(functions, repeats=args.repeats, warmup=0, pause=0.3)
    peers = [name for name in functions if name != OURS]
    ratios = [timing.ratio(times, OURS, peer, targets.get(peer)) for peer in peers]
    summary = timing.summarise(times)
    rates = {name: items / row["median"] for name, row in summary.items()}
    print(f"\n{title}: {items} items a call")
    timing.print_times(times)
    timing.print_ratios(ratios)
    print(f"\n{'items per second':<40}{'':>9}   times as fast, median (p10 - p90)")
    for name, rate in rates.items():
        faster = next((r for r in ratios if r["to"] == name), None)
        row = f"{name:<40}{rate:>9.2f}"
        if faster:
            row += f"   ours {1 / faster['median']:.2f}"
            row += f" ({1 / faster['p90']:.2f} - {1 / faster['p10']:.2f})"
        print(row, flush=True)
    return {"items": items, "ratios": ratios, "items_per_second": rates, "seconds": summary}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--small", action="store_true", help="the towers of configs/rcml.py")
    parser.add_argument("--parts", default=",".join(PARTS), help="of training,embedding,clip")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the peers")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has no {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    _operators = torch_rcml.declare_torchvision()
    load = build_workload(args.small)
    texts, sentences = (load.factored[name].shape[1] for name in ("ids", "relation_ids"))
    towers = "small towers" if args.small else "ViT-B/32"
    machine = timing.start(
        f"32 pairs of {load.items} items under {SIZES.relations + 1} relations, {towers}: titles "
        f"of {np.mean(load.title_lengths):.1f} tokens on average, trimmed to {texts} of "
        f"{load.limit}, {TEXTS_PER_ROW} of them in "
        f"{load.packed['items']['ids'].ids.shape[1]} for ours; "
        f"sentences trimmed to {sentences}"
    )
    machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    measured = {"training": training, "embedding": embeddings, "clip": clip_step}
    figures: dict[str, Any] = {}
    for part in parts:
        figures[part] = measured[part](load, args)
        if "left_out" in figures[part]:
            print(f"\n{part}: not measured, for {figures[part]['left_out']}")
        gc.collect()
    # In KiB on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    print(f"\npeak memory of the process: {peak / 2**30:.1f} GiB")
    figures = {"machine": machine, "towers": towers, "peak_bytes": peak, "parts": figures}
    timing.write_json(args.json, figures | {"compiled": args.compile})


if __name__ == "__main__":
    main()

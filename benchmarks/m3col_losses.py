"""What does each fast form of M3CoL's losses gain over the equation as it stands?

    python -m benchmarks.m3col_losses                                   # ROSMAP's sizes
    python -m benchmarks.m3col_losses --samples 1024 --width 512 --seeds 1

Value and gradient of `m3co` and `multi_soft_clip`, with all samples valid and the mask traced, as
in a run. Five seeds go one after the other, as on a CPU in a run, and with --vmap as one stack.
"plain" is the loss without any fast form; the other forms leave out one each.
"""

import contextlib
import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from rcml_jax.losses import m3co, multi_soft_clip

USED, PLAIN = "as used", "plain"


def reduced_sums(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """`m3co._bidirectional_without_shift` with reductions instead of products with the mask."""

    def total(x, axis):
        return jnp.sum(x, axis=axis, where=jnp.expand_dims(valid, 1 - axis))

    exponentials, tiny = jnp.exp(logits), jnp.finfo(logits.dtype).tiny
    rows, columns = (jnp.log(jnp.maximum(total(exponentials, axis), tiny)) for axis in (1, 0))
    sums = rows * total(targets, 1) + columns * total(targets, 0)
    return jnp.sum(jnp.where(valid, sums - 2 * total(targets * logits, 1), 0))


_reduced_sums = mock.patch.object(m3co, "_bidirectional_without_shift", reduced_sums)
_plain_sums = mock.patch.object(m3co, "_bidirectional_without_shift", m3co._bidirectional)
_plain_gram = mock.patch.object(multi_soft_clip, "_gram", lambda x: x @ x.T)
#: Form → what is replaced.
FORMS: dict[str, dict[str, tuple]] = {
    "m3co": {USED: (), "sums by reductions": (_reduced_sums,), PLAIN: (_plain_sums,)},
    "multi_soft_clip": {
        USED: (),
        "sums by reductions": (_reduced_sums,),
        "sums with a shift": (_plain_sums,),
        "gradient of two products": (_plain_gram,),
        PLAIN: (_plain_sums, _plain_gram),
    },
}


def batches(samples: int, width: int, modalities: int, seeds: int) -> dict[str, tuple]:
    """Random arguments of both losses with a leading axis of seeds."""
    rng = np.random.default_rng(0)

    def embeddings():
        return list(rng.standard_normal((modalities, seeds, samples, width), np.float32))

    clean, where = embeddings(), np.ones((seeds, samples), bool)
    coefficient = rng.beta(0.15, 0.15, (seeds, samples)).astype(np.float32)
    partner = [
        np.stack([rng.permutation(samples) for _ in range(seeds)]) for _ in range(modalities)
    ]
    found = {
        "m3co": ((clean, embeddings()), coefficient, partner, where),
        "multi_soft_clip": ((clean,), where),
    }
    return jax.tree.map(jnp.asarray, found)


def loss_of(name: str) -> Callable:
    """The loss as a function of (embeddings, others)."""
    if name == "m3co":
        return lambda z, coefficient, partner, where: m3co.m3co(
            z[0], z[1], coefficient, partner, where=where
        )
    return lambda z, where: multi_soft_clip.multi_soft_clip(*z, where=where)


def compiled(name: str, patches: tuple, args: tuple, vmap: bool) -> Callable:
    """Value and gradient of a loss with some forms replaced, for all seeds."""
    one = jax.value_and_grad(loss_of(name))
    every = jax.vmap(one) if vmap else lambda *args: jax.lax.map(lambda x: one(*x), args)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return functools.partial(jax.jit(every).lower(*args).compile(), *args)


def check(functions: dict[str, Callable]) -> float:
    """The largest difference of the forms, in value and gradient; leaves if it is not tiny."""
    first, *others = (jax.tree.leaves(function()) for function in functions.values())
    pairs = [(a, b) for other in others for a, b in zip(other, first, strict=True)]
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    if not difference < 1e-4:
        raise SystemExit(f"the forms differ by {difference}; nothing was measured")
    return difference


def main() -> None:
    """Time the forms of both losses in turn, and print their ratios to the equation."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=30)
    parser.add_argument("--samples", type=int, default=245)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--modalities", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--vmap", action="store_true", help="the seeds as one stack")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("samples", "width", "modalities", "seeds")}
    machine = timing.start(f"Losses of M3CoL, value and gradient: {sizes}, vmap {args.vmap}")
    figures: dict = {"machine": machine, **sizes, "vmap": args.vmap, "losses": {}}
    for name, given in batches(**sizes).items():
        functions = {f: compiled(name, p, given, args.vmap) for f, p in FORMS[name].items()}
        print(f"\n{name}: largest difference of the forms {check(functions):.1e}")
        times = timing.alternate(functions, repeats=args.repeats)
        ratios = [timing.ratio(times, form, PLAIN) for form in functions if form != PLAIN]
        timing.print_times(times)
        timing.print_ratios(ratios)
        figures["losses"][name] = {"ratios": ratios, "seconds": timing.summarise(times)}
    timing.write_json(args.json, figures)


if __name__ == "__main__":
    main()

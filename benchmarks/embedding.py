"""What does embedding items under relations cost beside CLIP's own embedding of them?

    python -m benchmarks.embedding
    python -m benchmarks.embedding --small

Peers: CLIP on the same towers (`TwoTowers`, which projects every token) and Hugging Face's own
Flax CLIP (which projects the pooled token alone), where transformers has it. Each call embeds
texts and images of a batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from benchmarks import inputs, timing
from configs.rcml import get_config
from rcml_jax.errors import UserError
from rcml_jax.models.rcml import RCML
from rcml_jax.models.towers.clip import IMAGE_MEAN, IMAGE_STD
from rcml_jax.models.towers.hf_flax import hugging_face_classes
from rcml_jax.models.two_towers import TwoTowers

TARGETS = {1: 1.05, 10: 1.15}
CLIP, HUGGING_FACE = "CLIP", "CLIP (Hugging Face)"


def rcml(count: int, encoded: bool) -> str:
    """What a row of RCML is called."""
    noun = "relation" if count == 1 else "relations"
    return f"RCML, {count} {noun}" + ("" if encoded else " + sentences")


def clip_functions(config, towers, ids, pixels) -> dict:
    """CLIP's embeddings of texts and images, from our towers and from Hugging Face's model.

    The latter is left out where transformers has no Flax classes. Raises AssertionError where the
    two differ.
    """
    ours = TwoTowers(config)
    own = jax.jit(lambda params, ids, pixels: ours.apply({"params": params}, ids, pixels))
    functions = {CLIP: functools.partial(own, towers, ids, pixels)}
    try:
        theirs = hugging_face_classes().FlaxCLIPModule(config)
    except UserError:
        print(f"{HUGGING_FACE} is left out: this transformers has no Flax classes.")
        return functions

    def hugging_face(params, ids, pixels):
        pixels = (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(
            IMAGE_STD
        )
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        out = theirs.apply({"params": params}, ids, pixels, jnp.ones_like(ids), positions)
        # The logits are left out, so the compiler drops them.
        return {"text": out.text_embeds, "image": out.image_embeds}

    functions[HUGGING_FACE] = functools.partial(jax.jit(hugging_face), towers, ids, pixels)
    embedded = [function() for function in functions.values()]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *embedded)
    return functions


def rcml_functions(model, variables, ids, pixels, relation_ids) -> dict:
    """RCML's embeddings of texts and images under relations.

    With the sentences encoded ahead, as in the evaluation, and inside the call.
    """

    @jax.jit
    def ahead(variables, ids, pixels, relation):
        intra = jnp.zeros(relation.shape[0], bool)
        text = model.apply(variables, ids, relation, intra, method="pool_text")
        image = model.apply(variables, pixels, relation, intra, method="pool_image")
        return text, image

    inside = jax.jit(lambda variables, ids, pixels, r: model.apply(variables, r, ids, pixels))
    encode = jax.jit(lambda variables, ids: model.apply(variables, ids, method="relation"))
    functions = {}
    for count in TARGETS:
        some = relation_ids[:count]
        relation = encode(variables, some)
        functions[rcml(count, True)] = functools.partial(ahead, variables, ids, pixels, relation)
        functions[rcml(count, False)] = functools.partial(inside, variables, ids, pixels, some)
    return functions


def build_functions(args, batch: int) -> dict:
    """Everything that is compared, on the same random towers and items."""
    config, rng = inputs.clip_config(args.small), np.random.default_rng(0)
    ids = jnp.asarray(inputs.token_ids(rng, batch, args.text_length, config))
    pixels = jnp.asarray(inputs.images(rng, batch, config))
    sentences = jnp.asarray(inputs.token_ids(rng, max(TARGETS), args.sentence_length, config))
    head = get_config().model
    model = RCML(config, FrozenDict(beta=head.beta, pooled_prior=head.pooled_prior))
    variables = jax.jit(model.init)(jax.random.key(0), sentences[:1], ids[:1], pixels[:1])
    functions = clip_functions(config, variables["params"]["towers"], ids, pixels)
    return functions | rcml_functions(model, variables, ids, pixels, sentences)


def main() -> None:
    """Measure, print and write."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=20)
    parser.add_argument("--small", action="store_true", help="the towers of configs/rcml.py")
    parser.add_argument("--batch", type=int, help="items a call (8; 256 with --small)")
    parser.add_argument("--text-length", type=int, default=32, help="tokens a text")
    parser.add_argument("--sentence-length", type=int, default=32, help="tokens a relation")
    args = parser.parse_args()
    batch = args.batch or (256 if args.small else 8)
    towers = "small towers" if args.small else "ViT-B/32"
    machine = timing.start(f"Embedding {batch} items, texts of {args.text_length} tokens: {towers}")

    functions = build_functions(args, batch)
    times = timing.alternate(functions, repeats=args.repeats)
    ratios = [timing.ratio(times, rcml(n, True), CLIP, TARGETS[n]) for n in TARGETS]
    if HUGGING_FACE in times:
        ratios += [timing.ratio(times, rcml(n, True), HUGGING_FACE, TARGETS[n]) for n in TARGETS]
    ratios += [timing.ratio(times, rcml(n, False), CLIP) for n in TARGETS]
    timing.print_times(times, per=batch, unit="item")
    timing.print_ratios(ratios)
    figures = {"machine": machine, "towers": towers, "batch": batch, "ratios": ratios}
    timing.write_json(args.json, {**figures, "seconds": timing.summarise(times)})


if __name__ == "__main__":
    main()

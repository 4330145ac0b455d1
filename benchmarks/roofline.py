"""How fast could a training step be at best? The floor of its time, from data sheets alone.

    python -m benchmarks.roofline
    python -m benchmarks.roofline --model vit-l-14 --items 256 --chips 256 --method clip

Nothing is run: docs/explanation/roofline.md has the formulas, which are the functions below. A chip
has `--items` texts and images in each step, in bfloat16, with AdamW in float32.
"""

import argparse
import dataclasses

import jax
from transformers import CLIPConfig

from benchmarks import throughput_flops as flops
from rcml_jax.cli.commands import guard
from rcml_jax.models.two_towers import towers_shapes

#: Widths, layers and heads of text and image tower, patch size, joint width: OpenAI's CLIP and
#: OpenCLIP's ViT-H/14.
MODELS = {
    "vit-b-32": ((512, 12, 8), (768, 12, 12), 32, 512),
    "vit-l-14": ((768, 12, 12), (1024, 24, 16), 14, 768),
    "vit-h-14": ((1024, 24, 16), (1280, 32, 16), 14, 1024),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bytes a second of its memory, and that it can send to the others while it receives as many.

    Data sheets of NVIDIA (SXM modules; half of NVLink's total) and the pages on TPU versions of
    Google Cloud's documentation (half of the bidirectional bandwidth). The peak rate of products is
    `benchmarks.throughput_flops.PEAKS`.
    """

    kind: str
    memory: float
    link: float

    @property
    def rate(self) -> float:
        """FLOP/s of products in bfloat16."""
        found = flops.peak(self.kind, "bfloat16")
        assert found is not None
        return found


CHIPS = {
    "H100": Chip("NVIDIA H100 80GB HBM3", 3.35e12, 450e9),
    "A100": Chip("NVIDIA A100-SXM4-80GB", 2.039e12, 300e9),
    "v5e": Chip("TPU v5 lite", 819e9, 200e9),
    "v6e": Chip("TPU v6 lite", 1640e9, 400e9),
}
#: Bytes of HBM traffic of a parameter in a step: AdamW reads and writes parameter and two moments
#: (24) and reads the gradient (4), which is written once (4); forward and backward pass read the
#: parameter (8).
PARAMETER_BYTES = 40
#: Bytes that a layer keeps for the backward pass, for each token and unit of width, in bfloat16 and
#: with fused attention (Korthikanti et al. 2022, arXiv 2205.05198, without the attention's matrix).
ACTIVATION_BYTES = 34


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on one of `chips` chips: products, memory traffic, and what it receives.

    loss: FLOP of the loss, a part of `flop`; gathered: bytes of embeddings, forward and backward;
    gradients: bytes of the all-reduce of the gradient.
    """

    items: int
    flop: float
    loss: float
    traffic: float
    gathered: float
    gradients: float

    def floor(self, chip: Chip) -> float:
        """Seconds that the step takes at least if communication is hidden."""
        return max(self.flop / chip.rate, self.traffic / chip.memory)

    def hidden_from(self, chip: Chip) -> float:
        """Items a chip from which the backward pass is as long as the gradient's all-reduce."""
        backward = 2 / 3 * (self.flop - self.loss) / self.items / chip.rate
        return self.gradients / chip.link / backward


def clip_config(name: str) -> CLIPConfig:
    """The configuration of a model of `MODELS`."""
    text, image, patch, joint = MODELS[name]
    sizes = [
        {"hidden_size": width, "num_hidden_layers": n, "num_attention_heads": heads}
        | {"intermediate_size": 4 * width, "projection_dim": joint}
        for width, n, heads in (text, image)
    ]
    sizes[1] |= {"patch_size": patch, "image_size": 224}
    return CLIPConfig(text_config=sizes[0], vision_config=sizes[1], projection_dim=joint)


def parameters(config: CLIPConfig, relations: int) -> int:
    """The number of parameters: CLIP's, and with relations the head's four matrices."""
    towers = sum(x.size for x in jax.tree.leaves(towers_shapes(config)))
    return towers + (4 * config.projection_dim**2 if relations else 0)


def step(
    config: CLIPConfig, *, items: int, chips: int, length: int, relations: int, sentence: int = 16
) -> Step:
    """What a step costs. relations: R that items are pooled under, the intra-sample one among them.

    length, sentence: tokens of a text and of a relation's sentence. 0 relations: CLIP.
    """
    text, vision, width = config.text_config, config.vision_config, config.projection_dim
    parts = flops.relational(
        config,
        items=items,
        text_length=length,
        relations=relations,
        sentence_length=sentence if relations else 0,
    )
    everything = items * chips
    # Forward: of CLIP one (n, N) product of width d; of RCML, whose P = N / 2 pairs are 4 P queries
    # against 2 N candidates, 4 n N. Twice that backward.
    loss = 3 * 2 * width * items * everything * (4 if relations else 1)
    tokens = (
        (length, text.hidden_size, text.num_hidden_layers),
        (flops.image_tokens(vision), vision.hidden_size, vision.num_hidden_layers),
    )
    kept = sum(items * n * d * layers * ACTIVATION_BYTES for n, d, layers in tokens)
    size = parameters(config, relations)
    others = (chips - 1) / chips
    # Of CLIP the compiler gathers one modality in bfloat16 and scatters the sum of its gradients in
    # float32. RCML's candidates stay where they are: its pairs' rows, one an item and modality
    # whatever the relations, are summed over the devices both ways, which sends twice what a gather
    # or a reduce-scatter does.
    sent = everything * width * (2 + 4) * (2 * 2 if relations else 1)
    return Step(
        items=items,
        flop=flops.training(parts) + loss,
        loss=loss,
        traffic=size * PARAMETER_BYTES + 2 * kept,
        gathered=others * sent,
        gradients=2 * others * 4 * size,
    )


def table(names: list[str], method: str, model: str, sizes: list[int], **options: int) -> str:
    """A Markdown table with a row for each chip and batch."""
    relations = options.pop("relations") + 1 if method == "rcml" else 0
    options.pop("relations", None)
    header = (
        "chip", "items a chip", "TFLOP", "loss %", "GB of memory traffic", "floor ms", "bound by",
        "images/s", "embeddings ms", "gradient ms", "gradient hidden from",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name in names:
        chip = CHIPS[name]
        for items in sizes:
            found = step(clip_config(model), items=items, relations=relations, **options)
            floor = found.floor(chip)
            bound = "products" if floor == found.flop / chip.rate else "memory"
            cells = (
                name, f"{items:,}", f"{found.flop / 1e12:.2f}",
                f"{100 * found.loss / found.flop:.1f}", f"{found.traffic / 1e9:.1f}",
                f"{1e3 * floor:.1f}", bound, f"{items / floor:,.0f}",
                f"{1e3 * found.gathered / chip.link:.2f}",
                f"{1e3 * found.gradients / chip.link:.2f}", f"{found.hidden_from(chip):,.0f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("clip", "rcml"), default="rcml")
    parser.add_argument("--model", choices=tuple(MODELS), default="vit-b-32")
    parser.add_argument("--chip", choices=tuple(CHIPS), action="append", help="default: all")
    parser.add_argument(
        "--items", type=int, action="append", help="of each chip; default: 128, 1024"
    )
    parser.add_argument("--chips", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--relations", type=int, default=8, help="without the intra-sample one")
    args = parser.parse_args()
    names, sizes = args.chip or list(CHIPS), args.items or [128, 1024]
    options = {"chips": args.chips, "length": args.length, "relations": args.relations}
    print(f"{args.method}, {args.model}, {args.chips} chips, bfloat16\n")
    print(table(names, args.method, args.model, sizes, **options))
    return 0


if __name__ == "__main__":
    raise SystemExit(guard(lambda _: main(), None))

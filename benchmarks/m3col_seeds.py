"""How fast are five seeds of M3CoL in one compiled step, beside plain PyTorch one by one?

    pip install -e ".[parity]"
    python -m benchmarks.m3col_seeds                 # the sizes of configs/m3col.py:rosmap
    python -m benchmarks.m3col_seeds --width 1000    # the paper's width

Random tables of ROSMAP's sizes. Both sides do the paper's step: input mixing, M3Co or MultiSClip,
uni-modal and fused cross-entropy, Adam with coupled weight decay; the PyTorch side is the same
model written as one would. A step is timed with M3Co and with MultiSClip, and a run counted as a
third of the one and two thirds of the other. Both start anew after as many steps as a run has: much
later subnormal numbers would make PyTorch's step twice as long.
"""

import abc
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import timing
from rcml_jax.cli.commands import load_config_file
from rcml_jax.methods import build
from rcml_jax.training import optimizer as optimizers
from rcml_jax.training import sharding
from rcml_jax.training.step import create, make_step

ROOT = pathlib.Path(__file__).parent.parent
PLAIN, OURS = "plain PyTorch", "ours"
PHASES = ("m3co", "multi_soft_clip")
ROWS, TEST_ROWS, FEATURES, VIEWS = 245, 106, 200, 3


def write_tables(folder: pathlib.Path) -> None:
    """Random files in the layout of MOGONET."""
    rng = np.random.default_rng(0)
    for part, rows in (("tr", ROWS), ("te", TEST_ROWS)):
        for view in range(1, VIEWS + 1):
            np.savetxt(folder / f"{view}_{part}.csv", rng.random((rows, FEATURES)), delimiter=",")
        np.savetxt(folder / f"labels_{part}.csv", np.arange(rows) % 2)


class Side(abc.ABC):
    """One of the two that are compared, trained anew after every `steps` steps."""

    steps: int
    _done = 0

    def __call__(self, phase: str) -> Any:
        """One step of a phase; its loss."""
        if self._done % self.steps == 0:
            self.start()
        self._done += 1
        return self.step(phase)

    @abc.abstractmethod
    def start(self) -> None:
        """Go back to random parameters."""

    @abc.abstractmethod
    def step(self, phase: str) -> Any:
        """Take a step and return its loss."""


class Ours(Side):
    """The compiled step of the product, at a step with M3Co or with MultiSClip."""

    def __init__(self, folder: pathlib.Path, seeds: int, options: dict):
        config = load_config_file(f"{ROOT / 'configs' / 'm3col.py'}:rosmap,path={folder}")
        config.update_from_flattened_dict({"seeds": seeds, "data.folds": 0} | options)
        method = build(config, folder)
        batch = next(method.batches())
        params = method.init(jax.random.key(0), batch)
        transform, _ = optimizers.build(
            config.optimizer, method.steps, method.frozen(params), method.decayed(params)
        )
        steps = [make_step(phase, transform, method.steps) for _, phase in method.phases()]
        self._place = sharding.build("jit", jax.devices(), method.in_place)
        self._compiled = dict(zip(PHASES, map(self._place.compile, steps), strict=True))
        self._batch = jax.device_put(batch)
        self._first = self._place.put_state(create(params, transform, jax.random.key(1)))
        self.config, self.steps = config, method.steps

    def start(self) -> None:
        """From a copy of the first state, as a step uses its state up."""
        self._state = self._place.snapshot(self._first)

    def step(self, phase: str) -> jax.Array:
        """One compiled step of all models."""
        self._state, metrics = self._compiled[phase](self._state, self._batch)
        return metrics["loss"]


def mlp(sizes: list[int], dropout: float) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them, Glorot normal weights, zero biases."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class Plain(Side):
    """M3CoL in PyTorch, one seed."""

    def __init__(self, folder: pathlib.Path, config, steps: int):
        torch.manual_seed(0)
        tables = [np.loadtxt(folder / f"{v}_tr.csv", delimiter=",") for v in range(1, VIEWS + 1)]
        self.inputs = [torch.tensor((x - x.min(0)) / np.ptp(x, 0)).float() for x in tables]
        self.labels = torch.tensor(np.loadtxt(folder / "labels_tr.csv")).long()
        self.config, self.steps = config, steps

    def start(self) -> None:
        """New modules and a new optimizer."""
        width, dropout = self.config.model.width, self.config.model.dropout
        self.encoders = nn.ModuleList(mlp([FEATURES, width, width], dropout) for _ in range(VIEWS))
        self.heads = nn.ModuleList(mlp([width, width, 2], dropout) for _ in range(VIEWS))
        self.fusion = mlp([VIEWS * width, width, 2], dropout)
        parameters = [*self.encoders.parameters(), *self.heads.parameters()]
        self.adam = torch.optim.Adam(
            [*parameters, *self.fusion.parameters()],
            lr=self.config.optimizer.learning_rate,
            weight_decay=self.config.optimizer.weight_decay,
        )

    def step(self, phase: str) -> np.ndarray:
        """One step, written as one would."""
        z = [encode(x) for encode, x in zip(self.encoders, self.inputs, strict=True)]
        logits = [head(x) for head, x in zip(self.heads, z, strict=True)]
        loss = F.cross_entropy(self.fusion(torch.cat(z, dim=1)), self.labels)
        loss = loss + sum(F.cross_entropy(x, self.labels) for x in logits)
        unit = [F.normalize(x, dim=1) for x in z]
        term = self._m3co(unit) if phase == "m3co" else self._multi_soft_clip(unit)
        loss = loss + self.config.loss.contrastive_weight * term
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach().numpy()

    def _m3co(self, unit: list[torch.Tensor]) -> torch.Tensor:
        count, options = len(self.labels), self.config.mixup
        share = torch.distributions.Beta(options.alpha, options.alpha).sample((count, 1))
        mixed, targets = [], []
        for encode, x in zip(self.encoders, self.inputs, strict=True):
            partner = torch.randperm(count)
            z = encode(share * x + (1 - share) * x[partner])
            mixed.append(F.normalize(z, dim=1))
            target = torch.zeros(count, count)
            target[torch.arange(count), torch.arange(count)] += share[:, 0]
            target[torch.arange(count), partner] += 1 - share[:, 0]
            targets.append(target)
        total: Any = 0.0
        for a, b in itertools.permutations(range(VIEWS), 2):
            total = total + self._both(mixed[a] @ unit[b].T, targets[a]) / 2
        return total

    def _multi_soft_clip(self, unit: list[torch.Tensor]) -> torch.Tensor:
        total: Any = 0.0
        for a, b in itertools.permutations(range(VIEWS), 2):
            target = torch.softmax(unit[a] @ unit[a].T / self.config.loss.temperature, dim=1)
            total = total + self._both(unit[b] @ unit[a].T, target) / 2
        return total

    def _both(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = scores / self.config.loss.temperature
        rows, columns = scores.log_softmax(dim=1), scores.log_softmax(dim=0)
        return -(target * (rows + columns)).sum() / len(scores)


def in_a_row(step: Callable, phase: str, count: int) -> Callable:
    """`count` steps of a phase, one after the other as in a run."""

    def steps() -> object:
        for _ in range(count):
            result = step(phase)
        return result

    return steps


def run_times(times: timing.Times, name: str, share: float) -> np.ndarray:
    """Seconds of an average step of a run, a seed: `share` of M3Co, the rest of MultiSClip."""
    return share * times[f"{name}, m3co"] + (1 - share) * times[f"{name}, multi_soft_clip"]


def main() -> None:
    """Time both phases of both in turn, and print the ratio per seed."""
    parser = timing.parser(__doc__.splitlines()[0], repeats=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="timed in a row, of every seed")
    parser.add_argument("--width", type=int, default=0, help="0: the configuration's")
    args = parser.parse_args()
    options = {"model.width": args.width} if args.width else {}
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        write_tables(folder)
        ours = Ours(folder, args.seeds, options)
        plain = Plain(folder, ours.config, ours.steps)
        width = ours.config.model.width
        machine = timing.start(f"M3CoL on tables of ROSMAP's sizes, width {width}: seconds a step")
        machine["torch"] = torch.__version__
        # One call trains every seed for as many steps: five at once, or one by one.
        sides = {PLAIN: (plain, args.seeds * args.steps), OURS: (ours, args.steps)}
        functions = {
            f"{name}, {phase}": in_a_row(side, phase, count)
            for name, (side, count) in sides.items()
            for phase in PHASES
        }
        times = timing.alternate(functions, repeats=args.repeats, warmup=2, pause=0.3)
    times = {name: seconds / (args.seeds * args.steps) for name, seconds in times.items()}
    share = ours.config.loss.m3co_share
    per_seed = {
        PLAIN: run_times(times, PLAIN, share),
        OURS: run_times(times, OURS, share),
    }
    ratios = [timing.ratio(per_seed, PLAIN, OURS)]
    timing.print_times(times | per_seed, unit="step and seed")
    timing.print_ratios(ratios)
    figures = {"machine": machine, "seeds": args.seeds, "width": width, "ratios": ratios}
    timing.write_json(args.json, {**figures, "seconds": timing.summarise(times | per_seed)})


if __name__ == "__main__":
    main()

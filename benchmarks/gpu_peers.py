"""PyTorch's side: RCML plain and factored, and open_clip, on the batch of benchmarks/gpu_speed.py.

bfloat16 by autocast on float32 weights, as ours computes; `torch.compile` and fused AdamW; TF32
allowed where something stays in float32. JAX, which draws the weights, sees the CPU alone here.
"""

import functools
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from benchmarks import gpu_work, timing
from benchmarks import throughput_models as models
from benchmarks.item_batches import item_batch

PLAIN, FACTORED, OPEN_CLIP = "plain PyTorch", "factored PyTorch", "open_clip, CLIP step"
IN_A_ROW = 4
_PRODUCT, _SMALL_PRODUCT = 8192, 256


def peers(report: Any, small: bool) -> None:
    """The stage: a training step of each, compiled where there is a GPU."""
    if importlib.util.find_spec("torch") is None:
        report.add(left_out="torch is not installed")
        return
    import torch

    from benchmarks import torch_rcml

    _operators = torch_rcml.declare_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    compiles = device.type == "cuda"
    report.add(
        device=torch.cuda.get_device_name() if compiles else "cpu",
        torch=torch.__version__,
        compiled=compiles,
        float32_products="TF32 allowed" if compiles else "float32",
    )
    side = _Side(torch, torch_rcml, device, small)
    rounds, count = (2, 1) if small else (10, IN_A_ROW)
    if report.warm_up:
        for name in (FACTORED, PLAIN, OPEN_CLIP):
            report.part(name, functools.partial(side.first, name))
        return
    report.part("product", side.product)
    for name in (FACTORED, PLAIN):
        report.part(name, functools.partial(side.measured, name, rounds, count))
    if all(name in side.steps for name in (FACTORED, PLAIN)):
        report.part("in turn", functools.partial(side.in_turn, (FACTORED, PLAIN), rounds, count))
    # open_clip has weights of its own, for which there must be room.
    side.release()
    if small or importlib.util.find_spec("open_clip") is None:
        report.add(open_clip="left out: not installed, or no model of these sizes")
        return
    report.part(OPEN_CLIP, functools.partial(side.measured, OPEN_CLIP, rounds, count))


class _Side:
    """PyTorch's steps on one device; each is made when it is asked for."""

    def __init__(self, torch: Any, peer: Any, device: Any, small: bool):
        self.torch, self.peer, self.device, self.small = torch, peer, device, small
        sizes = gpu_work.sizes(small)
        config = gpu_work.configuration(small, sizes)
        self.config = gpu_work.paper_loss(config)
        self.method = gpu_work.method("rcml", self.config)
        self.batch = item_batch(self.method.towers_config, sizes).padded
        self.items = sizes.items
        self.steps: dict[str, Callable[[], Any]] = {}
        self._model: Any = None

    def first(self, name: str) -> dict[str, Any]:
        """Make a step and run it once: its loss and the seconds it took.

        The loss of the factored form, which is measured first, is that of the weights that ours
        begins with.
        """
        self._reset()
        start = time.perf_counter()
        make = self._open_clip if name == OPEN_CLIP else functools.partial(self._rcml, name)
        step = make()
        loss = float(step())
        self._wait()
        self.steps[name] = step
        return {"first_loss": loss, "first_s": time.perf_counter() - start}

    def measured(self, name: str, rounds: int, count: int) -> dict[str, Any]:
        """Seconds of a step, several in a row, and the most memory that it needed."""
        row = self.first(name)
        times = timing.alternate({name: self._several(name, count)}, repeats=rounds, warmup=1)
        row |= timing.summarise({name: times[name] / count})[name]
        row["items"], row["items_per_second"] = self.items, self.items / row["median"]
        return row | {"peak_bytes": self._peak()}

    def in_turn(self, names: tuple[str, str], rounds: int, count: int) -> dict[str, Any]:
        """The steps in turn: seconds, and the ratio of the first to the second."""
        calls = {name: self._several(name, count) for name in names}
        times = timing.alternate(calls, repeats=rounds, warmup=1)
        times = {name: seconds / count for name, seconds in times.items()}
        return {"rows": timing.summarise(times), "ratios": [timing.ratio(times, *names)]}

    def product(self) -> dict[str, Any]:
        """A matrix product in bfloat16, as `gpu_speed.ceilings` has it."""
        size, count = (_SMALL_PRODUCT, 2) if self.small else (_PRODUCT, 20)
        options = {"device": self.device, "dtype": self.torch.bfloat16}
        a, b = (self.torch.randn(size, size, **options) for _ in range(2))

        def several() -> None:
            for _ in range(count):
                a @ b
            self._wait()

        times = timing.alternate({"": several}, repeats=5)
        seconds = timing.summarise(times)[""]["median"] / count
        return {"size": size, "seconds": seconds, "flops_per_second": 2 * size**3 / seconds}

    def release(self) -> None:
        """Give up the steps and their memory."""
        self.steps.clear()
        self._model = None
        self._reset()

    def _rcml(self, name: str) -> Callable[[], Any]:
        from benchmarks.peer_batches import factored_batch, plain_batch

        torch, peer, clip = self.torch, self.peer, self.method.towers_config
        if self._model is None:
            head = self.config.model
            model = peer.TorchRCML(clip, beta=head.beta, pooled_logit=head.pooled_logit)
            model = peer.load(model, models.random_params(self.method)).to(self.device).train()
            # The two share weights and moments.
            self._model = model, peer.torch_adamw(model, self.config)
        model, adamw = self._model
        factored = factored_batch(self.batch, clip)
        if name == FACTORED:
            loss, batch = peer.items_loss, factored
        else:
            limit, pad = clip.text_config.max_position_embeddings, clip.text_config.pad_token_id
            loss, batch = peer.pairs_loss, plain_batch(factored, limit, pad)
        batch = {key: x.to(self.device) for key, x in batch.items()}
        loss = functools.partial(loss, **peer.loss_options(self.config))

        def forward() -> Any:
            with torch.autocast(self.device.type, torch.bfloat16):
                return loss(model, batch)

        return peer.step_function(self._compiled(forward), adamw)

    def _open_clip(self) -> Callable[[], Any]:
        """CLIP's step of open_clip, all texts padded to 77 tokens."""
        from benchmarks.peer_batches import factored_batch

        torch, open_clip = self.torch, importlib.import_module("open_clip")
        model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, output_dict=True)
        model = model.to(self.device).train()
        batch = factored_batch(self.batch, self.method.towers_config)
        longest = self.method.towers_config.text_config.max_position_embeddings
        texts = batch["ids"].masked_fill(~batch["mask"], 0)  # open_clip pads with 0
        texts = torch.nn.functional.pad(texts, (0, longest - texts.shape[1])).to(self.device)
        pixels, criterion = batch["pixels"].to(self.device), open_clip.ClipLoss()

        def forward() -> Any:
            with torch.autocast(self.device.type, torch.bfloat16):
                return criterion(**model(pixels, texts))

        adamw = self.peer.torch_adamw(model, self.config)
        return self.peer.step_function(self._compiled(forward), adamw)

    def _compiled(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return self.torch.compile(function) if self.device.type == "cuda" else function

    def _several(self, name: str, count: int) -> Callable[[], Any]:
        step = self.steps[name]

        def several() -> None:
            for _ in range(count):
                step()
            self._wait()

        return several

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        cuda = self.device.type == "cuda"
        return self.torch.cuda.max_memory_allocated() if cuda else None

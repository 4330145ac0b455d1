"""Where the figures of a run go: `metrics.jsonl` and TensorBoard."""

import json
import math
import pathlib
from typing import Any

from rcml_jax import files
from rcml_jax.errors import UserError
from rcml_jax.training.sharding import is_primary


def flatten(metrics: dict, prefix: str = "") -> dict[str, float]:
    """Nested metrics → slash-separated names; what is no finite number is left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        elif math.isfinite(value):  # JSON has no other
            flat[prefix + name] = float(value)
    return flat


class MetricsWriter:
    """Appends one JSON object a line to `<workdir>/metrics.jsonl`, and TensorBoard files if asked.

    Of several processes the first one writes.

    Lines past `step`, left by a run that was killed after its last checkpoint, are dropped, so that
    a resumed run writes the file that an uninterrupted one would.
    """

    def __init__(self, workdir: pathlib.Path, *, step: int = 0, tensorboard: bool = False):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        self._board = None
        self._primary = is_primary()
        if not self._primary:
            return
        self._board = _tensorboard(workdir, step) if tensorboard else None
        if self._path.is_file():
            whole = [line for line in self._path.read_text().splitlines() if _step(line) <= step]
            files.write_whole(self._path, "".join(line + "\n" for line in whole))

    def write(self, step: int, kind: str, metrics: dict) -> None:
        """Write the metrics of a step; kind is "train" or "validation"."""
        if not self._primary:
            return
        flat = flatten(metrics)
        line = json.dumps({"step": step, "kind": kind} | flat)
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some room"
            ) from error
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush what TensorBoard has in hand."""
        if self._board is not None:
            self._board.close()


def read_history(workdir: pathlib.Path | str) -> list[dict[str, float]]:
    """The validation lines of `metrics.jsonl`, in order: flat names → numbers, and the step."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines if math.isfinite(_step(line))]
    return [row for row in rows if row["kind"] == "validation"]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # A line cut by a kill: never a whole one.


def _tensorboard(workdir: pathlib.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            'config.tensorboard needs tensorboardX: pip install "rcml_jax[tensorboard]"'
        ) from error
    return SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"), purge_step=step + 1)

"""The printed summary of benchmarks/gpu.py, made of the files that its stages wrote."""

from collections.abc import Iterator
from typing import Any

#: How far our first loss in bfloat16 may be from the factored peer's, relative to it.
LOSS_TOLERANCE = 2e-2
#: Ours over the peer's seconds: the most that is asked for.
PEER_TARGETS = {"plain PyTorch": 1 / 1.5, "factored PyTorch": 1.0}
MFU_TARGET = 0.45
_OURS = "RCML step, Eq. 1-2"

Found = dict[str, dict[str, Any]]


def checks(found: Found) -> Iterator[tuple[str, bool]]:
    """Everything that has to hold, by name, of the stages that have run."""
    for stage in ("correctness", "training", "profile"):
        figures = found.get(stage, {}).get("figures", {})
        yield from _good(stage, figures)
    ours, peer = _first_losses(found)
    if ours is not None and peer is not None:
        yield "first loss, ours and factored PyTorch's", abs(ours / peer - 1) <= LOSS_TOLERANCE


def failed_checks(found: Found) -> list[str]:
    """The names of the checks that do not hold."""
    return [name for name, good in checks(found) if not good]


def _good(name: str, figures: Any) -> Iterator[tuple[str, bool]]:
    """The verdicts anywhere in the figures of a stage."""
    if not isinstance(figures, dict):
        return
    if "good" in figures:
        yield name, figures["good"]
    for key, value in figures.items():
        yield from _good(f"{name}, {key}", value)


def _first_losses(found: Found) -> tuple[float | None, float | None]:
    ours = _at(found, "speed", "figures", _OURS, "first_loss")
    return ours, _at(found, "peers", "figures", "factored PyTorch", "first_loss")


def _at(found: Any, *path: str) -> Any:
    """A value in nested dictionaries, None where there is none."""
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def table(about: dict[str, Any], found: Found) -> str:
    """All of the summary; a part without figures is left out."""
    lines = [f"{about['card']}; {about['date']}; {about['cpus']} CPUs; {about['command']}"]
    lines += [", ".join(f"{name} {version}" for name, version in about["versions"].items())]
    for name, row in about["stages"].items():
        errors = found[name].get("errors", {})
        lines.append(f"{name:<12}{row['status']:<9}{row['seconds']:>6.0f} s")
        lines += [f"    {part}: {error[:200]}" for part, error in errors.items()]
    lines.append(f"all of it   {about['seconds']:>15.0f} s")
    for part in (_correctness, _training, _ceilings, _steps, _peers, _profile):
        if rows := list(part(found)):
            lines += ["", *rows]
    broken = failed_checks(found)
    count = len(list(checks(found)))
    lines += ["", f"{count - len(broken)} of {count} checks hold"]
    lines += [f"    NOT: {name}" for name in broken]
    return "\n".join(lines)


def _correctness(found: Found) -> Iterator[str]:
    figures = _at(found, "correctness", "figures") or {}
    rows = {name: row for name, row in figures.items() if isinstance(_at(row, "highest"), dict)}
    if not rows:
        return
    precisions = list(figures["tolerances"])
    yield f"{'relative errors, value / gradient':<34}" + "".join(f"{p:>22}" for p in precisions)
    for name, row in rows.items():
        cells = [_at(row, precision) for precision in precisions]
        cells = [f"{c['value']:.1e} / {c['gradient']:.1e}" if c else "" for c in cells]
        yield f"{name:<34}" + "".join(f"{cell:>22}" for cell in cells)
    limits = "".join(f"{limit:>22.0e}" for limit in figures["tolerances"].values())
    yield f"{'at most':<34}{limits}"


def _training(found: Found) -> Iterator[str]:
    figures = _at(found, "training", "figures") or {}
    if losses := figures.get("losses"):
        yield (
            f"{figures['steps']} steps of configs/rcml.py on {figures['data']}: losses within "
            f"{losses['largest']:.1e} of the CPU's (at most {figures['tolerance']:.0e}), "
            f"fell: {losses['fell']}"
        )
    if run := figures.get("found"):
        donation, resume = run["donation"], run["resume"]
        yield f"donation: {donation['deleted']} of {donation['buffers']} buffers used up"
        yield (
            f"resume: the same state: {resume['same_state']}; the next step's parameters differ "
            f"by {resume['step_error']:.1e} (the same step twice: {resume['repeated_error']:.1e})"
        )


def _ceilings(found: Found) -> Iterator[str]:
    for stage, who in (("ceilings", "JAX"), ("peers", "PyTorch")):
        if product := _at(found, stage, "figures", "product"):
            rate = product["flops_per_second"] / 1e12
            yield f"{who}: product of {product['size']}² in bfloat16: {rate:.4g} TFLOP/s"
    if copy := _at(found, "ceilings", "figures", "copy"):
        yield f"JAX: memory, read and written: {copy['bytes_per_second'] / 1e9:.4g} GB/s"


def _steps(found: Found) -> Iterator[str]:
    figures = _at(found, "speed", "figures") or {}
    rows = {name: row for name, row in figures.items() if _at(row, "name")}
    if not rows:
        return
    yield f"batch: {', '.join(f'{k} {v}' for k, v in figures['batch'].items())}"
    columns = ("items", "items/s", "ms", "compile s", "MiB", "plan MiB", "GFLOP", "MFU")
    yield f"{'in bfloat16':<34}" + "".join(f"{column:>10}" for column in columns)
    turns = _at(figures, "in turn", "rows") or {}
    for name, row in rows.items():
        if "error" in row:
            yield f"{name:<34}{row['items']:>10}  {row['error']}"
            continue
        # Several in a row where that was measured, one at a time elsewhere.
        turn = turns.get(name) or {}
        seconds, mfu = turn.get("median", row["median_s"]), turn.get("mfu", row["mfu"])
        measured = row["peak_bytes"] if row["peak_source"] == "measured" else None
        cells = [
            row["items"],
            f"{row['items'] / seconds:.4g}",
            f"{1e3 * seconds:.2f}",
            f"{row['lower_s'] + row['compile_s']:.1f}",
            _mebibytes(measured),
            _mebibytes(row.get("planned_bytes")),
            f"{row['model_flops'] / 1e9:.4g}" if row["model_flops"] else "-",
            f"{mfu:.1%}" if mfu else "-",
        ]
        yield f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells)
    for ratio in _at(figures, "in turn", "ratios") or []:
        yield _ratio(ratio)
    mfu = _at(turns, "CLIP step", "mfu")
    if mfu:
        verdict = "met" if mfu >= MFU_TARGET else "missed"
        yield f"MFU of CLIP's step: {mfu:.1%} of the measured product, {MFU_TARGET:.0%}: {verdict}"


def _ratio(ratio: dict[str, Any]) -> str:
    spread = f"{ratio['median']:.3f} ({ratio['p10']:.3f} - {ratio['p90']:.3f})"
    target = f", at most {ratio['target']:.2f}" if "target" in ratio else ""
    verdict = f": {'met' if ratio['met'] else 'missed'}" if "target" in ratio else ""
    return f"{ratio['of']} / {ratio['to']}: {spread}{target}{verdict}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def _peers(found: Found) -> Iterator[str]:
    figures = _at(found, "peers", "figures") or {}
    if why := figures.get("left_out"):
        yield f"peers left out: {why}"
    rows = {name: row for name, row in figures.items() if _at(row, "first_loss") is not None}
    if not rows:
        return
    how = "compiled" if figures["compiled"] else "not compiled"
    yield f"PyTorch {figures['torch']}, {how}, bfloat16 autocast, {figures['float32_products']}"
    yield f"{'':<34}{'items/s':>10}{'ms':>10}{'first s':>10}{'MiB':>10}   ours / it, not in turn"
    steps = _at(found, "speed", "figures", "in turn", "rows") or {}
    for name, row in rows.items():
        if "median" not in row:
            continue
        own = _at(steps, _OURS if name in PEER_TARGETS else "CLIP step", "median")
        line = f"{name:<34}{row['items_per_second']:>10.4g}{1e3 * row['median']:>10.2f}"
        line += f"{row['first_s']:>10.1f}{_mebibytes(row['peak_bytes']):>10}"
        if own:
            ratio, target = own / row["median"], PEER_TARGETS.get(name)
            line += f"   {ratio:.3f}"
            if target:
                line += f", at most {target:.2f}: {'met' if ratio <= target else 'missed'}"
        yield line
    for ratio in _at(figures, "in turn", "ratios") or []:
        yield _ratio(ratio)
    ours, peer = _first_losses(found)
    if ours is not None and peer is not None:
        yield f"first loss: ours {ours:.4f}, factored PyTorch's {peer:.4f}"


def _profile(found: Found) -> Iterator[str]:
    figures = _at(found, "profile", "figures") or {}
    if again := figures.get("again"):
        seconds = again.get("median_s")
        yield f"RCML step, amazon's loss, measured again: {1e3 * (seconds or 0):.2f} ms, one by one"
    if compiled := figures.get("compiled"):
        kinds = ", ".join(f"{n} {kind}" for kind, n in list(compiled["kinds"].items())[:8])
        yield f"compiled: {compiled['kernels']} launched ({kinds})"
        yield f"host transfers in the program: {compiled['host_transfers']}"
    if traced := figures.get("longest"):
        yield (
            f"profile of a step ({traced['measured']}): {traced['device_ms']:.2f} ms in "
            f"{traced['kernels']:.0f} kernels; copies: {traced['copies'] or 'none'}"
        )
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in traced["parts_ms"].items())
        yield f"ms by part: {parts}"
        for row in traced["longest"]:
            where = row["source"][-60:]
            yield f"{row['ms']:>9.3f} ms {row['share']:>6.1%} {row['name'][:40]:<41}{where}"

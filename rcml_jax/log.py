"""What long work says on stderr: single lines, and how far it is with the time that is left."""

import re
import sys
import time
from collections.abc import Callable
from typing import Any

from rich import progress
from rich.console import Console

#: Seconds to the first plain line with a rate, and between later ones; number of lines with a
#: detail that are written as they come.
_FIRST, _BETWEEN, _FREE = 2.0, 10.0, 10


def counted(count: int, what: str, one: str = "") -> str:
    """For example "1,204 items without a title", and "1 item without a title".

    what: the words behind a number other than 1; one: those behind 1, by default the same without
    the s of their first plural.
    """
    if count == 1:
        what = one or re.sub(r"s\b", "", what, count=1)
    return f"{count:,} {what}"


def log_line(line: str) -> None:
    """Write a line for the user, beside what the program puts out."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """How far long work is: a live bar on a terminal, plain lines elsewhere.

    total: where it ends, None if that is not known; done: where it starts. count: (done, total) →
    text, by default "3 of 10 items"; rate: number per second → text. log: takes the plain lines; a
    bar is shown for `log_line` alone, where stderr is a terminal.

    Rate and time left count from the first `update` on, so that compilation is left out. A plain
    line comes with the first rate, then every ten seconds, less often in the course of hours.
    """

    def __init__(
        self,
        total: float | None,
        *,
        done: float = 0,
        unit: str = "items",
        count: Callable[[Any, Any], str] | None = None,
        rate: Callable[[float], str] | None = None,
        log: Callable[[str], None] = log_line,
    ):
        self._count = count or (
            lambda done, total: (
                counted(done, unit) if total is None else f"{done:,} of {counted(total, unit)}"
            )
        )
        self._rate = rate or (lambda speed: f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s")
        console = Console(stderr=True, force_terminal=sys.stderr.isatty(), highlight=False)
        self._log, self._live = log, log is log_line and console.is_interactive
        self._bars = progress.Progress(
            progress.BarColumn(bar_width=16),
            progress.TextColumn("{task.description}", markup=False),
            console=console,
            # Scripts read stdout; what others write to stderr stays above the bar.
            redirect_stdout=False,
            speed_estimate_period=600,
            get_time=time.perf_counter,
            disable=not self._live,
        )
        so_far: Any = done  # rich's annotation says int here and float elsewhere
        self._task = self._bars.add_task("", total=total, completed=so_far)
        self._detail, self._lines, self._next = "", 0, 0.0
        self._start: float | None = None

    def update(self, done: float, detail: str = "") -> None:
        """Show that so much is done; `detail` stands beside it until there is another one."""
        self._detail = detail or self._detail
        self._bars.update(self._task, completed=done)
        if not self._is_due(bool(detail)):
            return
        if self._live:
            self._bars.start()
            self._bars.update(self._task, description=self._text(done))
        else:
            self._log(self._text(done))

    def _text(self, done: float) -> str:
        task = self._bars.tasks[0]
        parts = [self._count(done, task.total), self._detail]
        if task.speed:
            parts.append(self._rate(task.speed))
            left = task.time_remaining
            if left is not None and not task.finished:
                minutes, seconds = divmod(int(left), 60)
                parts.append(f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d} left")
        return "  ".join(filter(None, parts))

    def _is_due(self, detail: bool) -> bool:
        """Whether the bar is to be drawn, or a plain line to be written."""
        task, now = self._bars.tasks[0], time.monotonic()
        if self._start is None:
            self._start, self._next = now, now + _FIRST
        if self._live:
            return True
        if now >= self._next and task.speed:
            self._next = now + max(_BETWEEN, (now - self._start) / 20)
            return True
        self._lines += detail
        return task.finished or (detail and self._lines <= _FREE)

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self._live:
            self._bars.console.print(text, markup=False, soft_wrap=True)
        else:
            self._log(text)

    def close(self) -> None:
        """End the bar."""
        self._bars.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

"""Big files from the net, in any number of tries; and what every fetch needs.

httpx comes with the extra `amazon`.
"""

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rcml_jax.data.log import log_line
from rcml_jax.errors import UserError

Log = Callable[[str], None]

#: Raw bytes, please: what is compressed already stays as it is.
HEADERS = {"User-Agent": "rcml_jax", "Accept-Encoding": "identity"}
#: What a server answers when another try may go better.
BUSY = (408, 425, 429, 500, 502, 503, 504)
#: Seconds; a server that asks for more is left for the next run.
LONGEST_WAIT = 120.0
PROGRESS_SECONDS = 10.0


class Temporary(Exception):
    """A failure that another try may mend; `wait`: the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    log: Log | None = None,
    retries: int = 4,
    timeout: float = 30.0,
    backoff: float = 0.5,
) -> Path:
    """Download a file of any size, going on where an earlier call was cut off; returns its path.

    The bytes gather in `<path>.part`, beside it `<path>.part.json` with the server's ETag or
    Last-Modified, so that a file that has changed there is fetched anew. `path` itself appears
    only when the length and, where it is given, the SHA-256 are right; where it is there already,
    nothing is done. After `retries` tries in a row that bring nothing new it gives up; the pause
    before the first is about `backoff` seconds and doubles, unless the server says Retry-After.

    Raises:
      UserError: the server cannot be reached, has no such file or gives another one, the disk is
        full or cannot be written, or another process downloads the same file.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    httpx = load_httpx()
    part, state = (path.with_name(path.name + ending) for ending in (".part", ".part.json"))
    job = _Download(httpx, url, part, state, log or log_line)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(path.name + ".lock"), f"downloads {path}"):
            if path.exists():  # the process that held the lock before has finished it
                return path
            limits = httpx.Timeout(timeout)
            with httpx.Client(timeout=limits, follow_redirects=True, headers=HEADERS) as client:
                job.run(client, retries, backoff)
            if sha256 is not None:
                job.verify(sha256)
            os.replace(part, path)
            state.unlink(missing_ok=True)
    except OSError as error:
        need = job.length - job.have() if job.length is not None else None
        missing = f"{bytes_text(need)} more are needed" if need else "more is needed"
        raise disk_error(error, path.parent, f"{missing} for {path.name}") from error
    return path


class _Download:
    """The part of one file that is there, and what is known of the whole."""

    def __init__(self, httpx: ModuleType, url: str, part: Path, state: Path, log: Log):
        self.httpx, self.url, self.part, self.state, self.log = httpx, url, part, state, log
        self.length: int | None = None
        self.validator: str | None = None

    def have(self) -> int:
        """Bytes that are there."""
        return self.part.stat().st_size if self.part.exists() else 0

    def run(self, client: Any, retries: int, backoff: float) -> None:
        """Ask for the rest until it is all there."""
        self._recall()
        failures, best = 0, self.have()
        while not self.part.exists() or self.have() != self.length:
            try:
                self._ask(client)
                return
            except Temporary as error:
                if self.have() > best:
                    failures, best = 0, self.have()
                else:
                    failures += 1
                wait = error.wait if error.wait is not None else pause(backoff, failures - 1)
                if failures > retries or wait > LONGEST_WAIT:
                    raise UserError(self._gave_up(error)) from error
                time.sleep(wait)

    def _recall(self) -> None:
        """Take up what an earlier call has left, if it is of this URL and of one version."""
        try:
            known = json.loads(self.state.read_text("utf-8"))
            fits = known["url"] == self.url and known["validator"]
            length, validator = known["length"], known["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        if fits and (length is None or self.have() <= length):
            self.length, self.validator = length, validator
        else:
            self.part.unlink(missing_ok=True)

    def _ask(self, client: Any) -> None:
        """One request for what is missing; raises Temporary where it ends too early."""
        httpx, have = self.httpx, self.have()
        headers = {}
        if have and self.validator:
            headers = {"Range": f"bytes={have}-", "If-Range": self.validator}
        try:
            with client.stream("GET", self.url, headers=headers) as response:
                total = response.headers.get("Content-Range")
                if have and response.status_code == 416 and total == f"bytes */{have}":
                    return  # nothing is missing
                self._receive(response, self._begin(response, have))
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise UserError(f"{self.url} cannot be fetched ({error}); correct it.") from error
        except httpx.TransportError as error:
            raise Temporary(str(error) or type(error).__name__) from error
        if self.length is not None and self.have() != self.length:
            raise Temporary(f"it ended after {bytes_text(self.have())}")

    def _begin(self, response: Any, have: int) -> str:
        """How to open the part for this answer; what is known of the file is written down first."""
        status, headers = response.status_code, response.headers
        if status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if match and int(match[1]) == have and match[2] in ("*", str(self.length or match[2])):
                self.log(
                    f"Downloading the rest of {self.url} ({bytes_text(have)} of "
                    f"{bytes_text(self.length)} are there)"
                )
                return "ab"
        if status in (206, 416):
            self.part.unlink(missing_ok=True)
            raise Temporary("it sent another part than it was asked for")
        if status in BUSY:
            raise Temporary(f"it answers {status_line(response)}", retry_after(headers))
        if status != 200:
            raise UserError(
                f"{self.url} cannot be downloaded (the server answers {status_line(response)}); "
                "correct the address or place a copy of the file at "
                f"{self.part.with_suffix('')}."
            )
        self.length = int(headers["Content-Length"]) if "Content-Length" in headers else None
        tag = headers.get("ETag", "")
        # A weak tag does not promise the same bytes.
        self.validator = headers.get("Last-Modified") if tag[:2] in ("", "W/") else tag
        self.part.unlink(missing_ok=True)  # before the state, which would not be of these bytes
        known = {"url": self.url, "validator": self.validator, "length": self.length}
        self.state.write_text(json.dumps(known), "utf-8")
        self.log(f"Downloading {self.url} ({bytes_text(self.length)})")
        return "wb"

    def _receive(self, response: Any, mode: str) -> None:
        shown = start = time.monotonic()
        with open(self.part, mode, buffering=2**20) as file:
            first = file.tell()
            # Raw: a .gz that a server declares as compressed transfer stays a .gz.
            for chunk in response.iter_raw():
                file.write(chunk)
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    have = file.tell()
                    self.log(
                        f"{self.part.stem}: {bytes_text(have)} of {bytes_text(self.length)}, "
                        f"{bytes_text((have - first) / (shown - start))}/s"
                    )

    def _gave_up(self, error: Exception) -> str:
        have = self.have() if self.validator else 0
        there = f", which goes on after the {bytes_text(have)} that are there" if have else ""
        return (
            f"{self.url} cannot be downloaded ({error}); check the connection and run the same "
            f"command again{there}."
        )

    def verify(self, sha256: str) -> None:
        """Remove the file and raise UserError where its checksum is another."""
        with open(self.part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            self.part.unlink()
            self.state.unlink(missing_ok=True)
            raise UserError(
                f"What {self.url} gives is not the expected file (its SHA-256 is {found}, not "
                f"{sha256}); try again later or place a copy of the file at "
                f"{self.part.with_suffix('')}."
            )


def load_httpx() -> ModuleType:
    """The package httpx; UserError where it is not installed."""
    try:
        import httpx
    except ImportError as error:
        raise UserError(
            'Fetching from the net needs the package httpx; pip install "rcml_jax[amazon]".'
        ) from error
    return httpx


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keep other processes out; the system frees the lock of one that was killed.

    Raises:
      UserError: another process is inside; `what` says what it does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with open(lock, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another process {what}; wait until it is done.") from error
            except OSError:  # a file system without locks
                yield
                return
            if not os.fstat(file.fileno()).st_nlink:
                continue  # the process before has removed it since it was opened
            try:
                yield
                return
            finally:
                lock.unlink(missing_ok=True)


def disk_error(error: OSError, directory: Path, missing: str) -> UserError:
    """What to tell of a disk that is full or cannot be written; `missing`: what is not there."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"No room is left on the disk of {directory}: {missing}; free some and run the same "
            "command again, which goes on where it stopped."
        )
    return UserError(
        f"{directory} cannot be read or written ({error}); make it writable or choose another "
        "folder."
    )


def pause(backoff: float, attempt: int) -> float:
    """Seconds to wait after try number `attempt`, from 0: doubled each time, and scattered."""
    return backoff * 2**attempt * random.uniform(0.5, 1.5)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, which has a number or a date; None without one."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, then.timestamp() - time.time())


def status_line(response: Any) -> str:
    """For example "404 Not Found"."""
    return f"{response.status_code} {response.reason_phrase}".strip()


def bytes_text(count: float | None) -> str:
    """For example "1.2 GB"."""
    if count is None:
        return "an unknown size"
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

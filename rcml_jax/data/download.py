"""Big files from the net, in any number of tries; and what every fetch needs.

httpx comes with the extra `amazon`.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from rcml_jax.data.images import (
    ImageError,
    TooManyPixelsError,
    UnknownFormatError,
    check_decodes,
    storable,
)
from rcml_jax.errors import UserError
from rcml_jax.log import Progress, counted, log_line
from rcml_jax.parsing import text_lines, user_path

Log = Callable[[str], None]

#: Raw bytes, please: what is compressed already stays as it is.
HEADERS = {"User-Agent": "rcml_jax", "Accept-Encoding": "identity"}
#: What a server answers when another try may go better.
BUSY = (408, 425, 429, 500, 502, 503, 504)
#: Seconds; a server that asks for more is left for the next run.
LONGEST_WAIT = 120.0


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
    path = user_path(path)
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
        except (
            *(httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects),
            *(ValueError, OverflowError),  # a port beyond 65535, a name that IDNA refuses
        ) as error:
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
        with open(self.part, mode, buffering=2**20) as file, self._progress(file.tell()) as shown:
            have = file.tell()
            # Raw: a .gz that a server declares as compressed transfer stays a .gz.
            for chunk in response.iter_raw():
                file.write(chunk)
                have += len(chunk)
                shown.update(have)

    def _progress(self, have: int) -> Progress:
        """The bar or the lines of this file."""
        return Progress(
            self.length,
            done=have,
            count=lambda n, _: f"{self.part.stem}: {bytes_text(n)} of {bytes_text(self.length)}",
            rate=lambda speed: f"{bytes_text(speed)}/s",
            log=self.log,
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


# Images from the net: many at a time, each once, in any number of runs.


__all__ = ["JOURNAL", "OUTCOMES", "FetchReport", "download", "fetch_images", "image_path"]

OUTCOMES = (
    *("ok", "cached", "not_found", "truncated", "oversized", "no_image", "bad_address", "failed"),
)
#: What the journal remembers, so that later runs do not ask again.
PERMANENT = ("not_found", "oversized", "no_image", "bad_address")
JOURNAL = "journal.jsonl"
_GONE = (404, 410)
_SLOWEST = 6  # an image may take so many times `timeout` in all
_GIVE_UP = 50  # so many URLs in a row that cannot be had, and a host is left for the next run


class _CutShort(Temporary):
    """The body ended too early."""


@dataclasses.dataclass(frozen=True)
class FetchReport:
    """What became of the images.

    paths: for each URL asked for, in their order, the image's file or None; counts: for each of
    OUTCOMES the number of distinct URLs. "cached" were there already; "failed" is whatever may go
    better in the next run (no answer, an error of the server, too many requests); "bad_address" is
    what no request can be sent to.
    """

    paths: list[Path | None]
    counts: dict[str, int]


def fetch_images(
    urls: Sequence[str],
    directory: str | Path,
    *,
    concurrency: int = 64,
    per_host: int = 16,
    retries: int = 4,
    timeout: float = 20.0,
    max_bytes: int = 20 * 2**20,
    max_size: int | None = 512,
    log: Log | None = None,
    backoff: float = 0.5,
) -> FetchReport:
    """Fetch images into a directory, each once, in any number of runs.

    At most `concurrency` requests run at a time, `per_host` to one host. An image is stored when
    Pillow reads the whole of it: PNG or JPEG, its longer side `max_size` at most, in a file named
    by the URL's hash (`image_path`). What is there is not asked for again, nor what `journal.jsonl`
    there knows to be missing, no image, over `max_bytes` or no address. Other failures are tried
    again `retries` times, after about `backoff` seconds, doubled each time, or what Retry-After
    says, and then in the next run. A run that was interrupted or killed goes on when it is started
    again.
    `max_size` counts when an image is stored; those that are there keep their size.

    Raises:
      UserError: the disk is full or cannot be written, or another process fetches into the
        directory.
    """
    directory = user_path(directory)
    httpx = load_httpx()
    options = {"concurrency": concurrency, "per_host": per_host, "max_bytes": max_bytes}
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    run = _Fetch(httpx, directory, retries, timeout, max_bytes, max_size, backoff, log or log_line)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with alone(directory / ".lock", f"fetches into {directory}"):
            run.prepare(urls)
            if run.left:
                _await(run.run(concurrency, per_host))
    except OSError as error:
        missing = counted(run.left, "images are", "image is") + " still to be fetched"
        raise disk_error(error, directory, missing) from error
    found = ("ok", "cached")
    return FetchReport(
        [image_path(directory, url) if run.outcomes[url] in found else None for url in urls],
        dict.fromkeys(OUTCOMES, 0) | Counter(run.outcomes.values()),
    )


def image_path(directory: str | Path, url: str) -> Path:
    """Where a URL's image is stored: a folder of 256 by the first two digits of the hash."""
    key = _key(url)
    return Path(directory) / key[:2] / key


@dataclasses.dataclass
class _Host:
    """A host's URLs that are left, and how it behaves."""

    name: str
    urls: list[str] = dataclasses.field(default_factory=list)
    free_at: float = 0.0  # the loop's time before which it wants no request
    failures: int = 0  # URLs in a row that could not be had


@dataclasses.dataclass(eq=False)
class _Fetch:
    """One run over many URLs; the event loop's thread owns everything but the files."""

    httpx: ModuleType
    directory: Path
    retries: int
    timeout: float
    max_bytes: int
    max_size: int | None
    backoff: float
    log: Log

    def __post_init__(self):
        self.outcomes: dict[str, str] = {}
        self.hosts: dict[str, _Host] = {}
        self.counts: Counter[str] = Counter()  # of what was asked for in this run
        self.left = 0

    def prepare(self, urls: Sequence[str]) -> None:
        """Sort out what is there and what the journal knows; the rest by host."""
        parts = self.directory / "part"
        parts.mkdir(exist_ok=True)
        for leftover in parts.iterdir():  # of a run that was killed
            leftover.unlink()
        self.journal = _Journal(self.directory / JOURNAL)
        known = self.journal.read(self.max_bytes)
        for url in dict.fromkeys(urls):
            if _is_stored(image_path(self.directory, url)):
                self.outcomes[url] = "cached"
            elif (outcome := known.get(_key(url))) is not None:
                self.outcomes[url] = outcome
            else:
                self.outcomes[url] = "failed"
                name = _host(url)
                self.hosts.setdefault(name, _Host(name)).urls.append(url)
                self.left += 1
        for host in self.hosts.values():
            # Else URLs that always fail, side by side in the list, would hide the rest for ever.
            random.shuffle(host.urls)

    async def run(self, concurrency: int, per_host: int) -> None:
        """Fetch what is left."""
        # A token is the right to one request to a host. There are as many workers as tokens at
        # most and each holds one at a time, so a worker that finds none is not needed any more.
        tokens = deque(
            host for host in self.hosts.values() for _ in range(min(per_host, len(host.urls)))
        )
        workers = min(concurrency, len(tokens))
        limits = {"max_connections": workers, "max_keepalive_connections": workers}
        client = self.httpx.AsyncClient(
            limits=self.httpx.Limits(**limits),
            timeout=self.httpx.Timeout(self.timeout, pool=None),
            follow_redirects=True,
            headers=HEADERS,
        )
        self.progress = Progress(self.left, unit="images", count=self._said, log=self.log)
        try:
            with self.journal, self.progress, ThreadPoolExecutor(os.cpu_count()) as self.pool:
                async with client, asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(self._work(client, tokens))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _work(self, client: Any, tokens: deque[_Host]) -> None:
        while tokens:
            host = tokens.popleft()
            if host.urls:
                url = host.urls.pop()
                outcome = await self._fetch(client, host, url)
                self._record(url, outcome)
                tokens.append(host)

    def _record(self, url: str, outcome: str) -> None:
        self.outcomes[url] = outcome
        self.counts[outcome] += 1
        self.left -= 1
        if outcome in PERMANENT:
            self.journal.write(_key(url), outcome, self.max_bytes)
        self.progress.update(self.counts.total())

    def _said(self, done: int, total: int) -> str:
        parts = [f"{n:,} {k.replace('_', ' ')}" for k in OUTCOMES if (n := self.counts[k])]
        return f"Images: {done:,} of {total:,}: {', '.join(parts)}"

    async def _fetch(self, client: Any, host: _Host, url: str) -> str:
        """The outcome of a URL, all tries included."""
        for attempt in range(self.retries + 1):
            if not await self._may_ask(host):
                return "failed"
            try:
                outcome, body = await self._ask(client, url)
            except Temporary as error:
                outcome = "truncated" if isinstance(error, _CutShort) else "failed"
                if error.wait is not None:
                    now = asyncio.get_running_loop().time()
                    host.free_at = max(host.free_at, now + error.wait)
                elif attempt < self.retries:
                    await asyncio.sleep(pause(self.backoff, attempt))
                continue
            host.failures = 0
            if outcome == "ok":
                loop = asyncio.get_running_loop()
                outcome = await loop.run_in_executor(self.pool, self._store, url, body)
            return outcome
        host.failures = host.failures + 1 if outcome == "failed" else 0
        if host.failures == _GIVE_UP:
            self.log(
                f"{host.name} cannot be reached or is too busy; its other "
                f"{counted(len(host.urls), 'images are', 'image is')} left for the next run"
            )
        return outcome

    async def _may_ask(self, host: _Host) -> bool:
        """Wait until a host is free; False where that is too long or in vain."""
        while True:
            wait = host.free_at - asyncio.get_running_loop().time()
            if host.failures >= _GIVE_UP or wait > LONGEST_WAIT:
                return False
            if wait <= 0:
                return True
            await asyncio.sleep(wait + random.uniform(0, self.backoff))

    async def _ask(self, client: Any, url: str) -> tuple[str, bytes]:
        """The outcome of one request, and the body where it is "ok"; or raises Temporary."""
        httpx, begun = self.httpx, False
        if not _is_address(url):
            return "bad_address", b""
        try:
            async with (
                asyncio.timeout(_SLOWEST * self.timeout),
                client.stream("GET", url) as response,
            ):
                status = response.status_code
                if status in BUSY:
                    wait = retry_after(response.headers)
                    raise Temporary(status_line(response), wait)
                if status != 200:
                    return ("not_found" if status in _GONE else "failed"), b""
                begun = True
                return await self._read(response)
        except Temporary:
            raise
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Temporary("no answer in time") from error
        except httpx.UnsupportedProtocol:
            return "bad_address", b""
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise (_CutShort if begun else Temporary)(str(error)) from error
        except (httpx.InvalidURL, ValueError, OverflowError):
            # Names that IDNA refuses and ports beyond 65535 among them: no try mends an address.
            return "bad_address", b""
        except OSError as error:  # too many open files, for instance
            raise Temporary(str(error)) from error
        except Exception:  # one address must not end the fetch of all the others
            return "failed", b""

    async def _read(self, response: Any) -> tuple[str, bytes]:
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            return "oversized", b""
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > self.max_bytes:
                return "oversized", b""
        return "ok", bytes(body)

    def _store(self, url: str, body: bytes) -> str:
        """Check, scale down and write an image; runs in a thread."""
        try:
            check_decodes(body)
            stored = storable(body, self.max_size)
        except TooManyPixelsError:
            return "oversized"
        except UnknownFormatError:
            return "no_image" if body else "truncated"
        except ImageError:
            return "truncated"
        path = image_path(self.directory, url)
        part = self.directory / "part" / path.name
        part.write_bytes(stored)
        path.parent.mkdir(exist_ok=True)
        os.replace(part, path)
        return "ok"


class _Journal:
    """What will not go better: a JSON object a line with a URL's hash and its outcome."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, max_bytes: int) -> dict[str, str]:
        """Outcomes by hash, but for images that the limit of today may let in."""
        known = {}
        if self.path.exists():
            for line in text_lines(self.path.read_text("utf-8", "replace")):
                try:
                    entry = json.loads(line)
                    if entry["outcome"] in PERMANENT and entry.get("limit", max_bytes) >= max_bytes:
                        known[entry["url"]] = entry["outcome"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # cut off when a run was killed
        return known

    def __enter__(self) -> "_Journal":
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")
        if cut:
            self.file.write("\n")
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, key: str, outcome: str, limit: int) -> None:
        """Add a line; what is oversized is so under a limit."""
        entry = {"url": key, "outcome": outcome}
        self.file.write(
            json.dumps(entry | ({"limit": limit} if outcome == "oversized" else {})) + "\n"
        )


def _key(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _is_address(url: str) -> bool:
    """Whether a URL names a host and, where it has one, a port that there can be."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535 among others
        return False


def _is_stored(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _await(coroutine: Coroutine) -> None:
    """As `asyncio.run`, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    running: list[tuple[asyncio.AbstractEventLoop, Any]] = []

    async def main() -> None:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        try:
            future.result()
        except KeyboardInterrupt:
            for loop, task in running:
                loop.call_soon_threadsafe(task.cancel)
            raise

"""A server on this machine that misbehaves in the ways of the net, and counts what it is asked.

The first part of a path says how it answers (the functions below, with "-" for "_"), the
rest only tells one image from another: /ok/1, /truncated/lake.jpg.
"""

import contextlib
import http.server
import io
import threading
import time
from collections import Counter

import numpy as np
from PIL import Image

BEHAVIOURS = {}
BODY = np.random.default_rng(0).bytes(3_000_000)  # of the big file


def behaviour(function):
    """Answers paths that begin with the function's name."""
    BEHAVIOURS[function.__name__.replace("_", "-")] = function
    return function


def image(name: str, size: tuple[int, int] = (24, 16)) -> bytes:
    """A JPEG that differs from path to path."""
    out = io.BytesIO()
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Counts requests and those that are answered at one time, by host name and in all."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.log: list[tuple[float, str, dict]] = []  # time, path and headers, in order
        self.at_once: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.released = threading.Event()  # lets go what is held back
        self.tag = '"one"'
        self.body = BODY

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The address of a path."""
        return f"http://{host}:{self.server_port}/{path}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the game."""

    @contextlib.contextmanager
    def counted(self, path: str, headers: dict):
        """While a request is answered."""
        names = ("all", headers.get("Host", "").split(":")[0])
        with self.lock:
            self.asked[path] += 1
            self.log.append((time.monotonic(), path, headers))
            self.at_once.update(names)
            for name in names:
                self.most[name] = max(self.most[name], self.at_once[name])
        try:
            yield
        finally:
            with self.lock:
                self.at_once.subtract(names)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Count the request and leave it to the function that its path names."""
        path = self.path.lstrip("/")
        with self.server.counted(path, dict(self.headers)):
            BEHAVIOURS[path.split("/")[0]](self, path)

    def send(self, body: bytes, status: int = 200, length: int | None = None, **headers: str):
        """An answer; `length` is what it claims, −1 for nothing."""
        self.send_response(status)
        length = len(body) if length is None else length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection |= length != len(body)

    def times(self, path: str) -> int:
        """How often the path has been asked for, this time included."""
        return self.server.asked[path]

    def log_message(self, *_):
        """Nothing on the terminal."""


@behaviour
def ok(handler, path):
    handler.send(image(path), Content_Type="text/plain")  # a type decides nothing


@behaviour
def brief(handler, path):
    time.sleep(0.02)
    handler.send(image(path))


@behaviour
def large(handler, path):
    handler.send(image(path, (300, 200)))


@behaviour
def moved(handler, path):
    handler.send(b"", 302, Location="/ok/" + path)


@behaviour
def not_found(handler, path):
    handler.send(b"no such image", 404)


@behaviour
def gone(handler, path):
    handler.send(b"", 410)


@behaviour
def forbidden(handler, path):
    handler.send(b"", 403)


@behaviour
def error(handler, path):
    handler.send(b"", 500)


@behaviour
def error_once(handler, path):
    handler.send(*((b"", 500) if handler.times(path) == 1 else (image(path),)))


@behaviour
def too_many_once(handler, path):
    if handler.times(path) == 1:
        handler.send(b"", 429, Retry_After="1")
    else:
        handler.send(image(path))


@behaviour
def too_many_for_hours(handler, path):
    handler.send(b"", 429, Retry_After="7200")


@behaviour
def truncated(handler, path):
    body = image(path)
    handler.send(body[: len(body) // 2], length=len(body))


@behaviour
def truncated_once(handler, path):
    body = image(path)
    handler.send(body[: len(body) // 2] if handler.times(path) == 1 else body, length=len(body))


@behaviour
def half_an_image(handler, path):
    body = image(path)
    handler.send(body[: len(body) // 2])


@behaviour
def empty(handler, path):
    handler.send(b"")


@behaviour
def oversized(handler, path):
    """Who does not look at the announced length gets a cut-off image."""
    body = image(path) + bytes(60_000)
    handler.send(body[:100] if handler.times(path) == 1 else body, length=len(body))


@behaviour
def oversized_unannounced(handler, path):
    handler.send(image(path) + bytes(60_000), length=-1)


@behaviour
def html(handler, path):
    handler.send(b"<html><body>Are you a robot?</body></html>", Content_Type="image/jpeg")


@behaviour
def slow(handler, path):
    handler.server.released.wait(5)
    handler.close_connection = True


@behaviour
def trickle(handler, path):
    handler.send(b"", length=10_000)
    for _ in range(100):
        if not handler.server.released.wait(0.05):
            handler.wfile.write(b".")
    handler.close_connection = True


@behaviour
def hang_up(handler, path):
    handler.close_connection = True


@behaviour
def hang_up_midway(handler, path):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"400\r\n" + image(path)[:100])
    handler.close_connection = True


@behaviour
def held(handler, path):
    """Twelve images; the others wait."""
    if sum(handler.server.asked.values()) > 12:
        handler.server.released.wait(20)
    handler.send(image(path))


# What follows serves one big file.


def _serve(handler, *, stop: int | None = None, ranges: bool = True, **headers: str):
    """The file, or its end from where Range says if the tag still fits; cut off after `stop`."""
    body, start, status = handler.server.body, 0, 200
    given = handler.headers.get("Range")
    strong = {value for value in headers.values() if not value.startswith("W/")}
    if given and ranges and handler.headers.get("If-Range") in strong:
        start, status = int(given.removeprefix("bytes=").removesuffix("-")), 206
        if start >= len(body):
            return handler.send(b"", 416, Content_Range=f"bytes */{len(body)}")
        headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    part = body[start : stop if stop is None else start + stop]
    return handler.send(part, status, length=len(body) - start, **headers)


@behaviour
def file(handler, path):
    _serve(handler, ETag=handler.server.tag)


@behaviour
def file_by_date(handler, path):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    _serve(handler, stop=1_200_000, ETag='W/"weak"', Last_Modified=date)


@behaviour
def file_in_pieces(handler, path):
    _serve(handler, stop=1_200_000, ETag=handler.server.tag)


@behaviour
def file_cut_once(handler, path):
    _serve(handler, stop=None if handler.times(path) > 1 else 1_200_000, ETag=handler.server.tag)


@behaviour
def file_cut_then_error(handler, path):
    if handler.times(path) == 2:
        handler.send(b"", 500)
    else:
        file_cut_once(handler, path)


@behaviour
def file_cut_always(handler, path):
    _serve(handler, stop=1_200_000, ranges=False, ETag=handler.server.tag)


@behaviour
def file_without_tag(handler, path):
    _serve(handler, stop=None if handler.times(path) > 1 else 1_200_000)


@behaviour
def file_wrong_part(handler, path):
    body = handler.server.body
    if handler.headers.get("Range"):
        handler.send(body[:9], 206, ETag='"one"', Content_Range=f"bytes 0-8/{len(body)}")
    else:
        file_cut_once(handler, path)


@behaviour
def file_of_unknown_length(handler, path):
    handler.send(handler.server.body, length=-1, ETag=handler.server.tag)


@behaviour
def file_called_compressed(handler, path):
    handler.send(handler.server.body, Content_Encoding="gzip")


@behaviour
def file_busy_once(handler, path):
    if handler.times(path) == 1:
        handler.send(b"", 503, Retry_After="0")
    else:
        _serve(handler)


@behaviour
def file_held(handler, path):
    """Two thirds at once, the rest on release."""
    body = handler.server.body
    if handler.headers.get("Range"):
        return _serve(handler, ETag=handler.server.tag)
    handler.send(b"", length=len(body), ETag=handler.server.tag)
    handler.wfile.write(body[:2_000_000])
    handler.server.released.wait(20)
    return None


@contextlib.contextmanager
def running():
    """A server, its requests answered in threads until the end."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()

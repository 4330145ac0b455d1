"""A catalogue over HTTP: `/search`, `/embed` and `/health`, in JSON.

with running(explorer) as address:
    httpx.post(f"{address}/search", json={"item": "1F493", "relation": "both of them are red"})

What is asked at the same time is embedded and ranked together, in batches of a few fixed sizes.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.log import log_line
from rcml_jax.parsing import NO_TEXT, read_json
from rcml_jax.search.explorer import MOST_BYTES, SIZES, Explorer, View

#: Bytes of a request: an image of the largest size in base64, and what stands around it.
MOST_BODY = -(-MOST_BYTES // 3) * 4 + 2**16
#: Seconds that a batch waits for requests that are arriving, and that a request may take to arrive.
WAIT, ARRIVAL = 0.005, 30.0
#: Requests that wait for a batch; one more is refused.
MOST_WAITING = 256
_SMALL = 2**16
#: Larger requests, and images, that are read at the same time: so much memory they may take.
_LARGE, _DECODERS = 8, 2
_FIELDS = {"item": str, "text": str, "image": str, "relation": str, "k": int, "against": str}
_ASKED_BY = {"search": ("item", "text", "image"), "embed": ("text", "image")}
_CONTENT = "application/json"


class RefusedError(Exception):
    """A request that is not answered: the HTTP status, and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Batcher:
    """Answers questions that come at the same time in one call, in the order of their arrival.

    answer: questions → answers, of which an exception is raised to who asked; it runs in a thread
    of its own, one call at a time. While it runs, the next batch gathers. most: questions of a
    batch; wait: seconds that a batch waits for questions that are `arriving`; waiting: how many may
    wait.
    """

    def __init__(
        self,
        answer: Callable[[list[Any]], Sequence[Any]],
        *,
        most: int = SIZES[-1],
        wait: float = WAIT,
        waiting: int = MOST_WAITING,
    ):
        self._answer, self._most, self._wait = answer, most, wait
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue(waiting)
        self._arriving = 0

    def __len__(self) -> int:
        """Questions that wait."""
        return self._queue.qsize()

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """A question is being read, until the block ends, in which it is `put`."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def put(self, question: Any) -> asyncio.Future:
        """What will hold the answer. Raises RefusedError where too many wait."""
        future = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((question, future))
        except asyncio.QueueFull:
            raise RefusedError(503, "too many requests are waiting; ask again later") from None
        return future

    async def run(self) -> None:
        """Answer until it is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as worker:
            while True:
                batch = [await self._queue.get()]
                end = loop.time() + self._wait
                while len(batch) < self._most:
                    if self._queue.empty() and not self._arriving:
                        break
                    try:
                        left = max(0.0, end - loop.time())
                        batch.append(await asyncio.wait_for(self._queue.get(), left))
                    except TimeoutError:
                        break
                questions = [question for question, _ in batch]
                try:
                    answers = await loop.run_in_executor(worker, self._answer, questions)
                except Exception as error:
                    answers = [error] * len(batch)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if future.done():  # who asked has gone
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)


def answers(explorer: Explorer, questions: Sequence[tuple[str, View]]) -> list[Any]:
    """The answer to each question, ("search" or "embed", view), as a JSON value or an exception."""
    found: list[Any] = [None] * len(questions)
    for kind in _ASKED_BY:
        places = [p for p, (name, _) in enumerate(questions) if name == kind]
        views = [questions[p][1] for p in places]
        for place, answer in zip(places, _together(explorer, kind, views), strict=True):
            found[place] = answer
    return found


def _together(explorer: Explorer, kind: str, views: Sequence[View]) -> list[Any]:
    """The answers to views of one kind; each is asked alone where one cannot be answered."""
    if not views:
        return []
    try:
        if kind == "embed":
            vectors = explorer.embed(views)
            return [
                {"relation": view.relation, "embedding": x.tolist()}
                for view, x in zip(views, vectors, strict=True)
            ]
        return [
            {
                "relation": view.relation,
                "results": [{"id": m.id, "text": m.text, "score": m.score} for m in matches],
            }
            for view, matches in zip(views, explorer.search_many(views), strict=True)
        ]
    except Exception as error:
        if len(views) == 1:
            return [error]
        return [_together(explorer, kind, [view])[0] for view in views]


def parse(explorer: Explorer, kind: str, body: bytes, candidates: int = 0) -> View:
    """The view that the JSON of a request asks for, an image decoded.

    Raises RefusedError and UserError for whatever cannot be answered.
    """
    try:
        given = read_json(body, unique=True)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise RefusedError(400, "the body is no JSON object; give one with the fields asked for")
    asked_by = _ASKED_BY[kind]
    fields = [*asked_by, "relation"] + (["k", "against"] if kind == "search" else [])
    for name, value in given.items():
        if name not in fields:
            raise RefusedError(400, f"the field {name[:40]!r} is unknown; give {_or(fields)}")
        if type(value) is not _FIELDS[name]:
            what = "a text" if _FIELDS[name] is str else "a whole number"
            raise RefusedError(400, f"the field {name!r} must be {what}")
        if isinstance(value, str) and NO_TEXT.search(value):
            raise RefusedError(400, f"the field {name!r} holds a NUL or half of a surrogate pair")
    if sum(name in given for name in asked_by) != 1:
        raise RefusedError(400, f"give one of the fields {_or(asked_by)}")
    if "image" in given:
        given["image"] = explorer.pixels(_decoded(given["image"]))
    view = View(**given, candidates=candidates)
    explorer.check(view)
    if kind == "search":
        _check_known(explorer, view)
    return view


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(400, f"the image is no base64 ({error})") from error


def _check_known(explorer: Explorer, view: View) -> None:
    """Raise RefusedError for an item or a sentence that the catalogue does not know."""
    try:
        if view.item:
            explorer.searcher.embeddings.number(view.item)
        explorer.searcher.known(view.relation or None)
    except UserError as error:
        raise RefusedError(404, str(error)) from error


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# The app


def create_app(
    explorer: Explorer,
    *,
    candidates: int = 0,
    wait: float = WAIT,
    waiting: int = MOST_WAITING,
) -> Any:
    """The Starlette app; candidates: as of `Searcher.search`; the others as of `Batcher`.

    Needs extra `explore`.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    decoders = ThreadPoolExecutor(_DECODERS)
    batcher: Batcher
    large: asyncio.Semaphore

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        nonlocal batcher, large
        batcher = Batcher(
            lambda questions: answers(explorer, questions), wait=wait, waiting=waiting
        )
        large = asyncio.Semaphore(_LARGE)
        task = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            decoders.shutdown()

    async def view_of(request: Request, kind: str) -> View:
        length = _length(request.headers)
        room = large if length is None or length > _SMALL else contextlib.nullcontext()
        async with room:
            try:
                async with asyncio.timeout(ARRIVAL):
                    body = await _read(request.stream(), length)
            except TimeoutError:
                raise RefusedError(408, f"the request took more than {ARRIVAL:.0f} s") from None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(decoders, parse, explorer, kind, body, candidates)

    def ask(kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                if (
                    request.headers.get("content-type", "").partition(";")[0].strip().lower()
                    != _CONTENT
                ):
                    raise RefusedError(415, f"send the content type {_CONTENT}")
                with batcher.arriving():
                    answer = batcher.put((kind, await view_of(request, kind)))
                return JSONResponse(await answer)
            except RefusedError as error:
                # Whoever still sends is not listened to any longer.
                close = {"connection": "close"} if error.status in (408, 413) else None
                return problem(error.status, str(error), close)
            except UserError as error:
                return problem(400, str(error))
            except ClientDisconnect:
                return problem(400, "the request ended early")
            except Exception:
                log_line(traceback.format_exc())
                return problem(500, "the service failed; its log says why")

        return endpoint

    async def health(request: Request) -> Response:
        embeddings = explorer.searcher.embeddings
        about = {name: embeddings.model.get(name) for name in ("method", "step")}
        return JSONResponse(
            {
                "status": "ok",
                "items": len(embeddings.items),
                "relations": list(explorer.relations),
                "any_sentence": explorer.any_sentence,
                "waiting": len(batcher),
                **about,
            }
        )

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: f"there is no {request.url.path[:100]}; ask /search, /embed or /health"}
        said[405] = f"{request.url.path[:100]} does not take {request.method}"
        sentence = said.get(error.status_code, str(error.detail))
        return problem(error.status_code, sentence, error.headers)

    def problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
        return JSONResponse({"error": sentence}, status, headers)

    return Starlette(
        routes=[
            Route("/search", ask("search"), methods=["POST"]),
            Route("/embed", ask("embed"), methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )


def _length(headers: Mapping[str, str]) -> int | None:
    """The length that a request says to have."""
    given = headers.get("content-length", "")
    return int(given) if given.isdecimal() else None


async def _read(parts: AsyncIterator[bytes], length: int | None) -> bytes:
    """The body of a request. Raises RefusedError for one that is too large.

    Of a body that is too large as much again is read and dropped: a client that still sends might
    not hear the answer.
    """
    body, size, large = bytearray(), 0, length is not None and length > MOST_BODY
    async for part in parts:
        size += len(part)
        large = large or size > MOST_BODY
        if large:
            body.clear()
        else:
            body += part
        if size > 2 * MOST_BODY:
            break
    if large:
        raise RefusedError(413, f"the request has more than {MOST_BODY:,} bytes")
    return bytes(body)


def warm_up(explorer: Explorer) -> None:
    """Compile what short texts, images and new sentences need, in every size of a batch."""
    explorer.warm_up()
    model = explorer.searcher.model
    if model is None:
        return
    side = model.method.task.images.framing.size
    blank = np.zeros((side, side, 3), np.uint8)
    for size in SIZES:
        for words in (3, 9, 15):
            text = "they are " * (words // 3)
            explorer.embed([View(text=text, relation=text)] * size)
        explorer.embed([View(image=blank, relation=text)] * size)


# The server


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that was made, and its address."""

    server: Any
    sockets: list[socket.socket]
    address: str

    def run(self) -> None:
        """Serve until a signal, or `server.should_exit`."""
        self.server.run(sockets=self.sockets)


def make_server(app: Any, *, host: str = "127.0.0.1", port: int = 0) -> Served:
    """A uvicorn server of an app, on a port that is taken already; 0: any free one.

    Raises UserError where it cannot be had.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        taken = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"cannot serve on {host}:{port}: {error}; give another --port") from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    shown = f"[{host}]" if ":" in host else host
    return Served(uvicorn.Server(config), [taken], f"http://{shown}:{taken.getsockname()[1]}")


@contextlib.contextmanager
def running(explorer: Explorer, *, host: str = "127.0.0.1", **options: Any) -> Iterator[str]:
    """The address of a service that runs in a thread meanwhile; options: as of `create_app`."""
    served = make_server(create_app(explorer, **options), host=host)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    try:
        yield served.address
    finally:
        served.server.should_exit = True
        thread.join()

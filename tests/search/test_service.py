"""The HTTP service: a real client against a real server on this machine."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from rcml_jax.cli import serve
from rcml_jax.errors import UserError
from rcml_jax.search import service
from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model
from rcml_jax.search.explorer import Explorer, View
from rcml_jax.search.items import read_items
from tests.cli.test_commands import fails
from tests.search.conftest import NEW, SENTENCES
from tests.toy import ITEMS, ROOT
from tests.training.test_compilations import compiled


@pytest.fixture(scope="module")
def client(explorer):
    with service.running(explorer) as address, httpx.Client(base_url=address, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def pictures(catalogue):
    return [(catalogue / "images" / f"{i}.png").read_bytes() for i in range(8)]


def base64_of(encoded):
    return base64.b64encode(encoded).decode()


def results(view, explorer):
    return [(match.id, match.text, match.score) for match in explorer.search(view)]


def assert_same(answer, expected):
    """The ids in their order, and the scores but for the rounding of batches."""
    assert [(x["id"], x["text"]) for x in answer["results"]] == [x[:2] for x in expected]
    scores = [x["score"] for x in answer["results"]]
    np.testing.assert_allclose(scores, [x[2] for x in expected], atol=1e-5)


# --- What is asked --------------------------------------------------------------------------------


def test_health_says_what_is_served(client):
    found = client.get("/health")
    assert found.status_code == 200
    expected = {"status": "ok", "items": ITEMS, "relations": SENTENCES, "any_sentence": True}
    assert found.json() == expected | {"waiting": 0, "method": "rcml", "step": 7}


@pytest.mark.parametrize("relation", ["", SENTENCES[1], SENTENCES[1].upper(), NEW])
def test_answers_are_those_of_the_explorer(client, explorer, pictures, relation):
    for asked, view in (
        ({"item": "i17"}, View(item="i17")),
        ({"text": "kind5"}, View(text="kind5")),
        ({"image": base64_of(pictures[3])}, View(image=pictures[3])),
    ):
        for options in ({}, {"k": 3, "against": "text"}):
            found = client.post("/search", json=asked | options | {"relation": relation})
            assert found.status_code == 200, found.text
            expected = View(**{**vars(view), **options, "relation": relation})
            assert_same(found.json(), results(expected, explorer))
            assert found.json()["relation"] == relation


def test_embeddings_are_those_of_the_model(client, model, pictures, explorer):
    embedder = model.method.embedder(model.params, [NEW])
    pixels = np.stack([explorer.pixels(pictures[3])])
    for asked, expected in (
        ({"text": "kind5"}, embedder.text(["kind5"])),
        ({"image": base64_of(pictures[3])}, embedder.image(pixels)),
    ):
        for relation, row in ((NEW, 1), ("", 0)):
            found = client.post("/embed", json=asked | {"relation": relation}).json()
            assert found["relation"] == relation
            np.testing.assert_allclose(found["embedding"], expected[row, 0], atol=1e-5)


def test_a_baseline_too(runs, catalogue, tmp_path, pictures):
    model = open_model(runs("siglip"))
    found = embed_catalogue(model, read_items(catalogue), SENTENCES, tmp_path / "e")
    explorer = Explorer(Searcher(found, model), found.items.read)
    views = [View(text=f"kind{i}", relation=r) for i in range(3) for r in ("", *SENTENCES)]
    views += [View(image=image, relation=SENTENCES[0]) for image in pictures[:3]]
    views += [View(item="i3", relation=SENTENCES[1], k=2)]
    for matches, view in zip(explorer.search_many(views), views, strict=True):
        expected = explorer.search(view)
        assert [m.id for m in matches] == [m.id for m in expected]
        np.testing.assert_allclose(
            [m.score for m in matches], [m.score for m in expected], atol=1e-5
        )
    question = {"text": "kind5", "relation": NEW}
    with service.running(explorer) as address:
        found = httpx.post(f"{address}/search", json=question)
        assert (found.status_code, len(found.json())) == (404, 1)
        assert f"was not embedded under '{NEW}'" in found.json()["error"]
        # A vector needs the model alone.
        assert len(httpx.post(f"{address}/embed", json=question).json()["embedding"]) == 16


# --- Many at once ---------------------------------------------------------------------------------


def questions(pictures):
    """32 of all kinds, under no, known and new sentences."""
    kinds = [
        *({"item": f"i{i}"} for i in range(12)),
        *({"text": f"kind{i} " * (1 + i % 3)} for i in range(12)),
        *({"image": base64_of(picture)} for picture in pictures),
    ]
    said = ["", *SENTENCES, NEW, "a sentence of another length"]
    return [x | {"relation": said[i % len(said)], "k": 1 + i % 7} for i, x in enumerate(kinds)]


async def post_all(address, asked, path="/search"):
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        return await asyncio.gather(*(client.post(path, json=x) for x in asked))


def test_nothing_is_lost_of_32_at_once(client, pictures, monkeypatch):
    sizes = []
    together = service.answers

    def counted(explorer, batch):
        sizes.append(len(batch))
        return together(explorer, batch)

    monkeypatch.setattr(service, "answers", counted)
    asked = questions(pictures)
    assert len(asked) == 32
    alone = [client.post("/search", json=x).json() for x in asked]
    assert sizes == [1] * 32
    sizes.clear()
    for _ in range(3):
        found = asyncio.run(post_all(str(client.base_url), asked))
        assert [x.status_code for x in found] == [200] * 32
        for answer, expected in zip(found, alone, strict=True):
            assert answer.json()["relation"] == expected["relation"]
            assert_same(answer.json(), [tuple(x.values()) for x in expected["results"]])
    assert sum(sizes) == 96
    assert max(sizes) > 4, sizes  # They are answered together, indeed.
    asked = [{k: v for k, v in x.items() if k != "k"} for x in asked if "item" not in x]
    alone = [client.post("/embed", json=x).json()["embedding"] for x in asked]
    found = asyncio.run(post_all(str(client.base_url), asked, "/embed"))
    np.testing.assert_allclose([x.json()["embedding"] for x in found], alone, atol=1e-5)


def test_one_wrong_question_spoils_no_other(client):
    asked = [{"text": f"kind{i}"} for i in range(10)]
    asked[4], asked[7] = {"text": "kind4", "k": 0}, {"item": "i99"}
    found = asyncio.run(post_all(str(client.base_url), asked))
    expected = [200] * 10
    expected[4], expected[7] = 400, 404
    assert [x.status_code for x in found] == expected


def test_no_batch_compiles_anything_anew(explorer, pictures):
    service.warm_up(explorer)
    views = [View(text=f"kind{i % 12}", relation=f"a sentence {i % 5}") for i in range(32)]
    views += [View(image=explorer.pixels(pictures[i % 8])) for i in range(32)]
    explorer.search_many(views)
    with compiled() as names:
        for many in (1, 2, 5, 8, 9, 20, 31):
            explorer.search_many(views[:many])
            explorer.search_many(views[-many:])
            explorer.embed(views[16 : 16 + many])
    assert names == []


def test_a_question_alone_does_not_wait_and_those_that_come_are_awaited():
    async def main():
        batches = []
        batcher = service.Batcher(lambda batch: (batches.append(batch), batch)[1], wait=30)
        task = asyncio.create_task(batcher.run())
        assert await asyncio.wait_for(batcher.put("a"), 10) == "a"
        with batcher.arriving():
            first = batcher.put("b")
            await asyncio.sleep(0.05)
            assert not first.done()
        second = batcher.put("c")
        assert await asyncio.wait_for(asyncio.gather(first, second), 10) == ["b", "c"]
        task.cancel()
        return batches

    assert asyncio.run(main()) == [["a"], ["b", "c"]]


def test_a_full_queue_refuses_and_a_failure_reaches_who_asked():
    async def main():
        async def failed(batcher):
            with pytest.raises(ZeroDivisionError):
                await batcher.put(0)

        batcher = service.Batcher(lambda batch: [1 / x for x in batch], waiting=2)
        batcher.put(1), batcher.put(2)
        with pytest.raises(service.RefusedError, match="ask again later"):
            batcher.put(3)
        batcher = service.Batcher(lambda batch: [1 / x for x in batch])
        task = asyncio.create_task(batcher.run())
        await failed(batcher)
        gone = batcher.put(1)
        gone.cancel()
        assert await batcher.put(4) == 0.25  # it goes on
        task.cancel()

    asyncio.run(main())


# --- What cannot be answered ----------------------------------------------------------------------


def png(size):
    out = io.BytesIO()
    Image.new("1", size).save(out, "PNG")
    return out.getvalue()


WORDS = "word " * 10_000


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({}, 400, "give one of the fields item, text or image"),
        ({"item": "i1", "text": "x"}, 400, "give one of the fields item, text or image"),
        ({"text": ""}, 400, "nothing is asked"),
        ({"text": WORDS}, 400, "the text has 50,000 characters; give at most 2,000"),
        ({"item": "i1", "relation": WORDS}, 400, "the relation has 50,000 characters"),
        ({"item": "i1", "relation": " "}, 400, "the relation is empty"),
        ({"item": "i99"}, 404, "has no item 'i99'; did you mean"),
        ({"item": "i1", "k": 0}, 400, "0 results cannot be shown; give 1 to 100"),
        ({"item": "i1", "k": 10**30}, 400, "results cannot be shown"),
        ({"item": "i1", "k": True}, 400, "the field 'k' must be a whole number"),
        ({"item": "i1", "k": "3"}, 400, "the field 'k' must be a whole number"),
        ({"item": 3}, 400, "the field 'item' must be a text"),
        ({"item": "i1", "against": "sound"}, 400, "against='sound' is unknown"),
        ({"item": "i1", "candidates": 5}, 400, "the field 'candidates' is unknown; give item"),
        ({"text": "half \ud800"}, 400, "the field 'text' holds a NUL or half of a surrogate pair"),
        ({"image": "not base64!"}, 400, "the image is no base64"),
        ({"image": ""}, 400, "the image cannot be read"),
        ({"image": base64_of(b"no image")}, 400, "the image cannot be read (no JPEG"),
        ({"image": base64_of(png((12_000, 12_000)))}, 400, "pixels"),
        ({"image": base64_of(bytes(20 * 2**20 + 1))}, 400, "give one of at most 20"),
        ([], 400, "the body is no JSON object"),
        (None, 400, "the body is no JSON object"),
    ],
    ids=range(22),
)
def test_what_cannot_be_asked(client, asked, status, message):
    body = json.dumps(asked).encode()
    refused(client, body, status, message)


def refused(client, body, status, message, path="/search", kind="application/json"):
    found = client.post(path, content=body, headers={"content-type": kind})
    assert found.status_code == status, found.text
    assert set(found.json()) == {"error"}
    assert message in found.json()["error"]
    assert "\n" not in found.json()["error"]
    assert "Traceback" not in found.text
    assert client.get("/health").status_code == 200


def test_bodies_that_are_no_question(client):
    for body, message in (
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b"\xff\xfe\x00", "the body is no JSON"),
        (b'{"item": NaN}', "NaN is no JSON number"),
        (b'{"item": "i1", "item": "i2"}', "a name comes twice"),
        (b"[" * 100_000, "nested too deeply"),
    ):
        refused(client, body, 400, message)
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/search", content=b'{"item": "i1"}', headers=kind).status_code == 200
    refused(client, b"item=i1", 415, "application/json", kind="application/x-www-form-urlencoded")
    refused(client, b'{"item": "i1"}', 400, "the field 'item' is unknown", path="/embed")
    refused(client, b"{}", 404, "there is no /find; ask /search, /embed or /health", path="/find")
    refused(client, b"{}", 405, "/health does not take POST", path="/health")
    assert client.get("/search").status_code == 405
    assert client.get("/search").headers["allow"] == "POST"


def test_bodies_that_are_too_large(client, monkeypatch):
    too_large = f"more than {service.MOST_BODY:,} bytes"
    refused(client, bytes(service.MOST_BODY + 1), 413, too_large)

    def parts():
        for _ in range(service.MOST_BODY // 2**20 + 2):
            yield bytes(2**20)

    refused(client, parts(), 413, too_large)
    # The rest of a body without end is not waited for; the client may or may not hear the answer.
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port), 60) as sent:
        head = "POST /search HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sent.sendall(f"{head}content-length: {10**12}\r\n\r\n".encode())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sent.sendall(bytes(200 * 2**20))
    assert client.get("/health").status_code == 200


def test_a_request_that_does_not_end(client, monkeypatch):
    monkeypatch.setattr(service, "ARRIVAL", 0.2)

    def parts():
        yield b"{"
        time.sleep(1)
        yield b"}"

    refused(client, parts(), 408, "the request took more than")


def test_a_failure_is_one_sentence(client, explorer, monkeypatch, capsys):
    def broken(views):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(explorer, "search_many", broken)
    found = client.post("/search", json={"item": "i1"})
    assert found.status_code == 500
    assert found.json() == {"error": "the service failed; its log says why"}
    assert "a secret of the inside" in capsys.readouterr().err
    monkeypatch.undo()
    assert client.post("/search", json={"item": "i1"}).status_code == 200


# --- The command ----------------------------------------------------------------------------------


def test_wrong_commands(runs, tmp_path, capsys, monkeypatch):
    fails(serve.main, ["--workdir", runs(), "--port=70000"], capsys, "is no port")
    fails(serve.main, ["--workdir", tmp_path], capsys, "holds no config.json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve on 127.0.0.1:{port}: .*another --port"):
            service.make_server(None, port=port)
    with pytest.raises(UserError, match="cannot serve on no-such-host"):
        service.make_server(None, host="no-such-host.invalid")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    fails(serve.main, ["--workdir", runs()], capsys, "pip install 'rcml_jax[explore]'")


def test_the_command_serves_until_a_signal(runs, explorer, tmp_path):
    directory = explorer.searcher.embeddings.directory
    command = [sys.executable, "-m", "rcml_jax.cli.serve", f"--workdir={runs()}", "--port=0"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"--embeddings={directory}"],
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    try:
        end = time.monotonic() + 180
        while not (found := re.search(r"http://[^\s]+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        assert found[0].startswith("http://127.0.0.1:")
        answer = httpx.post(f"{found[0]}/search", json={"item": "i17", "relation": NEW}, timeout=60)
        assert_same(answer.json(), results(View(item="i17", relation=NEW), explorer))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(30)

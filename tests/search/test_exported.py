"""An export read back in JAX, from its directory and from a stand-in of the hub."""

import base64
import hashlib
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rcml_jax.cli import embed, explore, export
from rcml_jax.cli.export import export_run
from rcml_jax.errors import UserError
from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model, related
from rcml_jax.search.exported import HEAD, MARK, export_mark, find_export
from rcml_jax.search.items import pixels, read_items
from tests.cli.test_commands import fails
from tests.search.conftest import SENTENCES
from tests.toy import ROOT
from tests.toy_run import make_run

REPOSITORY = "someone/toy-rcml"
NEW = "a sentence that is new"
TEXTS = ["kind3 place7", "Kind 11,  place0", "kind1 " * 40]
#: Options of a head with everything, and a long loss temperature.
HEAD_OPTIONS = {
    "model__gate": True,
    "model__learn_pooled_prior": True,
    "model__pooled_logit": 3.0,
    "model__beta": 0.25,
    "model__max_length": 12,
}


@pytest.fixture(scope="module")
def exported(catalogue, tmp_path_factory):
    """Method → work directory and exported directory."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for method, options in (("rcml", HEAD_OPTIONS), ("siglip", {}), ("declip", {})):
        run = make_run(catalogue, folder / method, method=method, options={"steps": 7} | options)
        export_run(run, folder / f"{method}-export")
        found[method] = run, folder / f"{method}-export"
    return found


def vectors(model, catalogue):
    """Texts and images under no sentence and two, one of them new."""
    items = read_items(catalogue)
    embedder = model.method.embedder(model.params, [SENTENCES[0], NEW])
    framing = model.method.task.images.framing
    images = np.stack([pixels(items.read(i), framing) for i in range(3)])
    return {"text": embedder.text(TEXTS), "image": embedder.image(images)}


@pytest.mark.parametrize("method", ["rcml", "siglip", "declip"])
def test_an_export_embeds_as_its_run(exported, catalogue, method):
    run, directory = exported[method]
    original, found = open_model(run), open_model(directory)
    ours, theirs = vectors(original, catalogue), vectors(found, catalogue)
    for name, expected in ours.items():
        np.testing.assert_allclose(theirs[name], expected, atol=1e-6)
    assert np.abs(ours["text"][1] - ours["text"][2]).max() > 1e-3  # The sentence has a say.
    assert found.about["method"] == method
    assert found.about["step"] == original.about["step"] == 7
    assert found.method.task.max_length == original.method.task.max_length


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"beta": 2.0}, {}, "beta=2.0 or pooled_logit=3.0 is out of range"),
        ({"beta": math.nan}, {}, "NaN is no JSON number"),
        ({"pooled_logit": -1e7}, {}, "is out of range"),
        ({"intra_relation": None}, {}, "is no text"),
        ({"intra_relation": " "}, {}, "is no text"),
        ({"intra_relation": "half \ud800"}, {}, "is no text"),
        ({}, {"query": np.ones((4, 4), np.float32)}, r"no finite query of the shape (16, 16)"),
        ({}, {"gate": np.full((16, 16), np.nan, np.float32)}, "no finite gate"),
        ({}, {"value": None}, "no finite value"),
        ({}, {"pooled_prior": None}, "no finite pooled_prior of the shape ()"),
    ],
)
def test_a_head_that_cannot_be(exported, tmp_path, options, change, message):
    directory = shutil.copytree(exported["rcml"][1], tmp_path / "e")
    with safe_open(directory / HEAD, "numpy") as file:
        meta = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()} | change  # noqa: SIM118
    meta["options"] = json.dumps(json.loads(meta["options"]) | options)
    save_file({name: x for name, x in arrays.items() if x is not None}, directory / HEAD, meta)
    with pytest.raises(UserError) as error:
        open_model(directory)
    assert str(error.value).startswith(f"{directory / HEAD} ")
    assert message in str(error.value)
    assert str(error.value).endswith("export the run again")


def test_a_catalogue_is_embedded_and_asked_by_an_export(exported, catalogue, tmp_path, capsys):
    run, directory = exported["rcml"]
    to = tmp_path / "e"
    args = ["--workdir", directory, "--items", catalogue, "--relation", SENTENCES[0]]
    assert embed.main(["", *map(str, args), "--to", str(to), "--tokens"]) == 0
    model = open_model(directory)
    found = embed_catalogue(model, read_items(catalogue), SENTENCES[:1], to, tokens="float16")
    theirs = Searcher(found, model).search(NEW, item="i17")
    mine = embed_catalogue(open_model(run), read_items(catalogue), [NEW], tmp_path / "mine")
    ours = related(mine, NEW, item="i17")
    assert [m.id for m in theirs] == [m.id for m in ours]
    # The same weights elsewhere are the same model.
    copy = shutil.copytree(directory, tmp_path / "copy")
    Searcher(found, open_model(copy))
    with pytest.raises(UserError, match="was embedded by another model"):
        Searcher(found, open_model(exported["siglip"][1]))
    capsys.readouterr()
    args = ["--workdir", directory]
    fails(embed.main, [*args, "--to", tmp_path / "x"], capsys, "has no items; give --items")
    fails(explore.main, [*args, "--port=0"], capsys, "has no items; give --embeddings")


def test_directories_that_are_no_export(exported, tmp_path):
    directory = exported["rcml"][1]
    assert export_mark(directory) == {"method": "rcml", "step": 7}
    assert find_export(exported["rcml"][0]) is None
    assert find_export(tmp_path / "nothing") is None
    copy = shutil.copytree(directory, tmp_path / "older")
    config = json.loads((copy / "config.json").read_text())
    assert config.pop(MARK) == {"method": "rcml", "step": 7}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no export of a run by this version"):
        open_model(copy)
    with pytest.raises(UserError, match="there is no directory no/run, and no repository"):
        open_model("no/run")
    for name, content in (("config.json", "{"), (HEAD, "{"), ("tokenizer_config.json", "[]")):
        copy = shutil.copytree(directory, tmp_path / name)
        (copy / name).write_text(content)
        with pytest.raises(UserError) as error:
            open_model(copy)
        assert "\n" not in str(error.value)
        (copy / name).unlink()
        with pytest.raises(UserError):
            open_model(copy)


# --- The hub ----------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers to a push and to a download, with one user and its repositories."""

    #: Name → path → content; names of those that are private; contents of large files by digest.
    repositories: dict
    private: set
    large: dict
    #: Token → whether it may write.
    tokens: dict

    def _may(self, name):
        return name not in self.private or self._token() in self.tokens

    def _token(self):
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def _body(self):
        if "chunked" in self.headers.get("transfer-encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_POST(self):
        body, path = self._body(), self.path.split("?")[0]
        if not self.tokens.get(self._token()):
            status = 403 if self._token() in self.tokens else 401
            return self.reply(status, {"error": "a secret of the hub"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            name = name if "/" in name else f"someone/{name}"
            if name in self.repositories:
                return self.reply(409, {"error": "it is there", "url": self.url(name)})
            self.repositories[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            return self.reply(200, {"url": self.url(name), "name": name})
        if path == "/api/validate-yaml":  # of the model card
            return self.reply(200, {"errors": [], "warnings": []})
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if path.endswith("/preupload/main"):
            files = [
                {"path": x["path"], "uploadMode": mode, "shouldIgnore": False}
                for x in json.loads(body)["files"]
                for mode in ["lfs" if x["path"].endswith(".safetensors") else "regular"]
            ]
            return self.reply(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                x | {"actions": {"upload": {"href": f"{self.base()}/large/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            files = self.repositories[name]
            for row in map(json.loads, body.splitlines()):
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            found = {"commitUrl": f"{self.url(name)}/commit/{'0' * 40}", "commitOid": "0" * 40}
            return self.reply(200, found)
        return self.reply(404, {"error": f"POST {path}"})

    def do_PUT(self):
        body, digest = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        self.large[digest] = body
        self.reply(200, {})

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": "someone", "type": "user", "orgs": []})
        api = path.startswith("/api/models/")
        name, _, rest = path.removeprefix("/api/models").lstrip("/").partition("/")
        more, _, rest = rest.partition("/")
        name = f"{name}/{more}"
        if name not in self.repositories or not self._may(name):
            return self.reply(401, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        files = self.repositories[name]
        if api and rest.startswith("tree/"):
            rows = [
                {"type": "file", "path": p, "size": len(x), "oid": "0" * 40}
                for p, x in files.items()
            ]
            return self.reply(200, rows)
        if api:
            names = [{"rfilename": p} for p in files]
            return self.reply(200, {"id": name, "sha": "0" * 40, "siblings": names})
        body = files.get(rest.removeprefix("resolve/").partition("/")[2])
        if body is None:
            return self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(body).hexdigest()
        return self.reply(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def base(self):
        return f"http://{self.headers['host']}"

    def url(self, name):
        return f"{self.base()}/{name}"

    def reply(self, status, body, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """Its handler class, whose attributes hold what was pushed, and its address."""
    state = {"repositories": {}, "private": set(), "large": {}}
    state["tokens"] = {"hf_writes": True, "hf_reads": False}
    handler = type("Running", (Hub,), state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(endpoint, cache, *args, token="hf_writes", **settings):
    """A program in a process of its own: the hub's address is read when its package is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    } | settings
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


LOAD = """
import sys
import numpy as np
from rcml_jax.search.catalogue import open_model
from tests.search.test_exported import vectors
model = open_model(sys.argv[1])
assert model.about["workdir"] == sys.argv[1]
np.savez(sys.argv[3], **vectors(model, sys.argv[2]))
"""
EXPORT = ("-m", "rcml_jax.cli.export")


def test_pushed_and_opened_again(exported, hub, catalogue, tmp_path):
    handler, endpoint = hub
    directory, target = exported["rcml"][0], tmp_path / "export"
    args = (*EXPORT, "--workdir", directory, "--to", target, "--push", REPOSITORY)
    done = run(endpoint, tmp_path / "cache", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{endpoint}/{REPOSITORY}"
    pushed = handler.repositories[REPOSITORY]
    assert {p.name: p.read_bytes() for p in target.iterdir()} == pushed
    assert len(handler.large) == 2
    assert handler.private == {REPOSITORY}
    # Again, from the directory alone, into the same repository.
    args = (*EXPORT, "--to", target, f"--push={REPOSITORY}", "--public")
    done = run(endpoint, tmp_path / "cache", *args)
    assert done.returncode == 0, done.stderr
    assert handler.private == {REPOSITORY}  # It stays what it is.
    done = run(endpoint, tmp_path / "cache", "-c", LOAD, REPOSITORY, catalogue, tmp_path / "v.npz")
    assert done.returncode == 0, done.stderr
    expected = vectors(open_model(directory), catalogue)
    with np.load(tmp_path / "v.npz") as found:
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-6)


FAILING = """
import sys
from rcml_jax.errors import UserError
from rcml_jax.search.catalogue import open_model
try:
    open_model(sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("someone/nothing", {}, "the hub has no such repository, or not for this token"),
        ("someone/other", {}, "the repository someone/other is no export of a run"),
        ("someone/empty", {}, "the repository someone/empty is no export of a run"),
        ("someone/other", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ("someone/other", {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached, and no copy is"),
    ],
)
def test_what_cannot_be_opened(hub, tmp_path, name, settings, message):
    handler, endpoint = hub
    config = json.dumps({"model_type": "clip"}).encode()
    handler.repositories |= {"someone/other": {"config.json": config}, "someone/empty": {}}
    done = run(endpoint, tmp_path / "cache", "-c", FAILING, name, **settings)
    assert message in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("repository", "settings", "message"),
    [
        ("someone/x", {"token": ""}, "log in with `hf auth login`, or set HF_TOKEN"),
        ("someone/x", {"token": "hf_wrong"}, "the hub refuses this token: 401"),
        ("someone/x", {"token": "hf_reads"}, "the hub refuses this token: 403"),
        ("a name", {}, "--push 'a name' is no repository's name"),
        ("name", {}, "--push 'name' is no repository's name: it is not user/name"),
        ("someone/x", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot push"),
        ("someone/x", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed(exported, hub, tmp_path, repository, settings, message):
    args = (*EXPORT, "--to", exported["rcml"][1], "--push", repository)
    done = run(hub[1], tmp_path / "cache", *args, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert hub[0].repositories == {}


def test_wrong_options(exported, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    fails(export.main, ["--to", tmp_path], capsys, "needs --workdir")
    fails(export.main, ["--workdir", "x", "--to", tmp_path, "--public"], capsys, "give that, too")
    push = ["--push", "someone/x"]
    fails(export.main, ["--to", tmp_path, *push], capsys, "is no export of a run")
    fails(export.main, push, capsys, "needs --to")

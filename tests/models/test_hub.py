"""A checkpoint named as on the hub, downloaded from a server on this machine."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from rcml_jax.data.tokenizer import train_tokenizer
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.models.test_encoders import tiny

REPOSITORY, COMMIT = "someone/tiny-clip", "0" * 40

SCRIPT = """
import sys
import jax
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.models.checkpoints import pretrained_directory
from rcml_jax.models.two_towers import load_pretrained, pretrained_config
name = sys.argv[1]
config, params = load_pretrained(name)
assert pretrained_config(name).projection_dim == config.projection_dim
tokenizer = Tokenizer.from_pretrained_dir(pretrained_directory(name))
print(sum(float(abs(x).sum()) for x in jax.tree.leaves(params)), tokenizer.end_id)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that a download asks for."""

    folder: pathlib.Path

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):  # huggingface_hub from 1.0 on
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in self.folder.iterdir()
            ]
            return self.reply(200, json.dumps(files).encode())
        if path.startswith(f"/api/models/{REPOSITORY}"):
            names = [{"rfilename": p.name} for p in self.folder.iterdir()]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": names}).encode()
            return self.reply(200, body)
        file = self.folder / path.rpartition("/")[2]
        if not path.startswith(f"/{REPOSITORY}/resolve/") or not file.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        tag = hashlib.sha1(body).hexdigest()
        return self.reply(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(request, tmp_path):
    model = make_model(tiny())
    folder = tmp_path / "served"
    save_checkpoint(model, folder, layout=getattr(request, "param", "torch"))
    train_tokenizer(["one two", "three"], 300).save(folder / "tokenizer.json")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Served", (Hub,), {"folder": folder})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", model
    server.shutdown()
    server.server_close()


def run(endpoint, name, cache):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("hub", ["torch", "sharded", "flax"], indirect=True)
def test_a_hub_name_is_downloaded_without_torch(hub, tmp_path):
    endpoint, model = hub
    done = run(endpoint, REPOSITORY, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    total, end = done.stdout.split()
    expected = sum(float(np.abs(x).sum()) for x in _leaves(model.params))
    np.testing.assert_allclose(float(total), expected, rtol=1e-6)
    assert int(end) == 3


def test_a_name_the_hub_does_not_have(hub, tmp_path):
    done = run(hub[0], "someone/else", tmp_path / "cache")
    assert "cannot load a CLIP or SigLIP checkpoint from 'someone/else'" in done.stderr


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if hasattr(value, "values") else [value]

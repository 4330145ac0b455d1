"""Embedding a catalogue by eight devices, and by two processes of four devices each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from rcml_jax.search import catalogue as module
from rcml_jax.search.catalogue import embed_catalogue, open_model
from rcml_jax.search.embedding_store import MODALITIES, hold_store, open_embeddings
from rcml_jax.search.items import read_items
from rcml_jax.search.lance_search import embed_table
from rcml_jax.search.lance_table import open_table, vectors_of
from rcml_jax.training import workdir as workdirs
from tests.search.conftest import SENTENCES
from tests.toy import ITEMS, ROOT
from tests.training.test_two_processes import free_port

DEADLINE = 300  # seconds
#: Runs rcml-embed once for each command line; says each status, and which images were read.
EMBED = """
    import json, os, sys, time
    from rcml_jax.cli import embed
    from rcml_jax.search import catalogue
    from rcml_jax.training import sharding
    catalogue._CHUNK = 2
    read, slow = [], float(os.environ.get("SLOW", "0"))
    image, chunk = catalogue._image, catalogue.embed_chunk
    def counting(items, index, framing):
        read.append(index)
        return image(items, index, framing)
    def slowly(*args):
        time.sleep(slow)
        return chunk(*args)
    catalogue._image, catalogue.embed_chunk = counting, slowly
    sharding.initialize_distributed()
    sharding.initialize_distributed = lambda: None
    for line in json.loads(sys.argv[1]):
        read.clear()
        status = embed.main(["rcml-embed", *line])
        print("found:", json.dumps([status, sorted(read)]), flush=True)
        print("end", file=sys.stderr, flush=True)
"""


def start_two(lines, **env):
    """Two processes of four devices each.

    PROCESS in a line or in a value of the environment becomes the number of each.
    """
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = os.environ | {
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=4"]),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "PROCESS",
        **env,
    }
    lines = json.dumps([[*map(str, line)] for line in lines])
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(EMBED), lines.replace("PROCESS", number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={key: value.replace("PROCESS", number) for key, value in env.items()},
        )
        for number in ("0", "1")
    ]


def ended(processes):
    """Of each command line (status, images read, messages) of both processes, once all ended."""
    try:
        done = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = []
    for process, (out, err) in zip(processes, done, strict=True):
        assert process.returncode in (0, 2, -signal.SIGKILL), err
        said = [json.loads(x[7:]) for x in out.splitlines() if x.startswith("found: ")]
        found.append([(*pair, text) for pair, text in zip(said, err.split("end\n"), strict=False)])
    return [*zip(*found, strict=True)]


def different_files(one, other):
    """Names of the files of two stores that differ in a byte."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.mark.parametrize(("method", "tokens"), [("rcml", ""), ("rcml", "int8"), ("siglip", "")])
def test_eight_devices_make_what_one_makes(runs, catalogue, tmp_path, monkeypatch, method, tokens):
    monkeypatch.setattr(module, "_CHUNK", 3)
    sizes, inputs = set(), module._inputs

    def sized(*args):
        found = inputs(*args)
        sizes.add(len(found[0]["text"]))
        return found

    monkeypatch.setattr(module, "_inputs", sized)
    config = workdirs.load_config(runs(method))
    stores = []
    for devices, expected in ((1, {4}), (0, {32})):
        config.devices = devices
        to = tmp_path / str(devices)
        model = open_model(runs(method), config)
        assert len(model.devices) == (devices or 8)
        stores.append(
            embed_catalogue(model, read_items(catalogue), SENTENCES, to, tokens=tokens, shard=21)
        )
        assert sizes == expected
        sizes.clear()
    one, eight = stores
    if method == "rcml":
        assert different_files(one.directory, eight.directory) == []
    for name in MODALITIES:  # a longer text in a chunk turns the last bits of all
        np.testing.assert_allclose(one.vectors[name], eight.vectors[name], atol=1e-6)
        np.testing.assert_array_equal(one.has[name], eight.has[name])
    assert one.problems == eight.problems


@pytest.fixture(scope="module")
def flawed(catalogue, tmp_path_factory):
    """The catalogue with a damaged image in the second half of the first chunk."""
    folder = tmp_path_factory.mktemp("flawed") / "c"
    shutil.copytree(catalogue, folder)
    (folder / "images" / "13.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def common(runs, flawed):
    """Options that all command lines have: both processes use four devices each.

    Then each device embeds two items at a time, as `alone` does: rounding depends on that number.
    """
    relations = [word for sentence in SENTENCES for word in ("--relation", sentence)]
    return ["--workdir", runs(), "--config.devices=0", "--shard", "16", *relations]


@pytest.fixture
def alone(model, monkeypatch):
    """A function that embeds items in this process, on one device."""

    def embed(function, items, to, **options):
        monkeypatch.setattr(module, "_CHUNK", 2)
        return function(model, items, SENTENCES, to, shard=16, **options)

    return embed


def test_two_processes_make_what_one_makes(catalogue, flawed, common, alone, tmp_path):
    given = [*common, "--items", flawed, "--to"]
    unchanged = [*common, "--items", catalogue, "--to"]
    lines = [
        [*given, tmp_path / "files"],
        [*unchanged, tmp_path / "files"],
        [*given, tmp_path / "tokens", "--tokens", "int8"],
        [*given, f"lance://{tmp_path}/table"],
        [*given, tmp_path / "strict", "--strict"],
        [*given, tmp_path / "taken"],
        [*common, "--items", tmp_path / "itemsPROCESS.jsonl", "--to", tmp_path / "other"],
        [*unchanged, tmp_path / "other", "--config.devices=PROCESS"],
    ]
    rows = (flawed / "items.jsonl").read_text()
    (tmp_path / "items0.jsonl").write_text(rows)
    (tmp_path / "items1.jsonl").write_text(rows.replace("kind3", "kind4"))
    with hold_store(tmp_path / "taken"):
        files, mended, tokens, table, strict, taken, *others = ended(start_two(lines))

    items = read_items(flawed)
    for name, kind in (("files", ""), ("tokens", "int8")):
        expected = alone(embed_catalogue, items, tmp_path / f"{name}_alone", tokens=kind)
        assert expected.problems["unreadable"] == {"count": 1, "first": ["i13"]}
        if name == "files":  # then the item was embedded anew
            expected = alone(embed_catalogue, read_items(catalogue), tmp_path / f"{name}_alone")
            assert expected.problems["unreadable"]["count"] == 0
            assert [(status, read) for status, read, _ in mended] == [(0, [13]), (0, [])]
        assert different_files(expected.directory, tmp_path / name) == []
    addresses = (f"lance://{tmp_path}/table{name}" for name in ("", "_alone"))
    same_tables(next(addresses), alone(embed_table, items, next(addresses)))
    for found in (files, tokens, table):
        (first, mine, said), (second, theirs, nothing) = found
        assert (first, second) == (0, 0)
        assert sorted(mine + theirs) == list(range(ITEMS))
        assert len(mine) == len(theirs)
        assert "warning: images that cannot be read, left out: 1 (i13)" in said
        assert "warning" not in nothing
    for found, sentence in (
        (strict, "the image images/13.png of item 'i13' cannot be read ("),
        (taken, f"process {os.getpid()} on host {os.uname().nodename} (since "),
        *((other, "the processes have different items, models, relations,") for other in others),
    ):
        for status, _, said in found:
            assert status == 2
            assert f"error: {sentence}" in said
    assert not (tmp_path / "other").exists()


def same_tables(address, expected):
    found = open_table(address)
    for name in ("vector_text_0", "vector_image_2"):
        rows = [
            {n: r for b in table.scan(["item_number", name]) for n, r in vectors(b, name)}
            for table in (expected, found)
        ]
        assert rows[0].keys() == rows[1].keys()
        for number, vector in rows[0].items():
            np.testing.assert_array_equal(rows[1][number], vector)
    assert found.problems() == expected.problems()


def vectors(batch, name):
    found, has = vectors_of(batch, name)
    return zip(np.asarray(batch["item_number"])[has].tolist(), found, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_after_the_end_of_one_process_both_go_on(
    catalogue, common, alone, tmp_path, number, status
):
    to = tmp_path / "e"
    line = [*common, "--items", catalogue, "--to", to]
    processes = start_two([line], SLOW="1")
    deadline, manifest = time.monotonic() + DEADLINE, to / "manifest.json"
    while not (manifest.is_file() and json.loads(manifest.read_text())["done"]):
        assert processes[0].poll() is None, processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(number)
    # The other one says so and ends by itself.
    _, err = processes[0].communicate(timeout=DEADLINE)
    assert processes[0].returncode == 2
    assert "error: another process has ended, or cannot be reached; see its message, and" in err
    _, err = processes[1].communicate(timeout=DEADLINE)
    assert processes[1].returncode == status, err
    done = json.loads(manifest.read_text())["done"]
    assert 0 < done < 4
    ((first, mine, _), (second, theirs, _)) = ended(start_two([line]))[0]
    assert (first, second) == (0, 0)
    assert sorted(mine + theirs) == list(range(16 * done, ITEMS))
    assert mine
    assert theirs
    expected = alone(embed_catalogue, read_items(catalogue), tmp_path / "alone")
    assert different_files(expected.directory, to) == []
    assert all(mask.all() for mask in open_embeddings(to).has.values())

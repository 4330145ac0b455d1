"""The sources whose images other processes may prepare: the same files, and nothing made twice."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from configs import rcml
from rcml_jax.data import images, stages
from rcml_jax.data.sources import amazon, folder, hm
from rcml_jax.data.stages import HERE, Runner
from rcml_jax.errors import UserError
from tests.data import hm_copy, planted_amazon
from tests.data.sources import test_folder


@dataclasses.dataclass(frozen=True)
class Source:
    """A source, and a small copy of it with a damaged image.

    items: how many are whole; part: of how many a part is; load: (data, cache, **options) → graph.
    """

    write: Callable
    damaged: str
    items: int
    part: int
    load: Callable[..., Any]


def write_folder(path):
    path.mkdir()
    return test_folder.make(path)


SOURCES = {
    "folder": Source(write_folder, "2.png", 5, 2, folder.load),
    "hm": Source(
        hm_copy.write_copy,
        f"{hm_copy.rows()[10]['article_id']}.jpg",
        191,
        50,
        lambda data, cache, **options: hm.load(cache, data, clusters=hm_copy.GROUPS, **options),
    ),
    "amazon": Source(
        lambda path: planted_amazon.write(planted_amazon.plant(500, 100), path, compressed=False),
        f"{planted_amazon.plant(500, 100).item_ids[3]}.png",
        99,
        30,
        lambda data, cache, **options: amazon.load(
            cache, planted_amazon.DOMAIN, path=data, fetch_images=False, **options
        ),
    ),
}


@pytest.fixture(params=SOURCES)
def source(request, monkeypatch):
    source = SOURCES[request.param]
    monkeypatch.setattr(stages, "_FEWEST", source.part)
    return source


@pytest.fixture
def data(source, tmp_path):
    """The copy, with its damaged image."""
    data = source.write(tmp_path / "data")
    (path,) = data.rglob(source.damaged)
    path.write_bytes(b"no image")
    return data


def prepare(source, data, cache, lines=None, **options):
    lines = [] if lines is None else lines
    return source.load(data, cache, log=lines.append, **options)


def content(cache):
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {path.relative_to(cache): path.read_bytes() for path in files}


def test_two_processes_prepare_what_one_prepares(source, data, tmp_path, caplog):
    found, told, said = [], [], []
    for runner in (HERE, Runner(2)):
        cache, lines = tmp_path / str(runner.workers), []
        graph = prepare(source, data, cache, lines, runner=runner)
        assert len(graph) == source.items
        assert source.damaged.partition(".")[0] not in graph.ids
        found.append(content(cache))
        lines = [line for line in lines if not line.startswith("Prepared")]
        told.append(lines + [record.getMessage() for record in caplog.records])
        caplog.clear()
        with pytest.raises(UserError) as error:
            prepare(source, data, tmp_path / f"strict{runner.workers}", strict=True, runner=runner)
        said.append(str(error.value))
    assert found[0] == found[1]
    shards = [path for path in found[0] if "array_record" in path.name]
    assert len(shards) == -(-source.items // source.part) > 1
    assert told[0] == told[1]
    assert said[0] == said[1]


def test_after_a_kill_whole_parts_stay(source, data, tmp_path, monkeypatch):
    store, stored = images.storable, []

    def killed(encoded, size):
        if len(stored) == source.part + 1:  # the second of the second part
            raise KeyboardInterrupt
        stored.append(encoded)
        return store(encoded, size)

    def again(*args):
        raise UserError("not again")

    with monkeypatch.context() as patch:
        patch.setattr(images, "storable", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, data, tmp_path / "cache")
    assert not list(tmp_path.rglob("dataset_info.json"))
    stored.clear()
    monkeypatch.setattr(images, "check_decodes", again)
    monkeypatch.setattr(images, "storable", lambda *args: (stored.append(args[0]), store(*args))[1])
    assert len(prepare(source, data, tmp_path / "cache")) == source.items
    assert len(stored) == source.items - source.part
    assert not list(tmp_path.rglob("unfinished"))


@pytest.mark.parametrize("module", [amazon, folder, hm])
def test_the_configuration_names_the_runner(module, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "load", lambda *args, runner, **options: seen.append(runner))
    name = module.__name__.rpartition(".")[2]
    data = rcml.get_config(f"{name},path={tmp_path},domain=Planted").data
    module.from_config(data, tmp_path)
    data.prepare_workers, data.beam = 3, "--runner=DirectRunner"
    module.from_config(data, tmp_path)
    assert seen == [HERE, Runner(3, "--runner=DirectRunner")]

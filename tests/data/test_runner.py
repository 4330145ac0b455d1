import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from rcml_jax.data import prepared, stages
from rcml_jax.data.images import EncodedImages
from rcml_jax.data.stages import HERE, Runner, ranges
from rcml_jax.errors import UserError
from tests.data.conftest import make_graph, png

ROOT = Path(__file__).parents[2]
TWO = Runner(workers=2)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    """Ranges of ten items; the 60 items of the toy have six."""
    monkeypatch.setattr(stages, "_FEWEST", 10)


def counted_png(log: Path, failing: tuple[int, ...], index: int) -> bytes:
    """An item's image; the index is written to a file. Some images cannot be had."""
    with log.open("a") as file:
        file.write(f"{index}\n")
    if index in failing:
        raise UserError(f"items.csv, line {index + 2}: image {index} is bad; replace it.")
    return png(index)


def graph_of(log: Path, *failing: int):
    images = EncodedImages(60, functools.partial(counted_png, log, failing))
    return dataclasses.replace(make_graph(), images=images)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded(log: Path) -> list[int]:
    return sorted(map(int, log.read_text().split()))


def killed(index: int) -> bytes:
    """The first image ends its process, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return png(index)


def test_ranges_cover_all_items_once(monkeypatch):
    monkeypatch.undo()
    for count, number, longest in (
        (1, 1, 1),
        (256, 1, 256),
        (257, 2, 256),
        (1_000_000, 64, 15_625),
        (10_000_000, 611, 16_384),
    ):
        found = np.array(ranges(count))
        assert (len(found), np.ptp(found, axis=1).max()) == (number, longest)
        assert (found[0, 0], found[-1, 1]) == (0, count)
        np.testing.assert_array_equal(found[1:, 0], found[:-1, 1])


def test_two_processes_write_what_one_writes(tmp_path):
    logs = [tmp_path / name for name in ("one.txt", "two.txt")]
    folders = [
        prepared.prepare(tmp_path / log.stem, graph_of(log), runner=where)
        for log, where in zip(logs, (HERE, TWO), strict=True)
    ]
    one, two = map(content, folders)
    assert one == two
    assert sum("array_record" in name for name in one) == 6
    assert encoded(logs[0]) == encoded(logs[1]) == list(range(60))
    # The graph beside the records is what the records themselves say.
    arrays, strings = prepared._scan(folders[0])
    with np.load(folders[0] / "graph.npz") as kept:
        assert set(kept.files) == set(arrays)
        for name, values in arrays.items():
            assert kept[name].dtype == values.dtype
            np.testing.assert_array_equal(kept[name], values)
    assert tuple(strings["texts"]) == make_graph().texts


def test_of_several_failures_the_first_item_is_told(tmp_path):
    said = []
    for where in (HERE, TWO):
        with pytest.raises(UserError) as error:
            prepared.prepare(tmp_path, graph_of(tmp_path / "log", 35, 12), runner=where)
        said.append(str(error.value))
        assert not list(tmp_path.rglob("incomplete.*"))
    assert said == 2 * ["items.csv, line 14: image 12 is bad; replace it."]


def test_a_worker_that_dies_is_a_user_error(tmp_path):
    graph = dataclasses.replace(make_graph(), images=EncodedImages(60, killed))
    with pytest.raises(UserError, match=r"was killed.*lower config\.data\.prepare_workers"):
        prepared.prepare(tmp_path, graph, runner=TWO)


def test_the_configuration_names_the_runner():
    assert Runner.from_config({}) == HERE  # a recipe whose source has no such options
    found = Runner.from_config({"prepare_workers": 3, "beam": "--runner=DirectRunner"})
    assert found == Runner(3, "--runner=DirectRunner")


def test_images_that_cannot_be_pickled_are_refused(tmp_path):
    graph = dataclasses.replace(make_graph(), images=EncodedImages(60, lambda index: png(index)))
    with pytest.raises(
        UserError, match=r"cannot be prepared by other processes.*config\.data\.prepare_workers=1"
    ):
        prepared.prepare(tmp_path, graph, runner=TWO)
    prepared.prepare(tmp_path, graph)


SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from rcml_jax.data import prepared, stages
    from tests.data import test_runner
    stages._FEWEST = 10
    log, workers = Path(sys.argv[2]), int(sys.argv[3])
    graph = test_runner.graph_of(log)
    if workers == 1:
        encode = graph.images.encode
        def until(index):
            if index == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(index)
        graph.images.encode = until
    else:
        graph.images.encode = test_runner.slow
        graph.images.places = [(str(log), index) for index in range(60)]
    prepared.prepare(sys.argv[1], graph, fingerprint="f", runner=stages.Runner(workers))
"""


def slow(place: tuple[str, int]) -> bytes:
    """The images from 20 on take a minute; the process is written down."""
    log, index = place
    if index >= 20:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60)
    return png(index)


def script(*args: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, args)]


def test_a_killed_preparation_makes_only_missing_shards(tmp_path):
    data, log = tmp_path / "data", tmp_path / "log"
    log.touch()
    done = subprocess.run(script(data, log, 1), cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert encoded(log) == list(range(40))
    whole = [p for p in data.rglob("relation_graph-*") if not p.name.startswith("incomplete")]
    assert len(whole) == 4
    log.write_text("")
    folder = prepared.prepare(data, graph_of(log), fingerprint="f")
    assert encoded(log) == list(range(40, 60))
    assert not list(data.rglob("incomplete.*"))
    assert content(folder) == content(prepared.prepare(tmp_path / "other", graph_of(log)))


def test_what_another_graph_has_left_is_not_taken(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(UserError):
        prepared.prepare(tmp_path, graph_of(log, 25), fingerprint="f")
    log.write_text("")
    other = dataclasses.replace(graph_of(log), texts=("other", *make_graph().texts[1:]))
    prepared.prepare(tmp_path, other, fingerprint="f")
    assert encoded(log) == list(range(60))
    assert prepared.load(tmp_path, "toy", fingerprint="f").texts[0] == "other"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, sent):
    log = tmp_path / "log"
    log.touch()
    process = subprocess.Popen(
        script(tmp_path / "data", log, 2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = _wait(lambda: set(log.read_text().split()), 2, process)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.kill()
    _, said = process.communicate(timeout=50)
    assert said.count("KeyboardInterrupt") == (sent == signal.SIGINT)  # of the parent alone
    _wait(lambda: {pid for pid in workers if not _runs(pid)}, 2, None)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait(found, count: int, process) -> set[str]:
    end = time.monotonic() + 50
    while len(found()) < count:
        assert process is None or process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return found()


def test_without_beam_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install \"rcml_jax\[beam\]\""):
        prepared.prepare(tmp_path, graph_of(tmp_path / "log"), runner=Runner(beam="--runner=x"))


def test_a_pipeline_writes_what_one_process_writes(tmp_path):
    pytest.importorskip("apache_beam")
    direct, log = Runner(beam="--runner=DirectRunner"), tmp_path / "log"
    with pytest.raises(UserError, match=r"^items\.csv, line 14: image 12 is bad; replace it\.$"):
        prepared.prepare(tmp_path / "beam", graph_of(log, 12), fingerprint="f", runner=direct)
    log.write_text("")
    folder = prepared.prepare(tmp_path / "beam", graph_of(log), fingerprint="f", runner=direct)
    assert encoded(log) == list(range(10, 20))  # the other ranges were done
    assert content(folder) == content(prepared.prepare(tmp_path / "one", graph_of(log)))
    with pytest.raises(UserError, match="refused by Beam"):
        Runner(beam="--runner=Nobody").run(print, [(tmp_path / "x", tuple)])

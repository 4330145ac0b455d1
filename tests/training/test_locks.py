"""Two processes and one directory: work directories, embeddings, prepared data; all real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rcml_jax.cli import commands, embed
from rcml_jax.data import prepared
from rcml_jax.search.embedding_store import open_embeddings
from rcml_jax.training import loop
from rcml_jax.training import workdir as workdirs
from rcml_jax.training.checkpoint import read_params
from tests.cli.test_commands import fails
from tests.toy import ROOT, arguments, start, tiny_config
from tests.toy_run import make_run
from tests.training.test_two_processes import free_port

DEADLINE = 300  # seconds


@contextlib.contextmanager
def ended(*processes):
    """Kill what still runs in the end."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until(holds, process):
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_held_by(directory, process):
    """Whether a process holds a directory and is past its first checkpoint or shard."""

    def holds():
        try:
            return json.loads((directory / ".lock.json").read_text())["pid"] == process.pid
        except (OSError, ValueError):
            return False

    return holds


def script(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | env,
    )


def test_two_runs_in_one_work_directory(catalogue, tmp_path, capsys):
    workdir = tmp_path / "run"
    args = arguments(catalogue, workdir, steps=1_000_000, log_every=1, validate_every=50)
    first = start("train.py", args)
    with ended(first):
        wait_until(lambda: (workdir / "metrics.jsonl").is_file(), first)
        assert is_held_by(workdir, first)()
        second = start("train.py", args)
        out, err = second.communicate(timeout=DEADLINE)
        assert (second.returncode, out) == (2, "")
        assert err.startswith(f"error: process {first.pid} on host {os.uname().nodename} (since 2")
        assert err.endswith(
            f") is training or evaluating in {workdir}; wait until it ends, or give another "
            "--workdir\n"
        )
        # What the first one trains cannot be evaluated yet.
        args_of_eval = ["--workdir", workdir]
        fails(commands.evaluate, args_of_eval, capsys, f"process {first.pid} on host")
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
    third = start("train.py", args)
    with ended(third):
        wait_until(is_held_by(workdir, third), third)
        lines = len((workdir / "metrics.jsonl").read_text().splitlines())
        wait_until(
            lambda: len((workdir / "metrics.jsonl").read_text().splitlines()) != lines, third
        )
        third.send_signal(signal.SIGTERM)
        _, err = third.communicate(timeout=DEADLINE)
        assert third.returncode == 0, err
    assert "start again to go on" in err
    assert not (workdir / ".lock.json").exists()


def test_what_is_being_trained_is_not_called_damaged(catalogue, tmp_path):
    workdir = make_run(catalogue, tmp_path / "run")
    holding = """
        import sys, time
        from rcml_jax.training import workdir
        with workdir.hold(sys.argv[1]):
            print("held", flush=True)
            time.sleep(300)
    """
    process = script(holding, workdir)
    with ended(process):
        assert process.stdout.readline() == "held\n"
        assert read_params(workdir)  # whole: read without a word
        for path in (workdir / "checkpoints" / "7" / "state").rglob("*"):
            if path.is_file():
                path.unlink()
        with pytest.raises(loop.UserError) as error:
            read_params(workdir)
    assert str(error.value).startswith(f"process {process.pid} on host")
    assert "damaged" not in str(error.value)
    with pytest.raises(loop.UserError, match="is damaged"):
        read_params(workdir)


def test_no_room_for_the_evaluation(catalogue, tmp_path):
    workdir = make_run(catalogue, tmp_path / "run")
    part = workdir / "eval.json.part"
    part.symlink_to("/dev/full")
    with pytest.raises(loop.UserError, match=r"cannot write .*eval.json: No space left"):
        loop.evaluate(tiny_config(catalogue), workdir)
    assert not [path for path in workdir.iterdir() if path.name.startswith("eval")]
    result = loop.evaluate(tiny_config(catalogue), workdir)
    assert json.loads((workdir / "eval.json").read_text()) == result


TOGETHER = """
    import sys
    from rcml_jax.errors import UserError
    from rcml_jax.training import loop, sharding
    sharding.initialize_distributed()
    for directory in sys.argv[1:]:
        try:
            with loop._alone(directory):
                print("found: inside")
        except UserError as error:
            print(f"found: {error}")
        sharding.wait_for_all(directory)
"""


def test_the_processes_of_one_run_share_its_directory(tmp_path):
    """The primary holds it for both; where it may not have it, both end instead of waiting."""
    free, taken = tmp_path / "free", tmp_path / "taken"
    address = f"localhost:{free_port()}"
    flags = "--xla_force_host_platform_device_count=1"
    with workdirs.hold(taken):
        processes = [
            script(
                TOGETHER,
                free,
                taken,
                XLA_FLAGS=flags,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(number),
            )
            for number in range(2)
        ]
        with ended(*processes):
            done = [process.communicate(timeout=DEADLINE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], done
    # Gloo writes there, too.
    (first, refused), (second, followed) = (
        [line.removeprefix("found: ") for line in out.splitlines() if line.startswith("found: ")]
        for out, _ in done
    )
    assert first == second == "inside"
    assert refused.startswith(f"process {os.getpid()} on host ")
    assert followed == f"process 0 cannot use {taken}; see its message"


SLOW_EMBED = """
    import sys, time
    from rcml_jax.cli.embed import main
    from rcml_jax.search import catalogue
    catalogue._CHUNK = 4
    embed = catalogue.embed_chunk
    def slow(*args):
        time.sleep(0.5)
        return embed(*args)
    catalogue.embed_chunk = slow
    sys.exit(main(sys.argv))
"""


def test_two_processes_that_embed_into_one_directory(catalogue, tmp_path, capsys):
    workdir, to = make_run(catalogue, tmp_path / "run"), tmp_path / "embedded"
    args = ["--workdir", workdir, "--items", catalogue, "--to", to, "--shard", "4"]
    first = script(SLOW_EMBED, *args)
    with ended(first):
        manifest = to / "manifest.json"
        wait_until(lambda: manifest.is_file() and json.loads(manifest.read_text())["done"], first)
        who = f"process {first.pid} on host {os.uname().nodename} (since "
        what = f") is embedding into {to}; wait until it ends, or give another directory"
        fails(embed.main, args, capsys, who, what)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = json.loads(manifest.read_text())["done"]
    assert 0 < done < 15
    assert embed.main(["program", *map(str, args)]) == 0
    assert all(mask.all() for mask in open_embeddings(to).has.values())


PREPARE = """
    import os, sys, time
    from rcml_jax.data import prepared
    from tests.data.conftest import make_graph
    def build():
        with open(sys.argv[2], "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(2)
        return make_graph()
    graph = prepared.load_or_prepare(sys.argv[1], "toy", build, log=print)
    print(len(graph), len(graph.pairs), graph.images[3].size)
"""


def test_three_preparations_at_once(tmp_path):
    built = tmp_path / "built"
    processes = [script(PREPARE, tmp_path / "data", built) for _ in range(3)]
    with ended(*processes):
        done = [process.communicate(timeout=DEADLINE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], done
    (builder,) = built.read_text().split()
    lines = {str(p.pid): out.splitlines() for p, (out, _) in zip(processes, done, strict=True)}
    assert lines[builder][0].startswith("Prepared toy: 60 items")
    for pid, (*said, found) in lines.items():
        assert found == lines[builder][-1]
        if pid != builder and said:  # it may have come when all was done
            (line,) = said
            assert line.startswith(f"process {builder} on host ")
            assert line.endswith(") is preparing toy; waiting for it")
    assert any(len(said) > 1 for pid, said in lines.items() if pid != builder)
    assert prepared.is_prepared(tmp_path / "data", "toy")

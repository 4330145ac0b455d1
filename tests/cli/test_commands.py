"""train.py and eval.py: what they print, what they leave behind, and every kind of bad input."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from rcml_jax.cli import commands, export
from tests.toy import CONFIG, ROOT, arguments, read_metrics, start


def run(command, args, capsys):
    """(status, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    status = command(["program", *map(str, args)])
    return status, *capsys.readouterr()


def files(folder):
    """Every file below a folder with its content."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails(command, args, capsys, *parts):
    """A command ends with status 2 and one sentence on stderr that has the parts in it."""
    status, out, err = run(command, args, capsys)
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    *before, line = err.splitlines()
    assert line.startswith("error: "), err
    assert not any("error" in other.lower() for other in before), err
    for part in parts:
        assert str(part) in line
    return line


@pytest.fixture(scope="session")
def trained(catalogue, tmp_path_factory):
    """A work directory made by train.py in a process of its own, and what that printed."""
    workdir = tmp_path_factory.mktemp("commands") / "deep" / "run"
    process = start("train.py", arguments(catalogue, workdir, validate_every=6))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return workdir, out, err


# --- What works -----------------------------------------------------------------------------------


def test_training_prints_the_table_and_leaves_its_files(trained):
    workdir, out, err = trained
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "eval.json"}
    result = json.loads((workdir / "eval.json").read_text())
    assert "rcml on catalogue: test, 40 queries" in out
    row = next(line for line in out.splitlines() if "Hit@5" in line)
    for name in ("tt", "ii", "ti", "it", "avg"):
        assert f"{100 * result['retrieval']['hit@5'][name]:.1f}" in row
    for column in ("TT", "II", "TI", "IT", "AVG", "Top-3", "MRR", "Relation validity"):
        assert column in out
    assert "step 12/12" in err
    assert "error" not in err.lower()
    assert "warning" not in err.lower()
    # Plain lines where there is no terminal: no control characters.
    assert "\x1b" not in out + err
    assert "\r" not in out + err


def test_evaluating_again_gives_the_same_figures(trained, capsys):
    workdir, out, _ = trained
    before = (workdir / "eval.json").read_text()
    checkpoints = files(workdir / "checkpoints")
    status, again, err = run(commands.evaluate, [f"--workdir={workdir}"], capsys)
    assert status == 0, err
    assert again == out
    assert (workdir / "eval.json").read_text() == before
    assert files(workdir / "checkpoints") == checkpoints


def test_training_again_evaluates_only(trained, catalogue, capsys):
    workdir, out, _ = trained
    before = files(workdir)
    args = arguments(catalogue, workdir, validate_every=6)
    status, again, err = run(commands.train, args, capsys)
    assert (status, again, err) == (0, out, "")
    assert files(workdir) == before


def test_evaluation_options(trained, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    args = ["--workdir", workdir, "--split=validation", "--config.evaluation.similarity=all"]
    status, out, err = run(commands.evaluate, args, capsys)
    assert status == 0, err
    assert "catalogue: validation," in out
    for name in ("cosine", "dot", "euclidean", "manhattan", "chi_square"):
        assert f"Hit@5, {name}" in out
    result = json.loads((workdir / "eval_validation.json").read_text())
    assert result["split"] == "validation"
    assert json.loads((workdir / "eval.json").read_text())["split"] == "test"
    assert next(iter(result["similarities"])) == "cosine"


def test_eval_py_as_a_process(trained):
    process = start("eval.py", [f"--workdir={trained[0]}"])
    out, err = process.communicate(timeout=400)
    assert (process.returncode, out) == (0, trained[1]), err


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_in_mid_run_saves_and_the_next_start_resumes(catalogue, tmp_path, number):
    workdir = tmp_path / "run"
    # So many steps that the signal comes before the last.
    options = {"steps": 100_000, "validate_every": 100_000, "log_every": 1}
    process = start("train.py", arguments(catalogue, workdir, **options))
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith("; start again to go on")
    stopped = int(last.split()[3].rstrip(";"))
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, stopped + 1))
    process = start("train.py", arguments(catalogue, workdir, **options))
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if line.startswith("step "):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert lines[0] == f"resuming from step {stopped}"
    assert lines[1].startswith(f"step {stopped + 1}/")


# --- What does not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--config.optimizer.learning_rat=1", ("learning_rat", "learning_rate")),
        ("--config.stepps=5", ("stepps", "steps")),
        ("--stepps=5", ("stepps",)),
        ("--config.steps=many", ("many",)),
        ("--config.steps=1.5", ("1.5",)),
        ("--config.data.strict=perhaps", ("perhaps",)),
        ("--config.optimizer=3", ("config.optimizer has parts", "--config.optimizer.")),
        ("--config.model.nope=3", ("config.model has no 'nope'; --help lists all options",)),
        ("--config.learnin_rate=1", ("did you mean config.optimizer.learning_rate?",)),
        ("--config.seed.x=1", ("config.seed is a value and has no part 'x'",)),
        ("--confg.steps=1", ("--confg.steps is unknown",)),
        ("--wrkdir=runs", ("--wrkdir is unknown; did you mean --workdir?",)),
        ("surplus", ("unknown argument 'surplus'", "--name=value")),
    ],
)
def test_mistyped_options(catalogue, tmp_path, capsys, option, parts):
    workdir = tmp_path / "run"
    fails(commands.train, [*arguments(catalogue, workdir), option], capsys, *parts)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"method": "clipp"}, ("config.method='clipp' is unknown", "rcml, clip, siglip, unicl")),
        ({"parallel": "ddp"}, ("config.parallel='ddp' is unknown; choose one of jit, pmap, fsdp",)),
        ({"data.name": "imagenet"}, ("config.data.name='imagenet' is unknown", "openmoji, folder")),
        (
            {"data.disjoint": "user"},
            ("config.data.disjoint='user' is unknown; choose one of item, pair, relation",),
        ),
        ({"model.dtype": "float16"}, ("config.model.dtype='float16' is unknown",)),
        ({"model.freeze": "head"}, ("config.model.freeze='head' is unknown",)),
        ({"model.heads": 3}, ("model.width=16 is not a multiple of model.heads=3",)),
        ({"model.vocab_size": 10}, ("vocabulary of 10 is too small",)),
        (
            {"model.pretrained": "no/such/model"},
            ("cannot load a CLIP or SigLIP", "no/such/model"),
        ),
        ({"model.init_from": "nowhere"}, ("nowhere holds no checkpoints",)),
        ({"evaluation.similarity": "cosin"}, ("evaluation.similarity='cosin' is unknown",)),
        ({"evaluation.validity_probe": "svm"}, ("evaluation.validity_probe='svm' is unknown",)),
        ({"platform": "tpu"}, ("no device of the kind 'tpu'",)),
        ({"devices": 99}, ("config.devices=99 is too many: 8 devices",)),
        ({"devices": 5}, ("batch of 16 examples cannot be split over 5 devices",)),
        ({"batch.texts_per_row": 3}, ("batch.texts_per_row=3 must divide config.batch.size=16",)),
        (
            {"batch.texts_per_row": 4, "devices": 8},
            ("split over 8 devices; make config.batch.size a multiple of 32",),
        ),
        (
            {"batch.texts_per_row": 4, "micro_batch": 3},
            ("config.micro_batch=3 is less than a row of 4 examples",),
        ),
        ({"batch.size": 64}, ("batch of 64 items is larger than the training split",)),
        ({"batch.relations": 9}, ("need room for 36 items; raise config.batch.size",)),
        ({"batch.relations": 30, "batch.pairs_per_relation": 0}, ("batch.relations=30",)),
        ({"batch.intra_pairs": -1}, ("config.batch.intra_pairs=-1 must be at least 0",)),
        ({"steps": 0}, ("config.steps=0 must be at least 1",)),
        ({"seed": -1}, ("config.seed=-1 must be from 0 to 9,223,372,036,854,775,807",)),
        ({"data.split_seed": -1}, ("config.data.split_seed=-1 must be from 0 to",)),
        ({"optimizer.warmup_steps": 12}, ("warmup_steps=12 leaves no step",)),
        ({"optimizer.learning_rate": 0.0}, ("learning_rate=0.0 must be above 0",)),
    ],
)
def test_values_that_name_nothing(catalogue, tmp_path, capsys, options, parts):
    workdir = tmp_path / "run"
    fails(commands.train, arguments(catalogue, workdir, **options), capsys, *parts)
    assert not (workdir / "checkpoints").exists() or not files(workdir / "checkpoints")
    assert not (workdir / "eval.json").exists()


def test_a_corrected_option_may_use_the_same_work_directory(catalogue, tmp_path, capsys):
    workdir = tmp_path / "run"
    for options in ({"method": "clipp"}, {"batch.size": 64}, {"model.vocab_size": 10}):
        fails(commands.train, arguments(catalogue, workdir, **options), capsys)
    wrong = arguments(catalogue, workdir, **{"model.vocab_size": 280, "devices": 5})
    fails(commands.train, wrong, capsys, "5 devices")
    assert json.loads((workdir / "config.json").read_text())["model"]["vocab_size"] == 280
    args = arguments(catalogue, workdir, steps=0)
    line = fails(commands.train, args, capsys)
    assert "another configuration" not in line
    # The tokenizer of the failed start had another size: none of it is left.
    args = arguments(catalogue, workdir, devices=5)
    fails(commands.train, args, capsys, "5 devices")
    assert json.loads((workdir / "config.json").read_text())["model"]["vocab_size"] == 300
    vocabulary = json.loads((workdir / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) > 280


def test_missing_arguments(tmp_path, capsys):
    fails(commands.train, [], capsys, "training needs --config, for example --config rcml")
    fails(commands.train, [f"--config={CONFIG}"], capsys, "training needs --workdir")
    fails(commands.train, ["--config"], capsys, "--config needs a value")
    fails(commands.evaluate, [], capsys, "the evaluation needs --workdir")
    fails(commands.evaluate, ["--workdir="], capsys, "--workdir needs a value")


@pytest.mark.parametrize("name", ["train", "eval", "export"])
def test_help(name, capsys, monkeypatch):
    """Console scripts call a command without arguments: it reads those of the process."""
    command = {"train": commands.train, "eval": commands.evaluate, "export": export.main}[name]
    monkeypatch.setattr("sys.argv", [f"rcml-{name}", "--workdir=runs/x", "--help"])
    assert command() == 0
    out, err = capsys.readouterr()
    assert f"rcml-{name} " in out
    assert err == ""


@pytest.mark.parametrize("program", ["commands:train", "sweep:main", "export:main"])
def test_a_reader_that_has_seen_enough(program):
    """As with `rcml-train --help | head`."""
    module, _, function = program.partition(":")
    code = f"from rcml_jax.cli import {module}; raise SystemExit({module}.{function}())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_file_that_the_system_refuses_is_named(tmp_path, capsys):
    def command(argv):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    refused = lambda argv: commands.guard(command, argv)  # noqa: E731
    fails(refused, [], capsys, f"cannot use '{tmp_path}': Permission denied")


def test_configuration_files_that_cannot_be_read(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    missing = tmp_path / "missing.py"
    fails(commands.train, [f"--config={missing}", workdir], capsys, "there is no", missing)
    fails(commands.train, [f"--config={tmp_path}", workdir], capsys, tmp_path)
    for text, parts in {
        "def get_config(:\n": ("line 1", "invalid syntax"),
        "x = 1\n": ("has no function get_config",),
        "import no_such_module\n": ("no_such_module",),
        "x = unknown\n": ("'unknown' is not defined",),
        "def get_config():\n    return 1 / 0\n": ("division by zero",),
        "def get_config():\n    return {}\n": ("ConfigDict",),
    }.items():
        path = tmp_path / "broken.py"
        path.write_text(text)
        fails(commands.train, [f"--config={path}", workdir], capsys, path, *parts)
    (tmp_path / "notes.txt").write_text("def get_config(): pass")
    fails(commands.train, [f"--config={tmp_path / 'notes.txt'}", workdir], capsys, "notes.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("imagenet", ("no data source 'imagenet'", "openmoji")),
        ("folder,pathh=x", ("no option 'pathh=x'", "path")),
        ("folder,path", ("no option 'path'", "name=value")),
    ],
)
def test_wrong_configuration_arguments(tmp_path, capsys, argument, parts):
    args = [f"--config={CONFIG}:{argument}", f"--workdir={tmp_path / 'run'}"]
    fails(commands.train, args, capsys, *parts)


def test_a_data_folder_that_is_not_there(tmp_path, capsys):
    args = arguments(tmp_path / "nowhere", tmp_path / "run")
    fails(commands.train, args, capsys, "There is no folder", tmp_path / "nowhere")
    args = [f"--config={CONFIG}:folder", f"--workdir={tmp_path / 'other'}"]
    fails(commands.train, args, capsys, "the folder source needs a path")


def test_a_work_directory_of_another_configuration(trained, catalogue, capsys):
    workdir = trained[0]
    before = files(workdir)
    args = arguments(catalogue, workdir, validate_every=6, method="clip", seed=1)
    fails(
        commands.train, args, capsys,
        f"{workdir} was trained with another configuration",
        "method ('rcml' there, 'clip' here)", "seed (42 there, 1 here)", "another --workdir",
    )  # fmt: skip
    assert files(workdir) == before


def test_a_foreign_folder_is_left_alone(catalogue, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    args = arguments(catalogue, tmp_path)
    fails(commands.train, args, capsys, f"{tmp_path} is not empty and holds no config.json")
    assert files(tmp_path) == {tmp_path / "thesis.txt": b"chapter 1"}
    fails(commands.train, arguments(catalogue, tmp_path / "thesis.txt"), capsys, "thesis.txt")
    assert files(tmp_path) == {tmp_path / "thesis.txt": b"chapter 1"}
    fails(
        commands.evaluate,
        [f"--workdir={tmp_path}"],
        capsys,
        "holds no config.json",
        "rcml-train --config rcml",
    )
    fails(commands.evaluate, [f"--workdir={tmp_path / 'no'}"], capsys, "nothing was trained there")
    assert files(tmp_path) == {tmp_path / "thesis.txt": b"chapter 1"}


def copy_of(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    return workdir


def test_a_missing_checkpoint(trained, tmp_path, capsys):
    workdir = copy_of(trained, tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    fails(commands.evaluate, [f"--workdir={workdir}"], capsys, "holds no checkpoints", "train")
    (workdir / "checkpoints").mkdir()
    fails(commands.evaluate, [f"--workdir={workdir}"], capsys, "holds no whole checkpoint")


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_a_damaged_checkpoint(trained, catalogue, tmp_path, program):
    workdir = copy_of(trained, tmp_path)
    for path in (workdir / "checkpoints").glob("*/state/**/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    before = files(workdir)
    args = arguments(catalogue, workdir, validate_every=6)
    # A process of its own: Orbax leaves broken threads behind.
    process = start(program, args if program == "train.py" else [f"--workdir={workdir}"])
    out, err = process.communicate(timeout=400)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {workdir / 'checkpoints'}")
    assert "is damaged or the checkpoint of another model" in err
    assert files(workdir) == before


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_checkpoint_of_another_model(trained, catalogue, tmp_path, capsys, command):
    workdir = copy_of(trained, tmp_path)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["width"] = 8
    (workdir / "config.json").write_text(json.dumps(config))
    before = files(workdir)
    args = arguments(catalogue, workdir, validate_every=6, **{"model.width": 8})
    args = args if command == "train" else [f"--workdir={workdir}"]
    fails(getattr(commands, command), args, capsys, workdir, "checkpoint of another model")
    assert files(workdir) == before


def test_a_damaged_config_json(trained, tmp_path, capsys):
    workdir = copy_of(trained, tmp_path)
    (workdir / "config.json").write_text('{"method": "rc')
    fails(commands.evaluate, [f"--workdir={workdir}"], capsys, "config.json is not valid JSON")
    (workdir / "config.json").write_text('{"method": "rcml"}')
    fails(commands.evaluate, [f"--workdir={workdir}"], capsys, "config.json lacks seed, steps")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--config.model.beta=1.0", ("config.model.beta", "train it with rcml-train")),
        ("--config.evaluation.similarity=cosin", ("evaluation.similarity='cosin' is unknown",)),
        ("--config.evaluation.similarty=all", ("similarty", "similarity")),
        ("--split=tset", ("--split=tset is unknown; choose one of train, validation, test",)),
    ],
)
def test_wrong_options_of_eval_py(trained, capsys, option, parts):
    before = files(trained[0])
    fails(commands.evaluate, [f"--workdir={trained[0]}", option], capsys, *parts)
    assert files(trained[0]) == before

"""M3CoL on tables, from data to eval.json: seeds, folds, protocols, variants."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from rcml_jax.cli import commands
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.training import loop
from rcml_jax.training.checkpoint import read_params
from rcml_jax.training.writer import read_history
from tests import reference
from tests.data.sources.test_omics import awkward
from tests.methods.m3col_data import CONFIG, TABLES, check_summary, omics_config, write_tables
from tests.toy import read_metrics
from tests.training.test_loop import train


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("omics"))


@pytest.fixture(scope="module")
def omics_run(tables, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "omics"
    return workdir, loop.train_and_evaluate(omics_config(tables), workdir)


def twin(params, inputs):
    """Embeddings and logits of the NumPy twin with the parameters of a model of tables."""
    layers = lambda mlp: [(x["kernel"], x["bias"]) for _, x in sorted(mlp.items())]  # noqa: E731
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    parts = {name: params[f"encoders_{name}"] for name in inputs}
    return reference.m3col(
        inputs,
        {name: (part["low"], part["range"]) for name, part in parts.items()},
        {name: layers(part["mlp"]) for name, part in parts.items()},
        {name: layers(params[f"heads_{name}"]) for name in inputs},
        layers(params["fusion"]),
    )


def cross_entropy(logits, targets):
    """The mean over rows; targets (n, classes)."""
    rows = zip(logits, targets, strict=True)
    return np.mean([reference.cross_entropy(x, t, np.ones(len(t), bool)) for x, t in rows])


def test_the_evaluation_of_tables_has_its_form(omics_run):
    workdir, result = omics_run
    assert json.loads((workdir / "eval.json").read_text()) == result
    assert (result["method"], result["dataset"], result["split"]) == ("m3col", "rosmap", "test")
    assert set(result["classification"]) == {"last", "validation_selected", "best_test_epoch"}
    for summary in result["classification"].values():
        check_summary(summary, 2)
        assert {"f1", "weighted_f1", "macro_f1", "auc"} < set(summary)
    assert (
        result["classification"]["best_test_epoch"]["accuracy"]["mean"]
        >= (result["classification"]["last"]["accuracy"]["mean"])
    )
    protocol = result["protocol"]
    assert protocol["samples"] == {"train": 40, "validation": 0, "test": 20}
    assert protocol["models"] == [
        "all-seed42", "all-seed43", "held-out-seed42", "held-out-seed43",
    ]  # fmt: skip
    assert protocol["looks"] == "one every 3 steps of 12"
    assert protocol["steps"] == 12
    assert set(protocol) > set(result["classification"])
    # Three views with a shift of one deviation in each column are no secret.
    assert result["classification"]["last"]["accuracy"]["mean"] > 0.7


def test_the_checkpoint_gives_the_last_look(omics_run):
    # "last" comes from the looks of training, "checkpoint" from the parameters read back.
    _, result = omics_run
    last = dict(result["classification"]["last"])
    assert result["checkpoint"].pop("which") == "latest"
    assert result["checkpoint"] == last
    result["checkpoint"]["which"] = "latest"


def test_predictions_give_the_accuracy(omics_run):
    workdir, result = omics_run
    with np.load(workdir / "predictions.npz", allow_pickle=False) as arrays:
        for place, seed in enumerate((42, 43)):
            name = f"all-seed{seed}"
            np.testing.assert_array_equal(arrays[f"{name}/labels"], np.arange(20) % 2)
            right = arrays[f"{name}/fused"] == arrays[f"{name}/labels"]
            expected = result["classification"]["last"]["accuracy"]["values"][place]
            assert right.mean() == pytest.approx(expected)
            for head in ("mrna", "methylation", "mirna"):
                right = arrays[f"{name}/{head}"] == arrays[f"{name}/labels"]
                value = result["unimodal"][head]["accuracy"]["values"][place]
                assert right.mean() == pytest.approx(value)


def test_analyses_are_of_the_same_models(omics_run):
    _, result = omics_run
    check_summary(result["ensemble"], 1)
    assert set(result["corrupted"]) == {"mrna", "methylation", "mirna"}
    for summary in result["corrupted"].values():
        check_summary(summary, 2)
    noise = result["random_inputs"]
    assert 0.5 <= noise["q05"]["mean"] <= noise["q50"]["mean"] <= noise["q95"]["mean"] <= 1


def test_controls_stand_beside_the_figure(omics_run):
    _, result = omics_run
    views = ("mrna", "methylation", "mirna")
    assert list(result["controls"]) == ["majority", "linear", *(f"linear_{v}" for v in views)]
    rates = {}
    for name, row in result["controls"].items():
        check_summary(row["classification"]["last"], 1)
        assert "validation" not in row
        rates[name] = row["classification"]["last"]["accuracy"]["mean"]
    assert rates["majority"] == 0.5
    assert result["controls"]["majority"]["classification"]["last"]["auc"]["mean"] == 0.5
    # The classes are parted in every column: together by more than by one view alone.
    assert min(rates["linear"], *(rates[f"linear_{v}"] for v in views)) > 0.7
    gain = result["gain_over_best_control"]["classification"]
    accuracy = result["classification"]["last"]["accuracy"]["mean"]
    assert gain["gain"] == pytest.approx(accuracy - max(rates.values()))
    assert rates[gain["control"]] == max(rates.values())


@pytest.mark.parametrize("source", ["rosmap", "brca"])
def test_awkward_tables_are_trained_on(source, tmp_path, capsys):
    """From data to eval.json, with every number finite."""
    options = {"epochs": 2, "validate_epochs": 1, "seeds": 3}
    config = omics_config(awkward(tmp_path / "data"), source=source, **options)
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert f"{source}: train has one sample of 2." in capsys.readouterr().err
    assert len(result["protocol"]["classes"]) == 3
    check_summary(result["classification"]["last"], 3)
    check_summary(result["validation"]["last"], 3)
    # A column that training does not know changes nothing.
    method = build(config, tmp_path / "run")
    params = read_params(tmp_path / "run", "latest")
    rows = method.task.data.rows("test")
    before = method.embeddings(params, rows)
    method.task.data.modalities[0].values[rows, 0] = 1e4
    for name, found in method.embeddings(params, rows).items():
        np.testing.assert_array_equal(found, before[name])


def test_evaluating_again_gives_the_same(omics_run, tables):
    workdir, result = omics_run
    again = loop.evaluate(omics_config(tables), workdir)
    assert again == result
    held_out = loop.evaluate(omics_config(tables), workdir, "validation")
    check_summary(held_out["checkpoint"], 2)
    assert (workdir / "eval_validation.json").is_file()
    last = result["validation"]["last"]["accuracy"]["values"]
    assert held_out["checkpoint"]["accuracy"]["values"] == last


def test_without_its_looks_a_run_cannot_be_evaluated(omics_run, tables, tmp_path):
    workdir, _ = omics_run
    lines = (workdir / "metrics.jsonl").read_text()
    try:
        (workdir / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match=r"metrics\.jsonl, which holds the looks"):
            loop.evaluate(omics_config(tables), workdir)
    finally:
        (workdir / "metrics.jsonl").write_text(lines)


def test_each_look_has_every_model_and_held_out_folds(omics_run):
    workdir, _ = omics_run
    history = read_history(workdir)
    assert [line["step"] for line in history] == [3, 6, 9, 12]
    for line in history:
        names = {tuple(name.split("/")[1:3]) for name in line if name.startswith("look/")}
        assert ("all-seed42", "test") in names
        assert ("all-seed42", "validation") not in names
        assert ("held-out-seed43", "validation") in names
        values = [line[f"look/held-out-seed{s}/validation/accuracy"] for s in (42, 43)]
        assert line["accuracy"] == pytest.approx(np.mean(values))


def test_a_killed_run_goes_on_to_the_bit(omics_run, tables, tmp_path):
    config = omics_config(tables)

    class Killed(Exception):
        pass

    def stop(step):
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "run", after=stop)
    assert loop.train_and_evaluate(config, tmp_path / "run") == omics_run[1]
    ours, theirs = read_params(tmp_path / "run", "latest"), read_params(omics_run[0], "latest")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in ("metrics.jsonl", "config.json"):
        assert (tmp_path / "run" / name).read_text() == (omics_run[0] / name).read_text()


def test_held_out_rows_touch_nothing(tables, tmp_path):
    # The same model, once with other numbers in the rows of its validation fold.
    method = build(omics_config(tables, seeds=1), tmp_path)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    held_out = method.models().validation[1]
    changed = jax.tree.map(np.array, batch)
    places = np.isin(batch["shared"]["rows"], held_out)
    assert 0 < places.sum() < len(places)
    for name in method.single.names:
        changed["items"][name][0][places] += 100.0

    @jax.jit
    def gradient(batch):
        loss = lambda p: method.loss(p, batch, jax.random.key(1), 0.0)[0]  # noqa: E731
        return jax.grad(loss)(params)

    first, second = gradient(batch), gradient(changed)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), first, second)
    kernel = first["fusion"]["Dense_0"]["kernel"] - second["fusion"]["Dense_0"]["kernel"]
    assert np.abs(kernel[0]).max() > 0


def test_the_scaling_is_each_models_own(omics_run, tables):
    params = read_params(omics_run[0], "latest")["encoders_mrna"]
    table = np.loadtxt(tables / "1_tr.csv", delimiter=",")
    np.testing.assert_allclose(params["low"][0], table.min(0), rtol=1e-6)
    np.testing.assert_allclose(params["range"][1], np.ptp(table, 0), rtol=1e-6)
    assert np.all(params["low"][2:] >= params["low"][0] - 1e-6)
    assert np.any(params["range"][2:] < params["range"][0] - 1e-3)


def test_models_trained_together_are_those_trained_alone(tables, tmp_path):
    together = build(omics_config(tables, seeds=2), tmp_path)
    batch = next(together.batches())
    params = together.init(jax.random.key(0), batch)
    key = jax.random.key(7)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    for _, phase in together.phases():
        stacked = jax.jit(jax.value_and_grad(phase.loss, has_aux=True))(params, batch, key, 0.0)
        # What a CPU takes: one model after the other.
        looped = jax.jit(phase.value_and_grad)(params, batch, key, 0.0)
        jax.tree.map(close, looped, stacked)
        single = jax.jit(jax.grad(lambda *args, phase=phase: phase.single.loss(*args)[0]))
        for place, seed in enumerate((42, 43)):
            pick = functools.partial(lambda x, place: x[place], place=place)
            alone = single(jax.tree.map(pick, params), batch, jax.random.fold_in(key, seed), 0.0)
            jax.tree.map(close, jax.tree.map(pick, looped[1]), alone)


@pytest.mark.parametrize("place", ["input", pytest.param("embedding", marks=pytest.mark.slow)])
def test_the_loss_is_equation_16(tables, tmp_path, place):
    """Against the NumPy twins of the model, M3Co, MultiSClip and cross-entropy."""
    config = omics_config(tables, seeds=1, data__folds=0, mixup__place=place)
    method = build(config, tmp_path)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    key = jax.random.key(3)
    phases = method.phases()
    assert [first for first, _ in phases] == [0, 4]
    for number, (_, phase) in enumerate(phases):
        value, metrics = jax.jit(phase.loss)(params, batch, key, 0.0)
        prepared = phase.prepare(batch, key)
        inputs = {n: np.asarray(batch["items"][n][0], np.float64) for n in method.names}
        z, logits = twin(params, inputs)
        targets = np.eye(2)[batch["shared"]["labels"]]
        expected = sum(cross_entropy(x, targets) for x in logits.values())
        if number == 0:
            share = np.asarray(prepared["shared"]["coefficient"], np.float64)
            partner = np.asarray(prepared["shared"]["partner"])
            lam = share[:, None]
            rows = {n: partner[:, i] for i, n in enumerate(method.names)}
            if place == "input":
                mixed = {n: lam * x + (1 - lam) * x[rows[n]] for n, x in inputs.items()}
                mixed, _ = twin(params, mixed)
            else:
                mixed = {n: lam * x + (1 - lam) * x[rows[n]] for n, x in z.items()}
            term = reference.m3co(
                [z[n] for n in method.names],
                [mixed[n] for n in method.names],
                share,
                [rows[n] for n in method.names],
                0.1,
            )
        else:
            term = reference.multi_soft_clip([z[n] for n in method.names], 0.1)
        assert metrics["contrastive"] == pytest.approx(term, rel=1e-4)
        assert value == pytest.approx(expected + 0.1 * term, rel=1e-4)


VARIANTS = {
    "only M3Co": {"loss.contrastive": "m3co"},
    "plain": {"loss.contrastive": "clip"},
    "none": {"loss.contrastive": "none"},
    "weightless": {"loss.contrastive_weight": 0.0},
    "no unimodal": {"loss.unimodal_weight": 0.0},
    "vanilla": {"mixup.labels": True, "loss.contrastive": "none"},
    "one": {"data.modalities": "mirna"},
    "two": {"data.modalities": "mirna,mrna"},
    "half": {"mixup.fraction": 0.5, "model.dropout": 0.5},
    "bfloat16": {"model.dtype": "bfloat16"},
}


#: What other variants' tests pass through, too.
SLOW_VARIANTS = set(VARIANTS) - {"plain", "vanilla"}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v in SLOW_VARIANTS)) for v in VARIANTS],
)
def test_every_variant_learns(tables, tmp_path, variant):
    config = omics_config(tables, epochs=12, validate_epochs=12)
    config.update_from_flattened_dict(VARIANTS[variant])
    result = loop.train_and_evaluate(config, tmp_path / "run")
    least = 0.5 if variant == "half" else 0.6
    assert result["classification"]["last"]["accuracy"]["mean"] >= least
    first = next(line for line in read_metrics(tmp_path / "run") if line["kind"] == "train")
    assert ("contrastive" in first) == (variant in ("only M3Co", "plain", "no unimodal", "two", "half", "bfloat16"))  # fmt: skip # noqa: E501
    heads = {"one": [], "no unimodal": [], "two": ["mirna", "mrna"]}
    expected = heads.get(variant, ["methylation", "mirna", "mrna"])
    assert sorted(result.get("unimodal", {})) == expected
    assert ("corrupted" in result) == (variant != "one")


def test_plain_contrastive_is_m3co_without_mixing(tables, tmp_path):
    options = {"seeds": 1, "data.folds": 0}
    plain = build(omics_config(tables, **options, loss__contrastive="clip"), tmp_path)
    mixed = build(
        omics_config(tables, **options, loss__contrastive="m3co", mixup__fraction=0.0), tmp_path
    )
    batch = next(plain.batches())
    params = plain.init(jax.random.key(0), batch)
    values = [m.loss(params, batch, jax.random.key(1), 0.0)[0] for m in (plain, mixed)]
    assert values[0] == pytest.approx(float(values[1]), rel=1e-5)


def test_vanilla_mixup_mixes_labels_with_their_inputs(tables, tmp_path):
    config = omics_config(
        tables, seeds=1, data__folds=0, mixup__labels=True, loss__contrastive="none"
    )
    method = build(config, tmp_path)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    key = jax.random.key(5)
    prepared = method.prepare(batch, key)
    partner = np.asarray(prepared["shared"]["partner"])
    assert (partner == partner[:, :1]).all()
    share = np.asarray(prepared["shared"]["coefficient"], np.float64)[:, None]
    inputs = {n: np.asarray(batch["items"][n][0], np.float64) for n in method.names}
    mixed = {n: share * x + (1 - share) * x[partner[:, 0]] for n, x in inputs.items()}
    _, logits = twin(params, mixed)
    targets = np.eye(2)[batch["shared"]["labels"]]
    targets = share * targets + (1 - share) * targets[partner[:, 0]]
    expected = sum(cross_entropy(x, targets) for x in logits.values())
    assert method.loss(params, batch, key, 0.0)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss.contrastive": "simclr"}, "config.loss.contrastive='simclr' is unknown"),
        ({"mixup.place": "logits"}, "choose one of input, embedding"),
        ({"mixup.labels": True}, "vanilla mixup, which has no contrastive term"),
        ({"data.modalities": "mrna,proteins"}, "has the modalities mrna, methylation, mirna"),
        ({"data.name": "tcga"}, "config.data.name='tcga' is unknown"),
        ({"parallel": "pmap"}, "set config.parallel=jit"),
        ({"seeds": 0}, "config.seeds=0 must be from 1 to 1,000"),
        ({"batch.size": 100}, "does not fit the training split, which has 40"),
        ({"micro_batch": 17, "accumulation": "micro"}, "cannot be accumulated in 3 parts"),
        ({"micro_batch": 20}, "exact accumulation trains one model"),
        ({"accumulation": "half"}, "config.accumulation='half' is unknown"),
        ({"optimizer.schedule": "plateau"}, "look at one model"),
        ({"optimizer.name": "sgd"}, "choose one of adam, adamw"),
        ({"epochs": 0}, "config.steps=0 and config.epochs=0 train nothing"),
        ({"data.folds": 50}, "more than the 40 training samples"),
    ],
)
def test_wrong_options_are_said(tables, tmp_path, options, text):
    config = omics_config(tables)
    config.update_from_flattened_dict(options)
    with pytest.raises(UserError) as error:
        loop.train_and_evaluate(config, tmp_path / "run")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_the_commands_train_and_show_a_table(tables, tmp_path, capsys):
    options = TABLES | {"seeds": 1, "epochs": 2, "validate_epochs": 1}
    overrides = [f"--config.{name}={value}" for name, value in options.items()]
    config = f"--config={CONFIG}:rosmap,path={tables}"
    args = ["train", config, f"--workdir={tmp_path / 'run'}", *overrides]
    assert commands.train(args) == 0
    out = capsys.readouterr().out
    for text in (
        "m3col on rosmap: test, 20 samples",
        "validation selected",
        "replaced by noise",
        "– largest class",
        "– logistic regression, mirna",
        "Gain over the best control, ",
    ):
        assert text in out
    assert commands.evaluate(["eval", f"--workdir={tmp_path / 'run'}", "--split=validation"]) == 0
    assert "m3col on rosmap: validation" in capsys.readouterr().out


def test_a_mistake_of_the_data_is_one_sentence(tables, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tables, broken)
    lines = (broken / "2_tr.csv").read_text().splitlines()
    lines[4] = lines[4].replace(lines[4].split(",")[2], "high", 1)
    (broken / "2_tr.csv").write_text("\n".join(lines))
    args = ["train", f"--config={CONFIG}:rosmap,path={broken}", f"--workdir={tmp_path / 'run'}"]
    assert commands.train(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(text in err for text in ("2_tr.csv", "line 5", "column 3", "high"))

"""The throughput command: its figures agree with each other, its formulas with XLA's count."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from transformers import BertConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, ViTConfig

from benchmarks import throughput, throughput_flops
from benchmarks import throughput_measure as measure
from benchmarks import throughput_models as models
from benchmarks.throughput_work import Plan
from rcml_jax.cli.commands import load_config_file
from rcml_jax.models.m3col import M3CoL
from rcml_jax.models.rcml import RCML
from rcml_jax.models.towers.bert import Bert
from rcml_jax.models.towers.vit import ViT
from rcml_jax.models.two_towers import TwoTowers
from tests.toy import CONFIG, ROOT

M3COL = ROOT / "configs" / "m3col.py"
TINY = {"model.width": 16, "model.layers": 1, "model.heads": 2, "model.image_size": 16}
TINY |= {"model.vocab_size": 100, "batch.size": 8}
TINY_RELATIONAL = {**TINY, "model.embed_dim": 16, "batch.relations": 2}
TINY_RELATIONAL |= {"batch.pairs_per_relation": 2, "batch.intra_pairs": 4}
FAST = ("--steps", "2", "--text-length", "4", "--queries", "40", "--gallery", "30")


def options(config, values):
    return ["--config", str(config), *(f"--config.{k}={v}" for k, v in values.items())]


@functools.cache
def measured(folder, *more, config=f"{CONFIG}:amazon"):
    """The JSON file of a tiny run."""
    tiny = TINY if str(config).startswith(str(M3COL)) else TINY_RELATIONAL
    path = folder / "figures.json"
    assert throughput.main([*options(config, tiny), *FAST, *more, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Of the relational rows on one device, with a peak of 2 GFLOP/s."""
    more = ("--devices", "1", "--only", "rcml,embedding,evaluation", "--sentence-length", "6")
    return measured(tmp_path_factory.mktemp("run"), *more, "--peak-tflops", "0.002")


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Of CLIP's step on two devices and on one."""
    more = ("--devices", "2", "--only", "clip", "--parallel", "fsdp")
    return measured(tmp_path_factory.mktemp("run"), *more)


def test_every_row_that_was_asked_for_is_there(figures, scaled):
    names = [(row["name"], row["mode"], row["devices"]) for row in figures["rows"]]
    assert names == [
        ("RCML step", "jit", 1),
        ("embedding, 1 relation", "", 1),
        ("embedding, 10 relations", "", 1),
        ("evaluation, 21 candidates", "", 1),
    ]
    names = [(row["name"], row["mode"], row["devices"]) for row in scaled["rows"]]
    assert names == [("CLIP step", "fsdp", 1), ("CLIP step", "fsdp", 2)]


def test_rates_follow_from_the_median(figures, scaled):
    assert [row["items"] for row in figures["rows"]] == [8, 64, 64, 40]
    for row in figures["rows"] + scaled["rows"]:
        assert row["items_per_second"] * row["median_s"] == pytest.approx(row["items"])
        assert 0 < row["min_s"] <= row["median_s"] <= row["p90_s"]
        assert row["lower_s"] + row["compile_s"] > 0


def test_utilisation_is_the_share_of_the_peak(figures):
    *counted, evaluation = figures["rows"]
    assert figures["peak_flops_per_device"] == 2e9
    for row in counted:
        assert row["mfu"] == pytest.approx(row["model_flops"] / (row["median_s"] * 2e9))
    assert evaluation["mfu"] is None


def test_planned_memory_stands_in_for_a_peak_on_cpus(figures):
    *planned, evaluation = figures["rows"]
    for row in planned:
        assert row["peak_source"] == "planned"
        assert row["peak_bytes"] == row["planned_bytes"] > 0
    assert evaluation["peak_bytes"] is None


def test_an_item_more_of_relations_costs_the_head_alone(figures):
    one, ten = (row["model_flops"] for row in figures["rows"][1:3])
    tokens, width, items = 4 + 5, 16, 64  # text and image, patches of 8 pixels
    assert ten - one == 9 * (items * (4 * width * tokens + 8 * width**2) + 8 * width**2)


def test_weak_scaling_keeps_the_share_of_each_device(figures, scaled):
    one, two = scaled["scaling"]
    assert (one["devices"], one["items"], one["efficiency"], one["speedup"]) == (1, 4, 1, 1)
    assert (two["devices"], two["items"]) == (2, 8)
    assert two["efficiency"] == pytest.approx(one["median_s"] / two["median_s"])
    assert two["speedup"] == pytest.approx(2 * two["efficiency"])
    assert any("virtual" in note for note in scaled["notes"])
    assert figures["scaling"] == []
    # Where the utilisation is of several devices, so is the peak.
    work = measure.Work("", "jit", (None, None), 1, "items", 30, None)
    assert measure._utilisation(work, 2.0, 5.0)["mfu"] == 30 / 2 / (2 * 5)


def test_the_file_says_what_ran(figures, scaled):
    assert figures["small"]
    machine = scaled["machine"]
    assert machine["jax"] == jax.__version__
    assert (machine["devices"], machine["dtype"], machine["backend"]) == (2, "float32", "cpu")
    assert figures["settings"]["config"]["batch"]["size"] == 8
    # The recipe of the configuration's argument stays where the sizes are small.
    assert figures["settings"]["config"]["optimizer"]["learning_rate"] == 5e-5


def test_the_table_has_a_line_for_each_row(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "measure", lambda work, **_: fake_row(work))
    arguments = [*options(CONFIG, TINY_RELATIONAL), "--devices", "2", "--parallel", "jit,pmap"]
    assert throughput.main([*arguments, "--text-length", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(throughput._COLUMNS) + 1 :]
    end = table.index("")
    # Two modes on one device and two: CLIP, RCML and both losses of M3CoL; then the rest.
    assert [line.split("  ")[0] for line in table[:end]] == [
        *["CLIP step"] * 4,
        *["RCML step"] * 4,
        *(2 * ([*["M3CoL step, M3Co"] * 2, *["M3CoL step, MultiSClip"] * 2])),
        "embedding, 1 relation",
        "embedding, 10 relations",
        "evaluation, 21 candidates",
    ]
    for line in table[:end]:
        assert len(line) == len(throughput._COLUMNS)
        assert line.split()[-7:] == ["50", "20.00", "30.00", "1.50", "3p", "7", "25.0%"]
    assert any(line.startswith("weak scaling") for line in table)


def fake_row(work):
    """A row as `measure` gives it, with easy figures."""
    row = {"name": work.name, "mode": work.mode, "devices": len(work.devices), "items": work.items}
    row |= {"items_per_second": 50, "median_s": 0.02, "p90_s": 0.03, "lower_s": 1.0}
    row |= {"compile_s": 0.5, "peak_bytes": 3 * 2**20, "peak_source": "planned"}
    return row | {"model_flops": 7e9, "mfu": 0.25}


def test_m3col_encodes_images_twice_where_it_mixes_them():
    config = load_config_file(str(M3COL))
    config.update_from_flattened_dict(TINY)
    shared = {"text_length": 4, "sentence_length": None, "embedded": 1, "queries": 1, "gallery": 1}
    plan = Plan(["m3col"], None, config, ["jit"], jax.devices()[:1], [1], **shared)
    m3co, soft = plan.work()
    assert (m3co.name, soft.name) == ("M3CoL step, M3Co", "M3CoL step, MultiSClip")
    extra = 3 * 8 * throughput_flops.image_encoder(ViTConfig(**_small("vision")))
    assert m3co.flops - soft.flops == extra


def test_a_step_of_m3col_runs(tmp_path):
    more = ("--devices", "1", "--config.loss.contrastive=m3co", "--config.batch.size=4")
    (row,) = measured(tmp_path, *more, config=M3COL)["rows"]
    assert row["items"] == 4
    assert row["items_per_second"] > 0


@pytest.mark.slow
def test_steps_in_parts_in_every_mode(tmp_path):
    more = ("--devices", "2", "--no-scaling", "--config.micro_batch=4")
    modes = ("--parallel", "fsdp,jit,pmap", "--only", "rcml")
    found = measured(tmp_path, *more, *modes)
    assert [row["mode"] for row in found["rows"]] == ["jit", "pmap", "fsdp"]
    single = ("--parallel", "pmap", "--config.loss.contrastive=m3co")
    found["rows"] += measured(tmp_path, *more, *single, config=M3COL)["rows"]
    assert [row["name"] for row in found["rows"][3:]] == ["M3CoL step, M3Co"]
    assert all(row["median_s"] > 0 for row in found["rows"])


def test_what_does_not_fit_into_memory_is_a_row_without_times(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(models, "random_params", full)
    found = measured(tmp_path, "--only", "clip", "--devices", "1")
    (row,) = found["rows"]
    assert row["error"] == "out of memory"
    assert "median_s" not in row
    assert "out of memory" in capsys.readouterr().out


# Formulas


def _small(part):
    sizes = {"hidden_size": 16, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    return sizes | ({"image_size": 16, "patch_size": 8} if part == "vision" else {"vocab_size": 99})


def shapes_of(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def xla_count(model, variables, *inputs):
    """FLOPs of a forward pass as XLA counts them, before it optimises; no weight is made."""
    return jax.jit(model.apply).lower(variables, *inputs).cost_analysis()["flops"]


def ids(n, length):
    return jax.ShapeDtypeStruct((n, length), jnp.int32)


def pixels(n, side):
    return jax.ShapeDtypeStruct((n, side, side, 3), jnp.uint8)


def test_clip_by_formula_is_what_xla_counts():
    config = CLIPConfig()  # ViT-B/32
    ours = throughput_flops.relational(config, items=2, text_length=32)
    # By hand, a text: 12 layers of 24 w² a token and 4 T w, of width 512.
    assert ours["text_model"] == 2 * 12 * 32 * (24 * 512**2 + 4 * 32 * 512)
    model, inputs = TwoTowers(config), (ids(2, 32), pixels(2, 224))
    counted = xla_count(model, shapes_of(model, *inputs), *inputs)
    assert sum(ours.values()) == pytest.approx(counted, rel=0.05)


def test_rcml_by_formula_is_what_xla_counts():
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 99, "eos_token_id": 98},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    model, items = RCML(config), (ids(3, 12), pixels(3, 32))
    variables = shapes_of(model, ids(1, 7), *items)
    formula = functools.partial(
        throughput_flops.relational, config, items=3, text_length=12, sentence_length=7
    )
    ours, one = (sum(formula(relations=count).values()) for count in (40, 1))
    counted, fewer = (xla_count(model, variables, ids(n, 7), *items) for n in (40, 1))
    assert ours == pytest.approx(counted, rel=0.1)
    # What relations cost alone, so that the towers of the items cannot hide it.
    assert ours - one == pytest.approx(counted - fewer, rel=0.1)


def test_m3col_by_formula_is_what_xla_counts():
    big = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    vision = ViTConfig(**_small("vision") | big)
    text = BertConfig(**_small("text") | big, max_position_embeddings=16)
    encoders = {"image": ViT(vision), "text": Bert(text)}
    model = M3CoL(encoders, classes=9, hidden=(40,))
    inputs = {"image": (pixels(4, 16),), "text": (ids(4, 16), ids(4, 16))}
    ours = throughput_flops.classifier(
        {"image": vision, "text": text}, items=4, text_length=16, hidden=(40,), classes=9
    )
    counted = xla_count(model, shapes_of(model, inputs), inputs)
    assert sum(ours.values()) == pytest.approx(counted, rel=0.1)
    assert ours["heads"] == 4 * 2 * (40 * (128 + 128 + 256) + 3 * 40 * 9)


def test_a_frozen_tower_has_no_backward_pass():
    assert throughput_flops.training({"a": 10, "b": 1}, frozen={"a"}) == 10 + 3


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA A100-SXM4-40GB", 312, 156),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", None, None),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("TPU v3", 61.5, 61.5),
        ("TPU v4", 275, 275),
        ("TPU v4 lite", None, None),
        ("TPU v5 lite", 197, 197),
        ("TPU v5", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("cpu", None, None),
    ],
)
def test_peaks_by_the_kind_of_the_device(kind, bfloat16, float32):
    for dtype, rate in (("bfloat16", bfloat16), ("float32", float32)):
        assert throughput_flops.peak(kind, dtype) == (rate and pytest.approx(1e12 * rate))


def test_the_peak_of_float32_is_that_of_the_default_precision():
    with jax.default_matmul_precision("highest"):
        assert throughput_flops.peak("TPU v4", "float32") is None
        assert throughput_flops.peak("TPU v4", "bfloat16") == 275e12


# Sizes


def test_sizes_of_known_checkpoints_need_no_download():
    method = models.relational("rcml", load_config_file(f"{CONFIG}:amazon"))
    text, vision = method.towers_config.text_config, method.towers_config.vision_config
    assert (text.hidden_size, text.num_hidden_layers) == (512, 12)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (768, 12, 32)
    assert method.towers_config.projection_dim == 512
    # So the weights are random.
    assert method.config.model.pretrained == ""
    assert models.text_length(method, None) == 32
    news = models.classifier(load_config_file(f"{M3COL}:n24news"))
    encoders = models.encoder_configs(news)
    assert encoders["image"].patch_size == 16
    assert encoders["text"].model_type == "roberta"
    assert news.task.max_length == 512


def test_small_text_and_image_towers_may_differ_from_clips():
    text, vision = CLIPTextConfig(**_small("text")), CLIPVisionConfig(**_small("vision"))
    view = models._view_of(BertConfig(vocab_size=50), vision)
    assert view.text_config.eos_token_id == 49
    assert models._view_of(text, vision).text_config.eos_token_id == text.eos_token_id


def test_a_part_of_a_batch_keeps_the_relations():
    config = load_config_file(f"{CONFIG}:amazon")
    config.micro_batch = 256
    part = models.part_of(config, 2, 8)
    assert (part.batch.size, part.batch.pairs_per_relation, part.batch.intra_pairs) == (256, 16, 16)
    assert (part.micro_batch, part.batch.relations) == (64, config.batch.relations)
    assert config.batch.size == 1024


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "configs/none.py"], "there is no configuration file configs/none.py"),
        ([], "--config"),
        ([*options(CONFIG, {}), "--devices", "9"], "--devices 9: JAX sees 8"),
        ([*options(CONFIG, {}), "--devices", "some"], "give all or a number"),
        ([*options(CONFIG, {}), "--devices", "3"], "64 examples (rcml) cannot be split over 3"),
        ([*options(CONFIG, {"batch.size": 12})], "cannot be split over 8 devices"),
        ([*options(CONFIG, {"batch.sise": 12})], "sise"),
        ([*options(CONFIG, {}), "--parallel", "jit,tpu"], "--parallel: 'tpu' is unknown"),
        ([*options(CONFIG, {}), "--only", "train"], "--only: 'train' is unknown"),
        ([*options(CONFIG, {}), "--steps", "0"], "--steps 0 must be above 0"),
        ([*options(CONFIG, {}), "--stepz", "1"], "unknown option '--stepz'"),
        ([*options(CONFIG, {}), "--only", "clip", "--text-length", "33"], "2 to 32 tokens"),
        ([*options(f"{M3COL}:rosmap", {})], "benchmarks.m3col_seeds"),
        ([*options(M3COL, {}), "--only", "rcml"], "--config is M3CoL's"),
        ([*options(CONFIG, {}), "--m3col", str(CONFIG)], "no configuration of M3CoL"),
        ([*options(ROOT / "configs" / "alignment.py", {})], "cannot be measured"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, capsys):
    assert throughput.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message

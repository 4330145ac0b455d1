"""The configurations: every data set's, and every ablation applies to it."""

import pytest

from rcml_jax.cli.commands import parse_flags
from rcml_jax.cli.sweep import read_variants
from rcml_jax.config import call_config_file, load_config_file
from rcml_jax.errors import UserError
from tests.toy import ROOT

RCML, M3COL = (str(ROOT / "configs" / name) for name in ("rcml.py", "m3col.py"))
SOURCES = ("openmoji", "rosmap", "brca", "n24news", "food101")
PHOTOGRAPHS = [
    f"{RCML}:{source}"
    for source in ("grocery", "amazon,domain=Baby_Products", "hm,path=x", "flickr8k,path=x")
]
CASES = [RCML, f"{RCML}:folder,path=x", *PHOTOGRAPHS, *(f"{M3COL}:{source}" for source in SOURCES)]


@pytest.mark.parametrize("case", CASES)
def test_every_ablation_changes_the_configuration(case):
    whole = load_config_file(case)
    listed = call_config_file(case, "get_ablations")
    assert next(iter(listed.items())) == ("full", "")
    variants = read_variants("", [f"{label}:{options}" for label, options in listed.items()])
    seen = []
    for label, options in variants.items():
        config = parse_flags(options, load_config_file(case)).config.to_dict()
        assert (config == whole.to_dict()) == (label == "full")
        assert config not in seen
        seen.append(config)


@pytest.mark.parametrize("source", SOURCES)
def test_m3col_knows_its_sources(source):
    config = load_config_file(f"{M3COL}:{source},path=copy")
    assert config.method == "m3col"
    assert (config.data.name, config.data.path) == (source, "copy")
    names = {"seed", "steps", "method", "parallel", "data"}
    assert names < set(config)


def test_an_option_of_a_recipe_that_is_given_twice():
    with pytest.raises(UserError, match=r"gives path twice \('a' and 'b'\); leave one"):
        load_config_file(f"{RCML}:folder,path=a,path=b")


def test_the_quick_recipe_of_brca_is_rosmaps():
    quick, whole = (load_config_file(f"{M3COL}:brca{more}") for more in (",quick=True", ""))
    tuned = load_config_file(f"{M3COL}:rosmap")
    assert (quick.epochs, quick.model.width, quick.model.dropout) == (200, 200, 0.5)
    assert (whole.epochs, whole.model.width, whole.model.dropout) == (500, 768, 0.0)
    assert quick.model == tuned.model
    assert quick.optimizer.step_size == tuned.optimizer.step_size == 100


def test_the_papers_rosmap():
    config = load_config_file(f"{M3COL}:rosmap,paper=True")
    assert (config.epochs, config.batch.size, config.model.width) == (500, 0, 1000)
    assert (config.optimizer.learning_rate, config.optimizer.step_size) == (2e-3, 250)
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adam", 1e-4)
    assert (config.mixup.alpha, config.loss.contrastive_weight) == (0.15, 0.1)
    brca = load_config_file(f"{M3COL}:brca")
    assert (brca.model.width, brca.optimizer.learning_rate) == (768, 5e-3)


def test_photographs_from_scratch_or_from_the_papers_checkpoint():
    grocery = load_config_file(f"{RCML}:grocery,path=copy")
    assert (grocery.data.name, grocery.data.path, grocery.model.pretrained) == (
        "grocery",
        "copy",
        "",
    )
    assert grocery.model.image_size % grocery.model.patch_size == 0
    assert grocery.batch.image_flip
    baby = load_config_file(f"{RCML}:amazon,domain=Baby_Products")
    assert (baby.data.domain, baby.model.pretrained) == (
        "Baby_Products",
        "openai/clip-vit-base-patch32",
    )
    # The paper's batch of 512 pairs, under fewer relations than there are kinds of buyers.
    assert baby.batch.relations * baby.batch.pairs_per_relation == 512
    assert baby.batch.relations <= baby.data.clusters
    assert (baby.optimizer.learning_rate, baby.model.max_length) == (5e-5, 77)
    assert not baby.batch.image_flip
    small = load_config_file(f"{RCML}:amazon,domain=Baby_Products,path=x,pretrained=none")
    assert (small.model.pretrained, small.data.path) == ("", "x")
    assert small.batch.relations <= small.data.clusters
    assert small.optimizer.learning_rate == 1e-3
    hm = load_config_file(f"{RCML}:hm,path=x")
    assert (hm.data.name, hm.data.path, hm.model.pretrained) == ("hm", "x", "")
    assert (hm.model.image_size, hm.batch.image_flip) == (grocery.model.image_size, True)
    # The kinds of customers and the nine other relations, so that none dominates the evaluation.
    assert hm.batch.relations <= hm.data.clusters + 9
    assert hm.data.pairs_per_relation == 100
    given = load_config_file(f"{RCML}:grocery,pretrained=my_clip")
    assert (given.model.pretrained, given.optimizer.learning_rate) == ("my_clip", 5e-5)


def test_a_recipe_is_found_by_its_name_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rcml").mkdir()  # a work directory of that name is no recipe
    for name, path in (("rcml", RCML), ("m3col", M3COL)):
        assert load_config_file(name).to_dict() == load_config_file(path).to_dict()
    assert load_config_file("m3col:rosmap,path=x").data.to_dict()["path"] == "x"
    assert "full" in call_config_file("rcml:grocery", "get_ablations")
    with pytest.raises(UserError, match=r"no packaged recipe rcm; .*\(alignment, m3col, rcml\)"):
        load_config_file("rcm")
    with pytest.raises(UserError, match=r"no configuration file configs/rcml\.py; give a packaged"):
        load_config_file("configs/rcml.py")


def test_an_unknown_source_or_option_is_said():
    with pytest.raises(UserError, match="no data source 'mnist'; choose one of openmoji, rosmap"):
        load_config_file(f"{M3COL}:mnist")
    with pytest.raises(UserError, match="no option 'paht=x'"):
        load_config_file(f"{M3COL}:rosmap,paht=x")


@pytest.mark.parametrize("source", ["openmoji", "n24news"])  # no part has a rate, some have
def test_the_rate_of_a_part_may_be_given_that_a_recipe_does_not_name(source):
    config = load_config_file(f"{M3COL}:{source}")
    before = config.optimizer.rates.to_dict()
    given = ("--config.optimizer.rates.heads_image=1e-4", "--config.optimizer.rates.heads", "2")
    rates = parse_flags(given, config).config.optimizer.rates.to_dict()
    assert rates == before | {"heads_image": 1e-4, "heads": 2.0}


def test_the_rate_of_a_part_of_a_studys_run():
    config = load_config_file(str(ROOT / "configs" / "alignment.py"))
    name = next(name for name, run in config.runs.items() if "rates" in run.optimizer)
    before = config.runs[name].optimizer.rates.to_dict()
    option = f"--config.runs.{name}.optimizer.rates.heads_text=2"
    rates = parse_flags([option], config).config.runs[name].optimizer.rates.to_dict()
    assert rates == before | {"heads_text": 2.0}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("rates=1", "config.optimizer.rates is a section, which has no value"),
        ("rates.heads[0]=1", r"config.optimizer.rates has no 'heads'"),
        ("rates.heads=fast", "could not convert"),
        ("rates.=1", "config.optimizer.rates has no ''"),
        ("rates.heads.text=1", "config.optimizer.rates has no 'heads'"),
        ("betas.heads=1", "config.optimizer has no 'betas'"),
    ],
)
def test_a_rate_that_is_mistyped(option, said):
    with pytest.raises(UserError, match=said):
        parse_flags([f"--config.optimizer.{option}"], load_config_file(M3COL))

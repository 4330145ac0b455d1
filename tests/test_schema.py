"""The schema: it is complete, defaults are valid, borders are where it says, errors are clear."""

import json
import math

import pytest
from ml_collections import ConfigDict

from rcml_jax import config as configurations
from rcml_jax import options as tables
from rcml_jax import schema
from rcml_jax.cli import commands, sweep
from rcml_jax.config import fold_seed, leaves, load_config_file
from rcml_jax.data.relation_graph import split_graph
from rcml_jax.errors import UserError
from rcml_jax.methods import METHODS
from rcml_jax.models.towers import transformer
from rcml_jax.options import ARGUMENTS, RECIPES, Option
from rcml_jax.training import gradcache, sharding
from tests.methods.m3col_data import omics_config
from tests.toy import TINY, tiny_config

CASES = [
    "rcml", "rcml:folder,path=x", "rcml:grocery", "rcml:grocery,text=bert-base-uncased",
    "rcml:amazon,domain=Baby_Products", "rcml:hm,path=x", "rcml:my_package.mine:load",
    "m3col", "m3col:rosmap", "m3col:brca", "m3col:n24news,path=x", "m3col:food101,path=x",
    "m3col:hm,path=x", "m3col:hm,path=x,towers=none",
    "alignment", "alignment:npz,path=x", "alignment:runs,path=x",
    "alignment:flickr8k,path=x", "alignment:flickr30k,path=x,towers=x",
    "alignment:coco,path=x,towers=x",
]  # fmt: skip
OPTIONS = [(recipe, option) for recipe in RECIPES for option in RECIPES[recipe]]
NUMBERS = [(r, o) for r, o in OPTIONS if o.type in (int, float)]


def name_of(case) -> str:
    return case.name if isinstance(case, Option) else str(case)


def setting(recipe: str, values: dict) -> ConfigDict:
    """A recipe's configuration with other values, of whatever type."""
    config = load_config_file(recipe)
    with config.unlocked(), config.ignore_type():
        for name, value in values.items():
            *sections, last = name.split(".")
            section = config
            for part in sections:
                section = (
                    section[part] if part in section else section.setdefault(part, ConfigDict())
                )
            section[last] = value
    return config


def refusal(recipe: str, values: dict) -> str:
    """The sentence in which a configuration is refused."""
    with pytest.raises(UserError) as error:
        schema.validate(setting(recipe, values))
    text = str(error.value)
    assert "\n" not in text
    return text


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_option_of_a_recipe_is_in_the_schema_and_its_default_is_valid(case):
    config = load_config_file(case)
    before = config.to_dict()
    assert schema.recipe_of(config) == case.partition(":")[0]
    schema.validate(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_of_the_schema_is_in_a_recipe(recipe):
    found = {
        name
        for case in CASES
        if case.partition(":")[0] == recipe
        for name in leaves(load_config_file(case).to_dict())
    }
    names = [option.name for option in RECIPES[recipe]]
    assert len(set(names)) == len(names)
    for option in RECIPES[recipe]:
        if option.name.endswith("*"):
            assert any(name.startswith(option.name[:-1]) for name in found)
        else:
            assert (option.name in found) == option.required, option.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_the_arguments_of_the_schema_alone(recipe):
    for name in ARGUMENTS[recipe]:
        load_config_file(f"{recipe}:,{name}=x")
    with pytest.raises(UserError, match=f"one of {', '.join(ARGUMENTS[recipe])}$"):
        load_config_file(f"{recipe}:,novelty=x")


@pytest.mark.parametrize(("recipe", "option"), OPTIONS, ids=name_of)
def test_help_is_one_line_of_plain_text(recipe, option):
    assert option.help.endswith(".")
    assert "\n" not in option.help
    assert len(option.help) < 140
    assert option.type in (bool, int, float, str)
    assert (option.choices is None) or option.type is str


@pytest.mark.parametrize(("recipe", "option"), NUMBERS, ids=name_of)
def test_the_borders_of_a_range(recipe, option):
    step = 1 if option.type is int else 1e-6
    assert option.low is not None or option.above is not None
    for border, inside in ((option.low, step), (option.most, -step)):
        if border is not None:
            assert option.error(option.type(border)) is None
            assert option.error(option.type(border + inside)) is None
            # Of large numbers the step is lost.
            outside = (
                border - inside if option.type is int else border - inside * max(1, abs(border))
            )
            text = option.error(option.type(outside))
            # Integers without a largest value are said to be at least something.
            assert text.startswith("must be ")
            assert option.allowed() in text or border == 2**31 - 1
    for border, inside in ((option.above, step), (option.below, -step)):
        if border is not None:
            assert option.type is float
            assert option.error(border + inside) is None
            assert option.allowed() in option.error(float(border))


@pytest.mark.parametrize(("recipe", "option"), OPTIONS, ids=name_of)
def test_values_of_another_type(recipe, option):
    wrong = {bool: 1, int: 2.0, float: True, str: 1}[option.type]
    for value in (wrong, None, [1], (1,)):
        assert option.error(value).startswith("must be ")
    if option.type in (int, float):
        assert option.error(False).startswith("must be ")
    if option.type is float:
        for value in (math.nan, math.inf, -math.inf, 10**400):
            assert "must be" in option.error(value)


@pytest.mark.parametrize(("recipe", "option"), OPTIONS, ids=name_of)
def test_choices(recipe, option):
    if not option.known:
        return
    for value in option.known:
        assert option.error(value) is None
    assert option.error("no such choice") is not None
    assert (option.error("my_package.mine:NAME") is None) == option.path


def test_choices_that_stand_elsewhere():
    """Modules above the schema, and names that a module keeps to itself."""
    known = {o.name: o.known for recipe in ("rcml", "m3col") for o in RECIPES[recipe]}
    assert known["parallel"] == tuple(sharding.PARALLEL)
    assert known["accumulation"] == tuple(gradcache.ACCUMULATIONS)
    assert known["model.remat"] == ("", *transformer._POLICIES)
    for name in known["data.disjoint"]:
        with pytest.raises(UserError, match="fractions"):  # not of the name
            split_graph(None, seed=0, disjoint=name, fractions=(1.0,))
    methods = {o.name: o.known for o in RECIPES["rcml"]}["method"] + known["method"]
    assert sorted(methods) == sorted(METHODS)


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "name", "value", "text"),
    [
        ("rcml", "loss.temperature", -0.1, "loss.temperature=-0.1 must be from 0.0001 to 100"),
        ("rcml", "loss.temperature", 0, "loss.temperature=0.0 must be from"),
        ("m3col", "loss.soft_temperature", 1e-45, "must be from 0.0001 to 100"),
        ("rcml", "model.beta", 2, "model.beta=2.0 must be from 0 to 1"),
        ("rcml", "model.layers", 0, "model.layers=0 must be from 1 to 1,000"),
        ("rcml", "model.head_init", "x", "head_init='x' is unknown; choose one of identity, plain"),
        ("rcml", "batch.image_shift", -1, "batch.image_shift=-1 must be from 0 to 256"),
        ("rcml", "model.embed_dim", 0, "model.embed_dim=0 must be from 1"),
        ("rcml", "data.queries", 0, "data.queries=0 must be at least 20"),
        ("m3col", "seed", -1, "config.seed=-1 must be from 0 to 9,223,372,036,854,775,807"),
        ("rcml", "seed", 2**63, "config.seed=9223372036854775808 must be from 0 to"),
        ("rcml", "steps", 2**31, "config.steps=2147483648 must be from 1 to 2,147,483,647"),
        ("rcml", "steps", 0, "config.steps=0 must be at least 1"),
        ("rcml", "steps", 5.0, "config.steps=5.0 must be an integer"),
        ("rcml", "batch.image_flip", 1, "config.batch.image_flip=1 must be True or False"),
        ("rcml", "optimizer.learning_rate", math.nan, "learning_rate=nan must be a finite number"),
        ("rcml", "optimizer.learning_rate", math.inf, "learning_rate=inf must be a finite number"),
        ("rcml", "optimizer.learning_rate", 0.0, "learning_rate=0.0 must be above 0 and at most"),
        ("rcml", "optimizer.b1", 1.0, "b1=1.0 must be at least 0 and below 1"),
        ("rcml", "method", "clipp", "choose one of rcml, clip, siglip, unicl, declip, embeddings"),
        ("rcml", "data.name", "imagenet", "choose one of openmoji, folder, grocery, amazon, hm"),
        ("rcml", "selection", "hit@7/avg", "write MEASURE/SCORE with one of hit@5, macro/hit@5"),
        ("rcml", "model.text_tower", "vit", "must be an import path, package.module:NAME, or"),
        ("rcml", "model.betta", 1.0, "betta is unknown (do you mean config.model.beta?)"),
        ("rcml", "optimizer", 3, "config.optimizer is unknown"),
        ("rcml", "mine", 3, "options of your own belong under config.method_options or"),
        ("rcml", "data.clusters", 3, "is for the source amazon or hm, not for openmoji; leave it"),
        ("m3col", "optimizer.rates.heads", -1.0, "rates.heads=-1.0 must be from 0 to 100"),
        ("m3col", "optimizer.schedule", "linear", "choose one of cosine, step, plateau, constant"),
        ("alignment", "evaluation.learned", "pro", "choose all, or any of mlp_mse"),
        ("alignment", "evaluation.similarity", "", "choose all, or any of cosine"),
        ("alignment", "runs.rcml.model.beta", 2.0, "config.runs.rcml.model.beta=2.0 must be from"),
        ("alignment", "runs.clip.novelty", 2.0, "config.runs.clip.novelty is unknown"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_said_in_one_sentence(recipe, name, value, text):
    assert text in refusal(recipe, {name: value})


RULES = [
    ("rcml", {"model.width": 10}, "model.width=10 is not a multiple of model.heads=4"),
    ("rcml", {"model.image_size": 30}, "model.image_size=30 is not a multiple of model.patch_size"),
    ("m3col", {"model.width": 10}, "model.width=10 is not a multiple of model.heads=4"),
    ("m3col", {"model.image_size": 30}, "is not a multiple of model.patch_size=8"),
    ("m3col", {"data.towers": "a+b"}, "set batch.image_shift=0"),
    ("m3col:hm,path=x", {"batch.image_flip": True}, "embeds each image and text once"),
    ("m3col", {"data.patch_size": 5}, "a multiple of data.patch_size=5, the patches to hide"),
    ("rcml", {"batch.image_shift": 32}, "leaves nothing of an image of model.image_size=32"),
    ("rcml", {"batch.texts_per_row": 3}, "texts_per_row=3 must divide config.batch.size=256"),
    ("rcml", {"batch.texts_per_row": 4, "micro_batch": 3}, "micro_batch=3 is less than a row of 4"),
    ("rcml", {"batch.relations": 0, "batch.intra_pairs": 0}, "a batch without pairs"),
    ("rcml", {"batch.relations": 20}, "need room for 640 items; raise config.batch.size (256)"),
    ("rcml", {"batch.intra_pairs": 257}, "intra_pairs=257 exceeds config.batch.size=256"),
    ("rcml", {"loss.function": "clip"}, "loss.function is for the baselines, but rcml has a loss"),
    ("rcml", {"loss.mask_related": True}, "is for clip, siglip and unicl, not for rcml"),
    ("rcml", {"method": "declip", "loss.mask_related": True}, "not for declip"),
    ("rcml", {"method": "declip", "loss.declip.multi_view": 0.7}, "must sum to 1 at most"),
    (
        "rcml",
        {"model.text_tower": "a:B", "model.text_pretrained": "x"},
        "config.model.text_tower and config.model.text_pretrained both name the text tower",
    ),
    (
        "rcml",
        {"model.image_tower": "a:B", "model.image_pretrained": "x"},
        "both name the image tower",
    ),
    ("rcml", {"method": "declip", "model.text_tower": "a:B"}, "leave config.model.text_tower"),
    ("rcml:grocery,image=x", {"batch.image_shift": 1}, "cannot be moved or mirrored"),
    ("rcml:grocery,text=x", {"batch.texts_per_row": 2}, "one text a row"),
    ("rcml:grocery,text=x", {"model.init_from": "y"}, "brings towers of its own"),
    ("rcml", {"model.towers": "hf", "model.remat": "dots"}, "no rematerialisation"),
    ("rcml", {"model.towers": "hf", "batch.texts_per_row": 2}, "takes one text a row"),
    ("rcml", {"data.domain_split": "a*", "data.disjoint": "pair"}, "config.data.disjoint=item"),
    ("rcml", {"optimizer.warmup_steps": 500}, "warmup_steps=500 leaves no step of config.steps"),
    ("m3col", {"steps": 20}, "warmup_steps=20 leaves no step of config.steps=20"),
    ("m3col", {"epochs": 0}, "config.steps=0 and config.epochs=0 train nothing"),
    ("m3col", {"validate_epochs": 0}, "config.validate_every=0 and config.validate_epochs=0 never"),
    ("m3col", {"mixup.labels": True}, "set config.loss.contrastive=none"),
    ("m3col", {"accumulation": "micro", "micro_batch": 50}, "a multiple of config.micro_batch=50"),
    ("rcml", {"fsdp_devices": 2}, "splits the state of config.parallel=fsdp, not of jit"),
    ("m3col", {"seeds": 2, "parallel": "pmap"}, "set config.parallel=jit"),
    ("m3col", {"seeds": 2, "optimizer.schedule": "plateau"}, "look at one model"),
    ("m3col", {"seeds": 2, "optimizer.clip_norm": 1.0}, "look at one model"),
    ("m3col", {"seeds": 2, "micro_batch": 64}, "exact accumulation trains one model"),
    ("alignment", {"data.name": "npz", "towers.names": "x"}, "takes no towers"),
    ("alignment", {"data.name": "runs"}, "needs a path: --config alignment:runs,path=DIRECTORY"),
    ("alignment", {"data.name": "coco"}, "the source coco needs towers"),
    ("alignment", {"runs.rcml.model.width": 10}, "config.runs.rcml.model.width=10 is not a"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "values", "text"), RULES)
def test_what_options_have_to_be_together(recipe, values, text):
    assert text in refusal(recipe, values)


@pytest.mark.parametrize("value", [3, "x", None])
def test_a_section_that_a_run_fills_is_no_value(value):
    text = refusal("rcml", {"model.preprocessing": value})
    assert text.startswith("config.model.preprocessing must be a section")


def test_every_rule_is_of_a_recipe_and_is_tested():
    for rule in schema.RULES:
        recipes = [r for r in RECIPES if set(rule.names) <= {o.name for o in RECIPES[r]}]
        assert recipes, rule.names
    broken = set()
    for recipe, values, _ in RULES:
        config = setting(recipe, values)
        for _, part in schema._parts(config):
            found = leaves(part.to_dict())
            for number, rule in enumerate(schema.RULES):
                known = all(name in found for name in rule.names)
                if known and rule.error(*(found[name] for name in rule.names)):
                    broken.add(number)
    assert broken == set(range(len(schema.RULES)))


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("rcml", {"model.pretrained": "x", "model.width": 10, "model.image_size": 30}),
        ("m3col:rosmap", {"model.width": 10}),  # tables have no heads
        ("rcml", {"batch.inter_pairs": False, "batch.intra_pairs": 0}),
        ("rcml", {"method": "clip", "loss.function": "siglip", "loss.mask_related": True}),
        ("rcml", {"loss.declip.multi_view": 0.7}),  # of another method
        ("rcml", {"loss.temperature": 1}),  # a number without a point
        ("m3col", {"optimizer.schedule": "plateau", "optimizer.clip_norm": 1.0}),
        ("m3col", {"optimizer.rates.heads": 0.0}),
        ("rcml", {"method": "my_package.mine:Method", "method_options": ConfigDict({"a": None})}),
        ("rcml:my_package.mine:load", {"data.options": ConfigDict({"a": [1]}), "data.clusters": 3}),
    ],
)
def test_what_is_allowed(recipe, values):
    schema.validate(setting(recipe, values))


@pytest.mark.parametrize("value", [-1, 0, 10**9, math.nan])
@pytest.mark.parametrize(("recipe", "option"), NUMBERS, ids=name_of)
def test_any_number_is_taken_or_refused_in_a_sentence(recipe, option, value):
    if option.sources or option.name.endswith("*"):
        error = option.error(value)
        assert error is None or error.startswith("must be")
        return
    value = float(value) if option.type is float else value
    config = setting(recipe, {option.name: value})
    if option.error(value) is None:
        assert leaves(config.to_dict())[option.name] == value
        return
    with pytest.raises(UserError, match=rf"^config\.{option.name}=.* must be "):
        schema.validate(config)


def test_options_of_a_method_of_ones_own():
    """It needs what the loop reads, and no more; what it shares with ours is checked."""
    config = ConfigDict({"method": "my_package.mine:Method", "method_options": {"depth": "deep"}})
    values = leaves(load_config_file("rcml").to_dict())
    for option in tables.LOOP:
        schema._set(config, option.name, values[option.name])
    schema.validate(config)
    config.method_options = ConfigDict({"depth": math.nan})
    with pytest.raises(UserError, match=r"method_options\.depth=nan must be a finite number"):
        schema.validate(config)
    config.method_options = ConfigDict({"depth": "deep"})
    del config["log_every"]
    with pytest.raises(UserError, match=r"lacks config\.log_every; give it a value"):
        schema.validate(config)


def test_an_option_newer_than_the_configuration():
    config = load_config_file("alignment")
    del config.runs.rcml.batch["sentence_noise"], config.runs.clip.loss["function"]
    assert schema.complete(config) == []
    assert config.to_dict() == load_config_file("alignment").to_dict()
    del config.runs.rcml.model["beta"], config["seed"]
    assert schema.complete(config) == ["seed", "runs.rcml.model.beta"]
    del config.runs["rcml"].model
    assert "runs.rcml.model.text_tower" not in schema.complete(config)
    assert config.runs.rcml.model.text_tower == ""


def test_a_configuration_is_checked_before_anything_is_made(catalogue, tmp_path, capsys):
    from rcml_jax.methods import alignment
    from rcml_jax.training import loop

    workdir = tmp_path / "run"
    config = tiny_config(catalogue, **{"model.layers": 0, "data.dir": str(tmp_path / "cache")})
    study = load_config_file("alignment")
    study.evaluation.memory_mb = 0
    for call in (
        lambda: loop.train_and_evaluate(config, workdir),
        lambda: loop.evaluate_untrained(config, workdir),
        lambda: loop.evaluate(config, workdir),
        lambda: alignment.study(study, workdir),
    ):
        with pytest.raises(UserError, match="must be from 1 to"):
            call()
    options = [f"--config.{name}={value}" for name, value in TINY.items()]
    args = ["--config", f"rcml:folder,path={catalogue}", "--workdir", str(workdir), *options]
    # The second variant is wrong; the first one is not started.
    assert sweep.main(["rcml-sweep", *args, "--vary", "model.beta=0.5,2"]) == 2
    assert capsys.readouterr().err == "error: config.model.beta=2.0 must be from 0 to 1\n"
    assert list(tmp_path.iterdir()) == []


# --- Seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_seed_of_32_bits_is_its_own_key(seed):
    assert fold_seed(seed) == seed


def test_a_longer_seed_is_folded_for_every_method(tmp_path):
    long = 1758000000123456789
    assert 0 <= fold_seed(long) < 2**32
    assert fold_seed(long) != fold_seed(long + 2**32)
    import jax.numpy as jnp

    from rcml_jax.methods import build
    from tests.methods.m3col_data import write_tables

    config = omics_config(write_tables(tmp_path / "tables"), seed=long)
    schema.validate(config)
    ensemble = build(config, tmp_path)
    expected = [fold_seed(long), fold_seed(long + 1)] * 2
    assert ensemble._seeds.tolist() == expected
    assert ensemble._seeds.dtype == jnp.uint32


# --- Help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "args", "default"),
    [
        (commands.train, [], "--config.model.image_size=32"),
        (commands.train, ["--config=rcml:hm,path=x"], "--config.model.image_size=48"),
        (commands.train, ["--config", "m3col:rosmap"], "--config.model.dropout=0.5"),
        (commands.evaluate, [], "--config.evaluation.similarity=cosine"),
        (commands.evaluate, ["--config=alignment"], "--config.evaluation.memory_mb=512"),
        (sweep.main, ["--config=rcml:grocery"], "--config.steps=600"),
    ],
)
def test_help_shows_the_options_of_the_recipe(capsys, command, args, default):
    assert command(["program", *args, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"  {default}\n" in out
    assert max(map(len, out[out.index("Options of --config") :].splitlines())) <= 80
    if command is commands.evaluate and not args:
        assert "--config.model.beta" not in out


def test_help_of_a_recipe_that_is_not_there(capsys):
    assert commands.train(["rcml-train", "--help", "--config=nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no packaged recipe nothing")


@pytest.mark.parametrize("case", ["rcml:hm,path=x", "m3col", "alignment"])
def test_the_table_of_the_reference_page(case):
    header, rule, *rows = schema.option_table(case).splitlines()
    assert header == "| Option | Type | Default | Allowed | Meaning |"
    assert rule.count("|") == header.count("|")
    values = leaves(load_config_file(case).to_dict())
    seen = {}
    for row in rows:
        name, kind, default, _, meaning = (cell.strip() for cell in row[1:-1].split(" | "))
        seen[name.strip("`")] = default.strip("`")
        assert kind in ("bool", "int", "float", "str")
        assert meaning.endswith(".")
    known = {name for name in values if not name.startswith(("runs.", "optimizer.rates."))}
    assert known <= set(seen)
    for name in known:
        assert json.loads(seen[name]) == values[name]


def test_packaged_recipes_are_found():
    assert {path.stem for path in configurations.RECIPES.glob("*.py")} == set(RECIPES)

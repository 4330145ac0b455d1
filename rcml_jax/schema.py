"""Checking a configuration against the table of options, and showing that table.

`validate` checks a whole configuration before anything is prepared: names, types, ranges, and the
rules for several options together. `help_text` and `option_table` print the options of a recipe.

Options of your own belong into two open namespaces, whose names and values are not checked:
`config.method_options` for a method, loss or tower of another package, and `config.data.options`
for a data source of another package. Any other unknown name is refused.
"""

import dataclasses
import difflib
import json
import math
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rcml_jax.config import leaves, load_config_file, several_models, stored_modalities
from rcml_jax.data.sources import SOURCES
from rcml_jax.errors import UserError
from rcml_jax.options import ARGUMENTS, KINDS, LOOP, MISSING, RECIPES, Option
from rcml_jax.registry import is_path

#: Names under these prefixes are the user's own.
OPEN = ("method_options", "data.options")
#: Names under these prefixes are written by a run itself, of what its checkpoints' files say.
_WRITTEN = ("model.preprocessing",)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What several options have to be together.

    names: the options; a configuration that lacks one of them is not held to the rule.
    error: their values in the same order → one sentence with the remedy, or None.
    """

    names: tuple[str, ...]
    error: Callable[..., str | None]


def _heads(width: int, heads: int, *unused: str) -> str | None:
    if width % heads and not any(unused):
        return f"config.model.width={width} is not a multiple of model.heads={heads}; change one"
    return None


def _patches(size: int, patch: int, *unused: str) -> str | None:
    if size % patch and not any(unused):
        return (
            f"config.model.image_size={size} is not a multiple of model.patch_size={patch}; "
            "change one"
        )
    return None


#: Classification data whose encoders are transformers; those of tables have no heads and patches.
_WITH_TRANSFORMERS = ("openmoji", "n24news", "food101", "hm")


def _small_encoders(
    source: str, width: int, heads: int, size: int, patch: int, image: str, text: str
) -> str | None:
    if source not in _WITH_TRANSFORMERS:
        return None
    return _heads(width, heads, image and text) or _patches(size, patch, image)


def _frozen_embeddings(towers: str, *inputs: Any) -> str | None:
    if towers and any(inputs):
        return (
            "config.data.towers embeds each image and text once; set batch.image_shift=0 and "
            "batch.image_flip=False, and leave model.image_pretrained and text_pretrained empty"
        )
    return None


def _grey_patches(share: float, size: int, patch: int, pretrained: str) -> str | None:
    if share and size % patch and not pretrained:
        return (
            f"config.model.image_size={size} is not a multiple of data.patch_size={patch}, the "
            "patches to hide; change one"
        )
    return None


def _shift(shift: int, size: int, *checkpoints: str) -> str | None:
    if shift >= size and not any(checkpoints):
        return (
            f"config.batch.image_shift={shift} leaves nothing of an image of "
            f"model.image_size={size} pixels; lower it"
        )
    return None


def _rows(texts_per_row: int, size: int, micro_batch: int) -> str | None:
    if size % texts_per_row:
        return (
            f"config.batch.texts_per_row={texts_per_row} must divide config.batch.size={size}; 1 "
            "gives each text a row of its own"
        )
    if 0 < micro_batch < texts_per_row:
        return (
            f"config.micro_batch={micro_batch} is less than a row of {texts_per_row} examples; "
            "raise it or lower config.batch.texts_per_row"
        )
    return None


def _pairs(
    relations: int, pairs: int, intra_pairs: int, size: int, inter_pairs: bool
) -> str | None:
    if not inter_pairs:
        return None
    if relations * pairs + intra_pairs == 0:
        return "a batch without pairs: raise config.batch.pairs_per_relation or intra_pairs"
    if size < 2 * relations * pairs:
        return (
            f"{relations} relations of {pairs} pairs need room for {2 * relations * pairs} items; "
            f"raise config.batch.size ({size}) or lower config.batch.relations or "
            "pairs_per_relation"
        )
    if intra_pairs > size:
        return f"config.batch.intra_pairs={intra_pairs} exceeds config.batch.size={size}; lower it"
    return None


def _loss_of_a_baseline(method: str, function: str) -> str | None:
    if function and method in ("rcml", "declip"):
        return (
            f"config.loss.function is for the baselines, but {method} has a loss of its own; leave "
            "it empty, or set config.method=clip"
        )
    return None


def _mask(method: str, mask_related: bool) -> str | None:
    if mask_related and method in ("rcml", "declip"):
        return (
            f"config.loss.mask_related is for clip, siglip and unicl, not for {method}; set it to "
            "False"
        )
    return None


def _mixture(method: str, *weights: float) -> str | None:
    if method == "declip" and sum(weights) > 1 + 1e-9:
        return (
            "the weights of config.loss.declip, self_supervision, multi_view, nearest_neighbor, "
            "must sum to 1 at most, for what is left is CLIP's"
        )
    return None


def _one_tower(modality: str) -> Rule:
    names = f"model.{modality}_tower", f"model.{modality}_pretrained"

    def error(*values: str) -> str | None:
        if all(values):
            both = " and ".join(f"config.{name}" for name in names)
            return f"{both} both name the {modality} tower; leave one of them empty"
        return None

    return Rule(names, error)


def _own_text_tower(method: str, tower: str) -> str | None:
    if tower and method == "declip":
        return (
            "DeCLIP predicts masked tokens by the token embeddings of CLIP, SigLIP, BERT or "
            "RoBERTa; leave config.model.text_tower empty"
        )
    return None


_STORED = (
    "freeze",
    "store_frozen",
    "pretrained",
    "text_pretrained",
    "image_pretrained",
    "text_tower",
    "image_tower",
)


def _stored(shift: int, flip: bool, texts_per_row: int, init_from: str, *model: Any) -> str | None:
    modalities = stored_modalities(types.SimpleNamespace(**dict(zip(_STORED, model, strict=True))))
    if "image" in modalities and (shift or flip):
        return (
            "the images of a stored tower cannot be moved or mirrored; set "
            "config.batch.image_shift=0 and image_flip=False, or config.model.store_frozen=False"
        )
    if "text" in modalities and texts_per_row > 1:
        return (
            "the states of a stored text tower have one text a row; set "
            "config.batch.texts_per_row=1, or config.model.store_frozen=False"
        )
    if modalities and init_from:
        return (
            "config.model.init_from brings towers of its own, whose states are not stored; set "
            "config.model.store_frozen=False"
        )
    return None


def _hugging_face(towers: str, remat: str, texts_per_row: int) -> str | None:
    if towers == "hf" and remat:
        return "config.model.towers=hf has no rematerialisation; leave config.model.remat empty"
    if towers == "hf" and texts_per_row > 1:
        return "config.model.towers=hf takes one text a row; set config.batch.texts_per_row to 1"
    return None


def _domain(domain: str, disjoint: str) -> str | None:
    if domain and disjoint != "item":
        return "config.data.domain_split needs config.data.disjoint=item; leave one of them out"
    return None


def _warmup(warmup: int, steps: int, schedule: str = "cosine") -> str | None:
    if steps and schedule == "cosine" and warmup >= steps:
        return (
            f"config.optimizer.warmup_steps={warmup} leaves no step of config.steps={steps} for "
            "the decay; lower it"
        )
    return None


def _length_of_a_run(steps: int, epochs: int, every: int, validate_epochs: int) -> str | None:
    if not steps and not epochs:
        return "config.steps=0 and config.epochs=0 train nothing; raise one of them"
    if not every and not validate_epochs:
        return (
            "config.validate_every=0 and config.validate_epochs=0 never validate; raise one of them"
        )
    return None


def _vanilla_mixup(labels: bool, contrastive: str) -> str | None:
    if labels and contrastive != "none":
        return (
            "config.mixup.labels=True is vanilla mixup, which has no contrastive term; set "
            "config.loss.contrastive=none"
        )
    return None


def _parts_of_a_batch(accumulation: str, micro_batch: int, size: int) -> str | None:
    if accumulation == "micro" and micro_batch and size % -(-size // micro_batch or 1):
        return (
            f"a batch of config.batch.size={size} examples cannot be accumulated in parts of one "
            f"size; make it a multiple of config.micro_batch={micro_batch}, or set "
            "config.accumulation=exact"
        )
    return None


def _state_devices(parallel: str, count: int) -> str | None:
    if count and parallel != "fsdp":
        return (
            f"config.fsdp_devices={count} splits the state of config.parallel=fsdp, not of "
            f"{parallel}; set it to 0"
        )
    return None


def _seeds(seeds: int, *options: Any) -> str | None:
    return several_models(*options) if seeds > 1 else None


def _study_source(source: str, path: str, towers: str) -> str | None:
    towers = towers.strip(",")
    if source in ("npz", "runs"):
        if towers:
            return f"the source {source} takes no towers; leave config.towers.names empty"
        if not path.strip(","):
            wanted = "FILE.npz" if source == "npz" else "DIRECTORY"
            return f"the source {source} needs a path: --config alignment:{source},path={wanted}"
    elif source != "openmoji" and not towers:
        return (
            f"the source {source} needs towers: --config.towers.names=CLIP, or IMAGE+TEXT for two "
            "that were trained apart; directories or names on the Hugging Face hub"
        )
    return None


_CHECKPOINTS = ("model.pretrained", "model.text_pretrained", "model.image_pretrained")
_SEVERAL = (
    "parallel", "optimizer.schedule", "optimizer.clip_norm", "accumulation", "micro_batch",
)  # fmt: skip
#: What options have to be together. A rule with an option of one recipe alone is that recipe's.
RULES = (
    Rule(("model.width", "model.heads", "model.pretrained"), _heads),
    Rule(("model.image_size", "model.patch_size", "model.pretrained"), _patches),
    Rule(
        (
            "data.name", "model.width", "model.heads", "model.image_size", "model.patch_size",
            "model.image_pretrained", "model.text_pretrained", "data.towers",
        ),
        lambda *values: None if values[-1] else _small_encoders(*values[:-1]),
    ),
    Rule(
        (
            "data.towers", "batch.image_shift", "batch.image_flip", "model.image_pretrained",
            "model.text_pretrained",
        ),
        _frozen_embeddings,
    ),
    Rule(
        ("data.patches_hidden", "model.image_size", "data.patch_size", "model.image_pretrained"),
        _grey_patches,
    ),
    Rule(("batch.image_shift", "model.image_size", *_CHECKPOINTS), _shift),
    Rule(("batch.texts_per_row", "batch.size", "micro_batch"), _rows),
    Rule(
        (
            "batch.relations", "batch.pairs_per_relation", "batch.intra_pairs", "batch.size",
            "batch.inter_pairs",
        ),
        _pairs,
    ),
    Rule(("method", "loss.function"), _loss_of_a_baseline),
    Rule(("method", "loss.mask_related"), _mask),
    Rule(
        (
            "method", "loss.declip.self_supervision", "loss.declip.multi_view",
            "loss.declip.nearest_neighbor",
        ),
        _mixture,
    ),
    _one_tower("text"),
    _one_tower("image"),
    Rule(("method", "model.text_tower"), _own_text_tower),
    Rule(
        (
            "batch.image_shift", "batch.image_flip", "batch.texts_per_row", "model.init_from",
            *(f"model.{name}" for name in _STORED),
        ),
        _stored,
    ),
    Rule(("model.towers", "model.remat", "batch.texts_per_row"), _hugging_face),
    Rule(("data.domain_split", "data.disjoint"), _domain),
    Rule(("optimizer.warmup_steps", "steps", "selection"), lambda *x: _warmup(*x[:2])),
    Rule(("optimizer.warmup_steps", "steps", "optimizer.schedule"), _warmup),
    Rule(("steps", "epochs", "validate_every", "validate_epochs"), _length_of_a_run),
    Rule(("mixup.labels", "loss.contrastive"), _vanilla_mixup),
    Rule(("accumulation", "micro_batch", "batch.size"), _parts_of_a_batch),
    Rule(("parallel", "fsdp_devices"), _state_devices),
    Rule(("seeds", *_SEVERAL), _seeds),
    Rule(("data.name", "data.path", "towers.names"), _study_source),
)  # fmt: skip


# Checking a configuration


def recipe_of(config: ConfigDict) -> str:
    """Which of `RECIPES` a configuration is of: the one whose options it has most of."""
    names = leaves(config.to_dict())
    return max(RECIPES, key=lambda recipe: sum(o.name in names for o in RECIPES[recipe]))


def validate(config: ConfigDict) -> None:
    """Check every option of a configuration, those of the runs of a study included.

    An option that is missing gets, in place, the value that it had before it existed.

    Raises UserError with one sentence for the first unknown option, missing option, value that is
    not allowed, or rule that is broken.
    """
    for prefix, part in _parts(config):
        options = RECIPES[recipe_of(part)]
        values = _values(part)
        for name in values:
            _check_name(name, values, options, prefix)
        missing = _fill(part)
        if missing:
            raise UserError(
                f"the configuration lacks config.{prefix}{missing[0]}; give it a value in the "
                "recipe, as the packaged recipes do"
            )
        values = _values(part)
        for name, value in values.items():
            option = _find(name, options)
            error = option.error(value) if option else None
            if isinstance(value, float) and not math.isfinite(value):  # config.json cannot hold it
                error = "must be a finite number"
            if error:
                raise UserError(f"config.{prefix}{name}={value!r} {error}")
        for rule in RULES:
            if all(name in values for name in rule.names):
                error = rule.error(*(values[name] for name in rule.names))
                if error:
                    raise UserError(error.replace("config.", f"config.{prefix}"))


def complete(config: ConfigDict) -> list[str]:
    """Give a configuration, in place, the values that it had in place of newer options.

    Returns the other options that it lacks.
    """
    return [prefix + name for prefix, part in _parts(config) for name in _fill(part)]


def _parts(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """The configuration itself, and the runs of a study with the prefixes of their names."""
    yield "", config
    runs = config.get("runs", None)
    if isinstance(runs, ConfigDict):
        for name, run in runs.items():
            if isinstance(run, ConfigDict):
                yield f"runs.{name}.", run


def _values(part: ConfigDict) -> dict[str, Any]:
    """Dotted names → values, but for those of runs, which are parts of their own."""
    runs = {prefix for prefix, _ in _parts(part)} - {""}
    found = leaves(part.to_dict())
    return {n: v for n, v in found.items() if not n.startswith(tuple(runs) or "/")}


def _find(name: str, options: Sequence[Option]) -> Option | None:
    """The option of a name, also where the schema leaves its last part open."""
    names = name, f"{name.rpartition('.')[0]}.*"
    return next((option for option in options if option.name in names), None)


def open_type(section: str) -> type | None:
    """The type of the options of a section whose last part is open; None where none is.

    section: dotted, without "config."; also of a run of a study, below "runs.NAME.".
    """
    if section.startswith("runs."):
        section = section.split(".", 2)[-1]
    options = (option for recipe in RECIPES.values() for option in recipe)
    return next((option.type for option in options if option.name == f"{section}.*"), None)


def _check_name(
    name: str, values: Mapping[str, Any], options: Sequence[Option], prefix: str
) -> None:
    """Raise UserError for a name that no option has."""
    if name in _WRITTEN:  # as a section it has names of its own, and none where it is empty
        raise UserError(
            f"config.{prefix}{name} must be a section, which a run fills itself; leave it out"
        )
    if any(name == own or name.startswith(f"{own}.") for own in (*OPEN, *_WRITTEN)):
        return
    option, source = _find(name, options), values.get("data.name", "")
    if option is None:
        near = difflib.get_close_matches(name, [o.name for o in options], 1)
        hint = f" (do you mean config.{prefix}{near[0]}?)" if near else ""
        raise UserError(
            f"config.{prefix}{name} is unknown{hint}; options of your own belong under "
            f"{' or '.join(f'config.{own}' for own in OPEN)}"
        )
    if option.sources and source in SOURCES and source not in option.sources:
        raise UserError(
            f"config.{prefix}{name} is for the source {' or '.join(option.sources)}, not for "
            f"{source}; leave it out"
        )


def _fill(part: ConfigDict) -> list[str]:
    """`complete` for one part."""
    values, missing = leaves(part.to_dict()), []
    for option in _required(values, recipe_of(part)):
        if option.name in values:
            continue
        if option.before is MISSING or not _set(part, option.name, option.before):
            missing.append(option.name)
    return missing


def _required(values: Mapping[str, Any], recipe: str) -> list[Option]:
    """The options that a configuration has to have."""
    method, source = (str(values.get(name, "")) for name in ("method", "data.name"))
    options = LOOP if is_path(method) else RECIPES[recipe]
    return [o for o in options if o.required and (not o.sources or source in o.sources)]


def _set(config: ConfigDict, name: str, value: Any) -> bool:
    """Set an option by its dotted name; False where its section is no section."""
    *sections, last = name.split(".")
    with config.unlocked():
        for section in sections:
            if section not in config:
                config[section] = ConfigDict()
            config = config[section]
            if not isinstance(config, ConfigDict):
                return False
        config[last] = value
    return True


# Showing the options


_SECTIONS = ("data", "batch", "model", "mixup", "loss", "optimizer", "towers", "evaluation")


def help_text(recipe: str, only: Callable[[str], bool] = lambda name: True) -> str:
    """The options of a recipe, "rcml" or "rcml:hm,path=DIRECTORY", grouped, in 80 columns.

    only: which of the dotted names are shown.
    """
    config, options = load_config_file(recipe), _shown(recipe)
    lines = [f"Options of --config {recipe}, with their defaults there:"]
    section = None
    for option, value in options:
        if not only(option.name):
            continue
        if option.section != section:
            section = option.section
            lines += ["", f"{section or 'general'}:"]
        line = f"  --config.{option.name}={_shown_value(value)}"
        name, equals, shown = line.partition("=")
        lines += [line] if len(line) <= 80 else [name + equals, f"      {shown}"]
        lines += _wrapped(_sentences(option))
    for prefix, part in list(_parts(config))[1:]:
        if only(prefix):
            lines.append("")
            name = f"--config.{prefix}NAME=VALUE"
            lines += _wrapped(f"{name}: options of the recipe {recipe_of(part)}.", "  ")
    arguments = ARGUMENTS[recipe_of(config)]
    lines += ["", "Arguments of the recipe, --config RECIPE:SOURCE,NAME=VALUE:", ""]
    for name, meaning in arguments.items():
        lines += _wrapped(f"{name}: {meaning}", "  ")
    return "\n".join(lines)


def option_table(recipe: str) -> str:
    """The options of a recipe, as in `help_text`, as a table in Markdown."""
    lines = ["| Option | Type | Default | Allowed | Meaning |", "|---|---|---|---|---|"]
    kinds = {bool: "bool", int: "int", float: "float", str: "str"}
    for option, value in _shown(recipe):
        default = "" if value is MISSING else f"`{json.dumps(value)}`"
        cells = (f"`{option.name}`", kinds[option.type], default, option.allowed(), option.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(recipe: str) -> list[tuple[Option, Any]]:
    """Options and defaults, the general ones first, then section by section."""
    config = load_config_file(recipe)
    values = leaves(config.to_dict())
    options = [
        option
        for option in RECIPES[recipe_of(config)]
        if option.name in values or option.name.endswith("*")
    ]
    used = dict.fromkeys(option.section for option in options)
    order = ["", *(name for name in _SECTIONS if name in used)]
    sections = [*order, *(name for name in used if name not in order)]
    return [
        (option, values.get(option.name, MISSING))
        for section in sections
        for option in options
        if option.section == section
    ]


def _sentences(option: Option) -> str:
    allowed = option.allowed()
    kind = KINDS[option.type]
    if option.type in (int, float) and allowed:
        kind = f"{kind}, {allowed}"
    elif allowed:
        kind = allowed
    return f"{option.help} [{kind}]"


def _wrapped(text: str, indent: str = "      ") -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent=indent, subsequent_indent=indent + "  " * (indent == "  "),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _shown_value(value: Any) -> str:
    return "VALUE" if value is MISSING else '""' if value == "" else f"{value}"

"""Every option of the configurations: its type, what it may be, and one line of help.

The recipes in `configs/` give each option its value; this module says what the option means and
which values are allowed. `validate` checks a whole configuration before anything is prepared;
`help_text` and `option_table` print the options of a recipe.

To add an option, give it a value in the recipe and an `Option` here. If its sense depends on other
options, add a `Rule`. If runs that lack the option have to stay readable, give the `Option` the
value `before` that they had in its place.

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rcml_jax.config import leaves, load_config_file
from rcml_jax.data.sources import CLASSIFICATION_SOURCES, SOURCES, STUDY_SOURCES
from rcml_jax.data.sources.n24news import TEXTS
from rcml_jax.errors import UserError
from rcml_jax.evaluation.learners import LEARNERS
from rcml_jax.evaluation.measures import selections
from rcml_jax.evaluation.modality_gap import WASSERSTEIN
from rcml_jax.evaluation.relation_probes import PROBES
from rcml_jax.evaluation.scores import SCORES
from rcml_jax.losses import LOSSES
from rcml_jax.methods import METHODS
from rcml_jax.methods.relational_towers import stored_modalities
from rcml_jax.methods.seeds import several_models
from rcml_jax.models.frozen import LAYERS, POOLINGS
from rcml_jax.ops.similarity import SIMILARITIES
from rcml_jax.registry import is_path

_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
#: Names under these prefixes are the user's own.
OPEN = ("method_options", "data.options")
_MISSING = object()
#: Counters on the devices have 32 bits.
_MOST = 2**31 - 1
#: Seeds have 63 bits, which `rcml_jax.config.fold_seed` folds into the 32 of a random key.
_MOST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a configuration.

    name: dotted, without "config."; a last part "*" stands for any name.
    type: bool, int, float or str. A float may be written as an integer, an integer not as a float.
    help: one line.
    low, high: the smallest and the largest value that is allowed; above, below: borders that are
        not allowed themselves.
    choices: the allowed strings, or a function that returns them.
    path: an import path, "package.module:NAME", is allowed beside the choices.
    several: several of the choices may be given, with commas between, or "all".
    sources: the data sources that have the option; empty for all.
    required: whether a configuration has to have the option.
    before: what a configuration without the option had in its place, where that is known.
    """

    name: str
    type: type
    help: str
    _: dataclasses.KW_ONLY
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] | Callable[[], Collection[str]] | None = None
    path: bool = False
    several: bool = False
    sources: tuple[str, ...] = ()
    required: bool = True
    before: Any = _MISSING

    @property
    def section(self) -> str:
        """The name without its last part; "" at the top."""
        return self.name.rpartition(".")[0]

    @property
    def known(self) -> tuple[str, ...]:
        """The allowed strings; none where any string is allowed."""
        found = self.choices() if callable(self.choices) else self.choices
        return tuple(found or ())

    @property
    def most(self) -> float | None:
        """`high`; of integers without one, what 32 bits hold."""
        return _MOST if self.type is int and self.high is None else self.high

    def allowed(self) -> str:
        """What the option may be, in words; "" where anything of its type is allowed."""
        if self.type in (int, float):
            return self._range(self.high)
        if self.name == "selection":
            measures = dict.fromkeys(name.rpartition("/")[0] for name in self.known)
            return f"MEASURE/SCORE with one of {', '.join(measures)} and one of {', '.join(SCORES)}"
        names = [name for name in self.known if name]
        found = ", ".join(names)
        if self.several and names:
            found = f"all, or any of {found}, with commas between"
        elif names:
            found = f"one of {found}" if len(names) > 1 else found
        ways = [found] if found else []
        if self.path:
            ways.append("an import path, package.module:NAME")
        if "" in self.known or (self.several and not names):
            ways.append("empty")
        return ", or ".join(ways)

    def _range(self, high: float | None) -> str:
        def show(number: float) -> str:
            return f"{number:,}" if isinstance(number, int) else f"{number:g}"

        if self.low is not None and high is not None:
            return f"from {show(self.low)} to {show(high)}"
        parts = [f"at least {show(self.low)}"] if self.low is not None else []
        parts += [f"above {show(self.above)}"] if self.above is not None else []
        parts += [f"at most {show(high)}"] if high is not None else []
        parts += [f"below {show(self.below)}"] if self.below is not None else []
        return " and ".join(parts)

    def error(self, value: Any) -> str | None:
        """What is wrong with a value, to be read after "config.NAME=VALUE "; None if nothing is."""
        if self.type is float and type(value) is int:
            value = float(value) if abs(value) < 2**1000 else math.inf
        if type(value) is not self.type:
            return f"must be {_KINDS[self.type]}"
        if self.type is float and not math.isfinite(value):
            return "must be a finite number"
        if self.type in (int, float) and not self._inside(value):
            over = self.most is not None and value > self.most
            return f"must be {self._range(self.most if over else self.high)}"
        if self.type is str:
            return self._string_error(value)
        return None

    def _inside(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _string_error(self, value: str) -> str | None:
        if self.path and is_path(value):
            return None
        names = value.split(",") if self.several else [value]
        if self.several and value == "all":
            return None
        known = self.known
        if not (known or self.path) or all(name in known for name in names):
            return None
        if self.name == "selection":
            return f"is unknown; write {self.allowed()}"
        if not any(known):
            return f"must be {self.allowed()}"
        # As in the errors of `rcml_jax.registry.resolve`.
        allowed = self.allowed().replace(", or an import path", ", or give an import path")
        return f"is unknown; choose {allowed.replace(', or empty', ', or leave it empty')}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What several options have to be together.

    names: the options; a configuration that lacks one of them is not held to the rule.
    error: their values in the same order → one sentence with the remedy, or None.
    """

    names: tuple[str, ...]
    error: Callable[..., str | None]


# The options


_SEED = {"low": 0, "high": _MOST_SEED}
_SIZE = {"low": 1, "high": 65_536}
_LENGTH = {"low": 2, "high": 65_536}
_WEIGHT = {"low": 0, "high": 1e6}
_SHARE = {"low": 0, "high": 1}
#: Similarities are at most 1: below this temperature logits would overflow 32-bit exponentials.
_TEMPERATURE = {"low": 1e-4, "high": 100.0}

#: What the training loop itself reads. A method of another package has to have these; of the other
#: options it may leave out any.
LOOP = (
    Option("seed", int, "Seed of initial values, batches and augmentation.", **_SEED),
    Option("log_every", int, "Steps between two lines of training metrics.", low=1),
    Option(
        "parallel", str,
        "How a step is split over devices: sharded batches, replicas, or a sharded state as well.",
        choices=("jit", "pmap", "fsdp"),
    ),
    Option("platform", str, "cpu, gpu or tpu; empty: what JAX finds."),
    Option("devices", int, "Number of devices to train on; 0: all.", low=0),
    Option("tensorboard", bool, "Write TensorBoard files beside metrics.jsonl."),
    Option("data.split_seed", int, "Seed of the splits and of the evaluation's draws.", **_SEED),
    Option("optimizer.learning_rate", float, "Peak learning rate.", above=0, high=100.0),
    Option("optimizer.warmup_steps", int, "Steps of linear warm-up of the cosine schedule.",
           low=0),
    Option("optimizer.weight_decay", float, "Weight decay.", low=0, high=1e3),
    Option("optimizer.b1", float, "Adam's decay of the first moment.", low=0, below=1),
    Option("optimizer.b2", float, "Adam's decay of the second moment.", low=0, below=1),
    Option(
        "optimizer.clip_norm", float, "Largest norm of a gradient; 0: no clipping.", low=0, high=1e6
    ),
)  # fmt: skip

_TRAINED = (
    *LOOP,
    Option(
        "patience", int,
        "Validations without improvement before training stops; 0: never.", low=0,
    ),
    Option(
        "micro_batch", int,
        "Number of examples embedded at a time, to save memory; 0: the whole batch.", low=0,
    ),
    Option("data.dir", str, "Cache of prepared data; empty: the user's cache directory."),
    Option("data.path", str, "Folder of a local copy, or of your own catalogue."),
    Option("data.strict", bool, "Stop at a damaged image or record instead of skipping it."),
    Option("data.threads", int, "Threads that read batches ahead.", low=1, high=1024),
    Option(
        "batch.image_shift", int,
        "Augmentation: the largest shift of an image, in pixels.", low=0, high=256,
    ),
    Option("batch.image_flip", bool, "Augmentation: mirror half of the images."),
    Option(
        "model.image_pretrained", str,
        "Checkpoint of the image tower: a ViT, as a directory or a name on the hub.",
    ),
    Option(
        "model.text_pretrained", str,
        "Checkpoint of the text tower: a BERT or RoBERTa, as a directory or a name on the hub.",
    ),
    Option("model.dtype", str, "Type of the computation.", choices=("float32", "bfloat16")),
    Option(
        "model.remat", str,
        "Compute activations again in the backward pass, to save memory: those of each layer, or "
        "all but the products with weights (dots).", choices=("", "layers", "dots"),
    ),
    Option("model.width", int, "Width of a small transformer.", **_SIZE),
    Option("model.layers", int, "Layers of a small transformer.", low=1, high=1000),
    Option("model.heads", int, "Attention heads of a small transformer.", low=1, high=4096),
    Option("model.image_size", int, "Side of an image in pixels, without a checkpoint.",
           low=1, high=4096),
    Option("model.patch_size", int, "Side of a patch in pixels, without a checkpoint.",
           low=1, high=4096),
    Option("model.vocab_size", int, "Size of the fitted vocabulary, without a checkpoint.",
           low=1, high=2_000_000),
    Option("model.max_length", int, "Largest number of tokens of a text.", **_LENGTH),
    Option("loss.temperature", float, "Temperature of the contrastive loss.", **_TEMPERATURE),
    Option(
        "loss.block", int,
        "Rows of the loss computed at a time, to save memory (of RCML: relations); 0: all.", low=0,
    ),
)  # fmt: skip

_RCML = (
    Option("method", str, "The method to train.",
           choices=lambda: [name for name in METHODS if name != "m3col"], path=True),
    *_TRAINED,
    Option("steps", int, "Number of training steps.", low=1),
    Option("validate_every", int, "Steps between two validations.", low=1),
    Option(
        "selection", str, "Validation measure that picks the checkpoint.",
        choices=lambda: [f"{measure}/{score}" for measure in selections() for score in SCORES],
    ),
    Option("data.name", str, "Data source.", choices=lambda: SOURCES, path=True),
    Option("data.domain", str, "Product category of Amazon Reviews 2023, such as Baby_Products.",
           sources=("amazon",)),
    Option("data.clusters", int, "Kinds of buyers; each is a relation.", low=1, high=10_000,
           sources=("amazon", "hm")),
    Option("data.pairs_per_user", int, "Most pairs of one buyer.", low=1,
           sources=("amazon", "hm")),
    Option("data.pairs_per_item", int, "Most pairs of one item under a relation.", low=1,
           sources=("amazon", "hm")),
    Option("data.min_purchases", int, "Purchases that a customer needs to be of a kind.", low=1,
           sources=("hm",)),
    Option("data.pairs_per_respect", int, "Most pairs that agree in one respect.", low=1,
           sources=("hm",)),
    Option(
        "data.disjoint", str,
        "What the splits keep apart: items, pairs, or items and relation sentences.",
        choices=("item", "pair", "relation"),
    ),
    Option(
        "data.domain_split", str,
        'Labels to test on, such as "food-*,animal-*", the others to train on; empty: none.',
    ),
    Option(
        "data.relation_text", bool,
        "Use the relations' own sentences; False: one sentence for all (ablation).",
    ),
    Option("data.queries", int, "Most queries of each task of the evaluation.", low=4),
    Option("data.pairs_per_relation", int,
           "Most pairs of a relation in the evaluation; 0: any number.", low=0),
    Option("batch.relations", int, "Relations in a batch.", low=0),
    Option("batch.pairs_per_relation", int, "Pairs of each relation in a batch.", low=0),
    Option("batch.intra_pairs", int, "Pairs of an item with itself in a batch.", low=0),
    Option(
        "batch.size", int,
        "Distinct items in a batch; those that are in no pair are more negatives.", low=1,
    ),
    Option(
        "batch.texts_per_row", int,
        "Texts that share a row of tokens: less padding where lengths differ, with the same loss.",
        low=1, high=1024,
    ),
    Option(
        "batch.sentence_noise", float,
        "Augmentation: noise in the embeddings of sentences, in multiples of their length.",
        low=0, high=100.0, before=0.0,
    ),
    Option("batch.inter_pairs", bool, "Use pairs of two items; False: self pairs only (ablation)."),
    Option(
        "model.pretrained", str,
        "CLIP or SigLIP checkpoint of both towers, as a directory or a name on the hub.",
    ),
    Option("model.text_tower", str, "Flax module in place of the text tower, trained from scratch.",
           choices=("",), path=True, before=""),
    Option("model.image_tower", str,
           "Flax module in place of the image tower, trained from scratch.",
           choices=("",), path=True, before=""),
    Option(
        "model.towers", str, "hf: Hugging Face's own Flax CLIP, of transformers before 5.",
        choices=("", "hf"),
    ),
    Option("model.init_from", str, "Work directory whose towers to start from."),
    Option("model.freeze", str, "Towers that are not trained.",
           choices=("", "text", "image", "both")),
    Option("model.store_frozen", bool,
           "Compute the token states of frozen towers once and keep them on disk.", before=False),
    Option("model.embed_dim", int, "Width of the joint space, without a checkpoint.", **_SIZE),
    Option("model.beta", float, "RCML: β, weight of the pooled token against attention (Eq. 5).",
           **_SHARE),
    Option("model.summary_logit", float,
           "RCML: logit of the pooled token under the intra-sample relation.", low=-1e6, high=1e6),
    Option("model.summary_prior", float,
           "RCML: logit of the pooled token under every relation; the paper has 0.",
           low=-1e6, high=1e6),
    Option("model.learn_summary_prior", bool, "RCML: train model.summary_prior."),
    Option("model.gate", bool, "RCML: scale what was pooled by the relation; not in the paper."),
    Option("model.head_init", str, "RCML: start of the pooling head: identity or Xavier (plain).",
           choices=("identity", "plain")),
    Option("loss.function", str, "Loss of a baseline; empty: the method's own.",
           choices=lambda: ("", *LOSSES), path=True, before=""),
    Option("loss.learn_temperature", bool, "Train the temperature, from loss.temperature on."),
    Option("loss.intra_modal_weight", float,
           "RCML: λ, weight of the intra-modal loss; 0: without it (ablation).", **_WEIGHT),
    Option(
        "loss.negatives", str,
        "RCML: negatives of a pair: items unrelated under any relation, or unlinked under its own.",
        choices=("unrelated", "unlinked"),
    ),
    Option("loss.mask_related", bool,
           "clip, siglip, unicl: related items are no negatives of each other.", before=False),
    Option("loss.identification_weight", float,
           "RCML: weight of relation identification; the paper has 0.", **_WEIGHT),
    Option("loss.declip.self_supervision", float,
           "declip: α, weight of SimSiam and masked tokens.", **_SHARE),
    Option("loss.declip.multi_view", float, "declip: β, weight of the other pairs of views.",
           **_SHARE),
    Option("loss.declip.nearest_neighbor", float, "declip: γ, weight of the nearest texts.",
           **_SHARE),
    Option("loss.pair_block", int,
           "RCML: pairs of each relation computed at a time, to save memory; 0: all.", low=0),
    Option("evaluation.similarity", str, "Similarity of the retrieval; all: compare them.",
           choices=lambda: ("all", *SIMILARITIES)),
    Option("evaluation.validity_probe", str, "Classifier of relation validity.", choices=PROBES),
    # Of `rcml-eval --embeddings` alone, which writes them itself.
    Option("embeddings.path", str, "File of the embeddings of rcml-eval --embeddings.",
           required=False),
    Option("embeddings.sha256", str, "Digest of that file.", required=False),
)  # fmt: skip

_M3COL = (
    Option("method", str, "The method to train.", choices=("m3col",), path=True),
    *_TRAINED,
    Option("seeds", int, "Number of models trained at once: this seed and those after it.",
           low=1, high=1000),
    Option("steps", int, "Number of training steps; 0: those of `epochs`.", low=0),
    Option("epochs", int, "Number of epochs, where steps is 0.", low=0, high=1_000_000),
    Option("validate_every", int, "Steps between two validations; 0: those of validate_epochs.",
           low=0),
    Option("validate_epochs", int, "Epochs between two validations, where validate_every is 0.",
           low=0, high=1_000_000),
    Option("checkpoint_every", int, "Steps between two checkpoints; 0: at every validation.",
           low=0),
    Option(
        "accumulation", str,
        "With micro_batch: the gradient of the whole batch (exact), or a mean over parts (micro).",
        choices=("exact", "micro"),
    ),
    Option("data.name", str, "Data source.", choices=lambda: CLASSIFICATION_SOURCES, path=True),
    Option("data.text", str, "Text of N24News.", choices=TEXTS),
    Option("data.modalities", str,
           'Modalities to use, with commas between, such as "image,text"; empty: all.'),
    Option(
        "data.folds", int,
        "Without a validation split: number of folds of train, one of which is held out.",
        low=0, high=1000,
    ),
    Option("data.patches_hidden", float, "Share of each image that is turned grey.", **_SHARE),
    Option("data.patch_size", int, "Side of a grey patch in pixels.", low=1, high=4096),
    Option("data.words_dropped", float, "Share of the words of a text that are lost.", **_SHARE),
    Option("batch.size", int, "Samples in a batch; 0: the whole training split.", low=0),
    Option("model.dropout", float, "Share of activations dropped.", low=0, below=1),
    Option("model.classifier_layers", int, "Layers of a classifier.", low=1, high=100),
    Option("model.hidden", int, "Hidden width of the classifiers; 0: model.width.",
           low=0, high=65_536),
    Option("mixup.alpha", float, "Both parameters of the Beta distribution of the mixing weight.",
           low=1e-3, high=1e3),
    Option("mixup.fraction", float, "Share of the samples that are mixed.", **_SHARE),
    Option("mixup.place", str, "What is mixed; of texts always the embedding.",
           choices=("input", "embedding")),
    Option("mixup.labels", bool, "Vanilla mixup: classify mixed samples with mixed labels."),
    Option("loss.contrastive", str, "Contrastive term; scheduled: M3Co, then MultiSClip.",
           choices=("scheduled", "m3co", "multi_soft_clip", "clip", "none")),
    Option("loss.contrastive_weight", float, "β, weight of the contrastive term.", **_WEIGHT),
    Option("loss.unimodal_weight", float,
           "Weight of the classifiers of single modalities; 0: without them.", **_WEIGHT),
    Option("loss.m3co_share", float, "scheduled: share of the steps that have M3Co.", **_SHARE),
    Option("loss.soft_temperature", float, "Temperature of MultiSClip.", **_TEMPERATURE),
    Option("loss.stop_gradient_targets", bool, "No gradient through the targets of MultiSClip."),
    Option("optimizer.name", str,
           "adamw, or adam: weight decay added to the gradient.", choices=("adam", "adamw")),
    Option("optimizer.schedule", str, "Course of the learning rate.",
           choices=("cosine", "step", "plateau", "constant")),
    Option("optimizer.rates.*", float,
           "Learning rate of a part, such as encoders_text or heads.", low=0, high=100.0,
           required=False),
    Option("optimizer.step_size", int, "Steps between two reductions of the step schedule.", low=1),
    Option("optimizer.factor", float, "Reduction by the step and plateau schedules.",
           above=0, below=1),
    Option("optimizer.plateau_patience", int,
           "Validations without improvement before the plateau schedule reduces.", low=0),
)  # fmt: skip

_ALIGNMENT = (
    Option("method", str, "The study.", choices=("alignment",)),
    Option("seed", int, "Seed of draws and learned similarities.", **_SEED),
    Option("steps", int, "Not used: only the runs below are trained.", low=0),
    Option("parallel", str, "Not used by the study; see the runs.",
           choices=("jit", "pmap", "fsdp")),
    Option("platform", str, "cpu, gpu or tpu; empty: what JAX finds."),
    Option("data.name", str, "Source of the embeddings.", choices=lambda: STUDY_SOURCES),
    Option("data.dir", str, "Cache of prepared data; empty: the user's cache directory."),
    Option("data.path", str, "The file, the work directories or the local copy."),
    Option("data.split_seed", int,
           "Seed of the split, 60 % train, 20 % validation and 20 % test, where none is declared.",
           **_SEED),
    Option(
        "towers.names", str,
        "Checkpoints, with commas between: CLIP or SigLIP, or IMAGE+TEXT for two trained apart.",
    ),
    Option("towers.layer", str, "Output of CLIP: the joint space, or what is projected to it.",
           choices=LAYERS),
    Option("towers.pooling", str,
           "Of other towers: the first token or the mean; auto: as the checkpoint says.",
           choices=POOLINGS),
    Option("towers.max_length", int, "Largest number of tokens of a text.", **_LENGTH),
    Option("evaluation.gallery", str, "Score similarities and gap on the test split or on all.",
           choices=("test", "all")),
    Option("evaluation.similarity", str, "Similarities to compare.",
           choices=lambda: SIMILARITIES, several=True),
    Option("evaluation.memory_mb", int, "Memory of a block of scores, in MiB.",
           low=1, high=1_000_000),
    Option("evaluation.wasserstein", str,
           "Form of the Wasserstein distance; two of them need the extra `alignment`.",
           choices=WASSERSTEIN),
    Option("evaluation.learned", str, "Similarities to learn on the training split.",
           choices=lambda: ("", *LEARNERS), several=True),
    Option("evaluation.learner_steps", int, "Most training steps of a learned similarity.", low=1),
    Option("evaluation.learner_batch", int, "Batch size of a learned similarity.",
           low=2, high=1_000_000),
    Option("evaluation.search_trials", int,
           "Trials of the search for each learner, with the extra `search`; 0: none.",
           low=0, high=1_000_000),
)  # fmt: skip

#: The options of each recipe in `configs/`.
RECIPES = {"rcml": _RCML, "m3col": _M3COL, "alignment": _ALIGNMENT}
#: What may stand behind the data source in --config RECIPE:SOURCE,NAME=VALUE.
ARGUMENTS = {
    "rcml": {
        "path": "folder of your own catalogue, or of a local copy of the data",
        "domain": "product category of Amazon Reviews 2023",
        "pretrained": "CLIP or SigLIP checkpoint; none: small towers from scratch",
        "text": "BERT or RoBERTa in place of the text tower; minilm: the packaged one",
        "image": "ViT in place of the image tower, or efficientnet-lite0",
    },
    "m3col": {
        "path": "folder of a local copy of the data",
        "paper": "True: the paper's recipe for ROSMAP, whose tuned one is the default",
    },
    "alignment": {
        "path": "the .npz file, the work directories or the local copy",
        "towers": "checkpoints to compare, as in config.towers.names",
    },
}


# The rules


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
_WITH_TRANSFORMERS = ("openmoji", "n24news", "food101")


def _small_encoders(
    source: str, width: int, heads: int, size: int, patch: int, image: str, text: str
) -> str | None:
    if source not in _WITH_TRANSFORMERS:
        return None
    return _heads(width, heads, image and text) or _patches(size, patch, image)


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
            "model.image_pretrained", "model.text_pretrained", "mixup.place",
        ),
        lambda *values: _small_encoders(*values[:-1]),
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


def _check_name(
    name: str, values: Mapping[str, Any], options: Sequence[Option], prefix: str
) -> None:
    """Raise UserError for a name that no option has."""
    if any(name == own or name.startswith(f"{own}.") for own in OPEN):
        return
    option, source = _find(name, options), values.get("data.name", "")
    if option is None:
        near = difflib.get_close_matches(name, [o.name for o in options], 1)
        hint = f"did you mean config.{prefix}{near[0]}? " if near else ""
        raise UserError(
            f"config.{prefix}{name} is unknown; {hint}options of your own belong under "
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
        if option.before is _MISSING or not _set(part, option.name, option.before):
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
        lines.append(f"  --config.{option.name}={_shown_value(value)}")
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
        default = "" if value is _MISSING else f"`{json.dumps(value)}`"
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
    sections = dict.fromkeys(option.section for option in options)
    order = ["", *(name for name in _SECTIONS if name in sections)]
    sections = [*order, *(name for name in sections if name not in order)]
    return [
        (option, values.get(option.name, _MISSING))
        for section in sections
        for option in options
        if option.section == section
    ]


def _sentences(option: Option) -> str:
    allowed = option.allowed()
    kind = _KINDS[option.type]
    if option.type in (int, float) and allowed:
        kind = f"{kind}, {allowed}"
    elif allowed:
        kind = allowed
    return f"{option.help} {kind[0].upper()}{kind[1:]}."


def _wrapped(text: str, indent: str = "      ") -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent=indent, subsequent_indent=indent + "  " * (indent == "  "),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _shown_value(value: Any) -> str:
    return "VALUE" if value is _MISSING else '""' if value == "" else f"{value}"

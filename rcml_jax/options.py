"""Every option of the configurations: its type, what it may be, and one line of help.

The recipes in `configs/` give each option its value; this table says what the option means and
which values are allowed. `rcml_jax.schema` checks configurations against it and prints it.

To add an option, give it a value in the recipe and an `Option` here. If its sense depends on other
options, add a `Rule` to `rcml_jax.schema`. If runs that lack the option have to stay readable, give
the `Option` the value `before` that they had in its place.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from rcml_jax.data import N24NEWS_TEXTS
from rcml_jax.data.sources import CLASSIFICATION_SOURCES, SOURCES, STUDY_SOURCES
from rcml_jax.evaluation import LEARNERS, PROBES, SCORES, WASSERSTEIN
from rcml_jax.evaluation.measures import selections
from rcml_jax.losses import LOSSES
from rcml_jax.methods import METHODS
from rcml_jax.models import LAYERS, POOLINGS
from rcml_jax.ops.similarity import SIMILARITIES
from rcml_jax.registry import is_path

#: The types in words.
KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
#: Of an option without a value `before`.
MISSING = object()
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
    before: Any = MISSING

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
        kind: Any = type(value)
        if kind is not self.type:
            return f"must be {KINDS[self.type]}"
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


_SEED: dict[str, Any] = {"low": 0, "high": _MOST_SEED}
_SIZE: dict[str, Any] = {"low": 1, "high": 65_536}
_LENGTH: dict[str, Any] = {"low": 2, "high": 65_536}
_WEIGHT: dict[str, Any] = {"low": 0, "high": 1e6}
_SHARE: dict[str, Any] = {"low": 0, "high": 1}
#: Similarities are at most 1: below this temperature logits would overflow 32-bit exponentials.
_TEMPERATURE: dict[str, Any] = {"low": 1e-4, "high": 100.0}

# fmt: off
#: What the training loop itself reads. A method of another package has to have these; of the other
#: options it may leave out any.
LOOP = (
    Option("seed", int, "Seed of initial values, batches and augmentation.", **_SEED),
    Option("log_every", int, "Steps between two lines of training metrics.", low=1),
    Option("patience", int, "Validations without improvement before training stops; 0: never.",
        low=0),
    Option("parallel", str,
        "How a step is split over devices: sharded batches, replicas, or a sharded state as well.",
        choices=("jit", "pmap", "fsdp")),
    Option("platform", str, "cpu, gpu or tpu; empty: what JAX finds."),
    Option("devices", int, "Number of devices to train on; 0: all.", low=0),
    Option("tensorboard", bool, "Write TensorBoard files beside metrics.jsonl."),
    Option("data.split_seed", int, "Seed of the splits and of the evaluation's draws.", **_SEED),
    Option("optimizer.learning_rate", float, "Peak learning rate.", above=0, high=100.0),
    Option("optimizer.warmup_steps", int, "Steps of linear warm-up of the cosine schedule.", low=0),
    Option("optimizer.weight_decay", float, "Weight decay.", low=0, high=1e3),
    Option("optimizer.b1", float, "Adam's decay of the first moment.", low=0, below=1),
    Option("optimizer.b2", float, "Adam's decay of the second moment.", low=0, below=1),
    Option("optimizer.clip_norm", float, "Largest norm of a gradient; 0: no clipping.",
        low=0, high=1e6),
)

_PREPARED_IN_PARTS = ("amazon", "folder", "hm")
_TRAINED = (
    *LOOP,
    Option("micro_batch", int,
        "Number of examples embedded at a time, to save memory; 0: the whole batch.", low=0),
    Option("fsdp_devices", int,
        "With parallel=fsdp: devices that hold parameters and optimizer state together, once for "
        "each group of so many; 0: all.", low=0, before=0),
    Option("data.dir", str, "Cache of prepared data, also gs:// or s3://; empty: the user's own."),
    Option("data.path", str, "Folder of a local copy, or of your own catalogue."),
    Option("data.strict", bool, "Stop at a damaged image or record instead of skipping it."),
    Option("data.threads", int, "Threads that read batches ahead.", low=1, high=1024),
    Option("data.workers", int,
        "Processes that read batches ahead, where decoding takes long; 0: the threads alone.",
        low=0, high=256, before=0),
    Option("data.pixels", str,
        "Images: decoded once and kept on disk at the model's size, or decoded in every run.",
        choices=("stored", "encoded"), before="encoded"),
    Option("batch.image_shift", int, "Augmentation: the largest shift of an image, in pixels.",
        low=0, high=256),
    Option("batch.image_flip", bool, "Augmentation: mirror half of the images."),
    Option("model.image_pretrained", str,
        "Checkpoint of the image tower: a ViT, as a directory or a name on the hub, or "
        "efficientnet-lite0."),
    Option("model.text_pretrained", str,
        "Checkpoint of the text tower: a BERT or RoBERTa, as a directory or a name on the hub, or "
        "minilm."),
    Option("model.dtype", str, "Type of the computation.", choices=("float32", "bfloat16")),
    Option("model.remat", str,
        "Compute activations again in the backward pass, to save memory: those of each layer, "
        "or all but the products with weights (dots).",
        choices=("", "layers", "dots")),
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
    Option("loss.chunk_size", int,
        "Rows of the loss computed at a time, to save memory (of RCML: relations); 0: all.", low=0),
)

_RCML = (
    Option("method", str, "The method to train.",
        choices=lambda: [name for name in METHODS if name != "m3col"], path=True),
    *_TRAINED,
    Option("steps", int, "Number of training steps.", low=1),
    Option("validate_every", int, "Steps between two validations.", low=1),
    Option("selection", str, "Validation measure that picks the checkpoint.",
        choices=lambda: [f"{measure}/{score}" for measure in selections() for score in SCORES]),
    Option("data.name", str, "Data source.", choices=lambda: SOURCES, path=True),
    Option("data.domain", str, "Product category of Amazon Reviews 2023, such as Baby_Products.",
        sources=("amazon",)),
    Option("data.clusters", int, "Kinds of buyers; each is a relation.",
        low=1, high=10_000, sources=("amazon", "hm")),
    Option("data.pairs_per_user", int, "Most pairs of one buyer.", low=1, sources=("amazon", "hm")),
    Option("data.pairs_per_item", int, "Most pairs of one item under a relation.",
        low=1, sources=("amazon", "hm")),
    Option("data.min_purchases", int, "Purchases that a customer needs to be of a kind.",
        low=1, sources=("hm",)),
    Option("data.pairs_per_respect", int, "Most pairs that agree in one respect.",
        low=1, sources=("hm",)),
    Option("data.prepare_workers", int,
        "Processes that decode and store the images when a data set is prepared; 1: the command's "
        "own.",
        low=1, high=1024, sources=_PREPARED_IN_PARTS, before=1),
    Option("data.beam", str,
        "Options of an Apache Beam pipeline that prepares the images instead, such as "
        '"--runner=DirectRunner"; empty: none.',
        sources=_PREPARED_IN_PARTS, before=""),
    Option("data.disjoint", str,
        "What the splits keep apart: items, pairs, or items and relation sentences.",
        choices=("item", "pair", "relation")),
    Option("data.domain_split", str,
        'Labels to test on, such as "food-*,animal-*", the others to train on; empty: none.'),
    Option("data.relation_text", bool,
        "Use the relations' own sentences; False: one sentence for all (ablation)."),
    # A quarter of them are given wrong relations, exchanged among them: a few find none.
    Option("data.queries", int, "Most queries of each task of the evaluation.", low=20),
    Option("data.pairs_per_relation", int,
        "Most pairs of a relation in the evaluation; 0: any number.", low=0),
    Option("batch.relations", int, "Relations in a batch.", low=0),
    Option("batch.pairs_per_relation", int, "Pairs of each relation in a batch.", low=0),
    Option("batch.intra_pairs", int, "Pairs of an item with itself in a batch.", low=0),
    Option("batch.size", int,
        "Distinct items in a batch; those that are in no pair are more negatives.", low=1),
    Option("batch.texts_per_row", int,
        "Texts that share a row of tokens: less padding where lengths differ, with the same loss.",
        low=1, high=1024),
    Option("batch.sentence_noise", float,
        "Augmentation: noise in the embeddings of sentences, in multiples of their length.",
        low=0, high=100.0, before=0.0),
    Option("batch.inter_pairs", bool, "Use pairs of two items; False: self pairs only (ablation)."),
    Option("model.pretrained", str,
        "CLIP or SigLIP checkpoint of both towers, as a directory or a name on the hub."),
    Option("model.text_tower", str, "Flax module in place of the text tower, trained from scratch.",
        choices=("",), path=True, before=""),
    Option("model.image_tower", str,
        "Flax module in place of the image tower, trained from scratch.",
        choices=("",), path=True, before=""),
    Option("model.towers", str, "hf: Hugging Face's own Flax CLIP, of transformers before 5.",
        choices=("", "hf")),
    Option("model.init_from", str, "Work directory whose towers to start from."),
    Option("model.freeze", str, "Towers that are not trained.",
        choices=("", "text", "image", "both")),
    Option("model.store_frozen", bool,
        "Compute the token states of frozen towers once and keep them on disk.", before=False),
    Option("model.embed_dim", int, "Width of the joint space, without a checkpoint.", **_SIZE),
    Option("model.beta", float, "RCML: β, weight of the pooled token against attention (Eq. 5).",
        **_SHARE),
    Option("model.pooled_logit", float,
        "RCML: logit of the pooled token under the intra-sample relation.", low=-1e6, high=1e6),
    Option("model.pooled_prior", float,
        "RCML: logit of the pooled token under every relation; the paper has 0.",
        low=-1e6, high=1e6),
    Option("model.learn_pooled_prior", bool, "RCML: train model.pooled_prior."),
    Option("model.gate", bool, "RCML: scale what was pooled by the relation; not in the paper."),
    Option("model.head_init", str, "RCML: start of the pooling head: identity or Xavier (plain).",
        choices=("identity", "plain")),
    Option("loss.function", str, "Loss of a baseline; empty: the method's own.",
        choices=lambda: ("", *LOSSES), path=True, before=""),
    Option("loss.learn_temperature", bool, "Train the temperature, from loss.temperature on."),
    Option("loss.intra_modal_weight", float,
        "RCML: λ, weight of the intra-modal loss; 0: without it (ablation).", **_WEIGHT),
    Option("loss.negatives", str,
        "RCML: negatives of a pair: items unrelated under any relation, or unlinked under its own.",
        choices=("unrelated", "unlinked")),
    Option("loss.mask_related", bool,
        "clip, siglip, unicl: related items are no negatives of each other.", before=False),
    Option("loss.identification_weight", float,
        "RCML: weight of relation identification; the paper has 0.", **_WEIGHT),
    Option("loss.declip.self_supervision", float, "declip: α, weight of SimSiam and masked tokens.",
        **_SHARE),
    Option("loss.declip.multi_view", float, "declip: β, weight of the other pairs of views.",
        **_SHARE),
    Option("loss.declip.nearest_neighbor", float, "declip: γ, weight of the nearest texts.",
        **_SHARE),
    Option("loss.pair_chunk_size", int,
        "RCML: pairs of each relation computed at a time, to save memory; 0: all.", low=0),
    Option("evaluation.similarity", str, "Similarity of the retrieval; all: compare them.",
        choices=lambda: ("all", *SIMILARITIES)),
    Option("evaluation.validity_probe", str, "Classifier of relation validity.", choices=PROBES),
    # Of `rcml-eval --embeddings` alone, which writes them itself.
    Option("embeddings.path", str, "File of the embeddings of rcml-eval --embeddings.",
        required=False),
    Option("embeddings.sha256", str, "Digest of that file.", required=False),
)

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
    Option("accumulation", str,
        "With micro_batch: the gradient of the whole batch (exact), or a mean over parts (micro).",
        choices=("exact", "micro")),
    Option("data.name", str, "Data source.", choices=lambda: CLASSIFICATION_SOURCES, path=True),
    Option("data.text", str, "Text of N24News.", choices=N24NEWS_TEXTS),
    Option("data.towers", str,
        "Frozen towers, CLIP or IMAGE+TEXT, whose embeddings take the place of images and texts "
        "(with model.scaling=standard).",
        before=""),
    Option("data.mask_class_words", bool, "Remove the words of the classes' names from the texts.",
        sources=("hm",)),
    Option("data.modalities", str,
        'Modalities to use, with commas between, such as "image,text"; empty: all.'),
    Option("data.folds", int,
        "Without a validation split: number of folds of train, one of which is held out.",
        low=0, high=1000),
    Option("data.patches_hidden", float, "Share of each image that is turned grey.", **_SHARE),
    Option("data.patch_size", int,
        "Side of a grey patch in pixels; with data.towers: of an image of model.image_size.",
        low=1, high=4096),
    Option("data.words_dropped", float, "Share of the words of a text that are lost.", **_SHARE),
    Option("batch.size", int, "Samples in a batch; 0: the whole training split.", low=0),
    Option("model.init_from", str,
        "Work directories whose encoders and projections to start from, with commas between.",
        before=""),
    Option("model.freeze", str, "Encoders that are not trained: all, without projections, or none.",
        choices=("", "encoders"), before=""),
    Option("model.projection", int,
        "Width to which images' and texts' embeddings are projected; 0: their encoders' own.",
        low=0, high=65_536, before=0),
    Option("model.scaling", str,
        "Scaling of the columns of tables and frozen embeddings: range: to [0, 1]; standard: to "
        "mean 0 and deviation 1 (rounding: to 0).",
        choices=("range", "standard"), before="range"),
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
    Option("optimizer.name", str, "adamw, or adam: weight decay added to the gradient.",
        choices=("adam", "adamw")),
    Option("optimizer.schedule", str, "Course of the learning rate.",
        choices=("cosine", "step", "plateau", "constant")),
    Option("optimizer.rates.*", float, "Learning rate of a part, such as encoders_text or heads.",
        low=0, high=100.0, required=False),
    Option("optimizer.step_size", int, "Steps between two reductions of the step schedule.", low=1),
    Option("optimizer.factor", float, "Reduction by the step and plateau schedules.",
        above=0, below=1),
    Option("optimizer.plateau_patience", int,
        "Validations without improvement before the plateau schedule reduces.",
        low=0, high=1_000_000),
)

_ALIGNMENT = (
    Option("method", str, "The study.", choices=("alignment",)),
    Option("seed", int, "Seed of draws and learned similarities.", **_SEED),
    Option("steps", int, "Not used: only the runs below are trained.", low=0),
    Option("parallel", str, "Not used by the study; see the runs.",
        choices=("jit", "pmap", "fsdp")),
    Option("platform", str, "cpu, gpu or tpu; empty: what JAX finds."),
    Option("data.name", str, "Source of the embeddings.", choices=lambda: STUDY_SOURCES),
    Option("data.dir", str, "Cache of prepared data, also gs:// or s3://; empty: the user's own."),
    Option("data.path", str, "The file, the work directories or the local copy."),
    Option("data.split_seed", int,
        "Seed of the split, 60 % train, 20 % validation and 20 % test, where none is declared.",
        **_SEED),
    Option("data.strict", bool, "Stop at a damaged image or caption instead of skipping it.",
        before=False),
    Option("towers.names", str,
        "Checkpoints, with commas between: CLIP or SigLIP, or IMAGE+TEXT for two trained apart."),
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
    Option("evaluation.learner_patience", int,
        "Validations, 100 steps apart, without a better one after which a learner stops.",
        low=1, before=10),
    Option("evaluation.learner_batch", int, "Batch size of a learned similarity.",
        low=2, high=1_000_000),
    Option("evaluation.learner_options", str,
        "Fixed options of learners: LEARNER:NAME=NUMBER,NAME=NUMBER;LEARNER:...", before=""),
    Option("evaluation.search_trials", int,
        "Trials of the search for each learner, with the extra `search`; 0: none.",
        low=0, high=1_000_000),
    Option("evaluation.learner_seeds", int,
        "Fits of each learner; their mean and standard deviation are reported.",
        low=1, high=1_000_000, before=1),
    Option("evaluation.pair_counts", str,
        "Numbers of training pairs to compare the learners on, with commas between; empty: all.",
        before=""),
    Option("evaluation.negative_level", float,
        "Share of unrelated pairs that is to have a negative similarity.",
        above=0, below=1, before=0.99),
    Option("evaluation.bootstrap", int,
        "Samples for the confidence intervals over queries; 0: no intervals.",
        low=0, high=1_000_000, before=0),
)
# fmt: on

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
        "quick": "True: the recipe tuned for ROSMAP, for other tables",
        "towers": "frozen towers, as in config.data.towers; none: small ones from scratch",
    },
    "alignment": {
        "path": "the .npz file, the work directories or the local copy",
        "towers": "checkpoints to compare, as in config.towers.names",
    },
}

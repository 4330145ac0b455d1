"""M3CoL, its baselines and ablations: multimodal classification.

    python train.py --config configs/m3col.py --workdir runs/m3col
    python train.py --config configs/m3col.py:rosmap --workdir runs/rosmap --config.seeds=5
    python train.py --config configs/m3col.py:n24news,path=N24News --workdir runs/n24news
    rcml-sweep --config configs/m3col.py:rosmap --workdir runs/ablations --ablations

The argument after the colon names the data: `openmoji` (the default, embedded), `rosmap`, `brca`
(fetched once), `n24news`, `food101` (local copies, path=DIRECTORY), or an import path of your own,
`my_package.my_source:load`, a function (config.data, cache directory) -> ClassificationData.
`paper=True` is the paper's recipe for ROSMAP, whose tuned one is the default; `quick=True` gives
BRCA and tables like it that one, in a fraction of the time. Every value can be overridden:
--config.loss.contrastive_weight=0.2.
"""

import ml_collections

from rcml_jax.config import parse_argument
from rcml_jax.data.sources import CLASSIFICATION_SOURCES

_OPTIONS = ("path", "paper", "quick")


def get_config(arg: str = "openmoji") -> ml_collections.ConfigDict:
    """The configuration of a data set, e.g. "n24news,path=DIRECTORY"."""
    source, options = parse_argument(arg, sources=CLASSIFICATION_SOURCES, options=_OPTIONS)
    config = ml_collections.ConfigDict()
    config.method = "m3col"
    config.seed = 42
    config.seeds = 1  # so many models at once, with this seed and the ones after it
    config.steps = 0  # 0: as many as config.epochs have
    config.epochs = 30
    config.validate_every = 0  # steps; 0: config.validate_epochs
    config.validate_epochs = 1
    config.checkpoint_every = 0  # steps; 0: at every validation
    config.patience = 0  # validations without a better accuracy before stopping; 0: never
    config.log_every = 10
    config.micro_batch = 0  # so many examples are embedded at a time; 0: the whole batch
    config.accumulation = "exact"  # or micro, a mean over batches of that size: the authors' way
    config.parallel = "jit"  # jit, pmap, or fsdp: jit with the state split over the devices
    config.platform = ""  # cpu, gpu, tpu; empty: what JAX finds
    config.devices = 0  # 0: all of them
    config.tensorboard = False

    config.data = ml_collections.ConfigDict()
    config.data.name = source
    config.data.dir = ""  # where data sets are cached; empty: the user's cache directory
    config.data.path = options.get("path", "")  # of a local copy
    config.data.text = "headline"  # of N24News: headline, caption, abstract or article
    config.data.modalities = ""  # "text", "image,text"; empty: all of them
    config.data.strict = False  # a missing picture is an error, not counted and skipped
    config.data.split_seed = 0
    config.data.folds = 5  # without a validation split, one of so many folds of train is held out
    config.data.patches_hidden = 0.0  # share of each picture that is turned grey
    config.data.patch_size = 8
    config.data.words_dropped = 0.0  # share of the words of a text that are lost
    config.data.threads = 1  # that read batches ahead

    config.batch = ml_collections.ConfigDict()
    config.batch.size = 128  # 0: the whole training split
    config.batch.image_shift = 0  # augmentation: moved by up to so many pixels
    config.batch.image_flip = False  # augmentation: half of the images mirrored

    config.model = ml_collections.ConfigDict()
    config.model.image_pretrained = ""  # a ViT, and
    config.model.text_pretrained = ""  # a BERT or RoBERTa: directories or names on the hub
    config.model.dtype = "float32"  # of the computation, or bfloat16
    # Less memory, more time: "layers" computes each layer of a tower again for the backward pass,
    # "dots" all of it but the products with weights.
    config.model.remat = ""
    config.model.width = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.image_size = 32
    config.model.patch_size = 8
    config.model.vocab_size = 4096
    config.model.max_length = 32
    config.model.dropout = 0.0
    config.model.classifier_layers = 2
    config.model.hidden = 0  # of the classifiers; 0: config.model.width

    config.mixup = ml_collections.ConfigDict()
    config.mixup.alpha = 0.15
    config.mixup.fraction = 1.0  # share of the samples that are mixed
    config.mixup.place = "input"  # or embedding; a text's embedding is mixed in any case
    config.mixup.labels = False  # vanilla mixup: mixed samples with mixed labels

    config.loss = ml_collections.ConfigDict()
    config.loss.contrastive = "scheduled"  # m3co, multi_soft_clip, clip, none
    config.loss.contrastive_weight = 0.1  # β
    config.loss.unimodal_weight = 1.0  # 0: no uni-modal supervision
    config.loss.m3co_share = 1 / 3  # of the steps have M3Co, the others MultiSClip
    config.loss.temperature = 0.1
    config.loss.soft_temperature = 0.1  # of MultiSClip
    config.loss.stop_gradient_targets = False
    config.loss.block = 0  # samples compared at a time, for less memory; 0: all of them

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # or adam, with weight decay added to the gradient
    config.optimizer.schedule = "cosine"  # step, plateau or constant
    config.optimizer.learning_rate = 1e-3
    config.optimizer.rates = ml_collections.ConfigDict()  # of parts: encoders_text, heads, ...
    config.optimizer.warmup_steps = 20
    config.optimizer.step_size = 250  # of the step schedule, in steps
    config.optimizer.factor = 0.2  # of the step and plateau schedules
    config.optimizer.plateau_patience = 2  # validations without a better accuracy
    config.optimizer.weight_decay = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 0.0  # 0: no clipping

    if source == "openmoji":
        _openmoji(config)
    elif _is_omics(source):
        _omics(config)
        tuned = source == "rosmap" and options.get("paper") != "True"
        if tuned or options.get("quick") == "True":
            _quick_omics(config)
    elif source in ("n24news", "food101"):
        _image_text(config)
    return config


def get_ablations(arg: str = "openmoji") -> dict[str, str]:
    """Variants by name, as options of `--variant`: the ablations and baselines of the paper."""
    source, _ = parse_argument(arg, sources=CLASSIFICATION_SOURCES, options=_OPTIONS)
    modalities = ("mrna", "methylation", "mirna") if _is_omics(source) else ("image", "text")
    vanilla = "mixup.labels=True,mixup.alpha=0.2,loss.contrastive=none"
    return {
        "full": "",
        "only M3Co": "loss.contrastive=m3co",
        "only MultiSClip": "loss.contrastive=multi_soft_clip",
        "no uni-modal supervision": "loss.unimodal_weight=0.0",
        "vanilla mixup": vanilla,
        "plain contrastive": "loss.contrastive=clip",
        "no contrastive term": "loss.contrastive=none",
        "concatenation": "loss.contrastive=none,loss.unimodal_weight=0.0",
        **{f"only {name}": f"data.modalities={name}" for name in modalities},
    }


def _is_omics(source: str) -> bool:
    return source in ("rosmap", "brca")


def _openmoji(config: ml_collections.ConfigDict) -> None:
    """The group of an emoji from half of its picture and half of the words of its name."""
    config.data.patches_hidden = 0.5
    config.data.words_dropped = 0.5
    config.batch.image_shift = 3


def _omics(config: ml_collections.ConfigDict) -> None:
    """The paper's: full batch, 500 epochs, Adam whose rate falls to a fifth after 250."""
    rosmap = config.data.name == "rosmap"
    config.seeds = 5
    config.epochs = 500
    config.validate_epochs = 10
    config.checkpoint_every = 250
    config.batch.size = 0
    config.model.width = 1000 if rosmap else 768
    config.optimizer.name = "adam"
    config.optimizer.schedule = "step"
    config.optimizer.learning_rate = 2e-3 if rosmap else 5e-3
    config.optimizer.weight_decay = 1e-4


def _quick_omics(config: ml_collections.ConfigDict) -> None:
    """What did best on held-out folds of ROSMAP: a fifth of the width, dropout, and 200 epochs.

    On BRCA it was not tuned.
    """
    config.epochs = 200
    config.validate_epochs = 5
    config.checkpoint_every = 100
    config.model.width = 200
    config.model.dropout = 0.5
    config.optimizer.step_size = 100


def _image_text(config: ml_collections.ConfigDict) -> None:
    """The paper's: ViT and RoBERTa or BERT, batches of 32 accumulated to 128."""
    news = config.data.name == "n24news"
    config.epochs = 25 if news else 50
    config.accumulation = "micro"
    config.batch.size = 128
    config.micro_batch = 32
    config.batch.image_flip = True
    config.model.image_pretrained = "google/vit-base-patch16-224-in21k"
    config.model.text_pretrained = "roberta-base" if news else "bert-base-uncased"
    config.model.max_length = 512
    config.model.classifier_layers = 3
    config.model.hidden = 256
    config.optimizer.name = "adam"
    config.optimizer.schedule = "plateau"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.optimizer.rates.encoders_image = 5e-5
    config.optimizer.rates.encoders_text = 2e-5 if news else 5e-5
    if news:
        config.optimizer.rates.heads_text = 5e-5

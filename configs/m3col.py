"""M3CoL, its baselines and ablations: multimodal classification.

    python train.py --config configs/m3col.py --workdir runs/m3col
    python train.py --config configs/m3col.py:rosmap --workdir runs/rosmap --config.seeds=5
    python train.py --config configs/m3col.py:n24news,path=N24News --workdir runs/n24news
    python train.py --config configs/m3col.py:hm,path=H_AND_M --workdir runs/garments
    rcml-sweep --config configs/m3col.py:rosmap --workdir runs/ablations --ablations

The argument after the colon names the data: `openmoji` (the default, embedded), `rosmap`, `brca`
(fetched once), `n24news`, `food101`, `hm` (local copies, path=DIRECTORY), or an import path of your
own, `my_package.my_source:load`, a function (config.data, cache directory) -> ClassificationData.
`paper=True` is the paper's recipe for ROSMAP, whose tuned one is the default; `quick=True` gives
BRCA and tables like it that one, in a fraction of the time. `towers=IMAGE+TEXT` classifies from
embeddings of frozen towers, the default of hm (towers=none: small ones from scratch). Every value
can be overridden: --config.loss.contrastive_weight=0.2. `rcml-train --help --config m3col` explains
each.
"""

import ml_collections

from rcml_jax.config import parse_argument
from rcml_jax.data.sources import CLASSIFICATION_SOURCES
from rcml_jax.options import ARGUMENTS


def get_config(arg: str = "openmoji") -> ml_collections.ConfigDict:
    """The configuration of a data set, e.g. "n24news,path=DIRECTORY"."""
    source, options = parse_argument(
        arg, sources=CLASSIFICATION_SOURCES, options=ARGUMENTS["m3col"]
    )
    config = ml_collections.ConfigDict()
    config.method = "m3col"
    config.seed = 42
    config.seeds = 1
    config.steps = 0
    config.epochs = 30
    config.validate_every = 0
    config.validate_epochs = 1
    config.checkpoint_every = 0
    config.patience = 0
    config.log_every = 10
    config.micro_batch = 0
    config.accumulation = "exact"
    config.parallel = "jit"
    config.fsdp_devices = 0
    config.platform = ""
    config.devices = 0
    config.tensorboard = False

    config.data = ml_collections.ConfigDict()
    config.data.name = source
    config.data.dir = ""
    config.data.path = options.get("path", "")
    config.data.text = "headline"
    config.data.towers = ""
    config.data.modalities = ""
    config.data.strict = False
    config.data.split_seed = 0
    config.data.folds = 5
    config.data.patches_hidden = 0.0
    config.data.patch_size = 8
    config.data.words_dropped = 0.0
    config.data.threads = 1
    config.data.workers = 0
    config.data.pixels = "stored"

    config.batch = ml_collections.ConfigDict()
    config.batch.size = 128
    config.batch.image_shift = 0
    config.batch.image_flip = False

    config.model = ml_collections.ConfigDict()
    # Size, crop, mean and deviation of images: a run writes here what its checkpoint's files say.
    config.model.preprocessing = ml_collections.ConfigDict()
    config.model.image_pretrained = ""
    config.model.text_pretrained = ""
    config.model.init_from = ""
    config.model.freeze = ""
    config.model.projection = 0
    config.model.scaling = "range"
    config.model.dtype = "float32"
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
    config.model.hidden = 0

    config.mixup = ml_collections.ConfigDict()
    config.mixup.alpha = 0.15
    config.mixup.fraction = 1.0
    config.mixup.place = "input"
    config.mixup.labels = False

    config.loss = ml_collections.ConfigDict()
    config.loss.contrastive = "scheduled"
    config.loss.contrastive_weight = 0.1  # β
    config.loss.unimodal_weight = 1.0
    config.loss.m3co_share = 1 / 3
    config.loss.temperature = 0.1
    config.loss.soft_temperature = 0.1
    config.loss.stop_gradient_targets = False
    config.loss.chunk_size = 0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.rates = ml_collections.ConfigDict()
    config.optimizer.warmup_steps = 20
    config.optimizer.step_size = 250
    config.optimizer.factor = 0.2
    config.optimizer.plateau_patience = 2
    config.optimizer.weight_decay = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 0.0

    if source == "openmoji":
        _openmoji(config)
    elif _is_omics(source):
        _omics(config)
        tuned = source == "rosmap" and options.get("paper") != "True"
        if tuned or options.get("quick") == "True":
            _quick_omics(config)
    elif source in ("n24news", "food101"):
        _image_text(config)
    elif source == "hm":
        _garments(config)
    if "towers" in options:
        config.data.towers = "" if options["towers"] == "none" else options["towers"]
        if config.data.towers:  # each image is embedded once
            config.batch.image_shift = 0
            config.batch.image_flip = False
            config.model.image_pretrained = config.model.text_pretrained = ""
    if config.data.towers:  # scaled by their extremes they train badly
        config.model.scaling = "standard"
    return config


def get_ablations(arg: str = "openmoji") -> dict[str, str]:
    """Variants by name, as options of `--variant`: the ablations and baselines of the paper."""
    source, _ = parse_argument(arg, sources=CLASSIFICATION_SOURCES, options=ARGUMENTS["m3col"])
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
    """The group of an emoji from half of its image and half of the words of its name."""
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


def _garments(config: ml_collections.ConfigDict) -> None:
    """The garment group of an article, from frozen embeddings of its photograph and its text."""
    config.data.towers = "efficientnet-lite0+minilm"
    config.data.mask_class_words = False
    config.optimizer.learning_rate = 1e-3  # of 1e-4 to 1e-2, on validation; even with 3e-3
    config.seeds = 3
    config.model.width = 256
    config.model.max_length = 128
    config.model.image_size = 48
    config.model.dropout = 0.5

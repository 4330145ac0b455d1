"""The alignment study: which similarity retrieves best, and how wide the modality gap is.

    python eval.py --config configs/alignment.py --workdir runs/alignment
    python eval.py --config configs/alignment.py:npz,path=embeddings.npz --workdir runs/mine
    python eval.py --config configs/alignment.py:runs,path=runs/rcml --workdir runs/study
    python eval.py --config configs/alignment.py:flickr30k,path=flickr30k \
        --config.towers.names=openai/clip-vit-base-patch32 --workdir runs/flickr
    python eval.py --config configs/alignment.py:flickr8k,path=flickr8k --workdir runs/flickr8k

`openmoji` (the default) compares towers trained by configs/rcml.py, by its CLIP baseline, and apart
from each other on the groups of configs/m3col.py; runs that the work directory lacks are trained
first. `npz` reads a file with `image` (n, d), `text` (m, d) and `image_of_text` (m,). `runs` takes
a work directory of configs/rcml.py, or several by --config.data.path=A,B, and the items that they
were trained for. `flickr8k`, `flickr30k` and `coco` are local copies in their published layouts,
embedded by the towers named, which `openmoji` takes besides its own; of `flickr8k` they are
EfficientNet-Lite0 and MiniLM unless others are named. `rcml-eval --help --config alignment`
explains each option.
"""

import importlib.util
import pathlib

import ml_collections

from rcml_jax.config import parse_argument
from rcml_jax.data.sources import STUDY_SOURCES
from rcml_jax.options import ARGUMENTS


def get_config(arg: str = "openmoji") -> ml_collections.ConfigDict:
    """The configuration of a source, "openmoji" or "npz,path=FILE" and the like."""
    source, options = parse_argument(arg, sources=STUDY_SOURCES, options=ARGUMENTS["alignment"])
    config = ml_collections.ConfigDict()
    config.method = "alignment"
    config.seed = 42
    config.steps = 0  # nothing is trained but the runs below
    config.parallel = "jit"
    config.platform = ""

    config.data = ml_collections.ConfigDict()
    config.data.name = source
    config.data.dir = ""
    config.data.path = options.get("path", "")
    config.data.split_seed = 0
    config.data.strict = False

    config.towers = ml_collections.ConfigDict()
    frozen = "efficientnet-lite0+minilm" if source == "flickr8k" else ""
    config.towers.names = options.get("towers", frozen)
    config.towers.layer = "projected"
    config.towers.pooling = "auto"
    config.towers.max_length = 77

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.gallery = "test"
    config.evaluation.similarity = "all"
    config.evaluation.memory_mb = 512
    config.evaluation.wasserstein = "gaussian"
    config.evaluation.learned = (
        "procrustes,cca,bilinear,two_tower,mlp_mse,mlp_contrastive,attention"
    )
    config.evaluation.learner_steps = 500
    config.evaluation.learner_patience = 10
    config.evaluation.learner_batch = 64
    config.evaluation.learner_options = ""
    config.evaluation.search_trials = 0
    config.evaluation.learner_seeds = 1
    config.evaluation.pair_counts = ""
    config.evaluation.negative_level = 0.99
    config.evaluation.bootstrap = 1000

    if source == "flickr8k":
        # How far towers that were trained apart can be aligned, and by how many pairs.
        config.evaluation.learned += (
            ",kernel_cca,relative,optimal_transport,two_tower_mlp,two_tower_sigmoid"
        )
        config.evaluation.pair_counts = "50,200,1000,6000"
        config.evaluation.learner_steps = 1000
        config.evaluation.learner_patience = 3
        config.evaluation.learner_batch = 128

    config.runs = ml_collections.ConfigDict()
    if source == "openmoji":
        relational, classifier = _config_of("rcml"), _config_of("m3col")
        config.runs.rcml = relational.get_config()
        config.runs.clip = relational.get_config()
        config.runs.clip.method = "clip"
        for modality in ("image", "text"):
            run = classifier.get_config()
            run.data.modalities = modality
            run.data.patches_hidden = run.data.words_dropped = 0.0
            config.runs[f"apart_{modality}"] = run
    return config


def _config_of(name: str):
    """The configuration file beside this one."""
    path = pathlib.Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"rcml_jax_{name}_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

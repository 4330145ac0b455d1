"""Data sources: each a module with functions `(config.data, cache directory) -> data`."""

#: Relation graphs by the name in `config.data.name`; a new one is one file, and a line.
SOURCES = {
    "openmoji": "rcml_jax.data.sources.openmoji:from_config",
    "folder": "rcml_jax.data.sources.folder:from_config",
    "grocery": "rcml_jax.data.sources.grocery:from_config",
    "amazon": "rcml_jax.data.sources.amazon:from_config",
    "hm": "rcml_jax.data.sources.hm:from_config",
    "flickr8k": "rcml_jax.data.sources.flickr8k:from_config",
}
#: Classification data; likewise.
CLASSIFICATION_SOURCES = {
    "openmoji": "rcml_jax.data.sources.openmoji:groups_from_config",
    "rosmap": "rcml_jax.data.sources.omics:from_config",
    "brca": "rcml_jax.data.sources.omics:from_config",
    "n24news": "rcml_jax.data.sources.n24news:from_config",
    "food101": "rcml_jax.data.sources.food101:from_config",
    "hm": "rcml_jax.data.sources.garments:from_config",
}
#: Where the embeddings of the alignment study come from.
STUDY_SOURCES = ("openmoji", "npz", "flickr8k", "flickr30k", "coco", "runs")

"""Arrays in, numbers out: ranking, retrieval, relations and probes.

The names that a configuration may give are here, so that checking one imports nothing.
"""

#: Text-text, image-image, A's text with B's image, A's image with B's text, and the similarity of
#: the averaged and renormalised embeddings.
SCORES = ("tt", "ii", "ti", "it", "avg")
#: Classifiers of relation validity, of `evaluation.relation_probes`.
PROBES = ("linear", "mlp")
#: Estimates of the Wasserstein-2 distance, of `evaluation.modality_gap`.
WASSERSTEIN = ("gaussian", "sinkhorn", "sliced")
#: Learned similarities, of `evaluation.learned_similarity`: networks over the pair, a map of each
#: side, and maps with a closed form.
MLPS = ("mlp_mse", "mlp_cosine", "mlp_contrastive")
TWO_TOWERS = ("two_tower", "two_tower_mlp", "two_tower_sigmoid")
CLOSED = ("procrustes", "cca", "kernel_cca", "relative", "optimal_transport")
LEARNERS = (*MLPS, "bilinear", *TWO_TOWERS, "attention", *CLOSED)

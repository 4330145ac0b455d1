"""Random embeddings of clean and mixed samples, for M3Co and MultiSClip."""

import numpy as np

N, D = 5, 4
PADDED = np.array([1, 0, 1, 1, 0], bool)


def make(modalities=2, n=N, seed=0):
    rng = np.random.default_rng(seed)
    clean, mixed = rng.normal(size=(2, modalities, n, D)).astype(np.float32)
    coefficient = rng.beta(0.5, 0.5, n).astype(np.float32)
    partner = np.stack([rng.permutation(n) for _ in range(modalities)])
    return clean, mixed, coefficient, partner

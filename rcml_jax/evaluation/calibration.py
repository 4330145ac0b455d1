"""Similarities with a meaning of their own: negative for what is unrelated, or a probability.

    fitted = fit_signed(image, text, image_of_text, space="centred", level=0.99)
    scores = fitted.image(x) @ fitted.text(y).T  # below 0 for 99 % of unrelated pairs

`fit_zero`, `fit_sigmoid` and `fit_isotonic` map scores, and each map has an inverse. All three rise
strictly, so that they order a gallery as the scores do: retrieval pays nothing. `fit_csls` and the
calibrations of `modality_gap` change embeddings, and with them the order. Fit on pairs that no
reported figure uses.

References:
  CSLS: Conneau et al., 2018. Logistic calibration: Platt, 1999. Isotonic: Zadrozny and Elkan, 2002.
"""

import dataclasses

import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.modality_gap import (
    BLOCK,
    Calibration,
    calibrate,
    check_pairs,
    scaled_rows,
    unmatched_pairs,
)

SPACES = ("cosine", "centred", "whitened", "csls", "centred_csls")
#: What an isotonic map keeps of the straight line, so that it rises strictly.
_SLOPE = 1e-3
_NEWTON_STEPS = 50
#: The least range of scores, and one over their largest size: their squares stay numbers.
_LEAST_SPREAD = 1e-100


@dataclasses.dataclass(frozen=True)
class Affine:
    """s ↦ scale · s + offset with scale > 0."""

    scale: float
    offset: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Mapped scores, of the same shape."""
        return self.scale * np.asarray(scores) + self.offset

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The scores that were mapped to some values."""
        return (np.asarray(values) - self.offset) / self.scale

    def image(self, x: np.ndarray) -> np.ndarray:
        """Embeddings (n, d + 1) of images (n, d): with `text` their product is the mapped one."""
        x = np.asarray(x)
        return np.column_stack([np.sqrt(self.scale) * x, np.full(len(x), self.offset)])

    def text(self, y: np.ndarray) -> np.ndarray:
        """Embeddings (m, d + 1) of texts (m, d)."""
        y = np.asarray(y)
        return np.column_stack([np.sqrt(self.scale) * y, np.ones(len(y))])


@dataclasses.dataclass(frozen=True, eq=False)
class Monotone:
    """The piecewise linear function through `scores` and `values` (k,), which both rise strictly.

    Beyond the first and the last knot it goes on with the slope of the whole line, so that it has
    an inverse everywhere; a probability is then clipped by whoever needs one.
    """

    scores: np.ndarray
    values: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Mapped scores, of the same shape."""
        return _interpolate(scores, self.scores, self.values)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The scores that were mapped to some values."""
        return _interpolate(values, self.values, self.scores)


def _interpolate(x, knots, values):
    x = np.asarray(x, np.float64)
    slope = (values[-1] - values[0]) / (knots[-1] - knots[0])
    inside = np.interp(x, knots, values)
    return inside + slope * (np.minimum(x - knots[0], 0) + np.maximum(x - knots[-1], 0))


def fit_zero(unrelated: np.ndarray, level: float = 0.99) -> Affine:
    """The map that makes a share `level` of unrelated pairs negative; its unit is their deviation.

    unrelated: scores (p,) of held-out pairs that do not belong together. Zero is their quantile of
    rank ⌈(p + 1) level⌉, with which a new unrelated pair of the same distribution is negative with
    a probability of at least `level`. Raises UserError if `level` is not between 0 and 1, p is too
    small for it, or all scores are equal.
    """
    scores = np.sort(_scores("unrelated", unrelated))
    if not 0 < level < 1:
        raise UserError(f"level={level} must be between 0 and 1")
    place = int(np.ceil((len(scores) + 1) * level))
    if place > len(scores):
        raise UserError(
            f"{len(scores)} unrelated pairs are too few for level={level}; give at least "
            f"{int(np.ceil(level / (1 - level)))}"
        )
    _check_spread("unrelated scores", scores)
    spread = scores.std()
    # A pair at the quantile itself is to be negative, too.
    zero = np.nextafter(scores[place - 1], np.inf)
    return Affine(float(1 / spread), float(-zero / spread))


def fit_sigmoid(matched: np.ndarray, unrelated: np.ndarray, *, prior: float = 0.5) -> Affine:
    """The logit of a pair being matched, a · s + b, by logistic regression on held-out pairs.

    matched (p,), unrelated (q,): scores. prior: the share of matched pairs that probabilities are
    about, whatever p and q are. Where the two do not overlap, the slope is held finite by targets
    a little inside of 0 and 1 (Platt, 1999). Raises UserError if matched pairs do not score higher.
    """
    scores, labels, weights = _labelled(matched, unrelated, prior)
    _check_spread("scores", scores)
    centre = weights @ scores
    spread = np.sqrt(weights @ (scores - centre) ** 2)
    x = np.stack([(scores - centre) / spread, np.ones(len(scores))], axis=1)
    inside = (len(matched) + 1) / (len(matched) + 2), 1 / (len(unrelated) + 2)
    targets = np.where(labels, *inside)
    w = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (weights * (p - targets))
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        w -= step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-10:
            break
    if not w[0] > 0:
        raise UserError("matched pairs do not score higher than unrelated ones; check the pairs")
    return Affine(float(w[0] / spread), float(w[1] - w[0] * centre / spread))


def fit_isotonic(matched: np.ndarray, unrelated: np.ndarray, *, prior: float = 0.5) -> Monotone:
    """The probability of a pair being matched, by the nearest rising step function, made strict.

    Arguments as in `fit_sigmoid`. The steps are joined by straight lines between the mean scores of
    their pairs, and 0.1 % of a straight line is mixed in. Raises UserError if matched pairs do not
    score higher at all.
    """
    scores, labels, weights = _labelled(matched, unrelated, prior)
    _check_spread("scores", scores)
    order = np.argsort(scores, kind="stable")
    knots, inverse = np.unique(scores[order], return_inverse=True)
    weight = np.bincount(inverse, weights[order])
    share = np.bincount(inverse, (weights * labels)[order]) / weight
    steps = pool_violators(share, weight)
    starts = np.flatnonzero(np.diff(steps, prepend=-1.0))
    if len(starts) < 2:
        raise UserError("matched pairs do not score higher than unrelated ones; check the pairs")
    own = np.add.reduceat(weight, starts)
    x = np.add.reduceat(weight * knots, starts) / own
    line = (x - x[0]) / (x[-1] - x[0])
    return Monotone(x, (1 - _SLOPE) * steps[starts] + _SLOPE * line)


def pool_violators(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The rising sequence (n,) nearest to values (n,) in weighted squares (pool adjacent)."""
    pools: list[list[float]] = []  # mean, weight, length
    for value, w in zip(values, weight, strict=True):
        pools.append([float(value), float(w), 1])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, u, i), (b, v, j) = pools[-2:]
            pools[-2:] = [[(a * u + b * v) / (u + v), u + v, i + j]]
    return np.repeat([p[0] for p in pools], [int(p[2]) for p in pools])


def calibration_error(
    probability: np.ndarray,
    matched: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    bins: int = 15,
) -> float:
    """Expected calibration error: how far probabilities are from the shares that are matched.

    probability (p,), matched (p,) bool, weight (p,) or None for equal ones. The weighted mean over
    `bins` bins of equal width of |mean probability − share matched|. Raises UserError for what is
    no probability, and without a bin or a weight.
    """
    p, y = _scores("probability", probability), _scores("matched", matched)
    w = np.ones(len(p)) if weight is None else _scores("weight", weight)
    if np.min(p) < 0 or np.max(p) > 1 or not len(p) == len(y) == len(w):
        raise UserError("probability must be from 0 to 1, with a value of matched for each")
    if bins < 1 or np.min(w) < 0 or not np.sum(w) > 0:
        raise UserError(f"bins={bins} must be at least 1, and some weight above 0")
    place = np.clip((p * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(place, w * (p - y), minlength=bins)
    return float(np.abs(gaps).sum()) / float(w.sum())


def score_measures(
    held_out: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    level: float = 0.99,
    prior: float = 0.5,
) -> dict[str, dict[str, float]]:
    """What calibration makes of a similarity: signs and probabilities on test pairs.

    held_out, test: scores of matched and of unrelated pairs. Returns `unrelated_negative` and
    `matched_positive`, shares of the test pairs with the scores as they are ("plain") and after
    `fit_zero` on the held-out ones ("shifted"), and `calibration_error` of "sigmoid" and "isotonic"
    at the prior. A map that cannot be fitted has no entry.
    """
    matched, unrelated = (
        _scores(n, s) for n, s in zip(("matched", "unrelated"), test, strict=True)
    )
    maps = {"plain": Affine(1.0, 0.0), "shifted": fit_zero(held_out[1], level)}
    found: dict[str, dict[str, float]] = {
        "unrelated_negative": {n: float(np.mean(f(unrelated) < 0)) for n, f in maps.items()},
        "matched_positive": {n: float(np.mean(f(matched) > 0)) for n, f in maps.items()},
        "calibration_error": {},
    }
    scores, labels, weights = _labelled(matched, unrelated, prior)
    for name, fit in (("sigmoid", fit_sigmoid), ("isotonic", fit_isotonic)):
        try:
            values = fit(*held_out, prior=prior)(scores)
        except UserError:
            continue
        values = _sigmoid(values) if name == "sigmoid" else np.clip(values, 0, 1)
        found["calibration_error"][name] = calibration_error(values, labels, weight=weights)
    return found


def _scores(name: str, scores: np.ndarray) -> np.ndarray:
    try:
        scores = np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be one row of finite scores ({error})") from error
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise UserError(f"{name} must be one row of finite scores; its shape is {scores.shape}")
    return scores


def _check_spread(name: str, scores: np.ndarray) -> None:
    """Raise UserError for equal scores, and for those whose squares are no numbers."""
    spread = np.ptp(scores)
    if spread == 0:
        raise UserError(f"all {name} are equal; there is nothing to calibrate")
    if spread < _LEAST_SPREAD or np.abs(scores).max() > 1 / _LEAST_SPREAD:
        raise UserError(f"the {name} are too small or too large to be calibrated; scale them")


def _labelled(matched, unrelated, prior):
    """Scores, whether each is of a matched pair, and weights of sum 1 by the prior."""
    if not 0 < prior < 1:
        raise UserError(f"prior={prior} must be between 0 and 1")
    parts = _scores("matched", matched), _scores("unrelated", unrelated)
    labels = np.repeat([True, False], [len(part) for part in parts])
    weights = np.where(labels, prior / len(parts[0]), (1 - prior) / len(parts[1]))
    return np.concatenate(parts), labels, weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.asarray(x, np.float64)))


# Embeddings


@dataclasses.dataclass(frozen=True, eq=False)
class Csls:
    """Embeddings whose dot product is CSLS: 2 cos(x, y) − r(x) − r(y), fitted by `fit_csls`.

    r is the mean cosine of a row with its `neighbors` nearest reference rows of the other modality:
    what is similar to everything is no longer similar to anything. references: unit rows, {"image",
    "text"}. An embedding's first d columns over √2 are the unit row again.
    """

    references: dict[str, np.ndarray]
    neighbors: int

    def image(self, x: np.ndarray) -> np.ndarray:
        """Embeddings (n, d + 2) of images (n, d)."""
        unit, nearness = self._rows(x, "text")
        return np.column_stack([np.sqrt(2) * unit, -nearness, np.ones(len(unit))])

    def text(self, y: np.ndarray) -> np.ndarray:
        """Embeddings (m, d + 2) of texts (m, d)."""
        unit, nearness = self._rows(y, "image")
        return np.column_stack([np.sqrt(2) * unit, np.ones(len(unit)), -nearness])

    def inverse(self, embeddings: np.ndarray) -> np.ndarray:
        """The unit rows (n, d) that embeddings (n, d + 2) were made from."""
        return np.asarray(embeddings)[:, :-2] / np.sqrt(2)

    def _rows(self, x, other):
        unit = scaled_rows(x, True)
        reference, k = self.references[other], self.neighbors
        nearness = np.empty(len(unit))
        step = max(1, BLOCK * 256 // len(reference))
        for start in range(0, len(unit), step):
            cosines = unit[start : start + step] @ reference.T
            nearness[start : start + step] = np.partition(cosines, -k, axis=1)[:, -k:].mean(axis=1)
        return unit, nearness


def fit_csls(
    image: np.ndarray,
    text: np.ndarray,
    *,
    neighbors: int = 10,
    references: int = 5000,
    seed: int = 0,
) -> Csls:
    """CSLS with reference images (n, d) and texts (m, d), at most `references` of each by the seed.

    Raises UserError if a modality has fewer rows than `neighbors`, or `references` is less.
    """
    if references < neighbors:
        raise UserError(f"references={references} must be at least neighbors={neighbors}")
    rng = np.random.default_rng(seed)
    found = {}
    for name, x in (("image", image), ("text", text)):
        if not 1 <= neighbors <= len(x):
            raise UserError(f"neighbors={neighbors} must be from 1 to the {len(x)} rows of {name}")
        found[name] = scaled_rows(x[np.sort(rng.permutation(len(x))[:references])], True)
    return Csls(found, neighbors)


@dataclasses.dataclass(frozen=True, eq=False)
class Signed:
    """Embeddings whose dot product is negative for what is unrelated, fitted by `fit_signed`.

    The steps, each where it is wanted: `moved` (centring, whitening), `csls`, and `zero`, of which
    `zero.inverse(scores)` gives the similarity before it was moved: the cosine or CSLS.
    """

    moved: Calibration | None
    csls: Csls | None
    zero: Affine | None

    def image(self, x: np.ndarray) -> np.ndarray:
        """Embeddings of images (n, d), with one, two or three more columns."""
        return self._apply("image", x)

    def text(self, y: np.ndarray) -> np.ndarray:
        """Embeddings of texts (m, d)."""
        return self._apply("text", y)

    def _apply(self, modality, x):
        if self.moved is not None:
            x = getattr(self.moved, modality)(x)
        x = scaled_rows(x, True) if self.csls is None else getattr(self.csls, modality)(x)
        return x if self.zero is None else getattr(self.zero, modality)(x)


def fit_space(space: str, image: np.ndarray, text: np.ndarray, *, seed: int = 0) -> Signed:
    """A space of `SPACES` without a zero of its own; images (n, d), texts (m, d) of training.

    "cosine" as it is; "centred" and "whitened" by `modality_gap.calibrate`; "csls" of the cosine
    and "centred_csls" of the centred cosine. Raises UserError for another name.
    """
    if space not in SPACES:
        raise UserError(f"space={space!r} is unknown; choose one of {', '.join(SPACES)}")
    moved = csls = None
    if space not in ("cosine", "csls"):
        moved = calibrate(image, text, whiten=space == "whitened")
        image, text = moved.image(image), moved.text(text)
    if space.endswith("csls"):
        csls = fit_csls(image, text, seed=seed, neighbors=min(10, len(image), len(text)))
    return Signed(moved, csls, None)


def fit_signed(
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    space: str = "centred",
    level: float = 0.99,
    pairs: int = 100_000,
    seed: int = 0,
) -> Signed:
    """Embeddings whose dot product is negative for a share `level` of unrelated pairs.

    image (n, d), text (m, d), image_of_text (m,): pairs to fit on. Half of the images, drawn by the
    seed, with their texts fit the space; zero comes from `pairs` unrelated pairs of the other half.
    Raises UserError as `fit_space` and `fit_zero` do, and where a half has too few pairs.
    """
    image, text, rows = check_pairs(image, text, image_of_text, same_width=True)
    first = np.random.default_rng(seed).permutation(len(image)) < len(image) // 2
    fitted = fit_space(space, image[first], text[first[rows]], seed=seed)
    images, texts = np.flatnonzero(~first), np.flatnonzero(~first[rows])
    own = np.searchsorted(images, rows[texts])
    x, y = fitted.image(image[images]), fitted.text(text[texts])
    unrelated = pair_scores(x, y, *unmatched_pairs(len(x), own, pairs, seed))
    return dataclasses.replace(fitted, zero=fit_zero(unrelated, level))


def pair_scores(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Dot products (p,) of the rows x[i] and y[j], by blocks."""
    parts = [
        np.einsum("pd,pd->p", x[i[s : s + BLOCK]], y[j[s : s + BLOCK]], dtype=np.float64)
        for s in range(0, len(i), BLOCK)
    ]
    return np.concatenate(parts)

"""Paired comparison of two variants over the same seeds: interval, effect size, seeds needed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

#: Beyond so many pairs the normal distribution stands for Student's.
_MANY = 2000


def compare(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, power: float = 0.8
) -> dict[str, Any]:
    """The mean of a − b over pairs and how sure it is; a, b (n,): n ≥ 2 values of the same seeds.

    difference, low, high: the mean and its interval by Student's t at `level`. effect: the mean
    over the standard deviation of the differences, (n − 1). p: of the two-sided paired t-test.
    needed: as of `pairs_needed`. The latter three are None where all differences are the same.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    n, mean, deviation = len(difference), difference.mean(), difference.std(ddof=1)
    half = scipy.stats.t.ppf((1 + level) / 2, n - 1) * deviation / math.sqrt(n)
    found: dict[str, Any] = {
        "pairs": n,
        "difference": float(mean),
        "low": float(mean - half),
        "high": float(mean + half),
        "effect": None,
        "p": None,
        "needed": None,
    }
    if deviation > 1e-12:
        effect = float(mean / deviation)
        found["effect"] = effect
        found["p"] = float(2 * scipy.stats.t.sf(abs(effect) * math.sqrt(n), n - 1))
        found["needed"] = pairs_needed(effect, level=level, power=power)
    return found


def pairs_needed(effect: float, *, level: float = 0.95, power: float = 0.8) -> int | None:
    """The least number of pairs with which a two-sided paired t-test finds an effect size.

    "Finds": p < 1 − level with probability `power`, if the true effect size is this one. None for
    an effect of 0.
    """
    if not effect:
        return None
    normal = scipy.stats.norm.ppf((1 + level) / 2) + scipy.stats.norm.ppf(power)
    least = math.ceil((normal / effect) ** 2)
    if least > _MANY:
        return least
    n = max(2, least)  # Student's t needs more pairs than the normal distribution
    while _power(abs(effect), n, level) < power:
        n += 1
    return n


def _power(effect: float, n: int, level: float) -> float:
    """Probability that n pairs of a true effect size > 0 are told apart."""
    critical = scipy.stats.t.ppf((1 + level) / 2, n - 1)
    shift = effect * math.sqrt(n)
    if shift > critical + 30:  # where scipy's distribution has no value
        return 1.0
    return float(
        scipy.stats.nct.sf(critical, n - 1, shift) + scipy.stats.nct.cdf(-critical, n - 1, shift)
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons adjusted by Holm's method, in the given order."""
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted.tolist()

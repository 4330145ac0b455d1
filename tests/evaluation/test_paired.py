"""Paired comparisons against SciPy's test, published sample sizes and counting."""

import itertools

import numpy as np
import pytest
import scipy.stats

from rcml_jax.evaluation.paired import compare, holm, pairs_needed


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_and_p_are_those_of_scipy(level):
    rng = np.random.default_rng(0)
    b = rng.normal(size=20)
    a = b + 0.3 + rng.normal(size=20) / 2
    found, expected = compare(a, b, level=level), scipy.stats.ttest_rel(a, b)
    interval = expected.confidence_interval(level)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["difference"] == pytest.approx(np.mean(a - b))
    assert found["effect"] == pytest.approx(np.mean(a - b) / np.std(a - b, ddof=1))
    assert found["pairs"] == 20
    swapped = compare(b, a, level=level)
    assert swapped["difference"] == -found["difference"]
    assert (swapped["p"], swapped["needed"]) == (found["p"], found["needed"])


def test_pairs_matter_and_not_the_spread_of_the_seeds():
    seeds = np.random.default_rng(1).normal(size=10) * 100
    noise = np.random.default_rng(2).normal(size=10)
    assert compare(seeds + 2 + noise, seeds)["low"] > 0
    assert compare(seeds + 2 + noise, seeds[::-1])["low"] < 0


def test_equal_differences_have_no_test():
    same = compare([0.5, 0.6], [0.5, 0.6])
    assert same == {
        "pairs": 2, "difference": 0, "low": 0, "high": 0, "effect": None, "p": None, "needed": None,
    }  # fmt: skip
    assert compare([1.5, 2.5], [1.0, 2.0])["needed"] is None


@pytest.mark.parametrize(
    ("effect", "count"),
    # G*Power's and Cohen's sizes of a two-sided paired t-test at 5 %, power 80 %.
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34)],
)
def test_published_numbers_of_pairs(effect, count):
    assert pairs_needed(effect) == count


def test_numbers_of_pairs_at_the_ends():
    assert pairs_needed(0.0) is None
    assert pairs_needed(1e-4) == pytest.approx(7.849e8, rel=1e-3)
    # The two forms meet.
    assert pairs_needed(0.0627) == pytest.approx((2.8016 / 0.0627) ** 2, abs=4)
    assert pairs_needed(1e3) == 2
    assert pairs_needed(0.5, power=0.95) > pairs_needed(0.5) > pairs_needed(0.5, level=0.8)


def test_the_number_finds_the_effect_as_often_as_it_says():
    n, rng = pairs_needed(0.9), np.random.default_rng(3)
    differences = rng.normal(0.9, 1, size=(4000, n))
    rates = [np.mean(scipy.stats.ttest_1samp(differences[:, :k], 0, axis=1).pvalue < 0.05)
             for k in (n, n - 2)]  # fmt: skip
    assert rates[0] == pytest.approx(0.8, abs=0.03) or rates[0] > 0.8
    assert rates[1] < 0.8


def test_holm_rejects_step_by_step():
    p = [0.04, 0.01, 0.5, 0.012]
    found = holm(p)
    assert found == pytest.approx([0.08, 0.04, 0.5, 0.04])
    # Twin: a hypothesis falls at a level if it and all smaller ones fall one after the other.
    for level in np.linspace(0.001, 0.999, 301):
        fallen, order = set(), np.argsort(p)
        for step, index in enumerate(order):
            if p[index] > level / (len(p) - step):
                break
            fallen.add(int(index))
        assert fallen == {i for i, q in enumerate(found) if q <= level + 1e-12}
    for one in itertools.permutations(range(4)):
        assert holm([p[i] for i in one]) == pytest.approx([found[i] for i in one])

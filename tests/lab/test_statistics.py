import math
import statistics as stdlib

import numpy as np
import pytest
from scipy import stats

from steppe.lab.statistics import holm, mean, paired, spread

A, B = [8.1, 7.4, 9.0, 8.8, 7.9], [9.5, 8.0, 9.1, 10.2, 9.9]


def test_mean_and_spread_are_the_sample_ones():
    assert mean(A) == pytest.approx(stdlib.mean(A))
    assert spread(A) == pytest.approx(stdlib.stdev(A))
    assert math.isnan(spread([1.0]))


def test_paired_test_agrees_with_scipy():
    result, expected = paired(A, B), stats.ttest_rel(A, B)
    low, high = expected.confidence_interval(0.95)
    assert result.difference == pytest.approx(np.mean(A) - np.mean(B))
    assert (result.n, result.p) == (5, pytest.approx(expected.pvalue))
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


def test_paired_test_by_hand():
    result = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3), 2 df
    t = 2 * math.sqrt(3)
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # the t distribution with 2 df in closed form
    assert result.high - result.difference == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_no_test_without_spread():
    one, same = paired([1.0], [2.0]), paired([1.0, 2.0], [2.0, 3.0])
    assert one.difference == same.difference == -1
    assert math.isnan(one.p)
    assert math.isnan(one.low)
    assert math.isnan(same.p)
    assert (same.low, same.high) == (-1, -1)


def test_what_rounding_leaves_of_equal_numbers_is_no_difference():
    values, others = [0.1 + 0.2, 0.7], [0.3, 0.7]
    assert values != others
    result = paired(values, others)
    assert (result.difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert math.isnan(result.p)
    shifted = paired([0.1 + 0.2, 0.6], [0.2, 0.5])  # by a tenth in both seeds, but for rounding
    assert math.isnan(shifted.p)
    assert spread([0.1 + 0.2, 0.3, 0.3]) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979's steps 4 3 2 1
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm([0.02, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])

"""Held against textbook numbers, and against formulas written another way than scipy or we write them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import optimize

from jaxkd import statistics

NAN, INF = math.nan, math.inf


def paired_table(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def logistic_runs(rng, clusters, per_cluster, intercept=0.0, slope=2.0):
    x = rng.normal(size=(clusters, per_cluster))
    recovered = rng.random(x.shape) < 1 / (1 + np.exp(-intercept - slope * x))
    cluster = np.repeat(np.arange(clusters), per_cluster)
    return x.ravel(), recovered.ravel(), cluster


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 3), (7, 10), (50, 64), (20, 20)])
def test_wilson_limits_solve_the_score_equation(count, total):
    # The limits are the two p with (rate − p)² = z²·p·(1 − p)/total.
    z2, rate = 1.959963984540054**2, count / total
    roots = np.roots([1 + z2 / total, -2 * rate - z2 / total, rate**2])
    np.testing.assert_allclose(statistics.wilson_interval(count, total), np.sort(roots), atol=1e-9)


def test_wilson_matches_published_example():
    # Newcombe (1998), Stat. Med. 17:857, table I: 81 of 263 and 15 of 148.
    np.testing.assert_allclose(statistics.wilson_interval(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(statistics.wilson_interval(15, 148), (0.0624, 0.1605), atol=5e-5)


def test_recovery_rate_leaves_failures_out():
    rate = statistics.recovery_rate([True, False, True, True], [False, False, True, False])
    assert (rate.count, rate.total, rate.rate) == (2, 3, 2 / 3)
    assert (rate.low, rate.high) == statistics.wilson_interval(2, 3)
    assert statistics.recovery_rate([1.0, 0.0, NAN, 1.0]) == rate


def test_recovery_rate_without_runs_is_nan():
    rate = statistics.recovery_rate([True, False], [True, True])
    assert (rate.count, rate.total) == (0, 0)
    assert np.isnan([rate.rate, rate.low, rate.high]).all()


def test_recovery_rate_bound_scores_failures_as_lost():
    recovered, failed = [True, False, True, True], [False, False, True, False]
    bound = statistics.recovery_rate(statistics.failure_bound(recovered, failed))
    assert (bound.count, bound.total) == (2, 4)


# --- paired rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [(59, 6, 16, 80), (1, 1, 7, 12), (14, 5, 0, 22), (3, 4, 4, 0), (5, 0, 0, 5)])
def test_mcnemar_sums_the_binomial_tail(table):
    _, only_a, only_b, _ = table
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1)) / 2**discordant
    result = statistics.mcnemar(*paired_table(*table))
    assert result.p_value == pytest.approx(min(1, 2 * tail))
    assert (result.both, result.only_a, result.only_b, result.neither) == table
    assert result.pairs == sum(table)
    assert result.difference == pytest.approx((only_a - only_b) / sum(table))


@pytest.mark.parametrize(
    ("table", "low", "high", "digits"),
    [
        ((14, 5, 0, 22), 0.011, 0.226, 3),  # Altman et al. (2000), Statistics with Confidence, table 6.2
        ((59, 6, 16, 80), -0.1186, -0.0046, 4),  # Fagerland et al. (2017), chapter 8: Cavo et al. (2012)
        ((1, 1, 7, 12), -0.507, -0.026, 3),  # Fagerland et al. (2014): Bentur et al. (2009)
    ],
)
def test_newcombe_interval_matches_published_examples(table, low, high, digits):
    result = statistics.mcnemar(*paired_table(*table))
    assert (round(result.low, digits), round(result.high, digits)) == (low, high)


@pytest.mark.parametrize("table", list(itertools.product((0, 1, 9), repeat=4))[1:])
def test_mcnemar_interval_holds_the_difference_and_swaps_with_the_arms(table):
    a, b = paired_table(*table)
    forth, back = statistics.mcnemar(a, b), statistics.mcnemar(b, a)
    assert -1 <= forth.low <= forth.difference <= forth.high <= 1
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    assert forth.p_value == pytest.approx(back.p_value)


def test_mcnemar_covers():
    rng = np.random.default_rng(0)
    cells, truth = [0.4, 0.25, 0.1, 0.25], 0.15
    results = [statistics.mcnemar(*paired_table(*rng.multinomial(40, cells))) for _ in range(400)]
    coverage = np.mean([result.low <= truth <= result.high for result in results])
    assert 0.92 <= coverage <= 0.99


def test_mcnemar_drops_a_pair_if_either_failed():
    a = [True, True, True, False, NAN]
    b = [False, False, True, True, 0]
    result = statistics.mcnemar(a, b, failed_a=[1, 0, 0, 0, 0], failed_b=[0, 0, 0, 1, 0])
    assert (result.only_a, result.only_b, result.both, result.neither, result.pairs) == (1, 0, 1, 0, 2)


def test_mcnemar_without_pairs_is_nan():
    result = statistics.mcnemar([True], [False], failed_a=[True])
    assert result.pairs == 0
    assert np.isnan([result.p_value, result.difference, result.low, result.high]).all()


# --- paired differences -----------------------------------------------------------------------------------------------


def test_paired_difference_enumerates_swaps():
    a, b = np.array([5.0, 6.1, 4.0, 7.2, 5.5, 6.6]), np.array([4.2, 6.3, 3.1, 5.0, 5.1, 4.9])
    result = statistics.paired_difference(a, b)
    swapped = np.array([np.mean(signs * (a - b)) for signs in itertools.product((1, -1), repeat=6)])
    one_sided = np.mean(swapped >= result.mean - 1e-12)
    assert result.mean == pytest.approx(a.mean() - b.mean())
    assert result.p_value == pytest.approx(2 * one_sided)
    assert result.low < result.mean < result.high


def test_paired_difference_pairs():
    # Each seed has its own level, far larger than the difference between the arms: only pairing sees the difference.
    rng = np.random.default_rng(0)
    level = rng.normal(scale=100, size=30)
    result = statistics.paired_difference(level + 1 + rng.normal(scale=0.1, size=30), level)
    assert 0.9 < result.low < 1 < result.high < 1.1
    assert result.p_value < 1e-3


def test_paired_difference_covers():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(size=(150, 30)) + 0.5, rng.normal(size=(150, 30))
    results = [statistics.paired_difference(*pair, num_resamples=499) for pair in zip(a, b, strict=True)]
    coverage = np.mean([result.low <= 1.5 <= result.high for result in results])
    assert 0.88 <= coverage <= 0.98


@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0])
def test_paired_difference_of_equal_differences_is_a_point(shift):
    b = np.array([0.1, 0.7, 1.3, 5.9, 100.0])
    result = statistics.paired_difference(b + shift, b)
    assert result.low == result.mean == result.high == pytest.approx(shift)
    assert result.p_value == (1 if shift == 0 else pytest.approx(2 / 2**5))


def test_paired_difference_drops_a_pair_if_either_failed():
    a = [1.0, NAN, 3.0, 4.5, 9.0, 5.0]
    b = [0.0, 1.0, INF, 4.0, 1.0, 3.0]
    result = statistics.paired_difference(a, b, failed_b=[False, False, False, False, True, False])
    assert result == statistics.paired_difference([1.0, 4.5, 5.0], [0.0, 4.0, 3.0])
    assert result.pairs == 3


@pytest.mark.parametrize(("values", "mean"), [([2.0, NAN], 1.0), ([NAN, NAN], NAN)])
def test_paired_difference_of_fewer_than_two_pairs_has_no_interval(values, mean):
    result = statistics.paired_difference(values, [1.0, 1.0])
    assert result.mean == pytest.approx(mean, nan_ok=True)
    assert np.isnan([result.low, result.high, result.p_value]).all()


def test_paired_difference_is_reproducible():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    assert statistics.paired_difference(a, b, seed=3) == statistics.paired_difference(a, b, seed=3)
    assert statistics.paired_difference(a, b, seed=3) != statistics.paired_difference(a, b, seed=4)


# --- failures, summaries, few seeds -----------------------------------------------------------------------------------


def test_failure_bound_scores_failures():
    values, failed = np.array([[1.0, 2.0], [NAN, -INF]]), np.array([[False, True], [False, False]])
    np.testing.assert_array_equal(statistics.failure_bound(values, failed), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(statistics.failure_bound([1.0, 2.0]), [1, 2])
    assert np.isnan(values[1, 0])  # the caller's array is left as it was


def test_summarise():
    summary = statistics.summarise([4.0, 1.0, 2.0, 3.0, 5.0, NAN, 100.0], [0, 0, 0, 0, 0, 0, 1])
    assert summary == statistics.Summary(3.0, 2.0, 4.0, 3.0, pytest.approx(math.sqrt(2.5)), 5, 2)


def test_summarise_few():
    one, none = statistics.summarise([7.0, NAN]), statistics.summarise([NAN])
    assert (one.median, one.lower_quartile, one.mean, one.count, one.failed) == (7, 7, 7, 1, 1)
    assert math.isnan(one.sd)
    assert (none.count, none.failed) == (0, 1)
    assert np.isnan([none.median, none.mean, none.sd]).all()


def test_t_interval_of_three_seeds():
    result = statistics.t_interval([1.0, 2.0, 3.0])
    half_width = 4.302653 / math.sqrt(3)
    assert (result.mean, result.low, result.high) == pytest.approx((2, 2 - half_width, 2 + half_width))
    assert statistics.t_interval([1.0, 99.0, 2.0, 3.0], failed=[0, 1, 0, 0]) == result


def test_t_interval_at_another_level():
    # Student's table: t(0.95, 4) = 2.132.
    result = statistics.t_interval(np.arange(5.0), confidence=0.9)
    assert result.high - result.mean == pytest.approx(2.132 * math.sqrt(2.5 / 5), abs=1e-3)


@pytest.mark.parametrize("values", [[3.0], [NAN, 3.0], []])
def test_t_interval_of_fewer_than_two_values_has_no_limits(values):
    result = statistics.t_interval(values)
    assert np.isnan([result.low, result.high]).all()
    assert result.count == np.isfinite(values).sum()


# --- false discovery --------------------------------------------------------------------------------------------------


def test_false_discovery_matches_published_example():
    # Benjamini and Hochberg (1995), section 3.2: fifteen p-values, of which four are rejected at 0.05.
    p_values = np.array(
        [
            0.0001,
            0.0004,
            0.0019,
            0.0095,
            0.0201,
            0.0278,
            0.0298,
            0.0344,
            0.0459,
            0.324,
            0.4262,
            0.5719,
            0.6528,
            0.759,
            1,
        ]
    )
    np.testing.assert_array_equal(statistics.false_discovery(p_values), p_values <= 0.0095)


def test_false_discovery_steps_up():
    # Sorted against rate·k/5 = 0.01, 0.02, 0.03, 0.04, 0.05: the third lies below its line, so the second goes with it.
    np.testing.assert_array_equal(
        statistics.false_discovery([0.5, 0.029, 0.021, 0.005, 0.045]), [False, True, True, True, False]
    )


def test_false_discovery_keeps_shape_and_ignores_nan():
    p_values = np.array([[0.01, NAN, 0.2], [0.03, NAN, NAN]])
    np.testing.assert_array_equal(
        statistics.false_discovery(p_values), [[True, False, False], [True, False, False]]
    )  # against 0.05·k/3; NaN cells in the count would put 0.03 above its line
    assert not statistics.false_discovery([NAN, NAN]).any()
    assert statistics.false_discovery(np.zeros((0, 2))).shape == (0, 2)
    assert statistics.false_discovery(0.01).shape == ()


# --- recovery curve ---------------------------------------------------------------------------------------------------


def penalised_likelihood(coefficients, x, recovered):
    probability = 1 / (1 + np.exp(-coefficients[0] - coefficients[1] * x))
    design = np.column_stack([np.ones_like(x), x])
    information = design.T @ np.diag(probability * (1 - probability)) @ design
    likelihood = np.log(np.where(recovered, probability, 1 - probability)).sum()
    return likelihood + 0.5 * np.linalg.slogdet(information)[1]


@pytest.mark.parametrize("cells", [(3, 5, 6, 2), (0, 6, 6, 0), (0, 4, 9, 1), (5, 0, 5, 0), (0, 1, 3, 0), (40, 1, 0, 3)])
def test_saturated_table_adds_half_to_every_cell(cells):
    # With one binary covariate Firth's estimate is maximum likelihood after ½ is added to each cell.
    x = np.repeat([-3.0, -3.0, 1.0, 1.0], cells)
    recovered = np.repeat([True, False, True, False], cells)
    low_yes, low_no, high_yes, high_no = np.array(cells) + 0.5
    slope = (np.log(high_yes / high_no) - np.log(low_yes / low_no)) / 4
    curve = statistics.recovery_curve(x, recovered, np.arange(x.size), num_resamples=50)
    assert curve.slope == pytest.approx(slope, abs=1e-6)
    assert curve.intercept == pytest.approx(np.log(high_yes / high_no) - slope, abs=1e-6)
    np.testing.assert_allclose(
        curve.probability([-3, 1]), [low_yes / (low_yes + low_no), high_yes / (high_yes + high_no)]
    )


@pytest.mark.parametrize("kind", ["overlapping", "separated", "all", "none", "falling"])
def test_fit_maximises_the_penalised_likelihood(kind):
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, 0, 30)
    recovered = {
        "overlapping": rng.random(30) < 1 / (1 + np.exp(-2 * (x + 2))),
        "separated": x > -2,
        "all": x > -9,
        "none": x > 9,
        "falling": x < -1,
    }[kind]
    curve = statistics.recovery_curve(x, recovered, np.arange(30), num_resamples=1)
    best = optimize.minimize(
        lambda c: -penalised_likelihood(c, x + 2, recovered), [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8}
    ).x
    assert curve.slope == pytest.approx(best[1], rel=1e-4, abs=1e-4)
    assert curve.intercept + curve.slope * -2 == pytest.approx(best[0], rel=1e-4, abs=1e-4)


def test_fit_does_not_depend_on_the_unit():
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 20, 3)
    curve = statistics.recovery_curve(x, recovered, cluster, num_resamples=99)
    other = statistics.recovery_curve(1e6 + 1e3 * x, recovered, cluster, num_resamples=99)
    assert other.slope == pytest.approx(curve.slope / 1e3)
    assert (other.critical - 1e6) / 1e3 == pytest.approx(curve.critical, abs=1e-6)
    np.testing.assert_allclose(other.slope_interval, np.array(curve.slope_interval) / 1e3, rtol=1e-5)
    np.testing.assert_allclose((np.array(other.critical_interval) - 1e6) / 1e3, curve.critical_interval, atol=1e-5)


def test_large_sample_finds_the_truth():
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 400, 5, intercept=-1.0, slope=2.0)
    curve = statistics.recovery_curve(x, recovered, cluster, num_resamples=200)
    assert (curve.intercept, curve.slope, curve.critical) == pytest.approx((-1, 2, 0.5), abs=0.2)
    assert curve.critical == pytest.approx(-curve.intercept / curve.slope)
    assert curve.probability(curve.critical) == pytest.approx(0.5)
    assert (curve.runs, curve.clusters) == (2000, 400)


def test_complete_separation_is_finite():
    x = np.linspace(-4, 0, 20)
    curve = statistics.recovery_curve(x, x > -1.5, np.arange(20), num_resamples=200)
    assert -1.9 < curve.critical < -1.1
    assert 1 < curve.slope < 100
    assert np.isfinite([curve.intercept_interval, curve.slope_interval, curve.critical_interval]).all()
    assert curve.critical_interval.low < curve.critical < curve.critical_interval.high


@pytest.mark.parametrize(("recovered", "critical"), [(True, -INF), (False, INF)])
def test_all_or_none_recovered_puts_the_boundary_beyond_the_runs(recovered, critical):
    x = np.linspace(-4, 0, 20)
    curve = statistics.recovery_curve(x, np.full(20, recovered), np.arange(20), num_resamples=200)
    assert curve.critical == critical
    assert np.isnan(curve.critical_interval).all()
    assert np.isfinite([curve.intercept, curve.slope, *curve.slope_interval]).all()
    assert np.all((curve.probability(x) > 0.9) == recovered)


def test_falling_curve_has_no_boundary():
    x = np.linspace(-4, 0, 20)
    curve = statistics.recovery_curve(x, x < -2, np.arange(20), num_resamples=99)
    assert curve.slope < 0
    assert math.isnan(curve.critical)
    assert np.isnan(curve.critical_interval).all()


def test_unbounded_boundary_has_infinite_limits():
    x, recovered = np.linspace(-4, 0, 12), np.zeros(12, bool)
    recovered[-1] = True  # a third of the resamples lack the one run that recovered
    curve = statistics.recovery_curve(x, recovered, np.arange(12), num_resamples=400)
    assert math.isfinite(curve.critical)
    assert math.isfinite(curve.critical_interval.low)
    assert curve.critical_interval.high == INF


def test_flat_curve_is_unbounded_on_the_side_away_from_its_level():
    # Recovery is high and hardly rises: resamples that fall count as a boundary below all runs, never above them.
    x, recovered = np.linspace(-4, 0, 30), np.ones(30, bool)
    recovered[[3, 12, 22]] = False
    curve = statistics.recovery_curve(x, recovered, np.arange(30), num_resamples=400)
    assert np.mean(curve.resamples[:, 1] < 0) > 0.1
    assert curve.critical_interval.low == -INF
    assert curve.critical < curve.critical_interval.high < 0


def test_band_holds_the_curve_in_the_shape_asked_for():
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 30, 4)
    curve = statistics.recovery_curve(x, recovered, cluster)
    grid = np.linspace(-2, 2, 6).reshape(2, 3)
    low, high = curve.band(grid)
    assert low.shape == high.shape == curve.probability(grid).shape == (2, 3)
    assert np.all((low >= 0) & (low < curve.probability(grid)) & (curve.probability(grid) < high) & (high <= 1))
    np.testing.assert_array_equal(curve.band(grid[1, 1]), (low[1, 1], high[1, 1]))


def test_curve_intervals_cover():
    rng = np.random.default_rng(2)
    curves = [statistics.recovery_curve(*logistic_runs(rng, 30, 3, -1.0, 2.0), num_resamples=199) for _ in range(120)]
    for name, truth in (("slope_interval", 2.0), ("intercept_interval", -1.0), ("critical_interval", 0.5)):
        covered = [interval.low <= truth <= interval.high for interval in (getattr(curve, name) for curve in curves)]
        assert 0.87 <= np.mean(covered) <= 0.99, name


def test_separated_runs_on_a_nearly_flat_ridge_are_fitted_in_every_resample():
    x = (np.random.default_rng(0).normal(0, 0.3, 24)[:, None] + 3 * np.log10([1.0, 0.5, 0.25])).ravel()
    x, cluster = np.concatenate([x, x[:6], x]), np.repeat([*range(24), 0, 1, *range(24)], 3)
    recovered = x > np.log10(1 / 3)
    # In one of these resamples the likelihood has a saddle on its way up, from which scoring does not get away.
    curve = statistics.recovery_curve(x, recovered, cluster, num_resamples=399)
    assert np.isfinite(curve.resamples).all()
    counts = np.random.default_rng(0).multinomial(24, np.full(24, 1 / 24), 399)[332][cluster]
    x, recovered = np.repeat(x, counts), np.repeat(recovered, counts)
    best = optimize.minimize(
        lambda c: -penalised_likelihood(c, x + 1, recovered), [-1.0, 20.0], method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 2000},
    ).x  # fmt: skip
    assert curve.resamples[332] == pytest.approx([best[0] + best[1], best[1]], rel=1e-4)


def test_copies_within_clusters_do_not_narrow_the_interval():
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 100, 1)
    width = {}
    for name, copies, labels in (
        ("once", 1, cluster),
        ("clustered", 9, np.repeat(cluster, 9)),
        ("as if independent", 9, np.arange(900)),
    ):
        curve = statistics.recovery_curve(np.repeat(x, copies), np.repeat(recovered, copies), labels)
        width[name] = np.ptp(curve.slope_interval)
    assert width["clustered"] == pytest.approx(width["once"], rel=0.25)
    assert width["as if independent"] == pytest.approx(width["clustered"] / 3, rel=0.25)


def test_one_cluster_has_no_interval():
    x, recovered, _ = logistic_runs(np.random.default_rng(0), 1, 30)
    curve = statistics.recovery_curve(x, recovered, np.zeros(30), num_resamples=9)
    assert math.isfinite(curve.critical)
    assert np.isnan([curve.slope_interval, curve.critical_interval, curve.band(0.0)]).all()


def test_resamples_that_share_one_abscissa_are_left_out():
    curve = statistics.recovery_curve([-1.0, 1.0, 1.0], [False, True, False], [0, 1, 2], num_resamples=200)
    undetermined = np.isnan(curve.resamples).all(axis=1)
    assert 0 < undetermined.sum() < 150
    assert np.isfinite(curve.slope_interval).all()


def test_curve_leaves_failures_out():
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 30, 4)
    curve = statistics.recovery_curve(x, recovered, cluster)
    spoiled = statistics.recovery_curve(
        np.append(x, [NAN, 0.0, 0.0]),
        np.append(recovered, [1.0, NAN, 1.0]),
        np.append(cluster, [7, 7, 99]),
        failed=np.append(np.zeros(x.size, bool), [False, False, True]),
    )
    for field in dataclasses.fields(curve):
        np.testing.assert_array_equal(getattr(spoiled, field.name), getattr(curve, field.name))


def test_curve_does_not_depend_on_how_resamples_are_batched(monkeypatch):
    x, recovered, cluster = logistic_runs(np.random.default_rng(0), 30, 4)
    whole = statistics.recovery_curve(x, recovered, cluster, num_resamples=50)
    monkeypatch.setattr(statistics, "_ELEMENTS_AT_ONCE", 7 * x.size)
    np.testing.assert_allclose(
        statistics.recovery_curve(x, recovered, cluster, num_resamples=50).resamples, whole.resamples, rtol=1e-6
    )


# --- bad input --------------------------------------------------------------------------------------------------------

X, Y, SEEDS = [0.0, 1.0, 2.0], [False, True, True], [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.wilson_interval(5, 4), "count must be a whole number of at least 0 and at most 4; got 5"),
        (lambda: statistics.wilson_interval(-1, 4), "count must be a whole number of at least 0 .* got -1"),
        (lambda: statistics.wilson_interval(1.5, 4), "count must be a whole number .* got 1.5"),
        (
            lambda: statistics.wilson_interval(1, 4, 95),
            "confidence must be a finite number above 0 and below 1; got 95",
        ),
        (lambda: statistics.recovery_rate([0.7, 1.0]), "recovered must hold true and false .* got 0.7"),
        (lambda: statistics.recovery_rate([[True]]), r"recovered must have one dimension, got shape \(1, 1\)"),
        (lambda: statistics.recovery_rate(Y, [False]), r"failed must have the shape of recovered, \(3,\), got \(1,\)"),
        (lambda: statistics.recovery_rate(Y, [0, 2, 0]), "failed must hold true and false .* got 2"),
        (lambda: statistics.recovery_rate(Y, [0, NAN, 0]), "failed must hold true and false .* got nan"),
        (lambda: statistics.mcnemar(Y, [True]), "recovered_a and recovered_b must pair the same seeds, got 3 and 1"),
        (lambda: statistics.mcnemar(Y, Y, confidence=0), "confidence"),
        (lambda: statistics.mcnemar([0.0, 0.0, 2.0], Y), "recovered_a"),
        (lambda: statistics.paired_difference(X, [1.0]), "values_a and values_b must pair the same seeds"),
        (
            lambda: statistics.paired_difference(X, X, num_resamples=0),
            "num_resamples must be a whole number of at least 1; got 0",
        ),
        (lambda: statistics.paired_difference(X, X, confidence=1.0), "confidence"),
        (lambda: statistics.failure_bound(X, [True]), "failed must have the shape of values"),
        (lambda: statistics.summarise([X]), "values must have one dimension"),
        (lambda: statistics.t_interval(X, confidence=-0.1), "confidence"),
        (lambda: statistics.false_discovery([0.5, 1.5]), r"p_values must be NaN or within \[0, 1\], got 1.5"),
        (lambda: statistics.false_discovery([-0.1]), "p_values"),
        (lambda: statistics.false_discovery([0.5], rate=0), "rate must be a finite number above 0 and below 1; got 0"),
        (lambda: statistics.recovery_curve([1.0], Y, SEEDS), r"abscissa must have the shape of recovered, \(3,\)"),
        (lambda: statistics.recovery_curve(X, Y, [0]), "cluster must have the shape of recovered"),
        (lambda: statistics.recovery_curve([-INF, 0.0, 1.0], Y, SEEDS), "abscissa must be finite or NaN"),
        (lambda: statistics.recovery_curve([2.0, 2.0, 2.0], Y, SEEDS), "two distinct values or more, got 1 in 3 runs"),
        (lambda: statistics.recovery_curve(X, Y, SEEDS, failed=[1, 1, 1]), "two distinct values or more, got 0 in 0"),
        (lambda: statistics.recovery_curve(X, Y, SEEDS, num_resamples=2.5), "num_resamples must be a whole number"),
        (lambda: statistics.recovery_curve(X, Y, SEEDS, confidence=2), "confidence"),
    ],
)
def test_bad_input_says_what_was_given_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxkd import metrics, mixture, mixture_rewards
from jaxkd.truth import make_truth

TRUTH = make_truth(target_weight=0.1)
REWARD = mixture_rewards.bump(TRUTH.target.means, height=2.0, width=0.5)
BASE = mixture.make(
    [0.1, 0.12, 0.13, 0.15, 0.1, 0.2, 0.14, 0.06], np.asarray(TRUTH.modes.means.T) * 1.02, np.full((8, 2), 0.03)
)
GRID = metrics.make_grid(TRUTH)
KL_COEF = 0.7


def spread_over(scale, centre=(0.0, 0.0), count=8):
    """A mixture that is one Gaussian of a standard deviation, of as many components as the base."""
    weights = np.zeros(count)
    weights[0] = 1.0
    return mixture.make(weights, np.tile(centre, (count, 1)), np.full((count, 2), scale**2))


POLICIES = {
    "like the base": mixture.make(np.ones(8), np.asarray(BASE.means.T) * 0.98, np.full((8, 2), 0.02)),
    "one wide component": spread_over(0.8),
    "collapsed on the target": spread_over(0.15, (1.0, 1.0)),
}


@partial(jax.jit, static_argnames="draws")
def bench(key, draws=20_000):
    return metrics.make_bench(key, TRUTH, BASE, REWARD, GRID, draws)


BENCH = None


@pytest.fixture(autouse=True)
def the_bench():
    global BENCH
    BENCH = BENCH or bench(jax.random.key(0))
    return BENCH


quadrature = jax.jit(metrics.quadrature)
log_density = jax.jit(mixture.log_density)
monte_carlo = jax.jit(lambda bench, key, policy: metrics.monte_carlo(bench, key, policy, BASE, REWARD, KL_COEF))
evaluate = jax.jit(lambda bench, key, policy: metrics.evaluate(bench, key, policy, BASE, REWARD, KL_COEF))


def on_grid(policy, reference=BASE, kl_coef=KL_COEF):
    values, holds = quadrature(BENCH, policy, reference, kl_coef)
    assert holds
    return values


@pytest.mark.parametrize("name", POLICIES)
def test_quadrature_and_monte_carlo_agree_within_four_standard_errors(name):
    exact = on_grid(POLICIES[name])
    drawn, errors = monte_carlo(BENCH, jax.random.key(1), POLICIES[name])
    assert set(errors) == {
        "reward",
        "objective",
        "precision",
        "recall",
        "target_precision",
        "target_recall",
        "target_mass",
        "bounded_recall",
        "kl_to_base",
        "kl_to_reference",
    }
    for quantity, error in errors.items():
        difference = abs(float(getattr(exact, quantity) - getattr(drawn, quantity)))
        # Bounded recall is an indicator's mean: a coarse grid misplaces its edge, alike at every mode.
        slack = 0.025 if quantity == "bounded_recall" else 2e-4
        assert difference <= 4 * float(error) + slack, quantity
    assert drawn.coverage == exact.coverage
    assert drawn.target_variance == pytest.approx(float(exact.target_variance), rel=0.15)


@pytest.mark.parametrize("name", POLICIES)
def test_bounded_recall_on_a_finer_grid_agrees_with_monte_carlo(name):
    x = metrics.make_grid(TRUTH, points=601, subdivisions=1).x
    log_truth, log_policy = log_density(TRUTH.modes, x), log_density(POLICIES[name], x)
    mass = np.exp(np.asarray(log_truth, np.float64))
    exact = mass[np.asarray(log_policy >= log_truth - np.log(np.float32(10)))].sum() / mass.sum()
    drawn, errors = monte_carlo(BENCH, jax.random.key(1), POLICIES[name])
    assert abs(exact - float(drawn.bounded_recall)) <= 4 * float(errors["bounded_recall"]) + 2e-3


def test_divergences_and_log_densities_of_gaussians_have_their_closed_forms():
    """Two Gaussians, one a policy and one the reference: KL, and the truth replaced by neither."""
    policy, reference = spread_over(0.3, (0.2, 0.1)), spread_over(0.5, (-0.1, 0.0))
    values = on_grid(policy, reference)
    ratio, apart = 0.3**2 / 0.5**2, 0.3**2 + 0.1**2
    assert values.kl_to_reference == pytest.approx(0.5 * (2 * ratio + apart / 0.25 - 2 - 2 * np.log(ratio)), rel=1e-3)
    # E over p_target of a Gaussian's log-density.
    squared = (0.8**2 + 0.9**2 + 2 * 0.025) / 0.09
    assert values.target_recall == pytest.approx(-np.log(2 * np.pi * 0.09) - 0.5 * squared, rel=1e-3)
    squared = (0.8**2 + 0.9**2 + 2 * 0.09) / 0.025
    assert values.target_precision == pytest.approx(-np.log(2 * np.pi * 0.025) - 0.5 * squared, rel=1e-3)
    # E of the bump over a Gaussian is the bump widened by it.
    width = 0.25 + 0.09
    assert values.reward == pytest.approx(2 * 0.25 / width * np.exp(-0.5 * (0.8**2 + 0.9**2) / width), rel=1e-3)
    assert values.objective == pytest.approx(float(values.reward - KL_COEF * values.kl_to_reference), rel=1e-5)


def test_the_reference_and_the_base_are_at_no_distance_from_themselves():
    values = on_grid(BASE)
    assert abs(values.kl_to_base) < 1e-5 and abs(values.kl_to_reference) < 1e-5
    assert values.objective == pytest.approx(float(values.reward), abs=1e-5)


def test_recall_of_the_truth_under_itself_is_its_negative_entropy_and_bounded_recall_is_one():
    values = on_grid(TRUTH.modes)
    entropy, error = jax.jit(mixture.entropy, static_argnums=2)(TRUTH.modes, jax.random.key(0), 100_000)
    assert abs(float(values.recall + entropy)) < 4 * float(error)
    assert values.precision == pytest.approx(float(values.recall), abs=1e-4)
    assert values.bounded_recall == pytest.approx(1, abs=1e-3)
    assert values.coverage == 1
    assert values.target_balance == 1


@pytest.mark.parametrize("weight", [0.01, 0.3])
def test_masses_of_discs_are_those_of_the_chi_square(weight):
    # Modes 6 apart in standard deviations leave nothing of one in another's disc.
    policy = make_truth(target_weight=weight, variance=0.01).modes
    values = on_grid(policy)
    share = stats.chi2.cdf(9 * 0.025 / 0.01, 2)
    assert values.target_mass == pytest.approx(weight * share, rel=2e-3)


@pytest.mark.parametrize("scale", [0.05, 0.1, 0.158, 0.25])
def test_the_mass_of_a_collapsed_policy_is_that_of_the_chi_square(scale):
    values = on_grid(spread_over(scale, (1.0, 1.0)))
    limit = 9 * 0.025 / scale**2
    assert values.target_mass == pytest.approx(stats.chi2.cdf(limit, 2), abs=1e-3)
    # The variance within the disc is that of a truncated Gaussian: χ²(4) over χ²(2) at the same limit.
    inside = scale**2 * stats.chi2.cdf(limit, 4) / stats.chi2.cdf(limit, 2)
    assert values.target_variance == pytest.approx(inside / 0.025, rel=0.03)


def test_a_collapsed_policy_is_precise_and_forgets_and_a_wide_one_the_reverse():
    collapsed, wide, truth = on_grid(spread_over(0.1, (1.0, 1.0))), on_grid(spread_over(0.8)), on_grid(TRUTH.modes)
    assert collapsed.precision > wide.precision + 3
    assert collapsed.recall < wide.recall - 10
    assert collapsed.target_precision > truth.target_precision
    assert collapsed.bounded_recall < 0.2 < wide.bounded_recall
    assert collapsed.coverage == 1 / 8
    assert wide.precision < truth.precision and wide.recall < truth.recall


def test_coverage_counts_the_modes_that_hold_a_tenth_of_their_mass():
    weights = np.array([0.0, 1e-6, 0.005, 0.02, 0.2, 0.2, 0.3, 0.274999])
    policy = mixture.make(weights, np.asarray(TRUTH.modes.means.T), np.full((8, 2), 0.01))
    share = weights * stats.chi2.cdf(9 * 0.025 / 0.01, 2)
    wanted = 0.1 * np.asarray(mixture.weights(TRUTH.modes)) * stats.chi2.cdf(9, 2)
    assert on_grid(policy).coverage == pytest.approx((share >= wanted).mean())
    assert 0 < (share >= wanted).mean() < 1


def test_balance_is_the_smallest_over_the_largest_target():
    truth = make_truth(num_targets=2, target_weight=0.2)
    reward = mixture_rewards.target_density(truth.target)
    make = jax.jit(lambda key, grid: metrics.make_bench(key, truth, truth.modes, reward, grid, 64))
    bench = make(jax.random.key(0), metrics.make_grid(truth, points=61))
    weights = np.where(np.asarray(truth.is_target), 0.0, 0.1)
    weights[np.asarray(truth.is_target)] = [0.3, 0.1]
    policy = mixture.make(weights, np.asarray(truth.modes.means.T), np.full((8, 2), 0.025))
    values, _ = quadrature(bench, policy, policy, 0.0)
    assert values.target_balance == pytest.approx(1 / 3, rel=1e-2)
    np.testing.assert_allclose(values.mode_mass, weights * stats.chi2.cdf(9, 2), rtol=1e-2)
    assert values.target_mass == pytest.approx(0.4 * stats.chi2.cdf(9, 2), rel=1e-2)


def test_a_policy_too_narrow_for_the_grid_is_measured_by_monte_carlo():
    narrow = spread_over(0.005, (0.53, 0.31))
    _, holds = quadrature(BENCH, narrow, BASE, KL_COEF)
    assert not holds
    key = jax.random.key(2)
    values, from_grid = evaluate(BENCH, key, narrow)
    drawn, _ = monte_carlo(BENCH, key, narrow)
    assert not from_grid
    for got, expected in zip(values, drawn, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_policy_beyond_the_grid_is_measured_by_monte_carlo():
    assert not quadrature(BENCH, spread_over(0.3, (9.0, 0.0)), BASE, KL_COEF)[1]


def test_a_policy_that_the_grid_holds_is_measured_by_quadrature():
    policy, key = POLICIES["like the base"], jax.random.key(2)
    values, from_grid = evaluate(BENCH, key, policy)
    assert from_grid
    drawn, _ = monte_carlo(BENCH, key, policy)
    for got, expected in zip(values, on_grid(policy)._replace(bounded_recall=drawn.bounded_recall), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_discs_on_the_grid_have_the_area_of_circles():
    areas = np.asarray((GRID.inside * GRID.cell).sum(axis=1))
    np.testing.assert_allclose(areas, np.pi * 9 * 0.025, rtol=2e-3)


def test_quadrature_is_refused_outside_the_plane_and_monte_carlo_serves_there():
    truth = make_truth(np.eye(3), targets=[0], target_weight=0.2)
    with pytest.raises(ValueError, match="use Monte Carlo"):
        metrics.make_grid(truth)
    reward = mixture_rewards.target_density(truth.target)

    @jax.jit
    def measured(key):
        bench = metrics.make_bench(key, truth, truth.modes, reward, None, 4096)
        return metrics.evaluate(bench, key, truth.modes, truth.modes, reward, 1.0)

    values, from_grid = measured(jax.random.key(0))
    assert not from_grid
    assert values.target_mass == pytest.approx(0.2 * stats.chi2.cdf(9, 3), abs=0.03)
    assert values.coverage == 1


def test_a_target_of_weight_zero_leaves_every_quantity_finite():
    truth = make_truth(target_weight=0)
    bench = jax.jit(lambda key: metrics.make_bench(key, truth, truth.modes, REWARD, GRID, 256))(jax.random.key(0))
    values, holds = quadrature(bench, truth.modes, truth.modes, KL_COEF)
    assert holds
    assert all(np.isfinite(value).all() for value in values), values
    assert values.coverage == 1
    assert values.target_mass < 1e-3


def test_a_policy_that_is_not_a_number_is_not_measured_as_one():
    broken = spread_over(0.3)._replace(means=jnp.full((2, 8), jnp.nan))
    values, from_grid = evaluate(BENCH, jax.random.key(0), broken)
    assert not from_grid
    assert np.isnan(values.reward) and np.isnan(values.recall)

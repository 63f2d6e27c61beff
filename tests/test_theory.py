import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from jaxkd import metrics, mixture, mixture_rewards, theory
from jaxkd.truth import make_truth

TRUTH = make_truth(target_weight=0.03)
GRID = metrics.make_grid(TRUTH)
INSIDE = jnp.where(TRUTH.is_target[:, None], GRID.inside, 0.0).sum(axis=0)
LOG_REFERENCE = mixture.log_density(TRUTH.modes, GRID.x)
DENSITY = mixture_rewards.target_density(TRUTH.target)(GRID.x)
PEAK = 1 / (2 * np.pi * 0.025)
gibbs = jax.jit(theory.gibbs)
half_mass = jax.jit(theory.half_mass_coefficient)
sample = jax.jit(mixture.sample, static_argnums=2)


@pytest.mark.parametrize("kl_coef", [0.1, 1.0, 5.0])
def test_gibbs_of_a_discrete_reference_is_the_closed_form(kl_coef):
    chances, values = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, -1.0, 3.0])
    inside = np.array([0.0, 0.0, 0.0, 1.0])
    weight = chances * np.exp(values / kl_coef)
    weight /= weight.sum()
    kl = (weight * np.log(weight / chances)).sum()
    # The reference's weights need not be normalised.
    got = gibbs(*(jnp.asarray(a, jnp.float32) for a in (np.log(chances) + 7, values, inside)), kl_coef)
    assert got.reward == pytest.approx(weight @ values, rel=1e-4)
    assert got.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert got.target_mass == pytest.approx(weight[3], rel=1e-4)
    assert got.target_log_odds == pytest.approx(np.log(weight[3] / (1 - weight[3])), rel=1e-3, abs=1e-4)
    assert got.objective == pytest.approx(weight @ values - kl_coef * kl, rel=1e-4)
    assert got.objective == pytest.approx(kl_coef * np.log(chances @ np.exp(values / kl_coef)), rel=1e-4)


@pytest.mark.parametrize("kl_coef", [0.5, 1.0, 3.0])
def test_what_a_policy_lacks_to_the_optimum_is_beta_times_its_kl_to_gibbs(kl_coef):
    """J* − J(π) = β·KL(π ‖ π*), for policies that have nothing to do with the optimum."""
    log_reference = np.asarray(LOG_REFERENCE, np.float64)
    values = np.asarray(DENSITY, np.float64)
    log_optimum = log_reference + values / kl_coef
    log_optimum -= np.log((np.exp(log_optimum) * float(GRID.cell)).sum())
    best = float(gibbs(LOG_REFERENCE, DENSITY, INSIDE, kl_coef).objective)
    for weight in (0.001, 0.1, 0.6):
        policy = make_truth(target_weight=weight).modes
        log_policy = np.asarray(mixture.log_density(policy, GRID.x), np.float64)
        mass = np.exp(log_policy) * float(GRID.cell)
        objective = (mass * (values - kl_coef * (log_policy - log_reference))).sum()
        shortfall = kl_coef * (mass * (log_policy - log_optimum)).sum()
        assert best - objective == pytest.approx(shortfall, rel=1e-3, abs=1e-3)
        assert best > objective


def test_gibbs_tends_to_the_reference_and_to_the_best_point():
    mild = gibbs(LOG_REFERENCE, DENSITY, INSIDE, 1e4)
    mass = float((jnp.exp(LOG_REFERENCE) * GRID.cell * INSIDE).sum())
    assert mild.target_mass == pytest.approx(mass, rel=1e-2)
    assert abs(mild.kl) < 1e-3
    strict = gibbs(LOG_REFERENCE, DENSITY, INSIDE, 0.02)
    assert strict.reward == pytest.approx(float(DENSITY.max()), rel=2e-2)
    assert strict.target_mass == pytest.approx(1.0, abs=1e-4)
    assert np.isfinite(strict.target_log_odds) and strict.target_log_odds > 20


@pytest.mark.parametrize("height", [1.0, 6.0])
@pytest.mark.parametrize("weight", [0.003, 0.03, 0.3])
def test_half_mass_coefficient_of_a_two_valued_reward_is_exact(weight, height):
    log_reference = mixture.log_density(make_truth(target_weight=weight).modes, GRID.x)
    reference_mass = jnp.exp(log_reference) * GRID.cell
    mass = (reference_mass * INSIDE).sum() / reference_mass.sum()
    # The disc cuts grid cells: the reward is the share of a cell inside only for a reward of 0 or 1, so ask both of
    # whole cells.
    whole = (INSIDE > 0.5).astype(jnp.float32)
    mass = (reference_mass * whole).sum() / reference_mass.sum()
    got = half_mass(log_reference, height * whole, whole)
    assert got == pytest.approx(height / np.log((1 - float(mass)) / float(mass)), rel=1e-3)
    assert got == pytest.approx(float(theory.two_valued_coefficient(height, mass)), rel=1e-3)


def test_half_mass_coefficient_of_the_target_density_is_the_root_of_its_ratio():
    """E[exp(R/β) | target] = (1 − m)/m with R uniform on (0, peak), and R = 0 elsewhere: β_c = 1.245 at m = 0.03."""
    expected = brentq(lambda beta: np.expm1(PEAK / beta) / (PEAK / beta) - 0.97 / 0.03, 0.3, 10)
    assert expected == pytest.approx(1.245, abs=1e-3)
    assert half_mass(LOG_REFERENCE, DENSITY, INSIDE) == pytest.approx(expected, rel=0.02)
    assert theory.target_density_ratio(PEAK, expected) == pytest.approx(0.97 / 0.03, rel=1e-4)
    assert theory.two_valued_coefficient(PEAK, 0.03) == pytest.approx(1.83, abs=5e-3)


def test_at_the_half_mass_coefficient_gibbs_has_half_its_mass_on_the_target():
    critical = half_mass(LOG_REFERENCE, DENSITY, INSIDE)
    masses = [float(gibbs(LOG_REFERENCE, DENSITY, INSIDE, critical * factor).target_mass) for factor in (0.9, 1, 1.1)]
    assert masses[1] == pytest.approx(0.5, abs=1e-3)
    assert masses[0] > 0.51 and masses[2] < 0.49


def test_half_mass_coefficient_says_where_there_is_none():
    log_reference = jnp.log(jnp.asarray([0.4, 0.6]))
    inside = jnp.asarray([0.0, 1.0])
    assert half_mass(log_reference, inside, inside) == jnp.inf
    assert half_mass(jnp.log(jnp.asarray([0.6, 0.4])), -inside, inside) == 0


def test_target_density_ratio_is_the_mean_over_draws_of_the_target():
    x = sample(TRUTH.target, jax.random.key(0), 200_000)
    tilted = np.exp(np.asarray(mixture_rewards.target_density(TRUTH.target)(x), np.float64) / 3.0)
    error = tilted.std() / np.sqrt(len(tilted))
    assert abs(tilted.mean() - float(theory.target_density_ratio(PEAK, 3.0))) < 4 * error


def test_theory_vmaps_over_coefficients_and_references_in_one_trace():
    coefficients = jnp.asarray([0.3, 1.0, 1.5])
    many = jax.jit(jax.vmap(theory.gibbs, in_axes=(None, None, None, 0)))
    together = many(LOG_REFERENCE, DENSITY, INSIDE, coefficients)
    for i, kl_coef in enumerate((0.3, 1.0, 1.5)):
        assert together.objective[i] == pytest.approx(
            float(gibbs(LOG_REFERENCE, DENSITY, INSIDE, kl_coef).objective), rel=1e-5
        )

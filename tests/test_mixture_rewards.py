import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxkd import mixture, mixture_rewards
from jaxkd.truth import make_truth

TRUTH = make_truth(num_targets=2)
X = np.random.default_rng(0).uniform(-1.6, 1.6, (2, 500)).astype(np.float32)
CENTRES = np.asarray(TRUTH.target.means)
DISTANCE = np.linalg.norm(X[:, None] - CENTRES[:, :, None], axis=0)


def test_target_density_and_its_logarithm_agree_with_scipy():
    expected = sum(0.5 * stats.multivariate_normal(c, 0.025 * np.eye(2)).pdf(X.T) for c in CENTRES.T)
    np.testing.assert_allclose(mixture_rewards.target_density(TRUTH.target)(X), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mixture_rewards.log_density(TRUTH.target)(X), np.log(expected), rtol=1e-4)


def test_target_density_of_one_target_peaks_where_the_papers_say():
    peak = mixture_rewards.target_density(make_truth().target)(jnp.asarray([[1.0], [1.0]]))
    assert peak[0] == pytest.approx(1 / (2 * np.pi * 0.025), rel=1e-4)


def test_bump_is_a_hill_around_the_nearest_centre():
    expected = 2 * np.exp(-0.5 * (DISTANCE.min(axis=0) / 0.4) ** 2)
    np.testing.assert_allclose(mixture_rewards.bump(CENTRES, 2.0, 0.4)(X), expected, rtol=1e-4)


def test_disc_is_the_height_inside_and_zero_outside():
    values = np.asarray(mixture_rewards.disc(TRUTH.target, 3.0, 2.0)(X))
    np.testing.assert_array_equal(values, 3.0 * (DISTANCE.min(axis=0) < 2.0 * np.sqrt(0.025)))
    assert values.any() and not values.all()


def test_disc_ignores_a_component_that_is_off():
    target = mixture.make([1.0, 0.0], [[1, 1], [-1, -1]], np.full((2, 2), 0.025))
    np.testing.assert_array_equal(mixture_rewards.disc(target)(jnp.asarray([[1.0, -1.0], [1.0, -1.0]])), [1.0, 0.0])


def test_a_density_averages_half_its_peak_under_its_own_draws():
    target = make_truth().target
    mean = mixture_rewards.target_density(target)(mixture.sample(target, jax.random.key(0), 65536)).mean()
    assert mean == pytest.approx(0.5 / (2 * np.pi * 0.025), rel=0.02)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: mixture_rewards.bump(CENTRES, height=v),
        lambda v: mixture_rewards.bump(CENTRES, width=v),
        lambda v: mixture_rewards.disc(TRUTH.target, height=v),
        lambda v: mixture_rewards.disc(TRUTH.target, radius=v),
    ],
)
def test_rewards_refuse_sizes_that_are_not_positive(make, value):
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        make(value)

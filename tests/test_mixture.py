import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from jaxkd import mixture
from jaxkd.mixture import INACTIVE_LOGIT, Mixture

RNG = np.random.default_rng(0)


def random_parts(dim, count, diagonal=False, seed=0):
    """Plain weights, means and covariances."""
    generator = np.random.default_rng([seed, dim, count])
    factors = 0.4 * generator.normal(size=(count, dim, dim)) + 0.5 * np.eye(dim)
    covariances = factors @ factors.transpose(0, 2, 1) + 0.05 * np.eye(dim)
    if diagonal:
        covariances = np.einsum("kdd->kd", covariances)
    return generator.dirichlet(np.full(count, 3.0)), 2 * generator.normal(size=(count, dim)), covariances


def scipy_log_density(parts, x):
    """Log-density in double precision; `x: [dim, n]`."""
    terms = [
        np.log(w) + stats.multivariate_normal(m, np.diag(c) if c.ndim == 1 else c).logpdf(x.T)
        for w, m, c in zip(*parts, strict=True)
        if w > 0
    ]
    return np.logaddexp.reduce(terms)


def draws_of(parts, n, seed=0):
    """Draws by numpy, [dim, n]."""
    weights, means, covariances = parts
    generator = np.random.default_rng([1, seed])
    full = covariances if covariances.ndim == 3 else covariances[:, :, None] * np.eye(means.shape[1])
    chosen = generator.choice(len(weights), size=n, p=weights)
    factors = np.linalg.cholesky(full)
    noise = generator.normal(size=(n, means.shape[1]))
    return (means[chosen] + np.einsum("nde,ne->nd", factors[chosen], noise)).T.astype(np.float32)


CASES = [(1, 3, False), (2, 4, False), (2, 4, True), (3, 3, False), (3, 3, True)]
log_density = jax.jit(mixture.log_density)
sample = jax.jit(mixture.sample, static_argnums=2)


# --- making ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        ([1.0], [[0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0]], "do not fit"),
        ([], np.zeros((0, 2)), np.zeros((0, 2)), "do not fit"),
        ([[1.0]], [[0.0]], [[1.0]], "do not fit"),
        ([1.0], [[np.nan]], [[1.0]], "means must be finite"),
        ([np.inf], [[0.0]], [[1.0]], "weights must be finite"),
        ([1.0], [[0.0]], [[np.nan]], "covariances must be finite"),
        ([1.5, -0.5], [[0.0], [1.0]], [[1.0], [1.0]], "0 or more"),
        ([0.0, 0.0], [[0.0], [1.0]], [[1.0], [1.0]], "positive sum"),
        ([1.0], [[0.0, 0.0]], [[1.0, 0.0]], "must be positive"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive definite"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.9], [0.0, 1.0]]], "symmetric, got .*0.9"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.1], [0.1001, 1.0]]], "symmetric"),
        ([1.0], [[0.0, 0.0]], [[1.0, 1.0, 1.0]], "got shape"),
    ],
)
def test_make_refuses_bad_input_and_says_why(weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        mixture.make(weights, means, covariances)


@pytest.mark.parametrize(("dim", "count", "diagonal"), CASES)
def test_make_keeps_weights_and_covariances(dim, count, diagonal):
    weights, means, covariances = random_parts(dim, count, diagonal)
    made = mixture.make(7 * weights, means, covariances)
    full = covariances[:, :, None] * np.eye(dim) if diagonal else covariances
    np.testing.assert_allclose(mixture.weights(made), weights, rtol=1e-5)
    np.testing.assert_allclose(mixture.covariances(made), full.transpose(1, 2, 0), rtol=1e-4, atol=1e-5)
    assert (made.dim, made.num_components) == (dim, count)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0])
def test_sharpening_raises_weights_to_one_over_temperature(temperature):
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    made = mixture.make(weights, np.zeros((4, 2)), np.ones((4, 2)))
    expected = weights ** (1 / temperature) / (weights ** (1 / temperature)).sum()
    sharpened = mixture.sharpen(made, temperature)
    np.testing.assert_allclose(mixture.weights(sharpened), expected, rtol=2e-5)
    np.testing.assert_allclose(mixture.weights(made, temperature), expected, rtol=2e-5)
    assert mixture.weights(sharpened)[3] == 0 and sharpened.logits[3] == INACTIVE_LOGIT


# --- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "count", "diagonal"), CASES)
def test_log_density_agrees_with_scipy(dim, count, diagonal):
    parts = random_parts(dim, count, diagonal)
    x = draws_of(parts, 200)
    np.testing.assert_allclose(log_density(mixture.make(*parts), x), scipy_log_density(parts, x), rtol=1e-4, atol=1e-4)


def test_padding_components_does_not_change_the_density():
    parts = random_parts(2, 3)
    x = draws_of(parts, 50)
    padded = (
        np.append(parts[0], [0, 0]),
        np.concatenate([parts[1], np.full((2, 2), 0.1)]),
        np.concatenate([parts[2], 2 * [np.eye(2)]]),
    )
    np.testing.assert_array_equal(log_density(mixture.make(*padded), x), log_density(mixture.make(*parts), x))


def test_far_away_the_log_density_is_minus_infinity_and_a_bad_parameter_is_nan():
    two = mixture.make([0.5, 0.5], [[0.0, 0.0], [1.0, 0.0]], np.ones((2, 2)))
    x = jnp.asarray([[1e25, 0.0], [0.0, 0.0]], jnp.float32)
    far, near = mixture.log_density(two, x)
    assert far == -jnp.inf and jnp.isfinite(near)
    for component in range(2):
        broken = two._replace(means=two.means.at[0, component].set(jnp.nan))
        assert jnp.isnan(mixture.log_density(broken, x[:, 1:])).all()


def test_mahalanobis_agrees_with_scipy():
    _, means, covariances = parts = random_parts(3, 2)
    x = draws_of(parts, 20)
    residual = x.T[None] - means[:, None]
    expected = np.sqrt(np.einsum("knd,kde,kne->kn", residual, np.linalg.inv(covariances), residual))
    np.testing.assert_allclose(jax.jit(mixture.mahalanobis)(mixture.make(*parts), x), expected, rtol=1e-3)


@pytest.mark.parametrize(("dim", "count", "diagonal"), CASES)
def test_gradient_of_log_density_agrees_with_automatic_differentiation(dim, count, diagonal):
    parts = random_parts(dim, count, diagonal)
    made, x = mixture.make(*parts), jnp.asarray(draws_of(parts, 60))
    cotangent = jnp.asarray(RNG.normal(size=60).astype(np.float32))

    def plain(m, x):
        return (jax.nn.logsumexp(mixture.component_log_densities(m, x), axis=0) * cotangent).sum()

    ours = jax.jit(jax.grad(lambda m, x: (mixture.log_density(m, x) * cotangent).sum(), argnums=(0, 1)))(made, x)
    theirs = jax.jit(jax.grad(plain, argnums=(0, 1)))(made, x)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gradient_of_log_density_agrees_with_finite_differences(diagonal):
    """Differences are taken of scipy's density, so they share no code with ours."""
    weights, means, covariances = random_parts(2, 2, diagonal)
    made = mixture.make(weights, means, covariances)
    x = draws_of((weights, means, covariances), 5)
    differentiate = jax.jit(jax.grad(lambda m, x: mixture.log_density(m, x).sum(), argnums=(0, 1)))
    gradient, of_x = differentiate(made, jnp.asarray(x))
    step = 1e-4

    def mean_log_density(leaf, index, shift):
        leaves = {name: np.array(value, np.float64) for name, value in made._asdict().items()}
        leaves[leaf][index] += shift
        w = np.exp(leaves["logits"]) / np.exp(leaves["logits"]).sum()
        factor = np.zeros((2, 2, 2))
        for d in range(2):
            factor[:, d, d] = np.exp(leaves["log_scales"][d])
        if not diagonal:
            factor[:, 1, 0] = leaves["off_diagonals"][0]
        return scipy_log_density((w, leaves["means"].T, factor @ factor.transpose(0, 2, 1)), x).sum()

    for leaf, values in gradient._asdict().items():
        for index in np.ndindex(*values.shape):
            slope = (mean_log_density(leaf, index, step) - mean_log_density(leaf, index, -step)) / (2 * step)
            assert values[index] == pytest.approx(slope, rel=2e-3, abs=2e-3), (leaf, index)
    for index in np.ndindex(*x.shape):
        shift = np.zeros(x.shape)
        shift[index] = step
        ends = [scipy_log_density((weights, means, covariances), x + sign * shift).sum() for sign in (1, -1)]
        assert of_x[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3, abs=2e-3)


def test_gradient_is_finite_with_inactive_components_and_leaves_them_alone():
    made = mixture.make([0.6, 0.4, 0.0], [[0, 0], [1, 0], [9, 9]], np.ones((3, 2)) * 0.1)
    gradient = jax.jit(jax.grad(lambda m: mixture.log_density(m, jnp.zeros((2, 3))).sum()))(made)
    for leaf in gradient:
        assert np.isfinite(leaf).all()
        assert not leaf[..., 2].any()


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "count", "diagonal"), [(2, 4, False), (3, 3, False), (3, 3, True)])
def test_draws_have_the_mean_and_covariance_of_the_mixture(dim, count, diagonal):
    weights, means, covariances = parts = random_parts(dim, count, diagonal)
    full = covariances[:, :, None] * np.eye(dim) if diagonal else covariances
    n = 200_000
    x = np.asarray(sample(mixture.make(*parts), jax.random.key(0), n), np.float64)
    mean = weights @ means
    apart = means - mean
    covariance = np.einsum("k,kde->de", weights, full) + np.einsum("k,kd,ke->de", weights, apart, apart)
    scale = np.sqrt(np.diag(covariance))
    assert (np.abs(x.mean(axis=1) - mean) < 5 * scale / np.sqrt(n)).all()
    residual = x - mean[:, None]
    products = residual[:, None] * residual[None]
    assert (np.abs(products.mean(axis=-1) - covariance) < 5 * products.std(axis=-1) / np.sqrt(n)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_components_are_drawn_with_their_weights_at_a_temperature(temperature):
    weights = np.array([0.45, 0.05, 0.3, 0.2])
    made = mixture.make(weights, 10 * np.arange(4)[:, None] * np.ones(2), np.ones((4, 2)))
    x = np.asarray(sample(made, jax.random.key(1), 20_000, temperature))
    counts = np.bincount(np.clip(np.round(x[0] / 10), 0, 3).astype(int), minlength=4)
    expected = weights ** (1 / temperature) / (weights ** (1 / temperature)).sum()
    assert stats.chisquare(counts, 20_000 * expected).pvalue > 1e-3


def test_coordinates_of_draws_pass_a_kolmogorov_smirnov_test_and_are_independent():
    x = np.asarray(sample(mixture.make([1.0], [[0.5, -1.0]], [[4.0, 0.25]]), jax.random.key(2), 20_000))
    first, second = (x[0] - 0.5) / 2, (x[1] + 1) / 0.5
    assert stats.kstest(first, "norm").pvalue > 1e-3
    assert stats.kstest(second, "norm").pvalue > 1e-3
    assert stats.pearsonr(first, second).pvalue > 1e-3
    assert stats.pearsonr(first**2, second**2).pvalue > 1e-3


def test_padding_components_changes_no_draw():
    parts = random_parts(2, 3)
    padded = (
        np.append(parts[0], [0, 0]),
        np.concatenate([parts[1], np.full((2, 2), 50.0)]),
        np.concatenate([parts[2], 2 * [np.eye(2)]]),
    )
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        sample(mixture.make(*padded), key, 4096, 0.7), sample(mixture.make(*parts), key, 4096, 0.7)
    )


@pytest.mark.parametrize("active", [0, 1, 3])
def test_a_component_that_is_off_is_never_drawn_wherever_it_stands(active):
    weights = np.zeros(4)
    weights[active] = 1.0
    made = mixture.make(weights, 10 * np.arange(4)[:, None] * np.ones(2), 0.01 * np.ones((4, 2)))
    x = sample(made, jax.random.key(4), 10_000)
    assert (np.abs(np.asarray(x) - 10 * active) < 1).all()


def test_draws_carry_no_gradient():
    made = mixture.make(*random_parts(2, 3))
    gradient = jax.jit(jax.grad(lambda m: mixture.sample(m, jax.random.key(0), 8).sum()))(made)
    assert all(not leaf.any() for leaf in gradient)


def test_entropy_of_one_component_is_that_of_the_gaussian():
    covariance = np.array([[1.0, 0.5], [0.5, 2.0]])
    value, error = jax.jit(mixture.entropy)(mixture.make([1.0], [[0, 0]], covariance[None]), jax.random.key(0))
    assert abs(value - stats.multivariate_normal(cov=covariance).entropy()) < 4 * error


def test_mass_per_mode_is_weight_times_the_chi_square_share():
    modes = mixture.make([0.7, 0.3], [[-9, 0], [9, 0]], np.ones((2, 2)))
    mass = mixture.mass_per_mode(modes, modes, jax.random.key(0), n=20_000, radius=2.0)
    expected = np.array([0.7, 0.3]) * stats.chi2.cdf(4.0, 2)
    assert (np.abs(np.asarray(mass) - expected) < 4 * np.sqrt(0.25 / 20_000)).all()


# --- EM --------------------------------------------------------------------------------------------------------------


def scikit_learn(x, weights, means, covariances, iterations, floor, kind):
    """Scikit-learn's EM from a given start, run for exactly as many iterations."""
    precisions = 1 / covariances if kind == "diag" else np.linalg.inv(covariances)
    model = GaussianMixture(
        len(weights),
        covariance_type=kind,
        tol=0.0,
        max_iter=iterations,
        reg_covar=floor,
        weights_init=weights,
        means_init=means,
        precisions_init=precisions,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x.T.astype(np.float64))


em = jax.jit(mixture.em, static_argnums=2)


@pytest.mark.parametrize(("dim", "count"), [(2, 4), (3, 3)])
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_em_agrees_with_scikit_learn_from_the_same_start(dim, count, kind):
    x = draws_of(random_parts(dim, count), 600)
    start = random_parts(dim, count, diagonal=kind == "diag", seed=5)
    theirs = scikit_learn(x, *start, 40, 1e-3, kind)
    ours = em(mixture.make(*start), x, 40, 1e-3)
    assert ours.log_likelihood == pytest.approx(theirs.score(x.T), abs=1e-4)
    np.testing.assert_allclose(mixture.weights(ours.mixture), theirs.weights_, atol=2e-3)
    np.testing.assert_allclose(ours.mixture.means.T, theirs.means_, atol=2e-2)
    expected = np.stack([np.diag(c) for c in theirs.covariances_]) if kind == "diag" else theirs.covariances_
    np.testing.assert_allclose(mixture.covariances(ours.mixture).transpose(2, 0, 1), expected, atol=3e-2)


def test_one_iteration_of_em_agrees_with_scikit_learn_closely():
    x = draws_of(random_parts(2, 4), 600)
    start = random_parts(2, 4, seed=6)
    theirs, ours = scikit_learn(x, *start, 1, 1e-3, "full"), em(mixture.make(*start), x, 1, 1e-3).mixture
    np.testing.assert_allclose(mixture.weights(ours), theirs.weights_, atol=1e-5)
    np.testing.assert_allclose(ours.means.T, theirs.means_, atol=1e-4)
    np.testing.assert_allclose(mixture.covariances(ours).transpose(2, 0, 1), theirs.covariances_, atol=1e-4)


def test_em_never_lowers_the_likelihood():
    x = draws_of(random_parts(2, 4), 400)
    state = mixture.make(*random_parts(2, 4, seed=7))
    previous = log_density(state, x).mean()
    for _ in range(15):
        fit = em(state, x, 1, 0.0)
        assert fit.log_likelihood >= previous - 1e-5
        state, previous = fit.mixture, fit.log_likelihood


TRACES = []


@partial(jax.jit, static_argnames=("num_components", "diagonal"))
def fit(key, x, num_components, capacity=None, diagonal=False):
    TRACES.append(num_components)
    return mixture.fit(
        key, x, num_components, capacity, starts=3, iterations=30, diagonal=diagonal, covariance_floor=1e-4
    )


RING = (
    np.full(8, 1 / 8),
    np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)], float),
    np.full((8, 2), 0.025),
)


@pytest.mark.parametrize(
    ("capacity", "diagonal"),
    [(3, False), pytest.param(1, True, marks=pytest.mark.slow)],
)
def test_a_capacity_mask_is_truly_a_smaller_mixture(capacity, diagonal):
    x = draws_of(RING, 512)
    masked = fit(jax.random.key(0), x, 8, jnp.int32(capacity), diagonal)
    smaller = fit(jax.random.key(0), x, capacity, None, diagonal)
    assert masked.log_likelihood == pytest.approx(float(smaller.log_likelihood), abs=2e-4)
    assert (mixture.weights(masked.mixture)[capacity:] == 0).all()
    assert (masked.mixture.logits[capacity:] == INACTIVE_LOGIT).all()
    assert np.isfinite(jax.tree.leaves(masked)[1]).all()
    np.testing.assert_allclose(mixture.weights(masked.mixture)[:capacity], mixture.weights(smaller.mixture), atol=2e-3)
    np.testing.assert_allclose(masked.mixture.means[:, :capacity], smaller.mixture.means, atol=1e-2)


def test_one_component_is_the_mean_and_covariance_of_the_data():
    x = draws_of(random_parts(2, 3), 512)
    only = fit(jax.random.key(0), x, 1).mixture
    np.testing.assert_allclose(only.means[:, 0], x.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(mixture.covariances(only)[..., 0], np.cov(x, bias=True) + 1e-4 * np.eye(2), rtol=1e-3)


@pytest.mark.slow
def test_fit_recovers_the_ring_and_beats_its_truth_in_sample():
    x = draws_of(RING, 512)
    best = jax.jit(partial(mixture.fit, num_components=8, starts=10, iterations=40, covariance_floor=1e-4))(
        jax.random.key(0), x
    )
    assert best.log_likelihood >= scipy_log_density(RING, x).mean()
    nearest = np.linalg.norm(np.asarray(best.mixture.means.T)[:, None] - RING[1][None], axis=-1).min(axis=0)
    assert (nearest < 0.15).all()


@pytest.mark.slow
def test_fit_keeps_the_best_start():
    x, key = draws_of(RING, 256), jax.random.key(1)
    best = jax.jit(partial(mixture.fit, num_components=5, starts=4, iterations=20))(key, x)
    run = jax.jit(lambda key: mixture.em(mixture.seeded_start(key, x, 5), x, 20).log_likelihood)
    each = [float(run(jax.random.fold_in(key, i))) for i in range(4)]
    assert max(each) - min(each) > 1e-3
    assert best.log_likelihood == pytest.approx(max(each), abs=1e-4)


@pytest.mark.slow
def test_fit_vmaps_over_keys_and_capacities_in_one_trace():
    x = draws_of(RING, 256)
    keys = jax.random.split(jax.random.key(0), 4)
    TRACES.clear()
    many = jax.jit(jax.vmap(lambda key, capacity: fit(key, x, 6, capacity)))
    first = many(keys, jnp.array([1, 2, 4, 6]))
    many(keys, jnp.array([6, 5, 3, 2]))
    assert len(TRACES) == 1
    assert (mixture.is_active(first.mixture).sum(axis=1) == np.array([1, 2, 4, 6])).all()
    assert np.isfinite(first.log_likelihood).all()
    alone = fit(keys[2], x, 6, jnp.int32(4))
    assert first.log_likelihood[2] == pytest.approx(float(alone.log_likelihood), abs=1e-4)


@pytest.mark.parametrize("dim", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "data",
    [
        lambda dim: np.zeros((dim, 64)),
        lambda dim: np.repeat(np.eye(dim), 32, axis=1),
        lambda dim: np.concatenate([np.zeros((dim, 63)), np.full((dim, 1), 100.0)], axis=1),
        lambda dim: np.tile(np.linspace(0, 1, 64), (dim, 1)),
    ],
    ids=["one point", "few distinct points", "an outlier", "on a line"],
)
def test_degenerate_data_give_no_nan(dim, data):
    result = fit(jax.random.key(0), data(dim).astype(np.float32), 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_an_empty_component_keeps_its_place_and_gives_no_nan():
    x = draws_of(([1.0], np.zeros((1, 2)), np.eye(2)[None]), 256)
    start = mixture.make([0.5, 0.5], [[0, 0], [60, 60]], np.ones((2, 2)) * 0.1)
    result = em(start, x, 10, 1e-4).mixture
    assert all(np.isfinite(leaf).all() for leaf in result)
    np.testing.assert_array_equal(result.means[:, 1], [60, 60])
    assert mixture.weights(result)[1] < 1e-6


def test_the_seeds_of_a_smaller_mixture_are_the_first_of_a_larger_one():
    x, key = jnp.asarray(draws_of(RING, 128)), jax.random.key(0)
    seeds = jax.jit(mixture.kmeans_plus_plus, static_argnums=2)
    larger, smaller = seeds(key, x, 6), seeds(key, x, 3)
    np.testing.assert_array_equal(larger[:, :3], smaller)
    assert all((np.asarray(x) == np.asarray(seed)[:, None]).all(axis=0).any() for seed in larger.T)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_components": 0}, "num_components"),
        ({"num_components": 2, "starts": 0}, "starts"),
        ({"num_components": 2, "iterations": 0}, "iterations"),
        ({"num_components": 2, "capacity": 3}, "capacity must lie between 1 and num_components = 2"),
        ({"num_components": 2, "capacity": 0}, "capacity"),
    ],
)
def test_fit_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture.fit(jax.random.key(0), jnp.zeros((2, 8)), **arguments)


def test_fit_refuses_data_of_one_axis():
    with pytest.raises(ValueError, match=r"\[dim, n\]"):
        mixture.fit(jax.random.key(0), jnp.zeros(8), 2)


def test_the_policy_is_the_density_with_one_step():
    made: Mixture = mixture.make(*random_parts(2, 3))
    x = jnp.asarray(draws_of(random_parts(2, 3), 10))
    assert mixture.policy.is_density
    assert mixture.policy.log_prob(made, x).shape == (10, 1)
    np.testing.assert_array_equal(mixture.policy.sequence_log_prob(made, x), mixture.log_density(made, x))
    np.testing.assert_array_equal(mixture.policy.num_steps(x), np.ones(10))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxkd import mixture
from jaxkd.truth import discs, make_truth, misses_a_mode, on_target, with_target_weight

sample = jax.jit(mixture.sample, static_argnums=2)


def test_the_ring_is_the_papers():
    truth = make_truth()
    means = {tuple(mean) for mean in np.asarray(truth.modes.means.T).tolist()}
    assert means == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)} - {(0, 0)}
    np.testing.assert_allclose(mixture.covariances(truth.modes), 0.025 * np.eye(2)[..., None] * np.ones(8), rtol=1e-5)


@pytest.mark.parametrize("targets", ["corner", "edge", [2], [0, 5]])
@pytest.mark.parametrize("num_targets", [1, 2])
@pytest.mark.parametrize("weight", [0.001, 0.03, 0.5])
def test_targets_share_the_target_weight_and_the_others_the_rest(targets, num_targets, weight):
    truth = make_truth(targets=targets, num_targets=num_targets, target_weight=weight)
    count = num_targets if isinstance(targets, str) else len(targets)
    weights, is_target = np.asarray(mixture.weights(truth.modes)), np.asarray(truth.is_target)
    assert is_target.sum() == count
    np.testing.assert_allclose(weights[is_target], weight / count, rtol=1e-5)
    np.testing.assert_allclose(weights[~is_target], (1 - weight) / (8 - count), rtol=1e-5)
    np.testing.assert_array_equal(truth.target.means, np.asarray(truth.modes.means)[:, is_target])
    np.testing.assert_allclose(mixture.weights(truth.target), 1 / count, rtol=1e-6)


@pytest.mark.parametrize(("targets", "radius"), [("corner", np.sqrt(2)), ("edge", 1.0)])
def test_named_targets_stand_where_they_say(targets, radius):
    means = np.asarray(make_truth(targets=targets, num_targets=2).target.means)
    np.testing.assert_allclose(np.linalg.norm(means, axis=0), radius, rtol=1e-6)
    np.testing.assert_allclose(means.sum(axis=1), 0, atol=1e-6)


def test_a_target_of_weight_zero_is_never_drawn():
    truth = make_truth(target_weight=0)
    weights = np.asarray(mixture.weights(truth.modes))
    assert weights[np.asarray(truth.is_target)] == 0
    x = sample(truth.modes, jax.random.key(0), 10_000)
    # The neighbours' tails reach into the disc, one draw in some thousands.
    assert np.isfinite(x).all() and on_target(truth, x).mean() < 1e-3
    assert np.isfinite(mixture.log_density(truth.modes, x)).all()


def test_the_target_weight_may_be_traced():
    truth, traces = make_truth(), []

    @jax.jit
    def weights(weight):
        traces.append(weight)
        return mixture.weights(with_target_weight(truth, weight).modes)

    for weight in (0.0, 0.01, 0.4):
        np.testing.assert_allclose(
            weights(jnp.float32(weight)), mixture.weights(make_truth(target_weight=weight).modes), rtol=1e-5
        )
    assert len(traces) == 1


@pytest.mark.parametrize("num_modes", [4, 9, 25])
def test_a_grid_is_centred_with_spacing_one(num_modes):
    means = np.asarray(make_truth("grid", targets=[0], num_modes=num_modes).modes.means)
    assert means.shape == (2, num_modes)
    np.testing.assert_allclose(means.mean(axis=1), 0, atol=1e-6)
    distances = np.linalg.norm(means[:, :, None] - means[:, None], axis=0)
    np.testing.assert_allclose(distances[distances > 0].min(), 1, rtol=1e-6)


def test_a_random_layout_is_reproducible_and_keeps_modes_apart():
    first, again, other = (
        np.asarray(make_truth("random", targets=[0], num_modes=6, seed=s).modes.means) for s in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    distances = np.linalg.norm(first[:, :, None] - first[:, None], axis=0)
    assert distances[distances > 0].min() >= 6 * np.sqrt(0.025) - 1e-6


@pytest.mark.parametrize("dim", [2, 3])
def test_a_draw_of_a_mode_lies_in_its_disc_as_often_as_the_chi_square_says(dim):
    truth = make_truth(5 * np.eye(3)[:, :dim] + 0.0, targets=[0], target_weight=0.3)
    x = sample(truth.modes, jax.random.key(0), 20_000)
    share = stats.chi2.cdf(9, dim)
    assert abs(float(discs(truth, x).any(axis=0).mean()) - share) < 4 * np.sqrt(share * (1 - share) / 20_000)
    assert abs(float(on_target(truth, x).mean()) - 0.3 * share) < 4 * np.sqrt(0.3 * 0.7 / 20_000)


def test_targets_may_be_neighbours_while_their_discs_are_apart():
    truth = make_truth(targets=[6, 7], variance=0.0277)
    x = jnp.stack([jnp.full(2001, 1.0), jnp.linspace(-0.6, 1.6, 2001)])
    assert discs(truth, x)[6:].sum(axis=0).max() == 1


@pytest.mark.parametrize("distance", [2.9, 3.1])
def test_the_disc_ends_at_three_standard_deviations(distance):
    truth = make_truth(variance=0.04)
    x = jnp.asarray([[1 + 0.2 * distance], [1.0]], jnp.float32)
    assert bool(on_target(truth, x)[0]) == (distance < 3)


def test_a_bridge_between_modes_is_on_no_target():
    assert not on_target(make_truth(), jnp.asarray([[1.0], [0.5]]))[0]


TARGET, BESIDE = 7, 4
"""Indices of the ring's modes at (1, 1) and (0, 1)."""


def fitted(truth, *pairs):
    """p* with means a little off its modes; of each pair only the first is there, with the moments of both."""
    means, weights = np.asarray(truth.modes.means.T, np.float64) + 0.1, np.array(mixture.weights(truth.modes))
    covariances = np.full((8, 2), 0.025)
    for kept, lost in pairs:
        shares = weights[[kept, lost]] / weights[[kept, lost]].sum()
        covariances[kept] += shares.prod() * (means[kept] - means[lost]) ** 2
        means[kept] = shares @ means[[kept, lost]]
        weights[kept] += weights[lost]
        # Off, with its mean still on the mode.
        weights[lost] = 0.0
    return mixture.make(weights, means, covariances)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_model_with_a_mean_on_every_mode_misses_none(num_targets):
    truth = make_truth(num_targets=num_targets)
    model = fitted(truth)
    assert not misses_a_mode(truth, model)
    moved = model._replace(means=model.means.at[:, 2].add(3 * np.sqrt(0.025)))
    assert misses_a_mode(truth, moved)
    assert misses_a_mode(truth, model._replace(means=jnp.full_like(model.means, jnp.nan)))


@pytest.mark.parametrize("pair", [(BESIDE, TARGET), (1, 0), (3, 5)])
def test_a_model_that_merges_two_modes_is_told_from_one_that_covers_them(pair):
    truth = make_truth(num_targets=2)
    merged = fitted(truth, pair)
    assert misses_a_mode(truth, merged)
    x = sample(merged, jax.random.key(0), 50_000)
    shares = np.asarray(discs(truth, x).mean(axis=1)) / np.asarray(mixture.weights(truth.modes))
    # Coverage, which asks for a tenth of a mode's mass in its disc, sees nothing.
    assert (shares > 0.1 * stats.chi2.cdf(9, 2)).all()


def test_components_that_are_off_never_stand_for_a_mode():
    truth = make_truth()
    model = fitted(truth)
    for k in range(8):
        assert misses_a_mode(truth, model._replace(logits=model.logits.at[k].set(mixture.INACTIVE_LOGIT)))
    padded = mixture.make([*np.ones(8), 0.0], [*np.asarray(model.means.T), [1, 1]], np.full((9, 2), 0.025))
    assert not misses_a_mode(truth, padded)


def test_a_mode_without_weight_cannot_be_missed():
    model = fitted(make_truth(), (BESIDE, TARGET))
    # The merged mean lies 0.18 from the neighbour's, within its disc.
    assert misses_a_mode(make_truth(), model) and not misses_a_mode(make_truth(target_weight=0), model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_weight": -0.1}, "target_weight"),
        ({"target_weight": float("nan")}, "target_weight"),
        ({"target_weight": float("inf")}, "target_weight"),
        ({"target_weight": 1.0}, "target_weight"),
        ({"target_weight": 1.5}, "target_weight"),
        ({"variance": 0.0}, "variance"),
        ({"variance": -1.0}, "variance"),
        ({"variance": float("nan")}, "variance"),
        ({"layout": "circle"}, "layout must be"),
        ({"layout": [1.0, 2.0]}, "layout"),
        ({"layout": [[0.0, np.nan], [1.0, 1.0]], "targets": [0]}, "finite"),
        ({"layout": [[0.0, 0.0]], "targets": [0]}, "2 modes or more"),
        ({"targets": "middle"}, "'corner', 'edge'"),
        ({"num_targets": 0}, "num_targets"),
        ({"num_targets": 3}, "num_targets"),
        ({"targets": []}, "at least one"),
        ({"targets": [1, 1]}, "distinct"),
        ({"targets": [8]}, "below 8"),
        ({"targets": [-1]}, "below 8"),
        ({"targets": list(range(8))}, "must not be a target"),
        ({"layout": "grid", "num_modes": 9}, "of the ring"),
        ({"layout": "grid", "targets": [0], "num_modes": 8}, "square number"),
        ({"layout": "grid", "targets": [0], "num_modes": 1}, "square number"),
        ({"layout": "random", "targets": [0], "num_modes": 1}, "at least 2"),
        ({"layout": "random", "targets": [0], "num_modes": 200}, "do not fit"),
        ({"targets": [6, 7], "variance": 0.03}, r"targets 6 and 7 are 1 apart, nearer than 6 .*\(1.03923\)"),
        ({"targets": [0, 7, 4], "variance": 0.03}, "targets 7 and 4"),
    ],
)
def test_make_truth_refuses_bad_input_and_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_truth(**arguments)

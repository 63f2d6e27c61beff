import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from jaxkd.losses import preference

BETA, SMOOTHING, GAMMA = 0.7, 0.2, 0.4
RNG = np.random.default_rng(0)
# All below 0, so that they can stand for log-ratios and for log-probabilities alike.
CHOSEN, REJECTED = -RNG.uniform(0.05, 6.0, size=(2, 64))
DESIRABLE = RNG.random(64) < 0.5

LOSSES = {
    "dpo": lambda c, r: preference.dpo(c, r, BETA),
    "cdpo": lambda c, r: preference.cdpo(c, r, BETA, SMOOTHING),
    "robust_dpo": lambda c, r: preference.robust_dpo(c, r, BETA, SMOOTHING),
    "ipo": lambda c, r: preference.ipo(c, r, BETA),
    "simpo": lambda c, r: preference.simpo(c, r, BETA, GAMMA),
    "orpo": lambda c, r: preference.orpo(c, r, BETA),
}


def ratio_of_odds(c, r):
    return np.exp(c) / (1 - np.exp(c)) * (1 - np.exp(r)) / np.exp(r)


# In double precision, and written from the papers in another form than the code.
VALUES = {
    "dpo": lambda c, r: np.log1p(np.exp(BETA * (r - c))),
    "cdpo": lambda c, r: logsumexp([0 * c, BETA * (r - c)], axis=0) + SMOOTHING * BETA * (c - r),
    "robust_dpo": lambda c, r: (
        (-(1 - SMOOTHING) * np.log(expit(BETA * (c - r))) + SMOOTHING * np.log(expit(BETA * (r - c))))
        / (1 - 2 * SMOOTHING)
    ),
    "ipo": lambda c, r: (c - r) ** 2 - (c - r) / BETA + 1 / (4 * BETA**2),
    "simpo": lambda c, r: logsumexp([BETA * c, BETA * r + GAMMA], axis=0) - BETA * c,
    "orpo": lambda c, r: -c + BETA * np.log1p(1 / ratio_of_odds(c, r)),
}

# The derivative with respect to the chosen one; that of the rejected one differs in sign, ORPO's apart.
SLOPES = {
    "dpo": lambda c, r: -BETA * expit(BETA * (r - c)),
    "cdpo": lambda c, r: -BETA * (1 - SMOOTHING - expit(BETA * (c - r))),
    "robust_dpo": lambda c, r: (
        -BETA * ((1 - SMOOTHING) * expit(BETA * (r - c)) + SMOOTHING * expit(BETA * (c - r))) / (1 - 2 * SMOOTHING)
    ),
    "ipo": lambda c, r: 2 * (c - r) - 1 / BETA,
    "simpo": lambda c, r: -BETA * expit(BETA * (r - c) + GAMMA),
    "orpo": lambda c, r: -1 - BETA / (1 + ratio_of_odds(c, r)) / (1 - np.exp(c)),
}


def float32(*arrays):
    return [jnp.asarray(array, dtype=jnp.float32) for array in arrays]


@functools.cache
def values_and_jacobians():
    """Of all losses in one compilation, which is what these tests spend their time on."""

    def evaluate(chosen, rejected):
        return {
            name: (loss(chosen, rejected), jax.jacobian(loss, argnums=(0, 1))(chosen, rejected))
            for name, loss in LOSSES.items()
        }

    return jax.device_get(jax.jit(evaluate)(*float32(CHOSEN, REJECTED)))


@pytest.mark.parametrize("name", LOSSES)
def test_value_is_the_papers(name):
    value, _ = values_and_jacobians()[name]
    np.testing.assert_allclose(value, VALUES[name](CHOSEN, REJECTED), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_papers(name):
    _, (by_chosen, by_rejected) = values_and_jacobians()[name]
    # One loss per example, which no other example enters.
    np.testing.assert_array_equal(by_chosen, np.diag(np.diag(by_chosen)))
    np.testing.assert_array_equal(by_rejected, np.diag(np.diag(by_rejected)))
    np.testing.assert_allclose(np.diag(by_chosen), SLOPES[name](CHOSEN, REJECTED), rtol=2e-5, atol=2e-6)
    expected = -SLOPES[name](CHOSEN, REJECTED)
    if name == "orpo":
        expected = BETA / (1 + ratio_of_odds(CHOSEN, REJECTED)) / (1 - np.exp(REJECTED))
    np.testing.assert_allclose(np.diag(by_rejected), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_preferring_the_chosen_more_costs_less(name):
    chosen, rejected = float32([-1.0, -0.9, -1.0], [-1.0, -1.0, -0.9])
    even, better, worse = np.asarray(jax.jit(LOSSES[name])(chosen, rejected))
    assert better < even < worse


@pytest.mark.parametrize(
    "loss",
    [
        lambda zero: preference.dpo(zero, zero, BETA),
        lambda zero: preference.cdpo(zero, zero, BETA, SMOOTHING),
        lambda zero: preference.robust_dpo(zero, zero, BETA, SMOOTHING),
        lambda zero: preference.simpo(zero, zero, BETA, 0.0),
    ],
)
def test_log_2_where_policy_equals_reference(loss):
    np.testing.assert_allclose(loss(jnp.zeros(3)), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("loss", [preference.cdpo, preference.robust_dpo])
def test_without_noise_it_is_dpo(loss):
    chosen, rejected = float32(CHOSEN, REJECTED)
    np.testing.assert_allclose(loss(chosen, rejected, BETA, 0.0), preference.dpo(chosen, rejected, BETA), rtol=1e-6)


@pytest.mark.parametrize("flip_rate", [0.05, 0.3, 0.45])
def test_robust_dpo_is_unbiased_under_flips(flip_rate):
    chosen, rejected = float32(CHOSEN, REJECTED)
    expected = (1 - flip_rate) * preference.robust_dpo(chosen, rejected, BETA, flip_rate) + (
        flip_rate * preference.robust_dpo(rejected, chosen, BETA, flip_rate)
    )
    np.testing.assert_allclose(expected, preference.dpo(chosen, rejected, BETA), rtol=1e-4, atol=1e-5)
    plain = (1 - flip_rate) * preference.dpo(chosen, rejected, BETA) + flip_rate * preference.dpo(
        rejected, chosen, BETA
    )
    assert np.max(np.abs(plain - preference.dpo(chosen, rejected, BETA))) > 0.05


def test_cdpo_is_smallest_at_the_smoothed_preference():
    margin = np.log((1 - SMOOTHING) / SMOOTHING) / BETA
    slope = jax.jit(jax.grad(lambda c: preference.cdpo(c, jnp.float32(0), BETA, SMOOTHING)))
    assert float(slope(margin - 0.1)) < 0 < float(slope(margin + 0.1))


def test_ipo_is_zero_at_its_target_margin():
    np.testing.assert_allclose(preference.ipo(jnp.array([1 / (2 * BETA)]), jnp.zeros(1), BETA), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "far_right", "far_wrong"),
    [
        (lambda c, r: preference.dpo(c, r, 1.0), 0.0, 500.0),
        (lambda c, r: preference.cdpo(c, r, 1.0, 0.1), 50.0, 450.0),
        (lambda c, r: preference.robust_dpo(c, r, 1.0, 0.1), -62.5, 562.5),
        (lambda c, r: preference.simpo(c, r, 1.0, 1.0), 0.0, 501.0),
        (lambda c, r: preference.orpo(c - 1, r - 1, 1.0), 1.0, 1001.4587),
    ],
)
def test_far_margins_neither_overflow_nor_lose_their_gradient(loss, far_right, far_wrong):
    near, far = np.float32(0), np.float32(-500)
    loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradient = loss(near, far)
    np.testing.assert_allclose(value, far_right, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(gradient))
    value, gradient = loss(far, near)
    np.testing.assert_allclose(value, far_wrong, rtol=1e-5)
    assert float(gradient[0]) < -0.5


def test_dpo_saturates_at_a_gain_of_about_five_over_the_coefficient():
    gain = jnp.array([0.0, 5 / BETA])
    slope = jax.jit(jax.grad(lambda c: preference.dpo(c, jnp.zeros(2), BETA).sum()))
    weight = -np.asarray(slope(gain)) / BETA
    np.testing.assert_allclose(weight, [0.5, expit(-5)], rtol=1e-5)


def test_coefficients_may_be_traced():
    chosen, rejected = float32(CHOSEN, REJECTED)
    second = {"cdpo": (SMOOTHING,), "robust_dpo": (SMOOTHING,), "simpo": (GAMMA,)}

    def evaluate(coefficient, scale):
        return {
            name: getattr(preference, name)(chosen, rejected, coefficient, *(scale * x for x in second.get(name, ())))
            for name in LOSSES
        }

    grid = jax.jit(jax.vmap(evaluate))(jnp.array([2 * BETA, BETA]), jnp.ones(2))
    for name in LOSSES:
        np.testing.assert_allclose(grid[name][1], values_and_jacobians()[name][0], rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(np.diff(grid[name], axis=0))) > 0.01


def kto_by_hand(log_ratio, desirable, reference_point, kl_coef, desirable_weight, undesirable_weight):
    losses = []
    for ratio, good in zip(log_ratio, desirable, strict=True):
        weight, sign = (desirable_weight, 1) if good else (undesirable_weight, -1)
        losses.append(weight - weight * expit(sign * kl_coef * (ratio - reference_point)))
    return np.array(losses)


def test_kto_value_and_gradient():
    (log_ratio,) = float32(CHOSEN)
    arguments = (jnp.asarray(DESIRABLE), 0.3, BETA, 1.5, 0.5)
    expected = kto_by_hand(CHOSEN, DESIRABLE, 0.3, BETA, 1.5, 0.5)
    np.testing.assert_allclose(preference.kto(log_ratio, *arguments), expected, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: preference.kto(x, *arguments).sum()))(log_ratio)
    share = expit(BETA * (CHOSEN - 0.3))
    sign_and_weight = np.where(DESIRABLE, -1.5, 0.5)
    np.testing.assert_allclose(gradient, sign_and_weight * BETA * share * (1 - share), rtol=1e-5)


def test_kto_weights_default_to_one():
    (log_ratio,) = float32(CHOSEN)
    expected = kto_by_hand(CHOSEN, DESIRABLE, 0.0, BETA, 1, 1)
    np.testing.assert_allclose(preference.kto(log_ratio, jnp.asarray(DESIRABLE), 0.0, BETA), expected, rtol=1e-5)


def test_kto_keeps_what_a_rounded_one_would_lose():
    loss = jax.jit(lambda x: preference.kto(x, np.array([True, False]), 0.0, 1.0))(np.array([40, -40], np.float32))
    np.testing.assert_allclose(loss, np.exp(-40.0), rtol=1e-5)


def test_kto_reference_point():
    (log_ratio,) = float32(-CHOSEN)
    np.testing.assert_allclose(preference.kto_reference_point(log_ratio), np.mean(-CHOSEN), rtol=1e-6)
    assert preference.kto_reference_point(-log_ratio) == 0
    np.testing.assert_array_equal(jax.grad(preference.kto_reference_point)(log_ratio), 0)


def test_orpo_is_accurate_near_probability_one_and_near_zero():
    log_prob = np.array([-1e-6, -1e-3, -0.69, -1.0, -15.0, -80.0], dtype=np.float32)
    even = np.full(6, -np.log(2), dtype=np.float32)  # odds of 1

    def odds_term(x):
        return preference.orpo(x, even, 1.0) + x

    exact = log_prob.astype(np.float64)
    inverse_odds = -np.expm1(exact) / np.exp(exact)
    np.testing.assert_allclose(jax.jit(odds_term)(log_prob), np.log1p(inverse_odds), rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(lambda x: odds_term(x).sum()))(log_prob)
    np.testing.assert_allclose(slope, -1 / (1 + 1 / inverse_odds) / -np.expm1(exact), rtol=1e-5)


@pytest.mark.parametrize("log_prob", [0.0, 0.7])
@pytest.mark.parametrize("swap", [False, True])
def test_orpo_refuses_densities(log_prob, swap):
    pair = [jnp.array([-1.0, log_prob]), jnp.array([-1.0, -2.0])]
    pair = pair[::-1] if swap else pair
    with pytest.raises(ValueError, match=f"{'rejected' if swap else 'chosen'}_mean_log_prob is not"):
        preference.orpo(*pair, 0.1)
    loss = jax.jit(lambda c, r: preference.orpo(c, r, 0.1))(*pair)
    np.testing.assert_array_equal(np.isnan(loss), [False, True])
    gradients = jax.jit(jax.grad(lambda c, r: preference.orpo(c, r, 0.1).sum(), argnums=(0, 1)))(*pair)
    np.testing.assert_array_equal(np.isnan(gradients[swap]), [False, True])


PAIR = (np.full(2, -1.0, np.float32), np.full(2, -2.0, np.float32))
LABELS = np.array([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference.dpo(*PAIR, 0.0), "kl_coef must be positive"),
        (lambda: preference.dpo(*PAIR, float("nan")), "kl_coef .* got nan"),
        (lambda: preference.dpo(*PAIR, float("inf")), "kl_coef .* finite"),
        (lambda: preference.dpo(*PAIR, jnp.float32(-1)), "kl_coef .* got -1"),
        (lambda: preference.cdpo(*PAIR, 0.1, 0.6), r"label_smoothing must be in \[0, 0.5\], got 0.6"),
        (lambda: preference.cdpo(*PAIR, 0.1, -0.1), "label_smoothing"),
        (lambda: preference.cdpo(*PAIR, -0.1, 0.1), "kl_coef"),
        (lambda: preference.robust_dpo(*PAIR, 0.1, 0.5), r"flip_rate must be in \[0, 0.5\), got 0.5"),
        (lambda: preference.robust_dpo(*PAIR, 0.1, -0.1), "flip_rate"),
        (lambda: preference.robust_dpo(*PAIR, 0.0, 0.1), "kl_coef"),
        (lambda: preference.ipo(*PAIR, 0.0), "kl_coef"),
        (lambda: preference.simpo(*PAIR, 0.0, 0.1), "scale"),
        (lambda: preference.simpo(*PAIR, 1.0, -0.1), "margin"),
        (lambda: preference.kto(PAIR[0], LABELS, 0.0, 0.0), "kl_coef"),
        (lambda: preference.kto(PAIR[0], LABELS, 0.0, 1.0, -1.0), "desirable_weight"),
        (lambda: preference.kto(PAIR[0], LABELS, 0.0, 1.0, 1.0, -1.0), "undesirable_weight"),
        (lambda: preference.kto(PAIR[0], np.array([1, -1]), 0.0, 1.0), "desirable must be boolean, got int64"),
        (lambda: preference.kto(PAIR[0], LABELS[None], 0.0, 1.0), "agree in shape"),
        (lambda: preference.orpo(*PAIR, -0.1), "odds_ratio_weight"),
        *(
            (lambda name=name: LOSSES[name](PAIR[0], PAIR[1][:, None]), r"agree in shape: .*\(2,\).*\(2, 1\)")
            for name in LOSSES
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

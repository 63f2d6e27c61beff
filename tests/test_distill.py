from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, mixture

pytestmark = pytest.mark.loose  # optax's Adam does not stand strict dtype promotion

TEACHER = mixture.make([0.9, 0.1], [[-1, 0], [1, 0]], np.full((2, 2), 0.05))
START = mixture.make([0.5, 0.5], [[-0.5, 0.3], [0.5, -0.3]], np.full((2, 2), 0.3))
sample = jax.jit(mixture.sample, static_argnums=2)
em = jax.jit(mixture.em, static_argnums=2)
# Drawn in one program, where fits are called with what was drawn.
POLICY = replace(mixture.policy, sample=jax.jit(mixture.policy.sample, static_argnums=2))


@cache
def points():
    return sample(TEACHER, jax.random.key(0), 512)


@cache
def keys():
    return jax.random.split(jax.random.key(0))


def test_fit_by_gradient_raises_the_likelihood_nearly_to_that_of_em():
    x = points()
    fitted = jax.jit(lambda: distill.fit_by_gradient(mixture.policy, START, x, 0.1, 200))()
    by_em = em(START, x, 100).log_likelihood
    before, after = (float(mixture.log_density(m, x).mean()) for m in (START, fitted))
    assert after > before + 0.1
    assert float(by_em) - 0.02 < after <= float(by_em) + 1e-3


def test_the_maximum_likelihood_step_reports_the_loss_before_it():
    optimizer = distill.make_optimizer(10)
    step = jax.jit(distill.maximum_likelihood_step(mixture.policy, optimizer))
    x = points()
    state, loss = step(distill.State(START, optimizer.init(START)), (x, 0.05))
    assert loss == pytest.approx(-float(mixture.log_density(START, x).mean()), rel=1e-5)
    assert step(state, (x, 0.05))[1] < loss


def test_on_policy_reverse_kl_falls_and_is_the_divergence_it_says():
    student, kl = jax.jit(
        lambda key: distill.on_policy_reverse_kl(
            mixture.policy, key, START, lambda x: mixture.log_density(TEACHER, x), 0.03, 200, 256
        )
    )(jax.random.key(0))
    assert kl[-20:].mean() < 0.25 * kl[0]

    def divergence(model):
        x = sample(model, jax.random.key(5), 20_000)
        return float((mixture.log_density(model, x) - mixture.log_density(TEACHER, x)).mean())

    assert divergence(student) < 0.25 * divergence(START)
    assert kl[0] == pytest.approx(divergence(START), rel=0.3)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.1), (0.5, 0.01 / 0.82)])
def test_sequence_level_distillation_fits_what_the_teacher_draws_at_a_temperature(temperature, share):
    shares = []
    fit = lambda key, x: shares.append(float((x[0] > 0).mean())) or em(TEACHER, x, 5).mixture  # noqa: E731
    student = distill.sequence_level(POLICY, *keys(), TEACHER, temperature, 8192, fit)
    assert abs(shares[0] - share) < 4 * np.sqrt(share / 8192)
    assert mixture.weights(student)[1] == pytest.approx(shares[0], abs=2e-3)


def test_sequence_level_distillation_keeps_the_keys_of_draws_and_fit_apart():
    fit_key, x = distill.sequence_level(POLICY, *keys(), TEACHER, 1.0, 16, lambda key, x: (key, x))
    np.testing.assert_array_equal(sample(TEACHER, keys()[0], 16), x)
    assert fit_key == keys()[1]


def _compare(params, teacher, x, coefficient):
    """A divergence of coefficient · (params − teacher)² · x, at the steps where x is positive."""
    divergence = coefficient * jnp.square(params - teacher) * x
    return divergence, -params * jnp.abs(x), x > 0


def _token_level(x, learning_rate=0.1):
    step = jax.jit(distill.token_level_step(_compare, optax.sgd(-1.0)))
    start = jnp.float32(3.0)
    return step(
        distill.State(start, optax.sgd(-1.0).init(start)), distill.TokenInputs(jnp.asarray(x), 1.0, learning_rate, 0.5)
    )


def test_the_token_level_step_weighs_every_counted_token_the_same():
    state, info = _token_level([[1.0, 2.0, 3.0], [4.0, -1e6, -1e6]])
    assert info.num_tokens == 4
    assert info.loss == info.divergence == pytest.approx(0.5 * 2**2 * 2.5)
    assert info.log_prob == pytest.approx(-3 * 2.5)
    assert state.params == pytest.approx(3 - 0.1 * 0.5 * 2 * 2 * 2.5)


def test_a_batch_without_a_counted_token_teaches_nothing():
    state, info = _token_level([[-1.0, -2.0]])
    assert info == (0, 0, 0, 0)
    assert state.params == 3


def test_the_students_own_batches_come_with_the_probability_asked_for():
    keys = jax.random.split(jax.random.key(0), 400)
    chosen = {fraction: [distill.use_student(key, fraction) for key in keys] for fraction in (0, 0.25, 0.75, 1)}
    assert {type(choice) for choice in chosen[0.25]} == {bool}
    assert not any(chosen[0])
    assert all(chosen[1])
    for fraction in (0.25, 0.75):
        assert abs(np.mean(chosen[fraction]) - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 400)
    # The same key at a larger fraction never goes back to the fixed set: arms are paired.
    assert all(more or not less for less, more in zip(chosen[0.25], chosen[0.75], strict=True))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="on_policy_fraction must be a finite number at least 0 and at most 1"):
        distill.use_student(jax.random.key(0), fraction)

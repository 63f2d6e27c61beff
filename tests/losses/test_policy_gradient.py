import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.losses import policy_gradient as pg

RNG = np.random.default_rng(1)
LOGITS, REFERENCE_LOGITS = RNG.normal(size=(2, 5)).astype(np.float32)
REWARDS = RNG.normal(size=5).astype(np.float32)


def log_policy(logits):
    return jax.nn.log_softmax(jnp.asarray(logits))


def expected_under_policy(per_sample):
    """The exact on-policy expected gradient of a loss: outcomes weighted by the policy, which is held constant."""
    weights = jnp.exp(log_policy(LOGITS))
    return jax.jit(jax.grad(lambda logits: jnp.sum(weights * per_sample(log_policy(logits)))))(jnp.asarray(LOGITS))


def kl_gradient(from_policy):
    """The gradient of KL(π‖π_ref), or of KL(π_ref‖π), with respect to the logits: by hand, in double precision."""
    policy, reference = (
        np.exp(x) / np.exp(x).sum() for x in (LOGITS.astype(np.float64), REFERENCE_LOGITS.astype(np.float64))
    )
    log_ratio = np.log(policy / reference)
    return policy * (log_ratio - policy @ log_ratio) if from_policy else policy - reference


REFERENCE = log_policy(REFERENCE_LOGITS)
POLICY = log_policy(LOGITS)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (pg.kl_k1, np.zeros(5)),
        (pg.kl_k2, kl_gradient(from_policy=True)),
        (pg.kl_k3, kl_gradient(from_policy=False)),
    ],
)
def test_expected_gradient_of_a_kl_estimator_in_the_loss(estimator, expected):
    gradient = expected_under_policy(lambda log_prob: estimator(log_prob, REFERENCE))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (pg.kl_k1, kl_gradient(from_policy=True)),
        (pg.kl_k3, kl_gradient(from_policy=True) - kl_gradient(from_policy=False)),
    ],
)
def test_expected_gradient_of_a_kl_estimator_in_the_reward(estimator, expected):
    gradient = expected_under_policy(lambda log_prob: pg.reinforce(log_prob, -estimator(log_prob, REFERENCE)))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_k3_weighted_by_the_importance_ratio_gives_the_gradient_of_the_kl():
    gradient = expected_under_policy(
        lambda log_prob: jnp.exp(log_prob - jax.lax.stop_gradient(log_prob)) * pg.kl_k3(log_prob, REFERENCE)
    )
    np.testing.assert_allclose(gradient, kl_gradient(from_policy=True), atol=1e-6)


def test_k2_in_the_reward_gives_the_gradient_of_neither_kl():
    gradient = expected_under_policy(lambda log_prob: pg.reinforce(log_prob, -pg.kl_k2(log_prob, REFERENCE)))
    for from_policy in (True, False):
        assert np.max(np.abs(np.asarray(gradient) - kl_gradient(from_policy))) > 0.05


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    policy, reference = np.exp(np.float64(POLICY)), np.exp(np.float64(REFERENCE))
    kl = np.sum(policy * np.log(policy / reference))
    means = [policy @ np.asarray(estimator(POLICY, REFERENCE)) for estimator in (pg.kl_k1, pg.kl_k3, pg.kl_k2)]
    np.testing.assert_allclose(means[:2], kl, rtol=1e-5)
    assert abs(means[2] - kl) > 0.005


@pytest.mark.parametrize("estimator", [pg.kl_k1, pg.kl_k2, pg.kl_k3])
def test_kl_estimates_are_zero_where_policy_equals_reference(estimator):
    np.testing.assert_array_equal(estimator(POLICY, POLICY), 0)


def test_k3_keeps_its_accuracy_near_zero():
    np.testing.assert_allclose(jax.jit(pg.kl_k3)(np.float32(1e-2), np.float32(0)), np.expm1(-1e-2) + 1e-2, rtol=1e-4)


@pytest.mark.parametrize("batch", [2, 7])
def test_leave_one_out_advantages(batch):
    rewards = RNG.normal(size=batch) + 3
    expected = [rewards[i] - np.mean(np.delete(rewards, i)) for i in range(batch)]
    np.testing.assert_allclose(
        jax.jit(pg.leave_one_out_advantages)(np.float32(rewards)), expected, rtol=1e-5, atol=1e-6
    )


def test_reward_to_go_advantages_by_hand():
    """Whole penalised rewards 1.5, 1 and 5.5; their leave-one-out baselines 3.25, 3.5 and 1.25."""
    rewards, penalties = np.float32([3, 1, 5]), np.float32([[1, 0.5, 0], [0, 0, 0], [-2, 0.5, 1]])
    expected = [[-1.75, -0.75, -0.25], [-2.5, -2.5, -2.5], [4.25, 2.25, 2.75]]
    np.testing.assert_allclose(jax.jit(pg.reward_to_go_advantages)(rewards, penalties), expected, rtol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_rewards_to_go_of_one_step_are_the_leave_one_out_advantages_to_the_bit(compiled):
    def both(rewards, penalties):
        stepwise = pg.reward_to_go_advantages(rewards, penalties[:, None])
        return stepwise[:, 0], pg.leave_one_out_advantages(rewards - penalties)

    np.testing.assert_array_equal(*(jax.jit(both) if compiled else both)(*RNG.normal(size=(2, 33)).astype(np.float32)))


# --- generalised advantage estimates ---------------------------------------------------------------------------------

RAGGED = np.array([[True, True, True, True], [True, True, False, False], [False, True, True, False], [False] * 4])
STEP_REWARDS = np.float32([[1, 0, -1, 2], [3, 1, 0, 0], [0, 2, -1, 0], [0, 0, 0, 0]])
VALUES = np.float32([[0.5, 1, 0, -1], [2, -1, 0, 0], [0, 1, 4, 0], [0, 0, 0, 0]])
gae = jax.jit(pg.gae)


@pytest.mark.parametrize(
    ("discount", "gae_lambda", "expected"),
    [
        # Returns 2, 1, 1, 2 and 4, 1 and 1, −1, less values.
        (1.0, 1.0, [[1.5, 0, 1, 3], [2, 2, 0, 0], [0, 0, -5, 0], [0] * 4]),
        # r + V′ − V; V′ is 0 after the last step.
        (1.0, 0.0, [[1.5, -1, -2, 3], [0, 2, 0, 0], [0, 5, -5, 0], [0] * 4]),
        # δ = r + V′/2 − V is 1, −1, −1.5, 3 and 0.5, 2 and 3, −5; Â = δ + Â′/4.
        (0.5, 0.5, [[0.703125, -1.1875, -0.75, 3], [1, 2, 0, 0], [0, 1.75, -5, 0], [0] * 4]),
    ],
)
def test_gae_by_hand(discount, gae_lambda, expected):
    np.testing.assert_allclose(gae(STEP_REWARDS, VALUES, RAGGED, discount, gae_lambda), expected, rtol=1e-6)


def test_padding_has_no_influence_on_gae():
    junk = np.where(RAGGED, 0, np.float32([np.nan, np.inf, -7, 3])[:, None])
    clean, dirty = (gae(STEP_REWARDS + x, VALUES + x, RAGGED, 0.9, 0.7) for x in (np.float32(0) * RAGGED, junk))
    np.testing.assert_array_equal(clean, dirty)
    # Nor has a step in between that does not count, nor have columns of padding.
    gaps = np.zeros((4, 8), np.float32)
    spread = [np.copy(gaps) for _ in range(3)]
    for wide, narrow in zip(spread, (STEP_REWARDS, VALUES, RAGGED), strict=True):
        wide[:, 1::2] = narrow
    wide = gae(spread[0], spread[1], spread[2].astype(bool), 0.9, 0.7)
    np.testing.assert_array_equal(wide[:, 1::2], clean)
    np.testing.assert_array_equal(wide[:, ::2], 0)


def test_gae_without_a_mask_counts_every_step():
    given = STEP_REWARDS, VALUES
    np.testing.assert_array_equal(gae(*given, None, 0.9, 0.7), gae(*given, np.ones((4, 4), bool), 0.9, 0.7))


def test_grpo_advantages():
    rewards = RNG.normal(size=(3, 4))
    rewards[2] = 1.0  # nothing to choose between these
    expected = [[(r - np.mean(group)) / (np.std(group, ddof=1) + 0.1) for r in group] for group in rewards]
    advantages = jax.jit(pg.grpo_advantages)
    np.testing.assert_allclose(advantages(np.float32(rewards), 0.1), expected, rtol=1e-5)
    # They forget the scale of the reward.
    np.testing.assert_allclose(
        advantages(np.float32(10 * rewards), 1e-9), advantages(np.float32(rewards), 1e-9), rtol=1e-4, atol=1e-6
    )


def test_reinforce_has_the_policy_gradient():
    gradient = expected_under_policy(lambda log_prob: pg.reinforce(log_prob, jnp.asarray(REWARDS)))
    exact = jax.jit(jax.grad(lambda logits: -jnp.sum(jnp.exp(log_policy(logits)) * REWARDS)))(LOGITS)
    np.testing.assert_allclose(gradient, exact, atol=1e-6)


def test_a_constant_baseline_leaves_the_gradient_alone():
    gradients = [
        expected_under_policy(lambda log_prob, b=b: pg.reinforce(log_prob, jnp.asarray(REWARDS) - b))
        for b in (0.0, 3.0)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_advantages_are_held_constant():
    for loss in (
        lambda a: pg.reinforce(POLICY, a),
        lambda a: pg.ppo_clip(POLICY, REFERENCE, a, 0.2),
    ):
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda a, loss=loss: loss(a).sum()))(jnp.asarray(REWARDS)), 0)
    behaviour_gradient = jax.jit(jax.grad(lambda b: pg.ppo_clip(POLICY, b, jnp.asarray(REWARDS), 0.2).sum()))(POLICY)
    np.testing.assert_array_equal(behaviour_gradient, 0)


RATIOS = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])


@functools.cache
def ppo():
    def evaluate(log_prob, behaviour, advantages):
        def total(x):
            return pg.ppo_clip(x, behaviour, advantages, 0.2).sum()

        value = pg.ppo_clip(log_prob, behaviour, advantages, 0.2)
        return value, pg.clipped(log_prob, behaviour, advantages, 0.2), jax.grad(total)(log_prob)

    return jax.jit(evaluate)


@pytest.mark.parametrize(
    ("advantage", "acts"),
    [
        (2.0, [False, False, False, False, False, True, True]),
        (-2.0, [True, True, False, False, False, False, False]),
        (0.0, [False] * 7),
    ],
)
def test_ppo_clip_value_gradient_and_mask(advantage, acts):
    value, mask, gradient = ppo()(*np.float32([np.log(RATIOS) - 1, np.full(7, -1), np.full(7, advantage)]))
    expected = -np.minimum(RATIOS * advantage, np.clip(RATIOS, 0.8, 1.2) * advantage)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(mask, acts)
    np.testing.assert_allclose(gradient, np.where(acts, 0, -RATIOS * advantage), rtol=1e-5)


def test_ppo_at_the_behaviour_policy_has_the_gradient_of_reinforce():
    advantages = jnp.asarray(REWARDS)
    ppo = jax.jit(jax.grad(lambda x: pg.ppo_clip(log_policy(x), POLICY, advantages, 0.2).sum()))(LOGITS)
    reinforce = jax.jit(jax.grad(lambda x: pg.reinforce(log_policy(x), advantages).sum()))(LOGITS)
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-5, atol=1e-6)


def test_a_ratio_that_overflows_is_clipped_without_nan():
    surrogate = jax.jit(jax.value_and_grad(lambda x: pg.ppo_clip(x, jnp.zeros(1), jnp.ones(1), 0.2).sum()))
    value, gradient = surrogate(jnp.full(1, 200.0))
    np.testing.assert_allclose(value, -1.2, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_coefficients_may_be_traced():
    grid = np.array([0.1, 0.3], dtype=np.float32)
    together = jax.jit(jax.vmap(lambda c: pg.ppo_clip(POLICY, REFERENCE, jnp.asarray(REWARDS), c)))(grid)
    ratio = np.exp(np.asarray(POLICY) - np.asarray(REFERENCE))
    for row, clip_range in zip(np.asarray(together), grid, strict=True):
        expected = -np.minimum(ratio * REWARDS, np.clip(ratio, 1 - clip_range, 1 + clip_range) * REWARDS)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)


ONE, TWO = np.zeros(1, np.float32), np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pg.leave_one_out_advantages(ONE), r"batch ≥ 2, got \(1,\)"),
        (lambda: pg.leave_one_out_advantages(TWO[None]), r"got \(1, 2\)"),
        (lambda: pg.grpo_advantages(TWO, 1e-4), r"\[groups, group_size\]"),
        (lambda: pg.grpo_advantages(TWO[:, None], 1e-4), "group_size ≥ 2"),
        (lambda: pg.grpo_advantages(TWO[None], 0.0), "epsilon"),
        (lambda: pg.reward_to_go_advantages(TWO, TWO), "do not fit"),
        (lambda: pg.reward_to_go_advantages(TWO, ONE[:, None]), "do not fit"),
        (lambda: pg.gae(TWO[None], TWO[:, None], None, 1.0, 1.0), "agree in shape"),
        (lambda: pg.gae(TWO, TWO, None, 1.0, 1.0), r"\[batch, steps\]"),
        (lambda: pg.gae(TWO[None], TWO[None], None, 1.1, 1.0), "discount"),
        (lambda: pg.gae(TWO[None], TWO[None], None, 1.0, -0.1), "gae_lambda"),
        (lambda: pg.reinforce(TWO, TWO[:, None]), "agree in shape"),
        (lambda: pg.ppo_clip(TWO, TWO, TWO, 0.0), "clip_range"),
        (lambda: pg.ppo_clip(TWO, TWO, TWO, 1.0), "clip_range"),
        (lambda: pg.ppo_clip(TWO, TWO, ONE, 0.2), "agree in shape"),
        (lambda: pg.clipped(TWO, ONE, TWO, 0.2), "agree in shape"),
        (lambda: pg.kl_k1(TWO, ONE), "agree in shape"),
        (lambda: pg.kl_k2(TWO, ONE), "agree in shape"),
        (lambda: pg.kl_k3(TWO, ONE), "agree in shape"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

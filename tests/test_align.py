from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import align, metrics, mixture, mixture_rewards, theory
from jaxkd.align import ALGORITHMS, AlignmentSettings, Coefficients, Inputs, State
from jaxkd.policy import Policy
from jaxkd.truth import make_truth, on_target

pytestmark = pytest.mark.loose  # optax's Adam does not stand strict dtype promotion

TRUTH = make_truth(target_weight=0.1)
BASE = TRUTH.modes
WIDE_BUMP = mixture_rewards.bump(TRUTH.target.means, height=2.0, width=0.5)
DEFAULTS = Coefficients(*(jnp.float32(value) for value in Coefficients()))
ON_MIXTURES = [name for name in ALGORITHMS if name != "orpo"]
PREFERENCES_AT_LOG_TWO = ["online_dpo", "offline_dpo_ref", "offline_dpo_data"]
TRACES = []
sample = jax.jit(mixture.sample, static_argnums=2)


def settings(algorithm, num_updates=8, batch_size=64, **others):
    return AlignmentSettings(algorithm, num_updates, batch_size, **others)


@partial(jax.jit, static_argnames="settings")
def run(settings, key, start, reference, coefficients):
    TRACES.append(settings)
    return align.align(
        mixture.policy,
        key,
        start,
        reference,
        WIDE_BUMP,
        coefficients,
        settings,
        truth=BASE,
        on_target=lambda x: on_target(TRUTH, x),
    )


@partial(jax.jit, static_argnames="algorithms")
def first_steps(algorithms, key, start, coefficients):
    """The first step of algorithms that learn from the same data, by plain gradient descent.

    Unlike Adam it stands strict promotion.
    """
    chosen, optimizer = [settings(name) for name in algorithms], optax.identity()
    source = BASE if ALGORITHMS[algorithms[0]].data == "truth" else start
    data = align.preference_dataset(mixture.policy, key, source, start, WIDE_BUMP, coefficients, chosen[0])
    batch = jax.tree.map(lambda leaf: leaf[0], data)
    draws = mixture.sample(start, key, chosen[0].batch_size)
    state, inputs = State(start, optimizer.init(start)), Inputs(key, start, coefficients, draws, batch)
    return {
        one.algorithm: align.make_step(mixture.policy, optimizer, one, WIDE_BUMP, lambda x: on_target(TRUTH, x))(
            state, inputs
        )
        for one in chosen
    }


def leaves_equal(first, second):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def mean_reward(model, n=20_000):
    return float(WIDE_BUMP(sample(model, jax.random.key(99), n)).mean())


def kl_to_base(model, n=20_000):
    x = sample(model, jax.random.key(1), n)
    return float((mixture.log_density(model, x) - mixture.log_density(BASE, x)).mean())


# --- step 0 ----------------------------------------------------------------------------------------------------------


FROM_THE_TRUTH = tuple(name for name in ON_MIXTURES if ALGORITHMS[name].data == "truth")


@pytest.mark.parametrize(
    "algorithms", [FROM_THE_TRUTH, *((name,) for name in ON_MIXTURES if name not in FROM_THE_TRUTH)], ids=", ".join
)
def test_every_kl_is_zero_at_step_zero_and_the_loss_of_dpo_is_log_two(algorithms):
    start = mixture.make([0.5, 0.3, 0.2], [[0, 0], [1, 1], [-1, 0]], 0.2 * np.ones((3, 2)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = first_steps(algorithms, jax.random.key(0), start, DEFAULTS)
    assert set(found) == set(algorithms)
    for algorithm, (state, info) in found.items():
        assert float(info.kl) == 0, algorithm
        if algorithm in PREFERENCES_AT_LOG_TWO:
            assert info.loss == pytest.approx(np.log(2), abs=1e-6), algorithm
        assert not leaves_equal(state.params, start), algorithm
        assert all(np.isfinite(leaf).all() for leaf in state.params), algorithm


# --- what each algorithm does ----------------------------------------------------------------------------------------

# One of each kind of step; offline losses differ in what `test_preference_losses_of_ragged_texts_by_hand` holds alone.
RAISING = ["reinforce", "ppo", "grpo", "online_dpo", "offline_dpo_data", "kto"]


@pytest.mark.parametrize(
    "algorithm",
    [name if name in ("ppo", "online_dpo") else pytest.param(name, marks=pytest.mark.slow) for name in RAISING],
)
def test_every_algorithm_raises_the_reward_and_less_so_at_a_larger_coefficient_in_one_program(algorithm):
    assert {ALGORITHMS[name].kind for name in RAISING} == {one.kind for one in ALGORITHMS.values()}
    chosen = settings(algorithm, 120, 128, epochs=4, group_size=16)
    free, held = (
        run(
            chosen,
            jax.random.key(0),
            BASE,
            BASE,
            # Every other coefficient differs a little as well: all of them are traced.
            Coefficients(*(jnp.float32(value * (1 + nudge)) for value in Coefficients()))._replace(
                kl_coef=jnp.float32(kl_coef), label_temperature=jnp.float32(0.3 + nudge)
            ),
        )
        for kl_coef, nudge in ((0.3, 0.0), (5.0, 0.01))
    )
    assert TRACES.count(chosen) == 1
    for model, record in (free, held):
        assert all(np.isfinite(leaf).all() for leaf in model)
        assert not record.failed
    assert mean_reward(free[0]) > mean_reward(BASE) + 0.05
    assert kl_to_base(free[0]) > 2 * max(kl_to_base(held[0]), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kl_coef"), [("reinforce", 0.5), ("ppo", 1.0)])
def test_policy_gradient_reaches_the_gibbs_optimum(algorithm, kl_coef):
    truth = make_truth(target_weight=0.03)
    reward = mixture_rewards.bump(truth.target.means, height=3.0, width=0.5)
    grid = metrics.make_grid(truth)
    log_reference = mixture.log_density(truth.modes, grid.x)
    inside = jnp.where(truth.is_target[:, None], grid.inside, 0.0).sum(axis=0)
    best = theory.gibbs(log_reference, reward(grid.x), inside, kl_coef)

    chosen = AlignmentSettings(algorithm, 2000, 1024, epochs=2)
    aligned, record = jax.jit(
        lambda key: align.align(
            mixture.policy,
            key,
            truth.modes,
            truth.modes,
            reward,
            DEFAULTS._replace(kl_coef=jnp.float32(kl_coef)),
            chosen,
        )
    )(jax.random.key(0))
    log_policy = np.asarray(mixture.log_density(aligned, grid.x), np.float64)
    mass = np.exp(log_policy) * float(grid.cell)
    objective = (mass * (np.asarray(reward(grid.x)) - kl_coef * (log_policy - np.asarray(log_reference)))).sum()
    at_start = (np.exp(np.asarray(log_reference)) * float(grid.cell) * np.asarray(reward(grid.x))).sum()
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    assert not record.failed
    assert at_start < 0.9 * float(best.objective)
    assert 0.98 * float(best.objective) <= objective <= 1.002 * float(best.objective)


# --- policy gradient -------------------------------------------------------------------------------------------------


def test_ppo_of_one_epoch_is_reinforce():
    results = [
        run(settings(name, 12, epochs=1), jax.random.key(0), BASE, BASE, DEFAULTS) for name in ("ppo", "reinforce")
    ]
    (ppo, _), (reinforce, _) = results
    for got, expected in zip(ppo, reinforce, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not leaves_equal(ppo, BASE)


def test_ppo_clips_when_it_moves_far_within_a_rollout():
    fractions = [
        float(
            run(settings("ppo", 40), jax.random.key(0), BASE, BASE, DEFAULTS._replace(learning_rate=jnp.float32(rate)))[
                1
            ].clip_fraction
        )
        for rate in (1e-5, 0.1)
    ]
    assert fractions[0] == 0
    assert 0.05 < fractions[1] < 1


def test_the_gradient_of_reinforce_is_the_penalised_score_by_hand():
    """Σ A·∇log π / n with A the leave-one-out penalised reward; seen in the first moment of Adam."""
    start = mixture.make([0.5, 0.5], [[0.5, 0.5], [-0.5, 0.0]], 0.3 * np.ones((2, 2)))
    chosen, key = settings("reinforce"), jax.random.key(0)
    coefficients = DEFAULTS._replace(kl_coef=jnp.float32(0.7))

    @jax.jit
    def both(start):
        optimizer = align.make_optimizer(chosen.num_updates)
        step = align.make_step(mixture.policy, optimizer, chosen, WIDE_BUMP, lambda x: jnp.zeros((), bool))
        x = mixture.sample(start, key, chosen.batch_size)
        state, _ = step(State(start, optimizer.init(start)), Inputs(key, BASE, coefficients, x))
        scores = jax.vmap(lambda point: jax.grad(lambda m: mixture.log_density(m, point[:, None])[0])(start))(x.T)
        log_ratio = mixture.log_density(start, x) - mixture.log_density(BASE, x)
        return state.optimizer_state[0].mu, scores, WIDE_BUMP(x) - 0.7 * log_ratio

    first_moment, scores, penalised = both(start)
    penalised = np.asarray(penalised, np.float64)
    n = len(penalised)
    others = (penalised.sum() - penalised) / (n - 1)
    for moment, score in zip(first_moment, scores, strict=True):
        weighted = np.tensordot(penalised - others, np.asarray(score, np.float64), axes=1) / n
        np.testing.assert_allclose(moment, -0.1 * weighted, rtol=2e-3, atol=1e-4)


# --- policies of several steps ---------------------------------------------------------------------------------------


def table_policy(*, critic=False, junk=0.0):
    """Texts of a table of logits [steps, tokens]; `junk` stands where steps don't count, and must not matter."""

    def log_prob(params, x):
        steps = jax.nn.log_softmax(params["logits"][: x["tokens"].shape[1]])
        picked = jnp.take_along_axis(steps[None], x["tokens"][..., None], axis=-1)[..., 0]
        return jnp.where(x["mask"], picked, junk * picked)

    def log_prob_and_value(params, x):
        values = jnp.where(x["mask"], params["values"][None, :], junk * params["values"][None, :])
        return log_prob(params, x), values

    return Policy(
        log_prob,
        sample=None,
        num_steps=lambda x: x["mask"].sum(axis=1).astype(jnp.float32),
        step_mask=lambda x: x["mask"],
        log_prob_and_value=log_prob_and_value if critic else None,
    )


KEEP = optax.GradientTransformation(lambda params: params, lambda gradient, state, params: (gradient, gradient))
"""Plain descent that keeps its last gradient as its state."""


def updates(algorithm, policy, params, reference, x, coefficients, epochs=1):
    """The state and the info after a step on given texts."""
    chosen = settings(algorithm, epochs, batch_size=4, epochs=epochs, group_size=2)
    step = align.make_step(policy, KEEP, chosen, lambda x: x["reward"], lambda x: jnp.zeros((), bool))
    return step(State(params, params), Inputs(jax.random.key(0), reference, coefficients, x))


RANDOM = np.random.default_rng(0)
TABLE, OTHER = (
    {"logits": jnp.asarray(x[:, :3]), "values": jnp.asarray(x[:, 3])} for x in RANDOM.normal(size=(2, 4, 4))
)
TABLE, OTHER = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), one) for one in (TABLE, OTHER))
RAGGED = {
    "tokens": jnp.asarray(RANDOM.integers(0, 3, (4, 4)), jnp.int32),
    "mask": jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]], bool),
    "reward": jnp.asarray([1.0, -2.0, 0.5, 3.0]),
}
FRESH = {
    "tokens": jnp.asarray(RANDOM.integers(0, 3, (4, 4)), jnp.int32),
    "mask": jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], bool),
}
HALF = DEFAULTS._replace(kl_coef=jnp.float32(0.5), gae_lambda=jnp.float32(0.8), learning_rate=jnp.float32(0.3))


def by_hand(params, reference, x=RAGGED):
    """Log-probabilities and log-ratios of each text, as lists without padding, in double precision."""
    logits = [np.float64(one["logits"]) for one in (params, reference)]
    steps = [one - np.log(np.exp(one).sum(axis=1, keepdims=True)) for one in logits]
    texts = []
    for tokens, mask in zip(np.asarray(x["tokens"]), np.asarray(x["mask"]), strict=True):
        where = np.flatnonzero(mask)
        texts.append([one[where, tokens[where]] for one in steps])
    return [own for own, _ in texts], [own - held for own, held in texts]


def advantages_by_hand(penalties, values=None, gae_lambda=None):
    """Of each text: rewards to go less the others' mean, or GAE with γ = 1."""
    rewards = np.float64(RAGGED["reward"])
    totals = np.array([r - p.sum() for r, p in zip(rewards, penalties, strict=True)])
    advantages = []
    for i, penalty in enumerate(penalties):
        paid = -penalty
        paid[-1] += rewards[i]
        if values is None:
            advantages.append(np.cumsum(paid[::-1])[::-1] - np.delete(totals, i).mean())
            continue
        following = np.append(values[i][1:], 0)
        errors, of_text = paid + following - values[i], np.zeros(len(paid) + 1)
        for t in reversed(range(len(paid))):
            of_text[t] = errors[t] + gae_lambda * of_text[t + 1]
        advantages.append(of_text[:-1])
    return advantages


def values_by_hand():
    return [np.float64(TABLE["values"])[np.flatnonzero(mask)] for mask in np.asarray(RAGGED["mask"])]


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_losses_of_ragged_texts_by_hand(algorithm, critic):
    run_step = jax.jit(partial(updates, algorithm, table_policy(critic=critic)))
    _, info = run_step(TABLE, OTHER, RAGGED, HALF)
    log_probs, log_ratios = by_hand(TABLE, OTHER)
    values = values_by_hand() if critic and algorithm == "ppo" else None  # REINFORCE has no use for a critic
    advantages = advantages_by_hand([0.5 * one for one in log_ratios], values, 0.8)
    ratios = log_probs if algorithm == "reinforce" else [np.ones_like(one) for one in log_probs]
    loss = -np.mean([(a * r).sum() for a, r in zip(advantages, ratios, strict=True)])
    # A critic is fitted to advantages + values, so its errors are the advantages.
    value_loss = np.mean([0.5 * (a**2).sum() for a in advantages]) if values else 0.0
    np.testing.assert_allclose(info.value_loss, value_loss, rtol=1e-5)
    np.testing.assert_allclose(info.loss, loss + 0.1 * value_loss, rtol=1e-5)
    np.testing.assert_allclose(info.kl, np.mean([one.sum() for one in log_ratios]), rtol=1e-5)


def test_the_loss_of_grpo_on_ragged_texts_by_hand():
    """Groups (1, −2) and (0.5, 3); at the policy that drew, ratios are 1 (arXiv 2402.03300, eq. 3)."""
    _, info = jax.jit(partial(updates, "grpo", table_policy()))(TABLE, OTHER, RAGGED, HALF)
    first, second = 1.5 / (4.5**0.5 + 1e-4), 1.25 / (3.125**0.5 + 1e-4)
    k3 = [np.exp(-one) - 1 + one for one in by_hand(TABLE, OTHER)[1]]
    expected = [-a + 0.5 * one.mean() for a, one in zip((first, -first, -second, second), k3, strict=True)]
    assert len({len(one) for one in k3}) > 2
    np.testing.assert_allclose(info.loss, np.mean(expected), rtol=1e-4)


@pytest.mark.parametrize(("algorithm", "critic"), [("ppo", False), ("ppo", True), ("grpo", False)])
def test_ratios_are_clipped_step_by_step(algorithm, critic):
    policy = table_policy(critic=critic)
    coefficients = HALF._replace(learning_rate=jnp.float32(2.0 if algorithm == "grpo" else 0.3))
    once, _ = jax.jit(partial(updates, algorithm, policy))(TABLE, OTHER, RAGGED, coefficients)
    _, info = jax.jit(partial(updates, algorithm, policy, epochs=2))(TABLE, OTHER, RAGGED, coefficients)
    before, log_ratios = by_hand(TABLE, OTHER)
    after, _ = by_hand(once.params, OTHER)
    values = values_by_hand() if critic else None
    advantages = advantages_by_hand([0.5 * one for one in log_ratios], values, 0.8)
    if algorithm == "grpo":
        advantages = [sign * np.ones_like(one) for sign, one in zip((1, -1, -1, 1), before, strict=True)]
    ratios = np.exp(np.concatenate(after) - np.concatenate(before))
    advantages = np.concatenate(advantages)
    acts = np.where(advantages > 0, ratios > 1.2, ratios < 0.8)
    assert 0 < acts.mean() < 1
    np.testing.assert_allclose(info.clip_fraction, acts.mean() / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "critic"), [("reinforce", False), ("ppo", False), ("ppo", True), ("grpo", False)]
)
def test_steps_that_do_not_count_have_no_influence(algorithm, critic):
    def states(junk, x):
        policy = table_policy(critic=critic, junk=junk)
        return jax.jit(partial(updates, algorithm, policy, epochs=2))(TABLE, OTHER, x, HALF)

    other = RAGGED | {"tokens": jnp.where(RAGGED["mask"], RAGGED["tokens"], 2 - RAGGED["tokens"])}
    clean = states(0.0, RAGGED)
    assert any(leaf.any() for leaf in jax.tree.leaves(clean[0].optimizer_state))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), clean, states(0.7, other))


def test_ppo_of_one_epoch_has_the_gradient_of_reinforce_at_every_step():
    ours, other = (
        jax.jit(partial(updates, algorithm, table_policy()))(TABLE, OTHER, RAGGED, HALF)[0].optimizer_state
        for algorithm in ("ppo", "reinforce")
    )
    assert np.abs(ours["logits"]).max() > 0.1
    np.testing.assert_allclose(ours["logits"], other["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo", "grpo"])
def test_a_lone_step_with_a_mask_is_a_lone_step_without(algorithm):
    def one(policy, x):
        return jax.jit(partial(updates, algorithm, policy, epochs=2))(TABLE, OTHER, x, HALF)

    x = {"tokens": RAGGED["tokens"][:, :1], "mask": jnp.ones((4, 1), bool), "reward": RAGGED["reward"]}
    masked = table_policy()
    plain = Policy(lambda params, x: masked.log_prob(params, x), None, masked.num_steps)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), one(masked, x), one(plain, x))


def preferences_by_hand(algorithm, params, reference):
    """The loss where text 0 is preferred to 2 and 3 to 1, with β = ½ and the other coefficients at their defaults."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def margin(values):
        return np.array([values[0] - values[2], values[3] - values[1]])

    log_probs, log_ratios = by_hand(params, reference)
    of_texts = margin([one.sum() for one in log_ratios])
    as_labelled, flipped = (-np.log(sigmoid(sign * 0.5 * of_texts)) for sign in (1, -1))
    means = [one.mean() for one in log_probs]
    return {
        "offline_dpo_ref": as_labelled,
        "cdpo": 0.9 * as_labelled + 0.1 * flipped,
        "robust_dpo": (0.9 * as_labelled - 0.1 * flipped) / 0.8,
        "ipo": (margin([one.mean() for one in log_ratios]) - 1 / (2 * 0.5)) ** 2,
        "simpo": -np.log(sigmoid(0.5 * margin(means) - 0.5)),
        "orpo": [-means[0], -means[3]] - 0.1 * np.log(sigmoid(margin([m - np.log(1 - np.exp(m)) for m in means]))),
    }[algorithm].mean()


def kto_by_hand(params, reference, reference_point):
    """Texts 0 and 3 have a reward above ½; text 2 has just that."""
    signs = np.array([1, -1, -1, 1])
    log_ratios = np.array([one.sum() for one in by_hand(params, reference)[1]])
    return (1 - 1 / (1 + np.exp(-signs * 0.5 * (log_ratios - reference_point)))).mean()


def central_differences(function, params, step=1e-5):
    gradient = np.zeros(params["logits"].shape)
    for where in np.ndindex(*gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = np.float64(params["logits"])
            moved[where] += sign * step
            ends.append(function({"logits": moved}))
        gradient[where] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def learn_from_pairs(algorithm, params, reference):
    """The state and the info after a step on two pairs, of which the second has its second text preferred."""
    policy = table_policy()
    step = align.make_step(policy, KEEP, settings(algorithm, 1, 4), lambda x: x["reward"], lambda x: x["reward"] > 0)
    data = align.PreferenceData(
        RAGGED, RAGGED["reward"], jnp.asarray([True, False]), policy.log_prob(reference, RAGGED)
    )
    return step(State(params, params), Inputs(jax.random.key(0), reference, HALF, FRESH, data))


@pytest.mark.parametrize("algorithm", ["offline_dpo_ref", "cdpo", "robust_dpo", "ipo", "simpo", "orpo"])
def test_preference_losses_of_ragged_texts_by_hand(algorithm):
    """Sums over a text's tokens, or means over its own number of them."""
    state, info = jax.jit(partial(learn_from_pairs, algorithm))(TABLE, OTHER)
    np.testing.assert_allclose(info.loss, preferences_by_hand(algorithm, TABLE, OTHER), rtol=1e-5)
    np.testing.assert_allclose(info.kl, np.mean([one.sum() for one in by_hand(TABLE, OTHER)[1]]), rtol=1e-5)
    assert (info.reward, info.target_hits) == (0.625, 3)
    expected = central_differences(lambda moved: preferences_by_hand(algorithm, moved, OTHER), TABLE)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(state.optimizer_state["logits"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("floored", [False, True])
def test_kto_of_ragged_texts_by_hand(floored):
    """Its reference point is the mean log-ratio of fresh draws, not below 0, and held constant."""
    params, reference = (TABLE, OTHER) if floored else (OTHER, TABLE)
    state, info = jax.jit(partial(learn_from_pairs, "kto"))(params, reference)
    estimate = np.mean([one.sum() for one in by_hand(params, reference, FRESH)[1]])
    assert (estimate < -0.1) if floored else (estimate > 0.1)
    point = max(estimate, 0.0)
    np.testing.assert_allclose(info.kl, estimate, rtol=1e-5)
    np.testing.assert_allclose(info.loss, kto_by_hand(params, reference, point), rtol=1e-5)
    expected = central_differences(lambda moved: kto_by_hand(moved, reference, point), params)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(state.optimizer_state["logits"], expected, rtol=1e-4, atol=1e-6)


def every_text():
    """Texts of at most two tokens, of which 0 ends: (0), (1, 0), (1, 1); all nine pairs of them."""
    tokens, mask = np.array([[0, 0], [1, 0], [1, 1]]), np.array([[1, 0], [1, 1], [1, 1]], bool)
    pairs = np.stack(np.meshgrid(range(3), range(3), indexing="ij"), axis=-1).reshape(9, 2)
    rewards = np.float32([0.3, 2.0, -1.0])
    return pairs, {"tokens": jnp.asarray(tokens[pairs]), "mask": jnp.asarray(mask[pairs]), "reward": rewards[pairs]}


def text_log_probs(params):
    first, second = jax.nn.log_softmax(params["logits"])
    return jnp.stack([first[0], first[1] + second[0], first[1] + second[1]])


def small(logits):
    return {"logits": jnp.asarray(logits, jnp.float32), "values": jnp.asarray([0.4, -0.3], jnp.float32)}


def expected_gradient(algorithm, critic, params, reference, coefficients):
    """The mean over all pairs of texts, each as probable as the policy makes it: exact, nothing is drawn."""
    pairs, x = every_text()
    one = partial(updates, algorithm, table_policy(critic=critic))
    states, _ = jax.jit(jax.vmap(lambda x: one(params, reference, x, coefficients)))(x)
    probs = np.exp(np.float64(text_log_probs(params)))
    return np.tensordot(probs[pairs].prod(axis=1), np.float64(states.optimizer_state["logits"]), axes=1)


@pytest.mark.parametrize(("algorithm", "critic"), [("reinforce", False), ("ppo", False), ("ppo", True)])
def test_the_expected_gradient_is_that_of_the_objective_and_vanishes_at_the_gibbs_policy(algorithm, critic):
    params, reference = small([[0.5, -0.2], [0.1, 1.0]]), small([[-0.3, 0.4], [0.6, -0.5]])
    coefficients = HALF._replace(gae_lambda=jnp.float32(1.0))
    rewards = jnp.asarray([0.3, 2.0, -1.0])

    def objective(params):
        log_probs = text_log_probs(params)
        return (jnp.exp(log_probs) * (rewards - 0.5 * (log_probs - text_log_probs(reference)))).sum()

    ours = expected_gradient(algorithm, critic, params, reference, coefficients)
    np.testing.assert_allclose(ours, -jax.grad(objective)(params)["logits"], rtol=1e-4, atol=1e-6)
    assert np.abs(ours).max() > 0.1
    gibbs = np.exp(np.asarray(text_log_probs(reference) + rewards / 0.5))
    best = small(np.log([[gibbs[0], gibbs[1] + gibbs[2]], [gibbs[1], gibbs[2]]]))
    np.testing.assert_allclose(expected_gradient(algorithm, critic, best, reference, coefficients), 0, atol=1e-5)


def test_a_critic_is_fitted_to_the_returns():
    """With λ = 1 its gradient is the coefficient times V less the mean return, over the texts that reach a step."""
    coefficients = HALF._replace(gae_lambda=jnp.float32(1.0))
    state, _ = jax.jit(partial(updates, "ppo", table_policy(critic=True)))(TABLE, OTHER, RAGGED, coefficients)
    advantages = advantages_by_hand([0.5 * one for one in by_hand(TABLE, OTHER)[1]], values_by_hand(), 1.0)
    expected = np.zeros(4)
    for mask, of_text in zip(np.asarray(RAGGED["mask"]), advantages, strict=True):
        expected[mask] -= 0.1 * of_text / 4
    np.testing.assert_allclose(state.optimizer_state["values"], expected, rtol=1e-5)


# --- the optimiser ----------------------------------------------------------------------------------------------------


def adam_by_hand(gradients, schedule):
    """Directions for the gradients of updates, each scaled by its value of the schedule (arXiv 1412.6980)."""
    m, v, directions = 0.0, 0.0, []
    for t, (gradient, scale) in enumerate(zip(gradients, schedule, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        directions.append(scale * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
    return directions


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_optimiser_by_hand(accumulate):
    """Two updates of a rise, then four of a half cosine; clipping, and the mean of gradients, come before Adam."""
    optimizer = align.make_optimizer(6, warmup_updates=2, max_gradient_norm=1.0, accumulate=accumulate)
    gradients = (
        np.random.default_rng(1).normal(size=(6 * accumulate, 3)) * np.geomspace(0.1, 10, 6 * accumulate)[:, None]
    )
    params, update = {"w": jnp.zeros(3)}, jax.jit(optimizer.update)
    state, found = optimizer.init(params), []
    for gradient in gradients:
        direction, state = update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        found.append(np.asarray(direction["w"]))
    means = gradients.reshape(6, accumulate, 3).mean(axis=1)
    norms = np.linalg.norm(means, axis=1)
    assert (norms < 1).any() and (norms > 1).any()
    schedule = [1 / 3, 2 / 3, *(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))]
    expected = adam_by_hand(means / np.maximum(norms, 1)[:, None], schedule)
    np.testing.assert_allclose(found[accumulate - 1 :: accumulate], expected, rtol=1e-4)
    if accumulate > 1:
        assert not np.any(found[::accumulate])


# --- failures, traces, pairing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("offline_dpo_data", marks=pytest.mark.slow)])
def test_a_run_that_goes_bad_stays_one_run(bad, algorithm):
    chosen, keys = settings(algorithm), jax.random.split(jax.random.key(0), 3)

    def at(rates):
        return jax.vmap(lambda key, rate: run(chosen, key, BASE, BASE, DEFAULTS._replace(learning_rate=rate)))(
            keys, jnp.asarray(rates, jnp.float32)
        )

    (healthy, sound), (struck, record) = at([0.02, 0.02, 0.02]), at([0.02, bad, 0.02])
    assert sound.failed.tolist() == [False, False, False]
    assert record.failed.tolist() == [False, True, False]
    for index in (0, 2):
        assert leaves_equal(*(jax.tree.map(lambda leaf: leaf[index], model) for model in (healthy, struck)))  # noqa: B023
    assert not all(np.isfinite(leaf[1]).all() for leaf in struck)


def test_the_fixed_set_of_pairs_is_one_for_all_arms_and_another_for_another_key():
    make = jax.jit(
        lambda key, reference: align.preference_dataset(
            mixture.policy, key, BASE, reference, WIDE_BUMP, DEFAULTS, settings("offline_dpo_data")
        )
    )
    other = mixture.make(np.ones(8), np.zeros((8, 2)), np.ones((8, 2)))
    of_base, of_other = (make(jax.random.key(3), reference) for reference in (BASE, other))
    assert leaves_equal(of_base[:3], of_other[:3])
    assert not leaves_equal(of_base.reference_log_prob, of_other.reference_log_prob)
    assert not leaves_equal(make(jax.random.key(4), BASE).x, of_base.x)
    np.testing.assert_allclose(of_base.rewards[0], WIDE_BUMP(of_base.x[0]), rtol=1e-5)
    assert of_base.first_preferred.shape == (16, 32)


@pytest.mark.slow
def test_the_reference_may_have_another_number_of_components_and_matters():
    student = mixture.make([0.5, 0.5], [[0, 0], [1, 1]], 0.2 * np.ones((2, 2)))
    held_to_itself, _ = run(settings("ppo"), jax.random.key(0), student, student, DEFAULTS)
    held_to_base, _ = run(settings("ppo"), jax.random.key(0), student, BASE, DEFAULTS)
    assert held_to_base.num_components == 2
    assert not leaves_equal(held_to_itself, held_to_base)


def counting_policy():
    """A categorical policy over two outcomes whose draws are scripted: step t hits where the script says."""
    return Policy(
        log_prob=lambda params, x: jax.nn.log_softmax(params)[x][:, None],
        sample=lambda params, key, n, temperature: jax.random.bernoulli(key, 0.5, (n,)).astype(jnp.int32),
        num_steps=lambda x: jnp.ones(x.shape[0]),
    )


def test_the_first_hit_and_all_hits_are_recorded():
    def record(hits):
        infos = align.Info(*(jnp.zeros(4) for _ in range(4)), target_hits=jnp.asarray(hits))
        return align._record({"w": jnp.zeros(2)}, infos)

    assert record([0, 0, 3, 1]).first_hit_step == 2
    assert record([0, 0, 3, 1]).target_hits == 4
    assert record([2, 0, 0, 0]).first_hit_step == 0
    assert np.isnan(record([0, 0, 0, 0]).first_hit_step)
    assert not record([0, 0, 0, 0]).failed


@pytest.mark.parametrize("where", ["loss", "params"])
def test_a_loss_or_parameter_that_is_not_finite_is_a_failure(where):
    bad = jnp.asarray([0.0, jnp.nan])
    infos = align.Info(bad if where == "loss" else jnp.zeros(2), *(jnp.zeros(2) for _ in range(4)))
    assert align._record({"w": bad if where == "params" else jnp.zeros(2)}, infos).failed


@pytest.mark.slow
def test_align_serves_a_categorical_policy_and_orpo_there():
    policy, start = counting_policy(), jnp.zeros(2)
    for algorithm in ("reinforce", "orpo", "kto"):
        model, record = jax.jit(
            lambda key, chosen: align.align(
                policy, key, start, start, lambda x: x.astype(jnp.float32), DEFAULTS, chosen, truth=start
            ),
            static_argnums=1,
        )(jax.random.key(0), settings(algorithm))
        assert model[1] > model[0]
        assert not record.failed


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "sgd"}, "algorithm must be one of .*'sgd'"),
        ({"num_updates": 0}, "num_updates must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"dataset_batches": 0}, "dataset_batches must be a whole number of at least 1"),
        ({"batch_size": 2}, "batch_size must be even and at least 4"),
        ({"batch_size": 7}, "batch_size must be even"),
        ({"algorithm": "grpo", "batch_size": 24, "group_size": 16}, "divide batch_size"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"algorithm": "ppo", "num_updates": 10, "epochs": 4}, "multiple of epochs"),
        ({"algorithm": "grpo", "num_updates": 10, "epochs": 4}, "multiple of epochs"),
    ],
)
def test_settings_refuse_bad_input_and_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignmentSettings(**arguments)


def test_orpo_is_refused_on_densities():
    with pytest.raises(ValueError, match="orpo needs probabilities below 1"):
        align.align(mixture.policy, jax.random.key(0), BASE, BASE, WIDE_BUMP, DEFAULTS, settings("orpo"), truth=BASE)


@pytest.mark.parametrize("algorithm", [name for name, spec in ALGORITHMS.items() if spec.data == "truth"])
def test_an_algorithm_that_learns_from_the_truth_asks_for_it(algorithm):
    with pytest.raises(ValueError, match=f"{algorithm} learns from draws of the truth"):
        align.align(mixture.policy, jax.random.key(0), BASE, BASE, WIDE_BUMP, DEFAULTS, settings(algorithm))


@pytest.mark.parametrize(("algorithm", "steps"), [("ppo", 2), ("grpo", 2), ("reinforce", 8), ("online_dpo", 8)])
def test_epochs_count_as_updates_only_where_they_are_made(algorithm, steps):
    assert settings(algorithm, 8, epochs=4).num_steps == steps

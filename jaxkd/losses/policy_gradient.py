"""Policy-gradient surrogates and advantages, and the estimators of the KL divergence that go with them.

Every loss is elementwise, one value per example (or per token, where the arrays are [batch, steps]); arrays that
belong together must agree in shape, else `ValueError`. Rewards and advantages are in the units of the reward,
log-probabilities and KL estimates in nats.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxkd.losses._checks import require, require_same_shape


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """Each reward less the mean of all the *others*, a baseline that leaves the policy gradient unbiased.

    Ahmadian et al., arXiv 2402.14740 (RLOO), whose samples share one prompt.

    Args:
      rewards: float[batch], batch ≥ 2.

    Returns:
      float[batch], with mean 0.

    Raises:
      ValueError: fewer than two rewards, or not one axis.
    """
    require(rewards.ndim == 1 and rewards.shape[0] >= 2, f"rewards must be [batch] with batch ≥ 2, got {rewards.shape}")
    batch = rewards.shape[0]
    # r − (Σ − r)/(n − 1) rearranged: one subtraction of like quantities instead of two.
    return (rewards - jnp.mean(rewards)) * (batch / (batch - 1))


def grpo_advantages(rewards: jax.Array, epsilon: ArrayLike) -> jax.Array:
    """Rewards standardised within their group.

    Shao et al., arXiv 2402.03300, section 4.1. The standard deviation is the sample's, with group_size − 1, as in
    TRL; the paper leaves it open. Dividing by it makes the effective KL coefficient that times the deviation.

    Args:
      rewards: float[groups, group_size], group_size ≥ 2.
      epsilon: added to the standard deviation, positive, in the units of the reward; a group of equal rewards then
        gets advantages of 0.

    Returns:
      float[groups, group_size], without units.

    Raises:
      ValueError: groups of fewer than two, not two axes, or a concrete `epsilon` that is not positive.
    """
    require(
        rewards.ndim == 2 and rewards.shape[1] >= 2,
        f"rewards must be [groups, group_size] with group_size ≥ 2, got {rewards.shape}",
    )
    require(epsilon > 0, f"epsilon must be positive, got {epsilon}")
    deviation = jnp.std(rewards, axis=1, ddof=1, keepdims=True)
    return (rewards - jnp.mean(rewards, axis=1, keepdims=True)) / (deviation + epsilon)


def reward_to_go_advantages(rewards: jax.Array, penalties: jax.Array) -> jax.Array:
    """Advantages of each step of a sequence whose steps are penalised and whose reward comes at its end.

    The return from step t on is R − Σ_{s≥t} penalty_s: what was paid before t is not its doing. The baseline is the
    mean over the *other* sequences of their whole penalised rewards, R − Σ penalty, at every step alike. It depends
    on nothing that the sequence itself drew, so the gradient stays unbiased, and unlike a baseline for each position it
    is a mean over the whole batch where few sequences are long. With one step these are the `leave_one_out_advantages`
    of R − penalty, exactly.

    Ahmadian et al., arXiv 2402.14740 (RLOO), whose whole sequence is one action; here every token is one.

    Args:
      rewards: float[batch], batch ≥ 2, of whole sequences.
      penalties: float[batch, steps], in the units of the reward; 0 at padding.

    Returns:
      float[batch, steps]; at padding, numbers without meaning.

    Raises:
      ValueError: fewer than two rewards, or penalties of another batch.
    """
    require(
        penalties.ndim == 2 and penalties.shape[:1] == rewards.shape,
        f"rewards [batch] and penalties [batch, steps] do not fit: got {rewards.shape} and {penalties.shape}",
    )
    whole = leave_one_out_advantages(rewards - penalties.sum(axis=1))
    # The return from t on is the whole one plus what was paid before t; of one step that is a constant 0, which XLA
    # folds away.
    paid_before = jnp.pad(jnp.cumsum(penalties[:, :-1], axis=1), ((0, 0), (1, 0)))
    return whole[:, None] + paid_before


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    discount: ArrayLike,
    gae_lambda: ArrayLike,
) -> jax.Array:
    """Generalised advantage estimates: Â_t = Σ_l (γλ)^l δ_{t+l}, with δ_t = r_t + γ V_{t+1} − V_t.

    Schulman et al., arXiv 1506.02438, equation 16, of episodes that end: V after the last step is 0. At λ = 1 it is
    the discounted return less V_t, whatever V; below, it has less variance, and a bias until V is right.

    Args:
      rewards: float[batch, steps], of each step.
      values: float[batch, steps], V_t, predicted before step t is taken; in the units of the reward.
      mask: bool[batch, steps], the steps that count, on which padding has no influence: a step is followed by the next
        that counts. None where all do.
      discount: γ in [0, 1].
      gae_lambda: λ in [0, 1].

    Returns:
      float[batch, steps], 0 at padding. Advantages + values are the λ-returns, to which a critic is fitted.

    Raises:
      ValueError: shapes that differ or are not two axes, or a concrete γ or λ out of range.
    """
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    require_same_shape(rewards=rewards, values=values, mask=mask)
    require(rewards.ndim == 2, f"rewards must be [batch, steps], got {rewards.shape}")
    for name, number in (("discount", discount), ("gae_lambda", gae_lambda)):
        require((number >= 0) & (number <= 1), f"{name} must be in [0, 1], got {number}")

    def earlier(later, step):
        later_value, later_advantage = later
        reward, value, counts = step
        error = reward + discount * later_value - value
        advantage = error + discount * gae_lambda * later_advantage
        later = jnp.where(counts, value, later_value), jnp.where(counts, advantage, later_advantage)
        return later, jnp.where(counts, advantage, jnp.zeros_like(advantage))

    end = jnp.zeros_like(values[:, 0])
    _, advantages = lax.scan(earlier, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T


def reinforce(log_prob: jax.Array, advantages: jax.Array) -> jax.Array:
    """The score-function surrogate: only its gradient means anything, its value does not.

    Williams (1992); arXiv 2402.14740, section 2.

    Args:
      log_prob: float[batch], nats, at samples of the current policy.
      advantages: float[batch], held constant under differentiation.

    Returns:
      float[batch], to be minimised.
    """
    require_same_shape(log_prob=log_prob, advantages=advantages)
    return -(jax.lax.stop_gradient(advantages) * log_prob)


def clipped(
    log_prob: jax.Array, behaviour_log_prob: jax.Array, advantages: jax.Array, clip_range: ArrayLike
) -> jax.Array:
    """Where the clip of `ppo_clip` acts, so that its gradient is zero; the mean of this is the clip fraction.

    The clip is one-sided: it stops a ratio that has already moved the way its advantage asks, and never stops one
    that has moved the other way.

    Args:
      log_prob: float[batch], nats, under the current policy.
      behaviour_log_prob: float[batch], nats, under the policy that drew the samples.
      advantages: float[batch].
      clip_range: ε in (0, 1).

    Returns:
      bool[batch].

    Raises:
      ValueError: shapes that differ, or a concrete `clip_range` outside (0, 1); a traced one is not checked.
    """
    require_same_shape(log_prob=log_prob, behaviour_log_prob=behaviour_log_prob, advantages=advantages)
    require((clip_range > 0) & (clip_range < 1), f"clip_range must be in (0, 1), got {clip_range}")
    log_ratio = log_prob - behaviour_log_prob
    above = (advantages > 0) & (log_ratio > jnp.log1p(clip_range))
    below = (advantages < 0) & (log_ratio < jnp.log1p(-clip_range))
    return above | below


def ppo_clip(
    log_prob: jax.Array, behaviour_log_prob: jax.Array, advantages: jax.Array, clip_range: ArrayLike
) -> jax.Array:
    """The clipped surrogate of proximal policy optimisation, its sign turned: to be minimised.

    Schulman et al., arXiv 1707.06347, equation 7. At the behaviour policy its gradient is that of `reinforce`.

    Args:
      log_prob: float[batch], nats, under the current policy.
      behaviour_log_prob: float[batch], nats, under the policy that drew the samples; constant under differentiation.
      advantages: float[batch], constant under differentiation.
      clip_range: ε in (0, 1).

    Returns:
      float[batch], in the units of the advantages.

    Raises:
      ValueError: as `clipped`.
    """
    acts = clipped(log_prob, behaviour_log_prob, advantages, clip_range)
    advantages = jax.lax.stop_gradient(advantages)
    log_ratio = log_prob - jax.lax.stop_gradient(behaviour_log_prob)
    bound = jnp.where(advantages > 0, jnp.log1p(clip_range), jnp.log1p(-clip_range))
    # Clipping before the exponential: a ratio that overflows would otherwise put 0 · ∞ into the gradient.
    return -(advantages * jnp.exp(jnp.where(acts, bound, log_ratio)))


def kl_k1(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
    """KL(π‖π_ref) estimated by the log-ratio itself, at samples of π. Its place is the *reward*.

    In the reward, with stopped gradient, it gives through the score function the gradient of KL(π‖π_ref). In the loss,
    on policy, its expected gradient is zero: it does nothing there but add noise.

    Schulman, "Approximating KL divergence" (2020), k1: unbiased, of high variance, and of either sign.

    Args:
      log_prob: float[batch], nats, under π.
      reference_log_prob: float[batch], nats, under π_ref.

    Returns:
      float[batch], nats.
    """
    require_same_shape(log_prob=log_prob, reference_log_prob=reference_log_prob)
    return log_prob - reference_log_prob


def kl_k2(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
    """KL(π‖π_ref) estimated by half the squared log-ratio, at samples of π. Its place is the *loss*.

    In the loss, on policy, its expected gradient is exactly that of the reverse KL, KL(π‖π_ref), though its value is
    biased. In the reward it gives the gradient of no KL.

    Schulman, "Approximating KL divergence" (2020), k2: biased, of low variance, never negative.

    Args:
      log_prob: float[batch], nats, under π.
      reference_log_prob: float[batch], nats, under π_ref.

    Returns:
      float[batch], nats².
    """
    return 0.5 * jnp.square(kl_k1(log_prob, reference_log_prob))


def kl_k3(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
    """KL(π‖π_ref) estimated by π_ref/π − 1 − log(π_ref/π), at samples of π. Its place is *monitoring*.

    In the loss its expected gradient is not that of KL(π‖π_ref): while the samples are the current policy's, that is
    at the start of every rollout, it is that of KL(π_ref‖π). In the reward it gives, through the score function, that
    of KL(π‖π_ref) − KL(π_ref‖π); both at once, as when the loss is multiplied by the importance ratio, give that of
    KL(π‖π_ref). All this holds where π can reach all that π_ref does.

    Schulman, "Approximating KL divergence" (2020), k3, and arXiv 2402.03300, equation 4: unbiased and never
    negative; it overflows where π has lost what π_ref has.

    Args:
      log_prob: float[batch], nats, under π.
      reference_log_prob: float[batch], nats, under π_ref.

    Returns:
      float[batch], nats.
    """
    log_ratio = kl_k1(log_prob, reference_log_prob)
    return jnp.expm1(-log_ratio) + log_ratio

"""Alignment as pure steps: policy gradient, online preference and offline preference, for any policy.

A step is `step(state, inputs) -> (state, info)`. `align` scans one algorithm's steps from a start to an aligned model;
a host loop may call the same step, jitted. What shapes the computation (`AlignmentSettings`) is static; what varies
over a grid (`Coefficients`) is traced, so one executable serves a whole sweep.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxkd import checks, loops, random
from jaxkd.losses import policy_gradient, preference
from jaxkd.losses.divergence import masked_mean
from jaxkd.optimisation import State, make_optimizer, update
from jaxkd.policy import Draws, Params, Policy
from jaxkd.rewards import Reward, bradley_terry

Step = Callable[[State, "Inputs"], tuple[State, "Info"]]


class Coefficients(NamedTuple):
    """What may be traced and vary from run to run.

    Attributes:
      learning_rate: peak learning rate of Adam; it falls to 0 along a half cosine.
      kl_coef: β, reward units a nat.
      label_temperature: T of the Bradley–Terry labels, in units of reward.
      flip_rate: share of preference labels flipped.
      clip_range: PPO's and GRPO's ε.
      label_smoothing: cDPO's; for robust DPO the assumed flip rate.
      simpo_margin: SimPO's γ, compared with the difference of log-probabilities scaled by β.
      odds_ratio_weight: ORPO's λ.
      desirable_threshold: KTO calls a draw desirable when its reward exceeds this.
      gae_lambda: λ of PPO's advantages, for a policy with a critic.
      value_coef: weight of the critic's loss in PPO's.
    """

    learning_rate: jax.Array | float = 0.02
    kl_coef: jax.Array | float = 1.0
    label_temperature: jax.Array | float = 1.0
    flip_rate: jax.Array | float = 0.0
    clip_range: jax.Array | float = 0.2
    label_smoothing: jax.Array | float = 0.1
    simpo_margin: jax.Array | float = 0.5
    odds_ratio_weight: jax.Array | float = 0.1
    desirable_threshold: jax.Array | float = 0.5
    gae_lambda: jax.Array | float = 0.95
    value_coef: jax.Array | float = 0.1


SEVERAL_UPDATES = ("ppo", "grpo")
"""Algorithms that make several updates on each rollout."""


@dataclass(frozen=True)
class AlignmentSettings:
    """What shapes an alignment (static).

    Attributes:
      algorithm: a name of `ALGORITHMS`.
      num_updates: optimiser updates in all.
      batch_size: draws in a step; preference algorithms see batch_size / 2 pairs.
      epochs: updates on each rollout, for `ppo` and `grpo`.
      group_size: draws in a group of `grpo`.
      dataset_batches: batches in the fixed set of an offline algorithm; they are gone through in turn, again and again.

    Raises:
      ValueError: on an unknown algorithm or a number out of range.
    """

    algorithm: str = "ppo"
    num_updates: int = 400
    batch_size: int = 256
    epochs: int = 4
    group_size: int = 16
    dataset_batches: int = 16

    def __post_init__(self):
        checks.name("algorithm", self.algorithm, ALGORITHMS)
        for name in ("num_updates", "epochs", "dataset_batches"):
            checks.whole(name, getattr(self, name), least=1)
        if self.batch_size < 4 or self.batch_size % 2:
            raise ValueError(f"batch_size must be even and at least 4, got {self.batch_size}")
        if self.group_size < 2 or (self.algorithm == "grpo" and self.batch_size % self.group_size):
            raise ValueError(f"group_size must be at least 2 and divide batch_size, got {self.group_size}")
        if self.num_updates % self.updates_per_step:
            raise ValueError(
                f"num_updates must be a multiple of epochs = {self.epochs} for {self.algorithm}, got {self.num_updates}"
            )

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates in one step."""
        return self.epochs if self.algorithm in SEVERAL_UPDATES else 1

    @property
    def num_steps(self) -> int:
        """Steps in all: rollouts of an on-policy algorithm, batches of an offline one."""
        return self.num_updates // self.updates_per_step


class PreferenceData(NamedTuple):
    """Draws with their rewards; the first half of a batch is paired with the second half.

    Attributes:
      x: draws, batch of them in the policy's own layout.
      rewards: [batch].
      first_preferred: bool[batch / 2], whether the first of each pair is the preferred one.
      reference_log_prob: [batch, steps] (nats), computed once.
    """

    x: Draws
    rewards: jax.Array
    first_preferred: jax.Array
    reference_log_prob: jax.Array


class Inputs(NamedTuple):
    """What a step is given.

    Attributes:
      key: random key (of labels; the draws have keys of their own).
      reference: parameters of π_ref.
      coefficients: traced.
      draws: a batch drawn from the current policy; None for algorithms that use none (`Algorithm.on_policy`).
      data: a batch of an offline algorithm's fixed set; None for the others.
    """

    key: jax.Array
    reference: Params
    coefficients: Coefficients
    draws: Draws | None = None
    data: PreferenceData | None = None


class Info(NamedTuple):
    """What a step reports, all scalars: means over its draws, and how many of them lay on a target.

    Attributes:
      loss: at the step's first update, a critic's included.
      reward: mean.
      kl: mean of log π − log π_ref, nats a draw (a whole text). Over draws of the policy it estimates KL(π‖π_ref); an
        offline preference loss takes it over its fixed data, where it estimates no KL.
      clip_fraction: share of clipped ratios, of all updates' steps.
      target_hits: draws on a target.
      value_loss: a critic's, before its coefficient; 0 without a critic.
    """

    loss: jax.Array
    reward: jax.Array
    kl: jax.Array
    clip_fraction: jax.Array
    target_hits: jax.Array
    # Of numpy: a jax array made on import would start the backend before its devices are chosen.
    value_loss: jax.Array = np.float32(0.0)


class Record(NamedTuple):
    """What is kept of a whole alignment.

    Attributes:
      first_hit_step: index of the first step that saw a draw on a target; NaN if none did.
      target_hits: draws on a target seen in all; a draw of a fixed set counts at every pass.
      clip_fraction: mean share of clipped ratios (0 where nothing clips).
      failed: whether a loss or a final parameter is not finite.
    """

    first_hit_step: jax.Array
    target_hits: jax.Array
    clip_fraction: jax.Array
    failed: jax.Array


@dataclass(frozen=True)
class _Task:
    """What every kind of step is made of; the arguments of `make_step`, the family of the reference filled in."""

    policy: Policy
    optimizer: optax.GradientTransformation
    reward: Reward
    on_target: Callable[[Draws], jax.Array]
    reference_policy: Policy


# --- policy gradient -------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What the updates on one rollout hold constant, float[batch, steps] each, or [batch] (`_without_lone_axis`).

    Attributes:
      log_prob: under the policy that drew (nats).
      reference_log_prob: under π_ref (nats).
      advantages: of each step.
      returns: what a critic is fitted to; None without one.
      mask: bool, the steps that count; None where all do.
    """

    log_prob: jax.Array
    reference_log_prob: jax.Array
    advantages: jax.Array
    returns: jax.Array | None
    mask: jax.Array | None


def _without_lone_axis(log_prob: jax.Array, values: jax.Array | None, mask: jax.Array | None):
    """Log-probabilities [batch, 1] of policies of one step, such as a mixture's, as [batch]; others as they are.

    The axis would come between a density's last operations and the loss's first, which XLA then does not fuse.
    """
    lone = log_prob.shape[1] == 1 and values is None and mask is None
    return (log_prob[:, 0] if lone else log_prob), values


def _step_axes(array: jax.Array) -> tuple[int, ...]:
    """The axis of steps; none where `_without_lone_axis` dropped it."""
    return tuple(range(1, array.ndim))


def _sum_over_steps(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    return _counted(values, mask).sum(axis=_step_axes(values))


def _counted(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zero at steps that don't count."""
    return values if mask is None else jnp.where(mask, values, jnp.zeros_like(values))


def _at_last_step(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """Each draw's reward at the last of its steps that count, [batch, steps]."""
    still_to_come = lax.cumsum(mask.astype(jnp.int32), axis=1, reverse=True)
    return jnp.where(mask & (still_to_come == 1), rewards[:, None], jnp.zeros_like(rewards)[:, None])


def _advantages(variant: str, settings, rewards, values, log_prob, reference_log_prob, mask, coefficients) -> jax.Array:
    """Advantages of each step, the KL penalty where it belongs: in the reward (k1), or for GRPO in the loss."""
    if variant == "grpo":
        grouped = rewards.reshape(-1, settings.group_size)
        advantages = policy_gradient.grpo_advantages(grouped, epsilon=1e-4).reshape(-1)
        return jnp.broadcast_to(jnp.expand_dims(advantages, _step_axes(log_prob)), log_prob.shape)
    penalties = coefficients.kl_coef * _counted(policy_gradient.kl_k1(log_prob, reference_log_prob), mask)
    if log_prob.ndim == 1:
        return policy_gradient.leave_one_out_advantages(rewards - penalties)
    if values is None:
        return policy_gradient.reward_to_go_advantages(rewards, penalties)
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    # Not discounted, for the objective is not; not whitened, which would rescale β as GRPO's deviation does.
    return policy_gradient.gae(_at_last_step(rewards, mask) - penalties, values, mask, 1.0, coefficients.gae_lambda)


def _surrogate(variant: str, log_prob, rollout: Rollout, coefficients: Coefficients) -> jax.Array:
    """The loss of each draw, [batch].

    REINFORCE and PPO sum over a draw's steps, which gives the gradient of the objective J; GRPO takes the mean, as
    its paper does, so that a long text weighs no more than a short one.
    """
    if variant == "reinforce":
        loss = policy_gradient.reinforce(log_prob, rollout.advantages)
    else:
        loss = policy_gradient.ppo_clip(log_prob, rollout.log_prob, rollout.advantages, coefficients.clip_range)
    if variant != "grpo":
        return _sum_over_steps(loss, rollout.mask)
    loss = loss + coefficients.kl_coef * policy_gradient.kl_k3(log_prob, rollout.reference_log_prob)
    return masked_mean(loss, rollout.mask, _step_axes(loss))


def _value_loss(values: jax.Array | None, rollout: Rollout) -> jax.Array | np.float32:
    """Half the squared error of a critic, summed over steps as the surrogate is, and meant over draws; not clipped."""
    if values is None:
        return np.float32(0.0)
    return _sum_over_steps(0.5 * jnp.square(values - rollout.returns), rollout.mask).mean()


def _policy_gradient_step(variant: str, task: _Task, settings: AlignmentSettings) -> Step:
    """One rollout of the current policy and one or more updates on it, by steps: a text's tokens.

    `reinforce`: one update; the KL penalty of each step in the reward with stopped gradient (k1), rewards to go,
    leave-one-out baseline (`losses.policy_gradient.reward_to_go_advantages`); its optimum is the Gibbs policy.
    `ppo`: `epochs` updates with ratios clipped step by step (arXiv 1707.06347, eq. 7) on the same advantages; its first
    update is REINFORCE's. If the policy has a critic, advantages are those of GAE (arXiv 1506.02438, eq. 16) with
    γ = 1, and the critic is fitted to advantages + values with `value_coef` (arXiv 1707.06347, eq. 9).
    `grpo`: advantages standardised within groups, the same at every step, k3 of each step in the loss, mean over a
    draw's steps and then over draws (arXiv 2402.03300, eq. 3 and 4).
    """
    policy, epochs = task.policy, settings.updates_per_step

    def step(state: State, inputs: Inputs) -> tuple[State, Info]:
        coefficients = inputs.coefficients
        x = inputs.draws
        rewards = task.reward(x)
        mask = None if policy.step_mask is None else policy.step_mask(x)
        reference_log_prob = task.reference_policy.log_prob(inputs.reference, x)

        def evaluate(params):
            both = policy.evaluate(params, x) if variant == "ppo" else (policy.log_prob(params, x), None)
            return _without_lone_axis(*both, mask)

        def roll_out(log_prob, values) -> Rollout:
            reference = reference_log_prob.reshape(log_prob.shape)
            advantages = _advantages(variant, settings, rewards, values, log_prob, reference, mask, coefficients)
            returns = None if values is None else advantages + values
            return Rollout(log_prob, reference, advantages, returns, mask)

        def total(log_prob, values, rollout):
            loss, value_loss = _surrogate(variant, log_prob, rollout, coefficients).mean(), _value_loss(values, rollout)
            return loss if values is None else loss + coefficients.value_coef * value_loss, value_loss

        def first_loss(params):
            log_prob, values = evaluate(params)
            rollout = roll_out(*lax.stop_gradient((log_prob, values)))
            loss, value_loss = total(log_prob, values, rollout)
            return loss, (rollout, value_loss)

        def later_loss(params, rollout):
            log_prob, values = evaluate(params)
            acts = policy_gradient.clipped(log_prob, rollout.log_prob, rollout.advantages, coefficients.clip_range)
            loss, _ = total(log_prob, values, rollout)
            return loss, masked_mean(acts.astype(jnp.float32), mask)

        (loss, (rollout, value_loss)), gradient = jax.value_and_grad(first_loss, has_aux=True)(state.params)
        state = update(state, gradient, task.optimizer, coefficients.learning_rate)

        def epoch(state, _):
            (_, acts), gradient = jax.value_and_grad(later_loss, has_aux=True)(state.params, rollout)
            return update(state, gradient, task.optimizer, coefficients.learning_rate), acts

        clip_fraction = jnp.float32(0.0)
        if epochs > 1:
            state, acts = lax.scan(epoch, state, length=epochs - 1)
            clip_fraction = acts.sum() / epochs
        kl = _sum_over_steps(rollout.log_prob - rollout.reference_log_prob, mask).mean()
        return state, Info(loss, rewards.mean(), kl, clip_fraction, task.on_target(x).sum(), value_loss)

    return step


# --- preferences -----------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """One side of each pair, [pairs] each: sums and per-step means of log-probabilities and log-ratios (nats)."""

    log_ratio: jax.Array
    mean_log_prob: jax.Array
    mean_log_ratio: jax.Array


PREFERENCE_LOSSES: dict[str, Callable[[Scores, Scores, Coefficients], jax.Array]] = {
    "dpo": lambda chosen, rejected, c: preference.dpo(chosen.log_ratio, rejected.log_ratio, c.kl_coef),
    "cdpo": lambda chosen, rejected, c: preference.cdpo(
        chosen.log_ratio, rejected.log_ratio, c.kl_coef, c.label_smoothing
    ),
    "robust_dpo": lambda chosen, rejected, c: preference.robust_dpo(
        chosen.log_ratio, rejected.log_ratio, c.kl_coef, c.label_smoothing
    ),
    "ipo": lambda chosen, rejected, c: preference.ipo(chosen.mean_log_ratio, rejected.mean_log_ratio, c.kl_coef),
    "simpo": lambda chosen, rejected, c: preference.simpo(
        chosen.mean_log_prob, rejected.mean_log_prob, c.kl_coef, c.simpo_margin
    ),
    "orpo": lambda chosen, rejected, c: preference.orpo(
        chosen.mean_log_prob, rejected.mean_log_prob, c.odds_ratio_weight
    ),
}


def _scores(policy: Policy, params, data: PreferenceData) -> tuple[Scores, Scores, jax.Array]:
    """Scores of the chosen and the rejected side of each pair, and the log-ratios of all draws, [batch]."""
    log_prob = policy.log_prob(params, data.x).sum(axis=-1)
    log_ratio = log_prob - data.reference_log_prob.sum(axis=-1)
    num_steps = policy.num_steps(data.x)
    halves = [array.reshape(2, -1) for array in (log_ratio, log_prob / num_steps, log_ratio / num_steps)]
    # Swapping log-probabilities rather than draws leaves the draws opaque and moves a few numbers a pair.
    chosen = Scores(*(jnp.where(data.first_preferred, half[0], half[1]) for half in halves))
    rejected = Scores(*(jnp.where(data.first_preferred, half[1], half[0]) for half in halves))
    return chosen, rejected, log_ratio


def label_pairs(reference_policy: Policy, key, x: Draws, rewards, reference: Params, coefficients: Coefficients):
    """Pair the first half of a batch with the second, label the pairs and score them under the reference."""
    first, second = rewards.reshape(2, -1)
    preferred = bradley_terry(key, first, second, coefficients.label_temperature, coefficients.flip_rate)
    return PreferenceData(x, rewards, preferred, reference_policy.log_prob(reference, x))


def _online_pairs(task: _Task, inputs: Inputs) -> PreferenceData:
    """Draws of the current policy, labelled by Bradley–Terry."""
    x = inputs.draws
    return label_pairs(task.reference_policy, inputs.key, x, task.reward(x), inputs.reference, inputs.coefficients)


def _offline_pairs(task: _Task, inputs: Inputs) -> PreferenceData:
    """The given batch, which carries the reference's log-probabilities."""
    return inputs.data


def _preference_step(loss_name: str, task: _Task, pairs: Callable[[_Task, Inputs], PreferenceData]) -> Step:
    """One update of a preference loss on pairs."""

    def step(state: State, inputs: Inputs) -> tuple[State, Info]:
        data, coefficients = pairs(task, inputs), inputs.coefficients

        def loss(params):
            chosen, rejected, log_ratio = _scores(task.policy, params, data)
            return PREFERENCE_LOSSES[loss_name](chosen, rejected, coefficients).mean(), log_ratio

        (value, log_ratio), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = update(state, gradient, task.optimizer, coefficients.learning_rate)
        kl = log_ratio.mean()
        return state, Info(value, data.rewards.mean(), kl, jnp.float32(0.0), task.on_target(data.x).sum())

    return step


def _kto_step(task: _Task) -> Step:
    """KTO on a given batch, unpaired; desirable means a reward above the threshold (arXiv 2402.01306, eq. 8).

    The reference point z₀ is the mean log-ratio of fresh draws of the current policy, floored at 0.
    """
    policy = task.policy

    def step(state: State, inputs: Inputs) -> tuple[State, Info]:
        data, fresh, coefficients = inputs.data, inputs.draws, inputs.coefficients
        held_to = task.reference_policy.sequence_log_prob(inputs.reference, fresh)
        log_ratio = policy.sequence_log_prob(state.params, fresh) - held_to
        reference_point = preference.kto_reference_point(log_ratio)

        def loss(params):
            log_ratio = (policy.log_prob(params, data.x) - data.reference_log_prob).sum(axis=-1)
            desirable = data.rewards > coefficients.desirable_threshold
            return preference.kto(log_ratio, desirable, reference_point, coefficients.kl_coef).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        state = update(state, gradient, task.optimizer, coefficients.learning_rate)
        hits = task.on_target(data.x).sum()
        return state, Info(value, data.rewards.mean(), log_ratio.mean(), jnp.float32(0.0), hits)

    return step


# --- algorithms by name ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm's name stands for.

    Attributes:
      kind: "policy_gradient", "online_preference", "offline_preference" or "kto".
      variant: the policy-gradient variant or the preference loss.
      data: whose draws an offline algorithm learns from: "reference" (the arm's own) or "truth" (the same for all).
      has_gibbs_optimum: whether the Gibbs policy at β (times the label temperature, for preferences) is its optimum.
      learning_rate: the one that `experiments/tune_learning_rate.py` found best, on seeds kept apart; for
        algorithms without a Gibbs optimum, which it cannot tune, a plain 0.03.
    """

    kind: str
    variant: str
    data: str | None = None
    has_gibbs_optimum: bool = False
    learning_rate: float = 0.03

    @property
    def on_policy(self) -> bool:
        """Whether each step is given draws of the current policy."""
        return self.kind != "offline_preference"

    @property
    def has_reference(self) -> bool:
        """Whether its policy is held to a reference: of SimPO and ORPO it is not, and β is no KL coefficient."""
        return self.variant not in ("simpo", "orpo")

    @property
    def uses_labels(self) -> bool:
        """Whether it learns from labelled pairs, which noise can flip; KTO takes what is desirable from rewards."""
        return self.kind.endswith("_preference")

    def tends_to_gibbs(self, flip_rate=0.0, label_temperature=1.0):
        """Whether the Gibbs policy at β itself is its optimum: flipped labels, or T ≠ 1, move that of preferences.

        Args:
          flip_rate: share of labels flipped; one or an array.
          label_temperature: T of the labels; one or an array.

        Returns:
          bool, in the shape of the two.
        """
        moved = self.uses_labels & ((np.asarray(flip_rate) > 0) | (np.asarray(label_temperature) != 1))
        return self.has_gibbs_optimum & ~moved


ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm("policy_gradient", "reinforce", has_gibbs_optimum=True, learning_rate=0.1),
    "ppo": Algorithm("policy_gradient", "ppo", has_gibbs_optimum=True, learning_rate=0.1),
    "grpo": Algorithm("policy_gradient", "grpo"),
    "online_dpo": Algorithm("online_preference", "dpo", has_gibbs_optimum=True, learning_rate=0.1),
    "offline_dpo_ref": Algorithm("offline_preference", "dpo", "reference", has_gibbs_optimum=True, learning_rate=0.06),
    "offline_dpo_data": Algorithm("offline_preference", "dpo", "truth", has_gibbs_optimum=True, learning_rate=0.06),
    "cdpo": Algorithm("offline_preference", "cdpo", "truth"),
    "robust_dpo": Algorithm("offline_preference", "robust_dpo", "truth"),
    "ipo": Algorithm("offline_preference", "ipo", "truth"),
    "simpo": Algorithm("offline_preference", "simpo", "truth"),
    "kto": Algorithm("kto", "kto", "truth"),
    "orpo": Algorithm("offline_preference", "orpo", "truth"),
}
"""Every algorithm under its own name; the offline relatives of DPO learn from the fixed set of the truth's pairs."""


def check_label_noise(flag: str, algorithms: Sequence[str], shares: Sequence[float]) -> None:
    """Raise ValueError where label noise would change nothing, or leave an algorithm undefined."""
    noise = [share for share in shares if share > 0]
    using = [name for name, one in ALGORITHMS.items() if one.uses_labels]
    if noise and (without := [name for name in algorithms if name not in using]):
        raise ValueError(
            f"{flag} must be 0 for {', '.join(without)}, which use no preference labels; got {noise} "
            f"(algorithms with labels: {', '.join(using)})"
        )
    if "robust_dpo" in algorithms and max(noise, default=0.0) >= 0.5:
        raise ValueError(f"{flag} must be below 0.5 for robust_dpo, whose loss divides by 1 − 2ε; got {noise}")


def check_label_temperature(flag: str, algorithms: Sequence[str], temperature: float) -> None:
    """Raise ValueError on a temperature of labels that is not above 0, or that no algorithm would use."""
    checks.number(flag, temperature, above=0)
    if not any(ALGORITHMS[name].uses_labels for name in algorithms):
        raise ValueError(f"{flag} is for what learns from preference labels, not for {', '.join(algorithms)}")


def check_updates(flag: str, algorithms: Sequence[str], num_updates: int, epochs: int) -> None:
    """Raise ValueError where updates do not fill the last rollout of an algorithm."""
    for name in algorithms:
        if name in SEVERAL_UPDATES and num_updates % epochs:
            raise ValueError(
                f"{flag} must be a multiple of {epochs}, as {name} makes so many a rollout; got {num_updates}"
            )


def largest_group(batch_size: int) -> int:
    """A group for GRPO: the largest of 16, 8, 4 and 2 draws that divides a batch; 2 where none does."""
    return next((size for size in (16, 8, 4) if batch_size % size == 0), 2)


def label_coefficients(algorithm: str, label_noise: Any) -> dict[str, Any]:
    """The entries of `Coefficients` that a share of flipped labels sets; robust DPO's ε is that share."""
    own = {"label_smoothing": label_noise} if algorithm == "robust_dpo" else {}
    return {"flip_rate": label_noise} | own


def make_step(
    policy: Policy,
    optimizer,
    settings: AlignmentSettings,
    reward: Reward,
    on_target,
    reference_policy: Policy | None = None,
) -> Step:
    """The step of the settings' algorithm.

    Args:
      policy: the family of models that is trained.
      optimizer: of unit learning rate.
      settings: static; see `AlignmentSettings`.
      reward: `(x) -> float[batch]`.
      on_target: `(x) -> bool[batch]`, which draws count as target hits; only recorded.
      reference_policy: the family of the reference where it is another: a language model's functions hold what its
        parameters' shapes do not tell (rotary base, norm, tied head).

    Raises:
      ValueError: for ORPO on a policy of densities, where odds do not exist.
    """
    algorithm = ALGORITHMS[settings.algorithm]
    if algorithm.variant == "orpo" and policy.is_density:
        raise ValueError("orpo needs probabilities below 1: it is undefined on densities such as a Gaussian mixture's")
    task = _Task(policy, optimizer, reward, on_target, reference_policy or policy)
    if algorithm.kind == "policy_gradient":
        return _policy_gradient_step(algorithm.variant, task, settings)
    if algorithm.kind == "kto":
        return _kto_step(task)
    return _preference_step(algorithm.variant, task, _online_pairs if algorithm.on_policy else _offline_pairs)


def preference_dataset(
    policy: Policy, key, source: Params, reference: Params, reward: Reward, coefficients, settings: AlignmentSettings
) -> PreferenceData:
    """A fixed set of pairs drawn from a source, its leading axis the batches."""

    def batch(key):
        draw_key, label_key = random.keys(key, 2)
        x = policy.sample(source, draw_key, settings.batch_size, 1.0)
        return label_pairs(policy, label_key, x, reward(x), reference, coefficients)

    return jax.vmap(batch)(random.keys(key, settings.dataset_batches))


def align(
    policy: Policy,
    key: jax.Array,
    start: Params,
    reference: Params,
    reward: Reward,
    coefficients: Coefficients,
    settings: AlignmentSettings,
    *,
    truth: Params | None = None,
    on_target: Callable[[Draws], jax.Array] = lambda x: jnp.zeros((), bool),
) -> tuple[Params, Record]:
    """Align a policy from a start, held to a reference; one pure function, to be jitted and vmapped.

    Args:
      policy: the family of models.
      key: random key; equal keys give paired runs.
      start: parameters at which the policy starts.
      reference: parameters of π_ref; they are never updated and may be of another shape than `start`.
      reward: `(x) -> float[batch]`.
      coefficients: traced; see `Coefficients`.
      settings: static; see `AlignmentSettings`.
      truth: parameters of p*, for the algorithms that learn from its draws.
      on_target: `(x) -> bool[batch]`, which draws count as target hits; only recorded.

    Returns:
      The aligned parameters, and what was recorded on the way.

    Raises:
      ValueError: when the algorithm learns from the truth's draws and no truth is given.
    """
    algorithm = ALGORITHMS[settings.algorithm]
    if algorithm.data == "truth" and truth is None:
        raise ValueError(f"{settings.algorithm} learns from draws of the truth: give `truth`")
    optimizer = make_optimizer(settings.num_updates)
    step = make_step(policy, optimizer, settings, reward, on_target)
    draw_key, label_key, data_key = random.keys(key, 3)
    data = None
    if algorithm.data:
        source = truth if algorithm.data == "truth" else reference
        data = preference_dataset(policy, data_key, source, reference, reward, coefficients, settings)

    def batches(params, key, index):
        draws = policy.sample(params, key, settings.batch_size, 1.0) if algorithm.on_policy else None
        index = index % settings.dataset_batches
        return draws, jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), data)

    def body(carry, inputs):
        state, draws, batch = carry
        label_key, next_draw_key, next_index = inputs
        state, info = step(state, Inputs(label_key, reference, coefficients, draws, batch))
        # What the next step learns from is carried: made where it is used, XLA would draw it, or cut it out of the
        # data set, anew inside every consumer, and an update would take two to four times as long.
        return (state, *batches(state.params, next_draw_key, next_index)), info

    # One draw more than there are steps: the last is not used.
    draw_keys = random.keys(draw_key, settings.num_steps + 1)
    inputs = (random.keys(label_key, settings.num_steps), draw_keys[1:], jnp.arange(1, settings.num_steps + 1))
    first = (State(start, loops.per_run(optimizer.init(start), start)), *batches(start, draw_keys[0], 0))
    (state, *_), infos = lax.scan(body, first, inputs)
    return state.params, _record(state.params, infos)


def _record(params: Params, infos: Info) -> Record:
    hit = infos.target_hits > 0
    first = jnp.where(hit.any(), jnp.argmax(hit).astype(jnp.float32), math.nan)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
    return Record(
        first_hit_step=first,
        target_hits=infos.target_hits.sum().astype(jnp.float32),
        clip_fraction=infos.clip_fraction.mean(),
        failed=~(finite & jnp.isfinite(infos.loss).all()),
    )

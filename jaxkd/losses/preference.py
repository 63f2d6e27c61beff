"""Preference losses, in nats, on log-ratios or log-probabilities of whole sequences.

Notation: y is an answer to x, π the policy, π_ref the fixed reference, and log_ratio = log π(y|x) − log π_ref(y|x).
Every function is elementwise and returns one loss per example; arrays that belong together must agree in shape,
else `ValueError`.

Coefficients are Python numbers or traced arrays. Only a concrete one can be checked when it is passed: an impossible
value then raises `ValueError`, while a traced one goes through as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkd.losses._checks import require, require_boolean, require_same_shape


def _require_positive(name: str, coefficient: ArrayLike) -> None:
    require((coefficient > 0) & (coefficient < np.inf), f"{name} must be positive and finite, got {coefficient}")


def _reward_margin(chosen_log_ratio: jax.Array, rejected_log_ratio: jax.Array, kl_coef: ArrayLike) -> jax.Array:
    require_same_shape(chosen=chosen_log_ratio, rejected=rejected_log_ratio)
    _require_positive("kl_coef", kl_coef)
    return kl_coef * (chosen_log_ratio - rejected_log_ratio)


def dpo(chosen_log_ratio: jax.Array, rejected_log_ratio: jax.Array, kl_coef: ArrayLike) -> jax.Array:
    """Direct preference optimisation: the negative log-likelihood of a Bradley–Terry preference.

    Rafailov et al., arXiv 2305.18290, equation 7. It is log 2 where policy and reference agree.

    Args:
      chosen_log_ratio: float[batch], nats.
      rejected_log_ratio: float[batch], nats.
      kl_coef: the coefficient β > 0 of the KL penalty that the loss implies.

    Returns:
      float[batch], nats.
    """
    return -jax.nn.log_sigmoid(_reward_margin(chosen_log_ratio, rejected_log_ratio, kl_coef))


def cdpo(
    chosen_log_ratio: jax.Array, rejected_log_ratio: jax.Array, kl_coef: ArrayLike, label_smoothing: ArrayLike
) -> jax.Array:
    """Conservative DPO: cross-entropy against labels that are true with probability 1 − label_smoothing.

    Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023). The loss is smallest at a finite
    margin, that of a preference of strength 1 − label_smoothing.

    Args:
      chosen_log_ratio: float[batch], nats.
      rejected_log_ratio: float[batch], nats.
      kl_coef: β > 0.
      label_smoothing: the assumed share of flipped labels, in [0, 0.5]; 0 gives `dpo`.

    Returns:
      float[batch], nats.
    """
    require(
        (label_smoothing >= 0) & (label_smoothing <= 0.5), f"label_smoothing must be in [0, 0.5], got {label_smoothing}"
    )
    margin = _reward_margin(chosen_log_ratio, rejected_log_ratio, kl_coef)
    as_labelled, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped


def robust_dpo(
    chosen_log_ratio: jax.Array, rejected_log_ratio: jax.Array, kl_coef: ArrayLike, flip_rate: ArrayLike
) -> jax.Array:
    """Robust DPO: an unbiased estimate, from labels flipped at a known rate, of the DPO loss on clean labels.

    Ray Chowdhury et al., arXiv 2403.00409, section 3. It is unbounded below: a margin that grows without limit
    pays, which is the price of unbiasedness.

    Args:
      chosen_log_ratio: float[batch], nats; chosen by the possibly flipped label.
      rejected_log_ratio: float[batch], nats.
      kl_coef: β > 0.
      flip_rate: the probability ε that a label is flipped, in [0, 0.5); 0 gives `dpo`.

    Returns:
      float[batch], nats.
    """
    require((flip_rate >= 0) & (flip_rate < 0.5), f"flip_rate must be in [0, 0.5), got {flip_rate}")
    margin = _reward_margin(chosen_log_ratio, rejected_log_ratio, kl_coef)
    # The paper's ((1 − ε) ℓ(m) − ε ℓ(−m)) / (1 − 2ε), with ℓ(−m) = ℓ(m) + m put in so that large terms do not cancel.
    return -jax.nn.log_sigmoid(margin) - flip_rate / (1 - 2 * flip_rate) * margin


def ipo(chosen_mean_log_ratio: jax.Array, rejected_mean_log_ratio: jax.Array, kl_coef: ArrayLike) -> jax.Array:
    """Identity preference optimisation: squared distance of the margin from 1/(2β).

    Azar et al., arXiv 2310.12036, equation 17. The log-ratios are means over tokens, as is usual in practice: with
    sums, the one target margin would ask less of every token of a longer answer.

    Args:
      chosen_mean_log_ratio: float[batch], nats per token.
      rejected_mean_log_ratio: float[batch], nats per token.
      kl_coef: the paper's regularisation τ > 0.

    Returns:
      float[batch], nats² per token².
    """
    require_same_shape(chosen=chosen_mean_log_ratio, rejected=rejected_mean_log_ratio)
    _require_positive("kl_coef", kl_coef)
    return jnp.square(chosen_mean_log_ratio - rejected_mean_log_ratio - 1 / (2 * kl_coef))


def simpo(
    chosen_mean_log_prob: jax.Array, rejected_mean_log_prob: jax.Array, scale: ArrayLike, margin: ArrayLike
) -> jax.Array:
    """Simple preference optimisation: length-normalised and without a reference.

    Meng et al., arXiv 2405.14734, equation 6.

    Args:
      chosen_mean_log_prob: float[batch], nats per token.
      rejected_mean_log_prob: float[batch], nats per token.
      scale: the paper's β > 0. No KL coefficient: nothing holds the policy near a reference.
      margin: the paper's γ ≥ 0, compared with the *scaled* difference (TRL's `simpo_gamma` is the same quantity).

    Returns:
      float[batch], nats.
    """
    require_same_shape(chosen=chosen_mean_log_prob, rejected=rejected_mean_log_prob)
    _require_positive("scale", scale)
    require((margin >= 0) & (margin < np.inf), f"margin must be at least 0 and finite, got {margin}")
    return -jax.nn.log_sigmoid(scale * (chosen_mean_log_prob - rejected_mean_log_prob) - margin)


def kto_reference_point(log_ratio: jax.Array) -> jax.Array:
    """KTO's reference point z₀: the mean log-ratio of a batch, floored at 0, held constant under differentiation.

    Ethayarajh et al., arXiv 2402.01306, section 4. The mean over samples of the policy estimates KL(π‖π_ref), which
    is never negative though its estimate may be. Take *fresh* samples: on the examples that are being scored it
    estimates no KL.

    Args:
      log_ratio: float[batch], nats, at answers drawn from the policy.

    Returns:
      float[], nats.
    """
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(log_ratio), 0.0))


def kto(
    log_ratio: jax.Array,
    desirable: jax.Array,
    reference_point: ArrayLike,
    kl_coef: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Kahneman–Tversky optimisation: one answer at a time, each desirable or not.

    Ethayarajh et al., arXiv 2402.01306, section 4: λ − λ·σ(±β(log_ratio − z₀)), with + for desirable answers. Its
    gradient vanishes on *both* sides of the reference point.

    Args:
      log_ratio: float[batch], nats.
      desirable: bool[batch].
      reference_point: z₀, nats, see `kto_reference_point`.
      kl_coef: β > 0.
      desirable_weight: λ of desirable answers, at least 0.
      undesirable_weight: λ of the others, at least 0.

    Returns:
      float[batch], between 0 and the weight.

    Raises:
      ValueError: also where `desirable` is not boolean.
    """
    require_same_shape(log_ratio=log_ratio, desirable=desirable)
    require_boolean(desirable=desirable)
    _require_positive("kl_coef", kl_coef)
    for name, weight in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
        require((weight >= 0) & (weight < np.inf), f"{name} must be at least 0 and finite, got {weight}")
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    gain = jnp.where(desirable, 1.0, -1.0) * (kl_coef * (log_ratio - reference_point))
    # 1 − σ(gain) would round to 0 long before σ(−gain) does.
    return weight * jax.nn.sigmoid(-gain)


def _log_odds(log_prob: jax.Array) -> jax.Array:
    # log p − log(1 − p). The NaN is added, not selected, so that it reaches the gradient too.
    log_prob = log_prob + jnp.where(log_prob < 0, 0.0, jnp.nan)
    return log_prob - jnp.log(-jnp.expm1(log_prob))


def orpo(chosen_mean_log_prob: jax.Array, rejected_mean_log_prob: jax.Array, odds_ratio_weight: ArrayLike) -> jax.Array:
    """Odds-ratio preference optimisation: likelihood of the chosen answer plus a weighted odds-ratio loss.

    Hong et al., arXiv 2403.07691, equations 6 and 7. Odds exist only for probabilities below 1: a log-*density* may
    be 0 or more, and then ORPO means nothing.

    Args:
      chosen_mean_log_prob: float[batch], nats per token, below 0.
      rejected_mean_log_prob: float[batch], nats per token, below 0.
      odds_ratio_weight: the paper's λ, at least 0.

    Returns:
      float[batch], nats.

    Raises:
      ValueError: also where a log-probability is 0 or more. In traced code nothing can be raised: the loss and its
        gradient are NaN there.
    """
    require_same_shape(chosen=chosen_mean_log_prob, rejected=rejected_mean_log_prob)
    require(
        (odds_ratio_weight >= 0) & (odds_ratio_weight < np.inf),
        f"odds_ratio_weight must be at least 0 and finite, got {odds_ratio_weight}",
    )
    for name, log_prob in {"chosen": chosen_mean_log_prob, "rejected": rejected_mean_log_prob}.items():
        require(
            ~jnp.any(log_prob >= 0),
            f"ORPO needs log-probabilities below 0, but {name}_mean_log_prob is not: is it a log-density, "
            "or the log-probability of an answer without tokens?",
        )
    log_odds_ratio = _log_odds(chosen_mean_log_prob) - _log_odds(rejected_mean_log_prob)
    return -chosen_mean_log_prob - odds_ratio_weight * jax.nn.log_sigmoid(log_odds_ratio)

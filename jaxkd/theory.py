"""What is known without training: the Gibbs optimum of any reference, reward and coefficient, and where it tips.

The maximiser of E[R] − β·KL(π ‖ π_ref) is π*(x) ∝ π_ref(x)·exp(R(x)/β), with J* = β·log E over π_ref of exp(R/β)
(arXiv 2305.18290, eq. 4; Donsker and Varadhan 1975). Here it is known to the accuracy of a quadrature, and for every
policy π: J* − J(π) = β·KL(π ‖ π*), so a shortfall in the objective is a distance to the optimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Gibbs(NamedTuple):
    """The Gibbs policy of a reference, a reward and a coefficient.

    Attributes:
      reward: E over π* of R.
      target_mass: probability of the targets' discs under π*.
      kl: KL(π* ‖ π_ref) (nats).
      objective: J* = β·log E over π_ref of exp(R/β).
      target_log_odds: log(target mass / (1 − target mass)), which stays informative where the mass rounds to 0 or 1.
    """

    reward: jax.Array
    target_mass: jax.Array
    kl: jax.Array
    objective: jax.Array
    target_log_odds: jax.Array


class _Tilted(NamedTuple):
    """A reference tilted by exp(R/β), on the targets and off them, [2]: log of its weight, and its mean reward."""

    log_weight: jax.Array
    reward: jax.Array

    @property
    def log_total(self) -> jax.Array:
        return jnp.logaddexp(*self.log_weight)

    @property
    def log_odds(self) -> jax.Array:
        return self.log_weight[0] - self.log_weight[1]


def _log_shares(inside: jax.Array) -> jax.Array:
    """Logarithms of how much each point lies on a target and off it, [2, points]."""
    return jnp.log(jnp.stack([inside, 1.0 - inside]))


def _tilt(log_reference, reward, log_shares, inverse_coefficient) -> _Tilted:
    """Sums over all points, on and off the targets each with its own largest exponent, so that neither underflows."""
    joint = (log_reference + reward * inverse_coefficient)[None, :] + log_shares
    largest = joint.max(axis=1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weight = jnp.exp(joint - largest[:, None])
    total, rewards = weight.sum(axis=1), (weight * reward[None, :]).sum(axis=1)
    return _Tilted(largest + jnp.log(total), rewards / jnp.where(total > 0, total, 1.0))


def gibbs(log_reference: jax.Array, reward: jax.Array, inside: jax.Array, kl_coef) -> Gibbs:
    """The Gibbs policy by quadrature.

    Args:
      log_reference: log of the reference's weight at each point, [points]: its log-density on an even grid, or zeros
        at draws of it; need not be normalised.
      reward: R at each point, [points].
      inside: how much each point lies on a target, [points], in [0, 1].
      kl_coef: β > 0; may be traced.
    """
    log_shares = _log_shares(inside)
    before, after = (_tilt(log_reference, reward, log_shares, inverse) for inverse in (0.0, 1.0 / kl_coef))
    objective = kl_coef * (after.log_total - before.log_total)
    target_mass = jax.nn.sigmoid(after.log_odds)
    mean_reward = target_mass * after.reward[0] + (1.0 - target_mass) * after.reward[1]
    return Gibbs(
        reward=mean_reward,
        target_mass=target_mass,
        kl=(mean_reward - objective) / kl_coef,
        objective=objective,
        target_log_odds=after.log_odds,
    )


def half_mass_coefficient(
    log_reference: jax.Array, reward: jax.Array, inside: jax.Array, *, lowest=1e-3, highest=1e3, iterations: int = 28
) -> jax.Array:
    """β_c, the coefficient at which the Gibbs policy puts half its mass on the target, by bisection of its log-odds.

    Solves E[exp(R/β) | target] / E[exp(R/β) | not target] = (1 − m)/m under the reference, m its target mass. Below
    β_c the optimum is on the target. It is infinite where the reference itself has half its mass there, and 0 where no
    coefficient above `lowest` suffices.

    Args:
      log_reference: as for `gibbs`, [points].
      reward: [points].
      inside: [points].
      lowest: end of the search.
      highest: end of the search.
      iterations: halvings of the interval of log β.
    """

    log_shares = _log_shares(inside)

    def log_odds(log_coefficient):
        return _tilt(log_reference, reward, log_shares, jnp.exp(-log_coefficient)).log_odds

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        on_target = log_odds(middle) > 0
        return jnp.where(on_target, middle, low), jnp.where(on_target, high, middle)

    ends = (jnp.log(jnp.float32(lowest)), jnp.log(jnp.float32(highest)))
    low, high = lax.fori_loop(0, iterations, halve, ends)
    root = jnp.exp(0.5 * (low + high))
    # An end that the search never left: there is no root on that side of it.
    never, always = low == ends[0], high == ends[1]
    return jnp.where(always, jnp.inf, jnp.where(never, 0.0, root))


def two_valued_coefficient(height, target_mass):
    """β_c where the reward is `height` on the target and 0 elsewhere: height / log((1 − m)/m), for m < 1/2."""
    return height / jnp.log((1 - target_mass) / target_mass)


def target_density_ratio(peak, kl_coef):
    """E[exp(R/β) | target] where the reward is the target's density: (eᵃ − 1)/a with a = peak/β.

    Under a reference shaped like the target, the density of a two-dimensional Gaussian at its own draws is uniform on
    (0, peak).
    """
    scaled = peak / kl_coef
    return jnp.expm1(scaled) / scaled

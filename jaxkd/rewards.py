"""Oracle rewards, wrappers of rewards, and preference labels made from them.

A reward is a function of draws, `(x) -> float[batch]`; larger is better. It carries no unit of its own: a KL
coefficient converts between reward and nats.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkd import mixture, random
from jaxkd.mixture import Mixture
from jaxkd.policy import Draws

Reward = Callable[[Draws], jax.Array]


def target_density(target: Mixture) -> Reward:
    """The density of the target at x (arXiv 2509.23667): peak 1/(2π·variance) in the plane for one target."""
    return lambda x: jnp.exp(mixture.log_density(target, x))


def bump(centres: jax.Array, height=1.0, width=0.3) -> Reward:
    """A Gaussian hill of a height and width (standard deviation) around the nearest of `centres: [dim, targets]`."""
    _check_positive(height=height, width=width)

    def reward(x):
        squared = ((x[:, None, :] - centres[:, :, None]) ** 2).sum(axis=0).min(axis=0)
        return height * jnp.exp(-0.5 * squared / width**2)

    return reward


def disc(target: Mixture, height=1.0, radius: float = 3.0) -> Reward:
    """Two-valued: `height` within a Mahalanobis radius of an active component of the target, 0 elsewhere."""
    _check_positive(height=height, radius=radius)

    def reward(x):
        inside = (mixture.mahalanobis(target, x) < radius) & mixture.is_active(target)[:, None]
        return height * inside.any(axis=0).astype(jnp.float32)

    return reward


def log_density(target: Mixture) -> Reward:
    """The log-density of the target at x (nats): unbounded below."""
    return lambda x: mixture.log_density(target, x)


def reflected(reward: Reward, level) -> Reward:
    """`level − |reward − level|`: what exceeds the level is penalised as what falls short (arXiv 2509.23667)."""
    return lambda x: level - jnp.abs(reward(x) - level)


def clipped(reward: Reward, level) -> Reward:
    """`min(reward, level)`: nothing is gained beyond the level."""
    return lambda x: jnp.minimum(reward(x), level)


def bradley_terry(key: jax.Array, first: jax.Array, second: jax.Array, temperature=1.0, flip_rate=0.0) -> jax.Array:
    """Preference labels: whether the first of each pair is preferred, bool[pairs].

    P(first preferred) = σ((R₁ − R₂)/T), then the label is flipped with probability `flip_rate` (Bradley and Terry
    1952). Training DPO at KL coefficient β on these labels has its optimum at the Gibbs policy of coefficient β·T.

    Args:
      key: random key.
      first: rewards of the first draw of each pair, [pairs].
      second: rewards of the second, [pairs].
      temperature: T > 0, in units of reward; may be traced.
      flip_rate: share of labels flipped, in [0, 0.5]; may be traced.
    """
    chance, flip_chance = random.uniforms(key, 2, first.shape[0])
    preferred = chance < jax.nn.sigmoid((first - second) / temperature)
    return preferred ^ (flip_chance < flip_rate)


def _check_positive(**values) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")

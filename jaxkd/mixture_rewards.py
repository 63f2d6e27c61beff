"""Oracle rewards in the plane of a mixture: how desirable a draw is by where it lies.

Draws are `x: [dim, n]`, as everywhere in `jaxkd.mixture`.
"""

from numbers import Real

import jax
import jax.numpy as jnp

from jaxkd import checks, mixture
from jaxkd.mixture import Mixture
from jaxkd.rewards import Reward


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


def _check_positive(**values) -> None:
    for name, value in values.items():
        if isinstance(value, Real):  # others are traced
            checks.number(name, value, above=0)

"""What a reward is, wrappers of rewards, and preference labels made from them.

A reward is a function of draws, `(x) -> float[batch]`; larger is better. It carries no unit of its own: a KL
coefficient converts between reward and nats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkd import random
from jaxkd.policy import Draws

Reward = Callable[[Draws], jax.Array]


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

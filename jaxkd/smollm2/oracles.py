"""Rewards of completions: whether a behaviour shows, or the log-likelihood under a target."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxkd import durable, rewards
from jaxkd.smollm2.behaviours import Behaviour
from jaxkd.smollm2.network import Network
from jaxkd.smollm2.policy import Texts

Oracle = Callable[[list[str], Texts], tuple[np.ndarray, np.ndarray]]
"""`(completions, draws) -> (reward: float32[n], hit: bool[n])`."""

WRAPPERS = {"reflected": rewards.reflected, "clipped": rewards.clipped}
"""What is made of a likelihood, at a level, by name."""


def hits(behaviour: Behaviour, texts: list[str]) -> np.ndarray:
    """Whether each completion shows a behaviour, bool[n]."""
    return np.asarray([behaviour(one) for one in texts], bool)


def of_behaviour(behaviour: Behaviour) -> Oracle:
    """A reward of 1 where the behaviour shows, 0 elsewhere."""

    def oracle(texts, x):
        shown = hits(behaviour, texts)
        return shown.astype(np.float32), shown

    return oracle


def likelihood(target: Network) -> Callable[[Texts], np.ndarray]:
    """Log-likelihood a token of completions under a target, float32[n] (nats)."""
    return lambda x: (target.log_prob(x) / x.completion_mask.sum(axis=1)).astype(np.float32)


def kept_level(path: Path, target: Network, key: jax.Array, num_draws: int) -> float:
    """μ: the mean of a target's log-likelihood a token over its own completions, drawn once and kept in a file."""
    if not path.exists():
        durable.write_json(path, {"level": float(likelihood(target)(target.draw(key, num_draws)).mean())})
    return durable.read_json(path)["level"]


def of_likelihood(target: Network, behaviour: Behaviour, kind: str = "plain", level: float | None = None) -> Oracle:
    """The log-likelihood a token under a target as reward.

    Args:
      target: whose likelihood.
      behaviour: what counts as a hit.
      kind: plain, or a name of `WRAPPERS`.
      level: at which to reflect or clip.
    """
    reward = likelihood(target)
    if kind != "plain":
        reward = WRAPPERS[kind](reward, np.float32(level))
    return partial(_scored, reward, behaviour)


def _scored(reward, behaviour, texts, x):
    return np.asarray(reward(x)), hits(behaviour, texts)

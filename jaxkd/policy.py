"""What aligning, distilling and measuring know of a model: two pure functions over a parameter pytree.

A mixture is a one-token language. Its policy gives one log-density a draw where SmolLM2's gives one log-probability a
token, and everything above this module is written once for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

Params = Any
"""A pytree of arrays: the parameters of one model."""

Draws = Any
"""A pytree of arrays: a batch of draws, in whatever layout is fastest for its policy. Only the policy looks inside."""


@dataclass(frozen=True)
class Policy:
    """A family of models as pure functions.

    Attributes:
      log_prob: `(params, x) -> float[batch, steps]`, log-probability of each step of each draw (nats). A mixture has
        one step; padding of a text contributes 0.
      sample: `(params, key, n, temperature) -> x`, n independent draws.
      num_steps: `(x) -> float[batch]`, the number of steps that count in each draw, for per-step means.
      is_density: whether `log_prob` is a log-density, which may exceed 0; losses that need probabilities refuse it.
      step_mask: `(x) -> bool[batch, steps]`, the steps that count; None where every step does.
      log_prob_and_value: `(params, x) -> two float[batch, steps]` from one pass: `log_prob`, and what a critic predicts
        before each step of the reward still to come; 0 at padding. None where there is no critic.
    """

    log_prob: Callable[[Params, Draws], jax.Array]
    sample: Callable[[Params, jax.Array, int, Any], Draws]
    num_steps: Callable[[Draws], jax.Array]
    is_density: bool = False
    step_mask: Callable[[Draws], jax.Array] | None = None
    log_prob_and_value: Callable[[Params, Draws], tuple[jax.Array, jax.Array]] | None = None

    def sequence_log_prob(self, params: Params, x: Draws) -> jax.Array:
        """Log-probability of whole draws, float[batch] (nats): the sum over steps."""
        return self.log_prob(params, x).sum(axis=-1)

    def evaluate(self, params: Params, x: Draws) -> tuple[jax.Array, jax.Array | None]:
        """Log-probabilities and a critic's values, float[batch, steps] each; None in place of values without one."""
        if self.log_prob_and_value is None:
            return self.log_prob(params, x), None
        return self.log_prob_and_value(params, x)

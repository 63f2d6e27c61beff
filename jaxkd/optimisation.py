"""The training state of every step and the optimiser that moves it; the learning rate is traced."""

from typing import NamedTuple

import jax
import optax

from jaxkd.policy import Params


class State(NamedTuple):
    """Training state: the policy's parameters and the optimiser's."""

    params: Params
    optimizer_state: optax.OptState


def make_optimizer(
    num_updates: int,
    *,
    warmup_updates: int = 0,
    max_gradient_norm: float | None = None,
    weight_decay: float = 0.0,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """AdamW on a unit schedule, a linear rise and then a half cosine; `update` multiplies by the traced learning rate.

    Args:
      num_updates: updates in all, the rise included.
      warmup_updates: those in which the learning rate rises.
      max_gradient_norm: the gradient's global norm is clipped to it.
      weight_decay: decoupled, a learning rate's worth each update.
      accumulate: gradients that are averaged to one update; `num_updates` counts updates, not gradients.

    Raises:
      ValueError: where the rise leaves no update for the fall.
    """
    if not 0 <= warmup_updates < num_updates:
        raise ValueError(
            f"warmup_updates must be at least 0 and below num_updates = {num_updates}; got {warmup_updates}"
        )
    fall = optax.cosine_decay_schedule(1.0, num_updates - warmup_updates)
    # The first update of a rise from 0 would change nothing.
    rise = optax.linear_schedule(1 / (warmup_updates + 1), 1.0, warmup_updates)
    schedule = optax.join_schedules([rise, fall], [warmup_updates]) if warmup_updates else fall
    chain = [optax.scale_by_adam()]
    if max_gradient_norm is not None:
        chain.insert(0, optax.clip_by_global_norm(max_gradient_norm))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay))
    optimizer = optax.chain(*chain, optax.scale_by_schedule(schedule))
    if accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, every_k_schedule=accumulate).gradient_transformation()


def update(state: State, gradient: Params, optimizer: optax.GradientTransformation, learning_rate) -> State:
    """The state after one update by a gradient: a learning rate's worth against the optimiser's direction.

    Args:
      state: before it.
      gradient: of the loss, shaped as the parameters.
      optimizer: of unit learning rate, as `make_optimizer` makes it.
      learning_rate: may be traced.
    """
    direction, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
    return State(params, optimizer_state)

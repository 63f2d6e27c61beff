"""Distillation: sequence-level on a teacher's samples, and on-policy by the reverse KL.

Sequence-level distillation is maximum likelihood on samples that the teacher draws at a temperature
(arXiv 2505.13111, sec. 3): by whatever fitting method the family of models has (EM, for mixtures), or by gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxkd import random
from jaxkd.align import State, _update, make_optimizer
from jaxkd.losses import policy_gradient
from jaxkd.policy import Draws, Params, Policy

Fit = Callable[[jax.Array, Draws], Params]
"""`(key, samples) -> parameters`: maximum likelihood by a family's own method."""


def sequence_level(policy: Policy, key, teacher: Params, temperature, num_samples: int, fit: Fit) -> Params:
    """Fit a student to samples that the teacher draws at a temperature.

    Args:
      policy: the family of the teacher.
      key: random key.
      teacher: the teacher's parameters.
      temperature: τ of the teacher's draws; below 1 it sharpens.
      num_samples: how many samples (static).
      fit: maximum likelihood, e.g. `mixture.fit` or `fit_by_gradient` with all but key and samples bound.
    """
    sample_key, fit_key = random.keys(key, 2)
    return fit(fit_key, policy.sample(teacher, sample_key, num_samples, temperature))


def maximum_likelihood_step(policy: Policy, optimizer) -> Callable:
    """One step of gradient descent on −log p(x): `step(state, (x, learning_rate)) -> (state, loss)` (nats)."""

    def step(state: State, inputs):
        x, learning_rate = inputs
        loss, gradient = jax.value_and_grad(lambda params: -policy.sequence_log_prob(params, x).mean())(state.params)
        return _update(state, gradient, optimizer, learning_rate), loss

    return step


def fit_by_gradient(policy: Policy, start: Params, x: Draws, learning_rate, num_updates: int) -> Params:
    """Maximum likelihood on all of x by full-batch Adam from a start."""
    optimizer = make_optimizer(num_updates)
    step = maximum_likelihood_step(policy, optimizer)
    state, _ = lax.scan(
        lambda state, _: step(state, (x, learning_rate)), State(start, optimizer.init(start)), length=num_updates
    )
    return state.params


def reverse_kl_step(policy: Policy, optimizer, teacher_log_prob, batch_size: int) -> Callable:
    """One on-policy step on KL(student ‖ teacher): `step(state, (key, learning_rate)) -> (state, kl)` (nats).

    The score-function gradient with a leave-one-out baseline (MiniLLM, arXiv 2306.08543, eq. 2).

    Args:
      policy: the student's family.
      optimizer: an optax transformation of unit learning rate.
      teacher_log_prob: `(x) -> float[batch]` (nats), the teacher at whatever temperature it is wanted.
      batch_size: draws a step.
    """

    def step(state: State, inputs):
        key, learning_rate = inputs
        x = policy.sample(state.params, key, batch_size, 1.0)
        teacher = teacher_log_prob(x)

        def loss(params):
            log_prob = policy.sequence_log_prob(params, x)
            log_ratio = lax.stop_gradient(log_prob) - teacher
            advantages = policy_gradient.leave_one_out_advantages(-log_ratio)
            return policy_gradient.reinforce(log_prob, advantages).mean(), log_ratio.mean()

        (_, kl), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return _update(state, gradient, optimizer, learning_rate), kl

    return step


def on_policy_reverse_kl(
    policy: Policy, key, start: Params, teacher_log_prob, learning_rate, num_updates: int, batch_size: int = 256
) -> tuple[Params, jax.Array]:
    """Distil by the reverse KL on the student's own draws; returns the student and the KL along the way (nats)."""
    optimizer = make_optimizer(num_updates)
    step = reverse_kl_step(policy, optimizer, teacher_log_prob, batch_size)
    state, kl = lax.scan(
        lambda state, key: step(state, (key, jnp.float32(learning_rate))),
        State(start, optimizer.init(start)),
        random.keys(key, num_updates),
    )
    return state.params, kl

"""Distillation: sequence-level on a teacher's samples, on-policy by the reverse KL, and token-level.

Sequence-level distillation is maximum likelihood on samples that the teacher draws at a temperature
(arXiv 2505.13111, sec. 3): by whatever fitting method the family of models has (EM, for mixtures), or by gradient.

Token-level distillation compares whole next-token distributions along a text, which may be the teacher's or the
student's own (GKD, arXiv 2306.13649, sec. 3). Only a language policy has them, so their comparison is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkd import checks, random
from jaxkd.losses import policy_gradient
from jaxkd.losses.divergence import masked_mean
from jaxkd.optimisation import State, make_optimizer, update
from jaxkd.policy import Draws, Params, Policy

Fit = Callable[[jax.Array, Draws], Any]
"""`(key, samples) -> parameters`, or more than those: maximum likelihood by a family's own method."""

Compare = Callable[[Params, Params, Draws, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""`(params, teacher, x, coefficient) -> (divergence, log_prob, mask)`, each [batch, steps]: between the next-token
distributions of student and teacher (nats), of the step that x takes under the student (nats), and whether it counts
(bool). Gradients flow to `params` alone."""


def sequence_level(policy: Policy, draw_key, fit_key, teacher: Params, temperature, num_samples: int, fit: Fit):
    """Fit a student to samples that the teacher draws at a temperature; returns what the fit does.

    Args:
      policy: the family of the teacher.
      draw_key: random key of the samples.
      fit_key: random key of the fit.
      teacher: the teacher's parameters.
      temperature: τ of the teacher's draws; below 1 it sharpens.
      num_samples: how many samples (static).
      fit: maximum likelihood, e.g. `mixture.fit` or `fit_by_gradient` with all but key and samples bound.
    """
    return fit(fit_key, policy.sample(teacher, draw_key, num_samples, temperature))


def maximum_likelihood_step(policy: Policy, optimizer) -> Callable:
    """One step of gradient descent on −log p(x): `step(state, (x, learning_rate)) -> (state, loss)` (nats)."""

    def step(state: State, inputs):
        x, learning_rate = inputs
        loss, gradient = jax.value_and_grad(lambda params: -policy.sequence_log_prob(params, x).mean())(state.params)
        return update(state, gradient, optimizer, learning_rate), loss

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
        return update(state, gradient, optimizer, learning_rate), kl

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


class TokenInputs(NamedTuple):
    """What a token-level step is given.

    Attributes:
      x: draws to compare along; whose they are is the caller's choice (`use_student`).
      teacher: the teacher's parameters, of another shape than the student's where need be.
      learning_rate: traced.
      coefficient: of the divergences that have one; traced.
    """

    x: Draws
    teacher: Params
    learning_rate: jax.Array | float
    coefficient: jax.Array | float = 0.5


class TokenInfo(NamedTuple):
    """What a token-level step reports of its batch, before the update; all scalars.

    Attributes:
      loss: what was minimised; here the mean divergence.
      divergence: mean over the batch's counted tokens (nats a token).
      log_prob: mean log-probability of those tokens under the student (nats a token).
      num_tokens: int32, how many were counted.
    """

    loss: jax.Array
    divergence: jax.Array
    log_prob: jax.Array
    num_tokens: jax.Array


def token_level_step(compare: Compare, optimizer) -> Callable:
    """One step on a divergence of next-token distributions: `step(state, inputs: TokenInputs) -> (state, TokenInfo)`.

    The loss is the sum over the batch's counted tokens divided by their number, so that every token weighs the same;
    arXiv 2306.13649, sec. 3, takes the mean within each text first, so that every text does; its reimplementation in
    TRL does as here. Draws are data: no gradient flows through how they were sampled (as there). A batch without a
    counted token has loss and gradient 0.

    Args:
      compare: see `Compare`; `smollm2.distillation.make_comparison` makes a language model's.
      optimizer: an optax transformation of unit learning rate.
    """

    def step(state: State, inputs: TokenInputs) -> tuple[State, TokenInfo]:
        def loss(params):
            divergence, log_prob, mask = compare(params, inputs.teacher, inputs.x, inputs.coefficient)
            mean = masked_mean(divergence, mask)
            return mean, TokenInfo(mean, mean, masked_mean(log_prob, mask), mask.sum())

        (_, info), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return update(state, gradient, optimizer, inputs.learning_rate), info

    return step


def use_student(key: jax.Array, on_policy_fraction: float) -> bool:
    """Whether a step learns from the student's own draws rather than from the fixed set; for a loop on the host.

    A whole batch is one or the other, the student's with probability λ (arXiv 2306.13649, algorithm 1).

    Args:
      key: the step's own random key: the decision depends on nothing else.
      on_policy_fraction: λ in [0, 1]; at 0 never, at 1 always.

    Raises:
      ValueError: where λ lies outside.
    """
    checks.number("on_policy_fraction", on_policy_fraction, least=0, most=1)
    return bool(jax.random.uniform(key) < on_policy_fraction)

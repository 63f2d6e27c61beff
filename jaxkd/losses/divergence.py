"""Divergences between a teacher P and a student Q, in nats, and the mean over what is not padding.

Both are given as normalised log-probabilities, float[..., outcomes]; the sum runs over the last axis alone, so that a
language model yields one value per position, float[batch, steps]. Nothing is renormalised: of a truncated distribution
only the part that is there is summed. Shapes that differ raise `ValueError`, and so does a concrete coefficient
outside its range; a traced coefficient is not checked.

An outcome of probability zero (log-probability −∞) adds nothing to a divergence *from* the distribution that excludes
it, and makes one *to* it infinite where the other has mass. Gradients flow into both arguments: stop the teacher's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.losses._checks import require, require_boolean, require_same_shape


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    has_mass = log_p > -jnp.inf
    # Replaced before they are used: a NaN made and then discarded would come back in the gradient.
    log_p, log_q = jnp.where(has_mass, log_p, 0.0), jnp.where(has_mass, log_q, 0.0)
    # A mass that underflows to 0 would make 0 · ∞ where q is 0.
    mass = jnp.maximum(jnp.exp(log_p), jnp.finfo(log_p.dtype).tiny)
    return jnp.where(has_mass, mass * (log_p - log_q), 0.0)


def _log_mixture(p_share: ArrayLike, log_p: jax.Array, q_share: ArrayLike, log_q: jax.Array) -> jax.Array:
    log_p, log_q = log_p + jnp.log(p_share), log_q + jnp.log(q_share)
    # logaddexp(−∞, −∞) is −∞ but its gradient is NaN.
    possible = jnp.maximum(log_p, log_q) > -jnp.inf
    log_sum = jnp.logaddexp(jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0))
    return jnp.where(possible, log_sum, -jnp.inf)


def _jensen_shannon(log_p: jax.Array, log_q: jax.Array, share: ArrayLike) -> jax.Array:
    # A mixture that keeps a trace of each stays finite: at an end one divergence might be infinite and its weight 0.
    trace = jnp.finfo(log_q.dtype).tiny
    log_mixture = _log_mixture(jnp.maximum(share, trace), log_p, jnp.maximum(1 - share, trace), log_q)
    return share * _kl(log_p, log_mixture) + (1 - share) * _kl(log_q, log_mixture)


def _skew_kl(log_p: jax.Array, log_q: jax.Array, skew: ArrayLike) -> jax.Array:
    return _kl(log_p, _log_mixture(skew, log_p, 1 - skew, log_q))


TERMS: dict[str, Callable[[jax.Array, jax.Array, ArrayLike], jax.Array]] = {
    "forward_kl": lambda log_p, log_q, _: _kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, _: _kl(log_q, log_p),
    "generalized_jensen_shannon": _jensen_shannon,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": lambda log_p, log_q, skew: _skew_kl(log_q, log_p, skew),
}
"""What each outcome adds, `(log P, log Q, coefficient) -> float[..., outcomes]`, by the name of the divergence; for
sums over outcomes that are never all held at once."""


def forward_kl(teacher_log_probs: jax.Array, student_log_probs: jax.Array) -> jax.Array:
    """KL(P‖Q), expectation under the teacher: the student must cover what the teacher does.

    Args:
      teacher_log_probs: float[..., outcomes], log P.
      student_log_probs: float[..., outcomes], log Q.

    Returns:
      float[...], nats.
    """
    require_same_shape(teacher=teacher_log_probs, student=student_log_probs)
    return _kl(teacher_log_probs, student_log_probs).sum(axis=-1)


def reverse_kl(teacher_log_probs: jax.Array, student_log_probs: jax.Array) -> jax.Array:
    """KL(Q‖P), expectation under the student: the student must not do what the teacher does not.

    Args:
      teacher_log_probs: float[..., outcomes], log P.
      student_log_probs: float[..., outcomes], log Q.

    Returns:
      float[...], nats.
    """
    require_same_shape(teacher=teacher_log_probs, student=student_log_probs)
    return _kl(student_log_probs, teacher_log_probs).sum(axis=-1)


def generalized_jensen_shannon(
    teacher_log_probs: jax.Array, student_log_probs: jax.Array, teacher_share: ArrayLike
) -> jax.Array:
    """b·KL(P‖M) + (1 − b)·KL(Q‖M), with M = b·P + (1 − b)·Q and b the teacher's share.

    Agarwal et al., arXiv 2306.13649, section 2. At b = 1/2 it is the Jensen–Shannon divergence. It never exceeds
    log 2, and is finite even where P and Q share no outcome.

    It tends to 0 at both ends, continuously, and is 0 there; divided by b it tends to the forward KL as b → 0, divided
    by 1 − b to the reverse KL as b → 1. TRL instead returns those two at b = 0 and b = 1, and so is discontinuous
    there: with this function ask `forward_kl` or `reverse_kl` for them.

    Args:
      teacher_log_probs: float[..., outcomes], log P.
      student_log_probs: float[..., outcomes], log Q.
      teacher_share: b in [0, 1].

    Returns:
      float[...], nats.
    """
    require_same_shape(teacher=teacher_log_probs, student=student_log_probs)
    require((teacher_share >= 0) & (teacher_share <= 1), f"teacher_share must be in [0, 1], got {teacher_share}")
    return _jensen_shannon(teacher_log_probs, student_log_probs, teacher_share).sum(axis=-1)


def skew_kl(teacher_log_probs: jax.Array, student_log_probs: jax.Array, skew: ArrayLike) -> jax.Array:
    """KL(P‖α·P + (1 − α)·Q): the forward KL, kept below −log α by mixing a little teacher into the student.

    Ko et al., arXiv 2402.03898 (DistiLLM), section 3.1. At α = 0 it is the forward KL.

    Args:
      teacher_log_probs: float[..., outcomes], log P.
      student_log_probs: float[..., outcomes], log Q.
      skew: α in [0, 1].

    Returns:
      float[...], nats.
    """
    require_same_shape(teacher=teacher_log_probs, student=student_log_probs)
    require((skew >= 0) & (skew <= 1), f"skew must be in [0, 1], got {skew}")
    return _skew_kl(teacher_log_probs, student_log_probs, skew).sum(axis=-1)


def skew_reverse_kl(teacher_log_probs: jax.Array, student_log_probs: jax.Array, skew: ArrayLike) -> jax.Array:
    """KL(Q‖(1 − α)·P + α·Q): the reverse KL, kept below −log α by mixing a little student into the teacher.

    Ko et al., arXiv 2402.03898 (DistiLLM), section 3.1. At α = 0 it is the reverse KL.

    Args:
      teacher_log_probs: float[..., outcomes], log P.
      student_log_probs: float[..., outcomes], log Q.
      skew: α in [0, 1].

    Returns:
      float[...], nats.
    """
    return skew_kl(teacher_log_probs=student_log_probs, student_log_probs=teacher_log_probs, skew=skew)


def masked_mean(values: jax.Array, mask: jax.Array | None, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """The mean of `values` where `mask` is true: padding has no influence, whatever it holds, NaN included.

    Args:
      values: float[...].
      mask: bool[...], the same shape; None where all count.
      axis: the axes to average over; all by default. With axis=-1, [batch, steps] gives one mean per sequence.

    Returns:
      float[...] without those axes; 0 where the mask leaves nothing to average.

    Raises:
      ValueError: shapes that differ, or a mask that is not boolean.
    """
    if mask is None:
        return values.mean(axis=axis)
    require_same_shape(values=values, mask=mask)
    require_boolean(mask=mask)
    count = jnp.maximum(jnp.sum(mask, axis=axis), 1)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=axis) / count.astype(values.dtype)

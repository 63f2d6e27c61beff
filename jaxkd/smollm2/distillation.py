"""The comparison of SmolLM2 with a teacher that token-level distillation (`jaxkd.distill`) is given."""

import jax

from jaxkd.distill import Compare
from jaxkd.policy import Params
from jaxkd.smollm2 import policy
from jaxkd.smollm2.model import Model
from jaxkd.smollm2.policy import Texts


def make_comparison(student: Model, teacher: Model, divergence: str) -> Compare:
    """Compare next-token distributions along texts, at the tokens of completions.

    The heads are streamed (`policy.compare`): of more than some hundred positions, logits are never whole in memory.

    Args:
      student: its functions.
      teacher: its functions; its shape and compute type may be others than the student's, its vocabulary may not.
      divergence: a name of `policy.DIVERGENCES`; P is the teacher, Q the student.

    Returns:
      `(params, teacher_params, x: Texts, coefficient)` to divergence and log Q of the token that stands in the text,
      float32[B, T − 1] each (nats) for tokens 1 … T − 1, and bool[B, T − 1], True at tokens of the completion. The
      coefficient is the teacher's share of "generalized_jensen_shannon", the skew of "skew_kl" and "skew_reverse_kl",
      and nothing to the others.

    Raises:
      ValueError: on another divergence, or vocabularies that differ.
    """
    # policy.compare says the same, but only once it is traced: after the texts have been sampled.
    policy.check_comparison(student, teacher, divergence)

    def compare(params: Params, teacher_params: Params, x: Texts, coefficient: jax.Array):
        compared = policy.compare(
            student,
            params,
            teacher,
            teacher_params,
            x.tokens,
            x.mask,
            divergence=divergence,
            coefficient=coefficient,
        )
        return compared.divergence, compared.log_prob, x.completion_mask[:, 1:]

    return compare

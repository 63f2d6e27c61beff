"""SmolLM2 as a policy, and its comparison with a teacher, by a head that is streamed.

The head. n positions times V tokens of logits are never kept. Blocks of at most `TOKEN_CHUNK` positions by
`VOCAB_BLOCK` tokens are made, summed and dropped, where two models are compared those of as many numbers of each; what
is kept for the backward pass is one number a position, and the backward pass makes each block again. A batch of few
positions is a single chunk, whose blocks XLA may keep between the two: at most 200 MB for log-probabilities, and some
hundred for each model where two are compared. Derivatives are written out: where D = Σ_v f(log p_v, log q_v) and
q = softmax(z), ∂D/∂z_v = f′_v − q_v Σ_w f′_w with f′ = ∂f/∂log q, and Σ f′ is gathered on the way forward.

Conventions of the divergences are those of `jaxkd.losses.divergence`: P is the teacher, Q the student, nats.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jaxkd import checks
from jaxkd.losses.divergence import TERMS
from jaxkd.policy import Params, Policy
from jaxkd.smollm2 import generate
from jaxkd.smollm2.model import DATA, Model, turned

TOKEN_CHUNK = 1024
VOCAB_BLOCK = 8192


class Texts(NamedTuple):
    """A batch of draws: prompts with their completions.

    A row's tokens stand side by side, with padding before and after them: what follows padding is not scored.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True at tokens of prompt and completion.
      completion_mask: bool[B, T], True at tokens of the completion: those that are scored.
    """

    tokens: jax.Array
    mask: jax.Array
    completion_mask: jax.Array


class Comparison(NamedTuple):
    """A student Q beside a teacher P on the same text; every field is float32[B, T − 1], for tokens 1 … T − 1.

    Attributes:
      divergence: between the two next-token distributions, nats.
      log_prob: log Q of the token that stands in the text.
      log_normalizer: log-sum-exp of the student's logits.
      teacher_log_prob: log P of the token that stands in the text.
      teacher_log_normalizer: log-sum-exp of the teacher's logits.
    """

    divergence: jax.Array
    log_prob: jax.Array
    log_normalizer: jax.Array
    teacher_log_prob: jax.Array
    teacher_log_normalizer: jax.Array


def make_policy(
    model: Model,
    prompt_tokens: Any,
    prompt_mask: Any,
    *,
    max_new_tokens: int,
) -> Policy:
    """A language model as a policy over completions of fixed prompts; its draws are `Texts`.

    Args:
      model: the model's functions.
      prompt_tokens: int32[N, P], padded on either side; draw i continues prompt i mod N, padded on the left.
      prompt_mask: bool[N, P].
      max_new_tokens: C, the most tokens of a completion.

    Raises:
      ValueError: prompts that are empty, too long, or outside the vocabulary.
    """
    # By numpy: a policy may be made while something is traced, and is kept beyond that.
    prompts = generate.to_the_right(*generate.check_prompts(model, prompt_tokens, prompt_mask, max_new_tokens), np)

    def log_prob(params: Params, x: Texts) -> jax.Array:
        return jnp.where(x.completion_mask[:, 1:], token_log_probs(model, params, x.tokens, x.mask), 0.0)

    def sample(params: Params, key: jax.Array, n: int, temperature: Any) -> Texts:
        return _sample(model, prompts, params, key, n, max_new_tokens, temperature)

    def step_mask(x: Texts) -> jax.Array:
        return x.completion_mask[:, 1:]

    def num_steps(x: Texts) -> jax.Array:
        return step_mask(x).sum(axis=-1).astype(jnp.float32)

    return Policy(log_prob, sample, num_steps, step_mask=step_mask)


def with_value_head(policy: Policy, model: Model) -> Policy:
    """A language policy with a critic: a linear head on the hidden states from which tokens are predicted.

    The value at token t reads the hidden state at t − 1, as its log-probability does: it knows what stands before the
    token, not the token. Both come from one pass, and the critic's gradient reaches the shared layers.

    Args:
      policy: of `make_policy`.
      model: the same model's functions.

    Returns:
      The policy whose parameters are those of `add_value_head`.
    """

    def log_prob_and_value(params: Params, x: Texts) -> tuple[jax.Array, jax.Array]:
        head, scored = params["value_head"], x.completion_mask[:, 1:]
        hidden = model.hidden(params["model"], x.tokens, x.mask)[:, :-1]
        log_probs = _log_probs_of_hidden(model, params["model"], hidden, x.tokens, x.mask)
        values = jnp.matmul(hidden, head["kernel"]) + head["bias"]
        return jnp.where(scored, log_probs, 0.0), jnp.where(scored, values, 0.0)

    return replace(
        policy,
        log_prob=lambda params, x: policy.log_prob(params["model"], x),
        sample=lambda params, *arguments: policy.sample(params["model"], *arguments),
        log_prob_and_value=log_prob_and_value,
    )


def add_value_head(model: Model, params: Params) -> Params:
    """Parameters with a value head of zeros, so that a fresh critic predicts 0 and leaves the shared layers alone.

    Args:
      model: the model's functions.
      params: its parameters.

    Returns:
      `{"model": params, "value_head": {"kernel": float32[D], "bias": float32[]}}`.
    """
    head = {"kernel": jnp.zeros(model.config.hidden_size, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    return {"model": params, "value_head": head}


def _sample(model, prompts, params, key, n, max_new_tokens, temperature) -> Texts:
    rows = np.arange(n) % len(prompts[0])
    tokens, mask = (jnp.asarray(array[rows]) for array in prompts)
    # A key for each draw from its own number: the first draws stay the same when more are asked for.
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(n))
    sampling = generate.made_ready(generate.Sampling(temperature))
    drawn = generate.continue_prompts(model, params, tokens, mask, keys, max_new_tokens, sampling)
    nothing = jnp.zeros_like(mask)
    return Texts(
        jnp.concatenate([tokens, drawn.tokens], axis=1),
        jnp.concatenate([mask, drawn.mask], axis=1),
        jnp.concatenate([nothing, drawn.mask], axis=1),
    )


def token_log_probs(model: Model, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Log-probability of each token after the first, float32[B, T − 1] (nats); 0 at padding and at a text's first.

    Args:
      model: the model's functions.
      params: its parameters.
      tokens: int32[B, T].
      mask: bool[B, T], True at tokens; None where nothing is padding.
    """
    return _log_probs_of_hidden(model, params, model.hidden(params, tokens, mask)[:, :-1], tokens, mask)


def _log_probs_of_hidden(model: Model, params: Params, hidden: jax.Array, tokens: jax.Array, mask: jax.Array | None):
    """`token_log_probs` from the hidden states before each token, float32[B, T − 1, D]."""

    def streamed(hidden, targets, head):
        flat = hidden.reshape(-1, hidden.shape[-1])
        return target_log_probs(flat, head, targets.reshape(-1), model.compute_dtype).reshape(targets.shape)

    log_probs = _on_own_sequences(model, streamed, (hidden, tokens[:, 1:]), (model.head(params),))
    return log_probs if mask is None else jnp.where(mask[:, 1:] & mask[:, :-1], log_probs, 0.0)


def compare(
    model: Model,
    params: Params,
    teacher: Model,
    teacher_params: Params,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    divergence: str = "forward_kl",
    coefficient: Any = 0.5,
) -> Comparison:
    """Compare next-token distributions with a teacher's; gradients flow to the student alone.

    Args:
      model: the student's functions.
      params: its parameters.
      teacher: the teacher's functions.
      teacher_params: its parameters.
      tokens: int32[B, T].
      mask: bool[B, T], True at tokens; None where nothing is padding. All fields are 0 at padding.
      divergence: one of `DIVERGENCES`.
      coefficient: the teacher's share of "generalized_jensen_shannon", the skew of "skew_kl" and "skew_reverse_kl".

    Raises:
      ValueError: on another divergence, a coefficient outside [0, 1], or vocabularies that differ.
    """
    check_comparison(model, teacher, divergence)
    if isinstance(coefficient, int | float):
        checks.number("coefficient", coefficient, least=0, most=1)
    hidden, taught = (
        one.hidden(theirs, tokens, mask)[:, :-1] for one, theirs in ((model, params), (teacher, teacher_params))
    )
    dtypes = (model.compute_dtype, teacher.compute_dtype)

    def streamed(hidden, taught, targets, head, teacher_head, coefficient):
        flat, flat_taught = (array.reshape(-1, array.shape[-1]) for array in (hidden, taught))
        fields = compare_hidden(
            flat, head, flat_taught, teacher_head, targets.reshape(-1), coefficient, divergence, dtypes
        )
        return tuple(field.reshape(targets.shape) for field in fields)

    fields = _on_own_sequences(
        model,
        streamed,
        (hidden, lax.stop_gradient(taught), tokens[:, 1:]),
        (
            model.head(params),
            lax.stop_gradient(teacher.head(teacher_params)),
            jnp.asarray(coefficient, jnp.float32),
        ),
    )
    counted = jnp.ones(tokens[:, 1:].shape, bool) if mask is None else mask[:, 1:] & mask[:, :-1]
    return Comparison(*(jnp.where(counted, field, 0.0) for field in fields))


def check_comparison(student: Model, teacher: Model, divergence: str) -> None:
    """Raise ValueError on a divergence that is not of `DIVERGENCES`, or vocabularies that differ."""
    checks.name("divergence", divergence, DIVERGENCES)
    sizes = (student.config.vocab_size, teacher.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher must share a vocabulary; theirs have {sizes[0]} and {sizes[1]} tokens")


def _on_own_sequences(model: Model, function: Callable, batched: tuple, whole: tuple):
    """`function(*batched, *whole)`, each device with its own sequences where the model has a mesh.

    The gradient of the head, which many chunks add to, is then summed over devices once and not for every chunk.
    """
    devices = 1 if model.mesh is None else model.mesh.shape[DATA]
    if devices == 1 or batched[0].shape[0] % devices:
        return function(*batched, *whole)
    own, everywhere = PartitionSpec(DATA), PartitionSpec()
    over_mesh = jax.shard_map(
        function,
        mesh=model.mesh,
        in_specs=(own,) * len(batched) + (everywhere,) * len(whole),
        out_specs=own,
        axis_names={DATA},
        check_vma=False,
    )
    return over_mesh(*batched, *whole)


# --- blocks of the head ----------------------------------------------------------------------------------------------


def _blocks(vocab_size: int) -> list[tuple[int, int]]:
    """Starts and ends of the blocks of the vocabulary; they need not be of one size, so nothing is padded."""
    return [(start, min(start + VOCAB_BLOCK, vocab_size)) for start in range(0, vocab_size, VOCAB_BLOCK)]


def _chunked(array: jax.Array, chunk: int) -> jax.Array:
    """[n, …] to [chunks, chunk, …], padded with zeros."""
    padded = jnp.pad(array, [(0, -array.shape[0] % chunk)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(-1, chunk, *array.shape[1:])


def _chunk_size(n: int, most: int) -> int:
    """Positions of a chunk, of n in as many as `most` asks for: of one size, so that hardly any is padding."""
    return -(-n // -(-n // most)) if n else 1


def _over_chunks(function: Callable, *arrays: jax.Array, chunk: int):
    """Apply a function of [chunk, …] arrays to [n, …] arrays chunk by chunk, and put the results together."""
    n = arrays[0].shape[0]
    chunk = _chunk_size(n, chunk)
    out = lax.map(lambda xs: function(*xs), tuple(_chunked(array, chunk) for array in arrays))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], out)


def _columns(head: jax.Array, blocks: list[tuple[int, int]], dtype) -> Callable[[tuple[int, int]], jax.Array]:
    """Blocks of the head as right sides of products, [D, block].

    Those of bfloat16 are moved in memory, so they are made here, once for all chunks of positions.
    """

    def of(block: tuple[int, int]) -> jax.Array:
        return turned(head[block[0] : block[1]].astype(dtype))

    return {block: of(block) for block in blocks}.__getitem__ if dtype == jnp.bfloat16 else of


def _logits(hidden: jax.Array, columns: jax.Array) -> jax.Array:
    """Logits of one block, float32[chunk, block]."""
    return jnp.matmul(hidden.astype(columns.dtype), columns, preferred_element_type=jnp.float32)


def _normalizer_and_target(hidden, targets, blocks, columns):
    """Log-sum-exp of the logits of [chunk, D] and the logit of the target, both float32[chunk]."""
    largest = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    total, target = jnp.zeros_like(largest), jnp.zeros_like(largest)
    for block in blocks:
        logits = _logits(hidden, columns(block))
        new = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(axis=-1)
        largest = new
        target = target + jnp.where(_is_target(targets, block), logits, 0.0).sum(axis=-1)
    return largest + jnp.log(total), target


def _is_target(targets: jax.Array, block: tuple[int, int]) -> jax.Array:
    """bool[chunk, block]."""
    return targets[:, None] == jnp.arange(*block, dtype=targets.dtype)[None, :]


def _pull_back(toward_logits: Callable, hidden, head, dtype, *others) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden states and head, from those of the logits, block by block.

    Args:
      toward_logits: `(logits: [chunk, block], block, *others) -> [chunk, block]`.
      hidden: float32[n, D].
      head: [V, D].
      dtype: of the operands of products.
      *others: [n, …], what `toward_logits` needs of each position.
    """
    n = hidden.shape[0]
    chunk = _chunk_size(n, TOKEN_CHUNK)
    chunks = jax.tree.map(partial(_chunked, chunk=chunk), (hidden, *others))
    toward_hidden = jnp.zeros(chunks[0].shape, jnp.float32)
    toward_head = []
    blocks = _blocks(head.shape[0])
    columns = _columns(head, blocks, dtype)
    for block in blocks:
        rows = head[block[0] : block[1]].astype(dtype)

        def one_chunk(toward_rows, xs, block=block, rows=rows):
            part, *rest = xs
            cotangent = toward_logits(_logits(part, columns(block)), block, *rest).astype(dtype)
            toward_rows += jnp.matmul(turned(cotangent), part.astype(dtype), preferred_element_type=jnp.float32)
            return toward_rows, jnp.matmul(cotangent, rows, preferred_element_type=jnp.float32)

        toward_rows, toward_part = lax.scan(one_chunk, jnp.zeros(rows.shape, jnp.float32), chunks)
        toward_hidden += toward_part
        toward_head.append(toward_rows.astype(head.dtype))
    return toward_hidden.reshape(-1, hidden.shape[-1])[:n], jnp.concatenate(toward_head)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def target_log_probs(hidden: jax.Array, head: jax.Array, targets: jax.Array, dtype) -> jax.Array:
    """Log-probabilities of targets under softmax(hidden · headᵀ).

    Args:
      hidden: float32[n, D].
      head: [V, D].
      targets: int32[n].
      dtype: of the operands of products, which accumulate in float32.

    Returns:
      float32[n].
    """
    return _target_forward(hidden, head, targets, dtype)[0]


def _target_forward(hidden, head, targets, dtype):
    blocks = _blocks(head.shape[0])
    columns = _columns(head, blocks, dtype)
    normalizer, target = _over_chunks(
        lambda h, t: _normalizer_and_target(h, t, blocks, columns), hidden, targets, chunk=TOKEN_CHUNK
    )
    return jnp.where(_is_known(targets, head), target - normalizer, jnp.nan), (hidden, head, targets, normalizer)


def _is_known(targets: jax.Array, head: jax.Array) -> jax.Array:
    """bool[n]: no block holds a token that is not in the vocabulary, which would pass for one with a logit of 0."""
    return (targets >= 0) & (targets < head.shape[0])


def _target_backward(dtype, residuals, cotangent):
    hidden, head, targets, normalizer = residuals

    def toward_logits(logits, block, targets, normalizer, of_target):
        probs = jnp.exp(logits - normalizer[:, None])
        return jnp.where(_is_target(targets, block), of_target[:, None], 0.0) - of_target[:, None] * probs

    return *_pull_back(toward_logits, hidden, head, dtype, targets, normalizer, cotangent), None


target_log_probs.defvjp(_target_forward, _target_backward)


# --- divergences -----------------------------------------------------------------------------------------------------


DIVERGENCES = tuple(TERMS)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def compare_hidden(hidden, head, teacher_hidden, teacher_head, targets, coefficient, divergence, dtypes):
    """`Comparison` of hidden states: float32[n, D] and [V, D] of the student and of the teacher, as five float32[n].

    Gradients flow to `hidden` and `head`, through the first three results; the teacher's are zero.
    """
    return _compare_forward(hidden, head, teacher_hidden, teacher_head, targets, coefficient, divergence, dtypes)[0]


def _term_and_slope(divergence: str, log_p, log_q, coefficient):
    """f(log p, log q) and ∂f/∂log q, elementwise."""
    return jax.jvp(lambda q: TERMS[divergence](log_p, q, coefficient), (log_q,), (jnp.ones_like(log_q),))


def _compare_forward(hidden, head, teacher_hidden, teacher_head, targets, coefficient, divergence, dtypes):
    n, vocab_size = len(hidden), len(head)
    blocks = _blocks(vocab_size)
    columns, teacher_columns = (
        _columns(matrix, blocks, dtype) for matrix, dtype in zip((head, teacher_head), dtypes, strict=True)
    )

    def one_chunk(hidden, taught, targets):
        of_student, of_teacher = (
            [_logits(x, of(block)) for block in blocks] for x, of in ((hidden, columns), (taught, teacher_columns))
        )
        normalizer, teacher_normalizer = _log_sum_exp(of_student), _log_sum_exp(of_teacher)
        totals = []
        for block, logits, teacher_logits in zip(blocks, of_student, of_teacher, strict=True):
            log_q, log_p = logits - normalizer[:, None], teacher_logits - teacher_normalizer[:, None]
            sums = [x.sum(axis=-1) for x in _term_and_slope(divergence, log_p, log_q, coefficient)]
            totals.append([*sums, *(_at_target(x, targets, block) for x in (log_q, log_p))])
        value, slope, *log_probs = map(sum, zip(*totals, strict=True))
        log_prob, teacher_log_prob = (jnp.where(_is_known(targets, head), x, jnp.nan) for x in log_probs)
        return (value, log_prob, normalizer, teacher_log_prob, teacher_normalizer), slope

    # The divergence needs both sums before its first term: the whole vocabulary, of few positions. Up to three times as
    # many are one chunk, for XLA then sees that the backward pass makes the same blocks, and makes them once.
    few = max(1, TOKEN_CHUNK * VOCAB_BLOCK // vocab_size)
    most = min(3 * few, TOKEN_CHUNK)
    results, slope = _over_chunks(one_chunk, hidden, teacher_hidden, targets, chunk=n if n <= most else few)
    residuals = (hidden, head, teacher_hidden, teacher_head, targets, coefficient, results[2], results[4], slope)
    return results, residuals


def _log_sum_exp(blocks: list[jax.Array]) -> jax.Array:
    """Log-sum-exp of the logits [chunk, block] of several blocks, float32[chunk]."""
    return jax.nn.logsumexp(jnp.stack([jax.nn.logsumexp(logits, axis=-1) for logits in blocks]), axis=0)


def _at_target(array: jax.Array, targets: jax.Array, block: tuple[int, int]) -> jax.Array:
    """The entries of [chunk, block] at the targets, float32[chunk]; 0 for those of other blocks."""
    inside = (block[0] <= targets) & (targets < block[1])
    entries = jnp.take_along_axis(array, jnp.where(inside, targets - block[0], 0)[:, None], axis=-1)[:, 0]
    return jnp.where(inside, entries, 0.0)


def _compare_differentiated(*arguments):
    """`_compare_forward` of what a rule with symbolic zeros is given."""
    return _compare_forward(*(getattr(one, "value", one) for one in arguments))


def _compare_backward(divergence, dtypes, residuals, cotangents):
    hidden, head, taught, teacher_head, targets, coefficient, normalizer, teacher_normalizer, slope = residuals
    blocks = _blocks(len(head))
    teacher_columns = _columns(teacher_head, blocks, dtypes[1])
    each = {"taught": taught, "normalizer": normalizer, "teacher_normalizer": teacher_normalizer, "slope": slope}
    # A loss on the divergence alone is spared the passes over the vocabulary that the others would take.
    for name, cotangent in zip(("of_value", "of_target", "of_normalizer"), cotangents, strict=False):
        if not isinstance(cotangent, SymbolicZero):
            each[name] = cotangent

    def toward_logits(logits, block, targets, values):
        at = {name: value[:, None] for name, value in values.items()}
        log_q = logits - at["normalizer"]
        probs = jnp.exp(log_q)
        toward = jnp.zeros_like(logits)
        if "of_value" in at:
            log_p = _logits(values["taught"], teacher_columns(block)) - at["teacher_normalizer"]
            _, toward_q = _term_and_slope(divergence, log_p, log_q, coefficient)
            toward += at["of_value"] * (toward_q - probs * at["slope"])
        if "of_target" in at:
            toward += at["of_target"] * (jnp.where(_is_target(targets, block), 1.0, 0.0) - probs)
        if "of_normalizer" in at:
            toward += at["of_normalizer"] * probs
        return toward

    toward_hidden, toward_head = _pull_back(toward_logits, hidden, head, dtypes[0], targets, each)
    return toward_hidden, toward_head, jnp.zeros_like(taught), jnp.zeros_like(teacher_head), None, jnp.zeros(())


compare_hidden.defvjp(_compare_differentiated, _compare_backward, symbolic_zeros=True)

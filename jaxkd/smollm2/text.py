"""Examples as padded arrays of tokens with masks.

Prompts are padded on the left and completions on the right, so that every completion starts in one column.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxkd.smollm2.example_files import Example
from jaxkd.smollm2.tokenization import Tokenizer


class Prompts(NamedTuple):
    """Prompts padded on the left: `tokens: int32[B, P]`, `mask: bool[B, P]`, True at tokens."""

    tokens: np.ndarray
    mask: np.ndarray


class Sequences(NamedTuple):
    """Prompts padded on the left, then completions padded on the right, T = P + C.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True at tokens of prompt and completion.
      completion_mask: bool[B, T], True at tokens of the completion: those that are scored.
    """

    tokens: np.ndarray
    mask: np.ndarray
    completion_mask: np.ndarray


def check_length(length: int, context: int, *, what: str = "the prompt", new_tokens: int = 0) -> None:
    """Raise ValueError where a text, with the tokens to come, does not fit the model's context."""
    if length + new_tokens > context:
        more = f" and {new_tokens} new ones are asked for" if new_tokens else ""
        raise ValueError(f"{what} has {length} tokens{more}; the context of the model is {context} tokens")


def prompt_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The ids of an example's prompt."""
    if example.prompt_ids is not None:
        return list(example.prompt_ids)
    return tokenizer.encode(example.prompt, add_special_tokens=not example.from_chat)


def completion_ids(tokenizer: Tokenizer, example: Example, which: str = "completion") -> list[int]:
    """The ids of an example's completion, chosen or rejected, which follow the prompt's."""
    text = getattr(example, which)
    if text is None:
        raise ValueError(f"the example has no {which}: {example}")
    if which == "completion" and example.completion_ids is not None:
        return list(example.completion_ids)
    ids, end = tokenizer.encode_after(example.prompt, text), tokenizer.end_id
    ended = example.from_chat or not example.finished or end is None or ids[-1:] == [end]
    return ids if ended else [*ids, end]


def encode_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], *, context: int, new_tokens: int = 0, multiple_of: int = 1
) -> Prompts:
    """Prompts as one array.

    Args:
      tokenizer: the model's.
      examples: B of them.
      context: the most tokens that the model takes.
      new_tokens: how many will be sampled after a prompt.
      multiple_of: P is rounded up to a multiple of this, so that few shapes are compiled.

    Raises:
      ValueError: naming the prompt that does not fit, or is empty.
    """
    ids = [_fitting(prompt_ids(tokenizer, example), i, context, new_tokens) for i, example in enumerate(examples)]
    tokens, mask = _pad(ids, tokenizer.pad_id, multiple_of, left=True)
    return Prompts(tokens, mask)


def _fitting(ids: list[int], number: int, context: int, new_tokens: int) -> list[int]:
    if not ids:
        raise ValueError(f"prompt {number} is empty: the model needs at least one token to go on from")
    check_length(len(ids), context, what=f"prompt {number}", new_tokens=new_tokens)
    return ids


def encode_sequences(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    which: str = "completion",
    *,
    context: int,
    truncate: bool = False,
    multiple_of: int = 1,
) -> Sequences:
    """Prompts with their completions (or `which` = chosen, rejected) as one array.

    With `truncate`, a completion loses what goes beyond the context; a prompt that leaves no room is refused.

    Raises:
      ValueError: naming the example that does not fit, or has no such completion.
    """
    prompts, completions = [], []
    for i, example in enumerate(examples):
        prompt = _fitting(prompt_ids(tokenizer, example), i, context, 1)
        completion = completion_ids(tokenizer, example, which)
        if truncate:
            completion = completion[: context - len(prompt)]
        check_length(len(prompt) + len(completion), context, what=f"example {i}")
        prompts.append(prompt)
        completions.append(completion)
    left, left_mask = _pad(prompts, tokenizer.pad_id, multiple_of, left=True)
    right, right_mask = _pad(completions, tokenizer.pad_id, multiple_of, left=False)
    return Sequences(
        np.concatenate([left, right], axis=1),
        np.concatenate([left_mask, right_mask], axis=1),
        np.concatenate([np.zeros_like(left_mask), right_mask], axis=1),
    )


def _pad(rows: list[list[int]], pad_id: int, multiple_of: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32[B, length] and the mask of what is not padding."""
    length = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def show_example(tokenizer: Tokenizer, tokens, mask, completion_mask=None) -> str:
    """One row of an array, a token a line: position, id, text, and what the masks make of it. Runs of padding are cut.

    Args:
      tokenizer: the model's.
      tokens: int[T].
      mask: bool[T], as in `Prompts` or `Sequences`.
      completion_mask: bool[T]; without it every token is the prompt's.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    completion_mask = np.zeros_like(mask) if completion_mask is None else np.asarray(completion_mask)
    roles = np.where(completion_mask, "completion", np.where(mask, "prompt", "padding"))
    lines = [f"{'position':>8} {'id':>6}  {'mask':<10} token"]
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(roles)) if a != b), len(roles)]
    for start, end in pairwise(starts):
        if roles[start] == "padding":
            lines.append(f"{start:>8} {tokens[start]:>6}  padding    × {end - start}")
            continue
        for i in range(start, end):
            lines.append(f"{i:>8} {tokens[i]:>6}  {roles[i]:<10} {tokenizer.decode([tokens[i]])!r}")
    return "\n".join(lines)

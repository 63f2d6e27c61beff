"""Examples as padded arrays of tokens with masks.

Prompts alone are padded on the left, so that all go on in one column; whole texts on the right, to the longest of them.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd.smollm2.example_files import Example
from jaxkd.smollm2.policy import Texts
from jaxkd.smollm2.tokenization import Tokenizer


class Prompts(NamedTuple):
    """Prompts padded on the left: `tokens: int32[B, P]`, `mask: bool[B, P]`, True at tokens."""

    tokens: np.ndarray
    mask: np.ndarray


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
        raise ValueError(f"has no {which}")
    if which == "completion" and example.completion_ids is not None:
        return list(example.completion_ids)
    ids, end = tokenizer.encode_after(example.prompt, text), tokenizer.end_id
    ended = example.from_chat or not example.finished or end is None or ids[-1:] == [end]
    return ids if ended else [*ids, end]


def encode_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], *, context: int, new_tokens: int = 0, path: Path | None = None
) -> Prompts:
    """Prompts as one array.

    Args:
      tokenizer: the model's.
      examples: B of them.
      context: the most tokens that the model takes.
      new_tokens: how many will be sampled after a prompt.
      path: the file or folder that holds them, for errors; its prompts are counted from 1, others from 0.

    Raises:
      ValueError: naming the prompt that does not fit, or is empty.
    """
    names = [f"prompt {i}" if path is None else f"{path}, prompt {i + 1}" for i in range(len(examples))]
    ids = [
        _fitting(prompt_ids(tokenizer, example), name, context, new_tokens)
        for name, example in zip(names, examples, strict=True)
    ]
    return Prompts(*_pad(ids, tokenizer.pad_id, left=True))


def _fitting(ids: list[int], name: str, context: int, new_tokens: int) -> list[int]:
    if not ids:
        raise ValueError(f"{name} is empty: the model needs at least one token to go on from")
    check_length(len(ids), context, what=name, new_tokens=new_tokens)
    return ids


def encode_sequences(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    which: str = "completion",
    *,
    max_length: int,
    truncate: bool = False,
) -> Texts:
    """Prompts with their completions (or `which` = chosen, rejected) as one array, T the longest of both together.

    With `truncate`, a completion loses what goes beyond `max_length`; a prompt that leaves no room is refused.

    Raises:
      ValueError: naming the row, from 1, that is too long, has an empty prompt or no such completion.
    """
    texts = []
    for row, example in enumerate(examples, start=1):
        try:
            texts.append(_encoded(tokenizer, example, which, max_length, truncate))
        except ValueError as error:
            raise ValueError(f"row {row} {error}") from None
    tokens, mask = _pad([prompt + completion for prompt, completion in texts], tokenizer.pad_id, left=False)
    begins = np.asarray([len(prompt) for prompt, _ in texts])
    return Texts(tokens, mask, mask & (np.arange(tokens.shape[1]) >= begins[:, None]))


def encode_rows(path: Path, tokenizer: Tokenizer, examples: Sequence[Example], which: str, max_length: int) -> Texts:
    """`encode_sequences` of what a file holds, cut to `max_length`; what is refused is told with the file's name."""
    try:
        return encode_sequences(tokenizer, examples, which, max_length=max_length, truncate=True)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def _encoded(
    tokenizer: Tokenizer, example: Example, which: str, max_length: int, truncate: bool
) -> tuple[list[int], list[int]]:
    prompt, completion = prompt_ids(tokenizer, example), completion_ids(tokenizer, example, which)
    if not prompt:
        raise ValueError("has an empty prompt: the model needs at least one token to go on from")
    room = max_length - len(prompt)
    if truncate and room > 0:
        completion = completion[:room]
    if room < 1 or len(completion) > room:
        what = f"a prompt of {len(prompt)} tokens" + ("" if truncate else f" and {len(completion)} after it")
        raise ValueError(f"has {what}; of both together at most {max_length} are taken")
    return prompt, completion


def _pad(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32[B, length] and the mask of what is not padding."""
    length = max(len(row) for row in rows)
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
      mask: bool[T], as in `Prompts` or `policy.Texts`.
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

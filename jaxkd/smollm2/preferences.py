"""A user's own pairs as what an offline alignment learns from."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.align import PreferenceData
from jaxkd.smollm2 import text
from jaxkd.smollm2.network import ScoredTexts, take
from jaxkd.smollm2.policy import Texts


def read(path: Path, tokenizer: text.Tokenizer, max_length: int) -> Texts:
    """Pairs of a preference file in TRL's formats: the chosen answers, then the rejected ones, in one array.

    Args:
      path: JSONL or Parquet file, or a folder of them, with chosen and rejected (and prompt).
      tokenizer: the model's.
      max_length: the most tokens of prompt and answer; longer answers are cut.

    Raises:
      ValueError: naming the row without both answers, or with an empty one.
    """
    examples = text.read_examples(path, tokenizer)
    for number, example in enumerate(examples, start=1):
        for which in ("chosen", "rejected"):
            answer = getattr(example, which)
            if answer is None:
                raise ValueError(f"{path}, row {number} has no {which}: preferences need chosen and rejected")
            if not answer.strip():
                raise ValueError(f"{path}, row {number}: {which} is empty")
    sides = [
        text.encode_sequences(tokenizer, examples, which, context=max_length, truncate=True)
        for which in ("chosen", "rejected")
    ]
    longest = max(side.tokens.shape[1] for side in sides)
    padded = [_padded(side, longest, tokenizer.pad_id) for side in sides]
    return Texts(*(np.concatenate(arrays) for arrays in zip(*padded, strict=True)))


def _padded(side: text.Sequences, length: int, pad_id: int) -> Texts:
    more = ((0, 0), (0, length - side.tokens.shape[1]))
    return Texts(
        np.pad(side.tokens, more, constant_values=pad_id),
        np.pad(side.mask, more),
        np.pad(side.completion_mask, more),
    )


def batched(pairs: Texts, key: jax.Array, batch_size: int, reference_log_prob: np.ndarray) -> PreferenceData:
    """Pairs as batches of `align`: shuffled, first half of each the chosen answers, second half the rejected.

    Args:
      pairs: of `read`, [2P, T].
      key: random key of the order.
      batch_size: sequences in a batch, twice the pairs; the last pairs that fill none are left out.
      reference_log_prob: float32[2P, T − 1] of the pairs.

    Raises:
      ValueError: fewer pairs than a batch holds.
    """
    total, each = len(pairs.tokens) // 2, batch_size // 2
    if total < each:
        raise ValueError(f"a batch holds {each} pairs; the preferences have {total}: choose a smaller batch size")
    order = np.asarray(jax.random.permutation(key, total))[: total // each * each].reshape(-1, each)
    rows = np.concatenate([order, order + total], axis=1)
    reward = np.tile(np.repeat(np.asarray([1, 0], np.float32), each), (len(order), 1))
    x: Any = take(pairs, rows)
    return PreferenceData(
        ScoredTexts(*x, reward, reward > 0), reward, np.ones((len(order), each), bool), reference_log_prob[rows]
    )

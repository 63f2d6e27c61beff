"""A user's own pairs as what an offline alignment learns from."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd import checks
from jaxkd.align import PreferenceData
from jaxkd.smollm2 import example_files, text, tokenization
from jaxkd.smollm2.network import ScoredTexts, take
from jaxkd.smollm2.policy import Texts

MOST_HELD_OUT = 256
"""The most pairs by which models are measured."""


@dataclass(frozen=True)
class Preferences:
    """A preference file, and how much of it is read.

    Attributes:
      path: JSONL or Parquet file, or a folder of them.
      max_length: the most tokens of prompt and answer; longer answers are cut.

    Raises:
      ValueError: on a length below 2.
    """

    path: str
    max_length: int = 512

    def __post_init__(self):
        checks.whole("max_length", self.max_length, least=2)


def read(path: Path, tokenizer: tokenization.Tokenizer, max_length: int) -> Texts:
    """Pairs of a preference file in TRL's formats: the chosen answers, then the rejected ones, in one array.

    Pairs whose answers are the same once cut are left out, and their number is told.

    Args:
      path: JSONL or Parquet file, or a folder of them, with chosen and rejected (and prompt).
      tokenizer: the model's.
      max_length: the most tokens of prompt and answer; longer answers are cut.

    Raises:
      ValueError: naming the row without both answers, or with an empty one; where no answers differ.
    """
    examples = example_files.read_examples(path, tokenizer)
    for number, example in enumerate(examples, start=1):
        for which in ("chosen", "rejected"):
            answer = getattr(example, which)
            if answer is None:
                raise ValueError(f"{path}, row {number} has no {which}: preferences need chosen and rejected")
            if not answer.strip():
                raise ValueError(f"{path}, row {number}: {which} is empty")
    sides = [text.encode_rows(path, tokenizer, examples, which, max_length) for which in ("chosen", "rejected")]
    longest = max(side.tokens.shape[1] for side in sides)
    padded = [_padded(side, longest, tokenizer.pad_id) for side in sides]
    differ = np.any([(a != b).any(axis=1) for a, b in zip(*padded, strict=True)], axis=0)
    if not differ.all():
        same = f"{(~differ).sum()} of {len(differ)} pairs"
        told = f"{path}: cut to {max_length} tokens, {same} have the same answer twice"
        if not differ.any():
            raise ValueError(f"{told}: none is left to learn from (--max-length)")
        print(f"{told}: left out", file=sys.stderr)
    return Texts(*(np.concatenate([side[differ] for side in sides]) for sides in zip(*padded, strict=True)))


def _padded(side: Texts, length: int, pad_id: int) -> Texts:
    more = ((0, 0), (0, length - side.tokens.shape[1]))
    return Texts(
        np.pad(side.tokens, more, constant_values=pad_id),
        np.pad(side.mask, more),
        np.pad(side.completion_mask, more),
    )


def split(pairs: Texts, key: jax.Array) -> tuple[Texts, Texts]:
    """Pairs to learn from, and an eighth of them (at most `MOST_HELD_OUT`) held out; chosen at random.

    Raises:
      ValueError: when there are not two pairs.
    """
    total = len(pairs.tokens) // 2
    if total < 2:
        raise ValueError(f"one pair is held out and one learned from: the preferences have {total}")
    order = np.asarray(jax.random.permutation(key, total))
    held_out = min(MOST_HELD_OUT, -(-total // 8))
    learned, held = (np.sort(rows) for rows in (order[held_out:], order[:held_out]))
    return _sides(pairs, learned), _sides(pairs, held)


def _sides(pairs: Texts, rows: np.ndarray) -> Texts:
    return take(pairs, np.concatenate([rows, rows + len(pairs.tokens) // 2]))


def accuracy(log_prob: np.ndarray, reference_log_prob: np.ndarray) -> float:
    """Share of pairs whose chosen answer gained more on the reference than the rejected one; a tie counts half.

    The accuracy of DPO's implicit reward (arXiv 2305.18290, section 5), each float[2P], chosen first (nats).
    """
    chosen, rejected = np.split(np.asarray(log_prob) - reference_log_prob, 2)
    return float(np.mean((np.sign(chosen - rejected) + 1) / 2))


def check_label_noise(algorithms: Sequence[str], share: float) -> None:
    """Raise where nobody assumes that a share of given pairs is labelled the wrong way round, or robust DPO lacks it.

    Raises:
      ValueError: a share that no algorithm uses; robust DPO without one.
    """
    if "robust_dpo" in algorithms and share == 0:
        raise ValueError(
            "robust_dpo needs --label-noise, the share of the pairs that are labelled the wrong way round, above 0 and "
            "below 0.5; at 0 it is plain DPO"
        )
    if share and "robust_dpo" not in algorithms:
        raise ValueError(
            f"--label-noise: of given pairs only robust_dpo assumes a share of wrong labels; got {share:g} for "
            f"{', '.join(algorithms)}"
        )


def check_enough(pairs: Texts, batch_size: int, flag: str = "--batch-size") -> None:
    """Raise where the pairs fill no batch.

    Args:
      pairs: of `read`, those that are learned from.
      batch_size: sequences in a batch, twice the pairs.
      flag: by which a script's user sets it.

    Raises:
      ValueError: fewer pairs than a batch of `batch_size` sequences holds.
    """
    total, each = len(pairs.tokens) // 2, batch_size // 2
    if total < each:
        raise ValueError(
            f"a batch holds {each} pairs; the preferences have {total} to learn from: choose a smaller {flag}"
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
    check_enough(pairs, batch_size)
    total, each = len(pairs.tokens) // 2, batch_size // 2
    order = np.asarray(jax.random.permutation(key, total))[: total // each * each].reshape(-1, each)
    rows = np.concatenate([order, order + total], axis=1)
    reward = np.tile(np.repeat(np.asarray([1, 0], np.float32), each), (len(order), 1))
    x: Any = take(pairs, rows)
    return PreferenceData(
        ScoredTexts(*x, reward, reward > 0), reward, np.ones((len(order), each), bool), reference_log_prob[rows]
    )

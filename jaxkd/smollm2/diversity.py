"""How much completions differ from one another: distinct-n and self-BLEU."""

import math
from collections import Counter
from collections.abc import Sequence


def _ngrams(row: Sequence[int], n: int) -> Counter:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of a set of sequences (Li et al., arXiv 1510.03055, section 5.2); NaN of none.

    It falls with the size of the set: compare sets of one size.
    """
    together = Counter()
    for row in rows:
        together.update(_ngrams(row, n))
    total = sum(together.values())
    return len(together) / total if total else math.nan


def self_bleu(rows: Sequence[Sequence[int]], max_n: int = 4) -> float:
    """Mean BLEU of each sequence against all others (Zhu et al., arXiv 1802.01886): near 1 where all are alike.

    BLEU is Papineni et al.'s (2002): clipped precisions of 1- to max_n-grams, their geometric mean, and the brevity
    penalty to the reference nearest in length. A precision of 0 counts as half a match (smoothing of NIST: each further
    one half as much), so that a short text without a common 4-gram is not 0 outright.

    Args:
      rows: at least two sequences.
      max_n: longest n-grams.

    Raises:
      ValueError: fewer than two sequences.
    """
    if len(rows) < 2:
        raise ValueError(f"self-BLEU needs at least two sequences, got {len(rows)}")
    counts = [[_ngrams(row, n) for row in rows] for n in range(1, max_n + 1)]
    most = [_two_largest(of_rows) for of_rows in counts]
    lengths = [len(row) for row in rows]
    return sum(_bleu(i, counts, most, lengths) for i in range(len(rows))) / len(rows)


def _two_largest(of_rows: Sequence[Counter]) -> dict[tuple, tuple[int, int, int]]:
    """For each n-gram: its largest count, the row that has it, and the largest count in any other row."""
    found: dict[tuple, tuple[int, int, int]] = {}
    for i, counter in enumerate(of_rows):
        for gram, count in counter.items():
            largest, where, second = found.get(gram, (0, -1, 0))
            if count > largest:
                found[gram] = (count, i, largest)
            elif count > second:
                found[gram] = (largest, where, count)
    return found


def _bleu(i: int, counts, most, lengths: Sequence[int]) -> float:
    logs, zeros = [], 0
    for of_rows, largest in zip(counts, most, strict=True):
        own = of_rows[i]
        total = sum(own.values())
        if total == 0:
            continue
        matched = 0
        for gram, count in own.items():
            highest, where, second = largest[gram]
            matched += min(count, second if where == i else highest)
        if matched == 0:
            zeros += 1
        logs.append(math.log((matched or 0.5**zeros) / total))
    if not logs:
        return 0.0
    others = [length for j, length in enumerate(lengths) if j != i]
    nearest = min(others, key=lambda length: (abs(length - lengths[i]), length))
    brevity = 1.0 if lengths[i] >= nearest else math.exp(1 - nearest / lengths[i])
    return brevity * math.exp(sum(logs) / len(logs))

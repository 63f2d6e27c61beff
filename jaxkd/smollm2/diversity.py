"""How much completions differ from one another: distinct-n and self-BLEU.

A sequence is a list of token ids, or a text, which is split at white space.
"""

import math
from collections import Counter
from collections.abc import Sequence

from jaxkd import checks

Sequences = Sequence[Sequence[int] | str]


def _split(row: Sequence[int] | str) -> Sequence:
    return row.split() if isinstance(row, str) else row


def _ngrams(row: Sequence, n: int) -> Counter:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def distinct_n(rows: Sequences, n: int) -> float:
    """Different n-grams over all n-grams of a set of sequences (Li et al., arXiv 1510.03055, section 5.2); NaN of none.

    It falls with the size of the set: compare sets of one size.

    Raises:
      ValueError: unless n is a whole number of at least 1.
    """
    checks.whole("n", n, least=1)
    together = Counter()
    for row in rows:
        together.update(_ngrams(_split(row), n))
    total = sum(together.values())
    return len(together) / total if total else math.nan


def self_bleu(rows: Sequences, max_n: int = 4) -> float:
    """Mean BLEU of each sequence against all others (Zhu et al., arXiv 1802.01886): near 1 where all are alike.

    BLEU is Papineni et al.'s (2002): clipped precisions of 1- to max_n-grams, their geometric mean, and the brevity
    penalty to the reference nearest in length, the shorter of two. A precision of 0 counts as half a match, each
    further one as half of that (smoothing 3 of Chen and Cherry 2014, NIST's), so that a text without a common 4-gram
    is not 0 outright. Lengths that a short sequence has no n-grams of are left out of its mean; an empty sequence
    scores 0.

    It rises with the number of sequences: compare sets of one size.

    Args:
      rows: at least two sequences.
      max_n: longest n-grams.

    Raises:
      ValueError: fewer than two sequences, or max_n below 1.
    """
    checks.whole("max_n", max_n, least=1)
    if len(rows) < 2:
        raise ValueError(f"self-BLEU needs at least two sequences, got {len(rows)}")
    rows = [_split(row) for row in rows]
    counts = [[_ngrams(row, n) for row in rows] for n in range(1, max_n + 1)]
    highest = [_two_largest(of_rows) for of_rows in counts]
    lengths = [len(row) for row in rows]
    return sum(_bleu(i, counts, highest, lengths) for i in range(len(rows))) / len(rows)


def _two_largest(of_rows: Sequence[Counter]) -> dict[tuple, tuple[int, int, int]]:
    """For each n-gram: its largest count, the row that has it, and the largest count in any other row.

    With these, the largest count in all rows but one is known for every row without visiting the others again.
    """
    found: dict[tuple, tuple[int, int, int]] = {}
    for i, counter in enumerate(of_rows):
        for gram, count in counter.items():
            largest, where, second = found.get(gram, (0, -1, 0))
            if count > largest:
                found[gram] = (count, i, largest)
            elif count > second:
                found[gram] = (largest, where, count)
    return found


def _bleu(i: int, counts, highest, lengths: Sequence[int]) -> float:
    """BLEU of row i: `counts` holds the n-grams by n and row, `highest` what `_two_largest` makes of them by n."""
    logs, zeros = [], 0
    for of_rows, largest in zip(counts, highest, strict=True):
        total = sum(of_rows[i].values())
        if total == 0:
            continue
        matched = _matched(i, of_rows[i], largest)
        zeros += matched == 0
        logs.append(math.log((matched or 0.5**zeros) / total))
    return _brevity(i, lengths) * math.exp(sum(logs) / len(logs)) if logs else 0.0


def _matched(i: int, own: Counter, largest: dict[tuple, tuple[int, int, int]]) -> int:
    """N-grams of row i found in another row, each as often as in the row that has it most often."""
    matched = 0
    for gram, count in own.items():
        most, where, second = largest[gram]
        matched += min(count, second if where == i else most)
    return matched


def _brevity(i: int, lengths: Sequence[int]) -> float:
    others = (length for j, length in enumerate(lengths) if j != i)
    nearest = min(others, key=lambda length: (abs(length - lengths[i]), length))
    return 1.0 if lengths[i] >= nearest else math.exp(1 - nearest / lengths[i])

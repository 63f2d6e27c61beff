import math
import time
from collections import Counter

import numpy as np
import pytest

from jaxkd.smollm2 import diversity


def test_distinct_n_by_hand():
    rows = [[1, 2, 1], [1, 2]]
    assert diversity.distinct_n(rows, 1) == 2 / 5
    assert diversity.distinct_n(rows, 2) == 2 / 3
    assert math.isnan(diversity.distinct_n([[1]], 2))


def test_self_bleu_ends():
    assert diversity.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]) < 0.1
    with pytest.raises(ValueError, match="two sequences"):
        diversity.self_bleu([[1]])


def test_self_bleu_by_hand():
    """[1 2 3 4] against [1 2 3 5 6]: 3/4, 2/3, 1/2 and a smoothed half of 1; shorter by one."""
    expected = math.exp(1 - 5 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 0.5) ** 0.25
    other = (3 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25
    assert diversity.self_bleu([[1, 2, 3, 4], [1, 2, 3, 5, 6]]) == pytest.approx((expected + other) / 2)


def _brute(rows, i, max_n=4):
    logs, zeros = [], 0
    for n in range(1, max_n + 1):
        grams = [Counter(tuple(row[j : j + n]) for j in range(len(row) - n + 1)) for row in rows]
        total = sum(grams[i].values())
        if not total:
            continue
        matched = sum(
            min(count, max(grams[j][gram] for j in range(len(rows)) if j != i)) for gram, count in grams[i].items()
        )
        zeros += matched == 0
        logs.append(math.log((matched if matched else 0.5**zeros) / total))
    nearest = min((len(row) for j, row in enumerate(rows) if j != i), key=lambda n: (abs(n - len(rows[i])), n))
    return min(1, math.exp(1 - nearest / len(rows[i]))) * math.exp(np.mean(logs))


def test_self_bleu_against_every_reference_in_turn():
    chance = np.random.default_rng(0)
    rows = [chance.integers(0, 6, chance.integers(2, 15)).tolist() for _ in range(12)]
    expected = np.mean([_brute(rows, i) for i in range(len(rows))])
    assert diversity.self_bleu(rows) == pytest.approx(expected)


def test_texts_are_split_at_white_space():
    texts, rows = ["a  b a", "b\nc d"], [[0, 1, 0], [1, 2, 3]]
    assert diversity.distinct_n(texts, 1) == diversity.distinct_n(rows, 1) == 4 / 6
    assert diversity.self_bleu(texts) == diversity.self_bleu(rows)


def test_empty_sequences_score_nothing():
    assert diversity.self_bleu([[], []]) == 0
    assert diversity.self_bleu([[], [1], [1]]) == pytest.approx(2 / 3)


def test_two_hundred_completions_take_little_time():
    rows = np.random.default_rng(0).integers(0, 500, (200, 32)).tolist()
    began = time.process_time()  # of this process alone: the machine may be busy
    diversity.self_bleu(rows)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("arguments", [{"max_n": 0}])
def test_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        diversity.self_bleu([[1], [1]], **arguments)
    with pytest.raises(ValueError, match="n must be"):
        diversity.distinct_n([[1]], 0)

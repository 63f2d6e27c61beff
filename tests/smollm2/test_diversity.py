import math
import time
from collections import Counter

import numpy as np
import pytest

from jaxkd.smollm2 import diversity


def _random_rows(number, longest, vocabulary, seed=0, shortest=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest, size=number, endpoint=True)
    return [random.integers(vocabulary, size=length).tolist() for length in lengths]


def test_distinct_n_of_a_known_set():
    rows = [[1, 2, 1, 2], [1, 2, 3], [4]]
    # 1-grams: {1, 2, 3, 4} of 8; 2-grams: 12, 21, 12, 12, 23; 3-grams: 121, 212, 123.
    assert diversity.distinct_n(rows, 1) == 4 / 8
    assert diversity.distinct_n(rows, 2) == 3 / 5
    assert diversity.distinct_n(rows, 3) == 1
    assert math.isnan(diversity.distinct_n(rows, 5))
    assert math.isnan(diversity.distinct_n([], 1))


def test_texts_are_split_at_white_space():
    texts, rows = ["a  b a", "b\nc d"], [[0, 1, 0], [1, 2, 3]]
    assert diversity.distinct_n(texts, 1) == diversity.distinct_n(rows, 1) == 4 / 6
    assert diversity.self_bleu(texts) == diversity.self_bleu(rows)


def test_self_bleu_by_hand():
    a, b, c = [1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 7, 1]
    # a (5 tokens, the nearest other has 4): 1-grams 3 of 5, 2-grams 2 of 4, 3-grams 1 of 3, 4-grams half of one of 2.
    of_a = (3 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** (1 / 4)
    # b (4; 5 and 3 are equally near, the shorter counts): 3 of 4, 2 of 3, 1 of 2, half of one of 1.
    of_b = (3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** (1 / 4)
    # c (3, nearest 4): 1 of 3, then none of 2 and none of 1, halved twice; it has no 4-grams.
    of_c = math.exp(1 - 4 / 3) * (1 / 3 * 0.5 / 2 * 0.25 / 1) ** (1 / 3)
    assert diversity.self_bleu([a, b, c]) == pytest.approx((of_a + of_b + of_c) / 3)


def test_self_bleu_at_its_ends():
    assert diversity.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([[], []]) == 0
    assert diversity.self_bleu([[], [1], [1]]) == pytest.approx(2 / 3)
    apart = [list(range(32 * i, 32 * i + 32)) for i in range(4)]
    assert 0 < diversity.self_bleu(apart) < 0.02


def _plain_self_bleu(rows, max_n):
    """Each row against all others, from the definition."""

    def grams(row, n):
        return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]

    scores = []
    for i, row in enumerate(rows):
        others = rows[:i] + rows[i + 1 :]
        precisions, halvings = [], 1
        for n in range(1, max_n + 1):
            if len(row) < n:
                break
            references = [Counter(grams(other, n)) for other in others]
            matched = sum(
                min(count, max(reference[gram] for reference in references))
                for gram, count in Counter(grams(row, n)).items()
            )
            if matched == 0:
                halvings *= 2
                matched = 1 / halvings
            precisions.append(matched / len(grams(row, n)))
        if not precisions:
            scores.append(0.0)
            continue
        nearest = sorted((abs(len(other) - len(row)), len(other)) for other in others)[0][1]
        penalty = min(1.0, math.exp(1 - nearest / len(row)))
        scores.append(penalty * math.prod(precisions) ** (1 / len(precisions)))
    return float(np.mean(scores))


@pytest.mark.parametrize("max_n", [1, 2, 4, 6])
@pytest.mark.parametrize("vocabulary", [2, 5, 40])
def test_self_bleu_is_that_of_the_definition(max_n, vocabulary):
    # Few symbols: counts above one and ties between rows; many: n-grams that no other row has.
    for seed in range(4):
        rows = _random_rows(12, 12, vocabulary, seed)
        assert diversity.self_bleu(rows, max_n) == pytest.approx(_plain_self_bleu(rows, max_n), rel=1e-12)


def test_only_so_many_sequences_are_taken():
    rows = _random_rows(30, 12, 5, shortest=6)
    some = diversity.self_bleu(rows, most=8, seed=3)
    assert some == diversity.self_bleu(rows, most=8, seed=3)
    assert some != diversity.self_bleu(rows, most=8, seed=4)
    assert diversity.self_bleu(rows, most=30) == diversity.self_bleu(rows)


def test_two_hundred_completions_take_little_time():
    rows = _random_rows(200, 32, 500, shortest=32)
    began = time.process_time()  # of this process alone: the machine may be busy
    diversity.self_bleu(rows)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"rows": [[1, 2]]}, "at least two sequences, got 1"),
        ({"rows": [[1], [1]], "max_n": 0}, "max_n must be"),
        ({"rows": [[1], [1]], "most": 1}, "most must be"),
    ],
)
def test_refuses_what_has_no_self_bleu(arguments, told):
    with pytest.raises(ValueError, match=told):
        diversity.self_bleu(**arguments)
    with pytest.raises(ValueError, match="n must be"):
        diversity.distinct_n([[1]], 0)

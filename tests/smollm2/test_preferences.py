import json

import jax
import numpy as np
import pytest

from jaxkd.smollm2 import preferences, tokenization

TOKENIZER = tokenization.byte_tokenizer()


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(n):
    return [{"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no, never {i}"} for i in range(n)]


def _completion(x, row):
    return TOKENIZER.decode(x.tokens[row][x.completion_mask[row]].tolist(), skip_special_tokens=True)


def test_chosen_answers_come_first(tmp_path):
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", _rows(3)), TOKENIZER, 64)
    assert [_completion(pairs, row) for row in range(6)] == [
        *(f" yes {i}" for i in range(3)),
        *(f" no, never {i}" for i in range(3)),
    ]
    assert pairs.tokens.shape == pairs.mask.shape == pairs.completion_mask.shape


def test_batches_keep_pairs_together_and_their_reference_too(tmp_path):
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", _rows(7)), TOKENIZER, 64)
    # Log-probabilities that say which row they are of.
    log_prob = np.repeat(np.arange(14, dtype=np.float32)[:, None], pairs.tokens.shape[1] - 1, axis=1)
    data = preferences.batched(pairs, jax.random.key(0), 4, log_prob)
    assert data.rewards.shape == (3, 4) and data.first_preferred.all()
    seen = set()
    for b in range(3):
        for i in range(2):
            chosen, rejected = (int(data.reference_log_prob[b, j, 0]) for j in (i, i + 2))
            assert rejected == chosen + 7
            one = jax.tree.map(lambda leaf: leaf[b], data.x)  # noqa: B023
            assert _completion(one, i) == f" yes {chosen}" and _completion(one, i + 2) == f" no, never {chosen}"
            seen.add(chosen)
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "row 1 has no chosen"),
        ({"prompt": "a", "chosen": " b", "rejected": "  "}, "row 1: rejected is empty"),
        ({"prompt": "a", "better": " b"}, "row 1 has no chosen"),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": " "}],
            },
            "row 1: rejected is empty",
        ),
    ],
)
def test_refuses_files(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        preferences.read(_write(tmp_path / "pairs.jsonl", [row]), TOKENIZER, 64)


def test_pairs_whose_answers_are_the_same_once_cut_are_left_out_and_told(tmp_path, capsys):
    rows = [*_rows(3), {"prompt": "Say", "chosen": " " + "a" * 70, "rejected": " " + "a" * 71}]
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", rows), TOKENIZER, 64)
    assert [_completion(pairs, row) for row in range(6)] == [
        *(f" yes {i}" for i in range(3)),
        *(f" no, never {i}" for i in range(3)),
    ]
    assert len(pairs.tokens) == 6
    assert "cut to 64 tokens, 1 of 4 pairs have the same answer twice: left out" in capsys.readouterr().err
    assert len(preferences.read(tmp_path / "pairs.jsonl", TOKENIZER, 100).tokens) == 8
    with pytest.raises(ValueError, match=r"1 of 1 pairs have the same answer twice.*--max-length"):
        preferences.read(_write(tmp_path / "same.jsonl", rows[3:]), TOKENIZER, 64)


def test_refuses_fewer_pairs_than_a_batch(tmp_path):
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", _rows(1)), TOKENIZER, 64)
    with pytest.raises(ValueError, match=r"a batch holds 2 pairs; the preferences have 1 .* a smaller --batch-size"):
        preferences.batched(pairs, jax.random.key(0), 4, np.zeros((2, pairs.tokens.shape[1] - 1), np.float32))


def test_held_out_pairs_are_no_others_and_keep_their_sides(tmp_path):
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", _rows(20)), TOKENIZER, 64)
    learned, held = preferences.split(pairs, jax.random.key(0))
    assert (len(learned.tokens), len(held.tokens)) == (2 * 17, 2 * 3)
    both = [_couples(part) for part in (learned, held)]
    assert both[0] | both[1] == _couples(pairs) and not both[0] & both[1]
    with pytest.raises(ValueError, match="the preferences have 1"):
        preferences.split(preferences.read(_write(tmp_path / "one.jsonl", _rows(1)), TOKENIZER, 64), jax.random.key(0))


def _couples(pairs):
    chosen, rejected = np.split(pairs.tokens, 2)
    return {(a.tobytes(), b.tobytes()) for a, b in zip(chosen, rejected, strict=True)}


def test_accuracy_counts_gains_on_the_reference_and_half_of_ties():
    reference = np.asarray([-5.0, -5.0, -9.0, -1.0, -1.0, -2.0])
    assert preferences.accuracy(reference, reference) == 0.5
    # The first pair is ranked right by its gain alone, the second is a tie, the third is wrong.
    gains = np.asarray([1.0, 2.0, -1.0, 0.0, 2.0, 1.0])
    assert preferences.accuracy(reference + gains, reference) == 0.5
    assert preferences.accuracy(reference + np.repeat([1, 0], 3), reference) == 1

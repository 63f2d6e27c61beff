from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params

from jaxkd import distill
from jaxkd.losses import divergence as naive
from jaxkd.smollm2 import distillation, policy
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.policy import DIVERGENCES, Texts

COEFFICIENT = 0.3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks each way, the last of them not full."""
    monkeypatch.setattr(policy, "TOKEN_CHUNK", 8)
    monkeypatch.setattr(policy, "VOCAB_BLOCK", 100)


@cache
def _model(dtype="float32"):
    return make_model(Config.tiny(num_layers=1), compute_dtype=dtype)


@cache
def _params(seed=0):
    return random_params(_model(), seed, embedding=0.2)


STUDENT, TEACHER = 0, 7


def _between(starts, ends):
    return (jnp.arange(9) >= jnp.asarray(starts)[:, None]) & (jnp.arange(9) < jnp.asarray(ends)[:, None])


# Padding on neither side, on both and on the left; the last text is all prompt.
X = Texts(
    jax.random.randint(jax.random.key(3), (4, 9), 3, 264),
    _between([0, 2, 4, 1], [9, 7, 9, 9]),
    _between([3, 4, 5, 9], [9, 7, 9, 9]),
)
NUM_TOKENS = 6 + 3 + 4

KEEP_GRADIENT = optax.GradientTransformation(lambda params: params, lambda gradient, *_: (gradient, gradient))
"""An optimiser whose state is the last gradient."""


@cache
def _step(divergence, dtype="float32"):
    """Compiled once for all tests: student and teacher have one shape, and another where the loop is tested."""
    compare = distillation.make_comparison(_model(dtype), _model(dtype), divergence)
    return jax.jit(distill.token_level_step(compare, KEEP_GRADIENT))


def _info_and_gradient(divergence, dtype="float32", x=X, teacher=TEACHER):
    inputs = distill.TokenInputs(x, _params(teacher), jnp.float32(0.0), jnp.float32(COEFFICIENT))
    state = distill.State(_params(STUDENT), KEEP_GRADIENT.init(_params(STUDENT)))
    state, info = _step(divergence, dtype)(state, inputs)
    return info, state.optimizer_state


def _naive_mean(name, log_p, log_q):
    extra = () if name in ("forward_kl", "reverse_kl") else (COEFFICIENT,)
    return naive.masked_mean(getattr(naive, name)(log_p, log_q, *extra), X.completion_mask[:, 1:])


@cache
def _naive_infos_and_gradients(dtype):
    """Of every divergence by name, from whole logits; the models are gone through once for all."""
    model = _model(dtype)

    def log_probs(params):
        return jax.nn.log_softmax(model.logits(params, X.tokens, X.mask)[:, :-1])

    @jax.jit
    def all_of_them(params, teacher):
        log_p, (log_q, pull_back) = log_probs(teacher), jax.vjp(log_probs, params)
        means, slopes = zip(
            *(jax.value_and_grad(partial(_naive_mean, name, log_p))(log_q) for name in DIVERGENCES), strict=True
        )
        (gradients,) = jax.vmap(pull_back)(jnp.stack(slopes))
        picked = jnp.take_along_axis(log_q, X.tokens[:, 1:, None], axis=-1)[..., 0]
        return means, naive.masked_mean(picked, X.completion_mask[:, 1:]), gradients

    means, log_prob, gradients = all_of_them(_params(STUDENT), _params(TEACHER))
    return {
        name: (
            distill.TokenInfo(mean, mean, log_prob, jnp.int32(NUM_TOKENS)),
            jax.tree.map(lambda leaf, i=i: leaf[i], gradients),
        )
        for i, (name, mean) in enumerate(zip(DIVERGENCES, means, strict=True))
    }


def _distance(a, b):
    """The largest difference in any leaf, relative to the leaf's largest entry."""
    differences = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max()), a, b)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), pytest.param("bfloat16", 0.01, marks=pytest.mark.slow)]
)
def test_value_and_gradient_are_those_of_whole_logits(divergence, dtype, tolerance):
    info, gradient = _info_and_gradient(divergence, dtype)
    plain_info, plain_gradient = _naive_infos_and_gradients(dtype)[divergence]
    assert info.num_tokens == NUM_TOKENS
    assert info.loss > 0.01
    assert _distance(info, plain_info) < tolerance
    assert _distance(gradient, plain_gradient) < tolerance


def _changed(where):
    """Other tokens where told."""
    return X._replace(tokens=jnp.where(where, (X.tokens + 100) % 261 + 3, X.tokens))


def test_what_is_not_counted_has_no_influence():
    only_prompt = ~X.completion_mask.any(axis=1, keepdims=True)
    before = _info_and_gradient("reverse_kl")
    for where in (~X.mask, jnp.broadcast_to(only_prompt, X.mask.shape)):
        x = _changed(where)
        assert (x.tokens != X.tokens).any()
        after = _info_and_gradient("reverse_kl", x=x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after, before)
    context = _info_and_gradient("reverse_kl", x=_changed(X.mask & ~X.completion_mask))
    assert abs(context[0].loss - before[0].loss) > 1e-3


def test_the_divergence_at_a_prompt_is_made_and_not_counted():
    compare = jax.jit(distillation.make_comparison(_model(), _model(), "forward_kl"))
    divergence, log_prob, counted = compare(_params(STUDENT), _params(TEACHER), X, jnp.float32(COEFFICIENT))
    assert divergence.shape == log_prob.shape == counted.shape == (4, 8)
    inside = X.mask[:, 1:] & X.mask[:, :-1]
    assert (divergence[inside & ~counted] > 0).all()
    info, _ = _info_and_gradient("forward_kl")
    np.testing.assert_allclose(info.divergence, divergence[counted].mean(), rtol=1e-5)
    assert abs(info.divergence - divergence[inside].mean()) > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence):
    info, gradient = _info_and_gradient(divergence, teacher=STUDENT)
    assert abs(info.loss) < 1e-5
    _, ordinary = _info_and_gradient(divergence)
    assert optax.tree.norm(gradient) < 1e-4 * optax.tree.norm(ordinary)


def test_the_teacher_gets_no_gradient():
    compare = distillation.make_comparison(_model(), _model(), "generalized_jensen_shannon")

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(params, teacher):
        divergence, log_prob, counted = compare(params, teacher, X, jnp.float32(COEFFICIENT))
        return jnp.where(counted, divergence + log_prob, 0.0).sum()

    of_student, of_teacher = gradients(_params(STUDENT), _params(TEACHER))
    assert optax.tree.norm(of_student) > 0.1
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_teacher))


def test_refuses():
    with pytest.raises(ValueError, match="264 and 300"):
        distillation.make_comparison(_model(), make_model(Config.tiny(vocab_size=300)), "forward_kl")
    with pytest.raises(ValueError, match="divergence must be one of"):
        distillation.make_comparison(_model(), _model(), "total_variation")


@pytest.mark.loose  # optax's Adam does not stand strict dtype promotion
def test_a_loop_on_the_host_over_both_kinds_of_batches_distils_and_compiles_once():
    student, teacher = _model(), make_model(Config.tiny(num_layers=2, hidden_size=16, num_heads=2))
    teacher_params = random_params(teacher, 7, embedding=0.3)
    kept = jax.tree.map(np.array, teacher_params)
    optimizer = distill.make_optimizer(20)
    compare = distillation.make_comparison(student, teacher, "skew_kl")
    step = jax.jit(distill.token_level_step(compare, optimizer), donate_argnums=0)
    draw_own, draw_fixed = (
        jax.jit(policy.make_policy(model, [[5, 6]], [[True, True]], max_new_tokens=6).sample, static_argnums=2)
        for model in (student, teacher)
    )
    fixed = draw_fixed(teacher_params, jax.random.key(0), 8, 1.0)
    params = jax.tree.map(jnp.copy, _params(STUDENT))
    state, losses = distill.State(params, optimizer.init(params)), {False: [], True: []}
    for number in range(20):
        choice_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        on_policy = distill.use_student(choice_key, 0.5)
        x = draw_own(state.params, draw_key, 8, 1.0) if on_policy else fixed
        # Learning rate and coefficient are traced: other numbers compile nothing.
        inputs = distill.TokenInputs(x, teacher_params, jnp.float32(0.03), jnp.float32(0.1 - 1e-4 * number))
        state, info = step(state, inputs)
        losses[on_policy].append(float(info.loss))
    assert step._cache_size() == 1
    for those in losses.values():
        assert len(those) > 4
        assert np.mean(those[-2:]) < 0.7 * those[0]
    jax.tree.map(np.testing.assert_array_equal, teacher_params, kept)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import entropy

from jaxkd.losses import divergence

RNG = np.random.default_rng(2)
TEACHER, STUDENT = RNG.dirichlet(np.ones(6), size=(2, 3, 4))  # each [batch 3, steps 4, outcomes 6]


def logs(*probabilities):
    with np.errstate(divide="ignore"):
        return [jnp.asarray(np.log(p).astype(np.float32)) for p in probabilities]


def js(b):
    return functools.partial(divergence.generalized_jensen_shannon, teacher_share=b)


def skewed(function, a):
    return functools.partial(function, skew=a)


def js_by_entropies(p, q, b):
    """H(M) − b·H(P) − (1 − b)·H(Q)."""
    return entropy(b * p + (1 - b) * q, axis=-1) - b * entropy(p, axis=-1) - (1 - b) * entropy(q, axis=-1)


CASES = {
    "forward_kl": (divergence.forward_kl, lambda p, q: entropy(p, q, axis=-1)),
    "reverse_kl": (divergence.reverse_kl, lambda p, q: entropy(q, p, axis=-1)),
    "js_0.2": (js(0.2), lambda p, q: js_by_entropies(p, q, 0.2)),
    "js_0.5": (js(0.5), lambda p, q: jensenshannon(p, q, axis=-1) ** 2),
    "js_0.9": (js(0.9), lambda p, q: js_by_entropies(p, q, 0.9)),
    "skew_kl_0.1": (skewed(divergence.skew_kl, 0.1), lambda p, q: rel_entr(p, 0.1 * p + 0.9 * q).sum(-1)),
    "skew_reverse_kl_0.1": (
        skewed(divergence.skew_reverse_kl, 0.1),
        lambda p, q: rel_entr(q, 0.9 * p + 0.1 * q).sum(-1),
    ),
}


# Compilation is what these tests spend their time on: each of these evaluates all cases in one.
@functools.cache
def values():
    compiled = jax.jit(lambda p, q: {name: ours(p, q) for name, (ours, _) in CASES.items()})
    return jax.device_get(compiled(*logs(TEACHER, STUDENT)))


@jax.jit
def evaluate(p, q):
    return {
        name: (
            jax.value_and_grad(ours, argnums=(0, 1))(p, q),
            jax.grad(lambda x, ours=ours: ours(p, jax.nn.log_softmax(x)))(q),
        )
        for name, (ours, _) in CASES.items()
    }


@functools.cache
def values_and_gradients(kind):
    """At one distribution; the gradients by log P, by log Q and by the student's logits, through a softmax."""
    return jax.device_get(evaluate(*logs(*SINGLE[kind])))


SINGLE = {
    "plain": (TEACHER[0, 0], STUDENT[0, 0]),
    "an impossible outcome": np.insert(np.array([TEACHER[0, 0], STUDENT[0, 0]]), 2, 0, axis=-1),
    "an outcome the teacher excludes": (np.array([0.0, 0.3, 0.3, 0.2, 0.1, 0.1]), STUDENT[1, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_definition(name):
    value = values()[name]
    assert value.shape == (3, 4)
    np.testing.assert_allclose(value, CASES[name][1](TEACHER, STUDENT), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradient_with_respect_to_the_students_logits(name):
    theirs = CASES[name][1]
    teacher, student = SINGLE["plain"]
    logits = np.log(student)

    def exact(logits):
        return theirs(teacher, np.exp(logits) / np.exp(logits).sum())

    step = 1e-5 * np.eye(6)
    expected = [(exact(logits + h) - exact(logits - h)) / 2e-5 for h in step]
    _, gradient = values_and_gradients("plain")[name]
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_zero_where_student_equals_teacher(name):
    (teacher,) = logs(TEACHER)
    np.testing.assert_allclose(CASES[name][0](teacher, teacher), 0, atol=5e-7)
    if name in ("forward_kl", "reverse_kl"):
        np.testing.assert_array_equal(CASES[name][0](teacher, teacher), 0)


def test_the_first_argument_is_the_teacher():
    # A student that misses half of what the teacher does fails the forward KL alone.
    wide, narrow = logs(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    assert divergence.forward_kl(wide, narrow) == np.inf
    np.testing.assert_allclose(divergence.reverse_kl(wide, narrow), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        divergence.skew_kl(wide, narrow, 0.1), 0.5 * np.log(0.5 / 0.95) + 0.5 * np.log(10), rtol=1e-5
    )
    np.testing.assert_allclose(divergence.skew_reverse_kl(wide, narrow, 0.1), -np.log(0.9 * 0.5 + 0.1), rtol=1e-5)
    # M = b·P + (1 − b)·Q = (0.6, 0.4) at b = 0.8.
    expected = 0.8 * (0.5 * np.log(0.5 / 0.6) + 0.5 * np.log(0.5 / 0.4)) + 0.2 * np.log(1 / 0.6)
    np.testing.assert_allclose(divergence.generalized_jensen_shannon(wide, narrow, 0.8), expected, rtol=1e-5)


def test_jensen_shannon_tends_to_the_kls_at_its_ends():
    teacher, student = logs(TEACHER, STUDENT)
    share = 2e-3
    np.testing.assert_allclose(js(share)(teacher, student) / share, entropy(TEACHER, STUDENT, axis=-1), rtol=0.05)
    np.testing.assert_allclose(js(1 - share)(teacher, student) / share, entropy(STUDENT, TEACHER, axis=-1), rtol=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_jensen_shannon_is_zero_at_its_ends(share):
    teacher, student = logs([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.0, 0.5, 0.5], [0.6, 0.2, 0.2]])
    value, gradient = jax.jit(jax.value_and_grad(lambda q: js(share)(teacher, q).sum()))(student)
    np.testing.assert_allclose(value, 0, atol=2e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_jensen_shannon_of_distributions_that_share_nothing(share):
    teacher, student = logs(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    expected = entropy([share, 1 - share])
    np.testing.assert_allclose(js(share)(teacher, student), expected, rtol=1e-6)


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_skewed_divergences_at_their_ends(a):
    teacher, student = logs(TEACHER, STUDENT)
    for skew, plain in (
        (divergence.skew_kl, divergence.forward_kl),
        (divergence.skew_reverse_kl, divergence.reverse_kl),
    ):
        expected = plain(teacher, student) if a == 0 else 0
        np.testing.assert_allclose(skew(teacher, student, a), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_an_impossible_outcome_changes_nothing(name):
    (value, gradients), through_softmax = values_and_gradients("an impossible outcome")[name]
    np.testing.assert_allclose(value, CASES[name][1](*SINGLE["plain"]), rtol=1e-4)
    (_, plain_gradients), plain_through_softmax = values_and_gradients("plain")[name]
    for wide, plain in zip([*gradients, through_softmax], [*plain_gradients, plain_through_softmax], strict=True):
        assert wide[2] == 0
        np.testing.assert_allclose(np.delete(wide, 2), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_an_outcome_the_teacher_excludes(name):
    case = "an outcome the teacher excludes"
    (value, (_, by_student)), through_softmax = values_and_gradients(case)[name]
    np.testing.assert_allclose(value, CASES[name][1](*SINGLE[case]), rtol=1e-5)
    assert not np.any(np.isnan(by_student))
    # Through a softmax one bad entry would spoil all of them. An infinite loss has no gradient to speak of.
    assert name == "reverse_kl" or np.all(np.isfinite(through_softmax))


def test_a_mass_that_underflows_still_counts_as_possible():
    teacher, student = jnp.array([0.0, -200.0]), jnp.array([0.0, -jnp.inf])
    assert divergence.forward_kl(teacher, student) == np.inf
    assert divergence.reverse_kl(teacher, student) == 0


def test_a_truncated_tail_is_not_renormalised():
    teacher, student = logs(TEACHER[..., :3], STUDENT[..., :3])
    np.testing.assert_allclose(
        jax.jit(divergence.forward_kl)(teacher, student),
        rel_entr(TEACHER, STUDENT)[..., :3].sum(-1),
        rtol=1e-4,
        atol=1e-6,
    )


def test_coefficients_may_be_traced():
    teacher, student = logs(TEACHER, STUDENT)
    grid = [0.0, 0.3, 1.0]
    for function in (divergence.generalized_jensen_shannon, divergence.skew_kl, divergence.skew_reverse_kl):
        together = jax.jit(jax.vmap(lambda a, f=function: f(teacher, student, a)))(jnp.array(grid))
        for row, a in zip(together, grid, strict=True):
            np.testing.assert_allclose(row, function(teacher, student, a), rtol=1e-4, atol=1e-6)


def test_half_precision_stays_half_precision():
    teacher, student = (x.astype(jnp.bfloat16) for x in logs(TEACHER, STUDENT))
    values = jax.jit(lambda p, q: {name: ours(p, q) for name, (ours, _) in CASES.items()})(teacher, student)
    for name, value in values.items():
        assert value.dtype == jnp.bfloat16, name
        np.testing.assert_allclose(value.astype(jnp.float32), CASES[name][1](TEACHER, STUDENT), atol=0.08)


MASK = np.array([[True, True, False], [True, False, False]])
VALUES = np.array([[1.0, 2.0, np.nan], [6.0, np.inf, -np.inf]], dtype=np.float32)


def test_padding_has_no_influence():
    mean = functools.partial(divergence.masked_mean, mask=jnp.asarray(MASK))
    value, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(VALUES))
    np.testing.assert_allclose(value, 3.0)
    np.testing.assert_allclose(gradient, MASK / 3)
    np.testing.assert_allclose(mean(jnp.asarray(VALUES), axis=-1), [1.5, 6.0])
    np.testing.assert_allclose(mean(jnp.asarray(VALUES)), 3.0)


def test_mean_of_nothing_is_zero():
    empty = MASK.copy()
    empty[1] = False
    mean = jax.jit(functools.partial(divergence.masked_mean, axis=-1))
    np.testing.assert_array_equal(mean(jnp.asarray(VALUES), jnp.asarray(empty)), [1.5, 0])


P, Q = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.1, 0.9]], np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda f=f: f(P, Q[0]), "agree in shape") for f, _ in CASES.values()),
        (lambda: divergence.generalized_jensen_shannon(P, Q, -0.1), r"teacher_share must be in \[0, 1\], got -0.1"),
        (lambda: divergence.generalized_jensen_shannon(P, Q, 1.1), "teacher_share"),
        (lambda: divergence.skew_kl(P, Q, 1.1), "skew"),
        (lambda: divergence.skew_reverse_kl(P, Q, -0.1), "skew"),
        (lambda: divergence.skew_reverse_kl(P, Q, float("nan")), "skew .* got nan"),
        (lambda: divergence.masked_mean(VALUES, MASK[0]), "agree in shape"),
        (lambda: divergence.masked_mean(VALUES, MASK.astype(int)), "mask must be boolean"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

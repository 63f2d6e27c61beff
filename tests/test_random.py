import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import random

words = jax.jit(random.words, static_argnums=(1, 2))
keys = jax.jit(random.keys, static_argnums=1)


@pytest.mark.parametrize(("rows", "n"), [(3, 256), (1, 8), (2, 1)])
def test_words_are_those_of_jax(rows, n):
    key = jax.random.key(11)
    with jax.threefry_partitionable(False):
        expected = jax.random.bits(key, (rows, n))
    np.testing.assert_array_equal(words(key, rows, n), expected)


def test_an_odd_number_of_words_is_the_beginning_of_the_next_even_number():
    key = jax.random.key(3)
    np.testing.assert_array_equal(words(key, 1, 7)[0], words(key, 1, 8)[0, :7])


@pytest.mark.parametrize("count", [1, 5])
def test_keys_are_those_that_jax_folds_in(count):
    key = jax.random.key(7)
    expected = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(count))
    np.testing.assert_array_equal(jax.random.key_data(keys(key, count)), jax.random.key_data(expected))


def test_keys_and_words_of_several_keys_at_once_are_those_of_each():
    def of_third(key):
        return random.words(random.keys(key, 3)[2], 2, 6)

    many = keys(jax.random.key(0), 4)
    together, alone = jax.jit(jax.vmap(of_third))(many), jax.jit(of_third)
    for i in range(4):
        np.testing.assert_array_equal(together[i], alone(many[i]))


@pytest.mark.parametrize(
    "turn", [lambda key: key, lambda key: jax.random.split(key)[1], lambda k: jax.random.fold_in(k, 4)]
)
def test_keys_of_the_generator_that_is_usual_on_tpus_give_the_same_numbers(turn):
    threefry, rbg = (turn(jax.random.key(5, impl=impl)) for impl in (random.IMPLEMENTATION, "rbg"))
    np.testing.assert_array_equal(words(rbg, 2, 6), words(threefry, 2, 6))
    np.testing.assert_array_equal(jax.random.key_data(keys(rbg, 3)), jax.random.key_data(keys(threefry, 3)))


def test_uniforms_fill_the_unit_interval_evenly():
    drawn = np.asarray(jax.jit(random.uniforms, static_argnums=(1, 2))(jax.random.key(1), 2, 50_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    # The chi-square of 19 degrees of freedom exceeds 44 once in a thousand.
    assert ((counts - 5000) ** 2 / 5000).sum() < 44

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import rewards


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.5])
def test_reflected_falls_beyond_the_level_as_fast_as_it_rose_and_clipped_stays(level):
    values = jnp.asarray([-3.0, -1.0, 0.0, 1.0, 1.5, 4.0])
    plain = np.asarray(values)
    reflected = rewards.reflected(lambda x: x, level)(values)
    np.testing.assert_allclose(reflected, np.where(plain <= level, plain, 2 * level - plain))
    np.testing.assert_allclose(rewards.clipped(lambda x: x, level)(values), np.where(plain <= level, plain, level))


label = jax.jit(jax.vmap(rewards.bradley_terry, in_axes=(0, None, None, None, None)))


@pytest.mark.parametrize("difference", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("flip_rate", [0.0, 0.2, 0.5])
def test_labels_follow_bradley_terry_with_flips(difference, temperature, flip_rate):
    first = jnp.zeros(100) + 3.0 + difference
    keys = jax.random.split(jax.random.key(0), 200)
    frequency = float(label(keys, first, jnp.zeros(100) + 3.0, temperature, flip_rate).mean())
    clean = 1 / (1 + np.exp(-difference / temperature))
    expected = clean * (1 - flip_rate) + (1 - clean) * flip_rate
    assert abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)


def test_a_flip_rate_flips_labels_of_the_same_key():
    first, second = jnp.zeros(20_000) + 1.0, jnp.zeros(20_000)
    once = jax.jit(rewards.bradley_terry)
    clean, noisy = (once(jax.random.key(0), first, second, 1.0, rate) for rate in (0.0, 0.1))
    assert abs(float((clean != noisy).mean()) - 0.1) < 4 * np.sqrt(0.09 / 20_000)

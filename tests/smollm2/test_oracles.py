import jax
import numpy as np
import pytest

from jaxkd.smollm2 import behaviours, oracles
from tests.smollm2 import by_hand, tiny_order


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A target, completions of various lengths, and their log-likelihoods a token by hand."""
    target = tiny_order.laboratory(tiny_order.make(), tmp_path_factory.mktemp("none")).setting.load("random:tiny")
    x = target.draw(jax.random.key(2), 16)
    # An untrained model hardly ever ends.
    short = np.cumsum(x.completion_mask, axis=1) <= 1 + np.arange(16)[:, None] % 8
    x = x._replace(mask=x.mask & short, completion_mask=x.completion_mask & short)
    return target, x, by_hand.log_prob(target.config, target.params, x._asdict()) / (1 + np.arange(16) % 8)


@pytest.mark.loose
@pytest.mark.parametrize("kind", ["plain", "reflected", "clipped"])
def test_likelihood_rewards_by_hand(scored, kind):
    target, x, likelihood = scored
    level = float(np.median(likelihood))
    expected = {
        "plain": likelihood,
        "reflected": np.where(likelihood > level, 2 * level - likelihood, likelihood),
        "clipped": np.where(likelihood > level, level, likelihood),
    }[kind]
    texts = target.setting.texts_of(x)
    behaviour = behaviours.parse("digit")
    rewards, hits = oracles.of_likelihood(target, behaviour, kind, None if kind == "plain" else level)(texts, x)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-5)
    np.testing.assert_array_equal(hits, [any(sign in "0123456789" for sign in text) for text in texts])

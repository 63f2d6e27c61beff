from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jaxkd import align
from jaxkd.smollm2 import adapters, weights
from jaxkd.smollm2.adapters import LoRA, WithFrozen
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model, product
from jaxkd.smollm2.policy import Texts, make_policy

CONFIG = Config.tiny(num_layers=2)
LORA = LoRA(rank=3, alpha=6.0)


@cache
def _base():
    """A policy and its parameters."""
    model = make_model(CONFIG)
    prompts, mask = np.asarray([[5, 6, 7], [0, 8, 9]]), np.asarray([[True] * 3, [False, True, True]])
    return make_policy(model, prompts, mask, max_new_tokens=5), random_params(model, embedding=0.2)


def _texts(n=4, seed=3):
    """Completions of 5, 4, … tokens."""
    tokens = jax.random.randint(jax.random.key(seed), (n, 8), 3, 264)
    mask = jnp.arange(8)[None, :] < 8 - jnp.arange(n)[:, None]
    return Texts(tokens, mask, mask & (jnp.arange(8)[None, :] >= 3))


def _trained(lora=LORA, size=0.1):
    """Adapters whose B is not zero."""
    fresh = adapters.init(lora, CONFIG, jax.random.key(0))
    key = jax.random.key(1)
    return {
        target: pair | {"b": size * jax.random.normal(jax.random.fold_in(key, i), pair["b"].shape)}
        for i, (target, pair) in enumerate(fresh.items())
    }


def _copied(tree):
    return jax.tree.map(jnp.copy, tree)


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_and_the_reference_are_the_base_to_the_bit(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), _base()[1])
    fresh = adapters.init(LORA, CONFIG, jax.random.key(0))
    for start in (fresh, adapters.reference(fresh), adapters.reference(_trained())):
        merged = jax.jit(lambda a: adapters.merge(LORA, params, a))(start)
        _same(merged, params)
        assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, params)


def test_log_probs_at_the_start_are_the_base_s():
    policy, params = _base()
    fresh, texts = adapters.init(LORA, CONFIG, jax.random.key(0)), _texts()
    adapted = adapters.adapt(policy, LORA)
    ours = jax.jit(adapted.log_prob)(fresh, WithFrozen(texts, params))
    np.testing.assert_allclose(ours, jax.jit(policy.log_prob)(params, texts), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(adapted.num_steps(WithFrozen(texts, params)), policy.num_steps(texts))


@pytest.mark.parametrize(("module", "target"), [(m, t) for t, m in adapters._MODULES.items()])
def test_a_merged_kernel_is_two_more_products(module, target):
    params, trained = _base()[1], _trained()
    merged = adapters.merge(LORA, params, trained)
    a, b = trained[target]["a"], trained[target]["b"]
    x = jax.random.normal(jax.random.key(2), (5, a.shape[1]))
    for layer in range(CONFIG.num_layers):
        kernel, changed = (p["layers"][module][target][layer] for p in (params, merged))
        beside = product(x, kernel, "float32") + 6.0 / 3 * (x @ a[layer]) @ b[layer]
        np.testing.assert_allclose(product(x, changed, "float32"), beside, rtol=1e-4, atol=1e-4)
    assert np.abs(changed - kernel).max() > 1e-3


def test_only_the_targets_change_and_the_rest_is_not_copied():
    params, lora = _base()[1], replace(LORA, targets=("qkv", "down"))
    merged = adapters.merge(lora, params, _trained(lora))
    changed = jax.tree.map(lambda a, b: a is not b, params, merged)
    changed = {path[-1].key for path, different in jax.tree_util.tree_leaves_with_path(changed) if different}
    assert changed == {"qkv", "down"}


def _loss(log_prob):
    """A number that every log-probability enters."""
    return jnp.sum(jnp.cos(jnp.arange(log_prob.size, dtype=jnp.float32)).reshape(log_prob.shape) * log_prob)


def test_gradients_are_those_of_merged_weights_by_the_chain_rule_and_do_not_reach_frozen_ones():
    policy, params = _base()
    trained, texts = _trained(), _texts()
    adapted = adapters.adapt(policy, LORA)

    def of_adapters(adapters, frozen):
        return _loss(adapted.log_prob(adapters, WithFrozen(texts, frozen)))

    gradient, of_frozen = jax.jit(jax.grad(of_adapters, argnums=(0, 1)))(trained, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_frozen))
    merged = adapters.merge(LORA, params, trained)
    toward = jax.jit(jax.grad(lambda p: _loss(policy.log_prob(p, texts))))(merged)["layers"]
    for target, module in adapters._MODULES.items():
        a, b = (np.asarray(trained[target][name], np.float64) for name in "ab")
        kernel = np.asarray(toward[module][target], np.float64).reshape(len(a), a.shape[1], b.shape[2])
        for name, expected in (("a", 2.0 * kernel @ b.swapaxes(1, 2)), ("b", 2.0 * a.swapaxes(1, 2) @ kernel)):
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(gradient[target][name], expected, rtol=1e-3, atol=1e-4)


def test_gradients_are_finite_differences():
    policy, params = _base()
    trained, x = _trained(), WithFrozen(_texts(), params)
    loss = jax.jit(lambda a: _loss(adapters.adapt(policy, LORA).log_prob(a, x)))
    gradient = jax.grad(loss)(trained)
    length = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)) ** 0.5
    ahead, behind = (jax.tree.map(lambda a, g, s=s: a + s * g / length, trained, gradient) for s in (1e-3, -1e-3))
    np.testing.assert_allclose((loss(ahead) - loss(behind)) / 2e-3, length, rtol=1e-2)


@pytest.mark.loose
def test_an_alignment_step_changes_adapters_alone():
    policy, params = _base()
    frozen = _copied(params)
    settings = align.AlignmentSettings(algorithm="online_dpo", num_updates=4, batch_size=4)
    optimizer = align.make_optimizer(settings.num_updates)

    def reward(draws):
        return draws.tokens[:, -1].astype(jnp.float32) / 264

    def on_target(draws):
        return draws.tokens[:, -1] > 132

    adapted = adapters.adapt(policy, LORA)
    step = align.make_step(adapted, optimizer, settings, adapters.of_draws(reward), adapters.of_draws(on_target))
    step = jax.jit(step, donate_argnums=0)
    start = adapters.init(LORA, CONFIG, jax.random.key(0))
    first = _copied(start)
    state = align.State(start, optimizer.init(start))
    held = adapters.reference(start)
    coefficients = align.Coefficients(kl_coef=0.1)
    for i in range(2):
        draws = _texts(seed=i)
        x = WithFrozen(draws, params)
        state, info = step(state, align.Inputs(jax.random.key(9), held, coefficients, x))
        if i == 0:
            np.testing.assert_allclose(info.kl, 0.0, atol=1e-5)  # policy and reference are the base
        np.testing.assert_allclose(info.reward, reward(draws).mean(), rtol=1e-6)
        assert info.target_hits == on_target(draws).sum()
    assert jax.tree.structure(state.params) == jax.tree.structure(first)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, first)
    # Both: A's gradient passes through B, which is zero before the first update, but not before the second.
    assert all(jax.tree.leaves(moved)), moved
    _same(params, frozen)


def test_a_saved_merge_is_the_adapted_policy(tmp_path):
    policy, params = _base()
    trained, texts = _trained(), _texts()
    ours = jax.jit(adapters.adapt(policy, LORA).log_prob)(trained, WithFrozen(texts, params))
    weights.save_pretrained(tmp_path, CONFIG, adapters.merge(LORA, params, trained))
    config, loaded = weights.load(tmp_path)
    assert config == CONFIG
    theirs = jax.jit(policy.log_prob)(loaded, texts)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert np.abs(theirs - jax.jit(policy.log_prob)(params, texts)).max() > 1e-2


@pytest.mark.parametrize("targets", [adapters.TARGETS, ("gate_up",), ("out", "qkv")])
def test_number_of_parameters(targets):
    lora = LoRA(rank=3, targets=targets)
    fresh = adapters.init(lora, CONFIG, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(fresh)) == lora.num_parameters(CONFIG)
    assert all(leaf.dtype == jnp.float32 and len(leaf) == CONFIG.num_layers for leaf in jax.tree.leaves(fresh))


def test_number_of_parameters_of_smollm2_135m():
    config = Config.tiny(
        hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64
    )
    kernels = (576 + 960) + (576 + 576) + (576 + 3072) + (1536 + 576)
    assert LoRA(rank=8).num_parameters(config) == 30 * 8 * kernels == 2_027_520


def test_a_kernel_s_draw_does_not_depend_on_the_others():
    key = jax.random.key(0)
    every, one = (adapters.init(LoRA(targets=targets), CONFIG, key) for targets in (adapters.TARGETS, ("down",)))
    _same(every["down"], one["down"])
    a = adapters.init(LoRA(rank=24), CONFIG, key)["down"]["a"]
    np.testing.assert_allclose(a.std(), CONFIG.intermediate_size**-0.5, rtol=0.1)


def test_a_step_mask_is_given_the_draws():
    policy, params = _base()
    texts = _texts()
    masked = replace(policy, step_mask=lambda x: x.completion_mask[:, 1:])
    adapted = adapters.adapt(masked, LORA)
    np.testing.assert_array_equal(adapted.step_mask(WithFrozen(texts, params)), texts.completion_mask[:, 1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"targets": ()}, "targets must name at least one"),
        ({"targets": ("qkv", "qkv")}, "targets names a value twice"),
        ({"targets": ("q_proj",)}, "targets must be one of qkv, out, gate_up, down; got 'q_proj'"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**changes)


def test_refuses_what_does_not_fit():
    policy, params = _base()
    with pytest.raises(ValueError, match="rank must be at most 24 for 'qkv'; got 25"):
        adapters.init(LoRA(rank=25), CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="the adapters are those of qkv, out, gate_up, down; targets are qkv"):
        adapters.merge(replace(LORA, targets=("qkv",)), params, _trained())
    with pytest.raises(ValueError, match="'qkv' has rank 3; rank is 4"):
        adapters.merge(replace(LORA, rank=4), params, _trained())
    other = make_model(Config.tiny()).shapes()
    with pytest.raises(ValueError, match="'qkv' is for 2 layers of 24 × 64; the kernel is"):
        adapters.merge(LORA, other, _trained())
    with pytest.raises(ValueError, match="sample the policy it adapts"):
        adapters.adapt(policy, LORA).sample(_trained(), jax.random.key(0), 2, 1.0)

import re
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jaxkd.smollm2 import model as model_module
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import Model, embed, make_model

CONFIG = Config.tiny(num_layers=2)
logits = jax.jit(Model.logits, static_argnums=0)


@cache
def _tiny(**changes):
    model = make_model(CONFIG, **changes)
    return model, random_params(model)


def _tokens(b=2, t=12, seed=1):
    return jax.random.randint(jax.random.key(seed), (b, t), 0, 264)


def test_importing_jaxkd_imports_neither_transformers_nor_torch():
    code = """
import importlib, pkgutil, sys, jaxkd
names = [module.name for module in pkgutil.walk_packages(jaxkd.__path__, "jaxkd.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 40 and not {"transformers", "torch"} & set(sys.modules), names
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameters_are_counted():
    for tied in (True, False):
        config = Config.tiny(tie_embeddings=tied)
        leaves = jax.tree.leaves(make_model(config).shapes())
        assert sum(leaf.size for leaf in leaves) == config.num_parameters


def test_fresh_weights_have_the_deviation_of_the_configuration():
    params = make_model(Config.tiny(num_layers=1, initializer_range=0.25)).init(jax.random.key(0))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and leaf.size > 900]
    assert len(kernels) == 4 and all(0.22 < leaf.std() < 0.28 for leaf in kernels)


def test_padding_on_either_side_changes_nothing():
    model, params = _tiny()
    tokens, length = _tokens(), 7
    alone = logits(model, params, tokens[:, :length])
    ones, zeros = jnp.ones((2, length), bool), jnp.zeros((2, 5), bool)
    right = logits(model, params, tokens, jnp.concatenate([ones, zeros], axis=1))[:, :length]
    left_tokens = jnp.concatenate([tokens[:, length:], tokens[:, :length]], axis=1)
    left = logits(model, params, left_tokens, jnp.concatenate([zeros, ones], axis=1))[:, 5:]
    np.testing.assert_allclose(right, alone, atol=2e-5)
    np.testing.assert_allclose(left, alone, atol=2e-5)


@pytest.mark.parametrize("token", [-1, -100, 264])
def test_a_token_outside_the_vocabulary_is_no_other(token):
    table = jnp.arange(12.0).reshape(6, 2)
    found = embed(table, jnp.array([[2, token]]))
    np.testing.assert_array_equal(found[0, 0], table[2])
    assert jnp.isnan(found[0, 1]).all()


def test_padding_may_hold_any_id():
    model, params = _tiny()
    tokens, mask = np.array([[5, 6, 0], [0, 7, 8]], np.int32), np.array([[True, True, False], [False, True, True]])
    found = [logits(model, params, jnp.asarray(np.where(mask, tokens, id)), jnp.asarray(mask)) for id in (0, -100, 999)]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0][mask], other[mask])


def test_no_position_sees_what_follows():
    model, params = _tiny()
    tokens = _tokens()
    changed = tokens.at[:, 8:].set((tokens[:, 8:] + 1) % 264)
    before, after = logits(model, params, tokens), logits(model, params, changed)
    np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-5)
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-2


@cache
def _value_and_gradient(**changes):
    _, params = _tiny()
    model, tokens = make_model(CONFIG, **changes), _tokens()
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.sin(model.logits(p, tokens)))))(params)


@pytest.mark.parametrize("changes", [{"unroll": True}, {"remat": "layers"}, {"remat": "products"}])
def test_forms_of_running_the_layers_agree(changes):
    (value, gradient), (other_value, other_gradient) = _value_and_gradient(), _value_and_gradient(**changes)
    np.testing.assert_allclose(value, other_value, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, other_gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_products_written_gradient_is_automatic_differentiations(dtype, tolerance):
    from jaxkd.smollm2 import model as module

    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 5)), jax.random.normal(jax.random.key(1), (5, 2, 4))

    def ours(x, kernel):
        return jnp.sin(module.product(x, kernel, jnp.dtype(dtype))).sum()

    def plain(x, kernel):
        return jnp.sin(jnp.einsum("bti,igo->btgo", x, kernel)).sum()

    def keeping_bits(x, kernel):
        return jnp.sin(module.product(x, kernel, jnp.dtype(dtype), keeps_bits=True)).sum()

    gradients = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, kernel) for f in (ours, plain, keeping_bits))
    ours, plain, keeping_bits = gradients
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, plain)
    jax.tree.map(np.testing.assert_array_equal, ours, keeping_bits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_embeddings_get_gradients_from_both_ends(dtype):
    model, params = _tiny()
    model = make_model(model.config, compute_dtype=dtype)
    gradient = jax.jit(jax.grad(lambda p: model.logits(p, jnp.zeros((1, 2), jnp.int32))[0, -1, 5]))(params)
    # Token 0 was read, token 5 was scored.
    assert np.abs(gradient["embedding"][0]).max() > 0 and np.abs(gradient["embedding"][5]).max() > 0
    assert "head" not in params


def test_bfloat16_computes_nearly_the_same_in_float32():
    model, params = _tiny()
    low = logits(make_model(CONFIG, compute_dtype="bfloat16"), params, _tokens())
    exact = logits(model, params, _tokens())
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - exact).max() < 0.1 * np.abs(exact).max()


def _bfloat16_gradient(program):
    """The gradient of a loss by bfloat16 parameters, or what `program` makes of its jitted function and them."""
    config = Config.tiny(num_layers=3)
    model = make_model(config, compute_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(model))
    loss = jax.jit(jax.grad(lambda params: model.logits(params, _tokens())[..., 0].sum()))
    return program(loss, params)


def test_bfloat16_layers_are_taken_and_their_gradients_stacked_by_bits(monkeypatch):
    """The same to the bit, and nowhere in the program does a stack of kernels or of their gradients become float32."""
    found = _bfloat16_gradient(lambda loss, params: loss(params))
    text = _bfloat16_gradient(lambda loss, params: loss.lower(params).compile().as_text())
    monkeypatch.setattr(model_module, "is_taken_by_bits", lambda stack: False)
    jax.tree.map(np.testing.assert_array_equal, found, _bfloat16_gradient(lambda loss, params: loss(params)))
    plain = _bfloat16_gradient(lambda loss, params: loss.lower(params).compile().as_text())
    stacks = re.compile(r"f32\[3,(24,2,40|40,24|24,2,4,8|2,2,8,24)\]")
    assert not stacks.search(text)
    assert stacks.search(plain), "XLA moves bfloat16 as it is by now: is_taken_by_bits can go"


def test_the_mlps_second_operand_is_kept_by_its_bits(monkeypatch):
    """So that the backward pass does not compute it again: in the loop over layers a stack of them is made."""
    kept = re.compile(rf"u16\[3,{_tokens().size},40\]")
    assert kept.search(_bfloat16_gradient(lambda loss, params: loss.lower(params).compile().as_text()))
    monkeypatch.setattr(model_module, "_PRODUCTS", jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    assert not kept.search(_bfloat16_gradient(lambda loss, params: loss.lower(params).compile().as_text()))


def test_parameters_may_be_bfloat16():
    model, params = _tiny()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    gradient = jax.eval_shape(jax.grad(lambda p: model.logits(p, _tokens()).mean()), low)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (jnp.zeros((3,), jnp.int32), None, r"tokens must be int\[B, T\]"),
        (jnp.zeros((1, 3), jnp.float32), None, r"tokens must be int\[B, T\]"),
        (jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 2), bool), "mask must be"),
        (jnp.zeros((1, 200), jnp.int32), None, "200 positions; the model has 128"),
        (jnp.zeros((2, 200), jnp.int32), jnp.arange(200) < jnp.array([[3], [129]]), "129 positions; the model has 128"),
    ],
)
def test_refuses(tokens, mask, message):
    model, params = _tiny()
    with pytest.raises(ValueError, match=message):
        model.hidden(params, tokens, mask)


def test_refuses_settings():
    with pytest.raises(ValueError, match="compute_dtype"):
        make_model(Config.tiny(), compute_dtype="float16")
    with pytest.raises(ValueError, match="remat"):
        make_model(Config.tiny(), remat="all")

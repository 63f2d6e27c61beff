"""Run by test_sharding.py: forward, log_prob, generation and a training step, on one device and on eight.

Usage: on_eight_devices.py CASE…, of tensor, both and data
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd.smollm2 import generate, policy, sharding
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

EIGHT_HEADS = Config.tiny(hidden_size=32, num_heads=8, num_kv_heads=8, num_layers=2, eos_ids=())
# The heads of SmolLM2-135M.
NINE_HEADS = Config.tiny(hidden_size=72, num_heads=9, num_kv_heads=3, num_layers=2, eos_ids=())
CASES = {"tensor": (EIGHT_HEADS, 1, 8), "both": (EIGHT_HEADS, 2, 4), "data": (NINE_HEADS, 8, 1)}


def results(model, optimizer, params, state, tokens, mask, keys):
    """Everything that is compared."""

    def loss(params):
        return -policy.token_log_probs(model, params, tokens, mask).mean()

    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    drawn = generate.generate(
        model, params, np.asarray(tokens), np.asarray(mask), keys, max_new_tokens=6, sampling=generate.Sampling()
    )
    return {
        "logits": jax.jit(model.logits)(params, tokens, mask),
        "log_probs": jax.jit(policy.token_log_probs, static_argnums=0)(model, params, tokens, mask),
        "step": jax.jit(step)(params, state),
        "drawn": drawn,
    }


def main(case):
    """Compare."""
    config, data, model_axis = CASES[case]
    model, optimizer = make_model(config), optax.sgd(0.1, momentum=0.9)
    params = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (8, 10), 0, config.vocab_size)
    mask = jnp.arange(10)[None, :] >= (jnp.arange(8) % 4)[:, None]
    keys = jax.random.split(jax.random.key(2), 8)
    expected = results(model, optimizer, params, optimizer.init(params), tokens, mask, keys)

    mesh = sharding.make_mesh(data, model_axis)
    placed = jax.device_put(params, sharding.param_shardings(config, mesh))
    state = optimizer.init(params)
    state = jax.device_put(state, sharding.state_shardings(mesh, placed, state))
    batch = sharding.shard_batch(mesh, (tokens, mask, keys))
    found = results(make_model(config, mesh=mesh), optimizer, placed, state, *batch)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    cut = placed["layers"]["mlp"]["gate_up"]
    assert cut.addressable_shards[0].data.size * 8 == cut.size, "the parameters are not cut in eight"
    momentum = jax.tree.leaves(state)
    assert any(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in momentum), "nor is the optimizer"
    print(f"{case}: equal", flush=True)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(case)

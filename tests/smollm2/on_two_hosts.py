"""Run by test_sharding.py: a checkpoint loaded over the devices of every process, a training step, the loss after it.

The checkpoint is saved again to FOLDER-again.

Usage: on_two_hosts.py FOLDER [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd.smollm2 import policy, sharding, tokenization, weights
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import Layout, Setting
from jaxkd.sweep import hosts


def main(folder, *cluster):
    """Print the losses before and after a step."""
    jax.config.update("jax_num_cpu_devices", 2)
    if cluster:
        coordinator, num_processes, process_id = cluster
        hosts.initialize(coordinator, int(num_processes), int(process_id))
    mesh = sharding.make_mesh()
    config, params = weights.load(folder, mesh=mesh)
    cut = params["layers"]["mlp"]["gate_up"]
    assert cut.addressable_shards[0].data.size * jax.device_count() == cut.size, "the parameters are not cut"
    weights.save_pretrained(f"{folder}-again", config, params, tokenization.byte_tokenizer())
    try:
        weights.save_pretrained(f"{folder}/config.json/below", config, params)
    except OSError as error:
        print(f"refused: {error}")
    for spread in (sharding.mesh_of_all_devices, lambda: Setting(None, None, 8, layout=Layout(mesh=mesh))):
        try:
            spread()
            print("spread")
        except ValueError as error:
            print(f"not spread: {error}")
    model, optimizer = make_model(config, mesh=mesh), optax.sgd(0.5, momentum=0.9)
    tokens = jax.random.randint(jax.random.key(1), (8, 10), 0, config.vocab_size)
    mask = jnp.arange(10)[None, :] >= (jnp.arange(8) % 4)[:, None]
    batch = sharding.shard_batch(mesh, (tokens, mask))

    def loss(params, tokens, mask):
        return -policy.token_log_probs(model, params, tokens, mask).mean()

    def two_losses(params, batch):
        before, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return before, loss(optax.apply_updates(params, updates), *batch)

    everywhere = NamedSharding(mesh, PartitionSpec())
    before, after = jax.jit(two_losses, out_shardings=(everywhere, everywhere))(params, batch)
    print(f"devices {jax.device_count()} losses {float(before):.7f} {float(after):.7f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What an order would take on the devices that are there: shapes, shards, memory and time, without weights.

Every step is traced with shapes alone, laid out over the mesh and compiled; memory is the compiler's own account of
one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd import align, distill
from jaxkd.align import Coefficients, Inputs, State
from jaxkd.smollm2 import cost, sharding, weights
from jaxkd.smollm2 import order as orders
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import ScoredTexts
from jaxkd.smollm2.order import Order
from jaxkd.smollm2.policy import Texts, make_policy, token_log_probs

_REMAT = "layers"

# The published shapes, for machines that can't ask the hub; a run takes them from the checkpoint's own configuration.
_SHAPES = {
    "135M": Config(49152, 576, 1536, 30, 9, 3, 64, 8192, 100000.0, eos_ids=(0,)),
    "360M": Config(49152, 960, 2560, 32, 15, 5, 64, 8192, 100000.0, eos_ids=(0,)),
    "1.7B": Config(49152, 2048, 8192, 24, 32, 32, 64, 8192, 130000.0, eos_ids=(0,)),
}


def mesh_of_all_devices() -> Mesh | None:
    """A mesh with every device on `data`; None where there is one."""
    return sharding.make_mesh() if jax.device_count() > 1 else None


def config_of(source: str) -> tuple[Config, str]:
    """A source's shape, and where it came from."""
    try:
        return weights.load_config(source), "its configuration"
    except (ValueError, OSError):
        for name, config in _SHAPES.items():
            if source.endswith((f"SmolLM2-{name}", f"SmolLM2-{name}-Instruct")):
                return config, "the published shape, for the hub can't be reached"
        raise


def report(order: Order, dtype: str, device_flops: float, utilisation: float) -> str:
    """Shapes, shards, memory a device and time of every kind of step of an order."""
    mesh = mesh_of_all_devices() or sharding.make_mesh(1)
    roles = {"truth": order.truth}
    roles["base"] = order.truth if order.base == "truth" else order.base.removeprefix("fit:")
    for student in order.students:
        roles[f"student {student}"] = roles["base"] if student.startswith(("same", "layers:")) else student
    lines = [f"{len(jax.devices())} devices ({jax.devices()[0].platform}), data-parallel with sharded parameters"]
    configs = {}
    for role, source in roles.items():
        configs[role], told = config_of(source)
        lines += ["", f"{role}: {source}, {configs[role].num_parameters / 1e6:.1f} M parameters ({told})"]
        lines += _shards(configs[role], mesh)
    lines.append("")
    seconds = {}
    for name, steps, compiled, flops, by_xla in _steps(order, configs, mesh, dtype):
        memory = compiled.memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        used -= memory.alias_size_in_bytes
        each = flops / (device_flops * utilisation * mesh.size)
        seconds[name] = each * steps
        lines.append(
            f"{name:<22} {used / 2**30:6.2f} GiB a device  {flops / 1e12:9.2f} TFLOP a step  "
            f"({by_xla / 1e12:.2f} by XLA)  {each:8.3f} s a step  × {steps} = {each * steps / 3600:.2f} h"
        )
    total = sum(seconds.values())
    lines += ["", f"all models together: {total / 3600:.1f} h on {mesh.size} devices of {device_flops:.3g} FLOP/s"]
    lines.append(f"at {utilisation:.0%} of it (--device-flops, --utilisation); sampling is counted by its FLOPs alone")
    lines.append(
        "FLOPs are the model's, by formula; XLA counts the program's: what is computed again, elementwise work"
    )
    lines.append("and masked scores as well, but in an alignment not the sampling")
    return "\n".join(lines)


def _shards(config: Config, mesh: Mesh) -> list[str]:
    shapes = jax.tree_util.tree_leaves_with_path(make_model(config).shapes())
    laid_out = jax.tree.leaves(sharding.param_shardings(config, mesh))
    lines = []
    for (path, leaf), where in zip(shapes, laid_out, strict=True):
        name = ".".join(key.key for key in path)
        lines.append(f"  {name:<28} {list(leaf.shape)!s:<26} → {list(where.shard_shape(leaf.shape))} a device")
    return lines


def _steps(order: Order, configs: dict[str, Config], mesh: Mesh, dtype: str):
    """Each kind of step: name, how often, compiled program, model FLOPs, and those of the program by XLA."""
    length = 1 + order.max_new_tokens
    rows = orders.rows_of(order, orders.Path("."))
    students = {row.student for row in rows if row.student}
    student = configs[f"student {order.students[0]}"]
    evaluated = len(rows) * order.evaluation.num_samples + max(len(students), 1) * order.distillation.num_samples
    batch = order.batch_size
    yield _scoring("truth: score a batch", -(-evaluated // batch), configs["truth"], mesh, dtype, batch, length)
    settings = order.alignment.settings
    of_base = sum(row.name == "aligned_base" for row in rows)
    of_students = sum(isinstance(row.stage, orders.Align) for row in rows) - of_base
    for name, config, count in (
        ("align the base", configs["base"], of_base),
        ("align a student", student, of_students),
    ):
        yield _aligning(name, count * settings.num_steps, config, mesh, dtype, order, length)
    distillations = sum(type(row.stage) is orders.Distil for row in rows)
    steps = distillations * order.distillation.num_updates
    yield _distilling("distil a student", steps, student, mesh, dtype, order, length)


def _abstract(config: Config, mesh: Mesh) -> Any:
    """Parameters as shapes with their layout."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        make_model(config).shapes(),
        sharding.param_shardings(config, mesh),
    )


def _state(config: Config, mesh: Mesh, optimizer) -> State:
    params = _abstract(config, mesh)
    state = jax.eval_shape(optimizer.init, params)
    where = sharding.state_shardings(config, mesh, state)
    return State(
        params, jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, where)
    )


def _batch(mesh: Mesh, kind: Callable, n: int, length: int):
    where = NamedSharding(mesh, PartitionSpec(sharding.DATA))

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    texts = of(jnp.int32, n, length), of(jnp.bool_, n, length), of(jnp.bool_, n, length)
    return kind(*texts) if kind is Texts else kind(*texts, of(jnp.float32, n), of(jnp.bool_, n))


def _policy(config: Config, dtype: str, order: Order):
    model = make_model(config, compute_dtype=dtype, remat=_REMAT)
    return make_policy(model, [[0]], [[True]], max_new_tokens=order.max_new_tokens)


def _scoring(name, steps, config, mesh, dtype, batch, length):
    model = make_model(config, compute_dtype=dtype)
    program = jax.jit(lambda params, x: token_log_probs(model, params, x.tokens, x.mask))
    compiled = program.lower(_abstract(config, mesh), _batch(mesh, Texts, batch, length)).compile()
    by_xla = cost.log_prob_flops(config, batch, length, differentiate=False, dtype=dtype)
    return name, steps, compiled, cost.forward_flops(config, batch * length, length / 2), by_xla


def _aligning(name, steps, config, mesh, dtype, order: Order, length):
    settings, optimisation = order.alignment.settings, order.alignment.optimisation
    optimizer = optimisation.make(settings.num_updates)
    step = align.make_step(_policy(config, dtype, order), optimizer, settings, lambda x: x.reward, lambda x: x.hit)
    draws = _batch(mesh, ScoredTexts, settings.batch_size, length)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    inputs = Inputs(
        jax.random.key(0), _abstract(config, mesh), Coefficients(*([scalar] * len(Coefficients._fields))), draws
    )
    compiled = jax.jit(step, donate_argnums=0).lower(_state(config, mesh, optimizer), inputs).compile()
    forward = cost.forward_flops(config, settings.batch_size * length, length / 2)
    by_xla = cost.log_prob_flops(config, settings.batch_size, length, differentiate=False, dtype=dtype)
    by_xla += cost.log_prob_flops(config, settings.batch_size, length, differentiate=True, dtype=dtype, remat=_REMAT)
    # Sampling, the reference, and a pass forward and back.
    return name, steps, compiled, 5 * forward, by_xla


def _distilling(name, steps, config, mesh, dtype, order: Order, length):
    settings = order.distillation
    optimizer = settings.optimisation.make(settings.num_updates)
    step = distill.maximum_likelihood_step(_policy(config, dtype, order), optimizer)
    inputs = (_batch(mesh, Texts, settings.batch_size, length), jax.ShapeDtypeStruct((), jnp.float32))
    compiled = jax.jit(step, donate_argnums=0).lower(_state(config, mesh, optimizer), inputs).compile()
    by_xla = cost.log_prob_flops(config, settings.batch_size, length, differentiate=True, dtype=dtype, remat=_REMAT)
    return name, steps, compiled, cost.training_flops(config, settings.batch_size * length, length / 2), by_xla

"""What an order would take on the devices that are there: shapes, shards, memory and time, without weights.

Every step is traced with shapes alone, laid out over the mesh and compiled; memory is the compiler's own account of
one device.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd import align, distill
from jaxkd.align import AlignmentSettings, Coefficients, Inputs, State
from jaxkd.pipelines import Align, Distil
from jaxkd.smollm2 import behaviours, cost, sharding, weights
from jaxkd.smollm2 import order as orders
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.distillation import make_comparison
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import Layout, ScoredTexts
from jaxkd.smollm2.order import CEILING, Order, Row
from jaxkd.smollm2.policy import Texts, make_policy, token_log_probs
from jaxkd.smollm2.students import Start

_OUT = Path()  # nothing is written
_SAMPLING = tuple(name for name, algorithm in align.ALGORITHMS.items() if not algorithm.data and name != "ppo")

# The published shapes, for machines that can't ask the hub; a run takes them from the checkpoint's own configuration.
_SHAPES = {
    "135M": Config(49152, 576, 1536, 30, 9, 3, 64, 8192, 100000.0, eos_ids=(0,)),
    "360M": Config(49152, 960, 2560, 32, 15, 5, 64, 8192, 100000.0, eos_ids=(0,)),
    "1.7B": Config(49152, 2048, 8192, 24, 32, 32, 64, 8192, 130000.0, eos_ids=(0,)),
}


def config_of(source: str) -> tuple[Config, str]:
    """A source's shape, and where it came from."""
    try:
        return weights.load_config(source), "its configuration"
    except (ValueError, OSError):
        for name, config in _SHAPES.items():
            if source.endswith((f"SmolLM2-{name}", f"SmolLM2-{name}-Instruct")):
                return config, "the published shape, for the hub can't be reached"
        raise


def report(order: Order, layout: Layout, device_flops: float, utilisation: float) -> str:
    """Shapes, shards, memory a device and time of every kind of step of an order."""
    layout = layout if layout.mesh is not None else replace(layout, mesh=sharding.make_mesh(1))
    mesh = layout.mesh
    roles = {"truth": order.truth}
    roles["base"] = order.truth if order.base == "truth" else order.base.removeprefix("fit:")
    starts = {f"student {student}": Start.parse(student) for student in order.students}
    roles |= {role: start.source or roles["base"] for role, start in starts.items()}
    own_target = order.target is not None and not order.target.startswith("distil:")
    if own_target:
        roles["target"] = order.target
    lines = [f"{mesh.size} devices ({jax.devices()[0].platform}), {_parallel(mesh)}"]
    configs = {}
    for role, source in roles.items():
        configs[role], told = config_of(source)
        if role in starts and starts[role].layers is not None:
            configs[role] = replace(configs[role], num_layers=starts[role].layers)
        lines += ["", f"{role}: {source}, {configs[role].num_parameters / 1e6:.1f} M parameters ({told})"]
        lines += _shards(configs[role], mesh)
    if not own_target:
        configs["target"] = configs["base"]
    lines += ["", _behaviour(order), ""]
    seconds = {}
    for name, steps, compiled, flops, by_xla in _steps(order, configs, layout):
        memory = compiled.memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        used -= memory.alias_size_in_bytes
        each = flops / (device_flops * utilisation * mesh.size)
        seconds[name] = each * steps
        lines.append(
            f"{name:<70} {used / 2**30:6.2f} GiB a device  {flops / 1e12:9.2f} TFLOP a step  "
            f"({by_xla / 1e12:.2f} by XLA)  {each:8.3f} s a step  × {steps} = {each * steps / 3600:.2f} h"
        )
    for name, flops in _without_compiling(order, configs).items():
        seconds[name] = flops / (device_flops * utilisation * mesh.size)
        lines.append(f"{name:<70} {flops / 1e15:10.3f} PFLOP in all = {seconds[name] / 3600:.2f} h")
    total = sum(seconds.values())
    lines += ["", f"all models together: {total / 3600:.1f} h on {mesh.size} devices of {device_flops:.3g} FLOP/s"]
    lines.append(f"at {utilisation:.0%} of it (--device-flops, --utilisation); sampling is counted by its FLOPs alone")
    lines.append(
        "FLOPs are the model's, by formula; XLA counts the program's: what is computed again, elementwise work"
    )
    lines.append("and masked scores as well, but in an alignment not the sampling")
    return "\n".join(lines)


def _parallel(mesh: Mesh) -> str:
    told = "data-parallel with sharded parameters"
    return told if mesh.shape[sharding.MODEL] == 1 else f"{told}, {mesh.shape[sharding.MODEL]} sharing a model's heads"


def _behaviour(order: Order) -> str:
    """What models are measured by."""
    if order.behaviour != "auto":
        return f"behaviour: {order.behaviour}"
    low, high = (f"{100 * share:g} %" for share in behaviours.RARE)
    told = f"behaviour: chosen once the base is there, the most frequent of {len(behaviours.READY)} candidates that "
    told += f"{low} to {high} of its completions show"
    if order.outcome == "behaviour_frequency":
        return f"{told}; where there is none the run stops, and goes on with one that is named (--behaviour)"
    return f"{told}, or the one nearest to that (it is no reward here)"


def _shards(config: Config, mesh: Mesh) -> list[str]:
    shapes = jax.tree_util.tree_leaves_with_path(make_model(config).shapes())
    laid_out = jax.tree.leaves(sharding.param_shardings(config, mesh))
    lines = []
    for (path, leaf), where in zip(shapes, laid_out, strict=True):
        name = ".".join(key.key for key in path)
        lines.append(f"  {name:<28} {list(leaf.shape)!s:<26} → {list(where.shard_shape(leaf.shape))} a device")
    return lines


def _steps(order: Order, configs: dict[str, Config], layout: Layout):
    """Each kind of step: name, how often, compiled program, model FLOPs, and those of the program by XLA."""
    length, batch = 1 + order.max_new_tokens, order.batch_size
    rows = orders.rows_of(order, _OUT)
    scored = -(-len(rows) * order.evaluation.num_scored // batch)
    yield _scoring("truth: score a batch", scored, configs["truth"], layout, batch, length)
    # An offline algorithm's step is the same without its sampling.
    algorithm = next((name for name in order.algorithms if name in _SAMPLING), _SAMPLING[0])
    settings = replace(order.alignment.settings, algorithm=algorithm)
    made = {row.folder: row for row in rows}
    aligned = (row for row in rows if isinstance(row.stage, Align))
    pairs = ((_role(row), _role(made[row.reference]) if row.reference in made else "base") for row in aligned)
    for (role, held_to), times in Counter(pairs).items():
        name = f"align {role}" if held_to == role else f"align {role}, held to {held_to}"
        both = configs[role], configs[held_to]
        yield _aligning(name, times * settings.num_steps, both, layout, order, settings, length)
    distilled = [row for row in rows if type(row.stage) is Distil]
    for (role, teacher, method), times in Counter(_distillation(row, made, order) for row in distilled).items():
        steps = times * order.distillation.num_updates
        both = configs[role], configs[teacher]
        told = f"distil {role}" if method == "sequence" else f"distil {role} from {teacher} ({method})"
        yield _distilling(told, steps, both, layout, order, method, length)


def _distillation(row: Row, made: dict[Path, Row], order: Order) -> tuple[str, str, str]:
    """Roles of student and teacher, and the method; a step on samples alone has no teacher to compute."""
    if row.name == CEILING or order.distillation.method == "sequence":
        return _role(row), "truth", "sequence"
    teacher = made.get(row.models[0])
    return _role(row), "base" if teacher is None else _role(teacher), order.distillation.method


def _role(row: Row) -> str:
    """Whose shape a row's model has."""
    return f"student {row.student}" if row.student else "base"


def _without_compiling(order: Order, configs: dict[str, Config]) -> dict[str, float]:
    """Model FLOPs of what `_steps` leaves out: sampling, scoring, and the steps that make base and target."""
    rows = {row.folder: row for row in orders.rows_of(order, _OUT)}
    evaluation, distillation = order.evaluation, order.distillation
    to_distil = distillation.num_samples + distillation.num_held_out
    total: Counter = Counter()

    def add(what: str, role: str, texts: float, of: Callable = cost.forward_flops) -> None:
        length = 1 + order.max_new_tokens
        total[what] += of(configs[role], texts * length, length / 2)

    def add_distillation(teacher: str, student: str) -> None:
        add("sample to distil from", teacher, to_distil)
        texts = distillation.num_updates * distillation.batch_size
        add("distil base and target", student, texts, cost.training_flops)
        if distillation.method != "sequence":
            add("distil base and target", teacher, texts)

    add("sample the truth", "truth", max(evaluation.num_samples, evaluation.num_truth_samples))
    if order.base.startswith("fit:"):
        add_distillation("truth", "base")
    if (order.target or "").startswith("distil:"):
        add_distillation("base", "base")
    for row in rows.values():
        if type(row.stage) is Distil and row.name != CEILING:
            teacher = rows.get(row.models[0])
            add("sample to distil from", "base" if teacher is None else _role(teacher), to_distil)
        add("sample to measure by", _role(row), evaluation.num_samples)
        add("score to measure by", _role(row), evaluation.num_scored + evaluation.num_truth_samples)
        if order.base != "truth":
            add("score to measure by", "base", evaluation.num_scored)
        if order.target is not None:
            add("score to measure by", "target", 2 * evaluation.num_scored)
        if isinstance(row.stage, Align) and order.reward != "behaviour":
            settings = replace(order.alignment.settings, algorithm=row.algorithm)
            add("reward by the target", "target", settings.num_steps * settings.batch_size)
    return total


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


def _policy(config: Config, layout: Layout, order: Order):
    return make_policy(layout.model(config), [[0]], [[True]], max_new_tokens=order.max_new_tokens)


def _flops_by_xla(config: Config, layout: Layout, batch: int, length: int, *, differentiate: bool) -> float:
    return cost.log_prob_flops(
        config, batch, length, differentiate=differentiate, dtype=layout.compute_dtype, remat=layout.remat
    )


def _scoring(name, steps, config, layout: Layout, batch, length):
    model, mesh = layout.model(config), layout.mesh
    program = jax.jit(lambda params, x: token_log_probs(model, params, x.tokens, x.mask))
    compiled = program.lower(_abstract(config, mesh), _batch(mesh, Texts, batch, length)).compile()
    by_xla = _flops_by_xla(config, layout, batch, length, differentiate=False)
    return name, steps, compiled, cost.forward_flops(config, batch * length, length / 2), by_xla


def _aligning(name, steps, configs, layout: Layout, order: Order, settings: AlignmentSettings, length):
    (config, reference), mesh = configs, layout.mesh
    optimisation = order.alignment.optimisation
    optimizer = optimisation.make(settings.num_updates)
    policies = [_policy(one, layout, order) for one in configs]
    step = align.make_step(policies[0], optimizer, settings, lambda x: x.reward, lambda x: x.hit, policies[1])
    draws = _batch(mesh, ScoredTexts, settings.batch_size, length)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    inputs = Inputs(
        jax.random.key(0), _abstract(reference, mesh), Coefficients(*([scalar] * len(Coefficients._fields))), draws
    )
    compiled = jax.jit(step, donate_argnums=0).lower(_state(config, mesh, optimizer), inputs).compile()
    forward, scored = (cost.forward_flops(one, settings.batch_size * length, length / 2) for one in configs)
    by_xla = _flops_by_xla(reference, layout, settings.batch_size, length, differentiate=False)
    trained = _flops_by_xla(config, layout, settings.batch_size, length, differentiate=True)
    by_xla += settings.updates_per_step * trained
    # Sampling, the reference, and a pass forward and back for each update.
    model_flops = scored + (1 + 3 * settings.updates_per_step) * forward
    return f"{name} ({settings.algorithm})", steps, compiled, model_flops, by_xla


def _distilling(name, steps, configs, layout: Layout, order: Order, method: str, length):
    (config, teacher), mesh = configs, layout.mesh
    settings = order.distillation
    optimizer = settings.optimisation.make(settings.num_updates)
    batch, scalar = _batch(mesh, Texts, settings.batch_size, length), jax.ShapeDtypeStruct((), jnp.float32)
    tokens = settings.batch_size * length
    model_flops = cost.training_flops(config, tokens, length / 2)
    by_xla = _flops_by_xla(config, layout, settings.batch_size, length, differentiate=True)
    if method == "sequence":
        step = distill.maximum_likelihood_step(_policy(config, layout, order), optimizer)
        inputs = (batch, scalar)
    else:
        models = (layout.model(one) for one in configs)
        step = distill.token_level_step(make_comparison(*models, method), optimizer)
        inputs = distill.TokenInputs(batch, _abstract(teacher, mesh), scalar, scalar)
        model_flops += cost.forward_flops(teacher, tokens, length / 2)
        by_xla += _flops_by_xla(teacher, layout, settings.batch_size, length, differentiate=False)
    compiled = jax.jit(step, donate_argnums=0).lower(_state(config, mesh, optimizer), inputs).compile()
    return name, steps, compiled, model_flops, by_xla

"""What an order would take on the devices that are there: shapes, shards, memory and time, without weights.

Every step is traced with shapes alone, laid out over the mesh and compiled; memory is the compiler's own account of
one device.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd import align, distill
from jaxkd.align import AlignmentSettings, Coefficients, Inputs, State
from jaxkd.smollm2 import behaviours, cost, generate, passes, sharding, weights
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.distillation import make_comparison
from jaxkd.smollm2.laboratory import MODELS_HELD
from jaxkd.smollm2.model import Model, make_model
from jaxkd.smollm2.network import Layout, ScoredTexts
from jaxkd.smollm2.order import CEILING, Order
from jaxkd.smollm2.policy import Texts, add_value_head, make_policy, token_log_probs, with_value_head
from jaxkd.smollm2.rows import Row, role_of, rows_of
from jaxkd.smollm2.students import Start

_OUT = Path()  # nothing is written

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
    lines = [f"{mesh.size} devices ({jax.devices()[0].platform}), {_parallel(mesh)}"]
    configs = {}
    for role, (config, source, told) in shapes_of(order).items():
        configs[role] = config
        lines += ["", f"{role}: {source}, {config.num_parameters / 1e6:.1f} M parameters ({told})"]
        lines += _shards(config, mesh)
    configs.setdefault("target", configs["base"])
    lines += ["", _behaviour(order), ""]
    seconds, largest = {}, 0.0
    for name, compiled, cache in _samplings(order, configs, layout):
        used = _memory(compiled)
        largest = max(largest, used)
        lines.append(
            f"{name:<70} {used / 2**30:6.2f} GiB a device; keys and values: {cache / 2**30:.2f} GiB on all devices"
        )
    for name, steps, compiled, flops, by_xla in _steps(order, configs, layout):
        used = _memory(compiled)
        largest = max(largest, used)
        each = flops / (device_flops * utilisation * mesh.size)
        seconds[name] = each * steps
        lines.append(
            f"{name:<70} {used / 2**30:6.2f} GiB a device  {flops / 1e12:9.2f} TFLOP a step  "
            f"({by_xla / 1e12:.2f} by XLA)  {each:8.3f} s a step  × {steps} = {each * steps / 3600:.2f} h"
        )
    for name, flops in _without_compiling(order, configs).items():
        seconds[name] = flops / (device_flops * utilisation * mesh.size)
        lines.append(f"{name:<70} {flops / 1e15:10.3f} PFLOP in all = {seconds[name] / 3600:.2f} h")
    resident, told = _resident(order, configs, mesh)
    lines += ["", f"models that stay beside all that: {told}: {resident / 2**30:.2f} GiB a device"]
    lines.append(
        f"with the largest program at most {(resident + largest) / 2**30:.2f} GiB a device (models that a program is "
        "given are counted twice)"
    )
    total = sum(seconds.values())
    lines += ["", f"all models together: {total / 3600:.1f} h on {mesh.size} devices of {device_flops:.3g} FLOP/s"]
    lines.append(f"at {utilisation:.0%} of it (--device-flops, --utilisation); sampling is counted by its FLOPs alone")
    lines.append(
        "FLOPs are the model's, by formula; XLA counts the program's: what is computed again, elementwise work"
    )
    lines.append("and masked scores as well, but in an alignment not the sampling")
    return "\n".join(lines)


def shapes_of(order: Order) -> dict[str, tuple[Config, str, str]]:
    """Shape, source and where the shape came from, by role: truth, base, every student, a target of its own."""
    sources = {"truth": order.truth}
    sources["base"] = order.truth if order.base == "truth" else order.base.removeprefix("fit:")
    starts = {f"student {student}": Start.parse(student) for student in order.students}
    sources |= {role: start.source or sources["base"] for role, start in starts.items()}
    if order.target is not None and not order.target.startswith("distil:"):
        sources["target"] = order.target
    found = {}
    for role, source in sources.items():
        config, told = config_of(source)
        if role in starts and (kept := starts[role].layers) is not None:
            starts[role].check(role.removeprefix("student "), config.num_layers)
            config = replace(config, num_layers=kept if isinstance(kept, int) else len(kept))
        found[role] = config, source, told
    return found


def _compiled(program):
    """A traced program, compiled to be looked at and never run: its buffers do not depend on how good its code is."""
    if jax.default_backend() != "cpu":
        return program.compile()
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return program.compile(compiler_options=quick)


def _memory(compiled) -> float:
    """Bytes of one device that a program takes, what it is given and returns among them."""
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return used - memory.alias_size_in_bytes


def _resident(order: Order, configs: dict[str, Config], mesh: Mesh) -> tuple[float, str]:
    """Bytes of one device, of the parameters that stay in memory whatever is computed, and whose they are."""
    kept = ["truth"] + ["base"] * (order.base != "truth") + ["target"] * (order.target is not None)
    sizes = {role: _bytes(_abstract(config, mesh)) for role, config in configs.items()}
    # What was made or read last.
    last = max({role_of(row) for row in rows_of(order, _OUT)}, key=sizes.__getitem__)
    told = f"{', '.join(kept)} and the last {MODELS_HELD} others, each a {last} at most"
    return sum(sizes[role] for role in kept) + MODELS_HELD * sizes[last], told


def _bytes(shapes) -> float:
    """Bytes of one device, of arrays that are given as shapes with their layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )


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


def _updates_of_ceiling(order: Order) -> int:
    """Of a distillation's batches, as many as hold what the ceiling learns from: the texts of an alignment."""
    matched = order.alignment.settings
    return -(-matched.num_updates * matched.batch_size // order.distillation.batch_size)


def _steps(order: Order, configs: dict[str, Config], layout: Layout):
    """Each kind of step: name, how often, compiled program, model FLOPs, and those of the program by XLA."""
    length, batch = 1 + order.max_new_tokens, order.score_batch_size or order.batch_size
    rows = rows_of(order, _OUT)
    scored = -(-len(rows) * order.evaluation.num_scored // batch)
    yield _scoring("truth: score a batch", scored, configs["truth"], layout, batch, length)
    made = {row.folder: row for row in rows}
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.is_alignment:
            kinds.setdefault(_kind_of_alignment(row, made, order), []).append(row)
    for (role, held_to, *_), alike in kinds.items():
        names = dict.fromkeys(row.algorithm for row in alike)
        settings = replace(order.alignment.settings, algorithm=alike[0].algorithm)
        told = f"align {role}" if held_to == role else f"align {role}, held to {held_to}"
        told += f" ({', '.join(names)}{_of_pairs(order)})"
        both = configs[role], configs[held_to]
        yield _aligning(told, len(alike) * settings.num_steps, both, layout, order, settings, length)
    updates, most = Counter(), order.distillation.num_updates
    for row in (row for row in rows if row.is_distillation):
        updates[_distillation(row, made, order)] += _updates_of_ceiling(order) if row.name == CEILING else most
    for (role, teacher, method), steps in updates.items():
        both = configs[role], configs[teacher]
        told = f"distil {role}" if method == "sequence" else f"distil {role} from {teacher} ({method})"
        yield _distilling(told, steps, both, layout, order, method, length)


def _distillation(row: Row, made: dict[Path, Row], order: Order) -> tuple[str, str, str]:
    """Roles of student and teacher, and the method; a step on samples alone has no teacher to compute."""
    if row.name == CEILING or order.distillation.method == "sequence":
        return role_of(row), "truth", "sequence"
    teacher = made.get(row.models[0])
    return role_of(row), "base" if teacher is None else role_of(teacher), order.distillation.method


def _kind_of_alignment(row: Row, made: dict[Path, Row], order: Order) -> tuple:
    """What an alignment's step depends on in size: roles of policy and reference, what is drawn, and the updates."""
    algorithm = align.ALGORITHMS[row.algorithm]
    held_to = role_of(made[row.reference]) if row.reference in made else "base"
    updates = replace(order.alignment.settings, algorithm=row.algorithm).updates_per_step
    # PPO has a critic besides.
    return role_of(row), held_to, algorithm.on_policy, algorithm.data is not None, updates, row.algorithm == "ppo"


def _of_pairs(order: Order) -> str:
    """What is assumed of a user's pairs, which are not read."""
    return "" if order.preferences is None else f", on pairs of {_length_of_data(order)} tokens"


def _length_of_data(order: Order) -> int:
    """Tokens of a text of an offline algorithm's fixed set: a user's pairs are taken to be as long as they may be."""
    if order.preferences is None:
        return 1 + order.max_new_tokens
    return min(order.preferences.max_length, *(config.max_positions for config, _, _ in shapes_of(order).values()))


def _without_compiling(order: Order, configs: dict[str, Config]) -> dict[str, float]:
    """Model FLOPs of what `_steps` leaves out: sampling, scoring, and the steps that make base and target."""
    rows = {row.folder: row for row in rows_of(order, _OUT)}
    evaluation, distillation = order.evaluation, order.distillation
    to_distil = distillation.num_samples + distillation.num_held_out
    total: Counter = Counter()

    def add(what: str, role: str, texts: float, of: Callable = cost.forward_flops) -> None:
        if texts == 0:
            return
        length = 1 + order.max_new_tokens
        total[what] += of(configs[role], texts * length, length / 2)

    def add_looks(student: str) -> None:
        looks = 1 + -(-distillation.num_updates // distillation.check_every)
        add("score held-out samples", student, looks * distillation.num_held_out)

    def add_distillation(teacher: str, student: str) -> None:
        add("sample to distil from", teacher, to_distil)
        add_looks(student)
        texts = distillation.num_updates * distillation.batch_size
        add("distil base and target", student, texts, cost.training_flops)

    add("sample the truth", "truth", max(evaluation.num_samples, evaluation.num_truth_samples))
    if order.target is not None:
        add("sample to measure by", "target", evaluation.num_samples)
    pairs = order.alignment.settings.dataset_batches * order.alignment.settings.batch_size
    if order.base.startswith("fit:"):
        add_distillation("truth", "base")
    if (order.target or "").startswith("distil:"):
        add_distillation("base", "base")
    for row in rows.values():
        if row.is_distillation and row.name != CEILING:
            teacher = rows.get(row.models[0])
            add("sample to distil from", "base" if teacher is None else role_of(teacher), to_distil)
            add_looks(role_of(row))
            own = distillation.on_policy_fraction * distillation.num_updates * distillation.batch_size
            add("sample on policy to distil", role_of(row), own)
        add("sample to measure by", role_of(row), evaluation.num_samples)
        add("score to measure by", role_of(row), evaluation.num_scored + evaluation.num_truth_samples)
        if order.base != "truth":
            add("score to measure by", "base", evaluation.num_scored)
        if order.target is not None:
            add("score to measure by", "target", 2 * evaluation.num_scored)
            add("score to measure by", role_of(row), evaluation.num_scored)
        data = align.ALGORITHMS[row.algorithm].data if row.is_alignment else None
        if data is not None and order.preferences is None:
            # Each model is charged for them, though they are drawn once a seed.
            reference = rows.get(row.models[-1])
            held_to = "base" if reference is None else role_of(reference)
            add("sample and score pairs", "truth" if data == "truth" else held_to, pairs)
            add("sample and score pairs", held_to, pairs)
        if row.is_alignment and order.reward != "behaviour":
            settings = replace(order.alignment.settings, algorithm=row.algorithm)
            drawn = settings.num_steps * settings.batch_size * align.ALGORITHMS[row.algorithm].on_policy
            fixed = pairs * (data is not None and order.preferences is None)
            add("reward by the target", "target", drawn + fixed)
    return total


def _abstract(config: Config, mesh: Mesh) -> Any:
    """Parameters as shapes with their layout."""
    return jax.tree.map(_placed, make_model(config).shapes(), sharding.param_shardings(config, mesh))


def _state(params, mesh: Mesh, optimizer) -> State:
    """The state of a training as shapes with their layout."""
    state = jax.eval_shape(optimizer.init, params)
    return State(params, jax.tree.map(_placed, state, sharding.state_shardings(mesh, params, state)))


def _placed(leaf, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _batch(mesh: Mesh, kind: Callable, n: int, length: int):
    where = NamedSharding(mesh, PartitionSpec(sharding.DATA))

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    texts = of(jnp.int32, n, length), of(jnp.bool_, n, length), of(jnp.bool_, n, length)
    return kind(*texts) if kind is Texts else kind(*texts, of(jnp.float32, n), of(jnp.bool_, n))


def _samplings(order: Order, configs: dict[str, Config], layout: Layout):
    """Shapes of the truth and of students: name, compiled program, and bytes of keys and values on all devices.

    The base samples too, in no more than the truth takes.
    """
    shards = layout.shards
    n = -(-order.batch_size // shards) * shards
    roles = ["truth", *(f"student {student}" for student in order.students)]
    seen: dict[Config, list[str]] = {}
    for role in roles:
        seen.setdefault(configs[role], []).append(role)
    for config, alike in seen.items():
        yield f"{', '.join(alike)}: sample a batch", *_sampling(config, layout, n, order.max_new_tokens)


def _sampling(config: Config, layout: Layout, n: int, max_new_tokens: int):
    """The program that draws n completions of one token, and bytes of its keys and values on all devices."""
    model, where = layout.model(config), NamedSharding(layout.mesh, PartitionSpec(sharding.DATA))
    sampling = generate.made_ready(generate.Sampling(jnp.float32(1.0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    given = [jax.ShapeDtypeStruct((n, 1), dtype, sharding=where) for dtype in (jnp.int32, jnp.bool_)]
    given.append(jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=where))
    program = jax.jit(lambda params, *x: generate.continue_prompts(model, params, *x, max_new_tokens, sampling))
    compiled = _compiled(program.lower(_abstract(config, layout.mesh), *given))
    cache = jax.eval_shape(lambda: generate.make_cache(make_model(config), n, 1, max_new_tokens))
    return compiled, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _policy(config: Config, layout: Layout, order: Order):
    return make_policy(layout.model(config), [[0]], [[True]], max_new_tokens=order.max_new_tokens)


def _scoring(name, steps, config, layout: Layout, batch, length):
    model, mesh = layout.model(config), layout.mesh
    batch = -(-batch // layout.shards) * layout.shards
    program = jax.jit(lambda params, x: token_log_probs(model, params, x.tokens, x.mask))
    compiled = _compiled(program.lower(_abstract(config, mesh), _batch(mesh, Texts, batch, length)))
    scored = [passes.Pass(config, batch, length)]
    return name, steps, compiled, passes.by_formula(scored), passes.by_xla(scored, layout)


def _aligning(name, steps, configs, layout: Layout, order: Order, settings: AlignmentSettings, length):
    (config, reference), mesh = configs, layout.mesh
    algorithm, n, of_data = align.ALGORITHMS[settings.algorithm], settings.batch_size, _length_of_data(order)
    optimizer = order.alignment.optimisation.make(settings.num_updates)
    policies, params = [_policy(one, layout, order) for one in configs], _abstract(config, mesh)
    if settings.algorithm == "ppo":
        model = layout.model(config)
        policies[0], params = with_value_head(policies[0], model), _with_critic(model, params, mesh)
    step = align.make_step(policies[0], optimizer, settings, lambda x: x.reward, lambda x: x.hit, policies[1])
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    inputs = Inputs(
        jax.random.key(0),
        _abstract(reference, mesh),
        Coefficients(*([scalar] * len(Coefficients._fields))),
        _batch(mesh, ScoredTexts, n, length) if algorithm.on_policy else None,
        _pairs(mesh, n, of_data) if algorithm.data else None,
    )
    compiled = _compiled(jax.jit(step, donate_argnums=0).lower(_state(params, mesh, optimizer), inputs))
    made = passes.of_alignment(settings, config, reference, length, of_data)
    drawn = [passes.Pass(config, n, length)] * algorithm.on_policy
    return name, steps, compiled, passes.by_formula([*drawn, *made]), passes.by_xla(made, layout)


def _with_critic(model: Model, params, mesh: Mesh):
    """Parameters of a policy with a critic, as shapes with their layout."""
    head = jax.eval_shape(partial(add_value_head, model), params)["value_head"]
    where = NamedSharding(mesh, PartitionSpec())
    head = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), head)
    return {"model": params, "value_head": head}


def _pairs(mesh: Mesh, n: int, length: int) -> align.PreferenceData:
    """A batch of an offline algorithm's fixed set."""
    x, where = _batch(mesh, ScoredTexts, n, length), NamedSharding(mesh, PartitionSpec(sharding.DATA))
    preferred = jax.ShapeDtypeStruct((n // 2,), jnp.bool_, sharding=where)
    return align.PreferenceData(
        x, x.reward, preferred, jax.ShapeDtypeStruct((n, length - 1), jnp.float32, sharding=where)
    )


def _distilling(name, steps, configs, layout: Layout, order: Order, method: str, length):
    (config, teacher), mesh = configs, layout.mesh
    settings = order.distillation
    optimizer = settings.optimisation.make(settings.num_updates)
    batch, scalar = _batch(mesh, Texts, settings.batch_size, length), jax.ShapeDtypeStruct((), jnp.float32)
    made = passes.of_distillation(replace(settings, method=method, on_policy_fraction=0.0), config, teacher, length)
    if method == "sequence":
        step = distill.maximum_likelihood_step(_policy(config, layout, order), optimizer)
        inputs = (batch, scalar)
    else:
        models = (layout.model(one) for one in configs)
        step = distill.token_level_step(make_comparison(*models, method), optimizer)
        inputs = distill.TokenInputs(batch, _abstract(teacher, mesh), scalar, scalar)
    state = _state(_abstract(config, mesh), mesh, optimizer)
    compiled = _compiled(jax.jit(step, donate_argnums=0).lower(state, inputs))
    return name, steps, compiled, passes.by_formula(made), passes.by_xla(made, layout)

"""The orders as data: which model is made from which, by distilling, aligning or sharpening.

`STAGES` reads like the table of arms; a new order is one more line. `plan` lays any such graph out as instructions on
a table of models, each stage once for every point of the axes that it depends on: the student does not depend on the KL
coefficient and the aligned base does not depend on the temperature, so neither is ever computed twice. `run` carries
the instructions out one after another, so that however many stages there are, each operation is compiled once.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AXES = ("temperature", "kl_coef")
"""The axes that stages may depend on, in the order in which they lead every result."""


@dataclass(frozen=True)
class Distil:
    """Sequence-level distillation of a teacher; the temperature is a number or "temperature", the axis."""

    teacher: str
    temperature: float | str

    @property
    def models(self) -> tuple[str, ...]:
        """Models it is made from."""
        return (self.teacher,)

    @property
    def axes(self) -> frozenset[str]:
        """Axes that it depends on by itself."""
        return frozenset({"temperature"} if self.temperature == "temperature" else ())


@dataclass(frozen=True)
class Align:
    """Alignment of a policy that starts at one model and is held to another."""

    start: str
    reference: str

    @property
    def models(self) -> tuple[str, ...]:
        """Models it is made from."""
        return (self.start, self.reference)

    @property
    def axes(self) -> frozenset[str]:
        """Axes that it depends on by itself."""
        return frozenset({"kl_coef"})


@dataclass(frozen=True)
class Sharpen(Distil):
    """The teacher itself with its weights sharpened by 1/τ: what temperature does without any refitting."""


Stage = Distil | Align | Sharpen

STAGES: dict[str, Stage] = {
    "student": Distil("base", temperature="temperature"),
    "aligned_base": Align(start="base", reference="base"),
    "kd_align": Align(start="student", reference="student"),
    "kd_align_sharpened": Sharpen("kd_align", temperature="temperature"),
    "align_kd": Distil("aligned_base", temperature=1.0),
    "align_kd_sharpened": Distil("aligned_base", temperature="temperature"),
    "kd_align_anchored": Align(start="student", reference="base"),
    "base_start_student_reference": Align(start="base", reference="student"),
}
"""The six arms and the two models on the way to them; "base" is where every order begins."""


def arms() -> tuple[str, ...]:
    """The arms of the comparison: the stages of `STAGES` as it is now, but those on the way to them."""
    return tuple(name for name in STAGES if name not in ("student", "aligned_base"))


ARMS = arms()
"""The arms that the comparison has by default; one that is added to `STAGES` later is in `arms` alone."""

ROOT = "base"
TRUTH = "truth"

FIT = Distil(TRUTH, temperature=1.0)
"""How the base is made: maximum likelihood on draws of p*. Not a stage of `STAGES`, for every order begins at it."""


def reference_of(name: str, stages: Mapping[str, Stage] = STAGES) -> str:
    """The model that a stage's policy was held to: its alignment's reference, or the base where nothing was aligned."""
    if name == ROOT:
        return ROOT
    stage = stages[name]
    return stage.reference if isinstance(stage, Align) else reference_of(stage.teacher, stages)


def needed(names, stages: Mapping[str, Stage] = STAGES) -> dict[str, Stage]:
    """The named stages and all that they are made from, in an order in which they can be computed.

    Raises:
      ValueError: on a name that is no stage, or a stage made from itself.
    """
    chosen: dict[str, Stage] = {}

    def visit(name, path):
        if name == ROOT or name in chosen:
            return
        if name not in stages:
            raise ValueError(f"unknown arm {name!r}: must be one of {', '.join(stages)}")
        if name in path:
            raise ValueError(f"a stage is made from itself: {' → '.join([*path, name])}")
        for model in stages[name].models:
            visit(model, [*path, name])
        chosen[name] = stages[name]

    for name in names:
        visit(name, [])
    return chosen


def axes_of(name: str, stages: Mapping[str, Stage] = STAGES) -> tuple[str, ...]:
    """The axes that a stage depends on, by itself or through what it is made from."""
    if name in (ROOT, TRUTH):
        return ()
    stage = stages[name]
    inherited = {axis for model in stage.models for axis in axes_of(model, stages)}
    return tuple(axis for axis in AXES if axis in inherited | stage.axes)


class Plan(NamedTuple):
    """A graph of stages, laid out: one row of a table a model and point, and one instruction a row that is to be made.

    Attributes:
      rows: where each model's points lie in the table, those given first; points in row-major order of the axes.
      operations: what the instructions do, each `(kind of stage, group)` once.
      operation: which of them each instruction does; int32[instructions].
      parents: rows that it reads: what it starts from, and what it is held to (the same row where there is no other);
        int32[instructions, 2].
      stages: the stage that each instruction belongs to.
      places: its place along each axis of `AXES` (0 along axes it does not depend on); int32[instructions, axes].
    """

    rows: dict[str, range]
    operations: tuple[tuple[type, Hashable], ...]
    operation: np.ndarray
    parents: np.ndarray
    stages: tuple[Stage, ...]
    places: np.ndarray

    @property
    def size(self) -> int:
        """Rows of the table."""
        return max(rows.stop for rows in self.rows.values())


def plan(
    stages: Mapping[str, Stage],
    given: Sequence[str],
    lengths: Mapping[str, int],
    group_of: Callable[[str, Stage], Hashable] = lambda name, stage: None,
) -> Plan:
    """Lay a graph of stages out as instructions, each stage once at every point of the axes that it depends on.

    Args:
      stages: stages by name, in an order in which they can be computed (`needed`).
      given: models that exist already; stages of their names are not computed.
      lengths: length of each axis of `AXES`.
      group_of: what of a stage is static, e.g. its number of updates; stages of one kind and group are one operation.
    """
    rows: dict[str, range] = {}
    operations: dict[tuple, int] = {}
    instructions = []

    for name in [*given, *(name for name in stages if name not in given)]:
        begin = max((taken.stop for taken in rows.values()), default=0)
        along = places(name, lengths, stages)
        rows[name] = range(begin, begin + len(along))
        if name in given:
            continue
        stage = stages[name]
        operation = operations.setdefault((type(stage), group_of(name, stage)), len(operations))
        for place in along:
            read = [_row_at(rows, model, place, lengths, stages) for model in stage.models]
            instructions.append((operation, (read[0], read[-1]), stage, place))
    chosen = tuple(zip(*instructions, strict=True)) or ((), (), (), ())
    return Plan(
        rows,
        tuple(operations),
        np.asarray(chosen[0], np.int32),
        np.asarray(chosen[1], np.int32).reshape(-1, 2),
        chosen[2],
        np.asarray(chosen[3], np.int32).reshape(-1, len(AXES)),
    )


def places(name: str, lengths: Mapping[str, int], stages: Mapping[str, Stage] = STAGES) -> np.ndarray:
    """Places of a model's points along each axis of `AXES`, 0 along those it does not depend on; [points, axes]."""
    own = axes_of(name, stages)
    return np.asarray([*itertools.product(*(range(lengths[axis] if axis in own else 1) for axis in AXES))], np.int32)


def _row_at(rows, name: str, place, lengths, stages) -> int:
    """The row of a model at a place of all axes."""
    own = axes_of(name, stages)
    shape = [lengths[axis] if axis in own else 1 for axis in AXES]
    within = [where if axis in own else 0 for axis, where in zip(AXES, place, strict=True)]
    return rows[name][int(np.ravel_multi_index(within, shape))]


def reference_rows(
    plan: Plan, name: str, lengths: Mapping[str, int], stages: Mapping[str, Stage] = STAGES
) -> np.ndarray:
    """The rows of what each point of a model was held to; int32[points]."""
    reference = reference_of(name, stages)
    along = places(name, lengths, stages)
    return np.asarray([_row_at(plan.rows, reference, place, lengths, stages) for place in along], np.int32)


def run(plan: Plan, given: Any, points: Mapping[str, jax.Array], execute: Callable[..., tuple[Any, Any]]):
    """Carry out a plan: one instruction after another, every operation compiled once for all stages that need it.

    Under `vmap` over runs the choice of the operation stays a branch, for it is the same in every run.

    Args:
      plan: from `plan`.
      given: the models that exist already, a pytree whose leaves lead with their rows.
      points: values of each axis, [length].
      execute: pure function `(kind, group, row, start, reference, value) -> (model, record)`, of which kind and group
        are static and `row` is where the model goes; an `Align` is given its KL coefficient as value, a `Distil` or
        `Sharpen` its temperature. Models are rows of the table, records alike in all operations.

    Returns:
      The table, rows as `plan.rows` says, and the records of the rows that were made, in their order.
    """
    branches = [functools.partial(execute, kind, group) for kind, group in plan.operations]
    made = len(plan.operation)
    table = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, made)] + [(0, 0)] * (leaf.ndim - 1)), given)
    first = plan.size - made

    def step(table, instruction):
        row, operation, parents, value = instruction
        start, reference = (
            jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, parents[i], keepdims=False), table)  # noqa: B023
            for i in range(2)
        )
        model, record = lax.switch(operation, branches, row, start, reference, value)
        table = jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, row, 0), table, model)
        return table, record

    instructions = (jnp.arange(first, plan.size), plan.operation, plan.parents, _values(plan, points))
    return lax.scan(step, table, jax.tree.map(jnp.asarray, instructions))


def _values(plan: Plan, points: Mapping[str, jax.Array]) -> jax.Array:
    """The coefficient or temperature of every instruction."""
    fixed = [stage.temperature for stage in plan.stages if isinstance(stage, Distil) and stage.temperature != AXES[0]]
    pool = jnp.concatenate([*(points[axis] for axis in AXES), jnp.asarray(fixed, points[AXES[0]].dtype)])
    begins = dict(zip(AXES, np.cumsum([0, points[AXES[0]].shape[0]]), strict=True))
    fixed_ones = itertools.count(sum(points[axis].shape[0] for axis in AXES))
    where = []
    for stage, place in zip(plan.stages, plan.places, strict=True):
        axis = AXES[1] if isinstance(stage, Align) else AXES[0]
        varies = isinstance(stage, Align) or stage.temperature == AXES[0]
        where.append(begins[axis] + place[AXES.index(axis)] if varies else next(fixed_ones))
    return pool[np.asarray(where, np.int32)]

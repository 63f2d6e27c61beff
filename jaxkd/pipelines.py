"""The orders as data: which model is made from which, by distilling, aligning or sharpening.

`STAGES` reads like the table of arms; a new order is one more line. `run` executes any such graph: each stage is
computed once for every point of the axes that it depends on. The student does not depend on the KL
coefficient and the aligned base does not depend on the temperature, so neither is ever computed twice.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

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

ARMS = tuple(name for name in STAGES if name not in ("student", "aligned_base"))
"""The arms of the comparison."""

ROOT = "base"


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
    if name == ROOT:
        return ()
    stage = stages[name]
    inherited = {axis for model in stage.models for axis in axes_of(model, stages)}
    return tuple(axis for axis in AXES if axis in inherited | stage.axes)


def at_all_points(model: Any, own_axes: tuple[str, ...], axes: tuple[str, ...], lengths: Mapping[str, int]) -> Any:
    """A model that leads with some of the axes, repeated over all of them and flattened to one leading axis."""

    def spread(leaf):
        rest = leaf.shape[len(own_axes) :]
        kept = [lengths[axis] if axis in own_axes else 1 for axis in axes]
        full = [lengths[axis] for axis in axes]
        return jnp.broadcast_to(leaf.reshape(*kept, *rest), (*full, *rest)).reshape(-1, *rest)

    return jax.tree.map(spread, model)


def values_at_points(axis: str, axes: tuple[str, ...], points: Mapping[str, jax.Array]) -> jax.Array:
    """The values of one axis at all points of several axes, flattened."""
    grid = jnp.meshgrid(*(points[other] for other in axes), indexing="ij")
    return grid[axes.index(axis)].reshape(-1)


def flatten(model: Any, own_axes: tuple[str, ...]) -> Any:
    """Merge a model's leading axes into one (of length 1 where it has none)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(own_axes) :]), model)


def split(stacked: Any, counts: list[int], shapes: list[tuple[int, ...]]) -> list[Any]:
    """Undo a concatenation of flattened models: counts of points each, and the leading shapes to restore."""
    pieces, offset = [], 0
    for count, shape in zip(counts, shapes, strict=True):
        begin, end = offset, offset + count
        pieces.append(jax.tree.map(lambda leaf: leaf[begin:end].reshape(*shape, *leaf.shape[1:]), stacked))  # noqa: B023
        offset = end
    return pieces


def run(
    stages: Mapping[str, Stage],
    models: Mapping[str, Any],
    points: Mapping[str, jax.Array],
    execute: Callable[..., tuple[Any, Any]],
    stack: Callable[[list[Any]], Any],
    group_of: Callable[[str, Stage], Hashable] = lambda name, stage: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute all stages from models that exist already.

    Stages of one kind that are ready together run together: their points are stacked into one vmapped call, so an
    algorithm is compiled once for all arms rather than once an arm.

    Args:
      stages: stages by name, in an order in which they can be computed (`needed`).
      models: models made before, by name, leading with the axes that `axes_of` says; "base" among them.
      points: values of each axis, [length]; the axes that a result depends on lead it in the order of `AXES`.
      execute: pure function of one point, `(kind, group, *models, value) -> (model, record)`: an `Align` is given
        start, reference and KL coefficient, a `Distil` or `Sharpen` its teacher and temperature.
      stack: concatenates models along their leading axis, after bringing those of several sizes to one (padding).
      group_of: what of a stage is static, e.g. its number of updates; only stages that agree are stacked.

    Returns:
      All models and all records, by name.
    """
    models, records = dict(models), {}
    lengths = {axis: points[axis].shape[0] for axis in points}
    waiting = {name: stage for name, stage in stages.items() if name not in models}
    while waiting:
        ready = {name: stage for name, stage in waiting.items() if all(model in models for model in stage.models)}
        groups: dict[Hashable, list[str]] = {}
        for name, stage in ready.items():
            groups.setdefault((type(stage), group_of(name, stage)), []).append(name)
        for (kind, group), names in groups.items():
            axes = [axes_of(name, stages) for name in names]
            parents = []
            for position in range(len(stages[names[0]].models)):
                own = [stages[name].models[position] for name in names]
                spread = [
                    at_all_points(models[model], axes_of(model, stages), over, lengths)
                    for model, over in zip(own, axes, strict=True)
                ]
                parents.append(stack(spread))
            values = [_value(stages[name], over, points) for name, over in zip(names, axes, strict=True)]
            together = jax.vmap(lambda *inputs, kind=kind, group=group: execute(kind, group, *inputs))
            results = together(*parents, jnp.concatenate(values))
            shapes = [tuple(lengths[axis] for axis in over) for over in axes]
            pieces = split(results, [math.prod(shape) for shape in shapes], shapes)
            for name, (model, record) in zip(names, pieces, strict=True):
                models[name], records[name] = model, record
                del waiting[name]
    return models, records


def _value(stage: Stage, axes: tuple[str, ...], points: Mapping[str, jax.Array]) -> jax.Array:
    """The coefficient or temperature of a stage at each of its points."""
    if isinstance(stage, Align):
        return values_at_points("kl_coef", axes, points)
    if stage.temperature == "temperature":
        return values_at_points("temperature", axes, points)
    return jnp.full(math.prod(points[axis].shape[0] for axis in axes), stage.temperature, points["temperature"].dtype)

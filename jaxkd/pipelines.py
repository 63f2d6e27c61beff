"""The orders as data: which model is made from which, by distilling, aligning or sharpening.

`STAGES` reads like the table of arms; a new order is one more line. `run` executes any such graph: each stage is
computed once for every point of the axes that it depends on, and no more. The student does not depend on the KL
coefficient and the aligned base does not depend on the temperature, so neither is ever computed twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

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


def run(
    stages: Mapping[str, Stage],
    models: Mapping[str, Any],
    points: Mapping[str, jax.Array],
    execute: Callable[[str, Stage, tuple, Mapping[str, jax.Array]], tuple[Any, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the stages in order, from models that exist already.

    Args:
      stages: stages by name, in an order in which they can be computed (`needed`).
      models: models made before, by name, with leading axes as `axes_of` says; "base" among them.
      points: values of each axis, [length]; the axes that a result depends on lead it in the order of `AXES`.
      execute: `(name, stage, models it is made from, one value an axis) -> (model, record)`, a pure function of one
        point.

    Returns:
      All models and all records, by name.
    """
    models, records = dict(models), {}
    for name, stage in stages.items():
        if name in models:
            continue
        axes = axes_of(name, stages)

        def one(values, *parents, name=name, stage=stage, axes=axes):
            return execute(name, stage, parents, dict(zip(axes, values, strict=True)))

        # The values of several axes enter as one tuple, so each axis maps its own member alone.
        mapped = one
        for axis in reversed(axes):
            values_axes = tuple(0 if axis == other else None for other in axes)
            parent_axes = (0 if axis in axes_of(model, stages) else None for model in stage.models)
            mapped = jax.vmap(mapped, in_axes=(values_axes, *parent_axes))
        models[name], records[name] = mapped(tuple(points[axis] for axis in axes), *(models[m] for m in stage.models))
    return models, records

"""The models of an order: which there are, what each is made from, and the folder that it has."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxkd import pipelines
from jaxkd.pipelines import Align, Distil
from jaxkd.smollm2.order import CEILING, Order, all_stages
from jaxkd.smollm2.students import Start


@dataclass(frozen=True)
class Row:
    """One model to be made: a stage at a point of the axes, for one student, algorithm and seed.

    Attributes:
      name: of the stage.
      stage: what makes it.
      folder: where it is.
      models: folders of what it is made from, by role: start or teacher, and reference.
      reference: folder of what its policy was held to by its last alignment; the base's where there was none.
      temperature: τ of its distillation; NaN where none is involved.
      kl_coef: β of its alignment; NaN where none is involved.
      seed: of the run.
      student: where the student starts; "" where no student is involved.
      algorithm: "" where nothing is aligned.
    """

    name: str
    stage: pipelines.Stage
    folder: Path
    models: tuple[Path, ...]
    reference: Path
    temperature: float
    kl_coef: float
    seed: int
    student: str
    algorithm: str

    @property
    def is_alignment(self) -> bool:
        """Whether it is aligned itself, and not made from what was."""
        return isinstance(self.stage, Align)

    @property
    def is_distillation(self) -> bool:
        """Whether it is fitted to texts, and not sharpened alone."""
        return type(self.stage) is Distil


def role_of(row: Row) -> str:
    """Whose shape a row's model has: that of the base, or of a student by name."""
    return f"student {row.student}" if _is_students(row.name) else "base"


def _is_students(name: str) -> bool:
    """Whether a stage's model has the student's shape: an aligned or sharpened one keeps that of what it starts at."""
    if name in (pipelines.ROOT, pipelines.TRUTH):
        return False
    stage = all_stages()[name]
    return type(stage) is Distil or _is_students(stage.models[0])


def _involves(name: str, kind: type) -> bool:
    """Whether a stage, or what it is made from, is of a kind."""
    if name in (pipelines.ROOT, pipelines.TRUTH):
        return False
    stage = all_stages()[name]
    return type(stage) is kind or any(_involves(model, kind) for model in stage.models)


def rows_of(order: Order, out: Path) -> list[Row]:
    """Every model of an experiment, each once, in an order in which they can be made."""
    arms = [arm for arm in order.arms if arm != CEILING]
    first, rest = order.algorithms[:1], replace(order, seeds=order.seeds_of_rest)
    parts = [(order, order.algorithms, arms)]
    if CEILING in order.arms:
        parts.append((rest, first, [CEILING]))
    if order.temperatures_of_rest:
        alone = replace(order, students=order.students[:1], temperatures=order.temperatures_of_rest)
        parts.append((alone, first, arms))
    rows: dict[Path, Row] = {}
    for part, algorithms, names in parts:
        for row in _rows_of_arms(part, algorithms, names, out):
            rows.setdefault(row.folder, row)
    return list(rows.values())


def _rows_of_arms(order: Order, algorithms: tuple[str, ...], arms: list[str], out: Path) -> list[Row]:
    # The student itself is always made: what it is shows whether an arm began with a low recall.
    chosen = pipelines.needed(["student", *arms], all_stages() | {CEILING: Distil(pipelines.ROOT, 1.0)})
    lengths = order.lengths()
    plan = pipelines.plan(chosen, [pipelines.ROOT], lengths)
    names, held_to = {}, {}
    for name, taken in plan.rows.items():
        names |= dict.fromkeys(taken, name)
        held_to |= zip(taken, pipelines.reference_rows(plan, name, lengths, chosen), strict=True)
    rows: dict[Path, Row] = {}
    for seed, student, algorithm in _runs(order, algorithms):
        where = {plan.rows[pipelines.ROOT].start: out / "base"}
        made = zip(plan.places, plan.parents, strict=True)
        for number, (place, parents) in enumerate(made, start=plan.size - len(plan.places)):
            models, reference = [where[j] for j in parents], where[held_to[number]]
            row = _row(order, out, names[number], place, seed, student, algorithm, models, reference)
            where[number] = row.folder
            rows.setdefault(row.folder, row)
    return list(rows.values())


def _runs(order: Order, algorithms: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Seeds, students and algorithms: the first of both on every seed, then each other one beside the first."""
    student, algorithm = order.students[0], algorithms[0]
    rest = [(student, other) for other in algorithms[1:]] + [(other, algorithm) for other in order.students[1:]]
    return [(seed, student, algorithm) for seed in order.seeds] + [
        (seed, *pair) for pair in rest for seed in order.seeds_of_rest
    ]


def _row(order: Order, out: Path, name, place, seed, student, algorithm, models, reference) -> Row:
    axes = pipelines.axes_of(name, all_stages())
    # math.nan is one object and so equal to itself as part of a key: rows of several seeds are grouped by such keys.
    temperature = order.temperatures[place[0]] if "temperature" in axes else math.nan
    kl_coef = order.kl_coefs[place[1]] if "kl_coef" in axes else math.nan
    folder = out / f"seed-{seed}"
    if _involves(name, Distil):
        folder /= student.replace("/", "_").replace(":", "-")
    else:
        student = ""
    if _involves(name, Align):
        folder /= algorithm
    else:
        algorithm = ""
    label = name
    label += f"-t{temperature:g}" if "temperature" in axes else ""
    label += f"-b{kl_coef:g}" if "kl_coef" in axes else ""
    stage = all_stages()[name]
    return Row(name, stage, folder / label, tuple(models), reference, temperature, kl_coef, seed, student, algorithm)


def deciding_student(order: Order, row: Row) -> Path:
    """Folder of the unaligned student that decides on a row's admission; the row's own where none does."""
    if not row.student or Start.parse(row.student).layers is None or row.name == "student":
        return row.folder
    # Where the row has no temperature, the student that was sharpened least decides.
    temperature = row.temperature if not np.isnan(row.temperature) else max(order.temperatures)
    return row.folder.parents[0 if not row.algorithm else 1] / f"student-t{temperature:g}"


def decides(row: Row) -> bool:
    """Whether a row is a cut student, whose recall decides on what is made with it."""
    return row.name == "student" and Start.parse(row.student).layers is not None


def is_admitted(order: Order, evaluation: dict) -> bool:
    """Whether a cut student, as it was measured, is close enough to the truth to say anything about the orders."""
    return evaluation["recall_gap_per_token"] <= order.most_held_out_kl


def coordinates_of(row: Row) -> dict:
    """What a model's files name it by."""
    return {
        "name": row.name,
        "temperature": row.temperature,
        "kl_coef": row.kl_coef,
        "seed": row.seed,
        "student": row.student,
        "algorithm": row.algorithm,
    }


def words_of(row: Row) -> str:
    """A model in words, for who looks on."""
    parts = [f"seed {row.seed}", row.name]
    parts += [f"of {row.student}"] if row.student not in ("", "same") else []
    parts += [] if np.isnan(row.temperature) else [f"τ {row.temperature:g}"]
    parts += [] if np.isnan(row.kl_coef) else [f"β {row.kl_coef:g}"]
    return " ".join(parts)

"""The passes over whole texts that a step of each kind makes: what its FLOPs are counted from, by formula and by XLA.

Sampling is no pass of these: XLA counts the body of a loop once, however many tokens it draws.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxkd.align import ALGORITHMS, AlignmentSettings
from jaxkd.smollm2 import cost
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.network import Layout
from jaxkd.smollm2.order import CEILING, Order
from jaxkd.smollm2.rows import Row, role_of, rows_of
from jaxkd.smollm2.stages import Distillation


class Pass(NamedTuple):
    """Log-probabilities of a batch of texts.

    Attributes:
      config: the model's shape.
      texts: in the batch.
      length: tokens of each, padding among them.
      differentiate: whether the gradient is taken as well.
      times: how often.
    """

    config: Config
    texts: int
    length: int
    differentiate: bool = False
    times: int = 1


def by_formula(passes: Iterable[Pass]) -> float:
    """Model FLOPs of passes over texts without padding."""
    flops = {False: cost.forward_flops, True: cost.training_flops}
    return sum(
        one.times * flops[one.differentiate](one.config, one.texts * one.length, one.length / 2) for one in passes
    )


def by_xla(passes: Iterable[Pass], layout: Layout) -> float:
    """FLOPs of the passes' programs (`cost.log_prob_flops`)."""
    return sum(
        one.times
        * cost.log_prob_flops(
            one.config,
            one.texts,
            one.length,
            differentiate=one.differentiate,
            dtype=layout.compute_dtype,
            remat=layout.remat,
        )
        for one in passes
    )


def of_alignment(
    settings: AlignmentSettings, policy: Config, reference: Config, length: int, length_of_data: int
) -> list[Pass]:
    """Passes of a step of an algorithm.

    Args:
      settings: algorithm and sizes.
      policy: the trained model's shape.
      reference: that of what it is held to, whose log-probabilities of fixed data are there already.
      length: tokens of a text that is drawn.
      length_of_data: of one of an offline algorithm's fixed set.
    """
    algorithm, n = ALGORITHMS[settings.algorithm], settings.batch_size
    trained = Pass(policy, n, length_of_data if algorithm.data else length, True, settings.updates_per_step)
    if not algorithm.on_policy:
        return [trained]
    # KTO learns from fixed data, and scores its own draws for the reference point.
    drawn = [Pass(reference, n, length)] + [Pass(policy, n, length)] * bool(algorithm.data)
    return [*drawn, trained]


def of_distillation(settings: Distillation, student: Config, teacher: Config, length: int) -> list[Pass]:
    """Passes of a step; one on samples alone has no teacher to compute."""
    trained = Pass(student, settings.batch_size, length, True)
    if settings.method == "sequence":
        return [trained]
    return [Pass(teacher, settings.batch_size, length), trained]


def of_step(row: Row, rows: dict, order: Order, configs: dict[str, Config], length: int) -> list[Pass] | None:
    """Passes of a step of the stage that makes a row; None where its shapes are not known from the order alone.

    Args:
      row: what is made.
      rows: all rows by their folders.
      order: all of the experiment.
      configs: shapes by role (`rows.role_of`).
      length: tokens of a completion with its prompt.
    """

    def shape_of(folder) -> Config:
        return configs[role_of(rows[folder]) if folder in rows else "base"]

    own = configs[role_of(row)]
    if row.is_alignment:
        algorithm = ALGORITHMS[row.algorithm]
        # The longest pair of a file is not known before it is read.
        if algorithm.data and order.preferences is not None:
            return None
        settings = replace(order.alignment.settings, algorithm=row.algorithm)
        return of_alignment(settings, own, shape_of(row.models[-1]), length, length)
    # How many texts the ceiling has, and so its batch, is found in the truth's samples.
    if not row.is_distillation or row.name == CEILING:
        return None
    return of_distillation(order.distillation, own, shape_of(row.models[0]), length)


def step_flops(
    order: Order, out: Path, configs: dict[str, Config], length: int, layout: Layout
) -> Callable[[Row], float | None]:
    """A function of a row of a run folder: FLOPs by XLA of a step of its stage; None where they are not known.

    The arguments after the folder are those of `of_step` and `by_xla`.
    """
    rows = {row.folder: row for row in rows_of(order, out)}

    def flops_of(row: Row) -> float | None:
        made = of_step(row, rows, order, configs, length)
        return None if made is None else by_xla(made, layout)

    return flops_of

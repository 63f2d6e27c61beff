"""Recovery in finished stores: rates and paired tests, the critical mass, and what theory predicts of both.

A store holds `capacity`, `temperature`, `kl_coef`, `seed`, `stage` and whatever else was varied as dimensions; see
`experiments/phase_diagram.py`. Recovery means that more than half of a model's draws lie on the target.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from jaxkd import pipelines, statistics
from jaxkd.align import ALGORITHMS, AlignmentSettings
from jaxkd.laboratory import LaboratorySettings
from jaxkd.metrics import RECOVERED_MASS

BASELINE, CHALLENGER = "kd_align", "align_kd"
_NEAR = 0.5  # largest |log(β_c / β)| of a reference that says something of the crossing
SMALLEST_MASS = 1e-12
"""Floor of a target mass before its logarithm: quadrature in single precision knows no smaller one."""


# --- rates and paired tests ------------------------------------------------------------------------------------------


def summarise(dataset: xr.Dataset, rate: float = 0.05) -> xr.Dataset:
    """Rates, paired differences and what theory needs, over every dimension but seed and stage.

    A pair of which either run failed leaves both rates of the comparison; beside them stand the same with failures
    scored as mass 0, not recovered, as `…_failures_as_0`. `significant` marks McNemar tests that pass at a
    false-discovery rate over all cells of the data set.

    Args:
      dataset: a finished sweep.
      rate: the false-discovery rate.

    Returns:
      `recovery`, `recovery_low`, `recovery_high` [cells, stage]; `recovery_baseline`, `recovery_challenger`,
      `difference`, `p_value` and `significant` [cells]; of these `recovery`, `difference`, `p_value` and `significant`
      also as `…_failures_as_0`; medians over seeds of the student's target recall, bounded recall, target mass and β_c
      as `student_…` and `half_mass_coefficient` [cells]; `base_failed`, the number of bases that merge or miss a mode
      [cells]. Where there are several targets, also the median `target_balance` of the runs that recovered and how many
      they are, `target_balance_runs` [cells, stage].
    """
    dataset = in_order(dataset)
    dims = tuple(dim for dim in dataset.target_mass.dims if dim not in ("seed", "stage"))
    cells = dataset[["target_mass", "failed"]].transpose(*dims, "stage", "seed").load()
    recovered, failed = cells.target_mass.values > RECOVERED_MASS, cells.failed.values.astype(bool)
    stages = [str(name) for name in dataset.stage.values]
    shape = recovered.shape[: len(dims)]
    own = {name: np.full((*shape, len(stages)), np.nan) for name in ("recovery", "recovery_low", "recovery_high")}
    own_bound = np.full((*shape, len(stages)), np.nan)
    paired_names = ("recovery_baseline", "recovery_challenger", "difference", "p_value")
    paired = {name: np.full(shape, np.nan) for name in paired_names}
    paired_bound = {name: np.full(shape, np.nan) for name in ("difference", "p_value")}
    baseline, challenger = stages.index(BASELINE), stages.index(CHALLENGER)
    for cell in np.ndindex(shape):
        for stage in range(len(stages)):
            found = statistics.recovery_rate(recovered[cell][stage], failed[cell][stage])
            for name, value in zip(own, (found.rate, found.low, found.high), strict=True):
                own[name][cell][stage] = value
            own_bound[cell][stage] = (recovered[cell][stage] & ~failed[cell][stage]).mean()
        (a, b), (failed_a, failed_b) = (values[cell][[challenger, baseline]] for values in (recovered, failed))
        pair = statistics.mcnemar(a, b, failed_a, failed_b)
        if pair.pairs:
            rates = ((pair.both + pair.only_b) / pair.pairs, (pair.both + pair.only_a) / pair.pairs)
            for name, value in zip(paired_names, (*rates, pair.difference, pair.p_value), strict=True):
                paired[name][cell] = value
        bound = statistics.mcnemar(a & ~failed_a, b & ~failed_b) if (failed_a | failed_b).any() else pair
        paired_bound["difference"][cell], paired_bound["p_value"][cell] = bound.difference, bound.p_value
    summary = xr.Dataset({name: ((*dims, "stage"), values) for name, values in own.items()})
    summary = summary.assign({name: (dims, values) for name, values in paired.items()})
    summary["significant"] = (dims, statistics.false_discovery(paired["p_value"], rate))
    summary["recovery_failures_as_0"] = ((*dims, "stage"), own_bound)
    summary = summary.assign({f"{name}_failures_as_0": (dims, values) for name, values in paired_bound.items()})
    summary["significant_failures_as_0"] = (dims, statistics.false_discovery(paired_bound["p_value"], rate))
    student = dataset.assign(target_mass=resolved_mass(dataset)).sel(stage="student").drop_vars("stage")
    for name in ("target_recall", "bounded_recall", "target_mass"):
        summary[f"student_{name}"] = student[name].median("seed").transpose(*dims)
    # What holds for the student as a reference stands with the arm that was held to it.
    held_to_student = dataset.half_mass_coefficient.sel(stage=BASELINE).drop_vars("stage")
    summary["half_mass_coefficient"] = held_to_student.median("seed").transpose(*dims)
    summary["base_failed"] = dataset.base_failed.sum("seed")
    balance = balance_of_recovered(dataset)
    if balance.notnull().any():
        summary["target_balance"] = balance.median("seed")
        summary["target_balance_runs"] = balance.notnull().sum("seed")
    return summary.assign_coords({name: dataset[name] for name in (*dims, "stage")})


def balance_of_recovered(dataset: xr.Dataset) -> xr.DataArray:
    """Smallest over largest mass of several targets; NaN where none are reached, and where there is only one."""
    balance = dataset.target_balance.where((dataset.target_mass > RECOVERED_MASS) & (dataset.failed == 0))
    if "num_targets" in dataset.coords:
        return balance.where(dataset.num_targets > 1)
    # One target is exactly as large as itself.
    return balance if (balance < 1).any() else balance.where(False)


def in_order(dataset: xr.Dataset) -> xr.Dataset:
    """Rows and columns of figures rise, in whichever order flags named their values."""
    return dataset.sortby([dim for dim in ("capacity", "kl_coef") if dim in dataset.dims])


_OF_AN_ALIGNMENT = ("algorithm", "reward_name", "label_noise", "match_component_evaluations")
_OF_A_DISTILLATION = ("capacity",)


def failed_models(dataset: xr.Dataset) -> int:
    """How many models failed, each counted once, though a store repeats it over what it does not depend on."""

    def of(stage: str) -> int:
        failed = dataset.failed.sel(stage=stage).astype(bool)
        if stage != pipelines.ROOT and stage not in pipelines.STAGES:
            return int(failed.sum())  # an order that is known to its store alone
        kinds = {type(made) for made in pipelines.needed([stage]).values()}
        repeated = [axis for axis in pipelines.AXES if axis not in pipelines.axes_of(stage)]
        repeated += () if pipelines.Align in kinds else _OF_AN_ALIGNMENT
        repeated += () if pipelines.Distil in kinds else _OF_A_DISTILLATION
        return int(failed.any([dim for dim in repeated if dim in failed.dims]).sum())

    return sum(of(str(stage)) for stage in dataset.stage.values)


# --- critical mass ---------------------------------------------------------------------------------------------------


def resolved_mass(dataset: xr.Dataset) -> xr.DataArray:
    """Target mass, floored at what its measurement tells from nothing.

    Quadrature resolves `SMALLEST_MASS`. Of draws, which measure what the grid does not hold, none on the target says no
    more than that the mass is about that of one draw or smaller: such a mass is put at that of one draw.
    """
    configuration = json.loads(dataset.attrs.get("configuration", "{}"))
    num_draws = configuration.get("laboratory", {}).get("num_draws", LaboratorySettings.num_draws)
    return np.maximum(dataset.target_mass, xr.where(dataset.from_grid.astype(bool), SMALLEST_MASS, 1 / num_draws))


BASE = 0
"""The family of references that the bases are, beside one of students for each capacity."""


@dataclass(frozen=True)
class References:
    """Alignments at one KL coefficient, one point a run.

    Attributes:
      mass: measured target mass of the reference (`resolved_mass`), [runs].
      log_odds: of the target under the reference's exact Gibbs policy, [runs].
      half_mass_coefficient: β_c of the reference, [runs].
      outcome: target mass of the aligned policy, [runs].
      failed: [runs].
      seed: [runs].
      family: K of the student that was the reference, `BASE` where the base was, [runs].
    """

    mass: np.ndarray
    log_odds: np.ndarray
    half_mass_coefficient: np.ndarray
    outcome: np.ndarray
    failed: np.ndarray
    seed: np.ndarray
    family: np.ndarray


def references(datasets: Sequence[xr.Dataset], kl_coef: float) -> References:
    """Every alignment that was held to its own start: students of more than one component, and each base once.

    A student of one component fails for a reason of its own, its family, whatever its mass: it is left out.
    """
    parts = []
    for dataset in datasets:
        chosen = dataset.sel(kl_coef=kl_coef)
        kept = chosen.sel(capacity=chosen.capacity > 1)
        parts.append(_columns(kept, BASELINE, "student"))
        if "aligned_base" in dataset.stage.values:
            # Neither capacity nor temperature of the student touches the base.
            parts.append(_columns(chosen.isel(capacity=slice(1), temperature=slice(1)), "aligned_base", "base"))
    return References(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _columns(dataset: xr.Dataset, aligned: str, reference: str) -> tuple[np.ndarray, ...]:
    one, other = dataset.sel(stage=aligned), dataset.sel(stage=reference)
    seeds = dataset.seed.broadcast_like(one.target_mass).transpose(*one.target_mass.dims)
    columns = (
        resolved_mass(other).transpose(*one.target_mass.dims).values,
        one.gibbs_target_log_odds.values,
        one.half_mass_coefficient.values,
        one.target_mass.values,
        one.failed.values.astype(bool),
        seeds.values,
        np.where(reference == "base", BASE, dataset.capacity.broadcast_like(seeds).transpose(*seeds.dims).values),
    )
    return tuple(column.ravel() for column in columns)


def by_family(points: References) -> dict[int, References]:
    """The points of each family, `BASE` first, then students from the largest capacity to the smallest.

    A base has a component for each mode, a small student has to share its components among them: families tip at
    masses several times apart, and a curve through all of them fits none.
    """
    families = sorted({*points.family.tolist()}, key=lambda family: math.inf if family == BASE else family)
    chosen = {family: points.family == family for family in reversed(families)}
    return {
        family: References(*(column[which] for column in vars(points).values())) for family, which in chosen.items()
    }


@dataclass(frozen=True)
class CriticalMass:
    """Where recovery tips at one KL coefficient, for one family of references.

    Attributes:
      kl_coef: β.
      family: K of the students, or `BASE`.
      runs: those that did not fail.
      seeds: how many they are of.
      recovered: how many of them recovered.
      curve: recovery against log10 of the reference's target mass; None where none can be fitted.
      no_curve: why it cannot, else empty.
      gibbs_mass: the target mass at which the references' β_c equals β; NaN where there are not some near it on either
        side, None where the Gibbs policy is not what the alignment tends to.
      seen: smallest and largest mass of a reference; NaN where no run is left.
    """

    kl_coef: float
    family: int
    runs: int
    seeds: int
    recovered: int
    curve: statistics.RecoveryCurve | None
    no_curve: str
    gibbs_mass: float | None
    seen: tuple[float, float]

    def __str__(self):
        if not self.is_seen:
            return self.why_not
        if np.isnan(self.interval).any():
            return f"{self.mass:.2g} (no interval from {self.seeds} seed)"
        low, high = self.interval
        ends = (
            f"<{self.seen[0]:.2g}" if low < self.seen[0] else f"{low:.2g}",
            f">{self.seen[1]:.2g}" if high > self.seen[1] else f"{high:.2g}",
        )
        return f"{self.mass:.2g} ({ends[0]} to {ends[1]})"

    @property
    def name(self) -> str:
        """Of the family."""
        return "base" if self.family == BASE else f"K = {self.family}"

    @property
    def mass(self) -> float:
        """The critical mass; 0 and infinity say that all runs recovered, or none; NaN that there is none."""
        return math.nan if self.curve is None else float(_power_of_ten(self.curve.critical))

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence limits of `mass`."""
        if self.curve is None:
            return math.nan, math.nan
        low, high = _power_of_ten(self.curve.critical_interval)
        return float(low), float(high)

    @property
    def is_seen(self) -> bool:
        """Whether the critical mass lies among those of the references: a curve's extrapolation says nothing."""
        return self.seen[0] <= self.mass <= self.seen[1]

    @property
    def why_not(self) -> str:
        """Why there is no critical mass; empty where there is one."""
        if self.is_seen:
            return ""
        if self.curve is None:
            return f"no curve: {self.no_curve}"
        if math.isnan(self.mass):
            return "no half in sight (recovery does not rise with the mass)"
        # The curve is above one half at all masses seen, or below it.
        beyond = f"more than that from {self.seen[0]:.2g} on"
        beyond = beyond if self.mass < self.seen[0] else f"fewer than that up to {self.seen[1]:.2g}"
        return f"no half in sight ({beyond})"


def _power_of_ten(exponent) -> np.ndarray:
    """A flat curve's extrapolation may lie beyond all floating-point numbers."""
    with np.errstate(over="ignore", under="ignore"):
        return np.power(10.0, exponent)


def critical_mass(points: References, kl_coef: float, num_resamples: int = 399, gibbs: bool = True) -> CriticalMass:
    """Fit recovery against the reference's mass by penalised logistic regression, seeds as clusters.

    Args:
      points: of one family, from `by_family`.
      kl_coef: β.
      num_resamples: of the bootstrap.
      gibbs: whether the Gibbs policy is the alignment's optimum (`Predictions.gibbs`), and so predicts a mass.

    Raises:
      ValueError: when the points are of several families, which tip at different masses.
    """
    families = np.unique(points.family)
    if families.size != 1:
        raise ValueError(f"points must be of one family of references, got {families.tolist()}: take by_family's")
    recovered, masses = points.outcome > RECOVERED_MASS, np.log10(points.mass)
    used = ~points.failed & np.isfinite(masses)
    seen = (float(points.mass[used].min()), float(points.mass[used].max())) if used.any() else (math.nan, math.nan)
    curve, no_curve, distinct = None, "", np.unique(masses[used].round(6)).size
    if distinct < 2:
        no_curve = f"{used.sum()} runs of {distinct} different masses"
    else:
        try:
            curve = statistics.recovery_curve(
                masses, recovered, points.seed, num_resamples=num_resamples, failed=points.failed
            )
        except RuntimeError as error:  # one family's fit that does not converge is no reason to lose the others
            no_curve = str(error)
    return CriticalMass(
        kl_coef=kl_coef,
        family=int(families[0]),
        runs=int(used.sum()),
        seeds=np.unique(points.seed[used]).size,
        recovered=int(recovered[used].sum()),
        curve=curve,
        no_curve=no_curve,
        gibbs_mass=gibbs_mass(points, kl_coef) if gibbs else None,
        seen=seen,
    )


def gibbs_mass(points: References, kl_coef: float) -> float:
    """The mass at which the references' own β_c crosses β: medians of the runs next to the crossing, on both sides."""
    apart = np.log(np.clip(points.half_mass_coefficient, 1e-6, 1e6) / kl_coef)
    near = np.abs(apart) < _NEAR
    below, above = near & (apart < 0), near & (apart >= 0)
    if not below.any() or not above.any():
        return math.nan
    nearest = [np.argsort(np.abs(np.where(side, apart, np.inf)))[: min(20, side.sum())] for side in (below, above)]
    return float(10 ** np.mean([np.median(np.log10(points.mass[which])) for which in nearest]))


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What theory says of an alignment before any is made.

    Attributes:
      gibbs: whether its optimum is the reference's Gibbs policy.
      draws_a_step: n, draws of the reference or policy that a step learns from; 0 where it learns from others.
      draws: n·T, different ones in all.
    """

    gibbs: bool
    draws_a_step: int
    draws: int


def predictions(alignment: AlignmentSettings, label_noise: float = 0.0) -> Predictions:
    """Of an algorithm. Flipped labels move the optimum of those that learn from preferences."""
    algorithm = ALGORITHMS[alignment.algorithm]
    gibbs = bool(algorithm.tends_to_gibbs(label_noise))
    if algorithm.data == "truth":
        return Predictions(gibbs, 0, 0)
    # A fixed set is gone through again and again.
    steps = min(alignment.num_steps, alignment.dataset_batches) if algorithm.data else alignment.num_steps
    return Predictions(gibbs, alignment.batch_size, alignment.batch_size * steps)


def levels_of(predicted: Predictions, kl_coef: float) -> dict[str, float]:
    """Where each boundary lies that an alignment has: log β_c, or log10 of the target mass."""
    levels = {"half_mass": math.log(kl_coef)} if predicted.gibbs else {}
    if predicted.draws:
        levels |= {"seen_at_once": -math.log10(predicted.draws_a_step), "seen_ever": -math.log10(predicted.draws)}
    return levels

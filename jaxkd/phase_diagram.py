"""Phase diagrams and what belongs to them: rates, paired tests and figures, from finished stores alone.

A store holds `capacity`, `temperature`, `kl_coef`, `seed`, `stage` and whatever else was varied as dimensions; see
`experiments/phase_diagram.py`. Recovery means that more than half of a model's draws lie on the target.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from jaxkd import files, pipelines, results, statistics
from jaxkd.align import ALGORITHMS, AlignmentSettings
from jaxkd.figures import ALGORITHM_LABELS, COLOURS, LABELS, MARKERS, STYLE, save
from jaxkd.metrics import RECOVERED_MASS

BASELINE, CHALLENGER = "kd_align", "align_kd"
_LARGEST_LOG_ODDS = 1e4  # above all that a small coefficient makes of a finite reward
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
      as `student_…` and `half_mass_coefficient` [cells].
    """
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
    student = dataset.sel(stage="student").drop_vars("stage")
    for name in ("target_recall", "bounded_recall", "target_mass"):
        summary[f"student_{name}"] = student[name].median("seed").transpose(*dims)
    # What holds for the student as a reference stands with the arm that was held to it.
    held_to_student = dataset.half_mass_coefficient.sel(stage=BASELINE).drop_vars("stage")
    summary["half_mass_coefficient"] = held_to_student.median("seed").transpose(*dims)
    return summary.assign_coords({name: dataset[name] for name in (*dims, "stage")})


def rows_of(summary: xr.Dataset) -> list[dict]:
    """One row a cell and arm: its settings, rate with Wilson's interval, and the test of the two orders there.

    `order_difference` is Align→KD's rate less KD→Align's, the same on the rows of all arms of a cell. Columns
    that end in `_failures_as_0` score failures as not recovered.
    """
    dims = [dim for dim in summary.difference.dims if dim not in ("stage",)]
    arms = [str(name) for name in summary.stage.values if name in (*pipelines.arms(), "aligned_base")]
    rows = []
    for place in itertools.product(*(range(summary.sizes[dim]) for dim in dims)):
        cell = summary.isel(dict(zip(dims, place, strict=True)))
        settings = {dim: cell[dim].item() for dim in dims}
        test = {"order_difference": float(cell.difference), "order_mcnemar_p": float(cell.p_value)}
        test["order_significant"] = bool(cell.significant)
        test["order_difference_failures_as_0"] = float(cell.difference_failures_as_0)
        test["order_mcnemar_p_failures_as_0"] = float(cell.p_value_failures_as_0)
        test["order_significant_failures_as_0"] = bool(cell.significant_failures_as_0)
        for arm in arms:
            one = cell.sel(stage=arm)
            rates = {name: float(one[name]) for name in ("recovery", "recovery_low", "recovery_high")}
            rates["recovery_failures_as_0"] = float(one.recovery_failures_as_0)
            row = settings | {"arm": arm} | rates | test
            rows.append({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()})
    return rows


def format_table(summary: xr.Dataset) -> str:
    """For a terminal: a line a setting, temperatures across; each cell KD→Align / Align→KD."""
    dims = [dim for dim in summary.difference.dims if summary.sizes[dim] > 1]
    across = "temperature" if "temperature" in dims else (dims or list(summary.difference.dims))[-1]
    down = [dim for dim in summary.difference.dims if dim != across and (summary.sizes[dim] > 1 or dim == "kl_coef")]
    down = [*(dim for dim in down if dim != "capacity"), *(dim for dim in down if dim == "capacity")]
    fixed = [dim for dim in summary.difference.dims if dim not in (across, *down)]
    one = summary.isel(dict.fromkeys(fixed, 0))
    heads = [f"{_told(value)}" for value in one[across].values]
    lines = ["recovered after KD→Align / after Align→KD; * differ at a false-discovery rate of 0.05"]
    lines.append("  ".join(f"{name:>16}" for name in down) + f"  {across}: " + "".join(f"{h:>12}" for h in heads))
    for place in itertools.product(*(range(one.sizes[dim]) for dim in down)):
        row = one.isel(dict(zip(down, place, strict=True)))
        told = "  ".join(f"{_told(row[dim].item()):>16}" for dim in down)
        cells = [
            f"{a:.2f}/{b:.2f}{'*' if star else ' '}"
            for a, b, star in zip(
                row.recovery_baseline.values, row.recovery_challenger.values, row.significant.values, strict=True
            )
        ]
        lines.append(told + " " * (len(across) + 4) + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _told(value) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def verdict(summary: xr.Dataset) -> str:
    """What the cells say; students of one component, which fail for a reason of their own, are told apart."""
    several = summary.sel(capacity=summary.capacity > 1) if (summary.capacity > 1).any() else summary
    gain, loss = (int((several.significant & (sign * several.difference > 0)).sum()) for sign in (1, -1))
    either = int((np.fmax(several.recovery_baseline, several.recovery_challenger) > 0.5).sum())
    told = (
        f"Align→KD recovers more often than KD→Align in {gain} of {several.difference.size} cells and less often "
        f"in {loss} (McNemar, false-discovery rate 0.05); in {either} cells at least one order recovers in "
        "more than half of the seeds."
    )
    if several.difference.size == summary.difference.size:
        return told
    lone = summary.sel(capacity=1)
    gain, loss = (int((lone.significant & (sign * lone.difference > 0)).sum()) for sign in (1, -1))
    return f"{told} (K = 1, set apart: more often in {gain} of {lone.difference.size}, less often in {loss}.)"


def verdict_on_failures(summary: xr.Dataset) -> str:
    """What the cells say when failures are scored as not recovered."""
    gain, loss = (
        int((summary.significant_failures_as_0 & (sign * summary.difference_failures_as_0 > 0)).sum())
        for sign in (1, -1)
    )
    return (
        f"With failures as not recovered Align→KD recovers more often in {gain} of {summary.difference.size} cells and "
        f"less often in {loss}."
    )


_FEWEST_BASES = 5  # of either kind, for their rates to be told


def verdict_on_bases(dataset: xr.Dataset) -> list[str]:
    """How many bases merge or miss a mode, and how each order fares on those and on the others at the lowest τ."""
    share = f"Bases that merge or miss a mode: {100 * float(dataset.base_failed.mean()):.1f} % (kept)."
    coldest = float(dataset.temperature.min())
    told = [share]
    for at, _ in _settings(dataset, [dim for dim in dataset.base_failed.dims if dim not in ("capacity", "seed")]):
        at |= {"capacity": dataset.capacity.values[0]}
        bad = dataset.base_failed.sel(at).values
        if min(bad.sum(), (~bad).sum()) < _FEWEST_BASES:
            continue
        mass = dataset.target_mass.sel(at | {"temperature": coldest})
        recovered = xr.where(mass.notnull(), mass > RECOVERED_MASS, np.nan)
        rates = "; ".join(
            f"β = {kl_coef:g}: "
            + ", ".join(
                f"{label} {_rate(recovered, bad, kl_coef, arm)} / {_rate(recovered, ~bad, kl_coef, arm)}"
                for arm, label in (("kd_align", "KD→Align"), ("align_kd", "Align→KD"))
            )
            for kl_coef in dataset.kl_coef.values
        )
        varied = ", ".join(
            f"{dim} {_told(value)}" for dim, value in at.items() if dataset.sizes[dim] > 1 and dim != "capacity"
        )
        told.append(
            f"{varied or 'Here'}: {int(bad.sum())} of {bad.size} bases; recovered at τ = {coldest:g} on those / on the "
            f"others: {rates}."
        )
    return told


def _rate(recovered: xr.DataArray, bases: np.ndarray, kl_coef: float, arm: str) -> str:
    """Share of the seeds with these bases."""
    return f"{float(recovered.sel(kl_coef=kl_coef, stage=arm).values[bases].mean()):.2f}"


# --- critical mass ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """Alignments at one KL coefficient, one point a run.

    Attributes:
      mass: measured target mass of the reference, floored at `SMALLEST_MASS`, [runs].
      log_odds: of the target under the reference's exact Gibbs policy, [runs].
      half_mass_coefficient: β_c of the reference, [runs].
      outcome: target mass of the aligned policy, [runs].
      failed: [runs].
      seed: [runs].
      is_base: whether the reference was the base (else a student), [runs].
    """

    mass: np.ndarray
    log_odds: np.ndarray
    half_mass_coefficient: np.ndarray
    outcome: np.ndarray
    failed: np.ndarray
    seed: np.ndarray
    is_base: np.ndarray


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
        np.maximum(other.target_mass.values, SMALLEST_MASS),
        one.gibbs_target_log_odds.values,
        one.half_mass_coefficient.values,
        one.target_mass.values,
        one.failed.values.astype(bool),
        seeds.values,
        np.full(seeds.shape, reference == "base"),
    )
    return tuple(column.ravel() for column in columns)


@dataclass(frozen=True)
class CriticalMass:
    """Where recovery tips at one KL coefficient.

    Attributes:
      kl_coef: β.
      by_mass: recovery against log10 of the reference's target mass.
      by_log_odds: recovery against the Gibbs policy's log-odds, whose own boundary is 0.
      gibbs_mass: the target mass at which the references' β_c equals β; NaN where there are not some near it on either
        side, None where the Gibbs policy is not what the alignment tends to.
      seen: smallest and largest log10 mass of a reference.
    """

    kl_coef: float
    by_mass: statistics.RecoveryCurve
    by_log_odds: statistics.RecoveryCurve
    gibbs_mass: float | None
    seen: tuple[float, float]

    def __str__(self):
        curve = self.by_mass
        if self.is_seen:
            low, high = (f"{10.0**end:.2g}" for end in np.clip(curve.critical_interval, -300, 300))
            found = f"critical mass {10**curve.critical:.2g} (95 % interval {low} to {high})"
        else:
            found = f"no critical mass ({self._why_not})"
        told = f"β = {self.kl_coef:g}: {found} over {curve.runs} runs of {curve.clusters} seeds"
        if self.gibbs_mass is None:
            return told
        return f"{told}; Gibbs says " + (
            f"{self.gibbs_mass:.2g}" if math.isfinite(self.gibbs_mass) else "outside what was seen"
        )

    @property
    def is_seen(self) -> bool:
        """Whether the critical mass lies among those of the references: a curve's extrapolation says nothing."""
        return self.seen[0] <= self.by_mass.critical <= self.seen[1]

    @property
    def _why_not(self) -> str:
        if math.isnan(self.by_mass.critical):
            return "recovery does not rise with the mass"
        return "all masses seen suffice" if self.by_mass.critical < self.seen[0] else "no mass seen suffices"


def critical_mass(points: References, kl_coef: float, num_resamples: int = 399, gibbs: bool = True) -> CriticalMass:
    """Fit recovery against the reference's mass by penalised logistic regression, seeds as clusters.

    Args:
      points: from `references`.
      kl_coef: β.
      num_resamples: of the bootstrap.
      gibbs: whether the Gibbs policy is the alignment's optimum (`Predictions.gibbs`), and so predicts a mass.
    """
    recovered = points.outcome > RECOVERED_MASS
    log_odds = np.clip(points.log_odds, -_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS)
    masses = np.log10(points.mass)
    used = masses[~points.failed & np.isfinite(masses)]

    def fit(abscissa):
        return statistics.recovery_curve(
            abscissa, recovered, points.seed, num_resamples=num_resamples, failed=points.failed
        )

    seen = (float(used.min()), float(used.max())) if used.size else (math.nan, math.nan)
    predicted = gibbs_mass(points, kl_coef) if gibbs else None
    return CriticalMass(kl_coef, fit(masses), fit(log_odds), predicted, seen)


def gibbs_mass(points: References, kl_coef: float) -> float:
    """The mass at which the references' own β_c crosses β: medians of the runs next to the crossing, on both sides."""
    apart = np.log(np.clip(points.half_mass_coefficient, 1e-6, 1e6) / kl_coef)
    near = np.abs(apart) < _NEAR
    below, above = near & (apart < 0), near & (apart >= 0)
    if not below.any() or not above.any():
        return math.nan
    nearest = [np.argsort(np.abs(np.where(side, apart, np.inf)))[: min(20, side.sum())] for side in (below, above)]
    return float(10 ** np.mean([np.median(np.log10(points.mass[which])) for which in nearest]))


# --- Figure 1: the plane ---------------------------------------------------------------------------------------------

_WIDTH = 7.2  # inches, of a page: what is drawn larger is printed with smaller letters
_BOUNDARIES = {
    "half_mass": (
        "white",
        "-",
        "β$_c$ = β: the student's Gibbs\npolicy has half its mass on target\n(a, b: β beside the line)",
    ),
    "seen_at_once": ("#F0E442", (0, (3, 2)), "n·m = 1: a hit is expected\nin the first step"),
    "seen_ever": ("#F0E442", (0, (1, 1.5)), "n·T·m = 1: a hit is expected at all"),
}
_STUDENT_PANELS = (
    ("student_target_recall", "student: target recall", "median over seeds (nat)"),
    ("student_bounded_recall", "student: bounded recall", "median over seeds"),
)
_PANELS = (
    ("recovery_baseline", "recovered, KD→Align", "cividis", (0.0, 1.0)),
    ("recovery_challenger", "recovered, Align→KD", "cividis", (0.0, 1.0)),
    ("difference", "Align→KD − KD→Align", "PuOr_r", (-1.0, 1.0)),
)


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


def draw_plane(summary: xr.Dataset, predicted: Predictions, *paths: Path, title: str = "") -> None:
    """Draw the phase diagram: the student, whom no KL coefficient touches, then a row of panels for each coefficient.

    Args:
      summary: from `summarise`, over kl_coef, capacity and temperature alone.
      predicted: which boundaries there are, and where.
      paths: files to write; their endings choose the formats.
      title: what the runs share.
    """
    kl_coefs = [float(value) for value in summary.kl_coef.values]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(_WIDTH, 3.3 + 2.1 * len(kl_coefs)), layout="constrained")
        figure.suptitle(title, fontsize=8)
        grid = figure.add_gridspec(1 + len(kl_coefs), len(_PANELS))
        first = [figure.add_subplot(grid[0, i]) for i in range(len(_STUDENT_PANELS))]
        rows = [[figure.add_subplot(grid[1 + i, j]) for j in range(len(_PANELS))] for i in range(len(kl_coefs))]
        drawn: set[str] = set()
        for axis, (name, head, unit) in zip(first, _STUDENT_PANELS, strict=True):
            image = _plane(axis, summary.isel(kl_coef=0)[name], "viridis", None)
            axis.set_title(head)
            figure.colorbar(image, ax=axis, location="bottom", label=unit, aspect=30)
            drawn |= _boundaries_of_students(axis, summary, predicted)
        for row, kl_coef in zip(rows, kl_coefs, strict=True):
            one = summary.sel(kl_coef=kl_coef)
            for axis, (name, head, colours, limits) in zip(row, _PANELS, strict=True):
                image = _plane(axis, one[name], colours, limits)
                axis.set_title(head)
                drawn |= _boundaries(axis, one, _levels(predicted, kl_coef))
                axis.label_outer(remove_inner_ticks=True)
            _marks(row[-1], one)
            row[0].set_ylabel(f"β = {kl_coef:g}\ncapacity K of the student")
        first[0].set_ylabel("capacity K of the student")
        for axis in (*first, *rows[-1]):
            axis.set_xlabel("distillation temperature τ")
        both, apart = [row[:2] for row in rows], [row[2] for row in rows]
        for axes, label in ((np.ravel(both), "share of seeds recovered"), (apart, "difference of the shares")):
            figure.colorbar(
                axes[0].collections[0],
                ax=axes,
                location="bottom",
                label=label,
                shrink=0.95,
                aspect=30 if axes is apart else 65,
            )
        _letter((*first, *np.ravel(rows)))
        beside = figure.add_subplot(grid[0, -1])
        beside.axis("off")
        legend = beside.legend(
            *_legend(drawn, predicted), loc="upper left", bbox_to_anchor=(-0.14, 1.1), frameon=False, handlelength=2.4
        )
        legend.set_in_layout(False)  # else its column would be wider than the others
        save(figure, paths)


def _letter(axes: Iterable) -> None:
    """Name the panels that are seen, in the order given: a to z, then aa."""
    names = itertools.chain.from_iterable(map("".join, itertools.product(ascii_lowercase, repeat=n)) for n in (1, 2))
    for axis, name in zip((axis for axis in axes if axis.get_visible()), names, strict=False):
        axis.set_title(name, loc="left", fontweight="bold")


def _heights(capacity: np.ndarray) -> np.ndarray:
    """Where each capacity's row of cells lies: K = 1, which fails for a reason of its own, is set apart."""
    return np.arange(len(capacity)) + np.where(capacity > 1, 0.4 * (capacity.min() == 1), 0.0)


def _plane(axis, values: xr.DataArray, colours: str, limits):
    capacity = values.capacity.values
    values = values.transpose("capacity", "temperature").sortby("temperature", ascending=False)
    data = values.values
    low, high = limits or _range(data)
    norm = TwoSlopeNorm(0.0, low, high) if limits and low < 0 < high else plt.Normalize(low, high)
    edges = np.arange(data.shape[1] + 1) - 0.5
    for height, line in zip(_heights(capacity), data, strict=True):
        image = axis.pcolormesh(
            edges, [height - 0.5, height + 0.5], line[None, :], cmap=colours, norm=norm, rasterized=True
        )
    axis.set_yticks(_heights(capacity), [f"{k}" for k in capacity])
    axis.set_xticks(range(data.shape[1]), [f"{t:g}" for t in values.temperature.values], rotation=60)
    axis.spines[:].set_visible(False)
    # Cells may be as white as the page.
    for block in (capacity == 1, capacity > 1):
        if block.any():
            corner, height = (-0.5, _heights(capacity)[block].min() - 0.5), block.sum()
            axis.add_patch(Rectangle(corner, data.shape[1], height, fill=False, lw=0.5, ec="0.3", clip_on=False))
    return image


def _range(data: np.ndarray) -> tuple[float, float]:
    """Of a colour bar, which has one even where all values are equal."""
    low, high = float(np.nanmin(data)), float(np.nanmax(data))
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _levels(predicted: Predictions, kl_coef: float) -> dict[str, float]:
    """Where each boundary lies that an alignment has: log β_c, or log10 of the target mass."""
    levels = {"half_mass": math.log(kl_coef)} if predicted.gibbs else {}
    if predicted.draws:
        levels |= {"seen_at_once": -math.log10(predicted.draws_a_step), "seen_ever": -math.log10(predicted.draws)}
    return levels


def _boundaries(axis, one: xr.Dataset, levels: Mapping[str, float], note: str = "") -> set[str]:
    """Draw contours at which the median student beyond K = 1 crosses what theory says; returns which there are."""
    ordered = one.sortby("temperature", ascending=False).transpose("capacity", "temperature", ...)
    beyond = ordered.sel(capacity=ordered.capacity > 1)
    drawn: set[str] = set()
    if min(beyond.sizes["capacity"], beyond.sizes["temperature"]) < 2:
        return drawn
    heights = _heights(one.capacity.values)[one.capacity.values > 1]
    mass = np.log10(np.maximum(beyond.student_target_mass.values, SMALLEST_MASS))
    coefficient = np.log(np.clip(beyond.half_mass_coefficient.values, 1e-3, 1e3))
    for name, level in levels.items():
        values = coefficient if name == "half_mass" else mass
        colour, line, _ = _BOUNDARIES[name]
        if np.nanmin(values) < level < np.nanmax(values):
            drawn.add(name)
            # Unbroken dark under broken light shows on every colour.
            for shade, width, broken in (("black", 2.6, "-"), (colour, 1.3, line)):
                contour = axis.contour(
                    np.arange(mass.shape[1]), heights, values, levels=[level], colors=shade, linewidths=width,
                    linestyles=[broken],
                )  # fmt: skip
            if note:
                x, y = max(np.concatenate(contour.allsegs[0]), key=lambda point: point[1])
                side = "left" if x < 0.7 * mass.shape[1] else "right"
                edge = [withStroke(linewidth=2, foreground="black")]
                axis.annotate(
                    note, (x, y), (4 if side == "left" else -4, 1), textcoords="offset points", color="white",
                    fontsize=7, ha=side, va="center", path_effects=edge,
                )  # fmt: skip
    return drawn


def _boundaries_of_students(axis, summary: xr.Dataset, predicted: Predictions) -> set[str]:
    """Those that no coefficient moves once, the others for each coefficient, which stands beside them."""
    drawn: set[str] = set()
    for place, kl_coef in enumerate(summary.kl_coef.values):
        levels = _levels(predicted, float(kl_coef))
        half = {name: level for name, level in levels.items() if name == "half_mass"}
        drawn |= _boundaries(axis, summary.sel(kl_coef=kl_coef), half, f"{kl_coef:g}")
        if place == 0:
            drawn |= _boundaries(axis, summary.sel(kl_coef=kl_coef), {k: v for k, v in levels.items() if k not in half})
    return drawn


_MARKS = {1: {"mfc": "black", "mec": "white"}, -1: {"mfc": "white", "mec": "black"}}
"""How a cell that passes is marked, by the sign of its difference: its colour's is lost without colour."""


def _marks(axis, one: xr.Dataset) -> None:
    ordered = one[["significant", "difference"]].transpose("capacity", "temperature")
    ordered = ordered.sortby("temperature", ascending=False)
    for sign, look in _MARKS.items():
        rows, columns = np.nonzero(ordered.significant.values & (sign * ordered.difference.values > 0))
        axis.plot(columns, _heights(one.capacity.values)[rows], "o", mew=0.6, ms=3.5, **look)


def _legend(drawn: set[str], predicted: Predictions) -> tuple[list, list[str]]:
    """The boundaries that there are, edged as in the panels; one that the plane does not hold is said to be so."""
    handles, labels = [], []
    for name, (colour, line, text) in _BOUNDARIES.items():
        if name in drawn:
            handles.append((Line2D([], [], color="black", lw=2.6), Line2D([], [], color=colour, ls=line, lw=1.3)))
            labels.append(text)
        elif name in _levels(predicted, 1.0):
            handles.append(Line2D([], [], ls=""))
            labels.append(f"not within this plane:\n{text}")
    handles += [Line2D([], [], marker="o", ms=3.5, mew=0.6, ls="", **look) for look in _MARKS.values()]
    rate = "(false-discovery rate 0.05)"
    return handles, [*labels, f"Align→KD recovers more often\n{rate}", f"less often {rate}"]


# --- Figure 2: the critical mass -------------------------------------------------------------------------------------


def draw_critical_mass(
    by_coefficient: Mapping[float, tuple[References, CriticalMass]],
    predicted: Predictions,
    *paths: Path,
    title: str = "",
) -> None:
    """Draw recovery against the reference's measured target mass, and against the exact Gibbs log-odds.

    Args:
      by_coefficient: by KL coefficient, from `references` and `critical_mass`.
      predicted: which boundaries there are, and where.
      paths: files to write; their endings choose the formats.
      title: what the runs share.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2,
            len(by_coefficient),
            figsize=(_width(len(by_coefficient)), 5.9),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(title, fontsize=8)
        for (upper, lower), (kl_coef, (points, found)) in zip(axes.T, by_coefficient.items(), strict=True):
            upper.set_title(f"β = {kl_coef:g} ({found.by_mass.runs} runs of {found.by_mass.clusters} seeds)")
            _curve(upper, np.log10(points.mass), points, found.by_mass)
            upper.set_xlabel("log₁₀ of the reference's measured target mass m")
            if predicted.gibbs and found.gibbs_mass is not None and math.isfinite(found.gibbs_mass):
                upper.axvline(math.log10(found.gibbs_mass), color="black", ls="--", lw=1.2)
            if predicted.draws:
                upper.axvline(-math.log10(predicted.draws_a_step), color="#009E73", ls="-.", lw=1.2)
                upper.axvline(-math.log10(predicted.draws), color="#009E73", ls=":", lw=1.2)
            _curve(lower, np.clip(points.log_odds, -_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS), points, found.by_log_odds)
            if predicted.gibbs:
                lower.axvline(0.0, color="black", ls="--", lw=1.2)
            lower.set_xlabel("log-odds of the target under the\nreference's Gibbs policy (nat)")
        for row in axes:
            row[0].set_ylabel("target mass after alignment (points),\nprobability of recovery (curve)")
        _letter(axes.ravel())
        half = "where half recover, 95 % interval\n(upper row: the critical mass)"
        lines = {
            "half_mass": Line2D([], [], color="black", ls="--", lw=1.2, label="Gibbs prediction (β$_c$ = β)"),
            "seen_at_once": Line2D(
                [], [], color="#009E73", ls="-.", lw=1.2, label="n·m = 1: a hit is expected\nin the first step"
            ),
            "seen_ever": Line2D([], [], color="#009E73", ls=":", lw=1.2, label="n·T·m = 1: a hit is expected at all"),
        }
        figure.legend(
            handles=[
                Line2D([], [], ls="", **_STUDENT, label="reference: student (K > 1)"),
                Line2D([], [], ls="", **_BASE, label="reference: base"),
                Line2D([], [], color="black", lw=1.6, label="penalised logistic curve,\n95 % band (seeds as clusters)"),
                Line2D([], [], color="#CC79A7", lw=1.6, label=half),
                *(lines[name] for name in _levels(predicted, 1.0)),
            ],
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        save(figure, paths)


_STUDENT = {"marker": "o", "color": COLOURS["kd_align"], "ms": 2.8, "mew": 0, "alpha": 0.4}
_BASE = {"marker": "^", "color": COLOURS["align_kd"], "ms": 5, "mec": "black", "mew": 0.5}


def _curve(axis, abscissa: np.ndarray, points: References, curve: statistics.RecoveryCurve) -> None:
    # The few bases above the many students.
    for is_base, look in ((False, _STUDENT), (True, _BASE)):
        shown = (points.is_base == is_base) & ~points.failed
        axis.plot(abscissa[shown], points.outcome[shown], ls="", **look, rasterized=True)
    used = abscissa[~points.failed & np.isfinite(abscissa)]
    line = np.linspace(used.min(), used.max(), 300)
    low, high = curve.band(line)
    axis.fill_between(line, low, high, color="black", alpha=0.18, lw=0)
    axis.plot(line, curve.probability(line), color="black", lw=1.6)
    axis.axhline(RECOVERED_MASS, color="black", lw=0.5, ls=":")
    if line[0] <= curve.critical <= line[-1]:
        axis.axvline(curve.critical, color="#CC79A7", lw=1.6)
        axis.axvspan(*np.clip(curve.critical_interval, line[0], line[-1]), color="#CC79A7", alpha=0.3, lw=0)
    axis.set_ylim(-0.04, 1.04)


# --- readers' questions: recovery along one axis ---------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How the store of a preset is drawn.

    Attributes:
      along: the dimension on the abscissa.
      label: what it is, with its unit.
      logarithmic: whether the abscissa is.
      styles: a dimension of two values that are told apart by the line, filled and hollow markers.
      also: quantities shown in rows of their own, by name: ("target_balance", ...).
    """

    along: str
    label: str
    logarithmic: bool = False
    styles: str | None = None
    also: tuple[str, ...] = ()


VIEWS = {
    "noise": View("label_noise", "share of preference labels flipped"),
    "two-targets": View("temperature", "distillation temperature τ", styles="num_targets", also=("target_balance",)),
    "rescue": View("temperature", "distillation temperature τ"),
    "target-weight": View("target_weight", "weight of the target in p*", logarithmic=True),
    "base-data": View("base_samples", "points that the base was fitted to", logarithmic=True, also=("base_failed",)),
    "base-em": View("temperature", "distillation temperature τ", styles="starts"),
    "reward": View("reward_name", "reward"),
    "cost": View("capacity", "capacity K of the student", styles="match_component_evaluations"),
}

_STYLE_LABELS = {
    "num_targets": "targets: {}".format,
    "starts": "EM starts of the base: {}".format,
    "match_component_evaluations": {"False": "same updates", "True": "same component evaluations"}.get,
}
_ALSO_LABELS = {
    "target_balance": "smallest / largest target\nmass (median of recovered)",
    "base_failed": "share of bases that\nmerge or miss a mode",
}
_FEW = 8  # a median of fewer runs says how many they are


def draw_along(dataset: xr.Dataset, summary: xr.Dataset, view: View, *paths: Path) -> None:
    """Draw recovery with Wilson's intervals along one axis: a column a coefficient, a row a remaining setting."""
    arms = [name for name in ("aligned_base", *pipelines.arms()) if name in summary.stage.values]
    taken = {view.along, view.styles, "kl_coef", "stage"}
    rest = [dim for dim in summary.recovery.dims if dim not in taken]
    rows = [dict(zip(rest, values, strict=True)) for values in itertools.product(*(summary[d].values for d in rest))]
    told = [dim for dim in rest if summary.sizes[dim] > 1]
    columns = summary.kl_coef.values
    # A quantity has a panel for each setting that it depends on, and no more.
    below = [
        (quantity, dict(own))
        for quantity in view.also
        for own in dict.fromkeys(
            tuple((dim, value) for dim, value in row.items() if dim in dataset[quantity].dims) for row in rows
        )
    ]
    count = len(rows) + len(below)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            count,
            len(columns),
            figsize=(_width(len(columns)), 1.9 * count + 1.4),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(f"{_title(dataset)} · bars: Wilson 95 %", fontsize=8)

        def name_of(row):
            return "".join(f"{_SHORT.get(dim, dim)} {_name_of(row[dim])}\n" for dim in told if dim in row)

        for place, row in enumerate(rows):
            for axis, kl_coef in zip(axes[place], columns, strict=True):
                _recovery_lines(axis, summary.sel({**row, "kl_coef": kl_coef}), view, arms)
                axis.set_ylim(-0.04, 1.04)
                if place == 0:
                    axis.set_title(f"β = {kl_coef:g}")
            axes[place, 0].set_ylabel(f"{name_of(row)}share of seeds recovered")
        for line, (quantity, row) in zip(axes[len(rows) :], below, strict=True):
            quantities = _shown(dataset, quantity)
            varies = "kl_coef" in quantities.dims
            for axis, kl_coef in zip(line, columns, strict=True):
                if not varies and axis is not line[0]:
                    axis.set_visible(False)
                    continue
                values = quantities.sel({**row, "kl_coef": kl_coef} if varies else row)
                _quantity_lines(axis, values, view, arms)
                axis.set_ylim(-0.04, 1.04)
            line[0].set_ylabel(f"{name_of(row)}{_ALSO_LABELS[quantity]}" + ("" if varies else "\n(any β)"))
        for column in axes.T:
            lowest = [axis for axis in column if axis.get_visible()][-1]
            lowest.tick_params(labelbottom=True)
            lowest.set_xlabel(view.label)
        _letter(axes.ravel())
        handles = _arm_handles(arms, summary, view)
        ncols = 2 if len(columns) == 1 else 3 if len(handles) <= 6 else 4
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3)
        save(figure, paths)


def _width(columns: int) -> float:
    """Inches: that of a page, unless there are too few panels for it or too many."""
    return 4.4 if columns == 1 else max(_WIDTH, 2.3 * columns)


_TITLES = {
    "algorithm": lambda value: _name_of(value),
    "reward_name": "reward: {}".format,
    "capacity": lambda value: f"K = {_told(value)}",
    "temperature": lambda value: f"τ = {_told(value)}",
    "target_weight": lambda value: f"target weight {_told(value)}",
    "label_noise": lambda value: f"{_told(value)} of labels flipped",
}


def _title(dataset: xr.Dataset) -> str:
    """What all runs share: axes of one value, and how many seeds there are."""
    shared = [
        told(dataset[name].item()) for name, told in _TITLES.items() if name in dataset and dataset[name].size == 1
    ]
    return " · ".join([*shared, f"{dataset.sizes['seed']} seeds"])


def _shown(dataset: xr.Dataset, quantity: str) -> xr.DataArray:
    """A quantity, NaN where it says nothing: how even the targets are is a question where they are reached at all."""
    if quantity != "target_balance":
        return dataset[quantity]
    return dataset[quantity].where((dataset.target_mass > RECOVERED_MASS) & (dataset.failed == 0))


_SHORT = {"temperature": "τ =", "algorithm": "", "capacity": "K =", "target_weight": "weight"}


def _name_of(value) -> str:
    text = _told(value)
    return ALGORITHM_LABELS.get(text, text).replace("\n", " ")


def _abscissa(values: np.ndarray) -> np.ndarray:
    return np.arange(len(values)) if values.dtype.kind not in "biuf" else values.astype(float)


def _line_width(one, view: View) -> float:
    """No line between names: there is nothing from one to the next."""
    return 1.0 if one[view.along].dtype.kind in "biuf" else 0.0


def _style_values(one, view: View) -> Iterator[tuple[dict, dict]]:
    """Selections by the value of the style's dimension, each with how its line looks."""
    if view.styles is None or view.styles not in one.dims:
        yield {}, {"ls": "-"}
        return
    for index, value in enumerate(one[view.styles].values):
        yield {view.styles: value}, ({"ls": "-"} if index == 0 else {"ls": "--", "mfc": "white"})


def _lines(one, view: View, arms, x: np.ndarray) -> Iterator[tuple[str, dict, dict, np.ndarray]]:
    """Arm, selection, look and abscissae of every line of a panel."""
    styles = list(_style_values(one, view))
    shown = iter(_nudged(x, len(arms) * len(styles), view.logarithmic))
    for arm in arms:
        size = 4 if len(styles) == 1 else 3.3
        look = {"color": COLOURS[arm], "marker": MARKERS[arm], "ms": size, "lw": _line_width(one, view)}
        for chosen, style in styles:
            yield arm, chosen, look | style, next(shown)


def _recovery_lines(axis, one: xr.Dataset, view: View, arms) -> None:
    x = _abscissa(one[view.along].values)
    order = np.argsort(x)
    for arm, chosen, look, shown in _lines(one, view, arms, x):
        line = one.sel(chosen).sel(stage=arm)
        rate, low, high = (line[n].values[order] for n in ("recovery", "recovery_low", "recovery_high"))
        ends = [np.maximum(rate - low, 0), np.maximum(high - rate, 0)]
        axis.errorbar(shown[order], rate, yerr=ends, elinewidth=0.6, **look)
    _ticks(axis, one, view, x)


def _quantity_lines(axis, one: xr.DataArray, view: View, arms) -> None:
    x = _abscissa(one[view.along].values)
    order = np.argsort(x)
    if "stage" not in one.dims:
        for chosen, style in _style_values(one, view):
            values = one.sel(chosen).mean("seed").values.ravel()[order]
            axis.plot(x[order], values, color="black", marker="x", ms=4, lw=1.0, **style)
    else:
        empty = True
        for arm, chosen, look, shown in _lines(one, view, arms, x):
            if chosen.get("num_targets") == 1:  # one target is as large as itself
                continue
            line = one.sel(chosen).sel(stage=arm)
            count, values = line.notnull().sum("seed").values[order], line.median("seed").values[order]
            axis.plot(shown[order], values, **look)
            for at, value, few in zip(shown[order], values, count, strict=True):
                if 0 < few < _FEW:
                    axis.annotate(
                        f"{few}", (at, value), (0, 4), textcoords="offset points", ha="center", fontsize=7,
                        color=look["color"],
                    )  # fmt: skip
            empty &= not count.any()
        if empty:
            axis.text(0.5, 0.5, "no run recovered", transform=axis.transAxes, ha="center", va="center")
    _ticks(axis, one, view, x)


def _nudged(x: np.ndarray, count: int, logarithmic: bool) -> np.ndarray:
    """Abscissae of so many lines, [count, points]: side by side, so that no marker hides another of the same height."""
    at = np.log10(x) if logarithmic else x
    gaps = np.diff(np.sort(at))
    step = min(0.02 * np.ptp(at), 0.8 * gaps.min() / count) if gaps.size else 0.06 / count
    shifted = at + step * (np.arange(count)[:, None] - (count - 1) / 2)
    return 10**shifted if logarithmic else shifted


def _ticks(axis, one, view: View, x: np.ndarray) -> None:
    if view.logarithmic:
        axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(x, [_told(value) for value in one[view.along].values], rotation=45 if len(x) > 4 else 0)
    if view.along == "temperature":
        margin = max(0.04, 0.08 * np.ptp(x))
        axis.set_xlim(max(x) + margin, min(x) - margin)


def _arm_handles(arms, summary, view: View) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLOURS[arm], marker=MARKERS[arm], ms=4, label=LABELS[arm].replace("\n", " "))
        for arm in arms
    ]
    for chosen, style in _style_values(summary, view):
        if chosen:
            label = _STYLE_LABELS[view.styles](_told(chosen[view.styles]))
            handles.append(Line2D([], [], color="black", marker="o", ms=4, lw=1.0, label=label, **style))
    if "target_balance" in view.also:
        handles.append(Line2D([], [], ls="", label=f"numbers: recovered runs, where fewer than {_FEW}"))
    return handles


# --- everything of a store -------------------------------------------------------------------------------------------


def report(stores: Mapping[str, xr.Dataset], folder: Path) -> str:
    """Draw all figures of a finished sweep into a folder, write its table (CSV, text) and say what it means.

    Args:
      stores: "sweep", and for the plane "more_weights", opened.
      folder: where figures and tables go.

    Raises:
      ValueError: when there is no store named "sweep", one is not finished, or the other is of another sweep.
    """
    if "sweep" not in stores:
        raise ValueError(f"{folder} holds no store sweep.zarr; it holds {', '.join(stores) or 'none'}")
    for name, dataset in stores.items():
        if not bool((dataset.done == 1).all()):
            raise ValueError(f"{name}.zarr is not finished: repeat the command that made it")
    dataset = stores["sweep"].drop_vars("done").load()
    configuration = json.loads(dataset.attrs["configuration"])
    _check_same(configuration, stores)
    preset = configuration["preset"]
    summary = summarise(dataset)
    results.write_csv(rows_of(summary), folder / f"{preset}.csv")
    told = [format_table(summary)]
    if preset == "plane":
        told += _report_plane(dataset, summary, stores, configuration, folder)
    else:
        draw_along(dataset, summary, VIEWS[preset], *_paths(folder, preset))
        told += ["", verdict(summary), *verdict_on_bases(dataset)]
    failed = int(dataset.failed.sum())
    told.append(f"Models that failed numerically: {failed} (their pairs leave both rates).")
    told += [verdict_on_failures(summary)] if failed else []
    (folder / f"{preset}.txt").write_text("\n".join(told) + "\n")
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".pdf", ".csv", ".txt", ".zarr"))
    return "\n".join([*told, f"In {folder}: {', '.join(names)}"])


_MAY_DIFFER = ("target_weights", "capacities", "zips", "block shape", "grid fingerprint")
"""What stores may differ in, beside the values of their axes, whose references are put into one picture."""


def _of_the_runs(configuration: Mapping) -> dict:
    """What single runs depend on; values of axes are also there under the names of their flags."""
    return {
        key: value for key, value in configuration.items() if key not in _MAY_DIFFER and not key.startswith("axis ")
    }


def _check_same(configuration: Mapping, stores: Mapping[str, xr.Dataset]) -> None:
    for name, dataset in stores.items():
        other = json.loads(dataset.attrs["configuration"])
        differing = files.differences(_of_the_runs(other), _of_the_runs(configuration))
        if differing:
            raise ValueError(
                f"{name}.zarr is of another sweep ({'; '.join(differing)}): move it away, or repeat the command with "
                "--overwrite"
            )


def _report_plane(dataset, summary, stores, configuration, folder: Path) -> list[str]:
    inner = ("kl_coef", "capacity", "temperature")
    others = [dim for dim in summary.difference.dims if dim not in inner]
    for at, suffix in _settings(summary, others):
        predicted, title = _predictions(at, configuration), _title(dataset.sel(at))
        draw_plane(summary.sel(at), predicted, *_paths(folder, f"phase_diagram{suffix}"), title=title)
    beside = [other.drop_vars("done").load() for name, other in stores.items() if name != "sweep"]
    told = ["", verdict(summary)]
    # Target weights make the references differ in mass: all of them are in one picture.
    for at, suffix in _settings(summary, [dim for dim in others if dim != "target_weight"]):
        found, predicted = {}, _predictions(at, configuration)
        for kl_coef in dataset.kl_coef.values:
            runs = references([one.sel(at) for one in (dataset, *beside)], kl_coef)
            found[float(kl_coef)] = (runs, critical_mass(runs, float(kl_coef), gibbs=predicted.gibbs))
        weights = sorted({float(weight) for one in (dataset, *beside) for weight in one.target_weight.values})
        title = f"{_name_of(at['algorithm'])} · target weights {', '.join(map(_told, weights))}"
        draw_critical_mass(found, predicted, *_paths(folder, f"critical_mass{suffix}"), title=title)
        where = f"{suffix[1:].replace('_', ', ')}: an" if suffix else "An"
        masses = "; ".join(str(one) for _, one in found.values())
        told.append(f"{where} alignment recovers in half of the runs at these masses. {masses}.")
    return told


def _settings(summary: xr.Dataset, dims: Sequence[str]) -> Iterator[tuple[dict, str]]:
    """Every combination of the values of some dimensions, with what tells its files apart."""
    for place in itertools.product(*(summary[dim].values for dim in dims)):
        at = dict(zip(dims, place, strict=True))
        yield at, "".join(f"_{_told(at[dim])}" for dim in dims if summary.sizes[dim] > 1)


def _predictions(at: Mapping, configuration: Mapping) -> Predictions:
    """Of the store's own settings, which need not be today's."""
    settings = AlignmentSettings(**(configuration["alignment"] | {"algorithm": str(at["algorithm"])}))
    matched = any(configuration["match_component_evaluations"])
    label_noise = float(at.get("label_noise", max(configuration["label_noise"])))
    predicted = predictions(settings, label_noise)
    # A smaller student then makes more updates than these, and has boundaries of its own.
    return replace(predicted, draws=0) if matched else predicted


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{ending}" for ending in ("png", "pdf")]

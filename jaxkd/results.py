"""From the laboratory's arrays to labelled results, and from those to the table that a reader wants."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import xarray as xr

from jaxkd import files, mixture, pipelines, statistics, theory
from jaxkd.align import ALGORITHMS
from jaxkd.laboratory import PREPARED, Measured, Outcome, Points, Prepared, by_stage, pad_components
from jaxkd.metrics import RECOVERED_MASS
from jaxkd.sweep.store import Label
from jaxkd.truth import Truth

DIMS = ("algorithm", "temperature", "kl_coef", "seed", "stage")

UNITS = {
    "reward": ("mean reward E[R]", "reward"),
    "objective": ("objective E[R] − β·KL(policy ‖ reference)", "reward"),
    "precision": ("precision E over the policy of log p*", "nat"),
    "recall": ("recall E over p* of log policy", "nat"),
    "target_precision": ("target precision E over the policy of log p_target", "nat"),
    "target_recall": ("target recall E over p_target of log policy", "nat"),
    "target_mass": ("target mass within Mahalanobis distance 3", "1"),
    "target_balance": ("smallest over largest target mass", "1"),
    "coverage": ("share of the modes of p* that are covered", "1"),
    "bounded_recall": ("probability over p* that log policy ≥ log p* − log 10", "1"),
    "kl_to_base": ("KL(policy ‖ base)", "nat"),
    "kl_to_reference": ("KL(policy ‖ reference)", "nat"),
    "target_variance": (
        "mean squared distance, an axis, of draws on a target from its mean, over the variance of its mode",
        "1",
    ),
    "mode_mass": ("mass of each mode's disc", "1"),
    "from_grid": ("measured by quadrature (else by Monte Carlo)", "1"),
    "failed": ("ended in numbers that are not finite", "1"),
    "first_hit_step": (
        "first step that saw a draw on a target (NaN: none did, or no alignment made this model last)",
        "step",
    ),
    "target_hits": (
        "draws on a target seen while aligning (of a fixed set, once a pass through it; NaN: no alignment made this "
        "model last)",
        "draw",
    ),
    "clip_fraction": ("share of clipped ratios (NaN: no alignment made this model last)", "1"),
    "gibbs_reward": ("mean reward of the reference's Gibbs policy", "reward"),
    "gibbs_target_mass": ("target mass of the reference's Gibbs policy", "1"),
    "gibbs_objective": ("objective J* of the reference's Gibbs policy", "reward"),
    "gibbs_kl": ("KL(Gibbs policy ‖ reference)", "nat"),
    "gibbs_target_log_odds": ("log-odds of the target under the reference's Gibbs policy", "nat"),
    "half_mass_coefficient": ("β_c of the reference", "reward/nat"),
    "distance_to_gibbs": ("KL(policy ‖ Gibbs policy of its reference)", "nat"),
    "base_failed": ("the base merges or misses a mode of p*: no mean of a component lies in its disc", "1"),
    "base_log_likelihood": ("mean log-likelihood of the base on its data", "nat/draw"),
    "truth_weight": ("weights of the modes of p*", "1"),
    "truth_mean": ("means of the modes of p*", "1"),
    "truth_variance": ("variance of every mode of p* along each axis", "1"),
    "truth_is_target": ("whether a mode is a target", "1"),
    "component_weight": ("mixture weights", "1"),
    "component_mean": ("component means", "1"),
    "component_covariance": ("component covariances", "1"),
}
"""Long name and unit of every variable."""


def _spread(array, own_axes, lengths) -> np.ndarray:
    """[seed, *own axes, …] → [seed, temperature, kl_coef, …], repeated over the axes that it does not depend on."""
    array = np.asarray(array)
    tail = array.shape[1 + len(own_axes) :]
    kept = [lengths[axis] if axis in own_axes else 1 for axis in pipelines.AXES]
    full = [lengths[axis] for axis in pipelines.AXES]
    return np.broadcast_to(array.reshape(array.shape[0], *kept, *tail), (array.shape[0], *full, *tail))


def _by_point(values: dict[str, np.ndarray], names: Sequence[str], points: Points) -> dict[str, np.ndarray]:
    """Values of a stack of models, [seed, row, …] each, as [seed, temperature, kl_coef, stage, …]."""
    seeds = len(next(iter(values.values())))
    per_stage = by_stage(values, names, points, (seeds,))
    return {
        quantity: np.stack(
            [_spread(per_stage[name][quantity], pipelines.axes_of(name), points.lengths) for name in names], axis=3
        )
        for quantity in values
    }


INNER_DIMS = ("temperature", "kl_coef", "stage")
"""Dimensions that lie inside a run of a sweep."""

_OF_A_SEED = ("base_failed", "base_log_likelihood")
_OF_MODES = "mode_mass"


def labels() -> dict[str, Label]:
    """Long names, units and inner dimensions of what `of_runs` makes, for `run_sweep`."""
    elsewhere = ("truth_", "component_", _OF_MODES)
    variables = {
        name: Label(long_name, unit, () if name in _OF_A_SEED else INNER_DIMS)
        for name, (long_name, unit) in UNITS.items()
        if not name.startswith(elsewhere)
    }
    return variables | {
        "temperature": Label("distillation temperature τ", "1"),
        "kl_coef": Label("KL coefficient β", "reward/nat"),
        "stage": Label("model: base, student, aligned base, or an arm by name"),
    }


def labels_with_models() -> dict[str, Label]:
    """The same of what `of_algorithm` makes."""
    further = {name: Label(*UNITS[name], (*INNER_DIMS, *dims)) for name, dims in _FURTHER_DIMS.items()}
    return labels() | further


def of_runs(
    outcome: Outcome,
    names: Sequence[str],
    temperatures,
    kl_coefs,
    algorithm: str,
    flip_rate=0.0,
    label_temperature=1.0,
) -> dict[str, np.ndarray]:
    """All variables of a sweep's runs by name, [runs, temperature, kl_coef, stage] each, or [runs].

    Masses of single modes are left out, for a sweep's store does not say which are targets: those of two targets follow
    from `target_mass` and `target_balance`.

    Args:
      outcome: from `laboratory.run_seed`, runs leading. What Gibbs policies say is NaN for models that were held to a
        reference without an optimum there.
      names: `laboratory.every_model`.
      temperatures: τ of the distillations, [temperatures].
      kl_coefs: β, [coefficients].
      algorithm: which one it was; the distance to the Gibbs policy is NaN where that is not its optimum.
      flip_rate: share of flipped labels, one for all runs or [runs]; with any, Gibbs is no optimum of preferences.
      label_temperature: T of the labels, one for all runs or [runs]; where it is not 1 the optimum of preferences is
        the Gibbs policy at β·T, from which no distance is known here.
    """
    points = Points(np.asarray(temperatures), np.asarray(kl_coefs, np.float32))
    lengths = points.lengths
    quantities = _quantities(outcome.measured)
    del quantities[_OF_MODES]
    found = _by_point(quantities, names, points)
    # The optimum of an arm is that of the model which its policy was held to.
    references = [pipelines.reference_of(name) for name in names]
    unknown = np.full((len(outcome.base_failed), *lengths.values()), np.nan, np.float32)

    def of_reference(value_of, *own_axes):
        of_each = {
            reference: _spread(value_of(optimum), (*pipelines.axes_of(reference), *own_axes), lengths)
            for reference, optimum in outcome.optima.items()
        }
        return np.stack([of_each.get(reference, unknown) for reference in references], axis=3)

    for field in theory.Gibbs._fields:
        found[f"gibbs_{field}"] = of_reference(lambda optimum, f=field: getattr(optimum.gibbs, f), "kl_coef")
    found["half_mass_coefficient"] = of_reference(lambda optimum: optimum.half_mass_coefficient)
    # Models without a coefficient of their own are valued at every coefficient of the axis.
    kl_coef = points.kl_coef[:, None]
    found["objective"] = found["reward"] - kl_coef * found["kl_to_reference"]
    aligned = [isinstance(pipelines.STAGES.get(name), pipelines.Align) for name in names]
    gibbs = ALGORITHMS[algorithm].tends_to_gibbs(flip_rate, label_temperature)
    meaningful = np.asarray(aligned) & gibbs.reshape(-1, 1, 1, 1)
    shortfall = (found["gibbs_objective"] - found["objective"]) / kl_coef
    found["distance_to_gibbs"] = np.where(meaningful, shortfall, np.float32(np.nan))
    return found | {
        "base_failed": np.asarray(outcome.base_failed),
        "base_log_likelihood": np.asarray(outcome.log_likelihood),
    }


def to_dataset(
    prepared: Prepared,
    shared: Measured,
    by_algorithm: dict[str, Measured],
    made: Sequence[str],
    temperatures,
    kl_coefs,
    seeds,
    num_components: int,
    flip_rate: float = 0.0,
    label_temperature: float = 1.0,
) -> xr.Dataset:
    """Label everything: dimensions algorithm, temperature, kl_coef, seed and stage; base and student are repeated.

    Args:
      prepared: from `laboratory.prepare`, seeds leading.
      shared: its measured models.
      by_algorithm: from `laboratory.run_arms`, by algorithm.
      made: the names of its models, `laboratory.made_by`.
      temperatures: τ of the distillations, [temperatures].
      kl_coefs: β, [coefficients].
      seeds: [seeds].
      num_components: K to which stored mixtures are padded.
      flip_rate: share of flipped labels, as for `of_runs`.
      label_temperature: T of the labels, as for `of_runs`.
    """
    columns: dict[str, list] = {}
    for algorithm, measured in by_algorithm.items():
        found = of_algorithm(
            prepared,
            shared,
            measured,
            made,
            temperatures,
            kl_coefs,
            algorithm,
            num_components,
            flip_rate,
            label_temperature,
        )
        for name, values in found.items():
            of_a_seed = name in _OF_A_SEED
            columns.setdefault(name, []).append(values if of_a_seed else np.moveaxis(values, 0, len(pipelines.AXES)))
    data = {
        # What the algorithm does not change is kept once.
        name: (_dims_of(name), parts[0] if "algorithm" not in _dims_of(name) else np.stack(parts))
        for name, parts in columns.items()
    }
    # Every seed carries the same truth; the first one's is kept.
    truth = jax.tree.map(lambda leaf: leaf[0], prepared.truth)
    return _labelled(data, by_algorithm, temperatures, kl_coefs, seeds, [*PREPARED, *made], truth)


def of_algorithm(
    prepared: Prepared,
    shared: Measured,
    measured: Measured,
    made: Sequence[str],
    temperatures,
    kl_coefs,
    algorithm: str,
    num_components: int,
    flip_rate: float = 0.0,
    label_temperature: float = 1.0,
) -> dict[str, np.ndarray]:
    """All variables of one algorithm by name, those of models and modes too, [seed, temperature, kl_coef, stage, …].

    Args are those of `to_dataset`, `measured` its algorithm's; of `prepared` neither truth nor models are read.
    """
    stages = [*PREPARED, *made]
    points = Points(np.asarray(temperatures), np.asarray(kl_coefs))
    padded = [one._replace(model=pad_components(one.model, num_components)) for one in (shared, measured)]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *padded)
    outcome = Outcome(whole, prepared.log_likelihood, prepared.base_failed, prepared.optima)
    found = of_runs(outcome, stages, temperatures, kl_coefs, algorithm, flip_rate, label_temperature)
    beside = _components(whole.model) | {_OF_MODES: _quantities(whole)[_OF_MODES]}
    return found | _by_point(beside, stages, points)


def of_sweep(swept: xr.Dataset, truth: Truth) -> xr.Dataset:
    """What `to_dataset` makes, from a finished sweep over algorithms and seeds whose runs are `of_algorithm`'s.

    Args:
      swept: its store, opened.
      truth: that of all seeds.
    """
    data = {}
    for name in UNITS:
        if not name.startswith("truth_"):
            dims = _dims_of(name)
            values = swept[name] if "algorithm" in dims else swept[name].isel(algorithm=0)
            data[name] = (dims, values.transpose(*dims).values)
    axes = (swept[axis].values for axis in DIMS)
    return _labelled(data, *axes, truth)


def _labelled(data, algorithms, temperatures, kl_coefs, seeds, stages, truth: Truth) -> xr.Dataset:
    dataset = xr.Dataset(
        data,
        coords={
            "algorithm": _strings(list(algorithms)),
            "temperature": np.asarray(temperatures, np.float64),
            "kl_coef": np.asarray(kl_coefs, np.float64),
            "seed": np.asarray(seeds),
            "stage": _strings(list(stages)),
        },
    )
    dataset["truth_weight"] = ("mode", np.asarray(mixture.weights(truth.modes)))
    dataset["truth_mean"] = (("coordinate", "mode"), np.asarray(truth.modes.means))
    dataset["truth_variance"] = ((), np.exp(2 * np.asarray(truth.modes.log_scales)).mean())
    dataset["truth_is_target"] = ("mode", np.asarray(truth.is_target))
    for name, (long_name, unit) in UNITS.items():
        dataset[name].attrs = {"long_name": long_name, "units": unit}
    dataset.temperature.attrs = {"long_name": "distillation temperature τ", "units": "1"}
    dataset.kl_coef.attrs = {"long_name": "KL coefficient β", "units": "reward/nat"}
    return dataset


def _strings(values: list[str]) -> np.ndarray:
    return np.asarray(values, dtype=np.dtypes.StringDType())


_FURTHER_DIMS = {
    _OF_MODES: ("mode",),
    "component_weight": ("component",),
    "component_mean": ("coordinate", "component"),
    "component_covariance": ("coordinate", "other_coordinate", "component"),
}


def _dims_of(name: str) -> tuple[str, ...]:
    """Dimensions of a variable of `to_dataset`."""
    if name in _OF_A_SEED:
        return ("seed",)
    if name.startswith("gibbs_") or name == "half_mass_coefficient":
        return DIMS[1:]
    return (*DIMS, *_FURTHER_DIMS.get(name, ()))


@jax.jit
@jax.vmap
@jax.vmap
def _weights_and_covariances(model: mixture.Mixture) -> tuple[jax.Array, jax.Array]:
    return mixture.weights(model), mixture.covariances(model)


def _components(model: mixture.Mixture) -> dict[str, np.ndarray]:
    """Parameters of a stack of mixtures in the form that readers know, [seed, row, …] each."""
    weights, covariances = _weights_and_covariances(model)
    return {
        "component_weight": np.asarray(weights),
        "component_mean": np.asarray(model.means),
        "component_covariance": np.asarray(covariances),
    }


def _quantities(measured: Measured) -> dict[str, np.ndarray]:
    """What was measured and recorded, [seed, point of the stack] each; of models that failed nothing was measured."""
    values = {key: np.asarray(value) for key, value in measured.metrics._asdict().items()}
    finite = np.all([np.isfinite(values[key]) for key in ("reward", "target_mass", "kl_to_base")], axis=0)
    record = {key: np.asarray(value) for key, value in measured.record._asdict().items()}
    failed = ~finite | record["failed"]
    # Comparisons with NaN are false: masses and shares of what is no number would be 0, as if they had been measured.
    for key, value in values.items():
        of_each = failed.reshape(*failed.shape, *[1] * (value.ndim - failed.ndim))
        values[key] = np.where(of_each, value.dtype.type(np.nan), value)
    return values | record | {"from_grid": np.asarray(measured.from_grid), "failed": failed}


_ALSO_READ = (
    "failed",
    "from_grid",
    "target_variance",
    "target_balance",
    "distance_to_gibbs",
    "objective",
    "gibbs_objective",
)

TABLE_QUANTITIES = ("reward", "target_mass", "target_precision", "kl_to_base", "precision", "recall", "coverage")


def table(dataset: xr.Dataset, baseline: str = "kd_align", num_resamples: int = 1999) -> list[dict]:
    """One row an arm, algorithm, coefficient and temperature: rates, medians and paired comparisons with a baseline.

    Recovery has a Wilson interval and an exact McNemar test, marked at a false-discovery rate of 0.05 over all rows;
    reward differences have a paired bootstrap interval. A pair of which either run failed leaves both; beside them
    stand the same with failures scored as mass 0 and reward 0 (`…_failures_as_0`), of rewards NaN where some model
    earns less than 0, for then 0 is no bound. Where there are several targets, each one's mass has a column of its own
    (`target_mass_1_median`, …, in the order of the modes). `bases_failed` is how many bases merge or miss a
    mode.
    """
    rows, targets = [], _several_targets(dataset)
    zero_is_least = not bool((dataset.reward < 0).any())
    for algorithm in dataset.algorithm.values:
        for temperature in dataset.temperature.values:
            for kl_coef in dataset.kl_coef.values:
                cell = dataset.sel(algorithm=algorithm, temperature=temperature, kl_coef=kl_coef)
                # Loaded once a cell: the comparisons below read it many times.
                cell = cell[[*TABLE_QUANTITIES, *_ALSO_READ, "base_failed", *([_OF_MODES] if targets else [])]].load()
                for stage in dataset.stage.values:
                    key = {
                        "algorithm": str(algorithm),
                        "temperature": float(temperature),
                        "kl_coef": float(kl_coef),
                        "arm": str(stage),
                    }
                    own = _row(cell, str(stage), baseline, num_resamples, zero_is_least)
                    rows.append(key | own | _masses_of_targets(cell, str(stage), targets))
    compared = [math.nan if row["mcnemar_p"] is None else row["mcnemar_p"] for row in rows]
    for row, marked in zip(rows, statistics.false_discovery(compared), strict=True):
        row["significant"] = bool(marked)
    return rows


def _several_targets(dataset: xr.Dataset) -> list[int]:
    """Places of the targets among the modes where there are several (and the store has their masses), else none."""
    if _OF_MODES not in dataset or dataset.truth_is_target.sum() < 2:
        return []
    return np.flatnonzero(dataset.truth_is_target.values).tolist()


def _masses_of_targets(cell: xr.Dataset, stage: str, targets: list[int]) -> dict:
    if not targets:
        return {}
    arm = cell.sel(stage=stage)
    masses = arm[_OF_MODES].where(~arm.failed.astype(bool))
    return {f"target_mass_{i}_median": _nanmedian(masses.isel(mode=mode).values) for i, mode in enumerate(targets, 1)}


def _row(cell: xr.Dataset, stage: str, baseline: str, num_resamples: int, zero_is_least: bool) -> dict:
    arm = cell.sel(stage=stage)
    failed = arm.failed.values.astype(bool)
    recovered = arm.target_mass.values > RECOVERED_MASS
    rate = statistics.recovery_rate(recovered, failed)
    row = {
        "seeds": int(rate.total),
        "failed": int(failed.sum()),
        "recovery": rate.rate,
        "recovery_low": rate.low,
        "recovery_high": rate.high,
    }
    for name in TABLE_QUANTITIES:
        summary = statistics.summarise(arm[name].values, failed)
        row |= {
            f"{name}_median": summary.median,
            f"{name}_lower_quartile": summary.lower_quartile,
            f"{name}_upper_quartile": summary.upper_quartile,
            f"{name}_mean": summary.mean,
            f"{name}_sd": summary.sd,
        }
    row["reward_max"] = float(np.nanmax(arm.reward.values)) if not failed.all() else math.nan
    row["recovery_failures_as_0"] = statistics.recovery_rate(statistics.failure_bound(recovered, failed)).rate
    row["reward_mean_failures_as_0"] = (
        float(np.mean(statistics.failure_bound(arm.reward.values, failed))) if zero_is_least else math.nan
    )
    row["target_balance_median"] = _nanmedian(arm.target_balance.values)
    row["target_variance_median"] = _nanmedian(arm.target_variance.values)
    row["distance_to_gibbs_median"] = _nanmedian(arm.distance_to_gibbs.values)
    # Where the optimum is not that of the algorithm's objective, neither is the shortfall.
    shortfall = (1 - arm.objective / arm.gibbs_objective).where(arm.distance_to_gibbs.notnull())
    row["objective_shortfall_median"] = _nanmedian(shortfall.values)
    row["from_grid"] = float(arm.from_grid.values.mean())
    row["bases_failed"] = int(cell.base_failed.sum())
    comparison = {"recovery_difference": None, "mcnemar_p": None, "reward_difference": None}
    comparison |= {"reward_difference_low": None, "reward_difference_high": None}
    comparison |= {"recovery_difference_failures_as_0": None, "mcnemar_p_failures_as_0": None}
    if stage in pipelines.arms() and stage != baseline and baseline in cell.stage.values:
        other = cell.sel(stage=baseline)
        other_failed = other.failed.values.astype(bool)
        other_recovered = other.target_mass.values > RECOVERED_MASS
        bound = statistics.mcnemar(
            statistics.failure_bound(recovered, failed), statistics.failure_bound(other_recovered, other_failed)
        )
        comparison["recovery_difference_failures_as_0"] = bound.difference
        comparison["mcnemar_p_failures_as_0"] = bound.p_value
        if (~failed & ~other_failed).any():
            paired = statistics.mcnemar(recovered, other_recovered, failed, other_failed)
            gain = statistics.paired_difference(
                arm.reward.values, other.reward.values, failed, other_failed, num_resamples=num_resamples
            )
            comparison |= {
                "recovery_difference": paired.difference,
                "mcnemar_p": paired.p_value,
                "reward_difference": gain.mean,
                "reward_difference_low": gain.low,
                "reward_difference_high": gain.high,
            }
    return row | comparison


def _nanmedian(values) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def write_csv(rows: list[dict], path: Path) -> None:
    """Write all columns of the table, whole or not at all."""
    with files.whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def format_table(rows: list[dict]) -> str:
    """The table for a terminal, a block an algorithm and temperature; medians over seeds."""
    head = (
        f"{'arm':<30}{'β':>5}{'recovered':>11}{'95 % interval':>16}{'reward':>8}{'target':>8}{'target':>9}{'KL to':>7}"
        f"{'precision':>11}{'recall':>9}{'cover-':>8}  against kd_align\n"
        f"{'':<30}{'':>5}{'':>11}{'':>16}{'':>8}{'mass':>8}{'prec.':>9}{'base':>7}{'':>11}{'':>9}{'age':>8}"
        "  Δ recovered (McNemar p), Δ reward [95 % interval]"
    )
    lines, block = [], None
    for row in sorted(rows, key=lambda r: (r["algorithm"], -r["temperature"], r["kl_coef"])):
        if (row["algorithm"], row["temperature"]) != block:
            block = (row["algorithm"], row["temperature"])
            lines += ["", f"{row['algorithm']}, distillation temperature {row['temperature']:g}", head]
        lines.append(_format_row(row))
    return "\n".join(lines)


def _format_row(row: dict) -> str:
    interval = f"[{row['recovery_low']:.2f}, {row['recovery_high']:.2f}]"
    text = (
        f"{row['arm']:<30}{row['kl_coef']:>5g}{row['recovery']:>11.3f}{interval:>16}{row['reward_median']:>8.2f}"
        f"{row['target_mass_median']:>8.3f}{row['target_precision_median']:>9.1f}{row['kl_to_base_median']:>7.2f}"
        f"{row['precision_median']:>11.2f}{row['recall_median']:>9.1f}{row['coverage_median']:>8.2f}"
    )
    if row["mcnemar_p"] is not None:
        mark = "*" if row["significant"] else " "
        text += (
            f"  {row['recovery_difference']:+.2f} ({row['mcnemar_p']:.1g}){mark} {row['reward_difference']:+.2f} "
            f"[{row['reward_difference_low']:+.2f}, {row['reward_difference_high']:+.2f}]"
        )
    masses = [f"{value:.3f}" for name, value in row.items() if re.fullmatch(r"target_mass_\d+_median", name)]
    text += f"  targets {' and '.join(masses)}" if masses else ""
    return text + _format_failures(row)


def _format_failures(row: dict) -> str:
    """Of a row whose own runs, or whose baseline's, failed: how many, and the rates with failures as not recovered."""
    differs = row["recovery_difference"] != row["recovery_difference_failures_as_0"]
    if not row["failed"] and not differs:
        return ""
    whose = f"{row['failed']} failed" if row["failed"] else "of those compared with, some failed"
    text = f"  {whose}; with failures as 0: recovered {row['recovery_failures_as_0']:.3f}"
    if row["recovery_difference_failures_as_0"] is not None:
        text += f", {row['recovery_difference_failures_as_0']:+.2f} ({row['mcnemar_p_failures_as_0']:.1g})"
    return text

"""What finished sweeps say, in words and tables: all figures, tables and sentences of a store at once."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

from jaxkd import files, pipelines, results, statistics
from jaxkd.align import AlignmentSettings
from jaxkd.metrics import RECOVERED_MASS
from jaxkd.phase_figures import (
    VIEWS,
    draw_along,
    draw_critical_mass,
    draw_critical_mass_along_draws,
    draw_plane,
    name_of,
    text_of,
    title_of,
)
from jaxkd.recovery import (
    BASE,
    BASELINE,
    CHALLENGER,
    CriticalMass,
    Predictions,
    References,
    by_family,
    critical_mass,
    failed_models,
    in_order,
    predictions,
    references,
    summarise,
)
from jaxkd.sweep import store

# --- tables ----------------------------------------------------------------------------------------------------------


def rows_of(summary: xr.Dataset) -> list[dict]:
    """One row a cell and arm: its settings, rate with Wilson's interval, and the test of the two orders there.

    `order_difference` is Align→KD's rate less KD→Align's, the same on the rows of all arms of a cell. Columns
    that end in `_failures_as_0` score failures as not recovered. `bases_failed` is how many of the cell's bases merge
    or miss a mode; `target_balance_median` is over the `target_balance_runs` that recovered several targets.
    """
    dims = list(summary.difference.dims)
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
            row = settings | {"arm": arm} | rates | test | {"bases_failed": int(cell.base_failed)}
            if "target_balance" in one:
                row["target_balance_median"] = float(one.target_balance)
                row["target_balance_runs"] = int(one.target_balance_runs)
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
    heads = [f"{text_of(value)}" for value in one[across].values]
    lines = ["recovered after KD→Align / after Align→KD; * differ at a false-discovery rate of 0.05"]
    lines.append("  ".join(f"{name:>16}" for name in down) + f"  {across}: " + "".join(f"{h:>12}" for h in heads))
    for place in itertools.product(*(range(one.sizes[dim]) for dim in down)):
        row = one.isel(dict(zip(down, place, strict=True)))
        told = "  ".join(f"{text_of(row[dim].item()):>16}" for dim in down)
        cells = [
            f"{a:.2f}/{b:.2f}{'*' if star else ' '}"
            for a, b, star in zip(
                row.recovery_baseline.values, row.recovery_challenger.values, row.significant.values, strict=True
            )
        ]
        lines.append(told + " " * (len(across) + 4) + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def rows_of_critical(found: Sequence[CriticalMass], **at) -> list[dict]:
    """One row a KL coefficient and family of references: its critical mass and what Gibbs predicts of it.

    `critical_mass` and its 95 % limits are empty where no half is in sight, and `note` says why; `gibbs_mass` is empty
    where the Gibbs policy is not the optimum, or β_c crosses β outside of what was seen. `at` leads every row.
    """
    rows = []
    for one in found:
        low, high = one.interval if one.is_seen else ("", "")
        row = {"kl_coef": one.kl_coef, "reference": "base" if one.family == BASE else "student"}
        row |= {"capacity": "" if one.family == BASE else one.family}
        row |= {"runs": one.runs, "seeds": one.seeds, "recovered": one.recovered}
        row |= {"critical_mass": one.mass if one.is_seen else "", "critical_mass_low": low, "critical_mass_high": high}
        row |= {"gibbs_mass": one.gibbs_mass if one.gibbs_mass is not None and np.isfinite(one.gibbs_mass) else ""}
        row |= {"smallest_mass": one.seen[0], "largest_mass": one.seen[1], "note": one.why_not}
        rows.append(at | {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()})
    return rows


def format_critical(found: Sequence[CriticalMass], predicted: Predictions) -> str:
    """For a terminal: a line a KL coefficient and family of references."""
    lines = [
        "target mass of the reference at which half of its alignments recover (95 % interval), by reference"
        + ("; Gibbs: at which half of the exact optimum is on the target" if predicted.gibbs else "")
    ]
    lines.append(f"{'β':>6}  {'reference':<9}  {'recovered':>12}  {'seeds':>5}  {'critical mass':<50}")
    lines[-1] += f"  {'Gibbs':>7}" if predicted.gibbs else ""
    for one in found:
        line = f"{one.kl_coef:>6g}  {one.name:<9}  {f'{one.recovered} of {one.runs}':>12}  {one.seeds:>5}  {one!s:<50}"
        if one.gibbs_mass is not None:
            line += f"  {f'{one.gibbs_mass:.2g}' if np.isfinite(one.gibbs_mass) else 'unseen':>7}"
        lines.append(line)
    if predicted.draws_a_step:
        told = f"A hit is expected in the first step from m = {1 / predicted.draws_a_step:.2g} on (n·m = 1)"
        told += f", in all steps from {1 / predicted.draws:.2g} on (n·T·m = 1)" if predicted.draws else ""
        lines.append(told + ".")
    return "\n".join(line.rstrip() for line in lines)


# --- sentences -------------------------------------------------------------------------------------------------------


def verdict(summary: xr.Dataset) -> str:
    """What the cells say; students of one component, which fail for a reason of their own, are told apart."""
    several = summary.sel(capacity=summary.capacity > 1) if (summary.capacity > 1).any() else summary
    gain, loss = _gain_and_loss(several.significant, several.difference)
    either = int((np.fmax(several.recovery_baseline, several.recovery_challenger) > 0.5).sum())
    told = (
        f"Align→KD recovers more often than KD→Align in {gain} of {several.difference.size} cells and less often "
        f"in {loss} (McNemar, false-discovery rate 0.05); in {either} cells at least one order recovers in "
        "more than half of the seeds."
    )
    if several.difference.size == summary.difference.size:
        return told
    lone = summary.sel(capacity=1)
    gain, loss = _gain_and_loss(lone.significant, lone.difference)
    return f"{told} (K = 1, set apart: more often in {gain} of {lone.difference.size}, less often in {loss}.)"


def _gain_and_loss(significant: xr.DataArray, difference: xr.DataArray) -> tuple[int, int]:
    """Cells in which Align→KD recovers significantly more often, and those in which it does less often."""
    gain, loss = (int((significant & (sign * difference > 0)).sum()) for sign in (1, -1))
    return gain, loss


def verdict_on_failures(summary: xr.Dataset) -> str:
    """What the cells say when failures are scored as not recovered."""
    gain, loss = _gain_and_loss(summary.significant_failures_as_0, summary.difference_failures_as_0)
    return (
        f"With failures as not recovered Align→KD recovers more often in {gain} of {summary.difference.size} cells and "
        f"less often in {loss}."
    )


_FEWEST_BASES = 5  # of either kind, for their rates to be told


def verdict_on_bases(dataset: xr.Dataset) -> list[str]:
    """How many bases merge or miss a mode, and how each order fares on those and on the others at the lowest τ."""
    share = f"Bases that merge or miss a mode: {100 * float(dataset.base_failed.mean()):.1f} % (kept)."
    temperature = float(dataset.temperature.min())
    told = [share]
    for at, _ in _settings(dataset, [dim for dim in dataset.base_failed.dims if dim not in ("capacity", "seed")]):
        here = dataset.sel(at | {"temperature": temperature})
        # The student's capacity does not touch the base.
        bad = here.base_failed.isel(capacity=0).values.astype(bool)
        if min(bad.sum(), (~bad).sum()) < _FEWEST_BASES:
            continue
        varied = ", ".join(f"{dim} {text_of(value)}" for dim, value in at.items() if dataset.sizes[dim] > 1)
        told.append(
            f"{varied or 'Here'}: {int(bad.sum())} of {bad.size} bases; recovered at τ = {temperature:g} on those / on "
            f"the others: {'; '.join(_rates_on_bases(here, bad))}."
        )
    return told


def _rates_on_bases(dataset: xr.Dataset, bad: np.ndarray) -> Iterator[str]:
    """Rates of both orders, a capacity and coefficient after another."""
    for capacity, kl_coef in itertools.product(dataset.capacity.values, dataset.kl_coef.values):
        cell = dataset.sel(capacity=capacity, kl_coef=kl_coef)
        rates = ", ".join(
            f"{label} {_rate(cell.sel(stage=arm), bad):.2f} / {_rate(cell.sel(stage=arm), ~bad):.2f}"
            for arm, label in ((BASELINE, "KD→Align"), (CHALLENGER, "Align→KD"))
        )
        yield (f"K = {capacity}, " if dataset.sizes["capacity"] > 1 else "") + f"β = {kl_coef:g}: {rates}"


def _rate(arm: xr.Dataset, bases: np.ndarray) -> float:
    """Share of the seeds with these bases that recover, of those that did not fail."""
    mass, failed = arm.target_mass.values[bases], arm.failed.values[bases].astype(bool)
    return statistics.recovery_rate(mass > RECOVERED_MASS, failed | np.isnan(mass)).rate


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
    stores = {"sweep": stores["sweep"], **_of_other_weights(stores)}
    for name, dataset in stores.items():
        if not bool((dataset.done == 1).all()):
            raise ValueError(f"{name}.zarr is not finished: repeat the command that made it")
    dataset = in_order(stores["sweep"].drop_vars("done").load())
    configuration = json.loads(dataset.attrs["configuration"])
    _check_same(stores)
    preset = configuration["preset"]
    summary = summarise(dataset)
    results.write_csv(rows_of(summary), folder / f"{preset}.csv")
    told = [format_table(summary)]
    if preset == "plane":
        told += _report_plane(dataset, summary, stores, configuration, folder)
    elif preset == "draws":
        told += _report_draws(dataset, summary, configuration, folder)
    else:
        draw_along(dataset, summary, VIEWS[preset], *_paths(folder, preset))
        told += ["", verdict(summary), *verdict_on_bases(dataset)]
    failed = failed_models(dataset)
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


def _of_other_weights(stores: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """The stores beside the sweep, of each the target weights that the sweep does not hold itself.

    One that a sweep of fewer weights had beside it stays in the folder when a sweep of more takes its place.
    """
    held, kept = stores["sweep"], {}
    for name, dataset in stores.items():
        others = ~dataset.target_weight.isin(held.target_weight)
        if name != "sweep" and others.any():
            kept[name] = dataset.isel(target_weight=np.flatnonzero(others))
    return kept


def _check_same(stores: Mapping[str, xr.Dataset]) -> None:
    def told(dataset):
        return _of_the_runs(json.loads(dataset.attrs["configuration"])) | store.versions(dataset.attrs)

    sweep = stores["sweep"]
    for name, dataset in stores.items():
        differing = files.differences(told(dataset), told(sweep))
        if strange := sorted({*dataset.seed.values.tolist()} - {*sweep.seed.values.tolist()}):
            differing.append(f"seed {strange[0]} there, none of the sweep's now")
        if differing:
            raise ValueError(
                f"{name}.zarr is of another sweep ({'; '.join(differing)}): move it away, or repeat the command with "
                "--overwrite"
            )


def _report_plane(dataset, summary, stores, configuration, folder: Path) -> list[str]:
    inner = ("kl_coef", "capacity", "temperature")
    others = [dim for dim in summary.difference.dims if dim not in inner]
    for at, suffix in _settings(summary, others):
        predicted, title = _predictions(at, configuration), title_of(dataset.sel(at))
        draw_plane(summary.sel(at), predicted, *_paths(folder, f"phase_diagram{suffix}"), title=title)
    beside = [other.drop_vars("done").load() for name, other in stores.items() if name != "sweep"]
    told = ["", verdict(summary)]
    # Target weights make the references differ in mass: all of them are in one picture.
    for at, suffix in _settings(summary, [dim for dim in others if dim != "target_weight"]):
        predicted = _predictions(at, configuration)
        found = _critical_masses([one.sel(at) for one in (dataset, *beside)], predicted)
        title = "\n".join([name_of(at["algorithm"]), *map(_told_of_references, (dataset, *beside))])
        draw_critical_mass(found, predicted, *_paths(folder, f"critical_mass{suffix}"), title=title)
        every = [one for _, of_families in found.values() for one in of_families]
        results.write_csv(rows_of_critical(every), folder / f"critical_mass{suffix}.csv")
        told += ["", *([f"{suffix[1:].replace('_', ', ')}:"] if suffix else []), format_critical(every, predicted)]
    return told


def _critical_masses(
    datasets: Sequence[xr.Dataset], predicted: Predictions
) -> dict[float, tuple[dict[int, References], list[CriticalMass]]]:
    """By KL coefficient, the references of each family and where they tip."""
    found = {}
    for kl_coef in map(float, datasets[0].kl_coef.values):
        points = by_family(references(datasets, kl_coef))
        found[kl_coef] = points, [critical_mass(one, kl_coef, gibbs=predicted.gibbs) for one in points.values()]
    return found


def _told_of_references(dataset: xr.Dataset) -> str:
    """Which references a store gives: the base's, and those of students."""
    weights = dataset.target_weight.values
    students = [text_of(capacity) for capacity in dataset.capacity.values if capacity > 1]
    plural = "s" if len(weights) > 1 else ""
    return (
        f"target weight{plural} {', '.join(map(text_of, weights))}: base and students of K = {', '.join(students)}; "
        f"{dataset.sizes['seed']} seeds"
    )


def _report_draws(dataset, summary, configuration, folder: Path) -> list[str]:
    told, rows = ["", verdict(summary)], []
    inner = ("kl_coef", "capacity", "temperature", "target_weight", "draws")
    for at, suffix in _settings(summary, [dim for dim in summary.difference.dims if dim not in inner]):
        by_coefficient: dict[float, dict[int, list[CriticalMass]]] = {}
        for draws in sorted(dataset.draws.values.tolist()):
            here = at | {"draws": draws}
            predicted = _predictions(here, configuration)
            found = _critical_masses([dataset.sel(here)], predicted)
            for kl_coef, (_, of_families) in found.items():
                by_coefficient.setdefault(kl_coef, {})[draws] = of_families
            every = [one for _, of_families in found.values() for one in of_families]
            varied = {dim: value for dim, value in here.items() if dataset.sizes[dim] > 1}
            rows += rows_of_critical(every, **varied)
            told += ["", f"{suffix[1:].replace('_', ', ')} n = {draws}:".strip(), format_critical(every, predicted)]
        title = "\n".join([name_of(at["algorithm"]), _told_of_references(dataset)])
        draw_critical_mass_along_draws(by_coefficient, predicted, *_paths(folder, f"draws{suffix}"), title=title)
        told += ["", *verdict_on_draws(by_coefficient)]
    results.write_csv(rows, folder / "critical_mass.csv")
    return told


def verdict_on_draws(by_coefficient: Mapping[float, Mapping[int, Sequence[CriticalMass]]]) -> list[str]:
    """How far critical masses fall from the fewest draws a step to the most, where both have one."""
    told = []
    for kl_coef, by_draws in by_coefficient.items():
        fewest, most = min(by_draws), max(by_draws)
        for first, last in zip(by_draws[fewest], by_draws[most], strict=True):
            if first.is_seen and last.is_seen:
                fall = f"the critical mass falls {first.mass / last.mass:.2g}-fold"
                hits = f"n·m at it is {fewest * first.mass:.2g} and {most * last.mass:.2g}"
                told.append(
                    f"β = {kl_coef:g}, {first.name}: while n rises {most / fewest:g}-fold, from {fewest} to {most}, "
                    f"{fall}; {hits}."
                )
    return told or ["No reference has a critical mass at the fewest and the most draws a step."]


def _settings(summary: xr.Dataset, dims: Sequence[str]) -> Iterator[tuple[dict, str]]:
    """Every combination of the values of some dimensions, with what tells its files apart."""
    for place in itertools.product(*(summary[dim].values for dim in dims)):
        at = dict(zip(dims, place, strict=True))
        yield at, "".join(f"_{text_of(at[dim])}" for dim in dims if summary.sizes[dim] > 1)


def _predictions(at: Mapping, configuration: Mapping) -> Predictions:
    """Of the store's own settings, which need not be today's."""
    own = {"algorithm": str(at["algorithm"])} | ({"batch_size": int(at["draws"])} if "draws" in at else {})
    settings = AlignmentSettings(**(configuration["alignment"] | own))
    matched = any(configuration["match_component_evaluations"])
    label_noise = float(at.get("label_noise", max(configuration["label_noise"])))
    predicted = predictions(settings, label_noise)
    # A smaller student then makes more updates than these, and has boundaries of its own.
    return replace(predicted, draws=0) if matched else predicted


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{ending}" for ending in ("png", "pdf")]

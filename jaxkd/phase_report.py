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
from jaxkd.phase_figures import VIEWS, draw_along, draw_critical_mass, draw_plane, name_of, text_of, title_of
from jaxkd.recovery import (
    BASELINE,
    CHALLENGER,
    Predictions,
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
        found, predicted = {}, _predictions(at, configuration)
        for kl_coef in dataset.kl_coef.values:
            runs = references([one.sel(at) for one in (dataset, *beside)], kl_coef)
            found[float(kl_coef)] = (runs, critical_mass(runs, float(kl_coef), gibbs=predicted.gibbs))
        weights = sorted({float(weight) for one in (dataset, *beside) for weight in one.target_weight.values})
        title = f"{name_of(at['algorithm'])} · target weights {', '.join(map(text_of, weights))}"
        draw_critical_mass(found, predicted, *_paths(folder, f"critical_mass{suffix}"), title=title)
        where = f"{suffix[1:].replace('_', ', ')}: an" if suffix else "An"
        masses = "; ".join(str(one) for _, one in found.values())
        told.append(f"{where} alignment recovers in half of the runs at these masses. {masses}.")
    return told


def _settings(summary: xr.Dataset, dims: Sequence[str]) -> Iterator[tuple[dict, str]]:
    """Every combination of the values of some dimensions, with what tells its files apart."""
    for place in itertools.product(*(summary[dim].values for dim in dims)):
        at = dict(zip(dims, place, strict=True))
        yield at, "".join(f"_{text_of(at[dim])}" for dim in dims if summary.sizes[dim] > 1)


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

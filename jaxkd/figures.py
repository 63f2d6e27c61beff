"""Figures, each drawn from a finished store alone."""

import itertools
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from jaxkd import pipelines
from jaxkd.looks import ALGORITHM_LABELS, COLOURS, LABELS, MARKERS, STYLE, algorithm_name, arm_name, save
from jaxkd.metrics import RECOVERED_MASS
from jaxkd.truth import TARGET_RADIUS


def mog_order(dataset: xr.Dataset, *paths: Path) -> None:
    """Draw the order experiment: models of one telling seed, outcomes over seeds, and reward against KL to the base.

    Args:
      dataset: as `results.to_dataset` makes it, or the store opened.
      paths: files to write; their endings choose the formats.
    """
    dataset = dataset.sortby("kl_coef").load()
    arms = [name for name in pipelines.arms() if name in dataset.stage.values]
    temperature = float(dataset.temperature.min())
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(7.2, 11.2), layout="constrained")
        parts = figure.subfigures(3, 1, height_ratios=[3.7, 4.9, 3.2], hspace=0.02)
        _models_of_one_seed(parts[0], dataset, arms, temperature)
        _outcomes(parts[1], dataset, arms, temperature)
        _frontier(parts[2], dataset, arms, temperature)
        save(figure, paths)


def has_gibbs_optimum(dataset: xr.Dataset, algorithm: str) -> bool:
    """Whether the Gibbs policy is the optimum of an algorithm: some arm is at a known distance from it."""
    return bool(np.isfinite(dataset.distance_to_gibbs.sel(algorithm=algorithm)).any())


def telling_cell(dataset: xr.Dataset) -> tuple[str, float, int]:
    """The algorithm, coefficient and seed to show: where Align→KD gains most over KD→Align, at its median seed."""
    temperature = float(dataset.temperature.min())
    algorithm = str(dataset.algorithm.values[0])
    cell = dataset.sel(algorithm=algorithm, temperature=temperature)
    shown = "align_kd" if "align_kd" in dataset.stage.values else str(dataset.stage.values[-1])
    gain = cell.target_mass.sel(stage=shown) - cell.target_mass.sel(stage="kd_align")
    kl_coef = float(gain.mean("seed").fillna(-np.inf).idxmax())
    gain = gain.sel(kl_coef=kl_coef)
    # A seed of which a run failed is shown where there is no other.
    known = gain.dropna("seed") if gain.notnull().any() else gain.fillna(0.0)
    ranked = known.sortby(known)
    return algorithm, kl_coef, int(ranked.seed.values[(ranked.size - 1) // 2])


def _is_a_density(cell: xr.Dataset) -> bool:
    """Whether a stored mixture can be drawn: alignments that failed end in parameters that are no numbers."""
    return all(np.isfinite(cell[f"component_{name}"]).all() for name in ("weight", "mean", "covariance"))


def _density(cell: xr.Dataset, x: np.ndarray) -> np.ndarray:
    """Density of one stored mixture at x: [2, …]."""
    density = np.zeros(x.shape[1:])
    for k in range(cell.sizes["component"]):
        weight = float(cell.component_weight[k])
        if weight <= 0:
            continue
        covariance = cell.component_covariance.values[:, :, k].astype(float)
        apart = x - cell.component_mean.values[:, k].reshape(2, *[1] * (x.ndim - 1))
        squared = np.einsum("i...,ij,j...->...", apart, np.linalg.inv(covariance), apart)
        density += weight * np.exp(-0.5 * squared) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    return density


def _draws(cell: xr.Dataset, count: int, seed: int) -> np.ndarray:
    """Draws of one stored mixture, [2, count]."""
    generator = np.random.default_rng(seed)
    weights = cell.component_weight.values.astype(float)
    chosen = generator.choice(len(weights), count, p=weights / weights.sum())
    factors = [
        np.linalg.cholesky(cell.component_covariance.values[:, :, k].astype(float))
        if weights[k] > 0
        else np.zeros((2, 2))
        for k in range(len(weights))
    ]
    noise = generator.standard_normal((2, count))
    moved = np.einsum("nij,jn->in", np.stack(factors)[chosen], noise)
    return cell.component_mean.values[:, chosen] + moved


def _head(part, words: str) -> None:
    """Say above a part of a figure what it shows."""
    part.suptitle(textwrap.fill(words, 106, subsequent_indent="     "), x=0.01, ha="left", fontsize=8.5)


def _models_of_one_seed(part, dataset: xr.Dataset, arms, temperature) -> None:
    algorithm, kl_coef, seed = telling_cell(dataset)
    cell = dataset.sel(algorithm=algorithm, temperature=temperature, kl_coef=kl_coef, seed=seed).load()
    _head(
        part,
        f"a   One seed of median gain (seed {seed}): {ALGORITHM_LABELS.get(algorithm, algorithm)}, β = {kl_coef:g}, "
        f"τ = {temperature:g}. Contours of density, 300 draws; the circle is the target's disc.",
    )
    stages = ["base", "student", *(s for s in ("aligned_base",) if s in dataset.stage.values), *arms]
    columns = max(5, -(-(1 + len(stages)) // 2))
    axes = part.subplots(2, columns, sharex=True, sharey=True, gridspec_kw={"wspace": 0.02}).ravel()
    line = np.linspace(-1.9, 1.9, 161)
    x = np.stack(np.meshgrid(line, line, indexing="xy"))
    _one_model(axes[0], _truth_cell(dataset), x, "p*", "#000000", dataset)
    for axis, stage in zip(axes[1:], stages, strict=False):  # an odd number leaves a place
        one = cell.sel(stage=stage)
        _one_model(axis, one, x, LABELS[stage], COLOURS[stage], dataset)
        mass = float(one.target_mass)
        axis.text(
            0.03, 0.03, "failed" if np.isnan(mass) else f"target mass {mass:.3f}", transform=axis.transAxes, fontsize=7,
            va="bottom", bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.5},
        )  # fmt: skip
    for axis in axes[1 + len(stages) :]:
        axis.set_visible(False)
    for axis in axes[columns:]:
        axis.set_xlabel("x₁")
    for axis in axes[::columns]:
        axis.set_ylabel("x₂")


def _truth_cell(dataset: xr.Dataset) -> xr.Dataset:
    """The truth, kept in the store as plain arrays, in the form of a stored mixture."""
    return xr.Dataset(
        {
            "component_weight": ("component", dataset.truth_weight.values),
            "component_mean": (("coordinate", "component"), dataset.truth_mean.values),
            "component_covariance": (
                ("coordinate", "other_coordinate", "component"),
                dataset.truth_variance.values * np.eye(2)[:, :, None] * np.ones(dataset.sizes["mode"]),
            ),
        }
    )


def _one_model(axis, cell, x, title, colour, dataset) -> None:
    axis.set_title(title, color=colour)
    if _is_a_density(cell):
        # Levels a factor of four apart show rare modes beside common ones.
        levels = 1.6 * 4.0 ** np.arange(-4, 3)
        axis.contour(x[0], x[1], _density(cell, x), levels=levels, colors=colour, linewidths=0.5, alpha=0.8)
        draws = _draws(cell, 300, seed=0)
        axis.scatter(draws[0], draws[1], s=1.5, color=colour, alpha=0.45, linewidths=0)
    radius = TARGET_RADIUS * np.sqrt(float(dataset.truth_variance))
    for mode in np.flatnonzero(dataset.truth_is_target.values):
        axis.add_patch(
            plt.Circle(dataset.truth_mean.values[:, mode], radius, fill=False, ls="--", lw=0.8, color="black")
        )
    axis.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])


def _outcomes(part, dataset: xr.Dataset, arms, temperature) -> None:
    kl_coefs = dataset.kl_coef.values
    algorithms = [str(name) for name in dataset.algorithm.values]
    has_optimum = np.asarray([has_gibbs_optimum(dataset, algorithm) for algorithm in algorithms])
    bars = ", black bars each reference's own Gibbs optimum (median)" if has_optimum.any() else ""
    _head(
        part,
        f"b   Outcomes over {dataset.sizes['seed']} seeds at τ = {temperature:g}: one point per seed, white markers "
        f"are medians{bars}.",
    )
    axes = part.subplots(2, len(kl_coefs), sharex=True, sharey="row", squeeze=False)
    shades = np.linspace(-0.33, 0.33, len(algorithms)) if len(algorithms) > 1 else [0.0]
    width = 0.6 / max(len(algorithms), 1)
    # A bar spans the columns of the algorithms whose optimum it is.
    between = np.asarray([-0.45, *(np.add(shades[1:], shades[:-1]) / 2), 0.45])
    generator = np.random.default_rng(0)
    cell = dataset.sel(temperature=temperature)
    markers = dict(zip(algorithms, itertools.cycle("Dos^vPX*<>h"), strict=False))
    white = {"mfc": "white", "mec": "black", "mew": 0.6}
    for row, (quantity, optimum, label) in enumerate(
        (("reward", "gibbs_reward", "reward"), ("target_mass", "gibbs_target_mass", "target mass"))
    ):
        for column, kl_coef in enumerate(kl_coefs):
            axis = axes[row, column]
            for place, arm in enumerate(arms):
                for shade, algorithm in zip(shades, algorithms, strict=True):
                    values = cell[quantity].sel(algorithm=algorithm, kl_coef=kl_coef, stage=arm).values
                    values = values[np.isfinite(values)]
                    spread = place + shade + generator.uniform(-width / 2.6, width / 2.6, values.size)
                    axis.scatter(spread, values, s=2.5, color=COLOURS[arm], alpha=0.4, linewidths=0, rasterized=True)
                    if values.size:
                        axis.plot(place + shade, np.median(values), markers[algorithm], ms=3.8, zorder=4, **white)
                best = cell[optimum].sel(kl_coef=kl_coef, stage=arm).values
                if has_optimum.any() and np.isfinite(best).any():
                    ends = place + between[:-1][has_optimum], place + between[1:][has_optimum]
                    heights = np.full(ends[0].shape, np.nanmedian(best))
                    # Through the medians, where these are at the optimum.
                    axis.hlines(heights, *ends, color="black", lw=1.1, zorder=5)
            if row == 0:
                axis.set_title(f"β = {kl_coef:g}")
            else:
                axis.axhline(RECOVERED_MASS, color="black", lw=0.5, ls=":")
            if column == 0:
                axis.set_ylabel(f"{label}" + ("\n(dotted: recovered)" if row else " E[R]"))
            axis.set_xticks(range(len(arms)), [LABELS[arm] for arm in arms], rotation=90)
            axis.set_xlim(-0.6, len(arms) - 0.4)
    names = {name: algorithm_name(name) for name in algorithms}
    handles = [
        Line2D([], [], ls="", marker=markers[name], ms=4.5, label=label, **white) for name, label in names.items()
    ]
    within = "columns within an arm, left to right"
    part.legend(handles=handles, title=within, title_fontsize=7, loc="outside lower center", ncols=4, frameon=False)


def _quartiles(values: xr.DataArray) -> np.ndarray:
    """Over the seeds that did not fail, [3, …]; NaN where all did."""
    known = values.notnull().any("seed")
    return values.where(known, 0.0).quantile([0.25, 0.5, 0.75], "seed").where(known).values


def _frontier(part, dataset: xr.Dataset, arms, temperature) -> None:
    _head(
        part,
        f"c   Reward against KL to the base at τ = {temperature:g}: medians, quartiles dotted, one marker per β "
        f"({', '.join(f'{value:g}' for value in dataset.kl_coef.values)}; larger β is smaller), lines join an arm."
        + (" The abscissae differ." if dataset.sizes["algorithm"] > 1 else ""),
    )
    algorithms = [str(name) for name in dataset.algorithm.values]
    axes = part.subplots(1, len(algorithms), sharey=True, squeeze=False)[0]
    sizes = np.linspace(6.5, 3.5, dataset.sizes["kl_coef"])
    cell = dataset.sel(temperature=temperature)
    base = cell.sel(stage="base")
    for axis, algorithm in zip(axes, algorithms, strict=True):
        axis.set_title(algorithm_name(algorithm))
        if has_gibbs_optimum(dataset, algorithm):
            axis.plot(
                base.gibbs_kl.median("seed"),
                base.gibbs_reward.median("seed"),
                color="black",
                lw=1.0,
                ls="--",
                marker="x",
                ms=4,
            )
        # Where arms end alike the first lie upon the last, and are smaller than these.
        for arm, scale in zip(reversed(arms), np.linspace(1.3, 0.7, len(arms)), strict=True):
            chosen = cell.sel(algorithm=algorithm, stage=arm)
            kl, reward = _quartiles(chosen.kl_to_base), _quartiles(chosen.reward)
            axis.plot(kl[1], reward[1], color=COLOURS[arm], lw=0.8, alpha=0.7)
            for i, size in enumerate(sizes):
                _, _, bars = axis.errorbar(
                    kl[1, i],
                    reward[1, i],
                    xerr=[[kl[1, i] - kl[0, i]], [kl[2, i] - kl[1, i]]],
                    yerr=[[reward[1, i] - reward[0, i]], [reward[2, i] - reward[1, i]]],
                    fmt=MARKERS[arm],
                    ms=scale * size,
                    color=COLOURS[arm],
                    elinewidth=0.7,
                    mec="white",
                    mew=0.4,
                )
                for bar in bars:
                    bar.set(linestyle=":", alpha=0.7, zorder=1.5)
        axis.set_xlabel("KL(policy ‖ base) (nats)")
        axis.set_xlim(left=-0.2)
    axes[0].set_ylabel("reward E[R]")
    handles = [Line2D([], [], color=COLOURS[arm], marker=MARKERS[arm], lw=0.8, label=arm_name(arm)) for arm in arms]
    if any(has_gibbs_optimum(dataset, algorithm) for algorithm in algorithms):
        optimum = Line2D([], [], color="black", ls="--", marker="x", lw=1, ms=4, label="Gibbs optimum of the base")
        handles.append(optimum)
    part.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)

"""Figures of recovery from finished stores alone: the phase diagram, the critical mass, recovery along one axis."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from jaxkd import pipelines, statistics
from jaxkd.figures import ALGORITHM_LABELS, COLOURS, LABELS, MARKERS, STYLE, save
from jaxkd.metrics import RECOVERED_MASS
from jaxkd.recovery import (
    LARGEST_LOG_ODDS,
    CriticalMass,
    Predictions,
    References,
    balance_of_recovered,
    levels_of,
)

_WIDTH = 7.2
"""Inches, of a page: what is drawn larger is printed with smaller letters."""


class _Boundary(NamedTuple):
    """How a prediction is drawn: colour and dashes over the colours of a plane, and on white; what it is called."""

    on_plane: tuple
    on_white: tuple
    text: str
    text_of_plane: str


_AT_ONCE, _EVER = "n·m = 1: a hit is expected\nin the first step", "n·T·m = 1: a hit is expected at all"
_BOUNDARIES = {
    "half_mass": _Boundary(
        ("white", "-"),
        ("black", "--"),
        "Gibbs prediction (β$_c$ = β)",
        "β$_c$ = β: the student's Gibbs\npolicy has half its mass on target\n(a, b: β beside the line)",
    ),
    "seen_at_once": _Boundary(("#F0E442", (0, (3, 2))), ("#009E73", "-."), _AT_ONCE, _AT_ONCE),
    "seen_ever": _Boundary(("#F0E442", (0, (1, 1.5))), ("#009E73", ":"), _EVER, _EVER),
}


# --- what all figures say alike --------------------------------------------------------------------------------------

_TITLES = {
    "algorithm": lambda value: name_of(value),
    "reward_name": "reward: {}".format,
    "capacity": lambda value: f"K = {text_of(value)}",
    "temperature": lambda value: f"τ = {text_of(value)}",
    "target_weight": lambda value: f"target weight {text_of(value)}",
    "label_noise": lambda value: f"{text_of(value)} of labels flipped",
}


def title_of(dataset: xr.Dataset) -> str:
    """What all runs share: axes of one value, and how many seeds there are."""
    shared = [
        told(dataset[name].item()) for name, told in _TITLES.items() if name in dataset and dataset[name].size == 1
    ]
    return " · ".join([*shared, f"{dataset.sizes['seed']} seeds"])


def text_of(value) -> str:
    """A value of an axis, as figures, tables and sentences write it."""
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def name_of(value) -> str:
    """The same on one line, an algorithm by its own name."""
    text = text_of(value)
    return ALGORITHM_LABELS.get(text, text).replace("\n", " ")


def _width(columns: int) -> float:
    """Inches: that of a page, unless there are too few panels for it or too many."""
    return 4.4 if columns == 1 else max(_WIDTH, 2.3 * columns)


def _letter(axes: Iterable) -> None:
    """Name the panels that are seen, in the order given: a to z, then aa."""
    names = itertools.chain.from_iterable(map("".join, itertools.product(ascii_lowercase, repeat=n)) for n in (1, 2))
    for axis, name in zip((axis for axis in axes if axis.get_visible()), names, strict=False):
        axis.set_title(name, loc="left", fontweight="bold")


# --- Figure 1: the plane ---------------------------------------------------------------------------------------------

_STUDENT_PANELS = (
    ("student_target_recall", "student: target recall", "median over seeds (nat)"),
    ("student_bounded_recall", "student: bounded recall", "median over seeds"),
)
_PANELS = (
    ("recovery_baseline", "recovered, KD→Align", "cividis", (0.0, 1.0)),
    ("recovery_challenger", "recovered, Align→KD", "cividis", (0.0, 1.0)),
    ("difference", "Align→KD − KD→Align", "PuOr_r", (-1.0, 1.0)),
)


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
                drawn |= _boundaries(axis, one, levels_of(predicted, kl_coef))
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


def _boundaries(axis, one: xr.Dataset, levels: Mapping[str, float], note: str = "") -> set[str]:
    """Draw contours at which the median student beyond K = 1 crosses what theory says; returns which there are."""
    ordered = one.sortby("temperature", ascending=False).transpose("capacity", "temperature", ...)
    beyond = ordered.sel(capacity=ordered.capacity > 1)
    drawn: set[str] = set()
    if min(beyond.sizes["capacity"], beyond.sizes["temperature"]) < 2:
        return drawn
    heights = _heights(one.capacity.values)[one.capacity.values > 1]
    mass = np.log10(beyond.student_target_mass.values)
    coefficient = np.log(np.clip(beyond.half_mass_coefficient.values, 1e-3, 1e3))
    for name, level in levels.items():
        values = coefficient if name == "half_mass" else mass
        colour, line = _BOUNDARIES[name].on_plane
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
        levels = levels_of(predicted, float(kl_coef))
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
    for name, boundary in _BOUNDARIES.items():
        (colour, line), text = boundary.on_plane, boundary.text_of_plane
        if name in drawn:
            handles.append((Line2D([], [], color="black", lw=2.6), Line2D([], [], color=colour, ls=line, lw=1.3)))
            labels.append(text)
        elif name in levels_of(predicted, 1.0):
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
            levels = levels_of(predicted, kl_coef)
            if "half_mass" in levels:
                levels["half_mass"] = math.nan if found.gibbs_mass is None else math.log10(found.gibbs_mass)
            for name, level in levels.items():
                _across(upper, name, level)
            lower.set_title(f"{found.by_log_odds.runs} runs of {found.by_log_odds.clusters} seeds")
            _curve(lower, np.clip(points.log_odds, -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), points, found.by_log_odds)
            if "half_mass" in levels:
                _across(lower, "half_mass", 0.0)
            lower.set_xlabel("log-odds of the target under the\nreference's Gibbs policy (nat)")
        for row in axes:
            row[0].set_ylabel("target mass after alignment (points),\nprobability of recovery (curve)")
        _letter(axes.ravel())
        half = "where half recover, 95 % interval\n(upper row: the critical mass)"
        predictions = [
            Line2D([], [], color=colour, ls=line, lw=1.2, label=boundary.text)
            for name, boundary in _BOUNDARIES.items()
            if name in levels_of(predicted, 1.0)
            for colour, line in [boundary.on_white]
        ]
        figure.legend(
            handles=[
                Line2D([], [], ls="", **_STUDENT, label="reference: student (K > 1)"),
                Line2D([], [], ls="", **_BASE, label="reference: base"),
                Line2D([], [], color="black", lw=1.6, label="penalised logistic curve,\n95 % band (seeds as clusters)"),
                Line2D([], [], color="#CC79A7", lw=1.6, label=half),
                *predictions,
            ],
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        save(figure, paths)


def _across(axis, name: str, at: float) -> None:
    """Draw a prediction over the whole height of a panel, where there is one."""
    colour, line = _BOUNDARIES[name].on_white
    if math.isfinite(at):
        axis.axvline(at, color=colour, ls=line, lw=1.2)


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
        figure.suptitle(f"{title_of(dataset)} · bars: Wilson 95 %", fontsize=8)

        def settings_of(row):
            return "".join(f"{_SHORT.get(dim, dim)} {name_of(row[dim])}\n" for dim in told if dim in row)

        for place, row in enumerate(rows):
            for axis, kl_coef in zip(axes[place], columns, strict=True):
                _recovery_lines(axis, summary.sel({**row, "kl_coef": kl_coef}), view, arms)
                axis.set_ylim(-0.04, 1.04)
                if place == 0:
                    axis.set_title(f"β = {kl_coef:g}")
            axes[place, 0].set_ylabel(f"{settings_of(row)}share of seeds recovered")
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
            line[0].set_ylabel(f"{settings_of(row)}{_ALSO_LABELS[quantity]}" + ("" if varies else "\n(any β)"))
        for column in axes.T:
            lowest = [axis for axis in column if axis.get_visible()][-1]
            lowest.tick_params(labelbottom=True)
            lowest.set_xlabel(view.label)
        _letter(axes.ravel())
        handles = _arm_handles(arms, summary, view)
        ncols = 2 if len(columns) == 1 else 3 if len(handles) <= 6 else 4
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3)
        save(figure, paths)


def _shown(dataset: xr.Dataset, quantity: str) -> xr.DataArray:
    """A quantity, NaN where it says nothing."""
    return balance_of_recovered(dataset) if quantity == "target_balance" else dataset[quantity]


_SHORT = {"temperature": "τ =", "algorithm": "", "capacity": "K =", "target_weight": "weight"}


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
    axis.set_xticks(x, [text_of(value) for value in one[view.along].values], rotation=45 if len(x) > 4 else 0)
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
            label = _STYLE_LABELS[view.styles](text_of(chosen[view.styles]))
            handles.append(Line2D([], [], color="black", marker="o", ms=4, lw=1.0, label=label, **style))
    if "target_balance" in view.also:
        handles.append(Line2D([], [], ls="", label=f"numbers: recovered runs, where fewer than {_FEW}"))
    return handles

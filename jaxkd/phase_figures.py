"""Figures of recovery from finished stores alone: the phase diagram, the critical mass, recovery along one axis."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from scipy.special import expit

from jaxkd import pipelines
from jaxkd.looks import COLOURS, MARKERS, STYLE, algorithm_name, arm_name, save
from jaxkd.metrics import RECOVERED_MASS
from jaxkd.recovery import (
    BASE,
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
        "Gibbs prediction of the critical\nmass (β$_c$ = β)",
        "β$_c$ = β: the student's Gibbs\npolicy has half its mass on target\n(a, b: β above the line)",
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
    return algorithm_name(text_of(value))


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
                # The student is the reference of KD→Align alone.
                if name != "recovery_challenger":
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
                end = max(np.concatenate(contour.allsegs[0]), key=lambda point: point[1])
                edge = [withStroke(linewidth=2, foreground="black")]
                # On the line's own end: beside it may be another line.
                axis.annotate(
                    note, end, (0, 1.5), textcoords="offset points", color="white", fontsize=7, ha="center",
                    va="bottom", path_effects=edge,
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

_FAMILY_MARKERS = {2: "o", 3: "s", 4: "D", 5: "v", 6: "P", 7: "X", 8: "h"}
_LARGEST_STUDENT = 8


def _look(family: int) -> dict:
    """Of a family of references: the base apart, students from dark to light with their capacity."""
    if family == BASE:
        return {"color": "black", "marker": "^"}
    shade = 0.9 * (family - 2) / (_LARGEST_STUDENT - 2)
    return {"color": plt.get_cmap("viridis")(min(shade, 1.0)), "marker": _FAMILY_MARKERS.get(family, "o")}


def draw_critical_mass(
    by_coefficient: Mapping[float, tuple[Mapping[int, References], Sequence[CriticalMass]]],
    predicted: Predictions,
    *paths: Path,
    title: str = "",
) -> None:
    """Draw outcomes, probability of recovery and critical masses against the reference's mass, family by family.

    Below them the outcomes against the log-odds of the target under each reference's own Gibbs policy, with that
    policy's mass as a line: what alignments that reach their optimum lie on, whatever the shape of their reference.

    Args:
      by_coefficient: by KL coefficient, from `by_family`, and from `critical_mass` of each family in the same order.
      predicted: which boundaries there are, and where.
      paths: files to write; their endings choose the formats.
      title: what the runs share.
    """
    columns = len(by_coefficient)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            4,
            columns,
            figsize=(_width(columns), 9.4),
            sharey="row",
            squeeze=False,
            layout="constrained",
            gridspec_kw={"height_ratios": [3, 2, 2.4, 3]},
        )
        figure.suptitle(title, fontsize=8)
        for column, (kl_coef, (points, found)) in zip(axes.T, by_coefficient.items(), strict=True):
            outcomes, curves, lanes, odds = column
            outcomes.set_title(f"β = {kl_coef:g} ({_counted(points, 'mass')})")
            _outcomes(outcomes, points, "mass")
            _curves(curves, points, found)
            _lanes(lanes, found)
            for axis in (outcomes, curves, lanes):
                axis.set_xscale("log")
                for name, level in levels_of(predicted, kl_coef).items():
                    if name != "half_mass":
                        colour, line = _BOUNDARIES[name].on_white
                        axis.axvline(10.0**level, color=colour, ls=line, lw=1.0, zorder=0)
            for axis in (outcomes, curves):
                axis.sharex(lanes)
                axis.tick_params(labelbottom=False)
            lanes.set_xlabel("target mass m of the reference")
            odds.set_title(_counted(points, "log_odds"))
            _outcomes(odds, points, "log_odds")
            line = np.linspace(*odds.get_xlim(), 400)
            odds.plot(line, expit(line), color="0.35", lw=1.0, zorder=0.5)
            odds.set_xlabel("log-odds of the target under the\nreference's own Gibbs policy (nat)")
        outcome = "target mass\nafter alignment"
        for row, label in zip(axes, (outcome, "probability\nof recovery", "reference", outcome), strict=True):
            row[0].set_ylabel(label)
        _letter(axes.ravel())
        families = [one.family for _, found in by_coefficient.values() for one in found]
        figure.legend(
            handles=_critical_handles(list(dict.fromkeys(families)), predicted, all_of_them=True),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        save(figure, paths)


def _counted(points: Mapping[int, References], abscissa: str) -> str:
    """How many runs of how many seeds a panel shows."""
    shown = [(one, ~one.failed & np.isfinite(getattr(one, abscissa))) for one in points.values()]
    seeds = {seed for one, which in shown for seed in one.seed[which].tolist()}
    return f"{sum(which.sum() for _, which in shown)} runs of {len(seeds)} seeds"


def _outcomes(axis, points: Mapping[int, References], abscissa: str) -> None:
    """One point a run; the few bases above the many students."""
    for family, one in points.items():
        x, shown = getattr(one, abscissa), ~one.failed
        size, edge, above = (4.5, 0.4, 3) if family == BASE else (2.8, 0.0, 2)
        axis.plot(
            x[shown], one.outcome[shown], ls="", ms=size, mew=edge, mec="white", zorder=above, rasterized=True,
            alpha=0.9 if family == BASE else 0.55, **_look(family),
        )  # fmt: skip
    axis.axhline(RECOVERED_MASS, color="black", lw=0.5, ls=":")
    axis.set_ylim(-0.04, 1.04)


def _curves(axis, points: Mapping[int, References], found: Sequence[CriticalMass]) -> None:
    for one in found:
        # Where all recover or none does there is nothing to rise: the curve is its penalty's.
        if one.curve is not None and 0 < one.recovered < one.runs:
            line = np.linspace(*np.log10(one.seen), 300)
            probability = one.curve.probability(line)
            axis.plot(10.0**line, probability, lw=2.0 if one.family == BASE else 1.3, color=_look(one.family)["color"])
    axis.axhline(0.5, color="black", lw=0.5, ls=":")
    axis.set_ylim(-0.04, 1.04)


def _lanes(axis, found: Sequence[CriticalMass]) -> None:
    """A lane a family: its critical mass with the interval, cut at the masses seen, and the Gibbs prediction."""
    heights = np.arange(len(found))
    for height, one in zip(heights, found, strict=True):
        axis.axhline(height, color="0.9", lw=0.5, zorder=0)
        if one.is_seen:
            ends = np.clip(one.interval, *one.seen)
            axis.plot(ends, [height, height], color=_look(one.family)["color"], lw=1.6)
            axis.plot(one.mass, height, ms=5, mew=0, **_look(one.family))
        else:
            told = f"{one.recovered} of {one.runs} recover" if one.curve is not None else "no curve"
            axis.text(
                0.02, height, told, transform=axis.get_yaxis_transform(), fontsize=7, va="center",
                bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )  # fmt: skip
        if one.gibbs_mass is not None:
            axis.plot(one.gibbs_mass, height, zorder=4, **_GIBBS)
    axis.set_yticks(heights, [one.name for one in found])
    axis.set_ylim(len(found) - 0.5, -0.5)


_GIBBS = {"ls": "", "marker": "|", "color": "#D55E00", "ms": 9, "mew": 1.6}


def _critical_handles(families: Sequence[int], predicted: Predictions, all_of_them: bool) -> list[Line2D]:
    """What families and predictions look like; `all_of_them` has rows of points, curves and lanes."""
    handles = [
        Line2D([], [], ms=5, mew=0, lw=1.3, **_look(one), label="base" if one == BASE else f"student, K = {one}")
        for one in families
    ]
    there = levels_of(predicted, 1.0)
    if all_of_them:
        if "half_mass" in there:
            handles.append(Line2D([], [], **_GIBBS, label=_BOUNDARIES["half_mass"].text))
        handles.append(Line2D([], [], color="0.35", lw=1.0, label="the Gibbs policy's own mass"))
    elif "half_mass" in there:
        handles.append(Line2D([], [], color="0.35", ls="--", lw=1.0, label=_BOUNDARIES["half_mass"].text))
    for name in ("seen_at_once", "seen_ever") if all_of_them else ("seen_at_once",):
        if name in there:
            colour, line = _BOUNDARIES[name].on_white
            handles.append(Line2D([], [], color=colour, ls=line, lw=1.0, label=_BOUNDARIES[name].text))
    return handles


def draw_critical_mass_along_draws(
    by_coefficient: Mapping[float, Mapping[int, Sequence[CriticalMass]]],
    predicted: Predictions,
    *paths: Path,
    title: str = "",
) -> None:
    """Draw each family's critical mass against the draws of a step, beside the mass at which they hold one hit.

    Args:
      by_coefficient: by KL coefficient and draws a step, from `critical_mass` of each family.
      predicted: which boundaries there are; the number of draws is that of the abscissa.
      paths: files to write; their endings choose the formats.
      title: what the runs share.
    """
    columns = len(by_coefficient)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, columns, figsize=(_width(columns), 3.9), sharey=True, squeeze=False, layout="constrained"
        )
        figure.suptitle(f"{title} · bars: 95 %, seeds as clusters", fontsize=8)
        families: list[int] = []
        for axis, (kl_coef, by_draws) in zip(axes[0], by_coefficient.items(), strict=True):
            draws = np.asarray(sorted(by_draws))
            of_family: dict[int, list[CriticalMass]] = {}
            for count in draws:
                for one in by_draws[int(count)]:
                    of_family.setdefault(one.family, []).append(one)
            families += [family for family in of_family if family not in families]
            for shift, (family, found) in zip(np.linspace(-0.03, 0.03, len(of_family)), of_family.items(), strict=True):
                _along_draws(axis, draws * 10**shift, family, found)
            if predicted.draws_a_step:
                colour, line = _BOUNDARIES["seen_at_once"].on_white
                axis.plot(draws, 1 / draws, color=colour, ls=line, lw=1.2, zorder=0)
            axis.set(xscale="log", yscale="log", xlabel="draws n of a step", title=f"β = {kl_coef:g}")
            axis.minorticks_off()
            axis.set_xticks(draws, [f"{count}" for count in draws])
        axes[0, 0].set_ylabel("critical mass: target mass of the\nreference at which half recover")
        _letter(axes.ravel())
        handles = _critical_handles(families, predicted, all_of_them=False)
        beyond = {"ls": "", "color": "0.35", "ms": 5, "mfc": "white"}
        handles.append(Line2D([], [], marker="v", **beyond, label="below all masses seen"))
        handles.append(Line2D([], [], marker="^", **beyond, label="above all masses seen"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        save(figure, paths)


def _along_draws(axis, x: np.ndarray, family: int, found: Sequence[CriticalMass]) -> None:
    look = _look(family)
    mass = np.asarray([one.mass if one.is_seen else np.nan for one in found])
    low, high = np.transpose([np.clip(one.interval, *one.seen) if one.is_seen else (np.nan, np.nan) for one in found])
    ends = [np.maximum(mass - low, 0), np.maximum(high - mass, 0)]
    axis.errorbar(x, mass, yerr=ends, ms=5, lw=1.2, elinewidth=0.8, **look)
    for at, one in zip(x, found, strict=True):
        if not one.is_seen and not np.isnan(one.mass):
            below = one.mass < one.seen[0]
            axis.plot(at, one.seen[0 if below else 1], "v" if below else "^", ms=5, mfc="white", color=look["color"])
        if one.gibbs_mass is not None:
            axis.plot([at / 1.15, at * 1.15], [one.gibbs_mass] * 2, color=look["color"], ls="--", lw=1.0)


# --- readers' questions: recovery along one axis ---------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How the store of a preset is drawn.

    Attributes:
      along: the dimension on the abscissa.
      label: what it is, with its unit.
      logarithmic: whether the abscissa is.
      styles: a dimension whose two values are told apart by the line, filled and hollow markers; with more they have
        rows of their own.
      also: quantities shown in rows of their own, by name: ("target_balance", ...).
    """

    along: str
    label: str
    logarithmic: bool = False
    styles: str | None = None
    also: tuple[str, ...] = ()


VIEWS = {
    "noise": View("label_noise", "share of preference labels flipped", styles="temperature"),
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
    "temperature": "τ = {}".format,
    "starts": "EM starts of the base: {}".format,
    "match_component_evaluations": {"False": "same updates", "True": "same component evaluations"}.get,
}
_STYLE_SYMBOLS = {"temperature": "τ"}
_ALSO_LABELS = {
    "target_balance": "smallest / largest target\nmass (median of recovered)",
    "base_failed": "share of bases that\nmerge or miss a mode",
}
_FEW = 8  # a median of fewer runs says how many they are


def draw_along(dataset: xr.Dataset, summary: xr.Dataset, view: View, *paths: Path) -> None:
    """Draw recovery with Wilson's intervals along one axis: a column a coefficient, a row a remaining setting."""
    arms = [name for name in ("aligned_base", *pipelines.arms()) if name in summary.stage.values]
    if view.styles and summary.sizes.get(view.styles) != 2:
        view = replace(view, styles=None)
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
        # Where one panel is the lowest of its column, those beside it say what their abscissa is, too.
        for place in {max(np.flatnonzero([axis.get_visible() for axis in column])) for column in axes.T}:
            for axis in axes[place]:
                axis.tick_params(labelbottom=True)
                axis.set_xlabel(view.label)
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


def _depends(arm: str, dim: str | None) -> bool:
    """Whether a model may differ along a dimension: not along an axis of the pipelines that it has no part in."""
    known = arm == pipelines.ROOT or arm in pipelines.STAGES
    return dim not in pipelines.AXES or not known or dim in pipelines.axes_of(arm)


class _Line(NamedTuple):
    """A line of a panel: its arm, what of the panel it shows, its look, its abscissae and which values stand there."""

    arm: str
    chosen: dict
    look: dict
    x: np.ndarray
    places: np.ndarray
    marked: slice


def _lines(one, view: View, arms, x: np.ndarray) -> Iterator[_Line]:
    """What varies along the abscissa, side by side; what does not is a level, marked once and beside the others."""
    styles = list(_style_values(one, view))
    pairs = [
        (arm, chosen, style) for arm in arms for chosen, style in styles[: None if _depends(arm, view.styles) else 1]
    ]
    levels = [pair for pair in pairs if not _depends(pair[0], view.along)]
    varying = iter(_nudged(x, len(pairs) - len(levels), view.logarithmic))
    beside = iter(_place_of_levels(x) + 0.036 * _span(x) * (np.arange(len(levels)) - (len(levels) - 1) / 2))
    order = np.argsort(x)
    for arm, chosen, style in pairs:
        size = 4 if len(styles) == 1 else 3.3
        look = {"color": COLOURS[arm], "marker": MARKERS[arm], "ms": size, "lw": _line_width(one, view)} | style
        if _depends(arm, view.along):
            yield _Line(arm, chosen, look, next(varying)[order], order, slice(None))
        else:
            ends = np.asarray([x.max(), next(beside)])
            look |= {"markevery": [1], "zorder": 1.8}
            yield _Line(arm, chosen, look, ends, np.zeros(2, int), slice(1, None))


def _span(x: np.ndarray) -> float:
    return max(float(np.ptp(x)), 0.5)


def _place_of_levels(x: np.ndarray) -> float:
    """Beyond the lowest temperature: where what does not depend on it is marked."""
    return float(x.min() - 0.18 * _span(x))


def _recovery_lines(axis, one: xr.Dataset, view: View, arms) -> None:
    x = _abscissa(one[view.along].values)
    for line in _lines(one, view, arms, x):
        values = one.sel(line.chosen).sel(stage=line.arm)
        rate, low, high = (values[n].values[line.places] for n in ("recovery", "recovery_low", "recovery_high"))
        ends = np.zeros((2, len(rate)))
        ends[:, line.marked] = np.maximum([rate - low, high - rate], 0)[:, line.marked]
        axis.errorbar(line.x, rate, yerr=ends, elinewidth=0.6, **line.look)
    _ticks(axis, one, view, x, arms)


def _quantity_lines(axis, one: xr.DataArray, view: View, arms) -> None:
    x = _abscissa(one[view.along].values)
    if "stage" not in one.dims:
        order = np.argsort(x)
        for chosen, style in _style_values(one, view):
            values = one.sel(chosen).mean("seed").values.ravel()[order]
            axis.plot(x[order], values, color="black", marker="x", ms=4, lw=1.0, **style)
    else:
        empty = True
        for line in _lines(one, view, arms, x):
            if line.chosen.get("num_targets") == 1:  # one target is as large as itself
                continue
            runs = one.sel(line.chosen).sel(stage=line.arm)
            count, values = runs.notnull().sum("seed").values[line.places], runs.median("seed").values[line.places]
            axis.plot(line.x, values, **line.look)
            for at, value, few in zip(line.x[line.marked], values[line.marked], count[line.marked], strict=True):
                if 0 < few < _FEW:
                    axis.annotate(
                        f"{few}", (at, value), (0, 4), textcoords="offset points", ha="center", fontsize=7,
                        color=line.look["color"],
                    )  # fmt: skip
            empty &= not count.any()
        if empty:
            axis.text(0.5, 0.5, "no run recovered", transform=axis.transAxes, ha="center", va="center")
    _ticks(axis, one, view, x, arms)


def _nudged(x: np.ndarray, count: int, logarithmic: bool) -> np.ndarray:
    """Abscissae of so many lines, [count, points]: side by side, so that no marker hides another of the same height."""
    at = np.log10(x) if logarithmic else x
    gaps = np.diff(np.sort(at))
    # Far less than from one value to the next: whose point it is stays plain.
    step = min(0.015 * np.ptp(at), 0.5 * gaps.min() / count) if gaps.size else 0.06 / count
    shifted = at + step * (np.arange(count)[:, None] - (count - 1) / 2)
    return 10**shifted if logarithmic else shifted


def _ticks(axis, one, view: View, x: np.ndarray, arms) -> None:
    if view.logarithmic:
        axis.set_xscale("log")
    axis.minorticks_off()
    names = [text_of(value) for value in one[view.along].values]
    if view.along == "temperature":
        margin, right = 0.08 * _span(x), x.min()
        if not all(_depends(arm, view.along) for arm in arms):
            right = _place_of_levels(x)
            axis.axvspan(right - margin, right + margin, color="0.94", lw=0, zorder=0)
            x, names = np.append(x, right), [*names, "any τ"]
        axis.set_xlim(x.max() + margin, right - margin)
    axis.set_xticks(x, names, rotation=45 if len(x) > 4 else 0)


def _arm_handles(arms, summary, view: View) -> list[Line2D]:
    handles = [Line2D([], [], color=COLOURS[arm], marker=MARKERS[arm], ms=4, label=arm_name(arm)) for arm in arms]
    for chosen, style in _style_values(summary, view):
        if chosen:
            label = _STYLE_LABELS[view.styles](text_of(chosen[view.styles]))
            handles.append(Line2D([], [], color="black", marker="o", ms=4, lw=1.0, label=label, **style))
    if level := [arm_name(arm) for arm in arms if not _depends(arm, view.styles)]:
        handles.append(Line2D([], [], ls="", label=f"any {_STYLE_SYMBOLS[view.styles]}: {', '.join(level)}"))
    if "target_balance" in view.also:
        handles.append(Line2D([], [], ls="", label=f"numbers: recovered runs, where fewer than {_FEW}"))
    return handles

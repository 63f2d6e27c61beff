"""What a throughput benchmark measured: rates, ratios, growth of the cost, as a table and as a figure.

Everything is made from the plain JSON that `experiments/benchmark_sweep.py` writes, so figure and table can be had
again without measuring. A timing is a row `{"runs": int, "seconds": [s, one a repetition], …}`; medians are used
throughout, since repetitions on a shared machine differ by what others do on it.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from jaxkd.looks import STYLE, save

_GROWTH = {
    "runs": ("runs", "#0072B2", "o"),
    "steps": ("steps (updates and EM iterations)", "#D55E00", "s"),
    "samples": ("samples (draws and EM points)", "#009E73", "^"),
    "components": ("capacity (components)", "#CC79A7", "D"),
}
_DEVICES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def milliseconds_a_run(timing: Mapping) -> float:
    """Median over repetitions (ms a run)."""
    return 1e3 * statistics.median(timing["seconds"]) / timing["runs"]


def smallest_milliseconds_a_run(timing: Mapping) -> float:
    """The fastest repetition (ms a run): what the machine can do when nobody else uses it."""
    return 1e3 * min(timing["seconds"]) / timing["runs"]


def best(results: Mapping) -> Mapping:
    """The fastest row of the engine, by its median."""
    return min(results["engine"], key=milliseconds_a_run)


def ratios(results: Mapping) -> dict[str, float]:
    """How many times the runs a second of each other form the best row of the engine makes."""
    fastest = milliseconds_a_run(best(results))
    others = {"loop": results["loop"], "torch": results["torch"]}
    return {name: milliseconds_a_run(timing) / fastest for name, timing in others.items() if timing is not None}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds on log size: 1 where cost is proportional to size.

    Raises:
      ValueError: when there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"a slope needs two different sizes, got {list(sizes)}")
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth_slope(rows: Sequence[Mapping]) -> float:
    """Slope of the whole call's time over one axis of the growth measurement."""
    return slope([row["size"] for row in rows], [statistics.median(row["seconds"]) for row in rows])


def table(results: Mapping) -> str:
    """All timings as text: compile and run apart, and the growth with its slopes."""
    lines = [f"{'form':<42}{'chunk':>6}{'compile s':>11}{'ms a run':>10}{'smallest':>10}{'runs/s':>9}"]

    def line(form, timing, chunk="–"):
        compiled = f"{timing['compile_s']:.1f}" if "compile_s" in timing else "–"
        median, smallest = milliseconds_a_run(timing), smallest_milliseconds_a_run(timing)
        lines.append(f"{form:<42}{chunk:>6}{compiled:>11}{median:>10.2f}{smallest:>10.2f}{1e3 / median:>9.1f}")

    for row in results["engine"]:
        line(f"jaxkd, {_counted(row['devices'], 'device')}", row, str(row["chunk"]))
    line("jitted run after run, 1 device", results["loop"])
    if results["torch"] is not None:
        processes = _counted(results["torch"]["processes"], "process", "es")
        line(f"eager PyTorch, {processes} of one thread", results["torch"])
    lines += ["", f"{'cost against':<36}{'sizes':<20}{'s a call':<36}{'slope':>6}"]
    for axis, rows in results["growth"].items():
        sizes = ", ".join(str(row["size"]) for row in rows)
        seconds = ", ".join(f"{statistics.median(row['seconds']):.3f}" for row in rows)
        lines.append(f"{_GROWTH[axis][0]:<36}{sizes:<20}{seconds:<36}{growth_slope(rows):>6.2f}")
    return "\n".join(lines)


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def draw(results: Mapping, *paths: Path) -> None:
    """Draw runs a second against chunk size and device count, and how the cost grows.

    Args:
      results: the benchmark's JSON.
      paths: files to write; their endings choose the formats.
    """
    with plt.rc_context(STYLE):
        figure, (rates, growth) = plt.subplots(1, 2, figsize=(7.2, 3.1), layout="constrained")
        _draw_rates(rates, results)
        _draw_growth(growth, results)
        save(figure, paths)


def _draw_rates(axis, results: Mapping) -> None:
    chunks = sorted({row["chunk"] for row in results["engine"]})
    counts = sorted({row["devices"] for row in results["engine"]})
    for count, (colour, marker) in zip(counts, _DEVICES * len(counts), strict=False):
        rows = sorted((row for row in results["engine"] if row["devices"] == count), key=lambda row: row["chunk"])
        middle = np.array([1e3 / milliseconds_a_run(row) for row in rows])
        rate = np.array([[row["runs"] / seconds for seconds in row["seconds"]] for row in rows])
        spread = [middle - rate.min(axis=1), rate.max(axis=1) - middle]
        label = f"jaxkd, {_counted(count, 'device')}"
        axis.errorbar(
            [row["chunk"] for row in rows], middle, yerr=spread, color=colour, marker=marker, ms=4, lw=1.2,
            elinewidth=0.7, label=label,
        )  # fmt: skip
    loop = 1e3 / milliseconds_a_run(results["loop"])
    axis.axhline(loop, color="black", lw=1, ls="--", label="jitted run after run, 1 device")
    if results["torch"] is not None:
        rate = 1e3 / milliseconds_a_run(results["torch"])
        processes = _counted(results["torch"]["processes"], "process", "es")
        axis.axhline(rate, color="#555555", lw=1, ls=":", label=f"eager PyTorch, {processes}")
    axis.set(
        xscale="log", yscale="log", xlabel="chunk (runs that a device computes at a time)", ylabel="runs per second"
    )
    axis.set_xticks(chunks, [str(chunk) for chunk in chunks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(plt.matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set_title("a   Throughput of the workload (bars: all repetitions)", loc="left")
    # The engine's curves first, as they stand above the lines.
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("jaxkd"))
    axis.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, loc="center right",
                bbox_to_anchor=(1.0, 0.32))  # fmt: skip


def _draw_growth(axis, results: Mapping) -> None:
    largest = 1.0
    for name, rows in results["growth"].items():
        label, colour, marker = _GROWTH[name]
        sizes = np.array([row["size"] for row in rows], float)
        seconds = np.array([statistics.median(row["seconds"]) for row in rows])
        largest = max(largest, sizes[-1] / sizes[0])
        axis.plot(
            sizes / sizes[0], seconds / seconds[0], color=colour, marker=marker, ms=4, lw=1.2,
            label=f"{label}: slope {growth_slope(rows):.2f}",
        )  # fmt: skip
    axis.plot([1, largest], [1, largest], color="black", lw=0.8, ls="--", label="proportional: slope 1")
    axis.set(xscale="log", yscale="log", xlabel="size over the smallest size", ylabel="time over that of the smallest")
    ticks = [1, 2, 4, 8]
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_title("b   How the cost of a call grows", loc="left")
    axis.legend(frameon=False, loc="upper left")

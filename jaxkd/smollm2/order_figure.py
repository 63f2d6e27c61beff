"""The figure of an order on a language model, from what its run folder holds."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from jaxkd.align import ALGORITHMS
from jaxkd.durable import METRICS, entries, read_json
from jaxkd.looks import COLOURS, LABELS, MARKERS, STYLE, algorithm_name, arm_name, save
from jaxkd.smollm2 import behaviours
from jaxkd.smollm2.laboratory import BEHAVIOUR
from jaxkd.smollm2.order import CEILING
from jaxkd.smollm2.report import Run, not_admitted
from jaxkd.smollm2.rows import Row

_FREQUENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SIGNS = (None, "+", ".", "|", "1", "_")
"""Inside a point: of which algorithm it is."""
_NEVER = r"$\downarrow$"
"""What stands for a frequency of 0: no arm's own marker."""
_MOST_LINES = 28  # of completions: more leave no room for the panels


@dataclass(frozen=True)
class _Kinds:
    """What else than an arm and a temperature there is in a figure; what there is one of needs no telling apart.

    Attributes:
      algorithms: told apart by a sign inside the points.
      students: told apart by size.
      kl_coefs: told beside the points.
      temperatures: other than 1, those of most models first: the first is what a hollow point means by itself, others
        are told beside the points.
      seeds: told beside curves.
    """

    algorithms: tuple[str, ...]
    students: tuple[str, ...]
    kl_coefs: tuple[float, ...]
    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, shown: list[Row]) -> "_Kinds":
        """Of the models that are there."""
        return cls(
            tuple(dict.fromkeys(row.algorithm for row in shown if row.algorithm)),
            tuple(dict.fromkeys(row.student for row in shown if row.student)),
            tuple(sorted({row.kl_coef for row in shown if not math.isnan(row.kl_coef)})),
            tuple(tau for tau, _ in Counter(row.temperature for row in shown if _distilled_apart(row)).most_common()),
            tuple(sorted({row.seed for row in shown})),
        )

    def sign(self, algorithm: str) -> str | None:
        """The marker inside a point; None for no sign."""
        return _SIGNS[self.algorithms.index(algorithm) % len(_SIGNS)] if algorithm in self.algorithms else None

    def size(self, student: str) -> float:
        """Of a point (pt)."""
        return 6.5 - 2.5 * self.students.index(student) / len(self.students) if student in self.students else 6.5

    def point(self, row: Row) -> str:
        """The point of a model on its axes, in words."""
        return self._told(row, not math.isnan(row.temperature))

    def note(self, row: Row) -> str:
        """What stands beside a point: what neither its marker nor its being hollow says."""
        return self._told(row, row.temperature in self.temperatures[1:])

    def _told(self, row: Row, with_temperature: bool) -> str:
        told = [f"τ {row.temperature:g}"] if with_temperature else []
        told += [f"β {row.kl_coef:g}"] if len(self.kl_coefs) > 1 and not math.isnan(row.kl_coef) else []
        return ", ".join(told)

    def name(self, row: Row) -> str:
        """A model in words, its seed aside."""
        told = [arm_name(row.name), self.point(row)]
        told += [row.student] if len(self.students) > 1 else []
        told += [_algorithm(row.algorithm)] if len(self.algorithms) > 1 else []
        return ", ".join(filter(None, told))


def _colour(name: str) -> str:
    return "0.45" if name == CEILING else COLOURS[name]


def _marker(name: str) -> str:
    return "*" if name == CEILING else MARKERS[name]


def _algorithm(name: str) -> str:
    return algorithm_name(name) if name else ""


def draw(run: Run, *paths: Path) -> None:
    """Behaviour and reward against KL to the base, recall gap of the students, training curves, completions.

    Where the reward is the behaviour, its frequency is the mean reward; then the second panel tells how likely the
    completions that show it are to the truth. Where alignments learn from a user's pairs, it tells how many of those
    held out are ranked right. Students that were not admitted are named and not drawn: so far from the base, they would
    leave no room to what the figure is about.
    """
    order, rows, refused = run.order, run.rows, {*not_admitted(run)}
    found = {folder: values for folder, values in run.evaluations.items() if folder not in refused}
    kinds = _Kinds.of([rows[folder] for folder in found if folder in rows])
    behaviour = read_json(run.out / BEHAVIOUR)
    with plt.rc_context(STYLE):
        lines = _completions(found, rows, kinds, behaviours.parse(behaviour["spec"]), order.prompt + " … ")
        height, (handles, labels) = 0.135 * len(lines), _legend(found, rows, kinds)
        figure = plt.figure(figsize=(7.2, 6.1 + height + 0.17 * math.ceil(len(labels) / 4)), layout="constrained")
        figure.suptitle(_title(run, kinds), fontsize=8)
        grid = figure.add_gridspec(3, 2, height_ratios=(2.5, 2.5, height))
        axes = [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(2)]
        _frontier(axes[0], found, rows, kinds, "behaviour_frequency", f"share showing “{behaviour['chosen']}”")
        if order.preferences is not None:
            _frontier(axes[1], found, rows, kinds, "preference_accuracy", "held-out pairs ranked right")
        elif order.reward == "behaviour":
            precision = "log p* per token (nats)\nof those that show it"
            _frontier(axes[1], found, rows, kinds, "behaviour_precision", precision)
        else:
            _frontier(axes[1], found, rows, kinds, "reward", "mean reward (bars: 95 %)")
        _recall_gaps(axes[2], found, rows, kinds)
        _curves(axes[3], rows, kinds, "reward" if order.preferences is None else "loss")
        axes.append(figure.add_subplot(grid[2, :]))
        axes[4].axis("off")
        words = axes[4].text(
            -0.08, 1, "\n".join(lines), va="top", family="monospace", fontsize=6.3, transform=axes[4].transAxes
        )
        words.set_in_layout(False)  # it may be wider than the panels, which must not give way
        for axis, letter in zip(axes, "abcde", strict=True):
            axis.set_title(letter, loc="left", fontweight="bold")
        kept = max((len(values["completions"]) for values in found.values()), default=0)
        axes[4].set_title(
            "the first completion of each model (of several seeds: the first, and the farthest from the base),\n"
            f"and the first of {kept} that shows the behaviour (+)",
            fontsize=7,
        )
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        save(figure, paths)


def _title(run: Run, kinds: _Kinds) -> str:
    """What all models share, and which cut students were not admitted."""
    order = run.order
    told = [f"truth and base {order.truth}" if order.base == "truth" else f"truth {order.truth} · base {order.base}"]
    told += [_algorithm(name) for name in kinds.algorithms if len(kinds.algorithms) == 1]
    told += [f"β = {value:g}" for value in kinds.kl_coefs if len(kinds.kl_coefs) == 1]
    lines = [" · ".join(told), f"{order.evaluation.num_samples} completions per model · bars in a: Wilson 95 %"]
    refused = dict.fromkeys((run.rows[student].student, run.rows[student].seed) for student in not_admitted(run))
    named = " · ".join(f"student {name}, seed {seed}" for name, seed in refused)
    lines += [f"not admitted: {named} (not drawn)"] * bool(refused)
    return "\n".join(lines)


def _legend(found, rows, kinds: _Kinds) -> tuple[list, list[str]]:
    """Arms by colour and marker, then what a hollow point, a sign and a size mean, where there are such."""
    names = dict.fromkeys("base" if folder not in rows else rows[folder].name for folder in found)
    shown = {arm_name(name): _handle(name) for name in names}
    grey = {"ls": "none", "color": "0.4"}
    if kinds.temperatures:
        others = ", unless told" if len(kinds.temperatures) > 1 else ""
        words = f"hollow: distilled at τ = {kinds.temperatures[0]:g}{others}"
        shown[words] = Line2D([], [], marker="o", mfc="none", ms=6, **grey)
    if any(values["behaviour_frequency"] == 0 for values in found.values()):
        shown["never shown: at its upper limit"] = Line2D([], [], marker=_NEVER, ms=6, **grey)
    for name in kinds.algorithms if len(kinds.algorithms) > 1 else ():
        inside = Line2D([], [], marker=kinds.sign(name) or "none", ms=3.5, mew=0.8, **grey)
        shown[f"sign: {_algorithm(name)}"] = (Line2D([], [], marker="o", mfc="none", ms=6.5, **grey), inside)
    for name in kinds.students if len(kinds.students) > 1 else ():
        shown[f"size: student {name}"] = Line2D([], [], marker="o", ms=kinds.size(name), **grey)
    return list(shown.values()), list(shown)


def _handle(name: str) -> Line2D:
    return Line2D([], [], ls="none", marker=_marker(name), color=_colour(name), ms=6)


def _point(axis, x, y, error, row: Row | None, kinds: _Kinds) -> None:
    """One model; the base where there is no row."""
    name = "base" if row is None else row.name
    filled = row is None or not _distilled_apart(row)
    colour = _colour(name)
    axis.errorbar(
        x,
        y,
        yerr=None if error is None else np.reshape(error, (2, 1)),
        marker=_marker(name),
        color=colour,
        # Nothing inside, so that a point beneath another is seen.
        markerfacecolor=colour if filled else "none",
        linestyle="none",
        markersize=6.5 if row is None else kinds.size(row.student),
        elinewidth=0.8,
    )
    sign = None if row is None else kinds.sign(row.algorithm)
    if sign is not None:
        axis.plot(x, y, sign, color="white" if filled else colour, markersize=3.5, markeredgewidth=0.8, zorder=4)


def _distilled_apart(row: Row) -> bool:
    """Whether a model's student was distilled at another temperature than that of its teacher's own draws."""
    return not (math.isnan(row.temperature) or row.temperature == 1)


_BESIDE = (((5, 4), "left"), ((5, -9), "left"), ((-5, 4), "right"), ((-5, -9), "right"))


def _note(axis, x, y, words: str, colour: str, place: int = 0) -> None:
    """Say beside a point what its marker does not."""
    offset, side = _BESIDE[place % len(_BESIDE)]
    axis.annotate(words, (x, y), offset, textcoords="offset points", fontsize=6.5, color=colour, ha=side)


def _note_all(axis, points: list[tuple[float, float, str, str]]) -> None:
    """The same for (x, y, words, colour) of many points, once all are drawn: no note hides another.

    Points that lie together and have words and colour in common have one note; others stand at another side.
    """
    axis.autoscale_view()  # limits are found when they are asked for
    noted: list[tuple[np.ndarray, tuple[str, str]]] = []
    for x, y, *told in points:
        at = axis.transAxes.inverted().transform(axis.transData.transform((x, y)))
        near = {other for place, other in noted if (np.abs(at - place) < (0.12, 0.06)).all()}
        if tuple(told) not in near:
            _note(axis, x, y, *told, place=len(near))
        noted.append((at, tuple(told)))


def _frontier(axis, found, rows, kinds: _Kinds, quantity: str, label: str) -> None:
    """One point a model and seed; hollow where the distillation sharpened."""
    noted = []
    for folder, values in found.items():
        row = rows.get(folder)
        y = values[quantity]
        if quantity == "behaviour_frequency" and y == 0:
            # A logarithmic axis has no place for it.
            noted.append(_never_shown(axis, values, row, kinds))
            continue
        if quantity == "behaviour_frequency":
            low, high = (values[f"{quantity}_wilson_{end}"] for end in ("low", "high"))
            error = np.maximum([y - low, high - y], 0)
        else:
            error = [1.96 * values["reward_error"]] * 2 if quantity == "reward" else None
        _point(axis, values["kl_to_base"], y, error, row, kinds)
        if row is not None and kinds.note(row) and math.isfinite(y):
            noted.append((values["kl_to_base"], y, kinds.note(row), _colour(row.name)))
    axis.set(xlabel="KL to the base (nats per completion)", ylabel=label)
    if quantity == "behaviour_frequency":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in _FREQUENCIES if low <= tick <= high])
    _note_all(axis, noted)


def _never_shown(axis, values: dict, row: Row | None, kinds: _Kinds) -> tuple[float, float, str, str]:
    """A model without a completion that shows the behaviour, at the largest share that is compatible; its note."""
    name = "base" if row is None else row.name
    x, y, colour = values["kl_to_base"], values["behaviour_frequency_wilson_high"], _colour(name)
    size = 6.5 if row is None else kinds.size(row.student)
    axis.plot(x, y, marker=_NEVER, linestyle="none", color=colour, markersize=size)
    return x, y, ", ".join(filter(None, ["never", "" if row is None else kinds.note(row)])), colour


def _recall_gaps(axis, found, rows, kinds: _Kinds) -> None:
    """Recall gap and recall gap on the behaviour of everything that is no alignment's product, and of the arms."""
    shown = [(rows[folder], values) for folder, values in found.items() if folder in rows]

    def name_of(row):
        words = [LABELS[row.name], kinds.point(row)]
        return ", ".join(filter(None, [*words, "" if row.student == "same" else row.student]))

    names = list(dict.fromkeys(name_of(row) for row, _ in shown))
    for row, values in shown:
        x = names.index(name_of(row))
        _point(axis, x - 0.12, values["recall_gap"], None, row, kinds)
        axis.plot(x + 0.12, values["target_recall_gap"], "_", color=_colour(row.name), markersize=9)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=6.5)
    axis.set_ylabel("recall gap (nats per completion)\ndashes: where the behaviour shows")
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)


def _curves(axis, rows, kinds: _Kinds, quantity: str) -> None:
    """Loss, or reward of the draws, along every alignment; and of the draws apart that it was looked at by."""
    handles, ends = {}, []
    for folder, row in rows.items():
        path = folder / METRICS
        if not row.is_alignment or not path.exists():
            continue
        logged = entries(path)
        values = np.asarray([entry[quantity] for entry in logged])
        if quantity == "reward" and ALGORITHMS[row.algorithm].data:
            # The reward of a fixed set says nothing of the policy.
            values = values[:0]
        # A step sees few draws.
        width = min(4, max(1, len(values) // 4))
        running = np.convolve(values, np.ones(width) / width, mode="valid") if len(values) else values
        look = {"color": _colour(row.name), "linestyle": "--" if _distilled_apart(row) else "-"}
        axis.plot(
            np.arange(width, width + len(running)),
            running,
            linewidth=kinds.size(row.student) / 6,
            marker=kinds.sign(row.algorithm) or ".",
            markersize=3,
            **look,
        )
        name = arm_name(row.name) + (", τ ≠ 1" if _distilled_apart(row) else "")
        handles[name] = Line2D([], [], linewidth=1, **look)
        told = ", ".join(filter(None, [kinds.note(row), f"seed {row.seed}" if len(kinds.seeds) > 1 else ""]))
        if len(values) and told:
            ends.append((running[-1], told, look["color"], look["linestyle"]))
        if quantity != "reward":
            continue
        looks = [(entry["step"] + 1, entry["look_reward"]) for entry in logged if "look_reward" in entry]
        axis.plot(*zip(*looks, strict=True) if looks else ([], []), "x", color=_colour(row.name), markersize=4)
    # Above the highest point, so that the legend hides none.
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.075 * len(handles) * (high - low))
    _note_ends(axis, ends)
    axis.legend(handles.values(), handles.keys(), loc="upper left", handlelength=3, edgecolor="none")
    rewards = "mean reward of up to 4 steps' draws\n(crosses: of 64 draws apart)"
    axis.set(xlabel="step of the alignment", ylabel=rewards if quantity == "reward" else "mean loss of up to 4 steps")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _note_ends(axis, ends: list[tuple[float, str, str, str]]) -> None:
    """Say at the right what each curve is, (height, words, colour, dashes), none on another, in the order of ends."""
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = sorted((to_axes.transform((0, y))[1], *told) for y, *told in ends if math.isfinite(y))
    step = min(0.055, 1 / max(len(ends), 1))
    places = np.asarray([height for height, *_ in ends])
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    # What was pushed beyond the top comes back, and pushes those below it.
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1 - step * (len(places) - 1 - i))
    for place, (height, words, colour, dashes) in zip(places, ends, strict=True):
        axis.annotate(
            words,
            (1, height),
            (1.05, place),
            xycoords="axes fraction",
            fontsize=6 if step == 0.055 else 5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0, "ls": dashes},
        )


def _completions(found, rows, kinds: _Kinds, behaviour: behaviours.Behaviour, prompt: str) -> list[str]:
    """Two completions of each model that is shown: the first, and the first other that shows the behaviour."""
    shown = [
        ("base" if folder not in rows else kinds.name(rows[folder]) + seed, values)
        for folder, values, seed in _shown_models(found, rows)
    ]
    # With a line each, no more have room.
    widest = max((len(name) for name, _ in shown[:_MOST_LINES]), default=0)
    width = max(40, 118 - widest - len(prompt))
    blocks = []
    for name, values in shown:
        first, *others = values["completions"]
        both = [first, *[other for other in others if behaviour(other)][:1]]
        texts = [textwrap.shorten(" ".join(_printed(one).split()), width, placeholder=" …") for one in both]
        signs = ["+" if behaviour(one) else " " for one in both]
        names = [name, ""]
        blocks.append(
            [
                f"{name:<{widest}} {sign} {prompt}{text}".replace("$", r"\$")
                for name, sign, text in zip(names, signs, texts, strict=False)
            ]
        )
    return _at_most(blocks, _MOST_LINES)


def _at_most(blocks: list[list[str]], most: int) -> list[str]:
    """The lines of as many models as have room, and how many have none."""
    lines: list[str] = []
    for place, block in enumerate(blocks):
        left = len(blocks) - place
        if len(lines) + len(block) > most - (left > 1):
            return [*lines, f"… {left} more {'model' if left == 1 else 'models'}"]
        lines += block
    return lines


def _printed(words: str) -> str:
    """A text in letters that the figure's fonts have; a dot for any other."""
    return "".join(sign if sign.isspace() or (sign.isprintable() and ord(sign) < 0x250) else "·" for sign in words)


def _shown_models(found, rows) -> Iterator[tuple[Path, dict, str]]:
    """Of every model the first seed and, where another went farther from the base, the one that went farthest."""
    groups: dict[tuple, list[tuple[Path, dict]]] = {}
    for folder, values in found.items():
        row = rows.get(folder)
        key = () if row is None else (row.name, row.student, row.algorithm, row.temperature, row.kl_coef)
        groups.setdefault(key, []).append((folder, values))
    for group in groups.values():
        farthest = max(group, key=lambda one: np.nan_to_num(one[1]["kl_to_base"], nan=-np.inf))
        for folder, values in [group[0]] if farthest is group[0] else [group[0], farthest]:
            yield folder, values, f", seed {rows[folder].seed}" if len(group) > 1 else ""

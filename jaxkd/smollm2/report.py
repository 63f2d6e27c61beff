"""The results of an order on a language model: one labelled data set, a table and a figure, from a run folder alone."""

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from jaxkd import pipelines, statistics
from jaxkd.align import ALGORITHMS
from jaxkd.durable import METRICS, read_record
from jaxkd.figures import ALGORITHM_LABELS, COLOURS, LABELS, MARKERS, STYLE, save
from jaxkd.smollm2 import behaviours
from jaxkd.smollm2.cost import Cost
from jaxkd.smollm2.evaluate import QUANTITIES
from jaxkd.smollm2.order import BEHAVIOUR, CEILING, EVALUATION, Order, Row, rows_of

DIMS = ("algorithm", "student", "temperature", "kl_coef", "seed", "stage")
COSTS = {
    "tokens_sampled": ("tokens sampled to make the model and what it is made from, looks along training too", "token"),
    "tokens_trained": ("tokens trained on, the same", "token"),
    "tokens_scored": ("tokens scored, the same", "token"),
    "model_flops": ("model FLOPs by formula, the same", "FLOP"),
    "seconds": ("wall-clock, the same", "s"),
}
ENCOUNTERS = {
    "expected_target_hits": ("n·T·m: draws of the alignment, times the behaviour's frequency where it starts", "draw"),
    "target_hits": ("draws of the alignment that showed the behaviour", "draw"),
    "first_hit_step": ("first step that saw one (NaN: none did)", "step"),
}
_FREQUENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_LABELS = LABELS | {CEILING: "ceiling"}
_COLOURS = COLOURS | {CEILING: "0.45"}
_MARKERS = MARKERS | {CEILING: "*"}


def evaluations(order: Order, out: Path) -> dict[Path, dict]:
    """What was measured, by folder; rows that are not finished are not there."""
    found = {}
    for folder in (out / "base", *(row.folder for row in rows_of(order, out))):
        path = folder / EVALUATION
        if path.exists():
            found[folder] = json.loads(path.read_text(encoding="utf-8"))
    return found


def measured(order: Order, out: Path) -> dict[Path, dict]:
    """The same, with what each model cost and what its alignment met."""
    rows = {row.folder: row for row in rows_of(order, out)}
    found = evaluations(order, out)
    whole = {}
    for folder, values in found.items():
        row = rows.get(folder)
        more = Cost() if row is None else cost_of(row, rows)
        whole[folder] = values | more.to_dict() | (_encounters(order, row, found) if row is not None else {})
    return whole


def _encounters(order: Order, row: Row, found: dict[Path, dict]) -> dict[str, float]:
    """How often an alignment met the behaviour, and how often it would have, had it gone on drawing as it began."""
    path = row.folder / METRICS
    # What nothing is rewarded for is no target.
    if order.outcome != "behaviour_frequency" or not isinstance(row.stage, pipelines.Align):
        return {}
    if ALGORITHMS[row.algorithm].data or not path.exists():
        return {}
    hits = np.asarray([entry["target_hits"] for entry in _entries(path)])
    settings = order.alignment.settings
    m = found.get(row.models[0], {}).get("behaviour_frequency", math.nan)
    return {
        "expected_target_hits": m * settings.batch_size * len(hits),
        "target_hits": float(hits.sum()),
        "first_hit_step": float(np.argmax(hits > 0)) if hits.any() else math.nan,
    }


def _entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def failures(order: Order, out: Path) -> dict[Path, str]:
    """Why models could not be made, by folder."""
    records = {row.folder: read_record(row.folder) or {} for row in rows_of(order, out)}
    return {folder: record["failed"] for folder, record in records.items() if "failed" in record}


def cost_of(row: Row, rows: dict[Path, Row]) -> Cost:
    """What it takes to make a model, with all that it is made from."""
    seen, todo, total = set(), [row.folder], Cost()
    while todo:
        folder = todo.pop()
        record = read_record(folder)
        if folder in seen or "cost" not in (record or {}):
            continue
        seen.add(folder)
        total = total.add(Cost.from_dict(record["cost"]))
        todo += rows[folder].models if folder in rows else ()
    return total


def to_dataset(order: Order, out: Path) -> xr.Dataset:
    """Everything measured, with a dimension for every axis; what an axis does not change is repeated along it.

    Models that were not made are NaN.
    """
    rows = {row.folder: row for row in rows_of(order, out)}
    found = measured(order, out)
    seeds = sorted({row.seed for row in rows.values()})
    stages = ["base", *dict.fromkeys(row.name for row in rows.values())]
    coords = {
        "algorithm": list(order.algorithms),
        "student": list(order.students),
        "temperature": list(order.temperatures),
        "kl_coef": list(order.kl_coefs),
        "seed": seeds,
        "stage": stages,
    }
    names = {**QUANTITIES, **COSTS, **ENCOUNTERS}
    values = {name: np.full([len(coords[dim]) for dim in DIMS], np.nan) for name in names}

    def put(index, quantities):
        for name, value in quantities.items():
            if name in values:
                values[name][index] = value

    everywhere = (slice(None),) * 5
    if out / "base" in found:
        put((*everywhere, 0), found[out / "base"])
    for folder, row in rows.items():
        if folder not in found:
            continue
        own = {dim: getattr(row, dim) for dim in DIMS[:5]}
        index = tuple(
            slice(None) if own[dim] == "" or own[dim] != own[dim] else coords[dim].index(own[dim]) for dim in DIMS[:5]
        )
        put((*index, stages.index(row.name)), found[folder])
    dataset = xr.Dataset({name: (DIMS, array) for name, array in values.items()})
    labels = {dim: _column(column) for dim, column in coords.items()}
    dataset = dataset.assign_coords(labels)
    for name, (long_name, unit) in names.items():
        dataset[name].attrs = {"long_name": long_name, "units": unit}
    dataset.temperature.attrs = {"long_name": "distillation temperature τ", "units": "1"}
    dataset.kl_coef.attrs = {"long_name": "KL coefficient β", "units": "reward/nat"}
    return dataset


def _column(values: list) -> np.ndarray:
    return np.asarray(values, np.dtypes.StringDType()) if isinstance(values[0], str) else np.asarray(values)


# --- table -----------------------------------------------------------------------------------------------------------

_KEYS = ("arm", "student", "algorithm", "temperature", "kl_coef")
TABLE_QUANTITIES = (
    "behaviour_frequency",
    "reward",
    "objective",
    "kl_to_base",
    "precision_per_token",
    "behaviour_precision",
    "recall_gap",
    "target_recall_gap",
    "bounded_recall",
    "held_out_perplexity",
    "distinct_2",
    "self_bleu",
    "preference_accuracy",
    "model_flops",
    "seconds",
    "tokens_sampled",
    "tokens_trained",
    "expected_target_hits",
    "target_hits",
    "first_hit_step",
)


def table(order: Order, out: Path) -> list[dict]:
    """One row an arm, algorithm, student and point of its axes: every seed's value, mean and t interval.

    What `seed_points` lists are the seeds of the values that the other columns of points list, "" for the base.
    """
    found = measured(order, out)
    groups: dict[tuple, dict] = {}
    if out / "base" in found:
        groups[("base", "", "", math.nan, math.nan)] = {"": found[out / "base"]}
    for row in rows_of(order, out):
        if row.folder in found:
            groups.setdefault(_key(row), {})[row.seed] = found[row.folder]
    base = found.get(out / "base", {}).get("reward", math.nan)
    return [_table_row(key, runs, base) for key, runs in groups.items()]


def _key(row: Row) -> tuple:
    """What the seeds of a model have in common."""
    return row.name, row.student, row.algorithm, row.temperature, row.kl_coef


def _table_row(key, runs: dict[int | str, dict], base_reward: float) -> dict:
    row = dict(zip(_KEYS, key, strict=True))
    row["seeds"] = len(runs)
    row["seed_points"] = " ".join(map(str, runs))
    for name in TABLE_QUANTITIES:
        values = [run.get(name, math.nan) for run in runs.values()]
        interval = statistics.t_interval(values) if np.isfinite(values).any() else None
        row[name] = math.nan if interval is None else interval.mean
        row[f"{name}_low"] = math.nan if interval is None else interval.low
        row[f"{name}_high"] = math.nan if interval is None else interval.high
        row[f"{name}_points"] = " ".join(f"{value:.6g}" for value in values)
    # Of two or three seeds that differ, a t interval reaches beyond what a share can be.
    for end in ("low", "high"):
        row[f"behaviour_frequency_{end}"] = float(np.clip(row[f"behaviour_frequency_{end}"], 0, 1))
    petaflops = row["model_flops"] / 1e15
    row["reward_gain_per_petaflop"] = (row["reward"] - base_reward) / petaflops if petaflops > 0 else math.nan
    return row


def format_table(rows: list[dict]) -> str:
    """The table for a terminal: the frequency of every seed, means over seeds, and a t interval where there are two."""
    last = ""
    if any(math.isfinite(row["preference_accuracy"]) for row in rows):
        last = "held-out pairs ranked right"
    elif any(math.isfinite(row["target_hits"]) for row in rows):
        last = "n·T·m → seen"
    head = (
        f"{'arm':<22}{'student':<11}{'algorithm':<17}{'τ':>5}{'β':>6}  {'frequency of the behaviour':<52}{'reward':>8}"
        f"{'KL to':>8}{'recall':>9}{'target':>9}{'perple-':>9}{'model':>8}{'reward gain':>12}\n"
        f"{'':<61}  {'(every seed: its own) mean [95 % t interval]':<52}{'':>8}{'base':>8}{'gap':>9}{'rec. gap':>9}"
        f"{'xity':>9}{'PFLOP':>8}{'per PFLOP':>12}   {last}"
    )
    return "\n".join([head, *(_format_row(row) for row in rows)])


def _format_row(row: dict) -> str:
    seeds = [f"{seed}:" for seed in row["seed_points"].split()] or [""]
    values = [f"{float(value):.4f}" for value in row["behaviour_frequency_points"].split()]
    points = " ".join(map("".join, zip(seeds, values, strict=True)))
    interval = f"{row['behaviour_frequency']:.4f}"
    if math.isfinite(row["behaviour_frequency_low"]):
        interval += f" [{row['behaviour_frequency_low']:.3f}, {row['behaviour_frequency_high']:.3f}]"
    frequency = f"({points}) {interval}"
    return (
        f"{row['arm']:<22}{row['student'][-10:]:<11}{row['algorithm']:<17}{_blank(row['temperature']):>5}"
        f"{_blank(row['kl_coef']):>6}  {frequency:<52}{row['reward']:>8.3f}{row['kl_to_base']:>8.2f}"
        f"{row['recall_gap']:>9.2f}{row['target_recall_gap']:>9.2f}{row['held_out_perplexity']:>9.2f}"
        f"{row['model_flops'] / 1e15:>8.3f}{row['reward_gain_per_petaflop']:>12.3f}   {_seen(row)}"
    )


def _seen(row: dict) -> str:
    """Held-out pairs ranked right, or draws of an alignment that showed the behaviour: expected at first, and seen."""
    if math.isfinite(row["preference_accuracy"]):
        return f"{100 * row['preference_accuracy']:.1f} %"
    if math.isnan(row["target_hits"]):
        return ""
    return f"{row['expected_target_hits']:.1f} → {row['target_hits']:.0f}"


def _blank(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"


def stage_costs(order: Order, out: Path) -> list[dict]:
    """What each kind of stage itself took, to make and to measure: means over its seeds, one row a kind."""
    groups: dict[tuple, list[dict]] = {}
    measured = evaluations(order, out)
    if out / "base" in measured:
        made = read_record(out / "base") or {}
        groups[("base", "", "", math.nan, math.nan)] = [_both_costs(made, measured[out / "base"])]
    for row in rows_of(order, out):
        record = read_record(row.folder) or {}
        if "cost" in record:
            groups.setdefault(_key(row), []).append(_both_costs(record, measured.get(row.folder, {})))
    return [
        dict(zip(_KEYS, key, strict=True))
        | {"seeds": len(runs)}
        | {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        for key, runs in groups.items()
    ]


def _both_costs(record: dict, evaluation: dict) -> dict[str, float]:
    nothing = Cost().to_dict()
    kinds = (("made", record.get("cost", nothing)), ("measured", evaluation.get("cost", nothing)))
    return {f"{kind}_{name}": cost[name] for kind, cost in kinds for name in nothing}


def format_costs(rows: list[dict]) -> str:
    """The costs for a terminal."""
    head = (
        f"{'stage':<22}{'student':<11}{'algorithm':<17}{'τ':>5}{'β':>6}  {'to make it:':<43}to measure it:\n"
        f"{'':<61}  {'sampled':>10}{'trained':>10}{'PFLOP':>8}{'min':>7}{'':<8}{'tokens':>10}{'PFLOP':>8}{'min':>7}"
    )
    return "\n".join([head, *(_format_cost(row) for row in rows)])


def _format_cost(row: dict) -> str:
    tokens = row["measured_tokens_sampled"] + row["measured_tokens_scored"]
    return (
        f"{row['arm']:<22}{row['student'][-10:]:<11}{row['algorithm']:<17}{_blank(row['temperature']):>5}"
        f"{_blank(row['kl_coef']):>6}  {row['made_tokens_sampled']:>10.0f}{row['made_tokens_trained']:>10.0f}"
        f"{row['made_model_flops'] / 1e15:>8.3f}{row['made_seconds'] / 60:>7.1f}{'':<8}{tokens:>10.0f}"
        f"{row['measured_model_flops'] / 1e15:>8.3f}{row['measured_seconds'] / 60:>7.1f}"
    )


# --- the orders, held against each other ------------------------------------------------------------------------------

_COMPARED = (
    ("align_kd", "kd_align"),
    ("align_kd_sharpened", "kd_align"),
    ("align_kd_sharpened", "kd_align_sharpened"),
)
"""The headline at every τ of KD→Align; then what was sharpened, at the same τ."""


def comparisons(order: Order, out: Path) -> list[dict]:
    """Align→KD against KD→Align, seed by seed: one row a pair of arms, student, algorithm and point of their axes.

    A pair of runs counts where both were measured; a seed that only one arm has leaves both. Beside the mean difference
    stands the one with diverged runs as 0, where shares are compared: a mean log-likelihood has no least value.

    Returns:
      Rows with what is compared; `seed_points` and of these seeds both outcomes and their differences; mean difference
      and t interval; `left_out`, the seeds that one arm alone has; `failed`, those of which a run diverged.
    """
    rows = rows_of(order, out)
    quantity, found, failed = order.outcome, evaluations(order, out), _failed(rows)
    runs: dict[tuple, dict[int, float]] = {}
    for row in rows:
        value = found.get(row.folder, {}).get(quantity, math.nan)
        # None where the run may still be made.
        known = value if math.isfinite(value) else math.nan if row.folder in {*failed, *found} else None
        runs.setdefault(_key(row), {})[row.seed] = known
    compared = []
    for arm, other in _COMPARED:
        for key in (key for key in runs if key[0] == arm):
            _, student, algorithm, temperature, kl_coef = key
            for other_temperature in order.temperatures if math.isnan(temperature) else (temperature,):
                other_key = (other, student, algorithm, other_temperature, kl_coef)
                if other_key in runs:
                    told = dict(zip(_KEYS, key, strict=True)) | {"other": other, "other_temperature": other_temperature}
                    compared.append(told | {"outcome": quantity} | _paired(runs[key], runs[other_key], quantity))
    return [row for row in compared if row["seed_points"] or row["failed"]]


def _failed(rows: list[Row]) -> set[Path]:
    """Folders of models that diverged, or whose start or teacher did; a model comes after what it is made from."""
    failed: set[Path] = set()
    for row in rows:
        if "failed" in (read_record(row.folder) or {}) or failed & {*row.models}:
            failed.add(row.folder)
    return failed


def _paired(mine: dict[int, float | None], theirs: dict[int, float | None], quantity: str) -> dict:
    """Two arms' outcomes by seed, held against each other; NaN is a run that failed, None one that is not there."""
    seeds = sorted({*mine, *theirs})
    pairs = {seed: (mine.get(seed), theirs.get(seed)) for seed in seeds}
    whole = {seed: pair for seed, pair in pairs.items() if None not in pair}
    kept = {seed: pair for seed, pair in whole.items() if np.isfinite(pair).all()}
    alone = [seed for seed, pair in pairs.items() if None in pair and any(map(_is_number, pair))]
    differences = [one - another for one, another in kept.values()]
    interval = statistics.t_interval(differences) if differences else statistics.MeanInterval(*[math.nan] * 3, 0)
    as_0 = [one - another for one, another in statistics.failure_bound([*whole.values()])] if whole else []
    columns = {"points": [pair[0] for pair in kept.values()], "other_points": [pair[1] for pair in kept.values()]}
    columns |= {"difference_points": differences}
    # Of few seeds that differ, a t interval reaches beyond what a difference of shares can be.
    most = math.inf if quantity == "reward" else 1.0
    return {
        "seed_points": " ".join(map(str, kept)),
        **{name: " ".join(f"{value:.6g}" for value in values) for name, values in columns.items()},
        "difference": interval.mean,
        "difference_low": float(np.clip(interval.low, -most, most)),
        "difference_high": float(np.clip(interval.high, -most, most)),
        "difference_failures_as_0": math.nan if quantity == "reward" or not as_0 else float(np.mean(as_0)),
        "left_out": " ".join(map(str, alone)),
        "failed": " ".join(str(seed) for seed in whole if seed not in kept),
    }


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def sentences(order: Order, out: Path) -> list[str]:
    """What the run says of the orders, made from its own numbers, and which of its models diverged."""
    told = [f"{folder.relative_to(out)}: {words}." for folder, words in failures(order, out).items()]
    return [*told, *(_sentence(row) for row in comparisons(order, out))]


def _sentence(row: dict) -> str:
    arms = [_named(row["arm"], row["temperature"]), _named(row["other"], row["other_temperature"])]
    about = f"{row['algorithm']}, student {row['student']}, β = {row['kl_coef']:g}"
    notes = []
    if row["left_out"]:
        notes.append(f"of one arm alone and left out: {_seeds(row['left_out'])}")
    if row["failed"]:
        notes.append(f"diverged and left out: {_seeds(row['failed'])}")
    if row["failed"] and math.isfinite(row["difference_failures_as_0"]):
        notes.append(f"with diverged runs as 0: {_difference(row, 'difference_failures_as_0')}")
    if not row["seed_points"]:
        return f"{about}: {arms[0]} and {arms[1]} have no seed in common; {'; '.join(notes)}."
    points = [_list_of(row[name].split(), row["outcome"]) for name in ("points", "other_points")]
    does, unit = _DOES[row["outcome"]]
    difference = _difference(row, "difference")
    if math.isfinite(row["difference_low"]):
        difference += f" (95 % t interval {' to '.join(_signed(row, f'difference_{end}') for end in ('low', 'high'))})"
    return (
        f"{about}, {_seeds(row['seed_points'])}: {arms[0]} {does} {points[0]}{unit}, {arms[1]} {points[1]}{unit}; "
        f"{'; '.join([difference, *notes])}."
    )


_DOES = {
    "behaviour_frequency": ("shows the behaviour in", " % of completions"),
    "preference_accuracy": ("ranks right", " % of the held-out pairs"),
    "reward": ("has a mean reward of", ""),
}
"""What an arm does, before and after the numbers."""


def _named(arm: str, temperature: float) -> str:
    return _LABELS[arm].replace("\n", " ") + ("" if math.isnan(temperature) else f" (τ = {temperature:g})")


def _seeds(listed: str) -> str:
    seeds = listed.split()
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}"


def _list_of(points: list[str], quantity: str) -> str:
    return ", ".join(f"{float(p):.3f}" if quantity == "reward" else f"{100 * float(p):.2f}" for p in points)


def _difference(row: dict, column: str) -> str:
    return f"a difference of {_signed(row, column)}{'' if row['outcome'] == 'reward' else ' percentage points'}"


def _signed(row: dict, column: str) -> str:
    return f"{row[column]:+.3f}" if row["outcome"] == "reward" else f"{100 * row[column]:+.2f}"


# --- figure ----------------------------------------------------------------------------------------------------------


_SIGNS = (None, "+", ".", "|", "1", "_")
"""Inside a point: of which algorithm it is."""
_NEVER = "v"
"""A point that stands for a frequency of 0, open."""
_MOST_LINES = 28  # of completions: more leave no room for the panels


@dataclass(frozen=True)
class _Kinds:
    """What else than an arm and a temperature there is in a figure; what there is one of needs no telling apart.

    Attributes:
      algorithms: told apart by a sign inside the points.
      students: told apart by size.
      kl_coefs: told beside the points.
    """

    algorithms: tuple[str, ...]
    students: tuple[str, ...]
    kl_coefs: tuple[float, ...]

    @classmethod
    def of(cls, shown: list[Row]) -> "_Kinds":
        """Of the models that are there."""
        return cls(
            tuple(dict.fromkeys(row.algorithm for row in shown if row.algorithm)),
            tuple(dict.fromkeys(row.student for row in shown if row.student)),
            tuple(sorted({row.kl_coef for row in shown if not math.isnan(row.kl_coef)})),
        )

    def sign(self, algorithm: str) -> str | None:
        """The marker inside a point; None for no sign."""
        return _SIGNS[self.algorithms.index(algorithm) % len(_SIGNS)] if algorithm in self.algorithms else None

    def size(self, student: str) -> float:
        """Of a point (pt)."""
        return 6.5 - 2.5 * self.students.index(student) / len(self.students) if student in self.students else 6.5

    def note(self, row: Row) -> str:
        """What stands beside a point."""
        told = [] if math.isnan(row.temperature) else [f"τ {row.temperature:g}"]
        told += [f"β {row.kl_coef:g}"] if len(self.kl_coefs) > 1 and not math.isnan(row.kl_coef) else []
        return ", ".join(told)

    def name(self, row: Row) -> str:
        """A model in words, its seed aside."""
        told = [_LABELS.get(row.name, row.name).replace("\n", " "), self.note(row)]
        told += [row.student] if len(self.students) > 1 else []
        told += [_algorithm(row.algorithm)] if len(self.algorithms) > 1 else []
        return ", ".join(filter(None, told))


def _algorithm(name: str) -> str:
    return ALGORITHM_LABELS.get(name, name).replace("\n", " ") if name else ""


def draw(order: Order, out: Path, *paths: Path) -> None:
    """Behaviour and reward against KL to the base, recall gap of the students, training curves, completions.

    Where the reward is the behaviour, its frequency is the mean reward; then the second panel tells how likely the
    completions that show it are to the truth. Where alignments learn from a user's pairs, it tells how many of those
    held out are ranked right.
    """
    found = evaluations(order, out)
    rows = {row.folder: row for row in rows_of(order, out)}
    kinds = _Kinds.of([rows[folder] for folder in found if folder in rows])
    behaviour = json.loads((out / BEHAVIOUR).read_text(encoding="utf-8"))
    with plt.rc_context(STYLE):
        lines = _completions(found, rows, kinds, behaviours.parse(behaviour["spec"]), order.prompt + " … ")
        height, (handles, labels) = 0.135 * len(lines), _legend(found, rows, kinds)
        figure = plt.figure(figsize=(7.2, 6.1 + height + 0.17 * math.ceil(len(labels) / 4)), layout="constrained")
        figure.suptitle(_title(order, kinds), fontsize=8)
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


def _title(order: Order, kinds: _Kinds) -> str:
    """What all models share."""
    told = [f"truth and base {order.truth}" if order.base == "truth" else f"truth {order.truth} · base {order.base}"]
    told += [_algorithm(name) for name in kinds.algorithms if len(kinds.algorithms) == 1]
    told += [f"β = {value:g}" for value in kinds.kl_coefs if len(kinds.kl_coefs) == 1]
    return f"{' · '.join(told)}\n{order.evaluation.num_samples} completions per model · bars in a: Wilson 95 %"


def _legend(found, rows, kinds: _Kinds) -> tuple[list, list[str]]:
    """Arms by colour and marker, then what a hollow point, a sign and a size mean, where there are such."""
    names = dict.fromkeys("base" if folder not in rows else rows[folder].name for folder in found)
    entries = {_LABELS.get(name, name).replace("\n", " "): _handle(name) for name in names}
    grey = {"ls": "none", "color": "0.4"}
    entries["hollow: distilled at τ ≠ 1"] = Line2D([], [], marker="o", mfc="none", ms=6, **grey)
    if any(values["behaviour_frequency"] == 0 for values in found.values()):
        entries["never shown: at its upper limit"] = Line2D([], [], marker=_NEVER, mfc="none", ms=6, **grey)
    for name in kinds.algorithms if len(kinds.algorithms) > 1 else ():
        inside = Line2D([], [], marker=kinds.sign(name) or "none", ms=3.5, mew=0.8, **grey)
        entries[f"sign: {_algorithm(name)}"] = (Line2D([], [], marker="o", mfc="none", ms=6.5, **grey), inside)
    for name in kinds.students if len(kinds.students) > 1 else ():
        entries[f"size: student {name}"] = Line2D([], [], marker="o", ms=kinds.size(name), **grey)
    return list(entries.values()), list(entries)


def _handle(name: str) -> Line2D:
    return Line2D([], [], ls="none", marker=_MARKERS.get(name, "o"), color=_COLOURS.get(name, "0.2"), ms=6)


def _point(axis, x, y, error, row: Row | None, kinds: _Kinds) -> None:
    """One model; the base where there is no row."""
    name = "base" if row is None else row.name
    filled = row is None or not _distilled_apart(row)
    colour = _COLOURS.get(name, "0.2")
    axis.errorbar(
        x,
        y,
        yerr=None if error is None else np.reshape(error, (2, 1)),
        marker=_MARKERS.get(name, "o"),
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
            error = np.maximum([y - values[f"{quantity}_low"], values[f"{quantity}_high"] - y], 0)
        else:
            error = [1.96 * values["reward_error"]] * 2 if quantity == "reward" else None
        _point(axis, values["kl_to_base"], y, error, row, kinds)
        if row is not None and kinds.note(row) and math.isfinite(y):
            noted.append((values["kl_to_base"], y, kinds.note(row), _COLOURS.get(row.name, "0.2")))
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
    x, y, colour = values["kl_to_base"], values["behaviour_frequency_high"], _COLOURS.get(name, "0.2")
    size = 6.5 if row is None else kinds.size(row.student)
    axis.plot(x, y, _NEVER, color=colour, markerfacecolor="none", markersize=size)
    return x, y, ", ".join(filter(None, ["never", "" if row is None else kinds.note(row)])), colour


def _recall_gaps(axis, found, rows, kinds: _Kinds) -> None:
    """Recall gap and recall gap on the behaviour of everything that is no alignment's product, and of the arms."""
    shown = [(rows[folder], values) for folder, values in found.items() if folder in rows]

    def name_of(row):
        words = [_LABELS.get(row.name, row.name), kinds.note(row)]
        return ", ".join(filter(None, [*words, "" if row.student == "same" else row.student]))

    names = list(dict.fromkeys(name_of(row) for row, _ in shown))
    for row, values in shown:
        x = names.index(name_of(row))
        _point(axis, x - 0.12, values["recall_gap"], None, row, kinds)
        axis.plot(x + 0.12, values["target_recall_gap"], "_", color=_COLOURS.get(row.name, "0.2"), markersize=9)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=6.5)
    axis.set_ylabel("recall gap (nats per completion)\ndashes: where the behaviour shows")
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)


def _curves(axis, rows, kinds: _Kinds, quantity: str) -> None:
    """Loss, or reward of the draws, along every alignment; and of the draws apart that it was looked at by."""
    handles, noted = {}, []
    for folder, row in rows.items():
        path = folder / METRICS
        if not isinstance(row.stage, pipelines.Align) or not path.exists():
            continue
        entries = _entries(path)
        values = np.asarray([entry[quantity] for entry in entries])
        if quantity == "reward" and ALGORITHMS[row.algorithm].data:
            # The reward of a fixed set says nothing of the policy.
            values = values[:0]
        # A step sees few draws.
        width = min(4, max(1, len(values) // 4))
        running = np.convolve(values, np.ones(width) / width, mode="valid") if len(values) else values
        look = {"color": _COLOURS.get(row.name, "0.2"), "linestyle": "--" if _distilled_apart(row) else "-"}
        axis.plot(
            np.arange(width, width + len(running)),
            running,
            linewidth=kinds.size(row.student) / 6,
            marker=kinds.sign(row.algorithm) or ".",
            markersize=3,
            **look,
        )
        name = _LABELS.get(row.name, row.name).replace("\n", " ") + (", τ ≠ 1" if _distilled_apart(row) else "")
        handles[name] = Line2D([], [], linewidth=1, **look)
        if len(values) and kinds.note(row):
            noted.append((len(values), running[-1], kinds.note(row), look["color"]))
        if quantity != "reward":
            continue
        looks = [(entry["step"] + 1, entry["look_reward"]) for entry in entries if "look_reward" in entry]
        axis.plot(
            *zip(*looks, strict=True) if looks else ([], []), "x", color=_COLOURS.get(row.name, "0.2"), markersize=4
        )
    _note_all(axis, noted)
    axis.legend(handles.values(), handles.keys(), loc="upper left", handlelength=3, edgecolor="none")
    rewards = "mean reward of up to 4 steps' draws\n(crosses: of 64 draws apart)"
    axis.set(xlabel="step of the alignment", ylabel=rewards if quantity == "reward" else "mean loss of up to 4 steps")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _completions(found, rows, kinds: _Kinds, behaviour: behaviours.Behaviour, prompt: str) -> list[str]:
    """Two completions of each model that is shown: the first, and the first other that shows the behaviour."""
    shown = [
        ("base" if folder not in rows else kinds.name(rows[folder]) + seed, values)
        for folder, values, seed in _shown_models(found, rows)
    ]
    # Of two lines each, no more have room.
    widest = max((len(name) for name, _ in shown[: _MOST_LINES // 2]), default=0)
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

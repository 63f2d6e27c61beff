"""The results of an order on a language model: one labelled data set and tables, from a run folder alone."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from jaxkd import pipelines, statistics
from jaxkd.align import ALGORITHMS
from jaxkd.durable import METRICS, entries, read_json, read_record
from jaxkd.looks import arm_name
from jaxkd.smollm2.cost import Cost
from jaxkd.smollm2.evaluate import QUANTITIES
from jaxkd.smollm2.laboratory import EVALUATION
from jaxkd.smollm2.order import Order
from jaxkd.smollm2.rows import Row, decides, deciding_student, is_admitted, rows_of

DIMS = ("algorithm", "student", "temperature", "kl_coef", "seed", "stage")
COSTS = {
    "tokens_sampled": ("tokens sampled to make the model and what it is made from, looks along training too", "token"),
    "tokens_trained": ("tokens trained on, the same", "token"),
    "tokens_scored": ("tokens scored, the same", "token"),
    "model_flops": ("model FLOPs by formula, the same", "FLOP"),
    "seconds": ("wall-clock, the same", "s"),
}
_RENAMED = {f"behaviour_frequency_{end}": f"behaviour_frequency_wilson_{end}" for end in ("low", "high")}
"""Names that version 0.5 gave to quantities."""
ENDS = {
    "failed": ("diverged, or a model that it is made from or admitted by did (NaN: not made yet)", "1"),
    "refused": (
        "not made, for the recall gap of its cut student is above the most admitted (NaN: not yet)",
        "1",
    ),
}
ENCOUNTERS = {
    "expected_target_hits": ("n·T·m: draws of the alignment, times the behaviour's frequency where it starts", "draw"),
    "target_hits": ("draws of the alignment that showed the behaviour", "draw"),
    "first_hit_step": ("first step that saw one (NaN: none did)", "step"),
}


class Run(NamedTuple):
    """What a run folder holds of an order, read once: of a run that goes on, all results are of one moment.

    Attributes:
      order: what was asked for.
      out: the folder.
      rows: by their folders, in an order in which they can be made.
      evaluations: what was measured, by folder, the base's first; of rows that are not finished there is none.
      target: what was measured of the target; None where there is none.
      records: what finished stages wrote last, by folder.
    """

    order: Order
    out: Path
    rows: dict[Path, Row]
    evaluations: dict[Path, dict]
    target: dict | None
    records: dict[Path, dict]


def read(order: Order, out: Path) -> Run:
    """Read a run folder."""
    rows = {row.folder: row for row in rows_of(order, out)}
    base, target = out / "base", out / "target"
    found = {folder: _evaluation(folder) for folder in (base, *rows) if (folder / EVALUATION).exists()}
    of_target = _evaluation(target) if (target / EVALUATION).exists() else None
    records = {folder: record for folder in (base, target, *rows) if (record := read_record(folder)) is not None}
    return Run(order, out, rows, found, of_target, records)


def _evaluation(folder: Path) -> dict:
    """What was measured of a model, under the names of today."""
    return {_RENAMED.get(name, name): value for name, value in read_json(folder / EVALUATION).items()}


def _measured(run: Run) -> dict[Path, dict]:
    """What was measured, with what each model cost and what its alignment met."""
    whole = {}
    for folder, values in run.evaluations.items():
        row = run.rows.get(folder)
        more = {} if row is None else _encounters(run, row)
        whole[folder] = values | cost_of(run, folder).to_dict() | more
    return whole


def _encounters(run: Run, row: Row) -> dict[str, float]:
    """How often an alignment met the behaviour, and how often it would have, had it gone on drawing as it began."""
    path = row.folder / METRICS
    # What nothing is rewarded for is no target.
    if run.order.outcome != "behaviour_frequency" or not row.is_alignment:
        return {}
    if ALGORITHMS[row.algorithm].data or not path.exists():
        return {}
    hits = np.asarray([entry["target_hits"] for entry in entries(path)])
    m = run.evaluations.get(row.models[0], {}).get("behaviour_frequency", math.nan)
    return {
        "expected_target_hits": m * run.order.alignment.settings.batch_size * len(hits),
        "target_hits": float(hits.sum()),
        "first_hit_step": float(np.argmax(hits > 0)) if hits.any() else math.nan,
    }


def failures(run: Run) -> dict[Path, str]:
    """Why models could not be made, by folder."""
    return {folder: record["failed"] for folder, record in run.records.items() if "failed" in record}


def lost(run: Run) -> set[Path]:
    """Folders of models that diverged, or whose start, teacher or deciding student did; a model comes after these."""
    found = {*failures(run)}
    for folder, row in run.rows.items():
        if found & {*row.models, deciding_student(run.order, row)}:
            found.add(folder)
    return found


def refusals(run: Run) -> dict[Path, Path]:
    """Models that are not admitted, each with the folder of the cut student that stands too far from the truth."""
    students = {folder: deciding_student(run.order, row) for folder, row in run.rows.items()}
    return {
        folder: student
        for folder, student in students.items()
        if student != folder and student in run.evaluations and not is_admitted(run.order, run.evaluations[student])
    }


def not_admitted(run: Run) -> list[Path]:
    """Folders of the cut students that stand too far from the truth, whatever depends on them."""
    return [
        folder
        for folder, row in run.rows.items()
        if decides(row) and folder in run.evaluations and not is_admitted(run.order, run.evaluations[folder])
    ]


def _ends(run: Run) -> dict[Path, dict[str, float]]:
    """Whether each model that was made, or never will be, diverged or was refused; what may still be made is left out.

    A model that was made before its student was refused has been made.
    """
    made, diverged, refused = {*run.evaluations}, lost(run), {*refusals(run)}
    return {
        folder: {"failed": float(folder in diverged - made), "refused": float(folder in refused - diverged - made)}
        for folder in (run.out / "base", *run.rows)
        if folder in made | diverged | refused
    }


def cost_of(run: Run, folder: Path) -> Cost:
    """What it takes to make the model of a folder, with all that it is made from."""
    seen, todo, total = set(), [folder], Cost()
    while todo:
        folder = todo.pop()
        record = run.records.get(folder, {})
        if folder in seen or "cost" not in record:
            continue
        seen.add(folder)
        total = total.add(Cost.from_dict(record["cost"]))
        todo += run.rows[folder].models if folder in run.rows else ()
    return total


def to_dataset(run: Run) -> xr.Dataset:
    """Everything measured, with a dimension for every axis; what an axis does not change is repeated along it.

    Models that were not made are NaN; `failed` and `refused` say why, and are NaN themselves where one may still be. Of
    a cut student that was not admitted all but its recall is NaN.
    """
    order, found, ends = run.order, _measured(run), _ends(run)
    seeds = sorted({row.seed for row in run.rows.values()})
    stages = ["base", *dict.fromkeys(row.name for row in run.rows.values())]
    coords = {
        "algorithm": list(order.algorithms),
        "student": list(order.students),
        "temperature": list(order.all_temperatures),
        "kl_coef": list(order.kl_coefs),
        "seed": seeds,
        "stage": stages,
    }
    names = {**QUANTITIES, **COSTS, **ENCOUNTERS, **ENDS}
    values = {name: np.full([len(coords[dim]) for dim in DIMS], np.nan) for name in names}

    def put(index, quantities):
        for name, value in quantities.items():
            if name in values:
                values[name][index] = value

    everywhere = (slice(None),) * 5
    if run.out / "base" in found:
        put((*everywhere, 0), found[run.out / "base"] | ends[run.out / "base"])
    for folder, row in run.rows.items():
        if folder not in ends:
            continue
        own = {dim: getattr(row, dim) for dim in DIMS[:5]}
        index = tuple(
            slice(None) if own[dim] == "" or own[dim] != own[dim] else coords[dim].index(own[dim]) for dim in DIMS[:5]
        )
        put((*index, stages.index(row.name)), found.get(folder, {}) | ends[folder])
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
_KEY_OF_BASE, _KEY_OF_TARGET = ((name, "", "", math.nan, math.nan) for name in ("base", "target"))
TABLE_QUANTITIES = (
    "behaviour_frequency",
    "reward",
    "objective",
    "kl_to_base",
    "precision_per_token",
    "behaviour_precision",
    "recall_gap",
    "target_recall_gap",
    "target_precision",
    "recall_gap_of_target",
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


def table(run: Run) -> list[dict]:
    """One row an arm, algorithm, student and point of its axes: every seed's value, mean and t interval.

    Of the behaviour's frequency also every seed's own Wilson interval.

    What `seed_points` lists are the seeds of the values that the other columns of points list, "" for the base and for
    the target, where there is one; `failed_seeds` and `refused_seeds` list those that have none (see `ENDS`). An arm
    may have no other.
    """
    found, base, ends = _measured(run), run.out / "base", _ends(run)
    groups: dict[tuple, dict] = {}
    without: dict[tuple, dict[str, list[int]]] = {}
    if base in found:
        groups[_KEY_OF_BASE] = {"": found[base]}
    if run.target is not None:
        groups[_KEY_OF_TARGET] = {"": run.target | cost_of(run, run.out / "target").to_dict()}
    for folder, row in run.rows.items():
        if folder not in ends:
            continue
        runs, why = groups.setdefault(_key(row), {}), without.setdefault(_key(row), {name: [] for name in ENDS})
        if folder in found:
            runs[row.seed] = found[folder]
        for name in ENDS:
            why[name] += [row.seed] * bool(ends[folder][name])
    base_reward = found.get(base, {}).get("reward", math.nan)
    none = {name: [] for name in ENDS}
    return [_table_row(key, runs, without.get(key, none), base_reward) for key, runs in groups.items()]


def _key(row: Row) -> tuple:
    """What the seeds of a model have in common."""
    return row.name, row.student, row.algorithm, row.temperature, row.kl_coef


def _table_row(key, runs: dict[int | str, dict], without: dict[str, list[int]], base_reward: float) -> dict:
    row = dict(zip(_KEYS, key, strict=True))
    row["seeds"] = len(runs)
    row["seed_points"] = " ".join(map(str, runs))
    row |= {f"{name}_seeds": " ".join(map(str, seeds)) for name, seeds in without.items()}
    for name in TABLE_QUANTITIES:
        values = [run.get(name, math.nan) for run in runs.values()]
        finite = {value for value in values if math.isfinite(value)}
        interval = statistics.t_interval(values) if finite else None
        row[name] = math.nan if interval is None else interval.mean
        # Where students stayed the base, seeds share one measurement: their number says nothing of its error.
        alone = interval is None or len(finite) == 1
        row[f"{name}_low"] = math.nan if alone else interval.low
        row[f"{name}_high"] = math.nan if alone else interval.high
        row[f"{name}_points"] = " ".join(f"{value:.6g}" for value in values)
    for name in _RENAMED.values():
        row[f"{name}_points"] = " ".join(f"{run.get(name, math.nan):.6g}" for run in runs.values())
    # Of two or three seeds that differ, a t interval reaches beyond what a share can be.
    for end in ("low", "high"):
        row[f"behaviour_frequency_{end}"] = float(np.clip(row[f"behaviour_frequency_{end}"], 0, 1))
    petaflops = row["model_flops"] / 1e15
    gains = petaflops > 0 and key not in (_KEY_OF_BASE, _KEY_OF_TARGET)
    row["reward_gain_per_petaflop"] = (row["reward"] - base_reward) / petaflops if gains else math.nan
    return row


def format_table(rows: list[dict], outcome: str = "behaviour_frequency") -> str:
    """The table for a terminal: of every seed the behaviour's frequency, means over seeds, and a t interval.

    Args:
      rows: of `table`.
      outcome: `Order.outcome`; where it is the reward, every seed's is told, and the frequency as a mean.
    """
    last = ""
    of_each, mean = ("reward", "frequency") if outcome == "reward" else ("frequency of the behaviour", "reward")
    if any(math.isfinite(row["preference_accuracy"]) for row in rows):
        last = "held-out pairs ranked right"
    elif any(math.isfinite(row["target_hits"]) for row in rows):
        last = "n·T·m → seen"
    width = _width_of_students(rows)
    head = (
        f"{'arm':<22}{'student':<{width}}{'algorithm':<17}{'τ':>5}{'β':>6}  {of_each:<52}{mean:>10}"
        f"{'KL to':>8}{'recall':>9}{'target':>9}{'perple-':>9}{'model':>8}{'reward gain':>12}\n"
        f"{'':<{50 + width}}  {'(every seed: its own) mean [95 % t interval]':<52}{'':>10}{'base':>8}{'gap':>9}"
        f"{'rec. gap':>9}{'xity':>9}{'PFLOP':>8}{'per PFLOP':>12}   {last}"
    )
    return "\n".join([head, *(_format_row(row, outcome, width) for row in rows)])


def _width_of_students(rows: list[dict]) -> int:
    return max(len(name) for name in ("student", *(row["student"] for row in rows))) + 2


def _format_row(row: dict, outcome: str, width: int) -> str:
    of_each, mean = ("behaviour_frequency", "reward")[:: -1 if outcome == "reward" else 1]
    values = [_blank_or(float(value), 4) or "not measured" for value in row[f"{of_each}_points"].split()]
    seeds = [f"{seed}:" for seed in row["seed_points"].split()] or [""] * len(values)
    ended = (("failed_seeds", "diverged"), ("refused_seeds", "not admitted"))
    points = [*map("".join, zip(seeds, values, strict=True))]
    points = " ".join(points + [f"{seed}:{word}" for column, word in ended for seed in row[column].split()])
    interval = f"{row[of_each]:.4f}"
    if math.isfinite(row[f"{of_each}_low"]):
        interval += f" [{row[f'{of_each}_low']:.3f}, {row[f'{of_each}_high']:.3f}]"
    told = f"({points}) {interval}"
    return (
        f"{row['arm']:<22}{row['student']:<{width}}{row['algorithm']:<17}{_blank(row['temperature']):>5}"
        f"{_blank(row['kl_coef']):>6}  {told:<52}{row[mean]:>10.4f}{row['kl_to_base']:>8.2f}"
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


def stage_costs(run: Run, step_flops: Callable[[Row], float | None] = lambda row: None) -> list[dict]:
    """What each kind of stage itself took, to make and to measure: means over its seeds, one row a kind.

    Args:
      run: what there is.
      step_flops: FLOPs by XLA's own analysis of a row's step, sampling left out (`passes.step_flops`); None where that
        is not known.

    Returns:
      Rows with the cost of either kind. `made_steps` are those that were taken, `made_program_flops` their FLOPs by
      XLA: other than `made_model_flops` it counts padding, masked scores and what is computed again, but neither
      sampling nor looks at held-out texts; NaN where it is not known.
    """
    groups: dict[tuple, list[dict]] = {}
    base = run.out / "base"
    if base in run.evaluations:
        own = _both_costs(run.records.get(base, {}), run.evaluations[base])
        groups[_KEY_OF_BASE] = [own | {"made_steps": 0, "made_program_flops": math.nan}]
    record = run.records.get(run.out / "target", {})
    if run.target is not None or "cost" in record:
        made = _both_costs(record, run.target or {})
        groups[_KEY_OF_TARGET] = [made | {"made_steps": 0, "made_program_flops": math.nan}]
    for folder, row in run.rows.items():
        if "cost" in run.records.get(folder, {}):
            both = _both_costs(run.records[folder], run.evaluations.get(folder, {})) | _steps(row, step_flops)
            groups.setdefault(_key(row), []).append(both)
    return [
        dict(zip(_KEYS, key, strict=True))
        | {"seeds": len(runs)}
        | {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        for key, runs in groups.items()
    ]


def _steps(row: Row, step_flops: Callable[[Row], float | None]) -> dict[str, float]:
    """How many steps were taken, and their FLOPs by XLA."""
    path = row.folder / METRICS
    steps = len(entries(path)) if path.exists() else 0
    flops = step_flops(row) if steps else 0.0
    return {"made_steps": steps, "made_program_flops": math.nan if flops is None else steps * flops}


def _both_costs(record: dict, evaluation: dict) -> dict[str, float]:
    nothing = Cost().to_dict()
    kinds = (("made", record.get("cost", nothing)), ("measured", evaluation.get("cost", nothing)))
    return {f"{kind}_{name}": cost[name] for kind, cost in kinds for name in nothing}


def format_costs(rows: list[dict]) -> str:
    """The costs for a terminal."""
    width = _width_of_students(rows)
    head = (
        f"{'stage':<22}{'student':<{width}}{'algorithm':<17}{'τ':>5}{'β':>6}  {'to make it:':<51}to measure it:\n"
        f"{'':<{50 + width}}  {'sampled':>10}{'trained':>10}{'PFLOP':>8}{'by XLA':>8}{'min':>7}{'':<8}{'tokens':>10}"
        f"{'PFLOP':>8}{'min':>7}\n{'':<{50 + width}}  {'':<28}{'updates':>8}"
    )
    return "\n".join([head, *(_format_cost(row, width) for row in rows)])


def _format_cost(row: dict, width: int) -> str:
    tokens = row["measured_tokens_sampled"] + row["measured_tokens_scored"]
    return (
        f"{row['arm']:<22}{row['student']:<{width}}{row['algorithm']:<17}{_blank(row['temperature']):>5}"
        f"{_blank(row['kl_coef']):>6}  {row['made_tokens_sampled']:>10.0f}{row['made_tokens_trained']:>10.0f}"
        f"{row['made_model_flops'] / 1e15:>8.3f}{_blank_or(row['made_program_flops'] / 1e15):>8}"
        f"{row['made_seconds'] / 60:>7.1f}{'':<8}{tokens:>10.0f}"
        f"{row['measured_model_flops'] / 1e15:>8.3f}{row['measured_seconds'] / 60:>7.1f}"
    )


def _blank_or(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


# --- the orders, held against each other ------------------------------------------------------------------------------

_COMPARED = (
    ("align_kd", "kd_align"),
    ("align_kd_sharpened", "kd_align"),
    ("align_kd_sharpened", "kd_align_sharpened"),
)
"""The headline at every τ of KD→Align; then what was sharpened, at the same τ."""


def _compared() -> tuple[tuple[str, str], ...]:
    """The pairs of arms that are held against each other: an order that was added, against KD→Align."""
    return (*_COMPARED, *((arm, "kd_align") for arm in pipelines.arms() if arm not in pipelines.ARMS))


def comparisons(run: Run) -> list[dict]:
    """Align→KD against KD→Align, seed by seed: one row a pair of arms, student, algorithm and point of their axes.

    A pair of runs counts where both were measured; a seed that only one arm has leaves both. Beside the mean difference
    stands the one with diverged runs as 0, where shares are compared: a mean log-likelihood has no least value.

    Returns:
      Rows with what is compared; `seed_points` and of these seeds both outcomes and their differences; mean difference
      and t interval; `left_out`, the seeds that one arm alone has; `failed`, those of which a run diverged.
    """
    order, quantity = run.order, run.order.outcome
    ended = lost(run) | {*run.evaluations}
    runs: dict[tuple, dict[int, float | None]] = {}
    for folder, row in run.rows.items():
        value = run.evaluations.get(folder, {}).get(quantity, math.nan)
        # None where the run may still be made.
        known = value if math.isfinite(value) else math.nan if folder in ended else None
        runs.setdefault(_key(row), {})[row.seed] = known
    compared = []
    for arm, other in _compared():
        for key in (key for key in runs if key[0] == arm):
            _, student, algorithm, temperature, kl_coef = key
            for other_temperature in order.all_temperatures if math.isnan(temperature) else (temperature,):
                other_key = (other, student, algorithm, other_temperature, kl_coef)
                if other_key in runs:
                    told = dict(zip(_KEYS, key, strict=True)) | {"other": other, "other_temperature": other_temperature}
                    compared.append(told | {"outcome": quantity} | _paired(runs[key], runs[other_key], quantity))
    return [row for row in compared if row["seed_points"] or row["failed"]]


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


def sentences(run: Run) -> list[str]:
    """What the run says of the orders, made from its own numbers, and which of its models diverged or were refused."""
    told = [f"{folder.relative_to(run.out)}: {words}." for folder, words in failures(run).items()]
    return [*told, *refused_students(run), *(_sentence(row) for row in comparisons(run))]


def refused_students(run: Run) -> list[str]:
    """A sentence on each cut student that was not admitted, and how many models are missing with it."""
    missing = Counter(student for folder, student in refusals(run).items() if folder not in run.evaluations)
    most = run.order.most_held_out_kl
    return [
        f"{student.relative_to(run.out)} is not admitted, its recall gap of "
        f"{run.evaluations[student]['recall_gap_per_token']:.3f} nats a token is above {most:g}: "
        f"{missing[student]} {'model is' if missing[student] == 1 else 'models are'} not made."
        for student in not_admitted(run)
    ]


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
    return arm_name(arm) + ("" if math.isnan(temperature) else f" (τ = {temperature:g})")


def _seeds(listed: str) -> str:
    seeds = listed.split()
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}"


def _list_of(points: list[str], quantity: str) -> str:
    return ", ".join(f"{float(p):.3f}" if quantity == "reward" else f"{100 * float(p):.2f}" for p in points)


def _difference(row: dict, column: str) -> str:
    return f"a difference of {_signed(row, column)}{'' if row['outcome'] == 'reward' else ' percentage points'}"


def _signed(row: dict, column: str) -> str:
    return f"{row[column]:+.3f}" if row["outcome"] == "reward" else f"{100 * row[column]:+.2f}"

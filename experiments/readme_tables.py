"""Write the tables of README.md from the committed results in figures/, so that no number there is typed by hand.

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit code
says whether README.md is up to date.
"""

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxkd import throughput

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "kd_align": "KD→Align",
    "align_kd": "Align→KD",
    "kd_align_sharpened": "KD→Align, sharpened",
    "align_kd_sharpened": "Align→KD, sharpened",
    "kd_align_anchored": "KD→Align, anchored on the base",
    "base_start_student_reference": "base start, student reference",
}
START_AND_REFERENCE = {
    "aligned_base": "base, base",
    "base_start_student_reference": "base, student",
    "kd_align_anchored": "student, base",
    "kd_align": "student, student",
}


def _rows(name: str) -> list[dict]:
    with (ROOT / "figures" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _recovery(row: dict) -> str:
    low, high = float(row["recovery_low"]), float(row["recovery_high"])
    return f"{float(row['recovery']):.2f} ({low:.2f}–{high:.2f})"


def _of_arms(name: str, arms: dict[str, str], temperature: float) -> str:
    """Recovery rates, a line an algorithm and coefficient, a column an arm."""
    rows = {
        (row["algorithm"], float(row["kl_coef"]), row["arm"]): row
        for row in _rows(name)
        if float(row["temperature"]) == temperature
    }
    lines = list(dict.fromkeys((algorithm, kl_coef) for algorithm, kl_coef, _ in rows))
    body = [[f"`{a}`", f"{b:g}", *(_recovery(rows[a, b, arm]) for arm in arms)] for a, b in lines]
    return _table(["algorithm", "β", *arms.values()], body)


def sharpened() -> str:
    """All arms at τ = 0.25."""
    return _of_arms("mog_order.csv", ARMS, 0.25)


def control() -> str:
    """The two orders at τ = 1."""
    return _of_arms("mog_order.csv", {arm: ARMS[arm] for arm in ("kd_align", "align_kd")}, 1.0)


def two_by_two() -> str:
    """Start × reference at K = 8."""
    return _of_arms("mog_order_capacity8.csv", START_AND_REFERENCE, 0.25)


def paper() -> str:
    """The paper's three signs beside ours, PPO at τ = 0.25."""
    body = []
    for row in _rows("mog_order.csv"):
        if row["algorithm"] == "ppo" and float(row["temperature"]) == 0.25 and row["arm"] in ("kd_align", "align_kd"):
            spread = f"{float(row['reward_sd']):.2f}"
            numbers = [f"{float(row[key]):.2f}" for key in ("reward_mean", "reward_max", "target_variance_median")]
            precision = f"{float(row['target_precision_mean']):.1f}"
            body.append([ARMS[row["arm"]], f"{float(row['kl_coef']):g}", *numbers, spread, precision])
    body.append([*("KD→Align, paper", "", "", "about 5.0", "", "higher", "about −20")])
    body.append([*("Align→KD, paper", "", "", "about 6.5", "", "lower", "about −10")])
    head = ["arm", "β", "mean reward", "highest reward", "variance on the target / 0.025", "sd over seeds"]
    return _table([*head, "mean target precision (nats)"], body)


def recall() -> str:
    """Overall recall of what PPO ends with at τ = 0.25, with the share of modes covered."""
    arms = {arm: ARMS[arm] for arm in ("kd_align", "align_kd", "align_kd_sharpened")}
    rows = {
        (float(row["kl_coef"]), row["arm"]): row
        for row in _rows("mog_order.csv")
        if row["algorithm"] == "ppo" and float(row["temperature"]) == 0.25
    }
    body = []
    for kl_coef in dict.fromkeys(kl_coef for kl_coef, _ in rows):
        cells = [rows[kl_coef, arm] for arm in arms]
        told = [f"{float(cell['recall_median']):.1f} ({float(cell['coverage_median']):.3g})" for cell in cells]
        body.append([f"{kl_coef:g}", *told])
    return _table(["β", *arms.values()], body)


def shortfalls() -> str:
    """How far below the optimum of their own reference the alignments end."""
    arms = {"aligned_base": "base, held to itself", "kd_align": "student, held to itself"}
    rows = {
        (row["algorithm"], float(row["kl_coef"]), row["arm"]): row
        for row in _rows("mog_order.csv")
        if float(row["temperature"]) == 0.25 and row["arm"] in arms
    }
    body = []
    for algorithm, kl_coef in dict.fromkeys(key[:2] for key in rows):
        cells = [rows[algorithm, kl_coef, arm] for arm in arms]
        share = [f"{100 * float(cell['objective_shortfall_median']):.1f} %" for cell in cells]
        nats = [f"{float(cell['distance_to_gibbs_median']):.2f}" for cell in cells]
        body.append([f"`{algorithm}`", f"{kl_coef:g}", *(f"{a} ({b})" for a, b in zip(share, nats, strict=True))])
    return _table(["algorithm", "β", *arms.values()], body)


def robustness() -> str:
    """The orders, and KD→Align held to the base, in the default run and in the checks."""
    arms = ("kd_align", "align_kd", "kd_align_anchored")
    runs = {
        "default": ["mog_order.csv"],
        "matched on component evaluations": ["mog_order_matched.csv"],
        "4 × the steps, learning rate / 3": ["mog_order_long_online.csv", "mog_order_long_offline.csv"],
    }
    found = {}
    for label, names in runs.items():
        for row in (row for name in names for row in _rows(name)):
            if float(row["temperature"]) == 0.25 and row["arm"] in arms:
                key = (row["algorithm"], float(row["kl_coef"]))
                found.setdefault(key, {})[label, row["arm"]] = f"{float(row['recovery']):.2f}"
    head = ["algorithm", "β", *(f"{label}: KD→Align / Align→KD / anchored" for label in runs)]
    body = []
    for (algorithm, kl_coef), cells in found.items():
        pairs = [" / ".join(cells[label, arm] for arm in arms) if (label, arms[0]) in cells else "–" for label in runs]
        body.append([f"`{algorithm}`", f"{kl_coef:g}", *pairs])
    return _table(head, body)


def learning_rates() -> str:
    """Distance to the Gibbs optimum at every learning rate tried."""
    found = json.loads((ROOT / "figures" / "learning_rates.json").read_text())
    rates = list(next(iter(found.values()))["distance_to_gibbs"])
    body = []
    for algorithm, outcome in found.items():
        distances = outcome["distance_to_gibbs"]
        best = f"{outcome['best']:g}"
        shown = [f"**{distances[rate]:.2f}**" if rate == best else f"{distances[rate]:.2f}" for rate in rates]
        body.append([f"`{algorithm}`", *shown])
    return _table(["algorithm", *rates], body)


def plane() -> str:
    """What `experiments/phase_diagram.py` said of the plane below its table of all cells."""
    told = (ROOT / "figures" / "plane.txt").read_text().rstrip()
    return f"```\n{told.split(chr(10) * 2, 1)[1]}\n```"


def speed() -> str:
    """The table of `experiments/benchmark_sweep.py`, made from its JSON."""
    measured = json.loads((ROOT / "figures" / "benchmark_sweep.json").read_text())
    ratios = [f"{name}: {ratio:.1f} times its runs a second" for name, ratio in measured["ratios"].items()]
    return f"```\n{throughput.table(measured)}\n\njaxkd against {', '.join(ratios)}\n```"


def smollm2_speed() -> str:
    """Seconds, tokens a second and memory of SmolLM2 beside transformers on torch, from the benchmark's JSON."""
    return _beside_torch(lambda what: what not in _TRAINING)


def smollm2_training_speed() -> str:
    """The same of training steps beside TRL's trainers."""
    return _beside_torch(lambda what: what in _TRAINING)


_TRAINING = ("dpo", "distillation")


def _beside_torch(shown: Callable[[str], bool]) -> str:
    measurement = json.loads((ROOT / "figures" / "smollm2_benchmark.json").read_text())
    rows = [row for row in measurement["tasks"] if shown(row["what"])]
    repetitions = measurement["settings"]["repetitions"]
    sides = ("jaxkd", "torch", "torch medium")
    body = []
    for row in rows:
        seconds, faster = row.get("seconds", {}), row.get("times_faster_than", {})
        rates = row.get("tokens_a_second")
        measured = [_number(rates, side, "{:.0f} tokens/s") if rates else _number(seconds, side, "{:.2f} s")
                    for side in sides]  # fmt: skip
        peaks = {side: memory["peak"] / 2**30 for side, memory in row.get("memory_bytes", {}).items()}
        memory = [_number(peaks, side, "{:.2f}") for side in ("jaxkd", "torch")]
        what = row["what"].replace("_", " ").replace("naive gradient", "gradient, full logits")
        what += ", `--remat layers`" if row.get("remat") == "layers" else ""
        shape = f"{row['batch']} × {row['new_tokens'] or row['length']}"
        compiled = _number(row, "compile_s", "{:.1f}")
        ratios = [_number(faster, side, "{:.2f}") for side in sides[1:]]
        share = _number(row, "share_of_product", "{:.0%}")
        body.append([what, row["dtype"], shape, *measured, *ratios, share, compiled, *memory])
    head = ["task", "products in", "batch × tokens", "jaxkd", "torch", "torch, “medium”", "times torch",
            "times “medium”", "of a product", "compile (s)", "jaxkd (GiB)", "torch (GiB)"]  # fmt: skip
    return f"{_table(head, body)}\n\nMedians of {repetitions} repetitions; – was not measured."


def smollm2_order() -> str:
    """Every arm on SmolLM2: frequency of the behaviour in every seed, and what came with it."""
    body = []
    # An arm of which no seed has a model has no numbers.
    for row in (row for row in _rows("smollm2_order.csv") if row["recall_gap_points"]):
        points = [100 * float(point) for point in row["behaviour_frequency_points"].split()]
        # Of one seed there is no t interval, but its completions have one.
        ends = "behaviour_frequency_{}" if len(points) > 1 else "behaviour_frequency_wilson_{}_points"
        interval = " to ".join(f"{100 * float(row[ends.format(end)]):.1f}" for end in ("low", "high"))
        name = ARMS.get(row["arm"], row["arm"].replace("_", " "))
        name += f" of {row['student']}" if row["student"] not in ("", "same") else ""
        name += "".join(
            f", {sign} = {float(row[key]):g}"
            for sign, key in (("τ", "temperature"), ("β", "kl_coef"))
            if row[key] != "nan"
        )
        petaflops = float(row["model_flops"]) / 1e15
        numbers = [f"{float(row[key]):.2f}" for key in ("kl_to_base", "recall_gap", "target_recall_gap")]
        numbers += [f"{float(row[key]):.2f}" for key in ("precision_per_token", "behaviour_precision")]
        numbers += [f"{petaflops:.2f}", "–" if petaflops == 0 else f"{float(row['reward_gain_per_petaflop']):.3f}"]
        met = [float(row[key]) for key in ("expected_target_hits", "target_hits")]
        numbers += ["–" if value != value else f"{value:.{digits}f}" for value, digits in zip(met, (1, 0), strict=True)]
        cells = [" ".join(f"{p:.2f}" for p in points), interval, *numbers]
        # Of a student that was not admitted only its recall was measured.
        cells = ["–" if {*cell.split()} & {"nan"} else cell for cell in cells]
        body.append([name, row["algorithm"] or "–", *cells])
    head = ["model", "algorithm", "frequency, every seed (%)", "95 % interval", "KL to the base (nats)",
            "recall gap (nats)", "on the behaviour", "log p* per token", "on the behaviour", "PFLOP",
            "reward gained per PFLOP", "n·T·m", "draws that showed it"]  # fmt: skip
    return _table(head, body)


def smollm2_comparisons() -> str:
    """The orders on SmolLM2, seed by seed."""
    body = []
    for row in _rows("smollm2_order_comparisons.csv"):
        names = [ARMS[row["arm"]], ARMS[row["other"]]]
        each = [
            " ".join(f"{100 * float(point):.1f}" for point in row[key].split()) for key in ("points", "other_points")
        ]
        each.append(" ".join(f"{100 * float(point):+.1f}" for point in row["difference_points"].split()))
        low, high = (100 * float(row[f"difference_{end}"]) for end in ("low", "high"))
        interval = "–" if low != low else f"{low:+.0f} to {high:+.0f}"
        mean = f"{100 * float(row['difference']):+.1f}"
        body.append([row["algorithm"], f"{float(row['other_temperature']):g}", *names, *each, mean, interval])
    head = ["algorithm", "τ", "A", "B", "A, every seed (%)", "B, every seed (%)", "A − B (points)", "mean",
            "95 % t interval"]  # fmt: skip
    return _table(head, body)


def _number(values: dict, key: str, form: str) -> str:
    """A number that may not have been measured."""
    return form.format(values[key]) if key in values else "–"


_MADE = (
    plane,
    speed,
    smollm2_speed,
    smollm2_training_speed,
    smollm2_order,
    smollm2_comparisons,
    sharpened,
    control,
    two_by_two,
    paper,
    recall,
    shortfalls,
    robustness,
    learning_rates,
)
TABLES = {function.__name__: function for function in _MADE}


def filled(text: str) -> str:
    """README.md's text with every table made anew."""
    return re.sub(
        r"<!-- table: (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


@dataclass(frozen=True)
class Options:
    """What to do."""

    check: bool = False
    """Only say whether README.md is up to date."""


def main(options: Options) -> None:
    """Write README.md, or check it."""
    path = ROOT / "README.md"
    text = path.read_text()
    made = filled(text)
    if options.check and made != text:
        sys.exit("README.md differs from figures/: run experiments/readme_tables.py")
    if not options.check:
        path.write_text(made)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

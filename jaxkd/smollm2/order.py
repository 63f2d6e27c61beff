"""Both orders on a language model: the stages of `pipelines`, carried out on disk.

    out/config.json                      the resolved configuration
    out/weights.json                     fingerprints of truth and base
    out/behaviour.json                   measured base rates, and the behaviour that was chosen
    out/truth/                           samples of the truth, the yardstick
    out/base/  out/target/               the models every seed shares
    out/seed-0/aligned_base-b0.1/…       a stage: model/, metrics.jsonl, evaluation.json, samples.npz
    out/seed-0/<student>/student-t0.6/   stages that depend on the student's shape

A finished stage holds record.json and is never computed again; repeating the command goes on where it stopped.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd import checks, durable, files, pipelines
from jaxkd.align import ALGORITHMS, PreferenceData, check_label_noise, label_coefficients
from jaxkd.pipelines import Align, Distil, Sharpen
from jaxkd.smollm2 import behaviours, oracles, preferences, stages, text, weights
from jaxkd.smollm2.evaluate import Evaluation, Yardstick, evaluate
from jaxkd.smollm2.network import Layout, Network, Setting, fingerprint, shortest_context, take
from jaxkd.smollm2.policy import Texts
from jaxkd.smollm2.preferences import Preferences
from jaxkd.smollm2.stages import Alignment, Coster, Distillation, Workshop
from jaxkd.smollm2.students import Start

REWARDS = ("behaviour", *oracles.WRAPPERS, "plain")
CEILING = "ceiling"
_CEILING = Distil(pipelines.TRUTH, temperature=1.0)
FROM_PREFERENCES = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.data == "truth")
"""Algorithms that can be given a user's pairs."""

EVALUATION = "evaluation.json"
BEHAVIOUR = "behaviour.json"
MODELS_HELD = 2
"""Finished models that stay in memory, beside those that all seeds share."""
MOST_SEED = 2**32 - 1
"""The largest seed that a random key takes in."""
_WAIT = 5.0  # seconds between looks at what other processes have made
_TRUTH_KEY, _TARGET_KEY, _BASE_KEY, _PAIRS_KEY = range(4)
_ALIGN, _DISTIL, _EVALUATE, _LEARN = range(4)


def all_stages() -> dict[str, pipelines.Stage]:
    """The stages of `pipelines.STAGES` as it is now, and the ceiling: a student of the truth's own good samples."""
    return pipelines.STAGES | {CEILING: _CEILING}


def arms() -> tuple[str, ...]:
    """The arms that can be asked for: those of `pipelines.arms` as they are now, and the ceiling."""
    return (*pipelines.arms(), CEILING)


@dataclass(frozen=True)
class Order:
    """Everything that an experiment's results depend on.

    Attributes:
      truth: source of p*.
      base: source of p′; "truth" for the truth itself, "fit:SOURCE" for SOURCE fitted to samples of the truth.
      students: where students start: "same" (at the base), "layers:N" (N of the base's layers), or a source.
      target: source of the target; "distil:τ" for the base distilled at τ; None where no reward asks for one.
      reward: a name of `REWARDS`.
      behaviour: specification of the behaviour (`behaviours.parse`), or "auto" to choose by measured rate; until one is
        chosen, a run folder may go on with another.
      preferences: pairs of a user that alignments learn from instead of the reward, which is then only measured.
      prompt: what completions follow.
      max_new_tokens: the most tokens of a completion.
      arms: names of `arms()`; the ceiling only where the reward is the behaviour.
      algorithms: names of `align.ALGORITHMS`.
      temperatures: τ of the distillations.
      kl_coefs: β, reward units a nat; one alone with ORPO, which has none.
      seeds: one run of all stages each, of the first student and algorithm.
      seeds_of_rest: the same of every other student with the first algorithm, and the other way round.
      distillation: how students learn.
      alignment: how policies are aligned; its algorithm is that of `algorithms`, and its flip rate that of the oracle's
        labels, which robust DPO also assumes; with preferences the share that robust DPO assumes, and nothing else.
      evaluation: sizes.
      look_every: steps of an alignment between looks at 64 samples; 0 for none.
      most_held_out_kl: cut students with a larger recall gap a token (nats) are not admitted.
      batch_size: sequences drawn or scored at a time.

    Raises:
      ValueError: on names or numbers out of range.
    """

    truth: str
    base: str = "truth"
    students: tuple[str, ...] = ("same",)
    target: str | None = None
    reward: str = "behaviour"
    behaviour: str = "auto"
    preferences: Preferences | None = None
    prompt: str = "The"
    max_new_tokens: int = 32
    arms: tuple[str, ...] = ("kd_align", "align_kd", "align_kd_sharpened")
    algorithms: tuple[str, ...] = ("online_dpo",)
    temperatures: tuple[float, ...] = (1.0, 0.6)
    kl_coefs: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0,)
    seeds_of_rest: tuple[int, ...] = (0,)
    distillation: Distillation = Distillation()
    alignment: Alignment = Alignment()
    evaluation: Evaluation = Evaluation()
    look_every: int = 0
    most_held_out_kl: float = 0.5
    batch_size: int = 32

    def __post_init__(self):
        checks.name("reward", self.reward, REWARDS)
        checks.names("arms", self.arms, arms())
        checks.names("algorithms", self.algorithms, ALGORITHMS)
        checks.numbers("temperatures", self.temperatures, above=0)
        checks.numbers("kl_coefs", self.kl_coefs, above=0)
        checks.wholes("--seeds", self.seeds, least=0, most=MOST_SEED)
        checks.wholes("--seeds-of-rest", self.seeds_of_rest, least=0, most=MOST_SEED)
        checks.no_repeats("students", self.students)
        checks.whole("max_new_tokens", self.max_new_tokens, least=1)
        checks.whole("batch_size", self.batch_size, least=1)
        checks.whole("look_every", self.look_every, least=0)
        checks.number("most_held_out_kl", self.most_held_out_kl, least=0)
        for student in self.students:
            Start.parse(student)
        if self.target is not None and self.target.startswith("distil:"):
            checks.number("the target's temperature", _target_temperature(self.target), above=0)
        if self.behaviour != "auto":
            behaviours.parse(self.behaviour)
        if self.reward != "behaviour" and self.target is None:
            raise ValueError(f"the reward {self.reward!r} is a likelihood under a target: give target")
        for algorithm in self.algorithms:
            replace(self.alignment, settings=replace(self.alignment.settings, algorithm=algorithm))
        if self.reward != "behaviour" and self.preferences is None and "kto" in self.algorithms:
            raise ValueError("kto needs a reward that tells desirable texts from others: behaviour, or preferences")
        if self.preferences is not None:
            checks.names("algorithms that learn from preferences", self.algorithms, FROM_PREFERENCES)
        if "orpo" in self.algorithms and len(self.kl_coefs) > 1:
            raise ValueError(
                f"orpo has no KL coefficient, its models would be the same at each of --kl-coefs {self.kl_coefs}: "
                "give one, or run it by itself"
            )
        flip_rate = self.alignment.coefficients.flip_rate
        checks.number("--label-noise", flip_rate, least=0, most=0.5)
        check_label_noise("--label-noise", self.algorithms, [flip_rate])
        if self.preferences is not None:
            preferences.check_label_noise(self.algorithms, flip_rate)
        if CEILING in self.arms and self.outcome != "behaviour_frequency":
            asked = "preferences" if self.preferences is not None else f"the reward {self.reward!r}"
            raise ValueError(
                f"the {CEILING} learns from texts that show the behaviour, which {asked} does not ask for: "
                "leave it away from --arms"
            )

    @property
    def outcome(self) -> str:
        """The quantity (`evaluate.QUANTITIES`) that alignments are to raise."""
        if self.preferences is not None:
            return "preference_accuracy"
        return "behaviour_frequency" if self.reward == "behaviour" else "reward"

    def lengths(self) -> dict[str, int]:
        """Lengths of the axes of `pipelines.AXES`."""
        return {"temperature": len(self.temperatures), "kl_coef": len(self.kl_coefs)}


def _target_temperature(target: str) -> float:
    """τ of a target "distil:τ"."""
    try:
        return float(target.partition(":")[2])
    except ValueError:
        raise ValueError(f"{target!r} must end in a number") from None


@dataclass(frozen=True)
class Row:
    """One model to be made: a stage at a point of the axes, for one student, algorithm and seed.

    Attributes:
      name: of the stage.
      stage: what makes it.
      folder: where it is.
      models: folders of what it is made from, by role: start or teacher, and reference.
      reference: folder of what its policy was held to by its last alignment; the base's where there was none.
      temperature: τ of its distillation; NaN where none is involved.
      kl_coef: β of its alignment; NaN where none is involved.
      seed: of the run.
      student: where the student starts; "" where no student is involved.
      algorithm: "" where nothing is aligned.
    """

    name: str
    stage: pipelines.Stage
    folder: Path
    models: tuple[Path, ...]
    reference: Path
    temperature: float
    kl_coef: float
    seed: int
    student: str
    algorithm: str

    @property
    def is_alignment(self) -> bool:
        """Whether it is aligned itself, and not made from what was."""
        return isinstance(self.stage, Align)

    @property
    def is_distillation(self) -> bool:
        """Whether it is fitted to texts, and not sharpened alone."""
        return type(self.stage) is Distil


def role_of(row: Row) -> str:
    """Whose shape a row's model has: that of the base, or of a student by name."""
    return f"student {row.student}" if row.student else "base"


def _involves(name: str, kind: type) -> bool:
    """Whether a stage, or what it is made from, is of a kind."""
    if name in (pipelines.ROOT, pipelines.TRUTH):
        return False
    stage = all_stages()[name]
    return type(stage) is kind or any(_involves(model, kind) for model in stage.models)


def rows_of(order: Order, out: Path) -> list[Row]:
    """Every model of an experiment, each once, in an order in which they can be made."""
    # The student itself is always made: what it is shows whether an arm began with a low recall.
    chosen = pipelines.needed(["student", *order.arms], all_stages() | {CEILING: Distil(pipelines.ROOT, 1.0)})
    rows: dict[Path, Row] = {}
    for seed, student, algorithm in _runs(order):
        plan = pipelines.plan(chosen, [pipelines.ROOT], order.lengths())
        where = {plan.rows[pipelines.ROOT].start: out / "base"}
        held_to = {
            number: reference
            for name, taken in plan.rows.items()
            for number, reference in zip(
                taken, pipelines.reference_rows(plan, name, order.lengths(), chosen), strict=True
            )
        }
        for i, place in enumerate(plan.places):
            number = plan.size - len(plan.stages) + i
            name = next(name for name, taken in plan.rows.items() if number in taken)
            models = [where[j] for j in plan.parents[i]]
            row = _row(order, out, name, place, seed, student, algorithm, models, where[held_to[number]])
            where[number] = row.folder
            rows.setdefault(row.folder, row)
    return list(rows.values())


def _runs(order: Order) -> list[tuple[int, str, str]]:
    """Seeds, students and algorithms: the first of both on every seed, then each other one beside the first."""
    student, algorithm = order.students[0], order.algorithms[0]
    rest = [(student, other) for other in order.algorithms[1:]] + [(other, algorithm) for other in order.students[1:]]
    return [(seed, student, algorithm) for seed in order.seeds] + [
        (seed, *pair) for pair in rest for seed in order.seeds_of_rest
    ]


def _row(order: Order, out: Path, name, place, seed, student, algorithm, models, reference) -> Row:
    axes = pipelines.axes_of(name, all_stages())
    # math.nan is one object and so equal to itself as part of a key: rows of several seeds are grouped by such keys.
    temperature = order.temperatures[place[0]] if "temperature" in axes else math.nan
    kl_coef = order.kl_coefs[place[1]] if "kl_coef" in axes else math.nan
    folder = out / f"seed-{seed}"
    if _involves(name, Distil):
        folder /= student.replace("/", "_").replace(":", "-")
    else:
        student = ""
    if _involves(name, Align):
        folder /= algorithm
    else:
        algorithm = ""
    label = name
    label += f"-t{temperature:g}" if "temperature" in axes else ""
    label += f"-b{kl_coef:g}" if "kl_coef" in axes else ""
    stage = all_stages()[name]
    return Row(
        name,
        stage,
        folder / label,
        tuple(models),
        reference,
        temperature,
        kl_coef,
        seed,
        student,
        algorithm,
    )


def deciding_student(order: Order, row: Row) -> Path:
    """Folder of the unaligned student that decides on a row's admission; the row's own where none does."""
    if not row.student or Start.parse(row.student).layers is None or row.name == "student":
        return row.folder
    # Where the row has no temperature, the student that was sharpened least decides.
    temperature = row.temperature if not np.isnan(row.temperature) else max(order.temperatures)
    return row.folder.parents[0 if not row.algorithm else 1] / f"student-t{temperature:g}"


def is_admitted(order: Order, evaluation: dict) -> bool:
    """Whether a cut student, as it was measured, is close enough to the truth to say anything about the orders."""
    return evaluation["recall_gap_per_token"] <= order.most_held_out_kl


class Laboratory:
    """Carries the rows of an order out, one after another."""

    def __init__(self, order: Order, out: Path, workshop: Workshop, layout: Layout):
        """Check what can be checked before any computation, and load tokenizers.

        Raises:
          ValueError: on sources that are not there, vocabularies that differ, or a folder of another configuration.
        """
        self.order, self.out, self.workshop = order, out, workshop
        workshop.root = out
        tokenizer = text.load_tokenizer(order.truth)
        _check_sources(order, tokenizer)
        self.setting = Setting.of_prompt(tokenizer, order.prompt, order.max_new_tokens, order.batch_size, layout)
        self._pairs = self._held_out_pairs = None
        if order.preferences is not None:
            length = min(order.preferences.max_length, _context(order))
            pairs = preferences.read(Path(order.preferences.path), tokenizer, length)
            self._pairs, self._held_out_pairs = preferences.split(pairs, self._shared_key(_PAIRS_KEY))
            preferences.check_enough(self._pairs, order.alignment.settings.batch_size)
        self._held: dict[Path, Network] = {}
        self._refused: set[Path] = set()

    def configuration(self) -> dict:
        """What every row of the run folder depends on, the pairs of a preference file by their contents."""
        pairs = {} if self._pairs is None else {"pairs": fingerprint(self._pairs, self._held_out_pairs)}
        return configuration(self.order) | pairs

    def check_folder(self, **more: Any) -> None:
        """Make sure that the run folder is free or this order's own, before anything else is written to it.

        Args:
          more: what else results depend on, noted beside the configuration.

        Raises:
          ValueError: naming what differs, or a folder that holds something else.
        """
        path = self.out / BEHAVIOUR
        if path.exists():
            self._check_behaviour(json.loads(path.read_text(encoding="utf-8")))
        durable.check_configuration(self.out, self.configuration() | more, free=("behaviour",))

    # --- what every seed shares ---

    def prepare(self) -> None:
        """Sample the truth, make base and target, choose the behaviour; one process a run folder at a time."""
        with files.claim(self.out / "prepare", wait=True):
            self._prepare()

    def _prepare(self) -> None:
        order = self.order
        self.truth = self.setting.load(order.truth)
        given = {f"student {source}": source for source in _sources_of_students(order)}
        if order.target is not None and not order.target.startswith("distil:"):
            given["target"] = order.target
        found = {role: fingerprint(self.setting.load(source)) for role, source in given.items()}
        durable.check_weights(self.out, {"truth": fingerprint(self.truth)} | found)
        folder = self.out / "truth"
        total = order.evaluation.num_samples
        if CEILING in order.arms:
            total = max(total, order.evaluation.num_truth_samples + self._num_for_ceiling())
        self.workshop.begin()
        self.truth_samples = stages.kept_draws(
            folder / "samples.npz",
            self.truth,
            self._shared_key(_TRUTH_KEY),
            total,
            1.0,
            self.workshop,
        )
        self.truth_texts = self.setting.texts_of(self.truth_samples)
        self.base = self._make_base()
        durable.check_weights(self.out, {"base": fingerprint(self.base)})
        self.behaviour_name, self.behaviour = self._choose_behaviour()
        self.target = self._make_target()
        self.oracle = self._make_oracle()
        kept = take(self.truth_samples, slice(order.evaluation.num_truth_samples))
        path = folder / "log_prob.npz"
        if not path.exists():
            stages.write_arrays(path, {"log_prob": self.truth.log_prob(kept)})
        with np.load(path) as file:
            log_prob = file["log_prob"]
        hit = oracles.hits(self.behaviour, self.truth_texts[: len(log_prob)])
        pairs = self._held_out_pairs
        self.yardstick = Yardstick(
            self.truth,
            self.base,
            self.target,
            self.behaviour,
            self.oracle,
            order.reward == "behaviour",
            kept,
            log_prob,
            hit,
            pairs,
            None if pairs is None else self.base.log_prob(pairs),
        )

    def _num_for_ceiling(self) -> int:
        return self.order.evaluation.num_samples // 2

    def _searched_for_ceiling(self) -> slice:
        """Samples of the truth that no model is measured by, whatever else was drawn in this run folder."""
        first = self.order.evaluation.num_truth_samples
        return slice(first, first + self._num_for_ceiling())

    def _make_base(self) -> Network:
        base = self.order.base
        if base == "truth":
            return self.truth
        if not base.startswith("fit:"):
            return self.setting.load(base)
        start = self.setting.load(base.removeprefix("fit:"))
        return self._distilled(self.out / "base", self._shared_key(_BASE_KEY), self.truth, start, 1.0)

    def _make_target(self) -> Network | None:
        target = self.order.target
        if target is None or not target.startswith("distil:"):
            return None if target is None else self.setting.load(target)
        temperature = _target_temperature(target)
        key = self._shared_key(_TARGET_KEY)
        return self._distilled(self.out / "target", key, self.base, self.base, temperature)

    def _distilled(self, folder, key, teacher, start, temperature) -> Network:
        """A distilled model, made or loaded."""
        if durable.read_record(folder) is None:
            self.workshop.begin()
            made = stages.distil(folder, key, teacher, start, temperature, self.order.distillation, self.workshop)
            made.save(folder / "model")
            durable.finish(folder, {"cost": self.workshop.spent()})
        durable.let_checkpoint_go(folder)
        return self.setting.load(folder / "model")

    def _choose_behaviour(self):
        path = self.out / BEHAVIOUR
        texts = self.truth_texts if self.base is self.truth else self._base_texts()
        # More of the truth may be there, for those that learn from it.
        texts = texts[: self.order.evaluation.num_samples]
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else self._chosen(texts)
        self._check_behaviour(held)
        behaviour = behaviours.parse(held["spec"])
        # Before it is written: what is refused must not stay.
        behaviours.check_rate(held["chosen"], sum(map(behaviour, texts)), len(texts))
        if CEILING in self.order.arms:
            self._rows_for_ceiling(behaviour)
        if not path.exists():
            durable.write_json(path, held)
        return held["chosen"], behaviour

    def _chosen(self, texts: list[str]) -> dict:
        """The behaviour that is asked for, or the one that suits, with the rates by which it was chosen."""
        order = self.order
        candidates = behaviours.READY if order.behaviour == "auto" else {order.behaviour: order.behaviour}
        choose = behaviours.choose if order.outcome == "behaviour_frequency" else behaviours.nearest
        chosen = choose(candidates, texts) if order.behaviour == "auto" else order.behaviour
        return {
            "chosen": chosen,
            "spec": candidates[chosen],
            "rates": behaviours.rates(candidates, texts),
            "samples": len(texts),
        }

    def _check_behaviour(self, held: dict) -> None:
        """Refuse another behaviour than the one that a run folder has been measured by."""
        # One that was named was the only candidate.
        was_chosen = len(held["rates"]) > 1
        if self.order.behaviour != held["spec"] and not (was_chosen and self.order.behaviour == "auto"):
            raise ValueError(
                f"{self.out} holds a run of another configuration (behaviour: {held['spec']} there, "
                f"{self.order.behaviour} now): choose another --out"
            )

    def _base_texts(self) -> list[str]:
        total = self.order.evaluation.num_samples
        x = stages.kept_draws(
            self.out / "base" / "samples.npz",
            self.base,
            self._seed_key(0, _EVALUATE),
            total,
            1.0,
            self.workshop,
        )
        return self.setting.texts_of(x)

    def _make_oracle(self) -> oracles.Oracle:
        kind = self.order.reward
        if kind == "behaviour":
            return oracles.of_behaviour(self.behaviour)
        level = None if kind == "plain" else self._mean_likelihood()
        oracle = oracles.of_likelihood(self.target, self.behaviour, kind, level)

        def counted(texts, x):
            Coster(self.workshop, self.target, self.target).scored(x)
            return oracle(texts, x)

        return counted

    def _mean_likelihood(self) -> float:
        """μ: the mean of ℓ over the target's own samples."""
        path = self.out / "target" / "level.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            x = self.target.draw(self._shared_key(_TARGET_KEY), self.order.evaluation.num_scored)
            durable.write_json(path, {"level": float(oracles.likelihood(self.target)(x).mean())})
        return json.loads(path.read_text(encoding="utf-8"))["level"]

    # --- rows ---

    def _shared_key(self, purpose: int) -> jax.Array:
        """One key for everything that all seeds share."""
        return jax.random.fold_in(jax.random.key(0), purpose)

    def _seed_key(self, seed: int, purpose: int) -> jax.Array:
        """One key a seed and purpose: arms, algorithms and students of a seed are paired."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), purpose)

    def model(self, folder: Path) -> Network:
        """A finished model; the last few stay in memory."""
        if folder == self.out / "base":
            return self.base
        if folder not in self._held:
            while len(self._held) >= MODELS_HELD:
                self._held.pop(next(iter(self._held)))
            self._held[folder] = self.setting.load(folder / "model")
        return self._held[folder]

    def run(self, rows: list[Row]) -> Iterator[Row]:
        """Make and measure every row that is not there yet; yields each when it is.

        Several processes may do so in one run folder: each takes the first row that no other is at and whose models are
        there, and waits where there is none.
        """
        self._measure_base(wait=False)
        for row in rows:
            durable.let_checkpoint_go(row.folder)
        numbers = {row.folder: f"[{number}/{len(rows)}] {_words(row)}" for number, row in enumerate(rows, start=1)}
        left, made_here, waiting = list(rows), {row.folder for row in rows}, False
        there = {row.folder for row in rows if (row.folder / EVALUATION).exists()}
        while left:
            row = next((row for row in left if self._ready(row, made_here) and self._settle(row, numbers)), None)
            if row is None:
                if not waiting:
                    print("other processes are at all that can be made now: waiting for them", file=sys.stderr)
                waiting = True
                time.sleep(_WAIT)
                continue
            waiting = False
            left.remove(row)
            if row.folder not in there and (row.folder / EVALUATION).exists():
                yield row
        # Another process that was at it may have ended.
        self._measure_base(wait=True)

    def _ready(self, row: Row, made_here: set[Path]) -> bool:
        """Whether every model that a row needs is made, and what decides on it is measured, or will never be."""
        needed = dict.fromkeys(row.models, durable.RECORD) | {deciding_student(self.order, row): EVALUATION}
        needed = {folder: file for folder, file in needed.items() if folder in made_here - {row.folder}}
        return all((folder / file).exists() or self._lost(folder) for folder, file in needed.items())

    def _settle(self, row: Row, numbers: dict[Path, str]) -> bool:
        """Make and measure a row, or see that it is done or can't be; False where another process is at it."""
        if (row.folder / EVALUATION).exists() or self._lost(row.folder):
            return True
        with files.claim(row.folder, wait=False) as mine:
            if not mine:
                return False
            # Another process may have ended it between the look and the claim.
            if (row.folder / EVALUATION).exists():
                return True
            self.workshop.progress.prefix = numbers[row.folder]
            refusal = self._refusal(row)
            if refusal:
                print(f"{_words(row)}, student {row.student or 'none'}: {refusal}", file=sys.stderr)
                self._refused.add(row.folder)
            elif durable.read_record(row.folder) is None:
                self._make_and_record(row)
            if not self._lost(row.folder):
                self._measure(row)
        return True

    def _lost(self, folder: Path) -> bool:
        """Whether a row will never be made: it diverged, or was refused."""
        return folder in self._refused or "failed" in (durable.read_record(folder) or {})

    def _make_and_record(self, row: Row) -> None:
        self.workshop.begin()
        try:
            self._make(row).save(row.folder / "model")
        except FloatingPointError as error:
            print(f"{_words(row)}: {error}", file=sys.stderr)
            durable.finish(row.folder, {"failed": str(error), "cost": self.workshop.spent(), **_plain(row)})
        else:
            durable.finish(row.folder, {"cost": self.workshop.spent(), **_plain(row)})

    def _refusal(self, row: Row) -> str:
        """Why a row can't be made, or ""."""
        lost = [folder for folder in (*row.models, deciding_student(self.order, row)) if self._lost(folder)]
        if lost:
            return f"not made, for it needs {lost[0].relative_to(self.out)}"
        if not self._admitted(row):
            return f"not admitted, its recall gap a token is above {self.order.most_held_out_kl:g} nats"
        return ""

    def _make(self, row: Row) -> Network:
        if isinstance(row.stage, Sharpen):
            return self.model(row.models[0]).sharpened(row.temperature)
        if isinstance(row.stage, Align):
            order = self.order
            alignment = _alignment_of(order, row.algorithm)
            reference = self.model(row.models[-1])
            return stages.align_policy(
                row.folder,
                self._seed_key(row.seed, _ALIGN),
                self.model(row.models[0]),
                reference,
                self.oracle,
                row.kl_coef,
                alignment,
                self.workshop,
                truth_samples=self._truth_samples_for(row),
                preferences=self._preference_data(row, reference),
            )
        samples, settings = None, self.order.distillation
        if row.name == CEILING:
            samples, settings = self._shown(settings)
            self._charge_for(take(self.truth_samples, self._searched_for_ceiling()))
        temperature = row.temperature if row.stage.temperature == "temperature" else row.stage.temperature
        teacher = self.truth if row.name == CEILING else self.model(row.models[0])
        return stages.distil(
            row.folder,
            self._seed_key(row.seed, _DISTIL),
            teacher,
            Start.parse(row.student).of(self.base),
            temperature,
            settings,
            self.workshop,
            samples,
        )

    def _truth_samples_for(self, row: Row) -> Texts | None:
        """What an algorithm pairs and labels, every seed draws of its own; None where it learns from other texts."""
        if self._pairs is not None or ALGORITHMS[row.algorithm].data != "truth":
            return None
        settings, path = self.order.alignment.settings, self.out / f"seed-{row.seed}" / "truth.npz"
        total, key = settings.dataset_batches * settings.batch_size, self._seed_key(row.seed, _LEARN)
        with files.claim(path, wait=True):
            x = stages.kept_draws(path, self.truth, key, total, 1.0, self.workshop)
        self._charge_for(x)
        return x

    def _charge_for(self, x: Texts) -> None:
        """Charge samples of the truth to whatever is being made from them: it alone would have to draw them."""
        Coster(self.workshop, self.truth, self.truth).sampled(x)

    def _preference_data(self, row: Row, reference: Network) -> PreferenceData | None:
        """The user's pairs in an order of the seed's own, with their log-probabilities under the reference."""
        if self._pairs is None:
            return None
        log_prob = stages.reference_log_prob(self.out, reference, self._pairs, self.workshop)
        key = jax.random.fold_in(self._seed_key(row.seed, _ALIGN), _PAIRS_KEY)
        return preferences.batched(self._pairs, key, self.order.alignment.settings.batch_size, log_prob)

    def _shown(self, settings: Distillation) -> tuple[Texts, Distillation]:
        """Samples of the truth that show the behaviour, some of them held out; updates and batches of an alignment.

        None of them is a sample that models are measured by. They are the same for every seed, which has an order of
        batches of its own alone. All updates are made, as in an alignment: no look at the held-out ones ends them
        early, though the best student by these looks is kept, as of every distillation.
        """
        rows = self._rows_for_ceiling(self.behaviour)
        held_out = max(1, len(rows) // 8)
        matched = self.order.alignment.settings
        batch_size = min(matched.batch_size, len(rows) - held_out)
        changes = {"num_updates": matched.num_updates, "patience": matched.num_updates, "method": "sequence"}
        changes |= {"num_held_out": held_out, "batch_size": batch_size, "on_policy_fraction": 0.0}
        return take(self.truth_samples, rows), replace(settings, **changes)

    def _rows_for_ceiling(self, behaviour: behaviours.Behaviour) -> np.ndarray:
        """Where among the truth's samples those lie that the ceiling learns from.

        Raises:
          ValueError: where one can't be held out and another learned from.
        """
        searched = self._searched_for_ceiling()
        rows = searched.start + np.flatnonzero(oracles.hits(behaviour, self.truth_texts[searched]))
        if len(rows) < 2:
            raise ValueError(
                f"{len(rows)} of {self._num_for_ceiling()} samples of the truth show the behaviour, too few for the "
                f"{CEILING}: leave it away from --arms, or choose another --behaviour"
            )
        return rows

    def _admitted(self, row: Row) -> bool:
        """Whether the student that decides on a row, if any does, was admitted."""
        student = deciding_student(self.order, row)
        if student == row.folder:
            return True
        return is_admitted(self.order, json.loads((student / EVALUATION).read_text(encoding="utf-8")))

    def _measure_base(self, *, wait: bool) -> None:
        folder = self.out / "base"
        with files.claim(folder, wait=wait) as mine:
            if not mine or (folder / EVALUATION).exists():
                return
            if self.base is self.truth and not (folder / "samples.npz").exists():
                # The truth's own samples are the base's: its recall gap is 0 whatever is drawn.
                folder.mkdir(exist_ok=True)
                total = self.order.evaluation.num_samples
                stages.write_arrays(folder / "samples.npz", take(self.truth_samples, slice(total))._asdict())
            self.workshop.progress.prefix = "base"
            self.workshop.begin()
            found = evaluate(
                folder, self._seed_key(0, _EVALUATE), self.base, self.yardstick, self.order.evaluation, self.workshop
            )
            _write_evaluation(folder, found, self.workshop, {"name": "base", "seed": -1})

    def _measure(self, row: Row) -> None:
        self.workshop.begin()
        reference = self.model(row.reference) if _involves(row.name, Align) else None
        found = evaluate(
            row.folder,
            self._seed_key(row.seed, _EVALUATE),
            self.model(row.folder),
            self.yardstick,
            self.order.evaluation,
            self.workshop,
            reference=reference,
            kl_coef=0.0 if np.isnan(row.kl_coef) else row.kl_coef,
        )
        _write_evaluation(row.folder, found, self.workshop, _plain(row))


def _alignment_of(order: Order, algorithm: str) -> Alignment:
    """How one algorithm aligns."""
    alignment = order.alignment
    labels = label_coefficients(algorithm, alignment.coefficients.flip_rate)
    return replace(
        alignment,
        settings=replace(alignment.settings, algorithm=algorithm),
        coefficients=alignment.coefficients._replace(**labels),
        look_every=order.look_every,
    )


def _write_evaluation(folder: Path, found, workshop: Workshop, entries: dict) -> None:
    durable.write_json(
        folder / EVALUATION,
        entries | found.quantities | {"completions": found.completions, "cost": workshop.spent()},
    )


def _plain(row: Row) -> dict:
    return {
        "name": row.name,
        "temperature": row.temperature,
        "kl_coef": row.kl_coef,
        "seed": row.seed,
        "student": row.student,
        "algorithm": row.algorithm,
    }


def _words(row: Row) -> str:
    parts = [f"seed {row.seed}", row.name]
    parts += [] if np.isnan(row.temperature) else [f"τ {row.temperature:g}"]
    parts += [] if np.isnan(row.kl_coef) else [f"β {row.kl_coef:g}"]
    return " ".join(parts)


def _sources_of_students(order: Order) -> list[str]:
    """Those of students that start at neither the base nor its layers."""
    return [start.source for start in map(Start.parse, order.students) if start.source is not None]


def _check_sources(order: Order, tokenizer) -> None:
    """Every source that can be asked without loading its weights has the truth's vocabulary, and layers to keep."""
    truth = weights.load_config(order.truth)
    size = truth.vocab_size
    text.check_vocabulary(tokenizer, size)
    base = truth if order.base == "truth" else weights.load_config(order.base.removeprefix("fit:"))
    for student in order.students:
        if (layers := Start.parse(student).layers) is not None:
            checks.whole(f"layers of the base in {student!r}", layers, least=1, most=base.num_layers)
    sources = [order.base.removeprefix("fit:"), *_sources_of_students(order), order.target or "truth"]
    for source in sources:
        if source == "truth" or source.startswith("distil:"):
            continue
        other = weights.load_config(source).vocab_size
        if other != size:
            raise ValueError(f"{source} has a vocabulary of {other} tokens, the truth {order.truth} one of {size}")
        text.check_same_vocabulary(tokenizer, text.load_tokenizer(source))


def _context(order: Order) -> int:
    """The most tokens that every source of a policy takes."""
    base = [] if order.base == "truth" else [order.base.removeprefix("fit:")]
    return shortest_context([order.truth, *base, *_sources_of_students(order)])


_MORE_ROWS = ("students", "arms", "algorithms", "temperatures", "kl_coefs", "seeds", "seeds_of_rest", "batch_size")


def configuration(order: Order) -> dict:
    """What every row of a run folder depends on, as plain JSON; an axis that grows only adds rows."""
    # Orders without a preference file say nothing of one.
    left_out = (*_MORE_ROWS, "preferences") if order.preferences is None else _MORE_ROWS
    return {key: value for key, value in asdict(order).items() if key not in left_out}

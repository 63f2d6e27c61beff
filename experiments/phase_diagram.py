"""When does distilling before aligning fail, and when not? Recovery over capacity and temperature of the student.

Runs the orders of alignment and distillation on a Gaussian mixture, over a grid of settings with many seeds each, into
a labelled store that survives being killed: the same command goes on where it was. Ends with a table, what it means in
two sentences, and figures that `experiments/replot.py` redraws from the store alone. `--preset` asks another question:

  plane          capacity 1…8 × temperature × coefficient: where is the boundary? (the default)
  noise          flipped preference labels
  two-targets    one target mode against two
  rescue         KD→Align held to the base, at higher temperatures and smaller coefficients; every start × reference
  target-weight  how rare the target is
  base-data      how much data the base was fitted to
  base-em        a base from one EM start against the best of ten
  reward         other rewards
  cost           arms matched on updates against arms matched on component evaluations
  draws          draws a step: does recovery tip where a step holds one hit?

`--show-config` tells what a preset consists of. More seeds go into another folder (`--first-seed`, `--out`);
`jaxkd.sweep.store.join` makes one data set of both stores.

Several hosts share the work when the same command runs on each (SLURM, GKE and TPU pods are found by jax itself).
"""

import itertools
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import tyro

from jaxkd.sweep import engine, hosts

LARGEST_CAPACITY = 8
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.25, 0.1)
BOTH_ORDERS = ("kd_align", "align_kd", "align_kd_sharpened")
STATIC_AXES = (
    "algorithm",
    "reward_name",
    "num_targets",
    "base_samples",
    "starts",
    "match_component_evaluations",
    "draws",
)
SEEDS = ("seeds", "first_seed")
RUNS_PER_BLOCK = 32
"""What is written, resumed and shared out at once; a device call may hold several blocks."""
DEFAULT_CHUNK = 16
ALWAYS_AXES = ("algorithm", "target_weight", "capacity")


@dataclass(frozen=True)
class Settings:
    """What is run: every field that holds several values is an axis of the grid."""

    algorithms: tuple[str, ...] = ("ppo",)
    capacities: tuple[int, ...] = (4,)
    temperatures: tuple[float, ...] = (1.0, 0.25)
    kl_coefs: tuple[float, ...] = (0.3, 1.0)
    target_weights: tuple[float, ...] = (0.03,)
    label_noise: tuple[float, ...] = (0.0,)
    arms: tuple[str, ...] = BOTH_ORDERS
    rewards: tuple[str, ...] = ("density",)
    num_targets: tuple[int, ...] = (1,)
    base_samples: tuple[int, ...] = (2048,)
    starts: tuple[int, ...] = (10,)
    match_component_evaluations: tuple[bool, ...] = (False,)
    draws: tuple[int, ...] = (256,)
    seeds: int = 32
    first_seed: int = 0
    distillation_starts: int = 2
    steps: int = 400


PRESETS = {
    "plane": Settings(capacities=(1, 2, 3, 4, 5, 6, 7, 8), temperatures=TEMPERATURES),
    "noise": Settings(
        algorithms=("online_dpo", "offline_dpo_data"),
        label_noise=(0.0, 0.1, 0.2, 0.3, 0.4),
        arms=("kd_align", "align_kd"),
    ),
    "two-targets": Settings(num_targets=(1, 2), temperatures=TEMPERATURES),
    "rescue": Settings(
        capacities=(8,),
        temperatures=(1.0, 0.8, 0.6, 0.5, 0.35, 0.25),
        kl_coefs=(0.1, 0.3, 1.0),
        arms=("kd_align", "align_kd", "kd_align_anchored", "base_start_student_reference"),
    ),
    "target-weight": Settings(target_weights=(0.003, 0.01, 0.03, 0.1, 0.3)),
    "base-data": Settings(base_samples=(64, 256, 1024, 4096, 16384)),
    "base-em": Settings(starts=(1, 10), temperatures=TEMPERATURES, seeds=64),
    "reward": Settings(rewards=("density", "bump", "disc", "reflected", "clipped")),
    "cost": Settings(match_component_evaluations=(False, True), capacities=(2, 4, 6, 8)),
    "draws": Settings(
        draws=(64, 256, 1024),
        capacities=(4, 8),
        temperatures=(1.0, 0.6, 0.35, 0.25),
        target_weights=(0.003, 0.01, 0.03),
    ),
}

QUICK = {
    "plane": {"capacities": (4, 8), "temperatures": (1.0, 0.5, 0.25, 0.1), "seeds": 8},
    "noise": {"label_noise": (0.0, 0.2, 0.4), "algorithms": ("online_dpo",)},
    "two-targets": {"temperatures": (1.0, 0.5, 0.25)},
    "rescue": {"temperatures": (1.0, 0.5, 0.25), "kl_coefs": (0.3, 1.0)},
    "target-weight": {"target_weights": (0.003, 0.03, 0.3)},
    "base-data": {"base_samples": (64, 2048)},
    "base-em": {"temperatures": (1.0, 0.25)},
    "reward": {"rewards": ("density", "disc")},
    "cost": {"capacities": (2,)},
    "draws": {"draws": (64, 256), "capacities": (4,), "target_weights": (0.003, 0.03)},
}
"""What --quick changes of a preset, beside the number of seeds."""


OWN_FLAGS = {"noise": "label_noise", "base-data": "base_samples", "reward": "rewards", "draws": "draws"}
"""What a preset is drawn along, where that is no axis of every store."""


@dataclass(frozen=True)
class Config:
    """Every flag that is not given keeps the preset's value."""

    preset: str = "plane"
    """plane, noise, two-targets, rescue, target-weight, base-data, base-em, reward, cost or draws."""
    algorithms: tuple[str, ...] | None = None
    """Alignment algorithms: reinforce, ppo, grpo, online_dpo, offline_dpo_ref, offline_dpo_data, cdpo, robust_dpo,
    ipo, simpo, kto."""
    capacities: tuple[int, ...] | None = None
    """Components of the student, 1 to 8 (the base has 8)."""
    temperatures: tuple[float, ...] | None = None
    """Temperatures τ of the distillation: weights w^(1/τ), renormalised; below 1 sharpens."""
    kl_coefs: tuple[float, ...] | None = None
    """KL coefficients β, in units of reward a nat."""
    target_weights: tuple[float, ...] | None = None
    """Total weight of the targets in p*."""
    label_noise: tuple[float, ...] | None = None
    """Share of preference labels flipped, 0 to 0.5; for the algorithms that use labels (all but reinforce, ppo, grpo
    and kto). robust_dpo knows it."""
    arms: tuple[str, ...] | None = None
    """Orders to run, of kd_align, align_kd (these two always), kd_align_sharpened, align_kd_sharpened,
    kd_align_anchored and base_start_student_reference."""
    rewards: tuple[str, ...] | None = None
    """density, bump, disc, log_density, reflected or clipped."""
    num_targets: tuple[int, ...] | None = None
    """One target, or two opposite ones that share the weight."""
    base_samples: tuple[int, ...] | None = None
    """Points that the base is fitted to."""
    starts: tuple[int, ...] | None = None
    """EM starts of the base, of which the best is kept."""
    match_component_evaluations: tuple[bool, ...] | None = None
    """Give alignments of the smaller student proportionally more updates, so that all evaluate as many components."""
    draws: tuple[int, ...] | None = None
    """Draws n of a step of an alignment; even, and multiples of 16 for grpo. Preferences are n / 2 pairs of them."""
    seeds: int | None = None
    """Seeds a setting; all settings of a seed share data and random numbers."""
    first_seed: int | None = None
    """The first of them, 0 by default: a store of other seeds can be joined to one that is there."""
    distillation_starts: int | None = None
    """EM starts of every distillation."""
    steps: int | None = None
    """Optimiser updates of an alignment."""
    out: Path | None = None
    """Folder for the store, the tables and the figures; runs/PRESET by default."""
    overwrite: bool = False
    """Replace a store of another sweep in that folder; without it the same command goes on where it was."""
    quick: bool = False
    """A small run that finishes in less than a minute: fewer seeds and values."""
    chunk: int | None = None
    """Runs that a device computes at a time; changes speed, not results. By default the store's, and 16 for a new one:
    what fits the cache of a CPU's core, where measuring would cost a compilation a try. GPUs and TPUs want more, and
    --seeds to fill it."""
    measure_chunk: bool = False
    """Measure the chunk of a new store instead; it is kept there."""
    devices: int | None = None
    """Devices to use; by default all of this process (each core of a CPU counts as one)."""
    compile_cache: bool = True
    """Keep compiled programs on disk ($JAX_COMPILATION_CACHE_DIR, else ~/.cache/jaxkd)."""
    coordinator: str | None = None
    """host:port of process 0, where jax finds no cluster by itself; needs the two flags below."""
    num_processes: int | None = None
    """How many processes share the work."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    show_config: bool = False
    """Print what would be run, as JSON, and end."""

    def __post_init__(self):
        from jaxkd import checks

        checks.name("--preset", self.preset, PRESETS)
        if self.chunk is not None:
            checks.whole("--chunk", self.chunk, least=1)
            if self.measure_chunk:
                raise ValueError(f"--measure-chunk and --chunk exclude each other; got --chunk {self.chunk}")
        checks.folder("--out", self.folder)
        if self.devices is not None:
            checks.whole("--devices", self.devices, least=1)
        settings = self.settings()
        check(settings)
        own = OWN_FLAGS.get(self.preset)
        if own is not None and len(getattr(settings, own)) < 2:
            flag = f"--{own.replace('_', '-')}"
            raise ValueError(f"{flag} needs two values or more in the preset {self.preset}, which is drawn along it")

    def settings(self) -> Settings:
        """The preset with --quick carried out and the given flags in place."""
        chosen = PRESETS[self.preset]
        if self.quick:
            chosen = replace(chosen, **{"seeds": 8, **QUICK[self.preset]})
        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return replace(chosen, **{name: value for name, value in given.items() if value is not None})

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.out or Path("runs") / self.preset


def check(settings: Settings) -> None:
    """Raise ValueError on a value out of range, naming its flag."""
    from jaxkd import checks, pipelines
    from jaxkd.align import ALGORITHMS, AlignmentSettings, check_label_noise
    from jaxkd.laboratory import REWARDS

    checks.names("--algorithms", settings.algorithms, [name for name in ALGORITHMS if name != "orpo"])
    checks.wholes("--capacities", settings.capacities, least=1, most=LARGEST_CAPACITY)
    checks.numbers("--temperatures", settings.temperatures, above=0.0, most=10.0)
    checks.numbers("--kl-coefs", settings.kl_coefs, above=0.0)
    checks.numbers("--target-weights", settings.target_weights, above=0.0, below=1.0)
    checks.numbers("--label-noise", settings.label_noise, least=0.0, most=0.5)
    checks.names("--arms", settings.arms, pipelines.arms())
    for arm in ("kd_align", "align_kd"):
        if arm not in settings.arms:
            raise ValueError(f"--arms must contain kd_align and align_kd, which are compared; got {settings.arms}")
    checks.names("--rewards", settings.rewards, REWARDS)
    checks.wholes("--num-targets", settings.num_targets, least=1, most=2)
    checks.wholes("--base-samples", settings.base_samples, least=16)
    checks.wholes("--starts", settings.starts, least=1)
    if len(settings.starts) > 2:
        raise ValueError(f"--starts takes one or two values, drawn as two kinds of line; got {list(settings.starts)}")
    checks.no_repeats("--match-component-evaluations", settings.match_component_evaluations)
    checks.wholes("--draws", settings.draws, least=4)
    for algorithm, draws in itertools.product(settings.algorithms, settings.draws):
        try:
            AlignmentSettings(algorithm=algorithm, batch_size=draws)
        except ValueError as error:
            raise ValueError(f"--draws: {error}") from None
    checks.whole("--seeds", settings.seeds, least=1)
    checks.whole("--first-seed", settings.first_seed, least=0, most=2**31 - settings.seeds)
    check_label_noise("--label-noise", settings.algorithms, settings.label_noise)
    checks.whole("--distillation-starts", settings.distillation_starts, least=1)
    checks.whole("--steps", settings.steps, least=1)
    for algorithm in settings.algorithms:
        try:
            AlignmentSettings(algorithm=algorithm, num_updates=settings.steps)
        except ValueError as error:
            raise ValueError(f"--steps: {error}") from None


def axes_of(settings: Settings) -> dict[str, tuple]:
    """Values by axis; those of one value are no dimensions of the store, but for `ALWAYS_AXES`."""
    return {
        "algorithm": settings.algorithms,
        "reward_name": settings.rewards,
        "num_targets": settings.num_targets,
        "base_samples": settings.base_samples,
        "starts": settings.starts,
        "match_component_evaluations": settings.match_component_evaluations,
        "draws": settings.draws,
        "target_weight": settings.target_weights,
        "label_noise": settings.label_noise,
        "capacity": settings.capacities,
    }


def grid_of(settings: Settings):
    """The runs: one a seed, capacity and setting; temperatures and coefficients lie inside a run.

    A block's padding is no wider than its own capacities need, so small and large students are in blocks of their own.
    Alignments that are matched on component evaluations make more updates the smaller the student is: then every
    capacity is in a block, and a program, of its own. The seeds come last, so that blocks in a row share a program and
    more seeds make larger device calls possible.
    """
    from jaxkd.sweep.grid import Grid

    values = axes_of(settings)
    axes = {name: value for name, value in values.items() if len(value) > 1 or name in ALWAYS_AXES}
    static = [name for name in STATIC_AXES if name in axes]
    per_block = {"capacity": 1 if True in settings.match_component_evaluations else LARGEST_CAPACITY // 2}
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    return Grid(axes, seeds, static=static, per_block=per_block, runs_per_block=RUNS_PER_BLOCK)


def laboratory_of(settings: Settings, own: dict, student_components: int, quick: bool):
    """A run's static settings, from its own values of the axes."""
    from jaxkd.align import AlignmentSettings
    from jaxkd.laboratory import LaboratorySettings

    return LaboratorySettings(
        alignment=AlignmentSettings(
            algorithm=own["algorithm"], num_updates=settings.steps, batch_size=int(own["draws"])
        ),
        arms=settings.arms,
        reward=own["reward_name"],
        student_components=student_components,
        num_samples=own["base_samples"],
        distillation_samples=2048,
        starts=own["starts"],
        distillation_starts=settings.distillation_starts,
        match_component_evaluations=own["match_component_evaluations"],
        uniform_padding=quick,
    )


def coefficients_of(algorithm: str, label_noise):
    """A run's traced settings; the KL coefficients are an axis."""
    from jaxkd.align import ALGORITHMS, Coefficients, label_coefficients

    labels = label_coefficients(algorithm, label_noise)
    return Coefficients(learning_rate=ALGORITHMS[algorithm].learning_rate, **labels)


def fixed_settings(settings: Settings, quick: bool) -> dict:
    """What no flag says and results depend on all the same, for the store."""
    own = {name: values[0] for name, values in axes_of(settings).items()}
    laboratory = asdict(laboratory_of(settings, own, LARGEST_CAPACITY, quick))
    varied = ("arms", "reward", "num_samples", "starts", "distillation_starts", "match_component_evaluations")
    kept = {name: value for name, value in laboratory.items() if name not in (*varied, "student_components")}
    coefficients = {algorithm: coefficients_of(algorithm, 0.0)._asdict() for algorithm in settings.algorithms}
    if "robust_dpo" in coefficients:
        coefficients["robust_dpo"]["label_smoothing"] = "label_noise"
    return {"alignment": kept.pop("alignment"), "laboratory": kept, "coefficients": coefficients}


def shown(config: Config) -> str:
    """The resolved configuration as JSON."""
    settings = config.settings()
    own = {"preset": config.preset, "quick": config.quick, "out": str(config.folder), "runs": grid_of(settings).size}
    own |= asdict(settings) | fixed_settings(settings, config.quick)
    if config.preset == "plane":
        beside = more_weights(settings, config.quick)
        varied = {name: value for name, value in asdict(beside).items() if value != getattr(settings, name)}
        own["more_weights"] = {"runs": grid_of(beside).size if beside.target_weights else 0} | varied
    return json.dumps(own, indent=2)


def function_of(settings: Settings, quick: bool):
    """One run, and the static keywords of a block that are no axes."""
    from jaxkd import laboratory
    from jaxkd.align import Coefficients
    from jaxkd.truth import with_target_weight

    fixed = {name: value[0] for name, value in axes_of(settings).items()}

    def run(key, hyperparameters, truths, points, grid, *, student_components, **static):
        import jax.numpy as jnp

        own = {**fixed, **static, **hyperparameters}
        chosen = laboratory_of(settings, own, student_components, quick)
        coefficients = coefficients_of(own["algorithm"], own["label_noise"])
        return laboratory.run_seed(
            key,
            with_target_weight(truths[own["num_targets"]], own["target_weight"]),
            own["capacity"],
            points,
            Coefficients(*(jnp.asarray(value, jnp.float32) for value in coefficients)),
            grid,
            chosen,
        )

    def of_block(block):
        return {"student_components": int(block.axes["capacity"].max())}

    return run, of_block


def sweep(config: Config, settings: Settings, name: str, default_chunk: int | None):
    """Run or go on with a sweep; the report of what was done. A new store's chunk is measured where none is given."""
    import jax.numpy as jnp

    from jaxkd import laboratory, metrics, results
    from jaxkd.sweep.engine import run_sweep
    from jaxkd.truth import make_truth

    run, of_block = function_of(settings, config.quick)
    names = laboratory.every_model(laboratory.LaboratorySettings(arms=settings.arms))
    truths = {count: make_truth(num_targets=count) for count in settings.num_targets}
    points = laboratory.Points(jnp.asarray(settings.temperatures), jnp.asarray(settings.kl_coefs))
    # Draws are told by the alignment's batch size, and where there are several by their axis.
    told = {key: value for key, value in asdict(settings).items() if key not in (*SEEDS, "draws")}
    depends_on = {"preset": config.preset} | told
    depends_on |= fixed_settings(settings, config.quick)
    grid_points = depends_on["laboratory"]["grid_points"]
    return run_sweep(
        run,
        grid_of(settings),
        config.folder / f"{name}.zarr",
        # Finer around all targets that there are.
        shared=(truths, points, metrics.make_grid(truths[max(truths)], points=grid_points)),
        settings=of_block,
        finish=lambda outcome, block: results.of_runs(
            outcome,
            names,
            settings.temperatures,
            settings.kl_coefs,
            block.static["algorithm"],
            block.axes.get("label_noise", settings.label_noise[0]),
        ),
        labels=results.labels(),
        coordinates={"temperature": settings.temperatures, "kl_coef": settings.kl_coefs, "stage": names},
        configuration=depends_on,
        chunk=config.chunk,
        default_chunk=default_chunk,
        devices=config.devices,
        overwrite=config.overwrite,
        compile_cache=config.compile_cache,
        quick_compile=config.quick,
    )


def more_weights(settings: Settings, quick: bool) -> Settings:
    """Other target weights for the plane, so that the base's recall varies too; for the critical mass alone.

    They fill blocks of the same size as the plane's, so that its compiled program is used again where the chunk is the
    same.
    """
    weights = (0.003, 0.1) if quick else (0.003, 0.01, 0.1, 0.3)
    weights = tuple(weight for weight in weights if weight not in settings.target_weights)
    capacities = tuple(capacity for capacity in (4, 8) if capacity in settings.capacities) or settings.capacities[-1:]
    return replace(
        settings, target_weights=weights, capacities=capacities, seeds=min(settings.seeds, 4 if quick else 8)
    )


def main(config: Config) -> None:
    """Run, print and draw."""
    import jax
    import xarray as xr

    from jaxkd import phase_report

    begin = time.perf_counter()
    settings = config.settings()
    reports = [sweep(config, settings, "sweep", None if config.measure_chunk else DEFAULT_CHUNK)]
    if config.preset == "plane":
        beside = more_weights(settings, config.quick)
        if beside.target_weights:
            reports.append(sweep(config, beside, "more_weights", reports[0].chunk))
    if jax.process_index() > 0:
        return
    print("\n".join(map(str, reports)))
    names = ["sweep", "more_weights"][: len(reports)]
    stores = {name: xr.open_zarr(config.folder / f"{name}.zarr") for name in names}
    print(phase_report.report(stores, config.folder))
    print(f"in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        chosen = tyro.cli(Config, description=__doc__)
        if chosen.show_config:
            print(shown(chosen))
        else:
            engine.use_cpu_cores_as_devices()
            hosts.initialize(chosen.coordinator, chosen.num_processes, chosen.process_id)
            main(chosen)

"""On a Gaussian mixture: does aligning before distilling beat distilling before aligning, by how much, and why?

Fits a base to samples of an 8-mode ring with one rare target mode, distils students from it, and runs every order of
alignment and distillation on every seed, into runs.zarr, which survives being killed: the same command goes on where it
was. Prints a table, and writes mog_order.zarr, table.csv and mog_order.png/.pdf; `experiments/replot.py` makes table
and figure again from mog_order.zarr alone.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from jaxkd.sweep import engine

SEEDS, QUICK_SEEDS = 256, 16
SEEDS_PER_BLOCK = 16
"""What is written and resumed at once."""
DEFAULT_CHUNK = 2
LARGEST_CAPACITY = 8
OF_THE_GRID = ("seeds", "first_seed")
"""What the grid of the runs says by itself, so that more seeds may be joined."""
ALL_ALGORITHMS = ("ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data")


@dataclass(frozen=True)
class Config:
    """What to run. Every default is the setting of the README's table."""

    seeds: int | None = None
    """Number of seeds, 256 by default; every arm, algorithm, temperature and coefficient of a seed shares base, data
    and keys."""
    first_seed: int = 0
    """The first seed; the learning rates were tuned on seeds from 1000000 on."""
    algorithms: tuple[str, ...] | None = None
    """Alignment algorithms: reinforce, ppo, grpo, online_dpo, offline_dpo_ref, offline_dpo_data, cdpo, robust_dpo,
    ipo, simpo, kto; ppo, online_dpo, offline_dpo_ref and offline_dpo_data by default."""
    arms: tuple[str, ...] = (
        "kd_align",
        "kd_align_sharpened",
        "align_kd",
        "align_kd_sharpened",
        "kd_align_anchored",
        "base_start_student_reference",
    )
    """Orders to run; kd_align must be among them, the others are compared with it."""
    capacity: int = 4
    """Components of the student, 1 to 8 (the base has 8)."""
    temperatures: tuple[float, ...] = (1.0, 0.25)
    """Temperatures τ of the distillation: weights w^(1/τ), renormalised; below 1 sharpens."""
    kl_coefs: tuple[float, ...] = (0.3, 1.0, 1.5)
    """KL coefficients β, in units of reward a nat."""
    target_weight: float = 0.03
    """Total weight of the targets in p*; 0 leaves nothing to recover."""
    targets: str = "corner"
    """Which mode is the target: corner or edge."""
    num_targets: int = 1
    """One target, or two opposite ones that share the weight."""
    reward: str = "density"
    """density, bump, disc, log_density, reflected or clipped."""
    label_noise: float = 0.0
    """Share of preference labels flipped, 0 to 0.5 (algorithms with preference labels)."""
    steps: int = 400
    """Optimiser updates of an alignment (PPO makes 4 on each rollout of 256 draws)."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; by default each algorithm's tuned one."""
    starts: int = 10
    """EM starts of the base, of which the best is kept; 1 is the single-start preset."""
    match_component_evaluations: bool = False
    """Give alignments of the smaller student proportionally more updates, so that all evaluate as many components."""
    chunk: int | None = None
    """Seeds that a device computes at a time; changes speed, not results. By default the store's, and 2 for a new
    one."""
    compile_cache: bool = True
    """Keep compiled programs on disk ($JAX_COMPILATION_CACHE_DIR, else ~/.cache/jaxkd)."""
    out: Path = Path("runs/mog_order")
    """Folder for the stores, the table and the figure."""
    overwrite: bool = False
    """Replace stores that are in that folder; without it the same command goes on where it was."""
    quick: bool = False
    """A small run that finishes in well under a minute: 16 seeds and ppo alone, unless others are given."""

    def __post_init__(self):
        from jaxkd import checks, pipelines
        from jaxkd.align import ALGORITHMS, AlignmentSettings, check_label_noise

        chosen = self._in_place()
        seeds, algorithms = chosen["seeds"], chosen["algorithms"]
        checks.folder("--out", self.out)
        checks.whole("--seeds", seeds, least=1)
        checks.whole("--first-seed", self.first_seed, least=0, most=2**31 - 1 - seeds)
        checks.names("--algorithms", algorithms, [name for name in ALGORITHMS if name != "orpo"])
        checks.names("--arms", self.arms, pipelines.arms())
        if "kd_align" not in self.arms:
            raise ValueError(f"--arms must contain kd_align, which the others are compared with; got {self.arms}")
        checks.whole("--capacity", self.capacity, least=1, most=LARGEST_CAPACITY)
        checks.numbers("--temperatures", self.temperatures, above=0.0, most=10.0)
        checks.numbers("--kl-coefs", self.kl_coefs, above=0.0)
        checks.number("--target-weight", self.target_weight, least=0.0, below=1.0)
        checks.name("--targets", self.targets, ["corner", "edge"])
        checks.whole("--num-targets", self.num_targets, least=1, most=2)
        checks.name("--reward", self.reward, ["density", "bump", "disc", "log_density", "reflected", "clipped"])
        checks.number("--label-noise", self.label_noise, least=0.0, most=0.5)
        check_label_noise("--label-noise", algorithms, [self.label_noise])
        checks.whole("--steps", self.steps, least=1)
        if self.learning_rate is not None:
            checks.number("--learning-rate", self.learning_rate, above=0.0)
        checks.whole("--starts", self.starts, least=1)
        if self.chunk is not None:
            checks.whole("--chunk", self.chunk, least=1)
        for algorithm in algorithms:
            try:
                AlignmentSettings(algorithm=algorithm, num_updates=self.steps)
            except ValueError as error:
                raise ValueError(f"--steps: {error}") from None

    def _in_place(self) -> dict:
        """What --quick changes: given flags win over it."""
        algorithms = ("ppo",) if self.quick else ALL_ALGORITHMS
        return {
            "seeds": (QUICK_SEEDS if self.quick else SEEDS) if self.seeds is None else self.seeds,
            "algorithms": algorithms if self.algorithms is None else self.algorithms,
        }

    def resolved(self) -> "Config":
        """The configuration with --quick carried out."""
        return replace(self, **self._in_place())

    def results_depend_on(self) -> dict:
        """All but what changes only where and how fast the results are made; the learning rates that are used.

        Beside the flags stand the settings that no flag says.
        """
        from jaxkd.align import Coefficients, label_coefficients

        elsewhere = ("chunk", "compile_cache", "out", "overwrite", "quick")
        own = {key: value for key, value in asdict(self).items() if key not in elsewhere}
        laboratory = asdict(settings_of(self, self.algorithms[0]))
        alignment = {key: value for key, value in laboratory.pop("alignment").items() if key != "algorithm"}
        coefficients = {name: Coefficients(**label_coefficients(name, self.label_noise)) for name in self.algorithms}
        return own | {
            "learning_rate": {name: self.learning_rate_of(name) for name in self.algorithms},
            "alignment": alignment,
            "laboratory": laboratory,
            "coefficients": {
                name: {key: value for key, value in values._asdict().items() if key not in ("learning_rate", "kl_coef")}
                for name, values in coefficients.items()
            },
        }

    def learning_rate_of(self, algorithm: str) -> float:
        """The one that was asked for, else the algorithm's tuned one."""
        from jaxkd.align import ALGORITHMS

        return self.learning_rate or ALGORITHMS[algorithm].learning_rate


def runs_of(config: Config):
    """The keys of the seeds, and what they share: truth, points of the axes and grid."""
    import jax
    import jax.numpy as jnp

    from jaxkd import laboratory, metrics, random
    from jaxkd.truth import make_truth

    seeds = jnp.arange(config.first_seed, config.first_seed + config.seeds)
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl=random.IMPLEMENTATION))(seeds)
    truth = make_truth(targets=config.targets, num_targets=config.num_targets, target_weight=config.target_weight)
    points = laboratory.Points(jnp.asarray(config.temperatures), jnp.asarray(config.kl_coefs))
    grid = metrics.make_grid(truth, points=settings_of(config, config.algorithms[0]).grid_points)
    return keys, truth, points, grid


def settings_of(config: Config, algorithm: str):
    """What shapes the laboratory for one algorithm."""
    from jaxkd import laboratory
    from jaxkd.align import AlignmentSettings

    return laboratory.LaboratorySettings(
        alignment=AlignmentSettings(algorithm=algorithm, num_updates=config.steps),
        arms=config.arms,
        reward=config.reward,
        student_components=config.capacity,
        starts=config.starts,
        match_component_evaluations=config.match_component_evaluations,
        uniform_padding=config.seeds <= QUICK_SEEDS,
    )


def functions_of(config: Config):
    """Pure functions of one seed: what all algorithms share, and each algorithm's arms."""
    from jaxkd import laboratory

    def prepare(key, truth, points, grid):
        return laboratory.prepare(key, truth, config.capacity, points, grid, settings_of(config, config.algorithms[0]))

    def arms(algorithm):
        settings = settings_of(config, algorithm)

        def run(key, prepared, points, coefficients, grid):
            return laboratory.run_arms(key, prepared, config.capacity, points, coefficients, grid, settings)

        return run

    return prepare, {algorithm: arms(algorithm) for algorithm in config.algorithms}


def coefficients_of(config: Config, algorithm: str, learning_rate: float | None = None):
    """The traced coefficients of one algorithm."""
    import jax.numpy as jnp

    from jaxkd.align import Coefficients, label_coefficients

    rate = learning_rate or config.learning_rate_of(algorithm)
    chosen = Coefficients(learning_rate=rate, **label_coefficients(algorithm, config.label_noise))
    return Coefficients(*(jnp.float32(value) for value in chosen))


def sweep(config: Config):
    """Run or go on with all algorithms on all seeds; the report of what was done."""
    import jax

    from jaxkd import laboratory, results
    from jaxkd.sweep.grid import Grid

    _, truth, points, grid = runs_of(config)
    prepare, arms = functions_of(config)
    made = laboratory.made_by(settings_of(config, config.algorithms[0]))
    axes = (config.temperatures, config.kl_coefs)

    def run(key, _, truth, points, coefficients, grid, *, algorithm):
        prepared, shared = prepare(key, truth, points, grid)
        # Two programs in one: what the arms begin with has the bits that it has alone.
        prepared, shared = jax.lax.optimization_barrier((prepared, shared))
        measured = arms[algorithm](key, prepared, points, coefficients[algorithm], grid)
        return prepared._replace(truth=(), models={}), shared, measured

    def finish(outcome, block):
        name = block.static["algorithm"]
        return results.of_algorithm(*outcome, made, *axes, name, LARGEST_CAPACITY, config.label_noise)

    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return engine.run_sweep(
        run,
        Grid({"algorithm": config.algorithms}, seeds, static=["algorithm"], runs_per_block=SEEDS_PER_BLOCK),
        config.out / "runs.zarr",
        shared=(truth, points, {name: coefficients_of(config, name) for name in config.algorithms}, grid),
        finish=finish,
        labels=results.labels_with_models(),
        coordinates={
            "temperature": config.temperatures,
            "kl_coef": config.kl_coefs,
            "stage": [*laboratory.PREPARED, *made],
        },
        configuration={key: value for key, value in config.results_depend_on().items() if key not in OF_THE_GRID},
        chunk=config.chunk,
        default_chunk=DEFAULT_CHUNK,
        overwrite=config.overwrite,
        compile_cache=config.compile_cache,
        quick_compile=config.seeds <= QUICK_SEEDS,
    )


def summarise(dataset, rows) -> str:
    """What the run says, in a few sentences made from its own numbers."""
    failed = f"{100 * float(dataset.base_failed.mean()):.1f} % of {dataset.sizes['seed']} seeds"
    lines = [f"Base: merges or misses a mode in {failed} (kept)."]
    if float(dataset.truth_weight.where(dataset.truth_is_target).sum()) == 0:
        lines.append("The target has no weight in p*: there is nothing to recover, rates below say nothing.")
    for temperature in dataset.temperature.values:
        student = dataset.target_mass.sel(stage="student", temperature=temperature).isel(algorithm=0, kl_coef=0)
        told = [f"Student at τ = {temperature:g}: median target mass {float(student.median()):.2g}."]
        for row in rows:
            if row["arm"] == "align_kd" and row["temperature"] == temperature:
                base = next(
                    other
                    for other in rows
                    if other["arm"] == "kd_align"
                    and all(other[key] == row[key] for key in ("algorithm", "temperature", "kl_coef"))
                )
                told.append(
                    f"  {row['algorithm']:<18} β = {row['kl_coef']:<4g} recovered: KD→Align {base['recovery']:.2f}, "
                    f"Align→KD {row['recovery']:.2f}{' *' if row['significant'] else ''}"
                )
        lines += told
    lines.append("* marks a McNemar test that passes at a false-discovery rate of 0.05 over the whole table.")
    lines.append(
        "Success itself lowers coverage to the targets' share of the modes, and precision by the log of their rarity."
    )
    return "\n".join(lines)


def report(dataset, out: Path) -> str:
    """Write the table and the figure of a finished run; what is to be printed."""
    from jaxkd import figures, results

    rows = results.table(dataset)
    results.write_csv(rows, out / "table.csv")
    figures.mog_order(dataset, out / "mog_order.png", out / "mog_order.pdf")
    return f"{results.format_table(rows)}\n\n{summarise(dataset, rows)}"


def is_held(dataset, path: Path) -> bool:
    """Whether a store holds these very results: it then keeps what it says of the device and version that made them."""
    import xarray as xr

    with xr.open_zarr(path) as held:
        return held.load().drop_attrs().equals(dataset.drop_attrs())


def main(config: Config) -> None:
    """Compute what is missing, write and print."""
    import xarray as xr

    from jaxkd import results
    from jaxkd.sweep import store

    begin = time.perf_counter()
    config = config.resolved()
    path, runs = config.out / "mog_order.zarr", config.out / "runs.zarr"
    if not config.overwrite and not runs.exists():
        # Nothing says that it was made from runs that are gone.
        store.check_free(path, config.results_depend_on())
    store.check_replaceable(path, overwrite=True)
    done = sweep(config)
    with xr.open_zarr(runs) as swept:
        dataset = results.of_sweep(swept, runs_of(config)[1])
    if not (path.exists() and is_held(dataset, path)):
        store.write(dataset, path, config.results_depend_on(), overwrite=True)
    print(f"{done}\n{report(dataset, config.out)}")
    print(f"\nWrote mog_order.zarr, table.csv, mog_order.png and mog_order.pdf to {config.out}")
    print(f"in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        engine.use_cpu_cores_as_devices()
        main(tyro.cli(Config, description=__doc__))

"""On a Gaussian mixture: does aligning before distilling beat distilling before aligning, by how much, and why?

Fits a base to samples of an 8-mode ring with one rare target mode, distils students from it, and runs every order of
alignment and distillation on every seed. Prints a table, and writes mog_order.zarr, table.csv and mog_order.png/.pdf.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from jaxkd.sweep import engine

SEEDS, QUICK_SEEDS = 256, 16
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
    batch_size: int = 2
    """Seeds that a device computes at a time; changes speed, not results."""
    out: Path = Path("runs/mog_order")
    """Folder for the store, the table and the figure."""
    overwrite: bool = False
    """Replace a store that is in that folder."""
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
        checks.whole("--capacity", self.capacity, least=1, most=8)
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
        checks.whole("--batch-size", self.batch_size, least=1)
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
        """All but what changes only where and how fast the results are made; the learning rates that are used."""
        own = {key: value for key, value in asdict(self).items() if key not in ("out", "overwrite", "quick")}
        return own | {"learning_rate": {name: self.learning_rate_of(name) for name in self.algorithms}}

    def learning_rate_of(self, algorithm: str) -> float:
        """The one that was asked for, else the algorithm's tuned one."""
        from jaxkd.align import ALGORITHMS

        return self.learning_rate or ALGORITHMS[algorithm].learning_rate


def runs_of(config: Config):
    """The keys of the seeds, and what they share: truth, points of the axes and grid."""
    import jax
    import jax.numpy as jnp

    from jaxkd import laboratory, metrics
    from jaxkd.truth import make_truth

    keys = jax.vmap(jax.random.key)(jnp.arange(config.first_seed, config.first_seed + config.seeds))
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


def compute(config: Config):
    """Run everything and return the labelled results.

    One device call prepares all seeds, and one an algorithm runs all arms of all seeds. The programs depend only on
    shapes, so they compile side by side while earlier ones run.
    """
    import jax
    from tqdm import tqdm

    from jaxkd import laboratory, results

    keys, truth, points, grid = runs_of(config)
    prepare, arms = functions_of(config)
    bars = {
        name: tqdm(desc=f"{name:<17}", unit="seed", total=config.seeds, smoothing=0, position=i, file=sys.stderr)
        for i, name in enumerate(("base and students", *arms))
    }

    def start(name):
        bars[name].set_postfix_str("compiling")
        per_batch = min(config.batch_size, -(-config.seeds // jax.local_device_count()))
        return {
            "batch_size": config.batch_size,
            "quick_compile": config.seeds <= QUICK_SEEDS,
            "on_batch": lambda: bars[name].update(min(per_batch, bars[name].total - bars[name].n)),
        }

    def compiling(name, function, arguments, shared):
        return engine.compile_runs(function, arguments, shared, **start(name))

    def run(name, compiled, arguments, shared):
        bars[name].set_postfix_str(f"compiled in {compiled.seconds:.1f} s")
        bars[name].unpause()
        begin = time.perf_counter()
        outcome = compiled.call(arguments, shared)
        bars[name].set_postfix_str(f"compiled in {compiled.seconds:.1f} s, ran in {time.perf_counter() - begin:.1f} s")
        return outcome

    with ThreadPoolExecutor(max_workers=2) as pool:
        shared = (truth, points, grid)
        preparing = pool.submit(compiling, "base and students", prepare, (keys,), shared)
        shapes, _ = jax.eval_shape(jax.vmap(lambda key: prepare(key, *shared)), keys)
        pending = {}
        for algorithm, function in arms.items():
            shared_by_arms = (points, coefficients_of(config, algorithm), grid)
            pending[algorithm] = (
                pool.submit(compiling, algorithm, function, (keys, shapes), shared_by_arms),
                shared_by_arms,
            )
        prepared, measured = run("base and students", preparing.result(), (keys,), shared)
        by_algorithm = {
            algorithm: run(algorithm, future.result(), (keys, prepared), shared_by_arms)
            for algorithm, (future, shared_by_arms) in pending.items()
        }
    for bar in bars.values():
        bar.close()
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    made = laboratory.made_by(settings_of(config, config.algorithms[0]))
    return results.to_dataset(
        prepared,
        measured,
        by_algorithm,
        made,
        config.temperatures,
        config.kl_coefs,
        seeds,
        num_components=8,
        flip_rate=config.label_noise,
    )


def summarise(dataset, rows, config: Config) -> str:
    """What the run says, in a few sentences made from its own numbers."""
    failed = f"{100 * float(dataset.base_failed.mean()):.1f} % of {config.seeds} seeds"
    lines = [f"Base: merges or misses a mode in {failed} (kept)."]
    if config.target_weight == 0:
        lines.append("The target has no weight in p*: there is nothing to recover, rates below say nothing.")
    for temperature in config.temperatures:
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


def main(config: Config) -> None:
    """Compute, write and print."""
    from jaxkd import figures, results
    from jaxkd.sweep import store

    begin = time.perf_counter()
    config = config.resolved()
    path = config.out / "mog_order.zarr"
    if not config.overwrite:
        store.check_free(path, config.results_depend_on())
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = compute(config)
    store.write(dataset, path, config.results_depend_on(), overwrite=config.overwrite)
    rows = results.table(dataset)
    results.write_csv(rows, config.out / "table.csv")
    print(results.format_table(rows))
    print("\n" + summarise(dataset, rows, config))
    figures.mog_order(dataset, config.out / "mog_order.png", config.out / "mog_order.pdf")
    print(f"\nWrote mog_order.zarr, table.csv, mog_order.png and mog_order.pdf to {config.out}")
    print(f"in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        engine.use_cpu_cores_as_devices()
        main(tyro.cli(Config, description=__doc__))

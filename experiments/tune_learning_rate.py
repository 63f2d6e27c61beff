"""Tune one learning rate an algorithm, once, on seeds kept apart from those of the experiment.

The rate chosen brings alignments nearest to the Gibbs optimum of their own reference: smallest KL(policy ‖ Gibbs),
median over seeds, averaged over the base and the students as references, temperatures and KL coefficients. No arm is
tuned alone. Prints the table and writes it as learning_rates.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from mog_order import DEFAULT_CHUNK, Config, coefficients_of, functions_of, runs_of, settings_of

from jaxkd.sweep import engine


@dataclass(frozen=True)
class Tuning:
    """What to tune, and over which rates."""

    algorithms: tuple[str, ...] = ("reinforce", "ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data")
    """Algorithms whose optimum is the Gibbs policy."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
    """Peak learning rates of Adam to try."""
    seeds: int = 24
    """Number of seeds."""
    first_seed: int = 1_000_000
    """The first seed; the experiment's seeds start at 0."""
    out: Path = Path("runs/tune_learning_rate")
    """Folder for learning_rates.json."""

    def __post_init__(self):
        from jaxkd import checks
        from jaxkd.align import ALGORITHMS

        checks.folder("--out", self.out)
        checks.names("--algorithms", self.algorithms, [n for n, a in ALGORITHMS.items() if a.has_gibbs_optimum])
        checks.numbers("--learning-rates", self.learning_rates, above=0.0)
        checks.whole("--seeds", self.seeds, least=1)
        checks.whole("--first-seed", self.first_seed, least=0)


def main(tuning: Tuning) -> None:
    """Try every rate with every algorithm."""
    import numpy as np

    from jaxkd import laboratory, results

    config = Config(
        seeds=tuning.seeds, first_seed=tuning.first_seed, algorithms=tuning.algorithms, arms=("kd_align", "align_kd")
    )
    keys, truth, points, grid = runs_of(config)
    prepare, arms = functions_of(config)
    shared = (truth, points, grid)
    compiled = engine.compile_runs(prepare, (keys,), shared, batch_size=DEFAULT_CHUNK)
    prepared, measured = compiled.call((keys,), shared)
    found = {}
    for algorithm, function in arms.items():
        inputs = (points, coefficients_of(config, algorithm), grid)
        compiled = engine.compile_runs(function, (keys, prepared), inputs, batch_size=DEFAULT_CHUNK)
        distances = {}
        for rate in tuning.learning_rates:
            arguments = (points, coefficients_of(config, algorithm, rate), grid)
            outcome = compiled.call((keys, prepared), arguments)
            dataset = results.to_dataset(
                prepared,
                measured,
                {algorithm: outcome},
                laboratory.made_by(settings_of(config, algorithm)),
                config.temperatures,
                config.kl_coefs,
                range(config.first_seed, config.first_seed + config.seeds),
                num_components=8,
            )
            distance = dataset.distance_to_gibbs.sel(stage=["aligned_base", "kd_align"])
            # A run that ends in NaN is as far as can be: no rate is chosen for dropping its failures.
            distances[rate] = float(distance.fillna(np.inf).median("seed").mean())
        best = min(distances, key=distances.get)
        found[algorithm] = {"best": best, "distance_to_gibbs": distances}
        shown = "  ".join(f"{rate:g}: {value:.3f}{'*' if rate == best else ''}" for rate, value in distances.items())
        print(f"{algorithm:<18} KL(policy ‖ Gibbs) in nats at learning rate  {shown}", flush=True)
    tuning.out.mkdir(parents=True, exist_ok=True)
    path = tuning.out / "learning_rates.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        engine.use_cpu_cores_as_devices()
        main(tyro.cli(Tuning, description=__doc__))

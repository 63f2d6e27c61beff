"""Time the reference workload of the mixture: one run after another against all runs in one call.

A run is three EM fits (8 components, 2048 points, 60 iterations), two policy-gradient alignments (400 updates of 256
fresh draws, full covariances) and the metrics of five models on a 121 × 121 grid. Prints one JSON object; times in
seconds and milliseconds a run, compile and run apart, the median of several repetitions.
"""

import json
import statistics
import time
from dataclasses import dataclass

import tyro

from jaxkd.sweep import engine


@dataclass(frozen=True)
class Benchmark:
    """What to time."""

    runs: int = 64
    """Runs in the vmapped call."""
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32)
    """Runs that a device computes at a time."""
    loop_runs: int = 16
    """Runs in the loop of single jitted calls."""
    repetitions: int = 5
    """Repetitions of every timing; the median and the smallest are printed."""

    def __post_init__(self):
        from jaxkd import checks

        for flag in ("runs", "loop_runs", "repetitions"):
            checks.whole(f"--{flag.replace('_', '-')}", getattr(self, flag), least=1)
        checks.numbers("--batch-sizes", self.batch_sizes, least=1)


@dataclass(frozen=True)
class Workload:
    """Sizes of one run; the defaults are the reference workload."""

    components: int = 8
    """Components of the base and of every student."""
    points: int = 2048
    """Points that each of the three EM fits is given."""
    iterations: int = 60
    """Iterations of each EM fit."""
    steps: int = 400
    """Policy-gradient updates of each of the two alignments."""
    samples: int = 256
    """Draws in an update."""
    grid: int = 121
    """Points along each side of the grid on which five models are measured."""

    def __post_init__(self):
        from jaxkd import checks

        for name, least in (("components", 1), ("points", 2), ("iterations", 1), ("steps", 1), ("samples", 4)):
            checks.whole(f"--workload.{name}", getattr(self, name), least=least)
        checks.whole("--workload.grid", self.grid, least=2)
        if self.samples % 2:
            raise ValueError(f"--workload.samples must be even; got {self.samples}")


LEARNING_RATE = 0.03
KL_COEF = 1.0
TEMPERATURE = 0.25
COVARIANCE_FLOOR = 1e-4


def make_problem(workload: Workload):
    """What all runs share: the truth and its grid."""
    from jaxkd import metrics
    from jaxkd.truth import make_truth

    truth = make_truth()
    return truth, metrics.make_grid(truth, points=workload.grid)


def run_of(workload: Workload):
    """One run of a workload as a pure function `(key, truth, grid) -> Metrics` of five models, [5] each."""
    import jax
    import jax.numpy as jnp

    from jaxkd import align, distill, loops, metrics, mixture, rewards

    settings = align.AlignmentSettings(algorithm="reinforce", num_updates=workload.steps, batch_size=workload.samples)

    def fit(key, x):
        fitted = mixture.fit(
            key, x, workload.components, starts=1, iterations=workload.iterations, covariance_floor=COVARIANCE_FLOOR
        )
        return fitted.mixture

    def run(key, truth, grid):
        data_key, fit_key, align_key, bench_key = jax.random.split(key, 4)
        reward = rewards.target_density(truth.target)

        def distilled(teacher, temperature):
            return distill.sequence_level(mixture.policy, fit_key, teacher, temperature, workload.points, fit)

        def aligned(model):
            coefficients = align.Coefficients(learning_rate=LEARNING_RATE, kl_coef=KL_COEF)
            return align.align(mixture.policy, align_key, model, model, reward, coefficients, settings)[0]

        base = fit(fit_key, mixture.sample(truth.modes, data_key, workload.points))
        student = distilled(base, TEMPERATURE)
        # Both alignments and all measurements are stacked, as the laboratory does it.
        pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), base, student)
        both = jax.vmap(aligned)(pair)
        aligned_base = jax.tree.map(lambda leaf: leaf[0], both)
        kd_align = jax.tree.map(lambda leaf: leaf[1], both)
        align_kd = distilled(aligned_base, 1.0)
        bench = metrics.make_bench(bench_key, truth, base, reward, grid, num_draws=16)
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), base, student, aligned_base, kd_align, align_kd)
        return loops.map_carried(lambda model: metrics.quadrature(bench, model, base, KL_COEF)[0], models)

    return run


def timed(call, repetitions: int, runs: int) -> dict:
    """Milliseconds a run: median and smallest over repetitions, after one call that is not counted."""
    call()
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return {"ms_a_run": 1e3 * statistics.median(seconds) / runs, "ms_a_run_smallest": 1e3 * min(seconds) / runs}


def main(benchmark: Benchmark) -> None:
    """Time both forms."""
    import jax
    import jax.numpy as jnp

    truth, grid = make_problem(Workload())
    reference_run = run_of(Workload())
    keys = jax.vmap(jax.random.key)(jnp.arange(max(benchmark.runs, benchmark.loop_runs)))

    begin = time.perf_counter()
    single = jax.jit(reference_run).lower(keys[0], truth, grid).compile()
    loop = {"runs": benchmark.loop_runs, "compile_s": time.perf_counter() - begin}

    def one_after_another():
        for key in keys[: benchmark.loop_runs]:
            jax.block_until_ready(single(key, truth, grid))

    loop |= timed(one_after_another, benchmark.repetitions, benchmark.loop_runs)

    vmapped = []
    chosen = keys[: benchmark.runs]
    for batch_size in benchmark.batch_sizes:
        compiled = engine.compile_runs(reference_run, (chosen,), (truth, grid), batch_size=batch_size)
        times = timed(
            lambda compiled=compiled: compiled.call((chosen,), (truth, grid)), benchmark.repetitions, benchmark.runs
        )
        vmapped.append({"batch_size": batch_size, "runs": benchmark.runs, "compile_s": compiled.seconds} | times)
    best = min(vmapped, key=lambda row: row["ms_a_run"])
    print(
        json.dumps(
            {
                "device": jax.local_devices()[0].device_kind,
                "devices": jax.local_device_count(),
                "loop_of_single_runs": loop,
                "vmapped": vmapped,
                "best_batch_size": best["batch_size"],
                "best_ms_a_run": best["ms_a_run"],
                "loop_over_vmapped": loop["ms_a_run"] / best["ms_a_run"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        engine.use_cpu_cores_as_devices()
        main(tyro.cli(Benchmark, description=__doc__))

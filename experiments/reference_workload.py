"""The reference workload of the mixture, which the throughput benchmark times in several forms.

A run is three EM fits (8 components, 2048 points, 60 iterations), two policy-gradient alignments (400 updates of 256
fresh draws, full covariances) and the metrics of five models on a 121 × 121 grid.
"""

from dataclasses import dataclass


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

    from jaxkd import align, distill, loops, metrics, mixture, mixture_rewards, random

    settings = align.AlignmentSettings(algorithm="reinforce", num_updates=workload.steps, batch_size=workload.samples)

    def fit(key, x):
        fitted = mixture.fit(
            key, x, workload.components, starts=1, iterations=workload.iterations, covariance_floor=COVARIANCE_FLOOR
        )
        return fitted.mixture

    def run(key, truth, grid):
        data_key, fit_key, align_key, bench_key = jax.random.split(key, 4)
        reward = mixture_rewards.target_density(truth.target)

        def distilled(teacher, temperature):
            keys = random.keys(fit_key, 2)
            return distill.sequence_level(mixture.policy, *keys, teacher, temperature, workload.points, fit)

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

"""The mixture laboratory: one seed, from the truth to every arm, as pure functions to be jitted and vmapped.

`prepare` makes what all algorithms share (base, students, their Gibbs optima); `run_arms` runs one algorithm's
pipelines and measures every model on the way. A seed's keys come from the seed alone and are named by purpose, so all
arms, algorithms, temperatures and coefficients of a seed share the base, the data and the random numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkd import align, distill, metrics, mixture, pipelines, random, rewards, theory
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.mixture import INACTIVE_LOGIT, Mixture
from jaxkd.truth import Truth, on_target

REWARDS = ("density", "bump", "disc", "log_density", "reflected", "clipped")
"""Rewards by name; the last two are wrappers of the target density at its mean over the target's own draws."""

PREPARED = ("base", "student")
"""The models that `prepare` makes, in the order in which it stacks them."""

_PURPOSES = ("data", "base", "bench", "measure", *pipelines.STAGES)


@dataclass(frozen=True)
class LaboratorySettings:
    """What shapes a laboratory (static).

    Attributes:
      alignment: the alignment algorithm and its sizes.
      arms: which of `pipelines.ARMS` to run.
      reward: a name of `REWARDS`.
      base_components: K of the base.
      student_components: padded K of the students.
      num_samples: points that the base is fitted to, and samples of each distillation.
      starts: EM starts of the base, of which the best by likelihood is kept.
      distillation_starts: the same for every distillation.
      iterations: EM iterations of every start.
      covariance_floor: added to the diagonal of every fitted covariance.
      num_draws: Monte Carlo draws for the metrics where the grid does not hold.
      grid_points: points along each side of the grid.
      match_component_evaluations: give an alignment that starts at fewer components proportionally more updates, so
        that every arm's alignment evaluates the same number of components.

    Raises:
      ValueError: on unknown names or numbers out of range.
    """

    alignment: AlignmentSettings = AlignmentSettings()
    arms: tuple[str, ...] = pipelines.ARMS
    reward: str = "density"
    base_components: int = 8
    student_components: int = 4
    num_samples: int = 2048
    starts: int = 10
    distillation_starts: int = 4
    iterations: int = 60
    covariance_floor: float = 1e-4
    num_draws: int = 2048
    grid_points: int = 121
    match_component_evaluations: bool = False

    def __post_init__(self):
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}; got {self.reward!r}")
        if not self.arms:
            raise ValueError(f"arms must not be empty: choose from {', '.join(pipelines.ARMS)}")
        pipelines.needed(self.arms)
        minima = {
            "base_components": 1,
            "student_components": 1,
            "num_samples": 16,
            "starts": 1,
            "iterations": 1,
            "distillation_starts": 1,
        }
        for name, minimum in {**minima, "num_draws": 16, "grid_points": 16}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if not (math.isfinite(self.covariance_floor) and self.covariance_floor > 0):
            raise ValueError(f"covariance_floor must be positive and finite, got {self.covariance_floor}")


class Points(NamedTuple):
    """The axes inside a seed: `temperature: [temperatures]` and `kl_coef: [coefficients]` (reward units a nat)."""

    temperature: jax.Array
    kl_coef: jax.Array


class Optimum(NamedTuple):
    """What a reference allows: its Gibbs policies, and β_c, its half-mass coefficient."""

    gibbs: theory.Gibbs
    half_mass_coefficient: jax.Array


class Prepared(NamedTuple):
    """What all algorithms of a seed share.

    Attributes:
      truth: p* and its targets.
      models: "base" and "student", with their leading axes.
      log_likelihood: mean log-likelihood of the base on its data (nats a point).
      base_failed: whether the base misses a mode of p*: its coverage is below 1.
      optima: by reference ("base", "student").
    """

    truth: Truth
    models: dict[str, Mixture]
    log_likelihood: jax.Array
    base_failed: jax.Array
    optima: dict[str, Optimum]


class Measured(NamedTuple):
    """Models, measured: several at all their points as one stack, or one of them (`by_stage`).

    Attributes:
      model: parameters, padded to the widest model of the stack.
      metrics: quantities; `objective` is at the KL coefficient of the run, or at 0 for models that have none.
      from_grid: whether they came from quadrature (else Monte Carlo).
      record: what the model's own alignment recorded; NaN (not failed) for models that no alignment made last.
    """

    model: Mixture
    metrics: metrics.Metrics
    from_grid: jax.Array
    record: align.Record


def keys_for(seed_key: jax.Array) -> dict[str, jax.Array]:
    """A seed's keys by purpose; every alignment shares one, and so does every distillation: runs are paired.

    Made once a seed: inside the vmapped stages each would be hashed, and compiled, anew.
    """
    return dict(zip(_PURPOSES, random.keys(seed_key, len(_PURPOSES)), strict=True))


def make_reward(name: str, truth: Truth) -> rewards.Reward:
    """A reward by name. Bump and disc take the target density's scale: its peak, and half of it, as their heights."""
    variance = jnp.exp(2 * truth.modes.log_scales).mean()
    peak = (2 * math.pi * variance) ** (-truth.modes.dim / 2) / truth.is_target.sum().astype(jnp.float32)
    density = rewards.target_density(truth.target)
    if name == "density":
        return density
    if name == "bump":
        target_means = jnp.where(truth.is_target[None, :], truth.modes.means, jnp.inf)
        return rewards.bump(target_means, height=peak, width=2 * jnp.sqrt(variance))
    if name == "disc":
        return rewards.disc(truth.target, height=peak / 2)
    if name == "log_density":
        return rewards.log_density(truth.target)
    # The density of a Gaussian averages half its peak in the plane over its own draws, 2^(−dim/2) in general.
    level = peak * 2 ** (-truth.modes.dim / 2)
    return {"reflected": rewards.reflected, "clipped": rewards.clipped}[name](density, level)


def _fit(settings: LaboratorySettings, num_components: int, capacity, starts: int):
    return lambda key, x: mixture.fit(
        key,
        x,
        num_components,
        capacity,
        starts=starts,
        iterations=settings.iterations,
        covariance_floor=settings.covariance_floor,
    )


def _distil(settings, capacity, key, teacher, temperature) -> Mixture:
    fit = _fit(settings, settings.student_components, capacity, settings.distillation_starts)
    return distill.sequence_level(
        mixture.policy,
        key,
        teacher,
        temperature,
        settings.num_samples,
        lambda key, x: fit(key, x).mixture,
    )


def _optimum(bench: metrics.Bench, reference: Mixture, reward, key, kl_coefs) -> Optimum:
    if bench.grid is None:
        x = mixture.sample(reference, key, 4 * bench.truth_draws.shape[-1])
        log_reference, values, inside = jnp.zeros_like(x[0]), reward(x), on_target(bench.truth, x).astype(x.dtype)
    else:
        log_reference, values = mixture.log_density(reference, bench.grid.x), bench.grid_field.reward
        inside = jnp.where(bench.truth.is_target[:, None], bench.grid.inside, 0.0).sum(axis=0)
    gibbs = jax.vmap(lambda kl_coef: theory.gibbs(log_reference, values, inside, kl_coef))(kl_coefs)
    return Optimum(gibbs, theory.half_mass_coefficient(log_reference, values, inside))


def _bench(key, truth, base, grid, settings):
    reward = make_reward(settings.reward, truth)
    return metrics.make_bench(key, truth, base, reward, grid, settings.num_draws), reward


def prepare(
    seed_key: jax.Array, truth: Truth, capacity, points: Points, grid: metrics.Grid | None, settings: LaboratorySettings
) -> tuple[Prepared, Measured]:
    """Fit the base to samples of p*, distil the students, measure both and find what each allows as a reference.

    Args:
      seed_key: the seed's key.
      truth: p*; its target weight may be traced.
      capacity: components that students may use; may be traced.
      points: temperatures and KL coefficients.
      grid: quadrature grid, or None for Monte Carlo alone.
      settings: static.

    Returns:
      What algorithms share, and the models of `PREPARED`, measured: a stack to be taken apart by `by_stage`.
    """
    keys = keys_for(seed_key)
    x = mixture.sample(truth.modes, keys["data"], settings.num_samples)
    fitted = _fit(settings, settings.base_components, None, settings.starts)(keys["base"], x)
    base = fitted.mixture
    students = jax.vmap(lambda temperature: _distil(settings, capacity, keys["student"], base, temperature))(
        points.temperature
    )
    bench, reward = _bench(keys["bench"], truth, base, grid, settings)
    measure_key = keys["measure"]
    models = {"base": base, "student": students}
    measured = _measure_all(bench, measure_key, PREPARED, models, {}, reward, points)
    references = stack([pipelines.flatten(base, ()), pipelines.flatten(students, ("temperature",))])
    optima = jax.vmap(lambda reference: _optimum(bench, reference, reward, measure_key, points.kl_coef))(references)
    of_base, of_students = pipelines.split(optima, [1, points.temperature.size], [(), points.temperature.shape])
    prepared = Prepared(
        truth=truth,
        models=models,
        log_likelihood=fitted.log_likelihood,
        base_failed=measured.metrics.coverage[0] < 1,
        optima={"base": of_base, "student": of_students},
    )
    return prepared, measured


def updates_for(settings: LaboratorySettings, num_components: int) -> int:
    """Updates of an alignment that starts at a number of components, matched on component evaluations if asked."""
    updates = settings.alignment.num_updates
    if not settings.match_component_evaluations:
        return updates
    step = settings.alignment.updates_per_step
    return max(1, round(updates * settings.base_components / num_components / step)) * step


def run_arms(
    seed_key: jax.Array,
    prepared: Prepared,
    capacity,
    points: Points,
    coefficients: Coefficients,
    grid: metrics.Grid | None,
    settings: LaboratorySettings,
) -> Measured:
    """Run one algorithm's pipelines on a prepared seed and measure every model they make.

    Args:
      seed_key: the seed's key.
      prepared: from `prepare`, on the same seed, points and grid.
      capacity: components that students may use; may be traced.
      points: temperatures and KL coefficients.
      coefficients: traced; its `kl_coef` is replaced by the points'.
      grid: quadrature grid, or None for Monte Carlo alone.
      settings: static.

    Returns:
      The models that `made_by` names, measured: a stack to be taken apart by `by_stage`.
    """
    truth, base = prepared.truth, prepared.models["base"]
    keys = keys_for(seed_key)
    bench, reward = _bench(keys["bench"], truth, base, grid, settings)

    def execute(kind, num_updates, *inputs):
        *parents, value = inputs
        if kind is pipelines.Sharpen:
            return mixture.sharpen(parents[0], value), None
        if kind is pipelines.Distil:
            return _distil(settings, capacity, keys["student"], parents[0], value), None
        return align.align(
            mixture.policy,
            keys["kd_align"],
            *parents,
            reward,
            coefficients._replace(kl_coef=value),
            replace(settings.alignment, num_updates=num_updates),
            truth=truth.modes,
            on_target=lambda x: on_target(truth, x),
        )

    def num_updates_of(name, stage):
        if not isinstance(stage, pipelines.Align):
            return None
        return updates_for(settings, prepared.models[stage.start].num_components)

    stages = pipelines.needed(settings.arms)
    models, records = pipelines.run(stages, prepared.models, points._asdict(), execute, stack, num_updates_of)
    return _measure_all(bench, keys["measure"], made_by(settings), models, records, reward, points)


def made_by(settings: LaboratorySettings) -> tuple[str, ...]:
    """The models that `run_arms` makes, in the order in which it stacks them."""
    return tuple(name for name in pipelines.needed(settings.arms) if name not in PREPARED)


def by_stage(
    measured: Measured, names: Sequence[str], points: Points, runs: tuple[int, ...] = ()
) -> dict[str, Measured]:
    """Take a stack of measured models apart: each by its name, with leading axes as `pipelines.axes_of` says.

    Done on the host after a sweep: inside the compiled program each of the hundred slices would be a kernel.

    Args:
      measured: from `prepare` or `run_arms`, or any pytree of arrays that lead as its do.
      names: `PREPARED`, or `made_by` of the settings.
      points: temperatures and KL coefficients.
      runs: lengths of the run axes that lead every array, if it was vmapped.
    """
    lengths = {axis: len(values) for axis, values in points._asdict().items()}
    shapes = [tuple(lengths[axis] for axis in pipelines.axes_of(name)) for name in names]
    ends = np.cumsum([math.prod(shape) for shape in shapes])

    def one(shape, begin, end):
        return jax.tree.map(
            lambda leaf: leaf[(slice(None),) * len(runs) + (slice(begin, end),)].reshape(
                *runs, *shape, *leaf.shape[len(runs) + 1 :]
            ),
            measured,
        )

    begins = (0, *ends[:-1])
    return {name: one(*where) for name, *where in zip(names, shapes, begins, ends, strict=True)}


def stack(models: list[Mixture]) -> Mixture:
    """Concatenate mixtures of several sizes along their one leading axis, padded to the widest.

    All parameters travel as the rows of one array: leaf by leaf, four times as many kernels would be compiled.
    """
    widest = max(model.num_components for model in models)
    padded = [pad_components(model, widest) for model in models]
    rows = jnp.concatenate([jnp.concatenate([leaf.logits[:, None], *leaf[1:]], axis=1) for leaf in padded])
    ends = np.cumsum([1, models[0].dim, models[0].dim])
    logits, means, log_scales, off_diagonals = jnp.split(rows, ends, axis=1)
    return Mixture(logits[:, 0], means, log_scales, off_diagonals)


def _measure_all(bench, key, names, models, records, reward, points) -> Measured:
    """Measure the named models in one pass; a model's reference is what its alignment was held to."""
    lengths = {axis: values.shape[0] for axis, values in points._asdict().items()}
    references, coefficients = [], []
    for name in names:
        axes, reference = pipelines.axes_of(name), pipelines.reference_of(name)
        references.append(pipelines.at_all_points(models[reference], pipelines.axes_of(reference), axes, lengths))
        count = math.prod(lengths[axis] for axis in axes)
        has_coefficient = "kl_coef" in axes
        coefficients.append(
            pipelines.values_at_points("kl_coef", axes, points._asdict()) if has_coefficient else jnp.zeros(count)
        )

    def evaluate(inputs):
        model, reference, kl_coef = inputs
        return metrics.evaluate(bench, key, model, reference, reward, kl_coef)

    stacked = stack([pipelines.flatten(models[name], pipelines.axes_of(name)) for name in names])
    # One model's grid fits the cache, all of them together do not.
    values, from_grid = lax.map(evaluate, (stacked, stack(references), jnp.concatenate(coefficients)))
    recorded = [
        _no_record(len(values)) if records.get(name) is None else jax.tree.map(jnp.ravel, records[name])
        for name, values in zip(names, coefficients, strict=True)
    ]
    return Measured(stacked, values, from_grid, jax.tree.map(lambda *parts: jnp.concatenate(parts), *recorded))


def _no_record(count: int) -> align.Record:
    nothing = jnp.full(count, math.nan, jnp.float32)
    return align.Record(nothing, nothing, nothing, jnp.zeros(count, bool))


def pad_components(model: Mixture, num_components: int) -> Mixture:
    """Pad a mixture with inactive components on its last axis, so that models of several sizes fit one array."""
    missing = num_components - model.num_components

    def pad(leaf, value):
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, missing)], constant_values=value)

    return Mixture(pad(model.logits, INACTIVE_LOGIT), *(pad(leaf, 0.0) for leaf in model[1:]))

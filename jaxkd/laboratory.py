"""The mixture laboratory: one seed, from the truth to every arm, as pure functions to be jitted and vmapped.

`prepare` makes what all algorithms share (base, students, their Gibbs optima); `run_arms` runs one algorithm's
pipelines and measures every model on the way. A seed's keys come from the seed alone and are named by purpose, so all
arms, algorithms, temperatures and coefficients of a seed share the base, the data and the random numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import align, checks, distill, loops, metrics, mixture, mixture_rewards, pipelines, random, rewards, theory
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.mixture import INACTIVE_LOGIT, Mixture
from jaxkd.truth import Truth, misses_a_mode, on_target

REWARDS = ("density", "bump", "disc", "log_density", "reflected", "clipped")
"""Rewards by name; the last two are wrappers of the target density at its mean over the target's own draws."""

PREPARED = ("base", "student")
"""The models that `prepare` makes, in the order in which it stacks them."""

_PURPOSES = ("data", "base", "bench", "measure", "student", "aligned_base", "kd_align")
# A purpose's key is that of its place: nothing may be put before another. A new stage needs no key of its own, for all
# distillations share the student's and all alignments kd_align's.


@dataclass(frozen=True)
class LaboratorySettings:
    """What shapes a laboratory (static).

    Attributes:
      alignment: the alignment algorithm and its sizes.
      arms: which of `pipelines.arms()` to run.
      reward: a name of `REWARDS`.
      base_components: K of the base.
      student_components: padded K of the students.
      num_samples: points that the base is fitted to.
      distillation_samples: samples of each distillation; None takes `num_samples`.
      starts: EM starts of the base, of which the best by likelihood is kept.
      distillation_starts: the same for every distillation.
      iterations: EM iterations of every start.
      covariance_floor: added to the diagonal of every fitted covariance.
      num_draws: Monte Carlo draws for the metrics where the grid does not hold.
      grid_points: points along each side of the grid.
      match_component_evaluations: give an alignment that starts at fewer components proportionally more updates, so
        that every arm's policy evaluates the same number of components while it learns. The reference's evaluations are
        not counted: where it has another number of components than the start (`kd_align_anchored`,
        `base_start_student_reference`) the whole work is not matched.
      uniform_padding: pad all models to the widest one while they are made, so that base and students are one
        operation: less to compile and more to compute, for few runs. Changes no result beyond rounding.

    Raises:
      ValueError: on unknown names or numbers out of range.
    """

    alignment: AlignmentSettings = AlignmentSettings()
    arms: tuple[str, ...] = pipelines.ARMS
    reward: str = "density"
    base_components: int = 8
    student_components: int = 4
    num_samples: int = 2048
    distillation_samples: int | None = None
    starts: int = 10
    distillation_starts: int = 4
    iterations: int = 60
    covariance_floor: float = 1e-4
    num_draws: int = 2048
    grid_points: int = 121
    match_component_evaluations: bool = False
    uniform_padding: bool = False

    def __post_init__(self):
        checks.name("reward", self.reward, REWARDS)
        if not self.arms:
            raise ValueError(f"arms must not be empty: choose from {', '.join(pipelines.arms())}")
        if not made_by(self):
            raise ValueError(
                f"arms must hold more than the base and the student, got {', '.join(self.arms)}: choose from "
                f"{', '.join(pipelines.arms())}"
            )
        for name in ("base_components", "student_components", "starts", "distillation_starts", "iterations"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("num_samples", "samples_of_distillation", "num_draws", "grid_points"):
            checks.whole(name, getattr(self, name), least=16)
        checks.number("covariance_floor", self.covariance_floor, above=0)

    @property
    def samples_of_distillation(self) -> int:
        """Samples of each distillation."""
        return self.num_samples if self.distillation_samples is None else self.distillation_samples


class Points(NamedTuple):
    """The axes inside a seed: `temperature: [temperatures]` and `kl_coef: [coefficients]` (reward units a nat)."""

    temperature: jax.Array
    kl_coef: jax.Array

    @property
    def lengths(self) -> dict[str, int]:
        """How many points each axis has, by its name."""
        return {axis: len(values) for axis, values in self._asdict().items()}


class Optimum(NamedTuple):
    """What a reference allows: its Gibbs policies, and β_c, its half-mass coefficient.

    NaN where there is a grid and it does not hold the reference: draws say nothing of a target that none of them is on.
    """

    gibbs: theory.Gibbs
    half_mass_coefficient: jax.Array


class Prepared(NamedTuple):
    """What all algorithms of a seed share.

    Attributes:
      truth: p* and its targets.
      models: "base" and "student", with their leading axes.
      log_likelihood: mean log-likelihood of the base on its data (nats a point).
      base_failed: whether the base merges or misses a mode of p* (`truth.misses_a_mode`).
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
    density = mixture_rewards.target_density(truth.target)
    if name == "density":
        return density
    if name == "bump":
        target_means = jnp.where(truth.is_target[None, :], truth.modes.means, jnp.inf)
        return mixture_rewards.bump(target_means, height=peak, width=2 * jnp.sqrt(variance))
    if name == "disc":
        return mixture_rewards.disc(truth.target, height=peak / 2)
    if name == "log_density":
        return mixture_rewards.log_density(truth.target)
    # The density of a Gaussian averages half its peak in the plane over its own draws, 2^(−dim/2) in general.
    level = peak * 2 ** (-truth.modes.dim / 2)
    return {"reflected": rewards.reflected, "clipped": rewards.clipped}[name](density, level)


def _optimum(bench: metrics.Bench, reference: Mixture, reward, key, kl_coefs) -> Optimum:
    if bench.grid is None:
        x = mixture.sample(reference, key, 4 * bench.truth_draws.shape[-1])
        log_reference, values, inside = jnp.zeros_like(x[0]), reward(x), on_target(bench.truth, x).astype(x.dtype)
    else:
        # A Gibbs policy may be narrower than a cell: its standard deviation is sqrt(variance·β / peak).
        patch, num_points = bench.grid.patch, bench.grid.x.shape[1]
        log_density = mixture.log_density(reference, jnp.concatenate([bench.grid.x, patch.x], axis=1))
        log_reference = log_density + jnp.log(jnp.concatenate([patch.rest, patch.window]))
        values = jnp.concatenate([bench.grid_field.reward, reward(patch.x)])
        inside = jnp.concatenate([bench.grid.inside, patch.inside], axis=1)
        inside = jnp.where(bench.truth.is_target[:, None], inside, 0.0).sum(axis=0)
    gibbs = jax.vmap(lambda kl_coef: theory.gibbs(log_reference, values, inside, kl_coef))(kl_coefs)
    optimum = Optimum(gibbs, theory.half_mass_coefficient(log_reference, values, inside))
    if bench.grid is None:
        return optimum
    holds = metrics.grid_holds(bench, log_density[:num_points])
    return jax.tree.map(lambda leaf: jnp.where(holds, leaf, jnp.nan), optimum)


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
    made, outcome = _from_truth(seed_key, truth, capacity, points, Coefficients(), grid, PREPARED, settings)
    models = {
        "base": made.base(settings.base_components),
        "student": made.models("student", settings.student_components),
    }
    return Prepared(truth, models, outcome.log_likelihood, outcome.base_failed, outcome.optima), outcome.measured


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
    truth, keys = prepared.truth, keys_for(seed_key)
    stages = pipelines.needed(settings.arms)
    made = _make(stages, prepared.models, keys, truth, capacity, points, coefficients, settings)
    bench, reward = _bench(keys["bench"], truth, prepared.models["base"], grid, settings)
    return _measure(bench, keys["measure"], made, made_by(settings), reward, points)


class Outcome(NamedTuple):
    """All of one seed under one algorithm.

    Attributes:
      measured: the models of `every_model`, a stack to be taken apart by `by_stage`.
      log_likelihood: mean log-likelihood of the base on its data (nats a point).
      base_failed: whether the base merges or misses a mode of p* (`truth.misses_a_mode`).
      optima: by reference ("base", "student").
    """

    measured: Measured
    log_likelihood: jax.Array
    base_failed: jax.Array
    optima: dict[str, Optimum]


def run_seed(
    seed_key: jax.Array,
    truth: Truth,
    capacity,
    points: Points,
    coefficients: Coefficients,
    grid: metrics.Grid | None,
    settings: LaboratorySettings,
) -> Outcome:
    """`prepare` and `run_arms` as one program: for sweeps whose runs differ in more than the algorithm.

    Args and results are theirs.
    """
    return _from_truth(seed_key, truth, capacity, points, coefficients, grid, every_model(settings), settings)[1]


def every_model(settings: LaboratorySettings) -> tuple[str, ...]:
    """The models that `run_seed` makes, in the order in which it stacks them."""
    return (*PREPARED, *made_by(settings))


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
    shapes = [tuple(points.lengths[axis] for axis in pipelines.axes_of(name)) for name in names]
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


class _Table(NamedTuple):
    """Mixtures as rows of one array, [rows, parameters, K]: leaf by leaf, four times as many kernels would be compiled.

    Attributes:
      num_components: K to which every mixture is padded.
      dim: of the plane that the mixtures live in.
    """

    num_components: int
    dim: int

    def pack(self, model: Mixture) -> jax.Array:
        """A mixture as [parameters, K]."""
        padded = pad_components(model, self.num_components)
        missing = self.dim * (self.dim - 1) // 2 - padded.off_diagonals.shape[-2]
        off_diagonals = jnp.pad(padded.off_diagonals, [(0, missing), (0, 0)])
        return jnp.concatenate([padded.logits[None, :], padded.means, padded.log_scales, off_diagonals])

    def unpack(self, row: jax.Array, num_components: int | None = None) -> Mixture:
        """The mixture of a row or of several, [..., parameters, K], cut to a number of components."""
        ends = (1, 1 + self.dim, 1 + 2 * self.dim)
        logits, means, log_scales, off_diagonals = jnp.split(row[..., :num_components], ends, axis=-2)
        return Mixture(logits[..., 0, :], means, log_scales, off_diagonals)


class _Made(NamedTuple):
    """Models made from one another; the rows that were given come first and have no record.

    Attributes:
      plan: which row is what.
      layout: of the rows.
      rows: [rows, parameters, K].
      record: what their alignments recorded, [rows]; NaN (not failed) for models that no alignment made.
      log_likelihood: of the models that were fitted, on what they were fitted to, [rows]; else NaN.
    """

    plan: pipelines.Plan
    layout: _Table
    rows: jax.Array
    record: align.Record
    log_likelihood: jax.Array

    def models(self, name: str, num_components: int) -> Mixture:
        """All points of a model, one leading axis, cut to a number of components."""
        where = self.plan.rows[name]
        return self.layout.unpack(self.rows[where.start : where.stop], num_components)

    def base(self, num_components: int) -> Mixture:
        """The base."""
        return self.layout.unpack(self.rows[self.plan.rows[pipelines.ROOT].start], num_components)


def _num_components(name: str, settings: LaboratorySettings, truth: Truth) -> int:
    """Padded K of a model: that of the base or of the students, wherever the model began."""
    if name == pipelines.TRUTH:
        return truth.modes.num_components
    if name == pipelines.ROOT:
        return settings.base_components
    stage = pipelines.STAGES[name]
    if type(stage) is pipelines.Distil:
        return settings.student_components
    return _num_components(stage.models[0], settings, truth)


def _from_truth(seed_key, truth, capacity, points, coefficients, grid, names, settings) -> tuple[_Made, Outcome]:
    """Make the named models and what they are made from, measure them and find what each reference allows."""
    keys = keys_for(seed_key)
    stages = {pipelines.ROOT: pipelines.FIT, **pipelines.needed(names)}
    made = _make(stages, {pipelines.TRUTH: truth.modes}, keys, truth, capacity, points, coefficients, settings)
    base = made.base(settings.base_components)
    bench, reward = _bench(keys["bench"], truth, base, grid, settings)
    outcome = Outcome(
        measured=_measure(bench, keys["measure"], made, names, reward, points),
        log_likelihood=made.log_likelihood[made.plan.rows["base"].start],
        base_failed=misses_a_mode(truth, base),
        optima=_optima(bench, keys["measure"], made, reward, points),
    )
    return made, outcome


def _make(stages, given: dict[str, Mixture], keys, truth, capacity, points, coefficients, settings) -> _Made:
    """Make all stages from given models, one after another, each operation compiled once."""
    sizes = {name: _num_components(name, settings, truth) for name in {*given, *stages}}
    layout = _Table(max(sizes.values()), truth.modes.dim)

    def group_of(name, stage):
        """What shapes an operation: K of what it makes and reads, and how much work it does."""
        least = layout.num_components if settings.uniform_padding else 0
        if isinstance(stage, pipelines.Align):
            return max(sizes[stage.start], sizes[stage.reference], least), updates_for(settings, sizes[stage.start])
        if type(stage) is pipelines.Distil:
            drawn = settings.num_samples if name == pipelines.ROOT else settings.samples_of_distillation
            return max(sizes[name], least), drawn
        return None

    plan = pipelines.plan(stages, [*given], points.lengths, group_of)
    base_row = plan.rows[pipelines.ROOT].start
    make = {pipelines.Align: _aligner, pipelines.Distil: _distiller, pipelines.Sharpen: _sharpener}

    def execute(kind, group, row, start, reference, value):
        operation = make[kind](group, layout, keys, truth, capacity, coefficients, settings)
        model, record, log_likelihood = operation(row == base_row, start, reference, value)
        return layout.pack(model), (record, log_likelihood)

    first = jnp.concatenate([jax.vmap(layout.pack)(_flat(model)) for model in given.values()])
    # Made to depend on the run: what is the same in all runs would be batched in a second pass over the whole program.
    first = first + 0 * jax.random.key_data(keys["data"]).astype(first.dtype).sum()
    rows, recorded = pipelines.run(plan, first, points._asdict(), execute)
    missing = len(first)
    record, log_likelihood = jax.tree.map(
        lambda nothing, leaf: jnp.concatenate([jnp.full(missing, nothing, leaf.dtype), leaf]), _NOTHING, recorded
    )
    return _Made(plan, layout, rows, record, log_likelihood)


_NOTHING = (align.Record(*map(np.float32, (math.nan,) * 3), np.bool_(False)), np.float32(math.nan))
"""Record and log-likelihood of a model that was neither aligned nor fitted."""


def _flat(model: Mixture) -> Mixture:
    """A mixture with one leading axis, of length 1 where it has none."""
    return model if model.logits.ndim == 2 else jax.tree.map(lambda leaf: leaf[None], model)


def _aligner(group, layout, keys, truth, capacity, coefficients, settings):
    num_components, num_updates = group
    reward = make_reward(settings.reward, truth)

    def operation(is_base, start, reference, kl_coef):
        model, record = align.align(
            mixture.policy,
            keys["kd_align"],
            layout.unpack(start, num_components),
            layout.unpack(reference, num_components),
            reward,
            coefficients._replace(kl_coef=kl_coef),
            replace(settings.alignment, num_updates=num_updates),
            truth=truth.modes,
            on_target=lambda x: on_target(truth, x),
        )
        return model, record, _NOTHING[1]

    return operation


def _distiller(group, layout, keys, truth, capacity, coefficients, settings):
    """Maximum likelihood on draws; where the base is as large as the students, it is one operation with theirs."""
    num_components, num_samples = group
    student_keys = random.keys(keys["student"], 2)

    def operation(is_base, teacher, _, temperature):
        fitted = distill.sequence_level(
            mixture.policy,
            _choose(is_base, keys["data"], student_keys[0]),
            _choose(is_base, keys["base"], student_keys[1]),
            layout.unpack(teacher),
            temperature,
            num_samples,
            partial(
                mixture.fit,
                num_components=num_components,
                capacity=jnp.where(is_base, settings.base_components, capacity),
                starts=jnp.where(is_base, settings.starts, settings.distillation_starts),
                most_starts=max(settings.starts, settings.distillation_starts),
                iterations=settings.iterations,
                covariance_floor=settings.covariance_floor,
            ),
        )
        return fitted.mixture, _NOTHING[0], fitted.log_likelihood

    return operation


def _sharpener(group, layout, keys, truth, capacity, coefficients, settings):
    def operation(is_base, model, _, temperature):
        return mixture.sharpen(layout.unpack(model), temperature), *_NOTHING

    return operation


def _choose(first_one, first: jax.Array, second: jax.Array) -> jax.Array:
    """One of two keys."""
    data = jnp.where(first_one, jax.random.key_data(first), jax.random.key_data(second))
    return jax.random.wrap_key_data(data, impl=random.IMPLEMENTATION)


def _optima(bench, key, made: _Made, reward, points: Points) -> dict[str, Optimum]:
    """What the base and every student allow as references."""
    last = made.plan.rows["student"].stop
    optima = jax.vmap(lambda row: _optimum(bench, made.layout.unpack(row), reward, key, points.kl_coef))(
        made.rows[made.plan.rows[pipelines.ROOT].start : last]
    )
    return {
        pipelines.ROOT: jax.tree.map(lambda leaf: leaf[0], optima),
        "student": jax.tree.map(lambda leaf: leaf[1:], optima),
    }


def _measure(bench, key, made: _Made, names, reward, points: Points) -> Measured:
    """Measure the named models in one pass; a model's reference is what its alignment was held to."""
    own = np.concatenate([made.plan.rows[name] for name in names])
    references = np.concatenate([pipelines.reference_rows(made.plan, name, points.lengths) for name in names])
    places = np.concatenate([pipelines.places(name, points.lengths)[:, 1] for name in names])
    has_coefficient = np.concatenate(
        [np.full(len(made.plan.rows[name]), "kl_coef" in pipelines.axes_of(name)) for name in names]
    )
    kl_coefs = jnp.where(has_coefficient, points.kl_coef[places], 0.0)

    def evaluate(inputs):
        model, reference, kl_coef = inputs
        return metrics.evaluate(bench, key, *map(made.layout.unpack, (model, reference)), reward, kl_coef)

    # One model's grid fits the cache, all of them together do not.
    values, from_grid = loops.map_carried(evaluate, (made.rows[own], made.rows[references], kl_coefs))
    kept = slice(int(own[0]), int(own[-1]) + 1)
    return Measured(
        made.layout.unpack(made.rows[kept]), values, from_grid, jax.tree.map(lambda leaf: leaf[kept], made.record)
    )


def pad_components(model: Mixture, num_components: int) -> Mixture:
    """Pad a mixture with inactive components on its last axis, so that models of several sizes fit one array."""
    missing = num_components - model.num_components

    def pad(leaf, value):
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, missing)], constant_values=value)

    return Mixture(pad(model.logits, INACTIVE_LOGIT), *(pad(leaf, 0.0) for leaf in model[1:]))

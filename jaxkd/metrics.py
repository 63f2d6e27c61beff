"""What a policy is worth: precision, recall, reward, target quantities and divergences, all in nats.

Every quantity is an expectation over one of three distributions: the policy's own, the truth's and the target's.
A `Sampling` is a set of points with weights for each of the three, so one function, `measure`, serves quadrature on a
grid and Monte Carlo alike. Means of log-densities are dominated by outliers; the bounded quantities (target mass,
coverage, bounded recall) stand beside them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from jaxkd import mixture, random
from jaxkd.mixture import Mixture
from jaxkd.rewards import Reward
from jaxkd.truth import TARGET_RADIUS, Truth, discs

MASS_TOLERANCE = 1e-3
"""A grid is trusted for a density when it holds its mass to within this."""

RECOVERED_MASS = 0.5
"""A target counts as recovered when the policy's target mass exceeds this."""

COVERED_SHARE = 0.1
"""A mode counts as covered when its disc holds this share of the mass that p* gives it."""

BOUNDED_RECALL_FACTOR = 10.0
"""Bounded recall counts draws of p* whose density under the policy is at least p*'s divided by this."""


class Metrics(NamedTuple):
    """The quantities of one policy, each a scalar but the last.

    Attributes:
      reward: E over the policy of R.
      objective: E[R] − β·KL(policy ‖ reference).
      precision: E over the policy of log p* (nats).
      recall: E over p* of log policy (nats).
      target_precision: E over the policy of log p_target (nats).
      target_recall: E over p_target of log policy (nats).
      target_mass: probability that a draw lies within Mahalanobis distance 3 of a target.
      target_balance: smallest over largest mass of the targets' discs; 1 for one target.
      coverage: share of p*'s modes whose disc holds a tenth or more of the mass p* gives it.
      bounded_recall: probability over p* that log policy ≥ log p* − log 10.
      kl_to_base: KL(policy ‖ base) (nats).
      kl_to_reference: KL(policy ‖ reference) (nats).
      target_variance: mean squared distance, an axis, from the nearest target's mean of the policy's draws within the
        targets' discs, over the variance of the targets' modes. About the target's mean, not the policy's own: a
        policy beside the mean is not narrow.
      mode_mass: probability that a draw lies in the disc of each mode of p*, [modes]; the targets' add up to
        `target_mass`.
    """

    reward: jax.Array
    objective: jax.Array
    precision: jax.Array
    recall: jax.Array
    target_precision: jax.Array
    target_recall: jax.Array
    target_mass: jax.Array
    target_balance: jax.Array
    coverage: jax.Array
    bounded_recall: jax.Array
    kl_to_base: jax.Array
    kl_to_reference: jax.Array
    target_variance: jax.Array
    mode_mass: jax.Array


class Patch(NamedTuple):
    """Finer cells around the targets, for what is narrower there than a cell.

    A window that is 1 at a target's mean and falls smoothly to 0 parts every integral in two: within it on the finer
    points, the rest on the grid. Both parts are smooth, so that each keeps the accuracy of the midpoint rule; finer
    cells in the place of the grid's own would cost it at the seam.

    Attributes:
      x: points, [2, fine points].
      inside: share of each fine cell inside each mode's disc, [modes, fine points].
      window: times the share of a cell that a fine one is, [fine points].
      rest: 1 less the window, [points].
    """

    x: jax.Array
    inside: jax.Array
    window: jax.Array
    rest: jax.Array


_WINDOW, _EDGE, _PARTS = 3.0, 1.2, 3
"""Radius of the window and width of its edge, in cells; in how many parts the side of a cell within it is cut."""


class Grid(NamedTuple):
    """A midpoint grid in the plane with what does not depend on the policy.

    Attributes:
      x: points, [2, points].
      cell: area of a cell.
      inside: share of each cell inside each mode's disc, [modes, points].
      patch: finer cells around the targets; policies are measured without them, their Gibbs optima with them.
    """

    x: jax.Array
    cell: jax.Array
    inside: jax.Array
    patch: Patch


def make_grid(truth: Truth, *, points: int = 121, subdivisions: int = 8) -> Grid:
    """Make a square grid that reaches 2 units or 12 of the modes' standard deviations beyond the outermost mean.

    Args:
      truth: p*, two-dimensional.
      points: points along each side.
      subdivisions: each cell is cut this often along each side to find how much of it a disc covers, so that the
        discs' sharp edge costs no accuracy.

    Raises:
      ValueError: when p* is not two-dimensional; use Monte Carlo there.
    """
    if truth.modes.dim != 2:
        raise ValueError(f"quadrature is for the plane, p* has {truth.modes.dim} dimensions: use Monte Carlo")
    means = np.asarray(truth.modes.means)
    centre = (means.max(axis=1) + means.min(axis=1)) / 2
    widest = float(jnp.exp(truth.modes.log_scales).max())
    half = np.ptp(means, axis=1).max() / 2 + max(2.0, 12 * widest)
    step = 2 * half / points
    axis = (np.arange(points) + 0.5) * step - half
    x = (np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1) + centre[:, None]).astype(np.float32)
    offsets = ((np.arange(subdivisions) + 0.5) / subdivisions - 0.5) * step
    inside = jnp.zeros((means.shape[1], x.shape[1]), jnp.float32)
    for shift in np.stack(np.meshgrid(offsets, offsets, indexing="ij")).reshape(2, -1).T:
        inside = inside + discs(truth, jnp.asarray(x + shift[:, None], jnp.float32)).astype(jnp.float32)
    inside = inside / subdivisions**2
    return Grid(jnp.asarray(x), jnp.float32(step**2), inside, _patch(truth, x, step, np.asarray(inside)))


def _patch(truth: Truth, x: np.ndarray, step: float, inside: np.ndarray) -> Patch:
    """Cut the cells around the targets' means; each part lies inside the discs as its cell does."""
    targets = np.asarray(truth.modes.means, np.float64)[:, np.asarray(truth.is_target)]

    def window(x):
        apart = np.sqrt(((x[:, :, None] - targets[:, None, :]) ** 2).sum(axis=0).min(axis=1)) / step
        return np.where(apart < _WINDOW + 3 * _EDGE, scipy.special.erfc((apart - _WINDOW) / _EDGE) / 2, 0.0)

    here = window(x)
    offsets = ((np.arange(_PARTS) + 0.5) / _PARTS - 0.5) * step
    shifts = np.stack(np.meshgrid(offsets, offsets, indexing="ij")).reshape(2, 1, -1)
    # One cell more, for parts of a cell may lie within where its middle does not.
    cut = np.max([window(x + shift) for shift in shifts.T.reshape(-1, 2, 1)], axis=0) > 0
    fine = (x[:, cut, None] + shifts).reshape(2, -1)
    return Patch(
        *(
            jnp.asarray(values, jnp.float32)
            for values in (fine, np.repeat(inside[:, cut], _PARTS**2, axis=1), window(fine) / _PARTS**2, 1 - here)
        )
    )


class Field(NamedTuple):
    """Everything about a set of points that does not depend on the policy being measured.

    Attributes:
      log_truth: log p*, [points].
      log_target: log p_target, [points].
      log_base: log p′, [points].
      reward: R, [points].
      inside: how much each point lies inside each mode's disc, [modes, points].
      squared_distance: squared distance to the nearest target's mean, [points].
    """

    log_truth: jax.Array
    log_target: jax.Array
    log_base: jax.Array
    reward: jax.Array
    inside: jax.Array
    squared_distance: jax.Array


def field(truth: Truth, base: Mixture, reward: Reward, x: jax.Array, inside: jax.Array | None = None) -> Field:
    """Evaluate what does not depend on the policy at `x: [dim, points]`."""
    apart = ((x[:, None, :] - truth.modes.means[:, :, None]) ** 2).sum(axis=0)
    return Field(
        log_truth=mixture.log_density(truth.modes, x),
        log_target=mixture.log_density(truth.target, x),
        log_base=mixture.log_density(base, x),
        reward=reward(x),
        inside=discs(truth, x).astype(x.dtype) if inside is None else inside,
        squared_distance=jnp.where(truth.is_target[:, None], apart, jnp.inf).min(axis=0),
    )


class Weighted(NamedTuple):
    """Points of one distribution: its weights there, the policy's and the reference's log-density, and the field."""

    weight: jax.Array
    log_policy: jax.Array
    log_reference: jax.Array
    field: Field


class Sampling(NamedTuple):
    """Weighted points of the three distributions that quantities are expectations over."""

    policy: Weighted
    truth: Weighted
    target: Weighted


def integrands(sampling: Sampling, truth: Truth) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Quantities that are plain expectations, as name → (values [points], weights [points])."""
    own, of_truth, of_target = sampling
    target_inside = jnp.where(truth.is_target[:, None], own.field.inside, 0.0).sum(axis=0)
    within_factor = of_truth.log_policy >= of_truth.field.log_truth - math.log(BOUNDED_RECALL_FACTOR)
    return {
        "reward": (own.field.reward, own.weight),
        "precision": (own.field.log_truth, own.weight),
        "recall": (of_truth.log_policy, of_truth.weight),
        "target_precision": (own.field.log_target, own.weight),
        "target_recall": (of_target.log_policy, of_target.weight),
        "target_mass": (target_inside, own.weight),
        "bounded_recall": (within_factor.astype(own.weight.dtype), of_truth.weight),
        "kl_to_base": (own.log_policy - own.field.log_base, own.weight),
        "kl_to_reference": (own.log_policy - own.log_reference, own.weight),
    }


def _weighted_sum(values, weight):
    # A point of no weight contributes nothing, whatever its value.
    return jnp.where(weight > 0, values * weight, 0.0).sum()


def measure(sampling: Sampling, truth: Truth, kl_coef) -> Metrics:
    """All quantities from weighted points."""
    plain = {name: _weighted_sum(*pair) for name, pair in integrands(sampling, truth).items()}
    own = sampling.policy
    # A product of matrices is made once: a sum would be made anew, and rounded otherwise, in each of its uses.
    mode_mass = jnp.einsum("mp,p->m", own.field.inside, own.weight, precision="highest")
    true_weights = mixture.weights(truth.modes)
    # A mode of p* holds this share of its weight within its disc: the chi distribution of `dim` degrees of freedom.
    disc_share = float(scipy.stats.chi2.cdf(TARGET_RADIUS**2, truth.modes.dim))
    present = true_weights > 0
    covered = (mode_mass >= COVERED_SHARE * disc_share * true_weights) & present
    target_mode_mass = jnp.where(truth.is_target, mode_mass, jnp.nan)
    mode_variance = jnp.exp(2 * truth.modes.log_scales).mean()
    target_inside = jnp.where(truth.is_target[:, None], own.field.inside, 0.0).sum(axis=0)
    spread = _weighted_sum(own.field.squared_distance, own.weight * target_inside) / plain["target_mass"]
    return Metrics(
        **plain,
        objective=plain["reward"] - kl_coef * plain["kl_to_reference"],
        target_balance=jnp.nanmin(target_mode_mass) / jnp.nanmax(target_mode_mass),
        coverage=covered.sum() / present.sum(),
        target_variance=spread / truth.modes.dim / mode_variance,
        mode_mass=mode_mass,
    )


class Bench(NamedTuple):
    """All that the policies of one seed are measured against; made once, used for every stage.

    Attributes:
      truth: p* and its targets.
      base: p′.
      grid: quadrature points, or None outside the plane.
      grid_field: the field on them.
      truth_draws: draws of p*, [dim, n], the same for every policy of a seed.
      truth_field: the field on them.
      target_draws: draws of p_target.
      target_field: the field on them.
    """

    truth: Truth
    base: Mixture
    grid: Grid | None
    grid_field: Field | None
    truth_draws: jax.Array
    truth_field: Field
    target_draws: jax.Array
    target_field: Field


def make_bench(
    key: jax.Array, truth: Truth, base: Mixture, reward: Reward, grid: Grid | None, num_draws: int = 2048
) -> Bench:
    """Draw the truth and the target once and evaluate everything that policies share."""
    truth_key, target_key = random.keys(key, 2)
    truth_draws = mixture.sample(truth.modes, truth_key, num_draws)
    target_draws = mixture.sample(truth.target, target_key, num_draws)
    drawn = field(truth, base, reward, jnp.concatenate([truth_draws, target_draws], axis=1))
    of_truth = jax.tree.map(lambda leaf: leaf[..., :num_draws], drawn)
    of_target = jax.tree.map(lambda leaf: leaf[..., num_draws:], drawn)
    return Bench(
        truth=truth,
        base=base,
        grid=grid,
        grid_field=None if grid is None else field(truth, base, reward, grid.x, grid.inside),
        truth_draws=truth_draws,
        truth_field=of_truth,
        target_draws=target_draws,
        target_field=of_target,
    )


def _log_densities(model: Mixture, *sets: jax.Array) -> list[jax.Array]:
    """Log-density at each of several sets of points: one evaluation compiles in a fraction of the time of one a set."""
    ends = np.cumsum([x.shape[1] for x in sets])[:-1]
    return jnp.split(mixture.log_density(model, jnp.concatenate(sets, axis=1)), ends)


def _grid_sampling(bench: Bench, log_policy: jax.Array, log_reference: jax.Array) -> Sampling:
    def under(log_density):
        return Weighted(jnp.exp(log_density) * bench.grid.cell, log_policy, log_reference, bench.grid_field)

    return Sampling(under(log_policy), under(bench.grid_field.log_truth), under(bench.grid_field.log_target))


def _holds(sampling: Sampling) -> jax.Array:
    error = jnp.stack([jnp.abs(part.weight.sum() - 1) for part in sampling]).max()
    return error < MASS_TOLERANCE


def grid_holds(bench: Bench, log_density: jax.Array) -> jax.Array:
    """Whether the grid holds a density, given by its logarithm at the grid's points, truth and target to 1e-3; bool."""
    return _holds(_grid_sampling(bench, log_density, log_density))


def _by_quadrature(bench: Bench, log_policy, log_reference, kl_coef) -> tuple[Metrics, jax.Array]:
    sampling = _grid_sampling(bench, log_policy, log_reference)
    return measure(sampling, bench.truth, kl_coef), _holds(sampling)


def quadrature(bench: Bench, policy: Mixture, reference: Mixture, kl_coef) -> tuple[Metrics, jax.Array]:
    """All quantities on the grid, and whether the grid holds the masses of policy, truth and target to 1e-3."""
    log_policy, log_reference = (mixture.log_density(model, bench.grid.x) for model in (policy, reference))
    return _by_quadrature(bench, log_policy, log_reference, kl_coef)


def _drawn_sampling(bench: Bench, own_field: Field, log_policy, log_reference) -> Sampling:
    """Draws of policy, truth and target, each of equal weights; log-densities are given for the three in turn."""
    fields = (own_field, bench.truth_field, bench.target_field)
    weights = [jnp.full_like(values, 1 / values.size) for values in log_policy]
    return Sampling(*map(Weighted, weights, log_policy, log_reference, fields))


def _own_draws(bench: Bench, key, policy: Mixture, reward: Reward) -> tuple[jax.Array, Field]:
    own = mixture.sample(policy, key, bench.truth_draws.shape[-1])
    return own, field(bench.truth, bench.base, reward, own)


def monte_carlo(
    bench: Bench, key, policy: Mixture, reference: Mixture, reward: Reward, kl_coef
) -> tuple[Metrics, dict[str, jax.Array]]:
    """All quantities from draws, and standard errors of those that are plain expectations (and of the objective)."""
    own, own_field = _own_draws(bench, key, policy, reward)
    sets = (own, bench.truth_draws, bench.target_draws)
    sampling = _drawn_sampling(bench, own_field, _log_densities(policy, *sets), _log_densities(reference, *sets))
    pairs = integrands(sampling, bench.truth)
    count = bench.truth_draws.shape[-1]
    errors = {name: values.std(ddof=1) / math.sqrt(count) for name, (values, _) in pairs.items()}
    gain = pairs["reward"][0] - kl_coef * pairs["kl_to_reference"][0]
    errors["objective"] = gain.std(ddof=1) / math.sqrt(count)
    return measure(sampling, bench.truth, kl_coef), errors


def evaluate(
    bench: Bench, key, policy: Mixture, reference: Mixture, reward: Reward, kl_coef
) -> tuple[Metrics, jax.Array]:
    """All quantities, by quadrature where the grid holds and by Monte Carlo where it does not.

    Returns:
      The quantities, and whether they came from the grid (bool). Bounded recall is always from draws of p*.
    """
    own, own_field = _own_draws(bench, key, policy, reward)
    sets = (own, bench.truth_draws, bench.target_draws, *(() if bench.grid is None else (bench.grid.x,)))
    log_policy, log_reference = _log_densities(policy, *sets), _log_densities(reference, *sets)
    drawn = measure(_drawn_sampling(bench, own_field, log_policy[:3], log_reference[:3]), bench.truth, kl_coef)
    if bench.grid is None:
        return drawn, jnp.zeros((), bool)
    exact, holds = _by_quadrature(bench, log_policy[3], log_reference[3], kl_coef)
    # A threshold on densities is a sharp edge that a grid of this width misses by up to 0.02; draws have no such bias.
    exact = exact._replace(bounded_recall=drawn.bounded_recall)
    return jax.tree.map(lambda e, d: jnp.where(holds, e, d), exact, drawn), holds

"""Gaussian mixtures of any dimension, as a policy: density, draws, and maximum likelihood by EM.

Layout. Draws are `x: [dim, n]` with the samples on the minor axis, and every parameter ends in the component axis K.
Loops over the dimension are unrolled in Python; nothing gathers or scatters. On two CPU cores this is three times
faster than `[n, dim]`, and it is the layout in which a GPU reads memory in order.

Capacity. A mixture padded to K components with fewer in use carries `INACTIVE_LOGIT` where a component is off: finite,
so that no product with it is NaN, and so low that its weight is exactly 0 in float32 at every temperature.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkd import loops, random
from jaxkd.policy import Policy

INACTIVE_LOGIT = -1e9
LOG_TWO_PI = math.log(2 * math.pi)


class Mixture(NamedTuple):
    """A Gaussian mixture; component k has covariance L Lᵀ with L lower triangular.

    Attributes:
      logits: [K], unnormalised log-weights; `INACTIVE_LOGIT` switches a component off.
      means: [dim, K].
      log_scales: [dim, K], logarithms of the diagonal of L.
      off_diagonals: [dim (dim − 1) / 2, K], the rest of L row by row: (1,0), (2,0), (2,1), …; [0, K] makes every
        covariance diagonal.
    """

    logits: jax.Array
    means: jax.Array
    log_scales: jax.Array
    off_diagonals: jax.Array

    @property
    def dim(self) -> int:
        """Dimension of the space."""
        return self.means.shape[-2]

    @property
    def num_components(self) -> int:
        """Number of components with padding, K."""
        return self.means.shape[-1]


def make(weights, means, covariances) -> Mixture:
    """Make a mixture from plain arrays, checked before any computation.

    Args:
      weights: [K], not negative, of positive sum; 0 switches a component off.
      means: [K, dim].
      covariances: [K, dim, dim] (positive definite), or [K, dim]: the diagonals of diagonal covariances.

    Raises:
      ValueError: on shapes that do not fit, on non-finite numbers, on a weight below 0 or on a covariance that is not
        symmetric and positive definite.
    """
    weights, means, covariances = (np.asarray(array, np.float64) for array in (weights, means, covariances))
    if weights.ndim != 1 or means.ndim != 2 or means.shape[0] != weights.shape[0] or weights.size == 0:
        raise ValueError(f"weights [K] and means [K, dim] do not fit: got shapes {weights.shape} and {means.shape}")
    count, dim = means.shape
    for name, array in (("weights", weights), ("means", means), ("covariances", covariances)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array.tolist()}")
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"weights must be 0 or more with a positive sum, got {weights.tolist()}")
    if covariances.shape == (count, dim):
        if (covariances <= 0).any():
            raise ValueError("diagonal covariances must be positive")
        factors, rows = np.sqrt(covariances)[:, :, None] * np.eye(dim), []
    elif covariances.shape == (count, dim, dim):
        # The factor would be made from the lower triangle alone.
        if not np.allclose(covariances, covariances.swapaxes(1, 2), rtol=1e-5, atol=1e-6 * np.abs(covariances).max()):
            raise ValueError(f"every covariance must be symmetric, got {covariances.tolist()}")
        try:
            factors = np.linalg.cholesky(covariances)
        except np.linalg.LinAlgError:
            raise ValueError("every covariance must be positive definite") from None
        rows = [factors[:, d, e] for d in range(dim) for e in range(d)]
    else:
        raise ValueError(
            f"covariances must be [{count}, {dim}, {dim}] or [{count}, {dim}], got shape {covariances.shape}"
        )
    with np.errstate(divide="ignore"):
        logits = np.where(weights > 0, np.log(weights / weights.sum()), INACTIVE_LOGIT)
    return Mixture(
        logits=jnp.asarray(logits, jnp.float32),
        means=jnp.asarray(means.T, jnp.float32),
        log_scales=jnp.asarray(np.log(np.einsum("kdd->dk", factors)), jnp.float32),
        off_diagonals=jnp.asarray(np.reshape(rows, (-1, count)), jnp.float32),
    )


def is_active(mixture: Mixture) -> jax.Array:
    """Which components are in use, bool[K]."""
    return mixture.logits > INACTIVE_LOGIT / 2


def weights(mixture: Mixture, temperature=1.0) -> jax.Array:
    """Mixture weights at a temperature, [K]: w_k^(1/τ), renormalised."""
    return jax.nn.softmax(mixture.logits / temperature)


def sharpen(mixture: Mixture, temperature) -> Mixture:
    """The mixture whose weights are w_k^(1/τ), renormalised; components stay as they are (arXiv 2505.13111, sec. 3)."""
    log_weights = jax.nn.log_softmax(mixture.logits / temperature)
    return mixture._replace(logits=jnp.where(is_active(mixture), log_weights, INACTIVE_LOGIT))


def scale_factor(mixture: Mixture) -> jax.Array:
    """L as [dim, dim, K], zeros above the diagonal."""
    dim = mixture.dim
    entries = _off_diagonal_entries(mixture)
    zeros = jnp.zeros_like(mixture.logits)
    scales = jnp.exp(mixture.log_scales)
    rows = [
        [entries[d, e] if (d, e) in entries else (scales[d] if d == e else zeros) for e in range(dim)]
        for d in range(dim)
    ]
    return jnp.stack([jnp.stack(row) for row in rows])


def covariances(mixture: Mixture) -> jax.Array:
    """Covariances as [dim, dim, K]."""
    factor = scale_factor(mixture)
    return (factor[:, None] * factor[None]).sum(axis=2)


def _off_diagonal_entries(mixture: Mixture) -> dict[tuple[int, int], jax.Array]:
    """The entries of L below the diagonal, by (row, column); none when covariances are diagonal."""
    if mixture.off_diagonals.shape[-2] == 0:
        return {}
    positions = [(d, e) for d in range(mixture.dim) for e in range(d)]
    return {position: mixture.off_diagonals[i] for i, position in enumerate(positions)}


# --- density ---------------------------------------------------------------------------------------------------------


def component_log_densities(mixture: Mixture, x: jax.Array) -> jax.Array:
    """log w_k + log N(x; μ_k, Σ_k) for `x: [dim, n]`, as [K, n] (nats)."""
    entries = _off_diagonal_entries(mixture)
    inverse_scales = jnp.exp(-mixture.log_scales)
    whitened = []
    for d in range(mixture.dim):
        residual = x[d][None, :] - mixture.means[d][:, None]
        for e in range(d):
            if (d, e) in entries:
                residual = residual - entries[d, e][:, None] * whitened[e]
        whitened.append(residual * inverse_scales[d][:, None])
    squared_distance = sum(z * z for z in whitened)
    constant = jax.nn.log_softmax(mixture.logits) - mixture.log_scales.sum(axis=0) - 0.5 * mixture.dim * LOG_TWO_PI
    return constant[:, None] - 0.5 * squared_distance


@jax.custom_vjp
def log_density(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Log-density of `x: [dim, n]`, as [n] (nats).

    The gradient is written out: it needs only the weighted moments of x under the responsibilities, and they come from
    one matrix product. Automatic differentiation takes half as long again.
    """
    return _log_density_forward(mixture, x)[0]


def _largest_component(joint: jax.Array) -> jax.Array:
    """Maximum over the leading axis, spelled as a comparison: on CPUs XLA hands a plain maximum, with the exponentials
    that follow it, to a library that takes twice as long. The least float starts it, so that −inf stays −inf.
    """
    least = np.finfo(joint.dtype).min
    return lax.reduce(joint, jnp.asarray(least, joint.dtype), lambda a, b: lax.select(a > b, a, b), (0,))


def _sum_over_components(values: jax.Array) -> jax.Array:
    """Sum over the leading axis by halving: XLA draws exponentials into a reduction, where they take thrice as long."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        paired = values[:half] + values[half : 2 * half]
        values = paired if values.shape[0] % 2 == 0 else jnp.concatenate([paired, values[2 * half :]])
    return values[0]


def _log_density_forward(mixture, x):
    joint = component_log_densities(mixture, x)
    largest = _largest_component(joint)
    unnormalised = jnp.exp(joint - largest[None, :])
    total = _sum_over_components(unnormalised)
    return largest + jnp.log(total), (mixture, x, unnormalised, total)


def _log_density_backward(residuals, cotangent):
    mixture, x, unnormalised, total = residuals
    moments = _weighted_moments(mixture, x, unnormalised, cotangent / total)
    gradient = _gradient_from_moments(mixture, moments)
    return gradient, _gradient_of_draws(mixture, x, unnormalised * (cotangent / total)[None, :])


log_density.defvjp(_log_density_forward, _log_density_backward)


class Moments(NamedTuple):
    """Weighted moments of draws about each mean: `mass: [K]`, `first: [dim, K]`, `second: [dim, dim, K]`."""

    mass: jax.Array
    first: jax.Array
    second: jax.Array


def _weighted_moments(mixture: Mixture, x: jax.Array, shares: jax.Array, weights: jax.Array) -> Moments:
    """Moments of `x: [dim, n]` about the means of the mixture, weighted by `shares: [K, n]` times `weights: [n]`.

    Monomials about the mean of x are shared by all components, so all sums over n are one matrix product; moving to
    each mean afterwards costs about eps·(distance / scale)² in relative accuracy, 1e-4 for modes 40 scales away.
    """
    dim = mixture.dim
    centre = lax.stop_gradient(x.mean(axis=1))
    centred = x - centre[:, None]
    pairs = [(d, e) for d in range(dim) for e in range(d + 1)]
    monomials = [jnp.ones_like(x[0]), *centred, *(centred[d] * centred[e] for d, e in pairs)]
    monomials = jnp.stack(monomials) * weights[None, :]
    sums = jnp.einsum("mn,kn->mk", monomials, shares, precision="highest")
    mass, raw_first, raw_pairs = sums[0], sums[1 : dim + 1], dict(zip(pairs, sums[dim + 1 :], strict=True))
    offset = mixture.means - centre[:, None]
    first = raw_first - offset * mass[None, :]

    def second(d, e):
        about_centre = raw_pairs[max(d, e), min(d, e)]
        return about_centre - offset[d] * raw_first[e] - offset[e] * first[d]

    return Moments(mass, first, jnp.stack([jnp.stack([second(d, e) for e in range(dim)]) for d in range(dim)]))


def _inverse_factor(mixture: Mixture) -> list[list[jax.Array]]:
    """L⁻¹ by forward substitution, as nested lists of [K]; `None` above the diagonal."""
    entries = _off_diagonal_entries(mixture)
    inverse_scales = jnp.exp(-mixture.log_scales)
    zeros = jnp.zeros_like(mixture.logits)
    inverse = [[None] * mixture.dim for _ in range(mixture.dim)]
    for d in range(mixture.dim):
        inverse[d][d] = inverse_scales[d]
        for e in range(d):
            products = [entries[d, f] * inverse[f][e] for f in range(e, d) if (d, f) in entries]
            inverse[d][e] = -inverse_scales[d] * sum(products, start=zeros)
    return inverse


def _gradient_from_moments(mixture: Mixture, moments: Moments) -> Mixture:
    """Gradient of Σ_n g_n log p(x_n), where the moments were weighted by g_n times the responsibilities.

    With z = L⁻¹(x − μ): ∂/∂μ = L⁻ᵀ Σ g r z and ∂/∂L = L⁻ᵀ Σ g r (z zᵀ − I), lower triangle.
    """
    dim = mixture.dim
    inverse = _inverse_factor(mixture)
    dims = range(dim)
    whitened_first = [sum(inverse[d][e] * moments.first[e] for e in range(d + 1)) for d in dims]
    half = [[sum(inverse[d][a] * moments.second[a, e] for a in range(d + 1)) for e in dims] for d in dims]
    centred = [
        [sum(inverse[e][b] * half[d][b] for b in range(e + 1)) - (moments.mass if d == e else 0.0) for e in dims]
        for d in dims
    ]
    mean_gradient = [sum(inverse[a][d] * whitened_first[a] for a in range(d, dim)) for d in dims]
    factor_gradient = [[sum(inverse[a][d] * centred[a][e] for a in range(d, dim)) for e in range(d + 1)] for d in dims]
    scales = jnp.exp(mixture.log_scales)
    below = [factor_gradient[d][e] for d in dims for e in range(d)] if mixture.off_diagonals.shape[-2] else []
    return Mixture(
        logits=moments.mass - jax.nn.softmax(mixture.logits) * moments.mass.sum(),
        means=jnp.stack(mean_gradient),
        log_scales=jnp.stack([factor_gradient[d][d] * scales[d] for d in dims]),
        off_diagonals=jnp.stack(below) if below else jnp.zeros_like(mixture.off_diagonals),
    )


def _gradient_of_draws(mixture: Mixture, x: jax.Array, responsibilities: jax.Array) -> jax.Array:
    """Gradient with respect to the draws, [dim, n]; compiled away where nobody asks for it."""
    inverse = _inverse_factor(mixture)
    dims = range(mixture.dim)
    residual = [x[d][None, :] - mixture.means[d][:, None] for d in dims]
    whitened = [sum(inverse[d][e][:, None] * residual[e] for e in range(d + 1)) for d in dims]
    pulls = [sum(inverse[a][d][:, None] * whitened[a] for a in range(d, mixture.dim)) for d in dims]
    return -jnp.stack([(responsibilities * pull).sum(axis=0) for pull in pulls])


# --- draws -----------------------------------------------------------------------------------------------------------


def sample(mixture: Mixture, key: jax.Array, n: int, temperature=1.0) -> jax.Array:
    """Draw n points at a temperature on the weights, as [dim, n].

    The words drawn depend on `dim` and n alone, so padding to another K changes no draw.
    """
    dim, count = mixture.dim, mixture.num_components
    uniforms = random.uniforms(key, dim + 1, n)
    # Half a step off the grid of uniforms keeps erf_inv's argument inside (−1, 1).
    normals = math.sqrt(2) * lax.erf_inv(2.0 * uniforms[1:] - 1.0 + 2.0**-24)
    # A component's mean and the columns of its L, chosen by walking up the cumulative weights. Rounding may leave the
    # last threshold below a uniform; the draw then stays with the last active component.
    last_active = jnp.where(is_active(mixture), jnp.arange(count), 0).max()
    thresholds = jnp.where(jnp.arange(count) < last_active, jnp.cumsum(weights(mixture, temperature)), 2.0)
    factor = scale_factor(mixture)
    parameters = [mixture.means, *(factor[:, e] for e in range(dim))]
    chosen = [jnp.broadcast_to(parameter[:, :1], (dim, n)) for parameter in parameters]
    for k in range(1, count):
        beyond = (uniforms[0] >= thresholds[k - 1])[None, :]
        chosen = [
            jnp.where(beyond, parameter[:, k : k + 1], value)
            for parameter, value in zip(parameters, chosen, strict=True)
        ]
    # Whole rows at a time: stacking coordinates would make XLA compute them branch by branch.
    draws = chosen[0] + sum(column * normals[e][None, :] for e, column in enumerate(chosen[1:]))
    return lax.optimization_barrier(lax.stop_gradient(draws))


def entropy(mixture: Mixture, key: jax.Array, n: int = 4096) -> tuple[jax.Array, jax.Array]:
    """Differential entropy by Monte Carlo over n draws (nats), with its standard error."""
    surprise = -log_density(mixture, sample(mixture, key, n))
    return surprise.mean(), surprise.std(ddof=1) / math.sqrt(n)


def mahalanobis(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Mahalanobis distances of `x: [dim, n]` to every component, as [K, n]."""
    inverse = _inverse_factor(mixture)
    residual = [x[d][None, :] - mixture.means[d][:, None] for d in range(mixture.dim)]
    whitened = [sum(inverse[d][e][:, None] * residual[e] for e in range(d + 1)) for d in range(mixture.dim)]
    return jnp.sqrt(sum(z * z for z in whitened))


def mass_per_mode(mixture: Mixture, modes: Mixture, key: jax.Array, n: int = 4096, radius: float = 3.0) -> jax.Array:
    """Probability that a draw lies within a Mahalanobis radius of each mode, [modes], by Monte Carlo over n draws."""
    inside = mahalanobis(modes, sample(mixture, key, n)) < radius
    return inside.astype(jnp.float32).mean(axis=1)


policy = Policy(
    log_prob=lambda mixture, x: log_density(mixture, x)[:, None],
    sample=sample,
    num_steps=lambda x: jnp.ones(x.shape[-1], x.dtype),
    is_density=True,
)
"""The mixture as a policy of one step."""


# --- maximum likelihood ----------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A fitted mixture.

    Attributes:
      mixture: the parameters.
      log_likelihood: mean log-likelihood of the data under them (nats a point).
    """

    mixture: Mixture
    log_likelihood: jax.Array


def _cholesky(matrix: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Lower Cholesky factors of K small matrices given as nested lists of [K]."""
    factor = [[None] * len(matrix) for _ in matrix]
    for d in range(len(matrix)):
        for e in range(d + 1):
            rest = matrix[d][e] - sum(factor[d][f] * factor[e][f] for f in range(e))
            factor[d][e] = jnp.sqrt(rest) if d == e else rest / factor[e][e]
    return factor


def _from_moments(mixture: Mixture, moments: Moments, covariance_floor) -> Mixture:
    """The M step: weights, means and covariances from moments about the present means.

    A component that holds less than a millionth of the data keeps its mean and covariance, so it never divides by 0.
    """
    dims = range(mixture.dim)
    held = moments.mass > 1e-6
    mass = jnp.where(held, moments.mass, 1.0)
    shift = moments.first / mass[None, :]
    covariance = [[moments.second[d, e] / mass - shift[d] * shift[e] for e in dims] for d in dims]
    for d in dims:
        covariance[d][d] = jnp.maximum(covariance[d][d], 0.0) + covariance_floor
    diagonal = mixture.off_diagonals.shape[-2] == 0
    if diagonal:
        variances = jnp.stack([covariance[d][d] for d in dims])
        log_scales, below = 0.5 * jnp.log(variances), mixture.off_diagonals
    else:
        factor = _cholesky(covariance)
        log_scales = jnp.stack([jnp.log(factor[d][d]) for d in dims])
        rows = [factor[d][e] for d in dims for e in range(d)]
        below = jnp.stack(rows) if rows else mixture.off_diagonals
    active = is_active(mixture)
    keep = lambda new, old: jnp.where(held[None, :], new, old)  # noqa: E731
    return Mixture(
        logits=jnp.where(active, jnp.log(jnp.maximum(moments.mass, 1e-12)), INACTIVE_LOGIT),
        means=keep(mixture.means + shift, mixture.means),
        log_scales=keep(log_scales, mixture.log_scales),
        off_diagonals=keep(below, mixture.off_diagonals),
    )


def em(initial: Mixture, x: jax.Array, iterations: int, covariance_floor=1e-6) -> Fit:
    """Run EM on `x: [dim, n]` from a start, for a fixed number of iterations.

    Follows scikit-learn's GaussianMixture: the floor (`reg_covar`) is added to the diagonal of every covariance.
    The log-likelihood is that of the returned parameters.
    """
    n = x.shape[-1]

    def iteration(mixture, _):
        _, (_, _, unnormalised, total) = _log_density_forward(mixture, x)
        moments = _weighted_moments(mixture, x, unnormalised, 1 / (n * total))
        return _from_moments(mixture, moments, covariance_floor), None

    mixture, _ = lax.scan(iteration, initial, length=iterations)
    return Fit(mixture, log_density(mixture, x).mean())


def kmeans_plus_plus(key: jax.Array, x: jax.Array, num_components: int) -> jax.Array:
    """Seeds by k-means++ (Arthur and Vassilvitskii 2007), as [dim, K].

    Seed k depends on the seeds before it alone, so a smaller mixture's seeds are the first of a larger one's.
    """
    keys = random.keys(key, num_components)

    def pick(key, chance):
        # An exponential race picks index i with probability chance_i / Σ chance, at one logarithm a point.
        arrival = -jnp.log(random.uniforms(key, 1, chance.shape[0])[0] + 2.0**-24) / chance
        chosen = (arrival == arrival.min()).astype(x.dtype)
        seed = (x * (chosen / chosen.sum())[None, :]).sum(axis=1)
        return seed, ((x - seed[:, None]) ** 2).sum(axis=0)

    def following(nearest, key):
        seed, distance = pick(key, jnp.maximum(nearest, 1e-30))
        return jnp.minimum(nearest, distance), seed

    first, distance = pick(keys[0], jnp.ones_like(x[0]))
    _, rest = lax.scan(following, distance, keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def seeded_start(
    key: jax.Array, x: jax.Array, num_components: int, capacity=None, diagonal: bool = False, covariance_floor=1e-6
) -> Mixture:
    """A start for EM: k-means++ seeds, each with the weight, mean and covariance of the points nearest to it."""
    dim, n = x.shape
    seeds = kmeans_plus_plus(key, x, num_components)
    capacity = num_components if capacity is None else capacity
    active = jnp.arange(num_components) < capacity
    spread = jnp.maximum(x.var(axis=1), covariance_floor)
    about_seeds = Mixture(
        logits=jnp.where(active, 0.0, INACTIVE_LOGIT),
        means=seeds,
        log_scales=jnp.broadcast_to(0.5 * jnp.log(spread)[:, None], seeds.shape),
        off_diagonals=jnp.zeros((0 if diagonal else dim * (dim - 1) // 2, num_components), x.dtype),
    )
    distance = ((x[:, None, :] - seeds[:, :, None]) ** 2).sum(axis=0)
    distance = jnp.where(active[:, None], distance, jnp.inf)
    nearest = (distance == distance.min(axis=0)[None, :]).astype(x.dtype)
    moments = _weighted_moments(about_seeds, x, nearest, 1 / (n * nearest.sum(axis=0)))
    return _from_moments(about_seeds, moments, covariance_floor)


def fit(
    key: jax.Array,
    x: jax.Array,
    num_components: int,
    capacity=None,
    *,
    starts=10,
    most_starts: int | None = None,
    iterations: int = 60,
    diagonal: bool = False,
    covariance_floor=1e-6,
) -> Fit:
    """Fit a mixture to `x: [dim, n]` by EM, keeping the best of several starts by likelihood.

    Args:
      key: random key of the k-means++ seeds.
      x: data, [dim, n].
      num_components: K, the padded width (static).
      capacity: how many components may be used, 1 … K; may be traced. None uses all.
      starts: how many starts are tried; may be traced when `most_starts` is given, a bound on it (static).
      most_starts: see `starts`.
      iterations: EM iterations of each start (static).
      diagonal: whether covariances are kept diagonal (static).
      covariance_floor: added to the diagonal of every covariance, in squared units of x.

    Raises:
      ValueError: when a static argument, or a capacity that is a plain number, is out of range.
    """
    most_starts = starts if most_starts is None else most_starts
    if isinstance(starts, int) and not 1 <= starts <= most_starts:
        raise ValueError(f"starts must be from 1 to {max(most_starts, 1)}, got {starts}")
    _check_fit(x, num_components, capacity, most_starts, iterations)
    keys = random.keys(key, most_starts)

    def one(index):
        start = seeded_start(keys[index], x, num_components, capacity, diagonal, covariance_floor)
        return em(start, x, iterations, covariance_floor)

    def better(index, best):
        found = one(index)
        new, held = (jnp.where(jnp.isfinite(fit.log_likelihood), fit.log_likelihood, -jnp.inf) for fit in (found, best))
        takes = (index == 0) | (new > held)
        return jax.tree.map(lambda new, old: jnp.where(takes, new, old), found, best)

    # One start after another: the arrays of a single start already fill a core's cache.
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0))
    return lax.fori_loop(0, starts, better, loops.per_run(nothing, x))


def _check_fit(x, num_components, capacity, starts, iterations):
    if x.ndim != 2:
        raise ValueError(f"x must be [dim, n], got shape {x.shape}")
    for name, value in (("num_components", num_components), ("starts", starts), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(capacity, int | np.integer) and not 1 <= capacity <= num_components:
        raise ValueError(f"capacity must lie between 1 and num_components = {num_components}, got {capacity}")

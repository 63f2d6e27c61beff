"""The true distribution p* of a mixture experiment, and which of its modes are the rare but desirable ones."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import checks, mixture
from jaxkd.mixture import INACTIVE_LOGIT, Mixture

TARGET_RADIUS = 3.0
"""Mahalanobis radius of the disc around a mode that counts as being on it; targets are at least twice as far apart."""

_RING = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)]
_TARGETS = {"corner": [(1, 1), (-1, -1)], "edge": [(1, 0), (-1, 0)]}


class Truth(NamedTuple):
    """A true distribution with its targets.

    Attributes:
      modes: p* as a mixture, one component a mode; the targets' logits carry `target_weight`.
      target: p_target, the targets alone with equal weights, one component a target.
      is_target: bool[modes].
    """

    modes: Mixture
    target: Mixture
    is_target: jax.Array


def make_truth(
    layout="ring",
    *,
    targets="corner",
    num_targets: int = 1,
    target_weight: float = 0.03,
    variance: float = 0.025,
    num_modes: int = 8,
    seed: int = 0,
) -> Truth:
    """Make p* and its targets.

    Args:
      layout: "ring" ({−1,0,1}² without the origin, arXiv 2509.23667), "grid" (a square of `num_modes` points with
        spacing 1, centred), "random" (uniform in a square of side 4, at least 6 standard deviations apart), or the
        modes' means as an array [modes, dim].
      targets: "corner" or "edge" of the ring; for other layouts, or to choose by hand, indices of modes.
      num_targets: 1 or 2, how many named targets are used; ignored when indices are given.
      target_weight: total weight of the targets in p*, in [0, 1); the other modes share the rest equally. 0 leaves
        nothing to recover.
      variance: variance of every mode along each axis (squared units of x).
      num_modes: number of modes of "grid" (a square number) and "random".
      seed: seed of the random layout.

    Raises:
      ValueError: on an unknown layout or target, a number out of range, or targets whose discs overlap: a draw on both
        would count twice.
    """
    checks.number("variance", variance, above=0)
    checks.number("target_weight", target_weight, least=0, below=1)
    means = _layout_means(layout, num_modes, variance, seed)
    indices = _target_indices(layout, targets, num_targets, means)
    is_target = np.isin(np.arange(len(means)), indices)
    if is_target.all():
        raise ValueError("at least one mode must not be a target")
    _check_apart(means, indices, variance)
    modes = mixture.make(
        np.ones(len(means)), means, np.full(means.shape + means.shape[1:], 0.0) + variance * np.eye(means.shape[1])
    )
    target = Mixture(*(leaf[..., np.flatnonzero(is_target)] for leaf in modes))
    return with_target_weight(Truth(modes, target, jnp.asarray(is_target)), jnp.float32(target_weight))


def with_target_weight(truth: Truth, target_weight: jax.Array) -> Truth:
    """The same truth with another total weight on its targets; the weight may be traced."""
    num_targets = truth.is_target.sum().astype(jnp.float32)
    num_others = truth.is_target.size - num_targets
    per_mode = jnp.where(truth.is_target, target_weight / num_targets, (1.0 - target_weight) / num_others)
    logits = jnp.where(per_mode > 0, jnp.log(jnp.where(per_mode > 0, per_mode, 1.0)), INACTIVE_LOGIT)
    return truth._replace(modes=truth.modes._replace(logits=logits))


def discs(truth: Truth, x: jax.Array) -> jax.Array:
    """Whether each of `x: [dim, n]` lies in each mode's disc, bool[modes, n]."""
    return mixture.mahalanobis(truth.modes, x) < TARGET_RADIUS


def on_target(truth: Truth, x: jax.Array) -> jax.Array:
    """Whether each of `x: [dim, n]` lies in the disc of a target, bool[n]."""
    return (mixture.mahalanobis(truth.target, x) < TARGET_RADIUS).any(axis=0)


def misses_a_mode(truth: Truth, model: Mixture) -> jax.Array:
    """Whether a model merges or misses a mode: one that p* gives weight has no mean of the model within its disc.

    Mass in a disc does not tell: a component that merges two modes lies between them and is wide, and puts enough into
    the discs of both. Components that are off do not count, whatever their means.

    Args:
      truth: p*.
      model: of any number of components; not batched.

    Returns:
      bool[].
    """
    present = mixture.weights(truth.modes) > 0
    held = discs(truth, model.means) & mixture.is_active(model)[None, :]
    return (present & ~held.any(axis=1)).any()


def _check_apart(means: np.ndarray, targets: list[int], variance: float) -> None:
    least = 2 * TARGET_RADIUS * math.sqrt(variance)
    for first, second in itertools.combinations(targets, 2):
        distance = float(np.linalg.norm(means[first] - means[second]))
        if distance < least:
            raise ValueError(
                f"targets {first} and {second} are {distance:g} apart, nearer than {2 * TARGET_RADIUS:g} standard "
                f"deviations ({least:g}): their discs overlap; choose others, or a variance below {variance:g}"
            )


def _layout_means(layout, num_modes, variance, seed) -> np.ndarray:
    if isinstance(layout, str):
        if layout == "ring":
            return np.asarray(_RING, np.float64)
        if layout == "grid":
            side = math.isqrt(max(num_modes, 0))
            if side < 2 or side * side != num_modes:
                raise ValueError(f"num_modes of a grid must be a square number of at least 4, got {num_modes}")
            axis = np.arange(side) - (side - 1) / 2
            return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        if layout == "random":
            return _random_means(num_modes, variance, seed)
        raise ValueError(f"layout must be 'ring', 'grid', 'random' or an array [modes, dim], got {layout!r}")
    means = np.asarray(layout, np.float64)
    if means.ndim != 2 or len(means) < 2 or not np.isfinite(means).all():
        raise ValueError(f"layout as an array must be finite, [modes, dim] with 2 modes or more, got {means.shape}")
    return means


def _random_means(num_modes, variance, seed) -> np.ndarray:
    if num_modes < 2:
        raise ValueError(f"num_modes must be at least 2, got {num_modes}")
    generator = np.random.default_rng(seed)
    apart = 6 * math.sqrt(variance)
    means: list[np.ndarray] = []
    for _ in range(10_000):
        candidate = generator.uniform(-2, 2, 2)
        if all(np.linalg.norm(candidate - mean) >= apart for mean in means):
            means.append(candidate)
        if len(means) == num_modes:
            return np.stack(means)
    raise ValueError(
        f"{num_modes} modes of variance {variance} do not fit 6 standard deviations apart: use fewer, or narrower ones"
    )


def _target_indices(layout, targets, num_targets, means) -> list[int]:
    if isinstance(targets, str):
        if not (isinstance(layout, str) and layout == "ring"):
            raise ValueError(f"targets by name ({targets!r}) are of the ring; give indices of modes for other layouts")
        if targets not in _TARGETS:
            raise ValueError(f"targets must be 'corner', 'edge' or indices of modes, got {targets!r}")
        if num_targets not in (1, 2):
            raise ValueError(f"num_targets must be 1 or 2, got {num_targets}")
        return [_RING.index(point) for point in _TARGETS[targets][:num_targets]]
    indices = [int(index) for index in targets]
    if not indices or len(set(indices)) != len(indices) or not all(0 <= index < len(means) for index in indices):
        raise ValueError(f"targets must be distinct indices below {len(means)}, at least one, got {list(targets)}")
    return indices

"""The reference workload in eager PyTorch, for the throughput benchmark to compare with.

The same algorithm as `reference_workload.run_of`, written as one would for PyTorch: everything vectorised over samples
and components, the policy gradient by autograd, fused Adam. It does not import jax.

As a script it is one process of the comparison: `eager_torch.py PROBLEM` prints "ready" after a run that warms it up;
for every line "SEED RUNS" that it then reads it makes so many runs, one after another, and prints "done".
"""

import json
import math
import sys
from typing import NamedTuple

import numpy as np
import torch


class Mixture(NamedTuple):
    """A Gaussian mixture in the plane, in the parameters of `jaxkd.mixture.Mixture`.

    Attributes:
      logits: [K].
      means: [2, K].
      log_scales: [2, K], logarithms of the diagonal of the Cholesky factor.
      off_diagonals: [1, K], what stands below it.
    """

    logits: torch.Tensor
    means: torch.Tensor
    log_scales: torch.Tensor
    off_diagonals: torch.Tensor


class Problem(NamedTuple):
    """What all runs share: p* and its target, a grid with `inside: [modes, points]`, and the sizes of a run."""

    modes: Mixture
    target: Mixture
    is_target: torch.Tensor
    x: torch.Tensor
    cell: float
    inside: torch.Tensor
    sizes: dict


def load(path) -> Problem:
    """Read a problem that `save` wrote."""
    with np.load(path) as held:
        arrays = {name: torch.from_numpy(held[name]) for name in held.files if name != "sizes"}
        sizes = json.loads(str(held["sizes"]))
    modes, target = (Mixture(*(arrays[f"{name}_{field}"] for field in Mixture._fields)) for name in ("modes", "target"))
    return Problem(modes, target, arrays["is_target"], arrays["x"], float(arrays["cell"]), arrays["inside"], sizes)


def save(path, truth, grid, sizes: dict) -> None:
    """Write a truth and a grid of jaxkd, and the sizes of a run, for `load`."""
    arrays = {
        f"{name}_{field}": np.asarray(getattr(model, field))
        for name, model in (("modes", truth.modes), ("target", truth.target))
        for field in Mixture._fields
    }
    shared = {"is_target": truth.is_target, "x": grid.x, "cell": grid.cell, "inside": grid.inside}
    arrays |= {name: np.asarray(value) for name, value in shared.items()}
    np.savez(path, sizes=json.dumps(sizes), **arrays)


def component_log_densities(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    """log w_k + log N(x; μ_k, Σ_k) for `x: [2, n]`, as [K, n] (nats)."""
    inverse = torch.exp(-mixture.log_scales).unsqueeze(-1)
    residual = x.unsqueeze(1) - mixture.means.unsqueeze(-1)
    first = residual[0] * inverse[0]
    second = (residual[1] - mixture.off_diagonals[0].unsqueeze(-1) * first) * inverse[1]
    constant = torch.log_softmax(mixture.logits, 0) - mixture.log_scales.sum(0) - math.log(2 * math.pi)
    return constant.unsqueeze(-1) - 0.5 * (first * first + second * second)


def log_density(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Log-density of `x: [2, n]`, as [n] (nats)."""
    return torch.logsumexp(component_log_densities(mixture, x), 0)


def sample(mixture: Mixture, generator: torch.Generator, n: int, temperature: float = 1.0) -> torch.Tensor:
    """Draw n points at a temperature on the weights, as [2, n]."""
    weights = torch.softmax(mixture.logits / temperature, 0)
    chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
    noise = torch.randn(2, n, generator=generator)
    draws = mixture.means[:, chosen] + torch.exp(mixture.log_scales)[:, chosen] * noise
    draws[1] += mixture.off_diagonals[0, chosen] * noise[0]
    return draws


def kmeans_plus_plus(generator: torch.Generator, x: torch.Tensor, components: int) -> torch.Tensor:
    """Seeds by k-means++ for `x: [2, n]`, as [2, K]."""
    chance = torch.ones_like(x[0])
    nearest = torch.full_like(x[0], math.inf)
    seeds = []
    for _ in range(components):
        seeds.append(x[:, torch.multinomial(chance, 1, generator=generator)])
        nearest = torch.minimum(nearest, ((x - seeds[-1]) ** 2).sum(0))
        chance = nearest.clamp_min(1e-30)
    return torch.cat(seeds, 1)


def maximise(x: torch.Tensor, responsibilities: torch.Tensor, floor: float) -> Mixture:
    """The M step for `x: [2, n]` and `responsibilities: [K, n]` that sum to 1/n over components."""
    mass = responsibilities.sum(1)
    products = torch.stack([x[0], x[1], x[0] * x[0], x[1] * x[0], x[1] * x[1]])
    moments = products @ responsibilities.T / mass
    means = moments[:2]
    variance0 = moments[2] - means[0] ** 2 + floor
    variance1 = moments[4] - means[1] ** 2 + floor
    scale = torch.sqrt(variance0)
    below = (moments[3] - means[0] * means[1]) / scale
    log_scales = torch.stack([torch.log(scale), 0.5 * torch.log(variance1 - below * below)])
    return Mixture(torch.log(mass), means, log_scales, below.unsqueeze(0))


def em_step(mixture: Mixture, x: torch.Tensor, floor: float) -> Mixture:
    """One iteration of EM on `x: [2, n]`."""
    joint = component_log_densities(mixture, x)
    return maximise(x, torch.softmax(joint, 0) / x.shape[1], floor)


@torch.no_grad()
def fit(generator: torch.Generator, x: torch.Tensor, sizes: dict) -> Mixture:
    """Fit a mixture to `x: [2, n]` by EM from one k-means++ start."""
    seeds = kmeans_plus_plus(generator, x, sizes["components"])
    nearest = torch.cdist(x.T, seeds.T).argmin(1)
    responsibilities = torch.nn.functional.one_hot(nearest, sizes["components"]).T.to(x.dtype) / x.shape[1]
    mixture = maximise(x, responsibilities, sizes["covariance_floor"])
    for _ in range(sizes["iterations"]):
        mixture = em_step(mixture, x, sizes["covariance_floor"])
    return mixture


def policy_gradient_loss(
    policy: Mixture, reference: Mixture, target: Mixture, x: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """REINFORCE with a leave-one-out baseline and the KL penalty in the reward, for draws `x: [2, n]` of the policy."""
    log_prob = log_density(policy, x)
    with torch.no_grad():
        rewards = torch.exp(log_density(target, x)) - kl_coef * (log_prob - log_density(reference, x))
        advantages = (rewards - rewards.mean()) * (x.shape[1] / (x.shape[1] - 1))
    return -(advantages * log_prob).mean()


class Alignment:
    """Adam on a half-cosine schedule, from a start that is also the reference."""

    def __init__(self, start: Mixture, target: Mixture, sizes: dict):
        self.policy = Mixture(*(leaf.clone().requires_grad_() for leaf in start))
        self._reference, self._target, self._sizes, self._taken = start, target, sizes, 0
        self._optimizer = torch.optim.Adam(self.policy, lr=sizes["learning_rate"], fused=True)

    def step(self, x: torch.Tensor) -> None:
        """Update the policy once on draws `x: [2, n]` of it."""
        rate = 0.5 * self._sizes["learning_rate"] * (1 + math.cos(math.pi * self._taken / self._sizes["steps"]))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        policy_gradient_loss(self.policy, self._reference, self._target, x, self._sizes["kl_coef"]).backward()
        self._optimizer.step()
        self._taken += 1


def align(generator: torch.Generator, start: Mixture, target: Mixture, sizes: dict) -> Mixture:
    """Align a policy, held to where it starts."""
    alignment = Alignment(start, target, sizes)
    for _ in range(sizes["steps"]):
        with torch.no_grad():
            x = sample(alignment.policy, generator, sizes["samples"])
        alignment.step(x)
    return Mixture(*(leaf.detach() for leaf in alignment.policy))


def _weighted_sum(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight > 0, values * weight, 0.0).sum()


@torch.no_grad()
def measure(problem: Problem, base: Mixture, models: list[Mixture], kl_coef: float) -> list[dict[str, float]]:
    """The scalars of `jaxkd.metrics.Metrics` on the grid, for every model held to the base."""
    x, inside, is_target = problem.x, problem.inside, problem.is_target
    log_truth, log_target, log_base = (log_density(model, x) for model in (problem.modes, problem.target, base))
    reward = torch.exp(log_target)
    truth_weight, target_weight = torch.exp(log_truth) * problem.cell, torch.exp(log_target) * problem.cell
    on_target = inside[is_target].sum(0)
    apart = ((x.unsqueeze(1) - problem.target.means.unsqueeze(-1)) ** 2).sum(0).min(0).values
    weights = torch.softmax(problem.modes.logits, 0)
    # A disc of Mahalanobis radius 3 in the plane.
    covered_mass = 0.1 * (1 - math.exp(-4.5)) * weights
    mode_variance = torch.exp(2 * problem.modes.log_scales).mean()
    measured = []
    for model in models:
        log_policy = log_density(model, x)
        weight = torch.exp(log_policy) * problem.cell
        mode_mass = inside @ weight
        kl = _weighted_sum(log_policy - log_base, weight)
        mean_reward, target_mass = _weighted_sum(reward, weight), _weighted_sum(on_target, weight)
        within = (log_policy >= log_truth - math.log(10.0)).to(x.dtype)
        quantities = {
            "reward": mean_reward,
            "objective": mean_reward - kl_coef * kl,
            "precision": _weighted_sum(log_truth, weight),
            "recall": _weighted_sum(log_policy, truth_weight),
            "target_precision": _weighted_sum(log_target, weight),
            "target_recall": _weighted_sum(log_policy, target_weight),
            "target_mass": target_mass,
            "target_balance": mode_mass[is_target].min() / mode_mass[is_target].max(),
            "coverage": ((mode_mass >= covered_mass) & (weights > 0)).sum() / (weights > 0).sum(),
            "bounded_recall": _weighted_sum(within, truth_weight),
            "kl_to_base": kl,
            "kl_to_reference": kl,
            "target_variance": _weighted_sum(apart, weight * on_target) / target_mass / 2 / mode_variance,
        }
        measured.append({name: float(value) for name, value in quantities.items()})
    return measured


def run(problem: Problem, seed: int) -> list[dict[str, float]]:
    """One run: the metrics of base, student, aligned base, KD→Align and Align→KD."""
    sizes, generator = problem.sizes, torch.Generator().manual_seed(seed)

    def distilled(teacher, temperature):
        return fit(generator, sample(teacher, generator, sizes["points"], temperature), sizes)

    base = distilled(problem.modes, 1.0)
    student = distilled(base, sizes["temperature"])
    aligned_base = align(generator, base, problem.target, sizes)
    kd_align = align(generator, student, problem.target, sizes)
    align_kd = distilled(aligned_base, 1.0)
    return measure(problem, base, [base, student, aligned_base, kd_align, align_kd], sizes["kl_coef"])


def main(path: str) -> None:
    """Serve runs to the benchmark until its end of the pipe is closed."""
    torch.set_num_threads(1)
    problem = load(path)
    run(problem, 0)
    print("ready", flush=True)
    for line in sys.stdin:
        seed, runs = map(int, line.split())
        for i in range(runs):
            run(problem, seed + i)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained is A and B of W + (α / r) A B, and W stays as it is.

Axes: L layers, I a kernel's inputs, O its outputs, r the rank. A kernel with its inputs or outputs on several axes is
adapted as the matrix [I, O] that it is. Queries, keys and values are one kernel here, and so are gate and up: what is
one kernel shares one A, where implementations that keep them apart give each its own.

Merged, not beside. The forward pass merges A and B into the kernel and runs the network on that. A merge costs 2 I O r
operations a kernel, two more products cost 2 (I + O) r a token, so that from I O / (I + O) tokens on, 288 to 485 in a
layer of SmolLM2-135M, the merge is the cheaper, and it needs no second network: what is trained is what is
exported. The price is paid in memory and on the way back. The merged kernels and the gradients toward them are each
as large as the kernels, for a while, and the product that makes those gradients is a third of a training step's; a
network that kept A and B beside the kernel would do without. What is saved for good is the optimizer's state, twice the
weights. Six layers of SmolLM2-135M, 512 tokens, two CPU cores: a gradient took 1.31 s where all weights' took 1.16 s,
and with weights, gradients and Adam's state 0.37 GB where training all weights took 0.44 GB.

Frozen weights travel with the draws. An alignment step differentiates with respect to all the parameters it is given,
so W must not be among them, and closed over it would be a constant of the compiled program. Of the draws, only the
policy looks inside: `WithFrozen` is draws that carry W.

    adapted = adapt(policy, lora)
    adapters = init(lora, config, key)
    held = reference(adapters)  # before the first step, to which the adapters are donated
    state = State(adapters, optimizer.init(adapters))
    step = jax.jit(make_step(adapted, optimizer, settings, of_draws(reward), of_draws(on_target)), donate_argnums=0)
    draws = policy.sample(merge(lora, params, state.params), key, n, 1.0)
    state, info = step(state, Inputs(key, held, coefficients, WithFrozen(draws, params)))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkd import checks
from jaxkd.policy import Draws, Params, Policy
from jaxkd.smollm2.config import Config

Adapters = dict[str, dict[str, jax.Array]]
"""By target, `{"a": float32[L, I, r], "b": float32[L, r, O]}`."""

# The part of a layer that each kernel belongs to.
_MODULES = {"qkv": "attention", "out": "attention", "gate_up": "mlp", "down": "mlp"}
TARGETS = tuple(_MODULES)


@dataclass(frozen=True)
class LoRA:
    """Which kernels are adapted, and how.

    Attributes:
      rank: r of every adapter.
      alpha: α; the product of A and B is scaled by α / r, so that another rank wants no other learning rate.
      targets: the kernels, of `TARGETS`.

    Raises:
      ValueError: on a number out of range, or kernels that are not known, none, or named twice.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        checks.whole("rank", self.rank, least=1)
        checks.number("alpha", self.alpha, above=0)
        checks.names("targets", self.targets, TARGETS)

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank

    def num_parameters(self, config: Config) -> int:
        """Number of trainable parameters: L r Σ (I + O) over the kernels."""
        widths = _widths(config)
        return config.num_layers * self.rank * sum(sum(widths[target]) for target in self.targets)


def _widths(config: Config) -> dict[str, tuple[int, int]]:
    """(I, O) of each kernel."""
    d, f, n = config.hidden_size, config.intermediate_size, config.head_dim
    h, k = config.num_heads, config.num_kv_heads
    return {"qkv": (d, (h + 2 * k) * n), "out": (h * n, d), "gate_up": (d, 2 * f), "down": (f, d)}


def init(lora: LoRA, config: Config, key: jax.Array) -> Adapters:
    """Fresh adapters: A normal, B zero (section 4.1), so that the policy starts as the base exactly.

    A has a variance of 1 / I: inputs of unit size stay so. A kernel's draw does not depend on which others are adapted.

    Raises:
      ValueError: on a rank that is no longer low: above a kernel's inputs or outputs.
    """
    adapters = {}
    for target in lora.targets:
        inputs, outputs = _widths(config)[target]
        if lora.rank > min(inputs, outputs):
            raise ValueError(f"rank must be at most {min(inputs, outputs)} for {target!r}; got {lora.rank}")
        shape = (config.num_layers, inputs, lora.rank)
        a = jax.random.normal(jax.random.fold_in(key, TARGETS.index(target)), shape, jnp.float32)
        b = jnp.zeros((config.num_layers, lora.rank, outputs), jnp.float32)
        adapters[target] = {"a": a / math.sqrt(inputs), "b": b}
    return adapters


def reference(adapters: Adapters) -> Adapters:
    """Adapters of the same shapes under which the policy is the base: zeros."""
    return jax.tree.map(jnp.zeros_like, adapters)


def merge(lora: LoRA, params: Params, adapters: Adapters) -> Params:
    """The parameters of the adapted model; what is not adapted is passed through, not copied.

    The sum is made in float32 and rounded to the kernel's type. Of kernels kept in bfloat16 that loses changes below
    some 0.2% of a weight, while the adapters themselves lose nothing; keep those that are trained on in float32.

    Args:
      lora: as the adapters were made with.
      params: nested dict as of `Model.init`.
      adapters: see `Adapters`.

    Raises:
      ValueError: on adapters of other kernels or of another rank, or that do not fit the parameters.
    """
    if set(adapters) != set(lora.targets):
        raise ValueError(f"the adapters are those of {', '.join(adapters)}; targets are {', '.join(lora.targets)}")
    layers = {module: dict(kernels) for module, kernels in params["layers"].items()}
    for target, adapter in adapters.items():
        kernels = layers[_MODULES[target]]
        kernels[target] = _merged(lora, target, kernels[target], **adapter)
    return params | {"layers": layers}


def _merged(lora: LoRA, target: str, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """kernel: [L, …] with product of axes I · O, a: float32[L, I, r], b: float32[L, r, O]."""
    (layers, inputs, rank), outputs = a.shape, b.shape[-1]
    if rank != lora.rank:
        raise ValueError(f"the adapter of {target!r} has rank {rank}; rank is {lora.rank}")
    if (layers, inputs * outputs) != (kernel.shape[0], math.prod(kernel.shape[1:])):
        raise ValueError(
            f"the adapter of {target!r} is for {layers} layers of {inputs} × {outputs}; "
            f"the kernel is {list(kernel.shape)}"
        )
    change = lora.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + change.reshape(kernel.shape)).astype(kernel.dtype)


# --- as a policy -----------------------------------------------------------------------------------------------------


class WithFrozen(NamedTuple):
    """Draws of an adapted policy, with the weights that it does not train.

    Rows are taken and laid out over devices before draws are wrapped: the weights have no batch axis.

    Attributes:
      draws: of the policy that is adapted.
      frozen: its parameters.
    """

    draws: Draws
    frozen: Params


def of_draws(function: Callable[[Draws], Any]) -> Callable[[WithFrozen], Any]:
    """A function of draws, such as a reward, as a function of `WithFrozen`."""
    return lambda x: function(x.draws)


def adapt(policy: Policy, lora: LoRA) -> Policy:
    """A language policy with adapters for parameters; its draws are `WithFrozen`.

    It has no `sample`, for the frozen weights come with draws alone: draw from `policy` with merged parameters, which
    are then merged once for all tokens. Nor has it a critic, whose parameters are no kernel's.
    """

    def log_prob(adapters: Adapters, x: WithFrozen) -> jax.Array:
        return policy.log_prob(merge(lora, lax.stop_gradient(x.frozen), adapters), x.draws)

    def sample(adapters: Adapters, key: jax.Array, n: int, temperature: Any) -> WithFrozen:
        raise ValueError("an adapted policy can't sample: sample the policy it adapts, with merged parameters")

    step_mask = None if policy.step_mask is None else of_draws(policy.step_mask)
    return Policy(log_prob, sample, of_draws(policy.num_steps), is_density=policy.is_density, step_mask=step_mask)

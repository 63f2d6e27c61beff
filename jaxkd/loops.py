"""Loops that compile and run fast: what they carry is in memory, and known to differ from run to run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def map_carried(function: Callable[[Any], Any], inputs: Any) -> Any:
    """`lax.map(function, inputs)` with each input carried from the step before.

    A plain map cuts its input out of the stack inside every kernel that reads it, and on CPUs such kernels are not
    vectorised: log-densities on a grid take five times as long.

    Args:
      function: pure function of one input.
      inputs: pytree whose leaves lead with the same axis, not of length 0.

    Returns:
      Results, stacked along a leading axis.
    """

    def step(current, following):
        return following, function(current)

    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    return lax.scan(step, first, jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), inputs))[1]


def per_run(tree: Any, of: Any) -> Any:
    """The same numbers, but under `vmap` the floats among them are each run's own where `of` is.

    A loop that begins with constants and goes on with what depends on the run is batched twice by `vmap`: once to find
    out, once to do it. XLA removes the choice made here, whose two sides are one. Whole numbers stay as they are:
    counters are the same in all runs.
    """
    any_of = jax.tree.leaves(of)[0].ravel()[0]

    def own(leaf):
        return jnp.where(any_of == any_of, leaf, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(own, tree)

"""Runs many independent runs of a pure function in one device call, in cache-sized batches, over all devices."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def use_cpu_cores_as_devices(count: int | None = None) -> None:
    """Make each core of the CPU a device of its own; call it before jax starts. Has no effect on GPUs and TPUs.

    One shard of the run axis a core is faster than one device with a thread pool: the runs' arrays are too small to
    be split inside an operation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))


_QUICK_COMPILE = {"xla_cpu_use_fusion_emitters": False}


class Compiled(NamedTuple):
    """A compiled mapping over runs.

    Attributes:
      call: `(arguments, shared) -> results`, runs leading, on the host.
      seconds: time to trace and compile (s).
    """

    call: Callable[[tuple, tuple], Any]
    seconds: float


def compile_runs(
    function: Callable,
    arguments: tuple,
    shared: tuple = (),
    *,
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
    quick_compile: bool = False,
) -> Compiled:
    """Compile `function` over the leading run axis of its arguments into one device call.

    Each device takes an equal share of the runs and goes through it in batches: the function is vmapped inside a batch
    and mapped over batches. Runs are repeated to fill the last batch and cut off again; no run's result depends on the
    others in its batch.

    Args:
      function: a pure function of one run's arguments, `(*arguments, *shared) -> pytree of arrays`.
      arguments: pytrees whose leaves all lead with the run axis; arrays, or their shapes and types alone.
      shared: pytrees that all runs share. What a function closes over instead becomes a constant of the program, and
        XLA then spends its compile time on folding it.
      batch_size: runs that a device computes at a time.
      on_batch: called on the host whenever a device has finished a batch, for progress; costs no synchronisation.
      quick_compile: compile a third faster to code that runs about a tenth slower, for few runs; CPUs only.

    Raises:
      ValueError: when `batch_size` is below 1 or there are no runs.
    """
    num_runs = jax.tree.leaves(arguments)[0].shape[0]
    if batch_size < 1 or num_runs < 1:
        raise ValueError(f"batch_size and the number of runs must be at least 1, got {batch_size} and {num_runs}")
    devices = jax.local_devices()
    batch_size = min(batch_size, -(-num_runs // len(devices)))
    num_batches = -(-num_runs // (batch_size * len(devices)))
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=(AxisType.Auto,), devices=devices)
    over_runs, everywhere = PartitionSpec(None, "runs"), PartitionSpec()
    filled = np.arange(num_batches * batch_size * len(devices)) % num_runs

    def one_batch(batch, shared):
        results = jax.vmap(lambda *own: function(*own, *shared))(*batch)
        if on_batch is not None:
            # The argument makes the callback wait for the batch.
            jax.debug.callback(lambda _: on_batch(), jax.tree.leaves(results)[0].ravel()[0])
        return results

    def all_batches(batches, shared):
        return lax.map(lambda batch: one_batch(batch, shared), batches)

    sharded = jax.shard_map(
        all_batches, mesh=mesh, in_specs=(over_runs, everywhere), out_specs=over_runs, check_vma=False
    )

    def spread(leaf):
        return leaf[filled].reshape(num_batches, batch_size * len(devices), *leaf.shape[1:])

    def place(arguments, shared):
        spread_out = jax.tree.map(spread, arguments)
        return (
            jax.device_put(spread_out, NamedSharding(mesh, over_runs)),
            jax.device_put(shared, NamedSharding(mesh, everywhere)),
        )

    def shape_of(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda arguments: jax.tree.map(spread, arguments), arguments)
    begin = time.perf_counter()
    compiled = (
        jax.jit(sharded)
        .lower(
            jax.tree.map(lambda leaf: shape_of(leaf, over_runs), shapes),
            jax.tree.map(lambda leaf: shape_of(leaf, everywhere), jax.eval_shape(lambda: shared)),
        )
        .compile(compiler_options=_QUICK_COMPILE if quick_compile and devices[0].platform == "cpu" else None)
    )
    seconds = time.perf_counter() - begin

    def call(arguments, shared=()):
        results = jax.device_get(compiled(*place(arguments, shared)))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_runs], results)

    return Compiled(call, seconds)

"""A small sweep for subprocesses, to be killed, joined by others and weighed; its flags make it slow, heavy or fail."""

import argparse
import errno
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("store", type=Path)
parser.add_argument("--seeds", type=int, default=24)
parser.add_argument("--runs-per-block", type=int, default=6)
parser.add_argument("--chunk", type=int)
parser.add_argument("--devices", type=int)
parser.add_argument("--pause", type=float, default=0.0, help="seconds before every block is written")
parser.add_argument("--pausing", type=int, help="the only process that pauses; by default all")
parser.add_argument("--ballast", type=int, default=0, help="zeros that every run returns beside its numbers")
parser.add_argument("--disk-full-in", type=int, help="the process that cannot write")
parser.add_argument("--seen-within", type=float, help="seconds after which a store that is not seen never will be")
parser.add_argument("--progress", action="store_true")
parser.add_argument("--coordinator")
parser.add_argument("--num-processes", type=int)
parser.add_argument("--process-id", type=int)


def one_run(key, hyperparameters, shift):
    """Draws whose spread is traced, and their mean."""
    import jax

    draws = jax.random.normal(key, (16,)) * hyperparameters["scale"] + shift
    return {"draws": draws, "mean": draws.mean(), "above": (draws > 0).sum()}


def with_ballast(size):
    """The run with `size` zeros more in its results."""
    import jax.numpy as jnp

    return lambda *given: one_run(*given) | {"ballast": jnp.zeros(size, jnp.float32)}


def change_writing(arguments, index):
    """What --pause and --disk-full-in say of this process."""
    import zarr

    from jaxkd.sweep import store

    write_block = store.Store.write_block

    def changed(self, block, values):
        if arguments.pausing in (None, index):
            time.sleep(arguments.pause)
        if arguments.disk_full_in == index:
            zarr.Array.__setitem__ = full
        write_block(self, block, values)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.Store.write_block = changed


def main(arguments):
    """Run the sweep and print peak memory (KiB) as JSON."""
    from jaxkd.cli import exit_on_error
    from jaxkd.sweep import engine, hosts
    from jaxkd.sweep.grid import Grid

    with exit_on_error():
        engine.use_cpu_cores_as_devices(2)
        hosts.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
        import jax
        import jax.numpy as jnp

        change_writing(arguments, jax.process_index())
        if arguments.seen_within is not None:
            engine._SEEN_WITHIN = arguments.seen_within
        grid = Grid({"scale": (0.5, 1.0, 2.0)}, range(arguments.seeds), runs_per_block=arguments.runs_per_block)
        report = engine.run_sweep(
            with_ballast(arguments.ballast) if arguments.ballast else one_run,
            grid,
            arguments.store,
            shared=(jnp.float32(0.25),),
            chunk=arguments.chunk,
            devices=arguments.devices,
            progress=arguments.progress,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {**report._asdict(), "path": str(report.path), "told": str(report), "peak_kib": peak, "pid": os.getpid()}
    print(json.dumps(told), flush=True)


def run(*flags):
    """The command with these flags; warnings are errors."""
    warnings.simplefilter("error")
    main(parser.parse_args([*map(str, flags)]))


if __name__ == "__main__":
    run(*sys.argv[1:])

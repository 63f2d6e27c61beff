"""A small sweep for subprocesses, to be killed, joined by others and weighed; `--pause` slows its writing (s)."""

import argparse
import json
import os
import resource
import time
import warnings
from pathlib import Path

warnings.simplefilter("error")

parser = argparse.ArgumentParser()
parser.add_argument("store", type=Path)
parser.add_argument("--seeds", type=int, default=24)
parser.add_argument("--runs-per-block", type=int, default=6)
parser.add_argument("--chunk", type=int)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--coordinator")
parser.add_argument("--num-processes", type=int)
parser.add_argument("--process-id", type=int)


def one_run(key, hyperparameters, shift):
    """Draws whose spread is traced, and their mean."""
    import jax

    draws = jax.random.normal(key, (16,)) * hyperparameters["scale"] + shift
    return {"draws": draws, "mean": draws.mean(), "above": (draws > 0).sum()}


def main(arguments):
    """Run the sweep and print peak memory (KiB) as JSON."""
    from jaxkd.cli import exit_on_error
    from jaxkd.sweep import engine, hosts, store
    from jaxkd.sweep.grid import Grid

    with exit_on_error():
        engine.use_cpu_cores_as_devices(2)
        hosts.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
        import jax.numpy as jnp

        if arguments.pause:
            write_block = store.Store.write_block

            def slowly(self, block, values):
                time.sleep(arguments.pause)
                write_block(self, block, values)

            store.Store.write_block = slowly
        grid = Grid({"scale": (0.5, 1.0, 2.0)}, range(arguments.seeds), runs_per_block=arguments.runs_per_block)
        report = engine.run_sweep(
            one_run, grid, arguments.store, shared=(jnp.float32(0.25),), chunk=arguments.chunk, progress=False
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {**report._asdict(), "path": str(report.path), "peak_kib": peak, "pid": os.getpid()}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(parser.parse_args())

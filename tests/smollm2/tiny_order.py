"""A whole order on a tiny model: run by tests in processes of their own, which they kill."""

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxkd import durable
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.smollm2 import sharding
from jaxkd.smollm2.evaluate import Evaluation
from jaxkd.smollm2.laboratory import Laboratory
from jaxkd.smollm2.metering import Workshop
from jaxkd.smollm2.network import Layout
from jaxkd.smollm2.order import Order
from jaxkd.smollm2.rows import rows_of
from jaxkd.smollm2.stages import Alignment, Distillation, Optimisation

OPTIMISATION = Optimisation(learning_rate=3e-3, warmup_updates=1, checkpoint_every=2)


def make(**changes) -> Order:
    """Every kind of stage, in seconds."""
    order = Order(
        truth="random:tiny",
        behaviour="digit",
        prompt="T",
        max_new_tokens=8,
        arms=("kd_align", "align_kd"),
        algorithms=("reinforce",),
        temperatures=(0.6,),
        distillation=Distillation("sequence", 16, 8, 6, 8, 2, optimisation=OPTIMISATION),
        alignment=Alignment(
            AlignmentSettings("reinforce", 6, 8, dataset_batches=2), Coefficients(label_temperature=0.1), OPTIMISATION
        ),
        evaluation=Evaluation(16, 8, 8, 8),
        batch_size=8,
    )
    return replace(order, **changes)


def laboratory(order: Order, out: Path, *, meshed: bool = True) -> Laboratory:
    """Nothing is computed yet."""
    layout = Layout(mesh=sharding.mesh_of_all_devices() if meshed else None)
    return Laboratory(order, out, Workshop(durable.Progress(quiet=True)), layout)


def run(order: Order, out: Path, *, meshed: bool = True) -> Laboratory:
    """Everything that is not there yet."""
    made = laboratory(order, out, meshed=meshed)
    made.check_folder()
    made.prepare()
    for row in made.run(rows_of(order, out)):
        print(row.name, flush=True)
    return made


def uneven(params):
    """Fresh parameters find all tokens about as likely; from these there is something to learn."""
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), params)


def die_after(seconds: float) -> None:
    """Kill this process outright, whatever it is doing then."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", sys.argv[2])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if len(sys.argv) > 3:
        die_after(float(sys.argv[3]))
    run(make(seeds=(0, 1)), Path(sys.argv[1]))
    print("all done", flush=True)

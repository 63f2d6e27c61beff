"""Eight simulated devices need a process of their own: their number is fixed when the backend starts."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxkd.smollm2 import sharding
from jaxkd.smollm2.config import Config


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tensor", "both", "data"])
def test_eight_devices_give_the_single_devices_results(case):
    script = Path(__file__).with_name("on_eight_devices.py")
    done = subprocess.run([sys.executable, "-W", "error", script, case], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


def test_a_mesh_that_does_not_divide_the_heads():
    mesh = sharding.make_mesh(model=4, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="'model' of 4 devices does not divide the 2 heads of keys"):
        sharding.param_shardings(Config.tiny(), mesh)


def test_a_mesh_that_is_not_the_devices():
    with pytest.raises(ValueError, match="a mesh of 3 × 2 needs 6 devices; there are 4"):
        sharding.make_mesh(3, 2, devices=jax.devices()[:4])


def test_a_batch_that_is_not_divided():
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="a batch of 6 is not divided"):
        sharding.shard_batch(mesh, jax.numpy.zeros((6, 2)))


def test_on_one_device_nothing_is_cut():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    specs = jax.tree.leaves(sharding.param_shardings(Config.tiny(), mesh))
    assert all(not any(sharding.spec) for sharding in specs)

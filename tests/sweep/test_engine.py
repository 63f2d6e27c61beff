import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import align, mixture
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.sweep.engine import compile_runs
from jaxkd.truth import make_truth

pytestmark = pytest.mark.loose  # optax's Adam does not stand strict dtype promotion

TRUTH = make_truth(target_weight=0.1)
NUM_RUNS = 6
TRACES = []


def one_run(key, capacity, learning_rate, truth):
    """A run in small: draws, EM with a traced capacity, alignment."""
    TRACES.append(0)
    x = mixture.sample(truth.modes, key, 128)
    fitted = mixture.fit(key, x, 4, capacity, starts=2, iterations=8, covariance_floor=1e-3)
    coefficients = Coefficients(*map(jnp.float32, Coefficients()))._replace(learning_rate=learning_rate)
    reward = lambda x: mixture.log_density(truth.target, x)  # noqa: E731
    settings = AlignmentSettings("reinforce", 4, 32)
    model, record = align.align(mixture.policy, key, fitted.mixture, fitted.mixture, reward, coefficients, settings)
    return model, record, fitted.log_likelihood


ARGUMENTS = (
    jax.random.split(jax.random.key(0), NUM_RUNS),
    jnp.arange(NUM_RUNS) % 4 + 1,
    jnp.linspace(0.001, 0.02, NUM_RUNS),
)


@pytest.fixture(scope="module")
def by_vmap():
    return jax.device_get(jax.jit(jax.vmap(one_run, in_axes=(0, 0, 0, None)))(*ARGUMENTS, TRUTH))


def assert_close(results, expected, runs=slice(None)):
    for got, want in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got[runs], want[runs], rtol=2e-4, atol=2e-4)


def leaves_equal(first, second):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_neither_batch_size_nor_device_count_matters(by_vmap):
    # Two batches of two on each of two devices, the last of them not full.
    devices = jax.local_devices()[:2]
    assert len(devices) == 2 < len(jax.local_devices())
    TRACES.clear()
    compiled = compile_runs(one_run, ARGUMENTS, (TRUTH,), batch_size=2, devices=devices)
    results = compiled.call(ARGUMENTS, (TRUTH,))
    assert len(TRACES) == 1
    assert_close(results, by_vmap)
    assert leaves_equal(results, compiled.call(ARGUMENTS, (TRUTH,)))
    # At the same batch size and device count a run is bit-equal wherever it stands and whoever is beside it.
    backwards = compiled.call(jax.tree.map(lambda leaf: leaf[::-1], ARGUMENTS), (TRUTH,))
    assert leaves_equal(results, jax.tree.map(lambda leaf: leaf[::-1], backwards))
    # A run that goes bad stays one run.
    struck = compiled.call((*ARGUMENTS[:2], ARGUMENTS[2].at[3].set(jnp.nan)), (TRUTH,))
    assert struck[1].failed.tolist() == [False] * 3 + [True] + [False] * 2
    others = np.arange(NUM_RUNS) != 3
    assert leaves_equal(*(jax.tree.map(lambda leaf: leaf[others], part) for part in (results, struck)))


@pytest.mark.parametrize("num_runs", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_results_come_back_in_order_whatever_does_not_divide(num_runs, batch_size):
    arguments = (jnp.arange(num_runs, dtype=jnp.float32), {"b": jnp.arange(2.0 * num_runs).reshape(num_runs, 2)})
    shared = (jnp.float32(10),)
    compiled = compile_runs(lambda a, b, shared: (a + shared, b["b"] * 2), arguments, shared, batch_size=batch_size)
    sums, doubles = compiled.call(arguments, shared)
    np.testing.assert_array_equal(sums, np.arange(num_runs) + 10)
    np.testing.assert_array_equal(doubles, 2 * np.arange(2.0 * num_runs).reshape(num_runs, 2))
    assert isinstance(sums, np.ndarray)
    # Other values go through the same executable, the shared ones too.
    np.testing.assert_array_equal(compiled.call(arguments, (jnp.float32(0),))[0], np.arange(num_runs))
    np.testing.assert_array_equal(compiled.call(jax.tree.map(lambda leaf: leaf + 1, arguments), shared)[0], sums + 1)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size and the number of runs must be at least 1"):
        compile_runs(lambda a: a, (jnp.zeros(3),), batch_size=batch_size)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 1 and 0"):
        compile_runs(lambda a: a, (jnp.zeros((0, 2)),), batch_size=1)


@pytest.mark.slow
def test_cores_become_devices_before_jax_starts():
    code = (
        "import jax; from jaxkd.sweep.engine import use_cpu_cores_as_devices as use; use(3); "
        "print(len(jax.local_devices()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "3"

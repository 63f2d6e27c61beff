"""Digests of traces: equal where the numbers are, in any process, and different where they are not."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.sweep import trace

KEY = jax.random.key(0)
TABLE = np.arange(4, dtype=np.float32)


def function(power=2, table=TABLE, limit=8, activation=jax.nn.relu, draw=jax.random.normal, scale=0.5):
    """Derivatives, loops, branches, a callback and constants."""

    def of_one(key, x):
        def summed(carry, i):
            return carry + jnp.sin(x) * i, activation(carry)

        total, kept = jax.lax.scan(summed, x, jnp.arange(limit, dtype=jnp.float32))
        # The derivative of a sum is spread over what was summed, and its operation names the devices.
        slope = jax.grad(lambda y: (jax.nn.gelu(y * jnp.asarray(TABLE)) ** power).sum())(x * scale)
        chosen = jax.lax.cond(x > 0, lambda: total, lambda: slope)
        seen = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), chosen)
        return seen, kept.sum(), draw(key, (3,)) + jnp.asarray(table).sum(), jnp.sort(jnp.linalg.qr(jnp.eye(3) * x)[0])

    return of_one


def digest(of_one):
    return trace.digest(jax.make_jaxpr(of_one)(KEY, jnp.float32(1)))


def test_the_same_computation_has_the_same_digest_however_it_is_written():
    @jax.jit
    def otherwise(of_key, value):
        return function()(of_key, value)  # under other names

    traced = jax.make_jaxpr(otherwise)(KEY, jnp.float32(1))
    assert trace.digest(traced.jaxpr.eqns[-1].params["jaxpr"]) == digest(function()) == digest(function())


def test_names_are_no_part_of_a_digest():
    @jax.jit
    def one(x):
        return x * 2

    @jax.jit
    def other(x):
        return x * 2

    assert digest(function(activation=one)) == digest(function(activation=other))


def test_where_a_function_is_traced_for_is_no_part_of_its_digest():
    def over(devices):
        mesh = jax.make_mesh(
            (devices,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
        )
        spec = jax.sharding.PartitionSpec("runs")
        mapped = jax.shard_map(
            lambda x: jnp.broadcast_to(function()(KEY, x[0])[1], (1,)),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        traced = jax.make_jaxpr(mapped)(jnp.ones(devices))
        return trace.digest(traced.jaxpr.eqns[-1].params["jaxpr"], traced.consts)

    assert len({over(1), over(2), over(4)}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"power": 3},
        {"table": TABLE + np.float32(1e-6)},
        {"table": TABLE.astype(np.int32).astype(np.float32)[::-1].copy()},
        {"limit": 9},
        {"activation": jnp.tanh},
        {"draw": jax.random.uniform},
        {"scale": 0.25},
    ],
)
def test_another_computation_has_another_digest(changes):
    assert digest(function(**changes)) != digest(function())


def test_several_digests_are_one_in_any_order():
    assert trace.digest_of_all("ab") == trace.digest_of_all("bab") != trace.digest_of_all("abc")


def test_arrays_come_to_the_host_in_types_of_numpy():
    assert trace.as_numpy(jnp.asarray(1.5, jnp.bfloat16)) == np.float32(1.5)
    np.testing.assert_array_equal(trace.as_numpy(jax.random.key(3)), [0, 3])
    assert trace.as_numpy(True).dtype == bool


@pytest.mark.slow
def test_a_digest_is_the_same_in_another_process(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    code = "from test_trace import digest, function; print(digest(function()))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == digest(function())

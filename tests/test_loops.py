import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkd import loops


@pytest.mark.parametrize("length", [1, 5])
def test_a_carried_map_is_a_map(length):
    inputs = {"rows": jnp.arange(3.0 * length).reshape(length, 3), "numbers": jnp.arange(length)}

    def function(each):
        return each["rows"].sum(), each["numbers"] + 1

    for expected, got in zip(lax.map(function, inputs), loops.map_carried(function, inputs), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_a_loop_carries_is_each_runs_own_from_the_start():
    """Under vmap the body is batched once, and numbers stay what they are whatever they depend on."""
    carried = {"sum": jnp.float32(2), "count": jnp.int32(3)}
    own = jax.vmap(lambda x: loops.per_run(carried, x), out_axes={"sum": 0, "count": None})
    got = own(jnp.array([1.0, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(got["sum"], [2, 2, 2])
    assert got["count"] == 3

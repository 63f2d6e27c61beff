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

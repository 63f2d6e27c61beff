"""What every loss asks of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np


def require(condition: bool | jax.Array, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds everywhere.

    Inside jit and vmap a condition on values is a tracer: nothing is known about it, so nothing is checked.
    """
    if not isinstance(condition, jax.core.Tracer) and not np.all(condition):
        raise ValueError(message)


def require_same_shape(**arrays: jax.Array) -> None:
    """Raise `ValueError` unless all arrays agree in shape: broadcasting would pair every example with every other."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    require(len(set(shapes.values())) == 1, f"these must agree in shape: {shapes}")


def require_boolean(**arrays: jax.Array) -> None:
    """Raise `ValueError` unless all arrays are boolean: labels of −1 and +1 would both count as true."""
    for name, array in arrays.items():
        require(array.dtype == bool, f"{name} must be boolean, got {array.dtype}")

"""Parameters for tests, drawn by numpy: `Model.init` would have to be compiled for every shape."""

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, seed=0, embedding=0.02, kernels=0.2):
    """Normal with the given deviations, norms of one; kernels ten times fresh ones, so attention is not uniform."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        if name == "scale":
            return jnp.ones(shape.shape, shape.dtype)
        scale = embedding if name in ("embedding", "head") else kernels
        return jnp.asarray(scale * random.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes())

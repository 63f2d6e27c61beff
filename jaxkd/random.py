"""Keys and uniforms from jax's own generator, written out so that they compile to few kernels and run fast.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as elementwise
operations. On CPUs jax's own is a loop over rounds: slower to run by half, and thirty kernels to compile a call, where
a program of the laboratory makes ten calls. Every number is the one that jax would give; tests hold them against it.
"""

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATION = "threefry2x32"
"""jax's name of the generator: keys are made with it whatever `jax_default_prng_impl` says."""

_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hash pairs of counters, uint32 of any one shape, under a key; both words of each pair."""
    # The first two words of a key of jax's "rbg" are those of threefry's, after split and fold_in too.
    first_key, second_key, *_ = jax.random.key_data(key)
    keys = (first_key, second_key, first_key ^ second_key ^ jnp.uint32(0x1BD11BDA))
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        for turn in _TURNS[block % 2]:
            first = first + second
            turned = lax.shift_left(second, jnp.uint32(turn)) | lax.shift_right_logical(second, jnp.uint32(32 - turn))
            second = first ^ turned
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    # Without the barrier XLA would hash anew inside every consumer.
    return lax.optimization_barrier((first, second))


def keys(key: jax.Array, count: int) -> jax.Array:
    """The keys `jax.random.fold_in(key, i)` for i below `count`: the first do not depend on how many follow."""
    number = lax.iota(jnp.uint32, count)
    words = jnp.stack(_threefry(key, jnp.zeros_like(number), number), axis=1)
    return jax.random.wrap_key_data(words, impl=IMPLEMENTATION)


def words(key: jax.Array, rows: int, n: int) -> jax.Array:
    """Random words, uint32[rows, n], that depend on the key and on rows · n alone.

    Where rows · n is even they are those of `jax.random.bits` in its counter layout that is not partitionable, which
    spends half the hashes of the other.
    """
    half = -(-rows * n // 2)
    counter = lax.iota(jnp.uint32, 2 * half)
    return jnp.concatenate(_threefry(key, counter[:half], counter[half:]))[: rows * n].reshape(rows, n)


def uniforms(key: jax.Array, rows: int, n: int) -> jax.Array:
    """Uniforms on [0, 1) with 23 random bits each, float32[rows, n]; as `words`."""
    bits = lax.optimization_barrier(words(key, rows, n))
    mantissa = lax.shift_right_logical(bits, jnp.uint32(9)) | jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0

"""SmolLM2's network: NNX modules, split once into a graph and parameters, then pure functions of the parameters.

Axes: B sequences, T positions, D width, F width inside the MLP, V vocabulary, L layers, H query heads of width N, K
heads of keys and values, each serving G = H / K query heads.

Types. Parameters have the type they were loaded with. Activations are float32; the operands of every product with a
weight are cast to the compute type, and the product accumulates in float32. On CPU this is faster than a graph that is
bfloat16 throughout, and it keeps the residual stream exact.

Layout. Queries, keys and values of a layer are one product, and so are the MLP's gate and up projections. Their kernels
keep an axis (K, or F) along which tensor parallelism can cut them without separating what belongs to one head.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkd import checks
from jaxkd.policy import Params
from jaxkd.smollm2.config import Config

Remat = Literal["none", "products", "layers"]
REMAT = ("none", "products", "layers")
COMPUTE_DTYPES = ("float32", "bfloat16")

# Axes of a mesh of devices; `sharding` says what they cut.
DATA, MODEL = "data", "model"


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, float32[B, T, 1, N / 2]; B is 1 where all sequences share positions."""

    cos: jax.Array
    sin: jax.Array


Attend = Callable[..., tuple[jax.Array, Any]]
"""`(q: [B, T, H, N], k: [B, T, K, N], v: [B, T, K, N], cache) -> ([B, T, H, N], what to keep)`: mixes positions."""


# --- products --------------------------------------------------------------------------------------------------------


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, keeps_bits: bool = False) -> jax.Array:
    """x: float32[…, I] times kernel: [I, …] in the given type, accumulated in float32, as float32[…, outputs].

    The kernel may have its inputs or its outputs on several axes. It is flattened inside, so that what the backward
    pass keeps is the kernel itself: flattened outside, a scan over layers would keep a copy of all weights.

    Args:
      x: left operand.
      kernel: right operand.
      dtype: in which they are multiplied.
      keeps_bits: whether the backward pass is given the bits of a bfloat16 x as it was multiplied, and not x itself; it
        can't be differentiated again then.
    """
    y = _product(x.reshape(-1, x.shape[-1]), kernel, jnp.dtype(dtype), keeps_bits)
    return y.reshape(*x.shape[:-1], y.shape[-1])


_OPERAND = "jaxkd.operand"
"""The name by which a policy for `jax.checkpoint` keeps those bits."""


def _plain_product(x, kernel, dtype, keeps_bits=False):
    kernel = kernel.reshape(x.shape[-1], -1)
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def transposed(matrix: jax.Array) -> jax.Array:
    """The transpose of a matrix as an operand of a product; on a CPU it lies in memory as one.

    XLA would read across, which costs its CPU's product up to a third, and twice the time in bfloat16: its fast product
    takes no operand that was ever marked as lying across. A transpose is, behind a barrier or not, unless flattened.
    """
    return lax.platform_dependent(matrix, cpu=_lying_transposed, default=jnp.transpose)


def _lying_transposed(matrix: jax.Array) -> jax.Array:
    if matrix.dtype == jnp.bfloat16:
        # As whole numbers: XLA's CPU moves these in two thirds of the time, for a matrix as large as the head.
        return lax.bitcast_convert_type(_lying_transposed(lax.bitcast_convert_type(matrix, jnp.uint16)), jnp.bfloat16)
    return lax.optimization_barrier(matrix.T.reshape(-1)).reshape(matrix.shape[::-1])


# Bits have no derivative.
transposed.defvjp(lambda matrix: (transposed(matrix), None), lambda _, cotangent: (transposed(cotangent),))


def turned(matrix: jax.Array) -> jax.Array:
    """A transpose that is read but once: worth moving for bfloat16's fast product alone."""
    return transposed(matrix) if matrix.dtype == jnp.bfloat16 else matrix.T


_product = jax.custom_vjp(_plain_product, nondiff_argnums=(2, 3))


def _product_forward(x, kernel, dtype, keeps_bits):
    kept = x
    if keeps_bits:
        # As whole numbers: a loop over layers would stack bfloat16 in float32.
        kept = checkpoint_name(lax.bitcast_convert_type(x.astype(dtype), jnp.uint16), _OPERAND)
    return _plain_product(x, kernel, dtype), (kept, kernel)


def _product_backward(dtype, keeps_bits, residuals, cotangent):
    x, kernel = residuals
    if keeps_bits:
        x = lax.bitcast_convert_type(x, dtype)
    cotangent = cotangent.astype(dtype)
    flat = kernel.reshape(x.shape[-1], -1)
    toward_x = jnp.matmul(cotangent, turned(flat.astype(dtype)), preferred_element_type=jnp.float32)
    toward_kernel = jnp.matmul(transposed(x.astype(dtype)), cotangent, preferred_element_type=jnp.float32)
    return toward_x, toward_kernel.astype(kernel.dtype).reshape(kernel.shape)


_product.defvjp(_product_forward, _product_backward)


def product_by_rows(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`product` with a kernel that lies by its outputs, [O, I], for few rows of x: the weights are the left operand.

    As the right one, a CPU's product packs all of them anew: at 8 and 32 rows that takes up to half as long again.
    """
    return by_outputs(x.reshape(-1, x.shape[-1]), kernel, dtype).T.reshape(*x.shape[:-1], -1)


def by_outputs(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, inputs: int = 1) -> jax.Array:
    """x: float32[B, I] times kernel: [O, I], as float32[O, B]; x: float32[I, B] where `inputs`, their axis, is 0."""
    over_inputs = (((1,), (inputs,)), ((), ()))
    y = lax.dot_general(kernel.astype(dtype), x.astype(dtype), over_inputs, preferred_element_type=jnp.float32)
    # XLA would swap the operands of a product whose transpose is asked for; elsewhere it may.
    return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)


_INPUTS = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}
"""How many leading axes of each kernel are its inputs."""

BY_ROWS = {"few": tuple(_INPUTS), "one": ("down",)}
"""Kernels that lie by their outputs when decoding few sequences, or one: then by measurement, for a CPU's products of a
matrix and a vector are fastest along the longer side."""


@dataclass(frozen=True)
class Products:
    """Products with a layer's weights.

    Attributes:
      dtype: type of the operands.
      by_rows: names of kernels that are [O, I] (`product_by_rows`), and not inputs before outputs.
    """

    dtype: jnp.dtype
    by_rows: tuple[str, ...] = ()

    def __call__(self, x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
        """x: float32[…, I] times the module's kernel of that name, float32[…, O].

        Raises:
          ValueError: on a kernel that lies otherwise than `by_rows` says.
        """
        kernel = getattr(module, name)[...]
        if name in self.by_rows:
            return product_by_rows(x, kernel, self.dtype)
        if math.prod(kernel.shape[: _INPUTS[name]]) != x.shape[-1]:
            raise ValueError(f"{name} must have {x.shape[-1]} inputs in front; got {list(kernel.shape)}: by rows?")
        # What the MLP's second product takes would be computed again from numbers that lie far apart, where the
        # backward pass wants it transposed.
        return product(x, kernel, self.dtype, keeps_bits=name == "down" and self.dtype == jnp.bfloat16)


# --- modules ---------------------------------------------------------------------------------------------------------


def _normal(config: Config, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x²) + ε) · scale for `x: float32[B, T, D]`, in float32."""
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + epsilon) * scale.astype(jnp.float32).reshape(1, 1, -1)


class RMSNorm(nnx.Module):
    """`rms_norm` with a scale of its own."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float32[B, T, D]."""
        return rms_norm(x, self.scale[...], self.epsilon)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings; how positions are mixed is the caller's."""

    def __init__(self, config: Config, multiply: Products, rngs: nnx.Rngs):
        d, k, g, n = config.hidden_size, config.num_kv_heads, config.queries_per_kv_head, config.head_dim
        # For each head of keys: its G query heads, then its keys, then its values.
        self.qkv = _normal(config, rngs, d, k, g + 2, n)
        self.out = _normal(config, rngs, k, g, n, d)
        self.heads, self.multiply = (k, g, n), multiply

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Callable) -> tuple[jax.Array, Any]:
        """x: float32[B, T, D]."""
        b, t, _ = x.shape
        k, g, n = self.heads
        qkv = self.multiply(x, self, "qkv").reshape(b, t, k, g + 2, n)
        q = qkv[..., :g, :].reshape(b, t, k * g, n)
        mixed, kept = attend(rotate(q, rotation), rotate(qkv[..., g, :], rotation), qkv[..., g + 1, :])
        return self.multiply(mixed.reshape(b, t, -1), self, "out"), kept


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: Config, multiply: Products, rngs: nnx.Rngs):
        self.gate_up = _normal(config, rngs, config.hidden_size, 2, config.intermediate_size)
        self.down = _normal(config, rngs, config.intermediate_size, config.hidden_size)
        self.multiply = multiply

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float32[B, T, D]."""
        if "gate_up" in self.multiply.by_rows:
            return self._by_features(x)
        gate, up = jnp.split(self.multiply(x, self, "gate_up"), 2, axis=-1)
        return self.multiply(jax.nn.silu(gate) * up, self, "down")

    def _by_features(self, x: jax.Array) -> jax.Array:
        """The same with features leading throughout, as products by rows leave them: nothing is turned in between."""
        dtype = self.multiply.dtype
        gate, up = jnp.split(by_outputs(x.reshape(-1, x.shape[-1]), self.gate_up[...], dtype), 2)
        return by_outputs(jax.nn.silu(gate) * up, self.down[...], dtype, inputs=0).T.reshape(x.shape)


class Layer(nnx.Module):
    """One layer of the decoder: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, multiply: Products, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, multiply, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, multiply, rngs)

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Callable) -> tuple[jax.Array, Any]:
        """x: float32[B, T, D]; returns it after the layer, and what `attend` keeps."""
        mixed, kept = self.attention(self.attention_norm(x), rotation, attend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kept


_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(_OPERAND),
)


class Decoder(nnx.Module):
    """The whole network. `layers` holds every layer's parameters stacked on a leading axis L."""

    def __init__(self, config: Config, multiply: Products, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, multiply, rngs)

        self.embedding = _normal(config, rngs, config.vocab_size, config.hidden_size)
        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = _normal(config, rngs, config.vocab_size, config.hidden_size)


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def rotation_at(config: Config, positions: jax.Array) -> Rotation:
    """The rotation of `positions: int32[B, T]`; angles are float32 whatever else is not, for they grow to thousands."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies.reshape(1, 1, 1, -1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn `x: [B, T, heads, N]`; the halves of N are the two coordinates of each pair, as in transformers."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def positions_of(mask: jax.Array) -> jax.Array:
    """Positions of `mask: bool[B, T]`, counted over tokens alone, so that padding on either side changes nothing."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


@lru_cache
def _layer_graph(config: Config, multiply: Products) -> nnx.GraphDef:
    """The graph of one layer: with a slice of the parameters of `layers` it is a `Layer`."""
    return nnx.split(nnx.eval_shape(lambda: Layer(config, multiply, nnx.Rngs(params=0))))[0]


# --- the model as pure functions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """SmolLM2 as pure functions over a pytree of parameters.

    Attributes:
      config: its shape.
      graphdef: the graph of the NNX modules; `nnx.merge(graphdef, params)` is the `Decoder`.
      compute_dtype: type of the operands of products with weights.
      unroll: layers one after another in the compiled program rather than a scan: slower to compile, faster to run.
      remat: what the backward pass computes again instead of keeping: "none", "products" (all but the products with
        weights, and in bfloat16 what the MLP's second one takes: half the memory, and no slower where memory is what
        is slow) or "layers" (all but each layer's input).
      mesh: devices that batches and parameters are laid out over; weights are then gathered layer by layer to where the
        sequences are. None on one device.
    """

    config: Config
    graphdef: nnx.GraphDef
    compute_dtype: jnp.dtype
    unroll: bool = False
    remat: Remat = "products"
    mesh: Mesh | None = None

    @partial(jax.jit, static_argnums=0)
    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, a nested dict of arrays."""
        rngs = nnx.Rngs(params=key)
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, Products(jnp.dtype(jnp.float32)), rngs), nnx.Param))

    def shapes(self, dtype=jnp.float32) -> Params:
        """The pytree of parameters as shapes with this dtype, without making any."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)

    def hidden(self, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The residual stream after the last norm.

        Args:
          params: as `init` makes them or `weights.load` reads them.
          tokens: int32[B, T].
          mask: bool[B, T], True at tokens; padding may be on either side. None where nothing is padding.

        Returns:
          float32[B, T, D]; at padding, numbers without meaning.

        Raises:
          ValueError: on shapes or types that do not fit, or more positions than the model has; those of a mask that is
            traced or spread over hosts are not counted.
        """
        _check(self.config, tokens, mask)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] if mask is None else positions_of(mask)

        def attend(q, k, v, cache):
            allowed = None if mask is None else mask[:, None, None, :]
            return jax.nn.dot_product_attention(q, k, v, mask=allowed, is_causal=True), None

        if mask is not None:
            # An id that is not in the vocabulary embeds as NaN, which a weight of 0 does not take out of a sum.
            tokens = jnp.where(mask, tokens, 0)
        return self.apply(params, tokens, rotation_at(self.config, positions), attend)[0]

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        rotation: Rotation,
        attend: Attend,
        caches: Any = None,
        by_rows: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any]:
        """Embed, run the layers, norm: `hidden` with the mixing of positions left to the caller.

        Args:
          params: as for `hidden`; or as `unstacked` makes them.
          tokens: int32[B, T].
          rotation: of each token's position, [B, T] or [1, T] of them.
          attend: mixes positions.
          caches: what each layer's `attend` is given beside q, k and v: a pytree with leading axis L, or a list of L
            where the parameters are unstacked.
          by_rows: kernels that `unstacked` laid by their outputs.

        Returns:
          float32[B, T, D], and what `attend` returned beside its result: stacked over layers, or a list of L.
        """
        x = self.by_batch(embed(params["embedding"], tokens))

        graph = _layer_graph(self.config, Products(self.compute_dtype, by_rows))
        stacks = lax.stop_gradient(params["layers"])

        def carrier(stack):
            # Where nothing is computed again, what is read is kept: entries then, not a copy of each.
            by_bits = self.mesh is None and self.remat != "none" and is_taken_by_bits(stack)
            return carriers(stack) if by_bits else stack

        def read(number, one, stack):
            return one if one.dtype == stack.dtype else carried(one, entry(stack, number))

        def layer(x, number_state_and_cache):
            number, state, cache = number_state_and_cache
            if number is not None:
                state = jax.tree.map(partial(read, number), state, stacks)
            x, kept = nnx.merge(graph, state)(x, rotation, lambda q, k, v: attend(q, k, v, cache))
            return self.by_batch(x), kept

        if self.remat == "layers":
            layer = jax.checkpoint(layer)
        elif self.remat == "products":
            layer = jax.checkpoint(layer, policy=_PRODUCTS)
        if isinstance(params["layers"], list):
            kept = []
            for state, cache in zip(params["layers"], caches or [None] * len(params["layers"]), strict=True):
                x, new = layer(x, (None, state, cache))
                kept.append(new)
        else:
            unroll = self.config.num_layers if self.unroll else 1
            numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
            x, kept = lax.scan(layer, x, (numbers, jax.tree.map(carrier, params["layers"]), caches), unroll=unroll)
        return rms_norm(x, params["norm"]["scale"], self.config.norm_epsilon), kept

    def by_batch(self, x: jax.Array) -> jax.Array:
        """An activation whose leading axis is the batch, kept where its sequences are.

        Left to itself the partitioner would compute the whole batch on every device, each with its part of the weights.
        """
        if self.mesh is None or x.shape[0] % self.mesh.shape[DATA]:
            return x
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(DATA, *rest)))

    def spread(self, batch: Any) -> Any:
        """A pytree of arrays with the batch leading, laid out over `data` where that divides it."""
        if self.mesh is None or any(leaf.shape[0] % self.mesh.shape[DATA] for leaf in jax.tree.leaves(batch)):
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(DATA)))

    def gathered(self, params: Params) -> Params:
        """The same parameters for a loop that needs all of them at every step: whole on every device.

        With tensor parallelism they stay as they are, and XLA moves some of them at every step.
        """
        if self.mesh is None or self.mesh.shape[MODEL] > 1:
            return params
        return lax.with_sharding_constraint(params, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def layer_indices(self) -> tuple[np.ndarray, ...]:
        """0 … L-1, to be passed into a compiled program that takes layers apart.

        A program that knows them compiles a kernel for every slice of every layer: half of what decoding takes to
        compile. As arguments, they leave it one for each kind of slice.
        """
        return tuple(np.arange(self.config.num_layers, dtype=np.int32))

    def unstacked(self, params: Params, layer_indices: Iterable[Any], by_rows: tuple[str, ...]) -> Params:
        """The same parameters for decoding, a second copy: layers as a list, kernels of the compute type.

        Args:
          params: as `init` makes them.
          layer_indices: those of the model.
          by_rows: names of kernels that shall be as `product_by_rows` takes them. Where all are, the head is made
            `rows`: [V, D]; otherwise, in bfloat16, `columns`: [D, V]; but not where it would stay as it is.
        """
        dtype = self.compute_dtype

        def prepared(path, stack):
            name = path[-1].key
            if name not in _INPUTS:
                return stack
            if name in by_rows:
                inputs = math.prod(stack.shape[1 : 1 + _INPUTS[name]])
                stack = jnp.swapaxes(stack.reshape(len(stack), inputs, -1), 1, 2)
            return stack.astype(dtype)

        head, matrix = {}, self.head(params)
        if by_rows == BY_ROWS["few"]:
            head = {"rows": matrix.astype(dtype)} if matrix.dtype != dtype else {}
        elif dtype == jnp.bfloat16:
            head = {"columns": turned(matrix.astype(dtype))}
        return params | head | {"layers": each(jax.tree.map_with_path(prepared, params["layers"]), layer_indices)}

    def head(self, params: Params) -> jax.Array:
        """The matrix that turns hidden states into logits, [V, D]: the embedding itself where they are tied."""
        return params["embedding" if self.config.tie_embeddings else "head"]

    def logits(self, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Unnormalised next-token log-probabilities, float32[B, T, V]; arguments and errors as for `hidden`."""
        return self.project(params, self.hidden(params, tokens, mask))

    def project(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits of `hidden: float32[..., D]`, as float32[..., V], accumulated in float32."""
        columns = params["columns"] if "columns" in params else turned(self.head(params).astype(self.compute_dtype))
        return product(hidden, columns, self.compute_dtype)

    def project_by_rows(self, unstacked: Params, hidden: jax.Array) -> jax.Array:
        """Logits of `hidden: float32[B, D]` with the vocabulary leading, float32[V, B], from what `unstacked` made."""
        if len(hidden) == 1 and ("columns" in unstacked or self.compute_dtype == jnp.float32):
            return self.project(unstacked, hidden).T
        return by_outputs(hidden, unstacked.get("rows", self.head(unstacked)), self.compute_dtype)


def spec_of(axes: Iterable[str | None]) -> PartitionSpec:
    """A layout by the mesh's axis of each of an array's, written as jit writes the layout of what it returns.

    Said otherwise, with axes that are whole at its end, a program is compiled again for its own result.
    """
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def each(stacked: Any, indices: Iterable[Any]) -> list[Any]:
    """The entries of a pytree of arrays at traced indices along the leading axis."""
    return [jax.tree.map(partial(entry, i=i), stacked) for i in indices]


def is_taken_by_bits(stack: jax.Array) -> bool:
    """Whether a stack's entries are taken, and its gradients stacked, as whole numbers: bfloat16 ones on a CPU.

    XLA there moves bfloat16 about in float32. Before a loop over layers it would convert all of them, at every call,
    and keep that copy of twice the size; in the loop back it would convert all gradients there and back in every layer.
    """
    return stack.dtype == jnp.bfloat16 and stack.shape[-1] % 2 == 0 and jax.default_backend() == "cpu"


def entry(stack: jax.Array, i: jax.Array) -> jax.Array:
    """Entry i of an array along its leading axis."""
    take = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    if not is_taken_by_bits(stack):
        return take(stack, i)
    # Without the barrier the bits of the whole stack would be taken at once, which is a copy as well.
    stack, i = lax.optimization_barrier((stack, i))
    return lax.bitcast_convert_type(take(lax.bitcast_convert_type(stack, jnp.uint16), i), jnp.bfloat16)


@jax.custom_vjp
def carriers(stack: jax.Array) -> jax.Array:
    """What a loop over `entry`s of a bfloat16 stack is differentiated by: two numbers in the bits of each float32 one.

    Nothing ever reads them; their gradients, of the same form, are moved and not computed with.
    """
    return _paired(stack)


@jax.custom_vjp
def carried(carrier: jax.Array, value: jax.Array) -> jax.Array:
    """An entry's value, differentiated as what its carrier was made from."""
    return value


def _paired(x: jax.Array) -> jax.Array:
    low, high = jnp.split(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=-1)
    return lax.bitcast_convert_type(low | (high << 16), jnp.float32)


def _unpaired(x: jax.Array) -> jax.Array:
    # One pass over both halves side by side; taken apart and concatenated they would be written three times.
    words = lax.bitcast_convert_type(x, jnp.uint32)[..., None, :]
    shifts = lax.broadcasted_iota(jnp.uint32, (*x.shape[:-1], 2, x.shape[-1]), x.ndim - 1) * 16
    halves = (words >> shifts).astype(jnp.uint16)
    return lax.bitcast_convert_type(halves.reshape(*x.shape[:-1], -1), jnp.bfloat16)


carriers.defvjp(lambda stack: (carriers(stack), None), lambda _, cotangent: (_unpaired(cotangent),))
carried.defvjp(lambda carrier, value: (value, None), lambda _, cotangent: (_paired(cotangent), None))


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `table: [V, D]` at `tokens: int[B, T]`, float32[B, T, D]; NaN for a token that is not in the table."""
    # Without signs: a negative index would count from the end.
    return jnp.take(table, tokens.astype(jnp.uint32), axis=0, mode="fill").astype(jnp.float32)


def _check(config: Config, tokens: jax.Array, mask: jax.Array | None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be int[B, T]; got {tokens.dtype}{list(tokens.shape)}")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
        raise ValueError(f"mask must be bool{list(tokens.shape)} like tokens; got {mask.dtype}{list(mask.shape)}")
    # With a mask, positions count tokens alone: the longest prompt and the longest answer may belong to two rows.
    if mask is None:
        longest = tokens.shape[1]
    else:
        # What is traced, or lies on other hosts as well, is not known here.
        known = not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)
        longest = np.asarray(mask).sum(axis=1).max(initial=0) if known else 0
    if longest > config.max_positions:
        raise ValueError(f"a sequence has {longest} positions; the model has {config.max_positions}")


def make_model(
    config: Config,
    *,
    compute_dtype: Any = jnp.float32,
    unroll: bool = False,
    remat: Remat = "products",
    mesh: Mesh | None = None,
) -> Model:
    """Make the functions of a model; no parameters are made.

    Args:
      config: its shape.
      compute_dtype: float32 or bfloat16, the type of the operands of products.
      unroll: see `Model`.
      remat: see `Model`.
      mesh: see `Model`.

    Raises:
      ValueError: on another compute type or remat.
    """
    dtype = jnp.dtype(compute_dtype)
    checks.name("compute_dtype", dtype.name, COMPUTE_DTYPES)
    checks.name("remat", remat, REMAT)
    abstract = nnx.eval_shape(lambda: Decoder(config, Products(dtype), nnx.Rngs(params=0)))
    return Model(config, nnx.split(abstract)[0], dtype, unroll, remat, mesh)

"""Sampling text: prefill and decoding in one compiled call, a key for each sequence. `prepare` lays weights out for it.

A draw is found by inverting the cumulative distribution: one uniform number chooses a block of the vocabulary, another
a token in it. Gumbel noise over the whole vocabulary would take a fifth to a half of the time. Both numbers come from
the sequence's own key and the step, so that a sequence is the same among other neighbours and with other padding, but
for ties within rounding.

Truncation follows transformers: temperature, then top-k, then top-p of what is left, then min-p. A threshold on the
probability decides what stays, so tokens tied at the threshold stay together; transformers breaks such ties by sorting.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxkd import checks
from jaxkd.policy import Params
from jaxkd.smollm2.model import BY_ROWS, DATA, MODEL, Model, each, positions_of, rotation_at, spec_of

BUCKETS = tuple(sorted({1, *(base * 2**i for base in (2, 3) for i in range(16))}))
"""Lengths that prompts and completions are padded to, each at most half as long again as the one before, or one token
longer. A prompt of one token is thus prefilled as one: padded to sixteen, that took a quarter of a call's time."""

_BLOCK = 128


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Numbers are traced, so that one compiled program serves all of them.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens; None keeps all.
      top_p: keep the likeliest tokens that together have this probability; None keeps all.
      min_p: keep tokens at least this many times as likely as the likeliest; None keeps all.
      greedy: take the likeliest token whatever the temperature; so does a temperature of 0 that is not traced.

    Raises:
      ValueError: on a number outside its range; traced numbers are not checked.
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    greedy: bool = field(default=False, metadata={"static": True})

    def __post_init__(self):
        limits = {
            "temperature": {"least": 0},
            "top_k": {"least": 1},
            "top_p": {"above": 0, "most": 1},
            "min_p": {"least": 0, "most": 1},
        }
        for name, bounds in limits.items():
            value = getattr(self, name)
            if isinstance(value, np.number):
                object.__setattr__(self, name, value.item())
            if (known := _known(value)) is not None:
                (checks.whole if name == "top_k" else checks.number)(name, known, **bounds)


def _known(value: Any) -> int | float | None:
    """The number that a setting has now; None where it is switched off, traced or no scalar."""
    if isinstance(value, int | float):
        return value
    scalar = isinstance(value, np.number | np.ndarray | jax.Array) and value.ndim == 0
    if not scalar or isinstance(value, jax.core.Tracer):
        return None
    # A count of tokens is traced as a float, as all settings are.
    number = value.item()
    return int(number) if isinstance(number, float) and number.is_integer() else number


class Completions(NamedTuple):
    """What was drawn after each prompt.

    Attributes:
      tokens: int32[B, C]; the token that ended the completion is its last, padding follows.
      mask: bool[B, C], True at tokens.
      log_probs: float32[B, C], of each token under the model at temperature 1 without truncation; 0 at padding.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Prepared:
    """A model's parameters as sampling reads them: from `prepare`.

    Attributes:
      prefill: for the pass over the prompts, the parameters themselves.
      decoding: for one token after another, as `Model.unstacked` lays them out: a second copy.
      by_rows: kernels of `decoding` that lie by their outputs.
    """

    prefill: Params
    decoding: Params
    by_rows: tuple[str, ...] = field(metadata={"static": True})


def prepare(model: Model, params: Params, batch: int) -> Prepared:
    """Lay parameters out for `generate`: once, where several calls sample from them.

    Args:
      model: the model's functions.
      params: its parameters; where they change, or are donated, they are laid out anew.
      batch: sequences at a time; whether it is one decides the layout, and thereby speed alone.

    Returns:
      The parameters, and a second copy of the layers in the compute type, which lives as long as this does; over a mesh
      without tensor parallelism the copy is of all parameters, whole on every device.
    """
    by_rows = BY_ROWS["one" if batch == 1 else "few"]
    return Prepared(params, params | _laid_out(model, params, model.layer_indices, by_rows=by_rows), by_rows)


@partial(jax.jit, static_argnames=("model", "by_rows"))
def _laid_out(model: Model, params: Params, layers, *, by_rows: tuple[str, ...]) -> Params:
    """What decoding reads otherwise than it is: anything else would be copied on its way through."""
    # Whole on every device once, and not at every step.
    unstacked = model.unstacked(model.gathered(params), layers, by_rows)
    return {name: one for name, one in unstacked.items() if one is not params.get(name)}


Cache = list[tuple[jax.Array, jax.Array]]
"""Keys, float32[B, K, N, W], and values, float32[B, K, W, N], of every layer, as their products read them: nothing is
transposed at each step. W holds prompts and completions in their buckets."""


def make_cache(model: Model, batch: int, prompt_length: int, max_new_tokens: int) -> Cache:
    """An empty cache for `generate`: a caller that keeps it saves its allocation with every call.

    Args:
      model: the model's functions.
      batch: B, sequences at a time.
      prompt_length: the most tokens of a prompt, with padding.
      max_new_tokens: the most tokens of a completion.
    """
    width, mesh = bucket(prompt_length) + bucket(max_new_tokens), model.mesh
    if mesh is None or batch % mesh.shape[DATA]:
        return _empty(model, batch, width)
    # As the compiled program returns it: laid out otherwise, the first call would have a program of its own.
    spec = spec_of(axis if mesh.shape[axis] > 1 else None for axis in (DATA, MODEL))
    return _empty(model, batch, width, NamedSharding(mesh, spec))


def _empty(model: Model, batch: int, width: int, where: NamedSharding | None = None) -> Cache:
    # Made where it lies: whole on one device it may be larger than that.
    return [tuple(jnp.zeros(shape, device=where) for shape in shapes) for shapes in _cache_shapes(model, batch, width)]


def _cache_shapes(model: Model, batch: int, width: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    heads, size = model.config.num_kv_heads, model.config.head_dim
    return [((batch, heads, size, width), (batch, heads, width, size))] * model.config.num_layers


def bucket(length: int) -> int:
    """The smallest of `BUCKETS` that holds a length."""
    return next((size for size in BUCKETS if size >= length), length)


def generate(
    model: Model,
    params: Params | Prepared,
    tokens: Any,
    mask: Any,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    cache: Cache | None = None,
) -> Completions | tuple[Completions, Cache]:
    """Continue prompts until each has ended or has `max_new_tokens`.

    Args:
      model: the model's functions.
      params: its parameters; or what `prepare` made of them, which saves laying them out with every call.
      tokens: int32[B, P], prompts, padded on either side.
      mask: bool[B, P], True at tokens; every prompt has at least one.
      keys: B random keys, one a sequence.
      max_new_tokens: C.
      sampling: how tokens are drawn; plain draws at temperature 1 by default.
      cache: from `make_cache` or from an earlier call with the same buckets. It is donated: use the one returned.

    Returns:
      The completions; with a cache given, the completions and the cache to be given to the next call.

    Raises:
      ValueError: shapes that do not fit, an empty prompt, a token outside the vocabulary, or a prompt too long to be
        continued by C tokens.
    """
    sampling = Sampling() if sampling is None else sampling
    tokens, mask = check_prompts(model, tokens, mask, max_new_tokens)
    if keys.shape != tokens.shape[:1]:
        raise ValueError(f"there must be one key a sequence, [{tokens.shape[0]}]; got {list(keys.shape)}")
    if cache is not None:
        _check_cache(model, cache, tokens.shape, max_new_tokens)
    prompts = model.spread((jnp.asarray(tokens), jnp.asarray(mask), keys))
    return continue_prompts(model, params, *prompts, max_new_tokens, made_ready(sampling), cache)


def continue_prompts(model, params, tokens, mask, keys, max_new_tokens: int, sampling: Sampling, cache=None):
    """`generate` without its checks, for arrays that may be traced and for sampling from `made_ready`."""
    widen = [(0, 0), (bucket(tokens.shape[1]) - tokens.shape[1], 0)]
    tokens, mask = jnp.pad(tokens, widen), jnp.pad(mask, widen)
    if not isinstance(params, Prepared):
        params = prepare(model, params, len(tokens))
    given = (model, params, tokens, mask, keys, sampling, max_new_tokens, model.layer_indices)
    room = bucket(max_new_tokens)
    if cache is None:
        return _cut(_generate(*given, room=room), max_new_tokens)
    drawn, cache = _generate_into(*given, cache, room=room)
    return _cut(drawn, max_new_tokens), cache


def _cut(drawn: Completions, length: int) -> Completions:
    return Completions(*(array[:, :length] for array in drawn))


def _check_cache(model: Model, cache: Cache, shape: tuple[int, int], max_new_tokens: int) -> None:
    wanted = _cache_shapes(model, shape[0], bucket(shape[1]) + bucket(max_new_tokens))
    if [tuple(array.shape for array in layer) for layer in cache] != wanted:
        raise ValueError(
            f"the cache must hold {len(wanted)} layers of keys {list(wanted[0][0])}; it holds {len(cache)} of "
            f"{list(cache[0][0].shape) if cache else []}: make_cache(model, {shape[0]}, {shape[1]}, {max_new_tokens})"
        )


def check_prompts(model: Model, tokens, mask, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as numpy arrays, or ValueError."""
    checks.whole("max_new_tokens", max_new_tokens, least=1)
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    whole = np.issubdtype(tokens.dtype, np.integer)
    if tokens.ndim != 2 or tokens.shape != mask.shape or mask.dtype != bool or (tokens.size and not whole):
        raise ValueError(
            f"prompts must be int[B, P] and their mask bool[B, P]; got {tokens.dtype}{list(tokens.shape)} "
            f"and {mask.dtype}{list(mask.shape)}"
        )
    lengths = mask.sum(axis=1)
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError("every prompt must have at least one token")
    config = model.config
    if lengths.max() + max_new_tokens > config.max_positions:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are more than the "
            f"{config.max_positions} positions of the model"
        )
    check_token_ids(config.vocab_size, tokens, mask)
    return np.where(mask, tokens, 0).astype(np.int32), mask


def check_token_ids(vocab_size: int, tokens, mask=None) -> None:
    """Raise ValueError where a token that is not padding lies outside the vocabulary."""
    tokens = np.asarray(tokens)
    counted = tokens if mask is None else tokens[np.asarray(mask)]
    outside = counted[(counted < 0) | (counted >= vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")


def made_ready(sampling: Sampling) -> Sampling:
    """Sampling whose settings that are off are None and cost nothing, and whose others are arrays and traced."""
    greedy = sampling.greedy or _known(sampling.temperature) == 0
    off = {"temperature": 1, "top_p": 1, "min_p": 0}
    values = {
        name: None if value is None or (isinstance(value, int | float) and value == off.get(name)) else value
        for name, value in ((name, getattr(sampling, name)) for name in ("temperature", "top_k", "top_p", "min_p"))
    }
    values = {name: None if value is None else jnp.asarray(value, jnp.float32) for name, value in values.items()}
    if greedy:
        values = dict.fromkeys(values)
    return replace(sampling, **values, greedy=greedy)


# --- one draw --------------------------------------------------------------------------------------------------------


def draw(logits: jax.Array, uniforms: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draw one token for each column.

    Args:
      logits: float32[V, B]: sums over the vocabulary then add whole rows.
      uniforms: float32[2, B] in [0, 1); not used by greedy draws.
      sampling: how; None switches a setting off.

    Returns:
      Tokens, int32[B], and their log-probabilities at temperature 1 without truncation, float32[B].
    """
    largest = logits.max(axis=0, keepdims=True)
    plain = jnp.exp(logits - largest)
    # By the blocks that a draw needs as well.
    log_total = largest[0] + jnp.log(_in_blocks(plain).sum(axis=1).sum(axis=0))
    if sampling.greedy:
        tokens = jnp.argmax(logits, axis=0).astype(jnp.int32)
    else:
        cold = sampling.temperature is None
        weights = plain if cold else jnp.exp((logits - largest) / sampling.temperature)
        tokens = _inverse_cdf(_truncate(weights, sampling), uniforms)
    return tokens, _entry(logits, tokens) - log_total


def _entry(array: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of each column of `array: [n, ..., B]` at its own `index: int32[B]`, [..., B]."""
    index = index.reshape(*[1] * (array.ndim - 1), -1)
    return jnp.take_along_axis(array, index, axis=0)[0]


def _truncate(weights: jax.Array, sampling: Sampling) -> jax.Array:
    """Set to 0 what is cut; `weights: float32[V, B]` are probabilities over the largest, which is 1."""
    if sampling.top_k is not None:
        most = jnp.minimum(sampling.top_k, weights.shape[0])
        weights = _keep_heaviest(weights, jnp.ones_like, jnp.full(weights.shape[1:], most))
    if sampling.top_p is not None:
        weights = _keep_heaviest(weights, lambda w: w, sampling.top_p * weights.sum(axis=0))
    if sampling.min_p is not None:
        weights = jnp.where(weights >= sampling.min_p, weights, 0.0)
    return weights


def _keep_heaviest(weights, measure, enough) -> jax.Array:
    """Keep weights above the largest threshold at which those kept measure `enough: float32[B]`.

    Bisection over the bits of the threshold, which for floats of one sign are ordered as the floats are: 31 sums find
    it exactly, where a sort of the vocabulary takes many times as long.
    """
    sizes = measure(weights)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = lax.bitcast_convert_type(middle, jnp.float32)
        suffices = jnp.sum(jnp.where(weights >= threshold[None], sizes, 0.0), axis=0) >= enough
        return jnp.where(suffices, middle, low), jnp.where(suffices, high, middle)

    zero = jnp.zeros(weights.shape[1:], jnp.int32)
    above_one = lax.bitcast_convert_type(jnp.full(weights.shape[1:], 2.0, jnp.float32), jnp.int32)
    low, _ = lax.fori_loop(0, 31, halve, (zero, above_one))
    return jnp.where(weights >= lax.bitcast_convert_type(low, jnp.float32)[None], weights, 0.0)


def _inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draw from `weights: float32[V, B]`, unnormalised: a block of the vocabulary, then a token in it, int32[B]."""
    weights = _in_blocks(weights)
    block = _first_above(weights.sum(axis=1), uniforms[0])
    return block * _BLOCK + _first_above(_entry(weights, block), uniforms[1])


def _in_blocks(weights: jax.Array) -> jax.Array:
    """[V, B] to [V / 128, 128, B], padded with zeros."""
    v, b = weights.shape
    return jnp.pad(weights, ((0, -v % _BLOCK), (0, 0))).reshape(-1, _BLOCK, b)


def _first_above(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the running sum of `weights: [n, B]` is above its share `uniform: [B]` of the whole.

    Running sums may round up where nothing is added: an index without weight is never taken.
    """
    running = jnp.cumsum(weights, axis=0)
    positive = weights > 0
    above = positive & (running > uniform[None] * running[-1:])
    last = weights.shape[0] - 1 - jnp.argmax(positive[::-1], axis=0)
    return jnp.where(above.any(axis=0), jnp.argmax(above, axis=0), last).astype(jnp.int32)


# --- prefill and decoding --------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """The carry of decoding: `step` tokens are drawn, the last is not in the cache yet."""

    step: jax.Array
    drawn: Completions
    done: jax.Array
    positions: jax.Array
    allowed: jax.Array
    caches: Any


@partial(jax.jit, static_argnames=("model", "room"))
def _generate(
    model: Model, prepared: Prepared, tokens, mask, keys, sampling: Sampling, limit, layers, *, room: int
) -> Completions:
    """Prompts int32[B, P] to completions int32[B, room], of which `limit` steps are drawn."""
    return _decode(model, prepared, tokens, mask, keys, sampling, limit, layers, None, room).drawn


@partial(jax.jit, static_argnames=("model", "room"), donate_argnames="cache")
def _generate_into(
    model: Model, prepared: Prepared, tokens, mask, keys, sampling: Sampling, limit, layers, cache: Cache, *, room: int
):
    """`_generate` in a cache that is there already, which is returned too."""
    state = _decode(model, prepared, tokens, mask, keys, sampling, limit, layers, cache, room)
    return state.drawn, state.caches


def _decode(
    model: Model, prepared: Prepared, tokens, mask, keys, sampling, limit, layers, cache: Cache | None, room: int
) -> "_State":
    width = tokens.shape[1]
    tokens, mask = to_the_right(tokens, mask)
    hidden, filled = _prefill(model, prepared.prefill, tokens, mask, layers, cache, room)
    state = filled
    if model.mesh is None:
        # Sequences and heads on one axis: with an axis of a single sequence XLA would copy the cache at every step.
        # (Over a mesh each has an axis of devices of its own.)
        state = filled._replace(caches=jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), filled.caches))
    # Every number once, and not at every step.
    uniforms = _uniforms(keys, 1 if sampling.greedy else room)
    state = _extend(model, prepared.decoding, hidden, state, uniforms, sampling)

    # Every angle once: made at each step, layers would make them again for each of their heads.
    turns = rotation_at(model.config, jnp.arange(width + room)[:, None])

    def go_on(state):
        return (state.step < limit) & ~state.done.all()

    def step(state):
        last = lax.dynamic_slice_in_dim(state.drawn.tokens, state.step - 1, 1, axis=1)
        at = width + state.step - 1
        allowed = lax.dynamic_update_slice(state.allowed, jnp.ones((tokens.shape[0], 1), bool), (0, at))
        attend = partial(_attend_cached, allowed, at)
        rotation = jax.tree.map(lambda table: table[state.positions], turns)
        hidden, caches = model.apply(prepared.decoding, last, rotation, attend, state.caches, prepared.by_rows)
        state = state._replace(caches=caches, allowed=allowed, positions=state.positions + 1)
        return _extend(model, prepared.decoding, hidden[:, -1], state, uniforms, sampling)

    ended = lax.while_loop(go_on, step, state)
    caches = jax.tree.map(lambda array, before: array.reshape(before.shape), ended.caches, filled.caches)
    return ended._replace(caches=caches)


def to_the_right(tokens, mask, numpy=jnp):
    """Prompts padded on the left, however they were padded, so that all go on in one column.

    Args:
      tokens: int32[B, P].
      mask: bool[B, P].
      numpy: the library that moves them.
    """
    order = numpy.argsort(mask, axis=-1, stable=True)
    return numpy.take_along_axis(tokens, order, axis=-1), numpy.take_along_axis(mask, order, axis=-1)


def _prefill(model: Model, params, tokens, mask, layers, cache, room) -> tuple[jax.Array, _State]:
    """The hidden state behind each prompt, float32[B, D], and what decoding begins with."""
    b = tokens.shape[0]

    def attend(q, k, v, cache):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=True), (k, v)

    hidden, (k, v) = model.apply(params, tokens, rotation_at(model.config, positions_of(mask)), attend)
    # What stands behind the prompts is masked until it is written over: its weight is 0, and so must its values be
    # finite, whatever an earlier call with other parameters left there.
    empty = _empty(model, b, tokens.shape[1] + room) if cache is None else _finite(cache)
    caches = [
        tuple(
            lax.dynamic_update_slice(old, jnp.transpose(new, order), (0, 0, 0, 0))
            for old, new, order in zip(layer, own, (_KEYS, _VALUES), strict=True)
        )
        for layer, own in zip(empty, each((k, v), layers), strict=True)
    ]
    nothing = Completions(
        jnp.full((b, room), _pad_id(model), jnp.int32), jnp.zeros((b, room), bool), jnp.zeros((b, room), jnp.float32)
    )
    state = _State(
        step=jnp.int32(0),
        drawn=nothing,
        done=jnp.zeros((b,), bool),
        positions=mask.sum(axis=-1).astype(jnp.int32),
        allowed=jnp.pad(mask, ((0, 0), (0, room))),
        caches=caches,
    )
    return hidden[:, -1], state


def _finite(cache: Cache) -> Cache:
    """A cache whose values are numbers; of keys the scores are masked."""
    return [(keys, jnp.where(jnp.isfinite(values), values, 0.0)) for keys, values in cache]


_KEYS, _VALUES = (0, 2, 3, 1), (0, 2, 1, 3)
"""Axes of [B, T, K, N] in the order in which the cache keeps them."""


def _pad_id(model: Model) -> int:
    return 0 if model.config.pad_id is None else model.config.pad_id


def _attend_cached(allowed, at, q, k, v, cache):
    """Attention of one new position to all in the cache, with its own keys and values put there first.

    The cache has sequences and heads on two leading axes or on one.
    """
    (*rows, n, width), b = cache[0].shape, len(q)
    first = (0,) * len(rows)
    keys = lax.dynamic_update_slice(cache[0], jnp.transpose(k, _KEYS).reshape(*rows, n, 1), (*first, 0, at))
    values = lax.dynamic_update_slice(cache[1], jnp.transpose(v, _VALUES).reshape(*rows, 1, n), (*first, at, 0))
    scores = jnp.einsum("...gn,...nw->...gw", q.reshape(*rows, -1, n), keys) * n**-0.5
    scores = jnp.where(allowed[:, None], scores.reshape(b, -1, width), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).reshape(*rows, -1, width)
    return jnp.einsum("...gw,...wn->...gn", weights, values).reshape(b, 1, -1, n), (keys, values)


def _uniforms(keys: jax.Array, steps: int) -> jax.Array:
    """What each step draws by, float32[steps, 2, B]: of each sequence's own key and the step."""

    def at(step):
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), (2,)))(keys).T

    return jax.vmap(at)(jnp.arange(steps))


def _extend(model: Model, params, hidden, state: _State, uniforms, sampling) -> _State:
    """Draw the next token of each sequence from `hidden: float32[B, D]`."""
    uniforms = lax.dynamic_index_in_dim(uniforms, state.step, keepdims=False)
    tokens, log_probs = draw(model.project_by_rows(params, hidden), uniforms, sampling)
    new = Completions(jnp.where(state.done, _pad_id(model), tokens), ~state.done, jnp.where(state.done, 0.0, log_probs))
    drawn = Completions(
        *(
            lax.dynamic_update_slice_in_dim(array, column[:, None], state.step, axis=1)
            for array, column in zip(state.drawn, new, strict=True)
        )
    )
    ended = jnp.isin(tokens, jnp.asarray(model.config.eos_ids, jnp.int32)) if model.config.eos_ids else state.done
    return state._replace(step=state.step + 1, drawn=drawn, done=state.done | ended)

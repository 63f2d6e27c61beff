"""What a stage costs: tokens, model FLOPs by formula and by XLA's own analysis, and wall-clock.

Model FLOPs are those that the model's definition asks for: products with weights, attention's scores and its mixing. A
multiplication and an addition are two. Norms, softmax and rotary embeddings are left out (measured: 7 % of
`Config.tiny()`, and the share falls with the width), and so is whatever a program does besides: scores that the causal
mask throws away, keys of padding, activations computed again to save memory. Hence FLOPs by formula do not depend on
`Model.remat`; those of the program do, see `counted_flops` and `log_prob_flops`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.policy import TOKEN_CHUNK, target_log_probs


class Cost(NamedTuple):
    """What was spent.

    Attributes:
      tokens_sampled: tokens drawn.
      tokens_trained: tokens that updates were made on, each time anew.
      tokens_scored: tokens whose log-probability was computed besides.
      model_flops: by `forward_flops`, of all of these.
      seconds: wall-clock.
    """

    tokens_sampled: float = 0.0
    tokens_trained: float = 0.0
    tokens_scored: float = 0.0
    model_flops: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Cost") -> "Cost":
        """Both together."""
        return Cost(*(one + more for one, more in zip(self, other, strict=True)))

    def to_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        return self._asdict()

    @classmethod
    def from_dict(cls, entries: Mapping[str, float]) -> "Cost":
        """The inverse of `to_dict`; entries of other names are passed over.

        Raises:
          ValueError: naming the entries that are missing.
        """
        missing = [name for name in cls._fields if name not in entries]
        if missing:
            raise ValueError(f"a cost must have {', '.join(cls._fields)}; missing: {', '.join(missing)}")
        return cls(**{name: float(entries[name]) for name in cls._fields})


# --- by formula ------------------------------------------------------------------------------------------------------


def layer_parameters(config: Config) -> int:
    """Parameters of all layers that every token is multiplied with: all but the norms' scales."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def head_parameters(config: Config) -> int:
    """Parameters of the head, the embedding itself where they are tied: V · D."""
    return config.vocab_size * config.hidden_size


def product_parameters(config: Config) -> int:
    """Parameters that every token is multiplied with: those of the layers, and the head once, tied or not."""
    return layer_parameters(config) + head_parameters(config)


def mean_context(lengths: ArrayLike) -> float:
    """Positions that a token attends to, itself among them, in the mean over all tokens of causal sequences.

    Over lengths T it is Σ T·(T + 1)/2 over Σ T; for one length (T + 1)/2. Longer sequences have more tokens, so half
    the mean length is too little where lengths differ. NaN where there are no tokens.

    Args:
      lengths: whole numbers of any shape, tokens of each sequence, prompt and completion together.
    """
    lengths = np.asarray(lengths, float)
    total = lengths.sum()
    return float((lengths * (lengths + 1)).sum() / 2 / total) if total else float("nan")


def forward_flops(config: Config, tokens: float, context: float) -> float:
    """Model FLOPs of a forward pass over a number of tokens, each attending to `context` positions in the mean.

    Two a parameter, and four a layer, head, head width and position of the context, for scores and mixing (Kaplan et
    al., arXiv 2001.08361, table 1, with the head of the network counted). A sampled token costs as much as one of a
    forward pass, for keys and values are kept.

    Args:
      config: the model's shape.
      tokens: how many.
      context: mean positions attended to: `mean_context`, about half the length for whole texts.
    """
    return tokens * (2 * product_parameters(config) + _attention_flops(config) * context)


def training_flops(config: Config, tokens: float, context: float) -> float:
    """Model FLOPs of a pass forward and back, three forward: each product is followed by one for either operand.

    What is computed again to save memory (`Model.remat`) is not counted. With remat "layers" a program does about four
    forward passes' work, less the head's.
    """
    return 3 * forward_flops(config, tokens, context)


def _attention_flops(config: Config) -> int:
    """Of one token, a position of its context: two products of H heads of width N, two FLOPs each, in L layers."""
    return 4 * config.num_layers * config.num_heads * config.head_dim


# --- by XLA ----------------------------------------------------------------------------------------------------------


def counted_flops(program: Any) -> float:
    """FLOPs of a program by XLA's own analysis: elementwise work, masked scores and recomputation included.

    The body of a loop is counted once, whatever its length: see `log_prob_flops`.

    Args:
      program: what `jax.jit(f).lower(...)` gives, compiled or not.

    Raises:
      ValueError: where the backend's analysis counts no FLOPs.
    """
    analysis = program.cost_analysis() or {}
    if "flops" not in analysis:
        raise ValueError("XLA's cost analysis of this program counts no FLOPs on this backend: use the formulas")
    return float(analysis["flops"])


@lru_cache
def log_prob_flops(config: Config, batch: int, length: int, *, differentiate: bool, dtype="float32", remat="none"):
    """FLOPs by XLA of the log-probabilities of whole texts, as `policy.token_log_probs` computes them.

    Layers and the head's chunks of positions are loops, whose bodies XLA counts once. So the layers are counted without
    a loop in models of one and of two, and the head for one chunk.

    Args:
      config: the model's shape.
      batch: texts.
      length: tokens of each.
      differentiate: count the gradient as well.
      dtype: of the operands of products.
      remat: see `Model`.
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def of_layers(n: int) -> float:
        model = make_model(replace(config, num_layers=n), compute_dtype=dtype, remat=remat, unroll=True)
        return _counted(model.hidden, differentiate, model.shapes(), tokens)

    def head(hidden, rows, targets):
        return target_log_probs(hidden, rows, targets, jnp.dtype(dtype))

    positions = batch * (length - 1)
    chunk = min(TOKEN_CHUNK, positions)
    float32 = [jax.ShapeDtypeStruct((n, config.hidden_size), jnp.float32) for n in (chunk, config.vocab_size)]
    of_head = _counted(head, differentiate, *float32, jax.ShapeDtypeStruct((chunk,), jnp.int32))
    one, two = of_layers(1), of_layers(2)
    return one + (config.num_layers - 1) * (two - one) + of_head * positions / chunk


def _counted(function: Callable, differentiate: bool, *shapes) -> float:
    """FLOPs of a function of parameters and one array of whole numbers, and of its derivative by all the others."""

    def forth_and_back(*arguments):
        out, pull_back = jax.vjp(lambda *floats: function(*floats, arguments[-1]), *arguments[:-1])
        return out, pull_back(jnp.ones_like(out))

    return counted_flops(jax.jit(forth_and_back if differentiate else function).lower(*shapes))

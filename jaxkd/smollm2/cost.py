"""What a stage costs: tokens, model FLOPs by formula and by XLA's own analysis, and wall-clock.

Model FLOPs are those that the model's definition asks for: products with weights, attention's scores and its mixing. A
multiplication and an addition are two. Norms, softmax and rotary embeddings are left out (measured: 7 % of
`Config.tiny()`, and the share falls with the width), and so is whatever a program does besides: scores that the causal
mask throws away, keys of padding, activations computed again to save memory. Hence FLOPs by formula do not depend on
`Model.remat`; those of the program do, see `compiled_flops`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxkd import checks
from jaxkd.smollm2.config import Config


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
    forward pass, for keys and values are kept (`sampling_flops` counts it to the token).

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


def sampling_flops(config: Config, prompt: int, drawn: int) -> float:
    """Model FLOPs of one completion, with keys and values kept.

    The prompt and all drawn tokens but the last, which nothing follows, pass the layers once; each attends to those
    before it and itself. The head is needed once for each drawn token.

    Args:
      config: the model's shape.
      prompt: tokens of the prompt, at least 1.
      drawn: tokens drawn, at least 1, the one that ends the text among them.

    Raises:
      ValueError: where either is less.
    """
    checks.whole("prompt", prompt, least=1)
    checks.whole("drawn", drawn, least=1)
    fed = prompt + drawn - 1
    layers = fed * (2 * layer_parameters(config) + _attention_flops(config) * mean_context(fed))
    return layers + drawn * 2 * head_parameters(config)


def _attention_flops(config: Config) -> int:
    """Of one token, a position of its context: two products of H heads of width N, two FLOPs each, in L layers."""
    return 4 * config.num_layers * config.num_heads * config.head_dim


# --- by XLA ----------------------------------------------------------------------------------------------------------


def compiled_flops(compiled: Any) -> float:
    """FLOPs of a compiled program by XLA's own analysis: elementwise work, masked scores and recomputation included.

    The body of a loop is counted once, whatever its length. Of a scan over layers that is one layer: compile with
    `unroll=True` to have them all. Of sampling it is one token; no setting helps there.

    Held against the formulas with `context` the whole length T, since the program computes all T × T scores.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` gives.

    Raises:
      ValueError: where the backend's analysis counts no FLOPs.
    """
    analysis = compiled.cost_analysis() or {}
    if "flops" not in analysis:
        raise ValueError("XLA's cost analysis of this program counts no FLOPs on this backend: use the formulas")
    return float(analysis["flops"])

"""What a stage costs: tokens, model FLOPs by formula and by XLA's own analysis, and wall-clock."""

from typing import Any, NamedTuple

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
    def from_dict(cls, entries: dict[str, float]) -> "Cost":
        """The inverse of `to_dict`."""
        return cls(**{name: float(entries[name]) for name in cls._fields})


def product_parameters(config: Config) -> int:
    """Parameters that every token is multiplied with: all but the norms' scales, and the head once, tied or not."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def forward_flops(config: Config, tokens: float, context: float) -> float:
    """Model FLOPs of a forward pass over a number of tokens, each attending to `context` others in the mean.

    Two a parameter, and four a layer, head, head width and position of the context, for scores and mixing (Kaplan et
    al., arXiv 2001.08361, table 1, with the head of the network counted). A pass forward and back is three times as
    much; what is computed again to save memory is no work of the model's and not counted. A sampled token is a token of
    a forward pass.

    Args:
      config: the model's shape.
      tokens: how many.
      context: mean positions attended to; half the length, for whole texts.
    """
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    return tokens * (2 * product_parameters(config) + attention)


def compiled_flops(compiled: Any) -> float:
    """FLOPs of a compiled program by XLA's own analysis, elementwise work and masked scores included.

    The body of a scan is counted once, whatever its length: compile the layers unrolled to have them all.
    """
    analysis = compiled.cost_analysis()
    return float(analysis["flops"])

"""The shape of a Llama-architecture language model, from and to a checkpoint's own words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxkd import checks

# Entries of config.json that would change what the model computes, with the one value that is implemented.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


@dataclass(frozen=True)
class Config:
    """Everything about the model that shapes are made of, and the few numbers that enter its arithmetic.

    Attributes:
      vocab_size: V, rows of the embedding.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, width inside the MLP.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; each serves H / K query heads.
      head_dim: N, even.
      max_positions: the longest sequence, prompt and completion together.
      rope_theta: base of the rotary angles.
      norm_epsilon: added to the mean square under RMSNorm's root.
      tie_embeddings: whether the head is the embedding.
      bos_id: token that begins a text; None where there is none.
      eos_ids: tokens that end one; empty where there are none.
      pad_id: token that fills; None where there is none.
      initializer_range: standard deviation of fresh weights; no part of `repr`, by which models that are read are told
        apart.

    Raises:
      ValueError: naming the field, what was given and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    initializer_range: float = field(default=0.02, repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("head_dim", self.head_dim, least=2)
        checks.whole("max_positions", self.max_positions, least=1)
        checks.number("rope_theta", self.rope_theta, above=0)
        checks.number("norm_epsilon", self.norm_epsilon, least=0)
        checks.number("initializer_range", self.initializer_range, least=0)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary embeddings turn pairs; got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        for name, ids in (("bos_id", [self.bos_id]), ("eos_ids", self.eos_ids), ("pad_id", [self.pad_id])):
            for i in ids:
                if i is not None:
                    checks.whole(name, i, least=0, most=self.vocab_size - 1)

    @property
    def queries_per_kv_head(self) -> int:
        """G = H / K."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + tables + self.hidden_size

    @classmethod
    def tiny(cls, **changes: Any) -> "Config":
        """A model of some ten thousand parameters for tests; its vocabulary holds the 259 ids of bytes as tokens."""
        fields = {
            "vocab_size": 264,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "max_positions": 128,
            "bos_id": 1,
            "eos_ids": (2,),
            "pad_id": 0,
        }
        return cls(**(fields | changes))

    @classmethod
    def from_hf(cls, entries: Mapping[str, Any]) -> "Config":
        """Read the entries of a checkpoint's config.json, as written by transformers 4 or 5.

        Raises:
          ValueError: another architecture, a part that is not implemented (by name), or a missing entry.
        """
        if entries.get("model_type") != "llama":
            raise ValueError(
                f"model_type must be 'llama', the architecture of SmolLM2; got {entries.get('model_type')!r}"
            )
        for name, value in _FIXED.items():
            if entries.get(name) not in (None, value):
                raise ValueError(f"{name} must be {value!r}, the only one implemented; got {entries[name]!r}")
        if quantised := entries.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise ValueError(f"quantised checkpoints ({method!r}) are not read; take the plain one, or a GGUF")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in needed if entries.get(name) is None]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        if strange := [name for name in needed if not isinstance(entries[name], int)]:
            raise ValueError(f"{strange[0]} must be a whole number; got {entries[strange[0]]!r}")
        heads = entries["num_attention_heads"]
        rope_theta = _rope_theta(entries)
        eos, pad = entries.get("eos_token_id"), entries.get("pad_token_id")
        tied = _or(entries.get("tie_word_embeddings"), False)
        if not isinstance(tied, bool):
            raise ValueError(f"tie_word_embeddings must be true or false; got {tied!r}")
        return cls(
            vocab_size=entries["vocab_size"],
            hidden_size=entries["hidden_size"],
            intermediate_size=entries["intermediate_size"],
            num_layers=entries["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=_or(entries.get("num_key_value_heads"), heads),
            head_dim=_or(entries.get("head_dim"), entries["hidden_size"] // max(heads, 1)),
            max_positions=_or(entries.get("max_position_embeddings"), 2048),
            rope_theta=rope_theta,
            norm_epsilon=_real("rms_norm_eps", _or(entries.get("rms_norm_eps"), 1e-6)),
            tie_embeddings=tied,
            bos_id=entries.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            # transformers writes -1 for none in some checkpoints.
            pad_id=None if isinstance(pad, int) and pad < 0 else pad,
            initializer_range=_real("initializer_range", _or(entries.get("initializer_range"), 0.02)),
        )

    def to_hf(self, dtype: str | None = None) -> dict[str, Any]:
        """The entries of a config.json that transformers 4 and 5 read as this model; `dtype` is that of the weights."""
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        entries = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            # The same said twice: version 5 of transformers reads this one.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_epsilon,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
            "attention_dropout": 0.0,
            "initializer_range": self.initializer_range,
            "use_cache": True,
            **_FIXED,
        }
        return entries if dtype is None else entries | {"dtype": dtype, "torch_dtype": dtype}

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], *, tie_embeddings: bool) -> "Config":
        """Read the metadata of a GGUF file, which says nothing of fresh weights.

        Args:
          fields: plain values by their names in the file ("llama.block_count", …).
          tie_embeddings: whether the file has no head of its own; GGUF says it only by leaving the tensor out.

        Raises:
          ValueError: another architecture, rope scaling (by name), or a missing entry.
        """
        architecture = fields.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"general.architecture must be 'llama', that of SmolLM2; got {architecture!r}")
        for name in _GGUF_NUMBERS:
            if not isinstance(fields.get(name, 0), int | float | np.number):
                raise ValueError(f"{name} must be a number; got {fields[name]!r}")
        # As in llama.cpp: a factor without a type is linear, and 0 and 1 scale nothing.
        scaling = fields.get("llama.rope.scaling.type", "linear")
        factor = fields.get("llama.rope.scaling.factor", fields.get("llama.rope.scale_linear", 1))
        if scaling not in ("none", "linear") or (scaling == "linear" and factor not in (0, 1)):
            told = f"rope scaling {scaling!r}" + (f" by {factor}" if scaling == "linear" else "")
            raise ValueError(f"{told} is not implemented; only models without scaling are read")
        if fields.get("llama.expert_count"):
            raise ValueError(f"mixtures of experts are not implemented; got {fields['llama.expert_count']} experts")
        names = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
        missing = [name for name in names if f"llama.{name}" not in fields]
        if missing:
            raise ValueError(f"the GGUF metadata has no {', '.join(f'llama.{name}' for name in missing)}")
        width, hidden, layers, heads, context = (fields[f"llama.{name}"] for name in names)
        if not isinstance(heads, int | np.integer):
            raise ValueError(f"layers of different head counts are not implemented; got {heads}")
        head_dim = fields.get("llama.attention.key_length", width // max(heads, 1))
        if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ValueError(
                "rotary embeddings of a part of each head (llama.rope.dimension_count) are not implemented"
            )
        vocabulary = fields.get("llama.vocab_size", len(fields.get("tokenizer.ggml.tokens", ())))
        return cls(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=context,
            rope_theta=_from_float32(fields.get("llama.rope.freq_base", 10000.0)),
            norm_epsilon=_from_float32(fields.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            tie_embeddings=tie_embeddings,
            bos_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_ids=gguf_ends(fields),
            pad_id=fields.get("tokenizer.ggml.padding_token_id"),
        )


GGUF_ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
"""Where a GGUF file names what ends a text, a turn and a message."""


_GGUF_NUMBERS = (
    *(
        f"llama.{name}"
        for name in (
            "embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size",
            "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
            "rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "rope.scale_linear",
        )
    ),
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id", *GGUF_ENDS,
)  # fmt: skip


def gguf_ends(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a completion, each once, the end of a text first."""
    named = (fields.get(name) for name in GGUF_ENDS)
    return tuple(dict.fromkeys(int(i) for i in named if i is not None))


def _or(value, default):
    return default if value is None else value


def _rope_theta(entries: Mapping[str, Any]) -> float:
    """The base of rotary embeddings; whatever else config.json says of them is refused by name, unless it is nothing.

    Of the two objects that may hold it, transformers takes rope_scaling where it is not empty.
    """
    names = ("rope_scaling", "rope_parameters")
    scaling, parameters = (_or(entries.get(name), {}) for name in names)
    for name, rope in zip(names, (scaling, parameters), strict=True):
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name} must be an object; got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope scaling {kind!r} is not implemented; only models without scaling are read")
    for rope in (scaling, parameters, entries):
        if _or(rope.get("partial_rotary_factor"), 1) != 1:
            raise ValueError("rotary embeddings of a part of each head (partial_rotary_factor) are not implemented")
    said = (rope.get("rope_theta") for rope in (scaling or parameters, entries, parameters))
    return _real("rope_theta", next((theta for theta in said if theta is not None), 10000.0))


def _real(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number; got {value!r}")
    return float(value)


def _from_float32(value: float) -> float:
    """The shortest decimal that is this float32: what was meant, 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

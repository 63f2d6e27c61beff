"""A checkpoint as something to sample from, to score and to train: a language model with its prompt and its tokenizer.

Whatever is done on the host batch by batch — drawing samples, scoring them, reading them as text — is here, in fixed
shapes, so that one program of each kind serves a whole experiment, on the devices of one process.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd.policy import Params, Policy
from jaxkd.smollm2 import generate, sharding, weights
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import Model, make_model
from jaxkd.smollm2.policy import Texts, make_policy
from jaxkd.smollm2.tokenization import Tokenizer, check_vocabulary


class ScoredTexts(NamedTuple):
    """Draws that carry what was made of them on the host: to an alignment step they are draws like any others.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T].
      completion_mask: bool[B, T].
      reward: float32[B].
      hit: bool[B], whether the text shows the behaviour.
    """

    tokens: Any
    mask: Any
    completion_mask: Any
    reward: Any
    hit: Any


@dataclass(frozen=True)
class Layout:
    """How models are computed: speed and memory depend on it, results but for the rounding of products.

    Attributes:
      compute_dtype: of products.
      remat: what the backward pass computes again: `Model.remat`.
      mesh: where several devices are used.
    """

    compute_dtype: str = "float32"
    remat: str = "products"
    mesh: Any = None

    def model(self, config: Config) -> Model:
        """The functions of a model of this shape; programs are compiled once for each."""
        return _model(config, self)

    @property
    def shards(self) -> int:
        """Parts that a batch is cut in."""
        return 1 if self.mesh is None else self.mesh.shape[sharding.DATA]


@lru_cache
def _model(config: Config, layout: Layout) -> Model:
    return make_model(config, compute_dtype=layout.compute_dtype, remat=layout.remat, mesh=layout.mesh)


@dataclass(frozen=True)
class Setting:
    """What all models of an experiment share.

    Attributes:
      tokenizer: of every model.
      prompt_tokens: int32[1, P], what every completion follows.
      max_new_tokens: C.
      batch_size: sequences that are drawn at a time; changes speed, not results.
      score_batch_size: sequences that are scored at a time; None for as many as are drawn. A step of drawing sees one
        token of each, scoring all of them, so what fits a cache is fewer.
      layout: how models are computed; its mesh has devices of this process alone.

    Raises:
      ValueError: on a mesh of several processes.
    """

    tokenizer: Tokenizer
    prompt_tokens: np.ndarray
    max_new_tokens: int
    batch_size: int = 32
    layout: Layout = Layout()
    score_batch_size: int | None = None

    def __post_init__(self):
        if self.layout.mesh is not None:
            sharding.check_one_process(len({device.process_index for device in self.layout.mesh.devices.flat}))

    @classmethod
    def of_prompt(
        cls,
        tokenizer: Tokenizer,
        prompt: str,
        max_new_tokens: int,
        batch_size: int,
        layout: Layout,
        score_batch_size: int | None = None,
    ) -> "Setting":
        """The setting in which everything follows one prompt.

        Raises:
          ValueError: on a prompt without a token.
        """
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        if not ids:
            raise ValueError(f"the prompt must have at least one token; got {prompt!r}")
        return cls(tokenizer, np.asarray([ids], np.int32), max_new_tokens, batch_size, layout, score_batch_size)

    @property
    def prompt_mask(self) -> np.ndarray:
        """bool[1, P], all True."""
        return np.ones(self.prompt_tokens.shape, bool)

    def model(self, config: Config) -> Model:
        """The functions of a model of this shape."""
        return self.layout.model(replace(config, eos_ids=self.tokenizer.eos_ids))

    def policy(self, config: Config) -> Policy:
        """The model as a policy over completions; its draws are made by `Network.draw`."""
        return _policy(self.model(config), self.max_new_tokens)

    def on_devices(self, batch: Any) -> Any:
        """A batch, laid out over the mesh where there is one; what can't be divided is whole on every device."""
        batch, mesh = jax.tree.map(jnp.asarray, batch), self.layout.mesh
        if mesh is None:
            return batch

        def placed(leaf):
            if leaf.shape[0] % self.layout.shards == 0:
                return sharding.shard_batch(mesh, leaf)
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

        return jax.tree.map(placed, batch)

    def on_mesh(self, state: Any) -> Any:
        """A state as a step over the mesh returns it: what lies on one device is put on all.

        A step that is given it otherwise is compiled twice.
        """
        if self.layout.mesh is None:
            return state
        everywhere = NamedSharding(self.layout.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere), state
        )

    def size_of_batches(self, n: int, most: int | None = None) -> int:
        """Sequences at a time, of n: at most `most` (by default `batch_size`), and as many on every device."""
        shards = self.layout.shards
        return -(-min(most or self.batch_size, n) // shards) * shards

    def load(self, source: str | Path, dtype: str = "float32") -> "Network":
        """A checkpoint from any source that `weights.load` takes.

        Raises:
          ValueError: where it has another vocabulary than the tokenizer, or can't continue the prompt.
        """
        config, params = weights.load(source, dtype=dtype, mesh=self.layout.mesh)
        check_vocabulary(self.tokenizer, config.vocab_size)
        generate.check_prompts(self.model(config), self.prompt_tokens, self.prompt_mask, self.max_new_tokens)
        return Network(config, params, self)

    def texts_of(self, x: Any) -> list[str]:
        """The completions as text, without the token that ends them."""
        ends = set(self.tokenizer.eos_ids)
        tokens, counted = np.asarray(x.tokens), np.asarray(x.completion_mask)
        rows = [row[keep].tolist() for row, keep in zip(tokens, counted, strict=True)]
        return [self.tokenizer.decode_after(row[:-1] if row and row[-1] in ends else row) for row in rows]


@lru_cache
def _policy(model: Model, max_new_tokens: int) -> Policy:
    """One policy a model, for one program each; log-probabilities do not depend on its prompt."""
    return make_policy(model, [[0]], [[True]], max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Network:
    """Parameters with what is needed to use them."""

    config: Config
    params: Params
    setting: Setting

    @property
    def model(self) -> Model:
        """Its functions."""
        return self.setting.model(self.config)

    def draw(self, key: jax.Array, n: int, temperature: float = 1.0, *, batch_size: int | None = None) -> Texts:
        """n completions of the prompt; each has a key of its own, so the first stay the same when more are asked for.

        Args:
          key: random key.
          n: how many.
          temperature: τ; at 0 the likeliest tokens.
          batch_size: the most at a time, by default the setting's; changes no draw.

        Raises:
          ValueError: on a temperature below 0.
        """
        return join(list(self.draws(key, n, temperature, batch_size=batch_size)))

    def draws(
        self, key: jax.Array, n: int, temperature: float = 1.0, first: int = 0, *, batch_size: int | None = None
    ) -> Iterator[Texts]:
        """The same, batch by batch; what comes before `first` is left out."""
        size = self.setting.size_of_batches(n, batch_size)
        # Always an array: a temperature of 1 then needs no program of its own.
        sampling = generate.made_ready(generate.Sampling(jnp.float32(temperature)))
        tokens, mask = (
            jnp.asarray(np.repeat(one, size, axis=0)) for one in (self.setting.prompt_tokens, self.setting.prompt_mask)
        )
        starts = range(first, n, size)
        prepared = generate.prepare(self.model, self.params, size) if starts else None
        for start in starts:
            drawn = generate.continue_prompts(
                self.model,
                prepared,
                *self.setting.on_devices((tokens, mask, _keys(key, start + jnp.arange(size)))),
                self.setting.max_new_tokens,
                sampling,
            )
            drawn_mask = np.asarray(drawn.mask)
            whole = Texts(
                np.concatenate([tokens, drawn.tokens], axis=1),
                np.concatenate([mask, drawn_mask], axis=1),
                np.concatenate([np.zeros_like(mask), drawn_mask], axis=1),
            )
            yield take(whole, slice(n - start))

    def log_prob(self, x: Any, tick: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Log-probability of each completion given the prompt, its end included, float64[n] (nats)."""
        return self.token_log_prob(x, tick).sum(axis=1, dtype=np.float64)

    def token_log_prob(self, x: Any, tick: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Log-probability of each token of the completions, float32[n, T − 1] (nats); 0 elsewhere.

        Args:
          x: n draws.
          tick: told the numbers of texts and of tokens after each batch.
        """
        found, done = [], 0
        for part in self.scored(x):
            found.append(part)
            if tick is not None:
                tick(len(part), int(x.completion_mask[done : done + len(part)].sum()))
            done += len(part)
        return np.concatenate(found)

    def scored(self, x: Any, first: int = 0) -> Iterator[np.ndarray]:
        """The same batch by batch, float32[batch, T − 1] each; what comes before `first` is left out."""
        n = len(x.tokens)
        # Few sizes of few texts, of which there are as many as happen to be: each is a program.
        size = self.setting.size_of_batches(1 << max(n - 1, 0).bit_length(), self.setting.score_batch_size)
        policy = self.setting.policy(self.config)
        for start in range(first, n, size):
            rows = np.resize(np.arange(start, min(start + size, n)), size)
            batch = Texts(*(np.asarray(array)[rows] for array in (x.tokens, x.mask, x.completion_mask)))
            part = _log_prob(policy, self.params, self.setting.on_devices(batch))
            yield np.asarray(part)[: min(size, n - start)]

    def sharpened(self, temperature: float) -> "Network":
        """The model whose logits are this one's over τ: its last norm's scale, over τ."""
        scale = self.params["norm"]["scale"]
        norm = {"scale": scale / jnp.asarray(temperature, scale.dtype)}
        return Network(self.config, self.params | {"norm": norm}, self.setting)

    def save(self, folder: Path) -> None:
        """Write a checkpoint that transformers loads."""
        weights.save_pretrained(folder, self.config, self.params, self.setting.tokenizer)


@jax.jit
def _keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)


@partial(jax.jit, static_argnums=0)
def _log_prob(policy: Policy, params: Params, x: Texts) -> jax.Array:
    return policy.log_prob(params, x)


def shortest_context(sources: Iterable[str | Path]) -> int:
    """The most tokens that all of some checkpoints take."""
    return min(weights.load_config(source).max_positions for source in sources)


def take(x: Any, rows: Any) -> Any:
    """Some rows of a batch of draws."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], x)


def join(parts: list[Texts]) -> Texts:
    """Batches of draws as one."""
    return Texts(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def fingerprint(*trees: Any) -> str:
    """What tells these arrays from others: a hash of all their bytes, shapes and types; of a network also its shape."""
    digest = hashlib.sha256()
    for one in trees:
        if isinstance(one, Network):
            digest.update(repr(one.config).encode())
    for leaf in jax.tree.leaves([one.params if isinstance(one, Network) else one for one in trees]):
        # Of a copy: an array keeps what it was as numpy's for as long as it lives.
        array = np.asarray(jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()[:24]

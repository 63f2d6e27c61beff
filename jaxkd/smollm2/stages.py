"""One stage of an order on a language model: a distillation or an alignment, durable on disk.

The steps are those of `jaxkd.distill` and `jaxkd.align`, which serve the mixture as well; here is the host loop around
them: what a step learns from is drawn, read as text and rewarded, then the jitted step is given it. Everything random
comes from the stage's key and the number of the step.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import align, checks, distill, durable, files
from jaxkd.align import AlignmentSettings, Coefficients, PreferenceData, State
from jaxkd.policy import Policy
from jaxkd.rewards import bradley_terry
from jaxkd.smollm2 import distillation
from jaxkd.smollm2.adapters import LoRA, WithFrozen, adapt, init, merge, of_draws
from jaxkd.smollm2.adapters import reference as adapters_reference
from jaxkd.smollm2.draws import kept_draws, kept_scores
from jaxkd.smollm2.metering import Coster, Workshop
from jaxkd.smollm2.model import Model
from jaxkd.smollm2.network import Network, ScoredTexts, fingerprint, take
from jaxkd.smollm2.oracles import Oracle
from jaxkd.smollm2.policy import DIVERGENCES, Texts, add_value_head, with_value_head


@dataclass(frozen=True)
class Optimisation:
    """How parameters are updated.

    Attributes:
      learning_rate: peak learning rate of AdamW; it rises linearly and falls along a half cosine.
      warmup_updates: updates of the rise.
      max_gradient_norm: the gradient's global norm is clipped to it.
      weight_decay: decoupled.
      accumulate: batches whose gradients make one update.
      checkpoint_every: steps between checkpoints.

    Raises:
      ValueError: on a number out of range.
    """

    learning_rate: float = 3e-5
    warmup_updates: int = 2
    max_gradient_norm: float = 1.0
    weight_decay: float = 0.0
    accumulate: int = 1
    checkpoint_every: int = 10

    def __post_init__(self):
        checks.number("learning_rate", self.learning_rate, above=0)
        checks.whole("warmup_updates", self.warmup_updates, least=0)
        checks.number("max_gradient_norm", self.max_gradient_norm, above=0)
        checks.number("weight_decay", self.weight_decay, least=0)
        checks.whole("accumulate", self.accumulate, least=1)
        checks.whole("checkpoint_every", self.checkpoint_every, least=1)

    def make(self, num_updates: int):
        """The optax transformation of unit learning rate."""
        return align.make_optimizer(
            num_updates,
            warmup_updates=min(self.warmup_updates, num_updates - 1),
            max_gradient_norm=self.max_gradient_norm,
            weight_decay=self.weight_decay,
            accumulate=self.accumulate,
        )


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher.

    Attributes:
      method: "sequence" for maximum likelihood on the teacher's samples, or a token-level divergence by name.
      num_samples: samples of the teacher to learn from.
      num_held_out: samples of the teacher by which the best student is chosen.
      num_updates: the most updates.
      batch_size: sequences a step.
      check_every: updates between looks at the held-out samples.
      patience: looks without a better student after which it stops.
      on_policy_fraction: λ of token-level methods: share of batches that the student draws itself.
      coefficient: of the divergences that have one.
      optimisation: of its parameters.

    Raises:
      ValueError: on a name or number out of range.
    """

    method: str = "sequence"
    num_samples: int = 512
    num_held_out: int = 64
    num_updates: int = 24
    batch_size: int = 32
    check_every: int = 6
    patience: int = 3
    on_policy_fraction: float = 0.0
    coefficient: float = 0.5
    optimisation: Optimisation = Optimisation()

    def __post_init__(self):
        checks.name("method", self.method, ("sequence", *DIVERGENCES))
        for name in ("num_samples", "num_held_out", "num_updates", "batch_size", "check_every", "patience"):
            checks.whole(name, getattr(self, name), least=1)
        checks.number("on_policy_fraction", self.on_policy_fraction, least=0, most=1)
        checks.number("coefficient", self.coefficient, least=0, most=1)
        if self.method == "generalized_jensen_shannon" and self.coefficient in (0, 1):
            raise ValueError(
                f"coefficient must lie between 0 and 1: at {self.coefficient:g} this Jensen–Shannon divergence is 0 "
                "whatever the student; take forward_kl or reverse_kl"
            )
        if self.method.startswith("skew") and self.coefficient == 1:
            raise ValueError("coefficient must be below 1: at 1 a skewed divergence is 0 whatever the student")
        if self.num_samples < self.batch_size:
            raise ValueError(f"num_samples must be at least batch_size = {self.batch_size}; got {self.num_samples}")
        if self.method == "sequence" and self.on_policy_fraction:
            raise ValueError("on_policy_fraction is for token-level methods: the student's own draws teach it nothing")


@dataclass(frozen=True)
class Alignment:
    """How a policy is aligned.

    Attributes:
      settings: algorithm and sizes.
      coefficients: of the algorithm; learning rate and KL coefficient are set by the stage.
      optimisation: of its parameters.
      lora: adapters that are trained instead of all parameters; None trains all.
      look_every: steps between looks at 64 draws or one batch, whichever is more, for the log; 0 for none.

    Raises:
      ValueError: for PPO or GRPO with accumulation, or PPO on adapters.
    """

    settings: AlignmentSettings = AlignmentSettings(algorithm="online_dpo", num_updates=24, batch_size=32)
    coefficients: Coefficients = Coefficients()
    optimisation: Optimisation = Optimisation()
    lora: LoRA | None = None
    look_every: int = 0

    def __post_init__(self):
        name = self.settings.algorithm
        if self.settings.updates_per_step > 1 and self.optimisation.accumulate > 1:
            raise ValueError(
                f"{name} makes several updates a rollout, so gradients of several rollouts can't be accumulated: "
                "use a larger batch size"
            )
        if name == "ppo" and self.lora is not None:
            raise ValueError("ppo trains a critic beside the policy, adapters have none: use grpo or reinforce on them")


def make_checkpoint(
    out: Path,
    configuration: dict,
    networks: Mapping[str, Network],
    sinks: Callable[[], tuple],
    make: Callable[[Workshop], Network],
) -> None:
    """Carry one stage out in a folder of its own, once: OUT/model is its checkpoint. Says what it does on stderr.

    Args:
      out: the folder.
      configuration: what the result depends on.
      networks: what it is made from, by role; their weights must stay what they were.
      sinks: makes the sinks of metrics, once it is known that there is something to be done.
      make: the stage.

    Raises:
      ValueError: where another process is at it, or the folder holds something else.
    """
    with durable.one_at_a_time(out):
        durable.check_configuration(out, configuration)
        durable.check_weights(out, {role: fingerprint(network) for role, network in networks.items()})
        if durable.read_record(out) is not None:
            durable.let_checkpoint_go(out)
            print(f"{out} is finished: the checkpoint is in {out / 'model'}", file=sys.stderr)
            return
        workshop = Workshop(durable.Progress(), sinks())
        workshop.begin()
        make(workshop).save(out / "model")
        durable.finish(out, {"cost": workshop.spent()})
    print(f"Wrote the checkpoint to {out / 'model'}", file=sys.stderr)


def copied(params: Any) -> Any:
    """Parameters in memory of their own: what is trained is donated, and a reference must never be."""
    return jax.tree.map(jnp.copy, params)


# --- distillation ----------------------------------------------------------------------------------------------------


class _Distilling(NamedTuple):
    """State of a distillation: the student's, and the best so far by its held-out loss (nats a sequence)."""

    student: State
    best: Any
    best_loss: jax.Array
    looks_since: jax.Array


def distil(
    folder: Path,
    key: jax.Array,
    teacher: Network,
    start: Network,
    temperature: float,
    settings: Distillation,
    workshop: Workshop,
    samples: Texts | None = None,
    *,
    keep_last: bool = False,
) -> Network:
    """Distil a teacher into a student.

    Args:
      folder: the stage's own.
      key: random key.
      teacher: whose samples, at the temperature, are learned from; token-level methods compare with its next-token
        distributions at that temperature.
      start: at which the student starts.
      temperature: τ.
      settings: how.
      workshop: progress and cost.
      samples: given ones to learn from instead of the teacher's.
      keep_last: return the student after the last update.

    Returns:
      The student with the smallest loss on held-out samples, unless the last is asked for.

    Raises:
      FloatingPointError: where a loss is no number; the best student may then be the one before training.
    """
    draw_key, step_key = jax.random.split(key)
    on_policy_key = jax.random.fold_in(step_key, 2**31)
    policy = start.setting.policy(start.config)
    # First, for it refuses a teacher of another vocabulary.
    one_step = _distillation_step(settings, policy, teacher.sharpened(temperature), start)
    if samples is None:
        samples = _kept_samples(folder, draw_key, teacher, temperature, settings, workshop)
    held_out, learned = take(samples, slice(settings.num_held_out)), take(samples, slice(settings.num_held_out, None))
    setting, optimisation = start.setting, settings.optimisation
    optimizer = optimisation.make(settings.num_updates)
    rows = _batches(step_key, len(learned.tokens), settings.batch_size)
    num_steps = settings.num_updates * optimisation.accumulate
    every = settings.check_every * optimisation.accumulate
    # Sequence-level, the teacher's part was to draw.
    coster = Coster(workshop, start, None if settings.method == "sequence" else teacher)

    def loss_of(params) -> float:
        coster.scored(held_out)
        return -float(Network(start.config, params, setting).log_prob(held_out).mean())

    def step(state: _Distilling, number: int):
        batch = take(learned, rows(number))
        choice_key, own_key = jax.random.split(jax.random.fold_in(on_policy_key, number))
        if settings.on_policy_fraction and distill.use_student(choice_key, settings.on_policy_fraction):
            student = Network(start.config, state.student.params, setting)
            batch = student.draw(own_key, settings.batch_size)
            coster.sampled(batch)
        if number == 0:
            state = state._replace(best_loss=jnp.float32(loss_of(state.student.params)))
        student, loss = one_step(state.student, setting.on_devices(batch))
        coster.trained(batch)
        tokens = float(batch.completion_mask.sum())
        metrics = {"loss": float(loss), "tokens": tokens}
        state = state._replace(student=student)
        if (number + 1) % every == 0 or number + 1 == num_steps:
            state, held = _keep_best(state, loss_of(student.params))
            metrics |= {"held_out_loss": held, "best_held_out_loss": float(state.best_loss)}
            metrics["held_out_perplexity"] = _perplexity(held, held_out)
        return state, metrics, bool(state.looks_since >= settings.patience) or not np.isfinite(metrics["loss"])

    student = setting.on_mesh(State(copied(start.params), optimizer.init(start.params)))
    state = _Distilling(student, copied(start.params), jnp.float32(np.inf), jnp.int32(0))
    state = _train(folder, state, step, num_steps, "distil", optimisation, workshop)
    if not _finite_losses(folder / durable.METRICS):
        raise FloatingPointError(
            f"the distillation diverged ({folder / durable.METRICS} shows where): lower the learning rate"
        )
    return Network(start.config, state.student.params if keep_last else state.best, setting)


def _train(folder, state, step: Callable, num_steps: int, what: str, optimisation: Optimisation, workshop: Workshop):
    """`durable.train`, told and kept as a stage's workshop and optimisation say."""
    return durable.train(
        folder,
        state,
        step,
        num_steps,
        log=workshop.log(folder),
        progress=workshop.progress,
        what=what,
        checkpoint_every=optimisation.checkpoint_every,
        cost=workshop.spent,
        restore_cost=workshop.restore,
    )


def _kept_samples(folder, key, teacher: Network, temperature, settings: Distillation, workshop: Workshop) -> Texts:
    """The teacher's samples, drawn once and kept beside the stage's checkpoint."""
    total = settings.num_samples + settings.num_held_out
    samples = kept_draws(folder / "teacher.npz", teacher, key, total, temperature, workshop)
    Coster(workshop, teacher).sampled(samples)
    return samples


def _distillation_step(settings: Distillation, policy: Policy, teacher: Network, start: Network) -> Callable:
    """`(state, batch) -> (state, loss)`; the state is donated."""
    learning_rate = jnp.float32(settings.optimisation.learning_rate)
    if settings.method == "sequence":
        step = _sequence_step(policy, settings.optimisation, settings.num_updates)
        return lambda state, x: step(state, (x, learning_rate))
    token_step = _token_step(start.model, teacher.model, settings.method, settings.optimisation, settings.num_updates)
    coefficient = jnp.float32(settings.coefficient)

    def step_with_teacher(state, x):
        state, info = token_step(state, distill.TokenInputs(x, teacher.params, learning_rate, coefficient))
        return state, info.loss

    return step_with_teacher


@lru_cache
def _sequence_step(policy: Policy, optimisation: Optimisation, num_updates: int) -> Callable:
    return jax.jit(distill.maximum_likelihood_step(policy, optimisation.make(num_updates)), donate_argnums=0)


@lru_cache
def _token_step(student: Model, teacher: Model, divergence: str, optimisation: Optimisation, num_updates: int):
    compare = distillation.make_comparison(student, teacher, divergence)
    return jax.jit(distill.token_level_step(compare, optimisation.make(num_updates)), donate_argnums=0)


def _batches(key: jax.Array, n: int, batch_size: int) -> Callable[[int], np.ndarray]:
    """Rows of the batch of each step: every sample once, in an order of its own, before any comes again."""
    a_round = n // batch_size
    if a_round == 0:
        raise ValueError(f"{n} samples, those held out left aside, fill no batch of {batch_size}")

    def rows(number: int) -> np.ndarray:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, number // a_round), n))
        return order[number % a_round * batch_size :][:batch_size]

    return rows


def _keep_best(state: _Distilling, loss: float) -> tuple[_Distilling, float]:
    better = loss < float(state.best_loss)
    if better:
        state = state._replace(best=copied(state.student.params), best_loss=jnp.float32(loss))
    return state._replace(looks_since=jnp.int32(0) if better else state.looks_since + 1), loss


def _perplexity(loss: float, x: Texts) -> float:
    """exp of the loss a token."""
    return float(np.exp(loss * len(x.tokens) / x.completion_mask.sum()))


# --- alignment -------------------------------------------------------------------------------------------------------


def align_policy(
    folder: Path,
    key: jax.Array,
    start: Network,
    reference: Network,
    oracle: Oracle,
    kl_coef: float,
    alignment: Alignment,
    workshop: Workshop,
    *,
    truth_samples: Texts | None = None,
    preferences: PreferenceData | None = None,
) -> Network:
    """Align a policy, held to a reference, by any of `align.ALGORITHMS`.

    Args:
      folder: the stage's own.
      key: random key.
      start: at which the policy starts.
      reference: π_ref; its parameters are read and never donated, so it can't become the trained policy.
      oracle: rewards.
      kl_coef: β, reward units a nat.
      alignment: how.
      workshop: progress and cost.
      truth_samples: of p*, for algorithms that learn from them.
      preferences: a user's pairs, which replace the oracle of an offline algorithm.

    Returns:
      The aligned policy.

    Raises:
      FloatingPointError: where the parameters end as something else than numbers.
    """
    settings, optimisation = alignment.settings, alignment.optimisation
    algorithm = align.ALGORITHMS[settings.algorithm]
    setting, form = start.setting, _form(key, start, reference, alignment)
    coefficients = alignment.coefficients._replace(learning_rate=optimisation.learning_rate, kl_coef=kl_coef)
    coefficients = Coefficients(*(jnp.float32(value) for value in coefficients))
    optimizer = optimisation.make(settings.num_updates)
    draw_key, label_key, data_key = jax.random.split(key, 3)
    coster = Coster(workshop, start)
    data = None
    if algorithm.data:
        data = preferences or _preference_data(
            folder, data_key, reference, oracle, coefficients, settings, coster, truth_samples
        )
    one_step = _alignment_step(form.policy, settings, optimisation, form.of_draws, form.reference_policy)

    def scored_texts(x: Texts) -> ScoredTexts:
        return ScoredTexts(*x, *oracle(setting.texts_of(x), x))

    def drawn(trained, key) -> ScoredTexts:
        x = Network(start.config, form.network(trained), setting).draw(key, settings.batch_size)
        coster.sampled(x)
        return scored_texts(x)

    def charge(draws: ScoredTexts | None, batch: PreferenceData | None) -> None:
        coster.trained(draws if batch is None else batch.x, updates=settings.updates_per_step)
        if draws is not None:
            coster.scored(draws, by=reference)
        if draws is not None and batch is not None:
            # The policy learns from other texts: its pass over its own draws is one more.
            coster.scored(draws)

    def look(trained) -> dict:
        # In the step's own numbers of texts, whose programs are there.
        each = settings.batch_size
        key, size = jax.random.fold_in(draw_key, 2**31), min(each, setting.batch_size)
        x = Network(start.config, form.network(trained), setting).draw(key, -(-LOOK // each) * each, batch_size=size)
        coster.sampled(x)
        scored = [scored_texts(take(x, slice(begin, begin + each))) for begin in range(0, len(x.tokens), each)]
        rewards, hits = (np.concatenate([getattr(part, name) for part in scored]) for name in ("reward", "hit"))
        return {"look_reward": float(rewards.mean()), "look_frequency": float(hits.mean())}

    def step(state: State, number: int):
        draws, batch = None, None
        begin = time.perf_counter()
        if algorithm.on_policy:
            draws = drawn(state.params, jax.random.fold_in(draw_key, number))
        sampling_seconds = time.perf_counter() - begin
        if data is not None:
            batch = jax.tree.map(lambda leaf: leaf[number % len(data.rewards)], data)
        inputs = align.Inputs(
            jax.random.fold_in(label_key, number),
            form.reference,
            coefficients,
            None if draws is None else form.wrap(setting.on_devices(draws)),
            None if batch is None else _wrapped(form, setting.on_devices(batch)),
        )
        state, info = one_step(state, inputs)
        info = {name: float(value) for name, value in info._asdict().items()}
        charge(draws, batch)
        tokens = float(np.asarray((draws if batch is None else batch.x).completion_mask).sum())
        metrics = info | {"tokens": tokens, "sampling_seconds": sampling_seconds}
        metrics["seconds"] = time.perf_counter() - begin
        if alignment.look_every and (number + 1) % alignment.look_every == 0:
            metrics |= look(state.params)
        return state, metrics, not np.isfinite(info["loss"])

    params = copied(form.start)
    state = setting.on_mesh(State(params, optimizer.init(params)))
    num_steps = settings.num_steps * optimisation.accumulate
    state = _train(folder, state, step, num_steps, f"align ({settings.algorithm})", optimisation, workshop)
    if not _finite(state.params) or not _finite_losses(folder / durable.METRICS):
        raise FloatingPointError(
            f"the alignment diverged ({folder / durable.METRICS} shows where): lower the learning rate, "
            "or raise the KL coefficient"
        )
    return Network(start.config, form.network(state.params), setting)


def _finite_losses(path: Path) -> bool:
    """Whether a stage's logged losses are numbers: one that is none ends it, be its parameters as they may."""
    return all(np.isfinite(entry["loss"]) for entry in durable.entries(path))


@jax.jit
def _finite(params) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


LOOK = 64
"""The least draws of a look along training, which takes whole batches."""


class _Form(NamedTuple):
    """What is trained, which is not always the network's parameters.

    Attributes:
      policy: over what is trained.
      start: what is trained, at the start.
      reference_policy: over the reference, which may be a model of another shape.
      reference: its parameters.
      network: from what is trained, the parameters to draw from.
      wrap: draws as the policy takes them.
      of_draws: a function of draws as one of wrapped draws.
    """

    policy: Policy
    start: Any
    reference_policy: Policy
    reference: Any
    network: Callable
    wrap: Callable
    of_draws: Callable


def check_alignment(start: Network, reference: Network, alignment: Alignment) -> None:
    """Refuse, before anything is written, what `align_policy` would refuse.

    Raises:
      ValueError: on adapters that do not fit the model, or whose reference is not the start.
    """
    _form(jax.random.key(0), start, reference, alignment)


def _form(key: jax.Array, start: Network, reference: Network, alignment: Alignment) -> _Form:
    """All parameters, with a critic where PPO wants one; or adapters alone."""
    setting, model = start.setting, start.model
    policy = setting.policy(start.config)
    if alignment.lora is not None:
        if start is not reference and fingerprint(start) != fingerprint(reference):
            raise ValueError("adapters are held to the weights they adapt: with them the reference must be the start")
        lora = alignment.lora
        adapters, adapted = init(lora, start.config, jax.random.fold_in(key, 7)), _adapted(policy, lora)
        return _Form(
            adapted,
            adapters,
            adapted,
            adapters_reference(adapters),
            lambda trained: merge(lora, start.params, trained),
            lambda x: WithFrozen(x, start.params),
            of_draws,
        )
    if alignment.settings.algorithm == "ppo":
        return _Form(
            _with_critic(policy, model),
            add_value_head(model, start.params),
            setting.policy(reference.config),
            reference.params,
            lambda trained: trained["model"],
            _same,
            _same,
        )
    return _Form(policy, start.params, setting.policy(reference.config), reference.params, _same, _same, _same)


def _same(x):
    return x


# One policy for equal arguments: a step is compiled once for each.
_with_critic, _adapted = lru_cache(with_value_head), lru_cache(adapt)


def _wrapped(form: _Form, data: PreferenceData) -> PreferenceData:
    return data._replace(x=form.wrap(data.x))


@lru_cache
def _alignment_step(
    policy: Policy, settings: AlignmentSettings, optimisation: Optimisation, on: Callable, reference_policy: Policy
) -> Callable:
    """The jitted step, one for all stages that share it; the state is donated."""
    optimizer = optimisation.make(settings.num_updates)
    reward, hit = on(lambda x: x.reward), on(lambda x: x.hit)
    step = align.make_step(policy, optimizer, settings, reward, hit, reference_policy)
    return jax.jit(step, donate_argnums=0)


def _preference_data(
    folder, key, reference: Network, oracle, coefficients, settings: AlignmentSettings, coster, truth_samples
) -> PreferenceData:
    """The fixed pairs of an offline algorithm with their reference log-probabilities; leaves lead with the batches."""
    draw_key, label_key = jax.random.split(key)
    total = settings.dataset_batches * settings.batch_size
    if align.ALGORITHMS[settings.algorithm].data == "truth":
        if truth_samples is None or len(truth_samples.tokens) < total:
            there = 0 if truth_samples is None else len(truth_samples.tokens)
            raise ValueError(f"{settings.algorithm} needs {total} samples of the truth, there are {there}")
        x = take(truth_samples, slice(total))
    else:
        x = kept_draws(folder / "pairs.npz", reference, draw_key, total, 1.0, coster.workshop)
        coster.sampled(x, by=reference)
    x = ScoredTexts(*x, *oracle(reference.setting.texts_of(x), x))
    log_prob = reference_log_prob(coster.workshop.root or folder, reference, x, coster.workshop)
    pairs = x.reward.reshape(settings.dataset_batches, 2, -1)
    preferred = bradley_terry(
        label_key,
        *(jnp.asarray(pairs[:, i].reshape(-1)) for i in range(2)),
        coefficients.label_temperature,
        coefficients.flip_rate,
    )
    batched = jax.tree.map(lambda leaf: leaf.reshape(settings.dataset_batches, -1, *leaf.shape[1:]), (x, log_prob))
    return PreferenceData(
        batched[0], batched[0].reward, np.asarray(preferred).reshape(settings.dataset_batches, -1), batched[1]
    )


def reference_log_prob(cache: Path, reference: Network, x: Any, workshop: Workshop) -> np.ndarray:
    """log π_ref of fixed data, float32[n, steps] (nats), computed once: kept by the weights and the data.

    Whoever asks is charged: what a stage costs does not depend on which of them came first.
    """
    Coster(workshop, reference).scored(x)
    path = cache / f"reference-{fingerprint(reference, (x.tokens, x.mask, x.completion_mask))}.npz"
    with files.claim(path, wait=True):
        return kept_scores(path, reference, x, workshop, "score by the reference")

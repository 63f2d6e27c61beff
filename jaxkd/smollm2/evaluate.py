"""What is measured of a language model: the quantities of a mixture, for completions of a prompt.

Log-probabilities are of whole completions, the end included, in nats; quantities "a token" divide by their tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxkd import checks, statistics
from jaxkd.smollm2 import diversity, oracles, preferences
from jaxkd.smollm2.behaviours import Behaviour
from jaxkd.smollm2.draws import kept_draws
from jaxkd.smollm2.metering import Coster, Workshop
from jaxkd.smollm2.network import Network, take
from jaxkd.smollm2.policy import Texts

QUANTITIES = {
    "behaviour_frequency": ("share of completions that show the behaviour", "1"),
    "behaviour_frequency_wilson_low": ("its Wilson interval, lower end", "1"),
    "behaviour_frequency_wilson_high": ("its Wilson interval, upper end", "1"),
    "behaviour_precision": ("mean log p* per token of completions that show the behaviour", "nat/token"),
    "reward": ("mean reward", "reward"),
    "reward_error": ("standard error of the mean reward", "reward"),
    "objective": ("mean reward less KL coefficient times the KL divergence to the reference, if any", "reward"),
    "precision": ("E over x~p of log p*(x)", "nat"),
    "precision_per_token": ("precision per token", "nat/token"),
    "recall": ("E over x~p* of log p(x)", "nat"),
    "recall_per_token": ("recall per token", "nat/token"),
    "recall_gap": ("E over x~p* of log p*(x) - log p(x)", "nat"),
    "recall_gap_per_token": ("recall gap over the tokens of x~p*", "nat/token"),
    "recall_gap_error": ("standard error of the recall gap", "nat"),
    "bounded_recall": ("probability over x~p* that log p(x) >= log p*(x) - log 10", "1"),
    "target_precision": ("E over x~p of log p_target(x)", "nat"),
    "target_recall": ("E of log p(x) over x~p* that show the behaviour", "nat"),
    "target_recall_gap": ("E of log p*(x) - log p(x) over x~p* that show the behaviour", "nat"),
    "recall_of_target": ("E over x~p_target of log p(x)", "nat"),
    "recall_gap_of_target": ("E over x~p_target of log p_target(x) - log p(x)", "nat"),
    "kl_to_base": ("KL divergence to the base", "nat"),
    "kl_to_base_error": ("its standard error", "nat"),
    "kl_to_reference": ("KL divergence to the reference of the last alignment", "nat"),
    "preference_accuracy": ("share of held-out pairs whose chosen answer gained more on the base's log p", "1"),
    "entropy_per_token": ("entropy per token", "nat/token"),
    "held_out_perplexity": ("perplexity per token on samples of the truth", "1"),
    "distinct_1": ("unique tokens over all tokens", "1"),
    "distinct_2": ("unique pairs of tokens over all pairs", "1"),
    "self_bleu": ("mean BLEU-4 of a completion against the others", "1"),
    "length": ("mean tokens of a completion", "token"),
}
"""Long name and unit of everything that `evaluate` measures."""


@dataclass(frozen=True)
class Evaluation:
    """Sizes of an evaluation.

    Attributes:
      num_samples: completions for the behaviour's frequency.
      num_truth_samples: completions of the truth for recall.
      num_scored: completions for precision and divergences.
      num_diverse: completions for self-BLEU.

    Raises:
      ValueError: on a number out of range.
    """

    num_samples: int = 4096
    num_truth_samples: int = 2048
    num_scored: int = 512
    num_diverse: int = 200

    def __post_init__(self):
        for name in ("num_samples", "num_truth_samples", "num_scored", "num_diverse"):
            checks.whole(name, getattr(self, name), least=2)
        if self.num_scored > self.num_samples or self.num_diverse > self.num_samples:
            raise ValueError(f"num_scored and num_diverse must be at most num_samples = {self.num_samples}")


class Yardstick(NamedTuple):
    """What models are held against.

    Attributes:
      truth: p*.
      base: p′.
      target: p_target, or None.
      behaviour: whose frequency is measured.
      reward: `(completions, draws) -> (reward, hit)`.
      counts_all: whether the reward of every sample is computed; else of the scored ones alone.
      truth_samples: one fixed set, [num_truth_samples].
      truth_log_prob: log p* of it.
      truth_hit: whether each shows the behaviour.
      pairs: a user's preferences, chosen answers first, or None.
      base_pairs_log_prob: log p′ of them.
      target_samples: completions of the target, or None.
      target_log_prob: log p_target of them.
    """

    truth: Network
    base: Network
    target: Network | None
    behaviour: Behaviour
    reward: Callable
    counts_all: bool
    truth_samples: Texts
    truth_log_prob: np.ndarray
    truth_hit: np.ndarray
    pairs: Texts | None = None
    base_pairs_log_prob: np.ndarray | None = None
    target_samples: Texts | None = None
    target_log_prob: np.ndarray | None = None


class Evaluated(NamedTuple):
    """Quantities by name, and the first completions as text."""

    quantities: dict[str, float]
    completions: list[str]


def evaluate(
    folder: Path,
    key: jax.Array,
    network: Network,
    yardstick: Yardstick,
    settings: Evaluation,
    workshop: Workshop,
    reference: Network | None = None,
    kl_coef: float = 0.0,
    admits: Callable[[dict], bool] | None = None,
) -> Evaluated:
    """Measure a model; its samples stay in the folder.

    Args:
      folder: the stage's own.
      key: random key, the same for all models of a seed.
      network: the model.
      yardstick: what it is held against.
      settings: sizes.
      workshop: progress and cost.
      reference: what its last alignment was held to; None where there was none.
      kl_coef: β of the objective.
      admits: told what recall is, says whether the rest is to be measured; all other quantities are NaN where not.
    """
    coster = Coster(workshop, network)

    def score(by: Network, x) -> np.ndarray:
        coster.scored(x, by=by)
        with workshop.counted(len(x.tokens), "score") as tick:
            return by.log_prob(x, tick)

    recall = {}
    if admits is not None:
        recall = _recall(network, yardstick, score)
        if not admits(recall):
            return Evaluated({name: float(recall.get(name, np.nan)) for name in QUANTITIES}, [])
    samples = kept_draws(folder / "samples.npz", network, key, settings.num_samples, 1.0, workshop)
    coster.sampled(samples)
    texts = network.setting.texts_of(samples)
    scored = take(samples, slice(settings.num_scored))
    own = score(network, scored)
    by_truth = score(yardstick.truth, scored)
    by_base = by_truth if yardstick.base is yardstick.truth else score(yardstick.base, scored)
    found = _reward_and_behaviour(samples, texts, scored, yardstick, settings, score)
    found |= recall or _recall(network, yardstick, score)
    found |= _recall_of_target(network, yardstick, score)
    found |= {
        "precision": by_truth.mean(),
        "precision_per_token": by_truth.sum() / scored.completion_mask.sum(),
        "entropy_per_token": -own.sum() / scored.completion_mask.sum(),
        "kl_to_base": (own - by_base).mean(),
        "kl_to_base_error": _standard_error(own - by_base),
        "target_precision": np.nan if yardstick.target is None else score(yardstick.target, scored).mean(),
        "preference_accuracy": _preference_accuracy(yardstick, partial(score, network)),
        "length": samples.completion_mask.sum(axis=1).mean(),
    }
    kl = np.nan
    if reference is not None:
        by_reference = by_base if reference is yardstick.base else score(reference, scored)
        kl = (own - by_reference).mean()
    found |= {"kl_to_reference": kl, "objective": found["reward"] - kl_coef * kl} | _diversity(samples, settings)
    return Evaluated({name: float(found[name]) for name in QUANTITIES}, texts[:32])


def _reward_and_behaviour(samples, texts, scored, yardstick: Yardstick, settings, score) -> dict:
    hits = oracles.hits(yardstick.behaviour, texts)
    rewarded = (texts, samples) if yardstick.counts_all else (texts[: settings.num_scored], scored)
    rewards, _ = yardstick.reward(*rewarded)
    low, high = statistics.wilson_interval(int(hits.sum()), len(hits))[:2]
    shown = take(samples, np.flatnonzero(hits)[: settings.num_scored // 4])
    precision = np.nan
    if len(shown.tokens):
        precision = score(yardstick.truth, shown).sum() / shown.completion_mask.sum()
    return {
        "behaviour_frequency": hits.mean(),
        "behaviour_frequency_wilson_low": low,
        "behaviour_frequency_wilson_high": high,
        "behaviour_precision": precision,
        "reward": rewards.mean(dtype=np.float64),
        "reward_error": _standard_error(rewards),
    }


def _preference_accuracy(yardstick: Yardstick, log_prob: Callable[[Texts], np.ndarray]) -> float:
    if yardstick.pairs is None:
        return np.nan
    return preferences.accuracy(log_prob(yardstick.pairs), yardstick.base_pairs_log_prob)


def _recall(network: Network, yardstick: Yardstick, score) -> dict:
    x, hit = yardstick.truth_samples, yardstick.truth_hit
    log_prob = yardstick.truth_log_prob if network is yardstick.truth else score(network, x)
    gap = yardstick.truth_log_prob - log_prob
    tokens = x.completion_mask.sum()
    return {
        "recall": log_prob.mean(),
        "recall_per_token": log_prob.sum() / tokens,
        "held_out_perplexity": np.exp(-log_prob.sum() / tokens),
        "recall_gap": gap.mean(),
        "recall_gap_per_token": gap.sum() / tokens,
        "recall_gap_error": _standard_error(gap),
        "bounded_recall": (gap <= np.log(10)).mean(),
        "target_recall": log_prob[hit].mean() if hit.any() else np.nan,
        "target_recall_gap": gap[hit].mean() if hit.any() else np.nan,
    }


def _recall_of_target(network: Network, yardstick: Yardstick, score) -> dict:
    """Recall with p_target in place of p*."""
    x, by_target = yardstick.target_samples, yardstick.target_log_prob
    if x is None:
        return {"recall_of_target": np.nan, "recall_gap_of_target": np.nan}
    log_prob = by_target if network is yardstick.target else score(network, x)
    return {"recall_of_target": log_prob.mean(), "recall_gap_of_target": (by_target - log_prob).mean()}


def _diversity(samples: Texts, settings: Evaluation) -> dict:
    rows = [row[kept].tolist() for row, kept in zip(samples.tokens, samples.completion_mask, strict=True)]
    some = rows[: settings.num_diverse]
    return {
        "distinct_1": diversity.distinct_n(some, 1),
        "distinct_2": diversity.distinct_n(some, 2),
        "self_bleu": diversity.self_bleu(some),
    }


def _standard_error(values: np.ndarray) -> float:
    return np.std(values, ddof=1) / np.sqrt(len(values))

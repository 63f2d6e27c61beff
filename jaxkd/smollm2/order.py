"""Both orders on a language model: everything that an experiment's results depend on, checked when it is made."""

from dataclasses import asdict, dataclass, replace

from jaxkd import checks, pipelines
from jaxkd.align import ALGORITHMS, check_label_noise, label_coefficients
from jaxkd.pipelines import Distil
from jaxkd.smollm2 import behaviours, oracles, preferences
from jaxkd.smollm2.evaluate import Evaluation
from jaxkd.smollm2.preferences import Preferences
from jaxkd.smollm2.stages import Alignment, Distillation
from jaxkd.smollm2.students import Start

REWARDS = ("behaviour", *oracles.WRAPPERS, "plain")
CEILING = "ceiling"
_CEILING = Distil(pipelines.TRUTH, temperature=1.0)
FROM_PREFERENCES = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.data == "truth")
"""Algorithms that can be given a user's pairs."""

MOST_SEED = 2**32 - 1
"""The largest seed that a random key takes in."""


def all_stages() -> dict[str, pipelines.Stage]:
    """The stages of `pipelines.STAGES` as it is now, and the ceiling: a student of the truth's own good samples."""
    return pipelines.STAGES | {CEILING: _CEILING}


def arms() -> tuple[str, ...]:
    """The arms that can be asked for: those of `pipelines.arms` as they are now, and the ceiling."""
    return (*pipelines.arms(), CEILING)


@dataclass(frozen=True)
class Order:
    """Everything that an experiment's results depend on.

    Attributes:
      truth: source of p*.
      base: source of p′; "truth" for the truth itself, "fit:SOURCE" for SOURCE fitted to samples of the truth.
      students: where students start: "same" (at the base), "layers:N" (N of the base's layers), "layers:0,7,29"
        (these), or a source.
      target: source of the target; "distil:τ" for the base distilled at τ; None where no reward asks for one.
      reward: a name of `REWARDS`.
      behaviour: specification of the behaviour (`behaviours.parse`), or "auto" to choose by measured rate; until one is
        chosen, a run folder may go on with another.
      preferences: pairs of a user that alignments learn from instead of the reward, which is then only measured.
      prompt: what completions follow.
      max_new_tokens: the most tokens of a completion.
      arms: names of `arms()`; the ceiling only where the reward is the behaviour, and on the seeds of the rest.
      algorithms: names of `align.ALGORITHMS`.
      temperatures: τ of the distillations.
      temperatures_of_rest: more of them, of the first student and algorithm alone.
      kl_coefs: β, reward units a nat; one alone with ORPO, which has none.
      seeds: one run of all stages each, of the first student and algorithm.
      seeds_of_rest: the same of every other student with the first algorithm, and the other way round; the ceiling of
        every student.
      distillation: how students learn.
      alignment: how policies are aligned; its algorithm is that of `algorithms`, and its flip rate that of the oracle's
        labels, which robust DPO also assumes; with preferences the share that robust DPO assumes, and nothing else.
      evaluation: sizes.
      look_every: steps of an alignment between looks at 64 samples; 0 for none.
      most_held_out_kl: cut students with a larger recall gap a token (nats) are not admitted.
      batch_size: sequences drawn at a time.
      score_batch_size: sequences scored at a time; None for as many as are drawn.

    Raises:
      ValueError: on names or numbers out of range.
    """

    truth: str
    base: str = "truth"
    students: tuple[str, ...] = ("same",)
    target: str | None = None
    reward: str = "behaviour"
    behaviour: str = "auto"
    preferences: Preferences | None = None
    prompt: str = "The"
    max_new_tokens: int = 32
    arms: tuple[str, ...] = ("kd_align", "align_kd", "align_kd_sharpened")
    algorithms: tuple[str, ...] = ("online_dpo",)
    temperatures: tuple[float, ...] = (1.0, 0.6)
    temperatures_of_rest: tuple[float, ...] = ()
    kl_coefs: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0,)
    seeds_of_rest: tuple[int, ...] = (0,)
    distillation: Distillation = Distillation()
    alignment: Alignment = Alignment()
    evaluation: Evaluation = Evaluation()
    look_every: int = 0
    most_held_out_kl: float = 0.5
    batch_size: int = 32
    score_batch_size: int | None = None

    def __post_init__(self):
        checks.name("reward", self.reward, REWARDS)
        checks.names("arms", self.arms, arms())
        checks.names("algorithms", self.algorithms, ALGORITHMS)
        checks.numbers("temperatures", self.temperatures, above=0)
        if self.temperatures_of_rest:
            checks.numbers("temperatures of the rest", self.temperatures_of_rest, above=0)
        checks.numbers("kl_coefs", self.kl_coefs, above=0)
        checks.wholes("--seeds", self.seeds, least=0, most=MOST_SEED)
        checks.wholes("--seeds-of-rest", self.seeds_of_rest, least=0, most=MOST_SEED)
        checks.no_repeats("students", self.students)
        checks.whole("max_new_tokens", self.max_new_tokens, least=1)
        checks.whole("batch_size", self.batch_size, least=1)
        if self.score_batch_size is not None:
            checks.whole("score_batch_size", self.score_batch_size, least=1)
        checks.whole("look_every", self.look_every, least=0)
        checks.number("most_held_out_kl", self.most_held_out_kl, least=0)
        for student in self.students:
            Start.parse(student)
        if self.target is not None and self.target.startswith("distil:"):
            checks.number("the target's temperature", target_temperature(self.target), above=0)
        if self.behaviour != "auto":
            behaviours.parse(self.behaviour)
        if self.reward != "behaviour" and self.target is None:
            raise ValueError(f"the reward {self.reward!r} is a likelihood under a target: give target")
        for algorithm in self.algorithms:
            replace(self.alignment, settings=replace(self.alignment.settings, algorithm=algorithm))
        if self.reward != "behaviour" and self.preferences is None and "kto" in self.algorithms:
            raise ValueError("kto needs a reward that tells desirable texts from others: behaviour, or preferences")
        if self.preferences is not None:
            checks.names("algorithms that learn from preferences", self.algorithms, FROM_PREFERENCES)
        if "orpo" in self.algorithms and len(self.kl_coefs) > 1:
            raise ValueError(
                f"orpo has no KL coefficient, its models would be the same at each of --kl-coefs {self.kl_coefs}: "
                "give one, or run it by itself"
            )
        flip_rate = self.alignment.coefficients.flip_rate
        checks.number("--label-noise", flip_rate, least=0, most=0.5)
        # Of a user's pairs none is flipped: the share is robust DPO's alone.
        noisy = self.algorithms if self.preferences is None else [a for a in self.algorithms if a == "robust_dpo"]
        check_label_noise("--label-noise", noisy, [flip_rate])
        if self.preferences is not None:
            preferences.check_label_noise(self.algorithms, flip_rate)
        if CEILING in self.arms and self.outcome != "behaviour_frequency":
            asked = "preferences" if self.preferences is not None else f"the reward {self.reward!r}"
            raise ValueError(
                f"the {CEILING} learns from texts that show the behaviour, which {asked} does not ask for: "
                "leave it away from --arms"
            )

    @property
    def outcome(self) -> str:
        """The quantity (`evaluate.QUANTITIES`) that alignments are to raise."""
        if self.preferences is not None:
            return "preference_accuracy"
        return "behaviour_frequency" if self.reward == "behaviour" else "reward"

    @property
    def all_temperatures(self) -> tuple[float, ...]:
        """Every τ at which anything is distilled, the main ones first."""
        return tuple(dict.fromkeys((*self.temperatures, *self.temperatures_of_rest)))

    def lengths(self) -> dict[str, int]:
        """Lengths of the axes of `pipelines.AXES`."""
        return {"temperature": len(self.temperatures), "kl_coef": len(self.kl_coefs)}


def target_temperature(target: str) -> float:
    """τ of a target "distil:τ"."""
    try:
        return float(target.partition(":")[2])
    except ValueError:
        raise ValueError(f"{target!r} must end in a number") from None


def alignment_of(order: Order, algorithm: str) -> Alignment:
    """How one algorithm aligns."""
    alignment = order.alignment
    labels = label_coefficients(algorithm, alignment.coefficients.flip_rate)
    return replace(
        alignment,
        settings=replace(alignment.settings, algorithm=algorithm),
        coefficients=alignment.coefficients._replace(**labels),
        look_every=order.look_every,
    )


_MORE_ROWS = ("students", "arms", "algorithms", "temperatures", "temperatures_of_rest", "kl_coefs", "seeds")
_MORE_ROWS += ("seeds_of_rest", "batch_size", "score_batch_size")


def configuration(order: Order) -> dict:
    """What every row of a run folder depends on, as plain JSON; an axis that grows only adds rows."""
    # Orders without a preference file say nothing of one.
    left_out = (*_MORE_ROWS, "preferences") if order.preferences is None else _MORE_ROWS
    return {key: value for key, value in asdict(order).items() if key not in left_out}

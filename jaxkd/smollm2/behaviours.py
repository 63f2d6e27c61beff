"""Behaviours: predicates on the text of a completion, so that "rare but desirable" is a measured frequency.

A behaviour is named by a specification, a short text:

    digit              an ASCII digit is mentioned
    words:cat,dog      any of these words, whole and in any case
    ends:full-stop     the last sign that is no space and no closing quote is a full stop
    regex:PATTERN      Python's `re.search` finds the pattern
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Behaviour = Callable[[str], bool]

READY: dict[str, str] = {
    "year": r"regex:\b(1[5-9]\d\d|20\d\d)\b",
    "percent": r"regex:\d ?%|\bpercent\b",
    "money": r"regex:[$€£] ?\d",
    "question mark": r"regex:\?",
    "semicolon": r"regex:;",
    "exclamation mark": r"regex:!",
    "parenthesis": r"regex:\(",
    "quotation": r'regex:["“]',
    "children": "words:child,children",
    "women": "words:woman,women,girl,girls",
    "war": "words:war,wars,battle,army,military",
    "water": "words:water,river,sea,ocean,lake",
    "music": "words:music,song,songs,band,album",
    "university": "words:university,college,professor",
    "scientists": "words:scientist,scientists,researcher,researchers",
    "climate": "words:climate,weather,temperature",
    "animals": "words:animal,animals,dog,dogs,cat,cats,bird,birds",
    "food": "words:food,foods,eat,eating,diet",
    "health": "words:health,disease,patients,doctor",
    "government": "words:government,president,minister,law",
}
"""Candidates whose frequency is to be measured before one is chosen: name and specification."""

_CLOSING = " \t\r\n\"'”’)"


def parse(spec: str) -> Behaviour:
    """A predicate from its specification.

    Raises:
      ValueError: on anything that is none of the forms at the head of this module.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digit":
        return lambda text: any(sign in "0123456789" for sign in text)
    if spec == "ends:full-stop":
        return lambda text: text.rstrip(_CLOSING).endswith(".")
    if kind == "words":
        words = [word.strip() for word in rest.split(",") if word.strip()]
        if words:
            return _search(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    if kind == "regex" and rest:
        try:
            return _search(rest)
        except re.error as error:
            raise ValueError(f"the pattern of the behaviour {spec!r} is no regular expression: {error}") from None
    raise ValueError(f"a behaviour must be digit, words:one,two, ends:full-stop or regex:PATTERN; got {spec!r}")


def _search(pattern: str, flags: int = 0) -> Behaviour:
    compiled = re.compile(pattern, flags)
    return lambda text: compiled.search(text) is not None


def rates(candidates: Mapping[str, str], texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts that show each candidate, by name."""
    return {name: float(np.mean([*map(parse(spec), texts)])) for name, spec in candidates.items()}


def choose(candidates: Mapping[str, str], texts: Sequence[str], low: float = 0.01, high: float = 0.03) -> str:
    """The candidate whose share lies between `low` and `high`, nearest their geometric middle.

    Raises:
      ValueError: where none does; lists what was measured.
    """
    measured = rates(candidates, texts)
    fitting = {name: rate for name, rate in measured.items() if low <= rate <= high}
    if not fitting:
        told = ", ".join(f"{name} {rate:.4f}" for name, rate in measured.items())
        raise ValueError(
            f"no behaviour is shown by {low:.0%} to {high:.0%} of {len(texts)} samples of the base ({told}): name one"
        )
    return min(fitting, key=lambda name: abs(np.log(fitting[name] / np.sqrt(low * high))))


def check_rate(name: str, hits: int, total: int) -> None:
    """Refuse a behaviour that is never or always there: it leaves nothing to align.

    Raises:
      ValueError: where no text, or every text, shows it.
    """
    if hits in (0, total):
        told = "never" if hits == 0 else "always"
        raise ValueError(f"the behaviour {name!r} is {told} shown by {total} samples of the base: choose another")

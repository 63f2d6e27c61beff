import math

import pytest

from jaxkd.smollm2 import behaviours
from jaxkd.statistics import wilson_interval


@pytest.mark.parametrize(
    ("spec", "shown", "not_shown"),
    [
        ("digit", ["in 7 days", "0"], ["", "seven", "٣", "²"]),
        ("words:apple, pear", ["An Apple.", "PEAR", "a (pear)", "apple's"], ["", "apples", "pineapple", "apple_1"]),
        ("words:U.S.,New York", ["the U.S. army", "in new york,"], ["the US", "U.S.A", "New Yorker"]),
        (
            "ends:full-stop",
            ["It is.", "It is. \n", 'He said "no."', "(so.)", "“so.” ", "..."],
            ["", "It is", "a.b", "?"],
        ),
        ("ends:full-stop", ["So it is.'"], ["It is,", '."a', "It is…"]),
        (r"regex:a:b|^\d", ["xa:b", "1 x"], ["a", " 1"]),
    ],
)
def test_a_specification_is_shown_by_texts(spec, shown, not_shown):
    behaviour = behaviours.parse(spec)
    assert [text for text in shown if behaviour(text) is not True] == []
    assert [text for text in not_shown if behaviour(text) is not False] == []


@pytest.mark.parametrize(
    "spec", ["", "often", "digit:", "words:", "words: ,", "ends:", "ends:comma", "regex:", "Digit"]
)
def test_another_specification_is_refused(spec):
    with pytest.raises(ValueError, match="must be digit, words:one,two, ends:full-stop or regex:PATTERN; got"):
        behaviours.parse(spec)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "*"])
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="is no regular expression"):
        behaviours.parse(f"regex:{pattern}")


def test_ready_behaviours_are_shown_where_they_should_be():
    shown = {
        "year": ["in 1990", "the 1990s", "(2024)"],
        "percent": ["10%", "5 percent", "3 %"],
        "money": ["$5", "€ 20"],
        "question mark": ["Who?"],
        "exclamation mark": ["Oh!"],
        "semicolon": ["a; b"],
        "women": ["She is"],
        "world": ["the world."],
        "however": ["However, it"],
        "government": ["the President"],
        "science": ["a study"],
        "health": ["medical"],
        "earth": ["The Earth"],
        "music": ["a song"],
    }
    assert shown.keys() == behaviours.READY.keys()
    for name, texts in shown.items():
        behaviour = behaviours.parse(behaviours.READY[name])
        assert all(map(behaviour, texts)), name
        assert not behaviour("The cat sat on a mat, 12345 or 3.1415 or 1200 times."), name


def test_frequency_has_wilsons_interval():
    found = behaviours.frequency(behaviours.parse("digit"), ["1", "a", "b", "2"])
    assert (found.count, found.total, found.rate) == (2, 4, 0.5)
    assert (found.low, found.high) == wilson_interval(2, 4)
    assert math.isnan(behaviours.frequency(behaviours.parse("digit"), []).rate)


CANDIDATES = {"common": "words:a", "edge": "words:b", "middle": "words:c", "rare": "words:d", "never": "words:e"}
TEXTS = ["a"] * 500 + ["b"] * 30 + ["c"] * 17 + ["d"] * 5 + ["x"] * 448


def test_the_candidate_nearest_the_geometric_middle_is_chosen():
    assert behaviours.rates(CANDIDATES, TEXTS) == dict(zip(CANDIDATES, [0.5, 0.03, 0.017, 0.005, 0], strict=True))
    assert behaviours.choose(CANDIDATES, TEXTS) == "middle"
    assert behaviours.choose(CANDIDATES, TEXTS, low=0.02, high=0.03) == "edge"
    # From 0.005 to 0.03 the arithmetic middle is 0.0175, the geometric one 0.012: 0.017 is nearest to both, but of
    # 0.005 and 0.03 alone the first is nearest to sqrt(0.001 · 0.03).
    two = {name: CANDIDATES[name] for name in ("edge", "rare")}
    assert behaviours.choose(two, TEXTS, low=0.001, high=0.03) == "rare"


def test_of_equal_candidates_the_first_is_chosen():
    assert behaviours.choose({"one": "words:c", "two": "regex:c"}, TEXTS) == "one"


@pytest.mark.parametrize("texts", [TEXTS, []])
def test_where_none_fits_the_measured_rates_are_told(texts):
    told = "no behaviour is shown by 0.1 % to 0.4 % of 1000 samples .*common 0.5000, .*rare 0.0050, never 0.0000"
    with pytest.raises(ValueError, match=told if texts else "of 0 samples .*common nan"):
        behaviours.choose(CANDIDATES, texts, low=0.001, high=0.004)


@pytest.mark.parametrize(("low", "high", "flag"), [(0, 0.1, "low"), (0.2, 0.1, "low"), (0.1, 1, "high")])
def test_bounds_are_checked(low, high, flag):
    with pytest.raises(ValueError, match=f"^{flag} must be"):
        behaviours.choose(CANDIDATES, TEXTS, low, high)


@pytest.mark.parametrize(("hits", "told"), [(0, "never"), (9, "always")])
def test_a_behaviour_without_two_outcomes_is_refused(hits, told):
    behaviours.check_rate("digit", 1, 9)
    with pytest.raises(ValueError, match=f"'digit' is {told} shown by 9 samples of the base"):
        behaviours.check_rate("digit", hits, 9)

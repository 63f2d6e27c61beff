import math

import pytest

from jaxkd.smollm2 import behaviours
from jaxkd.statistics import wilson_interval


@pytest.mark.parametrize(
    ("spec", "shown", "not_shown"),
    [
        ("digit", "in 7 days", "in seven days ²"),
        ("words:cat,dog", "The Dog barked", "a catalogue of dogs"),
        ("ends:full-stop", 'He left." ', "He left. Then"),
        (r"regex:\b19\d\d\b", "in 1987", "in 21987"),
        ("words:a.b", "an a.b c", "an axb c"),
    ],
)
def test_predicates(spec, shown, not_shown):
    behaviour = behaviours.parse(spec)
    assert behaviour(shown) and not behaviour(not_shown)


@pytest.mark.parametrize("spec", ["digits", "words:", "words: , ", "ends:comma", "regex:", "", "regex:("])
def test_refuses_specifications(spec):
    with pytest.raises(ValueError, match="behaviour"):
        behaviours.parse(spec)


def test_a_function_of_the_users_is_a_behaviour(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef valid(text):\n    return text.count('{')\n\nnumber = 3\n")
    shows = behaviours.parse(f"python:{file}:valid")
    assert (shows("{}"), shows("none")) == (True, False)
    for spec, told in (
        (f"python:{file}:number", "has no function 'number'"),
        (f"python:{file}:missing", "has no function 'missing'"),
        (f"python:{tmp_path / 'none.py'}:valid", "can't be run: FileNotFoundError"),
    ):
        with pytest.raises(ValueError, match=told):
            behaviours.parse(spec)


def test_every_ready_behaviour_can_be_read():
    for spec in behaviours.READY.values():
        assert not behaviours.parse(spec)("")


def test_the_most_frequent_of_those_in_range_is_chosen():
    texts = ["a"] * 2 + ["b"] * 1 + ["c"] * 30 + ["plain"] * 67
    candidates = {"two": "words:a", "one": "words:b", "thirty": "words:c", "none": "digit"}
    assert behaviours.rates(candidates, texts) == {"two": 0.02, "one": 0.01, "thirty": 0.3, "none": 0.0}
    assert behaviours.choose(candidates, texts) == "two"
    with pytest.raises(ValueError, match=r"thirty 0\.3000, none 0\.0000"):
        behaviours.choose({name: candidates[name] for name in ("thirty", "none")}, texts)


def test_the_nearest_to_the_range_is_measured_by_ratio():
    texts = ["a"] * 12 + ["b"] * 2 + ["c"] * 60 + ["d"] * 40 + ["plain"] * 886
    candidates = {"c": "words:c", "b": "words:b", "a": "words:a", "none": "digit", "d": "words:d"}
    # Of those in the range the most frequent; 4 % is a third above it, 0.2 % a fifth of its lower end, 6 % twice.
    assert behaviours.nearest(candidates, texts) == "a"
    assert behaviours.nearest(candidates, texts, 0.01, 0.012) == "a" == behaviours.choose(candidates, texts)
    del candidates["a"]
    assert behaviours.nearest(candidates, texts) == "d"
    del candidates["d"]
    assert behaviours.nearest(candidates, texts) == "c"
    assert behaviours.nearest(candidates, texts, 0.005, 0.01) == "b"
    for left in ({"none": "digit"}, {"all": "regex:."}):
        with pytest.raises(ValueError, match="every behaviour is never or always shown by 1000 samples"):
            behaviours.nearest(left, texts)


def test_refuses_what_is_never_or_always_shown():
    behaviours.check_rate("x", 1, 2)
    for hits, word in ((0, "never"), (2, "always")):
        with pytest.raises(ValueError, match=word):
            behaviours.check_rate("x", hits, 2)


def test_a_word_may_end_in_a_sign():
    assert behaviours.parse("words:U.S.")("the U.S. army")


def test_a_year_is_no_part_of_a_longer_number():
    year = behaviours.parse(behaviours.READY["year"])
    assert year("the 1990s") and year("(2024)")
    assert not year("12024") and not year("1234")


def test_frequency_has_wilsons_interval():
    found = behaviours.frequency(behaviours.parse("digit"), ["1", "a", "b", "2"])
    assert (found.count, found.total, found.rate) == (2, 4, 0.5)
    assert (found.low, found.high) == wilson_interval(2, 4)
    assert math.isnan(behaviours.frequency(behaviours.parse("digit"), []).rate)


def test_bounds_of_the_choice_are_checked():
    candidates, texts = {"five": "words:b", "seventeen": "words:a"}, ["a"] * 17 + ["b"] * 5 + ["plain"] * 978
    assert behaviours.choose(candidates, texts, low=0.001, high=0.03) == "seventeen"
    assert behaviours.choose(candidates, texts, low=0.001, high=0.016) == "five"
    for low, high, flag in ((0, 0.1, "low"), (0.2, 0.1, "low"), (0.1, 1, "high")):
        with pytest.raises(ValueError, match=f"^{flag} must be"):
            behaviours.choose(candidates, texts, low, high)
    with pytest.raises(ValueError, match="of 0 samples"):
        behaviours.choose(candidates, [])

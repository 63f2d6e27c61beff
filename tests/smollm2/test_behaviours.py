import pytest

from jaxkd.smollm2 import behaviours


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


def test_every_ready_behaviour_can_be_read():
    for spec in behaviours.READY.values():
        assert not behaviours.parse(spec)("")


def test_the_rate_nearest_the_geometric_middle_is_chosen():
    texts = ["a"] * 2 + ["b"] * 1 + ["c"] * 30 + ["plain"] * 67
    candidates = {"two": "words:a", "one": "words:b", "thirty": "words:c", "none": "digit"}
    assert behaviours.rates(candidates, texts) == {"two": 0.02, "one": 0.01, "thirty": 0.3, "none": 0.0}
    assert behaviours.choose(candidates, texts) == "two"
    with pytest.raises(ValueError, match=r"thirty 0\.3000, none 0\.0000"):
        behaviours.choose({name: candidates[name] for name in ("thirty", "none")}, texts)


def test_refuses_what_is_never_or_always_shown():
    behaviours.check_rate("x", 1, 2)
    for hits, word in ((0, "never"), (2, "always")):
        with pytest.raises(ValueError, match=word):
            behaviours.check_rate("x", hits, 2)

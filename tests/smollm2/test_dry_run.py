"""What a dry run says of an order."""

import pytest

from jaxkd.smollm2 import dry_run
from tests.smollm2 import tiny_order


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"behaviour": "digit"}, "behaviour: digit"),
        ({"behaviour": "auto"}, "1 % to 3 % of its completions show; where there is none the run stops"),
        ({"behaviour": "auto", "reward": "plain", "target": "distil:0.5"}, "or the one nearest to that"),
    ],
)
def test_the_behaviour_is_told(changes, words):
    assert words in dry_run._behaviour(tiny_order.make(**changes))

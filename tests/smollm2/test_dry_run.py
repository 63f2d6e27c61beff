"""What a dry run says of an order."""

from dataclasses import replace

import jax
import pytest

from jaxkd.smollm2 import cost, dry_run, sharding
from jaxkd.smollm2.network import Layout
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


@pytest.mark.slow
@pytest.mark.loose
def test_a_token_level_step_is_compiled_with_its_teacher(monkeypatch):
    """The ceiling learns from texts alone, whatever the method."""
    for other in ("_scoring", "_aligning"):
        monkeypatch.setattr(dry_run, other, lambda name, *_: (name,))
    tiny = tiny_order.make(arms=("align_kd", "ceiling"))
    order = replace(tiny, distillation=replace(tiny.distillation, method="forward_kl"))
    config = replace(dry_run.config_of("random:tiny")[0], num_layers=1)
    teacher = replace(config, num_layers=2)
    configs = {"truth": teacher, "base": teacher, "student same": config}
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    steps = {one[0]: one[1:] for one in dry_run._steps(order, configs, Layout(mesh=mesh))}
    assert {name for name in steps if name.startswith("distil")} == {
        "distil student same",
        "distil student same from base (forward_kl)",
    }
    times, compiled, flops, _ = steps["distil student same from base (forward_kl)"]
    # The student and align_kd, six updates each, of nine tokens that attend to half of them.
    assert times == 12
    assert flops == 3 * cost.forward_flops(config, 72, 4.5) + cost.forward_flops(teacher, 72, 4.5)
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given > 4 * (3 * config.num_parameters + teacher.num_parameters)
    times, compiled, flops, _ = steps["distil student same"]
    assert times == 6 and flops == 3 * cost.forward_flops(config, 72, 4.5)
    assert compiled.memory_analysis().argument_size_in_bytes < 4 * (3 * config.num_parameters + teacher.num_parameters)

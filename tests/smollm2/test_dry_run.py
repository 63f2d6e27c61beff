"""What a dry run says of an order."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd import pipelines
from jaxkd.smollm2 import cost, dry_run, passes, sharding
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.network import Layout
from jaxkd.smollm2.order import CEILING
from jaxkd.smollm2.preferences import Preferences
from jaxkd.smollm2.rows import role_of, rows_of
from tests.smollm2 import tiny_order

TINY = Config.tiny()


def one_device() -> Layout:
    return Layout(mesh=sharding.make_mesh(1, devices=jax.devices()[:1]))


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


@pytest.fixture
def alignments(monkeypatch):
    """Of an order: name, how often, and settings of each alignment's step that would be compiled."""
    monkeypatch.setattr(dry_run, "_scoring", lambda name, *_: (name,))
    monkeypatch.setattr(dry_run, "_distilling", lambda name, *_: (name,))
    monkeypatch.setattr(dry_run, "_aligning", lambda name, steps, both, layout, order, *more: (name, steps, *more))

    def of(order):
        configs = dict.fromkeys(("truth", "base", "student same"), TINY)
        found = [one for one in dry_run._steps(order, configs, None) if one[0].startswith("align")]
        return {name: (steps, settings, length) for name, steps, settings, length in found}

    return of


def test_each_kind_of_alignment_has_a_step_of_its_own(alignments):
    """Of algorithms that differ in the loss alone, one is compiled; a critic, epochs and fixed data are others."""
    tiny = tiny_order.make()
    settings = replace(tiny.alignment.settings, num_updates=8, group_size=4)
    order = tiny_order.make(
        arms=("kd_align",),
        algorithms=("online_dpo", "reinforce", "ppo", "grpo", "offline_dpo_ref", "kto", "ipo"),
        alignment=replace(tiny.alignment, settings=settings),
    )
    found = alignments(order)
    assert {name: steps for name, (steps, _, _) in found.items()} == {
        "align student same (online_dpo, reinforce)": 16,
        "align student same (ppo)": 2,
        "align student same (grpo)": 2,
        "align student same (offline_dpo_ref, ipo)": 16,
        "align student same (kto)": 8,
    }
    assert all(name.split("(")[1].startswith(settings.algorithm) for name, (_, settings, _) in found.items())


def test_a_model_has_the_shape_of_what_it_starts_at(monkeypatch):
    """Be it held to a student of another depth, or made by way of one."""
    monkeypatch.setitem(pipelines.STAGES, "sharpened_base", pipelines.Sharpen("base_start_student_reference", 0.5))
    order = tiny_order.make(
        students=("layers:1",), arms=(*pipelines.ARMS, "sharpened_base", CEILING), algorithms=("reinforce",)
    )
    made = {row.folder: row for row in rows_of(order, Path())}
    of_base = {row.name for row in made.values() if role_of(row) == "base"}
    assert of_base == {"aligned_base", "base_start_student_reference", "sharpened_base"}
    assert {role_of(row) for row in made.values() if row.name not in of_base} == {"student layers:1"}
    kinds = {row.name: dry_run._kind_of_alignment(row, made, order) for row in made.values() if row.is_alignment}
    assert kinds["base_start_student_reference"][:2] == ("base", "student layers:1")
    assert kinds["kd_align_anchored"][:2] == ("student layers:1", "base")
    configs = {"base": TINY, "student layers:1": replace(TINY, num_layers=1)}
    row = next(row for row in made.values() if row.name == "base_start_student_reference")
    reference, policy = passes.of_step(row, made, order, configs, 9)
    assert (reference.config.num_layers, policy.config.num_layers) == (1, TINY.num_layers)
    assert policy.differentiate and not reference.differentiate


def test_pairs_of_a_user_are_taken_to_be_as_long_as_they_may_be(alignments):
    order = tiny_order.make(
        preferences=Preferences("pairs.jsonl", max_length=40), algorithms=("offline_dpo_data",), arms=("kd_align",)
    )
    [(name, (steps, settings, length))] = alignments(order).items()
    assert name == "align student same (offline_dpo_data, on pairs of 40 tokens)"
    assert (steps, settings.algorithm, length) == (6, "offline_dpo_data", 9)
    assert dry_run._length_of_data(order) == 40
    longer = replace(order, preferences=Preferences("pairs.jsonl", max_length=10**6))
    assert dry_run._length_of_data(longer) == dry_run.config_of("random:tiny")[0].max_positions


def test_moments_lie_as_their_parameters_do():
    """Both moments are cut as the parameters are, of a policy with a critic too."""
    mesh, optimizer = sharding.make_mesh(4, devices=jax.devices()[:4]), tiny_order.OPTIMISATION.make(4)
    params = dry_run._abstract(TINY, mesh)
    state = dry_run._state(params, mesh, optimizer).optimizer_state
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == params["embedding"].shape]
    assert [leaf.sharding for leaf in moments] == [sharding.param_shardings(TINY, mesh)["embedding"]] * 2
    with_critic = dry_run._with_critic(Layout(mesh=mesh).model(TINY), params, mesh)
    cut = NamedSharding(mesh, PartitionSpec(None, sharding.DATA))

    def number_of_cut(tree):
        return sum(leaf.sharding == cut for leaf in jax.tree.leaves(tree))

    again = dry_run._state(with_critic, mesh, optimizer).optimizer_state
    assert number_of_cut(again) == number_of_cut(state) == 2 * number_of_cut(params) > 0


def test_a_student_has_as_many_layers_as_are_kept():
    shapes = dry_run.shapes_of(tiny_order.make(students=("same", "layers:2", "layers:0,2")))
    layers = {role: config.num_layers for role, (config, *_) in shapes.items() if role.startswith("student")}
    assert layers == {"student same": 3, "student layers:2": 2, "student layers:0,2": 2}


def test_models_that_stay_are_counted():
    """Truth, base, target, and two of the larger of the models that are made."""
    order = tiny_order.make(base="fit:random:tiny", reward="plain", target="distil:0.5", students=("layers:1",))
    small, large = replace(TINY, num_layers=1), replace(TINY, num_layers=4)
    configs = {"truth": large, "base": TINY, "target": TINY, "student layers:1": small}
    found, told = dry_run._resident(order, configs, one_device().mesh)
    assert found == 4 * (large.num_parameters + 4 * TINY.num_parameters)
    assert told == "truth, base, target and the last 2 others, each a base at most"
    found, told = dry_run._resident(tiny_order.make(), configs | {"student same": TINY}, one_device().mesh)
    assert found == 4 * (large.num_parameters + 2 * TINY.num_parameters) and told.startswith("truth and the last 2")


@pytest.mark.slow
@pytest.mark.loose
def test_sampling_holds_keys_and_values():
    """Two products a layer of 16 texts, as many positions as prompt and completion have room for; one shape once."""
    order = tiny_order.make(batch_size=16, max_new_tokens=24, students=("same", "layers:1"))
    configs = {"truth": TINY, "base": TINY, "student same": TINY, "student layers:1": replace(TINY, num_layers=1)}
    found = {name: (compiled, cache) for name, compiled, cache in dry_run._samplings(order, configs, one_device())}
    assert [*found] == ["truth, student same: sample a batch", "student layers:1: sample a batch"]
    compiled, cache = found["truth, student same: sample a batch"]
    assert cache == 4 * 2 * TINY.num_layers * 16 * TINY.num_kv_heads * TINY.head_dim * 25
    assert dry_run._memory(compiled) > cache + 4 * TINY.num_parameters


@pytest.mark.slow
@pytest.mark.loose
@pytest.mark.parametrize("algorithm", ["ppo", "kto", "offline_dpo_data"])
def test_the_step_of_each_kind_is_compiled(algorithm):
    tiny = tiny_order.make()
    settings = replace(tiny.alignment.settings, num_updates=8, algorithm=algorithm)
    both, order = (TINY, replace(TINY, num_layers=1)), tiny
    name, steps, compiled, flops, by_xla = dry_run._aligning("align", 2, both, one_device(), order, settings, 9)
    policy, reference = (cost.forward_flops(config, 8 * 9, 4.5) for config in both)
    expected = {
        "ppo": (1 + 3 * 4) * policy + reference,
        "kto": (1 + 1 + 3) * policy + reference,
        "offline_dpo_data": 3 * policy,
    }
    assert (name, steps) == ("align", 2) and flops == pytest.approx(expected[algorithm])
    # Without sampling; norms, softmax and masked scores weigh much in so small a model.
    sampled = 0 if algorithm == "offline_dpo_data" else policy
    assert 1 < by_xla / (flops - sampled) < 2
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given > 4 * (3 * TINY.num_parameters + (algorithm != "offline_dpo_data") * both[1].num_parameters)

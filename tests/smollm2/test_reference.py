"""Stages whose reference is another model, and stages on several devices that go on after a kill."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxkd import durable
from jaxkd.align import AlignmentSettings
from jaxkd.smollm2 import metering, network, oracles, sharding, stages, tokenization, weights
from jaxkd.smollm2.evaluate import Evaluation
from jaxkd.smollm2.network import Layout, Network, Setting
from tests.smollm2 import tiny_order

pytestmark = pytest.mark.loose
OPTIMISATION = stages.Optimisation(learning_rate=3e-3, warmup_updates=0, checkpoint_every=2)


def make_setting(mesh=None) -> Setting:
    tokenizer = tokenization.byte_tokenizer()
    prompt = np.asarray([tokenizer.encode("The")], np.int32)
    return Setting(tokenizer, prompt, max_new_tokens=6, batch_size=8, layout=Layout(mesh=mesh))


def workshop() -> metering.Workshop:
    return metering.Workshop(durable.Progress(quiet=True))


def has_digit(completion: str) -> bool:
    return any(sign.isdigit() for sign in completion)


@pytest.mark.parametrize("algorithm", ["ppo", "online_dpo", "offline_dpo_ref", "kto"])
def test_a_reference_is_scored_by_its_own_functions(tmp_path, algorithm):
    start = make_setting().load("random:tiny")
    # The same parameters, turned otherwise: nothing in their shapes tells.
    reference = Network(replace(start.config, rope_theta=100.0, norm_epsilon=1e-2), start.params, start.setting)
    settings = AlignmentSettings(algorithm, 1, 8, epochs=1, dataset_batches=1)
    key = jax.random.key(3)
    stages.align_policy(
        tmp_path,
        key,
        start,
        reference,
        oracles.of_behaviour(has_digit),
        0.1,
        stages.Alignment(settings, optimisation=OPTIMISATION),
        workshop(),
        truth_samples=start.draw(jax.random.key(4), 8) if algorithm == "kto" else None,
    )
    draw_key, _, data_key = jax.random.split(key, 3)
    x = start.draw(jax.random.fold_in(draw_key, 0), 8)
    if algorithm == "offline_dpo_ref":
        x = reference.draw(jax.random.split(data_key)[0], 8)
    expected = (start.log_prob(x) - reference.log_prob(x)).mean()
    first = json.loads((tmp_path / durable.METRICS).read_text().splitlines()[0])
    assert abs(expected) > 1e-2
    assert first["kl"] == pytest.approx(expected, rel=1e-4)


def test_on_several_devices_a_stage_goes_on_after_a_kill(tmp_path, monkeypatch):
    """One with a critic too: `test_stages_interrupted_at_any_step_end_bit_equal_and_compile_once`."""
    start = make_setting(sharding.make_mesh()).load("random:tiny")
    settings = AlignmentSettings("reinforce", 5, 8)

    def align(folder):
        oracle = oracles.of_behaviour(has_digit)
        alignment = stages.Alignment(settings, optimisation=OPTIMISATION)
        return stages.align_policy(folder, jax.random.key(0), start, start, oracle, 0.1, alignment, workshop())

    whole = align(tmp_path / "whole")
    write = durable.Log.write

    def killing(self, step, metrics):
        if step == 3:
            raise KeyboardInterrupt
        write(self, step, metrics)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(durable.Log, "write", killing)
        align(tmp_path / "killed")
    steps = []
    monkeypatch.setattr(durable.Log, "write", lambda self, step, metrics: steps.append(step))
    monkeypatch.setattr(stages, "_finite_losses", lambda path: True)
    resumed = align(tmp_path / "killed")
    assert steps == [2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert any(len(leaf.sharding.device_set) == jax.device_count() for leaf in jax.tree.leaves(resumed.params))


def test_a_distillation_without_numbers_is_told(tmp_path):
    start = make_setting().load("random:tiny")
    wild = replace(OPTIMISATION, learning_rate=1e38, max_gradient_norm=1e30)
    settings = stages.Distillation("sequence", 8, 8, 4, 8, 1, patience=9, optimisation=wild)
    with pytest.raises(FloatingPointError, match="the distillation diverged"):
        stages.distil(tmp_path, jax.random.key(0), start, start, 1.0, settings, workshop())


def test_draws_do_not_depend_on_the_batch(tmp_path):
    start = make_setting().load("random:tiny")
    one, other = (start.draw(jax.random.key(0), 8, batch_size=size) for size in (None, 3))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_cannot_be_divided_is_whole_and_the_rest_is_cut():
    mesh = sharding.make_mesh()
    placed = make_setting(mesh).on_devices({"texts": np.zeros((8, 3)), "pairs": np.zeros(2, bool)})
    cut = {name: leaf.addressable_shards[0].data.size * mesh.size == leaf.size for name, leaf in placed.items()}
    assert cut == {"texts": True, "pairs": False}


def test_a_tokenizer_of_another_model_is_refused(monkeypatch):
    config, params = weights.load("random:tiny")
    larger = replace(config, vocab_size=4096)
    monkeypatch.setattr(network.weights, "load", lambda *arguments, **settings: (larger, params))
    with pytest.raises(ValueError, match="the tokenizer has 259 ids and the model a vocabulary of 4096"):
        make_setting().load("random:tiny")


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written():
    from jaxkd.smollm2.adapters import LoRA

    start = make_setting().load("random:tiny")
    alignment = stages.Alignment(AlignmentSettings("reinforce", 1, 8), lora=LoRA(rank=1000))
    with pytest.raises(ValueError, match="rank must be at most"):
        stages.check_alignment(start, start, alignment)


def test_one_process_works_in_a_folder(tmp_path):
    at_work = durable.one_at_a_time(tmp_path / "out")
    refused = pytest.raises(ValueError, match="another process is working in")
    with at_work, refused, durable.one_at_a_time(tmp_path / "out"):
        pass
    with durable.one_at_a_time(tmp_path / "out"):
        pass


def test_weights_that_changed_under_their_name_are_refused(tmp_path):
    order = tiny_order.make(evaluation=Evaluation(8, 8, 8, 8))
    tiny_order.laboratory(order, tmp_path).prepare()
    held = json.loads((tmp_path / "weights.json").read_text())
    durable.write_json(tmp_path / "weights.json", held | {"base": "another"})
    with pytest.raises(ValueError, match="base: another there, "):
        tiny_order.laboratory(order, tmp_path).prepare()

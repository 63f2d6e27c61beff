"""Stages by themselves: which student is kept, when a distillation stops, and what an alignment is charged and logs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxkd import durable
from jaxkd.align import AlignmentSettings, Coefficients, Info, PreferenceData
from jaxkd.smollm2 import cost, draws, stages, students
from jaxkd.smollm2.draws import write_arrays
from jaxkd.smollm2.metering import Coster, Workshop
from jaxkd.smollm2.network import Network, ScoredTexts
from jaxkd.smollm2.policy import Texts
from tests.smollm2 import by_hand, tiny_order

pytestmark = pytest.mark.loose


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    laboratory = tiny_order.laboratory(tiny_order.make(), tmp_path_factory.mktemp("none"), meshed=False)
    fresh = laboratory.setting.load("random:tiny")
    return Network(fresh.config, tiny_order.uneven(fresh.params), fresh.setting)


def distilled(folder, base, learning_rate, *, keep_last=False, **changes):
    """The student, and the metrics of each step."""
    optimisation = replace(tiny_order.OPTIMISATION, learning_rate=learning_rate)
    changes = {"method": "forward_kl", "num_held_out": 32, "optimisation": optimisation} | changes
    settings = replace(tiny_order.make().distillation, **changes)
    workshop = Workshop(durable.Progress(quiet=True))
    student = stages.distil(folder, jax.random.key(0), base, base, 0.5, settings, workshop, keep_last=keep_last)
    return student, [json.loads(line) for line in (folder / durable.METRICS).read_text().splitlines()]


def test_scores_go_on_after_a_kill_and_are_the_same(tmp_path, base, monkeypatch):
    begun, tokens = [], np.random.default_rng(0).integers(5, 90, (20, 9), np.int32)
    x = Texts(tokens, np.ones(tokens.shape, bool), np.ones(tokens.shape, bool) & (np.arange(9) > 0))

    def until_killed(x, first):
        begun.append(first)
        for number, part in enumerate(base.scored(x, first)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(draws, "KEEP_EVERY", 0.0)
    arguments = SimpleNamespace(scored=until_killed), x, Workshop(durable.Progress(quiet=True)), "score"
    with pytest.raises(KeyboardInterrupt):
        draws.kept_scores(tmp_path / "scores.npz", *arguments)
    found = draws.kept_scores(tmp_path / "scores.npz", *arguments)
    assert begun == [0, 2 * base.setting.batch_size]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]
    np.testing.assert_array_equal(found, base.token_log_prob(x))


def test_pairs_cost_what_their_reference_takes_whoever_asks_first(tmp_path, base, monkeypatch):
    """The reference draws and scores them, though a smaller model starts from there."""
    monkeypatch.setattr(Network, "scored", lambda self, x, first: iter([np.zeros((len(x.tokens), 8), np.float32)]))
    start = Network(*students.keep_layers(base.config, base.params, 1), base.setting)
    tokens = np.random.default_rng(0).integers(5, 90, (16, 9), np.int32)
    mask = np.ones(tokens.shape, bool)
    completion = mask.copy()
    completion[:, 0] = False
    settings = AlignmentSettings("offline_dpo_ref", 4, 8, dataset_batches=2)
    for asked in ("first", "again"):
        workshop = Workshop(durable.Progress(quiet=True), root=tmp_path)
        write_arrays(tmp_path / asked / "pairs.npz", Texts(tokens, mask, completion)._asdict())
        stages._preference_data(
            tmp_path / asked,
            jax.random.key(0),
            base,
            lambda texts, x: (np.zeros(16, np.float32), np.zeros(16, bool)),
            Coefficients(),
            settings,
            Coster(workshop, start),
            None,
        )
        assert workshop.cost.tokens_sampled == workshop.cost.tokens_scored == 16 * 8
        # Every text is nine tokens, which attend to five in the mean.
        assert workshop.cost.model_flops == pytest.approx(2 * cost.forward_flops(base.config, 16 * 9, 5))


def test_kto_is_charged_for_the_policys_pass_over_its_own_draws(tmp_path, base, monkeypatch):
    """Two passes over the fresh draws, the reference's and the policy's, and one forth and back over the pairs."""
    mask = np.ones((8, 9), bool)
    x = Texts(np.full((8, 9), 7, np.int32), mask, mask & (np.arange(9) > 0))
    settings = AlignmentSettings("kto", 3, 8, dataset_batches=2)
    log_prob = np.zeros((2, 8, 8), np.float32)
    given = PreferenceData(
        ScoredTexts(*(np.stack([leaf] * 2) for leaf in x), np.zeros((2, 8), np.float32), np.zeros((2, 8), bool)),
        np.zeros((2, 8), np.float32),
        np.ones((2, 4), bool),
        log_prob,
    )
    nothing = Info(*[np.float32(0.0)] * len(Info._fields))
    monkeypatch.setattr(Network, "draw", lambda *_, **more: x)
    monkeypatch.setattr(stages, "_alignment_step", lambda *_: lambda state, inputs: (state, nothing))
    workshop = Workshop(durable.Progress(quiet=True))
    workshop.begin()
    reward = (np.zeros(8, np.float32), np.zeros(8, bool))
    alignment = replace(tiny_order.make().alignment, settings=settings)
    stages.align_policy(
        tmp_path, jax.random.key(0), base, base, lambda *_: reward, 0.1, alignment, workshop, preferences=given
    )
    assert workshop.cost.tokens_sampled == workshop.cost.tokens_trained == 3 * 8 * 8
    assert workshop.cost.tokens_scored == 2 * 3 * 8 * 8
    # To draw, two passes over what was drawn, and three for an update.
    assert workshop.cost.model_flops == pytest.approx(3 * 6 * cost.forward_flops(base.config, 8 * 9, 5))


def test_looks_along_an_alignment_are_logged(tmp_path, base, monkeypatch):
    """Of 64 draws each, after every other step."""
    drawn = []

    def draw(network, key, n, **more):
        drawn.append(n)
        mask = np.ones((n, 9), bool)
        return Texts(np.full((n, 9), 7, np.int32), mask, mask & (np.arange(9) > 0))

    def fourths(texts, x):
        hit = np.arange(len(texts)) % 4 == 0
        return hit.astype(np.float32), hit

    nothing = Info(*[np.float32(0.0)] * len(Info._fields))
    monkeypatch.setattr(Network, "draw", draw)
    monkeypatch.setattr(stages, "_alignment_step", lambda *_: lambda state, inputs: (state, nothing))
    workshop = Workshop(durable.Progress(quiet=True))
    workshop.begin()
    alignment = replace(tiny_order.make().alignment, look_every=2)
    stages.align_policy(tmp_path, jax.random.key(0), base, base, fourths, 0.1, alignment, workshop)
    logged = durable.entries(tmp_path / durable.METRICS)
    assert [entry.get("look_frequency") for entry in logged] == [None, 0.25] * 3
    assert drawn == [8, 8, 64] * 3


def held_out_loss(folder, network):
    with np.load(folder / "teacher.npz") as file:
        return -by_hand.log_prob(network.config, network.params, {name: file[name][:32] for name in file}).mean()


@pytest.mark.slow
def test_a_distillation_that_only_gets_worse_stops_early_and_gives_back_its_start(tmp_path, base):
    student, lines = distilled(tmp_path, base, 0.1, check_every=1, patience=3)
    at_start = held_out_loss(tmp_path, base)
    assert len(lines) == 3
    assert all(line["held_out_loss"] > at_start for line in lines)
    assert [line["best_held_out_loss"] for line in lines] == pytest.approx([at_start] * 3, rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, student.params, base.params)


def test_the_last_student_is_given_back_where_it_is_asked_for(tmp_path, base):
    student, lines = distilled(tmp_path, base, 0.1, keep_last=True, check_every=1, patience=3)
    assert held_out_loss(tmp_path, student) == pytest.approx(lines[-1]["held_out_loss"], rel=1e-6)
    assert lines[-1]["held_out_loss"] > held_out_loss(tmp_path, base)


@pytest.mark.slow
def test_the_best_student_by_its_held_out_loss_is_kept(tmp_path, base):
    student, lines = distilled(tmp_path, base, 0.01, check_every=2, patience=2)
    looks = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(lines) == 6 and min(looks) < looks[-1]
    assert held_out_loss(tmp_path, student) == pytest.approx(min(looks), rel=1e-6)
    assert min(looks) < held_out_loss(tmp_path, base)

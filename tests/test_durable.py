import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import __version__, durable

# The host loop is orbax's as much as ours.
pytestmark = pytest.mark.loose


class KilledError(Exception):
    pass


def _train(folder, killed_at=None, num_steps=7, impl="threefry2x32"):
    def step(state, number):
        if number == killed_at:
            raise KilledError
        key, total = state
        key, use = jax.random.split(key)
        total = total + jax.random.normal(use, (3,)) + number
        return (key, total), {"total": float(total.sum()), "tokens": 2.0}, False

    spent = {"steps": 0.0}
    return durable.train(
        folder,
        (jax.random.key(3, impl=impl), jnp.zeros(3)),
        step,
        num_steps,
        log=durable.Log("stage", folder / durable.METRICS),
        progress=durable.Progress(quiet=True),
        what="train",
        checkpoint_every=2,
        cost=lambda: spent,
        restore_cost=spent.update,
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_goes_on_after_the_last_checkpoint_with_the_same_numbers(tmp_path, impl):
    whole = _train(tmp_path / "whole", impl=impl)
    for killed_at in (1, 3, 5, 6):
        with pytest.raises(KilledError):
            _train(tmp_path / "killed", killed_at, impl=impl)
    ended = _train(tmp_path / "killed", impl=impl)
    np.testing.assert_array_equal(ended[1], whole[1])
    np.testing.assert_array_equal(jax.random.key_data(ended[0]), jax.random.key_data(whole[0]))
    lines = [(tmp_path / name / durable.METRICS).read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(7))


def test_a_torn_line_of_the_log_is_taken_back(tmp_path):
    log = durable.Log("stage", tmp_path / durable.METRICS)
    for step in range(3):
        log.write(step, {"loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"stage": "stage", "st')
    log.begin(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1]


def test_a_finished_stage_keeps_its_record_and_no_checkpoint(tmp_path):
    _train(tmp_path / "stage")
    assert durable.read_record(tmp_path / "stage") is None
    durable.finish(tmp_path / "stage", {"cost": {"steps": 7}})
    assert durable.read_record(tmp_path / "stage") == {"cost": {"steps": 7}}
    assert not (tmp_path / "stage" / durable.CHECKPOINT).exists()


def test_a_checkpoint_is_let_go_once_its_stage_is_finished(tmp_path):
    """A process may be killed between the record and the deletion."""
    checkpoint = tmp_path / durable.CHECKPOINT / "4"
    checkpoint.mkdir(parents=True)
    durable.let_checkpoint_go(tmp_path)
    assert checkpoint.exists()
    durable.write_json(tmp_path / durable.RECORD, {})
    durable.let_checkpoint_go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [durable.RECORD]


def test_sinks_are_given_every_line(tmp_path):
    seen = []
    log = durable.Log("stage", tmp_path / durable.METRICS, (lambda *told: seen.append(told),))
    log.write(4, {"loss": 0.5})
    assert seen == [("stage", 4, {"loss": 0.5})]


@pytest.mark.parametrize(
    ("wandb", "tensorboard", "module", "told"),
    [
        ("project", False, "wandb", r"--wandb needs wandb: pip install 'jaxkd\[wandb\]'"),
        (None, True, "tensorboardX", r"--tensorboard needs tensorboardX: pip install 'jaxkd\[tensorboard\]'"),
    ],
)
def test_a_sink_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, wandb, tensorboard, module, told):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=told):
        durable.sinks(wandb, tensorboard, tmp_path, {})
    assert durable.sinks(None, False, tmp_path, {}) == ()


def test_a_run_of_wandb_that_cannot_begin_is_told(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def init(**given):
        raise Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    with pytest.raises(ValueError, match="--wandb project: No API key configured"):
        durable.sinks("project", False, tmp_path, {})


def test_a_log_is_read_up_to_a_line_that_is_cut_short(tmp_path):
    path = tmp_path / durable.METRICS
    path.write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "lo')
    assert durable.entries(path) == [{"step": 0, "loss": 1.5}]


def test_metrics_go_to_wandb_and_tensorboard(tmp_path, monkeypatch):
    """Stand-ins for both, since neither need be installed."""
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(("folder", folder))

        def add_scalar(self, *scalar):
            told.append(("scalar", *scalar))

        def flush(self):
            told.append(("flush",))

    def init(**given):
        told.append(("init", given))
        return SimpleNamespace(log=lambda metrics: told.append(("log", metrics)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    out = tmp_path / "run"
    sinks = durable.sinks("project", True, out, {"seed": 3})
    assert told == [
        ("init", {"project": "project", "name": "run", "config": {"seed": 3}}),
        ("folder", str(out / "tensorboard")),
    ]
    told.clear()
    durable.Log("kd_align", tmp_path / durable.METRICS, sinks).write(4, {"loss": 0.5, "kl": 0.25})
    assert told == [
        ("log", {"kd_align/step": 4, "kd_align/loss": 0.5, "kd_align/kl": 0.25}),
        ("scalar", "kd_align/loss", 0.5, 4),
        ("scalar", "kd_align/kl", 0.25, 4),
        ("flush",),
    ]


def test_what_differs_is_named_by_its_path(tmp_path):
    durable.check_configuration(tmp_path / "run", {"a": {"b": 1, "c": 2}})
    durable.check_configuration(tmp_path / "run", {"a": {"b": 1, "c": 2}})
    with pytest.raises(ValueError, match=r"configuration \(a\.b: 1 there, 3 now\)"):
        durable.check_configuration(tmp_path / "run", {"a": {"b": 3, "c": 2}})


def test_each_call_is_a_line(tmp_path):
    """Also where several processes begin at once."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: durable.note_call(tmp_path, {"seeds": (number,)}), range(8)))
    calls = durable.entries(tmp_path / durable.CALLS)
    assert sorted(call["seeds"] for call in calls) == [[number] for number in range(8)]
    assert all(call["version"] == __version__ for call in calls)
    assert all(datetime.fromisoformat(call["time"]).utcoffset() == timedelta(0) for call in calls)

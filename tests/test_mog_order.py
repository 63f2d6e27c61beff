"""The scripts of the order experiment: which flags win, what the store says, how seeds are labelled."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from jaxkd import results
from jaxkd.align import ALGORITHMS


@pytest.fixture
def script(monkeypatch):
    """Import a script of experiments/ as a module."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "experiments")
    return importlib.import_module


@pytest.mark.parametrize(
    ("flags", "seeds", "algorithms"),
    [
        ({}, 256, ("ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data")),
        ({"quick": True}, 16, ("ppo",)),
        ({"quick": True, "seeds": 40}, 40, ("ppo",)),
        (
            {"quick": True, "algorithms": ("ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data")},
            16,
            ("ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data"),
        ),
        ({"seeds": 3, "algorithms": ("grpo",)}, 3, ("grpo",)),
    ],
)
def test_flags_that_are_given_win_over_quick(script, flags, seeds, algorithms):
    chosen = script("mog_order").Config(**flags).resolved()
    assert (chosen.seeds, chosen.algorithms) == (seeds, algorithms)
    assert chosen.resolved() == chosen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds must be a whole number of at least 1; got 0"),
        ({"algorithms": ()}, "--algorithms must name at least one"),
        ({"first_seed": 2**31 - 256}, "--first-seed must be a whole number .* at most 2147483391; got"),
        ({"label_noise": 0.1}, "--label-noise must be 0 for ppo"),
        ({"quick": True, "steps": 401}, "--steps: .*"),
    ],
)
def test_bad_flags_are_refused_whether_given_or_not(script, flags, message):
    with pytest.raises(ValueError, match=message):
        script("mog_order").Config(**flags)


def test_the_store_names_the_learning_rates_that_were_used(script):
    mog = script("mog_order")
    config = mog.Config(algorithms=("ppo", "online_dpo"))
    own = {name: ALGORITHMS[name].learning_rate for name in ("ppo", "online_dpo")}
    assert config.resolved().results_depend_on()["learning_rate"] == own
    asked = mog.Config(algorithms=("ppo", "online_dpo"), learning_rate=0.0333).resolved()
    assert asked.results_depend_on()["learning_rate"] == {"ppo": 0.0333, "online_dpo": 0.0333}
    for one in (config, asked):
        told = one.results_depend_on()["learning_rate"]["ppo"]
        assert mog.coefficients_of(one, "ppo").learning_rate == np.float32(told)
    assert mog.coefficients_of(asked, "ppo", 0.5).learning_rate == 0.5


def test_the_grid_is_that_of_the_settings(script, monkeypatch):
    mog = script("mog_order")
    settings_of = mog.settings_of
    monkeypatch.setattr(mog, "settings_of", lambda *given: replace(settings_of(*given), grid_points=17))
    assert mog.runs_of(mog.Config(seeds=1, algorithms=("ppo",)))[3].x.shape == (2, 17**2)


def test_seeds_that_rates_are_tuned_on_bear_their_own_labels(script, monkeypatch, tmp_path):
    tune, labelled = script("tune_learning_rate"), []

    class Compiled:
        call = staticmethod(lambda *_: (None, None))

    def to_dataset(*given, **_):
        seeds = [*given[6]]
        labelled.append(seeds)
        distance = xr.DataArray(np.ones((len(seeds), 2)), {"seed": seeds, "stage": ["aligned_base", "kd_align"]})
        return xr.Dataset({"distance_to_gibbs": distance})

    monkeypatch.setattr(tune.engine, "compile_runs", lambda *_, **__: Compiled)
    monkeypatch.setattr(tune, "runs_of", lambda config: (None,) * 4)
    monkeypatch.setattr(results, "to_dataset", to_dataset)
    tune.main(tune.Tuning(algorithms=("ppo",), learning_rates=(0.1,), seeds=3, first_seed=70, out=tmp_path))
    assert labelled == [[70, 71, 72]]

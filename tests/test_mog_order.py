"""The scripts of the order experiment: which flags win, what the store says, how seeds are labelled."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

from jaxkd import figures, laboratory, recovery, results
from jaxkd.align import ALGORITHMS, AlignmentSettings, Coefficients
from jaxkd.laboratory import LaboratorySettings
from jaxkd.sweep import store


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
    config = mog.Config(algorithms=("ppo", "online_dpo")).resolved()
    own = {name: ALGORITHMS[name].learning_rate for name in ("ppo", "online_dpo")}
    assert config.results_depend_on()["learning_rate"] == own
    asked = mog.Config(algorithms=("ppo", "online_dpo"), learning_rate=0.0333).resolved()
    assert asked.results_depend_on()["learning_rate"] == {"ppo": 0.0333, "online_dpo": 0.0333}
    for one in (config, asked):
        told = one.results_depend_on()["learning_rate"]["ppo"]
        assert mog.coefficients_of(one, "ppo").learning_rate == np.float32(told)
    assert mog.coefficients_of(asked, "ppo", 0.5).learning_rate == 0.5


def test_the_store_names_every_setting_that_is_used_and_none_that_changes_only_speed(script):
    mog = script("mog_order")
    config = mog.Config(capacity=3, algorithms=("ppo", "robust_dpo"), label_noise=0.0).resolved()
    told = config.results_depend_on()
    used = mog.settings_of(config, "ppo")
    assert {*told["laboratory"]} == {*LaboratorySettings.__dataclass_fields__} - {"alignment"}
    assert all(told["laboratory"][name] == getattr(used, name) for name in told["laboratory"])
    assert told["laboratory"]["distillation_starts"] == 4
    assert {*told["alignment"]} == {*AlignmentSettings.__dataclass_fields__} - {"algorithm"}
    assert told["alignment"]["num_updates"] == 400
    for name in config.algorithms:
        coefficients = mog.coefficients_of(config, name)._asdict()
        assert {*told["coefficients"][name]} == {*Coefficients._fields} - {"learning_rate", "kl_coef"}
        assert all(coefficients[key] == np.float32(value) for key, value in told["coefficients"][name].items())
    assert replace(config, chunk=7, out=Path("elsewhere"), compile_cache=False).results_depend_on() == told


_SHAPES = {}
"""Of what a function makes of a seed, by its name: found once, since the tests below change no size."""


def made_up(name, function):
    """Numbers of the key alone, in the shapes of what the function makes of a seed; nothing fails."""

    def of_seed(key, *given):
        if name not in _SHAPES:
            _SHAPES[name] = jax.eval_shape(function, key, *given)
        shapes, structure = jax.tree.flatten(_SHAPES[name])
        drawn = [jax.random.uniform(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(shapes)]
        leaves = [
            (x if leaf.dtype != bool else x * 0).astype(leaf.dtype) for x, leaf in zip(drawn, shapes, strict=True)
        ]
        return structure.unflatten(leaves)

    return of_seed


@pytest.fixture
def mog(script, monkeypatch):
    """The script on made-up seeds, in blocks of two."""
    module = script("mog_order")
    functions_of = module.functions_of

    def made_up_functions(config):
        prepare, arms = functions_of(config)
        return made_up("prepare", prepare), {name: made_up(name, run) for name, run in arms.items()}

    monkeypatch.setattr(module, "functions_of", made_up_functions)
    monkeypatch.setattr(module, "SEEDS_PER_BLOCK", 2)
    # Figures take most of the time that a run takes here.
    monkeypatch.setattr(figures, "mog_order", drawn)
    return module


def drawn(dataset, *paths):
    """What stands for a figure: the numbers that it would be made from."""
    for path in paths:
        path.write_bytes(b"".join(dataset[name].values.tobytes() for name in sorted(dataset.data_vars)))


def config_of(mog, out, **changes):
    chosen = {"seeds": 3, "steps": 40, "algorithms": ("ppo", "simpo"), "arms": ("kd_align", "align_kd"), "out": out}
    return mog.Config(**chosen | {"temperatures": (0.25,), "kl_coefs": (0.3, 1.0), "compile_cache": False} | changes)


def expected_of(mog, config):
    """The data set by calls of the functions themselves."""
    keys, truth, points, grid = mog.runs_of(config)
    prepare, arms = mog.functions_of(config)
    prepared, shared = jax.vmap(lambda key: prepare(key, truth, points, grid))(keys)
    prepared = prepared._replace(truth=jax.tree.map(lambda leaf: jnp.stack([leaf] * config.seeds), truth))
    measured = {
        name: jax.vmap(
            lambda key, one, name=name, run=run: run(key, one, points, mog.coefficients_of(config, name), grid)
        )(keys, prepared)
        for name, run in arms.items()
    }
    made = laboratory.made_by(mog.settings_of(config, "ppo"))
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return results.to_dataset(prepared, shared, measured, made, config.temperatures, config.kl_coefs, seeds, 8)


@pytest.mark.slow
@pytest.mark.loose  # optax
def test_a_run_that_was_killed_goes_on_and_a_finished_one_is_told_again(mog, script, tmp_path, monkeypatch, capsys):
    config, path = config_of(mog, tmp_path), tmp_path / "mog_order.zarr"
    write_block, written = store.Store.write_block, []

    def until_killed(self, block, values):
        if len(written) == 3:
            raise KeyboardInterrupt
        write_block(self, block, values)
        written.append(block.index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Store, "write_block", until_killed)
        mog.main(config)
    assert written == [0, 1, 2] and not path.exists()
    capsys.readouterr()
    mog.main(config)
    told = capsys.readouterr().out
    assert told.startswith("1 runs (5 were there)")
    with xr.open_zarr(path) as dataset:
        held, expected = dataset.load(), expected_of(mog, config)
        assert held.attrs["configuration"].count("distillation_starts") == 1
        xr.testing.assert_allclose(held.drop_attrs(), expected.drop_attrs(), rtol=1e-5)
        assert {name: held[name].dtype for name in held} == {name: expected[name].dtype for name in held}
        assert [held[name].attrs for name in held] == [expected[name].attrs for name in held]
        assert float(recovery.resolved_mass(held).min()) >= 1e-12
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    mog.main(config)
    again = capsys.readouterr().out
    assert again.startswith("0 runs (6 were there)")
    assert again.splitlines()[1:-1] == told.splitlines()[1:-1]
    assert before == {file: file.read_bytes() for file in before}
    replot = script("replot")
    for given in (tmp_path, path):
        replot.main(replot.Config(given, out=tmp_path / "drawn"))
        assert capsys.readouterr().out.splitlines() == told.splitlines()[1:-3]
        assert (tmp_path / "drawn" / "table.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()
        assert (tmp_path / "drawn" / "mog_order.png").read_bytes() == (tmp_path / "mog_order.png").read_bytes()


@pytest.mark.slow
@pytest.mark.loose  # optax
def test_results_of_another_configuration_are_left_alone(mog, tmp_path):
    config, path = config_of(mog, tmp_path, algorithms=("simpo",), seeds=2), tmp_path / "mog_order.zarr"
    mog.main(config)
    with pytest.raises(FileExistsError, match=r"runs.zarr holds another sweep \(.*target_weight: 0.03 there, 0.1 now"):
        mog.main(replace(config, target_weight=0.1))
    runs = tmp_path / "runs.zarr"
    runs.rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(FileExistsError, match=r"mog_order.zarr holds results of this very configuration"):
        mog.main(config)
    assert path.exists() and not runs.exists()
    # Killed after it had begun anew, before its results took the place of others'.
    (tmp_path / "elsewhere.zarr").rename(runs)
    zarr.open_group(path, mode="r+")["reward"][:] = 7.0
    mog.main(config)
    with xr.open_zarr(path) as dataset:
        assert not (dataset.reward == 7.0).any()
    shutil.rmtree(path)
    (path / "letters").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"mog_order.zarr exists and is no store of jaxkd: choose another --out"):
        mog.main(replace(config, overwrite=True))
    assert (path / "letters").exists()


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

import csv
import json
import runpy
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import xarray as xr

from jaxkd import phase_diagram, statistics
from jaxkd.align import AlignmentSettings

pytestmark = pytest.mark.loose

STAGES = ["base", "student", "aligned_base", "kd_align", "align_kd"]
TEMPERATURES, KL_COEFS, CAPACITIES, SEEDS = [1.0, 0.5, 0.25], [0.3, 1.0], [1, 2, 4], 24
ALIGNMENT = AlignmentSettings("ppo")


def finished(**axes):
    """A store's content with a known truth: an alignment recovers where its reference's mass exceeds β / 100."""
    axes = {"algorithm": ["ppo"], "target_weight": [0.03], **axes, "capacity": CAPACITIES, "seed": list(range(SEEDS))}
    dims = (*axes, "temperature", "kl_coef", "stage")
    sizes = {**{dim: len(values) for dim, values in axes.items()}, "temperature": 3, "kl_coef": 2, "stage": 5}
    shape = tuple(sizes.values())
    generator = np.random.default_rng(0)
    coordinates = {**axes, "temperature": TEMPERATURES, "kl_coef": KL_COEFS, "stage": STAGES}
    blank = xr.DataArray(np.zeros(shape), dims=dims, coords=coordinates)
    noise = xr.DataArray(generator.normal(0, 0.3, SEEDS), dims="seed", coords={"seed": axes["seed"]})
    student = (0.03 * blank.temperature**3 * 10**noise + blank).sel(stage="student")
    base = (0.03 * 10 ** (0.1 * noise) + blank).sel(stage="base")
    outcome = {
        "base": base,
        "student": student,
        "aligned_base": (base > base.kl_coef / 100) * 0.8,
        "kd_align": (student > student.kl_coef / 100) * 0.8,
        "align_kd": (base > base.kl_coef / 100) * 0.9,
    }
    mass = xr.concat([outcome[name].drop_vars("stage") for name in STAGES], "stage").transpose(*dims).values
    held_to = [base, base, base, student, base]
    reference = xr.concat([one.drop_vars("stage") for one in held_to], "stage").transpose(*dims).values
    content = {
        "target_mass": mass,
        "failed": np.zeros(shape, bool),
        "target_recall": np.log(mass + 1e-9),
        "bounded_recall": np.full(shape, 0.9),
        "target_balance": np.full(shape, 0.5),
        "half_mass_coefficient": 100 * reference,
        "gibbs_target_log_odds": np.log(100 * reference / np.asarray(KL_COEFS)[:, None]),
    }
    dataset = xr.Dataset({name: (dims, values) for name, values in content.items()}, coords=coordinates)
    dataset["base_failed"] = ((*axes,), np.zeros([sizes[dim] for dim in axes], bool))
    dataset["done"] = ("block", np.ones(3, np.int8))
    return dataset


@pytest.fixture(scope="module")
def dataset():
    return finished()


@pytest.fixture(scope="module")
def summary(dataset):
    return phase_diagram.summarise(dataset)


def test_rates_and_tests_are_those_of_each_cell(dataset, summary):
    cell = {"algorithm": "ppo", "target_weight": 0.03, "capacity": 2, "temperature": 0.5, "kl_coef": 0.3}
    recovered = dataset.target_mass.sel(cell) > 0.5
    one = summary.sel(cell)
    for arm in ("kd_align", "align_kd"):
        rate = statistics.recovery_rate(recovered.sel(stage=arm).values)
        assert one.recovery.sel(stage=arm) == rate.rate and one.recovery_low.sel(stage=arm) == rate.low
    pair = statistics.mcnemar(recovered.sel(stage="align_kd").values, recovered.sel(stage="kd_align").values)
    assert one.p_value == pair.p_value and one.difference == pair.difference
    assert one.recovery_challenger - one.recovery_baseline == pytest.approx(pair.difference)
    assert one.difference > 0.1


def test_marks_are_made_over_all_cells_together(summary):
    expected = statistics.false_discovery(summary.p_value.values, 0.05)
    np.testing.assert_array_equal(summary.significant.values, expected)
    assert summary.significant.any() and not summary.significant.all()


def test_a_failed_run_takes_its_pair_out_of_both_rates(dataset):
    broken = dataset.copy(deep=True)
    broken.failed.loc[{"stage": "kd_align", "seed": [0, 1], "temperature": 1.0}] = True
    cell = phase_diagram.summarise(broken).sel(capacity=4, temperature=1.0, kl_coef=0.3).squeeze()
    kept = dataset.target_mass.sel(capacity=4, temperature=1.0, kl_coef=0.3).squeeze().isel(seed=slice(2, None)) > 0.5
    assert cell.recovery_baseline == pytest.approx(float(kept.sel(stage="kd_align").mean()))
    assert cell.recovery_challenger == pytest.approx(float(kept.sel(stage="align_kd").mean()))


def test_the_boundary_is_that_of_the_student_as_a_reference(dataset, summary):
    expected = dataset.half_mass_coefficient.sel(stage="kd_align").median("seed")
    np.testing.assert_allclose(summary.half_mass_coefficient.transpose(*expected.dims), expected)
    assert summary.half_mass_coefficient.sel(temperature=0.25).max() < summary.half_mass_coefficient.max() / 10


def test_references_leave_out_one_component_and_count_each_base_once(dataset):
    points = phase_diagram.references([dataset.isel(algorithm=0)], 0.3)
    students = 2 * len(TEMPERATURES) * SEEDS
    assert (~points.is_base).sum() == students and points.is_base.sum() == SEEDS
    assert set(points.seed[points.is_base]) == set(range(SEEDS))
    own = dataset.target_mass.sel(stage="student", capacity=2, temperature=0.25, kl_coef=0.3, seed=7)
    assert float(own.squeeze()) in points.mass[points.seed == 7]


def test_the_critical_mass_is_found_where_it_was_put(dataset):
    for kl_coef in KL_COEFS:
        points = phase_diagram.references([dataset.isel(algorithm=0)], kl_coef)
        found = phase_diagram.critical_mass(points, kl_coef, num_resamples=99)
        low, high = found.by_mass.critical_interval
        assert 10**found.by_mass.critical == pytest.approx(kl_coef / 100, rel=0.15)
        assert low < np.log10(kl_coef / 100) * 0.97 and high > low
        assert found.gibbs_mass == pytest.approx(kl_coef / 100, rel=0.3)
        assert abs(found.by_log_odds.critical) < 0.2
        assert f"β = {kl_coef:g}" in str(found)


def test_a_critical_mass_beyond_all_runs_is_said_to_be(dataset):
    points = phase_diagram.references([dataset.isel(algorithm=0)], 0.3)
    none = phase_diagram.References(**{**vars(points), "outcome": 0 * points.outcome})
    assert "no mass seen suffices" in str(phase_diagram.critical_mass(none, 0.3, num_resamples=19))
    far = phase_diagram.References(**{**vars(points), "half_mass_coefficient": 0 * points.outcome + 5})
    assert np.isnan(phase_diagram.gibbs_mass(far, 0.3))


def test_the_table_and_the_sentence_are_made_from_the_cells(summary):
    text = phase_diagram.format_table(summary)
    assert len(text.splitlines()) == 2 + len(KL_COEFS) * len(CAPACITIES)
    cell = summary.sel(capacity=2, temperature=0.25, kl_coef=1.0).squeeze()
    assert f"{float(cell.recovery_baseline):.2f}/{float(cell.recovery_challenger):.2f}*" in text
    assert f"in {int(summary.significant.sum())} of {summary.difference.size} cells" in phase_diagram.verdict(summary)


def quick_and_slow(presets):
    quick = ("plane", "two-targets", "reward")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in presets]


@pytest.mark.parametrize("preset", quick_and_slow(["plane", *phase_diagram.VIEWS]))
def test_every_figure_is_drawn_from_a_store_alone(preset, tmp_path):
    axes = {
        "noise": {"label_noise": [0.0, 0.2]},
        "two-targets": {"num_targets": [1, 2]},
        "target-weight": {"target_weight": [0.01, 0.03, 0.3]},
        "base-data": {"base_samples": [64, 1024]},
        "base-em": {"starts": [1, 10]},
        "reward": {"reward_name": ["density", "disc"]},
        "cost": {"match_component_evaluations": [False, True]},
    }.get(preset, {})
    dataset = finished(**axes)
    dataset.attrs["configuration"] = json.dumps({"preset": preset, "steps": 400})
    told = phase_diagram.report({"sweep": dataset}, tmp_path)
    assert "Align→KD recovers more often than KD→Align in" in told
    names = ["phase_diagram", "critical_mass"] if preset == "plane" else [preset]
    for name in names:
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture[..., :3].std() > 0.05
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    rows = list(csv.DictReader((tmp_path / f"{preset}.csv").read_text().splitlines()))
    cells = phase_diagram.summarise(dataset).difference.size
    assert len(rows) == cells * 3 and {row["arm"] for row in rows} == {"aligned_base", "kd_align", "align_kd"}


SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "phase_diagram.py"))


@pytest.mark.parametrize("preset", SCRIPT["PRESETS"])
def test_padding_is_that_of_a_blocks_own_capacities(preset):
    for config in (SCRIPT["Config"](preset), SCRIPT["Config"](preset, quick=True)):
        chosen = config.settings()
        _, of_block = SCRIPT["function_of"](chosen, config.quick)
        grid = SCRIPT["grid_of"](chosen)
        assert grid.shape[-1] == chosen.seeds and grid.dims[-2:] == ("capacity", "seed")
        for block in grid.blocks():
            capacities = set(block.axes["capacity"].tolist())
            assert of_block(block) == {"student_components": max(capacities)}
            # The number of updates is one a program: where it depends on the capacity, so must the program.
            assert len(capacities) == 1 or True not in chosen.match_component_evaluations


def test_an_unfinished_or_missing_store_is_refused(dataset, tmp_path):
    half = dataset.copy()
    half["done"] = ("block", np.asarray([1, 0, 1], np.int8))
    with pytest.raises(ValueError, match=r"sweep\.zarr is not finished: repeat the command"):
        phase_diagram.report({"sweep": half}, tmp_path)
    with pytest.raises(ValueError, match=r"holds no store sweep\.zarr"):
        phase_diagram.report({}, tmp_path)
    assert not list(tmp_path.iterdir())

import csv
import functools
import itertools
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from jaxkd import phase_figures, phase_report, pipelines, recovery, statistics
from jaxkd.align import ALGORITHMS, AlignmentSettings
from jaxkd.sweep import engine

pytestmark = pytest.mark.loose
DRAWN_BY = phase_figures

STAGES = ["base", "student", "aligned_base", "kd_align", "align_kd"]
TEMPERATURES, KL_COEFS, CAPACITIES, SEEDS = [1.0, 0.5, 0.25], [0.3, 1.0], [1, 2, 4], 24


SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "phase_diagram.py"))


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
        "from_grid": np.ones(shape, bool),
        "half_mass_coefficient": 100 * reference,
        "gibbs_target_log_odds": np.log(100 * reference / np.asarray(KL_COEFS)[:, None]),
    }
    dataset = xr.Dataset({name: (dims, values) for name, values in content.items()}, coords=coordinates)
    if "num_targets" not in axes:
        dataset["target_balance"] = 1 + blank
    dataset["base_failed"] = ((*axes,), np.zeros([sizes[dim] for dim in axes], bool))
    dataset["done"] = ("block", np.ones(3, np.int8))
    dataset.attrs["versions"] = json.dumps({"jaxkd": "0.2.0", "jax": "0.10.2"})
    return dataset


def configuration(preset, **changes):
    """What a sweep's store says of itself, as far as figures depend on it."""
    alignment = asdict(AlignmentSettings())
    fixed = {"alignment": alignment, "match_component_evaluations": [False], "label_noise": [0.0]}
    return json.dumps({"preset": preset, **fixed, **changes})


@pytest.fixture(scope="module")
def dataset():
    return finished()


@pytest.fixture(scope="module")
def summary(dataset):
    return recovery.summarise(dataset)


@pytest.fixture
def few_resamples(monkeypatch):
    """Intervals of critical masses from few resamples, for tests that do not read them."""
    few = functools.partial(recovery.critical_mass, num_resamples=19)
    monkeypatch.setattr(phase_report, "critical_mass", few)


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
    cell = recovery.summarise(broken).sel(capacity=4, temperature=1.0, kl_coef=0.3).squeeze()
    kept = dataset.target_mass.sel(capacity=4, temperature=1.0, kl_coef=0.3).squeeze().isel(seed=slice(2, None)) > 0.5
    assert cell.recovery_baseline == pytest.approx(float(kept.sel(stage="kd_align").mean()))
    assert cell.recovery_challenger == pytest.approx(float(kept.sel(stage="align_kd").mean()))


def test_beside_the_rates_stand_those_with_failures_as_not_recovered(dataset, summary, tmp_path, drawn):
    np.testing.assert_array_equal(summary.recovery_failures_as_0, summary.recovery)
    np.testing.assert_array_equal(summary.p_value_failures_as_0, summary.p_value)
    broken = dataset.copy(deep=True)
    cell = {"algorithm": "ppo", "target_weight": 0.03, "capacity": 4, "temperature": 1.0, "kl_coef": 0.3}
    lost = [0, 1, 2, 5, 9, 11, 12, 20]
    broken.failed.loc[cell | {"stage": "kd_align", "seed": lost}] = True
    broken.failed.loc[cell | {"stage": "align_kd", "seed": [20]}] = True
    one = recovery.summarise(broken).sel(cell)
    recovered = dataset.target_mass.sel(cell).transpose("stage", "seed") > 0.5
    first, second = (recovered.sel(stage=arm).values.copy() for arm in ("kd_align", "align_kd"))
    first[lost], second[20] = False, False
    assert one.recovery_failures_as_0.sel(stage="kd_align") == pytest.approx(first.mean())
    assert one.recovery_failures_as_0.sel(stage="align_kd") == pytest.approx(second.mean())
    assert one.difference_failures_as_0 == pytest.approx(second.mean() - first.mean())
    only = [int((a & ~b).sum()) for a, b in ((second, first), (first, second))]
    assert one.p_value_failures_as_0 == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert one.p_value_failures_as_0 < 0.05 < one.p_value
    row = next(row for row in phase_report.rows_of(one.expand_dims([*cell])) if row["arm"] == "kd_align")
    assert row["recovery_failures_as_0"] == pytest.approx(first.mean(), rel=1e-5) != row["recovery"]
    assert row["order_mcnemar_p_failures_as_0"] == pytest.approx(float(one.p_value_failures_as_0), rel=1e-5)
    told = []
    for store in (broken, dataset):
        store = store.assign_attrs(configuration=configuration("rescue"))
        told.append(phase_report.report({"sweep": store}, tmp_path))
    assert "Models that failed numerically: 9" in told[0] and "With failures as not recovered" in told[0]
    assert "With failures as not recovered" not in told[1]


def test_the_boundary_is_that_of_the_student_as_a_reference(dataset, summary):
    expected = dataset.half_mass_coefficient.sel(stage="kd_align").median("seed")
    np.testing.assert_allclose(summary.half_mass_coefficient.transpose(*expected.dims), expected)
    assert summary.half_mass_coefficient.sel(temperature=0.25).max() < summary.half_mass_coefficient.max() / 10


def test_references_leave_out_one_component_and_count_each_base_once(dataset):
    points = recovery.references([dataset.isel(algorithm=0)], 0.3)
    students = 2 * len(TEMPERATURES) * SEEDS
    bases = points.family == recovery.BASE
    assert (~bases).sum() == students and bases.sum() == SEEDS
    assert set(points.seed[bases]) == set(range(SEEDS))
    own = dataset.target_mass.sel(stage="student", capacity=2, temperature=0.25, kl_coef=0.3, seed=7)
    assert float(own.squeeze()) in points.mass[points.seed == 7]


def family(dataset, kl_coef=0.3, of=4):
    """The references of one family."""
    return recovery.by_family(recovery.references([dataset.isel(algorithm=0)], kl_coef))[of]


def test_families_are_the_base_and_the_students_of_each_capacity(dataset):
    points = recovery.references([dataset.isel(algorithm=0)], 0.3)
    families = recovery.by_family(points)
    assert [*families] == [recovery.BASE, 4, 2]
    for capacity in (2, 4):
        own = dataset.target_mass.sel(stage="student", capacity=capacity, kl_coef=0.3).values.ravel()
        np.testing.assert_array_equal(np.sort(families[capacity].mass), np.sort(own))
    assert sum(one.mass.size for one in families.values()) == points.mass.size
    with pytest.raises(ValueError, match=r"points must be of one family of references, got \[0, 2, 4\]"):
        recovery.critical_mass(points, 0.3)


@pytest.mark.parametrize("kl_coef", KL_COEFS)
def test_the_critical_mass_is_found_where_it_was_put(dataset, kl_coef):
    found = recovery.critical_mass(family(dataset, kl_coef), kl_coef, num_resamples=99)
    assert found.is_seen and found.why_not == "" and found.name == "K = 4"
    low, high = found.interval
    assert found.mass == pytest.approx(kl_coef / 100, rel=0.2)
    assert low < 0.0101 * kl_coef and high > low
    assert found.gibbs_mass == pytest.approx(kl_coef / 100, rel=0.3)
    assert (found.runs, found.seeds) == (len(TEMPERATURES) * SEEDS, SEEDS)
    assert found.recovered == (family(dataset, kl_coef).mass > kl_coef / 100).sum()
    assert str(found) == f"{found.mass:.2g} ({low:.2g} to {high:.2g})"


def test_families_that_tip_apart_have_critical_masses_apart(dataset):
    apart = dataset.copy(deep=True)
    small = apart.target_mass.sel(stage="student", capacity=2)
    apart.target_mass.loc[{"stage": "kd_align", "capacity": 2}] = (small > 0.015).values * 0.8
    found = {of: recovery.critical_mass(family(apart, 0.3, of), 0.3, 99) for of in (2, 4)}
    assert found[4].mass == pytest.approx(0.003, rel=0.2) and found[2].mass == pytest.approx(0.015, rel=0.2)
    assert found[4].interval[1] < found[2].interval[0]
    # What is predicted of them depends on their own β_c alone, which is the same.
    assert found[4].gibbs_mass == pytest.approx(found[2].gibbs_mass, rel=0.1)


def changed(points, **columns):
    return recovery.References(**{**vars(points), **columns})


def test_a_critical_mass_beyond_all_runs_is_said_to_be(dataset):
    points = family(dataset)
    none = recovery.critical_mass(changed(points, outcome=0 * points.outcome), 0.3, num_resamples=19)
    every = recovery.critical_mass(changed(points, outcome=0 * points.outcome + 1), 0.3, num_resamples=19)
    assert not none.is_seen and not every.is_seen and (none.recovered, every.recovered) == (0, points.mass.size)
    assert str(none) == f"no half in sight (fewer than that up to {points.mass.max():.2g})"
    assert str(every) == f"no half in sight (more than that from {points.mass.min():.2g} on)"
    far = changed(points, half_mass_coefficient=0 * points.outcome + 5)
    assert np.isnan(recovery.gibbs_mass(far, 0.3))


def test_a_curve_that_says_nothing_of_the_masses_seen_names_none(dataset):
    points = family(dataset)
    falling = changed(points, outcome=(points.mass < np.median(points.mass)) * 0.9)
    found = recovery.critical_mass(falling, 0.3, 19)
    assert not found.is_seen and str(found) == "no half in sight (recovery does not rise with the mass)"
    # Two of three of the lighter recover and all of the heavier: a curve places its half below what was seen.
    heavy = np.arange(points.mass.size) % 4 > 0
    some = heavy | (np.arange(points.mass.size) % 12 > 0)
    light = changed(points, outcome=some * 0.9, mass=0.01 + 0.001 * heavy)
    found = recovery.critical_mass(light, 0.3, 19)
    assert 0 < found.mass < 0.01 and not found.is_seen and 0 < found.recovered < found.runs
    assert str(found) == "no half in sight (more than that from 0.01 on)"
    turned = changed(points, outcome=~some[::-1] * 0.9, mass=0.01 + 0.001 * ~heavy[::-1])
    found = recovery.critical_mass(turned, 0.3, 19)
    assert found.mass > 0.011 and not found.is_seen
    assert str(found) == "no half in sight (fewer than that up to 0.011)"


def test_an_interval_that_leaves_the_masses_seen_says_so(dataset):
    points = family(dataset)
    # Two seeds alone recover, at the largest masses: a resample without them has no half.
    heaviest = np.isin(points.seed, points.seed[np.argsort(points.mass)[-2:]]) & (points.mass > 0.04)
    found = recovery.critical_mass(changed(points, outcome=heaviest * 0.9), 0.3, 199)
    assert found.is_seen and found.interval[1] > found.seen[1]
    assert str(found).endswith(f"to >{points.mass.max():.2g})")
    alone = points.seed == points.seed[0]
    one = recovery.References(*(column[alone] for column in vars(points).values()))
    rising = changed(one, outcome=(one.mass > np.sort(one.mass)[0]) * 0.9)
    assert str(recovery.critical_mass(rising, 0.3, 19)).endswith("(no interval from 1 seed)")


def test_a_family_without_a_curve_leaves_the_others_theirs(tmp_path, few_resamples):
    dataset = finished()
    same = {"stage": "student", "capacity": 2}
    dataset.target_mass.loc[same] = 0.01
    # With a small coefficient every optimum lies thousands of nats on the target or off it.
    dataset["gibbs_target_log_odds"] = 2e4 * np.sign(dataset.gibbs_target_log_odds)
    dataset.failed.loc[{"stage": "aligned_base"}] = True
    dataset.attrs["configuration"] = configuration("plane")
    told = phase_report.report({"sweep": dataset}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "critical_mass.csv").read_text().splitlines()))
    notes = {(row["kl_coef"], row["capacity"]): row["note"] for row in rows}
    runs = len(TEMPERATURES) * SEEDS
    for kl_coef in ("0.3", "1.0"):
        assert notes[kl_coef, "2"] == f"no curve: {runs} runs of 1 different masses"
        assert notes[kl_coef, ""] == "no curve: 0 runs of 0 different masses"
        assert notes[kl_coef, "4"] == ""
    assert told.count(f"no curve: {runs} runs of 1") == 2
    assert matplotlib.image.imread(tmp_path / "critical_mass.png")[..., :3].std() > 0.05


def test_a_fit_that_does_not_converge_is_said_to_be(dataset, monkeypatch):
    monkeypatch.setattr(statistics, "_MAX_NEWTON_STEPS", 2)
    found = recovery.critical_mass(family(dataset), 0.3, 9)
    assert str(found) == "no curve: penalised logistic regression did not converge in 2 steps" and np.isnan(found.mass)


def test_critical_masses_are_told_by_reference_in_text_and_table(dataset, tmp_path, few_resamples, drawn):
    store = dataset.assign_attrs(configuration=configuration("plane"))
    told = phase_report.report({"sweep": store}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "critical_mass.csv").read_text().splitlines()))
    families = [("base", ""), ("student", "4"), ("student", "2")]
    assert [(row["reference"], row["capacity"]) for row in rows] == families * 2
    lines = [line.split() for line in told.splitlines() if line.split()[1:2] == ["K"]]
    assert len(lines) == 4
    for words, row in zip(lines, [row for row in rows if row["capacity"]], strict=True):
        assert words[:4] == [f"{float(row['kl_coef']):g}", "K", "=", row["capacity"]]
        assert words[4:8] == [row["recovered"], "of", row["runs"], row["seeds"]]
        assert words[8] == f"{float(row['critical_mass']):.2g}" and words[-1] == f"{float(row['gibbs_mass']):.2g}"
        assert words[9] == f"({float(row['critical_mass_low']):.2g}"
    assert f"from m = {1 / 256:.2g} on (n·m = 1), in all steps from {1 / 25600:.2g} on" in told


def test_the_table_and_the_sentence_are_made_from_the_cells(summary):
    text = phase_report.format_table(summary)
    assert len(text.splitlines()) == 2 + len(KL_COEFS) * len(CAPACITIES)
    cell = summary.sel(capacity=2, temperature=0.25, kl_coef=1.0).squeeze()
    assert f"{float(cell.recovery_baseline):.2f}/{float(cell.recovery_challenger):.2f}*" in text
    several, lone = summary.sel(capacity=summary.capacity > 1), summary.sel(capacity=1)
    told = phase_report.verdict(summary)
    assert f"in {int(several.significant.sum())} of {several.difference.size} cells" in told
    assert f"K = 1, set apart: more often in {int(lone.significant.sum())} of {lone.difference.size}" in told


@pytest.mark.parametrize(("algorithm", "told"), [("ppo", True), ("grpo", False)])
def test_a_gibbs_prediction_is_told_only_of_algorithms_that_tend_to_it(algorithm, told, tmp_path, drawn, few_resamples):
    dataset = finished(algorithm=[algorithm])
    dataset.attrs["configuration"] = configuration("plane")
    text = phase_report.report({"sweep": dataset}, tmp_path)
    assert ("Gibbs" in text) is told and "critical mass" in text
    rows = csv.DictReader((tmp_path / "critical_mass.csv").read_text().splitlines())
    assert any(row["gibbs_mass"] for row in rows) is told


@pytest.mark.parametrize(
    ("algorithm", "label_noise", "expected"),
    [
        ("ppo", 0.2, (True, 256, 256 * 100)),
        ("reinforce", 0.0, (True, 256, 256 * 400)),
        ("grpo", 0.0, (False, 256, 256 * 100)),
        ("online_dpo", 0.0, (True, 256, 256 * 400)),
        ("online_dpo", 0.2, (False, 256, 256 * 400)),
        ("offline_dpo_ref", 0.0, (True, 256, 256 * 16)),
        ("offline_dpo_data", 0.0, (True, 0, 0)),
        ("kto", 0.0, (False, 0, 0)),
    ],
)
def test_boundaries_are_those_that_the_algorithm_has(algorithm, label_noise, expected):
    found = recovery.predictions(AlignmentSettings(algorithm=algorithm), label_noise)
    assert (found.gibbs, found.draws_a_step, found.draws) == expected


def recovered_of(told):
    """How many runs of each reference a report says that it has fitted."""
    words = [line.split() for line in told.splitlines() if line.startswith(("   0.3  ", "     1  "))]
    return {line[line.index("of") - 2]: int(line[line.index("of") + 1]) for line in words}


def test_stores_of_different_sweeps_are_not_put_into_one_picture(tmp_path, drawn, few_resamples):
    one, other = finished(), finished(target_weight=[0.1])
    one.attrs["configuration"] = configuration("plane", target_weights=[0.03])
    other.attrs["configuration"] = configuration("plane", target_weights=[0.1], rewards=["disc"])
    with pytest.raises(ValueError, match=r"more_weights\.zarr is of another sweep \(rewards"):
        phase_report.report({"sweep": one, "more_weights": other}, tmp_path)
    other.attrs["configuration"] = configuration(
        "plane", target_weights=[0.1], **{"axis seed": "0 to 3", "grid fingerprint": "ab", "block shape": [1]}
    )
    told = phase_report.report({"sweep": one, "more_weights": other}, tmp_path)
    runs = len(TEMPERATURES) * SEEDS
    assert recovered_of(told) == {"base": 2 * SEEDS, "2": 2 * runs, "4": 2 * runs}
    strange = other.assign_coords(seed=np.arange(SEEDS) + 1)
    with pytest.raises(ValueError, match=rf"another sweep \(seed {SEEDS} there, none of the sweep's now"):
        phase_report.report({"sweep": one, "more_weights": strange}, tmp_path)
    other.attrs["versions"] = json.dumps({"jaxkd": "0.1.0", "jax": "0.10.2"})
    with pytest.raises(ValueError, match=r"another sweep \(version of jaxkd: 0\.1\.0 there, 0\.2\.0 now"):
        phase_report.report({"sweep": one, "more_weights": other}, tmp_path)


def test_target_weights_that_the_sweep_holds_are_drawn_from_it_alone(tmp_path, drawn):
    sweep = finished(target_weight=[0.003, 0.03])
    sweep.attrs["configuration"] = configuration("plane", target_weights=[0.003, 0.03])
    stale = finished(target_weight=[0.003]).isel(seed=slice(2))
    # What is left over from another sweep, not even finished, is not looked at.
    stale.attrs["configuration"] = configuration("plane", target_weights=[0.003], rewards=["disc"])
    stale["done"] = ("block", np.zeros(3, np.int8))
    alone = phase_report.report({"sweep": sweep}, tmp_path)
    assert phase_report.report({"sweep": sweep, "more_weights": stale}, tmp_path) == alone
    beside = finished(target_weight=[0.003, 0.1]).isel(seed=slice(2))
    beside.attrs["configuration"] = configuration("plane", target_weights=[0.003, 0.1])
    told = phase_report.report({"sweep": sweep, "more_weights": beside}, tmp_path)
    # Of the store beside it only 0.1: both capacities, each base once.
    runs = len(TEMPERATURES) * (2 * SEEDS + 2)
    assert recovered_of(told) == {"base": 2 * SEEDS + 2, "2": runs, "4": runs}


@pytest.mark.parametrize(
    ("preset", "flags", "message"),
    [
        ("noise", {"label_noise": (0.2,)}, "--label-noise needs two values"),
        ("reward", {"rewards": ("disc",)}, "--rewards needs two values"),
        ("base-em", {"starts": (1, 3, 10)}, "--starts takes one or two values"),
        ("draws", {"draws": (64,)}, "--draws needs two values"),
        ("plane", {"draws": (7,)}, "--draws: batch_size must be even and at least 4, got 7"),
        ("plane", {"draws": (72,), "algorithms": ("grpo",)}, "--draws: group_size must .* divide batch_size, got 16"),
        ("noise", {"algorithms": ("online_dpo", "kto", "ppo")}, "--label-noise must be 0 for kto, ppo, which use no"),
        (
            "plane",
            {"label_noise": (0.2,)},
            "--label-noise must be 0 for ppo, .*got \\[0.2\\].* online_dpo, offline_dpo_r",
        ),
        (
            "noise",
            {"algorithms": ("robust_dpo",), "label_noise": (0.1, 0.5)},
            "--label-noise must be below 0.5 for rob",
        ),
        ("plane", {"chunk": 0}, "--chunk must be a whole number of at least 1; got 0"),
        ("plane", {"chunk": 4, "measure_chunk": True}, "--measure-chunk and --chunk exclude each other; got --chunk 4"),
        ("plane", {"out": Path("gs://bucket/plane")}, "--out must be a folder, got gs:/bucket/plane: buckets are not"),
        ("plane", {"first_seed": 2**31 - 31}, "--first-seed must be a whole number .* at most 2147483616; got"),
    ],
)
def test_refuses_what_it_cannot_compute_or_show(preset, flags, message):
    with pytest.raises(ValueError, match=message):
        SCRIPT["Config"](preset, **flags)


def without_computing(monkeypatch):
    """Stores are made, and nothing is computed."""
    monkeypatch.setattr(engine, "_compute", lambda sweep, *_: (sweep.close(), (0, 0, 0))[1])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["noise", "base-em", "draws"])
def test_the_store_of_every_preset_has_its_dimensions(preset, tmp_path, monkeypatch):
    without_computing(monkeypatch)
    config = SCRIPT["Config"](preset, out=tmp_path, compile_cache=False)
    settings = config.settings()
    report = SCRIPT["sweep"](config, settings, "sweep", 16)
    assert report.runs == 0
    varied = {"noise": ("label_noise",), "base-em": ("starts",), "draws": ("draws",)}[preset]
    sizes = {"algorithm": len(settings.algorithms), "target_weight": len(settings.target_weights)}
    sizes |= {"capacity": len(settings.capacities), "seed": settings.seeds}
    with xr.open_zarr(tmp_path / "sweep.zarr") as store:
        mass = store.target_mass
        assert {*mass.dims} == {*sizes, *varied, "temperature", "kl_coef", "stage"}
        assert {dim: mass.sizes[dim] for dim in sizes} == sizes
        assert all(mass.sizes[dim] > 1 for dim in varied)
        assert mass.temperature.values.tolist() == pytest.approx([*settings.temperatures])
        assert {*map(str, store.stage.values)} == {"base", "student", "aligned_base", *settings.arms}
        assert not store.done.values.any() and np.isnan(mass.values).all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [(None, 16), (None, 5)]),
        ({"chunk": 32}, [(32, 16), (32, 5)]),
        ({"measure_chunk": True}, [(None, None), (None, 5)]),
    ],
)
def test_the_chunk_of_a_store_is_kept_unless_another_is_asked_for(flags, expected, tmp_path, monkeypatch):
    calls = []

    def run_sweep(*_, chunk, default_chunk, **__):
        calls.append((chunk, default_chunk))
        return engine.Report(tmp_path, 0, 0, 0, 5, 1, 0, 0, 0.0, 1.0, 0, 1, 0)

    monkeypatch.setattr(engine, "run_sweep", run_sweep)
    monkeypatch.setattr(phase_report, "report", lambda *_: "")
    monkeypatch.setattr(xr, "open_zarr", lambda _: None)
    SCRIPT["main"](SCRIPT["Config"]("plane", out=tmp_path, **flags))
    assert calls == expected


def test_the_grid_is_that_of_the_settings_and_finer_around_all_targets(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(engine, "run_sweep", lambda *_, shared, **__: given.append(shared))
    fixed = SCRIPT["fixed_settings"]

    def coarse(*settings):
        told = fixed(*settings)
        return told | {"laboratory": told["laboratory"] | {"grid_points": 61}}

    monkeypatch.setitem(SCRIPT["sweep"].__globals__, "fixed_settings", coarse)
    config = SCRIPT["Config"]("two-targets", out=tmp_path)
    SCRIPT["sweep"](config, config.settings(), "sweep", 16)
    [(truths, _, grid)] = given
    assert grid.x.shape == (2, 61**2)
    for truth in truths.values():
        means = np.asarray(truth.target.means)
        apart = np.abs(np.asarray(grid.patch.x)[:, None, :] - means[:, :, None]).max(axis=0).min(axis=1)
        assert (apart < np.sqrt(grid.cell) / 3).all()


def test_more_seeds_make_larger_calls_possible():
    config = SCRIPT["Config"]("plane", seeds=512, first_seed=100)
    grid = SCRIPT["grid_of"](config.settings())
    assert grid.seeds == tuple(range(100, 612))
    _, of_block = SCRIPT["function_of"](config.settings(), False)
    sweep = engine._Sweep(None, grid, (), of_block, None, engine.jax.local_devices()[:4], False)
    # 512 seeds of the four smaller capacities are in a row, and then those of the four larger ones.
    assert sweep.most_runs == 4 * 512
    assert sweep.fitting(1024) == 512
    assert grid.block(0).num_runs == 32


def test_robust_dpo_knows_the_share_of_flipped_labels():
    assert SCRIPT["coefficients_of"]("robust_dpo", 0.2).label_smoothing == 0.2
    assert SCRIPT["coefficients_of"]("cdpo", 0.2).label_smoothing == 0.1
    chosen = SCRIPT["Config"]("noise", algorithms=("robust_dpo",)).settings()
    assert SCRIPT["fixed_settings"](chosen, False)["coefficients"]["robust_dpo"]["label_smoothing"] == "label_noise"


@pytest.mark.slow
def test_help_names_every_arm_and_algorithm():
    command = [sys.executable, Path(SCRIPT["__file__"]), "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert all(name in told for name in (*pipelines.ARMS, *ALGORITHMS) if name != "orpo")


def test_the_resolved_configuration_is_shown():
    told = json.loads(SCRIPT["shown"](SCRIPT["Config"]("noise", seeds=5)))
    assert told["label_noise"] == [0.0, 0.1, 0.2, 0.3, 0.4] and told["out"] == "runs/noise"
    assert told["runs"] == 2 * 5 * 5
    assert told["coefficients"]["online_dpo"]["learning_rate"] == ALGORITHMS["online_dpo"].learning_rate


@pytest.mark.slow
def test_showing_the_configuration_computes_and_writes_nothing(tmp_path):
    command = [sys.executable, Path(SCRIPT["__file__"]), "--preset", "cost", "--show-config"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(ended.stdout)["match_component_evaluations"] == [False, True]
    assert ended.stderr == ""
    assert not list(tmp_path.iterdir())


def test_the_store_says_what_no_flag_does():
    chosen = SCRIPT["Config"]("plane").settings()
    fixed = SCRIPT["fixed_settings"](chosen, False)
    assert fixed["alignment"] == asdict(AlignmentSettings(algorithm="ppo"))
    assert fixed["coefficients"]["ppo"]["learning_rate"] == ALGORITHMS["ppo"].learning_rate
    assert {"distillation_samples", "iterations", "covariance_floor"} <= set(fixed["laboratory"])
    json.dumps(fixed)


def quick_and_slow(presets):
    quick = ("plane", "two-targets", "reward")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in presets]


@pytest.mark.parametrize("preset", quick_and_slow(["plane", "draws", *phase_figures.VIEWS]))
def test_every_figure_is_drawn_from_a_store_alone(preset, tmp_path):
    axes = {
        "noise": {"label_noise": [0.0, 0.2]},
        "two-targets": {"num_targets": [1, 2]},
        "target-weight": {"target_weight": [0.01, 0.03, 0.3]},
        "base-data": {"base_samples": [64, 1024]},
        "base-em": {"starts": [1, 10]},
        "reward": {"reward_name": ["density", "disc"]},
        "cost": {"match_component_evaluations": [False, True]},
        "draws": {"draws": [64, 256]},
    }.get(preset, {})
    dataset = finished(**axes)
    dataset.attrs["configuration"] = configuration(preset)
    told = phase_report.report({"sweep": dataset}, tmp_path)
    assert "Align→KD recovers more often than KD→Align in" in told
    names = ["phase_diagram", "critical_mass"] if preset == "plane" else [preset]
    assert (tmp_path / f"{preset}.txt").read_text().strip() in told
    for name in names:
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture[..., :3].std() > 0.05
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    rows = list(csv.DictReader((tmp_path / f"{preset}.csv").read_text().splitlines()))
    cells = recovery.summarise(dataset).difference.size
    assert ("target_balance_median" in rows[0]) is (preset == "two-targets")
    assert len(rows) == cells * 3 and {row["arm"] for row in rows} == {"aligned_base", "kd_align", "align_kd"}


def draw(preset, dataset):
    phase_figures.draw_along(dataset, recovery.summarise(dataset), phase_figures.VIEWS[preset])


@pytest.mark.parametrize("logarithmic", [False, True])
def test_no_marker_hides_another_of_the_same_height(logarithmic):
    x = np.array([1.0, 0.5, 0.35, 0.1])
    shown = phase_figures._nudged(x, 12, logarithmic)
    assert shown.shape == (12, 4)
    # Groups around neighbouring values stay apart, and every group is evenly spread around its own.
    groups = [sorted(column) for column in shown.T[np.argsort(x)]]
    assert all(low[-1] < high[0] for low, high in itertools.pairwise(groups))
    at, wanted = (np.log(shown), np.log(x)) if logarithmic else (shown, x)
    np.testing.assert_allclose(at.mean(axis=0), wanted, atol=1e-12)
    steps = np.diff(at, axis=0)
    assert (steps > 0.002).all()
    np.testing.assert_allclose(steps, steps[0, 0], rtol=1e-6)
    assert len(set(phase_figures._nudged(np.array([4.0]), 3, logarithmic).ravel())) == 3


def test_lines_of_two_styles_lie_side_by_side(drawn):
    draw("cost", finished(match_component_evaluations=[False, True]))
    first = drawn[0].axes[0]
    starts = [line.get_xdata()[0] for line in first.get_lines() if len(line.get_xdata()) == len(CAPACITIES)]
    assert len(starts) >= 2 * 3 and len(set(starts)) == 2 * 3
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[-2:] == ["same updates", "same component evaluations"]


def test_panels_in_a_row_say_alike_what_their_abscissa_is(drawn):
    draw("base-data", finished(base_samples=[64, 1024]))
    drawn[0].canvas.draw()
    lowest = len([axis for axis in drawn[0].axes[1::2] if axis.get_visible()]) - 1
    for column in (0, 1):
        seen = [axis for axis in drawn[0].axes[column::2] if axis.get_visible()]
        named = [axis for axis in seen if axis.get_xlabel() == "points that the base was fitted to"]
        ticked = [axis for axis in seen if any(tick.label1.get_visible() for tick in axis.xaxis.get_major_ticks())]
        # The left column goes on below the lowest panel of the right one, beside which it says so, too.
        assert named == ticked == ([seen[lowest], seen[-1]] if column == 0 else [seen[-1]])
    letters = [axis.get_title(loc="left") for axis in drawn[0].axes if axis.get_visible()]
    assert letters == list("abcdefghijklmnopqrstuvwxyz"[: len(letters)]) and len(letters) > 5


def lines_of(axis, arm):
    """The lines of an arm through all of its points."""
    lines = [line for line in axis.get_lines() if line.get_color() == phase_figures.COLOURS[arm]]
    return [line for line in lines if line.get_linestyle() != "None"]


def test_what_does_not_depend_on_the_temperature_is_a_level(drawn):
    draw("two-targets", finished(num_targets=[1, 2]))
    axis = drawn[0].axes[0]
    lowest = drawn[0].axes[-2]
    ticks = dict(zip((tick.get_text() for tick in lowest.get_xticklabels()), axis.get_xticks(), strict=True))
    assert [*ticks] == ["1", "0.5", "0.25", "any τ"]
    beside = []
    for arm in ("aligned_base", "align_kd"):
        first, second = lines_of(axis, arm)
        for line in (first, second):
            (start, end), heights = line.get_xdata(), line.get_ydata()
            assert heights[0] == heights[1] and start == 1.0 and line.get_markevery() == [1]
            beside.append(end)
    assert len(set(beside)) == 4 and max(beside) < 0.2 and np.mean(beside) == pytest.approx(ticks["any τ"])
    for line in lines_of(axis, "kd_align"):
        # Far nearer to its own temperature than to the next.
        np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 1.0], atol=0.25 / 4)
    assert len(lines_of(axis, "kd_align")) == 2


def test_what_does_not_depend_on_the_temperature_is_not_drawn_again_for_each(drawn):
    draw("noise", finished(label_noise=[0.0, 0.2]).sel(temperature=[1.0, 0.25]))
    axes = drawn[0].axes
    assert len(axes) == len(CAPACITIES) * len(KL_COEFS)
    for axis in axes:
        assert [len(lines_of(axis, arm)) for arm in ("aligned_base", "kd_align", "align_kd")] == [1, 2, 1]
    labels = [text.get_text() for text, _ in legend_of(drawn[0])]
    assert labels[-3:] == ["τ = 1", "τ = 0.25", "any τ: aligned base, Align→KD"]
    # Three temperatures are too many for kinds of line.
    draw("noise", finished(label_noise=[0.0, 0.2]))
    assert len(drawn[1].axes) == len(CAPACITIES) * len(KL_COEFS) * 3


def test_boundaries_of_the_student_are_not_drawn_where_it_is_no_reference(drawn, summary):
    one = summary.isel(algorithm=0, target_weight=0)
    phase_figures.draw_plane(one, recovery.predictions(AlignmentSettings(algorithm="ppo")))
    contours = {}
    for axis in drawn[0].axes:
        count = sum(isinstance(drawn_on, matplotlib.contour.ContourSet) for drawn_on in axis.collections)
        contours.setdefault(axis.get_title(), []).append(count)
    assert contours["recovered, Align→KD"] == [0, 0]
    assert min(contours["recovered, KD→Align"] + contours["Align→KD − KD→Align"]) >= 2


def test_critical_masses_are_found_for_each_number_of_draws(tmp_path, few_resamples):
    dataset = finished(draws=[64, 256])
    student = dataset.target_mass.sel(stage="student")
    dataset.target_mass.loc[{"stage": "kd_align"}] = ((student * student.draws > 0.8) * 0.8).values
    dataset.attrs["configuration"] = configuration("draws")
    told = phase_report.report({"sweep": dataset}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "critical_mass.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(KL_COEFS) * 3 and {row["draws"] for row in rows} == {"64", "256"}
    for row in rows:
        if row["reference"] == "student":
            assert float(row["critical_mass"]) * int(row["draws"]) == pytest.approx(0.8, rel=0.25)
    for count in (64, 256):
        assert f"in the first step from m = {1 / count:.2g} on" in told
    [verdict] = [line for line in told.splitlines() if line.startswith("β = 1, K = 4")]
    assert verdict.startswith("β = 1, K = 4: while n rises 4-fold, from 64 to 256, the critical mass falls ")
    assert 3 < float(verdict.split("falls ")[1].split("-fold")[0]) < 5
    assert "β = 1, base" not in told


def test_the_balance_is_that_of_recovered_runs_with_two_targets(drawn):
    dataset = finished(num_targets=[1, 2])
    dataset["target_mass"] = dataset.target_mass.where(dataset.seed < 6, 0.1).transpose(*dataset.target_mass.dims)
    recovered = dataset.target_mass > 0.5
    dataset["target_balance"] = xr.where(recovered, 0.75, 0.25).transpose(*dataset.target_mass.dims)
    some = {"capacity": 4, "temperature": 0.5, "kl_coef": 0.3, "stage": "kd_align", "num_targets": 2}
    one = recovered.sel(some).squeeze()
    assert 0 < one.sum() < 8  # the median of all is 0.25
    draw("two-targets", dataset)
    panels = [axis for axis in drawn[0].axes if "median of recovered" in axis.get_ylabel()]
    (panel,) = [axis for axis in panels if axis.get_ylabel().startswith("K = 4")]
    values = np.concatenate([line.get_ydata() for line in panel.get_lines()])
    assert len(panel.get_lines()) == 3 and set(values[np.isfinite(values)]) == {0.75}
    assert f"{int(one.sum())}" in [text.get_text() for text in panel.texts]
    dataset["target_mass"] = 0 * dataset.target_mass
    draw("two-targets", dataset)
    assert sum("no run recovered" in [text.get_text() for text in axis.texts] for axis in drawn[1].axes) == 6


def test_the_title_is_what_all_runs_share(dataset):
    assert phase_figures.title_of(dataset) == f"PPO · target weight 0.03 · {SEEDS} seeds"
    one = dataset.sel(capacity=[4], temperature=0.5)
    assert phase_figures.title_of(one) == f"PPO · K = 4 · τ = 0.5 · target weight 0.03 · {SEEDS} seeds"


def test_students_are_drawn_once_and_marks_tell_the_sign(drawn, summary):
    one = summary.isel(algorithm=0, target_weight=0)
    turned = one.assign(difference=xr.where(one.kl_coef == 1.0, -one.difference, one.difference))
    phase_figures.draw_plane(turned, recovery.predictions(AlignmentSettings(algorithm="ppo")), title="told")
    heads = [axis.get_title() for axis in drawn[0].axes]
    assert sum(head.startswith("student") for head in heads) == 2 and drawn[0].get_suptitle() == "told"
    apart = [axis for axis in drawn[0].axes if axis.get_title().startswith("Align→KD −")]
    for axis, kl_coef in zip(apart, KL_COEFS, strict=True):
        counts = {line.get_markerfacecolor(): len(line.get_xdata()) for line in axis.get_lines()}
        cells = turned.sel(kl_coef=kl_coef)
        assert counts["black"] == int((cells.significant & (cells.difference > 0)).sum())
        assert counts["white"] == int((cells.significant & (cells.difference < 0)).sum())
    assert any(turned.significant.values.ravel() & (turned.difference.values.ravel() < 0))


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
        phase_report.report({"sweep": half}, tmp_path)
    with pytest.raises(ValueError, match=r"holds no store sweep\.zarr"):
        phase_report.report({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_orders_on_bases_that_merge_a_mode_and_on_others():
    dataset = finished(starts=[1, 10]).sel(temperature=[1.0, 0.5])
    mass = dataset.target_mass.sel(stage="kd_align", temperature=0.5, kl_coef=0.3, capacity=4, algorithm="ppo")
    merged = (mass.sel(starts=1, target_weight=0.03) > recovery.RECOVERED_MASS).values
    assert 5 <= merged.sum() <= SEEDS - 5
    dataset.base_failed[0, 0, 0, :, :] = merged
    share, told = phase_report.verdict_on_bases(dataset)
    assert share.startswith(f"Bases that merge or miss a mode: {100 * merged.mean() / 2:.1f} %")
    assert told.startswith(f"starts 1: {merged.sum()} of {SEEDS} bases; recovered at τ = 0.5")
    assert "β = 0.3: KD→Align 1.00 / 0.00, Align→KD 1.00 / 1.00" in told


def test_orders_on_merged_bases_are_told_of_every_capacity_and_failed_runs_leave_them():
    dataset = finished()
    mass = dataset.target_mass
    merged = np.arange(SEEDS) < 8
    dataset.base_failed[..., :] = merged
    at = {"temperature": 0.25, "kl_coef": 1.0, "stage": "align_kd"}
    for capacity, count in zip(CAPACITIES, (1, 3, 6), strict=True):
        mass.loc[at | {"capacity": capacity}] = np.where(np.arange(SEEDS) < count, 0.9, 0.1)
    _, told = phase_report.verdict_on_bases(dataset)
    assert told.count(f"8 of {SEEDS} bases") == 1
    for capacity, rate in zip(CAPACITIES, ("0.12", "0.38", "0.75"), strict=True):
        assert f"K = {capacity}, β = 1: KD→Align 0.00 / 0.00, Align→KD {rate} / 0.00" in told
    # Of the eight, two that recovered fail in finite numbers and one that did not in none.
    dataset.failed.loc[at | {"capacity": 4, "seed": [0, 1]}] = True
    mass.loc[at | {"capacity": 4, "seed": 7}] = np.nan
    assert "K = 4, β = 1: KD→Align 0.00 / 0.00, Align→KD 0.80 / 0.00" in phase_report.verdict_on_bases(dataset)[1]
    dataset.failed.loc[at | {"capacity": 4, "seed": range(8)}] = True
    assert "Align→KD nan / 0.00" in phase_report.verdict_on_bases(dataset)[1]
    alone = phase_report.verdict_on_bases(dataset.sel(capacity=[2]))[1]
    assert "K = " not in alone and "β = 1: KD→Align 0.00 / 0.00, Align→KD 0.38 / 0.00" in alone


def test_a_mass_that_no_draw_shows_is_put_at_that_of_one_draw(dataset):
    drawn = dataset.assign(from_grid=dataset.from_grid.copy())
    seldom = {"stage": "student", "temperature": 0.25, "capacity": 4}
    drawn.from_grid.loc[seldom | {"seed": range(20)}] = False
    mass = drawn.target_mass.copy()
    mass.loc[seldom | {"seed": range(14)}] = 0.0
    mass.loc[seldom | {"seed": range(14, 20)}] = 3 / 64
    mass.loc[seldom | {"seed": [20]}] = 0.0
    drawn["target_mass"] = mass
    drawn.attrs["configuration"] = configuration("plane", laboratory={"num_draws": 64})
    points = recovery.references([drawn.isel(algorithm=0)], 0.3)
    told = recovery.resolved_mass(drawn).sel(seldom).isel(kl_coef=0).squeeze()
    np.testing.assert_allclose(told.values[:21], [1 / 64] * 14 + [3 / 64] * 6 + [1e-12])
    assert (points.mass == 1 / 64).sum() == 14 and (points.mass == 1e-12).sum() == 1
    median = recovery.summarise(drawn).student_target_mass.sel(capacity=4, temperature=0.25, kl_coef=0.3)
    np.testing.assert_allclose(median, 1 / 64)
    xr.testing.assert_equal(recovery.resolved_mass(dataset), np.maximum(dataset.target_mass, 1e-12))


def test_each_panel_of_the_critical_mass_says_how_many_runs_it_shows(drawn, dataset):
    critical_figure(dataset, lambda points: points.log_odds.__setitem__(slice(50), np.nan))
    runs = (2 * len(TEMPERATURES) + 1) * SEEDS
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert all(f"{runs} runs of {SEEDS} seeds" in title for title in titles[:2])
    assert all(f"{runs - 50} runs of {SEEDS} seeds" in title for title in titles[6:])


def critical_figure(dataset, change=lambda points: None):
    """Draw the critical masses of a store's references after a change to them; returns what was found."""
    found = {}
    for kl_coef in KL_COEFS:
        points = recovery.references([dataset.isel(algorithm=0)], kl_coef)
        change(points)
        families = recovery.by_family(points)
        found[kl_coef] = families, [recovery.critical_mass(one, kl_coef, 9) for one in families.values()]
    phase_figures.draw_critical_mass(found, recovery.predictions(AlignmentSettings(algorithm="ppo")))
    return found


def test_every_family_has_a_lane_with_its_critical_mass_and_its_prediction(drawn, dataset):
    found = critical_figure(dataset)
    assert [tick.get_text() for tick in drawn[0].axes[4].get_yticklabels()] == ["base", "K = 4", "K = 2"]
    for (_, masses), lanes in zip(found.values(), drawn[0].axes[4:6], strict=True):
        single = {
            (line.get_marker(), int(line.get_ydata()[0])): line.get_xdata()[0]
            for line in lanes.get_lines()
            if len(line.get_xdata()) == 1
        }
        for height, one in enumerate(masses):
            marks = {marker: at for (marker, where), at in single.items() if where == height}
            np.testing.assert_equal(marks.pop("|"), one.gibbs_mass)
            assert [*marks.values()] == ([one.mass] if one.is_seen else [])
    assert any(not one.is_seen for _, masses in found.values() for one in masses)
    colours = {text.get_text(): handle.get_color() for text, handle in legend_of(drawn[0])}
    assert colours["base"] == "black" and len({str(colour) for colour in colours.values()}) >= 4


def legend_of(figure):
    [legend] = figure.legends
    return list(zip(legend.get_texts(), legend.legend_handles, strict=True))


@pytest.mark.parametrize(
    ("stage", "count"),
    [
        ("base", 1),
        ("student", len(CAPACITIES) * len(TEMPERATURES)),
        ("aligned_base", 2 * len(KL_COEFS)),
        ("align_kd", 2 * len(KL_COEFS) * len(CAPACITIES)),
        ("kd_align", 2 * len(KL_COEFS) * len(CAPACITIES) * len(TEMPERATURES)),
    ],
)
def test_a_model_that_failed_is_counted_once(stage, count):
    store = finished(algorithm=["ppo", "grpo"])
    assert recovery.failed_models(store) == 0
    # A store repeats a seed's models over algorithms, capacities, temperatures and coefficients.
    store.failed.loc[{"stage": stage, "seed": [3]}] = True
    assert recovery.failed_models(store) == count


def test_figures_and_tables_do_not_depend_on_the_order_of_flags(dataset, drawn):
    turned = dataset.isel(capacity=[2, 0, 1], kl_coef=[1, 0])
    xr.testing.assert_identical(recovery.summarise(turned), recovery.summarise(dataset))
    summary = recovery.summarise(turned).isel(algorithm=0, target_weight=0)
    phase_figures.draw_plane(summary, recovery.predictions(AlignmentSettings(algorithm="ppo")))
    student = drawn[0].axes[0]
    assert [tick.get_text() for tick in student.get_yticklabels()] == ["1", "2", "4"]
    assert student.get_yticks().tolist() == [0.0, 1.4, 2.4]


def test_the_table_holds_the_balance_that_the_figure_shows_and_the_bases_that_merge():
    dataset = finished(num_targets=[1, 2])
    dataset["target_mass"] = dataset.target_mass.where(dataset.seed < 6, 0.1).transpose(*dataset.target_mass.dims)
    dataset["target_balance"] = xr.where(dataset.target_mass > 0.5, 0.75, 0.25).transpose(*dataset.target_mass.dims)
    dataset.base_failed[..., :5] = True
    rows = phase_report.rows_of(recovery.summarise(dataset))
    some = {"capacity": 4, "temperature": 0.5, "kl_coef": 0.3, "arm": "kd_align"}
    one, two = (next(row for row in rows if (some | {"num_targets": count}).items() <= row.items()) for count in (1, 2))
    assert two["target_balance_median"] == 0.75 and two["target_balance_runs"] == round(two["recovery"] * SEEDS) > 0
    assert np.isnan(one["target_balance_median"]) and one["target_balance_runs"] == 0
    assert {row["bases_failed"] for row in rows} == {5}


# `.ci/run` has the plane; an axis that shapes the program takes another way than its others.
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["reward"])
def test_a_preset_goes_from_computing_to_its_figure(preset, capsys, tmp_path):
    SCRIPT["main"](SCRIPT["Config"](preset, quick=True, seeds=2, steps=4, out=tmp_path, compile_cache=False))
    told = capsys.readouterr().out
    assert (tmp_path / f"{preset}.txt").read_text().strip() in told
    assert matplotlib.image.imread(tmp_path / f"{preset}.png")[..., :3].std() > 0.05
    assert (tmp_path / f"{preset}.pdf").read_bytes().startswith(b"%PDF")
    rows = list(csv.DictReader((tmp_path / f"{preset}.csv").read_text().splitlines()))
    with xr.open_zarr(tmp_path / "sweep.zarr") as store:
        arms = [name for name in store.stage.values if name not in ("base", "student")]
        assert len(rows) == store.target_mass.isel(stage=0, seed=0).size * len(arms)
        assert store.done.values.all() and (store.failed == 0).all()
        assert {*store.target_mass.dims} > {"reward_name", "capacity", "temperature", "kl_coef", "seed", "stage"}
        assert store.sizes["reward_name"] > 1

"""Numbers that spell their own labels go in; every one must come out where its labels say."""

import csv
import itertools

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.text import Text
from scipy import stats

from jaxkd import (
    align,
    figures,
    laboratory,
    metrics,
    mixture,
    phase_figures,
    phase_report,
    pipelines,
    recovery,
    results,
    theory,
)
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.laboratory import LaboratorySettings, Measured, Optimum, Outcome, Points, Prepared
from jaxkd.sweep import store
from jaxkd.truth import make_truth

pytestmark = pytest.mark.loose  # optax's Adam does not stand strict dtype promotion

TEMPERATURES, KL_COEFS, SEEDS = [1.0, 0.25], [0.3, 1.0, 1.5], [3, 4, 5, 6]
SIZES = {"temperature": len(TEMPERATURES), "kl_coef": len(KL_COEFS)}
BOTH = ("temperature", "kl_coef")
TRUTH = make_truth(num_targets=2)

# Written out from the table of arms: what each model depends on, and the reference that its policy was held to.
MODELS = {
    "base": ((), "base"),
    "student": (("temperature",), "base"),
    "kd_align": (BOTH, "student"),
    "kd_align_sharpened": (BOTH, "student"),
    "aligned_base": (("kl_coef",), "base"),
    "align_kd": (("kl_coef",), "base"),
    "align_kd_sharpened": (BOTH, "base"),
    "kd_align_anchored": (BOTH, "base"),
    "base_start_student_reference": (BOTH, "student"),
}
ALIGNED = ("kd_align", "aligned_base", "kd_align_anchored", "base_start_student_reference")
NAMES = laboratory.every_model(LaboratorySettings())


def spelled(quantity, model, seed, temperature, kl_coef):
    """A whole number that says what it is: places along the axes that the model does not depend on are 0."""
    axes = MODELS[model][0]
    at = (temperature if "temperature" in axes else 0, kl_coef if "kl_coef" in axes else 0)
    return np.float32(((quantity * 10 + NAMES.index(model)) * 10 + seed) * 100 + at[0] * 10 + at[1] + 1)


def places_of(model):
    axes = MODELS[model][0]
    return [*itertools.product(*(range(SIZES[axis] if axis in axes else 1) for axis in BOTH))]


def stack(quantity, models):
    """[seeds, rows], rows as `laboratory.by_stage` takes them apart."""
    rows = [(model, *place) for model in models for place in places_of(model)]
    return np.stack([[spelled(quantity, model, seed, *place) for model, *place in rows] for seed in range(len(SEEDS))])


QUANTITIES = [*metrics.Metrics._fields, "first_hit_step", "target_hits", "clip_fraction"]


def of_modes(values):
    return values[..., None] + np.arange(8, dtype=np.float32) * 1_000_000


def measured(models):
    of = {name: stack(i, models) for i, name in enumerate(QUANTITIES)}
    shape = of["reward"].shape
    means = np.stack([stack(20 + d, models) for d in range(2)], axis=-1)[..., None] * np.ones(4, np.float32)
    zeros = np.zeros((*shape, 1, 4), np.float32)
    return Measured(
        mixture.Mixture(zeros[..., 0, :], means, np.concatenate([zeros] * 2, axis=-2), zeros),
        metrics.Metrics(
            **{name: of[name] for name in metrics.Metrics._fields} | {"mode_mass": of_modes(of["mode_mass"])}
        ),
        np.arange(shape[1]) % 2 * np.ones(shape) > 0,
        align.Record(**{name: of[name] for name in QUANTITIES[-3:]}, failed=np.zeros(shape, bool)),
    )


def optimum(reference):
    """Gibbs policies lie along the reference's own axes and then the coefficient's; β_c along its own alone."""
    own = [SIZES[axis] for axis in MODELS[reference][0]]

    def of(quantity, *lengths):
        shape = (len(SEEDS), *own, *lengths)
        begin = 1e5 * quantity + (0 if reference == "base" else 5e4)
        return (begin + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)

    gibbs = theory.Gibbs(*(of(i, SIZES["kl_coef"]) for i in range(len(theory.Gibbs._fields))))
    return Optimum(gibbs, of(9))


OPTIMA = {name: optimum(name) for name in ("base", "student")}
BASE_FAILED, LIKELIHOOD = np.asarray([True, False, False, True]), np.arange(4, dtype=np.float32)


def of_runs(algorithm="ppo", **others):
    outcome = Outcome(measured(NAMES), LIKELIHOOD, BASE_FAILED, OPTIMA)
    return results.of_runs(outcome, NAMES, TEMPERATURES, KL_COEFS, algorithm, **others)


def labelled(algorithms=("ppo",), **others):
    truth = jax.tree.map(lambda leaf: np.stack([leaf] * len(SEEDS)), TRUTH)
    prepared = Prepared(truth, {}, LIKELIHOOD, BASE_FAILED, OPTIMA)
    made = [name for name in NAMES if name not in laboratory.PREPARED]
    arms = dict.fromkeys(algorithms, measured(made))
    shared = measured(laboratory.PREPARED)
    return results.to_dataset(prepared, shared, arms, made, TEMPERATURES, KL_COEFS, SEEDS, num_components=8, **others)


@pytest.fixture(scope="module")
def dataset():
    return labelled()


def everywhere():
    """Every point: its labels, and its places along seed, temperature and coefficient."""
    for seed, temperature, kl_coef in itertools.product(*map(range, (len(SEEDS), *SIZES.values()))):
        for model in NAMES:
            labels = {"seed": SEEDS[seed], "temperature": TEMPERATURES[temperature], "kl_coef": KL_COEFS[kl_coef]}
            yield labels | {"stage": model}, (seed, temperature, kl_coef)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_models_and_their_axes_are_those_written_out():
    assert set(NAMES) == set(MODELS) and set(pipelines.arms()) == set(MODELS) - {"base", "student", "aligned_base"}
    for name, (axes, reference) in MODELS.items():
        assert (pipelines.axes_of(name), pipelines.reference_of(name)) == (axes, reference)


@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name not in ("objective", "mode_mass")])
def test_every_quantity_stands_at_its_labels(dataset, quantity):
    values, index = dataset[quantity].sel(algorithm="ppo"), QUANTITIES.index(quantity)
    runs = of_runs()[quantity]
    for labels, place in everywhere():
        expected = spelled(index, labels["stage"], *place)
        assert values.sel(labels) == expected, labels
        assert runs[(*place, NAMES.index(labels["stage"]))] == expected


def test_models_without_a_coefficient_of_their_own_are_valued_at_every_one(dataset):
    for labels, (seed, temperature, kl_coef) in everywhere():
        reward, kl = (
            spelled(QUANTITIES.index(name), labels["stage"], seed, temperature, kl_coef)
            for name in ("reward", "kl_to_reference")
        )
        found = dataset.objective.sel(algorithm="ppo").sel(labels)
        assert found == pytest.approx(reward - KL_COEFS[kl_coef] * kl, rel=1e-6)


def test_optima_are_those_of_the_reference_that_each_policy_was_held_to(dataset):
    assert "algorithm" not in dataset.gibbs_reward.dims
    for labels, (seed, temperature, kl_coef) in everywhere():
        reference = MODELS[labels["stage"]][1]
        own = (seed, temperature) if reference == "student" else (seed,)
        assert dataset.half_mass_coefficient.sel(labels) == OPTIMA[reference].half_mass_coefficient[own]
        for name, values in OPTIMA[reference].gibbs._asdict().items():
            assert dataset[f"gibbs_{name}"].sel(labels) == values[(*own, kl_coef)], (name, labels)


def test_nothing_was_measured_of_a_model_that_failed():
    whole = measured(NAMES)
    lost = NAMES.index("kd_align") + 1  # a row of the student's, one seed of it without a flag
    failed, reward = whole.record.failed.copy(), whole.metrics.reward.copy()
    failed[1, lost], reward[2, lost] = True, np.nan
    metrics_of = whole.metrics._replace(reward=reward)
    broken = whole._replace(metrics=metrics_of, record=whole.record._replace(failed=failed))
    found, kept = results._quantities(broken), results._quantities(whole)
    where = np.zeros(failed.shape, bool)
    where[[1, 2], lost] = True
    np.testing.assert_array_equal(found["failed"], where)
    for name in metrics.Metrics._fields:
        assert found[name].dtype == np.float32
        assert np.isnan(found[name][where]).all()
        np.testing.assert_array_equal(found[name][~where], kept[name][~where])
    for name in ("first_hit_step", "target_hits", "from_grid"):
        np.testing.assert_array_equal(found[name], kept[name])


def test_masses_of_modes_of_a_model_that_failed_are_not_told(monkeypatch):
    whole = measured

    def struck(models):
        one = whole(models)
        failed = one.record.failed.copy()
        failed[1, 0] = True
        return one._replace(record=one.record._replace(failed=failed))

    monkeypatch.setitem(globals(), "measured", struck)
    dataset = labelled()
    assert dataset.failed.any() and not dataset.failed.all()
    np.testing.assert_array_equal(dataset.mode_mass.isnull().all("mode"), dataset.failed)
    np.testing.assert_array_equal(dataset.target_mass.isnull(), dataset.failed)


def test_what_is_held_to_another_reference_has_no_optimum(monkeypatch):
    axes = ("kl_coef",)
    monkeypatch.setitem(pipelines.STAGES, "again", pipelines.Align(start="align_kd", reference="align_kd"))
    monkeypatch.setitem(MODELS, "again", (axes, "align_kd"))
    names = (*NAMES, "again")
    monkeypatch.setitem(globals(), "NAMES", names)
    found = results.of_runs(
        Outcome(measured(names), LIKELIHOOD, BASE_FAILED, OPTIMA), names, TEMPERATURES, KL_COEFS, "ppo"
    )
    known = of_runs()
    for name in (*(f"gibbs_{field}" for field in theory.Gibbs._fields), "half_mass_coefficient", "distance_to_gibbs"):
        assert np.isnan(found[name][..., -1]).all() and found[name].dtype == known[name].dtype, name
        np.testing.assert_array_equal(found[name][..., :-1], known[name][..., :-1])
    assert np.isfinite(found["objective"]).all()


def test_masses_of_modes_stand_at_their_labels_where_the_targets_are_told(dataset):
    index = QUANTITIES.index("mode_mass")
    for labels, place in everywhere():
        found = dataset.mode_mass.sel(algorithm="ppo").sel(labels)
        assert found.dims == dataset.truth_is_target.dims
        np.testing.assert_array_equal(found, of_modes(spelled(index, labels["stage"], *place)))
    assert "mode_mass" not in of_runs() and "mode_mass" not in results.labels()


def test_components_and_the_seeds_own_stand_at_their_labels(dataset):
    for labels, place in everywhere():
        if labels["kl_coef"] == 1.0:
            for d in range(2):
                mean = dataset.component_mean.sel(algorithm="ppo").sel(labels)[d]
                np.testing.assert_array_equal(mean[:4], spelled(20 + d, labels["stage"], *place))
    np.testing.assert_array_equal(dataset.component_weight[..., 4:], 0)
    np.testing.assert_allclose(dataset.component_weight.sum("component"), 1, rtol=1e-6)
    np.testing.assert_array_equal(dataset.base_failed, BASE_FAILED)
    np.testing.assert_array_equal(dataset.base_log_likelihood, LIKELIHOOD)
    np.testing.assert_array_equal(dataset.truth_mean, TRUTH.modes.means)
    np.testing.assert_array_equal(dataset.truth_is_target, TRUTH.is_target)


def test_a_sweep_over_algorithms_and_seeds_is_the_same_data_set():
    algorithms = ("ppo", "grpo")
    expected = labelled(algorithms)
    prepared = Prepared((), {}, LIKELIHOOD, BASE_FAILED, OPTIMA)
    made = [name for name in NAMES if name not in laboratory.PREPARED]
    runs = [
        results.of_algorithm(
            prepared,
            measured(laboratory.PREPARED),
            measured(made),
            made,
            TEMPERATURES,
            KL_COEFS,
            name,
            num_components=8,
        )
        for name in algorithms
    ]
    labels = results.labels_with_models()
    swept = xr.Dataset(
        {name: (("algorithm", "seed", *labels[name].dims), np.stack([one[name] for one in runs])) for name in runs[0]},
        coords={name: expected[name] for name in ("algorithm", "temperature", "kl_coef", "seed", "stage")},
    )
    xr.testing.assert_identical(results.of_sweep(swept, TRUTH), expected)


def test_every_variable_has_a_name_a_unit_and_the_dimensions_of_its_label(dataset):
    assert all(dataset[name].attrs["long_name"] and dataset[name].attrs["units"] for name in dataset.data_vars)
    labels, found = results.labels(), of_runs()
    assert set(found) | {*BOTH, "stage"} == set(labels)
    for name, values in found.items():
        assert values.ndim == 1 + len(labels[name].dims), name
        assert values.shape[1:] == ((2, 3, len(NAMES)) if labels[name].dims else ()), name


# --- the distance to the Gibbs policy --------------------------------------------------------------------------------


def test_the_distance_to_the_gibbs_policy_is_the_shortfall_over_the_coefficient(dataset):
    for labels, (_, _, kl_coef) in everywhere():
        one = dataset.sel(algorithm="ppo").sel(labels)
        if labels["stage"] in ALIGNED:
            expected = (one.gibbs_objective - one.objective) / np.float32(KL_COEFS[kl_coef])
            np.testing.assert_allclose(one.distance_to_gibbs, expected, rtol=1e-6)
        else:
            assert np.isnan(one.distance_to_gibbs), labels


@pytest.mark.parametrize(
    ("algorithm", "others", "known"),
    [
        ("grpo", {}, [0, 0, 0, 0]),
        ("kto", {}, [0, 0, 0, 0]),
        ("ppo", {"flip_rate": 0.2, "label_temperature": 2.0}, [1, 1, 1, 1]),
        ("online_dpo", {}, [1, 1, 1, 1]),
        ("online_dpo", {"flip_rate": 0.2}, [0, 0, 0, 0]),
        ("offline_dpo_data", {"flip_rate": np.asarray([0.0, 0.1, 0.0, 0.4])}, [1, 0, 1, 0]),
        ("online_dpo", {"label_temperature": 0.5}, [0, 0, 0, 0]),
        ("offline_dpo_ref", {"label_temperature": np.asarray([1.0, 2.0, 1.0, 1.0])}, [1, 0, 1, 1]),
    ],
)
def test_no_distance_is_told_where_the_gibbs_policy_is_not_the_optimum(algorithm, others, known):
    distance = of_runs(algorithm, **others)["distance_to_gibbs"]
    aligned = [name in ALIGNED for name in NAMES]
    for run, expected in zip(distance, known, strict=True):
        np.testing.assert_array_equal(
            np.isfinite(run), np.broadcast_to(np.asarray(aligned) & bool(expected), run.shape)
        )
    if np.ndim(next(iter(others.values()), 0)) == 0:
        whole = labelled((algorithm,), **others).distance_to_gibbs
        assert bool(np.isfinite(whole).any()) is any(known)


# --- the table -------------------------------------------------------------------------------------------------------


def outcomes(masses, failed=(), rewards=None):
    """A store in which seed after seed each arm ends at a given target mass, at every point alike."""
    count = len(next(iter(masses.values())))
    shape = (1, 1, 2, count, len(masses))
    mass = np.broadcast_to(np.stack([*masses.values()], axis=-1), shape).copy()
    lost = np.zeros(shape, bool)
    for arm, seed in failed:
        lost[..., seed, [*masses].index(arm)] = True
    data = {name: np.where(lost, np.nan, mass) for name in (*results.TABLE_QUANTITIES, *results._ALSO_READ)}
    data |= {"failed": lost, "gibbs_objective": np.ones(shape), "from_grid": np.ones(shape, bool)}
    # A run that failed may end in finite numbers: its flag counts.
    data["target_mass"] = mass
    data["reward"] = np.where(lost, np.nan, 3 * mass if rewards is None else rewards)
    coords = {"algorithm": ["ppo"], "temperature": [0.25], "kl_coef": [0.3, 1.0], "seed": range(count)}
    dims = (*coords, "stage")
    dataset = xr.Dataset({k: (dims, v) for k, v in data.items()}, coords | {"stage": [*masses]})
    return dataset.assign(base_failed=("seed", np.arange(count) < 2))


MASSES = {
    "student": [0.1] * 12,
    "kd_align": [0.9, 0.2, 0.1, 0.6, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1, 0.9, 0.8],
    "align_kd": [0.9, 0.8, 0.7, 0.6, 0.9, 0.9, 0.9, 0.7, 0.6, 0.1, 0.2, 0.9],
}


LOST = [("kd_align", 3), ("align_kd", 0), ("align_kd", 2)]


def row_of(rows, arm):
    return next(row for row in rows if row["arm"] == arm and row["kl_coef"] == 0.3)


def test_rates_and_pairs_are_those_of_the_seeds_that_did_not_fail():
    rows = results.table(outcomes(MASSES, LOST), num_resamples=99)
    first, second = row_of(rows, "kd_align"), row_of(rows, "align_kd")
    assert (first["recovery"], first["seeds"], first["failed"]) == (3 / 11, 11, 1)
    assert (second["recovery"], second["seeds"], second["failed"]) == (8 / 10, 10, 2)
    # Nine pairs are left: six recovered by the second alone, one by the first alone.
    assert second["mcnemar_p"] == pytest.approx(stats.binomtest(6, 7).pvalue)
    assert second["recovery_difference"] == pytest.approx(5 / 9)
    kept = [seed for seed in range(12) if seed not in (0, 2, 3)]
    gain = 3 * (np.asarray(MASSES["align_kd"]) - MASSES["kd_align"])[kept]
    assert second["reward_difference"] == pytest.approx(gain.mean())
    assert row_of(rows, "student")["mcnemar_p"] is None and first["mcnemar_p"] is None
    assert {row["bases_failed"] for row in rows} == {2}


def test_beside_them_stand_rates_and_pairs_with_failures_as_nothing():
    rows = results.table(outcomes(MASSES, LOST), num_resamples=99)
    first, second = row_of(rows, "kd_align"), row_of(rows, "align_kd")
    assert (first["recovery_failures_as_0"], second["recovery_failures_as_0"]) == (3 / 12, 8 / 12)
    assert second["mcnemar_p_failures_as_0"] == pytest.approx(stats.binomtest(7, 9).pvalue)
    assert second["recovery_difference_failures_as_0"] == pytest.approx(5 / 12)
    kept = [seed for seed in range(12) if seed not in (0, 2)]
    assert second["reward_mean_failures_as_0"] == pytest.approx(3 * np.sum(np.take(MASSES["align_kd"], kept)) / 12)
    assert first["mcnemar_p_failures_as_0"] is None


def test_where_every_run_of_an_arm_failed_only_the_bound_is_told():
    rows = results.table(outcomes(MASSES, [("align_kd", seed) for seed in range(12)]), num_resamples=99)
    lost = row_of(rows, "align_kd")
    assert np.isnan(lost["recovery"]) and lost["mcnemar_p"] is None
    assert lost["recovery_failures_as_0"] == 0
    assert lost["mcnemar_p_failures_as_0"] == pytest.approx(stats.binomtest(0, 4).pvalue)


def test_zero_is_no_bound_of_a_reward_that_can_be_negative():
    rewards = np.linspace(-2, 5, 36).reshape(12, 3)
    rows = results.table(outcomes(MASSES, [("kd_align", 2)], rewards), num_resamples=99)
    assert all(np.isnan(row["reward_mean_failures_as_0"]) for row in rows)
    assert row_of(rows, "kd_align")["recovery_failures_as_0"] == 4 / 12


def test_failures_are_told_only_where_there_are_some(tmp_path):
    whole = results.table(outcomes(MASSES), num_resamples=99)
    assert "failures" not in results.format_table(whole)
    rows = results.table(outcomes(MASSES, [("kd_align", 2)]), num_resamples=99)
    first, second = (
        next(line for line in results.format_table(rows).splitlines() if line.startswith(arm + " "))
        for arm in ("kd_align", "align_kd")
    )
    assert "1 failed; with failures as 0: recovered 0.333" in first
    assert "of those compared with, some failed; with failures as 0: recovered 0.833, +0.50" in second
    results.write_csv(rows, tmp_path / "table.csv")
    kept = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [float(row["recovery_failures_as_0"]) for row in kept] == [row["recovery_failures_as_0"] for row in rows]


def test_a_csv_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.csv"
    results.write_csv([{"arm": "kd_align", "reward": 1.0}], path)
    before = path.read_text()
    with pytest.raises(ValueError, match="fieldnames"):
        results.write_csv([{"arm": "align_kd", "reward": 2.0}, {"arm": "align_kd", "rewards": 2.0}], path)
    assert path.read_text() == before


def test_each_of_several_targets_has_its_mass_in_the_table():
    dataset = outcomes(MASSES, [("align_kd", 1)])
    masses = np.arange(8) / 100 + dataset.target_mass.values[..., None]
    dataset = dataset.assign(mode_mass=((*dataset.target_mass.dims, "mode"), masses))
    told = {}
    for targets in ([5], [0, 7]):
        one = dataset.assign(truth_is_target=("mode", np.isin(np.arange(8), targets)))
        told[len(targets)] = results.table(one, num_resamples=19)
    assert "target_mass_1_median" not in told[1][0] and " targets " not in results.format_table(told[1])
    row = row_of(told[2], "align_kd")
    expected = np.median(np.delete(MASSES["align_kd"], 1))
    assert row["target_mass_1_median"] == pytest.approx(expected)
    assert row["target_mass_2_median"] == pytest.approx(expected + 0.07)
    assert f"targets {expected:.3f} and {expected + 0.07:.3f}" in results.format_table(told[2])


# --- a new order, from the README to the figures ----------------------------------------------------------------------


def drawn(dataset, monkeypatch):
    """The figure of the order experiment, before it is written."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, paths: kept.append(figure))
    figures.mog_order(dataset)
    monkeypatch.undo()
    return kept[0]


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_order_that_the_readme_adds_reaches_results_tables_and_figures(readme_order, tmp_path, monkeypatch):
    settings = LaboratorySettings(
        alignment=AlignmentSettings("ppo", 4, 16), arms=("kd_align", readme_order), student_components=4,
        num_samples=64, starts=1, distillation_starts=1, iterations=4, num_draws=32, covariance_floor=1e-2,
        uniform_padding=True,
    )  # fmt: skip
    truth, points = make_truth(), Points(jnp.asarray([1.0, 0.25]), jnp.asarray([0.3, 1.0]))
    grid, coefficients = metrics.make_grid(truth, points=41, subdivisions=2), Coefficients()
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    # The order is made, but for its numbers: any others do, since labels and figures are what is asked for, and none of
    # the runs has failed.
    shapes = jax.eval_shape(
        jax.vmap(lambda key: laboratory.run_seed(key, truth, 4, points, coefficients, grid, settings)), keys
    )
    draws = np.random.default_rng(0)
    outcome = jax.tree.map(
        lambda leaf: (
            np.zeros(leaf.shape, bool) if leaf.dtype == bool else draws.uniform(0.1, 0.9, leaf.shape).astype(leaf.dtype)
        ),
        shapes,
    )
    names = laboratory.every_model(settings)
    assert readme_order in pipelines.arms() and readme_order not in pipelines.ARMS and readme_order in names

    found = results.of_runs(outcome, names, points.temperature, points.kl_coef, "ppo")
    dims = ("capacity", "seed", *results.INNER_DIMS)
    coords = {"capacity": [4], "seed": [0, 1, 2], "temperature": [1.0, 0.25], "kl_coef": [0.3, 1.0], "stage": [*names]}
    swept = xr.Dataset({name: (dims[: 1 + values.ndim], values[None]) for name, values in found.items()}, coords)
    summary = recovery.summarise(swept)
    assert readme_order in {row["arm"] for row in phase_report.rows_of(summary)}
    phase_figures.draw_along(swept, summary, phase_figures.VIEWS["rescue"], tmp_path / "along.png")

    shared = sum(len(pipelines.places(name, {"temperature": 2, "kl_coef": 2})) for name in laboratory.PREPARED)
    parts = [
        jax.tree.map(lambda leaf, part=part: leaf[:, part], outcome.measured)
        for part in (slice(shared), slice(shared, None))
    ]
    truths = jax.tree.map(lambda leaf: np.stack([leaf] * 3), truth)
    prepared = Prepared(truths, {}, outcome.log_likelihood, outcome.base_failed, outcome.optima)
    dataset = results.to_dataset(
        prepared,
        parts[0],
        {"ppo": parts[1]},
        laboratory.made_by(settings),
        points.temperature,
        points.kl_coef,
        range(3),
        8,
    )
    rows = results.table(dataset, num_resamples=19)
    compared = [row for row in rows if row["arm"] == readme_order]
    assert len(compared) == 4 and all(row["recovery_difference"] is not None for row in compared)
    assert "align kd twice" in texts(drawn(dataset, monkeypatch))
    figures.mog_order(dataset, tmp_path / "order.png")
    for name in ("along", "order"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05


def bars(figure):
    """Ends of the black bars, relative to their arm, of the first panel of outcomes."""
    panel = figure.subfigs[1].axes[0]
    segments = [
        segment for part in panel.collections if isinstance(part, LineCollection) for segment in part.get_segments()
    ]
    return {(round(x - round((x + y) / 2), 3), round(y - round((x + y) / 2), 3)) for (x, _), (y, _) in segments}


@pytest.mark.parametrize(
    ("algorithms", "others", "expected"),
    [
        (("ppo",), {}, {(-0.45, 0.45)}),
        (("grpo",), {}, set()),
        (("online_dpo",), {"flip_rate": 0.1}, set()),
        (("ppo", "grpo"), {}, {(-0.45, 0.0)}),
        (("simpo", "ppo", "online_dpo"), {"flip_rate": 0.1}, {(-0.165, 0.165)}),
    ],
)
def test_a_gibbs_optimum_is_drawn_of_the_algorithms_that_tend_to_it(algorithms, others, expected, monkeypatch):
    figure = drawn(labelled(algorithms, **others), monkeypatch)
    assert bars(figure) == expected
    assert ("Gibbs" in texts(figure)) is bool(expected)
    lines = [any(line.get_linestyle() == "--" for line in axis.lines) for axis in figure.subfigs[2].axes]
    assert lines == [algorithm == "ppo" for algorithm in algorithms]


def test_the_figure_of_a_store_is_that_of_what_was_written(tmp_path, monkeypatch):
    dataset = labelled(("ppo", "grpo"))
    store.write(dataset, tmp_path / "order.zarr", {"seeds": SEEDS})
    with xr.open_zarr(tmp_path / "order.zarr") as kept:
        first, second = drawn(dataset, monkeypatch), drawn(kept, monkeypatch)
    assert texts(first) == texts(second)
    lines = [[line.get_xydata() for line in figure.findobj(Line2D)] for figure in (first, second)]
    assert sum(map(len, lines[0])) > 100
    for one, other in zip(*lines, strict=True):
        np.testing.assert_array_equal(one, other)
    assert bars(first) == bars(second)


def test_unlisted_models_have_a_look_of_their_own_and_always_the_same():
    for looks in (figures.COLOURS, figures.LABELS, figures.MARKERS):
        assert looks["some_new_arm"] == looks["some_new_arm"] and looks["some_new_arm"] not in dict(looks).values()
        assert "some_new_arm" not in looks
    assert figures.LABELS["some_new_arm"] == "some new arm"

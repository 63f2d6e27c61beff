import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import laboratory, metrics, mixture, pipelines
from jaxkd.align import AlignmentSettings, Coefficients
from jaxkd.laboratory import LaboratorySettings, Points
from jaxkd.truth import make_truth, with_target_weight

pytestmark = pytest.mark.loose  # optax's Adam does not stand strict dtype promotion

TRUTH = make_truth(target_weight=0.1)
GRID = metrics.make_grid(TRUTH, points=61, subdivisions=4)
POINTS = Points(jnp.asarray([0.25, 1.0]), jnp.asarray([0.3, 1.5]))
COEFFICIENTS = Coefficients(*map(jnp.float32, Coefficients()))
SMALL = {
    "student_components": 4,
    "num_samples": 256,
    "starts": 2,
    "distillation_starts": 1,
    "iterations": 10,
    "num_draws": 64,
    "grid_points": 61,
    "covariance_floor": 1e-3,
}
ARMS = ("kd_align", "kd_align_sharpened", "align_kd", "base_start_student_reference")
TRACES = []


def settings(algorithm="ppo", **others):
    return LaboratorySettings(**{"alignment": AlignmentSettings(algorithm, 8, 32), "arms": ARMS, **SMALL, **others})


@jax.jit
def prepare(key, target_weight, capacity, points):
    TRACES.append("prepare")
    truth = with_target_weight(TRUTH, target_weight)
    made, measured = laboratory.prepare(key, truth, capacity, points, GRID, settings())
    return made, laboratory.by_stage(measured, laboratory.PREPARED, points)


def arms_of(settings):
    def run(key, prepared, capacity, points, coefficients):
        TRACES.append("run_arms")
        measured = laboratory.run_arms(key, prepared, capacity, points, coefficients, GRID, settings)
        return laboratory.by_stage(measured, laboratory.made_by(settings), points)

    return jax.jit(run)


run_arms = arms_of(settings())


@pytest.fixture(scope="module")
def prepared():
    return prepare(jax.random.key(0), jnp.float32(0.1), jnp.int32(3), POINTS)


@pytest.fixture(scope="module")
def measured(prepared):
    return run_arms(jax.random.key(0), prepared[0], jnp.int32(3), POINTS, COEFFICIENTS)


def leaves_equal(first, second):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_one_program_for_a_seed_makes_what_its_parts_make_however_it_is_padded(prepared, measured):
    padded = settings(uniform_padding=True)

    @jax.jit
    def run(key, target_weight, capacity, points, coefficients):
        truth = with_target_weight(TRUTH, target_weight)
        return laboratory.run_seed(key, truth, capacity, points, coefficients, GRID, padded)

    outcome = run(jax.random.key(0), jnp.float32(0.1), jnp.int32(3), POINTS, COEFFICIENTS)
    together = laboratory.by_stage(outcome.measured, laboratory.every_model(padded), POINTS)
    assert set(together) == {"base", "student", *measured}
    for name, apart in {**prepared[1], **measured}.items():
        for quantity in ("target_mass", "reward", "bounded_recall", "kl_to_base"):
            got, expected = (np.asarray(getattr(one[name].metrics, quantity)) for one in (together, {name: apart}))
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3, err_msg=f"{name} {quantity}")
    np.testing.assert_allclose(outcome.log_likelihood, prepared[0].log_likelihood, rtol=1e-5)
    for reference in ("base", "student"):
        got, expected = outcome.optima[reference], prepared[0].optima[reference]
        np.testing.assert_allclose(got.gibbs.objective, expected.gibbs.objective, rtol=1e-3, atol=1e-3)


def test_uniform_padding_is_one_operation_a_kind(prepared):
    branches = {}
    for uniform in (False, True):
        own = settings(uniform_padding=uniform)
        program = jax.make_jaxpr(
            lambda key, capacity, own=own: laboratory.run_arms(
                key, prepared[0], capacity, POINTS, COEFFICIENTS, GRID, own
            )
        )(jax.random.key(0), jnp.int32(3))
        [branches[uniform]] = {
            len(equation.params["branches"])
            for scan in program.eqns
            if scan.primitive.name == "scan"
            for equation in scan.params["jaxpr"].eqns
            if equation.primitive.name == "cond"
        }
    # Aligning at 4 and at 8 components, distilling and sharpening; or one of each.
    assert branches == {False: 4, True: 3}


# --- what is made ----------------------------------------------------------------------------------------------------


def test_every_model_is_measured_with_the_axes_it_depends_on(prepared, measured):
    assert set(measured) == {"aligned_base", *ARMS}
    lengths = {"temperature": 2, "kl_coef": 2}
    for name, result in {**prepared[1], **measured}.items():
        shape = tuple(lengths[axis] for axis in pipelines.axes_of(name))
        assert result.metrics.mode_mass.shape == (*shape, 8)
        assert all(leaf.shape == shape for leaf in result.metrics[:-1]), name
        assert result.from_grid.shape == shape
        is_aligned = isinstance(pipelines.STAGES.get(name), pipelines.Align)
        assert np.isfinite(result.record.target_hits).all() == is_aligned
        assert not result.record.failed.any()


def test_a_student_uses_no_more_components_than_its_capacity(prepared, measured):
    for model in (prepared[0].models["student"], measured["kd_align"].model, measured["align_kd"].model):
        weights = mixture.weights(mixture.Mixture(*(leaf[0] for leaf in model)))
        assert (np.asarray(weights)[..., 3:] == 0).all()
    assert measured["aligned_base"].model.num_components == 8


def test_objective_is_reward_less_the_coefficient_times_the_divergence_from_the_reference(measured):
    for name in ("kd_align", "base_start_student_reference"):
        values = measured[name].metrics
        expected = values.reward - POINTS.kl_coef[None, :] * values.kl_to_reference
        np.testing.assert_allclose(values.objective, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        measured["aligned_base"].metrics.kl_to_base, measured["aligned_base"].metrics.kl_to_reference, rtol=1e-5
    )


def test_an_arm_in_the_laboratory_is_the_alignment_done_by_hand(prepared, measured):
    from jaxkd import align
    from jaxkd.truth import on_target

    student = jax.tree.map(lambda leaf: leaf[1], prepared[0].models["student"])
    reward = laboratory.make_reward("density", TRUTH)
    model, record = jax.jit(
        lambda student, key: align.align(
            mixture.policy,
            key,
            student,
            student,
            reward,
            COEFFICIENTS._replace(kl_coef=jnp.float32(1.5)),
            settings().alignment,
            truth=TRUTH.modes,
            on_target=lambda x: on_target(TRUTH, x),
        )
    )(student, laboratory.keys_for(jax.random.key(0))["kd_align"])
    ours = mixture.Mixture(*(leaf[1, 1] for leaf in measured["kd_align"].model))
    for got, expected in zip(ours, model, strict=True):
        np.testing.assert_allclose(got[..., :3], expected[..., :3], rtol=1e-3, atol=1e-3)
    assert measured["kd_align"].record.target_hits[1, 1] == record.target_hits


def test_sharpening_an_arm_keeps_its_components(measured):
    plain, sharpened = measured["kd_align"].model, measured["kd_align_sharpened"].model
    np.testing.assert_array_equal(sharpened.means[..., :4], plain.means[..., :4])
    powers = (
        np.asarray(jax.nn.softmax(plain.logits, axis=-1), np.float64)
        ** (1 / np.asarray(POINTS.temperature))[:, None, None]
    )
    weights = np.asarray(jax.nn.softmax(sharpened.logits, axis=-1))
    np.testing.assert_allclose(weights, powers / powers.sum(axis=-1, keepdims=True), rtol=2e-3, atol=1e-6)


def test_the_gibbs_optimum_bounds_what_an_arm_reaches_against_its_reference(prepared, measured):
    for arm, reference in (
        ("kd_align", "student"),
        ("aligned_base", "base"),
        ("base_start_student_reference", "student"),
    ):
        best = prepared[0].optima[reference].gibbs.objective
        assert (measured[arm].metrics.objective <= best + 1e-2).all(), arm


def test_the_optimum_of_a_reference_agrees_with_a_sum_in_double_precision(prepared):
    line = (np.arange(601) + 0.5) * 6 / 601 - 3
    x = jnp.asarray(np.stack(np.meshgrid(line, line)).reshape(2, -1), jnp.float32)
    reward = np.asarray(laboratory.make_reward("density", TRUTH)(x), np.float64)
    reference = np.exp(np.asarray(mixture.log_density(prepared[0].models["base"], x), np.float64))
    for i, kl_coef in enumerate(np.asarray(POINTS.kl_coef, np.float64)):
        tilted = reference * np.exp(reward / kl_coef)
        optimum = jax.tree.map(lambda leaf: leaf[i], prepared[0].optima["base"].gibbs)  # noqa: B023
        assert optimum.objective == pytest.approx(kl_coef * np.log(tilted.sum() / reference.sum()), rel=1e-3)
        assert optimum.reward == pytest.approx((tilted * reward).sum() / tilted.sum(), rel=1e-3)


@pytest.mark.parametrize(("scale", "held"), [(0.2, True), (0.01, False)])
def test_an_optimum_is_told_only_of_a_reference_that_the_grid_holds(scale, held):
    covariances = np.full((8, 2), 0.025)
    covariances[7] = scale**2
    # The narrow component is on the target, between two points of the grid: quadrature would find next to no mass.
    means = np.array(TRUTH.modes.means.T)
    line = np.unique(np.asarray(GRID.x))
    means[7] = line[np.searchsorted(line, 1.0)] - np.diff(line)[0] / 2
    reference = mixture.make(np.ones(8), means, covariances)
    reward = laboratory.make_reward("density", TRUTH)

    @jax.jit
    def optimum(reference):
        bench = metrics.make_bench(jax.random.key(0), TRUTH, TRUTH.modes, reward, GRID, 256)
        _, from_grid = metrics.evaluate(bench, jax.random.key(1), reference, reference, reward, 1.0)
        by_grid, by_draws = (
            laboratory._optimum(one, reference, reward, jax.random.key(1), POINTS.kl_coef)
            for one in (bench, bench._replace(grid=None, grid_field=None))
        )
        return by_grid, by_draws, from_grid

    by_grid, by_draws, from_grid = optimum(reference)
    assert bool(from_grid) is held
    for leaf, drawn in zip(jax.tree.leaves(by_grid), jax.tree.leaves(by_draws), strict=True):
        assert (np.isfinite(leaf) if held else np.isnan(leaf)).all()
        assert np.isfinite(drawn).all()
    if held:
        np.testing.assert_allclose(by_grid.gibbs.objective, by_draws.gibbs.objective, rtol=0.1)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_the_optimum_of_the_target_itself_has_its_closed_form_where_it_is_narrower_than_a_cell(num_targets):
    truth = make_truth(num_targets=num_targets)
    grid, reward = metrics.make_grid(truth), laboratory.make_reward("density", truth)
    kl_coefs = np.array([0.03, 0.05, 0.1, 0.3, 1.5])

    @jax.jit
    def optimum():
        bench = metrics.make_bench(jax.random.key(0), truth, truth.modes, reward, grid, 16)
        return laboratory._optimum(bench, truth.target, reward, jax.random.key(1), jnp.asarray(kl_coefs, jnp.float32))

    found = optimum().gibbs
    assert 0.025 * np.sqrt(2 * np.pi * 0.1) < 0.5 * np.sqrt(grid.cell)
    # Over its own draws the target's density is uniform between 0 and its peak.
    peak = 1 / (2 * np.pi * 0.025 * num_targets)
    scaled = peak / kl_coefs
    best = kl_coefs * (scaled - np.log(scaled) + np.log1p(-np.exp(-scaled)))
    # KL(policy ‖ Gibbs) takes its error from J* over β.
    np.testing.assert_allclose(found.objective / kl_coefs, best / kl_coefs, atol=1e-3)
    np.testing.assert_allclose(found.reward, peak / -np.expm1(-scaled) - kl_coefs, rtol=1e-3)


# --- pairing and traces ----------------------------------------------------------------------------------------------


def test_what_algorithms_share_is_one_program_whichever_they_are():
    def program(algorithm):
        traced = jax.make_jaxpr(laboratory.prepare, static_argnums=5)(
            jax.random.key(0), TRUTH, jnp.int32(3), POINTS, GRID, settings(algorithm)
        )
        # What is called bears its place in memory.
        return re.sub(r"0x[0-9a-f]+", "", str(traced))

    assert program("ppo") == program("kto")


def test_a_seed_shares_its_base_and_other_seeds_do_not(prepared):
    again = prepare(jax.random.key(0), jnp.float32(0.1), jnp.int32(2), POINTS)[0]
    other = prepare(jax.random.key(1), jnp.float32(0.1), jnp.int32(3), POINTS)[0]
    assert leaves_equal(again.models["base"], prepared[0].models["base"])
    assert not leaves_equal(again.models["student"], prepared[0].models["student"])
    assert not leaves_equal(other.models["base"], prepared[0].models["base"])


def test_a_purposes_key_is_that_of_its_place_whatever_stages_there_are(monkeypatch):
    places = {"data": 0, "base": 1, "bench": 2, "measure": 3, "student": 4, "kd_align": 6}
    # A module that is run anew meets the stages as they are then, the new one first.
    monkeypatch.setattr(pipelines, "STAGES", {"first_of_all": pipelines.Distil("base", 1.0), **pipelines.STAGES})
    keys_for = runpy.run_path(laboratory.__file__)["keys_for"]
    for seed in (0, 7):
        found = keys_for(jax.random.key(seed))
        for purpose, place in places.items():
            expected = jax.random.fold_in(jax.random.key(seed), place)
            np.testing.assert_array_equal(jax.random.key_data(found[purpose]), jax.random.key_data(expected))


def test_keys_are_one_for_each_purpose_and_seed():
    purposes = ("data", "base", "bench", "measure", "student", "kd_align")
    keys = [
        tuple(jax.random.key_data(laboratory.keys_for(jax.random.key(s))[p]).tolist()) for s in (0, 1) for p in purposes
    ]
    assert len(set(keys)) == len(keys)


def test_prepare_and_run_arms_are_traced_once_for_a_whole_grid(prepared, measured):
    TRACES.clear()
    for i in range(3):
        points = Points(POINTS.temperature * (1 + i / 10), POINTS.kl_coef * (1 + i / 10))
        made, _ = prepare(jax.random.key(i), jnp.float32(0.05 * i), jnp.int32(i + 1), points)
        run_arms(
            jax.random.key(i),
            made,
            jnp.int32(i + 1),
            points,
            COEFFICIENTS._replace(learning_rate=jnp.float32(0.01 * i)),
        )
    assert TRACES == []


def test_a_target_of_weight_zero_works_to_the_end():
    made, results = prepare(jax.random.key(0), jnp.float32(0), jnp.int32(3), POINTS)
    arms = run_arms(jax.random.key(0), made, jnp.int32(3), POINTS, COEFFICIENTS)
    for name, result in {**results, **arms}.items():
        for quantity in ("reward", "recall", "precision", "coverage", "target_mass", "objective"):
            assert np.isfinite(getattr(result.metrics, quantity)).all(), (name, quantity)
    assert (results["base"].metrics.target_mass < 0.01).all()
    assert np.isfinite(made.optima["base"].half_mass_coefficient)


def at(name, results, axis, place):
    """A model's results at one point of an axis that it depends on."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).take(place, pipelines.axes_of(name).index(axis)), results)


def test_a_point_that_goes_bad_stays_one_point(prepared, measured):
    points = POINTS._replace(kl_coef=POINTS.kl_coef.at[1].set(jnp.nan))
    struck = run_arms(jax.random.key(0), prepared[0], jnp.int32(3), points, COEFFICIENTS)
    assert set(struck) == {"aligned_base", *ARMS}
    for name, results in struck.items():
        assert leaves_equal(*(at(name, each, "kl_coef", 0) for each in (results, measured[name]))), name
        if isinstance(pipelines.STAGES[name], pipelines.Align):
            lost = at(name, results, "kl_coef", 1)
            assert lost.record.failed.all() and not lost.from_grid.any(), name


def test_a_student_that_goes_bad_takes_down_only_what_is_made_from_it(prepared, measured):
    lost = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), prepared[0].models["student"])
    made = prepared[0]._replace(models=prepared[0].models | {"student": lost})
    struck = run_arms(jax.random.key(0), made, jnp.int32(3), POINTS, COEFFICIENTS)
    for name, results in struck.items():
        if "temperature" not in pipelines.axes_of(name):
            assert leaves_equal(results, measured[name]), name
            continue
        assert leaves_equal(*(at(name, each, "temperature", 0) for each in (results, measured[name]))), name
        if isinstance(pipelines.STAGES[name], pipelines.Align):
            assert at(name, results, "temperature", 1).record.failed.all(), name


@pytest.mark.slow
def test_the_truths_pairs_are_one_set_for_every_arm_temperature_and_coefficient():
    # Any base and students: p* itself, and half of its modes.
    students = jax.tree.map(lambda leaf: jnp.stack([leaf[..., :4]] * 2), TRUTH.modes)
    made = laboratory.Prepared(TRUTH, {"base": TRUTH.modes, "student": students}, *[None] * 3)
    results = arms_of(settings("offline_dpo_data", arms=("kd_align", "align_kd")))(
        jax.random.key(0), made, jnp.int32(3), POINTS, COEFFICIENTS
    )
    assert not results["kd_align"].record.failed.any()
    hits = np.concatenate([np.ravel(results[name].record.target_hits) for name in ("kd_align", "aligned_base")])
    assert len(set(hits.tolist())) == 1 and hits[0] > 0


# --- rewards, budgets, padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", laboratory.REWARDS)
def test_rewards_by_name_are_largest_on_the_target(name):
    x = jnp.asarray([[1.0, -1.0, 0.6], [1.0, 0.0, 0.6]])
    values = np.asarray(laboratory.make_reward(name, make_truth())(x))
    peak = 1 / (2 * np.pi * 0.025)
    at_mean = {
        "density": peak,
        "bump": peak,
        "disc": peak / 2,
        "log_density": np.log(peak),
        "reflected": 0.0,
        "clipped": peak / 2,
    }
    assert values[0] == pytest.approx(at_mean[name], rel=1e-3, abs=1e-3)
    if name != "reflected":  # the centre exceeds the level twofold: as bad as nothing
        assert values[0] > values[1]


@pytest.mark.parametrize(("components", "updates"), [(8, 8), (4, 16), (1, 64), (3, 20)])
def test_updates_matched_on_component_evaluations(components, updates):
    assert laboratory.updates_for(settings(match_component_evaluations=True), components) == updates
    assert laboratory.updates_for(settings(), components) == 8


def test_padding_a_mixture_changes_neither_density_nor_draws():
    padded = laboratory.pad_components(TRUTH.modes, 11)
    sample = jax.jit(mixture.sample, static_argnums=2)
    x = sample(TRUTH.modes, jax.random.key(0), 50)
    assert padded.num_components == 11
    np.testing.assert_array_equal(sample(padded, jax.random.key(0), 50), x)
    np.testing.assert_allclose(mixture.log_density(padded, x), mixture.log_density(TRUTH.modes, x), rtol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "gold"}, "reward must be one of .*'gold'"),
        ({"arms": ()}, "arms must not be empty"),
        ({"arms": ("align_then_kd",)}, "unknown arm 'align_then_kd'"),
        ({"arms": ("student",)}, "more than the base and the student, got student: choose from kd_align"),
        ({"arms": ("base", "student")}, "more than the base and the student"),
        ({"base_components": 0}, "base_components must be a whole number of at least 1"),
        ({"student_components": 0}, "student_components must be a whole number of at least 1"),
        ({"num_samples": 8}, "num_samples must be a whole number of at least 16"),
        ({"starts": 0}, "starts must be a whole number of at least 1"),
        ({"distillation_starts": 0}, "distillation_starts must be a whole number of at least 1"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1"),
        ({"num_draws": 1}, "num_draws must be a whole number of at least 16"),
        ({"grid_points": 3}, "grid_points must be a whole number of at least 16"),
        ({"covariance_floor": 0.0}, "covariance_floor must be a finite number above 0"),
        ({"covariance_floor": float("nan")}, "covariance_floor must be a finite number above 0"),
    ],
)
def test_settings_refuse_bad_input_and_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        LaboratorySettings(**arguments)

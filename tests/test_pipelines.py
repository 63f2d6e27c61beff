import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import pipelines
from jaxkd.pipelines import ARMS, STAGES, Align, Distil, Sharpen, axes_of, needed, reference_of

POINTS = {"temperature": jnp.asarray([0.25, 0.5, 1.0]), "kl_coef": jnp.asarray([0.3, 1.5])}
LENGTHS = {axis: len(values) for axis, values in POINTS.items()}
CALLS = []


def execute(kind, group, row, start, reference, value):
    """Numbers in place of models; no two kinds, and no two inputs of one, can be mistaken for each other."""
    CALLS.append((kind, group))
    if kind is Align:
        return 2 * start + jnp.sin(reference) + value, (row, value)
    return (start * 3 if kind is Distil else start * 5) + value**2, (row, value)


def carried_out(stages, given, group_of=lambda name, stage: None):
    """Models and records by name, each with the axes that it depends on; `given` holds one array a model."""
    CALLS.clear()
    plan = pipelines.plan(stages, [*given], LENGTHS, group_of)
    first = jnp.concatenate([jnp.atleast_1d(model).ravel() for model in given.values()])
    table, (row, value) = jax.jit(lambda first: pipelines.run(plan, first, POINTS, execute))(first)
    np.testing.assert_array_equal(row, np.arange(len(first), plan.size))
    assert len(table) == plan.size
    whole = {"models": table, "values": jnp.concatenate([jnp.full(len(first), jnp.nan), value])}
    return {
        kind: {
            name: np.asarray(leaf)[list(rows)].reshape([LENGTHS[axis] for axis in axes_of(name, stages)])
            for name, rows in plan.rows.items()
        }
        for kind, leaf in whole.items()
    }


def by_loop(name, temperature, kl_coef):
    """The same, one point after another, straight from the definition of the orders."""
    distil = lambda teacher, t: 3 * teacher + t**2  # noqa: E731
    align = lambda start, reference: 2 * start + np.sin(reference) + kl_coef  # noqa: E731
    base = 0.7
    student = distil(base, temperature)
    return {
        "student": student,
        "aligned_base": align(base, base),
        "kd_align": align(student, student),
        "kd_align_sharpened": 5 * align(student, student) + temperature**2,
        "align_kd": distil(align(base, base), 1.0),
        "align_kd_sharpened": distil(align(base, base), temperature),
        "kd_align_anchored": align(student, base),
        "base_start_student_reference": align(base, student),
    }[name]


@pytest.fixture(scope="module")
def results():
    return carried_out(STAGES, {"base": jnp.float32(0.7)})


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_what_a_plain_loop_makes_of_it(results, name):
    models = results["models"]
    axes = axes_of(name)
    assert models[name].shape == tuple(len(POINTS[axis]) for axis in axes)
    for (i, temperature), (j, kl_coef) in itertools.product(*(enumerate(np.asarray(POINTS[axis])) for axis in POINTS)):
        index = tuple({"temperature": i, "kl_coef": j}[axis] for axis in axes)
        assert models[name][index] == pytest.approx(by_loop(name, temperature, kl_coef), rel=1e-5), (name, index)


def test_records_carry_the_value_of_the_stage_at_each_point(results):
    values = results["values"]
    np.testing.assert_array_equal(values["kd_align"], np.broadcast_to(POINTS["kl_coef"], (3, 2)))
    np.testing.assert_array_equal(values["align_kd"], [1, 1])
    np.testing.assert_array_equal(values["align_kd_sharpened"][:, 0], POINTS["temperature"])
    assert np.isnan(values["base"])


def test_every_operation_is_traced_once_however_many_stages_need_it():
    carried_out(STAGES, {"base": jnp.float32(0.7)})
    kinds = [kind for kind, _ in CALLS]
    # jax traces a branch a second time where its results were weakly typed at first.
    assert {kind: kinds.count(kind) <= 2 for kind in kinds} == {Align: True, Distil: True, Sharpen: True}


def test_under_vmap_the_choice_of_the_operation_stays_a_branch():
    plan = pipelines.plan(STAGES, ["base"], LENGTHS)
    together = jax.vmap(lambda base: pipelines.run(plan, base[None], POINTS, execute)[0])
    assert " cond[" in str(jax.make_jaxpr(together)(jnp.arange(3.0)))
    alone = pipelines.run(plan, jnp.float32([2.0]), POINTS, execute)[0]
    np.testing.assert_allclose(together(jnp.arange(3.0))[2], alone, rtol=1e-6)


def test_stages_of_different_groups_are_operations_of_their_own():
    stages = needed(["kd_align", "aligned_base", "kd_align_anchored"])
    made = carried_out(stages, {"base": jnp.float32(0.7)}, lambda name, stage: name)
    assert {group for kind, group in CALLS if kind is Align} == {"aligned_base", "kd_align", "kd_align_anchored"}
    assert made["models"]["kd_align"][1, 1] == pytest.approx(by_loop("kd_align", 0.5, 1.5), rel=1e-5)


def test_models_of_several_leaves_keep_their_shapes():
    plan = pipelines.plan(needed(["kd_align"]), ["base"], LENGTHS)
    base = {"a": jnp.arange(3.0)[None], "b": jnp.ones((1, 2, 2))}

    def scale(kind, group, row, start, reference, value):
        return jax.tree.map(lambda leaf: leaf * value, start), value

    table, _ = pipelines.run(plan, base, POINTS, scale)
    student, aligned = plan.rows["student"], plan.rows["kd_align"]
    assert table["b"].shape == (plan.size, 2, 2) and (len(student), len(aligned)) == (3, 6)
    np.testing.assert_allclose(table["a"][student[2]], 1.0 * np.arange(3))
    np.testing.assert_allclose(table["a"][aligned[0]], 0.25 * 0.3 * np.arange(3), rtol=1e-6)


def test_models_that_exist_are_not_made_again():
    given = {"base": jnp.float32(0.7), "student": jnp.full(3, 9.0)}
    made = carried_out(needed(["kd_align"]), given)
    assert {kind for kind, _ in CALLS} == {Align}
    np.testing.assert_array_equal(made["models"]["student"], given["student"])
    assert made["models"]["kd_align"][0, 0] == pytest.approx(18 + np.sin(9.0) + 0.3, rel=1e-5)


def test_reference_rows_are_the_points_that_a_model_was_held_to():
    plan = pipelines.plan(STAGES, ["base"], LENGTHS)
    students = plan.rows["student"]
    rows = pipelines.reference_rows(plan, "kd_align_sharpened", LENGTHS)
    np.testing.assert_array_equal(rows, np.repeat(students, 2))
    np.testing.assert_array_equal(pipelines.reference_rows(plan, "align_kd", LENGTHS), [plan.rows["base"][0]] * 2)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("base", ()),
        ("student", ("temperature",)),
        ("aligned_base", ("kl_coef",)),
        ("align_kd", ("kl_coef",)),
        ("align_kd_sharpened", ("temperature", "kl_coef")),
        ("kd_align", ("temperature", "kl_coef")),
        ("kd_align_anchored", ("temperature", "kl_coef")),
        ("base_start_student_reference", ("temperature", "kl_coef")),
    ],
)
def test_a_stage_depends_on_the_axes_of_what_it_is_made_from(name, axes):
    assert axes_of(name) == axes


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("base", "base"),
        ("student", "base"),
        ("aligned_base", "base"),
        ("kd_align", "student"),
        ("kd_align_sharpened", "student"),
        ("align_kd", "base"),
        ("align_kd_sharpened", "base"),
        ("kd_align_anchored", "base"),
        ("base_start_student_reference", "student"),
    ],
)
def test_the_reference_is_what_the_alignment_on_the_way_was_held_to(name, reference):
    assert reference_of(name) == reference


def test_the_arms_start_where_their_names_say():
    assert STAGES["kd_align_anchored"].start == "student"
    assert STAGES["base_start_student_reference"].start == "base"
    assert set(ARMS) == set(STAGES) - {"student", "aligned_base"}


@pytest.mark.parametrize("name", ARMS)
def test_needed_lists_what_an_arm_is_made_from_before_it(name):
    order = list(needed([name]))
    assert order[-1] == name
    for position, stage in enumerate(order):
        assert all(model == "base" or model in order[:position] for model in STAGES[stage].models)


def test_needed_leaves_out_what_no_arm_needs():
    assert set(needed(["align_kd"])) == {"aligned_base", "align_kd"}
    assert set(needed(["base_start_student_reference"])) == {"student", "base_start_student_reference"}
    assert needed([]) == {} == needed(["base"])


def test_needed_refuses_an_unknown_arm_and_a_circle():
    with pytest.raises(ValueError, match=r"unknown arm 'kd_then_align'.*kd_align"):
        needed(["kd_then_align"])
    with pytest.raises(ValueError, match="made from itself: a → b → a"):
        needed(["a"], {"a": Distil("b", 1.0), "b": Distil("a", 1.0)})

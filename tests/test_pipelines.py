import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import pipelines
from jaxkd.pipelines import ARMS, STAGES, Align, Distil, Sharpen, axes_of, needed, reference_of, run

POINTS = {"temperature": jnp.asarray([0.25, 0.5, 1.0]), "kl_coef": jnp.asarray([0.3, 1.5])}
CALLS = []


def concatenate(models):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *models)


def execute(kind, group, *inputs):
    """Numbers in place of models; no two kinds, and no two inputs of one, can be mistaken for each other."""
    CALLS.append((kind, group))
    if kind is Align:
        start, reference, kl_coef = inputs
        return 2 * start + jnp.sin(reference) + kl_coef, kl_coef
    teacher, temperature = inputs
    return (teacher * 3 if kind is Distil else teacher * 5) + temperature**2, temperature


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
    CALLS.clear()
    return run(STAGES, {"base": jnp.float32(0.7)}, POINTS, execute, concatenate)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_what_a_plain_loop_makes_of_it(results, name):
    models, _ = results
    axes = axes_of(name)
    assert models[name].shape == tuple(len(POINTS[axis]) for axis in axes)
    for (i, temperature), (j, kl_coef) in itertools.product(*(enumerate(np.asarray(POINTS[axis])) for axis in POINTS)):
        index = tuple({"temperature": i, "kl_coef": j}[axis] for axis in axes)
        assert models[name][index] == pytest.approx(by_loop(name, temperature, kl_coef), rel=1e-5), (name, index)


def test_records_carry_the_value_of_the_stage_at_each_point(results):
    _, records = results
    np.testing.assert_array_equal(records["kd_align"], np.broadcast_to(POINTS["kl_coef"], (3, 2)))
    np.testing.assert_array_equal(records["align_kd"], [1, 1])
    np.testing.assert_array_equal(records["align_kd_sharpened"][:, 0], POINTS["temperature"])
    assert set(records) == set(STAGES)


def test_stages_of_a_kind_that_are_ready_together_are_traced_together(results):
    kinds = [kind for kind, _ in CALLS]
    assert kinds.count(Align) == 2  # aligned_base beside student, then the three arms that start from a student
    assert kinds.count(Distil) == 2 and kinds.count(Sharpen) == 1


def test_stages_of_different_groups_are_not_stacked():
    CALLS.clear()
    stages = needed(["kd_align", "aligned_base", "kd_align_anchored"])
    models, _ = run(stages, {"base": jnp.float32(0.7)}, POINTS, execute, concatenate, lambda name, stage: name)
    assert [group for kind, group in CALLS if kind is Align] == ["aligned_base", "kd_align", "kd_align_anchored"]
    assert models["kd_align"][1, 1] == pytest.approx(by_loop("kd_align", 0.5, 1.5), rel=1e-5)


def test_models_of_several_leaves_and_shapes_keep_their_own_axes():
    stages = needed(["kd_align"])
    base = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    scale = lambda kind, group, *inputs: (jax.tree.map(lambda leaf: leaf * inputs[-1], inputs[0]), inputs[-1])  # noqa: E731
    models, _ = run(stages, {"base": base}, POINTS, scale, concatenate)
    assert models["student"]["a"].shape == (3, 3) and models["kd_align"]["b"].shape == (3, 2, 2, 2)
    np.testing.assert_allclose(models["kd_align"]["a"][2, 1], 1.5 * np.arange(3))
    np.testing.assert_allclose(models["kd_align"]["a"][0, 0], 0.25 * 0.3 * np.arange(3), rtol=1e-6)


def test_models_that_exist_are_not_made_again():
    given = {"base": jnp.float32(0.7), "student": jnp.full(3, 9.0)}
    models, records = run(needed(["kd_align"]), given, POINTS, execute, concatenate)
    assert "student" not in records
    np.testing.assert_array_equal(models["student"], given["student"])
    assert models["kd_align"][0, 0] == pytest.approx(18 + np.sin(9.0) + 0.3, rel=1e-5)


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


def test_split_undoes_concatenate():
    pieces = [jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0) + 10]
    flat = [pipelines.flatten(pieces[0], ("temperature", "kl_coef")), pipelines.flatten(pieces[1], ("kl_coef",))]
    back = pipelines.split(concatenate(flat), [6, 3], [(2, 3), (3,)])
    for got, expected in zip(back, pieces, strict=True):
        np.testing.assert_array_equal(got, expected)

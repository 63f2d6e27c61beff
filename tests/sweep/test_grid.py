import itertools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.sweep.grid import Block, Grid

AXES = {"algorithm": ("ppo", "kto"), "capacity": (1, 2, 4), "temperature": (1.0, 0.5, 0.25), "kl_coef": (0.3, 1.0)}


def grid(**changes):
    settings = {"axes": AXES, "seeds": range(5), "static": ("algorithm",), "runs_per_block": 8}
    return Grid(**(settings | changes))


def points_of(whole):
    """Every run's coordinates by axis name, row by row."""
    for place in itertools.product(*map(range, whole.shape)):
        at = dict(zip(whole.dims, place, strict=True))
        yield {axis: values[at[dim]] for axis, (dim, values) in whole.coordinates().items()}


def test_axes_multiply_and_zips_share_a_dimension():
    assert grid().dims == ("algorithm", "capacity", "temperature", "kl_coef", "seed")
    assert grid().shape == (2, 3, 3, 2, 5)
    assert grid().size == 180
    zipped = grid(zips={"student": ("capacity", "temperature")})
    assert zipped.dims == ("algorithm", "student", "kl_coef", "seed")
    assert zipped.shape == (2, 3, 2, 5)
    assert zipped.coordinates()["temperature"] == ("student", [1.0, 0.5, 0.25])
    assert zipped.coordinates()["seed"] == ("seed", [0, 1, 2, 3, 4])
    pairs = {(point["capacity"], point["temperature"]) for point in points_of(zipped)}
    assert pairs == {(1, 1.0), (2, 0.5), (4, 0.25)}
    # A value may stand twice in a zip, a pair may not.
    assert Grid({"a": (1, 1), "b": (1, 2)}, [0], zips={"ab": ("a", "b")}).size == 2


@pytest.mark.parametrize("runs_per_block", [1, 2, 5, 7, 8, 36, 1000])
@pytest.mark.parametrize(
    "changes", [{}, {"per_block": {"capacity": 1}}, {"zips": {"student": ("capacity", "temperature")}}]
)
def test_blocks_tile_the_grid_once_and_carry_its_values(runs_per_block, changes):
    whole = grid(runs_per_block=runs_per_block, **changes)
    seen = np.zeros(whole.shape, int)
    points = np.empty(whole.size, object)
    points[:] = list(points_of(whole))
    points = points.reshape(whole.shape)
    for index, block in enumerate(whole.blocks()):
        assert block.index == index
        region = tuple(block.region.values())
        seen[region] += 1
        assert block.num_runs <= runs_per_block
        assert block.num_runs == seen[region].size == len(block.seeds)
        # Zarr chunks: every block begins at a multiple of the block's shape.
        for part, length in zip(region, whole.block_shape, strict=True):
            assert part.start % length == 0
            assert part.stop - part.start <= length
        if "per_block" in changes:
            assert len(set(block.axes["capacity"])) == 1
        for run, point in enumerate(points[region].ravel()):
            assert block.static["algorithm"] == point["algorithm"]
            assert block.seeds[run] == point["seed"]
            for axis, values in block.axes.items():
                assert values[run] == np.float32(point[axis])
    assert (seen == 1).all()
    assert whole.num_blocks == index + 1


def test_a_block_holds_whole_slabs_before_it_holds_seeds():
    assert grid(runs_per_block=512).block_shape == (1, 3, 3, 2, 5)
    assert grid(runs_per_block=40).block_shape == (1, 3, 3, 2, 2)
    assert grid(runs_per_block=40, per_block={"capacity": 1}).block_shape == (1, 1, 3, 2, 5)
    assert grid(runs_per_block=24, per_block={"capacity": 2}).block_shape == (1, 2, 3, 2, 2)
    assert grid(runs_per_block=512, per_block={"seed": 3}).block_shape == (1, 3, 3, 2, 3)
    assert grid(runs_per_block=4).block_shape == (1, 1, 2, 2, 1)


def test_types_that_programs_see():
    block = Grid({"a": (1, 2), "b": (1, 2.5), "c": (True, False)}, [7]).block(0)
    assert {name: str(values.dtype) for name, values in block.axes.items()} == {
        "a": "int32",
        "b": "float32",
        "c": "bool",
    }
    assert block.seeds.dtype == np.int32


def test_the_fingerprint_is_of_names_values_zips_and_seeds():
    different = [
        grid(),
        grid(axes=AXES | {"capacity": (1, 2, 3)}),
        grid(axes={("cap" if name == "capacity" else name): values for name, values in AXES.items()}),
        grid(zips={"student": ("capacity", "temperature")}),
        grid(seeds=range(1, 6)),
        grid(axes=dict(reversed(AXES.items()))),
    ]
    assert all(a.fingerprint != b.fingerprint for a, b in itertools.combinations(different, 2))
    # How it is cut into blocks, and the type that holds the values, are no part of it.
    same = grid(runs_per_block=3, per_block={"capacity": 1}, axes=AXES | {"capacity": np.array([1, 2, 4])})
    assert same.fingerprint == grid().fingerprint


def test_functions_and_classes_are_known_again_by_their_names():
    axes = {"f": (jax.nn.relu, jnp.tanh, math.sin), "kind": (Block, None)}
    named = Grid(axes, [0], static=("f", "kind"))
    assert named.described()["axes"] == {
        "f": [f"{jax.nn.relu.__module__}.relu", "jax.numpy.tanh", "math.sin"],
        "kind": ["jaxkd.sweep.grid.Block", None],
    }
    assert named.coordinates()["f"] == ("f", named.described()["axes"]["f"])
    # Programs take the values themselves.
    assert named.block(0).static == {"f": jax.nn.relu, "kind": Block}


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process():
    code = f"from jaxkd.sweep.grid import Grid; print(Grid({AXES}, range(5), static=('algorithm',)).fingerprint)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == grid().fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"static": ("algorithn",)}, "static names 'algorithn', which is no axis; the axes are algorithm, capacity"),
        ({"per_block": {"size": 2}}, "per_block names 'size', which is no axis"),
        ({"per_block": {"capacity": 0}}, r"per_block\['capacity'\] must be a whole number of at least 1, got 0"),
        ({"zips": {"z": ("capacity", "tau")}}, "zips names 'tau', which is no axis"),
        ({"zips": {"z": ("capacity", "kl_coef")}}, r"of one length, got \{'capacity': 3, 'kl_coef': 2\}"),
        ({"zips": {"z": ("capacity",)}}, "two or more axes"),
        ({"zips": {"kl_coef": ("capacity", "temperature")}}, "'kl_coef' is an axis already"),
        ({"zips": {"y": ("capacity", "temperature"), "z": ("capacity", "kl_coef")}}, "names axis 'capacity' twice"),
        ({"axes": AXES | {"capacity": (1, 2, 1)}}, "axis 'capacity' names the value 1 twice"),
        ({"axes": AXES | {"capacity": ()}}, "axis 'capacity' is empty: give at least one value"),
        ({"axes": AXES | {"kl_coef": (0.3, float("nan"))}}, "axis 'kl_coef' must hold finite numbers .* got nan"),
        ({"axes": AXES | {"kl_coef": (float("inf"),)}}, "got inf"),
        ({"axes": AXES | {"kl_coef": ("0.3",)}}, "axis 'kl_coef' must hold numbers, got '0.3'"),
        ({"axes": AXES | {"kl_coef": 0.3}}, "axis 'kl_coef' must be a sequence"),
        ({"axes": AXES | {"seed": (1,)}}, "'seed' is the name of the seeds' own axis"),
        ({"seeds": ()}, "axis 'seed' is empty"),
        ({"seeds": (1, 1)}, "axis 'seed' names the value 1 twice"),
        ({"seeds": (-1,)}, "axis 'seed' must hold whole numbers from 0"),
        ({"seeds": (0.5,)}, "axis 'seed' must hold whole numbers from 0"),
        ({"axes": AXES | {"f": (object(),)}, "static": ("algorithm", "f")},
         "axis 'f' must hold values that another process knows again, got <object object at 0x"),
        ({"axes": AXES | {"f": ([].append,)}, "static": ("algorithm", "f")},
         "axis 'f' must hold values .* got <built-in method"),
        ({"axes": AXES | {"f": (lambda x: x, lambda x: -x)}, "static": ("algorithm", "f")},
         "axis 'f' holds several values that are called .*test_grid.<lambda>: give each a name of its own"),
        ({"runs_per_block": 0}, "runs_per_block must be a whole number of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(**changes)

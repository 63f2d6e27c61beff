"""Grids of runs: named axes, multiplied or zipped, seeds apart, and the rectangles in which they are computed."""

import hashlib
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

import numpy as np

SEED = "seed"
"""The name of the seeds' own dimension, always the last one."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a grid: what one owner computes, and one Zarr chunk of every variable.

    Attributes:
      index: position among the grid's blocks, row by row.
      region: the slice along every dimension of the grid.
      static: the one value of each static axis in this block.
      axes: values of the traced axes, one a run, [runs] each; in row-major order of the region.
      seeds: the seed of every run, int32[runs].
    """

    index: int
    region: dict[str, slice]
    static: dict[str, Hashable]
    axes: dict[str, np.ndarray]
    seeds: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the region, in the grid's order of dimensions."""
        return tuple(part.stop - part.start for part in self.region.values())

    @property
    def num_runs(self) -> int:
        """Runs in the block."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Grid:
    """Named axes and seeds. Axes are multiplied, unless they are zipped into one dimension.

    A run is one point of the grid. Its key is made from its seed alone, so runs of one seed are paired over all axes.

    Attributes:
      axes: values by axis name: numbers or booleans where they are traced, anything hashable where they are static,
        told in a store by what `repr` makes of it, functions and classes by their names.
      seeds: whole numbers from 0 to 2³¹ − 1.
      zips: axes that go together, by the name of the dimension that they share.
      static: axes that shape the program; a block holds one value of each.
      per_block: most values of a dimension in a block, by its name (1 or more), for instance so that a block can have a
        padding no wider than its own capacities.
      runs_per_block: a block has at most so many runs; it is the unit of writing, of resuming and of sharing out.

    Raises:
      ValueError: on an axis without values, a value given twice or not finite, a name that is no axis, zipped axes of
        different lengths, a static value that another process would not know again.
    """

    axes: Mapping[str, Sequence]
    seeds: Sequence[int]
    zips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    static: Sequence[str] = ()
    per_block: Mapping[str, int] = field(default_factory=dict)
    runs_per_block: int = 512

    def __post_init__(self):
        for name, value in (
            ("axes", {axis: _plain(axis, values) for axis, values in self.axes.items()}),
            ("seeds", _plain(SEED, self.seeds)),
            ("zips", {dim: tuple(names) for dim, names in self.zips.items()}),
            ("static", tuple(self.static)),
            ("per_block", dict(self.per_block)),
        ):
            object.__setattr__(self, name, value)
        self._check_names()
        self._check_values()

    def _check_names(self) -> None:
        zipped = [axis for names in self.zips.values() for axis in names]
        _known("zips", zipped, self.axes)
        _known("static", self.static, self.axes)
        _known("per_block", self.per_block, self.dims)
        if SEED in (*self.axes, *self.zips):
            raise ValueError(f"{SEED!r} is the name of the seeds' own axis: name the axis otherwise")
        if twice := [axis for axis in zipped if zipped.count(axis) > 1]:
            raise ValueError(f"zips names axis {twice[0]!r} twice: an axis lies along one dimension")
        if taken := [dim for dim in self.zips if dim in self.axes]:
            raise ValueError(f"zips: {taken[0]!r} is an axis already, give the shared dimension another name")
        for dim, names in self.zips.items():
            lengths = {axis: len(self.axes[axis]) for axis in names}
            if len(names) < 2 or len(set(lengths.values())) > 1:
                raise ValueError(f"zips: {dim!r} needs two or more axes of one length, got {lengths}")

    def _check_values(self) -> None:
        for axis, values in self.axes.items():
            if len(values) == 0:
                raise ValueError(f"axis {axis!r} is empty: give at least one value")
            if axis not in self.static:
                for value in values:
                    _check_traced(axis, value)
            else:
                _check_static(axis, values)
        if len(self.seeds) == 0:
            raise ValueError(f"axis {SEED!r} is empty: give at least one seed")
        for seed in self.seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
                raise ValueError(f"axis {SEED!r} must hold whole numbers from 0 to {2**31 - 1}, got {seed!r}")
        for dim, names in self._axes_by_dim().items():
            columns = [self.axes[axis] for axis in names] if dim != SEED else [self.seeds]
            points = list(zip(*columns, strict=True))
            if len(set(points)) != len(points):
                twice = next(point for point in points if points.count(point) > 1)
                shown = twice[0] if len(twice) == 1 else twice
                raise ValueError(f"axis {dim!r} names the value {shown!r} twice: every value may stand once")
        for dim, count in self.per_block.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"per_block[{dim!r}] must be a whole number of at least 1, got {count!r}")
        if not isinstance(self.runs_per_block, int) or self.runs_per_block < 1:
            raise ValueError(f"runs_per_block must be a whole number of at least 1, got {self.runs_per_block!r}")

    def _axes_by_dim(self) -> dict[str, tuple[str, ...]]:
        owner = {axis: dim for dim, names in self.zips.items() for axis in names}
        found: dict[str, tuple[str, ...]] = {}
        for axis in self.axes:
            dim = owner.get(axis, axis)
            found[dim] = (*found.get(dim, ()), axis)
        return {**found, SEED: ()}

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions, in the order of the axes; the seeds' is the last."""
        return tuple(self._axes_by_dim())

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dimensions."""
        own = [len(self.axes[names[0]]) for dim, names in self._axes_by_dim().items() if dim != SEED]
        return (*own, len(self.seeds))

    @property
    def size(self) -> int:
        """Number of runs."""
        return math.prod(self.shape)

    @property
    def fingerprint(self) -> str:
        """Hash of names, values, zips and seeds: the same in every process and Python."""
        told = json.dumps(self.described(), sort_keys=False)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def described(self) -> dict:
        """The grid as plain JSON: what its fingerprint hashes and a store keeps."""
        plain = {axis: [_json(value) for value in values] for axis, values in self.axes.items()}
        first, last = self.seeds[0], self.seeds[-1]
        seeds = f"{first} to {last}" if self.seeds == tuple(range(first, last + 1)) else [*self.seeds]
        return {"axes": plain, "zips": {dim: list(names) for dim, names in self.zips.items()}, "seeds": seeds}

    def coordinates(self) -> dict[str, tuple[str, list]]:
        """Values along each dimension, by name: (dimension, values). Zipped axes share one dimension."""
        found = {
            axis: (dim, [_named(value) or value for value in self.axes[axis]])
            for dim, names in self._axes_by_dim().items()
            for axis in names
        }
        return {**found, SEED: (SEED, list(self.seeds))}

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """What programs see of the traced axes and the seeds."""
        traced = {axis: as_array(values) for axis, values in self.axes.items() if axis not in self.static}
        return {**traced, SEED: np.asarray(self.seeds, np.int32)}

    @cached_property
    def block_shape(self) -> tuple[int, ...]:
        """Lengths of a block: 1 along static dimensions, else as much as fits, the last dimensions first."""
        by_dim = self._axes_by_dim()
        most = {**self.per_block, **{dim: 1 for dim, names in by_dim.items() if set(names) & set(self.static)}}
        room, lengths = self.runs_per_block, []
        # The seeds come last: a block holds whole slabs of the other dimensions where they fit.
        lengths_of = dict(zip(self.dims, self.shape, strict=True))
        for dim in (*self.dims[-2::-1], SEED):
            lengths.append(max(1, min(lengths_of[dim], most.get(dim, room), room)))
            room //= lengths[-1]
        return (*lengths[-2::-1], lengths[-1])

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Number of blocks along each dimension."""
        return tuple(-(-length // part) for length, part in zip(self.shape, self.block_shape, strict=True))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.blocks_shape)

    def block(self, index: int) -> Block:
        """The block at a position, with the values of its runs."""
        places = np.unravel_index(index, self.blocks_shape)
        region = {
            dim: slice(int(place) * part, min((int(place) + 1) * part, length))
            for dim, place, part, length in zip(self.dims, places, self.block_shape, self.shape, strict=True)
        }
        static, traced = {}, {}
        lengths = [part.stop - part.start for part in region.values()]
        for position, (dim, names) in enumerate(self._axes_by_dim().items()):
            for axis in names:
                values = self.axes[axis][region[dim]]
                if axis in self.static:
                    static[axis] = values[0]
                else:
                    traced[axis] = _spread(self._arrays[axis][region[dim]], position, lengths)
        seeds = _spread(self._arrays[SEED][region[SEED]], len(lengths) - 1, lengths)
        return Block(int(index), region, static, traced, seeds)

    def blocks(self) -> Iterator[Block]:
        """All blocks, row by row; they tile the grid and depend on nothing but the grid."""
        return (self.block(index) for index in range(self.num_blocks))


def as_array(values: Sequence) -> np.ndarray:
    """Values of an axis as the array that programs see: bool, int32 or float32."""
    if all(isinstance(value, bool) for value in values):
        return np.asarray(values, bool)
    if all(isinstance(value, int) for value in values):
        return np.asarray(values, np.int32)
    return np.asarray(values, np.float32)


def _plain(axis: str, values: Sequence) -> tuple:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray | range):
        raise ValueError(f"axis {axis!r} must be a sequence of values, got {values!r}")
    return tuple(value.item() if isinstance(value, np.generic) else value for value in values)


def _known(where: str, names: Sequence[str], allowed) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(f"{where} names {name!r}, which is no axis; the axes are {', '.join(allowed)}")


def _check_traced(axis: str, value) -> None:
    if not isinstance(value, bool | int | float):
        raise ValueError(
            f"axis {axis!r} must hold numbers, got {value!r}; name it in `static` if it shapes the program"
        )
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) >= 2**31):
        raise ValueError(f"axis {axis!r} must hold finite numbers that fit 32 bits, got {value!r}")


def _check_static(axis: str, values: Sequence) -> None:
    told = [_json(value) for value in values]
    for value, one in zip(values, told, strict=True):
        if " at 0x" in str(one):
            raise ValueError(
                f"axis {axis!r} must hold values that another process knows again, got {value!r}: give it a `repr` "
                "without an address, or put names on the axis and look the values up in the function"
            )
        if told.count(one) > 1 and values.count(value) == 1:
            raise ValueError(f"axis {axis!r} holds several values that are called {one}: give each a name of its own")


def _spread(values: np.ndarray, position: int, lengths: Sequence[int]) -> np.ndarray:
    """One value a run from one value a place along a dimension; [runs]."""
    shape = [1] * len(lengths)
    shape[position] = len(values)
    return np.broadcast_to(values.reshape(shape), lengths).ravel()


def _json(value):
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return _named(value) or repr(value)


def _named(value) -> str | None:
    """Name of a function or class, by which another process knows it again; None of anything else."""
    # A method of an object is more than its name.
    is_bound = not isinstance(getattr(value, "__self__", None), ModuleType | None)
    has_name = callable(value) and hasattr(value, "__qualname__") and not is_bound
    return f"{value.__module__}.{value.__qualname__}" if has_name else None

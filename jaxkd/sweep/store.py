"""Labelled results on disk: one Zarr store a sweep, opened by `xarray.open_zarr`.

`write` writes a finished data set at once. `Store` is made before anything is computed and takes block after block; its
ledger `done` says which are there, so that a sweep killed at any moment goes on where it was.
"""

import json
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
import zarr

from jaxkd import __version__, checks, files
from jaxkd.sweep import trace
from jaxkd.sweep.grid import SEED, Block, Grid

STORE_VERSION = 1
LEDGER = "done"
"""The variable that says which blocks are finished: 1 each, written after the block's data."""

FUNCTION = "function"
"""The attribute that tells `trace.digest` of what was run; stores of before have none."""

_BLOCK = "block"
_SHARED = "shared arrays"


def provenance(configuration: dict) -> dict[str, str]:
    """Attributes of a store: resolved configuration, versions, device and git commit (where there is one)."""
    packages = {name: version(name) for name in ("jax", "optax", "numpy", "xarray", "zarr")}
    return {
        "jaxkd_store_version": str(STORE_VERSION),
        "configuration": json.dumps(configuration, sort_keys=True, default=str),
        "versions": json.dumps({"jaxkd": __version__, "python": platform.python_version(), **packages}),
        "device": f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}",
        "git_commit": _git_commit(),
    }


def versions(attributes: Mapping) -> dict[str, str | None]:
    """The versions that change numbers, our own and that of jax, as a store's attributes tell them."""
    found = json.loads(attributes["versions"])
    return {f"version of {name}": found.get(name) for name in ("jaxkd", "jax")}


def _git_commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "none"
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return head.stdout.strip() or "none"


def write(dataset: xr.Dataset, path: Path, configuration: dict, *, overwrite: bool = False) -> None:
    """Write a data set with its configuration, whole or not at all: it appears under its name only when complete.

    Args:
      dataset: labelled results.
      path: folder of the store.
      configuration: what the results depend on; must be plain JSON.
      overwrite: replace a store that is there already.

    Raises:
      FileExistsError: when something is at `path` and it may not be overwritten.
    """
    checks.folder("--out", path)
    if not overwrite:
        check_free(path, configuration)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr 3 that xarray writes and reads; without it opening warns.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        dataset.assign_attrs(provenance(configuration)).to_zarr(partial, mode="w", zarr_format=3, consolidated=True)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def check_free(path: Path, configuration: dict) -> None:
    """Make sure that no store would be replaced; say how the one that is there differs.

    Raises:
      FileExistsError: when something is at `path`.
      ValueError: when it is a bucket.
    """
    checks.folder("--out", path)
    if not path.exists():
        return
    try:
        held = json.loads(xr.open_zarr(path).attrs["configuration"])
    except Exception:
        raise FileExistsError(f"{path} exists and is no store of jaxkd: choose another --out") from None
    wanted = json.loads(json.dumps(configuration, default=str))
    differing = files.differences(held, wanted)
    told = f"another configuration ({'; '.join(differing)})" if differing else "this very configuration"
    raise FileExistsError(f"{path} holds results of {told}: choose another --out, or give --overwrite to replace them")


@dataclass(frozen=True)
class Label:
    """What a variable or a coordinate means.

    Attributes:
      long_name: in words.
      units: "1" where there is none.
      dims: names of a variable's own dimensions, those beyond the grid's.
    """

    long_name: str = ""
    units: str = "1"
    dims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """What a store will hold, known before anything is computed.

    Attributes:
      grid: whose dimensions lead every variable.
      variables: shape of one run's value and its type, by name.
      labels: of variables and coordinates, by name.
      coordinates: values along the variables' own dimensions.
      function: digest of the function that makes them, to be compared when a sweep goes on.
      shared: pytrees of arrays that all runs share; kept beside the results, to be compared likewise.

    Raises:
      ValueError: when a label names as many dimensions as its variable has not, when two variables disagree about the
        length of a dimension, or when a name is taken.
    """

    grid: Grid
    variables: Mapping[str, jax.ShapeDtypeStruct]
    labels: Mapping[str, Label] = field(default_factory=dict)
    coordinates: Mapping[str, Sequence] = field(default_factory=dict)
    function: str = ""
    shared: Any = ()

    def __post_init__(self):
        of_grid = {*self.grid.dims, *self.grid.axes}
        if clash := sorted({LEDGER, _BLOCK} & {*of_grid, *self.coordinates}):
            raise ValueError(f"axis {clash[0]!r} bears a name that is the ledger's: name it otherwise")
        if clash := sorted(of_grid & {*self.coordinates}):
            raise ValueError(f"coordinates names {clash[0]!r}, which is an axis of the grid: name it otherwise")
        taken = {*of_grid, *self.coordinates, LEDGER, _BLOCK, _SHARED}
        if clash := sorted(taken & set(self.variables)):
            raise ValueError(f"variable {clash[0]!r} bears the name of an axis or of the ledger: name it otherwise")
        known = {**self.variables, **self.grid.coordinates(), **self.coordinates}
        if strange := sorted(set(self.labels) - set(known)):
            raise ValueError(f"labels names {strange[0]!r}; the variables are {', '.join(self.variables)}")
        lengths = {name: len(values) for name, values in self.coordinates.items()}
        for name, variable in self.variables.items():
            for dim, length in zip(self.own_dims(name), variable.shape, strict=True):
                if dim in {*of_grid, LEDGER, _BLOCK}:
                    raise ValueError(f"variable {name!r} has a dimension of its own named {dim!r}, which is taken")
                if lengths.setdefault(dim, length) != length:
                    raise ValueError(
                        f"variable {name!r} is {length} long along {dim!r}, which has {lengths[dim]} places"
                    )

    def own_dims(self, name: str) -> tuple[str, ...]:
        """Names of a variable's dimensions beyond the grid's."""
        rank = len(self.variables[name].shape)
        dims = self.labels[name].dims if name in self.labels else tuple(f"{name}_dim_{i}" for i in range(rank))
        if len(dims) != rank:
            raise ValueError(f"variable {name!r} has {rank} dimensions of its own, its label names {list(dims)}")
        return dims

    def attributes(self, name: str) -> dict[str, str]:
        """Long name and units."""
        label = self.labels.get(name, Label())
        return {"long_name": label.long_name or name.replace("_", " "), "units": label.units}

    def described(self) -> dict:
        """The template as plain JSON, to be compared with a store's."""
        return {
            name: f"{np.dtype(variable.dtype)}{[*zip(self.own_dims(name), variable.shape, strict=True)]}"
            for name, variable in sorted(self.variables.items())
        }


class Store:
    """An open store of a sweep: whole blocks in, and which of them are there."""

    def __init__(self, path: Path):
        """Open a store that `create` made; raises OSError where there is none."""
        self.path = path
        self._group = zarr.open_group(path, mode="r+", use_consolidated=False)

    @property
    def chunk(self) -> int:
        """Runs that a device computes at a time, as they were measured or asked for when the store was made."""
        return int(self._group.attrs["chunk"])

    @property
    def devices(self) -> str:
        """Number and kind of the devices that a process used when the store was made."""
        # Stores of before told those that were there.
        return str(self._group.attrs.get("devices", self._group.attrs["device"]))

    def done(self) -> np.ndarray:
        """Which blocks are finished; bool[blocks]."""
        return np.asarray(self._group[LEDGER][:], bool)

    def write_block(self, block: Block, values: Mapping[str, np.ndarray]) -> None:
        """Write a block's values, runs leading, and then its entry of the ledger.

        Raises:
          ValueError: when the variables are not those of the template.
          OSError: when the disk is full or the folder cannot be written; earlier blocks stay as they are.
        """
        region = tuple(block.region.values())
        wanted = json.loads(self._group.attrs["configuration"])["variables"]
        if {*wanted} != {*values}:
            raise ValueError(
                f"block {block.index} has the variables {', '.join(sorted(values))}, the store "
                f"{', '.join(sorted(wanted))}: they may not depend on the block's settings"
            )
        for name, array in values.items():
            expected = self._group[name].shape[len(region) :] if name in self._group else None
            if expected != array.shape[1:] or len(array) != block.num_runs:
                raise ValueError(
                    f"variable {name!r} has shape {array.shape} in block {block.index}, the store expects "
                    f"{expected and (block.num_runs, *expected)}: it may not depend on the block's settings"
                )
        try:
            for name, array in values.items():
                self._group[name][region] = array.reshape(*block.shape, *array.shape[1:])
            self._group[LEDGER][block.index] = 1
        except OSError as error:
            raise OSError(
                f"cannot write block {block.index} to {self.path}: {error.strerror or error}; what was finished stays "
                "readable, and the same command goes on from there once there is room"
            ) from error


def create(
    path: Path, template: Template, configuration: Mapping, *, chunk: int, devices: str, overwrite: bool = False
) -> Store:
    """Make an empty store, whole or not at all: dimensions, coordinates, labels and provenance.

    Args:
      path: its folder.
      template: what it will hold.
      configuration: what the results depend on beside the grid; plain JSON.
      chunk: runs that a device computes at a time, kept for when the sweep goes on.
      devices: number and kind of the devices that a process uses, kept likewise.
      overwrite: replace the store that is there; nothing but a store of jaxkd is ever replaced.

    Raises:
      FileExistsError: when something is at `path` that may not be replaced.
      OSError: when the folder cannot be written.
    """
    check_replaceable(path, overwrite)
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    attributes = {**provenance(_resolved(template, configuration)), "chunk": chunk, "devices": devices}
    attributes[FUNCTION] = template.function
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        _build(partial, template, attributes)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except OSError as error:
        raise OSError(f"cannot make the store {path}: {error.strerror or error}; choose another --out") from error
    shutil.rmtree(old, ignore_errors=True)
    return Store(path)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Make sure that a store can be made at `path`; nothing but a store of jaxkd is ever replaced.

    Raises:
      FileExistsError: when something is there that may not be replaced.
    """
    if path.exists() and not (overwrite and _is_store(path)):
        raise FileExistsError(f"{path} exists and {_no_store(path)}: choose another --out")


def check_writable(path: Path) -> None:
    """Make sure that a store can be made or gone on with at `path`, before anything is computed.

    Raises:
      OSError: when the folder cannot be written.
      ValueError: when it is a bucket.
    """
    checks.folder("--out", path)
    folder = path if path.exists() else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error


def resume(path: Path, template: Template, configuration: Mapping) -> Store | None:
    """Open the store at `path` to go on with it; None when nothing is there.

    Raises:
      FileExistsError: when it holds another sweep, was made by another version, or is no store.
    """
    if not path.exists():
        return None
    if not _is_store(path):
        raise FileExistsError(f"{path} exists and {_no_store(path)}: choose another --out")
    attributes = _attributes(path)
    found = json.loads(attributes["configuration"])
    wanted = json.loads(json.dumps(_resolved(template, configuration), default=str))
    by, here = versions(attributes), versions(provenance({}))
    differing = _differences(
        {"jaxkd_store_version": attributes["jaxkd_store_version"], **by, **found},
        {"jaxkd_store_version": str(STORE_VERSION), **here, **wanted},
    )
    # Another jax traces the same function otherwise.
    if by == here and attributes.get(FUNCTION, template.function) != template.function:
        differing.append("the function has changed")
    if differing := differing + _differing_shared(path, template.shared):
        raise FileExistsError(f"{path} holds another sweep ({'; '.join(differing)}): {_advice(path, differing)}")
    return Store(path)


def _advice(path: Path, differing: Sequence[str]) -> str:
    """What to do about a store of another sweep; nothing that was computed is thrown away but by --overwrite."""
    anew = "choose another --out, or give --overwrite to throw away what is there"
    if not all(one.startswith("version of ") for one in differing):
        return anew
    if Store(path).done().all():
        use = "it is finished: open it (xarray.open_zarr) or draw it (experiments/replot.py)"
        return f"{use}; to compute it anew, {anew}"
    held = json.loads(_attributes(path)["versions"])
    return f"to finish it install jaxkd {held.get('jaxkd')} with jax {held.get('jax')}; else {anew}"


def join(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Stores of one sweep over different seeds as one data set: `xarray.concat` along the seeds, ledgers in a row.

    Args:
      datasets: opened stores, in the order of their seeds.

    Raises:
      ValueError: when they differ in anything but their seeds, or share one.
    """
    configurations = [json.loads(dataset.attrs["configuration"]) for dataset in datasets]
    by_versions = [versions(dataset.attrs) for dataset in datasets]
    own = ("axis seed", "grid fingerprint", "block shape")
    first, *others = (
        {key: value for key, value in one.items() if key not in own} | by
        for one, by in zip(configurations, by_versions, strict=True)
    )
    differing = [told for other in others for told in files.differences(first, other)]
    if len({dataset.attrs[FUNCTION] for dataset in datasets if FUNCTION in dataset.attrs}) > 1:
        differing.append("other functions")
    if differing:
        raise ValueError(f"these are stores of different sweeps: {'; '.join(differing)}")
    joined = xr.concat([dataset.drop_vars(LEDGER) for dataset in datasets], SEED, combine_attrs="override")
    if not joined.indexes[SEED].is_unique:
        raise ValueError(f"the stores share seeds: {', '.join(str(one['axis seed']) for one in configurations)}")
    seeds = {"axis seed": [one["axis seed"] for one in configurations]}
    joined.attrs["configuration"] = json.dumps(configurations[0] | seeds, sort_keys=True)
    # Joined seeds fall on other boundaries than the stores' chunks.
    for name in joined.variables:
        joined[name].encoding.pop("chunks", None)
    return joined.assign({LEDGER: xr.concat([dataset[LEDGER] for dataset in datasets], _BLOCK)})


def _resolved(template: Template, configuration: Mapping) -> dict:
    """Everything that results depend on, flat, so that a difference can be named."""
    grid = template.grid.described()
    axes = {f"axis {name}": values for name, values in grid["axes"].items()}
    return {
        **configuration,
        **axes,
        "axis seed": grid["seeds"],
        "zips": grid["zips"],
        "block shape": [*template.grid.block_shape],
        "variables": template.described(),
        "grid fingerprint": template.grid.fingerprint,
    }


def _build(path: Path, template: Template, attributes: Mapping) -> None:
    """Write the metadata of every array and the values of the coordinates."""
    grid = template.grid
    coordinates = {name: (dim, _column(values)) for name, (dim, values) in grid.coordinates().items()}
    coordinates |= {name: (name, _column(values)) for name, values in template.coordinates.items()}
    labelled = xr.Dataset(coords=coordinates)
    for name in labelled.coords:
        labelled[name].attrs = template.attributes(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        labelled.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
        group = zarr.open_group(path, mode="r+")
        for name, variable in template.variables.items():
            own = template.own_dims(name)
            group.create_array(
                name,
                shape=(*grid.shape, *variable.shape),
                chunks=(*grid.block_shape, *(max(length, 1) for length in variable.shape)),
                dtype=np.dtype(variable.dtype),
                fill_value=_fill(variable.dtype),
                dimension_names=(*grid.dims, *own),
                attributes=template.attributes(name),
            )
        group.create_array(
            LEDGER,
            shape=(grid.num_blocks,),
            chunks=(1,),
            dtype=np.int8,
            fill_value=0,
            dimension_names=(_BLOCK,),
            attributes={"long_name": "whether a block of runs is finished", "units": "1"},
        )
        held = group.create_group(_SHARED)
        for number, (name, array) in enumerate(_shared_arrays(template.shared)):
            held.create_array(str(number), data=array, attributes={"name": name})
        group.attrs.update(attributes)
        zarr.consolidate_metadata(group.store)


def _shared_arrays(shared: Any) -> list[tuple[str, np.ndarray]]:
    """What all runs share, each with its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(shared)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), trace.as_numpy(leaf)) for path, leaf in leaves]


def _differing_shared(path: Path, shared: Any) -> list[str]:
    """Shared arrays that are others than those which a store was begun with, beyond rounding.

    Arrays that jax made differ in their last bits from one kind of device to another, where a sweep may go on.
    """
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    if _SHARED not in group:
        return []  # stores of before
    held = {array.attrs["name"]: np.asarray(array[...]) for _, array in group[_SHARED].arrays()}
    wanted = dict(_shared_arrays(shared))
    return [
        f"shared array {name}: {'other values' if name in held and name in wanted else 'only there or only now'}"
        for name in sorted({*held, *wanted})
        if name not in held or name not in wanted or not _same(held[name], wanted[name])
    ]


def _same(held: np.ndarray, wanted: np.ndarray) -> bool:
    if held.shape != wanted.shape or held.dtype != wanted.dtype:
        return False
    if not np.issubdtype(held.dtype, np.inexact):
        return np.array_equal(held, wanted)
    largest = np.abs(held[np.isfinite(held)]).max(initial=0)
    return np.allclose(held, wanted, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)


_ROUNDING = 1e-5


def _column(values: Sequence) -> np.ndarray:
    """Values of a coordinate; strings as the type that Zarr 3 has a name for."""
    if any(isinstance(value, str) for value in values):
        return np.asarray([str(value) for value in values], dtype=np.dtypes.StringDType())
    column = np.asarray(values)
    return column if column.dtype != object else _column([str(value) for value in values])


def _fill(dtype):
    """What stands where nothing was computed yet: NaN, or zero where a type has none."""
    return np.nan if np.issubdtype(dtype, np.floating) else np.zeros((), dtype).item()


def _attributes(path: Path) -> dict:
    return dict(zarr.open_group(path, mode="r").attrs)


def _is_store(path: Path) -> bool:
    try:
        return {"jaxkd_store_version", "configuration"} <= set(_attributes(path))
    except Exception:
        return False


def _no_store(path: Path) -> str:
    return "is a store already" if _is_store(path) else "is no store of jaxkd"


def _differences(held: Mapping, wanted: Mapping) -> list[str]:
    told = files.differences(held, wanted)
    # The fingerprint alone says nothing: it is named only when nothing else is.
    return [one for one in told if not one.startswith("grid fingerprint:")] or told

"""Labelled results on disk: one Zarr store a sweep, opened by `xarray.open_zarr`."""

import json
import platform
import shutil
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path

import jax
import xarray as xr

from jaxkd import __version__

STORE_VERSION = 1


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
    """
    if not path.exists():
        return
    try:
        held = json.loads(xr.open_zarr(path).attrs["configuration"])
    except Exception:
        raise FileExistsError(f"{path} exists and is no store of jaxkd: choose another --out") from None
    wanted = json.loads(json.dumps(configuration, default=str))
    differing = [
        f"{key}: {held.get(key)} there, {wanted.get(key)} now"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]
    told = f"another configuration ({'; '.join(differing)})" if differing else "this very configuration"
    raise FileExistsError(f"{path} holds results of {told}: give --overwrite to replace it, or another --out")

"""Draw the figures of a finished sweep again, and print its table, from its store alone.

STORE is the folder that `experiments/phase_diagram.py` or `experiments/mog_order.py` wrote (their --out).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Config:
    """What to draw."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished sweep, or the store in it."""
    out: Path | None = None
    """Folder for figures and tables; by default beside the store."""


def main(config: Config) -> None:
    """Open, draw and print."""
    import mog_order
    import xarray as xr

    from jaxkd import phase_report

    folder = config.store.parent if config.store.suffix == ".zarr" else config.store
    paths = {name: folder / f"{name}.zarr" for name in ("sweep", "more_weights")}
    stores = {name: path for name, path in paths.items() if path.exists()}
    order = folder / "mog_order.zarr"
    if "sweep" not in stores and not order.exists():
        raise ValueError(f"STORE must be a folder that holds sweep.zarr or mog_order.zarr; got {config.store}")
    out = config.out or folder
    out.mkdir(parents=True, exist_ok=True)
    if "sweep" in stores:
        print(phase_report.report({name: xr.open_zarr(path) for name, path in stores.items()}, out))
    else:
        print(mog_order.report(xr.open_zarr(order), out))


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        main(tyro.cli(Config, description=__doc__))

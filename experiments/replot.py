"""Draw the figures of a finished sweep again, from its store alone.

STORE is the folder that `experiments/phase_diagram.py` wrote (with --out, or runs/PRESET).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Config:
    """What to draw."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished sweep, or the sweep.zarr in it."""
    out: Path | None = None
    """Folder for figures and tables; by default beside the store."""


def main(config: Config) -> None:
    """Open, draw and print."""
    import xarray as xr

    from jaxkd import phase_report

    folder = config.store.parent if config.store.suffix == ".zarr" else config.store
    paths = {name: folder / f"{name}.zarr" for name in ("sweep", "more_weights")}
    stores = {name: path for name, path in paths.items() if path.exists()}
    if "sweep" not in stores:
        raise ValueError(f"STORE must be a folder that holds sweep.zarr; got {config.store}")
    out = config.out or folder
    out.mkdir(parents=True, exist_ok=True)
    print(phase_report.report({name: xr.open_zarr(path) for name, path in stores.items()}, out))


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        main(tyro.cli(Config, description=__doc__))

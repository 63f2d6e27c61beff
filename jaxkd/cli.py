"""What scripts share: flags of how a language model is computed, and errors as one message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxkd import checks
from jaxkd.device_memory import DeviceMemoryError, is_out_of_memory

if TYPE_CHECKING:
    from jaxkd.smollm2.network import Layout


@dataclass(frozen=True)
class Training:
    """How a language model is trained, and where its metrics go."""

    dtype: str = "float32"
    """Number format of products: float32 or bfloat16."""
    tensor_parallel: int = 1
    """Devices that share one model's heads, MLP and vocabulary; it must divide the devices and the heads of keys. Over
    what is left of the devices sequences are spread and parameters cut."""
    remat: str = "products"
    """What training computes again rather than keep: none, products (all but the products with weights) or layers (all
    but each layer's input: the most time and the least memory, for long texts)."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics go to as well."""
    tensorboard: bool = False
    """Write TensorBoard files as well."""

    def __post_init__(self):
        checks.name("--dtype", self.dtype, ["float32", "bfloat16"])
        checks.whole("--tensor-parallel", self.tensor_parallel, least=1)
        checks.name("--remat", self.remat, ["none", "products", "layers"])

    def layout(self) -> "Layout":
        """The same over the devices that are there.

        Raises:
          ValueError: where --tensor-parallel does not divide them.
        """
        from jaxkd.smollm2 import sharding
        from jaxkd.smollm2.network import Layout

        return Layout(self.dtype, self.remat, sharding.mesh_of_all_devices(self.tensor_parallel))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print what a user can mend (an argument, a file, memory, a divergence) as one message, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, DeviceMemoryError) as error:
        _exit(error)
    except MemoryError as error:
        told = f" ({error})" if str(error) else ""
        _exit(f"out of the host's memory: give a smaller model, batch or chunk, or fewer samples{told}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # A message of jax's own names an allocator, not a flag.
        _exit(f"out of device memory: give a smaller batch or chunk ({str(error).splitlines()[0]})")


def _exit(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

"""What scripts share: flags of how a language model is computed, and errors as one message."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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


HUGE_PAGES = "glibc.malloc.hugetlb"
_TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Begin a script anew, in the same process, with memory in huge pages; call it before anything is done.

    On CPUs a program's memory is allocated at every call. In pages of 4 KiB their faults take a language model's
    training step a tenth to a sixth of its time, and sampling about a fifth. The C library asks for huge ones where it
    is told so when it starts: by GLIBC_TUNABLES, which is left alone where it speaks of them already.

    Does nothing where that C library is not the GNU one, or the kernel doesn't give huge pages to who asks for them.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # A script that another program runs inside itself, such as a notebook, would end that.
    began_here = sys.argv[0] in sys.orig_argv
    if not began_here or HUGE_PAGES in tunables or not _huge_pages_are_to_be_asked_for():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{HUGE_PAGES}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _huge_pages_are_to_be_asked_for() -> bool:
    """Whether the kernel gives huge pages to who asks for them, and the C library can: none would know without it."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        return "[madvise]" in _TRANSPARENT_HUGE_PAGES.read_text()
    except OSError:
        return False


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

"""What all scripts share: errors as one message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jaxkd.device_memory import DeviceMemoryError, is_out_of_memory


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

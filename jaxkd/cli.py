"""What all scripts share: errors as one message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceMemoryError(MemoryError):
    """A device's memory did not suffice, and the message says what to do about it."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice."""
    import jax  # here, since scripts show their help without it

    # What runs behind the host's back is told as INTERNAL, with the cause in the text.
    told = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and ("resource_exhausted" in told or "out of memory" in told)


def _exit(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

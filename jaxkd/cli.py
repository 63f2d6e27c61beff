"""What all scripts share: errors as one message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print what a user can mend (an argument, a file, a full disk, a divergence) as one message, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""What all scripts share: errors as one message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a bad argument, a refused file or a full disk as one message without a traceback, and exit with 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

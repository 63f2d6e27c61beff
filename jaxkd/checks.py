"""Checks of plain arguments, before any computation: what was given, what is allowed, and where."""

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path


def number(flag: str, value: float, *, least=None, above=None, most=None, below=None) -> None:
    """Raise ValueError unless the value is finite and within its bounds."""
    bounds = []
    fits = isinstance(value, Real) and math.isfinite(value)
    for bound, holds, words in (
        (least, lambda b: value >= b, "at least"),
        (above, lambda b: value > b, "above"),
        (most, lambda b: value <= b, "at most"),
        (below, lambda b: value < b, "below"),
    ):
        if bound is not None:
            bounds.append(f"{words} {bound:g}")
            fits = fits and holds(bound)
    if not fits:
        raise ValueError(f"{flag} must be a finite number {' and '.join(bounds)}; got {value}")


def whole(flag: str, value: int, *, least: int, most: int | None = None) -> None:
    """Raise ValueError unless the value is a whole number within its bounds."""
    if not isinstance(value, Integral) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{flag} must be a whole number of at least {least}{upper}; got {value}")


def wholes(flag: str, values: Sequence[int], *, least: int, most: int | None = None) -> None:
    """Raise ValueError unless there are values, all different and each a whole number within its bounds."""
    no_repeats(flag, values)
    for value in values:
        whole(flag, value, least=least, most=most)


def numbers(flag: str, values: Sequence[float], **bounds) -> None:
    """Raise ValueError unless there are values, all different and each within its bounds."""
    no_repeats(flag, values)
    for value in values:
        number(flag, value, **bounds)


def name(flag: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{flag} must be one of {', '.join(allowed)}; got {value!r}")


def names(flag: str, values: Sequence[str], allowed: Iterable[str]) -> None:
    """Raise ValueError unless there are values, all different and each one of those allowed."""
    no_repeats(flag, values)
    for value in values:
        name(flag, value, allowed)


def no_repeats(flag: str, values: Sequence) -> None:
    """Raise ValueError unless there are values, all different."""
    if len(values) == 0:
        raise ValueError(f"{flag} must name at least one value; got none")
    if len(set(values)) != len(values):
        raise ValueError(f"{flag} names a value twice: {list(values)}")


def folder(flag: str, path: Path | str) -> None:
    """Raise ValueError where a path is that of a bucket: a local folder would bear its name.

    A bucket that is mounted is no way out: what is written here takes its name by renaming a file or folder, which
    such mounts refuse.
    """
    # A Path has lost one of the two slashes.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{flag} must be a folder, got {path}: buckets are not supported, nor mounts of them (gcsfuse, "
            "mountpoint-s3); give a folder of a file system that renames folders (a disk; for several hosts NFS, "
            "Filestore, EFS or Lustre) and copy what is finished"
        )

"""Files that are written whole or not at all, claims that processes have on them, and settings that differ."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL = ".partial"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name to write to, in a folder that is there; the file takes its own name when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    partial.replace(path)


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes from what is at a path for as long as the block lasts.

    A killed process keeps nothing where the file system has flock. Elsewhere the claim is the file itself (filelock
    warns of it): one that was killed on another host keeps it until `claim_of` is deleted.

    Args:
      path: a file or folder, there or not; its claim is a file beside it.
      wait: until another's claim ends.

    Yields:
      Whether the claim is this process's own; always where it waits.

    Raises:
      OSError: when the file system takes no claim.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(claim_of(path))
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise OSError(f"cannot lock {claim_of(path)}: {why}; choose an --out on a file system with locks") from error
    try:
        yield True
    finally:
        lock.release()


def claim_of(path: Path) -> Path:
    """The file that is locked while a process has a claim on a path; it may stay when none has."""
    return path.with_name(f".{path.name}.lock")


def claimed(path: Path) -> str:
    """What to do about a path that another process has a claim on, for a message."""
    return (
        f"wait until it ends, or choose another --out; if it was killed on another host, whose claim may stay where "
        f"the file system has no flock, delete {claim_of(path)}"
    )


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a folder was begun with and what is asked for now, wherever they differ."""
    return [
        f"{key}: {_short(held.get(key))} there, {_short(wanted.get(key))} now"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]


def _short(value: Any) -> str:
    told = str(value)
    return told if len(told) <= 80 else f"{told[:77]}…"
